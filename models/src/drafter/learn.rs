//! Training of the learned drafter on rollouts just made. It is shown a token and what the target made of those before it, and
//! guesses on from its own guesses as a draft does (training-time test: Li et al. 2025, "EAGLE-3", section 3.2). Tokens are
//! learned against the target's own distribution over the tokens that are drafted: by `Eagle3` by cross-entropy, by `Eagle` mostly by total
//! variation (`loss` says why), and by hidden states too, by SmoothL1 (Li et al. 2024, "EAGLE", section 4.2). Embedding and head stay the target's.

use kernels::{Draws, Pool};
use state::drafter::GUESSES_MIN;
use state::plan::{DrafterShape, NetworkKind, Optimizer, Schedule};
use state::speculation::Skill;

use super::buffer::Window;
use super::eagle;
use super::network::{Network, Pass};
use super::sharpness::{CANDIDATES, Sharpness};
use super::vocabulary::Place;
use super::{Calibration, Vocabulary};
use crate::error::Result;
use crate::load::{Config, RawWeights};
use crate::optim::{self, AdamW, Average, Gradients, Mean, Stride};
use crate::target::Target;
use crate::train::HELD_BYTES_MAX;
use crate::weights::Weights;

mod batch;
mod loss;

use batch::{Batch, Drawn};

/// Weights of the drafter in training, with the moments of its optimiser.
#[derive(Debug, Clone)]
pub struct Learner {
    /// With the weights so far.
    reader: Reader,
    adam: AdamW,
    optimizer: Optimizer,
    steps: u32,
    /// Steps of the optimiser that are to be small: it has seen nothing, and the weights have learned.
    warmup_left: u32,
    /// For the step to come.
    sum: Reading,
    /// The step that is being taken.
    stride: Option<Stride>,
    /// What is drafted with.
    average: Average,
}

/// What windows teach: gradients and loss, summed over their guesses.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    gradients: Gradients,
    guesses: usize,
    loss: f64,
    /// Of the weights it was read with.
    generation: u64,
}

/// Memory that the readings and exams of a device reuse: to have it mapped anew took half of a small drafter's time.
#[derive(Debug, Default)]
pub struct Workspace {
    passes: Vec<Pass>,
    loss: loss::Memory,
    /// Of exams: predictions in use, and logits.
    used: Vec<f32>,
    logits: Vec<f32>,
    /// Gradients that nobody needs any more.
    spare: Option<Gradients>,
}

impl Workspace {
    /// Takes gradients that are not needed any more.
    pub fn give_back(&mut self, gradients: Gradients) {
        self.spare = Some(gradients).filter(|spare| !spare.is_empty()).or(self.spare.take());
    }

    /// Gives back the memory of large models' drafters, before something else that needs memory.
    pub fn trim(&mut self) {
        let passes: usize = self.passes.iter().map(Pass::held).sum();
        let others = [&self.used, &self.logits].into_iter().chain(self.spare.iter().flatten());
        let others: usize = others.map(|values| values.capacity() * size_of::<f32>()).sum();
        if passes + self.loss.held() + others > HELD_BYTES_MAX {
            *self = Self::default();
        }
    }
}

/// Reads windows with one version of the weights, apart from the learner: several devices may read at the same time.
#[derive(Debug, Clone)]
pub struct Reader {
    target: Config,
    shape: DrafterShape,
    levels: usize,
    weights: Weights,
    /// How many times the learner has gone on from other weights.
    generation: u64,
}

impl Reader {
    /// Reads windows; nothing if the pool was interrupted.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn read(
        &self,
        pool: &Pool,
        vocabulary: &Vocabulary,
        windows: &[Window],
        workspace: &mut Workspace,
    ) -> Result<Option<Reading>> {
        let network = Network::new(&self.target, self.shape, &self.weights)?;
        let read = || {
            let batch = Batch::new(windows, &self.target, self.shape, self.levels);
            let guesses = batch.guesses();
            if guesses == 0 {
                return Some(Reading { generation: self.generation, ..Reading::default() });
            }
            pool.goes_on()?;
            let (mut gradients, whole) =
                (self.weights.zeros_in(workspace.spare.take()), (vocabulary, self.shape.network));
            let memory = (&mut workspace.passes, &mut workspace.loss);
            let Some(loss) = loss::gradient(pool, &batch, &network, whole, &mut gradients, memory) else {
                workspace.give_back(gradients);
                return None;
            };
            Some(Reading { gradients, guesses, loss, generation: self.generation })
        };
        Ok(pool.interruptibly(read).flatten())
    }
}

