//! Causal grouped-query attention over cached keys: decoding, draft trees, and blocks of rows in training.
//!
//! For a row each score is one chain over the features, then one pass for the maximum, lanes `i % 8` for the sum, and
//! values are added as one chain in the order of positions. So a token's output does not depend on where its keys are
//! stored or on which rows attend beside it.

mod sequences;

pub use sequences::{SequencesGradient, attend_ahead, attend_ahead_gradient, attend_sequences};

use crate::dispatch::simd;
use crate::math;
use crate::matrix::PANEL;
use crate::pool::{Pool, Shares};
use crate::product::{Operands, Strides, multiply};

/// Shape of the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; query head h reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of a row of queries.
    #[must_use]
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of a row of keys or values.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(PANEL)
    }
}

/// Keys, already turned, and values of consecutive positions in one layer. Each head's stand together, so that attention
/// streams them.
#[derive(Debug, Clone)]
pub struct KeyValues {
    shape: Heads,
    rows: usize,
    heads: Vec<HeadRows>,
}

#[derive(Debug, Clone, Default)]
struct HeadRows {
    /// Panels of 16 positions: `(panels, head_dim, PANEL)`.
    keys: Vec<f32>,
    /// `(rows, padded head_dim)`.
    values: Vec<f32>,
}

impl KeyValues {
    /// None yet.
    #[must_use]
    pub fn new(shape: Heads) -> Self {
        Self { shape, rows: 0, heads: vec![HeadRows::default(); shape.kv_heads] }
    }

    /// Positions stored.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.rows = 0;
        for head in &mut self.heads {
            head.keys.clear();
            head.values.clear();
        }
    }

    /// Becomes the same as another, of the same shape, and keeps the memory.
    pub fn copy_from(&mut self, other: &Self) {
        (self.shape, self.rows) = (other.shape, other.rows);
        for (to, from) in self.heads.iter_mut().zip(&other.heads) {
            to.keys.clone_from(&from.keys);
            to.values.clone_from(&from.values);
        }
    }

    /// Appends a position: key and value, `(kv_heads * head_dim)` each.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        let (lane, dim, padded) = (self.rows % PANEL, self.shape.head_dim, self.shape.padded());
        let base = self.rows / PANEL * PANEL * dim + lane;
        let own = key.chunks_exact(dim).zip(value.chunks_exact(dim));
        for (head, (key, value)) in self.heads.iter_mut().zip(own) {
            if lane == 0 {
                head.keys.resize(base + dim * PANEL, 0.0);
            }
            for (to, v) in head.keys[base..].iter_mut().step_by(PANEL).zip(key) {
                *to = *v;
            }
            head.values.extend_from_slice(value);
            head.values.resize((self.rows + 1) * padded, 0.0);
        }
        self.rows += 1;
    }

    /// Appends positions from rows of keys and of values.
    pub fn extend(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.shape.kv_width();
        keys.chunks_exact(width).zip(values.chunks_exact(width)).for_each(|(key, value)| self.push(key, value));
    }
}

/// Memory that calls of [`attend`] reuse.
#[derive(Debug, Default)]
pub struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    fresh: Vec<f32>,
    mixed: Vec<f32>,
}

/// What a set of queries attends to: the same `shared` positions, then rows of `fresh`, a path of its own each.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Keys and values of earlier positions, in order.
    pub shared: &'a [&'a KeyValues],
    /// Newer rows: a draft tree, or the newest part of a sequence.
    pub fresh: &'a KeyValues,
    /// For each query its rows of `fresh`, in the order of their positions, its own last.
    pub paths: &'a [&'a [usize]],
}

