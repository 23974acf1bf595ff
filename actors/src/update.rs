//! One step of the optimiser: micro-batches that devices compute in any order, summed in a fixed tree.

use std::sync::{Arc, Mutex};

use kernels::Pool;
use models::optim::{AdamW, TreeSum, learning_rate};
use models::train::{Sequence, Workspace, gradient, log_probs};
use models::{Answer, Target, Weights};
use state::algorithm::{divergence, token_signal};
use state::plan::{Grpo, Optimizer};

use crate::speculator::lock;

/// A sequence, and for reinforcement its recorded log-probabilities and its advantage.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) sequence: Sequence,
    pub(crate) recorded: Vec<f32>,
    pub(crate) advantage: f32,
}

/// What is minimised, as a mean over `tokens` tokens of the whole step.
#[derive(Debug, Clone)]
pub(crate) enum Objective {
    /// Negative log-likelihood.
    Likelihood,
    /// The algorithm's signal; with the reference model if it has a KL term.
    Reward { grpo: Grpo, reference: Option<Arc<Target>> },
}

pub(crate) struct Update {
    pub(crate) target: Target,
    pub(crate) weights: Arc<Weights>,
    pub(crate) objective: Objective,
    pub(crate) tokens: usize,
    pub(crate) inverse_temperature: f32,
    pub(crate) optimizer: Optimizer,
    /// Step and steps of the training, for the schedule.
    pub(crate) step: (usize, usize),
    /// Moments before the step.
    pub(crate) adam: Arc<AdamW>,
    pub(crate) parts: Arc<Vec<Vec<Item>>>,
    pub(crate) sums: Mutex<Sums>,
    pub(crate) outcome: Mutex<Option<Outcome>>,
}

/// What the micro-batches so far add up to.
#[derive(Debug)]
pub(crate) struct Sums {
    gradients: TreeSum,
    /// Loss and KL divergence of each.
    losses: Vec<[f64; 2]>,
}

impl Sums {
    pub(crate) fn new(parts: usize) -> Mutex<Self> {
        Mutex::new(Self { gradients: TreeSum::new(parts), losses: vec![[0.0; 2]; parts] })
    }
}

/// What a step made.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) weights: Arc<Weights>,
    pub(crate) adam: Arc<AdamW>,
    pub(crate) loss: f64,
    /// From the reference, if there is one.
    pub(crate) kl: Option<f64>,
    /// Of the gradient, before clipping.
    pub(crate) norm: f64,
    pub(crate) lr: f64,
    pub(crate) is_finite: bool,
}

impl Update {
    /// The same step from the beginning, for when a device was lost with its part of the sum.
    pub(crate) fn anew(&self) -> Self {
        Self {
            target: self.target.clone(),
            weights: self.weights.clone(),
            objective: self.objective.clone(),
            optimizer: self.optimizer.clone(),
            adam: self.adam.clone(),
            parts: self.parts.clone(),
            sums: Sums::new(self.parts.len()),
            outcome: Mutex::new(None),
            ..*self
        }
    }

    /// Gradient of one micro-batch; the same bits on any device.
    pub(crate) fn compute(&self, (pool, workspace): (&Pool, &mut Workspace), part: usize) {
        let items = self.learned(part);
        let sequences: Vec<Sequence> = items.iter().map(|i| i.sequence.clone()).collect();
        let mut losses = [0.0; 2];
        let mut gradients = workspace.zeros(&self.weights);
        if !sequences.is_empty() {
            let reference = self.reference(pool, &sequences);
            let slope = |item: usize, token: usize, now: f32| {
                let reference = reference.as_ref().map(|log_probs| log_probs[item][token]);
                let (part, slope) = self.signal(items[item], token, now, reference);
                losses[0] += f64::from(part) / self.tokens as f64;
                losses[1] += reference.map_or(0.0, |reference| divergence(now, reference)) / self.tokens as f64;
                slope / self.tokens as f32
            };
            let inverse = self.inverse_temperature;
            gradient((pool, &mut *workspace), &self.target, &sequences, inverse, slope, &mut gradients);
        }
        let mut sums = lock(&self.sums);
        sums.losses[part] = losses;
        workspace.give_back(sums.gradients.insert(part, gradients));
    }

    /// Tokens that a micro-batch computes with.
    pub(crate) fn tokens_of(&self, part: usize) -> usize {
        self.learned(part).iter().map(|item| item.sequence.tokens.len()).sum()
    }

    /// Items that pull the weights: an advantage of zero without a KL term adds exactly nothing.
    fn learned(&self, part: usize) -> Vec<&Item> {
        let pulls = |item: &&Item| match &self.objective {
            Objective::Likelihood => true,
            Objective::Reward { grpo, .. } => item.advantage != 0.0 || grpo.kl != 0.0,
        };
        self.parts[part].iter().filter(pulls).collect()
    }

    fn reference(&self, pool: &Pool, sequences: &[Sequence]) -> Option<Vec<Vec<f32>>> {
        let Objective::Reward { reference: Some(reference), .. } = &self.objective else { return None };
        Some(log_probs(pool, reference, sequences, self.inverse_temperature))
    }

    /// What a token adds to the loss, and its derivative by the token's log-probability.
    fn signal(&self, item: &Item, token: usize, now: f32, reference: Option<f32>) -> (f32, f32) {
        match &self.objective {
            Objective::Likelihood => (-now, -1.0),
            Objective::Reward { grpo, .. } => token_signal(grpo, now, item.recorded[token], reference, item.advantage),
        }
    }

    /// Takes the step, once all micro-batches are in.
    pub(crate) fn finish(&self, pool: &Pool) {
        let ([loss, kl], sum) = {
            let mut sums = lock(&self.sums);
            let Some(sum) = sums.gradients.take() else { return };
            ([0, 1].map(|which| sums.losses.iter().map(|losses| losses[which]).sum::<f64>()), sum)
        };
        let kl = matches!(self.objective, Objective::Reward { reference: Some(_), .. }).then_some(kl);
        let mut adam = (*self.adam).clone();
        let lr = learning_rate(&self.optimizer, self.step.0, self.step.1);
        let (weights, norm) = adam.step(pool, &self.weights, (sum, 1.0), &self.optimizer, lr);
        let is_finite = norm.is_finite() && weights.are_finite();
        let (weights, adam) = (Arc::new(weights), Arc::new(adam));
        *lock(&self.outcome) = Some(Outcome { weights, adam, loss, kl, norm, lr, is_finite });
    }
}

impl Item {
    /// An answer and how much better it was than its group.
    pub(crate) fn of(answer: Answer, advantage: f32) -> Self {
        let sequence = Sequence { tokens: answer.tokens, prompt: answer.prompt };
        Self { sequence, recorded: answer.log_probs, advantage }
    }
}
