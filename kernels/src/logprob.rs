//! Log-probability of chosen tokens without keeping `(r, vocabulary)` logits: rows go through the head in chunks.

use crate::dispatch::simd;
use crate::linear::{Turned, linear, turned_product, turned_weight, weight_gradient};
use crate::math;
use crate::matrix::Matrix;
use crate::pool::{Pool, Shares};

/// Rows of a chunk: at 49,152 tokens their logits take 37 MB.
const ROWS: usize = 192;

/// What is asked of each row.
#[derive(Debug, Clone, Copy)]
pub struct Chosen<'a> {
    /// The token of each row.
    pub targets: &'a [u32],
    /// 1/T.
    pub inverse_temperature: f32,
}

/// `log softmax(h Wᵀ / T)[target]` of each row: h `(r, k)`, packed head with n outputs; result `(r)`.
///
/// # Panics
/// If shapes do not fit or a target is outside the vocabulary.
#[must_use]
pub fn log_probs(pool: &Pool, hidden: &[f32], head: &Matrix, chosen: Chosen<'_>) -> Vec<f32> {
    check(hidden, head, chosen);
    let (n, k) = (head.n(), head.k());
    let mut result = vec![0.0; chosen.targets.len()];
    let mut logits = Vec::new();
    let chunks = hidden.chunks(ROWS * k).zip(chosen.targets.chunks(ROWS)).zip(result.chunks_mut(ROWS));
    for ((h, targets), result) in chunks {
        logits.resize(targets.len() * n, 0.0);
        linear(pool, h, head, &mut logits);
        let result = Shares::of(result);
        pool.split(targets.len(), 1, |rows| {
            // SAFETY: ranges of a split are disjoint.
            let result = unsafe { result.part(rows.clone()) };
            for (result, row) in result.iter_mut().zip(rows) {
                *result = log_prob(&logits[row * n..(row + 1) * n], targets[row], chosen.inverse_temperature);
            }
        });
    }
    result
}

/// Backward of [`log_probs`]: `slopes` is the loss's derivative by each. Overwrites `dh` `(r, k)`, adds to the packed `dw`.
///
/// # Panics
/// If shapes do not fit or a target is outside the vocabulary.
pub fn log_probs_gradient(
    pool: &Pool,
    hidden: &[f32],
    head: &Matrix,
    chosen: Chosen<'_>,
    slopes: &[f32],
    dh: &mut [f32],
    dw: &mut [f32],
) {
    check(hidden, head, chosen);
    assert!(slopes.len() == chosen.targets.len() && dh.len() == hidden.len(), "{} slopes", slopes.len());
    let (n, k) = (head.n(), head.k());
    let by_input = turned_weight(pool, head);
    let (mut d, mut turned) = (Vec::new(), Turned::default());
    let chunks = hidden.chunks(ROWS * k).zip(dh.chunks_mut(ROWS * k));
    for ((h, dh), (slopes, targets)) in chunks.zip(slopes.chunks(ROWS).zip(chosen.targets.chunks(ROWS))) {
        d.resize(targets.len() * n, 0.0);
        linear(pool, h, head, &mut d);
        let shares = Shares::of(&mut d);
        pool.split(targets.len(), 1, |rows| {
            for row in rows {
                // SAFETY: ranges of a split are disjoint, and so are their rows.
                let logits = unsafe { shares.part(row * n..(row + 1) * n) };
                logits_gradient(logits, targets[row], chosen.inverse_temperature, slopes[row]);
            }
        });
        turned_product(pool, &d, &by_input, dh, [n, k], false);
        weight_gradient(pool, h, &d, dw, [n, k], &mut turned);
    }
}

fn check(hidden: &[f32], head: &Matrix, chosen: Chosen<'_>) {
    assert_eq!(hidden.len(), chosen.targets.len() * head.k(), "log_probs of {} targets", chosen.targets.len());
    let outside = chosen.targets.iter().find(|t| **t as usize >= head.n());
    assert!(outside.is_none(), "token {outside:?} is outside a vocabulary of {}", head.n());
}

simd! {
    /// `log softmax(logits / T)[target]`.
    #[must_use]
    pub fn log_prob(logits: &[f32], target: u32, inverse_temperature: f32) -> f32 {
        let (max, sum) = partition(logits, inverse_temperature);
        (logits[target as usize] * inverse_temperature - max) - math::ln(sum)
    }
}

simd! {
    /// Softmax of logits, in place.
    pub fn softmax(logits: &mut [f32]) {
        let (max, sum) = partition(logits, 1.0);
        let inverse = 1.0 / sum;
        for l in logits.iter_mut() {
            *l = math::exp(*l - max) * inverse;
        }
    }
}

simd! {
    /// Replaces logits by `g d log_prob(target) / d logits`.
    fn logits_gradient(logits: &mut [f32], target: u32, inverse_temperature: f32, g: f32) {
        let (max, sum) = partition(logits, inverse_temperature);
        let scale = -g * inverse_temperature / sum;
        for l in logits.iter_mut() {
            *l = scale * math::exp(*l * inverse_temperature - max);
        }
        logits[target as usize] += g * inverse_temperature;
    }
}

/// Largest scaled logit, and the sum of exponentials relative to it.
#[inline(always)]
fn partition(logits: &[f32], inverse_temperature: f32) -> (f32, f32) {
    // 1/T is positive, and rounding keeps order: the largest logit is the largest scaled one.
    let max = math::lane_max(logits) * inverse_temperature;
    (max, math::lane_sum(logits.len(), |i| math::exp(logits[i] * inverse_temperature - max)))
}
