//! Gradients of the policy: forward over packed sequences, the loss by a function of log-probabilities, backward.

use candle_core::{Device, Tensor};
use kernels::RopeTable;

use crate::error::Result;
use crate::load::Config;
use crate::optim::Gradients;
use crate::target::Target;
use crate::weights::Weights;

/// A sequence to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Length of the prompt; only what follows is learned.
    pub prompt: usize,
}

impl Sequence {
    /// Tokens that are learned.
    #[must_use]
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }
}

/// Log-probabilities of every sequence's answer tokens under `softmax(logits / T)`, without gradients.
///
/// # Errors
/// If a tensor operation fails.
pub fn log_probs(target: &Target, sequences: &[Sequence], inverse_temperature: f32) -> Result<Vec<Vec<f32>>> {
    Ok(split(&forward(target, sequences, inverse_temperature)?.to_vec1()?, sequences))
}

/// Gradient of a loss that depends on the answers' log-probabilities. `loss` gets them, one list a sequence, and returns
/// the derivative of the loss by each. The loss itself is whatever it closes over.
///
/// # Errors
/// If a tensor operation fails.
pub fn gradient(
    config: &Config,
    weights: &Weights,
    rope: &RopeTable,
    sequences: &[Sequence],
    inverse_temperature: f32,
    loss: impl FnOnce(&[Vec<f32>]) -> Vec<Vec<f32>>,
) -> Result<Gradients> {
    let target = Target::trained(config, weights, rope)?;
    let log_probs = forward(&target, sequences, inverse_temperature)?;
    let slopes: Vec<f32> = loss(&split(&log_probs.to_vec1()?, sequences)).concat();
    let slopes = Tensor::from_vec(slopes, log_probs.shape(), &Device::Cpu)?;
    let store = (log_probs * slopes)?.sum_all()?.backward()?;
    weights.gradients(&store)
}

/// `(answer tokens of all sequences)`.
fn forward(target: &Target, sequences: &[Sequence], inverse_temperature: f32) -> Result<Tensor> {
    // The last token of a sequence predicts nothing that is learned.
    let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s.tokens[..s.tokens.len() - 1]).collect();
    let hidden = target.hidden_of_sequences(&inputs)?;
    let mut rows = Vec::new();
    let mut first = 0;
    for sequence in sequences {
        let len = sequence.tokens.len() - 1;
        rows.extend((first + sequence.prompt - 1..first + len).map(|row| u32::try_from(row).unwrap_or(u32::MAX)));
        first += len;
    }
    let rows = Tensor::new(rows, &Device::Cpu)?;
    let targets = sequences.iter().flat_map(|s| s.answer().iter().copied()).collect();
    Ok(target.log_probs(&hidden.index_select(&rows, 0)?, targets, inverse_temperature)?)
}

fn split(values: &[f32], sequences: &[Sequence]) -> Vec<Vec<f32>> {
    let mut rest = values;
    let mut take = |n: usize| {
        let (now, later) = rest.split_at(n);
        rest = later;
        now.to_vec()
    };
    sequences.iter().map(|s| take(s.answer().len())).collect()
}
