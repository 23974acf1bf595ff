//! One decoder layer of the Llama family, used by targets and by the learned drafter: forward, and the backward that
//! makes the forward's intermediate values again from its input.

use std::sync::Arc;

use kernels::{
    Heads, Matrix, Pool, RopeTable, SequencesGradient, Storage, Turn, Turned, add, input_gradient, linear, rms_norm,
    rms_norm_gradient, rope, round_to_bf16, swiglu, swiglu_gradient, weight_gradient,
};

use crate::load::Config;
use crate::weights::Loaded;

/// Mixes the rows: gets queries, keys (both turned by their positions) and values of all rows, fills in what each query
/// attends to.
pub(crate) type Attend<'a> = dyn FnMut([&[f32]; 3], &mut [f32]) + 'a;

/// Everything a layer needs to know of its rows.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) positions: &'a [u32],
    pub(crate) rope: &'a RopeTable,
    /// What the attention of some layers reads beside the residual stream, `(r, hidden)`; else empty.
    pub(crate) beside: &'a [f32],
}

/// How rows attend in training, forward and backward.
pub(crate) trait Attention {
    /// What each row of queries attends to, as [`Attend`].
    fn forth(&mut self, qkv: [&[f32]; 3], out: &mut [f32]);

    /// Gradients by queries, keys and values, to be overwritten, from `d`, that by what was attended to.
    fn back(&mut self, qkv: [&[f32]; 3], d: &[f32], by: [&mut [f32]; 3]);
}

/// Causal attention inside each of several sequences laid end to end.
#[derive(Clone, Copy)]
pub(crate) struct Sequences<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) lengths: &'a [usize],
    pub(crate) heads: Heads,
}

impl Attention for Sequences<'_> {
    fn forth(&mut self, qkv: [&[f32]; 3], out: &mut [f32]) {
        kernels::attend_sequences(self.pool, qkv, self.lengths, self.heads, out);
    }

    fn back(&mut self, qkv: [&[f32]; 3], d: &[f32], [dq, dk, dv]: [&mut [f32]; 3]) {
        let to = SequencesGradient { dq, dk, dv, ahead: &mut [] };
        kernels::attend_ahead_gradient(self.pool, qkv, &[], self.lengths, self.heads, d, to);
    }
}

/// Parameters in a layer of a target.
pub(crate) const PARAMETERS: usize = 9;

/// What the attention of a layer reads, with the weights of its norms.
#[derive(Debug, Clone)]
pub(crate) enum Reads {
    /// The residual stream, normalised.
    Normed(Arc<Vec<f32>>),
    /// The residual stream as it is (Li et al. 2024, "EAGLE").
    Stream,
    /// What stands beside, and then the stream, both normalised (Li et al. 2025, "EAGLE-3").
    Both([Arc<Vec<f32>>; 2]),
}

