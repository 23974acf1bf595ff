//! One rollout step: answers in flight, and what devices do that have run dry.
//!
//! * **STEP-1** Every answer ends exactly once, on the device that holds it; ended ones survive its loss.
//! * **STEP-2** An answer is held by at most one device, which is running, had room for it and does not train.
//! * **STEP-3** `Score` comes exactly once for each group, when all its answers have ended; `StartUpdate` exactly once, when
//!   every group is scored and no device trains the drafter.
//! * **STEP-4** A device trains the drafter only from when it has nothing to decode, nothing waits, and another device
//!   decodes. Several may train it together.
//! * **STEP-5** All are told to stop once no device decodes, or an answer waits that no other can take; one of them once halving
//!   what another device has left gains more than training is worth.
//! * **STEP-6** Answers of a lost device wait again, and waiting ones are handed out by group, in the order of their index.
//! * **STEP-7** A message of an earlier incarnation, drafter training or loan changes nothing.
//! * **STEP-8** If running devices answer and lost ones are started again, `StartUpdate` is reached.
//! * **STEP-9** A device borrows only when it has nothing to decode and nothing waits, from one that has at least two answers; one
//!   loan a borrower and a lender at a time. What a borrower cannot take over any more goes back to the lender.
//!
//! Which device decodes an answer never changes its tokens, so all of this is about time only.

mod answers;

use answers::{Answers, Place};

/// An answer of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId {
    /// Its group.
    pub group: usize,
    /// Which of the group's answers.
    pub sample: usize,
}

/// How much there is to do, and to do it with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Groups of the step.
    pub groups: usize,
    /// Answers of each group.
    pub samples: usize,
    /// Devices.
    pub devices: usize,
    /// Answers that a device decodes together, at most.
    pub slots_max: usize,
}

/// What a device without answers may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdleUse {
    /// Training the drafter.
    pub training: bool,
    /// Taking over answers of a device that has several.
    pub lending: bool,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A device can take answers.
    DeviceReady {
        /// Which device.
        device: usize,
        /// Its incarnation.
        epoch: u64,
    },
    /// An answer is complete.
    Ended {
        /// Which device decoded it.
        device: usize,
        /// Its incarnation.
        epoch: u64,
        /// Which answer.
        request: RequestId,
    },
    /// A device put these answers aside for another one: the answer to [`Effect::Lend`]. None if it had too few.
    Lent {
        /// Which device.
        device: usize,
        /// Its incarnation.
        epoch: u64,
        /// Number of the loan, as the effect gave it.
        loan: u64,
        /// Which answers.
        requests: Vec<RequestId>,
    },
    /// A group was scored, or given up.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Have answers of a group decoded, from the start or from where a lost device was.
    Assign {
        /// By this device.
        device: usize,
        /// This group.
        group: usize,
        /// These answers of it.
        samples: Vec<usize>,
    },
    /// Have all answers of this group scored.
    Score {
        /// Which group.
        group: usize,
    },
    /// Have half of its running answers put aside.
    Lend {
        /// By this device.
        device: usize,
        /// Number of the loan in the step.
        loan: u64,
    },
    /// Have the answers that were put aside decoded on.
    Borrow {
        /// By this device.
        device: usize,
        /// Number of the loan.
        loan: u64,
    },
    /// Have the drafter trained.
    TrainDrafter {
        /// By this device.
        device: usize,
        /// Number of this training in the step, so that an answer told twice does not end a later one.
        training: u64,
    },
    /// Stop that, within a kernel.
    PreemptDrafter {
        /// On this device.
        device: usize,
    },
    /// All groups are scored: train the policy.
    StartUpdate,
}

/// A group is split where there is room for this part of a device's slots.
const PARTS: usize = 4;
/// How many times faster the rest of so many answers must go if another device takes half of them, for a device that could train
/// the drafter instead: that is of use for later steps too.
const GAIN_MIN: f64 = 1.2;
/// The same for a device that has nothing else to do, or could train only beside others: more than noise.
const GAIN_MIN_IDLE: f64 = 1.05;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Training {
    Off,
    On { number: u64 },
    Stopping { number: u64 },
}

