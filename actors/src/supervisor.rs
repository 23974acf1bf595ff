//! The root of a run: walks the plan step by step, tells devices what to do, restarts lost ones, has progress recorded.
//!
//! Decisions are the machines' of `state` ([`StepMachine`], [`Device`], [`Supervisor`](supervise::Supervisor)); this
//! file turns messages into their events and performs their effects.

mod measure;
mod rolling;
mod stage;
mod updating;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use models::Weights;
use models::optim::AdamW;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use state::device::{self, Device, Phase};
use state::journal::{Event, SledJournal};
use state::metrics::StepMetrics;
use state::run::Position;
use state::supervise::{self, Decision, LOOKS, Silence};
use tokio::sync::oneshot;

use crate::device::{DeviceActor, DeviceMessage, Identity};
use crate::engine::{Command, Failing, Fault, Pulse, Report};
use crate::error::{Error, Result};
use crate::folder::RunFolder;
use crate::job::Job;
use crate::progress::{Ended, Observer, Progress};
use crate::recorder::{Record, Recorder};
use crate::rewarder::{Rewarder, Score, Verdict};
use crate::run::Options;
use crate::speculator::Speculator;
use measure::Timeline;
use rolling::Rolling;
use updating::Updating;

/// What the supervisor hears.
pub(crate) enum Message {
    /// A device reports.
    Report { device: usize, epoch: u64, report: Report },
    /// A group was scored.
    Scored { rollout: u64, group: usize, verdicts: Vec<Verdict> },
    /// The record that was waited for is durable.
    Committed,
    /// Something that cannot be mended failed.
    Failed(Box<Error>),
    /// Time to start a lost device again.
    Restart { device: usize },
    /// Time to look whether devices that have work do anything.
    Look,
    /// The user wants to stop.
    Interrupt,
}

/// All that the supervisor starts with.
pub(crate) struct Setup {
    pub(crate) job: Arc<Job>,
    pub(crate) speculator: Arc<Speculator>,
    pub(crate) folder: RunFolder,
    pub(crate) journal: SledJournal,
    pub(crate) position: Position,
    pub(crate) weights: Arc<Weights>,
    pub(crate) adam: Option<Arc<AdamW>>,
    pub(crate) devices: Vec<String>,
    pub(crate) options: Options,
    pub(crate) observer: Observer,
    pub(crate) ended: oneshot::Sender<Result<Ended>>,
    /// Dropped once the journal is closed.
    pub(crate) closed: oneshot::Sender<()>,
}

/// A device and what the supervisor knows of it.
struct Seat {
    name: String,
    actor: Option<ActorRef<DeviceMessage>>,
    pulse: Arc<Pulse>,
    silence: Silence,
    /// Seconds in which it was silent until it was given up: no time in which it was well.
    silent_s: f64,
    machine: Device,
    timeline: Timeline,
}

/// What the run is doing.
enum Activity {
    Rolling(Rolling),
    Updating(Updating),
    /// Waiting for records to be durable; then the next step, or the end.
    Recording {
        then: Option<Result<Ended>>,
    },
}

pub(crate) struct State {
    myself: ActorRef<Message>,
    job: Arc<Job>,
    speculator: Arc<Speculator>,
    seats: Vec<Seat>,
    restarts: supervise::Supervisor,
    rewarder: ActorRef<Score>,
    recorder: ActorRef<Record>,
    folder: PathBuf,
    clock: Instant,
    position: Position,
    weights: Arc<Weights>,
    adam: Arc<AdamW>,
    /// Name of a checkpoint of these, if none was made since the last step.
    unsaved: Option<String>,
    /// It was told why answers could not be scored.
    has_warned: bool,
    activity: Activity,
    metrics: StepMetrics,
    /// Of a step that is recorded, until it is told of.
    untold: Option<Box<StepMetrics>>,
    began: Instant,
    /// Records that are not durable yet; since when the run waits for them, and how long it did after the step before.
    unrecorded: usize,
    /// How many may be on their way to the disk while a step is computed: what is lost in a crash is computed again.
    unrecorded_max: usize,
    waiting_from: Instant,
    waited_s: f64,
    rollouts: u64,
    fault: Option<Fault>,
    observer: Observer,
    ended: Option<oneshot::Sender<Result<Ended>>>,
}

pub(crate) struct Supervisor;

