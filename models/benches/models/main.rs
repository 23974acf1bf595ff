//! Whole models against the machine: cycles of the quickstart's model, and SmolLM2-135M where it is installed.
//!
//!     cargo bench -p taper-models
//!     cargo bench -p taper-models -- tiny        one part: speculation, tiny, smollm2
//!
//! Prints tables and writes them to target/bench/models.json. Peers (llama.cpp, torch) run the same work in
//! models/benches/peers.py.

#![expect(clippy::print_stdout, reason = "a bench reports")]

mod bare;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kernels::{NoiseKey, Pool, Storage};
use models::data::Dataset;
use models::drafter::buffer::{Example, Window};
use models::drafter::learn::{self, Learner};
use models::drafter::{Context, Drafter, Vocabulary, eagle, eagle::Eagle};
use models::load::{gguf, load_tiny};
use models::optim::AdamW;
use models::tokenizer::Tokenizer;
use models::train::{Sequence, Workspace, gradient};
use models::{Config, Decoder, Decoding, Hidden, Result, Target, Weights};
use state::plan::{Chains, Data, DrafterShape, Optimizer, Schedule, Source, Strategy, TinyShape};
use state::speculation::tree::{DraftTree, ROOT};

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let mut rows = Vec::new();
    if wants("speculation") {
        speculation(&mut rows);
    }
    if wants("tiny") {
        overhead(&mut rows);
        tiny(&mut rows);
    }
    match gguf_file() {
        _ if !wants("smollm2") => {}
        Some(file) => smollm2(&file, &mut rows),
        None => println!("SmolLM2-135M is not in target/models (README.md tells how): left out"),
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("models.json"), serde_json::to_string_pretty(&rows).unwrap()).unwrap();
}

fn tell(rows: &mut Vec<serde_json::Value>, name: &str, value: f64, unit: &str) {
    println!("{name:<58} {value:>10.2} {unit}");
    rows.push(serde_json::json!({ "name": name, "value": value, "unit": unit }));
}

/// Proposes a chain of given length that is never right: every cycle costs its rows and emits one token.
struct Wrong;

impl Drafter for Wrong {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let chain = |request: &Context<'_>| {
            let mut tree = DraftTree::default();
            let mut parent = ROOT;
            for _ in 0..strategy.depth.min(request.depth_max) {
                parent = tree.push(parent, 1);
            }
            tree
        };
        Ok(requests.iter().map(chain).collect())
    }
}

fn decoder(target: &Arc<Target>, requests: usize, pool: &Arc<Pool>) -> Decoder {
    let decoding =
        Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 4096, eos: Vec::new(), stop: None, hidden: Hidden::Last };
    let mut decoder = Decoder::new(target.clone(), decoding, pool.clone());
    for group in 0..requests {
        let prompt: Vec<u32> = (0..100).map(|i| 1 + (i * 7 + group as u32) % 19).collect();
        decoder.admit(group, &prompt, &[(0, NoiseKey::new(1, 0, 0, group as u32, 0))]).unwrap();
    }
    while decoder.decoding() < requests {
        decoder.cycle(None).unwrap();
    }
    decoder
}

