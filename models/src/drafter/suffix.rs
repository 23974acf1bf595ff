//! Drafts what followed the last tokens before: in the request itself, in its siblings, in earlier answers to the prompt.
//!
//! Each text is read once, as it grows. Every `match_min` tokens in a row (a *gram*) lead to the newest place where they
//! stand, and from there to older ones: a draft costs a bounded number of comparisons, however long the texts are.

use std::collections::BTreeMap;

use state::plan::Strategy;

use super::{Context, Drafter};
use crate::error::Result;
use state::speculation::DraftTree;

/// Answers kept for a prompt, beside those in flight.
const ENDED_MAX: usize = 16;
/// Tokens kept for all prompts; those used longest ago leave first.
const TOKENS_MAX: usize = 1 << 20;
/// Places compared for a draft, newest first.
const PLACES_MAX: usize = 32;

/// The suffix drafter: longest match of the last tokens.
#[derive(Debug)]
pub struct Suffix {
    match_min: usize,
    match_max: usize,
    prompts: BTreeMap<Vec<u32>, Texts>,
    /// Number of drafts so far: dates the use of prompts.
    now: u64,
}

/// Prompt and answer of each sample, and where their grams stand.
#[derive(Debug, Default)]
struct Texts {
    /// By serial number.
    texts: BTreeMap<usize, Text>,
    /// Serial numbers of the requests in flight.
    running: BTreeMap<u64, usize>,
    next: usize,
    /// By the hash of the gram.
    newest: BTreeMap<u64, Place>,
    used: u64,
}

#[derive(Debug, Default)]
struct Text {
    tokens: Vec<u32>,
    /// For each end of a gram, the place before it with the same one.
    before: Vec<Option<Place>>,
}

/// A gram: the last of the tokens before `end` of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    text: usize,
    end: usize,
}

impl Suffix {
    /// Drafts from matches of `match_min..=match_max` tokens.
    #[must_use]
    pub fn new(match_min: usize, match_max: usize) -> Self {
        let match_min = match_min.max(1);
        Self { match_min, match_max: match_max.max(match_min), prompts: BTreeMap::new(), now: 0 }
    }

    fn read(&mut self, id: u64, tokens: &[u32], prompt: usize) -> &mut Texts {
        if !self.prompts.contains_key(&tokens[..prompt]) {
            self.prompts.insert(tokens[..prompt].to_vec(), Texts::default());
        }
        let Some(texts) = self.prompts.get_mut(&tokens[..prompt]) else { unreachable!("it was just put there") };
        texts.used = self.now;
        texts.read(id, tokens, self.match_min);
        texts
    }

    fn draft_one(&self, request: &Context<'_>, depth: usize) -> DraftTree {
        let Some(texts) = self.prompts.get(&request.tokens[..request.prompt]) else { return DraftTree::default() };
        let (length, follows) = texts.longest_match(request.tokens, self.match_min, self.match_max);
        // The longer the match, the further it is likely to go on.
        DraftTree::chain(follows.iter().take(depth.min(request.depth_max).min(length)).copied().collect())
    }

    /// Prompts without requests in flight leave, those used longest ago first, until the rest fits.
    fn forget(&mut self) {
        let mut tokens: usize = self.prompts.values().map(Texts::tokens).sum();
        while tokens > TOKENS_MAX {
            let idle = self.prompts.iter().filter(|(_, texts)| texts.running.is_empty());
            let Some(oldest) = idle.min_by_key(|(_, texts)| texts.used).map(|(prompt, _)| prompt.clone()) else {
                break;
            };
            tokens -= self.prompts.remove(&oldest).map_or(0, |texts| texts.tokens());
        }
    }
}

impl Texts {
    fn tokens(&self) -> usize {
        self.texts.values().map(|text| text.tokens.len()).sum()
    }

    /// Takes in what is new of a request.
    fn read(&mut self, id: u64, tokens: &[u32], gram: usize) {
        let known = self.running.get(&id).filter(|serial| self.texts[serial].tokens.len() <= tokens.len()).copied();
        let serial = known.unwrap_or_else(|| {
            // Not met before, or another request by the name of one whose end was not told.
            self.next += 1;
            self.running.insert(id, self.next);
            self.next
        });
        let text = self.texts.entry(serial).or_default();
        let known = text.tokens.len();
        text.tokens.extend_from_slice(&tokens[known..]);
        text.before.resize(tokens.len() + 1, None);
        for end in (known + 1).max(gram)..=tokens.len() {
            text.before[end] = self.newest.insert(hash(&tokens[end - gram..end]), Place { text: serial, end });
        }
    }

