//! Phases of a device.

use serde::{Deserialize, Serialize};

/// What a device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Waiting.
    Idle,
    /// Decoding answers.
    Rollout,
    /// Training the drafter while others decode.
    DraftTrain,
    /// Training the policy.
    Update,
}
