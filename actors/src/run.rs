//! The whole of a run: open its folder, find where to go on, work until the end or an interruption.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::data::Dataset;
use ractor::{Actor, ActorRef};
use state::journal::{Event, Inputs, Journal, SledJournal};
use state::plan::{Controller, Model, Plan, Source, Speculation};
use state::run::{Position, RunState};
use tokio::runtime::RuntimeFlavor;
use tokio::sync::oneshot;

use crate::engine::Fault;
use crate::error::{Error, Result};
use crate::experience::Experience;
use crate::folder::{Checkpoint, RunFolder};
use crate::job::{self, Job};
use crate::past::Past;
use crate::progress::{Ended, Observer, Progress};
use crate::speculator::Speculator;
use crate::supervisor::{Message, Setup, Supervisor};

/// How to run a plan.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Folder of the run: its journal, checkpoints and exports.
    pub dir: PathBuf,
    /// Remove what an earlier run left in the folder, and begin anew. Other files stay.
    pub fresh: bool,
    /// A device that fails on purpose.
    pub fault: Option<Fault>,
    /// Wait until a step is durable before the next one begins. For measurements: nothing is written in another's time.
    pub waits_for_disk: bool,
}

/// Works on a plan until it is done or `interrupt` is ready. A run that was begun in the folder goes on.
///
/// What is learned depends on the plan's model, data, steps, sampling and rewards alone; its devices, speculation,
/// supervision and checkpoints may differ from those of earlier sessions. The newest ones are recorded.
///
/// Runs on a multi-threaded runtime of tokio: files are written while actors go on. If the future is dropped, the run is
/// interrupted; it has the folder until it has noted that.
///
/// # Errors
/// If the model, the data or the folder cannot be used, the folder holds another run, or one that began with other data or another
/// model, devices fail too often, or the runtime has one thread only.
pub async fn run(
    plan: &Plan,
    options: Options,
    observer: impl Fn(Progress) + Send + Sync + 'static,
    interrupt: impl Future<Output = ()>,
) -> Result<Ended> {
    if tokio::runtime::Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        let reason = "a run needs tokio's multi-threaded runtime: `tokio::runtime::Builder::new_multi_thread()`, or \
            `#[tokio::main]` without `flavor`";
        return Err(Error::Runtime { reason: reason.into() });
    }
    let ((ended, end), (closed, close)) = (oneshot::channel(), oneshot::channel());
    let tells = (Observer(Arc::new(observer)), ended, closed);
    let setup = tokio::task::block_in_place(|| prepare(plan, options, tells))?;
    let Some(setup) = setup else { return Ok(Ended::Complete) };
    let failed = |e: ractor::SpawnErr| Error::Runtime { reason: e.to_string() };
    let (supervisor, handle) = match Actor::spawn(None, Supervisor, setup).await {
        Ok((supervisor, handle)) => (Interrupts(supervisor), handle),
        Err(error) => {
            let _ = close.await;
            return Err(failed(error));
        }
    };
    let mut end = std::pin::pin!(end);
    let result = tokio::select! {
        result = &mut end => result,
        () = interrupt => {
            // A supervisor that has just ended has sent its result.
            supervisor.interrupt();
            end.await
        }
    };
    let _ = handle.await;
    // The recorder ends after its supervisor. The folder is somebody else's to open from then on.
    let _ = close.await;
    result.unwrap_or_else(|_| Err(Error::Runtime { reason: "the supervisor ended without a result".into() }))
}

/// Interrupts a run, at the latest when nobody waits for it any more.
struct Interrupts(ActorRef<Message>);

impl Interrupts {
    fn interrupt(&self) {
        // A supervisor that has ended needs no telling.
        let _ = self.0.cast(Message::Interrupt);
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.interrupt();
    }
}

/// Reads the files that a run of this plan would begin with, and makes nothing.
///
/// # Errors
/// If the model, the data or the drafter's weights cannot be used.
pub fn check_inputs(plan: &Plan) -> Result<()> {
    match plan.model {
        // Its random weights say nothing.
        Model::Tiny { weights: None, .. } => Ok(Dataset::open(&plan.data, plan.seed).map(drop)?),
        _ => Job::load(plan).map(drop),
    }
}

