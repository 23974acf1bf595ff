//! A drafter that learns from the answers of a small random target.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use models::{Answer, Config, Decoder, Decoding, Hidden};
use state::plan::{self, Speculation, TinyShape};

use super::*;
use crate::experience::Experience;

const SHAPE: DrafterShape = DrafterShape { network: plan::Network::Eagle, ffn: 32 };

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
        let training =
            plan::DrafterTraining { lr: 3e-3, tokens_max: 256, levels: 1, publish_every, buffer_tokens_max: 1 << 14 };
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
        let decoding = Decoding {
            temperature: 1.0,
            top_p: 1.0,
            tokens_max: 60,
            eos: Vec::new(),
            stop: None,
            hidden: Hidden::Last,
        };
        let mut decoder = Decoder::new(self.target.clone(), decoding, self.pool.clone());
        for group in 0..16 {
            let prompt = [1, 2 + group % 8, 3];
            decoder.admit(group as usize, &prompt, &[(0, NoiseKey::new(3, 1, 0, group, 0))]).unwrap();
        }
        let mut answers = Vec::new();
        while answers.len() < 16 {
            answers.extend(decoder.cycle(None).unwrap().ended);
        }
        answers
    }

    fn learning(&self, earlier: (Option<&RawWeights>, Publication)) -> Mutex<Learning> {
        let training = self.speculator.plan.training.as_ref().unwrap();
        Mutex::new(Learning::new((&self.target, SHAPE), training, 3, None, earlier).unwrap())
    }

    /// Learns for as long as `go_on` answers yes.
    fn teach(&self, learning: &Mutex<Learning>, mut go_on: impl FnMut() -> bool) -> Learned {
        let vocabulary = Vocabulary::whole(&self.target);
        let lesson =
            Lesson { speculator: &self.speculator, pool: &self.pool, vocabulary: &vocabulary, temperature: 1.0 };
        Learning::go_on(learning, &lesson, || !go_on()).unwrap()
    }

    /// Learns until there have been so many looks at whether to stop.
    fn teach_for(&self, learning: &Mutex<Learning>, mut looks: u32) -> Learned {
        self.teach(learning, || {
            looks = looks.saturating_sub(1);
            looks > 0
        })
    }
}

#[test]
fn an_order_to_stop_is_obeyed_within_a_window() {
    let device = Device::new(4);
    let learning = device.learning((None, Publication::default()));
    assert_eq!(device.teach_for(&learning, 0), Learned::default());
    // One window is read; the others wait.
    assert_eq!(device.teach_for(&learning, 2).batches, 0);
    let state = || {
        let held = lock(&learning);
        (held.pending.len(), held.read, held.learner.steps())
    };
    let whole = lock(&learning).begun[0];
    assert!(whole > 2, "a micro-batch of two windows shows little");
    assert_eq!(state(), (whole - 1, 1, 0));
    // What was begun goes on; a stop that is said once holds.
    let mut looks = 0;
    device.teach(&learning, || {
        looks += 1;
        looks != 2
    });
    assert_eq!((state(), looks), ((whole - 2, 2, 0), 2));
}

#[test]
fn what_is_interrupted_is_read_another_time() {
    let waiting = Arc::new(AtomicUsize::new(0));
    let mut device = Device::new(4);
    device.pool = Arc::new(Pool::new(2).interrupted_by(waiting.clone()));
    let learning = device.learning((None, Publication::default()));
    let before = lock(&learning).learner().to_raw();
    // Work comes between two looks: within a window.
    let mut looks = 0;
    device.teach(&learning, || {
        waiting.store(1, Ordering::Relaxed);
        looks += 1;
        looks < 3
    });
    let whole = lock(&learning).begun[0];
    assert_eq!(lock(&learning).pending.len(), whole);
    let held = lock(&learning);
    assert_eq!((held.read, held.learner().to_raw()), (0, before));
    drop(held);
    waiting.store(0, Ordering::Relaxed);
    device.teach_for(&learning, 2);
    assert_eq!(lock(&learning).pending.len(), whole - 1);
}

