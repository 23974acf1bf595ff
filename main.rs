//! The command line: compose and report.

#[path = "main/bench.rs"]
mod bench;
#[path = "main/commands.rs"]
mod commands;
#[path = "main/compare.rs"]
mod compare;
#[path = "main/export.rs"]
mod export;
#[path = "main/failure.rs"]
mod failure;
#[path = "main/generate.rs"]
mod generate;
#[path = "main/output.rs"]
mod output;
#[path = "main/picture.rs"]
mod picture;
#[path = "main/show.rs"]
mod show;
#[path = "main/signals.rs"]
mod signals;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Trains reasoning language models with reinforcement learning; the long tail of each rollout pays for its own speed-up.
///
/// A run is declared in a workflow file (see workflows/quickstart.ron) and lives in a folder. It can be stopped at any
/// moment, with Ctrl-C or kill -9, and goes on where it stopped with `taper resume DIR`.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str =
    "Exit codes: 0 done; 2 bad input; 130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP; 1 else.";

#[derive(Subcommand)]
enum Command {
    /// Run a workflow file, or go on with its run.
    Run {
        /// The workflow, for instance workflows/quickstart.ron.
        file: PathBuf,
        /// Folder of the run. Default: runs/NAME, by the workflow's name.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Remove what an earlier run made in the folder (journal, checkpoints, exported models), and begin anew. Other
        /// files stay.
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
    /// Run a workflow twice, with speculation and without, step by step in turns: how much faster, and are the weights the
    /// same?
    Compare {
        /// The workflow.
        file: PathBuf,
        /// Folder for both runs. Default: runs/compare-NAME. The runs of an earlier comparison there are removed.
        #[arg(long)]
        out: Option<PathBuf>,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Answer a prompt, as fast as speculation makes it.
    Generate(generate::Generate),
    /// Write a run's model, or its drafter for SGLang, vLLM or another run of Taper.
    Export(export::Export),
    /// Measure on this machine.
    #[command(subcommand)]
    Bench(bench::Bench),
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
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A terminal that is gone takes no logs, and no complaints about that.
    logs.log_internal_errors(false).init();
    let result = match Cli::parse().command {
        Command::Run { file, out, fresh } => commands::run(&file, out, fresh),
        Command::Resume { dir } => commands::resume(&dir),
        Command::Report { dir, json } => commands::report(&dir, json),
        Command::Compare { file, out, json } => compare::compare(&file, out, json),
        Command::Generate(args) => generate::generate(&args),
        Command::Export(args) => export::export(&args),
        Command::Bench(bench) => bench::bench(&bench),
        Command::Check { file, json } => commands::check(&file, json),
    };
    match result {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}
