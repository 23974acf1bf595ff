//! Measurements of one way to decode: a sliding window and its median.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// One arm in one bucket.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Arm {
    /// Tokens a second, oldest first.
    rates: VecDeque<f64>,
    /// Tokens per request-cycle, oldest first.
    accept_lengths: VecDeque<f64>,
    /// Median of `rates`, kept because it is asked for at every cycle.
    median: f64,
}

impl Arm {
    /// Adds a measurement; only the newest `window` are kept.
    pub(super) fn observe(&mut self, rate: f64, accept_length: f64, window: usize) {
        self.rates.push_back(rate);
        self.accept_lengths.push_back(accept_length);
        self.keep(window);
        self.median = median(&self.rates);
    }

    /// Measurements in the window.
    pub(super) fn count(&self) -> usize {
        self.rates.len()
    }

    /// Median tokens a second; of an even number the upper one, so that a fresh arm is seen at its best.
    pub(super) fn rate(&self) -> Option<f64> {
        (!self.rates.is_empty()).then_some(self.median)
    }

    /// Median tokens per request-cycle.
    pub(super) fn accept_length(&self) -> Option<f64> {
        (!self.accept_lengths.is_empty()).then(|| median(&self.accept_lengths))
    }

    fn keep(&mut self, window: usize) {
        let excess = self.rates.len().saturating_sub(window);
        self.rates.drain(..excess);
        self.accept_lengths.drain(..excess);
    }
}

fn median(values: &VecDeque<f64>) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    let middle = sorted.len() / 2;
    *sorted.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_slides() {
        let mut arm = Arm::default();
        assert_eq!(arm.rate(), None);
        let mut check = |rate: f64, median: f64| {
            arm.observe(rate, 1.0, 3);
            assert_eq!(arm.rate(), Some(median));
        };
        check(1.0, 1.0);
        check(5.0, 5.0);
        check(3.0, 3.0);
        check(9.0, 5.0);
        check(9.0, 9.0);
        assert_eq!((arm.count(), arm.accept_length()), (3, Some(1.0)));
    }
}
