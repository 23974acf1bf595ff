//! The controller that devices share, and who is told what it is told.

use std::ops::Deref;

use state::plan::Strategy;
use state::speculation::{Controller, Decision, Measured, Skill};

use crate::progress::{Observer, Progress};

/// A controller; what is told to it is told to an observer, too, if there is one.
pub(crate) struct Chooser {
    controller: Controller,
    observer: Option<Observer>,
}

impl Chooser {
    pub(crate) fn new(controller: Controller) -> Self {
        Self { controller, observer: None }
    }

    /// The same that tells this observer from now on.
    pub(crate) fn telling(self, observer: Observer) -> Self {
        let chooser = Self { observer: Some(observer), ..self };
        chooser.tell(|controller| Decision::Began(Box::new(controller.clone())));
        chooser
    }

    /// Chooses as this one would from now on.
    pub(crate) fn go_on_from(&mut self, controller: &Controller) {
        self.controller.clone_from(controller);
        self.tell(|controller| Decision::Began(Box::new(controller.clone())));
    }

    pub(crate) fn probe(&mut self, forwards: Vec<(f64, f64)>) {
        self.tell(|_| Decision::Probed(forwards.clone()));
        self.controller.probe(forwards);
    }

    pub(crate) fn examined(&mut self, drafter: usize, skill: Skill) {
        self.tell(|_| Decision::Examined { drafter, skill: skill.clone() });
        self.controller.examined(drafter, skill);
    }

    /// The strategy of the next cycle; `ready`: which drafters can draft.
    pub(crate) fn choose(&mut self, batch: usize, draws: [f64; 2], ready: &[bool]) -> Option<Strategy> {
        let strategy = self.controller.choose(batch, draws, &|drafter| ready.get(drafter).copied().unwrap_or(false));
        self.tell(|_| Decision::Chose { batch, draws, ready: ready.to_vec(), strategy });
        strategy
    }

    pub(crate) fn observe(&mut self, batch: usize, strategy: Option<Strategy>, measured: Measured) {
        self.tell(|_| Decision::Measured { batch, strategy, measured });
        self.controller.observe(batch, strategy, measured);
    }

    fn tell(&self, decision: impl FnOnce(&Controller) -> Decision) {
        if let Some(observer) = &self.observer {
            observer.tell(Progress::Decided(Box::new(decision(&self.controller))));
        }
    }
}

impl Deref for Chooser {
    type Target = Controller;

    fn deref(&self) -> &Controller {
        &self.controller
    }
}