/// Everything the supervisor starts with; nothing if the run is complete.
fn prepare(
    plan: &Plan,
    options: Options,
    (observer, ended, closed): (Observer, oneshot::Sender<Result<Ended>>, oneshot::Sender<()>),
) -> Result<Option<Setup>> {
    let folder = RunFolder::new(&options.dir);
    if SledJournal::is_in_use(&folder.journal()) {
        return Err(state::Error::InUse { dir: folder.journal() }.into());
    }
    let mut began_with = None;
    if !options.fresh {
        let past = Past::read(&folder)?;
        check(&past.state, plan, &options.dir)?;
        if past.state.is_complete {
            observer.tell(Progress::AlreadyComplete);
            return Ok(None);
        }
        past.warning.into_iter().for_each(|text| observer.tell(Progress::Warning(text)));
        began_with = past.state.plan.is_some().then_some(past.state.inputs);
    }
    // Then the model and the data: a mistake there leaves no folder behind, and an earlier run as it was.
    let job = Arc::new(Job::load(plan)?);
    let inputs = job.inputs();
    same_inputs(began_with.as_ref(), &inputs, plan, &options.dir)?;
    std::fs::create_dir_all(&options.dir).map_err(Error::io("create", &options.dir))?;
    let mut journal = if options.fresh { begin_anew(&folder, plan)? } else { SledJournal::open(&folder.journal())? };
    let events = journal.events()?;
    let state = RunState::replay(&events);
    let (position, from) = start(&folder, &job, &events, &observer)?;
    if state.plan.is_none() {
        let noise_version = kernels::noise::VERSION;
        let (plan, plan_sha256) = (Box::new(plan.clone()), hash(plan));
        journal.append(&Event::RunStarted { plan, plan_sha256, noise_version, inputs })?;
    }
    let devices = device_names(plan);
    let kernels = kernels::variant().to_owned();
    let changed = state.plan.filter(|before| **before != *plan).map(|_| Box::new(plan.clone()));
    journal.append(&Event::SessionStarted { n: state.sessions, devices: devices.clone(), kernels, plan: changed })?;
    journal.commit()?;
    let (weights, adam, mut experience) = match from {
        Some(from) => (from.weights, Some(from.adam), from.experience),
        None => (Arc::new(job.initial.clone()), None, Experience::default()),
    };
    experience.published = experience.published.or_else(|| job.first_drafter());
    if experience.published.is_none() {
        drafts_nothing(plan).into_iter().for_each(|text| observer.tell(Progress::Warning(text)));
    }
    let speculator = Arc::new(Speculator::new(&plan.speculation, plan.seed, experience, job.seen.clone()));
    Ok(Some(Setup {
        job,
        speculator,
        folder,
        journal,
        position,
        weights,
        adam,
        devices,
        options,
        observer,
        ended,
        closed,
    }))
}

/// What to say of a learned drafter without weights, if it is to draft and does not learn.
fn drafts_nothing(plan: &Plan) -> Option<String> {
    let Speculation { controller, training, .. } = &plan.speculation;
    let is_meant_to = *controller != Controller::Off && training.is_none();
    let kind = plan.speculation.shape().filter(|_| is_meant_to)?.network;
    let help = "give it `weights`, or `training` to `speculation`";
    Some(format!("`{kind:?}` drafts nothing: it has no weights and does not learn; {help}"))
}

/// An empty journal, after removing what the run in the folder has made.
fn begin_anew(folder: &RunFolder, plan: &Plan) -> Result<SledJournal> {
    let was_run = folder.journal().is_dir() || folder.newest().is_some();
    let earlier = SledJournal::open_read_only(&folder.journal()).and_then(|journal| journal.events());
    let journal = SledJournal::begin_anew(&folder.journal())?;
    // A model in a folder that no run was in is somebody's.
    if was_run {
        let earlier = earlier.ok().and_then(|events| RunState::replay(&events).plan);
        folder.clear(earlier.as_deref().unwrap_or(plan))?;
    }
    Ok(journal)
}

