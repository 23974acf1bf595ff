//! One rollout step: groups in flight, and what devices do that have run dry.
//!
//! * **STEP-1** Every group is done exactly once, by the device that owns it; done groups survive its loss.
//! * **STEP-2** A group has at most one owner, which is running, had room for it and does not train.
//! * **STEP-3** `StartUpdate` comes exactly once: when every group is scored and no device trains the drafter.
//! * **STEP-4** At most one device trains the drafter. It begins only when it has nothing to decode, no group waits,
//!   and another device decodes.
//! * **STEP-5** It is told to stop once no other device decodes, or a group waits that no other can take.
//! * **STEP-6** Groups of a lost device wait again, and waiting groups are handed out in order of their index.
//! * **STEP-7** A message of an earlier incarnation or of an earlier drafter training changes nothing.
//! * **STEP-8** If running devices answer and lost ones are started again, `StartUpdate` is reached.
//!
//! Which device decodes a group never changes its tokens, so all of this is about time only.

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A device can take groups. It says so when it starts and after every finished group.
    DeviceReady {
        /// Which device.
        device: usize,
        /// Its incarnation.
        epoch: u64,
        /// Groups it can take beyond those it has.
        room: usize,
    },
    /// All answers of a group are complete.
    GroupDone {
        /// Which device decoded it.
        device: usize,
        /// Its incarnation.
        epoch: u64,
        /// Which group.
        group: usize,
    },
    /// A done group was scored, or given up.
    Scored {
        /// Which group.
        group: usize,
    },
    /// A device's actor ended.
    DeviceLost {
        /// Which device.
        device: usize,
    },
    /// Drafter training ended: the answer to [`Effect::PreemptDrafter`], or by itself.
    DrafterStopped {
        /// Which device.
        device: usize,
        /// Its incarnation.
        epoch: u64,
        /// Number of the training, as [`Effect::TrainDrafter`] gave it.
        training: u64,
    },
    /// A device was started again, or begins the step with this epoch.
    DeviceRestarted {
        /// Which device.
        device: usize,
        /// Its new incarnation, higher than any before.
        epoch: u64,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Have the group decoded.
    Assign {
        /// By this device.
        device: usize,
        /// This group.
        group: usize,
    },
    /// Have the drafter trained.
    TrainDrafter {
        /// By this device.
        device: usize,
        /// Number of this training in the step, so that an answer told twice does not end a later one.
        training: u64,
    },
    /// Stop that, within one micro-batch.
    PreemptDrafter {
        /// On this device.
        device: usize,
    },
    /// All groups are scored: train the policy.
    StartUpdate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Waiting,
    Assigned { device: usize },
    Done,
    Scored,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Training {
    Off,
    On,
    Stopping,
}

/// A device in this step.
#[derive(Debug, Clone, Copy)]
struct Seat {
    /// Lowest epoch whose messages count.
    epoch: u64,
    is_up: bool,
    /// Whether this incarnation has said how much it can take.
    is_heard: bool,
    room: usize,
    training: Training,
}

/// The machine of one step.
#[derive(Debug, Clone)]
pub struct StepMachine {
    groups: Vec<Group>,
    seats: Vec<Seat>,
    /// Whether a drained device may be sent to train the drafter.
    may_train: bool,
    /// Trainings begun.
    trainings: u64,
    is_update_started: bool,
}

impl StepMachine {
    /// A step of `groups` groups, all waiting, on `devices` running devices of epoch 0 that have yet to report.
    ///
    /// Devices with higher epochs are made known by [`Event::DeviceRestarted`], lost ones by [`Event::DeviceLost`].
    ///
    /// # Panics
    /// If there is no group or no device.
    #[must_use]
    pub fn new(groups: usize, devices: usize, draft_training: bool) -> Self {
        assert!(groups > 0 && devices > 0, "a step needs groups and devices, got {groups} and {devices}");
        let seat = Seat { epoch: 0, is_up: true, is_heard: false, room: 0, training: Training::Off };
        Self {
            groups: vec![Group::Waiting; groups],
            seats: vec![seat; devices],
            may_train: draft_training,
            trainings: 0,
            is_update_started: false,
        }
    }

    /// Takes in what happened; returns what is to be done, in this order.
    ///
    /// # Panics
    /// If the event names a device or a group that does not exist.
    #[must_use]
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        if self.is_update_started {
            return Vec::new();
        }
        match event {
            Event::DeviceReady { device, epoch, room } => self.hear(device, epoch, room),
            Event::GroupDone { device, epoch, group } => self.finish(device, epoch, group),
            Event::Scored { group } => self.score(group),
            Event::DeviceLost { device } => self.lose(device),
            Event::DrafterStopped { device, epoch, training } => self.stop(device, epoch, training),
            Event::DeviceRestarted { device, epoch } => self.welcome(device, epoch),
        }
        let mut effects = self.assign();
        effects.extend(self.preempt());
        effects.extend(self.train());
        effects.extend(self.start_update());
        effects
    }

    /// Groups that no device has.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.groups.iter().filter(|&&group| group == Group::Waiting).count()
    }

    /// Groups a device is decoding.
    #[must_use]
    pub fn in_flight(&self, device: usize) -> usize {
        self.groups.iter().filter(|&&group| group == Group::Assigned { device }).count()
    }

    /// The device that trains the drafter, also while it is being stopped.
    #[must_use]
    pub fn trainer(&self) -> Option<usize> {
        self.seats.iter().position(|seat| seat.training != Training::Off)
    }

    /// Whether `StartUpdate` was given; every later event is ignored.
    #[must_use]
    pub fn is_update_started(&self) -> bool {
        self.is_update_started
    }

    fn hear(&mut self, device: usize, epoch: u64, room: usize) {
        // Its report may overtake the news of its restart.
        self.welcome(device, epoch);
        if self.is_current(device, epoch) {
            let seat = &mut self.seats[device];
            (seat.is_heard, seat.room) = (true, room);
        }
    }

    fn finish(&mut self, device: usize, epoch: u64, group: usize) {
        if self.is_current(device, epoch) && self.groups[group] == (Group::Assigned { device }) {
            self.groups[group] = Group::Done;
        }
    }

    fn score(&mut self, group: usize) {
        if self.groups[group] == Group::Done {
            self.groups[group] = Group::Scored;
        }
    }

    fn lose(&mut self, device: usize) {
        if self.seats[device].is_up {
            self.vacate(device, self.seats[device].epoch + 1, false);
        }
    }

    fn stop(&mut self, device: usize, epoch: u64, training: u64) {
        if !self.is_current(device, epoch) || training != self.trainings {
            return;
        }
        // A drafter that stopped by itself has learned enough in this step.
        self.may_train &= self.seats[device].training != Training::On;
        self.seats[device].training = Training::Off;
    }

    /// Takes note of a new incarnation; nothing if it is known or outdated.
    fn welcome(&mut self, device: usize, epoch: u64) {
        let seat = self.seats[device];
        if epoch > seat.epoch || (epoch == seat.epoch && !seat.is_up) {
            self.vacate(device, epoch, true);
        }
    }

    /// Forgets what an incarnation was doing.
    fn vacate(&mut self, device: usize, epoch: u64, is_up: bool) {
        self.seats[device] = Seat { epoch, is_up, is_heard: false, room: 0, training: Training::Off };
        for group in &mut self.groups {
            if *group == (Group::Assigned { device }) {
                *group = Group::Waiting;
            }
        }
    }

    fn is_current(&self, device: usize, epoch: u64) -> bool {
        self.seats[device].is_up && self.seats[device].epoch == epoch
    }

    /// Hands waiting groups to devices with room, the emptiest first.
    fn assign(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        while let Some(group) = self.groups.iter().position(|&group| group == Group::Waiting) {
            let Some(device) = self.taker() else { break };
            self.groups[group] = Group::Assigned { device };
            self.seats[device].room -= 1;
            effects.push(Effect::Assign { device, group });
        }
        effects
    }

    /// The device to take the next group. Until every running device has reported, each takes no more than an equal
    /// share, so that the first to report does not take all.
    fn taker(&self) -> Option<usize> {
        let up = self.seats.iter().filter(|seat| seat.is_up).count().max(1);
        let is_complete = self.seats.iter().all(|seat| seat.is_heard || !seat.is_up);
        let share_max = if is_complete { usize::MAX } else { self.groups.len().div_ceil(up) };
        (0..self.seats.len())
            .filter(|&device| self.seats[device].room > 0 && self.seats[device].training == Training::Off)
            .filter(|&device| self.in_flight(device) < share_max)
            .min_by_key(|&device| (self.in_flight(device), device))
    }

    fn preempt(&mut self) -> Option<Effect> {
        let device = self.seats.iter().position(|seat| seat.training == Training::On)?;
        if self.waiting() == 0 && self.is_other_decoding(device) {
            return None;
        }
        self.seats[device].training = Training::Stopping;
        Some(Effect::PreemptDrafter { device })
    }

    fn train(&mut self) -> Option<Effect> {
        if !self.may_train || self.trainer().is_some() || self.waiting() > 0 {
            return None;
        }
        let is_drained = |device: &usize| self.seats[*device].is_heard && self.in_flight(*device) == 0;
        let device = (0..self.seats.len()).find(is_drained).filter(|&device| self.is_other_decoding(device))?;
        self.seats[device].training = Training::On;
        self.trainings += 1;
        Some(Effect::TrainDrafter { device, training: self.trainings })
    }

    fn is_other_decoding(&self, device: usize) -> bool {
        self.groups.iter().any(|group| matches!(group, Group::Assigned { device: owner } if *owner != device))
    }

    fn start_update(&mut self) -> Option<Effect> {
        let is_scored = self.groups.iter().all(|&group| group == Group::Scored);
        self.is_update_started = is_scored && self.trainer().is_none();
        self.is_update_started.then_some(Effect::StartUpdate)
    }
}

#[cfg(test)]
mod tests;
