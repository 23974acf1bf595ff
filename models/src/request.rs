//! A request: what its further tokens depend on, what the target made of it so far, and the answer it becomes.

use std::sync::Arc;

use kernels::NoiseKey;

use crate::cache::Cache;
use crate::target::Target;

/// A request outside of a decoder: all that its further tokens depend on, since its noise is keyed.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Group and sample, as admitted.
    pub group: usize,
    /// Sample within the group.
    pub sample: usize,
    /// Noise of the answer.
    pub noise: NoiseKey,
    /// Prompt and answer so far.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Log-probability of each answer token so far.
    pub log_probs: Vec<f32>,
}

/// Requests whose tokens are on their way through the target, a stretch a cycle; they begin behind them.
#[derive(Debug)]
pub(crate) struct Entering {
    /// At least one, with the same tokens.
    pub(crate) requests: Vec<Request>,
    /// Keys and values of the first tokens, and their hidden states.
    pub(crate) cache: Cache,
    pub(crate) hidden: Arc<Vec<f32>>,
}

impl Entering {
    /// Nothing of them has been through the target.
    pub(crate) fn new(requests: Vec<Request>) -> Self {
        Self { requests, cache: Cache::default(), hidden: Arc::default() }
    }

    /// All tokens but the last: those that go through the target before a request begins.
    pub(crate) fn tokens(&self) -> &[u32] {
        self.requests[0].tokens.split_last().map_or(&[], |(_, tokens)| tokens)
    }

    /// Tokens that have been through the target.
    pub(crate) fn done(&self) -> usize {
        self.cache.rows()
    }
}

/// A request in the middle of its answer, with the keys and values that the target made of it: it goes on in any decoder.
#[derive(Debug)]
pub struct Running {
    pub(crate) request: Request,
    /// Identity on its device.
    pub(crate) id: u64,
    /// Longest answer.
    pub(crate) limit: usize,
    pub(crate) cache: Cache,
    /// Hidden states that the group shares, and its own.
    pub(crate) shared_hidden: Arc<Vec<f32>>,
    pub(crate) hidden: Vec<f32>,
    /// The last token was one that ends an answer.
    pub(crate) ended: bool,
    /// Whose keys and values these are.
    pub(crate) target: Arc<Target>,
}

impl Running {
    /// `cache` and `hidden` are what the target made of all tokens but the last.
    pub(crate) fn new(
        request: Request,
        target: &Arc<Target>,
        tokens_max: usize,
        cache: Cache,
        hidden: Arc<Vec<f32>>,
    ) -> Self {
        let config = target.config();
        Self {
            id: 0,
            limit: tokens_max.min(config.positions_max - request.prompt),
            request,
            cache,
            shared_hidden: hidden,
            hidden: Vec::new(),
            ended: false,
            target: target.clone(),
        }
    }

    /// All that its further tokens depend on.
    #[must_use]
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Identity of the request on the device that it comes from.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn is_over(&self) -> bool {
        self.ended || self.request.log_probs.len() >= self.limit
    }

    /// The answer that it ended as, and the keys and values that are of no more use.
    pub(crate) fn answer(self) -> (Answer, Cache) {
        let Request { group, sample, noise, tokens, prompt, log_probs } = self.request;
        let parts = [self.shared_hidden.as_slice(), &self.hidden];
        let hidden = if self.hidden.is_empty() { Vec::new() } else { parts.concat() };
        let (id, truncated) = (self.id, !self.ended);
        (Answer { id, group, sample, noise, tokens, prompt, log_probs, truncated, hidden }, self.cache)
    }
}

/// A finished answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Identity of the request on its device.
    pub id: u64,
    /// Group of the request, as admitted.
    pub group: usize,
    /// Sample within the group.
    pub sample: usize,
    /// Noise of the answer.
    pub noise: NoiseKey,
    /// Prompt and answer, the end token included if there was one.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Log-probability of each answer token under `softmax(logits / T)` (T = 1 if greedy), of all tokens whatever the nucleus.
    pub log_probs: Vec<f32>,
    /// Whether the answer was cut at its longest allowed length.
    pub truncated: bool,
    /// Hidden states `(tokens - 1, width)` if kept, see [`Hidden::width`](crate::Hidden::width), else empty.
    pub hidden: Vec<f32>,
}
