//! The whole of a run: open its folder, find where to go on, work until the end or an interruption.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::Weights;
use models::drafter::learn::Learner;
use models::sha;
use ractor::Actor;
use state::journal::{Event, Journal, SledJournal};
use state::plan::{Drafter, Plan};
use state::run::RunState;
use tokio::sync::oneshot;

use crate::engine::Fault;
use crate::error::{Error, Result};
use crate::folder::RunFolder;
use crate::job::Job;
use crate::progress::{Ended, Observer, Progress};
use crate::speculator::Speculator;
use crate::supervisor::{Message, Setup, Supervisor};

/// How to run a plan.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of the run: its journal, checkpoints and exports.
    pub dir: PathBuf,
    /// A device that fails on purpose.
    pub fault: Option<Fault>,
}

/// Works on a plan until it is done or `interrupt` is ready. A run that was begun in the folder goes on.
///
/// What is learned depends on the plan's model, data, steps, sampling and rewards alone; its devices, speculation,
/// supervision and checkpoints may differ from those the run was begun with.
///
/// # Errors
/// If the model, the data or the folder cannot be used, the folder holds another run, or devices fail too often.
pub async fn run(
    plan: &Plan,
    options: Options,
    observer: impl Fn(Progress) + Send + Sync + 'static,
    interrupt: impl Future<Output = ()>,
) -> Result<Ended> {
    let (ended, end) = oneshot::channel();
    let setup = tokio::task::block_in_place(|| prepare(plan, options, Observer(Arc::new(observer)), ended))?;
    let Some(setup) = setup else { return Ok(Ended::Complete) };
    let failed = |e: ractor::SpawnErr| Error::Runtime { reason: e.to_string() };
    let (supervisor, handle) = Actor::spawn(None, Supervisor, setup).await.map_err(failed)?;
    let mut end = std::pin::pin!(end);
    let result = tokio::select! {
        result = &mut end => result,
        () = interrupt => {
            // A supervisor that has just ended has sent its result.
            let _ = supervisor.cast(Message::Interrupt);
            end.await
        }
    };
    let _ = handle.await;
    result.unwrap_or_else(|_| Err(Error::Runtime { reason: "the supervisor ended without a result".into() }))
}

/// What the journal in a run's folder says.
///
/// # Errors
/// If there is no run, or its journal cannot be read.
pub fn inspect(dir: &Path) -> Result<RunState> {
    let folder = RunFolder::new(dir);
    if !folder.journal().is_dir() {
        return Err(Error::NoRun { dir: dir.into() });
    }
    let state = RunState::replay(&SledJournal::open_read_only(&folder.journal())?.events()?);
    if state.plan.is_none() {
        return Err(Error::NoRun { dir: dir.into() });
    }
    Ok(state)
}

/// Everything the supervisor starts with; nothing if the run is complete.
fn prepare(
    plan: &Plan,
    options: Options,
    observer: Observer,
    ended: oneshot::Sender<Result<Ended>>,
) -> Result<Option<Setup>> {
    // First the model and the data: a mistake there leaves no folder behind.
    let job = Arc::new(Job::load(plan)?);
    std::fs::create_dir_all(&options.dir).map_err(Error::io("create", &options.dir))?;
    let folder = RunFolder::new(&options.dir);
    let mut journal = SledJournal::open(&folder.journal())?;
    let state = RunState::replay(&journal.events()?);
    check(&state, plan, &options.dir)?;
    if state.is_complete {
        return Ok(None);
    }
    if state.plan.is_none() {
        let noise_version = kernels::noise::VERSION;
        journal.append(&Event::RunStarted { plan: Box::new(plan.clone()), plan_sha256: hash(plan), noise_version })?;
    }
    let devices = device_names(plan);
    let kernels = kernels::variant().to_owned();
    journal.append(&Event::SessionStarted { n: state.sessions, devices: devices.clone(), kernels })?;
    journal.commit()?;
    let drafter = drafter_layout(&job)?;
    let from = match &state.checkpoint {
        Some(name) => Some(folder.read(name, &job.initial, drafter.as_ref())?),
        None => None,
    };
    let (weights, adam, published) = match from {
        Some(from) => (from.weights, Some(from.adam), from.drafter),
        None => (Arc::new(job.initial.clone()), None, None),
    };
    let speculator = Arc::new(Speculator::new(&plan.speculation, &job.config, plan.seed, published));
    let (fault, position) = (options.fault, state.next);
    Ok(Some(Setup { job, speculator, folder, journal, position, weights, adam, devices, fault, observer, ended }))
}

fn check(state: &RunState, plan: &Plan, dir: &Path) -> Result<()> {
    if state.plan.is_none() {
        return Ok(());
    }
    if state.plan_sha256 != hash(plan) {
        return Err(Error::OtherRun { dir: dir.into() });
    }
    let (found, supported) = (state.noise_version, kernels::noise::VERSION);
    if found != supported {
        return Err(Error::Noise { dir: dir.into(), found, supported });
    }
    Ok(())
}

/// Hash of the parts of a plan that decide what is learned.
fn hash(plan: &Plan) -> String {
    let what = (plan.seed, &plan.model, plan.compute, &plan.data, &plan.steps, &plan.sampling, &plan.rewards);
    // Plans are made of numbers, text and lists: there is nothing in them that could fail.
    sha::of_bytes(&serde_json::to_vec(&what).unwrap_or_default())
}

fn device_names(plan: &Plan) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if plan.devices.cpu == 0 { (cores / plan.devices.threads).max(1) } else { plan.devices.cpu };
    (0..count).map(|i| format!("cpu{i}")).collect()
}

/// A drafter of the plan's shape, to read a checkpoint into.
fn drafter_layout(job: &Job) -> Result<Option<Weights>> {
    let ffn = job.plan.speculation.drafters.iter().find_map(|d| match d {
        Drafter::Eagle { ffn } => Some(*ffn),
        Drafter::Suffix { .. } => None,
    });
    Ok(ffn.map(|ffn| Learner::fresh(&job.config, ffn, job.plan.seed)).transpose()?)
}
