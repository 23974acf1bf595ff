//! Algorithms: scores of a group become advantages, and log-probabilities become a loss.
//!
//! Numbers in, numbers out. The tensors whose gradient this is live in `models/`; which answers form a group is
//! decided by the step.

mod grpo;

use serde::{Deserialize, Serialize};

pub use grpo::{advantages, divergence, token_signal};

/// What became of one answer: a failure to score is never a score of zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// The reward.
    Scored(f32),
    /// Why there is none.
    Failed(String),
}

impl Outcome {
    /// The reward, if there is one and it is a finite number.
    #[must_use]
    pub fn score(&self) -> Option<f32> {
        match self {
            Self::Scored(score) if score.is_finite() => Some(*score),
            Self::Scored(_) | Self::Failed(_) => None,
        }
    }

    /// The sum of both; failed if one of them is, or if the sum is not finite.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Scored(one), Self::Scored(two)) if (one + two).is_finite() => Self::Scored(one + two),
            (Self::Scored(one), Self::Scored(two)) => Self::Failed(format!("the sum of {one} and {two} is not finite")),
            (Self::Failed(reason), _) | (_, Self::Failed(reason)) => Self::Failed(reason),
        }
    }

    /// Why there is none.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        match self {
            Self::Failed(reason) => Some(reason),
            Self::Scored(_) => None,
        }
    }
}