/// Where to go on, and from which checkpoint: the newest that can be read. What follows an older one is done again, with
/// the same result.
fn start(
    folder: &RunFolder,
    job: &Job,
    mut events: &[Event],
    observer: &Observer,
) -> Result<(Position, Option<Checkpoint>)> {
    let mut damaged = None;
    loop {
        let state = RunState::replay(events);
        let Some(name) = state.checkpoint else { return damaged.map_or(Ok((state.next, None)), Err) };
        match folder.read(&name, &job.initial) {
            Ok(mut checkpoint) => {
                if let Some(error) = damaged {
                    observer.tell(Progress::Warning(older(&name, &error)));
                }
                checkpoint.experience = experience(folder, &name, job, observer);
                return Ok((state.next, Some(checkpoint)));
            }
            Err(source) => {
                let path = folder.checkpoint(&name);
                damaged.get_or_insert(Error::Checkpoint { path, source: Box::new(source) });
            }
        }
        let is_older = |event: &Event| match event {
            Event::StepCommitted { checkpoint: Some(c), .. } | Event::Interrupted { checkpoint: Some(c) } => *c != name,
            _ => false,
        };
        events = &events[..events.iter().rposition(is_older).map_or(0, |at| at + 1)];
    }
}

fn older(name: &str, error: &Error) -> String {
    match error {
        Error::Checkpoint { path, source } => {
            format!("the checkpoint {} cannot be used ({source}); going on from {name}", path.display())
        }
        other => other.to_string(),
    }
}

/// What speculation had learned; what does not fit is as good as nothing, because it changes no token.
fn experience(folder: &RunFolder, name: &str, job: &Job, observer: &Observer) -> Experience {
    let (experience, errors) = folder.experience(name, &job.config, job.plan.speculation.shape());
    for error in errors {
        let path = folder.checkpoint(name);
        let text = format!("a part of the drafter in {} cannot be used ({error}); it is learned again", path.display());
        observer.tell(Progress::Warning(text));
    }
    experience
}

fn check(state: &RunState, plan: &Plan, dir: &Path) -> Result<()> {
    let Some(before) = &state.plan else { return Ok(()) };
    if state.plan_sha256 != hash(plan) {
        return Err(Error::OtherRun { dir: dir.into(), parts: differing(before, plan) });
    }
    let (found, supported) = (state.noise_version, kernels::noise::VERSION);
    if found != supported {
        return Err(Error::Noise { dir: dir.into(), found, supported });
    }
    Ok(())
}

/// What a run reads beside its folder has to be what it was when it began.
fn same_inputs(began_with: Option<&Inputs>, now: &Inputs, plan: &Plan, dir: &Path) -> Result<()> {
    let Some(then) = began_with.filter(|then| *then != now) else { return Ok(()) };
    let (input, hashes, path) = if then.model_sha256 == now.model_sha256 {
        let path = if let Source::Jsonl(path) = &plan.data.source { Some(path) } else { None };
        ("data", [&then.data_sha256, &now.data_sha256], path)
    } else {
        let path = match &plan.model {
            Model::Tiny { weights, .. } => weights.as_ref(),
            Model::HuggingFace(path) | Model::Gguf(path) => Some(path),
        };
        ("model", [&then.model_sha256, &now.model_sha256], path)
    };
    let [expected, found] = hashes.map(Clone::clone);
    Err(Error::OtherInput {
        dir: dir.into(),
        input,
        path: path.cloned().unwrap_or_else(|| "(made by Taper)".into()),
        expected,
        found,
    })
}

/// Hash of the parts of a plan that decide what is learned.
fn hash(plan: &Plan) -> String {
    job::hash(&(plan.seed, &plan.model, plan.compute, &plan.data, &plan.steps, &plan.sampling, &plan.rewards))
}

/// Which of them are not as they were, for people.
fn differing(before: &Plan, now: &Plan) -> String {
    let parts = [
        ("`seed`", before.seed == now.seed),
        ("`model`", before.model == now.model),
        ("`compute`", before.compute == now.compute),
        ("`data`", before.data == now.data),
        ("`steps`", before.steps == now.steps),
        ("`sampling`", before.sampling == now.sampling),
        ("`rewards`", before.rewards == now.rewards),
    ];
    let parts: Vec<&str> = parts.into_iter().filter(|(_, is_same)| !is_same).map(|(part, _)| part).collect();
    if parts.is_empty() { "how it is written".into() } else { parts.join(", ") }
}

fn device_names(plan: &Plan) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if plan.devices.cpu == 0 { (cores / plan.devices.threads).max(1) } else { plan.devices.cpu };
    (0..count).map(|i| format!("cpu{i}")).collect()
}
