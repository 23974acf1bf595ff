//! A drafter that learns from the answers of a small random target.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use models::drafter::Calibration;
use models::{Answer, Config, Decoder, Decoding, Hidden};
use state::drafter::Duel;
use state::plan::{self, Speculation, TinyShape};

use super::*;
use crate::experience::Experience;
use crate::speculator::{Drafters, Published};

mod exams;

const SHAPE: DrafterShape = DrafterShape::eagle(32);
const DRAWS: Draws = Draws { temperature: 1.0, top_p: 1.0 };

/// A device with something to learn from.
struct Device {
    pool: Arc<Pool>,
    target: Arc<Target>,
    speculator: Speculator,
}

impl Device {
    fn new(publish_every: usize) -> Self {
        let shape = TinyShape { hidden: 32, layers: 1, heads: 2, kv_heads: 1, ffn: 64, positions_max: 128 };
        let config = Config::tiny(&shape).unwrap();
        // Large weights, so that the target is sure of something that can be learned.
        let mut raw = Weights::random(&config, 3).unwrap().to_raw();
        raw.tensors.values_mut().filter(|(shape, _)| shape.len() == 2).flat_map(|(_, v)| v).for_each(|v| *v *= 12.0);
        let weights = Weights::from_raw(&config, &raw).unwrap();
        let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
        let training = plan::DrafterTraining {
            lr: Some(3e-3),
            tokens_max: 256,
            levels: 1,
            publish_every,
            buffer_tokens_max: 1 << 15,
            buffer_bytes_max: 1 << 30,
        };
        let speculation = Speculation {
            drafters: vec![plan::Drafter::Learned { shape: SHAPE, weights: None }],
            controller: plan::Controller::Fixed(plan::Strategy::chain(0, 3)),
            training: Some(training),
            lending: false,
        };
        let seen = vec![1; config.vocab];
        let speculator = Speculator::new(&speculation, 3, Experience::default(), seen);
        let device = Self { pool: Arc::default(), target, speculator };
        device.speculator.collect(&device.answers());
        device
    }

    fn answers(&self) -> Vec<Answer> {
        self.answers_of(0)
    }

    /// With the noise of this step.
    fn answers_of(&self, step: u32) -> Vec<Answer> {
        let decoding = Decoding {
            temperature: 1.0,
            top_p: 1.0,
            tokens_max: 60,
            eos: Vec::new(),
            stop: None,
            hidden: Hidden::Last,
        };
        let mut decoder = Decoder::new(self.target.clone(), decoding, self.pool.clone());
        for group in 0..64 {
            let prompt = [1, 2 + group % 17, 2 + group / 17];
            decoder.admit(group as usize, &prompt, &[(0, NoiseKey::new(3, 1, step, group, 0))]).unwrap();
        }
        let mut answers = Vec::new();
        while answers.len() < 64 {
            answers.extend(decoder.cycle(None).unwrap().ended);
        }
        answers
    }

    fn learning(&self, earlier: (Option<&RawWeights>, Publication)) -> Shared {
        let training = self.speculator.plan.training.as_ref().unwrap();
        Shared::new(Learning::new((&self.target, SHAPE), training, 3, None, earlier).unwrap())
    }

    fn lesson<'a>(&'a self, pool: &'a Pool, vocabulary: &'a Vocabulary, workspace: &'a mut Workspace) -> Lesson<'a> {
        Lesson { speculator: &self.speculator, pool, vocabulary, draws: DRAWS, workspace: RefCell::new(workspace) }
    }

    /// Learns for as long as `go_on` answers yes.
    fn teach(&self, learning: &Shared, mut go_on: impl FnMut() -> bool) -> Learned {
        let vocabulary = Vocabulary::whole(&self.target);
        let mut workspace = Workspace::default();
        let lesson = self.lesson(&self.pool, &vocabulary, &mut workspace);
        learning.go_on(&lesson, || !go_on()).unwrap()
    }

