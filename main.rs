//! The command line: compose and report.

#[path = "main/commands.rs"]
mod commands;
#[path = "main/failure.rs"]
mod failure;
#[path = "main/picture.rs"]
mod picture;
#[path = "main/show.rs"]
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Trains reasoning language models with reinforcement learning; the long tail of each rollout pays for its own speed-up.
///
/// A run is declared in a workflow file (see workflows/quickstart.ron) and lives in a folder. It can be stopped at any
/// moment, with Ctrl-C or kill -9, and goes on where it stopped with the same command.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a workflow file, or go on with its run.
    Run {
        /// The workflow, for instance workflows/quickstart.ron.
        file: PathBuf,
        /// Folder of the run. Default: runs/NAME, by the workflow's name.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Remove what an earlier run of this workflow left in the folder, and begin anew.
        #[arg(long)]
        fresh: bool,
    },
    /// Go on with the run in a folder, with the workflow it was begun with.
    Resume {
        /// Folder of the run.
        dir: PathBuf,
    },
    /// Tell what the run in a folder did.
    Report {
        /// Folder of the run.
        dir: PathBuf,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run a workflow twice, with speculation and without: how much faster, and are the weights the same?
    Compare {
        /// The workflow.
        file: PathBuf,
        /// Folder for both runs. Default: runs/compare-NAME. What is there from an earlier comparison is removed.
        #[arg(long)]
        out: Option<PathBuf>,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Check a workflow and tell what it would do, without doing it.
    Check {
        /// The workflow.
        file: PathBuf,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TAPER_LOG").unwrap_or_else(|_| "error".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match Cli::parse().command {
        Command::Run { file, out, fresh } => commands::run(&file, out, fresh),
        Command::Resume { dir } => commands::resume(&dir),
        Command::Report { dir, json } => commands::report(&dir, json),
        Command::Compare { file, out, json } => commands::compare(&file, out, json),
        Command::Check { file, json } => commands::check(&file, json),
    };
    match result {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}