/// Answers that a device was asked to put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loan {
    number: u64,
    from: usize,
    /// For whom; no one if that one was lost meanwhile.
    to: Option<usize>,
}

/// A device in this step.
#[derive(Debug, Clone, Copy)]
struct Seat {
    /// Lowest epoch whose messages count.
    epoch: u64,
    is_up: bool,
    /// Whether this incarnation has said that it can take answers.
    is_heard: bool,
    training: Training,
}

/// The machine of one step.
#[derive(Debug, Clone)]
pub struct StepMachine {
    size: Size,
    answers: Answers,
    is_scored: Vec<bool>,
    /// Groups that are not.
    unscored: usize,
    seats: Vec<Seat>,
    /// What a drained device may be used for.
    idle: IdleUse,
    /// Trainings and loans begun.
    trainings: u64,
    loans: u64,
    /// Loans that their lenders have not answered.
    asked: Vec<Loan>,
    is_update_started: bool,
}

impl StepMachine {
    /// A step of which everything waits, on running devices of epoch 0 that have yet to report.
    ///
    /// Devices with higher epochs are made known by [`Event::DeviceRestarted`], lost ones by [`Event::DeviceLost`].
    ///
    /// # Panics
    /// If there is no answer, no device, or no slot.
    #[must_use]
    pub fn new(size: Size, idle: IdleUse) -> Self {
        let Size { groups, samples, devices, slots_max } = size;
        assert!(groups.min(samples).min(devices).min(slots_max) > 0, "a step of {size:?}");
        let seat = Seat { epoch: 0, is_up: true, is_heard: false, training: Training::Off };
        Self {
            size,
            answers: Answers::new(size),
            is_scored: vec![false; size.groups],
            unscored: size.groups,
            seats: vec![seat; size.devices],
            idle,
            trainings: 0,
            loans: 0,
            asked: Vec::new(),
            is_update_started: false,
        }
    }

    /// Takes in what happened; returns what is to be done, in this order.
    ///
    /// `gain` tells how many times faster so many answers of a device would go on if another one took half of them; 1 where that
    /// is not known.
    ///
    /// # Panics
    /// If the event names a device, a group or an answer that does not exist.
    #[must_use]
    pub fn apply(&mut self, event: Event, gain: &dyn Fn(usize) -> f64) -> Vec<Effect> {
        if self.is_update_started {
            return Vec::new();
        }
        let mut effects = Vec::new();
        match event {
            Event::DeviceReady { device, epoch } => self.hear(device, epoch),
            Event::Ended { device, epoch, request } => effects.extend(self.finish(device, epoch, request)),
            Event::Lent { device, epoch, loan, requests } => effects.extend(self.lent(device, epoch, loan, &requests)),
            Event::Scored { group } => self.score(group),
            Event::DeviceLost { device } => self.lose(device),
            Event::DrafterStopped { device, epoch, training } => self.stop(device, epoch, training),
            Event::DeviceRestarted { device, epoch } => self.welcome(device, epoch),
        }
        effects.extend(self.assign());
        effects.extend(self.use_idle(gain));
        effects.extend(self.preempt(gain));
        effects.extend(self.start_update());
        effects
    }

