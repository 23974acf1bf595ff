//! What a run measured: typed values, written by the actors, read by reports.

use serde::{Deserialize, Serialize};

use crate::watchdog::PutOff;

/// What one optimiser step (or one evaluation, or export) measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Stage of the plan, from 0.
    pub stage: usize,
    /// Step within the stage, from 0.
    pub step: usize,
    /// Steps of the stage.
    pub steps: usize,
    /// Optimiser steps of the same training before the stage, and all of it, where evaluations divide it.
    pub begun: usize,
    /// Steps of the whole training, or of the stage where it is none.
    pub of: usize,
    /// Optimiser steps of the run before this one: the version of the policy that answers in it.
    pub policy_version: u32,
    /// `sft`, `grpo`, `evaluate` or `export`.
    pub kind: String,
    /// Mean loss a token (SFT, GRPO).
    pub loss: f64,
    /// Norm of its gradient, before clipping (SFT, GRPO).
    pub grad_norm: f64,
    /// Learning rate of the step (SFT, GRPO).
    pub lr: f64,
    /// Estimate of the entropy of a token where it was sampled, in nats: the mean of minus its log-probability.
    pub entropy: f64,
    /// Estimate of the KL divergence from the first model (k3), mean over tokens, where the loss has a KL term.
    pub kl: Option<f64>,
    /// Mean reward of scored rollouts.
    pub reward: f64,
    /// Share of correct answers.
    pub accuracy: f64,
    /// Rollouts that ended, scored or not.
    pub rollouts: usize,
    /// Rollouts left out because they could not be scored.
    pub failed: usize,
    /// Rollouts cut at the longest allowed answer.
    pub truncated: usize,
    /// Answer lengths in tokens: mean, 75th percentile, maximum.
    pub length_mean: f64,
    /// 75th percentile of lengths.
    pub length_p75: usize,
    /// Longest answer.
    pub length_max: usize,
    /// Tokens sampled in rollouts (or trained on in SFT).
    pub tokens: u64,
    /// Target forwards a request took part in, summed over requests; `tokens / cycles` is the accept length.
    pub cycles: u64,
    /// Tokens emitted in cycles that had a draft.
    pub drafted_tokens: u64,
    /// Request-cycles that had a draft.
    pub drafted_cycles: u64,
    /// Mean tokens per request-cycle that had a draft, bonus included; 1 when nothing was drafted.
    pub accept_length: f64,
    /// Mean accept length of the learned drafter alone; 0 when it did not draft.
    pub learned_accept_length: f64,
    /// For each level of its drafts, from the first on: how often its guesses were to decide because all above were right, and
    /// how often one of them was right.
    pub by_level: Vec<(u64, u64)>,
    /// Its drafts by version: within a long tail newer ones take over.
    pub by_version: Vec<VersionMetrics>,
    /// Seconds of the whole step.
    pub wall_s: f64,
    /// Seconds until the last device had drained.
    pub rollout_s: f64,
    /// Seconds of forward, backward and optimiser.
    pub update_s: f64,
    /// Seconds for which the run waited until the step before was durable; `wall_s` includes them. Most of the writing goes on
    /// while a step is computed.
    pub checkpoint_s: f64,
    /// Device-seconds waited in rollout for the last device.
    pub idle_s: f64,
    /// Part of them in which the drafter was taught or examined.
    pub idle_used_s: f64,
    /// Part of them left to rest, because versions of the drafter have stopped getting better.
    pub idle_rested_s: f64,
    /// Answers that a device which had run dry took over from a busy one.
    pub lent: u64,
    /// Device-seconds in which such devices decoded them: waited they would have else.
    pub borrowed_s: f64,
    /// Drafter micro-batches trained.
    pub drafter_batches: u64,
    /// Loss of the drafter's last micro-batch of the step, if there was one.
    pub drafter_loss: Option<f64>,
    /// Share of held-out tokens that the newest version scored in the step guessed at once, if one was scored: of what the step's policy
    /// says, if that is enough.
    pub drafter_held_out: Option<f64>,
    /// The same within its first three guesses.
    pub drafter_held_out_top3: Option<f64>,
    /// Share of held-out tokens of what the step's policy says that the version in use guessed at once before it learned from any of it:
    /// what the policy's update has left of what was learned. Nothing where so little is held out of the step that it says nothing.
    pub drafter_held_out_before: Option<f64>,
    /// The same within its first three guesses.
    pub drafter_held_out_before_top3: Option<f64>,
    /// Versions that were not published because they guessed worse than the one in use.
    pub drafter_discarded: u64,
    /// Why that version was put off at the end of the step, if it was.
    pub drafter_off: Option<PutOff>,
    /// Newest published drafter version.
    pub drafter_version: u64,
    /// Sampled tokens a second, all devices.
    pub tokens_per_s: f64,
    /// Estimate of the same without speculation, from the measured times of plain cycles at the same batch sizes.
    pub plain_tokens_per_s: f64,
    /// Where the time of rollouts went, by the number of answers that a device decoded together.
    pub by_batch: Vec<BatchMetrics>,
    /// Seconds from each order to stop drafter training to its end.
    pub preemptions_s: Vec<f64>,
    /// Restarts of devices during the step.
    pub restarts: usize,
    /// Phases of each device over the step, for the picture.
    pub timeline: Vec<Vec<PhaseSpan>>,
}

