//! Measurements of one way to decode: a sliding window of cycles.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::bandit::Cycle;
use super::prior::Trust;

/// A cycle counts as at most so many median ones: the machine did something else meanwhile.
const OUTLIER: f64 = 4.0;

/// How far tokens of cycles are expected to differ from their mean, as a share of it, before that is measured: counts as one cycle.
const SPREAD: f64 = 0.3;

/// Drafts of which what came counts as much as what they promised.
const PROMISES: f64 = 64.0;

/// One arm in one bucket.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Arm {
    /// Oldest first.
    cycles: VecDeque<Cycle>,
    /// Tokens a second, kept because it is asked for at every cycle.
    rate: f64,
    /// Of a cycle.
    tokens: f64,
    seconds: f64,
    #[serde(default)]
    batch: f64,
    /// Standard error of the rate, as a share of it.
    #[serde(default)]
    error: f64,
}

impl Arm {
    /// Adds a measurement; only the newest `window` are kept.
    pub(super) fn observe(&mut self, cycle: Cycle, window: usize) {
        self.observe_promised(cycle, window, Trust::default());
    }

    /// The same where cycles promise something.
    pub(super) fn observe_promised(&mut self, cycle: Cycle, window: usize, trust: Trust) {
        self.cycles.push_back(cycle);
        let excess = self.cycles.len().saturating_sub(window);
        self.cycles.drain(..excess);
        let longest = longest(&self.cycles);
        let count = self.cycles.len() as f64;
        let mean = |of: &dyn Fn(&Cycle) -> f64| self.cycles.iter().map(of).sum::<f64>() / count;
        self.seconds = mean(&|cycle| cycle.seconds.min(longest));
        self.batch = mean(&|cycle| cycle.batch());
        // What drafts promise varies less than what comes of them, but may be wrong: the more came, the more that counts.
        let drafts = count * self.batch;
        let share = drafts / (drafts + PROMISES);
        let believed = |cycle: &Cycle| cycle.tokens_believed(share, trust);
        self.tokens = mean(&believed);
        self.rate = self.tokens / self.seconds;
        let variance = mean(&|cycle| (believed(cycle) - self.rate * cycle.seconds.min(longest)).powi(2));
        let usual = (SPREAD * self.tokens).powi(2);
        let promises = (1.0 - share) * trust.error * (self.tokens - self.batch).max(0.0);
        self.error = ((variance + usual / count) / count + promises.powi(2)).sqrt() / self.tokens;
    }

    /// Measurements in the window.
    pub(super) fn count(&self) -> usize {
        self.cycles.len()
    }

    /// Tokens a second: all tokens over all time, so that a rare cycle of many tokens counts for what it is worth.
    pub(super) fn rate(&self) -> Option<f64> {
        (!self.cycles.is_empty()).then_some(self.rate)
    }

    /// Mean tokens of a cycle.
    pub(super) fn tokens(&self) -> Option<f64> {
        (!self.cycles.is_empty()).then_some(self.tokens)
    }

    /// Mean seconds of a cycle.
    pub(super) fn seconds(&self) -> Option<f64> {
        (!self.cycles.is_empty()).then_some(self.seconds)
    }

    /// Mean requests of a cycle.
    pub(super) fn batch(&self) -> Option<f64> {
        (!self.cycles.is_empty()).then_some(self.batch)
    }

    /// Standard error of the rate, as a share of it.
    pub(super) fn error(&self) -> f64 {
        self.error
    }

    /// Tokens per request-cycle.
    pub(super) fn accept_length(&self) -> Option<f64> {
        let sum = self.cycles.iter().map(|c| c.accept_length).sum::<f64>();
        (!self.cycles.is_empty()).then(|| sum / self.cycles.len() as f64)
    }
}

/// Seconds that a cycle counts as, at most.
fn longest(cycles: &VecDeque<Cycle>) -> f64 {
    let mut seconds: Vec<f64> = cycles.iter().map(|c| c.seconds).collect();
    // Of two the shorter one: one of them may be the outlier.
    let middle = (seconds.len() - 1) / 2;
    OUTLIER * *seconds.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(tokens: f64, seconds: f64) -> Cycle {
        Cycle { rate: tokens / seconds, seconds, catch_up_s: 0.0, accept_length: tokens, promised: None }
    }

    #[test]
    fn the_window_slides() {
        let mut arm = Arm::default();
        assert_eq!(arm.rate(), None);
        let mut check = |tokens: f64, seconds: f64, expected: f64| {
            arm.observe(cycle(tokens, seconds), 3);
            assert!((arm.rate().unwrap() - expected).abs() < 1e-12, "{:?}, expected {expected}", arm.rate());
        };
        check(1.0, 1.0, 1.0);
        check(3.0, 1.0, 2.0);
        check(8.0, 2.0, 3.0);
        check(1.0, 1.0, 3.0);
        assert_eq!((arm.count(), arm.accept_length()), (3, Some(4.0)));
    }

    #[test]
    fn an_outlier_counts_little_and_a_rare_success_in_full() {
        let mut arm = Arm::default();
        (0..8).for_each(|_| arm.observe(cycle(1.0, 1.0), 10));
        assert!((arm.error() - 0.3 / 8.0).abs() < 1e-12, "nothing differed: {}", arm.error());
        arm.observe(cycle(1.0, 1000.0), 10);
        assert!((arm.rate().unwrap() - 9.0 / 12.0).abs() < 1e-12);
        assert!((0.1..0.3).contains(&arm.error()), "{}", arm.error());
        arm.observe(cycle(9.0, 1.0), 10);
        assert!((arm.rate().unwrap() - 18.0 / 13.0).abs() < 1e-12);
    }
}
