//! The target: a decoder of the Llama family. One forward serves training, prefill, decoding and verification; only
//! the way rows attend differs. Keys and values live outside.

use std::sync::Arc;

use kernels::{Heads, Matrix, Pool, RopeTable, embed, linear, rms_norm};

use crate::error::{Error, Result};
use crate::layer::{Attend, Layer, Rows, Values, heads, matrix, vector};
use crate::load::Config;
use crate::weights::Weights;

/// A target model over one version of its weights.
#[derive(Debug, Clone)]
pub struct Target {
    config: Config,
    pub(crate) embedding: Matrix,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Arc<Vec<f32>>,
    pub(crate) head: Matrix,
    rope: RopeTable,
}

/// Hidden states of the target that are kept for a drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hidden {
    /// None.
    #[default]
    Nothing,
    /// Those behind the final norm, `(hidden)` a token (Li et al. 2024, "EAGLE").
    Last,
    /// Those before three layers, and then those behind the final norm, `(4 * hidden)` a token (Li et al. 2025, "EAGLE-3").
    Taps,
}

impl Hidden {
    /// Numbers a token.
    #[must_use]
    pub fn width(self, config: &Config) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last => config.hidden,
            Self::Taps => (TAPS + 1) * config.hidden,
        }
    }
}

/// Layers whose inputs a drafter reads.
pub(crate) const TAPS: usize = 3;

/// These layers: a low, a middle and a high one. From twelve layers on those of EAGLE-3's public code.
#[must_use]
pub fn taps(layers: usize) -> [usize; TAPS] {
    let step = (layers / 4).clamp(1, 3);
    [step.min(2).min(layers / 2), layers / 2, layers - step]
}

/// How each layer's rows attend: layer, then [queries, keys, values], and where to.
pub(crate) type AttendLayer<'a> = dyn FnMut(usize, [&[f32]; 3], &mut [f32]) + 'a;

/// Memory that forwards reuse.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) x: Vec<f32>,
    pub(crate) hidden: Vec<f32>,
    pub(crate) values: Values,
    /// What is to be kept for a backward, if one follows.
    pub(crate) tape: Option<Tape>,
    /// What is to be kept for a drafter, and [`Hidden::Taps`] if it is that.
    pub(crate) keeps: Hidden,
    pub(crate) taps: Vec<f32>,
}

impl Memory {
    /// What was kept of a forward's rows, [`Hidden::width`] numbers each.
    pub(crate) fn kept(&self) -> &[f32] {
        match self.keeps {
            Hidden::Nothing => &[],
            Hidden::Last => &self.hidden,
            Hidden::Taps => &self.taps,
        }
    }
}

/// What a forward keeps for its backward, in memory that forwards reuse.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    /// Input of each layer.
    pub(crate) inputs: Vec<Vec<f32>>,
    /// Values of layers from `first` on, without those that pass; the backward makes those of earlier layers again.
    pub(crate) values: Vec<Values>,
    pub(crate) first: usize,
}

impl Tape {
    /// Keeps the values of as many layers as fit into so many bytes.
    pub(crate) fn begin(&mut self, config: &Config, rows: usize, bytes_max: usize) {
        let kept = (bytes_max / Values::bytes(config, rows).max(1)).min(config.layers);
        self.first = config.layers - kept;
        self.inputs.resize_with(config.layers, Vec::new);
        self.values.resize_with(config.layers, Values::default);
    }

    /// Memory that it holds.
    pub(crate) fn bytes(&self) -> usize {
        let inputs: usize = self.inputs.iter().map(|x| x.capacity() * size_of::<f32>()).sum();
        inputs + self.values.iter().map(Values::held).sum::<usize>()
    }
}

impl Target {
    /// Over these weights, with a table of rotations from [`Target::rope_table`].
    ///
    /// # Errors
    /// If the weights are of another layout than `config`'s.
    pub fn new(config: &Config, weights: &Weights, rope: &RopeTable) -> Result<Self> {
        let mut parameters = weights.loaded();
        let wrong = || Error::Layout { found: weights.layout().len() };
        let embedding = matrix(&mut parameters).ok_or_else(wrong)?;
        let layer = |_| Layer::new(config, &mut parameters).ok_or_else(wrong);
        let layers = (0..config.layers).map(layer).collect::<Result<_>>()?;
        let norm = vector(&mut parameters).ok_or_else(wrong)?;
        let head = if config.tied { embedding.clone() } else { matrix(&mut parameters).ok_or_else(wrong)? };
        Ok(Self { config: config.clone(), embedding, layers, norm, head, rope: rope.clone() })
    }

