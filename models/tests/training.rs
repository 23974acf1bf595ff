//! Learning: the gradient is the loss's, its sum does not depend on who computed which part, and weights get better.

use kernels::{NoiseKey, Pool};
use models::drafter::buffer::{Example, Window};
use models::drafter::learn::{self, Learner};
use models::drafter::{Calibration, Drafter, Vocabulary, eagle, eagle::Eagle};
use models::optim::{AdamW, Gradients, TreeSum, learning_rate};
use models::train::{Sequence, Workspace, gradient, log_probs};
use models::{Answer, Config, Decoder, Decoding, Hidden, Target, Weights};
use state::plan::{DrafterShape, Optimizer, Schedule, Strategy, TinyShape};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

fn config() -> Config {
    let shape = TinyShape { hidden: 32, layers: 2, heads: 2, kv_heads: 1, ffn: 64, positions_max: 64 };
    Config { vocab: 20, ..Config::tiny(&shape).unwrap() }
}

/// Counting up from a random start.
fn sequences(count: u32) -> Vec<Sequence> {
    let key = NoiseKey::new(8, 0, 0, 0, 0);
    let start = |i| (key.uniform(0, i) * 9.0) as u32 + 1;
    (0..count).map(|i| Sequence { tokens: (start(i)..start(i) + 6 + i % 4).chain([0]).collect(), prompt: 2 }).collect()
}

fn tree_sum(parts: Vec<Gradients>) -> Gradients {
    let mut sum = TreeSum::new(parts.len());
    parts.into_iter().enumerate().for_each(|(i, part)| drop(sum.insert(i, part)));
    sum.take().unwrap()
}

fn optimizer() -> Optimizer {
    Optimizer {
        lr: 5e-3,
        betas: (0.9, 0.95),
        weight_decay: 0.01,
        clip_norm: 1.0,
        warmup: 5,
        schedule: Schedule::Cosine,
    }
}

fn gradients(weights: &Weights, sequences: &[Sequence], micro: usize) -> Vec<Gradients> {
    // Mean negative log-probability: its slope is the same everywhere.
    let slope = -1.0 / sequences.iter().map(|s| s.answer().len()).sum::<usize>() as f32;
    let target = Target::new(&config(), weights, &Target::rope_table(&config())).unwrap();
    let (pool, mut workspace) = (Pool::new(2).unwrap(), Workspace::default());
    let of = |part: &[Sequence]| {
        let mut gradients = weights.zeros();
        gradient((&pool, &mut workspace), &target, part, 1.0, |_, _, _| slope, &mut gradients);
        gradients
    };
    sequences.chunks(micro).map(of).collect()
}

fn loss(weights: &Weights, sequences: &[Sequence]) -> f32 {
    let target = Target::new(&config(), weights, &Target::rope_table(&config())).unwrap();
    let all = log_probs(&Pool::default(), &target, sequences, 1.0).concat();
    -all.iter().sum::<f32>() / all.len() as f32
}

#[test]
fn weights_learn_to_count() {
    let mut weights = Weights::random(&config(), 3).unwrap();
    let mut adam = AdamW::new(&weights);
    let sequences = sequences(16);
    let before = loss(&weights, &sequences);
    for step in 0..60 {
        let sum = tree_sum(gradients(&weights, &sequences, 8));
        let lr = learning_rate(&optimizer(), step, 60);
        let old = weights.blake3();
        weights = adam.step(&Pool::default(), &weights, (sum, 1.0), &optimizer(), lr).0;
        assert_ne!(weights.blake3(), old);
    }
    let after = loss(&weights, &sequences);
    let sum = tree_sum(gradients(&weights, &sequences, 8));
    let far = adam.step(&Pool::default(), &weights, (sum, 1.0), &optimizer(), 1e300).0;
    assert!(weights.are_finite() && !far.are_finite());
    // Where a sequence ends is chance: about 0.2 a token remains.
    assert!(before > 2.5 && after < 0.5, "loss {before} became {after}");
}

#[test]
fn moments_survive_a_file() {
    let weights = Weights::random(&config(), 3).unwrap();
    let sum = tree_sum(gradients(&weights, &sequences(4), 2));
    let mut adam = AdamW::new(&weights);
    let (weights, _) = adam.step(&Pool::default(), &weights, (sum.clone(), 1.0), &optimizer(), 1e-3);
    let mut again = AdamW::from_raw(&weights, &adam.to_raw()).unwrap();
    assert_eq!(again, adam);
    let step =
        |adam: &mut AdamW| adam.step(&Pool::default(), &weights, (sum.clone(), 1.0), &optimizer(), 1e-3).0.blake3();
    assert_eq!(step(&mut again), step(&mut adam));
}