    /// Learns until there have been so many looks at whether to stop.
    fn teach_for(&self, learning: &Shared, mut looks: u32) -> Learned {
        self.teach(learning, || {
            looks = looks.saturating_sub(1);
            looks > 0
        })
    }
}

#[test]
fn an_order_to_stop_is_obeyed_between_readings() {
    let device = Device::new(4);
    let learning = device.learning((None, Publication::default()));
    assert_eq!(device.teach_for(&learning, 0), Learned::default());
    // There was little time lately: one window is read; the others wait.
    learning.lock().together = WINDOW_MIN;
    assert_eq!(device.teach_for(&learning, 2).batches, 0);
    let state = || {
        let held = learning.lock();
        (held.pending.len(), held.read, held.learner.steps())
    };
    let whole = learning.lock().begun[0];
    assert!(whole > 2, "a micro-batch of two windows shows little");
    assert_eq!(state(), (whole - 1, 1, 0));
    // What was begun goes on, two windows together; a stop that is said once holds.
    let mut looks = 0;
    device.teach(&learning, || {
        looks += 1;
        looks != 2
    });
    assert_eq!((state(), looks), ((whole - 3, 3, 0), 2));
}

#[test]
fn what_is_interrupted_is_read_another_time() {
    let waiting = Arc::new(AtomicUsize::new(0));
    let mut device = Device::new(4);
    device.pool = Arc::new(Pool::new(2).unwrap().interrupted_by(waiting.clone()));
    let learning = device.learning((None, Publication::default()));
    let before = learning.lock().learner().to_raw();
    // Work comes between two looks: within a window.
    let mut looks = 0;
    device.teach(&learning, || {
        waiting.store(1, Ordering::Relaxed);
        looks += 1;
        looks < 3
    });
    let whole = learning.lock().begun[0];
    assert_eq!(learning.lock().pending.len(), whole);
    let mut held = learning.lock();
    assert_eq!((held.read, held.learner().to_raw()), (0, before));
    drop(held);
    waiting.store(0, Ordering::Relaxed);
    device.teach_for(&learning, 2);
    assert_eq!(learning.lock().pending.len(), whole - 1);
}

#[test]
fn versions_come_when_they_are_due_and_the_loss_falls() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    let until = |learning: &Shared, version: u64| {
        let mut learned = Learned::default();
        let mut looks = 0;
        while device.speculator.version() < version && looks < 5_000 {
            let now = device.teach_for(learning, 6);
            learned = Learned { held_out: now.held_out.or(learned.held_out), loss: now.loss.or(learned.loss), ..now };
            looks += 1;
        }
        (learned.held_out, learned.loss.unwrap_or_default())
    };
    // Nothing to draft with is worse than a young drafter, whatever it knows.
    let (examined, first) = until(&learning, 1);
    assert!(examined.is_some());
    let steps = learning.lock().learner.steps();
    assert!((FIRST_AFTER..FIRST_AFTER + 4).contains(&steps), "{steps} steps");
    let (examined, last) = until(&learning, 9);
    assert!(examined.is_some_and(|(first, three)| 0.0 < first && first < three));
    assert!(learning.lock().learner.steps() >= 8 * 16 && last < 0.9 * first, "{first} and {last}");
}

#[test]
fn a_version_that_guesses_worse_is_not_used() {
    let device = Device::new(32);
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() < 2 {
        device.teach_for(&learning, 8);
    }
    let in_use = device.speculator.published().unwrap();
    // Weights that a step has spoiled.
    let mut spoiled = in_use.weights.to_raw();
    spoiled.tensors.values_mut().flat_map(|(_, values)| values).for_each(|value| *value *= -3.0);
    let spoiled = Weights::with_layout(in_use.weights.layout().to_vec(), in_use.weights.storage(), &spoiled).unwrap();
    let mut held = learning.lock();
    held.learner.restart(spoiled);
    held.publication.fall_due();
    held.exam = None;
    drop(held);
    let mut learned = Learned::default();
    while learning.lock().publication.is_due() {
        learned = device.teach_for(&learning, 3);
    }
    assert_eq!(learned.discarded, 1);
    let still = device.speculator.published().unwrap();
    assert!(still.version == in_use.version && Arc::ptr_eq(&still.weights, &in_use.weights));
}

