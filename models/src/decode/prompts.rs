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

impl Prompts {
    /// Keeps what the target made of these tokens; the one that was not asked for the longest leaves.
    pub(super) fn keep(&mut self, tokens: &[u32], (cache, hidden): (&Cache, &Arc<Vec<f32>>), pages: &mut Pages) {
        if tokens.is_empty() {
            return;
        }
        match self.0.iter().position(|prompt| prompt.tokens == tokens) {
            Some(known) => self.0.rotate_left(known + 1),
            None => {
                let (tokens, cache, hidden) = (tokens.to_vec(), cache.clone(), hidden.clone());
                self.0.push_back(Prompt { tokens, cache, hidden });
            }
        }
        while self.0.len() > KEPT {
            self.forget(pages);
        }
    }

    /// What is known of the first of these tokens: all of them, or as many as fill pages; nothing if that is none. Each has `width`
    /// numbers of hidden states.
    pub(super) fn find(&self, tokens: &[u32], width: usize) -> Option<(Cache, Arc<Vec<f32>>)> {
        let alike = |prompt: &Prompt| prompt.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let (rows, prompt) = self.0.iter().map(|prompt| (alike(prompt), prompt)).max_by_key(|(rows, _)| *rows)?;
        if rows == tokens.len() && rows == prompt.tokens.len() {
            return (rows > 0).then(|| (prompt.cache.clone(), prompt.hidden.clone()));
        }
        let pages = rows / PAGE;
        let hidden = || Arc::new(prompt.hidden[..pages * PAGE * width].to_vec());
        (pages > 0).then(|| (prompt.cache.first_pages(pages), hidden()))
    }

    /// Forgets the oldest; whether there was one.
    pub(super) fn forget(&mut self, pages: &mut Pages) -> bool {
        self.0.pop_front().map(|prompt| pages.give_back(prompt.cache)).is_some()
    }

    pub(super) fn caches(&self) -> impl Iterator<Item = &Cache> {
        self.0.iter().map(|prompt| &prompt.cache)
    }
}
