//! Which prompts enter, and who has to wait, so that keys and values stay within their memory.

use super::Decoder;
use crate::cache::{Cache, PAGE};
use crate::request::{Entering, Request};

/// Rows of prompts that go through the target in a cycle, at most: requests that decode do not wait for a long prompt, and as
/// many rows are computed about as fast as more.
const PREFILL_ROWS: usize = 64;

impl Decoder {
    /// Holds keys and values of about so many tokens at most, shared ones once; 0: of all requests. Where those that are running
    /// need more, the youngest wait and are made again later. One request alone always goes on.
    #[must_use]
    pub fn with_cache_max(self, tokens: usize) -> Self {
        Self { pages_max: (tokens > 0).then_some(tokens.div_ceil(PAGE)), ..self }
    }

    /// Tokens that there is memory in use for: their keys and values, and the rest of their pages.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        let running = self.slots.iter().map(|slot| &slot.cache);
        Cache::pages_of(running.chain(self.entering.iter().map(|prompt| &prompt.cache))) * PAGE
    }

    /// Pages that are in use, that prompts on their way will need, and one more for each running request.
    fn pages_needed(&self) -> usize {
        let entering = self.entering.iter().filter(|prompt| prompt.done() > 0);
        let to_come: usize = entering.map(|prompt| pages_of(prompt) - prompt.cache.pages()).sum();
        self.cached_tokens() / PAGE + to_come + self.slots.len()
    }

    /// Before a cycle, in which each request may need a page more: the youngest are to wait until there is room, behind prompts that
    /// are on their way already. Returns the identities that they had.
    pub(super) fn make_room(&mut self) -> Vec<u64> {
        let Some(max) = self.pages_max else { return Vec::new() };
        let mut waiting = Vec::new();
        while self.slots.len() > 1 && self.pages_needed() > max {
            self.sort();
            let Some(youngest) = self.slots.pop() else { break };
            waiting.push(youngest.id);
            self.pages.give_back(youngest.cache);
            self.entering.insert(self.begun(), Entering::new(vec![youngest.request]));
        }
        self.pages.keep_free(max.saturating_sub(self.cached_tokens() / PAGE));
        waiting
    }

    /// Whether prompts are on their way through the target. Those that wait for memory are not.
    #[must_use]
    pub fn is_entering(&self) -> bool {
        if self.pages_max.is_none() { !self.entering.is_empty() } else { self.begun() > 0 }
    }

    /// Whether prompts go along with the next cycle.
    #[must_use]
    pub fn is_prefilling(&self) -> bool {
        self.stretches().iter().any(|rows| *rows > 0)
    }

    /// Prompts that are on their way through the target: the first ones.
    fn begun(&self) -> usize {
        self.entering.iter().take_while(|prompt| prompt.done() > 0).count()
    }

    /// Half of the requests that wait for memory, the last ones: for another device, which makes them again. Rounded up, unless nothing else
    /// is left here.
    pub(super) fn halve_waiting(&mut self) -> Vec<Request> {
        let (begun, mut out) = (self.begun(), Vec::new());
        let waiting: usize = self.entering.iter().skip(begun).map(|prompt| prompt.requests.len()).sum();
        let is_all = begun == 0 && self.slots.is_empty();
        let half = if is_all { waiting / 2 } else { waiting.div_ceil(2) };
        while self.pages_max.is_some() && out.len() < half {
            let Some(request) = self.pop_entering() else { break };
            out.push(request);
        }
        out
    }

    /// How many rows of each of the first prompts go along with the next cycle.
    pub(super) fn stretches(&self) -> Vec<usize> {
        let (mut rows, mut stretches) = (PREFILL_ROWS, Vec::new());
        // Each running request needs another page before long; who enters is to stay.
        let mut pages = self.pages_max.map(|max| max.saturating_sub(self.pages_needed() + self.slots.len()));
        for prompt in &self.entering {
            let (done, total) = (prompt.done(), prompt.tokens().len());
            if let Some(pages) = pages.as_mut().filter(|_| done == 0) {
                let needed = pages_of(prompt);
                let is_alone = self.slots.is_empty() && stretches.is_empty();
                if needed > *pages && !is_alone {
                    break;
                }
                *pages = pages.saturating_sub(needed);
            }
            let count = rows.min(total - done);
            rows -= count;
            stretches.push(count);
            if rows == 0 {
                break;
            }
        }
        stretches
    }
}

/// Pages of a prompt, and one for each of its requests to begin with.
fn pages_of(prompt: &Entering) -> usize {
    prompt.tokens().len().div_ceil(PAGE) + prompt.requests.len()
}
