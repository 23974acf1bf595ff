//! What exams are of, what they find out, and when there is nothing more to find out.

use super::*;
use crate::experience::Habits;

/// A device that has drafted with a version, and a learner that has one due.
fn due(device: &Device) -> Shared {
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() == 0 || !learning.lock().publication.is_due() {
        device.teach_for(&learning, 3);
    }
    learning
}

/// Reads so much of the exam that the version in use is through with it, and the newest one is not.
fn read_in_use(device: &Device, learning: &Shared) {
    let is_read = || learning.lock().exam.as_ref().is_some_and(|exam| exam.is_in_use_read());
    // At the second look a part of it is read, at the third it stops.
    while !is_read() {
        device.teach_for(learning, 3);
    }
    assert!(learning.lock().publication.is_due(), "the newest one has been through, too");
}

#[test]
fn an_exam_is_of_one_policy() {
    let device = Device::new(16);
    let learning = due(&device);
    read_in_use(&device, &learning);
    let begin = |policy: u32| {
        device.speculator.begin_policy(policy);
        let mut held = learning.lock();
        let (exam, _) = held.begin_exam(&device.speculator);
        let found = (exam.policy, exam.is_in_use_read(), exam.by_in_use.guesses.right.len());
        held.exam = Some(exam);
        found
    };
    let (policy, is_read, guesses) = begin(0);
    assert!(policy == 0 && is_read && guesses > 0, "an interruption changes nothing");
    assert_eq!(begin(1), (1, false, 0), "the policy has been updated");
}

#[test]
fn whether_the_target_has_moved_on_is_found_out_under_its_policy() {
    let device = Device::new(16);
    let learning = due(&device);
    read_in_use(&device, &learning);
    settle(&mut learning.lock().publication);
    learning.lock().publication.fall_due();
    // What it guessed of the earlier policy's answers was right.
    learning.lock().exam.as_mut().unwrap().by_in_use.guesses.right.fill(true);
    let find_out = || {
        let vocabulary = Vocabulary::whole(&device.target);
        let mut workspace = Workspace::default();
        let lesson = device.lesson(&device.pool, &vocabulary, &mut workspace);
        learning.lock().is_worth_it = None;
        let mut learned = Learned::default();
        (learning.is_worth_it(&lesson, &mut learned, &mut || false).unwrap(), learned.before)
    };
    let found: Vec<bool> = (0..4).map(|_| find_out().0).collect();
    assert_eq!(found, [true, false, true, false], "it seems to guess as well as before: longer and longer rests");
    device.speculator.begin_policy(1);
    device.speculator.collect(&device.answers_of(1));
    let (is_worth_it, before) = find_out();
    let before = before.expect("it is the policy's first exam").0;
    assert!(is_worth_it && before < 0.6, "it guesses {before} now");
}

#[test]
fn learning_ends_within_a_tail_once_versions_get_no_better() {
    let device = Device::new(8);
    let learning = due(&device);
    // Versions stopped getting better, and this opportunity's are no better.
    let mut publication = learning.lock().publication.clone();
    while !publication.has_settled() {
        let _ = publication.judge(Duel { guesses: 1_000, right: 300, only: (0, 4), is_alone: false });
    }
    publication.fall_due();
    learning.lock().publication = publication;
    let (version, vocabulary) = (device.speculator.version(), Vocabulary::whole(&device.target));
    let learn = &|| {
        let pool = Pool::default();
        let (mut workspace, mut looks) = (Workspace::default(), 0);
        let lesson = device.lesson(&pool, &vocabulary, &mut workspace);
        let stop = || {
            looks += 1;
            looks > 100_000
        };
        learning.go_on(&lesson, stop).unwrap()
    };
    // Somebody is at it, so that the opportunity is not a new one.
    let _at_work = learning.enter(&mut || false);
    learning.lock().is_worth_it = Some(true);
    learning.lock().tries = Tries { count: TRIES - 1, gain: -1.0 };
    let learned: Vec<Learned> = std::thread::scope(|scope| {
        let devices = [0; 2].map(|_| scope.spawn(learn));
        devices.into_iter().map(|device| device.join().unwrap()).collect()
    });
    assert!(learned.iter().all(|learned| learned.rests), "they leave by themselves: {learned:?}");
    let found = learned.into_iter().fold(Learned::default(), Learned::and);
    assert!(found.held_out.is_some() && !learning.lock().publication.is_due());
    assert!(found.discarded > 0 || device.speculator.version() > version, "what was found last is used");
    let mut workspace = Workspace::default();
    let lesson = device.lesson(&device.pool, &vocabulary, &mut workspace);
    assert!(matches!(learning.lock().next(&lesson, 2, &mut Learned::default()), Task::Rest));
}

