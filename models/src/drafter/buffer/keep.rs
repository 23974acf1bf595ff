//! A buffer as a checkpoint keeps it, so that a run that goes on teaches its drafter at once.

use std::sync::Arc;

use kernels::NoiseKey;

use super::{Buffer, Example, SHORTEST, hash, is_held_out};
use crate::load::RawWeights;

/// Tokens of the newest examples that are kept: enough for what is learned until there are new ones. All would be 150 MB for
/// SmolLM2, 600 with the taps of an `Eagle3`.
const TOKENS_MAX: usize = 8192;
/// Numbers of an example beside its tokens and hidden states: tokens, prompt, whether it is held out, policy, and halves of its
/// noise's words, each exact as a float.
const NUMBERS: usize = 4 + 8;

impl Buffer {
    /// The newest examples, and those held out: numbers by name. Nothing of an empty buffer.
    #[must_use]
    pub fn to_raw(&self) -> Option<RawWeights> {
        // The newest that fit: one that is longer than all of it leaves room for others.
        let mut left = TOKENS_MAX;
        let fits = |example: &&Arc<Example>| {
            let rest = left.checked_sub(example.tokens.len());
            left = rest.unwrap_or(left);
            rest.is_some()
        };
        let learned: Vec<_> = self.examples.iter().rev().filter(fits).collect();
        let learned = learned.into_iter().rev().map(|example| (example, false));
        let all: Vec<(&Arc<Example>, bool)> =
            learned.chain(self.held_out.iter().map(|example| (example, true))).collect();
        let width = self.width()?;
        let mut raw = RawWeights::default();
        let mut insert = |name: &str, width: usize, values: Vec<f32>| {
            raw.tensors.insert(name.into(), (vec![values.len() / width.max(1), width], values));
        };
        insert("examples", NUMBERS, all.iter().flat_map(|(example, held_out)| example.numbers(*held_out)).collect());
        insert("tokens", 1, all.iter().flat_map(|(example, _)| &example.tokens).map(|token| *token as f32).collect());
        insert("hidden", width, all.iter().flat_map(|(example, _)| &example.hidden).copied().collect());
        Some(raw)
    }

    /// Numbers a token of the hidden states that it holds, see [`Hidden::width`](crate::Hidden::width); nothing of an empty buffer.
    #[must_use]
    pub fn width(&self) -> Option<usize> {
        let first = self.examples.front().or(self.held_out.front())?;
        Some(first.hidden.len() / (first.tokens.len() - 1))
    }

    /// A buffer of what [`Buffer::to_raw`] kept, with room for more; nothing if that is of another shape.
    #[must_use]
    pub fn from_raw(raw: &RawWeights) -> Option<Self> {
        let values = |name: &str| raw.tensors.get(name).map(|(_, values)| values.as_slice());
        let width = *raw.tensors.get("hidden")?.0.last()?;
        let (mut tokens, mut hidden) = (values("tokens")?, values("hidden")?);
        let mut buffer = Self::new(usize::MAX);
        if raw.tensors.get("examples")?.0.last() != Some(&NUMBERS) {
            return None;
        }
        for numbers in values("examples")?.as_chunks::<NUMBERS>().0 {
            let [length, prompt, held_out, policy, halves @ ..] = numbers;
            let (length, prompt) = (*length as usize, *prompt as usize);
            if length < SHORTEST || prompt > length {
                return None;
            }
            let own = (tokens.split_off(..length)?, hidden.split_off(..(length - 1) * width)?);
            let word = |i: usize| halves[2 * i] as u32 | (halves[2 * i + 1] as u32) << 16;
            let noise = NoiseKey::from_words(std::array::from_fn(word));
            let example = Example {
                tokens: own.0.iter().map(|token| *token as u32).collect(),
                hidden: own.1.into(),
                prompt,
                noise,
                policy: *policy as u32,
            };
            buffer.policy = buffer.policy.max(example.policy);
            if *held_out == 0.0 { buffer.keep(example) } else { buffer.hold_out(example) }
        }
        let mut hashes = buffer.held_out.iter().map(|example| hash(example.asked()));
        buffer.first_held_out = hashes.find(|hash| !is_held_out(*hash));
        (tokens.is_empty() && hidden.is_empty()).then_some(buffer)
    }
}

impl Example {
    fn numbers(&self, held_out: bool) -> impl Iterator<Item = f32> {
        let halves = self.noise.to_words().into_iter().flat_map(|word| [(word & 0xffff) as f32, (word >> 16) as f32]);
        let own = [self.tokens.len() as f32, self.prompt as f32, f32::from(u8::from(held_out)), self.policy as f32];
        own.into_iter().chain(halves)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn buffer() -> Buffer {
        let mut buffer = Buffer::new(1 << 16);
        for i in 0..400_u32 {
            let length = 20 + i as usize % 30;
            let tokens: Vec<u32> = (0..length as u32).map(|at| i * 100 + at).collect();
            let hidden = (0..(length - 1) * 2).map(|at| (i * 7) as f32 + at as f32 * 0.125).collect();
            let noise = NoiseKey::new(u64::from(i) << 40 | 9, i, i * 3, !i, i % 2);
            buffer.push(Example { tokens, hidden, prompt: 4 + i as usize % 9, noise, policy: 0 });
            if i % 50 == 0 {
                buffer.begin_policy(buffer.policy() + 1);
            }
        }
        buffer
    }

    #[test]
    fn what_is_kept_comes_back() {
        let buffer = buffer();
        let again = Buffer::from_raw(&buffer.to_raw().unwrap()).unwrap();
        assert_eq!(again.held_out, buffer.held_out);
        assert_eq!((again.width(), Buffer::new(100).width()), (Some(2), None));
        let newest: VecDeque<Arc<Example>> =
            buffer.examples.iter().skip(buffer.examples.len() - again.examples.len()).cloned().collect();
        assert_eq!(again.examples, newest);
        assert!((TOKENS_MAX - 50..=TOKENS_MAX).contains(&again.tokens()), "{} tokens", again.tokens());
        assert!(Buffer::new(100).to_raw().is_none());
        // A smaller buffer keeps what is newest.
        let small = again.with_room(300, None);
        assert!(small.tokens() <= 300 && small.examples.back() == buffer.examples.back());
    }

    #[test]
    fn what_does_not_fit_is_nothing() {
        let whole = buffer().to_raw().unwrap();
        for name in ["examples", "tokens", "hidden"] {
            let mut raw = whole.clone();
            raw.tensors.get_mut(name).unwrap().1.truncate(NUMBERS * 10);
            assert!(Buffer::from_raw(&raw).is_none(), "{name} is cut");
            raw.tensors.remove(name);
            assert!(Buffer::from_raw(&raw).is_none(), "{name} is missing");
        }
    }
}
