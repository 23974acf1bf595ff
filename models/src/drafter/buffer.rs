//! What a drafter learns from: recent rollouts with the hidden states that decoding left behind, so that no forward of the
//! target is needed. Micro-batches are windows drawn at random: every token is as likely to be seen, long answers as much as
//! their length is worth, and no order of lengths or ages shapes what is learned.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::decode::Answer;

/// An answer: its tokens, and the target's hidden states of all but the last.
#[derive(Debug, PartialEq)]
pub struct Example {
    pub(crate) tokens: Vec<u32>,
    pub(crate) hidden: Vec<f32>,
    /// Length of the prompt, which is not drafted.
    pub(crate) prompt: usize,
}

/// A stretch of an example. Its tokens keep their positions.
#[derive(Debug, Clone)]
pub struct Window {
    pub(crate) example: Arc<Example>,
    pub(crate) tokens: Range<usize>,
}

/// Shortest window: one guess, the token and the hidden state it is made from, and the token that it should be.
const SHORTEST: usize = 3;

impl Example {
    /// What an answer teaches; nothing if it has no hidden states or is too short.
    #[must_use]
    pub fn of(answer: &Answer) -> Option<Self> {
        let is_useful = !answer.hidden.is_empty() && answer.tokens.len() >= SHORTEST;
        let (tokens, hidden) = (&answer.tokens, &answer.hidden);
        is_useful.then(|| Self { tokens: tokens.clone(), hidden: hidden.clone(), prompt: answer.prompt })
    }

    /// All of it.
    #[must_use]
    pub fn whole(self: &Arc<Self>) -> Window {
        Window { example: self.clone(), tokens: 0..self.tokens.len() }
    }
}

/// Recent examples, bounded in tokens.
#[derive(Debug, Default)]
pub struct Buffer {
    examples: VecDeque<Arc<Example>>,
    tokens: usize,
    tokens_max: usize,
}

impl Buffer {
    /// An empty buffer.
    #[must_use]
    pub fn new(tokens_max: usize) -> Self {
        Self { tokens_max, ..Self::default() }
    }

    /// Tokens that it holds.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes in an example; the oldest leave when there are too many tokens.
    pub fn push(&mut self, example: Example) {
        self.tokens += example.tokens.len();
        self.examples.push_back(Arc::new(example));
        while self.tokens > self.tokens_max {
            let Some(oldest) = self.examples.pop_front() else { break };
            self.tokens -= oldest.tokens.len();
        }
    }

    /// Windows of together at most `tokens_max` tokens (at least one window), from numbers of 0 up to 1; none of an empty
    /// buffer.
    #[must_use]
    pub fn draw(&self, tokens_max: usize, mut uniform: impl FnMut() -> f64) -> Vec<Window> {
        let (mut windows, mut left) = (Vec::new(), tokens_max.max(SHORTEST));
        while left >= SHORTEST {
            let Some(window) = self.window(left, [uniform(), uniform()]) else { break };
            // What does not fit is left for the next micro-batch, rather than cut where chance has it.
            if !windows.is_empty() && window.tokens.len() < window.example.tokens.len().min(tokens_max) {
                break;
            }
            left -= window.tokens.len();
            windows.push(window);
        }
        windows
    }

    fn window(&self, tokens_max: usize, [which, place]: [f64; 2]) -> Option<Window> {
        let mut at = (which * self.tokens as f64) as usize;
        let example = self.examples.iter().find(|example| {
            let is_it = at < example.tokens.len();
            at = at.saturating_sub(example.tokens.len());
            is_it
        })?;
        let len = example.tokens.len().min(tokens_max);
        let start = (place * (example.tokens.len() - len + 1) as f64) as usize;
        Some(Window { example: example.clone(), tokens: start..start + len })
    }
}

#[cfg(test)]
mod tests {
    use kernels::NoiseKey;

    use super::*;

    fn example(length: usize) -> Example {
        Example { tokens: vec![length as u32; length], hidden: vec![0.0; length - 1], prompt: 1 }
    }

    fn draws(buffer: &Buffer, count: u32, tokens_max: usize) -> Vec<Vec<Window>> {
        let batch = |i: u32| {
            let (key, mut n) = (NoiseKey::new(3, 0, 0, 0, 0), 0);
            buffer.draw(tokens_max, || {
                n += 1;
                key.uniform(i, n)
            })
        };
        (0..count).map(batch).collect()
    }

    #[test]
    fn the_oldest_leave() {
        let mut buffer = Buffer::new(10);
        assert!(buffer.draw(8, || 0.5).is_empty());
        [4, 5, 6].into_iter().for_each(|length| buffer.push(example(length)));
        assert_eq!(buffer.tokens(), 6);
        buffer.push(example(11));
        assert_eq!(buffer.tokens(), 0, "it does not fit at all");
    }

    #[test]
    fn micro_batches_are_full_and_whole_answers_where_these_fit() {
        let mut buffer = Buffer::new(1000);
        [4, 5, 30].into_iter().for_each(|length| buffer.push(example(length)));
        let batches = draws(&buffer, 3_000, 12);
        assert!(batches.iter().all(|b| (1..=12).contains(&b.iter().map(|w| w.tokens.len()).sum::<usize>())));
        let all = || batches.iter().flatten();
        assert!(all().filter(|w| w.example.tokens.len() < 12).all(|w| w.tokens == (0..w.example.tokens.len())));
        let starts: std::collections::BTreeSet<usize> = all().map(|w| w.tokens.start).collect();
        assert_eq!(starts, (0..=18).collect(), "windows of the long one begin everywhere");
        assert!(all().all(|w| w.tokens.end <= w.example.tokens.len()));
    }
}
