//! The whole of a run: open its folder, find where to go on, work until the end or an interruption.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::load::export::{Kind, replaceable};
use ractor::{Actor, ActorRef};
use state::journal::{Event, Journal, SledJournal};
use state::metrics::StepMetrics;
use state::plan::{Controller, Model, Part, Plan, Speculation, Step};
use state::run::{Position, RunState, steps_of};
use tokio::runtime::RuntimeFlavor;
use tokio::sync::oneshot;

use crate::engine::Fault;
use crate::error::{Error, Result};
use crate::experience::Experience;
use crate::folder::RunFolder;
use crate::identity::{check, hash, same_inputs};
use crate::job::Job;
use crate::past::{Past, Whole};
use crate::progress::{Ended, Observer, Progress};
use crate::rewarder::OwnReward;
use crate::speculator::Speculator;
use crate::supervisor::{Message, Setup, Supervisor};

/// How to run a plan.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Folder of the run: its journal, checkpoints and exports. Empty: the one that the process works in.
    pub dir: PathBuf,
    /// Remove what an earlier run left in the folder, and begin anew. Other files stay.
    pub fresh: bool,
    /// A reward of the program's own, beside the plan's. A run goes on only with one of the same name.
    pub reward: Option<OwnReward>,
    /// A device that fails on purpose.
    pub fault: Option<Fault>,
    /// Tell the observer all that the controller is told, and what it chooses: from that its choices can be made again.
    pub tells_decisions: bool,
    /// Wait until a step is durable before the next one begins. For measurements: nothing is written in another's time.
    pub waits_for_disk: bool,
}

/// Works on a plan until it is done or `interrupt` is ready. A run that was begun in the folder goes on.
///
/// What is learned depends on the plan's model, data, steps, sampling and rewards alone; its devices, speculation,
/// supervision and checkpoints may differ from those of earlier sessions. The newest ones are recorded.
///
/// Runs on a multi-threaded runtime of tokio: files are written while actors go on. If the future is dropped, the run is
/// interrupted; it has the folder until it has noted that. An observer that panics is told nothing any more, and the run goes on.
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
    let flavor = tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor());
    if flavor.map_or(true, |flavor| flavor == RuntimeFlavor::CurrentThread) {
        let reason = "a run needs tokio's multi-threaded runtime: `tokio::runtime::Builder::new_multi_thread()`, or \
            `#[tokio::main]` without `flavor`";
        return Err(Error::Runtime { reason: reason.into() });
    }
    let ((ended, end), (closed, close)) = (oneshot::channel(), oneshot::channel());
    let tells = (Observer::new(observer), ended, closed);
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

/// Reads the files that a run of this plan would begin with, and makes nothing. Returns what is not as whoever wrote them may think.
///
/// # Errors
/// If the model, the data or the drafter's weights cannot be used.
pub fn check_inputs(plan: &Plan) -> Result<Vec<String>> {
    plan.check()?;
    let mut plan = plan.clone();
    let has_drafter = plan.drafter_weights().is_some();
    if let Model::Tiny { weights: None, shape, .. } = &mut plan.model
        && !has_drafter
    {
        // Random weights say nothing, but to a drafter how many layers there are.
        shape.layers = 1;
    }
    Ok(Job::load(&plan)?.warnings)
}

