//! Counter-based noise: the same key gives the same number on every device, in any order, at any time.
//!
//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), then the Gumbel transform.
//! `argmax(logits / T + gumbel)` samples exactly from `softmax(logits / T)`.

use crate::dispatch::simd;
use crate::math;

/// Version of the mapping from keys to noise; written into every run. A change of bits is a new version.
pub const VERSION: u32 = 1;

/// Philox4x32 with ten rounds.
#[inline(always)]
#[must_use]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
    }
    c
}

/// Everything of the key that is fixed for one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseKey {
    key: [u32; 2],
    prompt: u32,
    sample: u32,
}

impl NoiseKey {
    /// Key of sample `sample` of prompt `prompt` in step `step` of a run with this seed. `stream` separates uses.
    #[must_use]
    pub fn new(seed: u64, stream: u32, step: u32, prompt: u32, sample: u32) -> Self {
        let mixed = philox([step, stream, VERSION, 0], [seed as u32, (seed >> 32) as u32]);
        Self { key: [mixed[0], mixed[1]], prompt, sample }
    }

    /// The key itself, to be kept.
    #[must_use]
    pub fn to_words(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.prompt, self.sample]
    }

    /// Of words that [`NoiseKey::to_words`] gave.
    #[must_use]
    pub fn from_words([first, second, prompt, sample]: [u32; 4]) -> Self {
        Self { key: [first, second], prompt, sample }
    }

    /// Four random words for block `block` at `position`.
    #[inline(always)]
    #[must_use]
    pub fn words(&self, position: u32, block: u32) -> [u32; 4] {
        philox([block, position, self.prompt, self.sample], self.key)
    }

    /// Gumbel noise of token `v` at `position`.
    #[must_use]
    pub fn gumbel(&self, position: u32, v: u32) -> f32 {
        gumbel(self.words(position, v / 4)[(v % 4) as usize])
    }

    /// A number in (0, 1).
    #[must_use]
    pub fn uniform(&self, position: u32, index: u32) -> f64 {
        (f64::from(self.words(position, index / 4)[(index % 4) as usize]) + 0.5) / 4_294_967_296.0
    }
}

/// `-ln(-ln(u))` with `u = (x + 1/2) / 2^32`; the upper half goes through `ln(1 - t)` to keep its precision.
#[inline(always)]
#[must_use]
pub fn gumbel(x: u32) -> f32 {
    const SCALE: f32 = 1.0 / 4_294_967_296.0;
    // Both sides are computed, so that lanes need not branch.
    let upper = math::neg_ln_1m((!x as f32 + 0.5) * SCALE);
    let lower = -math::ln((x as f32 + 0.5) * SCALE);
    let exponential = if x >> 31 == 1 { upper } else { lower };
    -math::ln(exponential)
}

/// `logits / T + G(position, v)` of every token into `out`; the logits themselves if T = 0.
pub fn perturb(logits: &[f32], temperature: f32, key: &NoiseKey, position: u32, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits);
    if temperature != 0.0 {
        add_noise(out, 1.0 / temperature, key, position);
    }
}

simd! {
    fn add_noise(logits: &mut [f32], inverse: f32, key: &NoiseKey, position: u32) {
        let mut block = 0;
        for chunk in logits.chunks_mut(64) {
            let mut words = [[0_u32; 4]; 16];
            for (i, w) in (0_u32..).zip(&mut words) {
                *w = key.words(position, block + i);
            }
            for (logit, word) in chunk.iter_mut().zip(words.as_flattened()) {
                *logit = *logit * inverse + gumbel(*word);
            }
            block += 16;
        }
    }
}

/// [`perturb`] for some tokens only: logits of these `ids`.
pub fn perturb_some(logits: &[f32], ids: &[u32], temperature: f32, key: &NoiseKey, position: u32, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits);
    if temperature != 0.0 {
        add_noise_of(out, ids, 1.0 / temperature, key, position);
    }
}

simd! {
    fn add_noise_of(logits: &mut [f32], ids: &[u32], inverse: f32, key: &NoiseKey, position: u32) {
        for (logits, ids) in logits.chunks_mut(16).zip(ids.chunks(16)) {
            let mut words = [0; 16];
            for (word, id) in words.iter_mut().zip(ids) {
                *word = key.words(position, id / 4)[(id % 4) as usize];
            }
            for (logit, word) in logits.iter_mut().zip(words) {
                *logit = *logit * inverse + gumbel(word);
            }
        }
    }
}

/// A bound of [`gumbel`] without logarithms: `-ln(-ln(1 - t)) <= -ln t`, and t is at least a half to the power of the ones that x
/// begins with, and one more.
#[inline(always)]
fn gumbel_below(x: u32) -> f32 {
    (x.leading_ones() + 1) as f32 * std::f32::consts::LN_2 + MARGIN
}

/// No noise is larger: `-ln(-ln(1 - 2^-33))`, rounded up.
const GUMBEL_MAX: f32 = 22.9;
/// Covers the rounding of [`gumbel`], which is increasing only up to it.
const MARGIN: f32 = 1e-3;
/// Tokens that are looked at together.
const BLOCK: usize = 64;

/// The sampled token: `argmax_v(logits_v / T + G(position, v))`; `T = 0` is plain argmax. The lowest id wins a tie.
///
/// Blocks of tokens whose largest logit cannot win with the largest noise, or with the largest of their own random words,
/// are passed over, which changes nothing.
#[must_use]
pub fn sample(logits: &[f32], temperature: f32, key: &NoiseKey, position: u32) -> u32 {
    if temperature == 0.0 { largest(logits).1 } else { sample_noisy(logits, 1.0 / temperature, key, position) }
}

