//! Learning: the gradient is the loss's, its sum does not depend on who computed which part, and weights get better.

use kernels::{NoiseKey, Pool};
use models::drafter::buffer::{Example, Window};
use models::drafter::learn::Learner;
use models::drafter::{Drafter, Vocabulary, eagle::Eagle};
use models::optim::{AdamW, Gradients, TreeSum, learning_rate};
use models::train::{Sequence, Workspace, gradient, log_probs};
use models::{Answer, Config, Decoder, Decoding, Target, Weights};
use state::plan::{Optimizer, Schedule, Strategy, TinyShape};
use std::sync::Arc;

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
    let (pool, mut workspace) = (Pool::new(2), Workspace::default());
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
        let old = weights.sha256();
        weights = adam.step(&Pool::default(), &weights, sum, &optimizer(), lr).0;
        assert_ne!(weights.sha256(), old);
    }
    let after = loss(&weights, &sequences);
    // Where a sequence ends is chance: about 0.2 a token remains.
    assert!(before > 2.5 && after < 0.5, "loss {before} became {after}");
}

#[test]
fn moments_survive_a_file() {
    let weights = Weights::random(&config(), 3).unwrap();
    let sum = tree_sum(gradients(&weights, &sequences(4), 2));
    let mut adam = AdamW::new(&weights);
    let (weights, _) = adam.step(&Pool::default(), &weights, sum.clone(), &optimizer(), 1e-3);
    let mut again = AdamW::from_raw(&weights, &adam.to_raw()).unwrap();
    assert_eq!(again, adam);
    let step = |adam: &mut AdamW| adam.step(&Pool::default(), &weights, sum.clone(), &optimizer(), 1e-3).0.sha256();
    assert_eq!(step(&mut again), step(&mut adam));
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let weights = Weights::random(&config(), 5).unwrap();
    let sequences = sequences(6);
    let sum = tree_sum(gradients(&weights, &sequences, 6));
    let norm: f64 = models::optim::norm(&sum);
    // One plain step down the gradient of length eps changes the loss by eps times its norm.
    let plain = Optimizer { betas: (0.0, 0.0), weight_decay: 0.0, clip_norm: f64::MAX, ..optimizer() };
    let (signs, _) = AdamW::new(&weights).step(&Pool::default(), &weights, sum.clone(), &plain, 1e-4);
    let expected: f64 = sum.iter().flatten().map(|g| f64::from(g.abs()) * 1e-4).sum();
    let found = f64::from(loss(&weights, &sequences) - loss(&signs, &sequences));
    assert!((found / expected - 1.0).abs() < 0.1, "loss fell by {found}, its gradient (norm {norm}) says {expected}");
}

/// Answers of a random model with some character, and tokens emitted in a request-cycle with a draft.
fn rollout(target: &Arc<Target>, seed: u64, drafter: Option<&mut dyn Drafter>) -> (Vec<Answer>, f64) {
    let decoding =
        Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 40, eos: vec![0], stop: None, keep_hidden: true };
    let mut decoder = Decoder::new(target.clone(), decoding, Arc::default());
    for group in 0..16 {
        decoder.admit(group, &[1 + group as u32, 2, 3], &[(0, NoiseKey::new(seed, 0, 0, group as u32, 0))]).unwrap();
    }
    let strategy = Strategy::chain(0, 4);
    let (mut answers, mut drafted, mut drafter) = (Vec::new(), (0, 0), drafter);
    while decoder.running() > 0 {
        let draft = drafter.as_mut().map(|d| (&mut **d as &mut dyn Drafter, &strategy));
        let cycle = decoder.cycle(draft).unwrap();
        drafted = (drafted.0 + cycle.drafted.0, drafted.1 + cycle.drafted.1);
        answers.extend(cycle.ended);
    }
    (answers, drafted.1 as f64 / drafted.0.max(1) as f64)
}

#[test]
fn a_drafter_learns_the_target() {
    let mut raw = Weights::random(&config(), 9).unwrap().to_raw();
    raw.tensors.values_mut().filter(|t| t.0.len() == 2).for_each(|t| t.1.iter_mut().for_each(|v| *v *= 10.0));
    let weights = Weights::from_raw(&config(), &raw).unwrap();
    let target = Arc::new(Target::new(&config(), &weights, &Target::rope_table(&config())).unwrap());
    let (answers, _) = rollout(&target, 1, None);
    let examples: Vec<Window> = answers.iter().filter_map(Example::of).map(|e| Arc::new(e).whole()).collect();
    let mut learner = Learner::new(&config(), 0, Learner::fresh(&config(), 0, 2).unwrap(), 3e-3);
    let mut accept_length = || {
        let mut eagle = Eagle::new(Arc::new(Vocabulary::whole(&target)), learner.weights(), 0, Arc::default()).unwrap();
        let found = rollout(&target, 2, Some(&mut eagle)).1;
        for i in 0..150 {
            learner.learn(&Pool::default(), &Vocabulary::whole(&target), &examples[i % 4 * 4..i % 4 * 4 + 4]).unwrap();
        }
        found
    };
    let (before, after) = (accept_length(), accept_length());
    assert!(after > before + 0.1, "accept length {before} became {after}");
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