/// [`attend`] for many requests whose rows stand one after another, on all threads. `scratch` gets one for each thread.
///
/// # Panics
/// If lengths do not fit.
pub fn attend_requests(
    pool: &Pool,
    queries: &[f32],
    requests: &[Context<'_>],
    shape: Heads,
    scratch: &mut Vec<Scratch>,
    out: &mut [f32],
) {
    let width = shape.width();
    let mut firsts = vec![0];
    firsts.extend(requests.iter().scan(0, |row, request| {
        *row += request.paths.len();
        Some(*row)
    }));
    assert!(queries.len() == firsts[requests.len()] * width && out.len() == queries.len(), "attention of requests");
    let parts = pool.threads().min(requests.len());
    scratch.resize_with(parts.max(scratch.len()), Scratch::default);
    let (out, scratch) = (Shares::of(out), Shares::of(scratch));
    pool.run(parts, &|part| {
        // SAFETY: each part has a scratch of its own.
        let scratch = unsafe { &mut scratch.part(part..part + 1)[0] };
        for i in requests.len() * part / parts..requests.len() * (part + 1) / parts {
            let at = firsts[i] * width..firsts[i + 1] * width;
            // SAFETY: requests have rows of their own.
            attend(&queries[at.clone()], requests[i], shape, scratch, unsafe { out.part(at) });
        }
    });
}

/// Attention of query rows `(paths.len(), heads * head_dim)` into `out`, of the same shape.
///
/// # Panics
/// If lengths do not fit.
pub fn attend(queries: &[f32], context: Context<'_>, shape: Heads, scratch: &mut Scratch, out: &mut [f32]) {
    let rows = context.paths.len();
    assert!(queries.len() == rows * shape.width() && out.len() == queries.len(), "attention of {} floats", out.len());
    for kv_head in 0..shape.kv_heads {
        attend_head(queries, context, shape, kv_head, scratch, out);
    }
}

/// All query heads of one key/value head: they read the same keys.
fn attend_head(
    queries: &[f32],
    context: Context<'_>,
    shape: Heads,
    kv_head: usize,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Scratch { queries: own, scores, fresh, mixed } = scratch;
    let (dim, padded, group) = (shape.head_dim, shape.padded(), shape.heads / shape.kv_heads);
    own.clear();
    for row in queries.chunks_exact(shape.width()) {
        own.extend_from_slice(&row[kv_head * group * dim..][..group * dim]);
    }
    let rows = own.len() / dim;
    let shared: usize = context.shared.iter().map(|s| s.rows).sum();
    let stride = shared + context.paths.iter().map(|p| p.len()).max().unwrap_or(0);
    scores.resize(rows * stride, 0.0);
    let mut done = 0;
    for run in context.shared {
        key_products(own, run, kv_head, stride, &mut scores[done..]);
        done += run.rows;
    }
    fresh.resize(rows * context.fresh.rows, 0.0);
    key_products(own, context.fresh, kv_head, context.fresh.rows, fresh);
    mixed.resize(rows * padded, 0.0);
    for row in 0..rows {
        let path = context.paths[row / group];
        let scores = &mut scores[row * stride..][..shared + path.len()];
        for (score, node) in scores[shared..].iter_mut().zip(path) {
            *score = fresh[row * context.fresh.rows + node];
        }
        // The sum waits in the row's place until its values are mixed.
        own[row] = soften(scores, shape.scale());
    }
    mixed.fill(0.0);
    done = 0;
    for run in context.shared {
        let strides =
            Strides { x_row: stride, x_step: 1, w_step: padded, w_panel: PANEL, y_row: padded, y_panel: PANEL };
        if run.rows > 0 {
            let (x, w) = (&scores[done..], run.heads[kv_head].values.as_slice());
            multiply(Operands { x, w, shape: [rows, run.rows, padded], strides, keep: true }, mixed);
        }
        done += run.rows;
    }
    for (row, mixed) in mixed.chunks_exact_mut(padded).enumerate() {
        let weights = &scores[row * stride + shared..];
        add_path(mixed, weights, context.paths[row / group], &context.fresh.heads[kv_head].values);
        let at = row / group * shape.width() + (kv_head * group + row % group) * dim;
        let inverse = 1.0 / own[row];
        out[at..at + dim].iter_mut().zip(mixed).for_each(|(o, m)| *o = *m * inverse);
    }
}

/// `q · key` of every position, rows of `to` `stride` floats apart.
fn key_products(queries: &[f32], run: &KeyValues, kv_head: usize, stride: usize, to: &mut [f32]) {
    let dim = run.shape.head_dim;
    if run.rows > 0 {
        let strides = Strides::packed(dim, stride);
        let shape = [queries.len() / dim, dim, run.rows];
        let w = run.heads[kv_head].keys.as_slice();
        multiply(Operands { x: queries, w, shape, strides, keep: false }, to);
    }
}

simd! {
    /// Adds the values along a path, in order.
    fn add_path<V>(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[f32]) {
        for (weight, node) in weights.iter().zip(path) {
            let row = values[node * mixed.len()..].as_chunks::<PANEL>().0;
            for (to, value) in mixed.as_chunks_mut::<PANEL>().0.iter_mut().zip(row) {
                V::splat(*weight).mul_add(V::load(value), V::load(to)).store(to);
            }
        }
    }
}

simd! {
    /// Leaves `exp(scale * score - max)` in `scores`; returns their sum.
    fn soften(scores: &mut [f32], scale: f32) -> f32 {
        soften_here(scores, scale)
    }
}

#[inline(always)]
fn soften_here(scores: &mut [f32], scale: f32) -> f32 {
    scores.iter_mut().for_each(|s| *s *= scale);
    let max = math::lane_max(scores);
    for s in scores.iter_mut() {
        *s = math::exp(*s - max);
    }
    math::lane_sum(scores, |score| score)
}
