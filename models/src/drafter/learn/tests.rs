//! Gradients against differences of the loss, and what a drafter guesses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kernels::{NoiseKey, Storage};
use state::plan::TinyShape;

use super::super::buffer::Example;
use super::*;
use crate::load::eagle::third::cosine;

const DRAWS: Draws = Draws { temperature: 0.8, top_p: 1.0 };
const SHAPES: [DrafterShape; 2] = [DrafterShape::eagle(10), DrafterShape::eagle3(10)];

/// A small target with large weights, so that its logits differ, and two answers with what it made of them.
fn classroom(shape: DrafterShape) -> (Arc<Target>, Vec<Window>) {
    let tiny = TinyShape { hidden: 16, layers: 4, heads: 2, kv_heads: 1, ffn: 24, positions_max: 64 };
    let config = Config::tiny(&tiny).unwrap();
    let mut raw = Weights::random(&config, 5).unwrap().to_raw();
    raw.tensors.values_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value *= 8.0));
    let target = Target::new(&config, &Weights::from_raw(&config, &raw).unwrap(), &Target::rope_table(&config));
    let target = Arc::new(target.unwrap());
    let example = |sample: u32, length: u32| {
        let tokens: Vec<u32> = (0..length).map(|i| (i * i + sample) % config.vocab as u32).collect();
        let most = &tokens[..tokens.len() - 1];
        let hidden = target.hidden_of_sequences(&Pool::default(), &[most], eagle::reads(shape));
        let noise = NoiseKey::new(1, 0, 0, 0, sample);
        Arc::new(Example { tokens, hidden, prompt: 3, noise, policy: 0 }).whole()
    };
    let windows = vec![example(1, 12), example(2, 7)];
    (target, windows)
}

#[test]
fn what_is_not_finite_changes_no_weight() {
    let (target, windows) = classroom(SHAPES[0]);
    let (pool, vocabulary, mut workspace) = (Pool::default(), Vocabulary::whole(&target), Workspace::default());
    let fresh = Learner::fresh(&target, SHAPES[0], 9).unwrap();
    let mut learner = Learner::new(target.config(), SHAPES[0], fresh, 1e-2);
    assert!(learner.learn(&pool, &vocabulary, &windows, &mut workspace).unwrap().is_finite());
    let before = Learner { steps: 2, ..learner.clone() }.to_raw();
    for spoiled in [f32::INFINITY, f32::NAN] {
        let mut learner = learner.clone();
        let mut reading = learner.reader().read(&pool, &vocabulary, &windows, &mut workspace).unwrap().unwrap();
        reading.gradients[1][0] = spoiled;
        learner.add(reading);
        assert!(learner.begin_step(&pool).is_finite(), "the loss does not tell");
        learner.finish_step(&pool);
        assert!(learner.to_raw() == before, "{spoiled}");
    }
    // A loss that tells.
    let spoil = |window: &Window| {
        let mut example = window.example.padded(0);
        example.hidden.fill(f32::NAN);
        Arc::new(example).whole()
    };
    let spoiled: Vec<Window> = windows.iter().map(spoil).collect();
    assert!(learner.learn(&pool, &vocabulary, &spoiled, &mut workspace).unwrap().is_nan());
    assert!(learner.to_raw() == before);
}

