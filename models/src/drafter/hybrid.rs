//! Two drafters in one: what followed the last tokens where they stood before is proposed to the learned drafter, which takes it into its
//! tree, and guesses on its own where that may be wrong.

use state::plan::Strategy;
use state::speculation::{Accepted, DraftTree};

use super::{Context, Drafter};
use crate::error::Result;
use crate::target::Hidden;

/// Drafts with `learned`, to which `suffix` proposes chains of up to [`Strategy::suffix`] tokens.
pub struct Hybrid<'a> {
    suffix: &'a mut dyn Drafter,
    learned: &'a mut dyn Drafter,
}

impl<'a> Hybrid<'a> {
    /// Both as one.
    pub fn new(suffix: &'a mut dyn Drafter, learned: &'a mut dyn Drafter) -> Self {
        Self { suffix, learned }
    }
}

impl Drafter for Hybrid<'_> {
    fn reads(&self) -> Hidden {
        self.learned.reads()
    }

    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let chains = self.suffix.draft(requests, &Strategy::chain(strategy.drafter, strategy.suffix))?;
        let proposed = requests.iter().zip(&chains).map(|(r, chain)| Context { proposal: &chain.tokens, ..*r });
        self.learned.draft(&proposed.collect::<Vec<_>>(), strategy)
    }

    fn promised(&self) -> Option<f64> {
        self.learned.promised()
    }

    fn verified(&mut self, trees: &[DraftTree], accepted: &[Accepted]) {
        self.learned.verified(trees, accepted);
    }

    fn learned(&self, request: usize) -> bool {
        self.learned.learned(request)
    }

    fn guessed(&self, request: usize, accepted: &Accepted) -> Option<usize> {
        self.learned.guessed(request, accepted)
    }

    fn catch_up_s(&self) -> f64 {
        self.learned.catch_up_s()
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
