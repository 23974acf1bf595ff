//! Steps by hand, and a simulated machine room that loses, doubles and delays.

use proptest::prelude::*;

use super::*;

fn ready(device: usize, room: usize) -> Event {
    Event::DeviceReady { device, epoch: 0, room }
}

fn done(device: usize, group: usize) -> Event {
    Event::GroupDone { device, epoch: 0, group }
}

fn assign(device: usize, group: usize) -> Effect {
    Effect::Assign { device, group }
}

/// Applies each event and compares its effects.
fn play(machine: &mut StepMachine, moves: &[(Event, &[Effect])]) {
    for (number, (event, effects)) in moves.iter().enumerate() {
        assert_eq!(machine.apply(*event), *effects, "move {number}: {event:?}");
    }
}

#[test]
fn a_step_with_drafter_training() {
    let mut machine = StepMachine::new(3, 2, true);
    let stopped = Event::DrafterStopped { device: 1, epoch: 0, training: 1 };
    play(
        &mut machine,
        &[
            (ready(0, 4), &[assign(0, 0), assign(0, 1)]),
            (ready(1, 4), &[assign(1, 2)]),
            (done(1, 2), &[Effect::TrainDrafter { device: 1, training: 1 }]),
            (Event::Scored { group: 2 }, &[]),
            (done(0, 0), &[]),
            (done(0, 1), &[Effect::PreemptDrafter { device: 1 }]),
            (Event::Scored { group: 0 }, &[]),
            (Event::Scored { group: 1 }, &[]),
            (stopped, &[Effect::StartUpdate]),
            (stopped, &[]),
        ],
    );
    assert!(machine.is_update_started());
}

#[test]
fn without_drafter_training_no_one_trains() {
    let mut machine = StepMachine::new(2, 2, false);
    play(
        &mut machine,
        &[
            (ready(0, 4), &[assign(0, 0)]),
            (ready(1, 4), &[assign(1, 1)]),
            (done(1, 1), &[]),
            (done(0, 0), &[]),
            (Event::Scored { group: 0 }, &[]),
            (Event::Scored { group: 1 }, &[Effect::StartUpdate]),
        ],
    );
}

#[test]
fn groups_of_a_lost_device_go_to_others_in_order() {
    let mut machine = StepMachine::new(4, 2, true);
    play(
        &mut machine,
        &[
            (ready(0, 1), &[assign(0, 0)]),
            (ready(1, 3), &[assign(1, 1), assign(1, 2), assign(1, 3)]),
            (done(1, 2), &[]),
            (Event::DeviceLost { device: 1 }, &[]),
            (done(1, 3), &[]),
            (ready(0, 2), &[assign(0, 1), assign(0, 3)]),
            (done(0, 2), &[]),
            (Event::DeviceRestarted { device: 1, epoch: 1 }, &[]),
            (Event::DeviceReady { device: 1, epoch: 1, room: 3 }, &[Effect::TrainDrafter { device: 1, training: 1 }]),
        ],
    );
}

#[test]
fn a_trainer_is_called_back_for_groups_no_one_else_can_take() {
    let mut machine = StepMachine::new(2, 3, true);
    play(
        &mut machine,
        &[
            (ready(0, 1), &[assign(0, 0)]),
            (ready(1, 1), &[assign(1, 1)]),
            (ready(2, 1), &[Effect::TrainDrafter { device: 2, training: 1 }]),
            (Event::DeviceLost { device: 1 }, &[Effect::PreemptDrafter { device: 2 }]),
            (Event::DrafterStopped { device: 2, epoch: 0, training: 1 }, &[assign(2, 1)]),
        ],
    );
}

#[test]
fn a_drafter_that_stopped_by_itself_is_not_trained_again() {
    let mut machine = StepMachine::new(1, 2, true);
    play(
        &mut machine,
        &[
            (ready(0, 1), &[assign(0, 0)]),
            (ready(1, 1), &[Effect::TrainDrafter { device: 1, training: 1 }]),
            (Event::DrafterStopped { device: 1, epoch: 0, training: 1 }, &[]),
            (ready(1, 1), &[]),
        ],
    );
}

/// A device as it is, whatever the machine believes.
#[derive(Debug, Clone, Default)]
struct Device {
    epoch: u64,
    is_up: bool,
    groups: Vec<usize>,
    is_training: bool,
    training: u64,
    is_stopping: bool,
}

