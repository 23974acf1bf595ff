//! Steps by hand, and in a simulated machine room.

use super::*;

mod room;

const TRAINING: IdleUse = IdleUse { training: true, lending: false };
const BOTH: IdleUse = IdleUse { training: true, lending: true };

/// Groups of one answer.
fn singles(groups: usize, devices: usize, slots_max: usize) -> Size {
    Size { groups, samples: 1, devices, slots_max }
}

fn ready(device: usize) -> Event {
    Event::DeviceReady { device, epoch: 0 }
}

fn ended(device: usize, group: usize, sample: usize) -> Event {
    Event::Ended { device, epoch: 0, request: RequestId { group, sample } }
}

fn assign(device: usize, group: usize, samples: &[usize]) -> Effect {
    Effect::Assign { device, group, samples: samples.to_vec() }
}

fn score(group: usize) -> Effect {
    Effect::Score { group }
}

fn lent(device: usize, loan: u64, requests: &[(usize, usize)]) -> Event {
    let requests = requests.iter().map(|&(group, sample)| RequestId { group, sample }).collect();
    Event::Lent { device, epoch: 0, loan, requests }
}

/// Applies each event and compares its effects.
fn play(machine: &mut StepMachine, gain: f64, moves: &[(Event, &[Effect])]) {
    for (number, (event, effects)) in moves.iter().enumerate() {
        assert_eq!(machine.apply(event.clone(), &|_| gain), *effects, "move {number}: {event:?}");
    }
}

#[test]
fn a_step_with_drafter_training() {
    let mut machine = StepMachine::new(singles(3, 2, 4), TRAINING);
    let stopped = Event::DrafterStopped { device: 1, epoch: 0, training: 1 };
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0]), assign(0, 1, &[0])]),
            (ready(1), &[assign(1, 2, &[0])]),
            (ended(1, 2, 0), &[score(2), Effect::TrainDrafter { device: 1, training: 1 }]),
            (Event::Scored { group: 2 }, &[]),
            (ended(0, 0, 0), &[score(0)]),
            (ended(0, 1, 0), &[score(1), Effect::PreemptDrafter { device: 1 }]),
            (Event::Scored { group: 0 }, &[]),
            (Event::Scored { group: 1 }, &[]),
            (stopped.clone(), &[Effect::StartUpdate]),
            (stopped, &[]),
        ],
    );
    assert!(machine.is_update_started());
}

#[test]
fn without_a_use_for_idle_time_devices_wait() {
    let mut machine = StepMachine::new(singles(2, 2, 4), IdleUse { training: false, lending: false });
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0])]),
            (ready(1), &[assign(1, 1, &[0])]),
            (ended(1, 1, 0), &[score(1)]),
            (ended(0, 0, 0), &[score(0)]),
            (Event::Scored { group: 0 }, &[]),
            (Event::Scored { group: 1 }, &[Effect::StartUpdate]),
        ],
    );
}

#[test]
fn answers_of_a_lost_device_go_to_others_in_order() {
    let mut machine = StepMachine::new(Size { groups: 3, samples: 2, devices: 2, slots_max: 4 }, TRAINING);
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0, 1]), assign(0, 1, &[0, 1])]),
            (ready(1), &[assign(1, 2, &[0, 1])]),
            (ended(0, 1, 1), &[]),
            (Event::DeviceLost { device: 0 }, &[assign(1, 0, &[0, 1])]),
            (ended(0, 0, 0), &[]),
            (ended(1, 2, 0), &[assign(1, 1, &[0])]),
            (ended(1, 1, 0), &[score(1)]),
            (Event::DeviceRestarted { device: 0, epoch: 1 }, &[]),
            (Event::DeviceReady { device: 0, epoch: 1 }, &[Effect::TrainDrafter { device: 0, training: 1 }]),
        ],
    );
}

#[test]
fn a_group_is_split_where_slots_would_stay_empty() {
    let mut machine = StepMachine::new(Size { groups: 2, samples: 8, devices: 1, slots_max: 8 }, TRAINING);
    let all: Vec<usize> = (0..8).collect();
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &all)]),
            // A part of two is worth a prompt.
            (ended(0, 0, 3), &[]),
            (ended(0, 0, 5), &[assign(0, 1, &[0, 1])]),
            (ended(0, 1, 0), &[]),
            (ended(0, 1, 1), &[assign(0, 1, &[2, 3])]),
            (Event::DeviceLost { device: 0 }, &[]),
            (Event::DeviceReady { device: 0, epoch: 1 }, &[assign(0, 0, &[0, 1, 2, 4, 6, 7]), assign(0, 1, &[2, 3])]),
        ],
    );
}

