//! Rewards: an answer's text and its reference become a number.
//!
//! Pure rules only. An answer that cannot be scored has [`Outcome::Failed`], never a score of zero: a reference that
//! holds no number says nothing about the model.

mod exact;
mod format;
mod length;
mod number;
mod numeric;
mod steps;

pub use number::Number;

use crate::algorithm::Outcome;
use crate::plan::{Reward, WeightedReward};

/// What a reward may look at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer<'a> {
    /// What was asked, without template.
    pub question: &'a str,
    /// The answer, without its prompt and without the token that ends it, as the data says what of it counts.
    pub text: &'a str,
    /// What the data says is right.
    pub reference: &'a str,
    /// The worked solution, where the data has one.
    pub solution: Option<&'a str>,
    /// Length, in tokens.
    pub tokens: usize,
    /// Longest allowed length, in tokens.
    pub tokens_max: usize,
    /// Whether the answer was cut at `tokens_max`.
    pub truncated: bool,
}

/// The weighted sum of all rewards; failed if one of them fails, if there is none, or if the sum is not finite.
#[must_use]
pub fn score(rewards: &[WeightedReward], answer: &Answer<'_>) -> Outcome {
    if rewards.is_empty() {
        return Outcome::Failed("the plan has no reward: add one to `rewards`".into());
    }
    let mut sum = 0.0;
    for WeightedReward { reward, weight } in rewards {
        match value(reward, answer) {
            Ok(value) => sum += weight * value,
            Err(reason) => return Outcome::Failed(reason),
        }
    }
    if sum.is_finite() { Outcome::Scored(sum) } else { Outcome::Failed(format!("the sum of rewards is {sum}")) }
}

/// Whether the answer is right by the first reward that compares it with the reference; false if none does.
#[must_use]
pub fn correct(rewards: &[WeightedReward], answer: &Answer<'_>) -> bool {
    let judge =
        rewards.iter().find(|weighted| matches!(weighted.reward, Reward::Exact { .. } | Reward::Numeric { .. }));
    judge.is_some_and(|judge| value(&judge.reward, answer) == Ok(1.0))
}

/// One reward, unweighted, or why it cannot be told.
fn value(reward: &Reward, answer: &Answer<'_>) -> Result<f32, String> {
    match reward {
        Reward::Exact { marker } => exact::value(marker, answer),
        Reward::Numeric { marker } => numeric::value(marker, answer),
        Reward::Format { marker } => Ok(format::value(marker, answer)),
        Reward::Steps { separator } => steps::value(separator, answer),
        Reward::Length => length::value(answer),
    }
}

/// What follows the last `marker`; the whole text if `marker` is empty.
fn after_last<'a>(text: &'a str, marker: &str) -> Option<&'a str> {
    if marker.is_empty() {
        return Some(text);
    }
    text.rfind(marker).map(|start| &text[start + marker.len()..])
}

#[cfg(test)]
fn answer<'a>(text: &'a str, reference: &'a str) -> Answer<'a> {
    Answer { question: "1+2?", text, reference, solution: None, tokens: 5, tokens_max: 20, truncated: false }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn weighted(reward: Reward, weight: f32) -> WeightedReward {
        WeightedReward { reward, weight }
    }

    fn exact() -> Reward {
        Reward::Exact { marker: "#".into() }
    }

    #[test]
    fn rewards_are_weighted_and_summed() {
        let rewards = [weighted(exact(), 1.0), weighted(Reward::Length, 0.5)];
        assert_eq!(score(&rewards, &answer("1+2=3#3", "3")), Outcome::Scored(0.875));
        assert_eq!(score(&rewards, &answer("1+2=4#4", "3")), Outcome::Scored(-0.125));
    }

    #[test]
    fn what_cannot_be_scored_fails() {
        let check = |rewards: &[WeightedReward], answer: &Answer<'_>, part: &str| match score(rewards, answer) {
            Outcome::Failed(reason) => assert!(reason.contains(part), "{reason}"),
            Outcome::Scored(score) => panic!("scored {score}, expected `{part}`"),
        };
        check(&[], &answer("#3", "3"), "no reward");
        check(&[weighted(exact(), f32::NAN)], &answer("#3", "3"), "NaN");
        check(&[weighted(exact(), 1.0)], &answer("#3", " "), "empty");
        check(&[weighted(Reward::Numeric { marker: "#".into() }, 1.0)], &answer("#3", "three"), "`three`");
        let unbounded = Answer { tokens_max: 0, ..answer("#3", "3") };
        check(&[weighted(Reward::Length, 1.0)], &unbounded, "tokens_max");
    }

    #[test]
    fn the_first_comparing_reward_judges() {
        let right = answer("#3", "3");
        assert!(correct(&[weighted(Reward::Length, 1.0), weighted(exact(), 0.1)], &right));
        assert!(!correct(&[weighted(Reward::Length, 1.0)], &right));
        assert!(!correct(&[weighted(exact(), 1.0)], &answer("", "3")));
        assert!(!correct(&[weighted(exact(), 1.0)], &answer("#", "")));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>(), reference in any::<String>(), marker in any::<String>()) {
            let rewards = [
                weighted(Reward::Exact { marker: marker.clone() }, 1.0),
                weighted(Reward::Numeric { marker: marker.clone() }, 1.0),
                weighted(Reward::Format { marker }, 1.0),
            ];
            let answer = answer(&text, &reference);
            for reward in rewards {
                let _ = (score(std::slice::from_ref(&reward), &answer), correct(&[reward], &answer));
            }
        }

        #[test]
        fn numeric_marks_never_panic(text in r"[-−0-9.,/%$ e+\\{}a-z!boxedfrac]{0,40}") {
            let _ = Number::last_in(&text);
        }
    }
}
