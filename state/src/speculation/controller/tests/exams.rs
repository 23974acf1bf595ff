//! What exams of a drafter say, and what its drafts promise, beside what was measured.

use super::*;

/// A drafter whose exams tell how well it guesses.
#[test]
fn what_exams_say_decides_what_is_tried_first() {
    let [short, long] = [Strategy::chain(0, 2), Strategy::chain(0, 8).with_chance_min(0.4)];
    let strategies = vec![short, long];
    let config = plan::Controller::Bandit { strategies, epsilon: 0.0, window: 10 };
    let probed = |batch: usize, chance: Option<f64>| {
        let mut controller = Controller::new(&config);
        // A row more costs a quarter of the first.
        controller.probe(vec![(1.0, 1.0), (8.0, 2.75), (128.0, 32.75)]);
        (0..4).for_each(|_| controller.observe(batch, None, measured(batch as u64, 0.75 + 0.25 * batch as f64, batch)));
        if let Some(chance) = chance {
            controller.examined(0, Skill { levels: vec![chance], runners_up: 0.5 });
        }
        controller
    };
    let tried = |batch: usize, chance| probed(batch, chance).choose(batch, [0.5, 0.5], &|_| true);
    assert!(tried(8, None).is_some(), "nothing is known");
    assert_eq!(tried(8, Some(0.3)), None, "rows are dear, and it guesses badly");
    assert_eq!(tried(8, Some(0.85)), Some(short), "what eight levels may lose is much against what one may gain");
    assert_eq!(
        [0.9, 0.45, 0.15].map(|chance| tried(1, Some(chance))),
        [Some(long), Some(long), None],
        "it may end early"
    );
    // A young drafter that was tried, and has learned since.
    let mut controller = probed(8, Some(0.1));
    let few = Measured { rows: 24, ..measured(8, 6.75, 8) };
    (0..20).for_each(|_| controller.observe(8, Some(short), few));
    assert_eq!(controller.choose(8, [0.5, 0.5], &|_| true), None);
    controller.examined(0, Skill { levels: vec![0.97], runners_up: 0.5 });
    assert_eq!(controller.choose(8, [0.5, 0.5], &|_| true), Some(long));
}

/// SmolLM2 on word problems, about: a row costs little up to eight, and a cycle brings one token or several, by luck.
#[test]
fn the_best_of_several_is_soon_in_use() {
    let (tree, long) = (Strategy::tree(0, 7, 4, 7), Strategy::chain(0, 16).with_chance_min(0.25));
    let strategies = vec![Strategy::chain(0, 2), tree, long];
    let config = plan::Controller::Bandit { strategies, epsilon: 0.05, window: 64 };
    // Chance of a level, levels, and what drafting them takes, in plain cycles.
    let of = |strategy: Strategy| match strategy {
        s if s == tree => (0.47, 7, 0.12),
        s if s == long => (0.35, 1, 0.07),
        _ => (0.35, 2, 0.08),
    };
    let rate = |(skill, promises): (Option<Skill>, bool)| {
        let (mut tokens, mut seconds) = (0.0, 0.0);
        for seed in 0..60 {
            let (mut uniform, mut controller) = (Uniform(seed * 7919), Controller::new(&config));
            controller.probe(vec![(1.0, 1.0), (8.0, 1.13), (32.0, 3.5)]);
            skill.iter().for_each(|skill| controller.examined(0, skill.clone()));
            for _ in 0..200 {
                let strategy = controller.choose(1, [uniform.next(), uniform.next()], &|_| true);
                let (chance, levels, draft_s) = strategy.map_or((0.0, 0, 0.0), of);
                // Some drafts are likelier to be right than others, which their drafter tells, but for a few parts in a hundred.
                let chance = chance * (0.6 + 0.8 * uniform.next());
                let emitted = 1 + (0..levels).take_while(|_| uniform.next() < chance).count() as u64;
                let promised = 1.05 * (0..=levels).map(|level| chance.powi(level)).sum::<f64>();
                let promised = Some(promised).filter(|_| promises);
                let cycle_s = (1.0 + 0.02 * f64::from(levels) + draft_s) * (0.95 + 0.1 * uniform.next());
                let rows = 1 + levels as usize;
                let measured = Measured { promised, rows, draft_s, ..measured(emitted, cycle_s, 1) };
                controller.observe(1, strategy, measured);
                (tokens, seconds) = (tokens + emitted as f64, seconds + cycle_s);
            }
        }
        tokens / seconds
    };
    // The tree, from the first cycle on; the mean over how likely its drafts are to be right.
    let spread = (0..100).map(|i| 0.47 * (0.6 + 0.8 * (f64::from(i) + 0.5) / 100.0));
    let best = spread.map(|chance| (0..=7).map(|level| chance.powi(level)).sum::<f64>()).sum::<f64>() / 100.0;
    let best = best / (1.0 + 0.14 + 0.12);
    let skill = Some(Skill { levels: vec![0.35], runners_up: 0.36 });
    let shares = [(None, false), (skill.clone(), false), (None, true), (skill, true)].map(|known| rate(known) / best);
    assert!(shares[0] > 0.87 && shares[1] > 0.91, "{shares:?}");
    assert!(shares[2..].iter().all(|share| *share > 0.95), "what drafts promise tells sooner: {shares:?}");
}

/// One that drafts well from the start, and a drafter that is tried young, loses, and has learned since.
#[test]
fn what_a_young_drafter_lost_is_forgotten_once_it_has_learned() {
    let [learned, rival] = [Strategy::chain(0, 4), Strategy::chain(1, 4)];
    let config = plan::Controller::Bandit { strategies: vec![learned, rival], epsilon: 0.05, window: 64 };
    let exam = |chance| Skill { levels: vec![chance], runners_up: 0.5 };
    // Share of the learned drafter's cycles among the first 300 after it has learned.
    let share = |is_told: bool| {
        let mut chosen = 0;
        for seed in 0..20 {
            let (mut uniform, mut controller) = (Uniform(seed * 7919), Controller::new(&config));
            controller.probe(vec![(1.0, 1.0), (8.0, 1.2), (32.0, 3.5)]);
            controller.examined(0, exam(0.1));
            for (chance, cycles) in [(0.1, 1500), (0.8, 300)] {
                if is_told {
                    controller.examined(0, exam(chance));
                }
                for _ in 0..cycles {
                    let strategy = controller.choose(1, [uniform.next(), uniform.next()], &|_| true);
                    let chance = strategy.map_or(0.0, |s| if s == learned { chance } else { 0.55 });
                    let emitted = 1 + (0..4).take_while(|_| uniform.next() < chance).count() as u64;
                    let (rows, draft_s) = strategy.map_or((1, 0.0), |_| (5, 0.05));
                    let cycle_s = (1.0 + 0.025 * rows as f64 + draft_s) * (0.95 + 0.1 * uniform.next());
                    controller.observe(1, strategy, Measured { rows, draft_s, ..measured(emitted, cycle_s, 1) });
                    chosen += usize::from(cycles == 300 && strategy == Some(learned));
                }
            }
        }
        chosen as f64 / 6000.0
    };
    let shares = [false, true].map(share);
    assert!(shares[1] > 0.85 && shares[1] > shares[0] + 0.2, "{shares:?}");
}
