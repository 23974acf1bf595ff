//! L1: whatever drafts, in whatever batch, the answers are those of plain decoding, and so are the bits of their
//! log-probabilities. L2: the training forward gives the same bits.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::{Draws, NoiseKey, Pool, Storage};
use models::drafter::{
    Context, Drafter, Vocabulary, eagle, hybrid::Hybrid, share::Lengths, suffix::Suffix, uncoupled::Uncoupled,
};
use models::tokenizer::Tokenizer;
use models::train::{Sequence, log_probs};
use models::{Answer, Config, Decoder, Decoding, Hidden, Result, Stop, Target, Weights};
use state::plan::{DrafterShape, Strategy, TinyShape};
use state::speculation::tree::{Accepted, DraftTree, ROOT};

mod prompts;

const VOCAB: u32 = 24;

fn config() -> Config {
    let shape = TinyShape { hidden: 32, layers: 3, heads: 4, kv_heads: 2, ffn: 48, positions_max: 128 };
    Config { vocab: VOCAB as usize, ..Config::tiny(&shape).unwrap() }
}

/// Larger weights than a fresh model's, so that its answers are not uniform noise.
fn weights(seed: u64) -> Weights {
    let mut raw = Weights::random(&config(), seed).unwrap().to_raw();
    for (shape, values) in raw.tensors.values_mut() {
        if shape.len() == 2 {
            values.iter_mut().for_each(|v| *v *= 12.0);
        }
    }
    Weights::from_raw(&config(), &raw).unwrap()
}

/// Of even seeds in bf16.
fn target(seed: u64) -> Arc<Target> {
    target_in(if seed.is_multiple_of(2) { Storage::Bf16 } else { Storage::F32 }, seed)
}

fn target_in(storage: Storage, seed: u64) -> Arc<Target> {
    let config = Config { storage, ..config() };
    let weights = Weights::from_raw(&config, &weights(seed).to_raw()).unwrap();
    Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap())
}

/// More than a page of keys and values.
const TOKENS_MAX: usize = 90;

/// Knows the answers, or draws from a list of evil habits.
struct Scripted {
    known: BTreeMap<(Vec<u32>, NoiseBits), Vec<u32>>,
    habit: Habit,
    calls: u32,
}

type NoiseBits = u32;

#[derive(Clone, Copy, Debug)]
enum Habit {
    Good,
    Random,
    Adversarial,
}

fn identity(noise: &NoiseKey) -> NoiseBits {
    noise.words(0, 0)[0]
}

impl Drafter for Scripted {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        self.calls += 1;
        let key = NoiseKey::new(77, 0, self.calls, 0, 0);
        Ok(requests.iter().enumerate().map(|(i, r)| self.tree(r, strategy, &key, i as u32)).collect())
    }
}

impl Scripted {
    fn tree(&self, request: &Context<'_>, strategy: &Strategy, key: &NoiseKey, i: u32) -> DraftTree {
        let answer = &self.known[&(request.tokens[..request.prompt].to_vec(), identity(&request.noise))];
        let mut tree = DraftTree::default();
        let mut parent = ROOT;
        for level in 0..strategy.depth.min(request.depth_max) {
            let truth = answer.get(request.tokens.len() + level).copied().unwrap_or(1);
            let drawn = (key.uniform(i, level as u32) * f64::from(VOCAB)) as u32;
            let tokens = match self.habit {
                Habit::Good => [truth, drawn],
                Habit::Random => [drawn, (drawn + level as u32) % VOCAB],
                // Right until a late level, then wrong; or the right one hidden behind wrong and repeated siblings.
                Habit::Adversarial if level % 3 == 2 => [(truth + 1) % VOCAB, (truth + 1) % VOCAB],
                Habit::Adversarial => [(truth + 1) % VOCAB, truth],
            };
            let nodes: Vec<usize> = tokens.iter().take(strategy.width).map(|t| tree.push(parent, *t)).collect();
            parent = nodes[nodes.len() - 1];
        }
        tree
    }
}

