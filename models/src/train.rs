//! Gradients of the policy: forward over packed sequences, the loss by a function of log-probabilities, backward.
//!
//! Only the input of each layer is kept; the backward makes the rest of a layer again when it gets there. For r rows of
//! width h in l layers that is `4 r h (l + 1)` bytes, beside one layer's intermediate values and 192 rows of logits.

use kernels::{Chosen, Pool, RopeTable, embed_gradient, log_probs_gradient, rms_norm_gradient};

use crate::error::Result;
use crate::layer::{Gradient, PARAMETERS, Rows, heads};
use crate::load::Config;
use crate::optim::Gradients;
use crate::target::{Memory, Packed, Target};
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
#[must_use]
pub fn log_probs(pool: &Pool, target: &Target, sequences: &[Sequence], inverse_temperature: f32) -> Vec<Vec<f32>> {
    split(&Forward::new(pool, target, sequences, inverse_temperature, false).log_probs, sequences)
}

/// Gradient of a loss that depends on the answers' log-probabilities. `loss` gets them, one list a sequence, and returns
/// the derivative of the loss by each. The loss itself is whatever it closes over.
///
/// # Errors
/// If the weights are of another layout than `config`'s.
pub fn gradient(
    pool: &Pool,
    config: &Config,
    weights: &Weights,
    rope: &RopeTable,
    sequences: &[Sequence],
    inverse_temperature: f32,
    loss: impl FnOnce(&[Vec<f32>]) -> Vec<Vec<f32>>,
) -> Result<Gradients> {
    let target = Target::new(config, weights, rope)?;
    let forward = Forward::new(pool, &target, sequences, inverse_temperature, true);
    let slopes = loss(&split(&forward.log_probs, sequences)).concat();
    let mut gradients = weights.zeros();
    forward.backward(pool, &target, &slopes, &mut gradients);
    Ok(gradients)
}

/// A forward over packed sequences, and what its backward needs.
struct Forward {
    packed: Packed,
    /// Input of each layer, and the output of the last.
    inputs: Vec<Vec<f32>>,
    /// Rows whose next token is learned, their hidden states, and those tokens.
    rows: Vec<usize>,
    hidden: Vec<f32>,
    targets: Vec<u32>,
    inverse_temperature: f32,
    log_probs: Vec<f32>,
}

impl Forward {
    fn new(pool: &Pool, target: &Target, sequences: &[Sequence], inverse_temperature: f32, keep: bool) -> Self {
        // The last token of a sequence predicts nothing that is learned.
        let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s.tokens[..s.tokens.len() - 1]).collect();
        let packed = Packed::new(&inputs);
        let (shape, width) = (heads(target.config()), target.config().hidden);
        let mut memory = Memory { inputs: keep.then(Vec::new), ..Memory::default() };
        let mut attend = |_: usize, qkv: [&[f32]; 3], out: &mut [f32]| {
            kernels::attend_sequences(pool, qkv, &packed.lengths, shape, out);
        };
        target.forward(pool, &packed.ids, &packed.positions, &mut attend, &mut memory);
        let mut kept = memory.inputs.unwrap_or_default();
        kept.push(memory.x);
        let (mut rows, mut first) = (Vec::new(), 0);
        for sequence in sequences {
            let len = sequence.tokens.len() - 1;
            rows.extend(first + sequence.prompt - 1..first + len);
            first += len;
        }
        let hidden: Vec<f32> =
            rows.iter().flat_map(|row| &memory.hidden[row * width..(row + 1) * width]).copied().collect();
        let targets: Vec<u32> = sequences.iter().flat_map(|s| s.answer().iter().copied()).collect();
        let chosen = Chosen { targets: &targets, inverse_temperature };
        let log_probs = kernels::log_probs(pool, &hidden, &target.head, chosen);
        Self { packed, inputs: kept, rows, hidden, targets, inverse_temperature, log_probs }
    }

    /// Adds the gradients of all parameters.
    fn backward(mut self, pool: &Pool, target: &Target, slopes: &[f32], gradients: &mut Gradients) {
        let (config, width) = (target.config(), target.config().hidden);
        let layers = config.layers;
        let head = if config.tied { 0 } else { gradients.len() - 1 };
        let chosen = Chosen { targets: &self.targets, inverse_temperature: self.inverse_temperature };
        let mut by_rows = vec![0.0; self.hidden.len()];
        log_probs_gradient(pool, &self.hidden, &target.head, chosen, slopes, &mut by_rows, &mut gradients[head]);
        let last = self.inputs.pop().unwrap_or_default();
        let mut by_hidden = vec![0.0; last.len()];
        for (row, from) in self.rows.iter().zip(by_rows.chunks_exact(width)) {
            by_hidden[row * width..(row + 1) * width].copy_from_slice(from);
        }
        let mut d = vec![0.0; last.len()];
        let norm = &mut gradients[1 + layers * PARAMETERS];
        rms_norm_gradient(pool, &last, &target.norm, config.eps, &by_hidden, &mut d, norm);
        let rows = Rows { positions: &self.packed.positions, rope: target.rope() };
        let mut memory = Gradient::default();
        for (i, layer) in target.layers.iter().enumerate().rev() {
            let input = self.inputs.pop().unwrap_or_default();
            let own = &mut gradients[1 + i * PARAMETERS..1 + (i + 1) * PARAMETERS];
            layer.backward(pool, &input, rows, &self.packed.lengths, &mut d, own, &mut memory);
        }
        embed_gradient(&self.packed.ids, &d, &mut gradients[0]);
    }
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
