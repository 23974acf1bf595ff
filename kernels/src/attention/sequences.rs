//! Causal attention inside each of several sequences laid end to end, forward and backward, for training and prefill.
//!
//! Rows may run ahead of their sequence: what a drafter guesses below a row sees the sequence up to that row and the guesses
//! between (Li et al. 2025, "EAGLE-3", section 3.2, training-time test).
//!
//! The backward makes each block of rows' probabilities again (Dao et al. 2022, "FlashAttention", section 3.1); nothing of
//! size `r × r` is kept. Its sums are products of the tile loop: over features, keys or rows, each in order.

use std::ops::Range;

use super::{Context, Heads, KeyValues, PANEL, Scratch, attend, soften_here};
use crate::dispatch::simd;
use crate::math;
use crate::pool::{Pool, Shares};
use crate::product::{Operands, Strides, multiply};
use crate::turn::turn;

/// Rows of a sequence that attend together, forward.
const BLOCK: usize = 16;
/// Rows of a block of the backward.
const ROWS: usize = 48;

/// `out` gets what each row of q attends to: q and out `(r, heads * head_dim)`, k and v `(r, kv_heads * head_dim)`, lengths
/// summing to r.
///
/// # Panics
/// If shapes do not fit.
pub fn attend_sequences(pool: &Pool, qkv: [&[f32]; 3], lengths: &[usize], shape: Heads, out: &mut [f32]) {
    attend_ahead(pool, qkv, &[], lengths, shape, out);
}

/// The same, where row i also sees row i of each of `ahead`, keys and values of their own, behind those of its sequence.
///
/// # Panics
/// If shapes do not fit.
pub fn attend_ahead(
    pool: &Pool,
    [q, k, v]: [&[f32]; 3],
    ahead: &[[&[f32]; 2]],
    lengths: &[usize],
    shape: Heads,
    out: &mut [f32],
) {
    check([q, k, v], ahead, lengths, shape);
    assert_eq!(q.len(), out.len(), "attention of {} floats", q.len());
    let (width, kv_width) = (shape.width(), shape.kv_width());
    // The rows ahead of a row stand behind it.
    let each = 1 + ahead.len();
    let path = |i: usize| (0..=i).map(move |row| row * each).chain(i * each + 1..(i + 1) * each);
    let order: Vec<usize> = (0..BLOCK).flat_map(path).collect();
    let mut rest = order.as_slice();
    let paths: [&[usize]; BLOCK] = std::array::from_fn(|i| {
        let (path, later) = rest.split_at(i + each);
        rest = later;
        path
    });
    let sequences = ranges(lengths);
    let out = Shares::of(out);
    pool.split(sequences.len(), 1, |some| {
        let (mut scratch, mut before, mut fresh) = (Scratch::default(), KeyValues::new(shape), KeyValues::new(shape));
        for rows in &sequences[some] {
            before.clear();
            for first in rows.clone().step_by(BLOCK) {
                if pool.is_interrupted() {
                    return;
                }
                let last = (first + BLOCK).min(rows.end);
                let keys = first * kv_width..last * kv_width;
                fresh.clear();
                for row in first..last {
                    let here = row * kv_width..(row + 1) * kv_width;
                    fresh.push(&k[here.clone()], &v[here.clone()]);
                    ahead.iter().for_each(|[k, v]| fresh.push(&k[here.clone()], &v[here.clone()]));
                }
                let context = Context { shared: &[&before], fresh: &fresh, paths: &paths[..last - first] };
                let here = first * width..last * width;
                // SAFETY: blocks have rows of their own.
                attend(&q[here.clone()], context, shape, &mut scratch, unsafe { out.part(here) });
                before.extend(&k[keys.clone()], &v[keys]);
            }
        }
    });
}

/// Gradients of [`attend_ahead`] by q, k and v, to be overwritten.
#[derive(Debug)]
pub struct SequencesGradient<'a> {
    /// `(r, heads * head_dim)`.
    pub dq: &'a mut [f32],
    /// `(r, kv_heads * head_dim)`.
    pub dk: &'a mut [f32],
    /// `(r, kv_heads * head_dim)`.
    pub dv: &'a mut [f32],
    /// The same by keys and values of rows ahead, to be added to.
    pub ahead: &'a mut [[Vec<f32>; 2]],
}

