//! What a controller was told and what it chose, so that anybody can have it choose again (CTRL-2, CTRL-3).

use serde::{Deserialize, Serialize};

use super::{Controller, Measured, Skill};
use crate::plan::Strategy;

/// One thing that a controller was told or asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Decision {
    /// A session begins with what earlier ones have left.
    Began(Box<Controller>),
    /// What forwards of the target over so many rows take, in seconds.
    Probed(Vec<(f64, f64)>),
    /// What an exam said of a drafter.
    Examined {
        /// Which, of the plan's.
        drafter: usize,
        /// How well it guesses.
        skill: Skill,
    },
    /// It chose.
    Chose {
        /// For so many requests.
        batch: usize,
        /// With these numbers.
        draws: [f64; 2],
        /// Which of the plan's drafters could draft.
        ready: Vec<bool>,
        /// What; nothing: plain decoding.
        strategy: Option<Strategy>,
    },
    /// It was told what came of that.
    Measured {
        /// Requests of the cycle.
        batch: usize,
        /// How they were drafted for.
        strategy: Option<Strategy>,
        /// What was measured.
        measured: Measured,
    },
}

/// A controller that is told again what another one was told.
#[derive(Debug, Clone, Default)]
pub struct Again(Option<Controller>);

impl Again {
    /// Takes in what the other one was told next; where that one chose, what this one does. Nothing is chosen before a session begins.
    pub fn take(&mut self, decision: &Decision) -> Option<Option<Strategy>> {
        if let Decision::Began(controller) = decision {
            self.0 = Some((**controller).clone());
        }
        let controller = self.0.as_mut()?;
        match decision {
            Decision::Began(_) => {}
            Decision::Probed(forwards) => controller.probe(forwards.clone()),
            Decision::Examined { drafter, skill } => controller.examined(*drafter, skill.clone()),
            Decision::Measured { batch, strategy, measured } => controller.observe(*batch, *strategy, *measured),
            Decision::Chose { batch, draws, ready, .. } => {
                let is_ready = |drafter: usize| ready.get(drafter).copied().unwrap_or(false);
                return Some(controller.choose(*batch, *draws, &is_ready));
            }
        }
        None
    }
}
