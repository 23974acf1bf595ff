//! Training of the learned drafter on rollouts just made: hidden states by SmoothL1, tokens by cross-entropy against the
//! target's own distribution (Li et al. 2024, "EAGLE", section 4.2). Embedding and head stay the target's.

use kernels::{Pool, input_gradient, softmax};
use state::plan::{Optimizer, Schedule};

use super::Vocabulary;
use super::buffer::Window;
use super::eagle;
use super::network::Network;
use crate::error::Result;
use crate::layer::{Rows, Sequences, Values, heads};
use crate::load::Config;
use crate::optim::AdamW;
use crate::target::Packed;
use crate::weights::Weights;

/// Weight of the cross-entropy beside SmoothL1.
const CROSS_ENTROPY: f32 = 0.1;

/// Weights of the drafter in training, with the moments of its optimiser.
#[derive(Debug, Clone)]
pub struct Learner {
    config: Config,
    weights: Weights,
    adam: AdamW,
    optimizer: Optimizer,
    steps: u32,
}

impl Learner {
    /// Starts from `weights`.
    #[must_use]
    pub fn new(target: &Config, ffn: usize, weights: Weights, lr: f64) -> Self {
        let optimizer = Optimizer {
            lr,
            betas: (0.9, 0.95),
            weight_decay: 0.0,
            clip_norm: 0.5,
            warmup: 0,
            schedule: Schedule::Constant,
        };
        Self { config: eagle::config(target, ffn), adam: AdamW::new(&weights), weights, optimizer, steps: 0 }
    }

    /// A fresh drafter: keyed random, but its mixing starts as a copy of the hidden state.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn fresh(target: &Config, ffn: usize, seed: u64) -> Result<Weights> {
        let config = eagle::config(target, ffn);
        let mut raw = Weights::random_layout(eagle::parameters(&config), config.storage, seed, 1)?.to_raw();
        if let Some((_, values)) = raw.tensors.get_mut("fc_hidden.weight") {
            (0..config.hidden).for_each(|i| values[i * config.hidden + i] += 1.0);
        }
        Weights::with_layout(eagle::parameters(&config), config.storage, &raw)
    }

    /// Micro-batches learned from.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The weights so far.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// One micro-batch and one step of the optimiser; returns the loss. A loss that is not finite changes nothing, and neither do
    /// windows without a token of an answer, whose loss is 0.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn learn(&mut self, pool: &Pool, vocabulary: &Vocabulary, windows: &[Window]) -> Result<f64> {
        let network = Network::new(&self.config, &self.weights)?;
        let batch = Batch::new(windows, self.config.hidden);
        self.steps = self.steps.wrapping_add(1);
        if batch.used.is_empty() {
            return Ok(0.0);
        }
        let (loss, gradients) = batch.gradient(pool, &network, vocabulary, self.weights.zeros());
        if loss.is_finite() {
            self.weights = self.adam.step(pool, &self.weights, &gradients, &self.optimizer, self.optimizer.lr).0;
        }
        Ok(loss)
    }
}

/// Rows of all windows: row t sees token t + 1 and the hidden state of token t, and predicts that of token t + 1.
struct Batch {
    packed: Packed,
    seen: Vec<f32>,
    /// Rows whose prediction a draft would use: those of answers.
    used: Vec<usize>,
    /// The true hidden states of these.
    wanted: Vec<f32>,
}