#[test]
fn gradients_are_differences_of_the_loss() {
    for (shape, levels) in SHAPES.into_iter().flat_map(|shape| [(shape, 1), (shape, 3)]) {
        let (target, windows) = classroom(shape);
        let (vocabulary, pool) = (Vocabulary::whole(&target), Pool::default());
        let mut raw = Learner::fresh(&target, shape, 9).unwrap().to_raw();
        // Beside a small stream everything else matters more.
        if let Some((_, fuse)) = raw.tensors.get_mut("fc.weight") {
            fuse.iter_mut().for_each(|value| *value *= 0.02);
        }
        let batch = Batch::new(&windows, target.config(), shape, levels);
        let of = |raw: &RawWeights, storage: Storage| {
            let in_full = Weights::with_layout(eagle::parameters(target.config(), shape), Storage::F32, raw).unwrap();
            let weights = if storage == Storage::F32 { in_full.clone() } else { in_full.rounded() };
            let network = Network::new(target.config(), shape, &weights).unwrap();
            let mut gradients = weights.zeros();
            let loss = loss::gradient(
                &pool,
                &batch,
                &network,
                (&vocabulary, shape.network),
                &mut gradients,
                (&mut Vec::new(), &mut loss::Memory::default()),
            )
            .unwrap();
            let rounded = vec![Vec::new(); gradients.len()];
            (loss, in_full.replaced(gradients, rounded).to_raw())
        };
        let (_, gradients) = of(&raw, Storage::F32);
        let (_, in_bf16) = of(&raw, Storage::Bf16);
        for name in raw.tensors.keys() {
            let slopes = &gradients.tensors[name].1;
            // Of numbers in bf16 differences are steps, but gradients point the same way.
            let alike = cosine(slopes, &in_bf16.tensors[name].1);
            assert!(alike > 0.99, "{shape:?} of {levels}, {name}: {alike}");
            // The steepest ones, all moved uphill, are the least drowned in rounding.
            let mut order: Vec<usize> = (0..slopes.len()).collect();
            order.sort_by(|a, b| slopes[*b].abs().total_cmp(&slopes[*a].abs()));
            order.truncate(8);
            let moved = |by: f32| {
                let mut raw = raw.clone();
                let values = &mut raw.tensors.get_mut(name).unwrap().1;
                order.iter().for_each(|at| values[*at] += by * slopes[*at].signum());
                of(&raw, Storage::F32).0
            };
            let slope: f64 = order.iter().map(|at| f64::from(slopes[*at].abs())).sum();
            let step = (0.01 / slope).min(2e-2) as f32;
            let difference = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            assert!(
                (difference - slope).abs() < 0.03 * slope.abs() + 1e-4,
                "{shape:?} of {levels}, {name}{order:?}: {slope}, found {difference}"
            );
        }
    }
}

#[test]
fn windows_together_are_windows_apart() {
    for shape in SHAPES {
        let (target, windows) = classroom(shape);
        let (vocabulary, pool) = (Vocabulary::whole(&target), Pool::default());
        let weights = Learner::fresh(&target, shape, 9).unwrap();
        let network = Network::new(target.config(), shape, &weights).unwrap();
        let of = |windows: &[Window]| {
            let mut gradients = weights.zeros();
            let batch = Batch::new(windows, target.config(), shape, 3);
            loss::gradient(
                &pool,
                &batch,
                &network,
                (&vocabulary, shape.network),
                &mut gradients,
                (&mut Vec::new(), &mut loss::Memory::default()),
            )
            .unwrap();
            gradients.concat()
        };
        let apart = windows.iter().map(|window| of(std::slice::from_ref(window)));
        let apart = apart.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
        let largest = apart.iter().fold(0.0_f32, |most, slope| most.max(slope.abs()));
        for (together, apart) in of(&windows).iter().zip(&apart) {
            assert!((together - apart).abs() <= 1e-5 * largest, "{together} and {apart}");
        }
    }
}

