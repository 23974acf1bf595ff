//! Training of the learned drafter on rollouts just made. It is shown a token and what the target made of those before it, and
//! guesses on from its own guesses as a draft does (training-time test: Li et al. 2025, "EAGLE-3", section 3.2). Tokens are
//! learned by cross-entropy against the target's own distribution, and by `Eagle` hidden states too, by SmoothL1 (Li et al. 2024,
//! "EAGLE", section 4.2). Embedding and head stay the target's.

use kernels::Pool;
use state::plan::{DrafterShape, Network as Kind, Optimizer, Schedule};

use super::Vocabulary;
use super::buffer::Window;
use super::eagle;
use super::network::Network;
use crate::error::Result;
use crate::load::{Config, RawWeights};
use crate::optim::{AdamW, Gradients};
use crate::target::Target;
use crate::weights::Weights;

mod batch;
mod loss;

use batch::{Batch, Drawn};

/// Weights of the drafter in training, with the moments of its optimiser.
#[derive(Debug, Clone)]
pub struct Learner {
    target: Config,
    shape: DrafterShape,
    levels: usize,
    weights: Weights,
    adam: AdamW,
    optimizer: Optimizer,
    steps: u32,
    /// For the step to come.
    sum: Reading,
}

/// What windows teach: gradients and loss, summed over their guesses.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    gradients: Gradients,
    guesses: usize,
    loss: f64,
}

/// Reads windows with one version of the weights, apart from the learner: several devices may read at the same time.
#[derive(Debug, Clone)]
pub struct Reader {
    target: Config,
    shape: DrafterShape,
    levels: usize,
    weights: Weights,
}

impl Reader {
    /// Reads windows; nothing if the pool was interrupted.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn read(&self, pool: &Pool, vocabulary: &Vocabulary, windows: &[Window]) -> Result<Option<Reading>> {
        let batch = Batch::new(windows, &self.target, self.shape, self.levels);
        if batch.guesses() == 0 {
            return Ok(Some(Reading::default()));
        }
        let network = Network::new(&self.target, self.shape, &self.weights)?;
        let mut gradients = self.weights.zeros();
        let whole = (vocabulary, self.shape.network);
        let loss = pool.interruptibly(|| loss::gradient(pool, &batch, &network, whole, &mut gradients));
        Ok(loss.map(|loss| Reading { gradients, guesses: batch.guesses(), loss }))
    }
}

impl Learner {
    /// Starts from `weights`; of each token it learns the next guess only.
    #[must_use]
    pub fn new(target: &Config, shape: DrafterShape, weights: Weights, lr: f64) -> Self {
        let optimizer = Optimizer {
            lr,
            betas: (0.9, 0.95),
            weight_decay: 0.0,
            clip_norm: 0.5,
            warmup: 0,
            schedule: Schedule::Constant,
        };
        let (target, adam) = (target.clone(), AdamW::new(&weights));
        Self { target, shape, levels: 1, adam, weights, optimizer, steps: 0, sum: Reading::default() }
    }

    /// From now on it learns so many guesses of each token, each from the one before.
    pub fn set_levels(&mut self, levels: usize) {
        self.levels = levels.max(1);
    }

    /// [`Learner::set_levels`] from the start.
    #[must_use]
    pub fn with_levels(mut self, levels: usize) -> Self {
        self.set_levels(levels);
        self
    }