impl Batch {
    fn new(windows: &[Window], width: usize) -> Self {
        let (mut tokens, mut seen, mut used, mut wanted) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut positions, mut first) = (Vec::new(), 0);
        for Window { example, tokens: at } in windows {
            let rows = at.start..at.end.max(at.start + 2) - 2;
            tokens.push(&example.tokens[rows.start + 1..rows.end + 1]);
            positions.extend(rows.clone().map(|row| u32::try_from(row).unwrap_or(u32::MAX)));
            seen.extend_from_slice(&example.hidden[rows.start * width..rows.end * width]);
            // Row t tells of token t + 2, which a draft guesses if it belongs to the answer.
            for row in rows.clone().filter(|row| row + 2 >= example.prompt) {
                used.push(first + row - rows.start);
                wanted.extend_from_slice(&example.hidden[(row + 1) * width..(row + 2) * width]);
            }
            first += rows.len();
        }
        Self { packed: Packed { positions, ..Packed::new(&tokens) }, seen, used, wanted }
    }

    /// The loss, and the gradients added to `gradients`.
    fn gradient(
        &self,
        pool: &Pool,
        network: &Network,
        vocabulary: &Vocabulary,
        mut gradients: Vec<Vec<f32>>,
    ) -> (f64, Vec<Vec<f32>>) {
        let target = vocabulary.target();
        let shape = heads(target.config());
        let rows = Rows { positions: &self.packed.positions, rope: target.rope() };
        let (mut embedded, mut mixed, mut values) = (Vec::new(), Vec::new(), Values::default());
        kernels::embed(&self.packed.ids, &target.embedding, &mut embedded);
        network.mix(pool, &embedded, &self.seen, &mut mixed);
        let mut predicted = mixed.clone();
        let mut attend = |qkv: [&[f32]; 3], out: &mut [f32]| {
            kernels::attend_sequences(pool, qkv, &self.packed.lengths, shape, out);
        };
        network.predict(pool, &mut predicted, rows, &mut attend, &mut values);
        let (loss, mut d) = self.loss(pool, vocabulary, &predicted);
        let inputs = [embedded.as_slice(), &self.seen, &mixed];
        let sequences = Sequences { rows, lengths: &self.packed.lengths };
        network.backward(pool, inputs, &mut values, sequences, &mut d, &mut gradients);
        (loss, gradients)
    }

    /// The loss of the rows in use and its derivative by all predictions: SmoothL1 by hidden states, and the cross-entropy of the
    /// drafted tokens that the target's head reads from them against those it reads from the true ones.
    fn loss(&self, pool: &Pool, vocabulary: &Vocabulary, predicted: &[f32]) -> (f64, Vec<f32>) {
        let (width, vocab) = (vocabulary.head().k(), vocabulary.size());
        let mut all = vec![0.0; predicted.len()];
        let (rows, count) = (self.used.len(), self.used.len() * width);
        let row = |at: &usize| at * width..(at + 1) * width;
        let predicted: Vec<f32> = self.used.iter().flat_map(|at| predicted[row(at)].iter().copied()).collect();
        let (mut wanted, mut found) = (Vec::new(), Vec::new());
        vocabulary.logits_into(pool, &self.wanted, &mut wanted);
        vocabulary.logits_into(pool, &predicted, &mut found);
        let mut entropy = 0.0;
        for (wanted, found) in wanted.chunks_exact_mut(vocab).zip(found.chunks_exact_mut(vocab)) {
            softmax(wanted);
            softmax(found);
            for (wanted, found) in wanted.iter().zip(found) {
                entropy -= f64::from(*wanted) * f64::from(found.max(f32::MIN_POSITIVE)).ln();
                *found = (*found - wanted) * (CROSS_ENTROPY / rows as f32);
            }
        }
        let mut d = vec![0.0; count];
        input_gradient(pool, &found, vocabulary.head(), &mut d, false);
        let mut regression = 0.0;
        for ((d, predicted), wanted) in d.iter_mut().zip(&predicted).zip(&self.wanted) {
            let difference = predicted - wanted;
            // d² / 2 below 1, d - 1/2 above: its slope is the smaller of d and 1.
            let near = difference.clamp(-1.0, 1.0);
            regression += f64::from(near * (difference - near * 0.5));
            *d += near / count as f32;
        }
        self.used.iter().zip(d.chunks_exact(width)).for_each(|(at, d)| all[row(at)].copy_from_slice(d));
        (regression / count as f64 + f64::from(CROSS_ENTROPY) * entropy / rows as f64, all)
    }
}
