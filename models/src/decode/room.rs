//! Which prompts enter, and who has to wait, so that keys and values stay within their memory.

use super::Decoder;
use crate::cache::{Cache, PAGE};
use crate::request::{Entering, Request, Running};

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

    /// Gives back memory that no request needs: prompts that went through the target lately, and free pages.
    pub fn trim(&mut self) {
        while self.prompts.forget(&mut self.pages) {}
        self.pages.keep_free(0);
    }

    /// Tokens that there is memory in use for: their keys and values, and the rest of their pages.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        let running = self.slots.iter().map(|slot| &slot.cache).chain(self.prompts.caches());
        Cache::pages_of(running.chain(self.entering.iter().map(|prompt| &prompt.cache))) * PAGE
    }

    /// Pages that are in use, that prompts on their way will need, and one more for each running request.
    fn pages_needed(&self) -> usize {
        let entering = self.entering.iter().filter(|prompt| prompt.done() > 0);
        let to_come: usize = entering.map(|prompt| pages_of(prompt) - prompt.cache.pages()).sum();
        self.cached_tokens() / PAGE + to_come + self.slots.len()
    }

    /// Their tokens, the same in all, are to go through the target, the last one left out; then the requests begin.
    pub(super) fn enter(&mut self, requests: Vec<Request>) {
        if requests.is_empty() {
            return;
        }
        // Where memory is limited, who is on the way has its room already.
        let may_join = |prompt: &&mut Entering| prompt.done() == 0 || self.pages_max.is_none();
        match self.entering.iter_mut().filter(may_join).find(|prompt| prompt.requests[0].tokens == requests[0].tokens) {
            Some(prompt) => prompt.requests.extend(requests),
            None => self.entering.push_back(Entering::new(requests)),
        }
        self.settle();
    }

    /// After requests came or ended: whoever can begins, also for what is known of its prompt.
    pub(super) fn settle(&mut self) {
        self.begin();
        self.recall();
        self.begin();
        self.forget_prompts();
    }

    /// Requests whose prompt has been through the target begin, in the order of their admission.
    fn begin(&mut self) {
        while self.entering.front().is_some_and(|prompt| prompt.done() == prompt.tokens().len()) {
            let Some(prompt) = self.entering.pop_front() else { return };
            if prompt.requests[0].log_probs.is_empty() {
                self.prompts.keep(prompt.tokens(), (&prompt.cache, &prompt.hidden), &mut self.pages);
            }
            let Entering { requests, cache, hidden } = prompt;
            for request in requests {
                let tokens_max = self.decoding.tokens_max;
                self.push(Running::new(request, &self.target, tokens_max, cache.clone(), hidden.clone()));
            }
        }
    }

    /// What is known of prompts that have yet to enter, from others before them; where memory is limited, in their order, as long as
    /// there is room.
    fn recall(&mut self) {
        let width = self.decoding.hidden.width(self.target.config());
        for i in 0..self.entering.len() {
            let prompt = &self.entering[i];
            if prompt.done() > 0 {
                continue;
            }
            let found = self
                .prompts
                .find(prompt.tokens())
                .filter(|found| self.room().is_none_or(|pages| pages_of(prompt) - found.pages() <= pages));
            match found {
                Some(found) => (self.entering[i].cache, self.entering[i].hidden) = self.prompts.take(found, width),
                None if self.pages_max.is_some() => break,
                None => {}
            }
        }
    }

    /// Pages for who enters and is to stay: each running request needs another one before long. Nothing: no limit.
    fn room(&self) -> Option<usize> {
        self.pages_max.map(|max| max.saturating_sub(self.pages_needed() + self.slots.len()))
    }

    /// Forgets earlier prompts where running requests need their pages, or the next to enter needs those that nobody else has.
    fn forget_prompts(&mut self) {
        let Some(max) = self.pages_max else { return };
        while self.pages_needed() > max && self.prompts.forget(&mut self.pages) {}
        let Some(next) = self.entering.iter().find(|prompt| prompt.done() == 0).map(pages_of) else { return };
        while self.room() < Some(next) && self.prompts.forget_own(&mut self.pages) {}
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
        let mut pages = self.room();
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