    /// The table of rotations that all versions of a model share.
    #[must_use]
    pub fn rope_table(config: &Config) -> RopeTable {
        RopeTable::new(config.head_dim, config.rope_theta, config.positions_max)
    }

    /// Shape of its attention.
    pub(crate) fn heads(&self) -> Heads {
        heads(&self.config, self.embedding.storage())
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Bytes of the weights that a forward streams.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.head.bytes()
    }

    /// Leaves the hidden states after the final norm, `(r, hidden)`, of rows at `positions` in `memory.hidden`.
    pub(crate) fn forward(
        &self,
        pool: &Pool,
        ids: &[u32],
        positions: &[u32],
        attend: &mut AttendLayer<'_>,
        memory: &mut Memory,
    ) {
        let rows = Rows { positions, rope: &self.rope, beside: &[] };
        let Memory { x, hidden, values, tape, keeps, taps: kept } = memory;
        let (width, taps) = (self.config.hidden, taps(self.layers.len()));
        embed(ids, &self.embedding, x);
        if *keeps == Hidden::Taps {
            kept.resize(ids.len() * keeps.width(&self.config), 0.0);
        }
        let mut keep = |column: usize, x: &[f32]| {
            for (to, x) in kept.chunks_exact_mut((TAPS + 1) * width).zip(x.chunks_exact(width)) {
                to[column * width..][..width].copy_from_slice(x);
            }
        };
        for (i, layer) in self.layers.iter().enumerate() {
            if *keeps == Hidden::Taps {
                taps.iter().enumerate().filter(|(_, tap)| **tap == i).for_each(|(column, _)| keep(column, x));
            }
            let mut attend_here = |qkv: [&[f32]; 3], out: &mut [f32]| attend(i, qkv, out);
            let attend_here: &mut Attend<'_> = &mut attend_here;
            if let Some(tape) = tape {
                tape.inputs[i].clone_from(x);
                if i >= tape.first {
                    let kept = &mut tape.values[i];
                    std::mem::swap(&mut kept.passing, &mut values.passing);
                    layer.forward(pool, x, rows, attend_here, kept);
                    std::mem::swap(&mut kept.passing, &mut values.passing);
                    continue;
                }
            }
            layer.forward(pool, x, rows, attend_here, values);
        }
        hidden.resize(x.len(), 0.0);
        rms_norm(pool, x, &self.norm, self.config.eps, hidden);
        if *keeps == Hidden::Taps {
            keep(TAPS, hidden);
        }
    }

    /// Hidden states of whole sequences laid end to end, [`Hidden::width`] numbers a token.
    ///
    /// # Panics
    /// If a token or a position is outside the model's tables.
    #[must_use]
    pub fn hidden_of_sequences(&self, pool: &Pool, sequences: &[&[u32]], which: Hidden) -> Vec<f32> {
        let packed = Packed::new(sequences);
        let shape = self.heads();
        let mut memory = Memory { keeps: which, ..Memory::default() };
        let mut attend = |_: usize, qkv: [&[f32]; 3], out: &mut [f32]| {
            kernels::attend_sequences(pool, qkv, &packed.lengths, shape, out);
        };
        self.forward(pool, &packed.ids, &packed.positions, &mut attend, &mut memory);
        memory.kept().to_vec()
    }

    /// Logits `(r, vocab)` of hidden states `(r, hidden)`.
    ///
    /// # Panics
    /// If `hidden` has no whole rows.
    #[must_use]
    pub fn logits(&self, pool: &Pool, hidden: &[f32]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.logits_into(pool, hidden, &mut logits);
        logits
    }

    pub(crate) fn logits_into(&self, pool: &Pool, hidden: &[f32], logits: &mut Vec<f32>) {
        logits.resize(hidden.len() / self.config.hidden * self.config.vocab, 0.0);
        linear(pool, hidden, &self.head, logits);
    }
}

/// Sequences laid end to end.
pub(crate) struct Packed {
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) lengths: Vec<usize>,
}

impl Packed {
    pub(crate) fn new(sequences: &[&[u32]]) -> Self {
        Self {
            ids: sequences.concat(),
            positions: sequences.iter().flat_map(|s| 0..u32::try_from(s.len()).unwrap_or(u32::MAX)).collect(),
            lengths: sequences.iter().map(|s| s.len()).collect(),
        }
    }
}