#[test]
fn it_goes_on_from_what_was_kept() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    device.teach_for(&learning, 40);
    let raw = learning.lock().learner().to_raw();
    let publication = learning.lock().publication.clone();
    let again = device.learning((Some(&raw), publication.clone()));
    assert!(again.lock().learner().steps() > 0);
    assert_eq!(again.lock().learner().to_raw(), raw);
    assert_eq!(again.lock().publication, publication);
}

#[test]
fn several_devices_learn_together() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    let vocabulary = Vocabulary::whole(&device.target);
    let learn = &|until: u32| {
        let pool = Pool::default();
        let mut workspace = Workspace::default();
        let lesson = device.lesson(&pool, &vocabulary, &mut workspace);
        learning.go_on(&lesson, || learning.lock().learner.steps() >= until).unwrap()
    };
    let learned: Vec<Learned> = std::thread::scope(|scope| {
        // One leaves early, the others go on.
        let devices = [100, 200, 200].map(|until| scope.spawn(move || learn(until)));
        devices.into_iter().map(|device| device.join().unwrap()).collect()
    });
    let (batches, discarded) = learned.iter().fold((0, 0), |(b, d), l| (b + l.batches, d + l.discarded));
    let held = learning.lock();
    assert!(batches == u64::from(held.learner.steps()) && batches >= 200, "{batches} steps");
    let version = device.speculator.version();
    assert!(version > 1 && version + discarded > 5, "version {version}, {discarded} discarded");
    assert_ne!(*lock(&device.speculator.calibration), Calibration::default(), "exams tell how far to believe logits");
    // Every window is read, waits, or waits to count.
    let begun: usize = held.begun.iter().sum();
    assert_eq!(held.pending.len() + held.read, begun);
}

#[test]
fn an_exam_outlives_the_device_that_reads_it() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    while !learning.lock().publication.is_due() {
        device.teach_for(&learning, 3);
    }
    let (vocabulary, mut learned) = (Vocabulary::whole(&device.target), Learned::default());
    let mut workspace = Workspace::default();
    let lesson = device.lesson(&device.pool, &vocabulary, &mut workspace);
    let mut next = || learning.lock().next(&lesson, 1, &mut learned);
    let task = std::iter::repeat_with(&mut next).find(|task| !matches!(task, Task::Step)).unwrap();
    assert!(matches!(task, Task::Examine(..)));
    let other = next();
    assert!(matches!(other, Task::Read(..)), "one device reads it, others go on");
    drop(task);
    let mut looks = 0;
    while device.speculator.version() == 0 && looks < 1_000 {
        device.teach_for(&learning, 4);
        looks += 1;
    }
    assert_eq!(device.speculator.version(), 1);
}

#[test]
fn nothing_is_begun_without_examples() {
    let device = Device::new(16);
    *lock(&device.speculator.buffer) = models::drafter::buffer::Buffer::new(1 << 14);
    let learning = device.learning((None, Publication::default()));
    for _ in 0..3 {
        assert_eq!(device.teach_for(&learning, 5), Learned::default());
    }
    assert!(learning.lock().begun.is_empty());
    device.speculator.collect(&device.answers());
    device.teach_for(&learning, 2);
    let held = learning.lock();
    assert_eq!((held.read, held.learner.steps()), (held.begun[0], 0), "a whole micro-batch at once");
}