fn decode(
    target: &Arc<Target>,
    seed: u64,
    temperature: f32,
    batch: usize,
    drafter: Option<(&mut dyn Drafter, Strategy)>,
) -> Vec<Answer> {
    decode_up_to(TOKENS_MAX, target, (seed, temperature), batch, drafter)
}

fn decode_up_to(
    tokens_max: usize,
    target: &Arc<Target>,
    (seed, temperature): (u64, f32),
    batch: usize,
    mut drafter: Option<(&mut dyn Drafter, Strategy)>,
) -> Vec<Answer> {
    // One of the three seeds draws from the nucleus.
    let top_p = if seed == 3 { 0.8 } else { 1.0 };
    // One of them ends at texts of two characters, too.
    let stop = Stop::new(
        &(0..20).map(|i| format!("{}{}", i / 2, ["+", "="][i % 2])).collect::<Vec<_>>(),
        &Arc::new(Tokenizer::chars()),
    );
    let stop = stop.filter(|_| seed == 2);
    let hidden = drafter.as_ref().map_or(Hidden::Last, |(drafter, _)| drafter.reads());
    let hidden = if hidden == Hidden::Taps { hidden } else { Hidden::Last };
    let decoding = Decoding { temperature, top_p, tokens_max, eos: vec![0], stop, hidden };
    // With a drafter also on several threads.
    let pool = Arc::new(Pool::new(if drafter.is_some() { 3 } else { 1 }).unwrap());
    let mut decoder = Decoder::new(target.clone(), decoding, pool);
    let (mut ended, mut next) = (Vec::new(), 0);
    // Six groups of three samples, admitted as there is room: the batch's make-up depends on who ends when.
    while ended.len() < 18 {
        while next < 18 && decoder.running() < batch {
            let (group, sample) = (next / 3, next % 3);
            let prompt: Vec<u32> = (0..2 + group as u32).map(|i| 1 + (i * 5 + group as u32) % (VOCAB - 1)).collect();
            let noise = NoiseKey::new(seed, 1, 0, group as u32, sample as u32);
            decoder.admit(group, &prompt, &[(sample, noise)]).unwrap();
            next += 1;
        }
        let draft = drafter.as_mut().map(|(d, s)| (&mut **d as &mut dyn Drafter, &*s));
        ended.extend(decoder.cycle(draft).unwrap().ended);
    }
    ended.sort_by_key(|a| (a.group, a.sample));
    ended
}