/// Steps over which the learning rate of a drafter that has learned already rises.
const WARMUP: u32 = 64;

/// Peak learning rate of a drafter of so wide a target where none is given: Adam's is to fall with the width (Yang et al. 2022, "Tensor
/// Programs V", table 8).
#[must_use]
pub fn learning_rate(target: &Config) -> f64 {
    0.3 / target.hidden as f64
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
            warmup: WARMUP as usize,
            schedule: Schedule::Constant,
        };
        let (adam, average) = (AdamW::new(&weights), Average::new(&weights));
        let reader = Reader { target: target.clone(), shape, levels: 1, weights, generation: 0 };
        Self { reader, adam, optimizer, steps: 0, warmup_left: 0, sum: Reading::default(), stride: None, average }
    }

    /// From now on it learns so many guesses of each token, each from the one before.
    pub fn set_levels(&mut self, levels: usize) {
        self.reader.levels = levels.max(1);
    }

    /// Guesses of each token that it learns.
    #[must_use]
    pub fn levels(&self) -> usize {
        self.reader.levels
    }

    /// [`Learner::set_levels`] from the start.
    #[must_use]
    pub fn with_levels(mut self, levels: usize) -> Self {
        self.set_levels(levels);
        self
    }

    /// Its weights have learned already: the optimiser, which has seen nothing, begins with small steps.
    #[must_use]
    pub fn taught(self) -> Self {
        Self { warmup_left: WARMUP, average: Average::of_mean(self.weights(), None), ..self }
    }

    /// A fresh drafter: keyed random, but what goes in starts as a copy of the target's highest hidden state that it reads, and what
    /// comes out is read as the target's.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn fresh(target: &Target, shape: DrafterShape, seed: u64) -> Result<Weights> {
        let (config, width) = (target.config(), target.config().hidden);
        let mut raw = eagle::random(config, shape, seed)?.to_raw();
        let copying = match shape.network {
            NetworkKind::Eagle => "fc_hidden.weight",
            NetworkKind::Eagle3 => "fc.weight",
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
        (self.adam, self.warmup_left) = (AdamW::new(&weights), WARMUP);
        self.average = Average::of_mean(&weights, Some(self.average.steps()));
        (self.reader.weights, self.sum, self.stride) = (weights, Reading::default(), None);
        self.reader.generation += 1;
    }

    /// Weights, their average, moments and steps, as a checkpoint keeps them: numbers by name. A step that was begun has to be finished before.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        debug_assert!(self.stride.is_none(), "a step is half taken");
        let mut raw = self.adam.to_raw();
        raw.tensors.extend(self.weights().to_raw().tensors);
        raw.tensors.extend(self.average.to_raw().tensors);
        // Exact in f32 up to 2^24.
        let learned = vec![self.steps as f32, self.warmup_left as f32, self.levels() as f32];
        raw.tensors.insert("learned".into(), (vec![learned.len()], learned));
        raw
    }

    /// Goes on from what [`Learner::to_raw`] kept.
    ///
    /// # Errors
    /// If it is of another shape.
    pub fn from_raw((target, shape): (&Config, DrafterShape), raw: &RawWeights, lr: f64) -> Result<Self> {
        let weights = eagle::weights(target, shape, raw)?;
        let (adam, average) = (AdamW::from_raw(&weights, raw)?, Average::from_raw(&weights, raw)?);
        let learned =
            |i: usize| raw.tensors.get("learned").and_then(|(_, counts)| counts.get(i)).map_or(0, |n| *n as u32);
        let (steps, warmup_left) = (learned(0), learned(1).min(WARMUP));
        let learner = Self { adam, average, steps, warmup_left, ..Self::new(target, shape, weights, lr) };
        Ok(learner.with_levels(learned(2) as usize))
    }

    /// Steps of the optimiser.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The weights that guess best: their average over the last steps.
    #[must_use]
    pub fn average(&self) -> Weights {
        self.mean().weights()
    }

    /// The same before anything is computed.
    #[must_use]
    pub fn mean(&self) -> Mean {
        self.average.mean(self.weights())
    }

    /// The weights so far.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.reader.weights
    }

    /// Reads windows with the weights so far.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// Some windows and one step of the optimiser; returns the loss. A loss or gradients that are not finite change no weight, and
    /// neither do windows without a token of an answer, whose loss is 0.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn learn(
        &mut self,
        pool: &Pool,
        vocabulary: &Vocabulary,
        windows: &[Window],
        workspace: &mut Workspace,
    ) -> Result<f64> {
        if let Some(reading) = self.reader.read(pool, vocabulary, windows, workspace)? {
            self.add(reading).into_iter().for_each(|spent| workspace.give_back(spent));
        }
        let loss = self.begin_step(pool);
        self.finish_step(pool);
        Ok(loss)
    }

    /// Takes in what was read for the next step, which but for rounding is the same however its windows are spread over readings.
    /// What was read before it went on from other weights is left out. Returns gradients that are not needed any more.
    pub fn add(&mut self, reading: Reading) -> Option<Gradients> {
        let Reading { gradients, guesses, loss, generation } = reading;
        if guesses == 0 || generation != self.reader.generation {
            return Some(gradients);
        }
        let is_first = self.sum.guesses == 0;
        self.sum.loss += loss;
        self.sum.guesses += guesses;
        if is_first {
            self.sum.gradients = gradients;
            return None;
        }
        optim::add(&mut self.sum.gradients, &gradients);
        Some(gradients)
    }

    /// Begins a step of the optimiser on what was read since the last one, which is finished before; returns the loss of a guess.
    pub fn begin_step(&mut self, pool: &Pool) -> f64 {
        self.finish_step(pool);
        self.steps = self.steps.wrapping_add(1);
        let Reading { gradients, guesses, loss, .. } = std::mem::take(&mut self.sum);
        if guesses == 0 {
            return 0.0;
        }
        let mean = loss / guesses as f64;
        if mean.is_finite() {
            let lr = optim::learning_rate(&self.optimizer, (WARMUP - self.warmup_left) as usize, usize::MAX);
            let (weights, gradients) = (&self.reader.weights, (gradients, 1.0 / guesses as f64));
            let stride = self.adam.begin(pool, weights, gradients, (&self.optimizer, lr));
            if stride.norm.is_finite() {
                self.warmup_left = self.warmup_left.saturating_sub(1);
                self.stride = Some(stride);
            }
        }
        mean
    }

    /// Goes on with a step that was begun, by one parameter; whether there was one. Until it is finished, weights are those before,
    /// and their average is of nothing.
    pub fn go_on(&mut self, pool: &Pool) -> bool {
        // If this panics, the step is gone as a whole.
        let Some(mut stride) = self.stride.take() else { return self.average.advance(pool, &self.reader.weights) };
        match self.adam.advance(pool, &mut stride) {
            Some(weights) => {
                self.reader.weights = weights;
                self.average.begin();
            }
            None => self.stride = Some(stride),
        }
        true
    }

    /// Finishes a step that was begun.
    pub fn finish_step(&mut self, pool: &Pool) {
        while self.go_on(pool) {}
    }
}