#[test]
fn a_taught_drafter_learns_all_levels_at_once() {
    let mut device = Device::new(16);
    device.speculator.plan.training.as_mut().unwrap().levels = 3;
    let levels = |learning: &Shared| {
        device.teach_for(learning, 2);
        learning.lock().learner.levels()
    };
    let fresh = device.learning((None, Publication::default()));
    assert_eq!(levels(&fresh), 1);
    let training = device.speculator.plan.training.as_ref().unwrap();
    let weights = fresh.lock().learner.weights().clone();
    let none = (None, Publication::default());
    let taught = Shared::new(Learning::new((&device.target, SHAPE), training, 3, Some(&weights), none).unwrap());
    assert_eq!(levels(&taught), 3);
    while fresh.lock().learner.levels() < 2 {
        device.teach(&fresh, || fresh.lock().learner.levels() < 2);
    }
    assert!(fresh.lock().learner.steps() <= LEVEL_AFTER + 60);
}

/// Versions that get no better.
fn settle(publication: &mut Publication) {
    let right: Vec<bool> = (0..1_000).map(|i| i % 2 == 0).collect();
    while !publication.has_settled() {
        let _ = publication.judge(Duel::of(&right, Some(&right)));
    }
}

#[test]
fn one_device_finds_out_for_all_whether_to_learn() {
    let device = Device::new(8);
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() == 0 {
        device.teach_for(&learning, 8);
    }
    settle(&mut learning.lock().publication);
    let vocabulary = Vocabulary::whole(&device.target);
    let barrier = std::sync::Barrier::new(3);
    let learn = &|| {
        let pool = Pool::default();
        let mut workspace = Workspace::default();
        let lesson = device.lesson(&pool, &vocabulary, &mut workspace);
        barrier.wait();
        let mut looks = 0;
        learning
            .is_worth_it(&lesson, &mut Learned::default(), &mut || {
                looks += 1;
                looks > 100_000
            })
            .unwrap()
    };
    let found: Vec<bool> = std::thread::scope(|scope| {
        let devices = [0; 3].map(|_| scope.spawn(learn));
        devices.into_iter().map(|device| device.join().unwrap()).collect()
    });
    assert_eq!(Some(found[0]), learning.lock().is_worth_it);
    assert!(found.iter().all(|is| *is == found[0]), "{found:?}");
}

#[test]
fn a_learner_that_is_given_up_has_another_one_go_on() {
    let device = Device::new(8);
    let (vocabulary, speculator) = (Vocabulary::whole(&device.target), &device.speculator);
    let learn = |stop: &mut dyn FnMut() -> bool| {
        let lesson = (DRAWS, &mut Workspace::default());
        speculator.train((&device.pool, &vocabulary), lesson, stop).unwrap().batches
    };
    // Until a learner is made, nobody knows how often that is asked.
    let is_made = || speculator.at_work().is_some_and(|learner| !learner.is_given_up());
    let looks = |most: u32| {
        let mut looks = 0;
        move || {
            looks += u32::from(is_made());
            looks > most
        }
    };
    let steps = || speculator.experience().learner.map(|raw| raw.tensors["learned"].1[0]);
    while speculator.version() == 0 {
        assert!(learn(&mut looks(40)) > 0);
    }
    // Nobody holds it: nothing is lost.
    let before = speculator.experience().learner;
    speculator.give_up_learner();
    assert_eq!(speculator.experience().learner, before);
    let so_far = steps();
    learn(&mut looks(40));
    assert!(so_far > Some(0.0) && steps() > so_far);
    // A device at work goes on with the other one.
    let first = speculator.at_work().unwrap();
    let (mut asked, so_far) = (0, steps());
    learn(&mut || {
        asked += u32::from(is_made());
        if asked == 3 {
            speculator.give_up_learner();
        }
        asked > 40
    });
    assert!(first.is_given_up() && !Arc::ptr_eq(&first, &speculator.at_work().unwrap()));
    assert!(asked > 40 && steps() > so_far);
    // One hangs that holds it: others wait until they are told to stop, or until the version in use goes on.
    let (held, so_far) = (speculator.at_work().unwrap(), steps());
    let hangs = held.lock();
    assert_eq!(learn(&mut looks(5)), 0);
    let mut asked = 0;
    let batches = learn(&mut || {
        asked += u32::from(is_made());
        if asked == 5 {
            speculator.give_up_learner();
        }
        asked > 45
    });
    assert!(batches > 0 && steps() < so_far);
    drop(hangs);
}

