//! A simulated machine room that loses, doubles and delays.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A device as it is, whatever the machine believes.
#[derive(Debug, Clone, Default)]
struct Device {
    epoch: u64,
    is_up: bool,
    requests: Vec<RequestId>,
    /// Loans that it is asked for.
    asked: Vec<u64>,
    is_training: bool,
    training: u64,
    is_stopping: bool,
}

/// All that is outside the machine.
struct Room {
    machine: StepMachine,
    size: Size,
    gain: f64,
    devices: Vec<Device>,
    /// Answers on their way, by loan.
    lent: BTreeMap<u64, Vec<RequestId>>,
    /// Losses not yet told.
    losses: Vec<usize>,
    unscored: Vec<usize>,
    ended: Vec<RequestId>,
    asked_to_score: Vec<bool>,
    scored: usize,
    updates: usize,
    /// Everything ever told, to be told again.
    told: Vec<Event>,
}

impl Room {
    fn new(size: Size, gain: f64) -> Self {
        Self {
            machine: StepMachine::new(size, BOTH),
            size,
            gain,
            devices: vec![Device { is_up: true, ..Device::default() }; size.devices],
            lent: BTreeMap::new(),
            losses: Vec::new(),
            unscored: Vec::new(),
            ended: Vec::new(),
            asked_to_score: vec![false; size.groups],
            scored: 0,
            updates: 0,
            told: Vec::new(),
        }
    }