/// Guesses of a level from which on their chance is told.
const LEVEL_MIN: usize = 16;

/// What one version of a drafter makes of held-out answers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Guesses {
    /// For each token, one after the other, and each level, whether it and all before it at earlier levels were the drafter's first
    /// choices: together as many as a draft would have right.
    pub right: Vec<bool>,
    /// Tokens guessed from true hidden states, those of them that were its first choice, and those among its first three.
    pub first: [usize; 3],
    /// For each level how many guesses had been right at all earlier ones, and how many of them were right here too.
    pub levels: Vec<[usize; 2]>,
    /// How far logits were to be believed.
    pub(super) sharpness: Sharpness,
}

impl Guesses {
    /// Takes in those of other windows.
    pub fn extend(&mut self, other: Self) {
        self.right.extend(other.right);
        self.first.iter_mut().zip(other.first).for_each(|(sum, own)| *sum += own);
        self.levels.resize(self.levels.len().max(other.levels.len()), [0; 2]);
        for (sum, own) in self.levels.iter_mut().zip(other.levels) {
            *sum = [sum[0] + own[0], sum[1] + own[1]];
        }
        self.sharpness.extend(&other.sharpness);
    }

    /// What they let strategies hope for; nothing if they are few.
    #[must_use]
    pub fn skill(&self) -> Option<Skill> {
        let [guesses, right, among_three] = self.first;
        let told = self.levels.iter().take_while(|[guesses, _]| *guesses >= LEVEL_MIN);
        // Of few guesses one more might have been right, or wrong (Laplace's rule of succession).
        let levels = told.map(|[guesses, right]| (*right + 1) as f64 / (*guesses + 2) as f64).collect();
        let runners_up = (among_three - right) as f64 / (guesses - right).max(1) as f64;
        (guesses >= GUESSES_MIN).then_some(Skill { levels, runners_up })
    }
}