fn assert_same(plain: &[Answer], other: &[Answer], what: &str) {
    for (a, b) in plain.iter().zip(other) {
        assert_eq!(a.tokens, b.tokens, "{what}: tokens of group {} sample {}", a.group, a.sample);
        let bits = |answer: &Answer| {
            // Whatever is kept beside them, last hidden states come last.
            let (width, last) = (answer.hidden.len() / (answer.tokens.len() - 1), config().hidden);
            let last = answer.hidden.chunks_exact(width).flat_map(|row| &row[width - last..]);
            answer.log_probs.iter().chain(last).map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(bits(a), bits(b), "{what}: bits of group {} sample {}", a.group, a.sample);
    }
}

/// Drafts nothing, and remembers how much it was told to expect.
struct Listens(Vec<f32>);

impl Drafter for Listens {
    fn draft(&mut self, requests: &[Context<'_>], _: &Strategy) -> Result<Vec<DraftTree>> {
        self.0.extend(requests.iter().map(|request| request.remainder));
        Ok(vec![DraftTree::default(); requests.len()])
    }
}

#[test]
fn a_decoder_made_later_knows_how_long_answers_get() {
    let (target, pool, lengths) = (target(1), Arc::new(Pool::new(1).unwrap()), Lengths::default());
    let decode = |lengths: Lengths, sample: u32| {
        let hidden = Hidden::Nothing;
        let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 20, eos: Vec::new(), stop: None, hidden };
        let mut decoder = Decoder::new(target.clone(), decoding, pool.clone()).with_lengths(lengths);
        decoder.admit(0, &[1, 2], &[(0, NoiseKey::new(1, 1, 0, 0, sample))]).unwrap();
        let mut listens = Listens(Vec::new());
        while decoder.running() > 0 {
            decoder.cycle(Some((&mut listens, &Strategy::chain(0, 1)))).unwrap();
        }
        listens.0
    };
    assert_eq!(decode(lengths.clone(), 0)[..3], [1.0, 2.0, 3.0], "as much again as was said");
    // The mean of those, and of what is left to one of 20 tokens.
    assert_eq!(decode(lengths.clone(), 1)[..3], [10.5, 10.5, 10.5]);
    assert_eq!(decode(Lengths::of(&lengths.to_vec()), 2)[0], 41.0 / 3.0);
}

#[test]
fn answers_are_those_of_plain_decoding() {
    let chain = Strategy::chain(0, 5);
    let tree = Strategy::tree(0, 6, 2, 12);
    for seed in [1, 2, 3] {
        for temperature in [0.0, 1.0] {
            let target = target(seed);
            let plain = decode(&target, seed, temperature, 1, None);
            assert_same(&plain, &decode(&target, seed, temperature, 16, None), "plain, batch of 16");
            let known = (0..18).map(|i| {
                let answer: &Answer = &plain[i];
                let noise = NoiseKey::new(seed, 1, 0, answer.group as u32, answer.sample as u32);
                ((answer.tokens[..answer.prompt].to_vec(), identity(&noise)), answer.tokens.clone())
            });
            let known: BTreeMap<_, _> = known.collect();
            for batch in [1, 2, 5, 16] {
                let same = |drafter: &mut dyn Drafter, strategy: Strategy, what: &str| {
                    let drafted = decode(&target, seed, temperature, batch, Some((drafter, strategy)));
                    assert_same(&plain, &drafted, &format!("{what} {strategy:?} T={temperature} batch={batch}"));
                };
                for strategy in [chain, tree] {
                    for habit in [Habit::Good, Habit::Random, Habit::Adversarial] {
                        let mut drafter = Scripted { known: known.clone(), habit, calls: 0 };
                        same(&mut drafter, strategy, &format!("{habit:?}"));
                    }
                    let learned = |shape| {
                        let weights = eagle::random(&config(), shape, 5).unwrap();
                        let vocabulary = Arc::new(Vocabulary::whole(&target));
                        eagle::Eagle::new(vocabulary, &weights, shape, Arc::new(Pool::new(2).unwrap())).unwrap()
                    };
                    let (mut third, mut suffix) = (learned(DrafterShape::eagle3(0)), Suffix::new(1, 4));
                    let mut learned = learned(DrafterShape::eagle(40));
                    same(&mut third, strategy, "eagle3");
                    same(&mut learned, strategy, "eagle");
                    same(&mut Uncoupled(&mut learned), strategy, "eagle without the target's noise");
                    same(&mut suffix, strategy, "suffix");
                    for learned in [&mut learned, &mut third] {
                        let with_suffix = strategy.with_suffix(4).with_chance_min(0.05).with_budget_all(9);
                        same(&mut Hybrid::new(&mut suffix, learned), with_suffix, "hybrid");
                    }
                }
            }
        }
    }
}

#[test]
fn one_tree_holds_what_is_proposed_and_what_is_guessed() {
    let (target, shape) = (target(4), DrafterShape::eagle(40));
    let weights = eagle::random(&config(), shape, 5).unwrap();
    let vocabulary = Arc::new(Vocabulary::whole(&target));
    let mut learned = eagle::Eagle::new(vocabulary, &weights, shape, Arc::default()).unwrap();
    let hidden = vec![0.1; 8 * 32];
    let request = |id, tokens| Context {
        id,
        tokens,
        prompt: 1,
        hidden: [&hidden, &[]],
        noise: NoiseKey::new(4, 1, 0, 0, 0),
        draws: Draws { temperature: 1.0, top_p: 1.0 },
        depth_max: 9,
        remainder: 1.0,
        proposal: &[],
    };
    // The end of the first text was there before, and went on with 1, 2, 3; that of the second was not.
    let requests = [request(3, &[9, 7, 8, 1, 2, 3, 4, 7, 8]), request(4, &[9, 7, 8, 1, 2, 3, 4, 5, 6])];
    let mut cycle = |requests: &[Context<'_>], strategy: &Strategy, is_right: bool| {
        let mut suffix = Suffix::new(2, 4);
        let mut hybrid = Hybrid::new(&mut suffix, &mut learned);
        let trees = hybrid.draft(requests, strategy).unwrap();
        let accept = |tree: &DraftTree| {
            let guessed = (0..tree.len()).find(|node| tree.parents[*node] == ROOT && tree.tokens[*node] != 1);
            let tokens = if is_right { vec![1, 2] } else { vec![guessed.map_or(23, |node| tree.tokens[node])] };
            let mut nodes = vec![];
            for token in &tokens {
                nodes.extend(tree.child(nodes.last().copied().unwrap_or(ROOT), *token));
            }
            Accepted { nodes, tokens }
        };
        let accepted: Vec<Accepted> = trees.iter().map(accept).collect();
        let is_learned = hybrid.learned(0);
        hybrid.verified(&trees, &accepted);
        (trees, is_learned)
    };
    let one = &requests[..1];
    let wide = Strategy::tree(0, 2, 3, 6).with_suffix(2);
    let (trees, is_learned) = cycle(one, &wide, true);
    let tree = &trees[0];
    let proposed = tree.child(tree.child(ROOT, 1).unwrap(), 2);
    assert!(proposed.is_some() && tree.len() == 6 && !is_learned, "{tree:?}");
    assert!(tree.parents.iter().filter(|parent| **parent == ROOT).count() > 1, "{tree:?}");
    // Where the chain fills the budget and was right whenever it was, nothing beside it is worth a node; others draft as ever.
    let (narrow, chain) = (Strategy::chain(0, 2).with_suffix(2), DraftTree::chain(vec![1, 2]));
    (0..200).for_each(|_| drop(cycle(one, &narrow, true)));
    let (alone, is_learned) = cycle(&requests[1..], &narrow, true);
    assert!(is_learned && alone[0].len() == 2);
    assert_eq!(cycle(&requests, &narrow, true).0, [chain.clone(), alone[0].clone()]);
    // Where it is wrong, and the network's own guess right, that one is.
    (0..400).for_each(|_| drop(cycle(one, &narrow, false)));
    let (trees, _) = cycle(one, &narrow, false);
    assert!(trees[0].len() == 2 && trees[0] != chain, "{trees:?}");
}

#[test]
fn a_good_drafter_saves_forwards() {
    let target = target(4);
    let plain = decode(&target, 4, 1.0, 1, None);
    let known = plain.iter().map(|a| {
        let noise = NoiseKey::new(4, 1, 0, a.group as u32, a.sample as u32);
        ((a.tokens[..a.prompt].to_vec(), identity(&noise)), a.tokens.clone())
    });
    let mut drafter = Scripted { known: known.collect(), habit: Habit::Good, calls: 0 };
    decode(&target, 4, 1.0, 1, Some((&mut drafter, Strategy::chain(0, 5))));
    let tokens: usize = plain.iter().map(|a| a.log_probs.len()).sum();
    assert!((drafter.calls as usize) < tokens / 4, "{} forwards for {tokens} tokens", drafter.calls);
}

#[test]
fn training_sees_the_bits_of_the_rollout() {
    for storage in [Storage::F32, Storage::Bf16] {
        let target = target_in(storage, 6);
        let answers = decode(&target, 6, 1.0, 7, None);
        assert!(answers.iter().any(|answer| answer.tokens.len() > 70), "no answer has two pages");
        let sequence = |a: &Answer| Sequence { tokens: a.tokens.clone(), prompt: a.prompt };
        let sequences: Vec<Sequence> = answers.iter().map(sequence).collect();
        // Alone, and all laid end to end on several threads.
        for (answer, sequence) in answers.iter().zip(&sequences) {
            let again = log_probs(&Pool::default(), &target, std::slice::from_ref(sequence), 1.0);
            assert_eq!(again[0], answer.log_probs);
        }
        let again = log_probs(&Pool::new(3).unwrap(), &target, &sequences, 1.0);
        assert!(again.iter().zip(&answers).all(|(again, answer)| *again == answer.log_probs));
    }
}

#[test]
fn requests_move_between_decoders() {
    for storage in [Storage::F32, Storage::Bf16] {
        requests_move(storage);
    }
}

fn requests_move(storage: Storage) {
    let target = target_in(storage, 9);
    // With their keys and values, without, and with some of a target that is not this one, though it has the same weights.
    for (cycles, way) in [
        (2, Way::Exported),
        (3, Way::Exported),
        (8, Way::Exported),
        (1, Way::Halved),
        (4, Way::Halved),
        (2, Way::Strange),
    ] {
        // Who brings no keys and values is to be done with making them before it moves again.
        let tokens_max = if way == Way::Halved { TOKENS_MAX } else { 40 };
        let plain = decode_up_to(tokens_max, &target, (9, 1.0), 5, None);
        let (temperature, top_p, hidden) = (1.0, 1.0, Hidden::Last);
        let decoding = Decoding { temperature, top_p, tokens_max, eos: vec![0], stop: None, hidden };
        let other = if way == Way::Strange { target_in(storage, 9) } else { target.clone() };
        let decoder = |target, threads| Decoder::new(target, decoding.clone(), Arc::new(Pool::new(threads).unwrap()));
        let (mut decoders, mut ended) = ([decoder(target.clone(), 1), decoder(other, 2)], Vec::new());
        for group in 0..6 {
            let prompt: Vec<u32> = (0..2 + group as u32).map(|i| 1 + (i * 5 + group as u32) % (VOCAB - 1)).collect();
            let noise = |sample: usize| (sample, NoiseKey::new(9, 1, 0, group as u32, sample as u32));
            decoders[group % 2].admit(group, &prompt, &[0, 1, 2].map(noise)).unwrap();
        }
        let mut suffixes = [Suffix::new(1, 4), Suffix::new(1, 4)];
        while decoders.iter().any(|d| d.running() > 0) {
            for at in 0..2 {
                let suffix = &mut suffixes[at];
                for _ in 0..cycles {
                    let ends = decoders[at].cycle(Some((suffix, &Strategy::chain(0, 3)))).unwrap().ended;
                    ends.iter().for_each(|a| suffix.ended(a.id, &a.tokens, a.prompt));
                    ended.extend(ends);
                }
                if way == Way::Exported {
                    for (id, request) in decoders[at].export(2) {
                        suffix.left(id);
                        decoders[1 - at].import(request).unwrap();
                    }
                    continue;
                }
                let before = decoders[at].running();
                for running in decoders[at].halve() {
                    suffix.left(running.id());
                    decoders[1 - at].take_over(running).unwrap();
                }
                assert_eq!(decoders[at].running(), before.div_ceil(2));
            }
        }
        ended.sort_by_key(|a| (a.group, a.sample));
        assert_eq!(ended.len(), plain.len());
        assert_same(&plain, &ended, &format!("{way:?} every {cycles} cycles"));
    }
}

/// How requests leave a decoder for another.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Exported,
    Halved,
    Strange,
}