#[test]
fn a_learner_that_was_given_up_publishes_nothing() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() == 0 || !learning.lock().publication.is_due() {
        device.teach_for(&learning, 3);
    }
    let (version, steps) = (device.speculator.version(), learning.lock().learner().steps());
    // While a version sits its exam.
    let mut looks = 0;
    let learned = device.teach(&learning, || {
        looks += 1;
        if looks == 2 {
            assert!(learning.lock().is_examined());
            learning.give_up();
        }
        true
    });
    assert_eq!((learned, looks > 2), (Learned { seconds: learned.seconds, ..Learned::default() }, true));
    assert_eq!((device.speculator.version(), learning.lock().learner.steps()), (version, steps));
    // Nor is a version used that comes too late.
    let late = device.speculator.published().unwrap();
    let newer = Published::new(version + 2, &learning.lock().learner.average());
    device.speculator.publish(newer);
    device.speculator.publish(late);
    assert_eq!(device.speculator.version(), version + 2);
}

#[test]
fn how_likely_guesses_are_is_kept() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() < 2 {
        device.teach_for(&learning, 8);
    }
    let (speculator, habits) = (&device.speculator, device.speculator.experience().habits);
    let habits = serde_json::from_str(&serde_json::to_string(&habits).unwrap()).unwrap();
    let experience = Experience { habits, ..Experience::default() };
    let again = Speculator::new(&speculator.plan, 3, experience, speculator.seen());
    let [before, after] = [speculator, &again].map(|speculator| lock(&speculator.calibration).clone());
    assert_ne!(before, Calibration::default());
    assert_eq!(after, before);
}

#[test]
fn what_was_said_elsewhere_or_before_is_repeated() {
    let device = Device::new(4);
    let plan = Speculation {
        drafters: vec![plan::Drafter::Suffix { match_min: 2, match_max: 8 }],
        training: None,
        ..device.speculator.plan.clone()
    };
    let seen = device.speculator.seen();
    let vocabulary = Arc::new(Vocabulary::whole(&device.target));
    let begin = |speculator: &Speculator| speculator.drafters((&vocabulary, 1.0), &device.pool, Vec::new()).unwrap().0;
    let drafted = |drafters: &mut Drafters| {
        let answers = device.answers();
        let (tokens, prompt) = (&answers[0].tokens[..20], answers[0].prompt);
        let noise = answers[0].noise;
        let request = models::drafter::Context {
            id: 1,
            tokens,
            prompt,
            hidden: [&[], &[]],
            noise,
            draws: DRAWS,
            depth_max: 6,
            remainder: 1.0,
            proposal: &[],
        };
        let tree = drafters[0].as_mut().unwrap().draft(&[request], &plan::Strategy::chain(0, 6)).unwrap().remove(0);
        (tree.tokens, answers[0].tokens[20..26].to_vec())
    };
    let first = Speculator::new(&plan, 3, Experience::default(), seen.clone());
    let (mut elsewhere, mut heard) = (begin(&first), 0);
    first.listen(&mut elsewhere, &mut heard);
    assert_ne!(drafted(&mut elsewhere).0.len(), 6, "nothing was said");
    // Another device's answers.
    first.collect(&device.answers());
    assert_ne!(drafted(&mut elsewhere).0.len(), 6, "nobody listened");
    first.listen(&mut elsewhere, &mut heard);
    let (found, said) = drafted(&mut elsewhere);
    assert_eq!((found, heard), (said, 64));
    let habits = serde_json::to_vec(&first.experience().habits).unwrap();
    let experience = Experience { habits: serde_json::from_slice(&habits).unwrap(), ..Experience::default() };
    let again = Speculator::new(&plan, 3, experience, seen);
    let (mut later, mut heard) = (begin(&again), 0);
    again.listen(&mut later, &mut heard);
    let (found, said) = drafted(&mut later);
    assert_eq!(found, said);
}
