//! Two drafters in one: what followed the last tokens before, where they stood before; elsewhere what a learned drafter guesses.

use state::plan::Strategy;
use state::speculation::{Accepted, DraftTree};

use super::{Context, Drafter};
use crate::error::Result;
use crate::target::Hidden;

/// Drafts with `suffix` where it finds a match, and with `learned` where not.
pub struct Hybrid<'a> {
    /// Asked first, for chains of up to [`Strategy::suffix`] tokens.
    suffix: &'a mut dyn Drafter,
    /// Asked for the rest.
    learned: &'a mut dyn Drafter,
    /// The requests of the last draft that it was asked for.
    asked: Vec<usize>,
    /// The cycle before drafted in another way.
    is_change: bool,
}

impl<'a> Hybrid<'a> {
    /// Both as one; whether the cycle before drafted in another way.
    pub fn new(suffix: &'a mut dyn Drafter, learned: &'a mut dyn Drafter, is_change: bool) -> Self {
        Self { suffix, learned, asked: Vec::new(), is_change }
    }
}

impl Drafter for Hybrid<'_> {
    fn reads(&self) -> Hidden {
        self.learned.reads()
    }

    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let mut trees = self.suffix.draft(requests, &Strategy::chain(strategy.drafter, strategy.suffix))?;
        self.asked = (0..trees.len()).filter(|i| trees[*i].is_empty()).collect();
        let rest: Vec<Context<'_>> = self.asked.iter().map(|i| requests[*i]).collect();
        if !rest.is_empty() {
            for (i, tree) in self.asked.iter().zip(self.learned.draft(&rest, strategy)?) {
                trees[*i] = tree;
            }
        }
        Ok(trees)
    }

    fn verified(&mut self, trees: &[DraftTree], accepted: &[Accepted]) {
        let trees: Vec<DraftTree> = self.asked.iter().map(|i| trees[*i].clone()).collect();
        let accepted: Vec<Accepted> = self.asked.iter().map(|i| accepted[*i].clone()).collect();
        self.learned.verified(&trees, &accepted);
    }

    fn learned(&self, request: usize) -> bool {
        self.asked.binary_search(&request).is_ok()
    }

    /// What the learned drafter catches up on after a match is part of drafting in this way, and counts.
    fn catch_up_s(&self) -> f64 {
        if self.is_change && !self.asked.is_empty() { self.learned.catch_up_s() } else { 0.0 }
    }

    fn left(&mut self, id: u64) {
        self.suffix.left(id);
        self.learned.left(id);
    }

    fn ended(&mut self, id: u64, tokens: &[u32], prompt: usize) {
        self.suffix.ended(id, tokens, prompt);
        self.learned.ended(id, tokens, prompt);
    }
}

#[cfg(test)]
mod tests {
    use kernels::{Draws, NoiseKey};

    use super::*;

    /// Drafts its token for the requests it knows, and remembers what it was told of.
    struct Stub {
        token: u32,
        known: Vec<u64>,
        told: Vec<Vec<u32>>,
    }

    impl Drafter for Stub {
        fn draft(&mut self, requests: &[Context<'_>], _: &Strategy) -> Result<Vec<DraftTree>> {
            let draft = |r: &Context<'_>| if self.known.contains(&r.id) { vec![self.token] } else { Vec::new() };
            Ok(requests.iter().map(|r| DraftTree::chain(draft(r))).collect())
        }

        fn verified(&mut self, trees: &[DraftTree], accepted: &[Accepted]) {
            assert_eq!(trees.len(), accepted.len());
            self.told = accepted.iter().map(|a| a.tokens.clone()).collect();
        }
    }

    #[test]
    fn the_learned_drafter_has_the_rest_and_hears_of_no_more() {
        let mut suffix = Stub { token: 1, known: vec![11, 13], told: Vec::new() };
        let mut learned = Stub { token: 2, known: vec![10, 11, 12, 13], told: Vec::new() };
        let noise = NoiseKey::new(0, 0, 0, 0, 0);
        let context = |id| Context {
            id,
            tokens: &[5],
            prompt: 1,
            hidden: [&[], &[]],
            noise,
            draws: Draws { temperature: 1.0, top_p: 1.0 },
            depth_max: 4,
            remainder: 1.0,
        };
        let mut hybrid = Hybrid::new(&mut suffix, &mut learned, false);
        let trees = hybrid.draft(&[10, 11, 12, 13].map(context), &Strategy::chain(0, 1).with_suffix(1)).unwrap();
        assert_eq!(trees.iter().map(|t| t.tokens[0]).collect::<Vec<_>>(), [2, 1, 2, 1]);
        assert_eq!([0, 1, 2, 3].map(|i| hybrid.learned(i)), [true, false, true, false]);
        let accepted = [20, 21, 22, 23].map(|token| Accepted { nodes: Vec::new(), tokens: vec![token] });
        hybrid.verified(&trees, &accepted);
        assert_eq!(learned.told, [[20], [22]]);
        assert!(suffix.told.is_empty());
    }
}
