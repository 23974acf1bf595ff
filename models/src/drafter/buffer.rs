//! What a drafter learns from: recent rollouts with the hidden states that decoding left behind, so that no forward of the
//! target is needed. Micro-batches are windows drawn at random, from long answers as many times as they hold windows. A quarter of
//! them are of the policy that is rolled out, whose long answers are still on their way, another quarter of the longest answers of
//! the policy before, the rest of all that is kept. Some rollouts are held out, to see what was learned.

mod example;
mod keep;

use std::collections::VecDeque;
use std::sync::Arc;

use super::suffix::hash;
use example::SHORTEST;
pub use example::{Example, Window};

/// Answers to one in so many prompts are held out, whenever they come: of what a sibling answered, a drafter knows too much.
const HELD_OUT_EVERY: u64 = 8;
/// Answers to one prompt that are held out; further ones would tell the same.
const HELD_OUT_SIBLINGS: u32 = 2;
/// Examples after which the first other prompt is held out, whatever its hash: versions are compared early.
const HELD_OUT_AFTER: usize = 8;
/// Tokens that are held out, those of the newest examples.
pub const HELD_OUT_TOKENS: usize = 1024;

/// Recent examples, bounded in tokens, and in bytes of their hidden states, with those that are held out. Clones share them.
#[derive(Debug, Default, Clone)]
pub struct Buffer {
    examples: VecDeque<Arc<Example>>,
    tokens: usize,
    tokens_max: usize,
    /// None: as many as the tokens have.
    bytes_max: Option<usize>,
    /// Not learned from, newest last.
    held_out: VecDeque<Arc<Example>>,
    /// Hash of a prompt that is held out because it came early.
    first_held_out: Option<u64>,
    /// The policy that is rolled out.
    policy: u32,
}

