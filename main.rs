//! The command line: compose and report.

#[path = "main/answers.rs"]
mod answers;
#[path = "main/bench.rs"]
mod bench;
#[path = "main/commands.rs"]
mod commands;
#[path = "main/compare.rs"]
mod compare;
#[path = "main/decisions.rs"]
mod decisions;
#[path = "main/export.rs"]
mod export;
#[path = "main/failure.rs"]
mod failure;
#[path = "main/generate.rs"]
mod generate;
#[path = "main/number.rs"]
mod number;
#[path = "main/output.rs"]
mod output;
#[path = "main/picture.rs"]
mod picture;
#[path = "main/show.rs"]
mod show;
#[path = "main/signals.rs"]
mod signals;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use commands::Files;
use failure::Failure;

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
        /// Go on with the run in the folder, as without this.
        #[arg(long, conflicts_with = "fresh")]
        resume: bool,
        /// Add every answer, with its score, to this file: one JSON object a line.
        #[arg(long, value_name = "FILE")]
        answers: Option<PathBuf>,
        /// Add what the controller of speculation is told, and what it chooses, to this file: one JSON object a line, for `taper
        /// decisions`.
        #[arg(long, value_name = "FILE")]
        decisions: Option<PathBuf>,
    },
    /// Go on with the run in a folder, with the workflow of its newest session.
    Resume {
        /// Folder of the run.
        dir: PathBuf,
        /// Add every answer, with its score, to this file: one JSON object a line.
        #[arg(long, value_name = "FILE")]
        answers: Option<PathBuf>,
        /// Add what the controller of speculation is told, and what it chooses, to this file: one JSON object a line, for `taper
        /// decisions`.
        #[arg(long, value_name = "FILE")]
        decisions: Option<PathBuf>,
    },
    /// Tell what the run in a folder did.
    Report {
        /// Folder of the run.
        dir: PathBuf,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Have the controller of a run choose again: are its choices the same, and what came of each way to draft?
    Decisions {
        /// What `--decisions` has written.
        file: PathBuf,
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
    /// Check a workflow and the files it names, and tell what it would do, without doing it.
    Check {
        /// The workflow.
        file: PathBuf,
        /// For machines: one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Threads that any command but the check of a workflow may need: those of journals and of models.
const THREADS: usize = 16;

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}

fn start() -> Result<ExitCode, Failure> {
    let command = Cli::parse().command;
    signals::outlive_limits();
    // Failures are told once, at the end.
    let filter = variable("TAPER_LOG", "off", "write `info`, or for instance `taper_actors=debug`", |text| {
        EnvFilter::try_new(text).ok()
    })?;
    let kernels = ["portable", "avx2", "avx512", "avx512bf16"];
    variable("TAPER_KERNELS", "avx512bf16", "write `portable`, `avx2`, `avx512` or `avx512bf16`", |text| {
        kernels.contains(&text).then_some(())
    })?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let logs = logs.with_ansi(std::io::stderr().is_terminal());
    // A terminal that is gone takes no logs, and no complaints about that.
    logs.log_internal_errors(false).init();
    if !matches!(command, Command::Check { .. }) {
        actors::may_start(THREADS)?;
    }
    match command {
        Command::Run { file, out, fresh, answers, decisions, .. } => {
            commands::run(&file, out, fresh, Files { answers: answers.as_deref(), decisions: decisions.as_deref() })
        }
        Command::Resume { dir, answers, decisions } => {
            commands::resume(&dir, Files { answers: answers.as_deref(), decisions: decisions.as_deref() })
        }
        Command::Decisions { file, json } => decisions::decisions(&file, json),
        Command::Report { dir, json } => commands::report(&dir, json),
        Command::Compare { file, out, json } => compare::compare(&file, out, json),
        Command::Generate(args) => generate::generate(&args),
        Command::Export(args) => export::export(&args),
        Command::Bench(bench) => bench::bench(&bench),
        Command::Check { file, json } => commands::check(&file, json),
    }
}

/// What a variable of the environment means, or what is meant without it or if it is empty.
fn variable<T>(
    name: &'static str,
    default: &str,
    wanted: &'static str,
    meaning: impl Fn(&str) -> Option<T>,
) -> Result<T, Failure> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    let value = value.map_or_else(|| default.into(), |value| value.to_string_lossy().into_owned());
    meaning(&value).ok_or(Failure::Variable { name, value, wanted })
}
