//! One function a command.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use actors::{Ended, Options, Progress};
use state::metrics::Report;
use state::plan::Plan;

use crate::answers::Answers;
use crate::decisions::Decisions;
use crate::failure::Failure;
use crate::output;
use crate::show::{self, Show};
use crate::signals::{self, Signal};

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Files that a run adds to.
#[derive(Clone, Copy)]
pub(crate) struct Files<'a> {
    pub(crate) answers: Option<&'a Path>,
    pub(crate) decisions: Option<&'a Path>,
}

pub(crate) fn load(path: &Path) -> Result<Plan> {
    let file = std::fs::File::open(path).map_err(Failure::file(path))?;
    // What is longer is no workflow, whatever it says, and may have no end.
    let mut bytes = Vec::new();
    file.take(workflows::LENGTH_MAX as u64 + 1).read_to_end(&mut bytes).map_err(Failure::file(path))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let folder = std::path::absolute(path).map_err(Failure::file(path))?;
    let folder = folder.parent().unwrap_or(Path::new("/"));
    workflows::parse(&text, folder).map_err(|problems| Failure::Workflow { path: path.into(), text, problems })
}

pub(crate) fn run(file: &Path, out: Option<PathBuf>, fresh: bool, files: Files<'_>) -> Result<ExitCode> {
    let plan = load(file)?;
    // The folder that the same command takes, but for a --fresh.
    let again = match &out {
        Some(dir) => format!("taper resume {}", shell(dir)),
        None => format!("taper run {}", shell(file)),
    };
    let dir = out.unwrap_or_else(|| Path::new("runs").join(&plan.name));
    let stopped = work(&plan, &dir, fresh, files)?;
    conclude(stopped, &dir, &again)
}

pub(crate) fn resume(dir: &Path, files: Files<'_>) -> Result<ExitCode> {
    let state = actors::inspect(dir)?;
    let Some(plan) = state.plan else { return Err(actors::Error::NoRun { dir: dir.into() }.into()) };
    let stopped = work(&plan, dir, false, files).map_err(|failure| match failure {
        Failure::Run(actors::Error::Model(source @ models::Error::FileMissing { .. })) => {
            Failure::Moved { again: format!("taper run FILE --out {}", shell(dir)), source }
        }
        other => other,
    })?;
    conclude(stopped, dir, &format!("taper resume {}", shell(dir)))
}

pub(crate) fn report(dir: &Path, json: bool) -> Result<ExitCode> {
    let past = actors::look(dir)?;
    if let Some(warning) = &past.warning {
        output::note(&format!("warning: {warning}"));
    }
    let report = state::report::report(&past.state, past.is_running);
    if json {
        output::json(&report)?
    } else {
        output::report(&show::report(&report))?
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn check(file: &Path, json: bool) -> Result<ExitCode> {
    let plan = load(file)?;
    let missing: Vec<PathBuf> =
        plan.inputs().into_iter().filter(|path| !path.exists()).map(Path::to_path_buf).collect();
    let checked = Checked { summary: workflows::describe(&plan), missing };
    if json {
        output::json(&checked)?
    } else {
        output::report(&format!("{}\n", checked.summary))?
    }
    for path in &checked.missing {
        output::note(&format!("warning: {} is not there; a run of this workflow reads it", path.display()));
    }
    if checked.missing.is_empty() {
        for text in actors::check_inputs(&plan)? {
            output::note(&format!("warning: {text}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a workflow would do, and which of its files are not there: it may be meant for another machine.
#[derive(serde::Serialize)]
struct Checked {
    #[serde(flatten)]
    summary: workflows::Summary,
    missing: Vec<PathBuf>,
}

/// Works on a plan with progress on stderr, and answers in a file if one is named, until it is done or a signal ends it.
fn work(plan: &Plan, dir: &Path, fresh: bool, files: Files<'_>) -> Result<Option<Signal>> {
    let answers = files.answers.map(Answers::open).transpose()?;
    let decisions = files.decisions.map(Decisions::open).transpose()?.map(Arc::new);
    let (show, tells_decisions) = (Arc::new(Show::new()), decisions.is_some());
    let observer = {
        let (show, decisions) = (show.clone(), decisions.clone());
        move |progress| {
            show.tell(&progress);
            answers.iter().for_each(|answers| answers.tell(&progress));
            decisions.iter().for_each(|decisions| decisions.tell(&progress));
        }
    };
    let options = Options { dir: dir.into(), fresh, tells_decisions, ..Options::default() };
    let result = watched(plan, options, observer, std::future::pending());
    show.finish();
    decisions.iter().for_each(|decisions| decisions.flush());
    result
}

/// The same, with progress told to an observer; `stop` ends it as a signal would.
pub(crate) fn watched(
    plan: &Plan,
    options: Options,
    observer: impl Fn(Progress) + Send + Sync + 'static,
    stop: impl Future<Output = ()>,
) -> Result<Option<Signal>> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::Runtime)?;
    // From here on, so that one that comes while the model is loaded ends the run as any other.
    let signal = signals::next().map_err(Failure::Runtime)?;
    let received = OnceLock::new();
    let interrupt = async {
        tokio::select! {
            Ok(signal) = signal => drop(received.set(signal)),
            () = stop => {}
        }
    };
    let result = runtime.block_on(actors::run(plan, options, observer, interrupt));
    match result? {
        Ended::Complete => Ok(None),
        Ended::Interrupted => Ok(Some(received.into_inner().unwrap_or(Signal::Interrupt))),
    }
}

fn conclude(stopped: Option<Signal>, dir: &Path, again: &str) -> Result<ExitCode> {
    if let Some(signal) = stopped {
        output::note(&format!("stopped; `{again}` goes on where it stopped"));
        return Ok(signal.code());
    }
    let text = format!("{}  saved in {}\n", show::report(&report_of(dir)?), dir.display());
    if let Err(failure) = output::report(&text) {
        // The run is done all the same, and `taper report` tells of it at any time.
        output::note(&format!("warning: {failure}"));
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn report_of(dir: &Path) -> Result<Report> {
    Ok(state::report::report(&actors::inspect(dir)?, false))
}

/// A path as a shell takes it.
pub(crate) fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+,:@%=".contains(c);
    if text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