#[test]
fn what_is_drafted_with_is_a_mean_of_the_last_steps() {
    let (shape, pool) = (SHAPES[0], Pool::new(2).unwrap());
    let (target, windows) = classroom(shape);
    let vocabulary = Vocabulary::whole(&target);
    let fresh = Learner::fresh(&target, shape, 9).unwrap();
    let mut learner = Learner::new(target.config(), shape, fresh, 1e-2);
    let of = |weights: &Weights| weights.masters().iter().flat_map(|master| master.to_vec()).collect::<Vec<f32>>();
    let mut mean = of(learner.weights());
    assert_eq!(of(&learner.average()), mean);
    for step in 1..=120 {
        learner.learn(&pool, &vocabulary, &windows, &mut Workspace::default()).unwrap();
        let share = (9.0 / (9.0 + step as f32)).max(0.01);
        mean.iter_mut().zip(of(learner.weights())).for_each(|(mean, newest)| *mean += share * (newest - *mean));
    }
    assert_eq!(of(&learner.average()), mean);
    assert_ne!(of(learner.weights()), mean);
    let again = Learner::from_raw((target.config(), shape), &learner.to_raw(), 1e-2).unwrap();
    assert_eq!(of(&again.average()), mean);
    // One that goes on from a mean is one at once.
    let taught = Learner::new(target.config(), shape, learner.average(), 1e-2).taught();
    let [before, after] = [taught.clone(), taught].map(|mut learner| {
        let before = learner.average();
        learner.learn(&pool, &vocabulary, &windows, &mut Workspace::default()).unwrap();
        (of(&before), of(&learner.average()), of(learner.weights()))
    });
    assert_eq!(before, after);
    let (mean, later, newest) = after;
    let moved = |to: &[f32]| to.iter().zip(&mean).map(|(to, from)| f64::from((to - from).abs())).sum::<f64>();
    assert!((moved(&later) / moved(&newest) - 0.01).abs() < 1e-3);
}

fn guesses_of(vocabulary: &Vocabulary, version: (&Weights, DrafterShape, usize), windows: &[Window]) -> Guesses {
    let belief = (DRAWS, &Calibration::default());
    guess(&Pool::default(), vocabulary, version, windows, belief, &mut Workspace::default()).unwrap().unwrap()
}

#[test]
fn guesses_are_those_of_the_drafts() {
    for shape in SHAPES {
        let (target, windows) = classroom(shape);
        let vocabulary = Vocabulary::whole(&target);
        let weights = Learner::fresh(&target, shape, 9).unwrap();
        let guesses = guesses_of(&vocabulary, (&weights, shape, 1), &windows);
        assert_eq!(guesses.right.len(), 9 + 4, "every token of the answers");
        assert_eq!(guesses.first[1], guesses.right.iter().filter(|right| **right).count());
        assert!(guesses.first[0] == 13 && guesses.first[2] >= guesses.first[1]);
        // One token further on, the same forward guesses the same.
        let cut: Vec<Window> = windows.iter().map(|w| Window { tokens: 0..w.tokens.end - 1, ..w.clone() }).collect();
        let fewer = guesses_of(&vocabulary, (&weights, shape, 1), &cut);
        assert_eq!([&guesses.right[..8], &guesses.right[9..12]].concat(), fewer.right);
    }
}

/// What is right at a level is right at those above it, and level by level there are fewer guesses: the ends of windows. Those of a token
/// stand side by side, whichever windows are read together.
#[test]
fn a_wrong_guess_ends_what_is_said_ahead() {
    for shape in SHAPES {
        let (target, windows) = classroom(shape);
        let vocabulary = Vocabulary::whole(&target);
        let weights = Learner::fresh(&target, shape, 9).unwrap();
        let of = |windows: &[Window], levels| guesses_of(&vocabulary, (&weights, shape, levels), windows);
        let (one, three) = (of(&windows, 1), of(&windows, 3));
        assert_eq!((one.right.len(), three.right.len()), (13, 13 + 13 + 13 - 2));
        let batch = Batch::new(&windows, target.config(), shape, 3);
        let level = |level| batch.drawn(level).map(move |(row, _)| (row, level));
        let places: BTreeSet<(usize, usize)> = (0..3).flat_map(level).collect();
        let right: BTreeMap<(usize, usize), bool> = places.into_iter().zip(three.right.iter().copied()).collect();
        let first: Vec<bool> = right.iter().filter(|((_, level), _)| *level == 0).map(|(_, right)| *right).collect();
        assert_eq!((first, three.first), (one.right, one.first));
        let above = |(row, level): (usize, usize)| level.checked_sub(1).and_then(|above| right.get(&(row, above)));
        assert!(right.iter().all(|(place, is_right)| !is_right || above(*place) != Some(&false)), "{right:?}");
        let decided = |at: usize| {
            let here = right.iter().filter(|(place, _)| place.1 == at && above(**place) != Some(&false));
            let (guesses, right) = here.fold((0, 0), |(n, sum), (_, right)| (n + 1, sum + usize::from(*right)));
            [guesses, right]
        };
        assert_eq!(three.levels, [0, 1, 2].map(decided));
        let apart: Vec<bool> = windows.iter().flat_map(|window| of(std::slice::from_ref(window), 3).right).collect();
        assert_eq!(three.right, apart);
    }
}