impl Actor for Supervisor {
    type Msg = Message;
    type State = State;
    type Arguments = Setup;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        setup: Setup,
    ) -> std::result::Result<State, ActorProcessingErr> {
        let Setup {
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
        } = setup;
        let (rewarder, _) =
            Actor::spawn_linked(None, Rewarder, (job.clone(), options.reward, myself.clone()), myself.get_cell())
                .await?;
        let place = folder.dir().to_path_buf();
        let books = (folder, (journal, closed), job.plan.checkpoint.keep, myself.clone());
        let (recorder, _) = Actor::spawn_linked(None, Recorder, books, myself.get_cell()).await?;
        let seat = |name| Seat {
            name,
            actor: None,
            pulse: Arc::default(),
            silence: Silence::default(),
            silent_s: 0.0,
            machine: Device::default(),
            timeline: Timeline::default(),
        };
        let mut state = State {
            restarts: supervise::Supervisor::new(&job.plan.supervision),
            adam: adam.unwrap_or_else(|| Arc::new(AdamW::new(&weights))),
            seats: devices.into_iter().map(seat).collect(),
            unsaved: None,
            has_warned: false,
            activity: Activity::Recording { then: None },
            metrics: StepMetrics::default(),
            untold: None,
            began: Instant::now(),
            unrecorded: 0,
            unrecorded_max: usize::from(!options.waits_for_disk),
            waiting_from: Instant::now(),
            waited_s: 0.0,
            clock: Instant::now(),
            rollouts: 0,
            ended: Some(ended),
            folder: place,
            myself,
            job,
            speculator,
            rewarder,
            recorder,
            position,
            weights,
            fault: options.fault,
            observer,
        };
        for device in 0..state.seats.len() {
            state.start_device(device).await?;
        }
        Ok(state)
    }

    async fn post_start(&self, _: ActorRef<Message>, state: &mut State) -> std::result::Result<(), ActorProcessingErr> {
        state.look_later();
        state.begin_step();
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            Message::Report { device, epoch, report } => state.hear(device, epoch, report),
            Message::Scored { rollout, group, verdicts } => state.scored(rollout, group, verdicts),
            Message::Committed => state.committed(),
            Message::Failed(error) => state.failed(*error),
            Message::Restart { device } => match state.start_device(device).await {
                Ok(()) => state.rejoin(device),
                Err(error) => state.lose(device, &error.to_string()),
            },
            Message::Look => state.look(),
            Message::Interrupt => state.interrupt(),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, reason) => state.actor_failed(&cell, &reason.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) if state.ended.is_some() => {
                state.actor_failed(&cell, &reason.unwrap_or_else(|| "it ended by itself".into()));
            }
            _ => {}
        }
        Ok(())
    }
}

impl State {
    async fn start_device(&mut self, device: usize) -> std::result::Result<(), ActorProcessingErr> {
        let seat = &mut self.seats[device];
        let epoch = seat.machine.epoch();
        let _ = seat.machine.apply(device::Event::Restarted { epoch });
        let fault = self.fault.filter(|f| (f.device == device || f.how == Failing::Kills) && epoch == 0);
        let threads = self.job.plan.devices.threads;
        (seat.pulse, seat.silence) = Default::default();
        let (name, pulse) = (seat.name.clone(), seat.pulse.clone());
        let identity = Identity { device, epoch, name, threads, pulse, fault };
        let arguments = (identity, self.myself.clone());
        let (actor, _) = Actor::spawn_linked(None, DeviceActor, arguments, self.myself.get_cell()).await?;
        seat.actor = Some(actor);
        Ok(())
    }

    /// A request to a device: passed on if its machine allows it.
    fn request(&mut self, device: usize, event: device::Event, command: Command) {
        let seat = &mut self.seats[device];
        let effects = seat.machine.apply(event);
        if let [device::Effect::Refused(refused)] = effects[..] {
            // Nothing would come of it, and the run would wait for good.
            let reason =
                format!("device {device} was asked for what it cannot do now ({refused:?}): please report this");
            return self.give_up(Error::Runtime { reason });
        }
        seat.timeline.enter(seat.machine.phase(), self.began.elapsed().as_secs_f64());
        self.send(device, command);
    }

    fn send(&self, device: usize, command: Command) {
        let Seat { actor, pulse, .. } = &self.seats[device];
        if let Some(actor) = actor {
            pulse.announce();
            // A dead device's loss is reported by its supervision event.
            let _ = actor.cast(DeviceMessage::Command(command));
        }
    }

    /// A report of a device for its machine.
    fn note(&mut self, device: usize, event: device::Event) {
        let seat = &mut self.seats[device];
        let _ = seat.machine.apply(event);
        seat.timeline.enter(seat.machine.phase(), self.began.elapsed().as_secs_f64());
    }

    fn hear(&mut self, device: usize, epoch: u64, report: Report) {
        if epoch != self.seats[device].machine.epoch() || !self.seats[device].machine.is_up() {
            return;
        }
        match report {
            Report::Ended { rollout, answers } => self.answers_ended(device, epoch, rollout, answers),
            Report::Lent { rollout, loan, answers } => self.lent(device, epoch, rollout, loan, answers),
            Report::DrafterStopped { training } => self.drafter_stopped(device, epoch, training),
            Report::Computed { part } => self.computed(device, epoch, part),
            Report::Finished => self.updated(device, epoch),
            Report::Died { .. } => {}
        }
    }

