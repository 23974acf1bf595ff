//! Prompts that went through the target lately: a request that comes later with the same one begins at once, and one that begins alike
//! shares the pages they have in common.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::cache::{Cache, PAGE, Pages};

/// Prompts that are kept. Requests of a group come one after the other, and what many prompts begin with is in the last one, too.
const KEPT: usize = 4;

/// Of one target.
#[derive(Debug, Default)]
pub(super) struct Prompts(VecDeque<Prompt>);

/// What the target made of tokens: their keys and values, and hidden states.
#[derive(Debug)]
struct Prompt {
    tokens: Vec<u32>,
    cache: Cache,
    hidden: Arc<Vec<f32>>,
}

/// What is known of tokens: the first so many, of this prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    prompt: usize,
    rows: usize,
}

impl Prompts {
    /// Keeps what the target made of these tokens; the one that was not asked for the longest leaves.
    pub(super) fn keep(&mut self, tokens: &[u32], (cache, hidden): (&Cache, &Arc<Vec<f32>>), pages: &mut Pages) {
        if tokens.is_empty() {
            return;
        }
        let known = self.0.iter().position(|prompt| prompt.tokens == tokens).and_then(|known| self.0.remove(known));
        let new = || Prompt { tokens: tokens.to_vec(), cache: cache.clone(), hidden: hidden.clone() };
        self.0.push_back(known.unwrap_or_else(new));
        while self.0.len() > KEPT {
            self.forget(pages);
        }
    }

    /// What is known of the first of these tokens: all of them, or as many as fill pages; nothing if that is none.
    pub(super) fn find(&self, tokens: &[u32]) -> Option<Found> {
        let found = |(i, prompt): (usize, &Prompt)| {
            let alike = prompt.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            let is_it = alike == tokens.len() && alike == prompt.tokens.len();
            Found { prompt: i, rows: if is_it { alike } else { alike / PAGE * PAGE } }
        };
        self.0.iter().enumerate().map(found).max_by_key(|found| found.rows).filter(|found| found.rows > 0)
    }

    /// Keys and values of what was found, and hidden states, `width` numbers a token.
    pub(super) fn take(&self, Found { prompt, rows }: Found, width: usize) -> (Cache, Arc<Vec<f32>>) {
        let Prompt { tokens, cache, hidden } = &self.0[prompt];
        if rows == tokens.len() {
            return (cache.clone(), hidden.clone());
        }
        (cache.first_pages(rows / PAGE), Arc::new(hidden[..rows * width].to_vec()))
    }

    /// Forgets the oldest; whether there was one.
    pub(super) fn forget(&mut self, pages: &mut Pages) -> bool {
        self.0.pop_front().map(|prompt| pages.give_back(prompt.cache)).is_some()
    }

    /// Forgets the oldest that nobody goes on from; whether there was one.
    pub(super) fn forget_own(&mut self, pages: &mut Pages) -> bool {
        let own = self.0.iter().position(|prompt| prompt.cache.is_own());
        own.and_then(|own| self.0.remove(own)).map(|prompt| pages.give_back(prompt.cache)).is_some()
    }

    pub(super) fn caches(&self) -> impl Iterator<Item = &Cache> {
        self.0.iter().map(|prompt| &prompt.cache)
    }
}

impl Found {
    /// Pages that are shared.
    pub(super) fn pages(self) -> usize {
        self.rows.div_ceil(PAGE)
    }
}
