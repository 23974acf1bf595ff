//! A run replayed from its journal: what is done, and where to go on.
//!
//! * **RUN-1** The position is never past what a checkpoint can restore: steps that changed the weights after the last
//!   checkpoint are done again.
//! * **RUN-2** A step counts once, however often it was done: the latest time.
//! * **RUN-3** The plan is the newest session's: it may speculate otherwise than the one that the run began with.

use crate::journal::{Event, Inputs};
use crate::metrics::StepMetrics;
use crate::plan::{Plan, Step};

/// Parts of a run's folder that are its own.
pub const JOURNAL: &str = "journal";
/// The same, of what it goes on from.
pub const CHECKPOINTS: &str = "checkpoints";

/// A step of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Stage of the plan, from 0.
    pub stage: usize,
    /// Step within the stage, from 0.
    pub step: usize,
}

/// What the journal says about a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunState {
    /// The plan of the newest session, once the run began.
    pub plan: Option<Box<Plan>>,
    /// Hash of the plan.
    pub plan_sha256: String,
    /// Version of the noise the run draws with.
    pub noise_version: u32,
    /// What it began with.
    pub inputs: Inputs,
    /// What to do next.
    pub next: Position,
    /// Folder name of the checkpoint to start from; none: the plan's own weights.
    pub checkpoint: Option<String>,
    /// Processes that worked on the run.
    pub sessions: u32,
    /// Steps that count, in order.
    pub history: Vec<StepMetrics>,
    /// BLAKE3 of the weights after the last of them.
    pub weights_blake3: String,
    /// Whether all is done.
    pub is_complete: bool,
    /// Whether the last session was asked to stop.
    pub is_interrupted: bool,
    /// Kernel variant of the last session.
    pub kernels: String,
    /// Devices of the last session.
    pub devices: Vec<String>,
    /// Restarts of devices.
    pub restarts: usize,
}

/// Steps of a stage; evaluations and exports are one.
#[must_use]
pub fn steps_of(step: &Step) -> usize {
    match step {
        Step::Sft(sft) => sft.steps,
        Step::Grpo(grpo) => grpo.steps,
        Step::Evaluate(_) | Step::Export(_) => 1,
    }
}

impl Position {
    /// The following step; `stage` is past the plan's last when all is done.
    #[must_use]
    pub fn after(self, plan: &Plan) -> Self {
        let step = self.step + 1;
        match plan.steps.get(self.stage) {
            Some(stage) if step < steps_of(stage) => Self { step, ..self },
            _ => Self { stage: self.stage + 1, step: 0 },
        }
    }
}

impl RunState {
    /// Takes in all events, oldest first.
    #[must_use]
    pub fn replay(events: &[Event]) -> Self {
        let mut state = Self::default();
        // Weights have changed since the last checkpoint.
        let mut is_ahead = false;
        for event in events {
            state.apply(event, &mut is_ahead);
        }
        state
    }

    fn apply(&mut self, event: &Event, is_ahead: &mut bool) {
        match event {
            Event::RunStarted { plan, plan_sha256, noise_version, inputs } => {
                self.plan = Some(plan.clone());
                self.plan_sha256.clone_from(plan_sha256);
                self.noise_version = *noise_version;
                self.inputs.clone_from(inputs);
            }
            Event::SessionStarted { n, devices, kernels, plan } => {
                *is_ahead = false;
                self.plan = plan.clone().or_else(|| self.plan.take());
                self.sessions = n + 1;
                self.is_interrupted = false;
                self.devices.clone_from(devices);
                self.kernels.clone_from(kernels);
            }
            Event::StepCommitted { metrics, weights_blake3, checkpoint } => {
                self.commit(metrics, checkpoint.as_ref(), is_ahead);
                self.weights_blake3.clone_from(weights_blake3);
            }
            Event::DeviceRestarted { .. } => self.restarts += 1,
            Event::RunCompleted { weights_blake3 } => {
                self.is_complete = true;
                self.weights_blake3.clone_from(weights_blake3);
            }
            Event::Interrupted { checkpoint } => {
                self.is_interrupted = true;
                let last = self.history.last().map(|m| Position { stage: m.stage, step: m.step });
                if let (Some(folder), Some(last), Some(plan)) = (checkpoint, last, &self.plan) {
                    self.next = last.after(plan);
                    self.checkpoint = Some(folder.clone());
                    *is_ahead = false;
                }
            }
        }
    }

    fn commit(&mut self, metrics: &StepMetrics, checkpoint: Option<&String>, is_ahead: &mut bool) {
        let at = Position { stage: metrics.stage, step: metrics.step };
        // What is done again takes the place of what was done.
        while self.history.pop_if(|m| Position { stage: m.stage, step: m.step } >= at).is_some() {}
        self.history.push(metrics.clone());
        let Some(plan) = &self.plan else { return };
        let changes_weights = plan.steps.get(at.stage).is_some_and(Step::changes_weights);
        if let Some(folder) = checkpoint {
            self.checkpoint = Some(folder.clone());
            *is_ahead = false;
        } else if changes_weights {
            *is_ahead = true;
        }
        // An evaluation done again from an older checkpoint does not take back what the newer one holds.
        if checkpoint.is_some() || (!*is_ahead && at == self.next) {
            self.next = at.after(plan);
        }
    }
}

#[cfg(test)]
mod tests;