    fn actor_failed(&mut self, cell: &ActorCell, reason: &str) {
        let is_it = |seat: &Seat| seat.actor.as_ref().is_some_and(|a| a.get_id() == cell.get_id());
        match self.seats.iter().position(is_it) {
            Some(device) => self.lose(device, reason),
            None if cell.get_id() == self.rewarder.get_id() => self.give_up(Error::Runtime { reason: reason.into() }),
            None if cell.get_id() == self.recorder.get_id() => {
                self.end(Err(Error::Runtime { reason: reason.into() }));
            }
            // A device that was given up, just before it failed by itself.
            None => {}
        }
    }

    /// Has itself told to look at the devices, unless silence is none of its business.
    fn look_later(&self) {
        let silent_s = self.job.plan.supervision.silent_s;
        if silent_s > 0.0 {
            self.myself.send_after(Duration::from_secs_f64(silent_s / f64::from(LOOKS)), || Message::Look);
        }
    }

    /// Gives up devices that have work and compute nothing.
    fn look(&mut self) {
        let silent_s = self.job.plan.supervision.silent_s;
        for device in 0..self.seats.len() {
            let Seat { actor, pulse, silence, machine, .. } = &mut self.seats[device];
            if self.ended.is_none() || actor.is_none() || !silence.look(pulse.done()) {
                continue;
            }
            if machine.phase() == Phase::DraftTrain {
                tokio::task::block_in_place(|| self.speculator.give_up_learner());
            }
            if let Some(actor) = actor.take() {
                // Nobody is to hear of the end of this actor. Its thread ends if it ever wakes up.
                actor.unlink(self.myself.get_cell());
                actor.stop(None);
            }
            self.seats[device].silent_s += silent_s;
            self.lose(device, &format!("it had work and computed nothing for {silent_s} s"));
        }
        self.look_later();
    }

    fn lose(&mut self, device: usize, reason: &str) {
        let epoch = self.seats[device].machine.epoch();
        self.seats[device].actor = None;
        self.note(device, device::Event::Lost { epoch });
        tracing::warn!(device, reason, "a device was lost");
        let well_s = self.clock.elapsed().as_secs_f64() - self.seats[device].silent_s;
        let decision = self.restarts.lost(well_s, device);
        match decision {
            Decision::Restart { after_ms } => {
                let Position { stage, step } = self.position;
                let event = Event::DeviceRestarted { device, stage, step, reason: reason.into() };
                let _ = self.recorder.cast(Record::Note(event));
                self.metrics.restarts += 1;
                self.observer.tell(Progress::DeviceLost { device, reason: reason.into(), after_ms });
                self.myself.send_after(Duration::from_millis(after_ms), move || Message::Restart { device });
                self.without(device);
            }
            Decision::Escalate { reason: why } => {
                self.give_up(Error::Device { reason: format!("{why}; the last time: {reason}") });
            }
        }
    }

    /// A lost device's work goes to others.
    fn without(&mut self, device: usize) {
        match &self.activity {
            Activity::Rolling(_) => self.rolling_without(device),
            Activity::Updating(_) => self.updating_without(device),
            Activity::Recording { .. } => {}
        }
    }

    /// A restarted device joins in.
    fn rejoin(&mut self, device: usize) {
        match &self.activity {
            Activity::Rolling(_) => self.offer(device),
            Activity::Updating(_) => self.feed(device),
            Activity::Recording { .. } => {}
        }
    }

    fn interrupt(&mut self) {
        self.observer.tell(Progress::Stopping);
        self.stop(Ok(Ended::Interrupted));
    }

    /// The run cannot go on. The same command may, once the cause is gone.
    fn give_up(&mut self, error: Error) {
        tracing::error!(error = error.whole(), "the run is given up");
        self.stop(Err(error));
    }

    /// A record could not be made. Where it was one of a run that is given up, it ends with what it was given up for.
    fn failed(&mut self, error: Error) {
        let first = match &mut self.activity {
            Activity::Recording { then } => then.take_if(|ended| ended.is_err()),
            _ => None,
        };
        if first.is_some() {
            self.observer.tell(Progress::Warning(format!("the last step is not kept: {}", error.whole())));
        }
        self.end(first.unwrap_or(Err(error)));
    }

    /// Ends the run once what was done is durable.
    fn stop(&mut self, ended: Result<Ended>) {
        if self.ended.is_none() || matches!(self.activity, Activity::Recording { then: Some(_) }) {
            return;
        }
        let checkpoint = self.unsaved.take().map(|name| (name, self.checkpoint()));
        if ended.is_ok() || checkpoint.is_some() {
            self.record(Record::Interruption { checkpoint });
        }
        self.activity = Activity::Recording { then: Some(ended) };
        self.go_on();
    }

    fn end(&mut self, result: Result<Ended>) {
        if let Some(ended) = self.ended.take() {
            let _ = ended.send(result);
        }
        self.myself.stop(None);
    }
}