    /// A fresh drafter: keyed random, but what goes in starts as a copy of the target's highest hidden state that it reads, and what
    /// comes out is read as the target's.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn fresh(target: &Target, shape: DrafterShape, seed: u64) -> Result<Weights> {
        let (config, width) = (target.config(), target.config().hidden);
        let mut raw = Weights::random_layout(eagle::parameters(config, shape), config.storage, seed, 1)?.to_raw();
        let copying = match shape.network {
            Kind::Eagle => "fc_hidden.weight",
            Kind::Eagle3 => "fc.weight",
        };
        if let Some((dims, values)) = raw.tensors.get_mut(copying) {
            let inputs = dims[1];
            (0..width).for_each(|i| values[i * inputs + inputs - width + i] += 1.0);
        }
        if let Some((_, norm)) = raw.tensors.get_mut("norm.weight") {
            norm.clone_from(&target.norm);
        }
        eagle::weights(config, shape, &raw)
    }

    /// Goes on from other weights, with an optimiser that has seen nothing.
    pub fn restart(&mut self, weights: Weights) {
        self.adam = AdamW::new(&weights);
        (self.weights, self.sum) = (weights, Reading::default());
    }

    /// Weights, moments and steps, as a checkpoint keeps them: numbers by name.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        let mut raw = self.adam.to_raw();
        raw.tensors.extend(self.weights.to_raw().tensors);
        // Exact in f32 up to 2^24.
        raw.tensors.insert("learned".into(), (vec![1], vec![self.steps as f32]));
        raw
    }

    /// Goes on from what [`Learner::to_raw`] kept.
    ///
    /// # Errors
    /// If it is of another shape.
    pub fn from_raw((target, shape): (&Config, DrafterShape), raw: &RawWeights, lr: f64) -> Result<Self> {
        let weights = eagle::weights(target, shape, raw)?;
        let adam = AdamW::from_raw(&weights, raw)?;
        let steps = raw.tensors.get("learned").and_then(|steps| steps.1.first()).map_or(0, |steps| *steps as u32);
        Ok(Self { adam, steps, ..Self::new(target, shape, weights, lr) })
    }

    /// Steps of the optimiser.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The weights so far.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Reads windows with the weights so far.
    #[must_use]
    pub fn reader(&self) -> Reader {
        let Self { target, shape, levels, weights, .. } = self;
        Reader { target: target.clone(), shape: *shape, levels: *levels, weights: weights.clone() }
    }

    /// Some windows and one step of the optimiser; returns the loss. A loss that is not finite changes nothing, and neither do
    /// windows without a token of an answer, whose loss is 0.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn learn(&mut self, pool: &Pool, vocabulary: &Vocabulary, windows: &[Window]) -> Result<f64> {
        if let Some(reading) = self.reader().read(pool, vocabulary, windows)? {
            self.add(reading);
        }
        Ok(self.step(pool))
    }

    /// Takes in what was read for the next step, which but for rounding is the same however its windows are spread over readings.
    pub fn add(&mut self, reading: Reading) {
        let Reading { gradients, guesses, loss } = reading;
        if guesses == 0 {
            return;
        }
        if self.sum.guesses == 0 {
            self.sum.gradients = gradients;
        } else {
            for (sum, own) in self.sum.gradients.iter_mut().zip(&gradients) {
                kernels::add(sum, own);
            }
        }
        self.sum.loss += loss;
        self.sum.guesses += guesses;
    }

    /// One step of the optimiser on what was read since the last one; returns the loss of a guess.
    pub fn step(&mut self, pool: &Pool) -> f64 {
        self.steps = self.steps.wrapping_add(1);
        let Reading { gradients, guesses, loss } = &mut self.sum;
        if *guesses == 0 {
            return 0.0;
        }
        let (mean, scale) = (*loss / *guesses as f64, 1.0 / *guesses as f32);
        gradients.iter_mut().flatten().for_each(|slope| *slope *= scale);
        if mean.is_finite() {
            let sum = std::mem::take(gradients);
            self.weights = self.adam.step(pool, &self.weights, sum, &self.optimizer, self.optimizer.lr).0;
        }
        (*guesses, *loss) = (0, 0.0);
        mean
    }
}

/// What one version of a drafter makes of held-out answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guesses {
    /// For each token whether it was the drafter's first choice.
    pub right: Vec<bool>,
    /// Tokens that were among its first three.
    pub among_three: usize,
}

/// Guesses each token of the windows' answers from the true tokens and hidden states before it, with the noise it was drawn
/// with; nothing if the pool was interrupted.
///
/// # Errors
/// If the weights are of another layout.
pub fn guess(
    pool: &Pool,
    vocabulary: &Vocabulary,
    (weights, shape): (&Weights, DrafterShape),
    windows: &[Window],
    temperature: f32,
) -> Result<Option<Guesses>> {
    let target = vocabulary.target().config();
    let network = Network::new(target, shape, weights)?;
    let batch = Batch::new(windows, target, shape, 1);
    if batch.guesses() == 0 {
        return Ok(Some(Guesses::default()));
    }
    Ok(pool.interruptibly(|| guesses(pool, &batch, &network, vocabulary, temperature)))
}

fn guesses(pool: &Pool, batch: &Batch, network: &Network, vocabulary: &Vocabulary, temperature: f32) -> Guesses {
    let (mut guesses, mut logits) = (Guesses::default(), Vec::new());
    let passes = batch.forward(pool, network, vocabulary);
    let read = network.leave(pool, &batch.used(0, &passes[0].predicted));
    vocabulary.logits_into(pool, &read, &mut logits);
    for (logits, Drawn { token, noise, position }) in logits.chunks_exact(vocabulary.size()).zip(batch.drawn(0)) {
        if pool.is_interrupted() {
            break;
        }
        let best = vocabulary.best(logits, temperature, noise, *position, 3);
        let place = best.iter().position(|(guess, _)| guess == token);
        guesses.right.push(place == Some(0));
        guesses.among_three += usize::from(place.is_some());
    }
    guesses
}

#[cfg(test)]
mod tests;
