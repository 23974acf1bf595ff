//! What is kept of an answer, and stretches of it.

use std::ops::Range;
use std::sync::Arc;

use kernels::NoiseKey;

use crate::request::Answer;

/// An answer: its tokens, and the target's hidden states of all but the last.
#[derive(Debug, PartialEq)]
pub struct Example {
    pub(crate) tokens: Vec<u32>,
    pub(crate) hidden: Vec<f32>,
    /// Length of the prompt, which is not drafted.
    pub(crate) prompt: usize,
    /// What drew its tokens.
    pub(crate) noise: NoiseKey,
    /// Which policy said it: the one after so many steps.
    pub(crate) policy: u32,
}

/// A stretch of an example. Its tokens keep their positions.
#[derive(Debug, Clone)]
pub struct Window {
    pub(crate) example: Arc<Example>,
    pub(crate) tokens: Range<usize>,
}

/// Shortest window: one guess, the token and the hidden state it is made from, and the token that it should be.
pub(super) const SHORTEST: usize = 3;

impl Window {
    /// Its halves, which guess together what it guesses.
    #[must_use]
    pub fn halves(self) -> [Self; 2] {
        let Range { start, end } = self.tokens;
        let middle = start + (end - start) / 2;
        let second = Self { example: self.example.clone(), tokens: (middle + 1).saturating_sub(SHORTEST)..end };
        [Self { tokens: start..middle, ..self }, second]
    }

    /// The policy that said it.
    #[must_use]
    pub fn policy(&self) -> u32 {
        self.example.policy
    }

    /// Tokens in it.
    #[must_use]
    pub fn size(&self) -> usize {
        self.tokens.len()
    }
}

impl Example {
    /// Its prompt.
    pub(super) fn asked(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// Which of the answers to its prompt it is.
    pub(super) fn sample(&self) -> u32 {
        self.noise.to_words()[3]
    }

    /// What an answer teaches; nothing if it has no hidden states or is too short.
    #[must_use]
    pub fn of(answer: &Answer) -> Option<Self> {
        let is_useful = !answer.hidden.is_empty() && answer.tokens.len() >= SHORTEST;
        let (tokens, hidden) = (&answer.tokens, &answer.hidden);
        let (prompt, noise) = (answer.prompt, answer.noise);
        is_useful.then(|| Self { tokens: tokens.clone(), hidden: hidden.clone(), prompt, noise, policy: 0 })
    }

    /// The same with tokens of nothing behind it, up to a length: what batches of padded sequences compute with.
    #[must_use]
    pub fn padded(&self, length: usize) -> Self {
        let (mut tokens, mut hidden) = (self.tokens.clone(), self.hidden.clone());
        let width = hidden.len() / (tokens.len() - 1);
        tokens.resize(length.max(tokens.len()), 0);
        hidden.resize((tokens.len() - 1) * width, 0.0);
        Self { tokens, hidden, ..*self }
    }

    /// All of it.
    #[must_use]
    pub fn whole(self: &Arc<Self>) -> Window {
        Window { example: self.clone(), tokens: 0..self.tokens.len() }
    }
}