/// More answers than a device has slots.
#[test]
fn a_large_group_goes_in_parts() {
    let mut machine = StepMachine::new(Size { groups: 1, samples: 5, devices: 1, slots_max: 2 }, TRAINING);
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0, 1])]),
            (ended(0, 0, 0), &[assign(0, 0, &[2])]),
            (ended(0, 0, 2), &[assign(0, 0, &[3])]),
            (ended(0, 0, 1), &[assign(0, 0, &[4])]),
            (ended(0, 0, 4), &[]),
            (ended(0, 0, 3), &[score(0)]),
        ],
    );
}

#[test]
fn a_trainer_is_called_back_for_answers_no_one_else_can_take() {
    let mut machine = StepMachine::new(singles(2, 3, 1), TRAINING);
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0])]),
            (ready(1), &[assign(1, 1, &[0])]),
            (ready(2), &[Effect::TrainDrafter { device: 2, training: 1 }]),
            (Event::DeviceLost { device: 1 }, &[Effect::PreemptDrafter { device: 2 }]),
            (Event::DrafterStopped { device: 2, epoch: 0, training: 1 }, &[assign(2, 1, &[0])]),
        ],
    );
}

#[test]
fn devices_that_have_run_dry_train_together() {
    let mut machine = StepMachine::new(singles(3, 4, 1), TRAINING);
    let stopped = |device, training| Event::DrafterStopped { device, epoch: 0, training };
    let [train, stop]: [fn(usize, u64) -> Effect; 2] =
        [|device, training| Effect::TrainDrafter { device, training }, |device, _| Effect::PreemptDrafter { device }];
    play(
        &mut machine,
        1.0,
        &[
            (ready(0), &[assign(0, 0, &[0])]),
            (ready(1), &[assign(1, 1, &[0])]),
            (ready(2), &[assign(2, 2, &[0])]),
            (ready(3), &[train(3, 1)]),
            (ended(2, 2, 0), &[score(2), train(2, 2)]),
            // What a lost device had begun is for one that does not train; nobody else can take it.
            (Event::DeviceLost { device: 1 }, &[stop(2, 0), stop(3, 0)]),
            // An answer that comes late, or of another training, changes nothing.
            (stopped(3, 2), &[]),
            (stopped(3, 1), &[assign(3, 1, &[0])]),
            (stopped(2, 2), &[train(2, 3)]),
            (ended(0, 0, 0), &[score(0), train(0, 4)]),
            (ended(3, 1, 0), &[score(1), stop(0, 0), stop(2, 0)]),
            (Event::Scored { group: 0 }, &[]),
            (Event::Scored { group: 1 }, &[]),
            (Event::Scored { group: 2 }, &[]),
            (stopped(0, 4), &[]),
            (stopped(2, 3), &[Effect::StartUpdate]),
        ],
    );
}

#[test]
fn a_drafter_that_stopped_by_itself_is_not_trained_again() {
    let mut machine = StepMachine::new(singles(1, 2, 1), TRAINING);
    play(
        &mut machine,
        2.0,
        &[
            (ready(0), &[assign(0, 0, &[0])]),
            (ready(1), &[Effect::TrainDrafter { device: 1, training: 1 }]),
            (Event::DrafterStopped { device: 1, epoch: 0, training: 1 }, &[]),
            (ready(1), &[]),
        ],
    );
}

#[test]
fn a_device_that_has_run_dry_takes_half_of_the_others_answers() {
    let mut machine = StepMachine::new(Size { groups: 2, samples: 4, devices: 2, slots_max: 4 }, BOTH);
    let all = [0, 1, 2, 3];
    play(
        &mut machine,
        1.5,
        &[
            (ready(0), &[assign(0, 0, &all)]),
            (ready(1), &[assign(1, 1, &all)]),
            (ended(1, 1, 0), &[]),
            (ended(1, 1, 1), &[]),
            (ended(1, 1, 2), &[]),
            (ended(1, 1, 3), &[score(1), Effect::Lend { device: 0, loan: 1 }]),
            (ended(0, 0, 0), &[]),
            (lent(0, 1, &[(0, 3)]), &[Effect::Borrow { device: 1, loan: 1 }]),
            (ended(0, 0, 3), &[]),
            // The borrower has run dry again; two are left.
            (ended(1, 0, 3), &[Effect::Lend { device: 0, loan: 2 }]),
            (lent(0, 2, &[(0, 2)]), &[Effect::Borrow { device: 1, loan: 2 }]),
            // One has nobody to share with.
            (ended(0, 0, 1), &[Effect::TrainDrafter { device: 0, training: 1 }]),
            (ended(1, 0, 2), &[score(0), Effect::PreemptDrafter { device: 0 }]),
        ],
    );
}

