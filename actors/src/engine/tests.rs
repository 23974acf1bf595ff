//! Two engines that share a rollout, told what to do by hand.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use kernels::NoiseKey;
use models::data::Problem;
use models::{Config, Decoding, Target, Weights};
use state::plan::{self, Speculation, TinyShape};

use super::*;
use crate::experience::Experience;
use crate::speculator::{Published, Speculator, lock};

const WAIT: Duration = Duration::from_secs(60);

/// Groups of four answers of about the longest allowed length.
fn rollout(groups: usize) -> Arc<Rollout> {
    let suffix = plan::Drafter::Suffix { match_min: 1, match_max: 8 };
    rollout_with(groups, (suffix, None), models::Hidden::Nothing)
}

fn rollout_with(
    groups: usize,
    (drafter, training): (plan::Drafter, Option<plan::DrafterTraining>),
    hidden: models::Hidden,
) -> Arc<Rollout> {
    let shape = TinyShape { hidden: 32, layers: 2, heads: 2, kv_heads: 1, ffn: 64, positions_max: 260 };
    let config = Config::tiny(&shape).unwrap();
    let weights = Weights::random(&config, 3).unwrap();
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
    let speculation = Speculation {
        drafters: vec![drafter],
        controller: plan::Controller::Fixed(plan::Strategy::chain(0, 3)),
        training,
        lending: true,
    };
    let teaches = speculation.training.is_some();
    let seen = vec![0; config.vocab];
    let speculator = Arc::new(Speculator::new(&speculation, 3, Experience::default(), seen));
    let group = |i: u32| {
        let problem = Problem { question: String::new(), answer: String::new(), solution: None };
        let noise = |sample| NoiseKey::new(3, 1, 0, i, sample);
        Group { problem, prompt: vec![1, 2, i], noise: (0..4).map(noise).collect() }
    };
    let groups = (0..groups as u32).map(group).collect();
    let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 250, eos: Vec::new(), stop: None, hidden };
    Arc::new(Rollout::new(1, target, decoding, groups, (speculator, teaches)))
}

fn engine(name: &str) -> (Engine, Receiver<Report>) {
    engine_with(name, None)
}

fn engine_with(name: &str, fault: Option<Fault>) -> (Engine, Receiver<Report>) {
    let (sender, reports) = channel();
    (Engine::start(name, 1, (Arc::default(), fault), move |report| drop(sender.send(report))).unwrap(), reports)
}

/// What a rollout made of a group.
fn parts(rollout: &Rollout, group: usize) -> Vec<(usize, Vec<u32>, Vec<f32>, bool)> {
    rollout.answers(group).into_iter().map(|a| (a.sample, a.tokens, a.log_probs, a.truncated)).collect()
}

fn send(engine: &Engine, command: Command) {
    engine.pulse.announce();
    engine.send(command);
}

fn decode(engine: &Engine, rollout: &Arc<Rollout>, group: usize) {
    send(engine, Command::Decode { rollout: rollout.clone(), group, samples: (0..4).collect() });
}

/// What comes of the next `count` answers.
fn ended(reports: &Receiver<Report>, count: usize) -> Vec<RequestId> {
    let mut all = Vec::new();
    while all.len() < count {
        match reports.recv_timeout(WAIT).unwrap() {
            Report::Ended { answers, .. } => all.extend(answers),
            other => panic!("{other:?}"),
        }
    }
    all
}

/// Gaps between guesses are others where no noise is added to them.
#[test]
fn greedy_answers_leave_the_chances_of_drawn_ones_alone() {
    let learned_at = |temperature: f32| {
        let shape = plan::DrafterShape::eagle(16);
        let drafter = plan::Drafter::Learned { shape, weights: None };
        let mut rollout = Arc::into_inner(rollout_with(1, (drafter, None), models::Hidden::Last)).unwrap();
        rollout.decoding.temperature = temperature;
        let rollout = Arc::new(rollout);
        let weights = models::drafter::eagle::random(rollout.target.config(), shape, 1).unwrap();
        rollout.speculator.publish(Published::new(1, &weights));
        let (engine, reports) = self::engine("one");
        decode(&engine, &rollout, 0);
        ended(&reports, 4);
        assert!(rollout.counts().drafted.0 > 0, "it drafts");
        let calibration = lock(&rollout.speculator.calibration).clone();
        calibration != models::drafter::Calibration::default()
    };
    assert_eq!([0.0, 1.0].map(learned_at), [false, true]);
}

#[test]
fn lent_answers_end_as_if_they_had_stayed() {
    lent(0);
}

/// A loan does not wait until nobody waits for memory: those who do are lent, too.
#[test]
fn so_do_those_that_wait_for_memory() {
    lent(640);
}

