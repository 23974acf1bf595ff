//! How far a drafter's logits are believed against the noise that tokens are drawn with, learned from the tokens that came.
//!
//! A perfect drafter's logits count as they are: with the target's own noise they rank tokens as the target does. Others are right
//! on the whole and not in each place. Where a drafter is surer than it should be (it has learned few answers by heart, or guesses
//! from guesses), noise decides more than it thinks. Where it knows the mean of what the target may say, a token that is unlikely on
//! the whole is in most places unlikelier still, and noise decides less. So logits are multiplied by a sharpness, apart for each
//! level: the one that would have guessed most tokens.

use serde::{Deserialize, Serialize};
use state::speculation::tree::{Accepted, ROOT};

use super::calibration::LEVELS;
use super::vocabulary::Candidate;

/// Those that are compared.
const VALUES: [f32; 7] = [0.5, 0.65, 0.8, 1.0, 1.25, 1.6, 2.5];
/// The one before anything was seen, and the tokens that it is ahead by then.
const FIRST: usize = 3;
const HEAD_START: f32 = 4.0;
/// Tokens among which the favourite of any sharpness nearly always is.
pub(super) const CANDIDATES: usize = 16;
/// Share forgotten at each token: drafters learn.
const FORGET: f32 = 1.0 / 1024.0;

/// For each level and sharpness how many tokens it would have guessed where not all would have guessed the same, the newest counting
/// most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sharpness {
    right: [[f32; VALUES.len()]; LEVELS],
    /// Such tokens of each level.
    seen: [f32; LEVELS],
}

/// What each sharpness would have guessed, by the node below which it was: all nodes of a tree that may have children.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Favourites(Vec<(usize, Bets)>);

/// The token that each sharpness would have guessed; of no candidates, none.
type Bets = [u32; VALUES.len()];

impl Default for Sharpness {
    fn default() -> Self {
        let mut right = [0.0; VALUES.len()];
        right[FIRST] = HEAD_START;
        Self { right: [right; LEVELS], seen: [0.0; LEVELS] }
    }
}

impl Sharpness {
    /// What to multiply a level's logits with: what has been best so far, of equals the one closest to 1.
    pub(super) fn value(&self, level: usize) -> f32 {
        let right = &self.right[level.min(LEVELS - 1)];
        let better = |best: usize, other: usize| {
            let closer = other.abs_diff(FIRST) < best.abs_diff(FIRST);
            if right[other] > right[best] || (right[other] == right[best] && closer) { other } else { best }
        };
        VALUES[(0..VALUES.len()).fold(FIRST, better)]
    }

    /// Learns from the tokens that came, as far as there were guesses.
    pub(super) fn observe(&mut self, favourites: &Favourites, accepted: &Accepted) {
        let above = [ROOT].into_iter().chain(accepted.nodes.iter().copied());
        for (level, (node, token)) in above.zip(&accepted.tokens).enumerate() {
            let Some((_, guesses)) = favourites.0.iter().find(|(above, _)| *above == node) else { break };
            self.observe_one(level, guesses, *token);
        }
    }

    /// Learns from a token of this level, with what might have been guessed.
    pub(super) fn observe_among(&mut self, level: usize, candidates: &[Candidate], token: u32) {
        self.observe_one(level, &bets(candidates), token);
    }

    fn observe_one(&mut self, level: usize, guesses: &Bets, token: u32) {
        // Without noise they never differ, and nothing is forgotten.
        if guesses.iter().all(|guess| *guess == guesses[0]) {
            return;
        }
        let level = level.min(LEVELS - 1);
        self.seen[level] += 1.0;
        for (right, guess) in self.right[level].iter_mut().zip(guesses) {
            *right += f32::from(u8::from(*guess == token)) - FORGET * *right;
        }
    }

    /// Takes in what another one has seen since it was new.
    pub(super) fn extend(&mut self, newer: &Self) {
        let fresh = Self::default();
        for level in 0..LEVELS {
            let keep = (1.0 - FORGET).powf(newer.seen[level]);
            for (i, right) in self.right[level].iter_mut().enumerate() {
                *right += newer.right[level][i] - keep * fresh.right[level][i] - (1.0 - keep) * *right;
            }
            self.seen[level] += newer.seen[level];
        }
    }
}

fn bets(candidates: &[Candidate]) -> Bets {
    VALUES.map(|sharpness| {
        let score = |c: &&Candidate| sharpness * c.logit + c.noise;
        candidates.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map_or(u32::MAX, |c| c.token)
    })
}

