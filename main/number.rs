//! Numbers on the command line, with what is wanted instead.

use std::str::FromStr;

type Result<T> = std::result::Result<T, String>;

fn that<T: FromStr>(text: &str, is_good: impl FnOnce(&T) -> bool, wanted: &str) -> Result<T> {
    text.parse().ok().filter(is_good).ok_or_else(|| format!("write {wanted}"))
}

pub(crate) fn at_least_one(text: &str) -> Result<usize> {
    that(text, |n| *n > 0, "a number from 1 on")
}

/// As many as a workflow may ask for.
pub(crate) fn threads(text: &str) -> Result<usize> {
    that(text, |n| (1..=1024).contains(n), "a number from 1 to 1024")
}

/// Enough of them for a first and a last quarter.
pub(crate) fn steps(text: &str) -> Result<usize> {
    that(text, |n| *n >= 4, "a number from 4 on")
}

pub(crate) fn seconds(text: &str) -> Result<u64> {
    that(text, |_| true, "whole seconds, such as 60")
}

/// As large as a workflow's may be.
pub(crate) fn learning_rate(text: &str) -> Result<f64> {
    that(text, |lr| *lr > 0.0 && *lr <= 1.0, "a number above 0 and at most 1")
}