#[test]
fn versions_come_when_they_are_due_and_guess_better() {
    let device = Device::new(64);
    let learning = device.learning((None, Publication::default()));
    let until = |learning: &Mutex<Learning>, version: u64| {
        let mut learned = Learned::default();
        let mut looks = 0;
        while device.speculator.version() < version && looks < 5_000 {
            let now = device.teach_for(learning, 6);
            learned = Learned { held_out: now.held_out.or(learned.held_out), ..now };
            looks += 1;
        }
        learned.held_out.unwrap().0
    };
    // Nothing to draft with is worse than a young drafter.
    let first = until(&learning, 1);
    let steps = lock(&learning).learner.steps();
    assert!((FIRST_AFTER..FIRST_AFTER + 4).contains(&steps), "{steps} steps");
    let last = until(&learning, 6);
    assert!(lock(&learning).learner.steps() >= 5 * 64 && last > first, "{first} and {last}");
}

#[test]
fn a_version_that_guesses_worse_is_not_used() {
    let device = Device::new(32);
    let learning = device.learning((None, Publication::default()));
    while device.speculator.version() < 4 {
        device.teach_for(&learning, 8);
    }
    let in_use = device.speculator.published().unwrap();
    // Weights that a step has spoiled.
    let mut spoiled = in_use.weights.to_raw();
    spoiled.tensors.values_mut().flat_map(|(_, values)| values).for_each(|value| *value *= -3.0);
    let spoiled = Weights::with_layout(in_use.weights.layout().to_vec(), in_use.weights.storage(), &spoiled).unwrap();
    let mut held = lock(&learning);
    held.learner.restart(spoiled);
    (held.is_due, held.exam) = (true, None);
    drop(held);
    let mut learned = Learned::default();
    while lock(&learning).is_due {
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
    let raw = lock(&learning).learner().to_raw();
    let publication = lock(&learning).publication().clone();
    let again = device.learning((Some(&raw), publication.clone()));
    assert!(lock(&again).learner().steps() > 0);
    assert_eq!(lock(&again).learner().to_raw(), raw);
    assert_eq!(lock(&again).publication(), &publication);
}

#[test]
fn several_devices_learn_together() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    let vocabulary = Vocabulary::whole(&device.target);
    let learn = &|until: u32| {
        let pool = Pool::default();
        let lesson = Lesson { speculator: &device.speculator, pool: &pool, vocabulary: &vocabulary, temperature: 1.0 };
        Learning::go_on(&learning, &lesson, || lock(&learning).learner.steps() >= until).unwrap().batches
    };
    let batches: u64 = std::thread::scope(|scope| {
        // One leaves early, the others go on.
        let devices = [100, 200, 200].map(|until| scope.spawn(move || learn(until)));
        devices.into_iter().map(|device| device.join().unwrap()).sum()
    });
    let held = lock(&learning);
    assert!(batches == u64::from(held.learner.steps()) && batches >= 200, "{batches} steps");
    assert!(device.speculator.version() > 5, "version {}", device.speculator.version());
    // Every window is read, waits, or waits to count.
    let begun: usize = held.begun.iter().sum();
    assert_eq!(held.pending.len() + held.read, begun);
}

#[test]
fn an_exam_outlives_the_device_that_reads_it() {
    let device = Device::new(16);
    let learning = device.learning((None, Publication::default()));
    while !lock(&learning).is_due {
        device.teach_for(&learning, 3);
    }
    let task = lock(&learning).next(&device.speculator);
    assert!(matches!(task, Task::Examine(..)));
    assert!(matches!(lock(&learning).next(&device.speculator), Task::Read(..)), "one device reads it, others go on");
    drop(task);
    let mut looks = 0;
    while device.speculator.version() == 0 && looks < 1_000 {
        device.teach_for(&learning, 4);
        looks += 1;
    }
    assert_eq!(device.speculator.version(), 1);
}
