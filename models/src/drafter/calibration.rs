//! How likely a guess is right, learned from what the target made of earlier ones.
//!
//! A guess is known by its *gap*: how far its score (sharpness times logit / T, plus noise) is above the second best, or, if it is not
//! the best, below the best. Gaps are told apart by bins, apart for each of the first levels: deeper guesses stand on guesses.

use serde::{Deserialize, Serialize};

use super::learn::Guesses;
use super::sharpness::Sharpness;

/// Levels told apart; deeper ones count as the last.
pub(super) const LEVELS: usize = 4;
/// Bins of gaps from `-GAP_MAX` to `GAP_MAX`.
const BINS: usize = 32;
const GAP_MAX: f32 = 8.0;
/// Lengths of proposed chains told apart: up to 2, 5, 11 tokens, and longer ones.
const LENGTHS: usize = 4;
/// Chance that a proposal goes on to be right, before anything was seen of any.
const PROPOSED: f32 = 0.75;
/// The same of a first choice.
const FIRST: f32 = 0.75;
/// Guesses that the chance before any observation is worth.
const PRIOR: f32 = 8.0;
/// Share forgotten at each observation: drafters learn, and the target moves.
const FORGET: f32 = 1.0 / 512.0;

/// Chances by level and gap, and how far logits are believed against noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    bins: [[Bin; BINS]; LEVELS],
    /// Of first choices, whatever their gaps.
    #[serde(default)]
    first: [Bin; LEVELS],
    /// Of tokens that another drafter proposed, by level and by the length of its chain.
    proposed: [[Bin; LENGTHS]; LEVELS],
    /// Where it changes, gaps mean something else, and bins learn anew.
    pub(super) sharpness: Sharpness,
}

/// Guesses seen, and those that were right, the newest counting most.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
struct Bin {
    seen: f32,
    right: f32,
}

impl Default for Calibration {
    fn default() -> Self {
        let (first, proposed, sharpness) = Default::default();
        Self { bins: [[Bin::default(); BINS]; LEVELS], first, proposed, sharpness }
    }
}

impl Calibration {
    /// Chance that a guess is right if the one above it is, 0 to 1. Before anything was seen, that of a coin weighted by the
    /// gap.
    #[must_use]
    pub fn chance(&self, level: usize, gap: f32) -> f32 {
        let prior = 1.0 / (1.0 + (-gap.clamp(-GAP_MAX, GAP_MAX)).exp());
        self.bins[level.min(LEVELS - 1)][bin(gap)].chance(prior)
    }

    /// The same of a first choice whose gap is not known yet.
    pub(super) fn first(&self, level: usize) -> f32 {
        self.first[level.min(LEVELS - 1)].chance(FIRST)
    }

    /// The same of a token of a proposed chain of this length.
    pub(super) fn proposed(&self, level: usize, length: usize) -> f32 {
        self.proposed[level.min(LEVELS - 1)][bin_of_length(length)].chance(PROPOSED)
    }

    /// Learns how far to believe logits from what a version was found to guess.
    pub fn learn(&mut self, guesses: &Guesses) {
        self.sharpness.extend(&guesses.sharpness);
    }

    /// Learns from a guess whose parent was right.
    pub fn observe(&mut self, level: usize, gap: f32, is_right: bool) {
        let level = level.min(LEVELS - 1);
        self.bins[level][bin(gap)].observe(is_right);
        if gap >= 0.0 {
            self.first[level].observe(is_right);
        }
    }

    /// Learns from a token of a proposed chain whose parent was right.
    pub(super) fn observe_proposed(&mut self, level: usize, length: usize, is_right: bool) {
        self.proposed[level.min(LEVELS - 1)][bin_of_length(length)].observe(is_right);
    }
}

impl Bin {
    fn chance(self, prior: f32) -> f32 {
        (self.right + PRIOR * prior) / (self.seen + PRIOR)
    }

    fn observe(&mut self, is_right: bool) {
        self.seen += 1.0 - FORGET * self.seen;
        self.right += f32::from(u8::from(is_right)) - FORGET * self.right;
    }
}

/// The bin of the length of a chain: a long match is likelier to go on than a short one.
fn bin_of_length(length: usize) -> usize {
    [3, 6, 12].iter().filter(|from| length >= **from).count()
}

/// The bin of a gap. An infinite one, of a guess without rivals, is in the last; NaN is in the first.
fn bin(gap: f32) -> usize {
    let place = (gap + GAP_MAX) / (2.0 * GAP_MAX) * BINS as f32;
    (place.max(0.0) as usize).min(BINS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_become_those_that_were_seen_and_follow_changes() {
        let mut calibration = Calibration::default();
        assert!((calibration.chance(0, 0.0) - 0.5).abs() < 1e-6);
        assert!(calibration.chance(0, 3.0) > 0.9 && calibration.chance(2, -3.0) < 0.1);
        let mut observe = |right: usize| {
            (0..4_000).for_each(|i| calibration.observe(1, 0.6, i % 10 < right));
            [calibration.chance(1, 0.6), calibration.chance(0, 0.6), calibration.chance(9, 0.6)]
        };
        let [seen, other, deep] = observe(3);
        assert!((seen - 0.3).abs() < 0.03, "{seen}");
        assert_eq!(other, deep, "other levels are not touched");
        assert!((observe(9)[0] - 0.9).abs() < 0.03);
    }

    #[test]
    fn first_choices_are_believed_as_often_as_they_were_right() {
        let mut calibration = Calibration::default();
        for i in 0..400 {
            calibration.observe(1, [0.1, 3.0][i % 2], i % 4 == 0);
            calibration.observe(1, -0.5, true);
        }
        let first = calibration.first(1);
        assert!((0.22..0.3).contains(&first), "others are no first choices: {first}");
        assert!((calibration.first(0) - FIRST).abs() < 1e-6, "levels are told apart");
    }

    #[test]
    fn every_gap_has_a_bin() {
        let gaps = [f32::NEG_INFINITY, -1e30, -8.0, 0.0, 7.99, 8.0, 1e30, f32::INFINITY, f32::NAN];
        assert!(gaps.iter().all(|gap| bin(*gap) < BINS));
        assert_eq!([bin(-8.0), bin(0.0), bin(f32::INFINITY)], [0, BINS / 2, BINS - 1]);
    }
}
