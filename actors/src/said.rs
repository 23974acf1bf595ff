//! What was answered lately, for drafters that repeat it: a device that begins, in a run that goes on too, knows it at once.

use std::collections::VecDeque;

use models::Answer;
use serde::{Deserialize, Serialize};

/// Tokens kept, at most: half a megabyte in memory and about as much in a checkpoint. They serve a step that is done again, and data
/// that comes round within so many tokens.
const TOKENS_MAX: usize = 1 << 17;

/// Prompt and answer together, and the length of the prompt.
pub(crate) type Text = (Vec<u32>, usize);

/// The newest answers, the oldest first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Said(VecDeque<Text>);

impl Said {
    /// Takes in answers; the oldest leave when there are too many tokens.
    pub(crate) fn push(&mut self, answers: &[Answer]) {
        self.0.extend(answers.iter().map(|answer| (answer.tokens.clone(), answer.prompt)));
        let mut tokens: usize = self.0.iter().map(|(tokens, _)| tokens.len()).sum();
        while tokens > TOKENS_MAX {
            tokens -= self.0.pop_front().map_or(tokens, |(oldest, _)| oldest.len());
        }
    }

    /// So many of the newest.
    pub(crate) fn newest(&self, count: usize) -> Vec<Text> {
        self.0.range(self.0.len().saturating_sub(count)..).cloned().collect()
    }

    /// Answers that are kept.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use kernels::NoiseKey;

    use super::*;

    #[test]
    fn the_oldest_leave() {
        let noise = NoiseKey::new(0, 0, 0, 0, 0);
        let answer = |group: usize| Answer {
            id: 0,
            group,
            sample: 0,
            noise,
            tokens: vec![group as u32; TOKENS_MAX / 4],
            prompt: 1,
            log_probs: Vec::new(),
            truncated: false,
            hidden: Vec::new(),
        };
        let mut said = Said::default();
        (0..6).for_each(|group| said.push(&[answer(group)]));
        assert_eq!(said.len(), 4);
        let newest = |count| said.newest(count).iter().map(|(tokens, _)| tokens[0]).collect::<Vec<_>>();
        assert_eq!((newest(2), newest(9)), (vec![4, 5], vec![2, 3, 4, 5]));
    }
}
