//! Rollouts played again from recorded cycles: numbers only, so that every controller meets the same.

use std::collections::BTreeMap;

use actors::CycleStats;
use kernels::NoiseKey;
use state::plan::{self, Strategy};
use state::speculation::controller::bucket;
use state::speculation::{Controller, Measured};

/// Separates the noise of choices from others.
const CHOICES: u32 = 10;

/// What was recorded at one age of the drafter: cycles of plain decoding, then of each strategy, by batch size.
pub(super) struct Age(Vec<BTreeMap<usize, Vec<Measured>>>);

/// Rollouts to be played again.
pub(super) struct Replay {
    /// Of the answers, in tokens.
    pub(super) lengths: Vec<usize>,
    pub(super) ages: Vec<Age>,
    pub(super) strategies: Vec<Strategy>,
    /// Answers decoded together, at most.
    pub(super) slots: usize,
    pub(super) rollouts: usize,
}

impl Age {
    /// Of the cycles of each way. Those that prompts went along with tell little of a strategy.
    pub(super) fn new<'a>(ways: impl Iterator<Item = &'a [CycleStats]>) -> Self {
        let by_batch = |cycles: &[CycleStats]| {
            let mut all: BTreeMap<usize, Vec<Measured>> = BTreeMap::new();
            let is_short = cycles.iter().all(|m| m.prefilled > 0);
            for m in cycles.iter().filter(|m| m.requests > 0 && (m.prefilled == 0 || is_short)) {
                let CycleStats { requests, rows, promised, seconds, draft_s, .. } = *m;
                let (tokens, catch_up_s) = (m.tokens as u64, 0.0);
                let measured = Measured { tokens, promised, requests, rows, seconds, draft_s, catch_up_s };
                all.entry(requests).or_default().push(measured);
            }
            all
        };
        Self(ways.map(by_batch).collect())
    }

    pub(super) fn cycles(&self) -> usize {
        self.0.iter().flat_map(BTreeMap::values).map(Vec::len).sum()
    }

    /// Cycles of a way at the recorded batch size that is nearest.
    fn near(&self, way: usize, batch: usize) -> (usize, &[Measured]) {
        let nearest = self.0[way].iter().min_by_key(|(recorded, _)| recorded.abs_diff(batch));
        nearest.map_or((0, &[]), |(batch, cycles)| (*batch, cycles.as_slice()))
    }

    /// The fastest way in the bucket of a batch size, the first of equal ones; plain decoding, which is 0, where nothing was recorded.
    pub(super) fn best(&self, batch: usize) -> usize {
        let rate = |way: &usize| {
            let here = self.0[*way].iter().filter(|(recorded, _)| bucket(**recorded) == bucket(batch));
            let (tokens, seconds) = here
                .flat_map(|(_, cycles)| cycles)
                .fold((0.0, 0.0), |(tokens, seconds), m| (tokens + m.tokens as f64, seconds + m.seconds));
            if seconds > 0.0 { tokens / seconds } else { 0.0 }
        };
        (0..self.0.len()).rev().max_by(|a, b| rate(a).total_cmp(&rate(b))).unwrap_or(0)
    }
}

impl Replay {
    /// Seconds of all rollouts under a controller that begins with nothing measured.
    pub(super) fn seconds(&self, controller: &plan::Controller, seed: u64) -> f64 {
        let (mut controller, key) = (Controller::new(controller), NoiseKey::new(seed, CHOICES, 0, 0, 0));
        let mut choices = 0;
        self.play(|_, batch, before| {
            if let Some((batch, strategy, measured)) = before {
                controller.observe(batch, strategy, measured);
            }
            choices += 1;
            controller.choose(batch, [key.uniform(choices, 0), key.uniform(choices, 1)], &|_| true)
        })
    }

    /// Seconds of all rollouts with the best way at each age and batch size.
    pub(super) fn hindsight(&self) -> f64 {
        self.play(|age, batch, _| age.best(batch).checked_sub(1).map(|strategy| self.strategies[strategy]))
    }

    /// Seconds of all rollouts; `choose` is given the cycle before.
    fn play(
        &self,
        mut choose: impl FnMut(&Age, usize, Option<(usize, Option<Strategy>, Measured)>) -> Option<Strategy>,
    ) -> f64 {
        let (mut seconds, mut before) = (0.0, None);
        // Each way goes on where it was at each age and batch size.
        let mut places: BTreeMap<(usize, usize, usize), usize> = BTreeMap::new();
        for rollout in 0..self.rollouts {
            let at = rollout * self.ages.len() / self.rollouts;
            let (age, mut waiting, mut running) = (&self.ages[at], self.lengths.iter(), Vec::new());
            loop {
                let room = self.slots - running.len();
                running.extend(waiting.by_ref().take(room).map(|length| *length as f64));
                if running.is_empty() {
                    break;
                }
                let strategy = choose(age, running.len(), before.take());
                let way =
                    strategy.and_then(|s| self.strategies.iter().position(|other| *other == s)).map_or(0, |i| i + 1);
                let (recorded, cycles) = age.near(way, running.len());
                let place = places.entry((at, way, recorded)).or_default();
                let measured = cycles[*place % cycles.len()];
                *place += 1;
                let each = measured.tokens as f64 / measured.requests as f64;
                seconds += measured.seconds;
                before = Some((running.len(), strategy, measured));
                running.iter_mut().for_each(|left| *left -= each);
                running.retain(|left| *left > 1e-9);
            }
        }
        seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycles(requests: usize, tokens: usize, seconds: f64, strategy: Option<Strategy>) -> CycleStats {
        let (target_s, rows) = (seconds, requests);
        CycleStats { seconds, target_s, requests, rows, tokens, strategy, ..CycleStats::default() }
    }

    #[test]
    fn a_rollout_takes_the_time_of_its_cycles() {
        let strategy = Strategy::chain(0, 2);
        let plain = [cycles(2, 2, 1.5, None), cycles(1, 1, 1.0, None)];
        let drafted = [cycles(2, 4, 4.0, Some(strategy)), cycles(1, 2, 1.0, Some(strategy))];
        let ages = vec![Age::new([&plain[..], &drafted[..]].into_iter())];
        let replay = Replay { lengths: vec![2, 6], ages, strategies: vec![strategy], slots: 2, rollouts: 3 };
        // Two cycles together, four alone; or one together, two alone.
        assert!((replay.seconds(&plan::Controller::Off, 0) - 3.0 * (3.0 + 4.0)).abs() < 1e-9);
        assert!((replay.seconds(&plan::Controller::Fixed(strategy), 0) - 3.0 * (4.0 + 2.0)).abs() < 1e-9);
        assert!((replay.hindsight() - 3.0 * (3.0 + 2.0)).abs() < 1e-9);
        assert_eq!([1, 2, 9].map(|batch| replay.ages[0].best(batch)), [1, 0, 0]);
    }
}
