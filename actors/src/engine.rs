//! The engine of a device: one thread that owns its decoder and drafters, and polls its commands between two cycles.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use kernels::Pool;
use models::drafter::learn;
use models::train::Workspace;
use models::{Answer, Decoder};
use state::metrics::BatchMetrics;
use state::speculation::controller::{batch_sizes, bucket};
use state::step::RequestId;

use crate::drafting::{Drafted, Drafting};
use crate::error::{Error, Result};
use crate::rollout::{Group, Rollout};
use crate::update::{Objective, Update};

/// What an engine is told.
pub(crate) enum Command {
    /// Decode these answers of a group of a rollout.
    Decode { rollout: Arc<Rollout>, group: usize, samples: Vec<usize> },
    /// Put half of the running answers aside for another device.
    Lend { rollout: Arc<Rollout>, loan: u64 },
    /// Go on with the answers that another device has put aside.
    Borrow { rollout: Arc<Rollout>, loan: u64 },
    /// Train the drafter until told to stop.
    TrainDrafter { rollout: Arc<Rollout>, training: u64 },
    /// Stop training the drafter, within a kernel or between two parameters of a step of its optimiser.
    Preempt,
    /// Compute a micro-batch.
    Compute { update: Arc<Update>, part: usize },
    /// Sum the micro-batches and take the step.
    Finish { update: Arc<Update> },
}

/// What an engine reports.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Report {
    Ended {
        rollout: u64,
        answers: Vec<RequestId>,
    },
    Lent {
        rollout: u64,
        loan: u64,
        answers: Vec<RequestId>,
    },
    DrafterStopped {
        training: u64,
    },
    Computed {
        part: usize,
    },
    Finished,
    /// The engine is gone.
    Died {
        reason: String,
    },
}

/// A device that fails on purpose, for tests of supervision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which device.
    pub device: usize,
    /// When, in its first incarnation.
    pub moment: Moment,
    /// How.
    pub how: Failing,
}

/// How a device fails on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failing {
    /// By a panic.
    Panics,
    /// By saying nothing more until it is given up; then it goes on.
    Hangs,
    /// By the end of the whole process, at once and without a word, as if it were killed; whichever device comes to that moment first.
    Kills,
}

/// When a device fails on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// At this cycle of decoding.
    Cycle(u64),
    /// At this look for commands while it trains the drafter, whose learner is made.
    Look(u64),
    /// At the first such look with this version of the drafter in use, or a later one.
    Published(u64),
    /// At this micro-batch of an update.
    MicroBatch(u64),
}

/// What an engine and who commands it see of each other without a message.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    /// Commands on their way, or not taken yet.
    commands: Arc<AtomicUsize>,
    is_waiting: AtomicBool,
    /// Kernels, and looks for commands.
    done: Arc<AtomicU64>,
}

impl Pulse {
    /// A command is about to be sent: what may be given up for it is given up at once.
    pub(crate) fn announce(&self) {
        self.commands.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a command is on its way, or not taken yet.
    fn is_commanded(&self) -> bool {
        self.done.fetch_add(1, Ordering::Relaxed);
        self.commands.load(Ordering::Relaxed) > 0
    }

    /// How much it has done; nothing while it waits for commands.
    pub(crate) fn done(&self) -> Option<u64> {
        (!self.is_waiting.load(Ordering::Relaxed)).then(|| self.done.load(Ordering::Relaxed))
    }
}

/// Handle of an engine. Dropping it ends the thread after its current cycle, or within a kernel of drafter training.
pub(crate) struct Engine {
    commands: Sender<Command>,
    pulse: Arc<Pulse>,
    _thread: JoinHandle<()>,
}

const STACK: usize = 8 << 20;
/// Cycles after which it is noted what running answers have said: so much is lost with a device, at most.
const NOTE_EVERY: u64 = 64;

impl Engine {
    /// Starts a thread that reports through `report`.
    pub(crate) fn start(
        name: &str,
        threads: usize,
        (pulse, fault): (Arc<Pulse>, Option<Fault>),
        report: impl Fn(Report) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let inbox = Inbox { commands: inbox, pulse: pulse.clone() };
        let body = move || {
            let serve = || State::new(inbox, threads, fault)?.serve(&report);
            let reason = match catch_unwind(AssertUnwindSafe(serve)) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.whole(),
                Err(panic) => message(panic.as_ref()),
            };
            report(Report::Died { reason });
        };
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(body)?;
        Ok(Self { commands, pulse, _thread: thread })
    }

    /// Sends a command that was announced; one to a dead engine is lost, and its death is reported.
    pub(crate) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.pulse.announce();
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("no message"))
}

/// Where commands come in, counted until they are taken.
struct Inbox {
    commands: Receiver<Command>,
    pulse: Arc<Pulse>,
}

