//! Gradients of the policy: forward over packed sequences, the loss by a function of each token's log-probability, backward.
//!
//! For r rows of width h in l layers the forward keeps `4 r h (l + 1)` bytes, the input of each layer, and up to 15/16 of a GiB of
//! intermediate values, those of the last layers. The backward makes those of earlier layers again when it gets there: the
//! same bits. Beside them stand one layer's values and 192 rows of logits.

use kernels::{Chosen, Pool, embed_gradient, log_probs_gradient, rms_norm_gradient};

use crate::layer::{Gradient, PARAMETERS, Rows, Sequences};
use crate::optim::Gradients;
use crate::target::{Memory, Packed, Tape, Target};
use crate::weights::Weights;

/// Most bytes of intermediate values that a forward keeps for its backward.
const VALUES_BYTES_MAX: usize = 15 << 26;

/// Memory that calls of [`gradient`] reuse.
#[derive(Debug, Default)]
pub struct Workspace {
    forward: Memory,
    backward: Gradient,
    /// Gradients that were added to others.
    spare: Vec<Gradients>,
}

/// Bytes of values worth the time of having their memory mapped again.
pub(crate) const HELD_BYTES_MAX: usize = 1 << 28;

/// Gradients kept to be used again: one device may add up what others made.
const SPARE_MAX: usize = 2;

impl Workspace {
    /// Gives back the memory of large models' values, before something else that needs memory.
    pub fn trim(&mut self) {
        if self.forward.tape.as_ref().is_some_and(|tape| tape.bytes() > HELD_BYTES_MAX) {
            *self = Self::default();
        }
    }

    /// Zeros in the shape of the gradients, in memory that was given back if there is some.
    #[must_use]
    pub fn zeros(&mut self, weights: &Weights) -> Gradients {
        weights.zeros_in(self.spare.pop())
    }

    /// Takes gradients that are not needed any more; those of large models are freed.
    pub fn give_back(&mut self, gradients: impl IntoIterator<Item = Gradients>) {
        let is_small = |g: &Gradients| g.iter().map(Vec::len).sum::<usize>() * size_of::<f32>() <= HELD_BYTES_MAX;
        self.spare.extend(gradients.into_iter().filter(is_small));
        self.spare.truncate(SPARE_MAX);
    }
}

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
    let forward = Forward::new(pool, target, sequences, inverse_temperature, &mut Memory::default());
    split(&kernels::log_probs(pool, &forward.hidden, &target.head, forward.chosen()), sequences)
}

/// Adds to `gradients` that of a loss that is a sum over the answers' tokens. If the weights are in bf16 they are to be zeros before:
/// sums of bf16 begin where [`kernels::to_bf16`] says. `slope` gets a sequence, a token's place in its
/// answer, and its log-probability under `target`, in this order, and returns the derivative of the loss by it. The loss
/// itself is whatever it closes over. That a token's part depends on its own log-probability alone saves a second pass
/// through the head, a sixteenth of the arithmetic of SmolLM2.
pub fn gradient(
    (pool, workspace): (&Pool, &mut Workspace),
    target: &Target,
    sequences: &[Sequence],
    inverse_temperature: f32,
    mut slope: impl FnMut(usize, usize, f32) -> f32,
    gradients: &mut Gradients,
) {
    let Workspace { forward: memory, backward, .. } = workspace;
    let rows = sequences.iter().map(|s| s.tokens.len() - 1).sum();
    memory.tape.get_or_insert_default().begin(target.config(), rows, VALUES_BYTES_MAX);
    let forward = Forward::new(pool, target, sequences, inverse_temperature, memory);
    let tokens = |(s, sequence): (usize, &Sequence)| (0..sequence.answer().len()).map(move |token| (s, token));
    let places: Vec<(usize, usize)> = sequences.iter().enumerate().flat_map(tokens).collect();
    let mut slope = |row: usize, log_prob: f32| slope(places[row].0, places[row].1, log_prob);
    forward.backward((pool, backward), target, &mut slope, memory, gradients);
}

/// A forward over packed sequences, and what its backward needs beside the tape.
struct Forward {
    packed: Packed,
    /// Rows whose next token is learned, their hidden states, and those tokens.
    rows: Vec<usize>,
    hidden: Vec<f32>,
    targets: Vec<u32>,
    inverse_temperature: f32,
}

impl Forward {
    fn new(
        pool: &Pool,
        target: &Target,
        sequences: &[Sequence],
        inverse_temperature: f32,
        memory: &mut Memory,
    ) -> Self {
        // The last token of a sequence predicts nothing that is learned.
        let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s.tokens[..s.tokens.len() - 1]).collect();
        let packed = Packed::new(&inputs);
        let (shape, width) = (target.heads(), target.config().hidden);
        let mut attend = |_: usize, qkv: [&[f32]; 3], out: &mut [f32]| {
            kernels::attend_sequences(pool, qkv, &packed.lengths, shape, out);
        };
        target.forward(pool, &packed.ids, &packed.positions, &mut attend, memory);
        let (mut rows, mut first) = (Vec::new(), 0);
        for sequence in sequences {
            let len = sequence.tokens.len() - 1;
            rows.extend(first + sequence.prompt - 1..first + len);
            first += len;
        }
        let hidden: Vec<f32> =
            rows.iter().flat_map(|row| &memory.hidden[row * width..(row + 1) * width]).copied().collect();
        let targets: Vec<u32> = sequences.iter().flat_map(|s| s.answer().iter().copied()).collect();
        Self { packed, rows, hidden, targets, inverse_temperature }
    }

    fn chosen(&self) -> Chosen<'_> {
        Chosen { targets: &self.targets, inverse_temperature: self.inverse_temperature }
    }

    /// Adds the gradients of all parameters; `memory` is that of the forward.
    fn backward(
        &self,
        (pool, work): (&Pool, &mut Gradient),
        target: &Target,
        slope: &mut dyn FnMut(usize, f32) -> f32,
        memory: &mut Memory,
        gradients: &mut Gradients,
    ) {
        let (config, width) = (target.config(), target.config().hidden);
        let layers = config.layers;
        let head = if config.tied { 0 } else { gradients.len() - 1 };
        let mut by_rows = vec![0.0; self.hidden.len()];
        let by_head = &mut gradients[head];
        log_probs_gradient(pool, &self.hidden, &target.head, self.chosen(), slope, &mut by_rows, by_head);
        let mut by_hidden = vec![0.0; memory.x.len()];
        for (row, from) in self.rows.iter().zip(by_rows.chunks_exact(width)) {
            by_hidden[row * width..(row + 1) * width].copy_from_slice(from);
        }
        let mut d = vec![0.0; memory.x.len()];
        let norm = &mut gradients[1 + layers * PARAMETERS];
        rms_norm_gradient(pool, &memory.x, &target.norm, config.eps, &by_hidden, &mut d, norm);
        let rows = Rows { positions: &self.packed.positions, rope: target.rope(), beside: &[] };
        let mut attention = Sequences { pool, lengths: &self.packed.lengths, heads: target.heads() };
        let Tape { inputs, values, first } = memory.tape.get_or_insert_default();
        for (i, layer) in target.layers.iter().enumerate().rev() {
            let kept = (i >= *first).then_some(&mut values[i]);
            let own = &mut gradients[1 + i * PARAMETERS..1 + (i + 1) * PARAMETERS];
            layer.backward(pool, (&inputs[i], kept), (rows, &mut attention), &mut d, own, work);
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