/// Backward of [`attend_ahead`] from `grad`, the gradient by its output, computed in f32 whatever is stored: in bf16 q, k and v are to
/// be what the forward rounded them to, and that the weights of values were rounded, too, it does not see.
///
/// # Panics
/// If shapes do not fit.
pub fn attend_ahead_gradient(
    pool: &Pool,
    [q, k, v]: [&[f32]; 3],
    ahead: &[[&[f32]; 2]],
    lengths: &[usize],
    shape: Heads,
    grad: &[f32],
    to: SequencesGradient<'_>,
) {
    check([q, k, v], ahead, lengths, shape);
    assert!(grad.len() == q.len() && to.dq.len() == q.len() && to.dk.len() == k.len() && to.dv.len() == v.len());
    assert!(to.ahead.len() == ahead.len() && to.ahead.iter().flatten().all(|d| d.len() == k.len()));
    let sequences = ranges(lengths);
    let shares = [Shares::of(to.dq), Shares::of(to.dk), Shares::of(to.dv)];
    let by_ahead: Vec<[Shares<'_>; 2]> = to.ahead.iter_mut().map(|d| d.each_mut().map(|d| Shares::of(d))).collect();
    pool.split(sequences.len() * shape.kv_heads, 1, |some| {
        let mut head = Head::default();
        for part in some.take_while(|_| !pool.is_interrupted()) {
            let (rows, kv_head) = (&sequences[part / shape.kv_heads], part % shape.kv_heads);
            head.gradient((pool, [q, k, v, grad]), ahead, rows, kv_head, shape, (shares, &by_ahead));
        }
    });
}

fn check([q, k, v]: [&[f32]; 3], ahead: &[[&[f32]; 2]], lengths: &[usize], shape: Heads) {
    let rows: usize = lengths.iter().sum();
    let fits = q.len() == rows * shape.heads * shape.head_dim && k.len() == rows * shape.kv_width();
    let fits = fits && ahead.iter().flatten().all(|rows| rows.len() == k.len());
    assert!(fits && k.len() == v.len(), "attention: q {}, k {}, v {}, lengths {lengths:?}", q.len(), k.len(), v.len());
}

fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let mut range = |length: &usize| {
        end += length;
        end - length..end
    };
    lengths.iter().map(&mut range).collect()
}

/// One key/value head of one sequence: its operands in the layouts of the tile loop, padded with zeros.
#[derive(Debug, Default)]
struct Head {
    /// Keys and values by positions: `(position panels, dim, PANEL)`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Keys by features: `(feature panels, rows, PANEL)`.
    keys_by_feature: Vec<f32>,
    /// Gradients by keys and values: `(rows, padded dim)`.
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// Of a block: queries and output gradients `(rows, dim)`, then by features `(feature panels, rows, PANEL)`.
    block: [Vec<f32>; 2],
    block_by_feature: [Vec<f32>; 2],
    /// Probabilities and the gradient by scores, `(rows, keys)`, and both turned, `(keys, rows)`.
    p: Vec<f32>,
    ds: Vec<f32>,
    turned: [Vec<f32>; 2],
    dq: Vec<f32>,
    /// Gradients by keys and values of the rows ahead of each row: `(rows, ahead, padded dim)`.
    by_ahead: [Vec<f32>; 2],
}

