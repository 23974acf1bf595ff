//! What speculation has learned, as a checkpoint keeps it. Losing it costs time and changes no token.

use std::sync::Arc;

use models::RawWeights;
use models::drafter::Calibration;
use models::drafter::buffer::Buffer;
use serde::{Deserialize, Serialize};
use state::drafter::Publication;
use state::plan;
use state::speculation::Controller;

use crate::said::Said;
use crate::speculator::Published;

/// All of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Experience {
    /// The drafter in use.
    pub(crate) published: Option<Published>,
    /// The drafter in training, with its optimiser's moments.
    pub(crate) learner: Option<Arc<RawWeights>>,
    pub(crate) habits: Option<Habits>,
    /// What the drafter learns from.
    pub(crate) buffer: Buffer,
}

/// Its small parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Habits {
    pub(crate) controller: Controller,
    pub(crate) publication: Publication,
    /// How likely guesses are right.
    pub(crate) calibration: Calibration,
    /// How often each token was seen, in the data and in rollouts.
    pub(crate) seen: Vec<u64>,
    /// What was answered lately; nothing without a drafter that repeats it.
    pub(crate) said: Said,
    /// Tokens of answers that ended lately, the newest last.
    pub(crate) lengths: Vec<usize>,
    /// Choices of the controller so far, each of which has drawn numbers.
    pub(crate) choices: u64,
}

impl Habits {
    /// Those of a run that has made nothing yet.
    pub(crate) fn new(controller: &plan::Controller, seen: Vec<u64>) -> Self {
        let (publication, calibration, said, lengths, choices) = Default::default();
        Self { controller: Controller::new(controller), publication, calibration, seen, said, lengths, choices }
    }

    /// The same without what is true of one drafter's versions only.
    pub(crate) fn without_drafter(self) -> Self {
        let (publication, calibration) = Default::default();
        Self { controller: self.controller.with_other_drafters(), publication, calibration, ..self }
    }
}
