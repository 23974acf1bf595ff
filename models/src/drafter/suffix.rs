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
    /// Tokens of all texts.
    tokens: usize,
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
        Self { match_min, match_max: match_max.max(match_min), prompts: BTreeMap::new(), tokens: 0, now: 0 }
    }

    fn read(&mut self, id: u64, tokens: &[u32], prompt: usize) -> &mut Texts {
        if !self.prompts.contains_key(&tokens[..prompt]) {
            self.prompts.insert(tokens[..prompt].to_vec(), Texts::default());
        }
        let Some(texts) = self.prompts.get_mut(&tokens[..prompt]) else { unreachable!("it was just put there") };
        texts.used = self.now;
        self.tokens += texts.read(id, tokens, self.match_min);
        texts
    }

    fn draft_one(&self, request: &Context<'_>, depth: usize) -> DraftTree {
        let Some(texts) = self.prompts.get(&request.tokens[..request.prompt]) else { return DraftTree::default() };
        let Some((length, place)) = texts.longest_match(request.tokens, self.match_min, self.match_max) else {
            return DraftTree::default();
        };
        // The longer the match, the further it is likely to go on.
        DraftTree::chain(texts.follows(place, request.id, depth.min(request.depth_max).min(length)))
    }

    /// Prompts without requests in flight leave, those used longest ago first, until the rest fits.
    fn forget(&mut self) {
        while self.tokens > TOKENS_MAX {
            let idle = self.prompts.iter().filter(|(_, texts)| texts.running.is_empty());
            let Some(oldest) = idle.min_by_key(|(_, texts)| texts.used).map(|(prompt, _)| prompt.clone()) else {
                break;
            };
            self.tokens -= self.prompts.remove(&oldest).map_or(0, |texts| texts.tokens());
        }
    }
}

/// Cuts the longest chains until there are at most so many tokens.
fn shorten(chains: &mut [DraftTree], budget_all: usize) {
    let mut lengths: Vec<usize> = chains.iter().map(DraftTree::len).collect();
    lengths.sort_unstable();
    // The shorter ones stay whole as long as the others can be as long.
    let (mut left, mut count) = (budget_all, lengths.len());
    for length in lengths {
        if length * count > left {
            break;
        }
        (left, count) = (left - length, count - 1);
    }
    let Some(longest) = left.checked_div(count) else { return };
    for chain in chains {
        chain.tokens.truncate(longest);
        chain.parents.truncate(longest);
    }
}

impl Texts {
    fn tokens(&self) -> usize {
        self.texts.values().map(|text| text.tokens.len()).sum()
    }

    /// Takes in what is new of a request; returns how many tokens.
    fn read(&mut self, id: u64, tokens: &[u32], gram: usize) -> usize {
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
        tokens.len() - known
    }

    /// Length and end of the longest match of the last tokens; the newest place wins a tie.
    fn longest_match(&self, tokens: &[u32], gram: usize, match_max: usize) -> Option<(usize, Place)> {
        let mut best = None;
        let last = tokens.len().checked_sub(gram).map(|start| hash(&tokens[start..]));
        let mut place = last.and_then(|hash| self.newest.get(&hash)).copied();
        for _ in 0..PLACES_MAX {
            // A place may lead to a text that has left; older ones mostly have too.
            let Some((here, text)) = place.and_then(|here| Some((here, self.texts.get(&here.text)?))) else { break };
            let same = tokens.iter().rev().zip(text.tokens[..here.end].iter().rev()).take(match_max);
            let same = same.take_while(|(a, b)| a == b).count();
            // Nothing follows where the request itself stands. What hashes alike may be another gram.
            if here.end < text.tokens.len() && same >= gram && best.is_none_or(|(length, _)| same > length) {
                best = Some((same, here));
            }
            place = text.before[here.end];
        }
        best
    }

    /// Up to `count` tokens from a place on. Where that is in the request itself, its end is followed by what is drafted: a
    /// loop goes on as a loop.
    fn follows(&self, place: Place, id: u64, count: usize) -> Vec<u32> {
        let text = &self.texts[&place.text].tokens[place.end..];
        let is_own = self.running.get(&id) == Some(&place.text);
        let count = if is_own { count } else { count.min(text.len()) };
        (0..count).map(|i| text[i % text.len()]).collect()
    }