/// Parts of a micro-batch: of the policy that is rolled out, and of the longest answers of the one before. The rest is of all.
const OF_THIS: f64 = 0.25;
const OF_THE_LONGEST: f64 = 0.25;

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

    /// Examples from now on are those of the policy after so many steps. A step that is done again has the same one.
    pub fn begin_policy(&mut self, steps: u32) {
        self.policy = steps;
    }

    /// The policy that is rolled out.
    #[must_use]
    pub fn policy(&self) -> u32 {
        self.policy
    }

    /// Takes in an example, or as much of it as the buffer can hold; the oldest leave when there are too many tokens. Some are held
    /// out, by their prompt; never the first. One that is there already, because its step is done again, counts once.
    pub fn push(&mut self, example: Example) {
        if self.has(&example) {
            return;
        }
        let (prompt, example) = (hash(example.asked()), Example { policy: self.policy, ..example });
        let is_new = || self.examples.iter().all(|other| other.asked() != example.asked());
        let is_early = self.held_out.is_empty() && self.first_held_out.is_none();
        if is_early && self.examples.len() >= HELD_OUT_AFTER && is_new() {
            self.first_held_out = Some(prompt);
        }
        let is_chosen = is_held_out(prompt) || self.first_held_out == Some(prompt);
        if self.examples.is_empty() || !is_chosen {
            self.keep(example);
        } else if example.sample() < HELD_OUT_SIBLINGS {
            // Not those that ended first, which are the shortest.
            self.hold_out(example);
        }
    }

    /// Whether this example is there, or as much of it as is kept. Noise tells answers of a run apart; tokens those of no run.
    fn has(&self, example: &Example) -> bool {
        let is_it = |other: &Arc<Example>| other.noise == example.noise && example.tokens.starts_with(&other.tokens);
        self.examples.iter().chain(&self.held_out).any(is_it)
    }

    fn hold_out(&mut self, example: Example) {
        self.held_out.push_back(Arc::new(example));
        let tokens = |examples: &VecDeque<Arc<Example>>| examples.iter().skip(1).map(|e| e.tokens.len()).sum::<usize>();
        while tokens(&self.held_out) >= HELD_OUT_TOKENS {
            self.held_out.pop_front();
        }
        self.make_room();
    }

    fn keep(&mut self, mut example: Example) {
        let (length, width) = (example.tokens.len(), example.hidden.len() / (example.tokens.len() - 1));
        let most = self.most(width);
        if length > most {
            if most < SHORTEST {
                return;
            }
            example.tokens.truncate(most);
            example.hidden.truncate((most - 1) * width);
        }
        self.tokens += example.tokens.len();
        self.examples.push_back(Arc::new(example));
        self.make_room();
    }

    /// Tokens to learn from that it has room for, with hidden states of so many numbers each.
    fn most(&self, width: usize) -> usize {
        let held_out = self.held_out.iter().map(|example| example.tokens.len()).sum::<usize>();
        let in_bytes = |bytes: usize| (bytes / (width.max(1) * size_of::<f32>())).saturating_sub(held_out);
        self.tokens_max.min(self.bytes_max.map_or(usize::MAX, in_bytes))
    }

    fn make_room(&mut self) {
        let most = self.width().map_or(self.tokens_max, |width| self.most(width));
        while self.tokens > most {
            let Some(oldest) = self.examples.pop_front() else { break };
            self.tokens -= oldest.tokens.len();
        }
    }

    /// The same with room for so many tokens, and so many bytes of hidden states, if that is bounded.
    #[must_use]
    pub fn with_room(mut self, tokens_max: usize, bytes_max: Option<usize>) -> Self {
        (self.tokens_max, self.bytes_max) = (tokens_max, bytes_max);
        self.make_room();
        self
    }

    /// All that is held out, in windows of at most `tokens_max` tokens; a few hundred tokens more than [`HELD_OUT_TOKENS`].
    #[must_use]
    pub fn held_out(&self, tokens_max: usize) -> Vec<Window> {
        let step = tokens_max.max(SHORTEST) - (SHORTEST - 1);
        let windows = |example: &Arc<Example>| -> Vec<Window> {
            let length = example.tokens.len();
            // Guesses of an answer's tokens only; each is in one window.
            let first = example.prompt.saturating_sub(SHORTEST - 1);
            let last = length.min(first + HELD_OUT_TOKENS) - (SHORTEST - 1);
            let window = |start: usize| Window {
                example: example.clone(),
                tokens: start..(start + step).min(last) + SHORTEST - 1,
            };
            (first..last).step_by(step).map(window).collect()
        };
        self.held_out.iter().flat_map(windows).collect()
    }

    /// Tokens that can be guessed of what is held out of the policy at work.
    #[must_use]
    pub fn held_out_now(&self) -> usize {
        let now = self.held_out.iter().filter(|example| example.policy == self.policy);
        now.map(|example| example.tokens.len() - example.prompt.max(SHORTEST - 1)).sum()
    }

    /// Examples of one policy.
    fn of(&self, policy: u32) -> Vec<&Arc<Example>> {
        let newest_first = self.examples.iter().rev().skip_while(|e| e.policy > policy);
        newest_first.take_while(|e| e.policy == policy).collect()
    }

    /// The longest answers of the policy before this one: half of its tokens.
    fn longest_before(&self) -> Vec<&Arc<Example>> {
        // Steps of other kinds may have been between.
        let earlier = self.examples.iter().rev().map(|example| example.policy).find(|policy| *policy < self.policy);
        let mut before = earlier.map_or_else(Vec::new, |policy| self.of(policy));
        before.sort_by_key(|example| std::cmp::Reverse(example.tokens.len()));
        let tokens: usize = before.iter().map(|example| example.tokens.len()).sum();
        let mut sum = 0;
        let is_longer = |example: &&Arc<Example>| {
            sum += example.tokens.len();
            2 * (sum - example.tokens.len()) < tokens
        };
        before.into_iter().take_while(is_longer).collect()
    }

    /// Windows of together at most `tokens_max` tokens, at least one window, from numbers of 0 up to 1; none of an empty buffer.
    /// The window that did not fit is `left` for the next time.
    #[must_use]
    pub fn draw(&self, tokens_max: usize, left: &mut Option<Window>, mut uniform: impl FnMut() -> f64) -> Vec<Window> {
        let tokens_max = tokens_max.max(SHORTEST);
        if self.examples.is_empty() {
            return Vec::new();
        }
        let [all, this, longest] = [self.examples.iter().collect(), self.of(self.policy), self.longest_before()]
            .map(|e| Source::new(e, tokens_max));
        let source = |place: f64| match place {
            _ if place < OF_THIS && this.windows() > 0 => &this,
            _ if place >= 1.0 - OF_THE_LONGEST && longest.windows() > 0 => &longest,
            _ => &all,
        };
        let (mut drawn, mut tokens) = (Vec::new(), 0);
        loop {
            let window = left.take().unwrap_or_else(|| {
                let example = source(uniform()).at(uniform());
                window(example, tokens_max, uniform())
            });
            tokens += window.tokens.len();
            if tokens > tokens_max && !drawn.is_empty() {
                *left = Some(window);
                return drawn;
            }
            drawn.push(window);
        }
    }
}

