//! Training of the learned drafter on rollouts just made: hidden states by SmoothL1, tokens by cross-entropy against the
//! target's own distribution (Li et al. 2024, "EAGLE", section 4.2). Embedding and head stay the target's.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use state::plan::{Optimizer, Schedule};

use super::eagle::{self, Network};
use crate::decode::Answer;
use crate::error::Result;
use crate::layer::{Rows, heads};
use crate::load::Config;
use crate::optim::AdamW;
use crate::target::Target;
use crate::weights::Weights;

/// Weight of the cross-entropy beside SmoothL1.
const CROSS_ENTROPY: f64 = 0.1;

/// One stretch of a rollout: tokens, and the target's hidden states of all but the last.
#[derive(Debug, Clone)]
pub struct Example {
    tokens: Vec<u32>,
    hidden: Vec<f32>,
}

impl Example {
    /// What an answer teaches, cut to its first `tokens_max` tokens; nothing if it has no hidden states or is too short.
    #[must_use]
    pub fn of(answer: &Answer, width: usize, tokens_max: usize) -> Option<Self> {
        let len = answer.tokens.len().min(tokens_max);
        if answer.hidden.is_empty() || len < 3 {
            return None;
        }
        Some(Self { tokens: answer.tokens[..len].to_vec(), hidden: answer.hidden[..(len - 1) * width].to_vec() })
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }
}

/// Weights of the drafter in training, with the moments of its optimiser.
#[derive(Debug, Clone)]
pub struct Learner {
    config: Config,
    weights: Weights,
    adam: AdamW,
    optimizer: Optimizer,
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
        Self { config: eagle::config(target, ffn), adam: AdamW::new(&weights), weights, optimizer }
    }

    /// A fresh drafter: keyed random, but its mixing starts as a copy of the hidden state.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn fresh(target: &Config, ffn: usize, seed: u64) -> Result<Weights> {
        let config = eagle::config(target, ffn);
        let mut raw = Weights::random_layout(eagle::parameters(&config), seed, 1)?.to_raw()?;
        if let Some((_, values)) = raw.tensors.get_mut("fc_hidden.weight") {
            (0..config.hidden).for_each(|i| values[i * config.hidden + i] += 1.0);
        }
        Weights::with_layout(eagle::parameters(&config), &raw)
    }

    /// The weights so far.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// One micro-batch and one step of the optimiser; returns the loss.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn learn(&mut self, target: &Target, examples: &[Example]) -> Result<f64> {
        let network = Network::over(&self.config, self.weights.tracked())?;
        let batch = Batch::new(examples, self.config.hidden)?;
        let loss = batch.loss(&network, target, &self.config)?;
        let gradients = self.weights.gradients(&loss.backward()?)?;
        let value = f64::from(loss.detach().to_scalar::<f32>()?);
        if value.is_finite() {
            self.weights = self.adam.step(&self.weights, &gradients, &self.optimizer, self.optimizer.lr)?.0;
        }
        Ok(value)
    }
}

/// Rows of all examples: row t sees token t + 1 and the hidden state of token t, and predicts that of token t + 1.
struct Batch {
    ids: Arc<Vec<u32>>,
    positions: Arc<Vec<u32>>,
    lengths: Arc<Vec<usize>>,
    seen: Tensor,
    wanted: Tensor,
}

impl Batch {
    fn new(examples: &[Example], width: usize) -> Result<Self> {
        let (mut ids, mut positions, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut seen, mut wanted) = (Vec::new(), Vec::new());
        for example in examples {
            let rows = example.tokens.len() - 2;
            ids.extend_from_slice(&example.tokens[1..=rows]);
            positions.extend((0..rows).map(|row| u32::try_from(row).unwrap_or(u32::MAX)));
            lengths.push(rows);
            seen.extend_from_slice(&example.hidden[..rows * width]);
            wanted.extend_from_slice(&example.hidden[width..(rows + 1) * width]);
        }
        let shape = (ids.len(), width);
        Ok(Self {
            ids: Arc::new(ids),
            positions: Arc::new(positions),
            lengths: Arc::new(lengths),
            seen: Tensor::from_vec(seen, shape, &Device::Cpu)?,
            wanted: Tensor::from_vec(wanted, shape, &Device::Cpu)?,
        })
    }

    fn loss(&self, network: &Network, target: &Target, config: &Config) -> Result<Tensor> {
        let shape = heads(config);
        let rows = Rows { positions: &self.positions, rope: target.rope() };
        let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| kernels::attend_sequences(q, k, v, &self.lengths, shape);
        let predicted = network.forward(&target.embed(&self.ids)?, &self.seen, &rows, &mut attend)?;
        let difference = (&predicted - &self.wanted)?.abs()?;
        // SmoothL1: d² / 2 below 1, d - 1/2 above; the smaller of d and 1 covers both.
        let near = difference.minimum(1.0)?;
        let regression = ((&near * (&difference - (&near * 0.5)?)?)?).mean_all()?;
        let wanted = log_softmax(&target.logits(&self.wanted)?)?.exp()?;
        let logs = log_softmax(&target.logits(&predicted)?)?;
        let entropy = (wanted * logs)?.sum(D::Minus1)?.mean_all()?.neg()?;
        Ok((regression + (entropy * CROSS_ENTROPY)?)?)
    }
}

/// Log-softmax of each row, from plain operations: the fused one has no gradient.
fn log_softmax(logits: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}
