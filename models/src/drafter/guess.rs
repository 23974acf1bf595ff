//! A drafted token, and what speaks for it: the network guessed it, another drafter proposed it, or both.

use std::collections::BTreeMap;

use state::speculation::tree::ROOT;
use state::speculation::{Accepted, DraftTree};

use super::Calibration;
use super::share::Record;

/// A node of a draft.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guess {
    /// 0 directly below the last token.
    pub(super) level: usize,
    /// Estimated chance that it is accepted.
    pub(super) chance: f32,
    /// If the network guessed it.
    pub(super) guessed: Option<Guessed>,
    /// If it is of a proposed chain.
    pub(super) proposed: Option<Proposed>,
}

/// What the network says for a token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guessed {
    /// How far its score is from its rivals'.
    pub(super) gap: f32,
    /// Chance that it is right if the one above is, as it would be in any request.
    pub(super) usual: f32,
}

/// What a proposal says for a token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Proposed {
    /// Tokens of the chain.
    length: usize,
    /// Chance that it is right if the one above is, as it would be in any request.
    usual: f32,
}

/// How often a drafter was right in each request: what the version after it goes on from.
#[derive(Debug, Clone, Default)]
pub struct Known(pub(super) BTreeMap<u64, Records>);

/// Of one request, how often the network was right, and how often proposals were.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Records {
    pub(super) guessed: Record,
    proposed: Record,
}

impl Records {
    /// Learns, together with what is known of all requests, from a guess whose parent was right.
    pub(super) fn observe(&mut self, guess: &Guess, is_right: bool, calibration: &mut Calibration) {
        if let Some(Guessed { gap, usual }) = guess.guessed {
            calibration.observe(guess.level, gap, is_right);
            self.guessed.observe(usual, is_right);
        }
        if let Some(Proposed { length, usual }) = guess.proposed {
            calibration.observe_proposed(guess.level, length, is_right);
            self.proposed.observe(usual, is_right);
        }
    }
}

/// Tokens of a tree that are expected to be right. Of the children of a node one may be, whatever each of them promises.
pub(super) fn promised(tree: &DraftTree, guesses: &[Guess]) -> f64 {
    let mut below = vec![0.0; 1 + guesses.len()];
    for (parent, guess) in tree.parents.iter().zip(guesses) {
        below[if *parent == ROOT { guesses.len() } else { *parent }] += guess.chance;
    }
    let above = guesses.iter().map(|guess| guess.chance).chain([1.0]);
    below.into_iter().zip(above).map(|(children, parent)| f64::from(f32::min(children, parent))).sum()
}

/// Accepted nodes of a tree that the network guessed; nothing if it guessed none of the tree's.
pub(super) fn guessed(guesses: &[Guess], accepted: &Accepted) -> Option<usize> {
    let is_guessed = |guess: &Guess| guess.guessed.is_some();
    guesses.iter().any(is_guessed).then(|| accepted.nodes.iter().filter(|node| is_guessed(&guesses[**node])).count())
}

/// The nodes of a proposed chain.
pub(super) fn chain(length: usize, records: &Records, calibration: &Calibration) -> Vec<Guess> {
    let mut chance = 1.0;
    let node = |level| {
        let usual = calibration.proposed(level, length);
        chance *= records.proposed.correct(usual);
        Guess { level, chance, guessed: None, proposed: Some(Proposed { length, usual }) }
    };
    (0..length).map(node).collect()
}

/// The likeliest that a token of the first `depth` levels can be that stands beside a chain or below its end: what it stands beside has
/// to be wrong.
pub(super) fn rival(chain: &[Guess], depth: usize) -> f32 {
    let above = [1.0].into_iter().chain(chain.iter().map(|guess| guess.chance));
    let beside = chain.iter().zip(above).map(|(guess, above)| above - guess.chance).take(depth);
    let below = chain.last().map_or(1.0, |last| last.chance);
    beside.chain((chain.len() < depth).then_some(below)).fold(0.0, f32::max)
}

/// The network guesses a node of a proposed chain too: it is at least as likely as either says, and what is proposed below it as much
/// likelier.
pub(super) fn agree(guesses: &mut [Guess], node: usize, guessed: Guessed, chance: f32) {
    guesses[node].guessed = Some(guessed);
    let before = guesses[node].chance;
    if chance <= before {
        return;
    }
    guesses[node].chance = chance;
    let (more, mut above) = (chance / before.max(f32::MIN_POSITIVE), chance);
    // A chain's nodes stand one after the other, before all others. Rounding makes none likelier than what it stands below.
    for guess in guesses[node + 1..].iter_mut().take_while(|guess| guess.proposed.is_some()) {
        guess.chance = (guess.chance * more).min(above);
        above = guess.chance;
    }
}

#[cfg(test)]
mod tests {
    use super::super::share::keep;
    use super::*;

