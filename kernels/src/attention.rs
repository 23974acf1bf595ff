//! Causal grouped-query attention, over cached keys for decoding and over packed sequences for training.
//!
//! Both run the same function for a row: each score one chain over the features, one pass for the maximum, lanes `i % 8`
//! for the sum, values added in the order of positions. So a token's output does not depend on where its keys are stored.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::dispatch::simd;
use crate::lanes::Lanes;
use crate::math;
use crate::tensor::{copied, output, tensor, values};

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
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Keys side by side in a panel.
const PANEL: usize = 16;
/// Rows of a sequence that attend together.
const BLOCK: usize = 16;

/// Keys and values of consecutive positions.
#[derive(Debug, Clone, Copy)]
pub struct KeyRun<'a> {
    /// In panels, as [`push_key`] stores them.
    pub keys: &'a [f32],
    /// `(positions, kv_heads * head_dim)`.
    pub values: &'a [f32],
}

/// Stores the key of position `position`, already turned, behind those before it: panels of 16 positions,
/// `(kv_heads * head_dim, 16)` each.
pub fn push_key(panels: &mut Vec<f32>, position: usize, key: &[f32]) {
    let lane = position % PANEL;
    if lane == 0 {
        panels.resize(panels.len() + key.len() * PANEL, 0.0);
    }
    let base = position / PANEL * PANEL * key.len() + lane;
    for (i, v) in key.iter().enumerate() {
        panels[base + i * PANEL] = *v;
    }
}

fn in_panels(rows: &[f32], width: usize) -> Vec<f32> {
    let mut panels = Vec::new();
    rows.chunks_exact(width).enumerate().for_each(|(i, row)| push_key(&mut panels, i, row));
    panels
}

/// Memory that calls of [`attend`] reuse.
#[derive(Debug, Default)]
pub struct Scratch {
    scores: [Vec<f32>; UNITS],
    fresh: [Vec<f32>; UNITS],
}

/// What a set of queries attends to: the same `shared` runs, then rows of `fresh`, a path of its own each.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Keys and values of earlier positions, in order.
    pub shared: &'a [KeyRun<'a>],
    /// Newer rows: a draft tree, or the newest part of a sequence.
    pub fresh: KeyRun<'a>,
    /// For each query its rows of `fresh`, in the order of their positions, its own last.
    pub paths: &'a [&'a [usize]],
}

/// Attention of query rows `(paths.len(), heads * head_dim)`. Each score is one chain over the features, each output one
/// chain over the keys in order, wherever a key is stored.
pub fn attend(queries: &[f32], context: Context<'_>, shape: Heads, scratch: &mut Scratch, out: &mut [f32]) {
    attend_rows(queries, context, shape, scratch, out);
}

/// Pairs of a head and a query that are computed together, so that their chains hide each other's latency.
const UNITS: usize = 4;

simd! {
    fn attend_rows<V>(queries: &[f32], context: Context<'_>, shape: Heads, scratch: &mut Scratch, out: &mut [f32]) {
        let units = shape.heads * context.paths.len();
        let mut unit = 0;
        while unit < units {
            if unit + UNITS <= units {
                attend_units::<V, UNITS>(unit, queries, context, shape, scratch, out);
                unit += UNITS;
            } else {
                attend_units::<V, 1>(unit, queries, context, shape, scratch, out);
                unit += 1;
            }
        }
    }
}

/// One head of one query.
#[derive(Clone, Copy)]
struct Unit<'a> {
    query: &'a [f32],
    /// First feature of its key/value head.
    offset: usize,
    path: &'a [usize],
    /// First float of its output.
    at: usize,
}

