//! Log-probability of chosen tokens without keeping `(r, vocabulary)` logits: rows go through the head in chunks.

use crate::dispatch::simd;
use crate::linear::{Packed, Turned, linear, turn_weight, turned_product, weight_gradient};
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

/// [`log_probs`] and its backward in one pass over the logits: `slope` gets a row and its log-probability, row after row, and
/// returns the loss's derivative by it. Overwrites `dh` `(r, k)`, adds to the packed `dw`.
///
/// # Panics
/// If shapes do not fit or a target is outside the vocabulary.
pub fn log_probs_gradient(
    pool: &Pool,
    hidden: &[f32],
    head: &Matrix,
    chosen: Chosen<'_>,
    slope: &mut dyn FnMut(usize, f32) -> f32,
    dh: &mut [f32],
    dw: &mut [f32],
) {
    check(hidden, head, chosen);
    assert_eq!(dh.len(), hidden.len(), "gradient of hidden states");
    let (n, k) = (head.n(), head.k());
    let (mut d, mut by_input, mut turned) = (Vec::new(), Packed::default(), Turned::default());
    let by_input = turn_weight(pool, head, &mut by_input);
    let mut parts = vec![Partition::default(); ROWS.min(chosen.targets.len())];
    let chunks = hidden.chunks(ROWS * k).zip(dh.chunks_mut(ROWS * k));
    for (chunk, ((h, dh), targets)) in chunks.zip(chosen.targets.chunks(ROWS)).enumerate() {
        d.resize(targets.len() * n, 0.0);
        linear(pool, h, head, &mut d);
        let (logits, shares) = (Shares::of(&mut d), Shares::of(&mut parts));
        pool.split(targets.len(), 1, |rows| {
            for row in rows {
                // SAFETY: ranges of a split are disjoint, and so are their rows.
                let (logits, part) = unsafe { (logits.part(row * n..(row + 1) * n), shares.part(row..row + 1)) };
                part[0] = partition_of(logits, chosen.inverse_temperature);
            }
        });
        let log_prob = |row: usize| parts[row].log_prob(d[row * n + targets[row] as usize], chosen.inverse_temperature);
        let slopes: Vec<f32> = (0..targets.len()).map(|row| slope(chunk * ROWS + row, log_prob(row))).collect();
        let logits = Shares::of(&mut d);
        pool.split(targets.len(), 1, |rows| {
            for row in rows {
                // SAFETY: ranges of a split are disjoint, and so are their rows.
                let logits = unsafe { logits.part(row * n..(row + 1) * n) };
                logits_gradient(logits, targets[row], chosen.inverse_temperature, parts[row], slopes[row]);
            }
        });
        turned_product(pool, &d, by_input, dh, [n, k], false);
        weight_gradient(pool, h, &d, head, dw, &mut turned);
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
        partition(logits, inverse_temperature).log_prob(logits[target as usize], inverse_temperature)
    }
}

simd! {
    /// Softmax of logits, in place.
    pub fn softmax(logits: &mut [f32]) {
        let Partition { max, sum } = partition(logits, 1.0);
        let inverse = 1.0 / sum;
        for l in logits.iter_mut() {
            *l = math::exp(*l - max) * inverse;
        }
    }
}

simd! {
    /// Replaces logits by `g d log_prob(target) / d logits`.
    fn logits_gradient(logits: &mut [f32], target: u32, inverse_temperature: f32, part: Partition, g: f32) {
        let Partition { max, sum } = part;
        let scale = -g * inverse_temperature / sum;
        for l in logits.iter_mut() {
            *l = scale * math::exp(*l * inverse_temperature - max);
        }
        logits[target as usize] += g * inverse_temperature;
    }
}

/// What a softmax divides by.
#[derive(Debug, Clone, Copy, Default)]
struct Partition {
    /// The largest scaled logit.
    max: f32,
    /// Of exponentials relative to it.
    sum: f32,
}

impl Partition {
    #[inline(always)]
    fn log_prob(self, logit: f32, inverse_temperature: f32) -> f32 {
        (logit * inverse_temperature - self.max) - math::ln(self.sum)
    }
}

simd! {
    fn partition_of(logits: &[f32], inverse_temperature: f32) -> Partition {
        partition(logits, inverse_temperature)
    }
}

#[inline(always)]
fn partition(logits: &[f32], inverse_temperature: f32) -> Partition {
    // 1/T is positive, and rounding keeps order: the largest logit is the largest scaled one.
    let max = math::lane_max(logits) * inverse_temperature;
    let sum = math::lane_sum(logits, |logit| math::exp(logit * inverse_temperature - max));
    Partition { max, sum }
}
