//! What exams are of, what they find out, and when there is nothing more to find out.

use super::*;
use crate::experience::Habits;
use crate::learning::exam::Newest;

/// A device that has drafted with a version, and a learner that has one due.
fn due(device: &Device) -> Shared {
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() == 0 || !learning.lock().publication.is_due() {
        device.teach_for(&learning, 3);
    }
    learning
}

/// Goes on with the exam.
fn go_on<R>(device: &Device, learning: &Shared, read: impl FnOnce(&mut Exam, &Lesson<'_>) -> R) -> R {
    let (vocabulary, mut workspace) = (Vocabulary::whole(&device.target), Workspace::default());
    let lesson = device.lesson(&device.pool, &vocabulary, &mut workspace);
    let (mut exam, _) = learning.lock().begin_exam(&device.speculator);
    let found = read(&mut exam, &lesson);
    learning.lock().exam = Some(exam);
    found
}

/// The version in use reads all of the exam, the newest one nothing.
fn read_in_use(device: &Device, learning: &Shared) {
    go_on(device, learning, |exam, lesson| {
        assert!(exam.read_in_use(exam.windows.len(), lesson, &mut || false).unwrap() && exam.is_in_use_read());
    });
}

/// A version that is made of the one in use, all of its weights so many times as large.
fn times(device: &Device, factor: f32) -> Published {
    let in_use = device.speculator.published().unwrap();
    let mut raw = in_use.weights.to_raw();
    raw.tensors.values_mut().flat_map(|(_, values)| values).for_each(|value| *value *= factor);
    let (layout, storage) = (in_use.weights.layout().to_vec(), in_use.weights.storage());
    Published::new(in_use.version + 1, &Weights::with_layout(layout, storage, &raw).unwrap())
}

#[test]
fn an_exam_is_over_once_it_is_clear_who_is_better() {
    let device = Device::new(16);
    let learning = due(&device);
    let read = |factor: f32, is_in_use_read: bool| {
        learning.lock().exam = None;
        if is_in_use_read {
            read_in_use(&device, &learning);
        }
        go_on(&device, &learning, |exam, lesson| {
            exam.newest = Some(Newest::Drafting(times(&device, factor)));
            assert!(exam.read(lesson, &mut || false).unwrap());
            let Duel { guesses, only, .. } = exam.duel();
            (guesses, exam.by_in_use.guesses.right.len(), only)
        })
    };
    let (all, by_in_use, none) = read(1.0, false);
    assert!(all > 300 && by_in_use == all && none == (0, 0), "they are the same: {all} guesses, {none:?}");
    let (some, by_in_use, (won, lost)) = read(-3.0, false);
    assert!(some < all / 2 && by_in_use == some && lost > won + 20, "{some} of {all} guesses, {won} and {lost}");
    assert_eq!(read(-3.0, true), (some, all, (won, lost)), "what the one in use has read changes nothing");
}

#[test]
fn the_newest_answers_are_asked_for_first() {
    let device = Device::new(16);
    let learning = due(&device);
    device.speculator.begin_policy(1);
    // Fewer than say enough alone.
    device.speculator.collect(&device.answers_of(1)[..8]);
    let windows = learning.lock().held_out(&device.speculator, 1);
    let policies: Vec<u32> = windows.iter().map(Window::policy).collect();
    assert!(policies.first() == Some(&1) && policies.last() == Some(&0), "{policies:?}");
    assert!(policies.is_sorted_by(|a, b| a >= b), "{policies:?}");
}

#[test]
fn the_controller_hears_what_the_first_version_knows() {
    let device = Device::new(4);
    let learning = device.learning((None, Publication::default()));
    let mut learned = Learned::default();
    while device.speculator.version() == 0 {
        learned = learned.and(device.teach_for(&learning, 9));
    }
    assert!(learned.held_out.is_some() && learned.before.is_none());
}

#[test]
fn what_was_read_before_an_update_counts() {
    let device = Device::new(16);
    let learning = due(&device);
    let version = device.speculator.version();
    let guesses = go_on(&device, &learning, |exam, lesson| {
        exam.newest = Some(Newest::Drafting(times(&device, 1.0)));
        // The version in use reads three times and the newest one twice.
        let mut looks = 0;
        let stop = &mut || {
            looks += 1;
            looks > 5
        };
        assert!(!exam.read(lesson, stop).unwrap() && !exam.is_in_use_read());
        exam.duel().guesses
    });
    assert!(guesses >= GUESSES_MIN && guesses < learning.lock().exam.as_ref().unwrap().by_in_use.guesses.right.len());
    device.speculator.begin_policy(1);
    let mut learned = Learned::default();
    learning.lock().end_outdated(&device.speculator, &mut learned);
    let held = learning.lock();
    assert_eq!(device.speculator.version(), version + 1, "it is as good");
    assert!(!held.publication.is_due() && held.exam.is_none() && learned.held_out.is_some());
}

#[test]
fn an_exam_is_of_one_policy() {
    let device = Device::new(16);
    let learning = due(&device);
    read_in_use(&device, &learning);
    let begin = |policy: u32| {
        device.speculator.begin_policy(policy);
        let mut held = learning.lock();
        held.end_outdated(&device.speculator, &mut Learned::default());
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
fn a_version_whose_exam_there_is_no_time_for_has_a_second_one() {
    let device = Device::new(16);
    let learning = due(&device);
    let (version, steps) = (device.speculator.version(), learning.lock().learner.steps());
    let is_due_under = |policy: u32| {
        device.speculator.begin_policy(policy);
        let mut held = learning.lock();
        held.end_outdated(&device.speculator, &mut Learned::default());
        let (mut exam, _) = held.begin_exam(&device.speculator);
        exam.newest = Some(Newest::Learned(version + 1, held.learner.mean()));
        held.exam = Some(exam);
        held.publication.is_due()
    };
    assert_eq!([1, 2, 3].map(is_due_under), [true, true, false]);
    learning.lock().exam = None;
    let mut policy = 3;
    while learning.lock().learner.steps() < steps + 16 {
        policy += 1;
        device.speculator.begin_policy(policy);
        device.teach_for(&learning, 3);
        assert!(policy < 10_000, "learning goes on");
    }
    // Where there is time for a part of an exam, that counts.
    let mut scored = 0;
    while scored < 3 {
        policy += 1;
        device.speculator.begin_policy(policy);
        scored += u32::from(device.teach_for(&learning, 9).held_out.is_some());
        assert!(policy < 20_000, "what was read counts");
    }
}

#[test]
fn whether_to_learn_is_found_out_from_what_there_was_time_for() {
    let device = Device::new(16);
    let learning = due(&device);
    let find_out = |policy: u32, mut looks: u32| {
        device.speculator.begin_policy(policy);
        let (vocabulary, mut workspace) = (Vocabulary::whole(&device.target), Workspace::default());
        let lesson = device.lesson(&device.pool, &vocabulary, &mut workspace);
        learning.lock().is_worth_it = None;
        let stop = &mut || {
            looks = looks.saturating_sub(1);
            looks == 0
        };
        let is_worth_it = learning.is_worth_it(&lesson, &mut Learned::default(), stop).unwrap();
        (is_worth_it, learning.lock().exam.is_some())
    };
    learning.lock().exam = None;
    learning.lock().publication = Publication::default();
    settle(&mut learning.lock().publication);
    // It guesses far worse than those that settled, but there is no time to read all of the exam.
    assert_eq!(find_out(1, 2), (false, true));
    assert_eq!(find_out(2, 100), (true, false), "a part of it was read under the policy before");
}

#[test]
fn what_the_update_has_left_is_found_with_nothing_due() {
    let device = Device::new(8);
    let learning = due(&device);
    learning.lock().publication = Publication::of_taught();
    let version = device.speculator.version();
    // Too little is held out of this policy to say anything; of the next one enough.
    device.speculator.begin_policy(1);
    let learned = device.teach_for(&learning, 30);
    assert_eq!((learned.before, learned.held_out), (None, None));
    device.speculator.begin_policy(2);
    device.speculator.collect(&device.answers_of(2));
    let learned = device.teach_for(&learning, 60);
    let held = learning.lock();
    assert!(learned.before.is_some() && learned.held_out.is_none(), "{learned:?}");
    assert!(learned.seconds > 0.0 && held.exam.is_none() && held.glance.is_none(), "an exam to come is one of its own");
    assert_eq!((held.first_examined, device.speculator.version()), (Some(2), version));
    drop(held);
    assert_eq!(device.teach_for(&learning, 60).before, None, "once");
}