/// With room for a few requests at a time, others wait in the middle of their answers, and say the same.
#[test]
fn requests_that_wait_for_memory_say_the_same() {
    let target = target(5);
    let decoding =
        Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 56, eos: vec![0], stop: None, hidden: Hidden::Last };
    let shape = DrafterShape::eagle(40);
    let weights = Weights::random_layout(eagle::parameters(&config(), shape), Storage::F32, 5, 1).unwrap();
    let vocabulary = Arc::new(Vocabulary::whole(&target));
    let decode = |room: usize, moves: bool| {
        let decoder =
            || Decoder::new(target.clone(), decoding.clone(), Arc::new(Pool::new(2).unwrap())).with_cache_max(room);
        let drafter =
            || eagle::Eagle::new(vocabulary.clone(), &weights, shape, Arc::new(Pool::new(1).unwrap())).unwrap();
        let (mut decoders, mut drafters) = ([decoder(), decoder()], [drafter(), drafter()]);
        for group in 0..6 {
            let prompt: Vec<u32> = (0..58 + 20 * group).map(|i| 1 + (i * 5 + group) % (VOCAB - 1)).collect();
            let noise = |sample: usize| (sample, NoiseKey::new(5, 1, 0, group, sample as u32));
            decoders[0].admit(group as usize, &prompt[..prompt.len().min(70)], &[0, 1, 2].map(noise)).unwrap();
        }
        let (mut ended, mut waited, mut most) = (Vec::new(), 0, 0);
        for turn in 0.. {
            if decoders.iter().all(|decoder| decoder.running() == 0) {
                break;
            }
            assert!(turn < 4_000, "it does not end");
            for (decoder, drafter) in decoders.iter_mut().zip(&mut drafters) {
                let prefills = decoder.is_prefilling();
                let cycle = decoder.cycle(Some((drafter, &Strategy::tree(0, 3, 2, 5)))).unwrap();
                assert!(prefills == (cycle.prefilled > 0) || !cycle.waiting.is_empty(), "it is known beforehand");
                cycle.waiting.iter().for_each(|id| drafter.left(*id));
                (waited, most) = (waited + cycle.waiting.len(), most.max(decoder.cached_tokens()));
                ended.extend(cycle.ended);
            }
            let from = turn / 5 % 2;
            if moves && turn % 5 == 4 {
                let before = decoders[from].running();
                for running in decoders[from].halve() {
                    drafters[from].left(running.id());
                    decoders[1 - from].take_over(running).unwrap();
                }
                assert!(decoders[from].running() > 0 || before == 0, "who lends goes on");
            }
        }
        decoders.iter_mut().for_each(Decoder::trim);
        assert!(
            decoders.iter().all(|decoder| decoder.cached_tokens() == 0),
            "some prompts were kept, and nothing else"
        );
        ended.sort_by_key(|a| (a.group, a.sample));
        (ended, waited, most)
    };
    let mut one = Decoder::new(target.clone(), decoding.clone(), Arc::new(Pool::new(1).unwrap())).with_cache_max(1);
    one.admit(0, &[1, 2], &[(0, NoiseKey::new(5, 1, 0, 0, 0))]).unwrap();
    assert_eq!((one.halve().len(), one.running()), (0, 1), "there is nothing to halve");
    let (plain, waited, all) = decode(0, false);
    assert_eq!((plain.len(), waited), (18, 0));
    // One token alone is less than anything needs: one after the other.
    for (room, moves) in [(1, false), (1, true), (5 * 64, false), (6 * 64, true), (12 * 64, false)] {
        let (answers, waited, most) = decode(room, moves);
        assert_eq!(answers.len(), plain.len());
        assert_same(&plain, &answers, &format!("room for {room} tokens, moving: {moves}"));
        assert!(waited > 0 && most < all, "{waited} waited, {most} of {all} tokens");
        assert!(moves || room == 1 || most <= room, "{most} tokens in {room}");
    }
}