#[inline(always)]
fn attend_units<V: Lanes, const U: usize>(
    first: usize,
    queries: &[f32],
    context: Context<'_>,
    shape: Heads,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let (dim, width, rows) = (shape.head_dim, shape.kv_width(), context.paths.len());
    // Queries of the same head stand together: they read the same keys.
    let units: [Unit<'_>; U] = std::array::from_fn(|u| {
        let (head, row) = ((first + u) / rows, (first + u) % rows);
        let at = row * shape.heads * dim + head * dim;
        let offset = head / (shape.heads / shape.kv_heads) * dim;
        Unit { query: &queries[at..at + dim], offset, path: context.paths[row], at }
    });
    let Scratch { scores, fresh } = scratch;
    scores.iter_mut().chain(fresh.iter_mut()).for_each(Vec::clear);
    for run in context.shared {
        products::<V, U>(&units, run, width, scores);
    }
    products::<V, U>(&units, &context.fresh, width, fresh);
    let mut inverses = [0.0_f32; U];
    for u in 0..U {
        scores[u].extend(units[u].path.iter().map(|row| fresh[u][*row]));
        inverses[u] = 1.0 / soften(&mut scores[u], shape.scale());
    }
    let mut done = 0;
    while done + 16 <= dim {
        mix::<V, U>(&units, context, width, scores, &inverses, done, out);
        done += 16;
    }
    for feature in done..dim {
        mix_one(&units, context, width, scores, &inverses, feature, out);
    }
}

/// Appends `q · key` of every key of a run, for each unit.
#[inline(always)]
fn products<V: Lanes, const U: usize>(
    units: &[Unit<'_>; U],
    run: &KeyRun<'_>,
    width: usize,
    to: &mut [Vec<f32>; UNITS],
) {
    let len = to[0].len() + run.values.len() / width;
    let dim = units[0].query.len();
    let queries: [&[f32]; U] = std::array::from_fn(|u| &units[u].query[..dim]);
    for panel in run.keys.as_chunks::<PANEL>().0.chunks_exact(width) {
        let keys: [&[[f32; PANEL]]; U] = std::array::from_fn(|u| &panel[units[u].offset..][..dim]);
        let mut acc = [V::splat(0.0); U];
        for i in 0..dim {
            acc = std::array::from_fn(|u| V::splat(queries[u][i]).mul_add(V::load(&keys[u][i]), acc[u]));
        }
        let scores: [[f32; PANEL]; U] = std::array::from_fn(|u| {
            let mut scores = [0.0; PANEL];
            acc[u].store(&mut scores);
            scores
        });
        to.iter_mut().zip(&scores).for_each(|(to, scores)| to.extend_from_slice(scores));
    }
    to.iter_mut().take(U).for_each(|scores| scores.truncate(len));
}

/// Leaves `exp(scale * score - max)` in `scores`; returns their sum.
#[inline(always)]
fn soften(scores: &mut [f32], scale: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    scores.iter_mut().for_each(|s| *s *= scale);
    let (whole, rest) = scores.as_chunks::<16>();
    for chunk in whole {
        lanes = std::array::from_fn(|i| larger(lanes[i], chunk[i]));
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b));
    for s in scores.iter_mut() {
        *s = math::exp(*s - max);
    }
    let scores = &scores[..];
    math::lane_sum(scores.len(), |i| scores[i])
}

