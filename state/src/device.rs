//! Phases of a device, and which moves between them are legal.
//!
//! ```text
//!            Assigned              UpdateRequested
//!   Rollout ◀──────── Idle ──────────────────────▶ Update
//!      │               ▲ │                            │
//!      └── Drained ────┘ └─ TrainingRequested ─▶ DraftTrain
//!                      ▲                              │
//!                      └── TrainingStopped / UpdateFinished
//! ```
//!
//! * **DEV-1** A device is in one phase; it leaves Idle on request, and returns to it by its own report.
//! * **DEV-2** A request that the phase does not allow is refused, and changes nothing.
//! * **DEV-3** A report of an earlier incarnation (a smaller epoch) changes nothing.
//! * **DEV-4** The epoch never falls, and grows by one with every loss.
//! * **DEV-5** A lost device refuses every request until it has been restarted.

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

/// What happened: a request of the supervisor, or a report of the device, which carries the epoch it was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Request: decode answers of a group, or go on with those of another device. Legal in Idle and Rollout.
    Assigned,
    /// Request: train the drafter. Legal in Idle.
    TrainingRequested,
    /// Request: stop training the drafter. Legal in DraftTrain; the device stays there until it has stopped.
    PreemptionRequested,
    /// Request: train the policy. Legal in Idle.
    UpdateRequested,
    /// Report: nothing left to decode.
    Drained {
        /// Incarnation that reports.
        epoch: u64,
    },
    /// Report: drafter training ended, on request or by itself.
    TrainingStopped {
        /// Incarnation that reports.
        epoch: u64,
    },
    /// Report: the policy step is done.
    UpdateFinished {
        /// Incarnation that reports.
        epoch: u64,
    },
    /// Its actor ended.
    Lost {
        /// Incarnation that ended.
        epoch: u64,
    },
    /// It was started again, with the epoch of [`Effect::Restart`].
    Restarted {
        /// The new incarnation.
        epoch: u64,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Send it the group.
    Decode,
    /// Tell it to train the drafter.
    TrainDrafter,
    /// Tell it to stop training the drafter.
    PreemptDrafter,
    /// Tell it to train the policy.
    Update,
    /// Start it again as this incarnation.
    Restart {
        /// The new incarnation.
        epoch: u64,
    },
    /// Nothing: the request is not legal now.
    Refused(Refused),
}

/// A request that was not legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The request or report.
    pub event: Event,
    /// The phase it met.
    pub phase: Phase,
    /// Whether the device was running.
    pub is_up: bool,
}

/// One device as its supervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    phase: Phase,
    epoch: u64,
    is_up: bool,
}

impl Default for Device {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Device {
    /// A running, idle device of this incarnation.
    #[must_use]
    pub fn new(epoch: u64) -> Self {
        Self { phase: Phase::Idle, epoch, is_up: true }
    }

    /// What it is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its incarnation; of a lost device, that of the next one.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether it is running.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.is_up
    }