impl Head {
    fn gradient(
        &mut self,
        (pool, [q, k, v, grad]): (&Pool, [&[f32]; 4]),
        ahead: &[[&[f32]; 2]],
        rows: &Range<usize>,
        kv_head: usize,
        shape: Heads,
        ([dq, dk, dv], by_ahead): ([Shares<'_>; 3], &[[Shares<'_>; 2]]),
    ) {
        let (dim, count) = (shape.head_dim, rows.len());
        let padded = dim.next_multiple_of(PANEL);
        let kv = Columns { width: shape.kv_width(), first: kv_head * dim, dim };
        by_position(k, rows, kv, &mut self.keys);
        by_position(v, rows, kv, &mut self.values);
        by_feature(k, rows, kv, &mut self.keys_by_feature);
        for sums in [&mut self.dk, &mut self.dv] {
            sums.clear();
            sums.resize(count * padded, 0.0);
        }
        for sums in &mut self.by_ahead {
            sums.clear();
            sums.resize(count * ahead.len() * padded, 0.0);
        }
        let group = shape.heads / shape.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            let own = Columns { width: shape.heads * dim, first: head * dim, dim };
            for first in (0..count).step_by(ROWS) {
                if pool.is_interrupted() {
                    return;
                }
                let block = rows.start + first..rows.start + (first + ROWS).min(count);
                self.block([q, grad], (ahead, kv), &block, first, own, shape.scale());
                // SAFETY: these rows and columns belong to this head of this sequence.
                unsafe { write(&self.dq, padded, &block, own, dq) };
            }
        }
        // SAFETY: as above.
        unsafe {
            write(&self.dk, padded, rows, kv, dk);
            write(&self.dv, padded, rows, kv, dv);
            for (sums, which) in self.by_ahead.iter().zip(0..) {
                let steps = (0..ahead.len()).cycle();
                for (from, (i, step)) in sums.chunks_exact(padded).zip(steps.enumerate()) {
                    let at = (rows.start + i / ahead.len()) * kv.width + kv.first;
                    let to = by_ahead[step][which].part(at..at + dim);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        }
    }

    /// Rows `block` of a query head, the first of them at position `first`.
    fn block(
        &mut self,
        [q, grad]: [&[f32]; 2],
        (ahead, kv): (&[[&[f32]; 2]], Columns),
        block: &Range<usize>,
        first: usize,
        own: Columns,
        scale: f32,
    ) {
        let (rows, dim) = (block.len(), own.dim);
        let padded = dim.next_multiple_of(PANEL);
        // Keys that the last row sees, after those ahead of it.
        let (keys, beside) = (first + rows, ahead.len());
        let stride = beside + keys;
        for (i, source) in [q, grad].into_iter().enumerate() {
            rows_of(source, block, own, &mut self.block[i]);
            by_feature(source, block, own, &mut self.block_by_feature[i]);
        }
        let by_keys = |x: &[f32], w: &[f32], y: &mut Vec<f32>| {
            y.resize(rows * stride, 0.0);
            let strides = Strides::packed(dim, stride);
            multiply(Operands { x, w, shape: [rows, dim, keys], strides, keep: false }, &mut y[beside..]);
        };
        by_keys(&self.block[0], &self.keys, &mut self.p);
        by_keys(&self.block[1], &self.values, &mut self.ds);
        for (i, row) in block.clone().enumerate() {
            for (step, rows) in ahead.iter().enumerate() {
                let at = i * stride + step;
                self.p[at] = product(own.of(q, row), kv.of(rows[0], row));
                self.ds[at] = product(own.of(grad, row), kv.of(rows[1], row));
            }
        }
        soften_rows(&mut self.p, &mut self.ds, stride - rows, stride, scale);
        self.dq.resize(rows * padded, 0.0);
        // The whole sequence's panels are longer than the keys of this block.
        let count = self.keys_by_feature.len() / padded;
        let strides = Strides { x_row: stride, w_panel: count * PANEL, ..Strides::packed(keys, padded) };
        let (x, w) = (&self.ds[beside..], self.keys_by_feature.as_slice());
        multiply(Operands { x, w, shape: [rows, keys, padded], strides, keep: false }, &mut self.dq);
        for (i, (weights, sums)) in [(&self.ds, &mut self.dk), (&self.p, &mut self.dv)].into_iter().enumerate() {
            turn_rows(weights, stride, &mut self.turned[i]);
            let (x, w) = (&self.turned[i][beside * rows..], self.block_by_feature[i].as_slice());
            let (shape, strides) = ([keys, rows, padded], Strides::packed(rows, padded));
            multiply(Operands { x, w, shape, strides, keep: true }, sums);
        }
        for (i, row) in block.clone().enumerate() {
            for (step, rows) in ahead.iter().enumerate() {
                let (p, ds) = (self.p[i * stride + step], self.ds[i * stride + step]);
                let at = ((first + i) * beside + step) * padded;
                add_times(&mut self.dq[i * padded..], ds, kv.of(rows[0], row));
                add_times(&mut self.by_ahead[0][at..], ds, own.of(q, row));
                add_times(&mut self.by_ahead[1][at..], p, own.of(grad, row));
            }
        }
    }
}

