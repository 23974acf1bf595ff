//! The engine of a device: one thread that owns its decoder and drafters, and polls its commands between two cycles.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kernels::{NoiseKey, Pool};
use models::drafter::Drafter;
use models::drafter::hybrid::Hybrid;
use models::train::Workspace;
use models::{Cycle, Decoder};
use state::metrics::BatchMetrics;
use state::plan;
use state::speculation::Measured;
use state::speculation::controller::{batch_sizes, bucket};

use crate::error::{Error, Result};
use crate::rollout::Rollout;
use crate::speculator::lock;
use crate::update::Update;

/// What an engine is told.
pub(crate) enum Command {
    /// Decode a group of a rollout.
    Decode { rollout: Arc<Rollout>, group: usize },
    /// Train the drafter until told to stop.
    TrainDrafter { rollout: Arc<Rollout>, training: u64 },
    /// Stop training the drafter, within one micro-batch.
    Preempt,
    /// Compute a micro-batch.
    Compute { update: Arc<Update>, part: usize },
    /// Sum the micro-batches and take the step.
    Finish { update: Arc<Update> },
}

/// What an engine reports.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Report {
    /// So many answers ended: there is room for others.
    Ended {
        rollout: u64,
        answers: usize,
    },
    GroupDone {
        rollout: u64,
        group: usize,
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

/// A device that fails on purpose, for tests of supervision: panics at the given cycle of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which device.
    pub device: usize,
    /// After how many cycles of its first incarnation.
    pub cycle: u64,
}

/// Handle of an engine. Dropping it ends the thread after its current cycle.
pub(crate) struct Engine {
    commands: Sender<Command>,
    _thread: JoinHandle<()>,
}

const STACK: usize = 8 << 20;

impl Engine {
    /// Starts a thread that reports through `report`.
    pub(crate) fn start(
        name: &str,
        threads: usize,
        fault_at: Option<u64>,
        report: impl Fn(Report) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let body = move || {
            let pool = Arc::new(Pool::new(threads));
            let workspace = Workspace::default();
            let mut state = State {
                inbox,
                later: VecDeque::new(),
                work: None,
                kept: Vec::new(),
                cycles: 0,
                fault_at,
                pool,
                workspace,
            };
            let result = catch_unwind(AssertUnwindSafe(|| state.serve(&report)));
            let reason = match result {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(panic) => message(panic.as_ref()),
            };
            report(Report::Died { reason });
        };
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(body)?;
        Ok(Self { commands, _thread: thread })
    }

    /// Sends a command; one to a dead engine is lost, and its death is reported.
    pub(crate) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("no message"))
}

/// The rollout a device works on.
struct Work {
    rollout: Arc<Rollout>,
    decoder: Decoder,
    drafters: Vec<Option<Box<dyn Drafter>>>,
    /// Version of the learned drafter among them.
    version: u64,
    pool: Arc<Pool>,
}

struct State {
    inbox: Receiver<Command>,
    /// Commands met while polling for another.
    later: VecDeque<Command>,
    work: Option<Work>,
    /// Drafters of the rollout before: those that learn nothing from weights go on.
    kept: Vec<Option<Box<dyn Drafter>>>,
    cycles: u64,
    fault_at: Option<u64>,
    /// The device's threads; this one is the first of them.
    pool: Arc<Pool>,
    workspace: Workspace,
}

impl State {
    /// Until the handle is dropped.
    fn serve(&mut self, report: &dyn Fn(Report)) -> Result<()> {
        loop {
            let is_decoding = self.work.as_ref().is_some_and(|w| w.decoder.running() > 0);
            let command = match self.later.pop_front() {
                Some(command) => Ok(command),
                None if is_decoding => {
                    self.inbox.try_recv().map_err(|e| e == std::sync::mpsc::TryRecvError::Disconnected)
                }
                None => self.inbox.recv().map_err(|_| true),
            };
            match command {
                Ok(command) => self.obey(command, report)?,
                Err(true) => return Ok(()),
                Err(false) => self.cycle(report)?,
            }
        }
    }

    fn obey(&mut self, command: Command, report: &dyn Fn(Report)) -> Result<()> {
        match command {
            Command::Decode { rollout, group } => self.admit(&rollout, group),
            Command::TrainDrafter { rollout, training } => {
                self.train_drafter(&rollout)?;
                report(Report::DrafterStopped { training });
                Ok(())
            }
            // It had stopped by itself.
            Command::Preempt => Ok(()),
            Command::Compute { update, part } => {
                self.put_away();
                update.compute((&self.pool, &mut self.workspace), part);
                report(Report::Computed { part });
                Ok(())
            }
            Command::Finish { update } => {
                update.finish(&self.pool);
                report(Report::Finished);
                Ok(())
            }
        }
    }

    fn admit(&mut self, rollout: &Arc<Rollout>, group: usize) -> Result<()> {
        if self.work.as_ref().is_none_or(|w| w.rollout.number != rollout.number) {
            let decoder = Decoder::new(rollout.target.clone(), rollout.decoding.clone(), self.pool.clone());
            let mut drafters = rollout.speculator.drafters(&rollout.vocabulary, &self.pool)?;
            self.put_away();
            for ((new, old), kind) in drafters.iter_mut().zip(&mut self.kept).zip(&rollout.speculator.plan.drafters) {
                if matches!(kind, plan::Drafter::Suffix { .. }) && old.is_some() {
                    *new = old.take();
                }
            }
            let version = rollout.speculator.version();
            let pool = self.pool.clone();
            self.work = Some(Work { rollout: rollout.clone(), decoder, drafters, version, pool });
        }
        let Some(work) = self.work.as_mut() else { return Ok(()) };
        rollout.restart(group);
        let samples: Vec<(usize, NoiseKey)> = rollout.groups[group].noise.iter().copied().enumerate().collect();
        Ok(work.decoder.admit(group, &rollout.groups[group].prompt, &samples)?)
    }