impl Reads {
    fn norms(&self) -> usize {
        match self {
            Self::Normed(_) => 1,
            Self::Stream => 0,
            Self::Both(_) => 2,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Layer {
    heads: Heads,
    eps: f32,
    reads: Reads,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    ffn_norm: Arc<Vec<f32>>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// Shape of attention, where keys and values are stored as weights are.
pub(crate) fn heads(config: &Config, storage: Storage) -> Heads {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    Heads { heads, kv_heads, head_dim, storage }
}

/// The next parameter, if it is a vector.
pub(crate) fn vector(parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Arc<Vec<f32>>> {
    match parameters.next()? {
        Loaded::Vector(vector) => Some(vector),
        Loaded::Matrix(_) => None,
    }
}

/// The next parameter, if it is a matrix.
pub(crate) fn matrix(parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Matrix> {
    match parameters.next()? {
        Loaded::Matrix(matrix) => Some(matrix),
        Loaded::Vector(_) => None,
    }
}

/// What a layer computes on its way and a backward needs; memory that calls reuse. Shapes `(r, width)` each.
#[derive(Debug, Default)]
pub(crate) struct Values {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// What attention adds to the residual stream, which may be a thousand times larger.
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    pub(crate) passing: Passing,
}

impl Values {
    /// Keys, turned, and values of its rows.
    pub(crate) fn keys_values(&self) -> [&[f32]; 2] {
        [&self.k, &self.v]
    }
}

/// The values that are made from others without a product: a backward makes them again, so that layers can share this memory.
#[derive(Debug, Default)]
pub(crate) struct Passing {
    normed: Vec<f32>,
    /// Halves of `normed` where it has two.
    halves: [Vec<f32>; 2],
    ffn_normed: Vec<f32>,
    gated: Vec<f32>,
    fed: Vec<f32>,
}

impl Values {
    /// Bytes of a layer's values of r rows, without those that pass.
    pub(crate) fn bytes(config: &Config, rows: usize) -> usize {
        let Config { heads, kv_heads, head_dim, .. } = *config;
        rows * (config.hidden + (2 * heads + 2 * kv_heads) * head_dim + 2 * config.ffn) * size_of::<f32>()
    }

    /// Bytes that it holds, without those that pass.
    pub(crate) fn held(&self) -> usize {
        let Self { q, k, v, attended, mixed, gate, up, .. } = self;
        [q, k, v, attended, mixed, gate, up].iter().map(|values| values.capacity() * size_of::<f32>()).sum()
    }
}

/// Memory that calls of [`Layer::backward`] reuse.
#[derive(Debug, Default)]
pub(crate) struct Gradient {
    /// Values of a layer that kept none.
    values: Values,
    passing: Passing,
    work: Work,
}

#[derive(Debug, Default)]
struct Work {
    /// Between the halves.
    x: Vec<f32>,
    wide: Vec<f32>,
    narrow: Vec<f32>,
    halves: [Vec<f32>; 2],
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    turned: Turned,
}

impl Layer {
    /// Takes its parameters in the order of `layout::layer`.
    pub(crate) fn new(config: &Config, parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Self> {
        let norm = vector(parameters)?;
        Self::reading(config, Reads::Normed(norm), parameters)
    }

    /// The same, of which `reads` brings the norms before its attention.
    pub(crate) fn reading(config: &Config, reads: Reads, parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Self> {
        let q = matrix(parameters)?;
        Some(Self {
            heads: heads(config, q.storage()),
            eps: config.eps,
            reads,
            q,
            k: matrix(parameters)?,
            v: matrix(parameters)?,
            o: matrix(parameters)?,
            ffn_norm: vector(parameters)?,
            gate: matrix(parameters)?,
            up: matrix(parameters)?,
            down: matrix(parameters)?,
        })
    }

    /// Shape of its attention.
    pub(crate) fn heads(&self) -> Heads {
        self.heads
    }

    /// Bytes of its matrices.
    pub(crate) fn bytes(&self) -> usize {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down].iter().map(|m| m.bytes()).sum()
    }

    /// x `(r, hidden)` becomes the layer's output.
    pub(crate) fn forward(
        &self,
        pool: &Pool,
        x: &mut [f32],
        rows: Rows<'_>,
        attend: &mut Attend<'_>,
        values: &mut Values,
    ) {
        self.mix(pool, x, rows, attend, values);
        self.feed(pool, x, values);
    }

    /// The first half: attention and its residual.
    fn mix(&self, pool: &Pool, x: &mut [f32], rows: Rows<'_>, attend: &mut Attend<'_>, values: &mut Values) {
        let (count, width, kv_width) = (rows.positions.len(), self.heads.width(), self.heads.kv_width());
        let Values { q, k, v, attended, mixed, passing, .. } = values;
        for (values, width) in [(&mut *q, width), (k, kv_width), (v, kv_width), (attended, width)] {
            values.resize(count * width, 0.0);
        }
        self.read(pool, x, rows.beside, passing);
        let normed = &passing.normed;
        linear(pool, normed, &self.q, q);
        linear(pool, normed, &self.k, k);
        linear(pool, normed, &self.v, v);
        rope(q, width, rows.positions, rows.rope, Turn::Forth);
        rope(k, kv_width, rows.positions, rows.rope, Turn::Forth);
        if self.heads.storage == Storage::Bf16 {
            // As attention would; a backward starts from the same.
            [&mut *q, k, v].into_iter().for_each(|values| round_to_bf16(values));
        }
        attend([q, k, v], attended);
        mixed.resize(x.len(), 0.0);
        linear(pool, attended, &self.o, mixed);
        add(x, mixed);
    }

    /// What attention reads.
    fn read(&self, pool: &Pool, x: &[f32], beside: &[f32], passing: &mut Passing) {
        let Passing { normed, halves, .. } = passing;
        normed.resize(x.len() * if matches!(self.reads, Reads::Both(_)) { 2 } else { 1 }, 0.0);
        match &self.reads {
            Reads::Normed(weight) => rms_norm(pool, x, weight, self.eps, normed),
            Reads::Stream => normed.copy_from_slice(x),
            Reads::Both(weights) => {
                for ((half, weight), from) in halves.iter_mut().zip(weights).zip([beside, x]) {
                    half.resize(x.len(), 0.0);
                    rms_norm(pool, from, weight, self.eps, half);
                }
                let width = weights[0].len();
                let rows = halves[0].chunks_exact(width).zip(halves[1].chunks_exact(width));
                for (to, (beside, stream)) in normed.chunks_exact_mut(2 * width).zip(rows) {
                    to[..width].copy_from_slice(beside);
                    to[width..].copy_from_slice(stream);
                }
            }
        }
    }

    /// The second half: the feed-forward network and its residual.
    fn feed(&self, pool: &Pool, x: &mut [f32], values: &mut Values) {
        self.gate(pool, x, values);
        let Passing { gated, fed, .. } = &mut values.passing;
        fed.resize(x.len(), 0.0);
        linear(pool, gated, &self.down, fed);
        add(x, fed);
    }

    /// The feed-forward network up to its gated values.
    fn gate(&self, pool: &Pool, x: &[f32], values: &mut Values) {
        let wide = x.len() / self.gate.k() * self.gate.n();
        let Values { gate, up, passing: Passing { ffn_normed, gated, .. }, .. } = values;
        ffn_normed.resize(x.len(), 0.0);
        for values in [&mut *gate, up, gated] {
            values.resize(wide, 0.0);
        }
        rms_norm(pool, x, &self.ffn_norm, self.eps, ffn_normed);
        linear(pool, ffn_normed, &self.gate, gate);
        linear(pool, ffn_normed, &self.up, up);
        swiglu(pool, gate, up, gated);
    }

    /// Backward: `d` `(r, hidden)`, the gradient by the output, becomes that by the input `x`. Takes the values that the forward
    /// kept, or makes them again, with the same bits. Adds to `gradients`, this layer's parameters in the order of the layout.
    pub(crate) fn backward(
        &self,
        pool: &Pool,
        (x, kept): (&[f32], Option<&mut Values>),
        (rows, attention): (Rows<'_>, &mut dyn Attention),
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
        memory: &mut Gradient,
    ) {
        let Gradient { values: again, passing, work } = memory;
        work.x.clear();
        work.x.extend_from_slice(x);
        let values = match kept {
            Some(kept) => {
                std::mem::swap(&mut kept.passing, passing);
                self.pass(pool, &mut work.x, rows.beside, kept);
                kept
            }
            None => {
                std::mem::swap(&mut again.passing, passing);
                let mut attend = |qkv: [&[f32]; 3], out: &mut [f32]| attention.forth(qkv, out);
                self.mix(pool, &mut work.x, rows, &mut attend, again);
                self.gate(pool, &work.x, again);
                again
            }
        };
        let (mixing, feeding) = gradients.split_at_mut(self.reads.norms() + 4);
        self.feed_backward(pool, d, &mut feeding[..4], values, work);
        self.mix_backward(pool, x, (rows, attention), d, mixing, values, work);
        std::mem::swap(&mut values.passing, passing);
    }

    /// Makes the values that passed once more, and x, the layer's input, that of its second half.
    fn pass(&self, pool: &Pool, x: &mut [f32], beside: &[f32], values: &mut Values) {
        let Values { mixed, gate, up, passing, .. } = values;
        self.read(pool, x, beside, passing);
        let Passing { ffn_normed, gated, .. } = passing;
        ffn_normed.resize(x.len(), 0.0);
        gated.resize(gate.len(), 0.0);
        add(x, mixed);
        rms_norm(pool, x, &self.ffn_norm, self.eps, ffn_normed);
        swiglu(pool, gate, up, gated);
    }

    fn feed_backward(
        &self,
        pool: &Pool,
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
        values: &mut Values,
        work: &mut Work,
    ) {
        let Work { x, wide, narrow, turned, .. } = work;
        let Values { gate, up, passing: Passing { ffn_normed, gated, .. }, .. } = values;
        wide.resize(gated.len(), 0.0);
        input_gradient(pool, d, &self.down, wide, false, turned);
        weight_gradient(pool, gated, d, &self.down, &mut gradients[3], turned);
        swiglu_gradient(pool, gate, up, wide);
        narrow.resize(d.len(), 0.0);
        input_gradient(pool, gate, &self.gate, narrow, false, turned);
        input_gradient(pool, up, &self.up, narrow, true, turned);
        weight_gradient(pool, ffn_normed, gate, &self.gate, &mut gradients[1], turned);
        weight_gradient(pool, ffn_normed, up, &self.up, &mut gradients[2], turned);
        rms_norm_gradient(pool, x, &self.ffn_norm, self.eps, narrow, d, &mut gradients[0]);
    }

    #[expect(clippy::too_many_arguments, reason = "half of `backward`")]
    fn mix_backward(
        &self,
        pool: &Pool,
        x: &[f32],
        (rows, attention): (Rows<'_>, &mut dyn Attention),
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
        values: &Values,
        work: &mut Work,
    ) {
        let Work { wide, narrow, halves, dq, dk, dv, turned, .. } = work;
        let Values { q, k, v, attended, passing: Passing { normed, .. }, .. } = values;
        let (width, kv_width) = (self.heads.width(), self.heads.kv_width());
        let (by_norms, gradients) = gradients.split_at_mut(self.reads.norms());
        wide.resize(attended.len(), 0.0);
        input_gradient(pool, d, &self.o, wide, false, turned);
        weight_gradient(pool, attended, d, &self.o, &mut gradients[3], turned);
        for (values, len) in [(&mut *dq, q.len()), (dk, k.len()), (dv, v.len())] {
            values.resize(len, 0.0);
        }
        attention.back([q, k, v], wide, [dq, dk, dv]);
        rope(dq, width, rows.positions, rows.rope, Turn::Back);
        rope(dk, kv_width, rows.positions, rows.rope, Turn::Back);
        narrow.resize(normed.len(), 0.0);
        for (i, (weight, by)) in [(&self.q, &*dq), (&self.k, &*dk), (&self.v, &*dv)].into_iter().enumerate() {
            input_gradient(pool, by, weight, narrow, i > 0, turned);
            weight_gradient(pool, normed, by, weight, &mut gradients[i], turned);
        }
        match (&self.reads, by_norms) {
            (Reads::Normed(weight), [by_norm]) => rms_norm_gradient(pool, x, weight, self.eps, narrow, d, by_norm),
            (Reads::Both([beside, stream]), [by_beside, by_stream]) => {
                let width = stream.len();
                for (i, half) in halves.iter_mut().enumerate() {
                    half.clear();
                    narrow.chunks_exact(2 * width).for_each(|row| half.extend_from_slice(&row[i * width..][..width]));
                }
                rms_norm_gradient(pool, x, stream, self.eps, &halves[1], d, by_stream);
                // The gradient by what stands beside goes nowhere.
                narrow.resize(x.len(), 0.0);
                rms_norm_gradient(pool, rows.beside, beside, self.eps, &halves[0], narrow, by_beside);
            }
            _ => add(d, narrow),
        }
    }
}

#[cfg(test)]
mod tests {
    use state::plan::TinyShape;

    use super::*;
    use crate::target::Target;
    use crate::weights::Weights;

    #[test]
    fn a_backward_in_bf16_starts_from_what_attention_read() {
        let shape = TinyShape { hidden: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 8, positions_max: 8 };
        for storage in [Storage::F32, Storage::Bf16] {
            let config = Config { storage, ..Config::tiny(&shape).unwrap() };
            let weights = Weights::random(&config, 1).unwrap();
            let target = Target::new(&config, &weights, &Target::rope_table(&config)).unwrap();
            let (mut x, mut values) = ((0..32).map(|i| (i as f32).sin()).collect::<Vec<_>>(), Values::default());
            let rows = Rows { positions: &[3, 4], rope: target.rope(), beside: &[] };
            let nothing = &mut |_: [&[f32]; 3], out: &mut [f32]| out.fill(0.0);
            target.layers[0].forward(&Pool::default(), &mut x, rows, nothing, &mut values);
            for kept in [values.q, values.k, values.v] {
                let mut rounded = kept.clone();
                round_to_bf16(&mut rounded);
                assert_eq!(rounded == kept, storage == Storage::Bf16);
            }
        }
    }
}