/// Everything the supervisor starts with; nothing if the run is complete.
fn prepare(
    plan: &Plan,
    options: Options,
    (observer, ended, closed): (Observer, oneshot::Sender<Result<Ended>>, oneshot::Sender<()>),
) -> Result<Option<Setup>> {
    plan.check()?;
    let devices = device_names(plan);
    may_start(devices.len() * plan.devices.threads + THREADS)?;
    let folder = RunFolder::new(&options.dir);
    if SledJournal::is_in_use(&folder.journal()) {
        return Err(state::Error::InUse { dir: folder.journal() }.into());
    }
    let (mut past, reward) = (Past::default(), options.reward.as_ref());
    if !options.fresh {
        past = Past::read(&folder)?;
        check(&past.state, (plan, reward), folder.dir())?;
        if past.state.is_complete {
            observer.tell(Progress::AlreadyComplete);
            return Ok(None);
        }
        past.warning.take().into_iter().for_each(|text| observer.tell(Progress::Warning(text)));
    }
    // Then the model and the data: a mistake there leaves no folder behind, and an earlier run as it was.
    let job = Arc::new(Job::load(plan)?);
    job.warnings.iter().for_each(|text| observer.tell(Progress::Warning(text.clone())));
    let inputs = job.inputs();
    same_inputs(&past.state, &inputs, plan, folder.dir())?;
    for step in plan.steps.iter().skip(past.state.next.stage) {
        // Found now rather than after all that is learned before.
        if let Step::Export(export) = step {
            replaceable(&folder.dir().join(&export.to), Kind::Model)?;
        }
    }
    std::fs::create_dir_all(folder.dir()).map_err(Error::io("create", folder.dir()))?;
    let mut journal = if options.fresh { begin_anew(&folder, plan)? } else { SledJournal::open(&folder.journal())? };
    let Past { state, events, .. } = past;
    if !options.fresh && journal.count() != events.len() as u64 {
        return Err(Error::WorkedOn { dir: folder.dir().into() });
    }
    let whole = Whole::find(&folder, &events, |name| folder.read(name, &job.initial))?;
    whole.warning.into_iter().for_each(|text| observer.tell(Progress::Warning(text)));
    let position = whole.state.next;
    began(&state, plan, position, folder.dir()).into_iter().for_each(|progress| observer.tell(progress));
    if state.plan.is_none() {
        let noise_version = kernels::noise::VERSION;
        let (plan, plan_sha256) = (Box::new(plan.clone()), hash(plan, reward));
        journal.append(&Event::RunStarted { plan, plan_sha256, noise_version, inputs })?;
    }
    let kernels = kernels::variant().to_owned();
    let are_alike = state.plan.as_ref().is_none_or(|before| before.devices.threads == plan.devices.threads);
    let changed = state.plan.filter(|before| **before != *plan).map(|_| Box::new(plan.clone()));
    journal.append(&Event::SessionStarted { n: state.sessions, devices: devices.clone(), kernels, plan: changed })?;
    journal.commit()?;
    let (weights, adam, mut experience) = match whole.checkpoint {
        Some((name, from)) => (from.weights, Some(from.adam), experience(&folder, &name, &job, &observer)),
        None => (Arc::new(job.initial.clone()), None, Experience::default()),
    };
    // Speeds say nothing of other devices; what drafts bring is soon seen again.
    experience.habits = experience.habits.map(|habits| match are_alike && habits.are_of_here() {
        true => habits,
        false => habits.with_controller(&plan.speculation.controller),
    });
    experience.published = experience.published.or_else(|| job.first_drafter());
    if experience.published.is_none() {
        drafts_nothing(plan).into_iter().for_each(|text| observer.tell(Progress::Warning(text)));
    }
    let mut speculator = Speculator::new(&job.plan.speculation, plan.seed, experience, job.seen.clone());
    if options.tells_decisions {
        speculator = speculator.telling(observer.clone());
    }
    let speculator = Arc::new(speculator);
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

/// Where the session begins; nothing if all steps are done, which only has to be noted.
fn began(state: &RunState, plan: &Plan, position: Position, dir: &Path) -> Option<Progress> {
    let place = |m: &StepMetrics| Position { stage: m.stage, step: m.step };
    let again = state.history.iter().filter(|m| place(m) >= position).count();
    let step = plan.steps.get(position.stage)?;
    let Part { begun, of } = step.part().unwrap_or(Part::whole(steps_of(step)));
    let from = state.plan.is_some().then_some((step.kind(), begun + position.step, of));
    Some(Progress::SessionBegan { dir: dir.into(), from, again })
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
    // A model in a folder that no run was in is somebody's. The journal goes last: it says what else there is to remove.
    let clear = || match was_run {
        true => {
            let earlier = earlier.ok().and_then(|events| RunState::replay(&events).plan);
            folder.clear(earlier.as_deref().unwrap_or(plan))
        }
        false => Ok(()),
    };
    SledJournal::begin_anew(&folder.journal(), clear)
}

/// What speculation had learned; what does not fit is as good as nothing, because it changes no token.
fn experience(folder: &RunFolder, name: &str, job: &Job, observer: &Observer) -> Experience {
    let (experience, errors) = folder.experience(name, &job.config, job.plan.speculation.shape());
    for error in errors {
        let path = folder.checkpoint(name);
        let text = format!(
            "a part of the drafter in {} cannot be used ({}); it is learned again",
            path.display(),
            error.whole()
        );
        observer.tell(Progress::Warning(text));
    }
    experience
}

/// Threads beside those of devices: the journal's, the runtime's, and that of signals.
const THREADS: usize = 20;

/// Fails if this process may not start so many threads now: later on, whoever wants one would panic, or wait for it.
///
/// # Errors
/// If the system refuses.
pub fn may_start(needed: usize) -> Result<()> {
    kernels::threads::may_start(needed).map_err(|source| Error::Threads { needed, source })
}

fn device_names(plan: &Plan) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if plan.devices.cpu == 0 { (cores / plan.devices.threads).max(1) } else { plan.devices.cpu };
    (0..count).map(|i| format!("cpu{i}")).collect()
}