/// What one version of the learned drafter did in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionMetrics {
    /// The version.
    pub version: u64,
    /// Request-cycles that it drafted for.
    pub cycles: u64,
    /// Tokens emitted in these.
    pub tokens: u64,
}

impl StepMetrics {
    /// Whether it was a step of a training.
    #[must_use]
    pub fn learns(&self) -> bool {
        self.kind == "sft" || self.kind == "grpo"
    }
}

/// Cycles of about the same batch size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchMetrics {
    /// Smallest batch size it stands for: 1, 2, 3, 5, 9, 17 or 33.
    pub batch_min: usize,
    /// Device-seconds in these cycles.
    pub busy_s: f64,
    /// Part of them for which is known what plain decoding would have taken, and that.
    pub rated_s: f64,
    /// Seconds of plain decoding instead of `rated_s`.
    pub plain_s: f64,
    /// Tokens emitted.
    pub tokens: u64,
    /// Request-cycles.
    pub cycles: u64,
    /// Request-cycles that had a draft.
    pub drafted_cycles: u64,
}

/// The nearest rank: the smallest of sorted values that so many percent of them do not exceed; nothing of none, or of 0 percent.
#[must_use]
pub fn nearest_rank<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    sorted.get((sorted.len() * percent).div_ceil(100).checked_sub(1)?).copied()
}

/// Adds what became of the levels of other drafts, which may be deeper.
pub fn add_levels(sum: &mut Vec<(u64, u64)>, new: &[(u64, u64)]) {
    sum.resize(sum.len().max(new.len()), (0, 0));
    for (sum, new) in sum.iter_mut().zip(new) {
        *sum = (sum.0 + new.0, sum.1 + new.1);
    }
}

impl BatchMetrics {
    /// Adds what another device or step measured at this batch size.
    pub fn add(&mut self, other: &Self) {
        self.batch_min = self.batch_min.max(other.batch_min);
        self.busy_s += other.busy_s;
        self.rated_s += other.rated_s;
        self.plain_s += other.plain_s;
        self.tokens += other.tokens;
        self.cycles += other.cycles;
        self.drafted_cycles += other.drafted_cycles;
    }
}

/// A stretch of time a device spent in one phase.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PhaseSpan {
    /// The phase.
    pub phase: crate::device::Phase,
    /// Seconds since the step began.
    pub start_s: f64,
    /// Seconds since the step began.
    pub end_s: f64,
}

/// A bar of a histogram.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// So many seconds at most, and more than the bar before.
    pub up_to_s: f64,
    /// How many.
    pub count: usize,
}

/// What `taper report` shows. Keys of the JSON form are these field names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run.
    pub name: String,
    /// `running`, `interrupted` or `complete`.
    pub status: String,
    /// Optimiser steps committed.
    pub steps: usize,
    /// Seconds over all sessions of the run.
    pub wall_s: f64,
    /// Seconds in rollout.
    pub rollout_s: f64,
    /// Seconds in update.
    pub update_s: f64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Tokens sampled a second of rollout.
    pub tokens_per_s: f64,
    /// The same without speculation, estimated from plain cycles.
    pub plain_tokens_per_s: f64,
    /// Accept length of each GRPO step.
    pub accept_length: Vec<f64>,
    /// Accept length of the learned drafter of each GRPO step.
    pub learned_accept_length: Vec<f64>,
    /// For each level of the learned drafter's drafts, how often one of its guesses was right when those above were.
    pub acceptance_by_level: Vec<f64>,
    /// Share of held-out tokens that the drafter guesses at once, of each GRPO step in which a version was scored: step, share.
    pub drafter_held_out: Vec<(usize, f64)>,
    /// The same within its first three guesses.
    pub drafter_held_out_top3: Vec<(usize, f64)>,
    /// The same of the version in use before the step, after the policy's update and before anything was learned from its answers.
    pub drafter_held_out_before: Vec<(usize, f64)>,
    /// The same within its first three guesses.
    pub drafter_held_out_before_top3: Vec<(usize, f64)>,
    /// Versions of the drafter that were not published because they guessed worse than the one in use.
    pub drafter_discarded: u64,
    /// Seconds from an order to stop drafter training to its end: median and 99th percentile.
    pub preemption_s: Option<(f64, f64)>,
    /// How many of them took how long: powers of two.
    pub preemptions: Vec<Bar>,
    /// Device-seconds waited for the last device.
    pub idle_s: f64,
    /// Part used for drafter training.
    pub idle_used_s: f64,
    /// Part left to rest, because versions of the drafter had stopped getting better.
    pub idle_rested_s: f64,
    /// Seconds for which each device waited, in the order of `devices`.
    pub idle_by_device_s: Vec<f64>,
    /// Answers that a device which had run dry took over from a busy one.
    pub lent: u64,
    /// Device-seconds in which such devices decoded them.
    pub borrowed_s: f64,
    /// Where the time of rollouts went, by the number of answers that a device decoded together.
    pub by_batch: Vec<BatchMetrics>,
    /// Held-out accuracy of the last evaluation before the first step of GRPO, or of a training if there is none.
    pub accuracy_before: Option<f64>,
    /// Held-out accuracy of the last evaluation after the end of the last training.
    pub accuracy_after: Option<f64>,
    /// BLAKE3 of the final (or last committed) weights.
    pub weights_blake3: String,
    /// Kernel variant in use.
    pub kernels: String,
    /// Names of the devices.
    pub devices: Vec<String>,
    /// Every committed step.
    pub history: Vec<StepMetrics>,
}
