//! What speculation has learned, as a checkpoint keeps it. Losing it costs time and changes no token.

use std::sync::Arc;

use models::RawWeights;
use models::drafter::Calibration;
use models::drafter::buffer::Buffer;
use serde::{Deserialize, Serialize};
use state::drafter::Publication;
use state::plan;
use state::speculation::Controller;
use state::watchdog::Watchdog;

use crate::said::Said;
use crate::speculator::Published;

/// What is known of the processor.
pub(crate) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    format!("{} {}", name.unwrap_or(std::env::consts::ARCH), kernels::variant())
}

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
    /// What speaks against the version in use.
    #[serde(default)]
    pub(crate) watchdog: Watchdog,
    /// How often each token was seen, in the data and in rollouts.
    pub(crate) seen: Vec<u64>,
    /// What was answered lately; nothing without a drafter that repeats it.
    pub(crate) said: Said,
    /// Tokens of answers that ended lately, the newest last.
    pub(crate) lengths: Vec<usize>,
    /// Choices of the controller so far, each of which has drawn numbers.
    pub(crate) choices: u64,
    /// The processor that the controller has measured.
    #[serde(default)]
    pub(crate) processor: String,
}

impl Habits {
    /// Those of a run that has made nothing yet.
    pub(crate) fn new(controller: &plan::Controller, seen: Vec<u64>) -> Self {
        let (publication, calibration, watchdog, said, lengths, choices) = Default::default();
        let (controller, processor) = (Controller::new(controller), processor());
        Self { controller, publication, calibration, watchdog, seen, said, lengths, choices, processor }
    }

    /// The same for other devices: without what was measured of speeds.
    pub(crate) fn with_controller(self, controller: &plan::Controller) -> Self {
        Self { controller: Controller::new(controller), watchdog: self.watchdog.elsewhere(), ..self }
    }

    /// Whether speeds were measured on such a processor.
    pub(crate) fn are_of_here(&self) -> bool {
        self.processor == processor()
    }

    /// The same without what is true of one drafter's versions only.
    pub(crate) fn without_drafter(self) -> Self {
        let (publication, calibration, watchdog) = Default::default();
        let controller = self.controller.with_other_drafters();
        Self { controller, publication, calibration, watchdog, ..self }
    }
}
