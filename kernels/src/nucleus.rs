//! Sampling from the nucleus: the fewest, likeliest tokens that have together at least a given probability (Holtzman et al.
//! 2020, "The curious case of neural text degeneration").

use std::cell::Cell;

use crate::dispatch::simd;
use crate::math;
use crate::noise::{self, NoiseKey};

/// Tokens below this share of the likeliest one's probability are sorted only if the others do not suffice.
const FAR: f32 = 1e-6;
/// Tokens that are looked at together.
const BLOCK: usize = 64;

/// The sampled token: `argmax(logits_v / T + G(position, v))` over the nucleus of `softmax(logits / T)`, which renormalises it.
/// A `top_p` of 1 or more is all tokens, `T = 0` plain argmax. Of equally likely tokens lower ids come first.
#[must_use]
pub fn sample(logits: &[f32], temperature: f32, top_p: f32, key: &NoiseKey, position: u32) -> u32 {
    let Some(nucleus) = cut(logits, temperature, top_p) else {
        return noise::sample(logits, temperature, key, position);
    };
    let inverse = 1.0 / temperature;
    let mut best = (f32::NEG_INFINITY, 0);
    for id in nucleus {
        let value = logits[id as usize] * inverse + key.gumbel(position, id);
        if value > best.0 || (value == best.0 && id < best.1) {
            best = (value, id);
        }
    }
    best.1
}

/// The tokens that can be drawn, likeliest first; nothing if all can, or only the likeliest.
pub(crate) fn cut(logits: &[f32], temperature: f32, top_p: f32) -> Option<Vec<u32>> {
    let is_whole = top_p >= 1.0 || temperature == 0.0;
    (!is_whole).then(|| nucleus(logits, 1.0 / temperature, f64::from(top_p)))
}

/// Its tokens, likeliest first; always one.
fn nucleus(logits: &[f32], inverse: f32, top_p: f64) -> Vec<u32> {
    let mut weights = WEIGHTS.take();
    let wanted = top_p * weigh(logits, inverse, &mut weights);
    let found = likeliest(logits, &weights, wanted);
    WEIGHTS.set(weights);
    found
}

thread_local! {
    /// Memory that the draws of a thread reuse.
    static WEIGHTS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

simd! {
    /// `exp((l - max) / T)` of each logit, and their sum: lane `i % 8` adds in the order of ids, so that it has the same bits everywhere.
    fn weigh(logits: &[f32], inverse: f32, weights: &mut Vec<f32>) -> f64 {
        let top = math::lane_max(logits);
        weights.resize(logits.len(), 0.0);
        for (weight, logit) in weights.iter_mut().zip(logits) {
            *weight = math::exp((*logit - top) * inverse);
        }
        let mut lanes = [0.0_f64; 8];
        for eight in weights.chunks(8) {
            for (lane, weight) in lanes.iter_mut().zip(eight) {
                *lane += f64::from(*weight);
            }
        }
        lanes.iter().sum()
    }
}

simd! {
    /// The tokens whose weight is not far below the largest, which is 1.
    fn near(weights: &[f32]) -> Vec<u32> {
        let mut ids = Vec::new();
        for (block, weights) in (0_u32..).zip(weights.chunks(BLOCK)) {
            if math::lane_max(weights) < FAR {
                continue;
            }
            for (id, weight) in (block * BLOCK as u32..).zip(weights) {
                if *weight >= FAR {
                    ids.push(id);
                }
            }
        }
        ids
    }
}

/// The fewest tokens that have together the `wanted` weight, likeliest first.
fn likeliest(logits: &[f32], weights: &[f32], wanted: f64) -> Vec<u32> {
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut near = near(weights);
    near.sort_unstable_by(order);
    let mut sum = 0.0;
    let mut is_enough = |id: &u32| {
        sum += f64::from(weights[*id as usize]);
        sum >= wanted
    };
    if let Some(last) = near.iter().position(&mut is_enough) {
        near.truncate(last + 1);
        return near;
    }
    let mut far: Vec<u32> = (0_u32..).zip(weights).filter(|(_, weight)| **weight < FAR).map(|(id, _)| id).collect();
    far.sort_unstable_by(order);
    let last = far.iter().position(is_enough).map_or(far.len(), |last| last + 1);
    near.extend_from_slice(&far[..last]);
    near
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nucleus_is_the_smallest_that_suffices() {
        // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16.
        let logits = [16.0_f32, 2.0, 8.0, 4.0, 2.0].map(f32::ln);
        let check = |top_p: f64, expected: &[u32]| assert_eq!(nucleus(&logits, 1.0, top_p), expected, "{top_p}");
        check(0.01, &[0]);
        check(0.49, &[0]);
        check(0.6, &[0, 2]);
        check(0.8, &[0, 2, 3]);
        check(0.9, &[0, 2, 3, 1]);
        check(0.99, &[0, 2, 3, 1, 4]);
        // Half as hot, the first one has three quarters.
        assert_eq!(nucleus(&logits, 2.0, 0.7), [0]);
        let flat = vec![-40.0; 300].into_iter().chain([0.0]).collect::<Vec<f32>>();
        assert_eq!(nucleus(&flat, 1.0, 0.999_999), [300]);
        assert_eq!(nucleus(&flat, 1.0, 1.0 - 1e-18).len(), 301, "far ones where the near ones do not suffice");
    }

    /// chi-square over a million draws; 3 degrees of freedom, p = 0.01 at 11.3.
    #[test]
    fn samples_follow_the_renormalised_softmax() {
        let logits = [0.0_f32, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.25];
        for (temperature, top_p) in [(1.0_f32, 0.8_f32), (0.7, 0.9)] {
            let ids = nucleus(&logits, 1.0 / temperature, f64::from(top_p));
            assert_eq!(ids.len(), 4);
            let weight = |id: &u32| f64::from(logits[*id as usize] / temperature).exp();
            let total: f64 = ids.iter().map(weight).sum();
            let (draws, mut counts) = (1_000_000, [0_u32; 8]);
            for i in 0..draws {
                let key = NoiseKey::new(12, 0, i % 50, i / 50, 3);
                counts[sample(&logits, temperature, top_p, &key, i % 7) as usize] += 1;
            }
            assert_eq!(counts.iter().sum::<u32>(), ids.iter().map(|id| counts[*id as usize]).sum(), "outside");
            let term = |id: &u32| {
                let want = weight(id) / total * f64::from(draws);
                (f64::from(counts[*id as usize]) - want).powi(2) / want
            };
            let chi: f64 = ids.iter().map(term).sum();
            assert!(chi < 11.3, "chi-square {chi} at T = {temperature}, top-p {top_p}");
        }
    }

    #[test]
    fn all_tokens_and_no_noise_are_plain_sampling() {
        let logits: Vec<f32> = (0..200).map(|i| (i * 37 % 101) as f32 * 0.1).collect();
        for i in 0..200 {
            let key = NoiseKey::new(3, 0, 0, i, 0);
            assert_eq!(sample(&logits, 0.9, 1.0, &key, i), noise::sample(&logits, 0.9, &key, i));
            assert_eq!(sample(&logits, 0.0, 0.3, &key, i), noise::sample(&logits, 0.0, &key, i));
            assert_eq!(sample(&logits, 1.0, 1e-9, &key, i), noise::sample(&logits, 0.0, &key, i));
        }
    }
}