impl Inbox {
    /// The next command, if there is one, or once there is; whether nobody can send any more.
    fn take(&self, waits: bool) -> std::result::Result<Command, bool> {
        self.pulse.done.fetch_add(1, Ordering::Relaxed);
        self.pulse.is_waiting.store(waits, Ordering::Relaxed);
        let command = match waits {
            true => self.commands.recv().map_err(|_| true),
            false => self.commands.try_recv().map_err(|error| error == TryRecvError::Disconnected),
        };
        self.pulse.is_waiting.store(false, Ordering::Relaxed);
        if command.is_ok() {
            self.pulse.commands.fetch_sub(1, Ordering::Relaxed);
        }
        command
    }
}

impl Inbox {
    /// Fails as a test of supervision wants it, if this is the moment.
    fn fail_at(&self, fault: Option<Fault>, moment: Moment) {
        let Some(fault) = fault.filter(|fault| fault.moment == moment) else { return };
        match fault.how {
            Failing::Panics => panic!("a fault was asked for at {moment:?}"),
            Failing::Kills => std::process::abort(),
            Failing::Hangs => {}
        }
        while !matches!(self.commands.try_recv(), Err(TryRecvError::Disconnected)) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// The rollout a device works on.
struct Work {
    rollout: Arc<Rollout>,
    decoder: Decoder,
    drafting: Drafting,
}

struct State {
    inbox: Inbox,
    work: Option<Work>,
    /// Drafters of the rollout before.
    earlier: Option<Drafting>,
    cycles: u64,
    looks: u64,
    micro_batches: u64,
    fault: Option<Fault>,
    /// The device's threads; this one is the first of them.
    pool: Arc<Pool>,
    workspace: Workspace,
    /// Of drafter training.
    reading: learn::Workspace,
}

impl State {
    fn new(inbox: Inbox, threads: usize, fault: Option<Fault>) -> Result<Self> {
        let pool = Pool::new(threads)?.interrupted_by(inbox.pulse.commands.clone());
        let pool = Arc::new(pool.counted_by(inbox.pulse.done.clone()));
        let (work, earlier, workspace, reading) = Default::default();
        Ok(Self { inbox, work, earlier, cycles: 0, looks: 0, micro_batches: 0, fault, pool, workspace, reading })
    }

    /// Until the handle is dropped.
    fn serve(&mut self, report: &dyn Fn(Report)) -> Result<()> {
        loop {
            let is_decoding = self.work.as_ref().is_some_and(|w| w.decoder.running() > 0);
            match self.inbox.take(!is_decoding) {
                Ok(command) => self.obey(command, report)?,
                Err(true) => return Ok(()),
                Err(false) => self.cycle(report)?,
            }
        }
    }

    fn obey(&mut self, command: Command, report: &dyn Fn(Report)) -> Result<()> {
        match command {
            Command::Decode { rollout, group, samples } => self.admit(&rollout, group, &samples),
            Command::Lend { rollout, loan } => {
                // Answers take along what their prompts became.
                while self.work.as_ref().is_some_and(|w| w.decoder.is_entering()) {
                    self.cycle(report)?;
                }
                let answers = self.lend(&rollout, loan);
                report(Report::Lent { rollout: rollout.number, loan, answers });
                Ok(())
            }
            Command::Borrow { rollout, loan } => self.borrow(&rollout, loan),
            Command::TrainDrafter { rollout, training } => {
                self.train_drafter(&rollout)?;
                report(Report::DrafterStopped { training });
                Ok(())
            }
            // It stopped when it was announced, or by itself.
            Command::Preempt => Ok(()),
            Command::Compute { update, part } => {
                self.micro_batches += 1;
                self.inbox.fail_at(self.fault, Moment::MicroBatch(self.micro_batches));
                self.put_away();
                self.reading.trim();
                update.compute((&self.pool, &mut self.workspace), part);
                report(Report::Computed { part });
                Ok(())
            }
            Command::Finish { update } => {
                // The next rollout needs no values of layers, and the optimiser their memory.
                if matches!(update.objective, Objective::Reward { .. }) {
                    self.workspace.trim();
                }
                update.finish(&self.pool);
                report(Report::Finished);
                Ok(())
            }
        }
    }

    fn admit(&mut self, rollout: &Arc<Rollout>, group: usize, samples: &[usize]) -> Result<()> {
        let Group { prompt, noise, .. } = &rollout.groups[group];
        let decoder = &mut self.work_on(rollout)?.decoder;
        // What a lost device has begun goes on, unless to have a prompt once for all is worth more than what they had said.
        let pays = |said: usize| samples.len() == 1 || said >= prompt.len();
        let (mut begun, mut fresh) = (Vec::new(), Vec::new());
        for &sample in samples {
            match rollout.noted(group, sample).filter(|request| pays(request.log_probs.len())) {
                Some(request) => begun.push(request),
                None => fresh.push((sample, noise[sample])),
            }
        }
        decoder.admit(group, prompt, &fresh)?;
        begun.into_iter().try_for_each(|request| Ok(decoder.import(request)?))
    }

    fn lend(&mut self, rollout: &Arc<Rollout>, loan: u64) -> Vec<RequestId> {
        let Some(work) = self.work.as_mut().filter(|work| work.rollout.number == rollout.number) else {
            return Vec::new();
        };
        let requests = work.decoder.halve();
        requests.iter().for_each(|running| work.drafting.left(running.id()));
        let ids = requests.iter().map(|running| id(running.request().group, running.request().sample)).collect();
        rollout.put_aside(loan, requests);
        ids
    }

    fn borrow(&mut self, rollout: &Arc<Rollout>, loan: u64) -> Result<()> {
        let missing = || Error::Runtime { reason: format!("nothing was left for loan {loan}") };
        let requests = rollout.take_over(loan).ok_or_else(missing)?;
        let work = self.work_on(rollout)?;
        requests.into_iter().try_for_each(|running| Ok(work.decoder.take_over(running)?))
    }

    /// The work of this rollout; that of an earlier one ends.
    fn work_on(&mut self, rollout: &Arc<Rollout>) -> Result<&mut Work> {
        if self.work.as_ref().is_none_or(|w| w.rollout.number != rollout.number) {
            self.workspace.trim();
            self.reading.trim();
            let decoder = Decoder::new(rollout.target.clone(), rollout.decoding.clone(), self.pool.clone());
            let decoder = decoder.with_cache_max(rollout.cache_tokens_max);
            let decoder = decoder.with_lengths(rollout.speculator.lengths.clone());
            self.put_away();
            let drawn = (&rollout.vocabulary, rollout.decoding.temperature);
            let drafting = Drafting::new(&rollout.speculator, drawn, &self.pool, self.earlier.take())?;
            self.work = Some(Work { rollout: rollout.clone(), decoder, drafting });
        }
        self.work.as_mut().ok_or_else(|| Error::Runtime { reason: "a device has no work".into() })
    }

    fn put_away(&mut self) {
        if let Some(work) = self.work.take() {
            self.earlier = Some(work.drafting);
        }
    }

    fn cycle(&mut self, report: &dyn Fn(Report)) -> Result<()> {
        self.cycles += 1;
        self.inbox.fail_at(self.fault, Moment::Cycle(self.cycles));
        let Some(work) = self.work.as_mut() else { return Ok(()) };
        let answers = work.cycle()?;
        if self.cycles.is_multiple_of(NOTE_EVERY) {
            work.rollout.note(work.decoder.requests());
        }
        if !answers.is_empty() {
            report(Report::Ended { rollout: work.rollout.number, answers });
        }
        Ok(())
    }

    fn train_drafter(&mut self, rollout: &Arc<Rollout>) -> Result<()> {
        self.workspace.trim();
        // The order to stop is obeyed before it is here, and whatever else is to be done stops it too.
        let (inbox, fault, looks) = (&self.inbox, self.fault, &mut self.looks);
        let stop = || {
            // Those from before there is a learner, of which nobody knows how many there are, do not count.
            if fault.is_some() && rollout.speculator.at_work().is_some() {
                *looks += 1;
                inbox.fail_at(fault, Moment::Look(*looks));
                if let Some(Fault { moment: Moment::Published(version), .. }) = fault
                    && rollout.speculator.version() >= version
                {
                    inbox.fail_at(fault, Moment::Published(version));
                }
            }
            inbox.pulse.is_commanded()
        };
        let draws = rollout.decoding.draws();
        let lesson = (draws, &mut self.reading);
        let learned = rollout.speculator.train((&self.pool, &rollout.vocabulary), lesson, stop)?;
        rollout.count(|c| c.learned_in_idle_time(learned));
        Ok(())
    }
}

impl Work {
    /// One cycle; returns the answers that ended.
    fn cycle(&mut self) -> Result<Vec<RequestId>> {
        let Drafted { cycle, seconds, plain_s, version, .. } = self.drafting.cycle(&mut self.decoder)?;
        // Prompts that went along took their part of the time.
        let seconds = seconds * (cycle.rows - cycle.prefilled) as f64 / cycle.rows.max(1) as f64;
        self.rollout.count(|c| {
            c.add_drafts(&cycle, version);
            if cycle.requests == 0 {
                return;
            }
            let bucket = bucket(cycle.requests);
            c.by_batch[bucket].add(&BatchMetrics {
                batch_min: batch_sizes(bucket).0,
                busy_s: seconds,
                rated_s: plain_s.map_or(0.0, |_| seconds),
                plain_s: plain_s.unwrap_or(0.0),
                tokens: cycle.tokens as u64,
                cycles: cycle.requests as u64,
                drafted_cycles: cycle.drafted.0 as u64,
            });
        });
        let add = |answer: Answer| {
            let id = id(answer.group, answer.sample);
            self.rollout.add(answer, version);
            id
        };
        Ok(cycle.ended.into_iter().map(add).collect())
    }
}

fn id(group: usize, sample: usize) -> RequestId {
    RequestId { group, sample }
}

impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        Self::Runtime { reason: format!("a thread could not be started: {source}") }
    }
}

#[cfg(test)]
mod tests;