/// Guesses the tokens of the windows' answers, so many ahead of each, with the noise they were drawn with and logits believed as they
/// are in drafts: what a draft would guess that has been right so far. Nothing if the pool was interrupted.
///
/// # Errors
/// If the weights are of another layout.
pub fn guess(
    pool: &Pool,
    vocabulary: &Vocabulary,
    (weights, shape, levels): (&Weights, DrafterShape, usize),
    windows: &[Window],
    belief: (Draws, &Calibration),
    workspace: &mut Workspace,
) -> Result<Option<Guesses>> {
    let target = vocabulary.target().config();
    let network = Network::new(target, shape, weights)?;
    let guess = || {
        let Workspace { passes, used, logits, .. } = workspace;
        let batch = Batch::new(windows, target, shape, levels.max(1));
        batch.forward(pool, &network, vocabulary, passes)?;
        let (mut guesses, mut right, mut rows) = (Guesses::default(), batch.rows_right(), Vec::new());
        for (level, pass) in passes.iter().enumerate() {
            used.clear();
            batch.used_into(level, &pass.predicted, used);
            vocabulary.logits_into(pool, &network.leave(pool, used), logits);
            level_guesses(pool, (&batch, level), vocabulary, (logits, belief), &mut right, &mut guesses)?;
            rows.extend(batch.drawn(level).map(|(row, _)| (row, right[row])));
        }
        // Stable. Whichever windows are read together, guesses of two versions stand side by side.
        rows.sort_by_key(|(row, _)| *row);
        guesses.right = rows.into_iter().map(|(_, is_right)| is_right).collect();
        Some(guesses)
    };
    Ok(pool.interruptibly(guess).flatten())
}

/// One level; `right` says of each row whether it has been right so far.
fn level_guesses(
    pool: &Pool,
    (batch, level): (&Batch, usize),
    vocabulary: &Vocabulary,
    (logits, (draws, calibration)): (&[f32], (Draws, &Calibration)),
    right: &mut [bool],
    guesses: &mut Guesses,
) -> Option<()> {
    let mut counts = [0; 2];
    for (logits, (row, drawn)) in logits.chunks_exact(vocabulary.size()).zip(batch.drawn(level)) {
        pool.goes_on()?;
        let Drawn { token, noise, position } = drawn;
        let is_to_decide = right[row];
        let place = if is_to_decide {
            let place = Place { draws, noise, position: *position, sharpness: calibration.sharpness.value(level) };
            let best = vocabulary.best(logits, &place, CANDIDATES);
            guesses.sharpness.observe_among(level, &best, *token);
            best[..best.len().min(3)].iter().position(|guess| guess.token == *token)
        } else {
            None
        };
        right[row] = place == Some(0);
        counts[0] += usize::from(is_to_decide);
        counts[1] += usize::from(right[row]);
        if level == 0 {
            let found = [true, place == Some(0), place.is_some()];
            guesses.first.iter_mut().zip(found).for_each(|(sum, is)| *sum += usize::from(is));
        }
    }
    guesses.levels.push(counts);
    Some(())
}

#[cfg(test)]
mod tests;
