//! What a run has saved that can be used without it.

use std::path::Path;
use std::sync::Arc;

use models::Weights;
use state::journal::Event;
use state::metrics::StepMetrics;
use state::run::RunState;

use crate::error::{Error, Result};
use crate::experience::Habits;
use crate::folder::RunFolder;
use crate::job::Job;
use crate::past::Whole;
use crate::speculator::Published;

/// What the newest checkpoint of a run holds that can be read.
pub(super) struct Saved {
    pub(super) weights: Arc<Weights>,
    pub(super) is_older: bool,
    pub(super) habits: Option<Habits>,
    pub(super) drafter: Option<Published>,
    pub(super) warnings: Vec<String>,
}

impl Saved {
    pub(super) fn read(dir: &Path, job: &Job, events: &[Event]) -> Result<Self> {
        let folder = RunFolder::new(dir);
        let whole = Whole::find(&folder, events, |name| folder.weights(name, &job.initial))?;
        let (is_older, mut warnings) = (whole.warning.is_some(), Vec::from_iter(whole.warning));
        let Some((name, weights)) = whole.checkpoint else {
            let weights = Arc::new(job.initial.clone());
            warnings.push("the run has no checkpoint yet: this is the model that it began with".into());
            let has_learned = RunState::replay(events).history.iter().any(StepMetrics::learns);
            return Ok(Self { weights, is_older: has_learned, habits: None, drafter: None, warnings });
        };
        // Of a run at work it may have been pruned by now.
        let is_gone = || !folder.checkpoint(&name).is_dir();
        let habits = match folder.habits(&name) {
            Err(error) if is_gone() => return Err(error),
            habits => habits.ok().flatten(),
        };
        let drafter = match job.plan.speculation.shape().map(|shape| folder.drafter(&name, &job.config, shape)) {
            // One of the drafter that an earlier session of the run had.
            Some(Err(Error::Model(models::Error::MissingTensor { .. } | models::Error::TensorShape { .. }))) => None,
            Some(Err(error)) if error.is_of_system() || is_gone() => return Err(error),
            Some(Err(error)) => {
                warnings.push(format!("its drafter cannot be used ({}): nothing is drafted by it", error.whole()));
                None
            }
            Some(Ok(drafter)) => drafter,
            None => None,
        };
        Ok(Self { weights, is_older, habits, drafter, warnings })
    }
}
