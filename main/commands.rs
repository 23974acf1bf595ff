//! One function a command.

#![expect(clippy::print_stdout, reason = "reports go to stdout, progress and logs to stderr")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use actors::{Ended, Options};
use state::metrics::Report;
use state::plan::Plan;

use crate::failure::Failure;
use crate::show::{self, Show};

type Result<T> = std::result::Result<T, Failure>;

fn load(path: &Path) -> Result<Plan> {
    let bytes = std::fs::read(path).map_err(Failure::file(path))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let folder = std::path::absolute(path).map_err(Failure::file(path))?;
    let folder = folder.parent().unwrap_or(Path::new("/"));
    workflows::parse(&text, folder).map_err(|problems| Failure::Workflow { path: path.into(), text, problems })
}

pub(crate) fn run(file: &Path, out: Option<PathBuf>, fresh: bool) -> Result<ExitCode> {
    let plan = load(file)?;
    let dir = out.unwrap_or_else(|| Path::new("runs").join(&plan.name));
    if fresh {
        remove(&dir)?;
    }
    let ended = work(&plan, &dir)?;
    conclude(ended, &dir, &format!("taper run {}", file.display()))
}

pub(crate) fn resume(dir: &Path) -> Result<ExitCode> {
    let state = actors::inspect(dir)?;
    let Some(plan) = state.plan else { return Err(actors::Error::NoRun { dir: dir.into() }.into()) };
    let ended = work(&plan, dir)?;
    conclude(ended, dir, &format!("taper resume {}", dir.display()))
}

pub(crate) fn report(dir: &Path, json: bool) -> Result<ExitCode> {
    let report = report_of(dir)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", show::report(&report));
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn check(file: &Path, json: bool) -> Result<ExitCode> {
    let summary = workflows::describe(&load(file)?);
    if json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        println!("{summary}");
    }
    Ok(ExitCode::SUCCESS)
}

/// What `compare` found; the keys of its JSON form.
#[derive(serde::Serialize)]
struct Comparison {
    rollout_ratio: f64,
    step_ratio: f64,
    identical: bool,
    weights_sha256_with: String,
    weights_sha256_without: String,
    with: Report,
    without: Report,
}

pub(crate) fn compare(file: &Path, out: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let plan = load(file)?;
    let dir = out.unwrap_or_else(|| Path::new("runs").join(format!("compare-{}", plan.name)));
    let mut reports = Vec::new();
    for (name, plan) in [("without", plan.without_speculation()), ("with", plan)] {
        let dir = dir.join(name);
        remove(&dir)?;
        eprintln!("{name} speculation and drafter training:");
        if work(&plan, &dir)? == Ended::Interrupted {
            return Ok(ExitCode::from(130));
        }
        reports.push(report_of(&dir)?);
    }
    let (with, without) = (reports.remove(1), reports.remove(0));
    let sum = |r: &Report, f: fn(&state::metrics::StepMetrics) -> f64| -> f64 {
        r.history.iter().filter(|m| m.kind == "grpo").map(f).sum()
    };
    let ratio = |f: fn(&state::metrics::StepMetrics) -> f64| sum(&without, f) / sum(&with, f).max(1e-9);
    let comparison = Comparison {
        rollout_ratio: ratio(|m| m.rollout_s),
        step_ratio: ratio(|m| m.wall_s),
        identical: with.weights_sha256 == without.weights_sha256,
        weights_sha256_with: with.weights_sha256.clone(),
        weights_sha256_without: without.weights_sha256.clone(),
        with,
        without,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", show::report(&comparison.with));
        println!(
            "\n  rollouts {:.2}x, steps {:.2}x as fast as without",
            comparison.rollout_ratio, comparison.step_ratio
        );
        let same = if comparison.identical { "byte-identical" } else { "DIFFERENT" };
        println!(
            "  final weights: {same}\n    with    {}\n    without {}",
            comparison.weights_sha256_with, comparison.weights_sha256_without
        );
    }
    Ok(if comparison.identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Works on a plan with progress on stderr, until it is done or Ctrl-C.
fn work(plan: &Plan, dir: &Path) -> Result<Ended> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::Runtime)?;
    let show = Arc::new(Show::new());
    let observer = {
        let show = show.clone();
        move |progress| show.tell(&progress)
    };
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let options = Options { dir: dir.into(), fault: None };
    let result = runtime.block_on(actors::run(plan, options, observer, interrupt));
    show.finish();
    Ok(result?)
}

fn conclude(ended: Ended, dir: &Path, again: &str) -> Result<ExitCode> {
    match ended {
        Ended::Complete => {
            print!("{}", show::report(&report_of(dir)?));
            println!("  saved in {}", dir.display());
            Ok(ExitCode::SUCCESS)
        }
        Ended::Interrupted => {
            eprintln!("stopped; `{again}` goes on where it stopped");
            Ok(ExitCode::from(130))
        }
    }
}

fn report_of(dir: &Path) -> Result<Report> {
    Ok(state::report::report(&actors::inspect(dir)?, false))
}

/// Removes the folder of a run, and nothing else.
fn remove(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    if !dir.join("journal").is_dir() {
        return Err(Failure::NotARun { path: dir.into() });
    }
    std::fs::remove_dir_all(dir).map_err(|source| Failure::Remove { path: dir.into(), source })
}
