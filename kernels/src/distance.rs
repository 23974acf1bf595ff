//! How far a distribution is from another one, and in which direction it gets nearer.

use crate::dispatch::simd;
use crate::math;

/// Lanes that sums are spread over.
const LANES: usize = 16;

/// How far two distributions over the same tokens are from each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// Cross-entropy of the one that is wanted with the other, in nats.
    pub entropy: f32,
    /// Total variation: one less what they have in common.
    pub variation: f32,
}

simd! {
    /// How far `softmax(logits)` is from the distribution that is wanted. The logits' place is taken by the derivative, by them, of the mean of
    /// both distances of which `share` is total variation, times `scale`.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn distance(logits: &mut [f32], wanted: &[f32], share: f32, scale: f32) -> Distance {
        assert_eq!(logits.len(), wanted.len(), "distributions over different tokens");
        let most = math::lane_max(logits);
        // -Σ w ln softmax(l) = ln Σ exp(l) - Σ w l, where the w sum to one.
        let (mut total, mut mean) = ([0.0; LANES], [0.0; LANES]);
        let (whole, rest) = logits.as_chunks_mut::<LANES>();
        let (whole_wanted, rest_wanted) = wanted.as_chunks::<LANES>();
        for (logits, wanted) in whole.iter_mut().zip(whole_wanted) {
            exponentials(logits, wanted, most, [&mut total, &mut mean]);
        }
        exponentials(rest, rest_wanted, most, [&mut total, &mut mean]);
        let (total, mean) = (sum(&total), sum(&mean));
        // 1 - Σ min(q, w), which falls with every q that is below its w.
        let (inverse, mut common, mut below) = (1.0 / total, [0.0; LANES], [0.0; LANES]);
        let (whole, rest) = logits.as_chunks_mut::<LANES>();
        for (q, wanted) in whole.iter_mut().zip(whole_wanted) {
            overlaps(q, wanted, inverse, [&mut common, &mut below]);
        }
        overlaps(rest, rest_wanted, inverse, [&mut common, &mut below]);
        let below = sum(&below);
        for (q, w) in logits.iter_mut().zip(wanted) {
            let variation = *q * (below - if *q < *w { 1.0 } else { 0.0 });
            *q = scale * ((1.0 - share) * (*q - w) + share * variation);
        }
        Distance { entropy: math::ln(total) - mean, variation: 1.0 - sum(&common) }
    }
}

/// Logits become exponentials; adds them, and what is wanted of the logits, each to its lane.
#[inline(always)]
fn exponentials(logits: &mut [f32], wanted: &[f32], most: f32, [total, mean]: [&mut [f32; LANES]; 2]) {
    for (i, (logit, w)) in logits.iter_mut().zip(wanted).enumerate() {
        mean[i] += w * (*logit - most);
        *logit = math::exp(*logit - most);
        total[i] += *logit;
    }
}

/// Exponentials become chances; adds what they have in common with those wanted, and those that are below, each to its lane.
#[inline(always)]
fn overlaps(q: &mut [f32], wanted: &[f32], inverse: f32, [common, below]: [&mut [f32; LANES]; 2]) {
    for (i, (q, w)) in q.iter_mut().zip(wanted).enumerate() {
        *q *= inverse;
        common[i] += if *q < *w { *q } else { *w };
        below[i] += if *q < *w { *q } else { 0.0 };
    }
}

#[inline(always)]
fn sum(lanes: &[f32; LANES]) -> f32 {
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoiseKey;

    #[test]
    fn distances_are_their_sums_and_slopes_their_differences() {
        let key = NoiseKey::new(9, 0, 0, 0, 0);
        for len in [1, 5, 16, 37, 300] {
            let logits: Vec<f32> = (0..len).map(|i| key.gumbel(0, i)).collect();
            let weights: Vec<f64> = (0..len).map(|i| f64::from(key.gumbel(1, i)).exp()).collect();
            let wanted: Vec<f32> = weights.iter().map(|w| (w / weights.iter().sum::<f64>()) as f32).collect();
            // As they are written down.
            let plain = |logits: &[f32]| {
                let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                let pairs =
                    || logits.iter().map(|l| f64::from(*l).exp() / total).zip(wanted.iter().map(|w| f64::from(*w)));
                [-pairs().map(|(q, w)| w * q.ln()).sum::<f64>(), 1.0 - pairs().map(|(q, w)| q.min(w)).sum::<f64>()]
            };
            for share in [0.0, 1.0] {
                let (mut slopes, [entropy, variation]) = (logits.clone(), plain(&logits));
                let found = distance(&mut slopes, &wanted, share, 2.0);
                assert!((f64::from(found.entropy) - entropy).abs() < 1e-5 * (1.0 + entropy), "{found:?}");
                assert!((f64::from(found.variation) - variation).abs() < 1e-5, "{found:?}");
                let at = |i: usize, by: f32| {
                    let mut logits = logits.clone();
                    logits[i] += by;
                    plain(&logits)[if share > 0.0 { 1 } else { 0 }]
                };
                for (i, slope) in slopes.iter().enumerate().take(20) {
                    let expected = (at(i, 1e-3) - at(i, -1e-3)) / 1e-3;
                    assert!((f64::from(*slope) - expected).abs() < 2e-3, "{slope} for {expected}, share {share}");
                }
            }
        }
    }
}