fn lent(cache_tokens_max: usize) {
    let shared = Arc::into_inner(rollout(2)).unwrap().with_cache_max(cache_tokens_max);
    let (alone, shared) = (rollout(2), Arc::new(shared));
    let (engine, reports) = self::engine("alone");
    (0..2).for_each(|group| decode(&engine, &alone, group));
    assert_eq!(ended(&reports, 8).len(), 8);

    let ((lender, lent), (borrower, borrowed)) = (self::engine("lender"), self::engine("borrower"));
    (0..2).for_each(|group| decode(&lender, &shared, group));
    shared.begin_loan(7, 0);
    send(&lender, Command::Lend { rollout: shared.clone(), loan: 7 });
    let Report::Lent { loan: 7, answers: away, .. } = lent.recv_timeout(WAIT).unwrap() else { panic!() };
    assert_eq!(away.len(), 4);
    assert!(shared.answers(0).is_empty() && shared.answers(1).is_empty(), "nobody had to end first");
    shared.hand_over(7, 1);
    send(&borrower, Command::Borrow { rollout: shared.clone(), loan: 7 });
    let mut there = ended(&borrowed, 4);
    there.sort();
    assert_eq!(there, away.iter().copied().collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>());
    assert_eq!(ended(&lent, 4).len(), 4);
    assert_eq!(shared.counts().lent, 4);
    assert_eq!(shared.speculator.lengths.to_vec().len(), 8, "each device knows how long answers get on the other one");
    for group in 0..2 {
        assert_eq!(parts(&alone, group), parts(&shared, group));
    }
}

/// A device that is lost in the middle of its answers has them go on where it last noted them.
#[test]
fn answers_of_a_lost_device_go_on_where_they_were() {
    let (alone, shared) = (rollout(1), rollout(1));
    let (engine, reports) = self::engine("alone");
    decode(&engine, &alone, 0);
    assert_eq!(ended(&reports, 4).len(), 4);
    let cycles = |rollout: &Rollout| rollout.counts().by_batch.iter().map(|b| b.cycles).sum::<u64>();
    let fault = Fault { device: 0, moment: Moment::Cycle(NOTE_EVERY + 3), how: Failing::Panics };
    let (lost, reports) = engine_with("lost", Some(fault));
    decode(&lost, &shared, 0);
    assert!(matches!(reports.recv_timeout(WAIT).unwrap(), Report::Died { .. }));
    let before = cycles(&shared);
    let (other, reports) = self::engine("other");
    decode(&other, &shared, 0);
    assert_eq!(ended(&reports, 4).len(), 4);
    assert_eq!(parts(&alone, 0), parts(&shared, 0));
    // Of each answer a few cycles were made twice.
    assert!(before > 200 && cycles(&shared) <= cycles(&alone) + 4 * 8, "{before} {}", cycles(&shared));
}

#[test]
fn a_device_without_answers_has_none_to_lend() {
    let shared = rollout(1);
    let (lender, reports) = engine("lender");
    send(&lender, Command::Lend { rollout: shared.clone(), loan: 1 });
    assert_eq!(reports.recv_timeout(WAIT).unwrap(), Report::Lent { rollout: 1, loan: 1, answers: Vec::new() });
    decode(&lender, &shared, 0);
    assert_eq!(ended(&reports, 4).len(), 4);
    send(&lender, Command::Lend { rollout: shared, loan: 2 });
    assert_eq!(reports.recv_timeout(WAIT).unwrap(), Report::Lent { rollout: 1, loan: 2, answers: Vec::new() });
}

/// Commands come between kernels of the training, and what was begun goes on the next time.
#[test]
fn training_gives_way_and_goes_on() {
    let shape = plan::DrafterShape::eagle(32);
    let drafter = plan::Drafter::Learned { shape, weights: None };
    let training = plan::DrafterTraining {
        lr: Some(1e-3),
        tokens_max: 512,
        levels: 3,
        publish_every: 4,
        buffer_tokens_max: 1 << 14,
        buffer_bytes_max: 1 << 30,
    };
    let rollout = rollout_with(3, (drafter, Some(training)), models::Hidden::Last);
    let (engine, reports) = engine("trainer");
    let train = |training| send(&engine, Command::TrainDrafter { rollout: rollout.clone(), training });
    let stopped = || loop {
        match reports.recv_timeout(WAIT).unwrap() {
            Report::DrafterStopped { training } => break training,
            Report::Ended { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    decode(&engine, &rollout, 0);
    assert_eq!(ended(&reports, 4).len(), 4);
    let (mut number, mut batches) = (0, Vec::new());
    while batches.last().is_none_or(|batches| *batches < 12) {
        number += 1;
        train(number);
        std::thread::sleep(Duration::from_millis(number % 7));
        send(&engine, Command::Preempt);
        assert_eq!(stopped(), number);
        batches.push(rollout.counts().training.batches);
        assert!(number < 5_000, "it does not get on: {:?}", batches.last());
    }
    assert!(batches.is_sorted());
    // That an order is on its way is enough; when it is here, it stops nothing else.
    train(number);
    engine.pulse.announce();
    assert_eq!(stopped(), number);
    engine.send(Command::Preempt);
    // Other work stops it too, and is done.
    train(number + 1);
    decode(&engine, &rollout, 1);
    assert_eq!(stopped(), number + 1);
    assert_eq!(ended(&reports, 4).len(), 4);
    // Whoever lets go of a device that trains does not wait for it.
    train(number + 2);
    drop(engine);
    let end = loop {
        match reports.recv_timeout(WAIT) {
            Ok(report) => assert!(matches!(report, Report::DrafterStopped { .. }), "{report:?}"),
            Err(end) => break end,
        }
    };
    assert_eq!(end, RecvTimeoutError::Disconnected, "it trains on for nobody");
}
