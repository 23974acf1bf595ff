//! What a run tells while it runs.

use std::sync::Arc;

use state::metrics::StepMetrics;

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
    /// A step begins, when the observer returns.
    StepBegan {
        /// Stage of the plan, from 0, and stages.
        stage: (usize, usize),
        /// Step of the stage, from 0, and steps.
        step: (usize, usize),
        /// `sft`, `grpo`, `evaluate` or `export`.
        kind: &'static str,
    },
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
    /// Something that an earlier session left cannot be used, and the run goes on without it.
    Warning(String),
    /// All steps were done before: there is nothing to do.
    AlreadyComplete,
    /// The run is ending because the user asked for it.
    Stopping,
}

/// Who is told.
#[derive(Clone)]
pub(crate) struct Observer(pub(crate) Arc<dyn Fn(Progress) + Send + Sync>);

impl Observer {
    pub(crate) fn tell(&self, progress: Progress) {
        (self.0)(progress);
    }
}