/// Whether answers to a prompt of this hash are held out.
fn is_held_out(prompt: u64) -> bool {
    (prompt >> 32).is_multiple_of(HELD_OUT_EVERY)
}

/// Examples to draw from, and how many windows the first ones hold.
struct Source<'a> {
    examples: Vec<&'a Arc<Example>>,
    ends: Vec<usize>,
}

impl<'a> Source<'a> {
    fn new(examples: Vec<&'a Arc<Example>>, tokens_max: usize) -> Self {
        let ends = examples.iter().scan(0, |end, example| {
            *end += example.tokens.len().div_ceil(tokens_max);
            Some(*end)
        });
        Self { ends: ends.collect(), examples }
    }

    fn windows(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The example at a place of 0 up to 1 among all windows.
    fn at(&self, place: f64) -> &'a Arc<Example> {
        let at = (place * self.windows() as f64) as usize;
        self.examples[self.ends.partition_point(|end| *end <= at)]
    }
}

/// A window of an example: all of it, if it fits. Of a long one any stretch with tokens of the answer; those that would begin
/// before or end behind it begin or end with it, so that its ends are seen as often as its middle.
fn window(example: &Arc<Example>, tokens_max: usize, place: f64) -> Window {
    let length = example.tokens.len();
    let len = length.min(tokens_max);
    let first = example.prompt.saturating_sub(len / 2).min(length - len);
    let middle = first + (place * (length - first) as f64) as usize;
    let start = middle.saturating_sub(len / 2).clamp(first, length - len);
    Window { example: example.clone(), tokens: start..start + len }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kernels::NoiseKey;

    use super::*;

    fn example(length: usize) -> Example {
        let noise = NoiseKey::new(1, 0, 0, 0, 0);
        let policy = 0;
        Example { tokens: vec![length as u32; length], hidden: vec![0.0; length - 1], prompt: 1, noise, policy }
    }

    /// Micro-batches, one after the other.
    fn draws(buffer: &Buffer, count: u32, tokens_max: usize) -> Vec<Vec<Window>> {
        let mut left = None;
        let batch = |i: u32| {
            let (key, mut n) = (NoiseKey::new(3, 0, 0, 0, 0), 0);
            buffer.draw(tokens_max, &mut left, || {
                n += 1;
                key.uniform(i, n)
            })
        };
        (0..count).map(batch).collect()
    }

    #[test]
    fn the_oldest_leave_and_what_is_too_long_is_cut() {
        let mut buffer = Buffer::new(10);
        assert!(buffer.draw(8, &mut None, || 0.5).is_empty());
        [4, 5, 6].into_iter().for_each(|length| buffer.push(example(length)));
        assert_eq!(buffer.tokens(), 6);
        buffer.push(example(11));
        assert_eq!(buffer.tokens(), 10);
        assert_eq!((buffer.examples[0].tokens.len(), buffer.examples[0].hidden.len()), (10, 9));
        Buffer::new(2).push(example(5));
        // In bytes of hidden states, here a number a token; what is held out has its part of them.
        let bytes = |tokens: usize| Some(tokens * size_of::<f32>());
        let mut buffer = Buffer::new(1000).with_room(1000, bytes(20));
        [8, 9, 6].into_iter().for_each(|length| buffer.push(example(length)));
        assert_eq!(buffer.tokens(), 15);
        buffer.hold_out(example(7));
        buffer.push(example(5));
        assert_eq!(buffer.tokens(), 11, "13 are left");
        assert_eq!(buffer.with_room(1000, bytes(13)).tokens(), 5, "6 are left");
    }

    #[test]
    fn micro_batches_are_full_and_tokens_about_as_likely() {
        let mut buffer = Buffer::new(1000);
        [4, 5, 30].into_iter().for_each(|length| buffer.push(example(length)));
        let batches = draws(&buffer, 6_000, 12);
        let sizes = batches.iter().map(|b| b.iter().map(|w| w.tokens.len()).sum::<usize>());
        assert!(sizes.clone().all(|size| size <= 12));
        assert!(sizes.sum::<usize>() as f64 > 8.5 * 6_000.0, "two short ones, or a long one's window, or the like");
        let windows = || batches.iter().flatten();
        let short = windows().filter(|w| w.example.tokens.len() == 4).count() as f64;
        // Of five windows three are the long one's: 36 tokens, of which each is one of 30.
        let seen =
            |at: usize| windows().filter(|w| w.example.tokens.len() == 30 && w.tokens.contains(&at)).count() as f64;
        for at in [0, 1, 7, 15, 22, 28, 29] {
            assert!((0.4..2.2).contains(&(seen(at) / short)), "token {at}: {} and {short}", seen(at));
        }
        assert!(windows().filter(|w| w.example.tokens.len() < 12).all(|w| w.tokens == (0..w.example.tokens.len())));
        assert!(windows().all(|w| w.tokens.end <= w.example.tokens.len()));
    }

    #[test]
    fn the_policy_at_work_and_the_longest_before_it_have_their_parts() {
        let mut buffer = Buffer::new(1000);
        let share = |buffer: &Buffer, is: fn(usize) -> bool| {
            let windows: Vec<Window> = draws(buffer, 4_000, 64).into_iter().flatten().collect();
            windows.iter().filter(|w| is(w.example.tokens.len())).count() as f64 / windows.len() as f64
        };
        [20, 21, 22].into_iter().for_each(|length| buffer.push(example(length)));
        buffer.begin_policy(1);
        [30, 31, 62].into_iter().for_each(|length| buffer.push(example(length)));
        // Supervised steps came between.
        buffer.begin_policy(5);
        // Nothing has ended yet: a quarter is of the longest before, and an eighth of it in what is of all.
        let longest = share(&buffer, |length| length == 62);
        assert!((0.3..0.42).contains(&longest), "{longest}");
        [40, 41].into_iter().for_each(|length| buffer.push(example(length)));
        let (this, longest) = (share(&buffer, |length| length / 10 == 4), share(&buffer, |length| length == 62));
        assert!((0.3..0.42).contains(&this), "{this}");
        assert!((0.25..0.37).contains(&longest), "{longest}");
        let again = Buffer::from_raw(&buffer.to_raw().unwrap()).unwrap();
        assert_eq!((again.policy, again.of(5).len(), again.of(1).len()), (5, 2, 3));
    }

    #[test]
    fn a_step_that_is_done_again_counts_once() {
        let answer = |sample: u32, prompt: u32| Example {
            noise: NoiseKey::new(1, 0, 7, prompt, sample),
            ..self::answer(prompt, 100 + sample as usize)
        };
        let step = |buffer: &mut Buffer| {
            buffer.begin_policy(7);
            (0..20).for_each(|prompt| (0..3).for_each(|sample| buffer.push(answer(sample, prompt))));
        };
        let mut buffer = Buffer::new(1 << 20);
        step(&mut buffer);
        let count = |buffer: &Buffer| (buffer.examples.len(), buffer.held_out.len(), buffer.tokens(), buffer.policy());
        let before = count(&buffer);
        assert!(before.0 > 40 && before.1 > 0, "{before:?}");
        // Stopped, and gone on with from what was kept.
        let mut again = Buffer::from_raw(&buffer.to_raw().unwrap()).unwrap().with_room(1 << 20, None);
        step(&mut again);
        assert_eq!(count(&again), before);
        // One that was too long is there as far as it fits.
        let mut small = Buffer::new(50);
        (0..2).for_each(|_| small.push(answer(0, 1)));
        assert_eq!((small.examples.len(), small.tokens()), (1, 50));
        // Another answer, and the same one of another policy, are others.
        again.push(Example { tokens: vec![99; 100], ..answer(0, 1) });
        again.push(Example { noise: NoiseKey::new(1, 0, 8, 1, 0), ..answer(0, 1) });
        assert_eq!(count(&again).0, before.0 + 2);
    }

    #[test]
    fn versions_are_compared_early() {
        let mut buffer = Buffer::new(1 << 16);
        // Three answers to each prompt, of which none has a hash that would hold it out.
        let mut prompts = (0..).filter(|prompt| !is_held_out(hash(&[*prompt; 20])));
        let mut answers = |buffer: &mut Buffer| {
            let prompt = prompts.next().unwrap();
            let answer = |i| Example { noise: NoiseKey::new(1, 0, 0, prompt, i), ..self::answer(prompt, 100) };
            // Those that end first need not be those that are held out.
            (0..3).rev().for_each(|i| buffer.push(answer(i)));
            prompt
        };
        (0..3).for_each(|_| _ = answers(&mut buffer));
        assert!(buffer.held_out.is_empty());
        let first = answers(&mut buffer);
        assert_eq!((buffer.held_out.len(), buffer.examples.len()), (2, 9), "siblings together");
        answers(&mut buffer);
        assert_eq!((buffer.held_out.len(), buffer.examples.len()), (2, 12));
        let mut again = Buffer::from_raw(&buffer.to_raw().unwrap()).unwrap().with_room(1 << 16, None);
        again.push(answer(first, 100));
        assert_eq!(again.examples.len(), 12, "it is not learned from later, either");
    }

    fn answer(prompt: u32, length: usize) -> Example {
        Example { tokens: vec![prompt; length], prompt: 20, ..example(length) }
    }

    #[test]
    fn some_examples_are_held_out() {
        let mut buffer = Buffer::new(1 << 20);
        // Three answers to each prompt.
        let noise = |epoch: u32, i: usize| NoiseKey::new(1, 0, epoch, 0, i as u32 % 3);
        let answer = |epoch: u32, i: usize| Example { noise: noise(epoch, i), ..answer(i as u32 / 3, 100 + i) };
        (0..240).for_each(|i| buffer.push(answer(0, i)));
        assert!(buffer.held_out.iter().all(|e| e.sample() < HELD_OUT_SIBLINGS));
        let learned: Vec<usize> = buffer.examples.iter().map(|e| e.tokens.len()).collect();
        assert!((150..230).contains(&learned.len()), "{}", learned.len());
        let is_learned = |i: usize| learned.contains(&(100 + i));
        assert!((1..80).all(|g| is_learned(3 * g) == is_learned(3 * g + 2)), "siblings together");
        let prompts = |buffer: &Buffer| buffer.examples.iter().skip(3).map(|e| e.tokens[0]).collect::<BTreeSet<_>>();
        let before = prompts(&buffer);
        (3..240).for_each(|i| buffer.push(answer(1, i)));
        assert_eq!(prompts(&buffer), before, "the same in every epoch");
        let windows = buffer.held_out(30);
        assert!(windows.iter().all(|w| w.tokens.len() <= 30 && !learned.contains(&w.example.tokens.len())));
        for example in &buffer.held_out {
            let guessed = windows.iter().filter(|w| Arc::ptr_eq(&w.example, example));
            let guessed: Vec<usize> = guessed.flat_map(|w| w.tokens.start + 2..w.tokens.end).collect();
            assert_eq!(guessed, (20..example.tokens.len()).collect::<Vec<_>>(), "each token of the answer once");
        }
        let tokens: usize = buffer.held_out.iter().map(|e| e.tokens.len()).sum();
        assert!((HELD_OUT_TOKENS..HELD_OUT_TOKENS + 400).contains(&tokens), "{tokens}");
        buffer.held_out.clear();
        buffer.hold_out(example(40_000));
        assert!(buffer.held_out(256).iter().map(|w| w.tokens.len()).sum::<usize>() < 1_100);
    }

    #[test]
    fn windows_hold_tokens_of_the_answer() {
        let mut buffer = Buffer::new(1000);
        buffer.push(Example { prompt: 500, ..example(520) });
        for window in draws(&buffer, 500, 40).into_iter().flatten() {
            assert!(window.tokens.end > 500 && window.tokens.len() == 40, "{:?}", window.tokens);
        }
    }
}
