//! A device's drafters under watch.

use kernels::NoiseKey;
use models::drafter::eagle;
use models::{Config, Decoding, Hidden, Target, Weights};
use state::plan::{Controller, Drafter, DrafterShape, Speculation, TinyShape};
use state::watchdog::PutOff;

use super::*;
use crate::experience::Experience;
use crate::speculator::Published;

const SHAPE: DrafterShape = DrafterShape::eagle(32);

#[test]
fn a_version_that_is_put_off_drafts_no_more_and_the_next_one_does() {
    let shape = TinyShape { hidden: 32, layers: 1, heads: 2, kv_heads: 1, ffn: 64, positions_max: 128 };
    let config = Config::tiny(&shape).unwrap();
    let weights = Weights::random(&config, 3).unwrap();
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
    let plan = Speculation {
        drafters: vec![
            Drafter::Suffix { match_min: 1, match_max: 8 },
            Drafter::Learned { shape: SHAPE, weights: None },
        ],
        controller: Controller::Fixed(Strategy::chain(1, 3).with_suffix(2)),
        training: None,
        lending: false,
    };
    let version = |version| Published::new(version, &eagle::random(&config, SHAPE, version).unwrap());
    let begun = Experience { published: Some(version(1)), ..Experience::default() };
    let speculator = Arc::new(Speculator::new(&plan, 3, begun, vec![0; config.vocab]));
    let (pool, vocabulary) = (Arc::<Pool>::default(), Arc::new(Vocabulary::whole(&target)));
    let mut drafting = Drafting::new(&speculator, (&vocabulary, 1.0), &pool, None).unwrap();
    let (temperature, top_p, tokens_max, hidden) = (1.0, 1.0, 120, Hidden::Last);
    let decoding = Decoding { temperature, top_p, tokens_max, eos: Vec::new(), stop: None, hidden };
    let mut decoder = Decoder::new(target, decoding, pool);
    decoder.admit(0, &[1, 2, 3], &[(0, NoiseKey::new(3, 1, 0, 0, 0))]).unwrap();
    let mut drafted = || {
        let cycles = (0..8).map(|_| drafting.cycle(&mut decoder).unwrap().cycle);
        cycles.fold((0, 0), |(all, guessed), cycle| (all + cycle.drafted.0, guessed + cycle.guessed.0))
    };
    let (all, guessed) = drafted();
    assert!(all > 0 && guessed > 0 && speculator.put_off(1).is_none());
    lock(&speculator.watchdog).observe(1, Watched { batch: 1, guessed: (5000, 0), timed: None });
    assert_eq!((drafted(), speculator.put_off(speculator.version())), ((0, 0), Some(PutOff::GuessesNothing)));
    speculator.publish(version(2));
    assert!(drafted().1 > 0 && speculator.put_off(speculator.version()).is_none(), "another version is another matter");
}

#[test]
fn time_is_held_against_a_drafter_only_where_prompts_took_none() {
    let cycle = Cycle { requests: 4, guessed: (3, 5), deepest: 2, draft_s: 0.5, target_s: 0.25, ..Cycle::default() };
    let all = Watched { batch: 4, guessed: (3, 5), timed: Some((2, 0.5, 0.25)) };
    assert_eq!(watched(&cycle), all);
    assert_eq!(watched(&Cycle { prefilled: 7, ..cycle }), Watched { timed: None, ..all });
}