    /// Takes in what happened; returns what is to be done.
    #[must_use]
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Assigned => self.request(event, &[Phase::Idle, Phase::Rollout], Phase::Rollout, Effect::Decode),
            Event::TrainingRequested => self.request(event, &[Phase::Idle], Phase::DraftTrain, Effect::TrainDrafter),
            Event::PreemptionRequested => {
                self.request(event, &[Phase::DraftTrain], Phase::DraftTrain, Effect::PreemptDrafter)
            }
            Event::UpdateRequested => self.request(event, &[Phase::Idle], Phase::Update, Effect::Update),
            Event::Drained { epoch } => self.report(event, epoch, Phase::Rollout),
            Event::TrainingStopped { epoch } => self.report(event, epoch, Phase::DraftTrain),
            Event::UpdateFinished { epoch } => self.report(event, epoch, Phase::Update),
            Event::Lost { epoch } => self.lose(epoch),
            Event::Restarted { epoch } => self.restart(epoch),
        }
    }

    fn request(&mut self, event: Event, legal: &[Phase], to: Phase, effect: Effect) -> Vec<Effect> {
        if !self.is_up || !legal.contains(&self.phase) {
            return self.refuse(event);
        }
        self.phase = to;
        vec![effect]
    }

    fn report(&mut self, event: Event, epoch: u64, from: Phase) -> Vec<Effect> {
        if !self.is_up || epoch != self.epoch {
            return Vec::new();
        }
        if self.phase != from {
            return self.refuse(event);
        }
        self.phase = Phase::Idle;
        Vec::new()
    }

    fn lose(&mut self, epoch: u64) -> Vec<Effect> {
        if !self.is_up || epoch != self.epoch {
            return Vec::new();
        }
        *self = Self { phase: Phase::Idle, epoch: self.epoch + 1, is_up: false };
        vec![Effect::Restart { epoch: self.epoch }]
    }

    fn restart(&mut self, epoch: u64) -> Vec<Effect> {
        self.is_up |= epoch == self.epoch;
        Vec::new()
    }

    fn refuse(&self, event: Event) -> Vec<Effect> {
        vec![Effect::Refused(Refused { event, phase: self.phase, is_up: self.is_up })]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_event() -> impl Strategy<Value = Event> {
        let epoch = 0u64..4;
        prop_oneof![
            Just(Event::Assigned),
            Just(Event::TrainingRequested),
            Just(Event::PreemptionRequested),
            Just(Event::UpdateRequested),
            epoch.clone().prop_map(|epoch| Event::Drained { epoch }),
            epoch.clone().prop_map(|epoch| Event::TrainingStopped { epoch }),
            epoch.clone().prop_map(|epoch| Event::UpdateFinished { epoch }),
            epoch.clone().prop_map(|epoch| Event::Lost { epoch }),
            epoch.prop_map(|epoch| Event::Restarted { epoch }),
        ]
    }

    #[test]
    fn a_step_of_a_device() {
        let mut device = Device::default();
        let mut check = |event: Event, effects: &[Effect], phase: Phase| {
            assert_eq!(device.apply(event), effects, "{event:?}");
            assert_eq!(device.phase(), phase, "{event:?}");
        };
        check(Event::Assigned, &[Effect::Decode], Phase::Rollout);
        check(Event::Assigned, &[Effect::Decode], Phase::Rollout);
        check(Event::Drained { epoch: 0 }, &[], Phase::Idle);
        check(Event::TrainingRequested, &[Effect::TrainDrafter], Phase::DraftTrain);
        check(Event::PreemptionRequested, &[Effect::PreemptDrafter], Phase::DraftTrain);
        check(Event::TrainingStopped { epoch: 0 }, &[], Phase::Idle);
        check(Event::UpdateRequested, &[Effect::Update], Phase::Update);
        let refused = Refused { event: Event::Assigned, phase: Phase::Update, is_up: true };
        check(Event::Assigned, &[Effect::Refused(refused)], Phase::Update);
        check(Event::UpdateFinished { epoch: 0 }, &[], Phase::Idle);
    }

    #[test]
    fn a_lost_device_comes_back_with_the_next_epoch() {
        let mut device = Device::default();
        assert_eq!(device.apply(Event::Assigned), [Effect::Decode]);
        assert_eq!(device.apply(Event::Lost { epoch: 0 }), [Effect::Restart { epoch: 1 }]);
        assert_eq!(device.apply(Event::Lost { epoch: 0 }), []);
        assert!(matches!(device.apply(Event::Assigned)[..], [Effect::Refused(_)]));
        assert_eq!(device.apply(Event::Restarted { epoch: 1 }), []);
        assert_eq!(device.apply(Event::Assigned), [Effect::Decode]);
        assert_eq!(device.apply(Event::Drained { epoch: 0 }), []);
        assert_eq!(device.phase(), Phase::Rollout);
    }

    proptest! {
        #[test]
        fn dev_1_to_5(events in prop::collection::vec(any_event(), 0..80)) {
            let mut device = Device::default();
            for event in events {
                let before = device.clone();
                let effects = device.apply(event);
                let is_refused = matches!(effects[..], [Effect::Refused(_)]);
                let is_request = matches!(
                    event,
                    Event::Assigned | Event::TrainingRequested | Event::PreemptionRequested | Event::UpdateRequested
                );
                prop_assert!(effects.len() <= 1);
                prop_assert!(!is_refused || device == before);
                prop_assert!(before.is_up || !is_request || is_refused);
                prop_assert_eq!(device.epoch - before.epoch, u64::from(before.is_up && !device.is_up));
                if let Event::Drained { epoch } | Event::TrainingStopped { epoch } | Event::UpdateFinished { epoch } = event {
                    prop_assert!(epoch == before.epoch || device == before);
                    prop_assert!(device == before || device.phase == Phase::Idle);
                }
                if is_request && device.phase != before.phase {
                    prop_assert_eq!(before.phase, Phase::Idle);
                }
            }
        }
    }
}