simd! {
    /// The largest number and its first place.
    fn largest(logits: &[f32]) -> (f32, u32) {
        let mut best = (f32::NEG_INFINITY, 0);
        for (block, chunk) in (0_u32..).zip(logits.chunks(BLOCK)) {
            if math::lane_max(chunk) > best.0 {
                for (v, logit) in (0_u32..).zip(chunk) {
                    if *logit > best.0 {
                        best = (*logit, block * BLOCK as u32 + v);
                    }
                }
            }
        }
        best
    }
}

simd! {
    fn sample_noisy(logits: &[f32], inverse: f32, key: &NoiseKey, position: u32) -> u32 {
        // A good first candidate lets most blocks be passed over.
        let top = largest(logits).1;
        let mut best = (logits[top as usize] * inverse + key.gumbel(position, top), top);
        for (block, chunk) in (0_u32..).zip(logits.chunks(BLOCK)) {
            let most = math::lane_max(chunk) * inverse;
            if most + GUMBEL_MAX < best.0 {
                continue;
            }
            let mut words = [[0_u32; 4]; BLOCK / 4];
            for (i, w) in (0_u32..).zip(&mut words) {
                *w = key.words(position, block * (BLOCK as u32 / 4) + i);
            }
            let words = words.as_flattened();
            let word = words.iter().fold(0, |a: u32, b| if *b > a { *b } else { a });
            if most + gumbel_below(word) < best.0 || most + gumbel(word) + MARGIN < best.0 {
                continue;
            }
            for ((v, logit), word) in (block * BLOCK as u32..).zip(chunk).zip(words) {
                let value = *logit * inverse + gumbel(*word);
                if value > best.0 || (value == best.0 && v < best.1) {
                    best = (value, v);
                }
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of the Random123 distribution (`kat_vectors`).
    #[test]
    fn philox_matches_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn passing_over_blocks_changes_nothing() {
        let draw = NoiseKey::new(4, 9, 0, 0, 0);
        for case in 0..2_000_u32 {
            let spread = [0.0, 1.0, 4.0, 30.0][case as usize % 4];
            let len = 1 + (draw.uniform(case, 0) * 300.0) as u32;
            let logits: Vec<f32> = (0..len).map(|i| eighths(draw.uniform(case, 1 + i)) * spread).collect();
            for temperature in [0.0, 0.6, 1.0, 1.7] {
                let key = NoiseKey::new(5, 0, case, 1, 2);
                let mut perturbed = Vec::new();
                perturb(&logits, temperature, &key, 7, &mut perturbed);
                let mut best = 0;
                for (i, value) in perturbed.iter().enumerate() {
                    best = if *value > perturbed[best] { i } else { best };
                }
                assert_eq!(sample(&logits, temperature, &key, 7) as usize, best, "case {case} at T = {temperature}");
            }
        }
    }

    #[test]
    fn the_bound_without_logarithms_is_one() {
        let key = NoiseKey::new(8, 0, 0, 0, 0);
        let drawn = (0..50_000).flat_map(|i| key.words(1, i)).flat_map(|x| [x, !(x >> (x % 32)), x >> (x % 32)]);
        let edges = (0..32).flat_map(|i| [u32::MAX << i, (u32::MAX << i).wrapping_sub(1), 1 << i]);
        for x in drawn.chain(edges).chain([0, u32::MAX]) {
            assert!(gumbel_below(x) >= gumbel(x) + MARGIN / 2.0, "{x:#x}: {} {}", gumbel_below(x), gumbel(x));
        }
    }

    /// Few different numbers, so that ties happen.
    fn eighths(uniform: f64) -> f32 {
        ((uniform - 0.5) * 8.0).round() as f32 / 8.0
    }

    /// chi-square over a million draws from 8 tokens; 7 degrees of freedom, p = 0.01 at 18.5.
    #[test]
    fn samples_follow_the_softmax() {
        let logits = [0.0_f32, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.25];
        for temperature in [0.7_f32, 1.0, 1.6] {
            let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let draws = 1_000_000;
            let mut counts = [0_u32; 8];
            for i in 0..draws {
                let key = NoiseKey::new(11, 0, i % 50, i / 50, 3);
                counts[sample(&logits, temperature, &key, i % 7) as usize] += 1;
            }
            let chi: f64 = counts
                .iter()
                .zip(&weights)
                .map(|(&c, w)| {
                    let want = w / total * f64::from(draws);
                    (f64::from(c) - want).powi(2) / want
                })
                .sum();
            assert!(chi < 18.5, "chi-square {chi} at T = {temperature}");
        }
    }

    /// The bits of version 1. If this fails, old runs could no longer be resumed: raise VERSION instead.
    #[test]
    fn noise_keeps_its_bits() {
        let key = NoiseKey::new(42, 1, 2, 3, 4);
        let bits: Vec<u32> = (0..6).map(|v| key.gumbel(5, v).to_bits()).collect();
        assert_eq!(bits, GOLDEN, "{bits:#x?}");
    }
    const GOLDEN: [u32; 6] = [0x3f6e_4470, 0xbde0_d868, 0xbdad_04e4, 0xbfa7_08a6, 0x3f75_9f1d, 0x4036_f71c];
}