    /// Answers that no device has.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.answers.waiting()
    }

    /// Answers a device is decoding.
    ///
    /// # Panics
    /// If there is no such device.
    #[must_use]
    pub fn held(&self, device: usize) -> usize {
        self.answers.held(device)
    }

    /// Whether this answer is decoded by that device.
    ///
    /// # Panics
    /// If there is no such answer.
    #[must_use]
    pub fn is_held(&self, device: usize, request: RequestId) -> bool {
        self.answers.place(request) == Place::Held { device }
    }

    /// Devices that train the drafter, also while they are being stopped.
    pub fn trainers(&self) -> impl Iterator<Item = usize> {
        (0..self.seats.len()).filter(|device| self.seats[*device].training != Training::Off)
    }

    /// Whether `StartUpdate` was given; every later event is ignored.
    #[must_use]
    pub fn is_update_started(&self) -> bool {
        self.is_update_started
    }

    fn hear(&mut self, device: usize, epoch: u64) {
        // Its report may overtake the news of its restart.
        self.welcome(device, epoch);
        if self.is_current(device, epoch) {
            self.seats[device].is_heard = true;
        }
    }

    fn finish(&mut self, device: usize, epoch: u64, request: RequestId) -> Option<Effect> {
        if !self.is_current(device, epoch) || !self.is_held(device, request) {
            return None;
        }
        self.answers.put(request, Place::Ended);
        let group = request.group;
        self.answers.are_ended(group).then_some(Effect::Score { group })
    }

    /// The answers are the borrower's now, or the lender's again if that one is gone.
    fn lent(&mut self, from: usize, epoch: u64, number: u64, requests: &[RequestId]) -> Option<Effect> {
        let is_it = |loan: &Loan| loan.number == number && loan.from == from;
        let asked = self.asked.iter().position(is_it).filter(|_| self.is_current(from, epoch))?;
        let device = self.asked.remove(asked).to.unwrap_or(from);
        for request in requests {
            self.answers.put(*request, Place::Held { device });
        }
        (!requests.is_empty()).then_some(Effect::Borrow { device, loan: number })
    }

    fn score(&mut self, group: usize) {
        if self.answers.are_ended(group) && !std::mem::replace(&mut self.is_scored[group], true) {
            self.unscored -= 1;
        }
    }

    fn lose(&mut self, device: usize) {
        if self.seats[device].is_up {
            self.vacate(device, self.seats[device].epoch + 1, false);
        }
    }

    fn stop(&mut self, device: usize, epoch: u64, training: u64) {
        let is_current = self.is_current(device, epoch);
        let seat = &mut self.seats[device];
        let is_by_itself = seat.training == Training::On { number: training };
        if is_current && (is_by_itself || seat.training == Training::Stopping { number: training }) {
            seat.training = Training::Off;
            // A drafter that stopped by itself has learned enough in this step.
            self.idle.training &= !is_by_itself;
        }
    }

    /// Takes note of a new incarnation; nothing if it is known or outdated.
    fn welcome(&mut self, device: usize, epoch: u64) {
        let seat = self.seats[device];
        if epoch > seat.epoch || (epoch == seat.epoch && !seat.is_up) {
            self.vacate(device, epoch, true);
        }
    }

    /// Forgets what an incarnation was doing, and what another one waits to get from it.
    fn vacate(&mut self, device: usize, epoch: u64, is_up: bool) {
        self.seats[device] = Seat { epoch, is_up, is_heard: false, training: Training::Off };
        self.asked.retain(|loan| loan.from != device);
        for loan in &mut self.asked {
            loan.to = loan.to.filter(|to| *to != device);
        }
        self.answers.vacate(device);
    }

    fn is_current(&self, device: usize, epoch: u64) -> bool {
        self.seats[device].is_up && self.seats[device].epoch == epoch
    }

    /// Hands waiting answers to devices with room, group by group, the emptiest device first. A group is split where waiting for room
    /// for all of it would leave slots empty; each device takes its prompt through the target.
    fn assign(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        while let Some((group, mut samples)) = self.answers.first_waiting() {
            let Some((device, count)) = self.taker(samples.len()) else { break };
            samples.truncate(count);
            for &sample in &samples {
                self.answers.put(RequestId { group, sample }, Place::Held { device });
            }
            effects.push(Effect::Assign { device, group, samples });
        }
        effects
    }

    /// The device to take so many answers of a group, and how many of them. Until every running device has reported, each takes no
    /// more than an equal share, so that the first to report does not take all.
    fn taker(&self, samples: usize) -> Option<(usize, usize)> {
        let up = self.seats.iter().filter(|seat| seat.is_up).count().max(1);
        let is_complete = self.seats.iter().all(|seat| seat.is_heard || !seat.is_up);
        let share_max = if is_complete { usize::MAX } else { self.size.groups.div_ceil(up) * self.size.samples };
        let most = share_max.min(self.size.slots_max);
        let least = samples.min(self.size.slots_max.div_ceil(PARTS));
        let room = |device: usize| most.saturating_sub(self.held(device));
        (0..self.seats.len())
            .filter(|&device| self.seats[device].is_heard && self.seats[device].training == Training::Off)
            .filter(|&device| !self.is_borrowing(device) && room(device) >= least)
            .min_by_key(|&device| (self.held(device), device))
            .map(|device| (device, samples.min(room(device))))
    }

    /// Calls trainers back where they are needed: all for answers that wait, or because nothing is decoded any more; one because
    /// halving what another device has left has become worth more than what it does.
    fn preempt(&mut self, gain: &dyn Fn(usize) -> f64) -> Vec<Effect> {
        let may_go_on = self.waiting() == 0 && self.is_decoding();
        let is_stopping = self.seats.iter().any(|seat| matches!(seat.training, Training::Stopping { .. }));
        let is_lending = !is_stopping && self.lender(GAIN_MIN, gain).is_some();
        let count = if !may_go_on { self.seats.len() } else { usize::from(is_lending) };
        let mut stop = |(device, seat): (usize, &mut Seat)| {
            let Training::On { number } = seat.training else { return None };
            seat.training = Training::Stopping { number };
            Some(Effect::PreemptDrafter { device })
        };
        self.seats.iter_mut().enumerate().filter_map(&mut stop).take(count).collect()
    }

    /// Gives each device that has nothing to decode whatever ends the step soonest: half of another one's answers, or the drafter.
    fn use_idle(&mut self, gain: &dyn Fn(usize) -> f64) -> Vec<Effect> {
        if self.waiting() > 0 {
            return Vec::new();
        }
        let drained: Vec<usize> = (0..self.seats.len()).filter(|&device| self.is_drained(device)).collect();
        drained.into_iter().filter_map(|device| self.borrow(device, gain).or_else(|| self.train(device))).collect()
    }

    fn is_drained(&self, device: usize) -> bool {
        let seat = self.seats[device];
        seat.is_heard && seat.training == Training::Off && !self.is_borrowing(device) && self.held(device) == 0
    }

    /// Whether answers are on their way to this device.
    fn is_borrowing(&self, device: usize) -> bool {
        self.asked.iter().any(|loan| loan.to == Some(device))
    }

    fn borrow(&mut self, device: usize, gain: &dyn Fn(usize) -> f64) -> Option<Effect> {
        // One more trainer is worth less than the first.
        let is_trained = self.trainers().next().is_some();
        let gain_min = if self.idle.training && !is_trained { GAIN_MIN } else { GAIN_MIN_IDLE };
        let from = self.lender(gain_min, gain)?;
        self.loans += 1;
        self.asked.push(Loan { number: self.loans, from, to: Some(device) });
        Some(Effect::Lend { device: from, loan: self.loans })
    }

    /// The device with the most answers of those that gain as much by having half of them.
    fn lender(&self, gain_min: f64, gain: &dyn Fn(usize) -> f64) -> Option<usize> {
        let is_lending = |from: usize| self.asked.iter().any(|loan| loan.from == from);
        (0..self.seats.len())
            .filter(|&from| self.idle.lending && !is_lending(from) && self.held(from) >= 2)
            .filter(|&from| gain(self.held(from)) >= gain_min)
            .max_by_key(|&from| (self.held(from), std::cmp::Reverse(from)))
    }

    fn train(&mut self, device: usize) -> Option<Effect> {
        if !self.idle.training || !self.is_decoding() {
            return None;
        }
        self.trainings += 1;
        self.seats[device].training = Training::On { number: self.trainings };
        Some(Effect::TrainDrafter { device, training: self.trainings })
    }

    /// Whether any device does; trainers hold no answers.
    fn is_decoding(&self) -> bool {
        (0..self.seats.len()).any(|device| self.held(device) > 0)
    }

    fn start_update(&mut self) -> Option<Effect> {
        self.is_update_started = self.unscored == 0 && self.trainers().next().is_none();
        self.is_update_started.then_some(Effect::StartUpdate)
    }
}

#[cfg(test)]
mod tests;