    fn tell(&mut self, event: Event) {
        // A loss carries no epoch and is told once by the runtime, so it is not repeated.
        if !matches!(event, Event::DeviceLost { .. }) {
            self.told.push(event.clone());
        }
        let gain = self.gain;
        for effect in self.machine.apply(event, &|_| gain) {
            self.perform(effect);
        }
        self.check();
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Assign { device, group, samples } => {
                let requests: Vec<_> = samples.into_iter().map(|sample| RequestId { group, sample }).collect();
                self.take(device, &requests);
            }
            Effect::Score { group } => {
                assert!(!self.asked_to_score[group], "STEP-3: group {group} twice");
                self.asked_to_score[group] = true;
                self.unscored.push(group);
            }
            Effect::Lend { device, loan } => {
                assert!(self.machine.held(device) >= 2, "STEP-9: device {device} lends its last");
                assert_eq!(self.machine.waiting(), 0, "STEP-9: an answer waits");
                assert!(self.devices[device].asked.is_empty(), "STEP-9: device {device} lends twice");
                if self.devices[device].is_up {
                    self.devices[device].asked.push(loan);
                }
            }
            Effect::Borrow { device, loan } => {
                let requests = self.lent.remove(&loan).expect("STEP-9: something to borrow");
                self.take(device, &requests);
            }
            Effect::TrainDrafter { device, training } => {
                let is_decoding = (0..self.devices.len()).any(|other| other != device && self.machine.held(other) > 0);
                assert!(is_decoding, "STEP-4: nothing is decoded");
                assert!(!self.devices[device].is_training, "STEP-4: device {device} trains already");
                assert_eq!(self.machine.waiting(), 0, "STEP-4: an answer waits");
                assert!(self.devices[device].requests.is_empty(), "STEP-4: the trainer decodes");
                self.devices[device].is_training = self.devices[device].is_up;
                self.devices[device].training = training;
            }
            Effect::PreemptDrafter { device } => self.devices[device].is_stopping = true,
            Effect::StartUpdate => {
                self.updates += 1;
                assert_eq!((self.updates, self.scored), (1, self.size.groups), "STEP-3");
                assert!(self.devices.iter().all(|device| !device.is_up || !device.is_training), "STEP-3: training");
            }
        }
    }

    fn take(&mut self, device: usize, requests: &[RequestId]) {
        for request in requests {
            let held = self.devices.iter().any(|device| device.is_up && device.requests.contains(request));
            assert!(!held && !self.ended.contains(request), "STEP-2: {request:?} is held or has ended");
        }
        let Device { is_up, is_training, requests: here, .. } = &mut self.devices[device];
        assert!(!*is_training, "STEP-2: device {device} trains");
        if *is_up {
            here.extend(requests);
            assert!(here.len() <= self.size.slots_max, "STEP-2: device {device} has no room");
        }
    }

    fn check(&self) {
        self.machine.answers.check();
        let is_decoding = (0..self.devices.len()).any(|device| self.machine.held(device) > 0);
        let is_stopping = |trainer: usize| self.devices[trainer].is_stopping || !self.devices[trainer].is_up;
        let may_go_on = is_decoding && self.machine.waiting() == 0;
        assert!(may_go_on || self.machine.trainers().all(is_stopping), "STEP-5");
        // Of a lost device the machine may not have heard.
        let is_known = |d: usize| self.devices[d].is_up && !self.losses.contains(&d);
        let may_lend = |d: usize| is_known(d) && self.machine.held(d) >= 2 && self.devices[d].asked.is_empty();
        let is_wanted = self.gain >= GAIN_MIN && (0..self.devices.len()).any(may_lend);
        let trainers: Vec<usize> = self.machine.trainers().collect();
        let is_free = trainers.is_empty() || trainers.into_iter().any(is_stopping);
        assert!(is_free || !is_wanted, "STEP-5: an answer could be lent");
    }

    fn report(&mut self, device: usize) {
        let Device { epoch, is_up, .. } = self.devices[device];
        if is_up {
            self.tell(Event::DeviceReady { device, epoch });
        }
    }

    fn finish(&mut self, device: usize, pick: usize) {
        let requests = self.devices[device].requests.len();
        if !self.devices[device].is_up || requests == 0 {
            return;
        }
        let request = self.devices[device].requests.remove(pick % requests);
        assert!(!self.ended.contains(&request), "STEP-1: {request:?} ended twice");
        self.ended.push(request);
        self.tell(Event::Ended { device, epoch: self.devices[device].epoch, request });
    }

    fn lend(&mut self, device: usize) {
        let Device { is_up: true, epoch, requests, asked, .. } = &mut self.devices[device] else { return };
        let Some(loan) = asked.pop() else { return };
        let away = requests.split_off(requests.len().div_ceil(2));
        let epoch = *epoch;
        self.lent.insert(loan, away.clone());
        self.tell(Event::Lent { device, epoch, loan, requests: away });
    }

    fn score(&mut self, pick: usize) {
        if !self.unscored.is_empty() {
            let group = self.unscored.remove(pick % self.unscored.len());
            self.scored += 1;
            self.tell(Event::Scored { group });
        }
    }

    fn stop(&mut self, device: usize) {
        let Device { epoch, is_up, is_training, training, .. } = self.devices[device];
        if is_up && is_training {
            (self.devices[device].is_training, self.devices[device].is_stopping) = (false, false);
            self.tell(Event::DrafterStopped { device, epoch, training });
        }
    }

    fn kill(&mut self, device: usize) {
        if self.devices[device].is_up {
            let epoch = self.devices[device].epoch + 1;
            self.devices[device] = Device { epoch, ..Device::default() };
            self.losses.push(device);
        }
    }

    fn tell_loss(&mut self) {
        if let Some(device) = self.losses.pop() {
            self.tell(Event::DeviceLost { device });
        }
    }

    fn restart(&mut self, device: usize) {
        if !self.devices[device].is_up && !self.losses.contains(&device) {
            self.devices[device].is_up = true;
            self.tell(Event::DeviceRestarted { device, epoch: self.devices[device].epoch });
        }
    }

    fn act(&mut self, action: u8, device: usize, pick: usize) {
        let device = device % self.devices.len();
        match action {
            0..=2 => self.report(device),
            3..=6 => self.finish(device, pick),
            7..=8 => self.score(pick),
            9..=10 if self.devices[device].is_stopping => self.stop(device),
            11 => self.stop(device),
            12 => self.kill(device),
            13 => self.tell_loss(),
            14..=15 => self.restart(device),
            16 if !self.told.is_empty() => self.tell(self.told[pick % self.told.len()].clone()),
            17..=18 => self.lend(device),
            _ => {}
        }
    }

    /// Everyone answers and comes back.
    fn settle(&mut self) {
        for _ in 0..=3 * self.size.groups * self.size.samples {
            for device in 0..self.devices.len() {
                self.tell_loss();
                self.restart(device);
                self.report(device);
                self.lend(device);
                if self.devices[device].is_stopping {
                    self.stop(device);
                }
                self.finish(device, 0);
                self.score(0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn step_1_to_9(
        (groups, samples, devices, slots_max) in (1usize..8, 1usize..6, 1usize..5, 1usize..9),
        gain in prop::sample::select(vec![1.0, 1.1, 2.0]),
        actions in prop::collection::vec((0u8..19, 0usize..5, any::<usize>()), 0..150),
    ) {
        let mut room = Room::new(Size { groups, samples, devices, slots_max }, gain);
        for (action, device, pick) in actions {
            room.act(action, device, pick);
        }
        room.settle();
        prop_assert_eq!(room.updates, 1);
        prop_assert!(room.machine.is_update_started());
    }
}