fn add_times(to: &mut [f32], by: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += by * from);
}

/// Columns of one head in rows of `width`.
#[derive(Debug, Clone, Copy)]
struct Columns {
    width: usize,
    first: usize,
    dim: usize,
}

impl Columns {
    fn of<'a>(&self, source: &'a [f32], row: usize) -> &'a [f32] {
        &source[row * self.width + self.first..][..self.dim]
    }
}

fn rows_of(source: &[f32], rows: &Range<usize>, columns: Columns, to: &mut Vec<f32>) {
    to.clear();
    rows.clone().for_each(|row| to.extend_from_slice(columns.of(source, row)));
}

fn by_position(source: &[f32], rows: &Range<usize>, columns: Columns, to: &mut Vec<f32>) {
    to.clear();
    to.resize(rows.len().next_multiple_of(PANEL) * columns.dim, 0.0);
    for (i, row) in rows.clone().enumerate() {
        let base = i / PANEL * PANEL * columns.dim + i % PANEL;
        columns.of(source, row).iter().enumerate().for_each(|(j, v)| to[base + j * PANEL] = *v);
    }
}

fn by_feature(source: &[f32], rows: &Range<usize>, columns: Columns, to: &mut Vec<f32>) {
    to.clear();
    to.resize(columns.dim.next_multiple_of(PANEL) * rows.len(), 0.0);
    for (i, row) in rows.clone().enumerate() {
        for (panel, chunk) in columns.of(source, row).chunks(PANEL).enumerate() {
            to[(panel * rows.len() + i) * PANEL..][..chunk.len()].copy_from_slice(chunk);
        }
    }
}

/// # Safety
/// No other thread uses these rows and columns of `to`.
unsafe fn write(from: &[f32], padded: usize, rows: &Range<usize>, columns: Columns, to: Shares<'_>) {
    for (from, row) in from.chunks_exact(padded).zip(rows.clone()) {
        let at = row * columns.width + columns.first;
        // SAFETY: by the caller's promise.
        unsafe { to.part(at..at + columns.dim) }.copy_from_slice(&from[..columns.dim]);
    }
}

simd! {
    fn product<V>(a: &[f32], b: &[f32]) -> f32 {
        math::dot(a, b)
    }
}

simd! {
    /// Scores and gradients by probabilities, `(rows, keys)` each, become probabilities and gradients by scores. Row i sees
    /// keys up to `first + i`; beyond them both become zero.
    fn soften_rows(scores: &mut [f32], grads: &mut [f32], first: usize, keys: usize, scale: f32) {
        for (i, (p, d)) in scores.chunks_exact_mut(keys).zip(grads.chunks_exact_mut(keys)).enumerate() {
            let (p, p_rest) = p.split_at_mut(first + i + 1);
            let (d, d_rest) = d.split_at_mut(first + i + 1);
            p_rest.fill(0.0);
            d_rest.fill(0.0);
            let inverse = 1.0 / soften_here(p, scale);
            p.iter_mut().for_each(|p| *p *= inverse);
            let mean = math::dot(p, d);
            for (p, d) in p.iter().zip(d) {
                *d = p * (*d - mean) * scale;
            }
        }
    }
}

simd! {
    /// Columns of `(rows, keys)` become rows.
    fn turn_rows(from: &[f32], keys: usize, to: &mut Vec<f32>) {
        to.resize(from.len(), 0.0);
        turn(from, keys, from.len() / keys, to);
    }
}
