//! AdamW (Loshchilov and Hutter 2019, algorithm 2) on one tensor, in one pass over its numbers.

use crate::dispatch::simd;
use crate::matrix::{PANEL, round_steps};
use crate::pool::{Pool, Shares};

const EPSILON: f32 = 1e-8;

/// Everything that is the same for all numbers of a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamRule {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Factor of the gradient: of its mean, and of clipping.
    pub scale: f32,
    /// What is left of a number: `1 - lr * decay`.
    pub keep: f32,
    /// `lr / (1 - beta1^steps)`.
    pub rate: f32,
    /// `1 / (1 - beta2^steps)`.
    pub second_correction: f32,
}

/// What a step reads and writes.
#[derive(Debug)]
pub struct AdamTensor<'a> {
    /// Numbers before: an old version may still be read.
    pub old: &'a [f32],
    /// Their gradients, which become the numbers after: memory that is mapped already.
    pub new: &'a mut [f32],
    /// First moments.
    pub first: &'a mut [f32],
    /// Second moments.
    pub second: &'a mut [f32],
    /// Where the new numbers go rounded, as a packed bf16 [`Matrix`](crate::Matrix) of so many input features, if wanted.
    pub rounded: Option<(&'a mut [u16], usize)>,
}

/// One step.
///
/// # Panics
/// If lengths differ, or that of a tensor to be rounded is not a packed one.
pub fn adam_step(pool: &Pool, rule: AdamRule, tensor: AdamTensor<'_>) {
    let AdamTensor { old, new, first, second, rounded } = tensor;
    let len = new.len();
    assert!([old.len(), first.len(), second.len()].iter().all(|l| *l == len), "a step of {len} gradients");
    // Pairs of steps do not lie across two chunks: where k is odd, a chunk is a panel.
    let chunk = match &rounded {
        Some((_, k)) if !k.is_multiple_of(2) => k * PANEL,
        _ => CHUNK,
    };
    let fits = |(to, k): &(&mut [u16], usize)| to.len() == len && len.is_multiple_of(k * PANEL);
    assert!(rounded.as_ref().is_none_or(fits), "{len} numbers do not round to a packed weight");
    let rounded = rounded.map(|(to, _)| Shares::of(to));
    let (new, first, second) = (Shares::of(new), Shares::of(first), Shares::of(second));
    pool.run(len.div_ceil(chunk), &|i| {
        let at = i * chunk..len.min((i + 1) * chunk);
        // SAFETY: chunks are disjoint.
        let [new, first, second] = [new, first, second].map(|s| unsafe { s.part(at.clone()) });
        step(rule, &old[at.clone()], new, first, second);
        if let Some(rounded) = rounded {
            // SAFETY: as above.
            round(new, unsafe { rounded.part(at) });
        }
    });
}

/// Moves numbers towards others by a share of what lies between.
///
/// # Panics
/// If there are not as many of both.
pub fn approach(pool: &Pool, numbers: &mut [f32], others: &[f32], share: f32) {
    let len = numbers.len();
    assert_eq!(len, others.len(), "numbers and what they move towards");
    let numbers = Shares::of(numbers);
    pool.run(len.div_ceil(CHUNK), &|i| {
        let at = i * CHUNK..len.min((i + 1) * CHUNK);
        // SAFETY: chunks are disjoint.
        move_towards(unsafe { numbers.part(at.clone()) }, &others[at], share);
    });
}

/// Sum of the squares of all numbers, in f64: of chunks one by one, so that threads change no bit.
#[must_use]
pub fn sum_of_squares(pool: &Pool, values: &[f32]) -> f64 {
    let mut parts = vec![0.0; values.len().div_ceil(CHUNK)];
    let shares = Shares::of(&mut parts);
    pool.run(values.len().div_ceil(CHUNK), &|i| {
        // SAFETY: each part is written once.
        let part = unsafe { shares.part(i..i + 1) };
        part[0] = squares(&values[i * CHUNK..values.len().min((i + 1) * CHUNK)]);
    });
    parts.iter().sum()
}

/// Numbers that are in the first-level cache when they are rounded.
const CHUNK: usize = 1 << 11;

simd! {
    /// Lane `i % 8` adds in order: one chain of additions would wait for each.
    fn squares(values: &[f32]) -> f64 {
        let mut lanes = [0.0_f64; 8];
        let (whole, rest) = values.as_chunks::<8>();
        for eight in whole {
            for (lane, value) in lanes.iter_mut().zip(eight) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*value) * f64::from(*value);
        }
        lanes.iter().sum()
    }
}

simd! {
    fn step(rule: AdamRule, old: &[f32], new: &mut [f32], first: &mut [f32], second: &mut [f32]) {
        let len = new.len();
        let (old, first, second) = (&old[..len], &mut first[..len], &mut second[..len]);
        for i in 0..len {
            let gradient = new[i] * rule.scale;
            first[i] = rule.beta1 * first[i] + (1.0 - rule.beta1) * gradient;
            second[i] = rule.beta2 * second[i] + (1.0 - rule.beta2) * gradient * gradient;
            new[i] = old[i] * rule.keep - rule.rate * first[i] / ((second[i] * rule.second_correction).sqrt() + EPSILON);
        }
    }
}

simd! {
    fn move_towards(numbers: &mut [f32], others: &[f32], share: f32) {
        numbers.iter_mut().zip(others).for_each(|(number, other)| *number += share * (other - *number));
    }
}

simd! {
    fn round(from: &[f32], to: &mut [u16]) {
        round_steps(from, to);
    }
}
