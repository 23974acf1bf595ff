//! Causal grouped-query attention over cached keys: decoding, draft trees, and blocks of rows in training.
//!
//! For a row each score is one chain over the features, then one pass for the maximum, lanes `i % 8` for the sum, and
//! values are added as one chain in the order of positions. So a token's output does not depend on where its keys are
//! stored or on which rows attend beside it. With keys and values in bf16, queries and the weights of values are rounded to it,
//! too; maxima and sums are not.

mod sequences;
mod stored;

pub use sequences::{SequencesGradient, attend_ahead, attend_ahead_gradient, attend_sequences};
pub use stored::KeyValues;

use crate::dispatch::simd;
use crate::math;
use crate::matrix::{PANEL, Storage};
use crate::pool::{Pool, Shares};
use crate::product::{Operands, Strides, multiply};
use stored::{HeadRows, Number, of_heads};

/// Shape of the heads, and what their keys and values are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; query head h reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head; even, where its keys are in bf16.
    pub head_dim: usize,
    /// What keys and values are stored as, and multiplied with.
    pub storage: Storage,
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
    /// For each query its rows of `fresh`, in the order of their positions, its own last: never none.
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
    let is_stored = |run: &KeyValues| run.shape == shape;
    assert!(context.shared.iter().all(|run| is_stored(run)) && is_stored(context.fresh), "keys of heads not {shape:?}");
    let is_inside = |path: &&[usize]| !path.is_empty() && path.iter().all(|row| *row < context.fresh.rows);
    assert!(context.paths.iter().all(is_inside), "a query without its own row, or with one that is not there");
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
        // A step in bf16 that only the run's last position fills multiplies one weight more by zero. There is one: of the row's next
        // run, or of its path, which ends with the row itself.
        let x = &scores[done..];
        of_heads!(&run.numbers, heads => add_values(x, &heads[kv_head], [rows, run.rows, padded], stride, mixed));
        done += run.rows;
    }
    for (row, mixed) in mixed.chunks_exact_mut(padded).enumerate() {
        let weights = &scores[row * stride + shared..];
        let path = context.paths[row / group];
        of_heads!(&context.fresh.numbers, heads => Number::add_path(mixed, weights, path, &heads[kv_head].values));
        let at = row / group * shape.width() + (kv_head * group + row % group) * dim;
        let inverse = 1.0 / own[row];
        out[at..at + dim].iter_mut().zip(mixed).for_each(|(o, m)| *o = *m * inverse);
    }
}

/// `q · key` of every position, rows of `to` `stride` floats apart.
fn key_products(queries: &[f32], run: &KeyValues, kv_head: usize, stride: usize, to: &mut [f32]) {
    let shape = [queries.len() / run.shape.head_dim, run.shape.head_dim, run.rows];
    of_heads!(&run.numbers, heads => multiply_keys(queries, &heads[kv_head], shape, stride, to));
}

fn multiply_keys<E: Number>(x: &[f32], head: &HeadRows<E>, [rows, dim, n]: [usize; 3], stride: usize, to: &mut [f32]) {
    let steps = dim / E::NUMBERS;
    let strides = Strides { x_row: dim, ..Strides::packed(steps, stride) };
    multiply(Operands { x, w: head.keys.as_slice(), shape: [rows, steps, n], strides, keep: false }, to);
}

/// Adds values, as often as rows of `x` say, `stride` floats apart.
fn add_values<E: Number>(
    x: &[f32],
    head: &HeadRows<E>,
    [rows, positions, n]: [usize; 3],
    stride: usize,
    to: &mut [f32],
) {
    let shape = [rows, positions.div_ceil(E::NUMBERS), n];
    let strides = Strides { x_row: stride, x_step: 1, w_step: n, w_panel: PANEL, y_row: n, y_panel: PANEL };
    multiply(Operands { x, w: head.values.as_slice(), shape, strides, keep: true }, to);
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