#[test]
fn an_exam_tells_what_drafts_may_hope_for() {
    let of = |first: [usize; 3], levels: &[[usize; 2]]| {
        let half = |n: usize| n / 2;
        let part = Guesses {
            first: first.map(half),
            levels: levels.iter().map(|l| l.map(half)).collect(),
            ..Guesses::default()
        };
        let mut whole = part.clone();
        whole.extend(part);
        whole.skill()
    };
    let levels = [[98, 48], [48, 24], [24, 0], [8, 8], [98, 98]];
    let Skill { levels: found, runners_up } = of([98, 48, 78], &levels).unwrap();
    assert_eq!(found, [0.49, 0.5, 1.0 / 26.0], "of few guesses a level tells nothing, nor what stands below it");
    assert!((runners_up - 0.6).abs() < 1e-12);
    assert_eq!(of([GUESSES_MIN - 2, 0, 0], &levels), None, "few guesses");
    assert_eq!(of([64, 64, 64], &[]).unwrap(), Skill { levels: Vec::new(), runners_up: 0.0 });
}

/// Windows anywhere in an answer, as short as one guess, with a part of the vocabulary.
#[test]
fn windows_anywhere_teach_and_halves_guess_what_the_whole_does() {
    for shape in SHAPES {
        let (target, windows) = classroom(shape);
        let part: Arc<Vec<u32>> = Arc::new((0..target.config().vocab as u32).filter(|id| id % 3 != 1).collect());
        let (vocabulary, pool) = (Vocabulary::of(&target, Some(&part)), Pool::default());
        let learner = Learner::new(target.config(), shape, Learner::fresh(&target, shape, 9).unwrap(), 1e-3);
        let (reader, mut workspace) = (learner.with_levels(3).reader(), Workspace::default());
        let whole = Window { tokens: 4..12, ..windows[0].clone() };
        for window in [whole.clone(), Window { tokens: 6..9, ..whole.clone() }] {
            let reading = reader.read(&pool, &vocabulary, &[window], &mut workspace).unwrap().unwrap();
            assert!(
                reading.guesses > 0
                    && reading.loss.is_finite()
                    && reading.gradients.iter().flatten().any(|g| *g != 0.0)
            );
        }
        let guesses = |windows: &[Window]| Batch::new(windows, target.config(), shape, 3).guesses();
        assert_eq!(guesses(std::slice::from_ref(&whole)), guesses(&whole.halves()));
    }
}