/// A mean is a sum with a factor, also where it is clipped.
#[test]
fn a_factor_of_the_gradients_is_one_of_their_norm() {
    let weights = Weights::random(&config(), 3).unwrap();
    let (sum, clipped) =
        (tree_sum(gradients(&weights, &sequences(4), 2)), Optimizer { clip_norm: 1e-3, ..optimizer() });
    let scaled: Gradients = sum.iter().map(|values| values.iter().map(|value| value * 0.25).collect()).collect();
    let step = |gradients| AdamW::new(&weights).step(&Pool::default(), &weights, gradients, &clipped, 1e-3);
    // A power of two rounds nothing.
    let ((with, norm), (without, expected)) = (step((sum, 0.25)), step((scaled, 1.0)));
    assert_eq!((with.blake3(), norm), (without.blake3(), expected));
    assert!(norm > clipped.clip_norm);
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let weights = Weights::random(&config(), 5).unwrap();
    let sequences = sequences(6);
    let sum = tree_sum(gradients(&weights, &sequences, 6));
    let norm: f64 = models::optim::norm(&Pool::default(), &sum);
    // One plain step down the gradient of length eps changes the loss by eps times its norm.
    let plain = Optimizer { betas: (0.0, 0.0), weight_decay: 0.0, clip_norm: f64::MAX, ..optimizer() };
    let (signs, _) = AdamW::new(&weights).step(&Pool::default(), &weights, (sum.clone(), 1.0), &plain, 1e-4);
    let expected: f64 = sum.iter().flatten().map(|g| f64::from(g.abs()) * 1e-4).sum();
    let found = f64::from(loss(&weights, &sequences) - loss(&signs, &sequences));
    assert!((found / expected - 1.0).abs() < 0.1, "loss fell by {found}, its gradient (norm {norm}) says {expected}");
}

/// Answers of a random model with some character, and how many guesses at each level were to decide, and right.
fn rollout(
    target: &Arc<Target>,
    (seed, groups): (u64, usize),
    hidden: Hidden,
    drafter: Option<&mut dyn Drafter>,
) -> (Vec<Answer>, [(u64, u64); 4]) {
    let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 40, eos: vec![0], stop: None, hidden };
    let mut decoder = Decoder::new(target.clone(), decoding, Arc::default());
    for group in 0..groups {
        decoder.admit(group, &[1 + group as u32, 2, 3], &[(0, NoiseKey::new(seed, 0, 0, group as u32, 0))]).unwrap();
    }
    let strategy = Strategy::chain(0, 4);
    let (mut answers, mut levels, mut drafter) = (Vec::new(), [(0, 0); 4], drafter);
    while decoder.running() > 0 {
        let draft = drafter.as_mut().map(|d| (&mut **d as &mut dyn Drafter, &strategy));
        let cycle = decoder.cycle(draft).unwrap();
        for (sum, (decided, right)) in levels.iter_mut().zip(cycle.levels) {
            *sum = (sum.0 + decided, sum.1 + right);
        }
        answers.extend(cycle.ended);
    }
    (answers, levels)
}

fn share(levels: &[(u64, u64)]) -> f64 {
    let [decided, right] = [0, 1].map(|i| levels.iter().map(|level| [level.0, level.1][i]).sum::<u64>());
    right as f64 / decided.max(1) as f64
}

#[test]
fn a_drafter_learns_the_target() {
    let target = target_with_character();
    for (shape, levels) in [(DrafterShape::eagle(0), 1), (DrafterShape::eagle3(0), 4)] {
        let hidden = eagle::reads(shape);
        let (answers, _) = rollout(&target, (1, 16), hidden, None);
        let examples: Vec<Window> = answers.iter().filter_map(Example::of).map(|e| Arc::new(e).whole()).collect();
        let fresh = Learner::fresh(&target, shape, 2).unwrap();
        let mut learner = Learner::new(&config(), shape, fresh, 3e-3).with_levels(levels);
        let mut workspace = learn::Workspace::default();
        let mut right = || {
            let vocabulary = Arc::new(Vocabulary::whole(&target));
            let mut eagle = Eagle::new(vocabulary.clone(), learner.weights(), shape, Arc::default()).unwrap();
            let found = rollout(&target, (2, 16), hidden, Some(&mut eagle)).1;
            for i in 0..150 {
                learner
                    .learn(&Pool::default(), &vocabulary, &examples[i % 4 * 4..i % 4 * 4 + 4], &mut workspace)
                    .unwrap();
            }
            share(&found[..1])
        };
        let (before, after) = (right(), right());
        assert!(after > before + 0.05, "{shape:?}: {before} right became {after}");
    }
}