/// Median seconds of a cycle.
fn cycle(decoder: &mut Decoder, cycles: usize, mut drafter: Option<(&mut dyn Drafter, Strategy)>) -> f64 {
    let mut times = Vec::new();
    for _ in 0..cycles {
        let began = Instant::now();
        let draft = drafter.as_mut().map(|(d, s)| (&mut **d as &mut dyn Drafter, &*s));
        decoder.cycle(draft).unwrap();
        times.push(began.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn chain(depth: usize) -> Strategy {
    Strategy::chain(0, depth)
}

fn tiny(rows: &mut Vec<serde_json::Value>) {
    let shape = TinyShape { hidden: 128, layers: 10, heads: 4, kv_heads: 1, ffn: 352, positions_max: 512 };
    for storage in [Storage::F32, Storage::Bf16] {
        let config = Config { storage, ..Config::tiny(&shape).unwrap() };
        let weights = Weights::random(&config, 1).unwrap();
        let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
        let pool = Arc::new(Pool::default());
        for requests in [1, 2, 4, 8, 16] {
            for depth in [0, 3, 7, 15] {
                let mut decoder = decoder(&target, requests, &pool);
                let mut wrong = Wrong;
                let draft = (depth > 0).then(|| (&mut wrong as &mut dyn Drafter, chain(depth)));
                let seconds = cycle(&mut decoder, 60, draft);
                let name = format!("tiny {storage:?}, cycle of {requests} x {} rows", depth + 1);
                tell(rows, &name, seconds * 1e6, "us");
            }
        }
        let shape = DrafterShape::eagle(0);
        let drafter = eagle::random(&config, shape, 2).unwrap().to_draft();
        for (requests, depth) in [(1, 4), (4, 4), (8, 4)] {
            let mut eagle = Eagle::new(Arc::new(Vocabulary::whole(&target)), &drafter, shape, pool.clone()).unwrap();
            let mut decoder = decoder(&target, requests, &pool);
            let seconds = cycle(&mut decoder, 60, Some((&mut eagle, chain(depth))));
            let drafts = drafter.storage();
            let name = format!("tiny {storage:?}, eagle of {depth} in {drafts:?} for {requests}, whole cycle");
            tell(rows, &name, seconds * 1e6, "us");
        }
    }
}

/// Cycles of one request against the same kernels on the same shapes without any decoder around them.
fn overhead(rows: &mut Vec<serde_json::Value>) {
    let shape = TinyShape { hidden: 128, layers: 10, heads: 4, kv_heads: 1, ffn: 352, positions_max: 512 };
    let config = Config::tiny(&shape).unwrap();
    let weights = Weights::random(&config, 1).unwrap();
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
    let pool = Arc::new(Pool::default());
    let bare = bare::Cycle::new(&config);
    // Side by side, because the machine's speed changes.
    let (mut whole, mut kernels) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        whole.push(cycle(&mut decoder(&target, 1, &pool), 60, None));
        kernels.push(bare.median(&pool, 60));
    }
    whole.sort_by(f64::total_cmp);
    kernels.sort_by(f64::total_cmp);
    let (whole, kernels) = (whole[4], kernels[4]);
    tell(rows, "tiny F32, cycle of 1 x 1 rows", whole * 1e6, "us");
    tell(rows, "the same kernels alone", kernels * 1e6, "us");
    tell(rows, "framework overhead, of kernel time", (whole / kernels - 1.0) * 100.0, "%");
}

/// The quickstart's model with a drafter trained on its own answers: tokens a second by batch and strategy.
fn speculation(rows: &mut Vec<serde_json::Value>) {
    let shape = TinyShape { hidden: 128, layers: 10, heads: 4, kv_heads: 1, ffn: 352, positions_max: 512 };
    let config = Config::tiny(&shape).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflows/quickstart.safetensors");
    let weights = Weights::from_raw(&config, &load_tiny(&file, &config, None).unwrap()).unwrap();
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
    let pool = Arc::new(Pool::default());
    let chains = Chains {
        terms_min: 20,
        terms_mean: 25.0,
        terms_max: 40,
        tail: 0.0,
        tail_min: 20,
        check: 0.0,
        checks_max: 1,
        check_steps: 2,
        solution_max: 1_000,
    };
    let data = Data { source: Source::Chains(chains), template: "{question}".into(), chat: false, heldout: 0 };
    let data = Dataset::open(&data, 3).unwrap();
    let tokenizer = Tokenizer::chars();
    let prompt = |i: u64| tokenizer.encode(&data.problem(i).question).unwrap();
    let roll = |first: u64, requests: u64, hidden: Hidden, mut drafter: Option<(&mut dyn Drafter, Strategy)>| {
        let (temperature, top_p, tokens_max, eos) = (1.0, 1.0, 256, config.eos.clone());
        let decoding = Decoding { temperature, top_p, tokens_max, eos, stop: None, hidden };
        let mut decoder = Decoder::new(target.clone(), decoding, pool.clone());
        // Groups of four, as a tail has them.
        for i in 0..requests.div_ceil(4) {
            let noise = |s: u64| (s as usize, NoiseKey::new(1, 0, 0, (first + i) as u32, s as u32));
            let samples: Vec<_> = (0..4.min(requests - 4 * i)).map(noise).collect();
            decoder.admit(i as usize, &prompt(first + i), &samples).unwrap();
        }
        let (mut answers, mut drafted, began) = (Vec::new(), (0, 0), Instant::now());
        while decoder.running() > 0 {
            let draft = drafter.as_mut().map(|(d, s)| (&mut **d as &mut dyn Drafter, &*s));
            let cycle = decoder.cycle(draft).unwrap();
            drafted = (drafted.0 + cycle.drafted.0, drafted.1 + cycle.drafted.1);
            answers.extend(cycle.ended);
        }
        let tokens: usize = answers.iter().map(|a| a.log_probs.len()).sum();
        (answers, tokens as f64 / began.elapsed().as_secs_f64(), drafted.1 as f64 / drafted.0.max(1) as f64)
    };
    for (name, shape, levels) in [
        ("eagle", DrafterShape::eagle(96), 1),
        ("eagle", DrafterShape::eagle(96), 4),
        ("eagle3", DrafterShape::eagle3(96), 4),
    ] {
        let (hidden, vocabulary) = (eagle::reads(shape), Arc::new(Vocabulary::whole(&target)));
        let name = format!("{name} of {levels} levels");
        let (answers, ..) = roll(100, 256, hidden, None);
        let examples: Vec<Window> = answers.iter().filter_map(Example::of).map(|e| Arc::new(e).whole()).collect();
        let mut learner =
            Learner::new(&config, shape, Learner::fresh(&target, shape, 1).unwrap(), 3e-3).with_levels(levels);
        let mut workspace = learn::Workspace::default();
        let (mut steps, mut seconds) = (0, 0.0);
        for until in [5.0, 15.0, 45.0] {
            while seconds < until {
                let began = Instant::now();
                learner.learn(&pool, &vocabulary, &examples[steps * 2 % 256..][..2], &mut workspace).unwrap();
                (steps, seconds) = (steps + 1, seconds + began.elapsed().as_secs_f64());
            }
            let mut eagle = Eagle::new(vocabulary.clone(), &learner.average(), shape, pool.clone()).unwrap();
            let accept = roll(0, 16, hidden, Some((&mut eagle, chain(6)))).2;
            tell(rows, &format!("{name}: accept length at depth 6 after {until} s, {steps} steps"), accept, "");
        }
        for requests in [1, 4, 16] {
            let plain = roll(0, requests, Hidden::Nothing, None).1;
            for (depth, width, budget) in [(2, 1, 2), (4, 1, 4), (6, 1, 6), (8, 1, 8), (6, 2, 12)] {
                let mut eagle = Eagle::new(vocabulary.clone(), &learner.average(), shape, pool.clone()).unwrap();
                let strategy = Strategy::tree(0, depth, width, budget);
                let (_, rate, accept) = roll(0, requests, hidden, Some((&mut eagle, strategy)));
                let name = format!("{name}: {requests} requests, {depth}x{width}, accept {accept:.2}");
                tell(rows, &name, rate / plain, "x plain");
            }
        }
    }
}

fn gguf_file() -> Option<std::path::PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/models");
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path());
    files.into_iter().find(|p| p.extension().is_some_and(|e| e == "gguf"))
}

