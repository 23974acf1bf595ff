//! What a run tells while it runs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use state::algorithm::Outcome;
use state::metrics::StepMetrics;
use state::speculation::Decision;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Complete,
    /// The user stopped it; it can be resumed.
    Interrupted,
}

/// News of a run.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Work on a run begins.
    SessionBegan {
        /// The run's folder.
        dir: PathBuf,
        /// Where an earlier session's work goes on: `sft` or the like, a step of its training, from 0, and how many it has. Nothing if
        /// there was none.
        from: Option<(&'static str, usize, usize)>,
        /// Steps that were done after the checkpoint that it goes on from: they are done again.
        again: usize,
    },
    /// A step begins, when the observer returns.
    StepBegan {
        /// Stage of the plan, from 0, and stages.
        stage: (usize, usize),
        /// Step of the training, from 0, and steps; evaluations divide it into stages.
        step: (usize, usize),
        /// `sft`, `grpo`, `evaluate` or `export`.
        kind: &'static str,
    },
    /// Answers to a prompt are scored. Groups come in whatever order they end.
    Scored(Box<ScoredGroup>),
    /// Groups that are complete, of how many.
    Groups {
        /// Complete ones.
        done: usize,
        /// All.
        total: usize,
    },
    /// Micro-batches that are computed, of how many.
    MicroBatches {
        /// Computed ones.
        done: usize,
        /// All.
        total: usize,
    },
    /// A step is done. It becomes durable while the next one is computed; what a crash loses is computed again.
    StepDone(Box<StepMetrics>),
    /// A device was lost and will be started again.
    DeviceLost {
        /// Which.
        device: usize,
        /// Why.
        reason: String,
        /// When, in milliseconds.
        after_ms: u64,
    },
    /// The controller was told something, or chose: only where [`Options::tells_decisions`](crate::Options::tells_decisions). In the
    /// order in which it did, thousands a second, from whichever thread decodes, while others wait for the controller: an observer must
    /// not wait for anything here.
    Decided(Box<Decision>),
    /// Something is not as whoever wrote the workflow may think, or cannot be used, and the run goes on without it.
    Warning(String),
    /// All steps were done before: there is nothing to do.
    AlreadyComplete,
    /// The run is ending because the user asked for it.
    Stopping,
}

/// Answers to one prompt, as rewards found them.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredGroup {
    /// Which of the step's groups it is, from 0.
    pub group: usize,
    /// What was asked, without template.
    pub question: String,
    /// What the data says is right.
    pub reference: String,
    /// In the order of their samples.
    pub answers: Vec<ScoredAnswer>,
}

/// An answer, as rewards found it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredAnswer {
    /// Its text.
    pub text: String,
    /// Length, in tokens.
    pub tokens: usize,
    /// Whether it was cut at the longest allowed length.
    pub truncated: bool,
    /// Version of the learned drafter that was in use where it ended; 0: none. It is in no token of the answer.
    pub drafter_version: u64,
    /// Whether it is right by the first reward that compares it with the reference.
    pub is_correct: bool,
    /// Its score, or why there is none.
    pub outcome: Outcome,
}

/// Who is told.
#[derive(Clone)]
pub(crate) struct Observer {
    tell: Arc<dyn Fn(Progress) + Send + Sync>,
    has_panicked: Arc<AtomicBool>,
}

impl Observer {
    pub(crate) fn new(tell: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self { tell: Arc::new(tell), has_panicked: Arc::default() }
    }

    /// One that panics is told nothing any more: it runs within the supervisor or an engine, and days of training are worth more.
    pub(crate) fn tell(&self, progress: Progress) {
        if self.has_panicked.load(Ordering::Relaxed) {
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| (self.tell)(progress))).is_err() {
            self.has_panicked.store(true, Ordering::Relaxed);
            tracing::error!("who observes the run has panicked, and is told nothing any more");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn who_panics_is_told_nothing_any_more() {
        let told = Arc::new(AtomicUsize::new(0));
        let counts = told.clone();
        let observer = Observer::new(move |_| assert!(counts.fetch_add(1, Ordering::Relaxed) < 1, "meant to panic"));
        (0..4).for_each(|_| observer.tell(Progress::Stopping));
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }
}