/// Taught eight answers by heart, a drafter says them on its own: what it learns a level at a time is what it drafts.
#[test]
fn what_is_learned_by_heart_is_drafted() {
    let target = target_with_character();
    for shape in [DrafterShape::eagle(0), DrafterShape::eagle3(0)] {
        let hidden = eagle::reads(shape);
        let (answers, _) = rollout(&target, (1, 8), hidden, None);
        let examples: Vec<Window> = answers.iter().filter_map(Example::of).map(|e| Arc::new(e).whole()).collect();
        let vocabulary = Arc::new(Vocabulary::whole(&target));
        // By other seeds a draft or two more of 88 is wrong, in f32 as in bf16.
        let mut weights = Learner::fresh(&target, shape, 5).unwrap();
        for lr in [4e-3, 4e-3, 1e-3, 2e-4] {
            let mut learner = Learner::new(&config(), shape, weights, lr).with_levels(4);
            let mut workspace = learn::Workspace::default();
            for _ in 0..800 {
                learner.learn(&Pool::default(), &vocabulary, &examples, &mut workspace).unwrap();
            }
            weights = learner.average();
        }
        let mut eagle = Eagle::new(vocabulary, &weights.to_draft(), shape, Arc::default()).unwrap();
        let (drafted, right) = rollout(&target, (1, 8), hidden, Some(&mut eagle));
        assert!(share(&right) > 0.95, "{shape:?}: {right:?}");
        // What the drafter shares with the target has stayed as it was, to the bit.
        let bits = |answers: &[Answer]| -> BTreeMap<usize, Vec<u32>> {
            answers.iter().map(|a| (a.group, a.log_probs.iter().map(|p| p.to_bits()).collect())).collect()
        };
        let after = rollout(&target, (1, 8), hidden, None).0;
        assert_eq!([bits(&after), bits(&drafted)], [bits(&answers), bits(&answers)]);
    }
}

/// Between two cycles a version takes the place of another, the same weights here: it promises what the first one would have, if it knows
/// what that one had found out about the requests.
#[test]
fn a_newer_version_knows_the_requests() {
    let target = target_with_character();
    let shape = DrafterShape::eagle(0);
    let (vocabulary, weights) = (Arc::new(Vocabulary::whole(&target)), Learner::fresh(&target, shape, 2).unwrap());
    let calibration = Arc::new(Mutex::new(Calibration::default()));
    let version = || {
        let eagle = Eagle::new(vocabulary.clone(), &weights, shape, Arc::default()).unwrap();
        eagle.calibrated(calibration.clone())
    };
    let promised = |swap: &dyn Fn(Eagle) -> Eagle| {
        *calibration.lock().unwrap() = Calibration::default();
        let decoding = Decoding {
            temperature: 1.0,
            top_p: 1.0,
            tokens_max: 40,
            eos: Vec::new(),
            stop: None,
            hidden: eagle::reads(shape),
        };
        let mut decoder = Decoder::new(target.clone(), decoding, Arc::default());
        decoder.admit(0, &[1, 2, 3], &[(0, NoiseKey::new(1, 0, 0, 0, 0))]).unwrap();
        let (mut eagle, mut promised) = (version(), Vec::new());
        while decoder.running() > 0 {
            if promised.len() == 6 {
                eagle = swap(eagle);
            }
            promised.push(decoder.cycle(Some((&mut eagle, &Strategy::chain(0, 4)))).unwrap().promised);
        }
        promised
    };
    let alone = promised(&|eagle| eagle);
    assert!(alone.len() > 12 && alone[1..].iter().all(Option::is_some), "{alone:?}");
    assert_eq!(promised(&|mut earlier| version().knowing(earlier.known())), alone);
    assert_ne!(promised(&|_| version()), alone);
}

fn target_with_character() -> Arc<Target> {
    let mut raw = Weights::random(&config(), 9).unwrap().to_raw();
    raw.tensors.values_mut().filter(|t| t.0.len() == 2).for_each(|t| t.1.iter_mut().for_each(|v| *v *= 10.0));
    let weights = Weights::from_raw(&config(), &raw).unwrap();
    Arc::new(Target::new(&config(), &weights, &Target::rope_table(&config())).unwrap())
}

#[test]
fn sums_do_not_see_the_order_of_arrival() {
    let key = NoiseKey::new(4, 0, 0, 0, 0);
    for parts in 1..12_u32 {
        let all: Vec<Gradients> =
            (0..parts).map(|p| vec![(0..9).map(|i| key.uniform(p, i) as f32 - 0.5).collect()]).collect();
        let want = tree_sum(all.clone());
        for round in 0..20 {
            let mut order: Vec<u32> = (0..parts).collect();
            order.sort_by(|a, b| key.uniform(100 + round, *a).total_cmp(&key.uniform(100 + round, *b)));
            let mut sum = TreeSum::new(parts as usize);
            for (done, part) in order.iter().enumerate() {
                assert_eq!(sum.take(), None, "after {done} of {parts}");
                sum.insert(*part as usize, all[*part as usize].clone());
            }
            assert_eq!(sum.take().as_ref(), Some(&want), "{order:?}");
        }
    }
}