/// Whatever was read or examined before, interrupted or not: memory that is used again has no part in what is read.
#[test]
fn memory_that_is_used_again_changes_no_bit() {
    for shape in SHAPES {
        let (target, windows) = classroom(shape);
        let (vocabulary, config) = (Vocabulary::whole(&target), target.config());
        let learner = Learner::new(config, shape, Learner::fresh(&target, shape, 9).unwrap(), 1e-3);
        let short = [Window { tokens: 2..7, ..windows[1].clone() }];
        let (mut used, calm) = (Workspace::default(), Pool::default());
        for (levels, windows) in [(3, &windows[..]), (2, &short), (3, &windows[..1]), (1, &windows), (3, &short)] {
            let reader = learner.clone().with_levels(levels).reader();
            for after_us in [0, 30, 100, 300] {
                let waiting = Arc::new(AtomicUsize::new(0));
                let pool = Pool::default().interrupted_by(waiting.clone());
                std::thread::scope(|scope| {
                    scope.spawn(move || {
                        std::thread::sleep(Duration::from_micros(after_us));
                        waiting.store(1, Ordering::Relaxed);
                    });
                    let _ = reader.read(&pool, &vocabulary, windows, &mut used).unwrap();
                });
            }
            let (version, belief) = ((learner.weights(), shape, levels), (DRAWS, &Calibration::default()));
            let examined = |memory: &mut Workspace| {
                let reading = reader.read(&calm, &vocabulary, windows, memory).unwrap().unwrap();
                (reading, guess(&calm, &vocabulary, version, windows, belief, memory).unwrap().unwrap())
            };
            let ((again, guesses), (fresh, fresh_guesses)) = (examined(&mut used), examined(&mut Workspace::default()));
            assert!(fresh.gradients == again.gradients && fresh.loss.to_bits() == again.loss.to_bits());
            assert_eq!(fresh_guesses, guesses);
            used.give_back(again.gradients);
        }
    }
}

#[test]
fn a_step_is_taken_a_parameter_at_a_time() {
    let shape = SHAPES[0];
    let (target, windows) = classroom(shape);
    let (vocabulary, config, pool) = (Vocabulary::whole(&target), target.config(), Pool::default());
    let mut learner = Learner::new(config, shape, Learner::fresh(&target, shape, 9).unwrap(), 1e-2);
    let (mut other, mut workspace) = (learner.clone(), Workspace::default());
    for _ in 0..2 {
        let reading = learner.reader().read(&pool, &vocabulary, &windows, &mut workspace).unwrap().unwrap();
        other.learn(&pool, &vocabulary, &windows, &mut workspace).unwrap();
        let (before, parameters) = (learner.weights().to_raw(), learner.weights().layout().len());
        learner.add(reading);
        learner.begin_step(&pool);
        for _ in 1..parameters {
            assert!(learner.go_on(&pool) && learner.weights().to_raw() == before);
        }
        assert!(learner.go_on(&pool) && learner.weights().to_raw() != before);
        // Then their average follows.
        (0..parameters).for_each(|_| assert!(learner.go_on(&pool)));
        assert!(!learner.go_on(&pool));
        assert_eq!(learner.to_raw(), other.to_raw());
    }
}

#[test]
fn one_that_has_learned_goes_on_with_small_steps() {
    let shape = SHAPES[0];
    let (target, windows) = classroom(shape);
    let (vocabulary, pool, config) = (Vocabulary::whole(&target), Pool::default(), target.config());
    let weights = Learner::fresh(&target, shape, 9).unwrap();
    let moved = |mut learner: Learner| {
        let before = learner.weights().to_raw();
        let reading = learner.reader().read(&pool, &vocabulary, &windows, &mut Workspace::default()).unwrap().unwrap();
        learner.add(reading);
        learner.begin_step(&pool);
        learner.finish_step(&pool);
        let after = learner.weights().to_raw();
        let pairs = after.tensors.iter().flat_map(|(name, (_, new))| new.iter().zip(&before.tensors[name].1));
        (pairs.map(|(new, old)| (new - old).abs()).fold(0.0, f32::max), learner)
    };
    let new = || Learner::new(config, shape, weights.clone(), 1e-2);
    let (full, _) = moved(new());
    let (small, learner) = moved(new().taught());
    assert!((full / small - WARMUP as f32).abs() < 0.1 * WARMUP as f32, "{full} and {small}");
    // A checkpoint does not forget that.
    let (next, _) = moved(Learner::from_raw((config, shape), &learner.to_raw(), 1e-2).unwrap());
    assert!(next < 4.0 * small, "{small}, then {next}");
}