impl Favourites {
    /// Takes in what may be guessed below a node.
    pub(super) fn add(&mut self, node: usize, candidates: &[Candidate]) {
        self.0.push((node, bets(candidates)));
    }

    /// Of the tree's nodes these are left, in order.
    pub(super) fn keep(&mut self, kept: &[usize]) {
        self.0.retain_mut(|(node, _)| match kept.binary_search(node) {
            _ if *node == ROOT => true,
            Ok(place) => {
                *node = place;
                true
            }
            Err(_) => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::NoiseKey;

    /// What is believed of a drafter whose logits are the target's times a factor, at each level, and the share of tokens that it
    /// guesses at first and in the end.
    fn learned(factor: f32) -> (Sharpness, f64, f64) {
        let mut sharpness = Sharpness::default();
        let mut right = Vec::new();
        for position in 0..12_000 {
            let key = NoiseKey::new(1, 0, 0, 0, 0);
            let logit = |token: u32| (key.uniform(position, 1000 + token) * 6.0) as f32;
            let candidate = |token: u32| {
                let (logit, noise) = (factor * logit(token), key.gumbel(position, token));
                Candidate { token, logit, noise, score: 0.0 }
            };
            let candidates: Vec<Candidate> = (0..16).map(candidate).collect();
            let best = |value: f32| {
                let score = |c: &&Candidate| value * c.logit + c.noise;
                candidates.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map_or(0, |c| c.token)
            };
            let (token, guess) = (best(1.0 / factor), best(sharpness.value(0)));
            right.push(token == guess);
            sharpness.observe_among(0, &candidates, token);
        }
        let share = |some: &[bool]| some.iter().filter(|is| **is).count() as f64 / some.len() as f64;
        (sharpness, share(&right[..50]), share(&right[2_000..]))
    }

    #[test]
    fn drafters_are_believed_as_far_as_they_are_right() {
        for (factor, wanted) in [(1.0, 1.0), (2.0, 0.5), (1.0 / 2.5, 2.5), (4.0, 0.5)] {
            let (sharpness, first, last) = learned(factor);
            assert_eq!(
                [0, 1].map(|level| sharpness.value(level)),
                [wanted, 1.0],
                "{factor}: other levels are not touched"
            );
            assert!(factor == 1.0 || last > first + 0.05, "{factor}: {first} to {last}");
        }
    }

    #[test]
    fn what_was_seen_elsewhere_counts_as_if_it_were_seen_here() {
        let key = NoiseKey::new(2, 0, 0, 0, 0);
        let mut both = Sharpness::default();
        let mut parts = [both; 2];
        for position in 0..900 {
            let candidate = |token: u32| {
                let (logit, noise) = (key.gumbel(position, 100 + token), key.gumbel(position, token));
                Candidate { token, logit, noise, score: 0.0 }
            };
            let candidates: Vec<Candidate> = (0..4).map(candidate).collect();
            let level = position as usize % LEVELS;
            both.observe_among(level, &candidates, position % 4);
            parts[position as usize / 600].observe_among(level, &candidates, position % 4);
        }
        let [mut first, second] = parts;
        first.extend(&second);
        for (first, both) in first.right.as_flattened().iter().zip(both.right.as_flattened()) {
            assert!((first - both).abs() < 1e-2 && *both > 5.0, "{first} {both}");
        }
        assert_eq!(first.seen, both.seen);
    }

    #[test]
    fn places_are_found_after_a_tree_was_cut() {
        // The dullest one prefers the token with luck.
        let candidates = |token: u32| {
            let likely = Candidate { token, score: 0.0, logit: 1.0, noise: 0.0 };
            [likely, Candidate { token: 99, logit: 0.0, noise: 0.6, ..likely }]
        };
        let mut favourites = Favourites::default();
        [ROOT, 0, 2, 3].into_iter().zip(10..).for_each(|(node, token)| favourites.add(node, &candidates(token)));
        favourites.keep(&[0, 3]);
        let places: Vec<(usize, u32)> = favourites.0.iter().map(|(node, tokens)| (*node, tokens[FIRST])).collect();
        assert_eq!(places, [(ROOT, 10), (0, 11), (1, 13)]);
        let mut sharpness = Sharpness::default();
        sharpness.observe(&favourites, &Accepted { nodes: vec![1], tokens: vec![10, 13] });
        assert_eq!([0, 1, 2].map(|level| sharpness.right[level][FIRST + 1]), [1.0, 1.0, 0.0]);
        assert_eq!(sharpness.right[1][0], 0.0, "the dullest one would have been wrong");
    }
}