fn smollm2(file: &Path, rows: &mut Vec<serde_json::Value>) {
    for storage in [Storage::Bf16, Storage::F32] {
        let loaded = gguf::load(file).unwrap();
        let config = Config { storage, ..loaded.config.clone() };
        let weights = Weights::from_raw(&config, &loaded.weights).unwrap();
        drop(loaded);
        let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
        for threads in [1, 2] {
            let pool = Arc::new(Pool::new(threads).unwrap());
            for requests in [1, 8, 32, 128] {
                let mut decoder = decoder(&target, requests, &pool);
                let seconds = cycle(&mut decoder, 20, None);
                let name = format!("SmolLM2 {storage:?}, decode, threads {threads}, batch {requests}");
                tell(rows, &name, requests as f64 / seconds, "tokens/s");
            }
        }
        step(&config, &weights, rows);
    }
}

/// Forward, backward and AdamW on 8 sequences of 256 tokens.
fn step(config: &Config, weights: &Weights, rows: &mut Vec<serde_json::Value>) {
    let pool = Pool::new(2).unwrap();
    let target = Target::new(config, weights, &Target::rope_table(config)).unwrap();
    let token = |i: u32| 100 + i * 37 % 40_000;
    let sequence = |s: u32| Sequence { tokens: (0..=256).map(|i| token(s * 257 + i)).collect(), prompt: 1 };
    let sequences: Vec<Sequence> = (0..8).map(sequence).collect();
    let mut adam = AdamW::new(weights);
    let optimizer = Optimizer {
        lr: 1e-6,
        betas: (0.9, 0.95),
        weight_decay: 0.0,
        clip_norm: 1.0,
        warmup: 0,
        schedule: Schedule::Constant,
    };
    let (mut seconds, mut workspace) = (f64::INFINITY, Workspace::default());
    for _ in 0..2 {
        let began = Instant::now();
        let mut gradients = weights.zeros();
        gradient((&pool, &mut workspace), &target, &sequences, 1.0, |_, _, _| -1.0 / 2048.0, &mut gradients);
        let forth = began.elapsed().as_secs_f64();
        drop(adam.step(&pool, weights, (gradients, 1.0), &optimizer, 1e-6));
        seconds = seconds.min(began.elapsed().as_secs_f64());
        println!("    gradient {forth:.2} s, AdamW {:.2} s", began.elapsed().as_secs_f64() - forth);
    }
    let name = format!("SmolLM2 {:?}, training step of 2,048 tokens, 2 threads", config.storage);
    tell(rows, &name, 2048.0 / seconds, "tokens/s");
    tell(rows, "peak memory so far", peak_gb(), "GB");
}

fn peak_gb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1e6
}