/// All that is outside the machine.
struct Room {
    machine: StepMachine,
    devices: Vec<Device>,
    slots: usize,
    /// Losses not yet told.
    losses: Vec<usize>,
    unscored: Vec<usize>,
    done: Vec<bool>,
    scored: usize,
    updates: usize,
    /// Everything ever told, to be told again.
    told: Vec<Event>,
}

impl Room {
    fn new(groups: usize, devices: usize, slots: usize) -> Self {
        Self {
            machine: StepMachine::new(groups, devices, true),
            devices: vec![Device { is_up: true, ..Device::default() }; devices],
            slots,
            losses: Vec::new(),
            unscored: Vec::new(),
            done: vec![false; groups],
            scored: 0,
            updates: 0,
            told: Vec::new(),
        }
    }

    fn tell(&mut self, event: Event) {
        // A loss carries no epoch and is told once by the runtime, so it is not repeated.
        if !matches!(event, Event::DeviceLost { .. }) {
            self.told.push(event);
        }
        for effect in self.machine.apply(event) {
            self.perform(effect);
        }
        self.check();
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Assign { device, group } => {
                let held = self.devices.iter().any(|device| device.is_up && device.groups.contains(&group));
                assert!(!held && !self.done[group], "STEP-2: group {group} has an owner or is done");
                assert!(!self.devices[device].is_training, "STEP-2: device {device} trains");
                if self.devices[device].is_up {
                    self.devices[device].groups.push(group);
                }
            }
            Effect::TrainDrafter { device, training } => {
                let others = self.devices.iter().enumerate().filter(|(other, _)| *other != device);
                assert!(others.clone().all(|(_, other)| !other.is_training), "STEP-4: two trainers");
                assert_eq!(self.machine.waiting(), 0, "STEP-4: a group waits");
                assert!(self.devices[device].groups.is_empty(), "STEP-4: the trainer decodes");
                self.devices[device].is_training = self.devices[device].is_up;
                self.devices[device].training = training;
            }
            Effect::PreemptDrafter { device } => self.devices[device].is_stopping = true,
            Effect::StartUpdate => {
                self.updates += 1;
                assert_eq!((self.updates, self.scored), (1, self.done.len()), "STEP-3");
                assert!(self.devices.iter().all(|device| !device.is_up || !device.is_training), "STEP-3: training");
            }
        }
    }

    fn check(&self) {
        let Some(trainer) = self.machine.trainer() else { return };
        let is_decoding = (0..self.devices.len()).any(|other| other != trainer && self.machine.in_flight(other) > 0);
        let is_stopping = self.devices[trainer].is_stopping || !self.devices[trainer].is_up;
        assert!(is_stopping || (is_decoding && self.machine.waiting() == 0), "STEP-5");
    }

    fn report(&mut self, device: usize) {
        let Device { epoch, is_up, ref groups, .. } = self.devices[device];
        let room = self.slots.saturating_sub(groups.len());
        if is_up {
            self.tell(Event::DeviceReady { device, epoch, room });
        }
    }

    fn finish(&mut self, device: usize, pick: usize) {
        let groups = self.devices[device].groups.len();
        if !self.devices[device].is_up || groups == 0 {
            return;
        }
        let group = self.devices[device].groups.remove(pick % groups);
        assert!(!self.done[group], "STEP-1: group {group} done twice");
        self.done[group] = true;
        self.unscored.push(group);
        self.tell(Event::GroupDone { device, epoch: self.devices[device].epoch, group });
        self.report(device);
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
            16 if !self.told.is_empty() => self.tell(self.told[pick % self.told.len()]),
            _ => {}
        }
    }

    /// Everyone answers and comes back.
    fn settle(&mut self) {
        for _ in 0..=2 * self.done.len() {
            for device in 0..self.devices.len() {
                self.tell_loss();
                self.restart(device);
                self.report(device);
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
    fn step_1_to_8(
        groups in 1usize..10, devices in 1usize..5, slots in 1usize..4,
        actions in prop::collection::vec((0u8..17, 0usize..5, any::<usize>()), 0..150),
    ) {
        let mut room = Room::new(groups, devices, slots);
        for (action, device, pick) in actions {
            room.act(action, device, pick);
        }
        room.settle();
        prop_assert_eq!(room.updates, 1);
        prop_assert!(room.machine.is_update_started());
    }
}