#[test]
fn a_small_gain_is_for_who_cannot_train() {
    let mut machine = StepMachine::new(Size { groups: 1, samples: 2, devices: 3, slots_max: 2 }, BOTH);
    play(
        &mut machine,
        1.1,
        &[
            (ready(0), &[assign(0, 0, &[0, 1])]),
            (ready(1), &[Effect::TrainDrafter { device: 1, training: 1 }]),
            (ready(2), &[Effect::Lend { device: 0, loan: 1 }]),
        ],
    );
    // Nor where it has nothing else to do.
    let mut machine = StepMachine::new(Size { groups: 1, samples: 2, devices: 2, slots_max: 2 }, BOTH);
    let stopped = Event::DrafterStopped { device: 1, epoch: 0, training: 1 };
    play(
        &mut machine,
        1.1,
        &[
            (ready(0), &[assign(0, 0, &[0, 1])]),
            (ready(1), &[Effect::TrainDrafter { device: 1, training: 1 }]),
            (stopped, &[Effect::Lend { device: 0, loan: 1 }]),
        ],
    );
    let mut machine = StepMachine::new(Size { groups: 1, samples: 2, devices: 2, slots_max: 2 }, BOTH);
    play(&mut machine, 1.0, &[(ready(0), &[assign(0, 0, &[0, 1])])]);
    assert_eq!(machine.apply(ready(1), &|_| 1.0), [Effect::TrainDrafter { device: 1, training: 1 }]);
    let stopped = Event::DrafterStopped { device: 1, epoch: 0, training: 1 };
    assert_eq!(machine.apply(stopped, &|_| 1.0), [], "nothing to gain");
}

#[test]
fn a_trainer_is_called_back_once_halving_gains_more() {
    let mut machine = StepMachine::new(Size { groups: 1, samples: 4, devices: 2, slots_max: 4 }, BOTH);
    let gain = |batch: usize| if batch == 2 { 1.5 } else { 1.0 };
    let mut play = |event: Event, effects: &[Effect]| assert_eq!(machine.apply(event, &gain), effects);
    play(ready(0), &[assign(0, 0, &[0, 1, 2, 3])]);
    play(ready(1), &[Effect::TrainDrafter { device: 1, training: 1 }]);
    play(ended(0, 0, 3), &[]);
    play(ended(0, 0, 1), &[Effect::PreemptDrafter { device: 1 }]);
    let stopped = Event::DrafterStopped { device: 1, epoch: 0, training: 1 };
    play(stopped, &[Effect::Lend { device: 0, loan: 1 }]);
    play(lent(0, 1, &[(0, 2)]), &[Effect::Borrow { device: 1, loan: 1 }]);
    play(ended(0, 0, 0), &[Effect::TrainDrafter { device: 0, training: 2 }]);
}

#[test]
fn a_loan_that_no_one_can_take_goes_back() {
    let mut machine = StepMachine::new(Size { groups: 1, samples: 2, devices: 2, slots_max: 2 }, BOTH);
    play(
        &mut machine,
        1.5,
        &[
            (ready(0), &[assign(0, 0, &[0, 1])]),
            (ready(1), &[Effect::Lend { device: 0, loan: 1 }]),
            (Event::DeviceLost { device: 1 }, &[]),
            (lent(0, 1, &[(0, 1)]), &[Effect::Borrow { device: 0, loan: 1 }]),
            (Event::DeviceReady { device: 1, epoch: 1 }, &[Effect::Lend { device: 0, loan: 2 }]),
            // The lender is lost before it answers: both answers begin anew.
            (Event::DeviceLost { device: 0 }, &[assign(1, 0, &[0, 1])]),
            (lent(0, 2, &[(0, 1)]), &[]),
        ],
    );
}
