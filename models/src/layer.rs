//! One decoder layer of the Llama family, used by targets and by the learned drafter: forward, and the backward that
//! makes the forward's intermediate values again from its input.

use std::sync::Arc;

use kernels::{
    Heads, Matrix, Pool, RopeTable, SequencesGradient, Turn, Turned, add, input_gradient, linear, rms_norm,
    rms_norm_gradient, rope, swiglu, swiglu_gradient, weight_gradient,
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
}

/// Rows of whole sequences laid end to end.
#[derive(Clone, Copy)]
pub(crate) struct Sequences<'a> {
    pub(crate) rows: Rows<'a>,
    pub(crate) lengths: &'a [usize],
}

/// Parameters in a layer with both its norms.
pub(crate) const PARAMETERS: usize = 9;

#[derive(Debug, Clone)]
pub(crate) struct Layer {
    heads: Heads,
    eps: f32,
    /// A drafter's layer has none (Li et al. 2024, "EAGLE").
    attention_norm: Option<Arc<Vec<f32>>>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    ffn_norm: Arc<Vec<f32>>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

pub(crate) fn heads(config: &Config) -> Heads {
    Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
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

/// The values that are made from others without a product: a backward makes them again, so that layers can share this memory.
#[derive(Debug, Default)]
pub(crate) struct Passing {
    normed: Vec<f32>,
    ffn_normed: Vec<f32>,
    gated: Vec<f32>,
    fed: Vec<f32>,
}

impl Values {
    /// Bytes of a layer's values of r rows, without those that pass.
    pub(crate) fn bytes(config: &Config, rows: usize) -> usize {
        let Heads { heads, kv_heads, head_dim } = heads(config);
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
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    turned: Turned,
}

impl Layer {
    /// Takes its parameters in the order of `layout::layer`.
    pub(crate) fn new(config: &Config, parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Self> {
        let norm = vector(parameters)?;
        Some(Self { attention_norm: Some(norm), ..Self::without_norm(config, parameters)? })
    }

    /// The same of `layout::layer_without_norm`.
    pub(crate) fn without_norm(config: &Config, parameters: &mut dyn Iterator<Item = Loaded>) -> Option<Self> {
        Some(Self {
            heads: heads(config),
            eps: config.eps,
            attention_norm: None,
            q: matrix(parameters)?,
            k: matrix(parameters)?,
            v: matrix(parameters)?,
            o: matrix(parameters)?,
            ffn_norm: vector(parameters)?,
            gate: matrix(parameters)?,
            up: matrix(parameters)?,
            down: matrix(parameters)?,
        })
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
        let Values { q, k, v, attended, mixed, passing: Passing { normed, .. }, .. } = values;
        normed.resize(x.len(), 0.0);
        for (values, width) in [(&mut *q, width), (k, kv_width), (v, kv_width), (attended, width)] {
            values.resize(count * width, 0.0);
        }
        self.norm_attention(pool, x, normed);
        linear(pool, normed, &self.q, q);
        linear(pool, normed, &self.k, k);
        linear(pool, normed, &self.v, v);
        rope(q, width, rows.positions, rows.rope, Turn::Forth);
        rope(k, kv_width, rows.positions, rows.rope, Turn::Forth);
        attend([q, k, v], attended);
        mixed.resize(x.len(), 0.0);
        linear(pool, attended, &self.o, mixed);
        add(x, mixed);
    }

    fn norm_attention(&self, pool: &Pool, x: &[f32], normed: &mut [f32]) {
        match &self.attention_norm {
            Some(weight) => rms_norm(pool, x, weight, self.eps, normed),
            None => normed.copy_from_slice(x),
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

    /// Backward over sequences laid end to end: `d` `(r, hidden)`, the gradient by the output, becomes that by the input
    /// `x`. Takes the values that the forward kept, or makes them again, with the same bits. Adds to `gradients`, this layer's
    /// parameters in the order of the layout.
    pub(crate) fn backward(
        &self,
        pool: &Pool,
        (x, kept): (&[f32], Option<&mut Values>),
        sequences: Sequences<'_>,
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
                self.pass(pool, &mut work.x, kept);
                kept
            }
            None => {
                std::mem::swap(&mut again.passing, passing);
                let mut attend = |qkv: [&[f32]; 3], out: &mut [f32]| {
                    kernels::attend_sequences(pool, qkv, sequences.lengths, self.heads, out);
                };
                self.mix(pool, &mut work.x, sequences.rows, &mut attend, again);
                self.gate(pool, &work.x, again);
                again
            }
        };
        let (mixing, feeding) = gradients.split_at_mut(PARAMETERS - 4 - usize::from(self.attention_norm.is_none()));
        self.feed_backward(pool, d, &mut feeding[..4], values, work);
        self.mix_backward(pool, x, sequences, d, mixing, values, work);
        std::mem::swap(&mut values.passing, passing);
    }

    /// Makes the values that passed once more, and x, the layer's input, that of its second half.
    fn pass(&self, pool: &Pool, x: &mut [f32], values: &mut Values) {
        let Values { mixed, gate, up, passing: Passing { normed, ffn_normed, gated, .. }, .. } = values;
        for (values, len) in [(&mut *normed, x.len()), (ffn_normed, x.len()), (gated, gate.len())] {
            values.resize(len, 0.0);
        }
        self.norm_attention(pool, x, normed);
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
        let shape = |m: &Matrix| [m.n(), m.k()];
        let Values { gate, up, passing: Passing { ffn_normed, gated, .. }, .. } = values;
        wide.resize(gated.len(), 0.0);
        input_gradient(pool, d, &self.down, wide, false, turned);
        weight_gradient(pool, gated, d, &mut gradients[3], shape(&self.down), turned);
        swiglu_gradient(pool, gate, up, wide);
        narrow.resize(d.len(), 0.0);
        input_gradient(pool, gate, &self.gate, narrow, false, turned);
        input_gradient(pool, up, &self.up, narrow, true, turned);
        weight_gradient(pool, ffn_normed, gate, &mut gradients[1], shape(&self.gate), turned);
        weight_gradient(pool, ffn_normed, up, &mut gradients[2], shape(&self.up), turned);
        rms_norm_gradient(pool, x, &self.ffn_norm, self.eps, narrow, d, &mut gradients[0]);
    }

    #[expect(clippy::too_many_arguments, reason = "half of `backward`")]
    fn mix_backward(
        &self,
        pool: &Pool,
        x: &[f32],
        Sequences { rows, lengths }: Sequences<'_>,
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
        values: &Values,
        work: &mut Work,
    ) {
        let Work { wide, narrow, dq, dk, dv, turned, .. } = work;
        let Values { q, k, v, attended, passing: Passing { normed, .. }, .. } = values;
        let shape = |m: &Matrix| [m.n(), m.k()];
        let (width, kv_width) = (self.heads.width(), self.heads.kv_width());
        let (by_norm, gradients) = gradients.split_at_mut(usize::from(self.attention_norm.is_some()));
        wide.resize(attended.len(), 0.0);
        input_gradient(pool, d, &self.o, wide, false, turned);
        weight_gradient(pool, attended, d, &mut gradients[3], shape(&self.o), turned);
        for (values, len) in [(&mut *dq, q.len()), (dk, k.len()), (dv, v.len())] {
            values.resize(len, 0.0);
        }
        let to = SequencesGradient { dq, dk, dv };
        kernels::attend_sequences_gradient(pool, [q, k, v], lengths, self.heads, wide, to);
        rope(dq, width, rows.positions, rows.rope, Turn::Back);
        rope(dk, kv_width, rows.positions, rows.rope, Turn::Back);
        for (i, (weight, by)) in [(&self.q, &*dq), (&self.k, &*dk), (&self.v, &*dv)].into_iter().enumerate() {
            input_gradient(pool, by, weight, narrow, i > 0, turned);
            weight_gradient(pool, normed, by, &mut gradients[i], shape(weight), turned);
        }
        match (&self.attention_norm, by_norm) {
            (Some(weight), [by_norm]) => rms_norm_gradient(pool, x, weight, self.eps, narrow, d, by_norm),
            _ => add(d, narrow),
        }
    }
}
