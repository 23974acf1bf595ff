//! Drafts what followed the last tokens before: in the request itself, in its siblings, in earlier answers to the prompt.

use std::collections::BTreeMap;

use state::plan::Strategy;

use super::{Context, Drafter};
use crate::error::Result;
use state::speculation::DraftTree;

/// Earlier answers kept for a prompt.
const ANSWERS_MAX: usize = 16;
/// Prompts with answers kept.
const PROMPTS_MAX: usize = 4096;

/// The suffix drafter: longest match of the last tokens.
#[derive(Debug)]
pub struct Suffix {
    match_min: usize,
    match_max: usize,
    earlier: BTreeMap<Vec<u32>, Vec<Vec<u32>>>,
}

impl Suffix {
    /// Drafts from matches of `match_min..=match_max` tokens.
    #[must_use]
    pub fn new(match_min: usize, match_max: usize) -> Self {
        Self { match_min: match_min.max(1), match_max, earlier: BTreeMap::new() }
    }

    fn draft_one(&self, request: &Context<'_>, depth: usize) -> DraftTree {
        let own = [&request.tokens[..request.tokens.len() - 1]];
        let earlier = self.earlier.get(&request.tokens[..request.prompt]);
        let sources = own
            .into_iter()
            .chain(request.siblings.iter().copied())
            .chain(earlier.into_iter().flatten().map(Vec::as_slice));
        let mut best: (usize, &[u32]) = (self.match_min - 1, &[]);
        for source in sources {
            let found = self.longest_match(request.tokens, source);
            if found.0 > best.0 {
                best = found;
            }
        }
        // The longer the match, the further it is likely to go on.
        DraftTree::chain(best.1.iter().take(depth.min(request.depth_max).min(best.0)).copied().collect())
    }

    /// Length of the longest suffix of `tokens` in `source` and what follows it there; the latest place wins a tie.
    fn longest_match<'a>(&self, tokens: &[u32], source: &'a [u32]) -> (usize, &'a [u32]) {
        let mut best: (usize, &[u32]) = (0, &[]);
        for end in 1..source.len() {
            let same = tokens
                .iter()
                .rev()
                .zip(source[..end].iter().rev())
                .take(self.match_max)
                .take_while(|(a, b)| a == b)
                .count();
            if same >= best.0.max(1) {
                best = (same, &source[end..]);
            }
        }
        best
    }
}

impl Drafter for Suffix {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        Ok(requests.iter().map(|r| self.draft_one(r, strategy.depth.min(strategy.budget))).collect())
    }

    fn ended(&mut self, _: u64, tokens: &[u32], prompt: usize) {
        if self.earlier.len() >= PROMPTS_MAX && !self.earlier.contains_key(&tokens[..prompt]) {
            self.earlier.pop_first();
        }
        let answers = self.earlier.entry(tokens[..prompt].to_vec()).or_default();
        if answers.len() >= ANSWERS_MAX {
            answers.remove(0);
        }
        answers.push(tokens.to_vec());
    }
}