#[test]
fn a_version_that_is_due_is_examined_by_who_goes_on() {
    let device = Device::new(16);
    let learning = due(&device);
    let version = device.speculator.version();
    let (experience, answers) = (device.speculator.experience(), device.answers());
    let (learner, publication) = learning.lock().left();
    let habits = experience.habits.map(|habits| Habits { publication, ..habits });
    let habits = serde_json::from_str(&serde_json::to_string(&habits).unwrap()).unwrap();
    let experience = Experience { published: device.speculator.published(), learner, habits, ..Experience::default() };
    let again = Speculator::new(&device.speculator.plan, 3, experience, device.speculator.seen());
    again.collect(&answers);
    let device = Device { speculator: again, ..device };
    let learning = device.speculator.learning(&device.target, &mut || false).unwrap().unwrap();
    let steps = learning.lock().learner.steps();
    assert!(learning.lock().publication.is_due());
    let mut learned = Learned::default();
    while learning.lock().publication.is_due() {
        learned = learned.and(device.teach_for(&learning, 3));
    }
    assert_eq!((learned.batches, learning.lock().learner.steps()), (0, steps), "at once");
    let published = u64::from(learned.discarded == 0);
    assert_eq!(device.speculator.version(), version + published);
    // One that begins has nothing due, whatever became of another.
    let mut publication = Publication::default();
    publication.fall_due();
    assert!(!device.learning((None, publication)).lock().publication.is_due());
}

#[test]
fn a_version_of_which_nothing_is_known_is_left() {
    let device = Device::new(16);
    let learning = due(&device);
    let in_use = device.speculator.published().unwrap();
    // As it is early in a run that begins with a drafter: nothing is held out yet.
    *lock(&device.speculator.buffer) = models::drafter::buffer::Buffer::new(1 << 14);
    learning.lock().exam = None;
    learning.lock().publication = Publication::of_taught();
    learning.lock().publication.fall_due();
    let mut learned = Learned::default();
    while learning.lock().publication.is_due() {
        learned = learned.and(device.teach_for(&learning, 3));
    }
    assert_eq!((learned.discarded, learned.held_out, learned.before, learned.rests), (0, None, None, false));
    assert_eq!(device.speculator.version(), in_use.version);
    device.speculator.collect(&device.answers());
    let mut learned = Learned::default();
    while learned.held_out.is_none() {
        learned = learned.and(device.teach_for(&learning, 9));
    }
    assert!(learned.discarded > 0 || device.speculator.version() > in_use.version, "a later one is examined");
}

#[test]
fn what_the_update_has_left_of_a_version_is_found_once_a_policy() {
    let device = Device::new(8);
    let learning = due(&device);
    let before = |policy: u32| {
        device.speculator.begin_policy(policy);
        device.speculator.collect(&device.answers_of(policy));
        let (mut found, mut exams) = (Vec::new(), 0);
        while exams < 3 {
            let learned = device.teach_for(&learning, 20);
            found.extend(learned.before);
            exams += u32::from(learned.held_out.is_some());
        }
        found
    };
    // The first version was published in this policy's step, before anything could be known of it.
    assert_eq!(before(0), []);
    let found = before(1);
    assert!(found.len() == 1 && 0.0 < found[0].0 && found[0].0 < found[0].1, "{found:?}");
    assert_eq!(before(2).len(), 1);
    let (first, later) = (Learned { before: Some((0.5, 0.75)), ..Learned::default() }, Learned::default());
    assert_eq!((first.and(later).before, later.and(first).before), (first.before, first.before));
}

#[test]
fn an_exam_that_there_is_never_time_for_gets_shorter() {
    let device = Device::new(2);
    let learning = due(&device);
    let (version, steps) = (device.speculator.version(), learning.lock().learner.steps());
    let (mut policy, mut shortest, mut scored) = (0, usize::MAX, 0);
    while scored < 3 {
        policy += 1;
        device.speculator.begin_policy(policy);
        scored += u32::from(device.teach_for(&learning, 9).held_out.is_some());
        shortest = shortest.min(learning.lock().windows_max);
        assert!(policy < 1_000, "each update of the policy begins it again");
    }
    assert!(shortest < usize::MAX && learning.lock().learner.steps() > steps, "{shortest}");
    assert!(device.speculator.version() >= version);
}