/// Sixteen features of each unit's output, from feature `from` of its head on.
#[inline(always)]
fn mix<V: Lanes, const U: usize>(
    units: &[Unit<'_>; U],
    context: Context<'_>,
    width: usize,
    weights: &[Vec<f32>; UNITS],
    inverses: &[f32; U],
    from: usize,
    out: &mut [f32],
) {
    let mut acc = [V::splat(0.0); U];
    let lanes = |row: &[f32], u: usize| V::load(&row[units[u].offset + from..].as_chunks::<16>().0[0]);
    let mut done = 0;
    for run in context.shared {
        let rows = run.values.len() / width;
        let weights: [&[f32]; U] = std::array::from_fn(|u| &weights[u][done..done + rows]);
        for t in 0..rows {
            let row = &run.values[t * width..(t + 1) * width];
            acc = std::array::from_fn(|u| V::splat(weights[u][t]).mul_add(lanes(row, u), acc[u]));
        }
        done += rows;
    }
    // By value: an index that is not constant would push the accumulators out of their registers.
    let mixed: [[f32; 16]; U] = std::array::from_fn(|u| {
        let rows = units[u].path.iter().map(|row| &context.fresh.values[row * width..(row + 1) * width]);
        let chain = |acc: V, (row, weight): (&[f32], &f32)| V::splat(*weight).mul_add(lanes(row, u), acc);
        let mut features = [0.0; 16];
        rows.zip(&weights[u][done..]).fold(acc[u], chain).store(&mut features);
        features
    });
    for u in 0..U {
        let to = &mut out[units[u].at + from..][..16];
        to.iter_mut().zip(mixed[u]).for_each(|(o, feature)| *o = feature * inverses[u]);
    }
}

/// One feature, for what sixteen do not divide.
#[inline(always)]
fn mix_one<const U: usize>(
    units: &[Unit<'_>; U],
    context: Context<'_>,
    width: usize,
    weights: &[Vec<f32>; UNITS],
    inverses: &[f32; U],
    feature: usize,
    out: &mut [f32],
) {
    for u in 0..U {
        let Unit { offset, path, at, .. } = units[u];
        let shared = context.shared.iter().flat_map(|run| run.values.chunks_exact(width));
        let fresh = path.iter().map(|row| &context.fresh.values[row * width..(row + 1) * width]);
        let chain = |acc: f32, (weight, row): (&f32, &[f32])| weight.mul_add(row[offset + feature], acc);
        out[at + feature] = weights[u].iter().zip(shared.chain(fresh)).fold(0.0, chain) * inverses[u];
    }
}

/// Causal attention inside each of several sequences laid end to end: q `(r, heads * head_dim)`,
/// k and v `(r, kv_heads * head_dim)`, lengths summing to r. Differentiable in all three; no `r × r` matrix is kept.
///
/// # Errors
/// If shapes do not fit.
pub fn attend_sequences(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &Arc<Vec<usize>>, shape: Heads) -> Result<Tensor> {
    q.apply_op3(k, v, Attention { lengths: lengths.clone(), shape })
}

struct Attention {
    lengths: Arc<Vec<usize>>,
    shape: Heads,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = l1.shape().dims2()?;
        if self.lengths.iter().sum::<usize>() != rows
            || width != self.shape.heads * self.shape.head_dim
            || l2.shape().dims2()? != (rows, self.shape.kv_width())
            || l3.shape() != l2.shape()
        {
            bail!("attention: q {:?}, k {:?}, v {:?}, lengths {:?}", l1.shape(), l2.shape(), l3.shape(), self.lengths);
        }
        let (q, k, v) = (values(s1, l1, "attention")?, values(s2, l2, "attention")?, values(s3, l3, "attention")?);
        let mut y = vec![0.0; q.len()];
        let mut scratch = Scratch::default();
        self.for_each_block(k, v, |rows, context| {
            let at = rows.start * width..rows.end * width;
            attend(&q[at.clone()], context, self.shape, &mut scratch, &mut y[at]);
        });
        Ok(output(y, (rows, width)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = q.dim(1)?;
        let (qs, ks, vs, gs) = (copied(q)?, copied(k)?, copied(v)?, copied(grad)?);
        let mut dq = vec![0.0; qs.len()];
        let (mut dk, mut dv) = (vec![0.0; ks.len()], vec![0.0; vs.len()]);
        let mut scratch = Scratch::default();
        let kv = self.shape.kv_width();
        self.for_each_sequence(|rows| {
            let keys = rows.start * kv..rows.end * kv;
            let panels = (in_panels(&ks[keys.clone()], kv), in_panels(&vs[keys.clone()], kv));
            for (i, row) in rows.enumerate() {
                let at = row * width..(row + 1) * width;
                let seen = keys.start..keys.start + (i + 1) * kv;
                let whole = (i + 1).div_ceil(PANEL) * PANEL * kv;
                let sides = Sides {
                    keys: KeyRun { keys: &panels.0[..whole], values: &vs[seen.clone()] },
                    values: KeyRun { keys: &panels.1[..whole], values: &vs[seen.clone()] },
                    key_rows: &ks[seen.clone()],
                };
                let grads = Gradients { dq: &mut dq[at.clone()], dk: &mut dk[seen.clone()], dv: &mut dv[seen] };
                row_gradient(&qs[at.clone()], &gs[at], sides, self.shape, &mut scratch, grads);
            }
        });
        Ok((Some(tensor(dq, q.shape())?), Some(tensor(dk, k.shape())?), Some(tensor(dv, v.shape())?)))
    }
}

impl Attention {
    /// Calls `f` with the rows of every sequence.
    fn for_each_sequence(&self, mut f: impl FnMut(Range<usize>)) {
        let mut start = 0;
        for length in self.lengths.iter() {
            start += length;
            f(start - length..start);
        }
    }

    /// Calls `f` with blocks of rows of a sequence and what they attend to.
    fn for_each_block(&self, k: &[f32], v: &[f32], mut f: impl FnMut(Range<usize>, Context<'_>)) {
        let width = self.shape.kv_width();
        let order: [usize; BLOCK] = std::array::from_fn(|i| i);
        let paths: [&[usize]; BLOCK] = std::array::from_fn(|i| &order[..=i]);
        self.for_each_sequence(|rows| {
            let values = &v[rows.start * width..rows.end * width];
            let panels = in_panels(&k[rows.start * width..rows.end * width], width);
            for first in (0..rows.len()).step_by(BLOCK) {
                let last = (first + BLOCK).min(rows.len());
                // Blocks are panels, so that what is before one ends with a whole panel.
                let at = first * width;
                let shared = [KeyRun { keys: &panels[..at], values: &values[..at] }];
                let fresh = KeyRun { keys: &panels[at..at + BLOCK * width], values: &values[at..last * width] };
                let context = Context { shared: &shared, fresh, paths: &paths[..last - first] };
                f(rows.start + first..rows.start + last, context);
            }
        });
    }
}

/// What a row attended to, in the layouts its gradient needs.
struct Sides<'a> {
    /// Keys in panels.
    keys: KeyRun<'a>,
    /// Values in panels, as keys.
    values: KeyRun<'a>,
    key_rows: &'a [f32],
}

struct Gradients<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

simd! {
    fn row_gradient<V>(
        query: &[f32],
        grad: &[f32],
        sides: Sides<'_>,
        shape: Heads,
        scratch: &mut Scratch,
        grads: Gradients<'_>,
    ) {
        let (dim, width, scale) = (shape.head_dim, shape.kv_width(), shape.scale());
        for head in 0..shape.heads {
            let at = head * dim..(head + 1) * dim;
            let (q, g) = (&query[at.clone()], &grad[at.clone()]);
            let offset = head / (shape.heads / shape.kv_heads) * dim;
            let unit = |query| Unit { query, offset, path: &[], at: 0 };
            let Scratch { scores, fresh } = &mut *scratch;
            scores[0].clear();
            fresh[0].clear();
            products::<V, 1>(&[unit(q)], &sides.keys, width, scores);
            products::<V, 1>(&[unit(g)], &sides.values, width, fresh);
            let (p, dp) = (&mut scores[0], &fresh[0]);
            let inverse = 1.0 / soften(p, scale);
            for p in p.iter_mut() {
                *p *= inverse;
            }
            let mean = math::dot(p, dp);
            let dq = &mut grads.dq[at];
            for (i, (p, dp)) in p.iter().zip(dp.iter()).enumerate() {
                let ds = p * (dp - mean) * scale;
                let here = i * width + offset..i * width + offset + dim;
                let (k, dk, dv) = (&sides.key_rows[here.clone()], &mut grads.dk[here.clone()], &mut grads.dv[here]);
                for j in 0..dim {
                    dq[j] = ds.mul_add(k[j], dq[j]);
                    dk[j] = ds.mul_add(q[j], dk[j]);
                    dv[j] = p.mul_add(g[j], dv[j]);
                }
            }
        }
    }
}