    /// Length of the longest match of the last tokens, and what follows it there; the newest place wins a tie.
    fn longest_match(&self, tokens: &[u32], gram: usize, match_max: usize) -> (usize, &[u32]) {
        let mut best: (usize, &[u32]) = (gram - 1, &[]);
        let last = tokens.len().checked_sub(gram).map(|start| hash(&tokens[start..]));
        let mut place = last.and_then(|hash| self.newest.get(&hash)).copied();
        for _ in 0..PLACES_MAX {
            // A place may lead to a text that has left; older ones mostly have too.
            let Some((here, text)) = place.and_then(|here| Some((here, self.texts.get(&here.text)?))) else { break };
            let same = tokens.iter().rev().zip(text.tokens[..here.end].iter().rev()).take(match_max);
            let same = same.take_while(|(a, b)| a == b).count();
            // Nothing follows where the request itself stands.
            if same > best.0 && here.end < text.tokens.len() {
                best = (same, &text.tokens[here.end..]);
            }
            place = text.before[here.end];
        }
        if best.1.is_empty() { (0, &[]) } else { best }
    }

    /// The request is not in flight any more; the oldest ended answer makes room.
    fn end(&mut self, id: u64) {
        self.running.remove(&id);
        let is_running = |serial: &&usize| self.running.values().any(|running| running == *serial);
        if self.texts.len() > ENDED_MAX + self.running.len() {
            let oldest = self.texts.keys().find(|serial| !is_running(serial)).copied();
            oldest.map(|serial| self.texts.remove(&serial));
            let texts = &self.texts;
            self.newest.retain(|_, place| texts.contains_key(&place.text));
        }
    }
}

/// FNV-1a over whole tokens. A collision costs a comparison.
fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |h, token| (h ^ u64::from(*token)).wrapping_mul(0x100_0000_01b3))
}

impl Drafter for Suffix {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        self.now += 1;
        for request in requests {
            self.read(request.id, request.tokens, request.prompt);
        }
        Ok(requests.iter().map(|r| self.draft_one(r, strategy.depth.min(strategy.budget))).collect())
    }

    fn ended(&mut self, id: u64, tokens: &[u32], prompt: usize) {
        self.read(id, tokens, prompt).end(id);
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::NoiseKey;

    /// What the index is to find, by looking everywhere: the longest match, of the newest of equal ones in one text.
    fn by_looking(tokens: &[u32], match_min: usize, match_max: usize) -> usize {
        let same = |end: usize| {
            let pairs = tokens.iter().rev().zip(tokens[..end].iter().rev()).take(match_max);
            pairs.take_while(|(a, b)| a == b).count()
        };
        (1..tokens.len()).map(same).filter(|same| *same >= match_min).max().unwrap_or(0)
    }

    fn request(tokens: &[u32]) -> Context<'_> {
        let noise = NoiseKey::new(0, 0, 0, 0, 0);
        Context { id: 7, tokens, prompt: 1, hidden: [&[], &[]], noise, temperature: 1.0, depth_max: 99 }
    }

    #[test]
    fn the_index_finds_the_longest_match() {
        let strategy = Strategy::chain(0, 99);
        for seed in 0..20 {
            let key = NoiseKey::new(seed, 5, 0, 0, 0);
            let (mut suffix, mut tokens) = (Suffix::new(2, 6), vec![0]);
            for at in 0..60 {
                tokens.push((key.uniform(at, 0) * 3.0) as u32);
                let drafted = suffix.draft(&[request(&tokens)], &strategy).unwrap().remove(0);
                let expected = by_looking(&tokens, 2, 6);
                assert_eq!(drafted.is_empty(), expected == 0, "{tokens:?}");
                assert!(drafted.len() <= expected, "{tokens:?}");
                let (length, follows) = suffix.prompts[&[0][..]].longest_match(&tokens, 2, 6);
                assert_eq!(length, expected, "{tokens:?}");
                assert!(follows.starts_with(&drafted.tokens));
            }
        }
    }

    #[test]
    fn siblings_and_earlier_answers_are_found_and_the_oldest_forgotten() {
        let strategy = Strategy::chain(0, 4);
        let mut suffix = Suffix::new(2, 6);
        suffix.ended(1, &[9, 1, 2, 3, 4, 5], 1);
        let draft = |suffix: &mut Suffix, tokens: &[u32]| {
            let request = Context { id: 100, ..request(tokens) };
            let drafted = suffix.draft(&[request], &strategy).unwrap().remove(0).tokens;
            suffix.ended(100, tokens, 1);
            drafted
        };
        assert_eq!(draft(&mut suffix, &[9, 7, 2, 3]), [4, 5]);
        assert_eq!(draft(&mut suffix, &[8, 7, 2, 3]), [0u32; 0], "another prompt");
        for id in 2..40 {
            suffix.ended(id, &[9, 6, 6, id as u32 + 50], 1);
        }
        assert_eq!(draft(&mut suffix, &[9, 7, 2, 3]), [0u32; 0]);
        assert!(suffix.prompts[&[9][..]].texts.len() <= ENDED_MAX + 1);
    }
}