    #[test]
    fn of_several_children_one_may_be_right() {
        let guess = |chance| Guess { level: 0, chance, guessed: None, proposed: None };
        let tree = DraftTree { tokens: vec![1, 2, 3, 4], parents: vec![ROOT, ROOT, 0, 0] };
        // Two at 0.7 and 0.6 are one at most; two of 0.2 below the first are within its chance.
        let guesses = [0.7, 0.6, 0.2, 0.2].map(guess);
        assert!((promised(&tree, &guesses) - 1.4).abs() < 1e-6);
        assert_eq!(promised(&DraftTree::default(), &[]), 0.0);
    }

    #[test]
    fn what_another_drafter_proposed_is_not_the_networks() {
        let proposed = chain(2, &Records::default(), &Calibration::default());
        let own = Guess { guessed: Some(Guessed { gap: 1.0, usual: 0.5 }), ..proposed[1] };
        let accepted = |nodes: &[usize]| Accepted { nodes: nodes.to_vec(), tokens: Vec::new() };
        assert_eq!(guessed(&proposed, &accepted(&[0, 1])), None);
        let both = [proposed.as_slice(), &[own]].concat();
        assert_eq!(guessed(&both, &accepted(&[0, 1])), Some(0));
        assert_eq!(guessed(&both, &accepted(&[0, 2])), Some(1));
    }

    #[test]
    fn a_chain_is_believed_as_far_as_chains_were_right() {
        let (mut calibration, mut records) = (Calibration::default(), Records::default());
        let chances = |records: &Records, calibration: &Calibration| -> Vec<f32> {
            chain(6, records, calibration).iter().map(|guess| guess.chance).collect()
        };
        let before = chances(&records, &calibration);
        assert!(before.windows(2).all(|w| w[1] < w[0]), "{before:?}");
        for i in 0..400 {
            let guess = chain(6, &records, &calibration)[0];
            Records::default().observe(&guess, i % 2 == 0, &mut calibration);
        }
        let half = chances(&records, &calibration)[0];
        assert!((half - 0.5).abs() < 0.05, "{half}");
        for _ in 0..200 {
            let guess = chain(6, &records, &calibration)[0];
            records.observe(&guess, true, &mut Calibration::default());
        }
        assert!(chances(&records, &calibration)[0] > 0.85, "this request repeats itself");
    }

    #[test]
    fn what_is_sure_leaves_no_room_for_rivals() {
        let guess = |chance| Guess { level: 0, chance, guessed: None, proposed: None };
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(rival(&[], 2), 1.0));
        assert!(near(rival(&[0.9, 0.6].map(guess), 2), 0.3));
        assert!(near(rival(&[0.9, 0.6].map(guess), 3), 0.6), "it may go on below");
        assert!(near(rival(&[0.2, 0.1].map(guess), 2), 0.8));
    }

    #[test]
    fn two_that_agree_are_at_least_as_likely_as_either_says() {
        let guessed = Guessed { gap: 1.0, usual: 0.8 };
        let mut guesses = chain(3, &Records::default(), &Calibration::default());
        let before: Vec<f32> = guesses.iter().map(|guess| guess.chance).collect();
        guesses.push(Guess { level: 0, chance: 0.1, guessed: Some(guessed), proposed: None });
        agree(&mut guesses, 1, guessed, before[1] * 0.5);
        assert_eq!(guesses.iter().map(|guess| guess.chance).take(3).collect::<Vec<_>>(), before);
        agree(&mut guesses, 1, guessed, before[1] * 1.25);
        let after: Vec<f32> = guesses.iter().zip(&before).map(|(guess, before)| guess.chance / before).collect();
        assert!(after[0] == 1.0 && after[1..].iter().all(|more| (more - 1.25).abs() < 1e-5), "{after:?}");
        assert_eq!(guesses[3].chance, 0.1);
    }

    #[test]
    fn no_node_is_likelier_than_what_it_stands_below() {
        let proposed = Some(Proposed { length: 7, usual: 0.5 });
        for case in 0..2_000 {
            let key = kernels::NoiseKey::new(7, 0, 0, case, 0);
            // Some are sure.
            let link = |i: u32| (key.uniform(i, 0) as f32 * 1.3).min(1.0);
            let mut chance = 1.0;
            let node = |level: usize| {
                chance *= link(level as u32);
                Guess { level, chance, guessed: None, proposed }
            };
            let mut guesses: Vec<Guess> = (0..7).map(node).collect();
            for i in 0..4 {
                let node = (key.uniform(i, 1) * 7.0) as usize;
                let above = node.checked_sub(1).map_or(1.0, |above| guesses[above].chance);
                agree(&mut guesses, node, Guessed { gap: 0.0, usual: 0.5 }, above * link(100 + i));
                assert!(guesses.windows(2).all(|w| w[1].chance <= w[0].chance), "case {case}: {guesses:?}");
            }
            let chances = [guesses.iter().map(|guess| guess.chance).collect()];
            assert_eq!(keep(&mut [DraftTree::chain(vec![1; 7])], &chances, &[1.0], 3), [[0, 1, 2]]);
        }
    }
}
