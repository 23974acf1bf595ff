//! A drafter without the shared noise: its trees hold the likeliest tokens, as drafters elsewhere have it. To compare with.

use kernels::Draws;
use state::plan::Strategy;
use state::speculation::{Accepted, DraftTree};

use super::{Context, Drafter};
use crate::error::Result;
use crate::target::Hidden;

/// Ranks guesses by their chance alone.
pub struct Uncoupled<'a>(pub &'a mut dyn Drafter);

impl Drafter for Uncoupled<'_> {
    fn reads(&self) -> Hidden {
        self.0.reads()
    }

    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        // At temperature 0 there is no noise.
        let without = |r: &Context<'_>| Draws { temperature: 0.0, ..r.draws };
        let requests: Vec<Context<'_>> = requests.iter().map(|r| Context { draws: without(r), ..*r }).collect();
        self.0.draft(&requests, strategy)
    }

    fn promised(&self) -> Option<f64> {
        self.0.promised()
    }

    fn verified(&mut self, trees: &[DraftTree], accepted: &[Accepted]) {
        self.0.verified(trees, accepted);
    }

    fn learned(&self, request: usize) -> bool {
        self.0.learned(request)
    }

    fn guessed(&self, request: usize, accepted: &Accepted) -> Option<usize> {
        self.0.guessed(request, accepted)
    }

    fn catch_up_s(&self) -> f64 {
        self.0.catch_up_s()
    }

    fn left(&mut self, id: u64) {
        self.0.left(id);
    }

    fn ended(&mut self, id: u64, tokens: &[u32], prompt: usize) {
        self.0.ended(id, tokens, prompt);
    }
}