    fn put_away(&mut self) {
        if let Some(work) = self.work.take() {
            self.kept = work.drafters;
        }
    }

    fn cycle(&mut self, report: &dyn Fn(Report)) -> Result<()> {
        let Some(work) = self.work.as_mut() else { return Ok(()) };
        self.cycles += 1;
        assert!(self.fault_at != Some(self.cycles), "a fault was asked for at cycle {}", self.cycles);
        let before = work.decoder.running();
        let complete = work.cycle(self.cycles)?;
        let answers = before - work.decoder.running();
        if answers > 0 {
            report(Report::Ended { rollout: work.rollout.number, answers });
        }
        for group in complete {
            work.rollout.harvest(group);
            report(Report::GroupDone { rollout: work.rollout.number, group });
        }
        Ok(())
    }

    fn train_drafter(&mut self, rollout: &Arc<Rollout>) -> Result<()> {
        let (inbox, later) = (&self.inbox, &mut self.later);
        // Anything but the order to stop is kept for afterwards, and stops the training too.
        let stop = || match inbox.try_recv() {
            Ok(Command::Preempt) | Err(std::sync::mpsc::TryRecvError::Disconnected) => true,
            Ok(other) => {
                later.push_back(other);
                true
            }
            Err(std::sync::mpsc::TryRecvError::Empty) => false,
        };
        let (batches, loss) = rollout.speculator.train(&self.pool, &rollout.vocabulary, stop)?;
        rollout.count(|c| {
            c.drafter_batches += batches;
            c.drafter_loss = if batches > 0 { loss } else { c.drafter_loss };
        });
        Ok(())
    }
}

impl Work {
    /// One cycle with the strategy that the controller chooses; returns the groups that became complete.
    fn cycle(&mut self, draw: u64) -> Result<Vec<usize>> {
        let speculator = self.rollout.speculator.clone();
        if speculator.version() != self.version {
            // Hot swap between two cycles: only the learned drafter is replaced.
            self.version = speculator.version();
            let fresh = speculator.drafters(&self.rollout.vocabulary, &self.pool)?;
            for ((old, new), kind) in self.drafters.iter_mut().zip(fresh).zip(&speculator.plan.drafters) {
                if matches!(kind, plan::Drafter::Eagle { .. }) {
                    *old = new;
                }
            }
        }
        let batch = self.decoder.running();
        let key = NoiseKey::new(draw, 9, 0, 0, 0);
        let draws = [key.uniform(0, 0), key.uniform(0, 1)];
        let drafters = &self.drafters;
        let ready = |i: usize| drafters.get(i).is_some_and(Option::is_some);
        let strategy = lock(&speculator.controller).choose(batch, draws, &ready);
        let began = Instant::now();
        let suffix = strategy.filter(|s| s.suffix > 0).and_then(|_| speculator.plan.suffix());
        let mut hybrid;
        let drafter: Option<&mut dyn Drafter> = match (strategy, suffix) {
            (Some(s), Some(suffix)) => match self.drafters.get_disjoint_mut([suffix, s.drafter]) {
                Ok([Some(suffix), Some(learned)]) => {
                    hybrid = Hybrid::new(suffix.as_mut(), learned.as_mut());
                    Some(&mut hybrid)
                }
                _ => None,
            },
            (Some(s), None) => self.drafters[s.drafter].as_deref_mut().map(|drafter| drafter as &mut dyn Drafter),
            (None, _) => None,
        };
        let cycle = self.decoder.cycle(drafter.zip(strategy.as_ref()))?;
        let seconds = began.elapsed().as_secs_f64();
        let plain_rate = {
            let mut controller = lock(&speculator.controller);
            let Cycle { requests, rows, catch_up_s, draft_s, .. } = cycle;
            let tokens = cycle.tokens as u64;
            controller.observe(batch, strategy, Measured { tokens, requests, rows, seconds, catch_up_s, draft_s });
            controller.plain_rate(batch)
        };
        let is_learned = strategy
            .is_some_and(|s| matches!(speculator.plan.drafters.get(s.drafter), Some(plan::Drafter::Eagle { .. })));
        self.rollout.count(|c| {
            let drafted = (cycle.drafted.0 as u64, cycle.drafted.1 as u64);
            c.drafted = (c.drafted.0 + drafted.0, c.drafted.1 + drafted.1);
            if is_learned {
                c.learned = (c.learned.0 + drafted.0, c.learned.1 + drafted.1);
            }
            let bucket = bucket(batch);
            c.by_batch[bucket].add(&BatchMetrics {
                batch_min: batch_sizes(bucket).0,
                busy_s: seconds,
                plain_s: plain_rate.map_or(seconds, |rate| cycle.tokens as f64 / rate),
                tokens: cycle.tokens as u64,
                cycles: cycle.requests as u64,
                drafted_cycles: drafted.0,
            });
        });
        let mut complete = Vec::new();
        for answer in cycle.ended {
            for drafter in self.drafters.iter_mut().flatten() {
                drafter.ended(answer.id, &answer.tokens, answer.prompt);
            }
            let group = answer.group;
            if self.rollout.add(answer) {
                complete.push(group);
            }
        }
        Ok(complete)
    }
}

impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        Self::Runtime { reason: format!("a thread could not be started: {source}") }
    }
}