    /// The request is not in flight any more; the oldest ended answer makes room. Returns how many tokens left.
    fn end(&mut self, id: u64) -> usize {
        self.running.remove(&id);
        let is_running = |serial: &&usize| self.running.values().any(|running| running == *serial);
        if self.texts.len() <= ENDED_MAX + self.running.len() {
            return 0;
        }
        let oldest = self.texts.keys().find(|serial| !is_running(serial)).copied();
        let Some((serial, text)) = oldest.and_then(|serial| Some((serial, self.texts.remove(&serial)?))) else {
            return 0;
        };
        self.newest.retain(|_, place| {
            // Older places of its grams stay.
            while place.text == serial {
                let Some(before) = text.before[place.end] else { return false };
                *place = before;
            }
            true
        });
        text.tokens.len()
    }
}

/// FNV-1a over whole tokens. A collision costs a comparison.
pub(super) fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |h, token| (h ^ u64::from(*token)).wrapping_mul(0x100_0000_01b3))
}

impl Drafter for Suffix {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        self.now += 1;
        for request in requests {
            self.read(request.id, request.tokens, request.prompt);
        }
        let mut chains: Vec<DraftTree> =
            requests.iter().map(|r| self.draft_one(r, strategy.depth.min(strategy.budget))).collect();
        if strategy.budget_all > 0 {
            shorten(&mut chains, strategy.budget_all);
        }
        Ok(chains)
    }

    fn recall(&mut self, tokens: &[u32], prompt: usize) {
        let texts = self.prompts.get(&tokens[..prompt]);
        if !texts.is_some_and(|texts| texts.texts.values().any(|text| text.tokens == tokens)) {
            // No request has this identity.
            self.ended(u64::MAX, tokens, prompt);
        }
    }

    fn left(&mut self, id: u64) {
        for texts in self.prompts.values_mut().filter(|texts| texts.running.contains_key(&id)) {
            self.tokens -= texts.end(id);
        }
    }

    fn ended(&mut self, id: u64, tokens: &[u32], prompt: usize) {
        let gone = self.read(id, tokens, prompt).end(id);
        self.tokens -= gone;
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::{Draws, NoiseKey};

    /// What the index is to find, by looking everywhere: the longest match, of the newest of equal ones in one text.
    fn by_looking(tokens: &[u32], match_min: usize, match_max: usize) -> usize {
        let same = |end: usize| {
            let pairs = tokens.iter().rev().zip(tokens[..end].iter().rev()).take(match_max);
            pairs.take_while(|(a, b)| a == b).count()
        };
        (1..tokens.len()).map(same).filter(|same| *same >= match_min).max().unwrap_or(0)
    }

    #[test]
    fn the_longest_chains_are_cut_to_the_budget_of_all() {
        let shortened = |budget_all: usize| {
            let mut chains = [5, 1, 0, 9].map(|length| DraftTree::chain(vec![7; length]));
            shorten(&mut chains, budget_all);
            chains.map(|chain| chain.len())
        };
        assert_eq!([shortened(15), shortened(14)], [[5, 1, 0, 9], [5, 1, 0, 8]]);
        assert_eq!([shortened(10), shortened(3), shortened(1)], [[4, 1, 0, 4], [1, 1, 0, 1], [0, 0, 0, 0]]);
    }

    fn request(tokens: &[u32]) -> Context<'_> {
        let noise = NoiseKey::new(0, 0, 0, 0, 0);
        let hidden: [&[f32]; 2] = [&[], &[]];
        Context {
            id: 7,
            tokens,
            prompt: 1,
            hidden,
            noise,
            draws: Draws { temperature: 1.0, top_p: 1.0 },
            depth_max: 99,
            remainder: 1.0,
            proposal: &[],
        }
    }

    #[test]
    fn what_is_known_is_not_taken_in_again() {
        let mut suffix = Suffix::new(2, 6);
        suffix.recall(&[0, 1, 2, 3], 1);
        suffix.ended(3, &[0, 1, 2, 4], 1);
        let tokens = suffix.tokens;
        suffix.recall(&[0, 1, 2, 3], 1);
        suffix.recall(&[0, 1, 2, 4], 1);
        assert_eq!((suffix.tokens, tokens), (8, 8));
        suffix.recall(&[0, 1, 2, 5], 1);
        assert_eq!(suffix.tokens, 12);
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
                let found = suffix.prompts[&[0][..]].longest_match(&tokens, 2, 6);
                assert_eq!(found.map_or(0, |(length, _)| length), expected, "{tokens:?}");
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
        assert_eq!(draft(&mut suffix, &[9, 7, 6, 7, 6, 7, 6]), [7, 6, 7, 6], "a loop");
        assert_eq!(suffix.tokens, suffix.prompts.values().map(Texts::tokens).sum::<usize>());
        assert!(suffix.prompts[&[9][..]].texts.len() <= ENDED_MAX + 1);
    }
}
