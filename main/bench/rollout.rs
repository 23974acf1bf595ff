//! How fast a model's rollouts decode with speculation, and whether the answers stay the same: everything side by side in
//! one process, request by request where that is possible, because machines are noisy.

use std::path::PathBuf;
use std::process::ExitCode;

use actors::{Asked, Decoded, How, Moment, Solo};
use kernels::NoiseKey;
use serde::Serialize;
use state::plan::{Controller, Strategy};
use state::speculation::controller::{BUCKETS, batch_sizes, bucket};

use crate::commands::Result;
use crate::generate::open;
use crate::output;

/// Separates the noise of measured rollouts from others, and that of answers the drafter learns from.
const STREAM: u32 = 4;
const LEARNED: u32 = 5;
/// Requests decoded together in the long-tailed rollout, at most.
const SLOTS: usize = 32;
/// Nodes of the trees that are compared with and without shared noise.
const BUDGETS: [usize; 4] = [4, 8, 16, 32];

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Rollout {
    /// A workflow, or the folder of a run with its trained drafter.
    model: PathBuf,
    /// Threads of the device.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Answers of the rollout with a long tail.
    #[arg(long, default_value_t = 128)]
    requests: usize,
    /// Answers decoded alone, one after the other.
    #[arg(long, default_value_t = 12)]
    alone: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long)]
    tokens: Option<usize>,
    /// Answers that a drafter learns from before it is measured, and for how many seconds at most; a run's drafter goes on.
    #[arg(long, default_value_t = 64)]
    learn_from: usize,
    #[arg(long, default_value_t = 120.0)]
    learn_s: f64,
    /// Measure every strategy on the long-tailed rollout too: what would the best choice in hindsight have gained?
    #[arg(long)]
    regret: bool,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Debug, Serialize)]
struct Measured {
    threads: usize,
    temperature: f32,
    /// Micro-batches the drafter learned, its last loss, and seconds.
    learned_batches: u64,
    learned_loss: f64,
    learned_s: f64,
    /// Answers that were compared with those of plain decoding, and those that differ.
    compared: usize,
    differences: usize,
    /// One request at a time.
    alone: Vec<Line>,
    /// A full batch.
    full: Vec<Line>,
    /// The long-tailed rollout.
    tail: Vec<Line>,
    tail_batch_sizes: Vec<BatchLine>,
    /// Seconds over those of the best single strategy, and over those of the best one at each batch size, in hindsight.
    regret_fixed: Option<f64>,
    regret_by_batch: Option<f64>,
    /// Accept length of trees with shared noise and without.
    trees: Vec<Tree>,
    /// Share of adaptive decoding that is neither target nor drafter, alone and in the rollout.
    overhead_alone: f64,
    overhead_tail: f64,
}

/// One way to decode.
#[derive(Debug, Serialize)]
struct Line {
    how: String,
    seconds: f64,
    tokens_per_s: f64,
    /// As fast as plain decoding.
    ratio: f64,
    accept_length: f64,
    /// Share of request-cycles with a draft, and tokens of those.
    drafted: f64,
    drafted_accept_length: f64,
    /// Milliseconds of a cycle in the target, and in the drafter.
    target_ms: f64,
    draft_ms: f64,
}

/// A batch size in the long-tailed rollout.
#[derive(Debug, Serialize)]
struct BatchLine {
    batch_min: usize,
    seconds: f64,
    ratio: f64,
}

/// Trees of equal size.
#[derive(Debug, Serialize)]
struct Tree {
    budget: usize,
    depth: usize,
    width: usize,
    coupled: f64,
    uncoupled: f64,
    ratio: f64,
}

struct Bench<'a> {
    args: &'a Rollout,
    solo: Solo,
    temperature: f32,
    tokens_max: usize,
    compared: usize,
    differences: usize,
}

pub(crate) fn rollout(args: &Rollout) -> Result<ExitCode> {
    let (solo, _) = open(&args.model, args.threads.max(1))?;
    let sampling = &solo.plan().sampling;
    let (temperature, tokens_max) = (sampling.temperature, args.tokens.unwrap_or(sampling.tokens_max).max(1));
    let mut bench = Bench { args, solo, temperature, tokens_max, compared: 0, differences: 0 };
    let measured = bench.measure()?;
    if args.json {
        output::json(&measured)?;
    } else {
        output::report(&measured.text())?;
    }
    Ok(if measured.differences == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Bench<'_> {
    fn measure(&mut self) -> Result<Measured> {
        let (learned_batches, learned_loss, learned_s) = self.learn()?;
        let ways = self.ways();
        output::note("one request at a time");
        let alone = self.alone(&ways)?;
        output::note(&format!("{SLOTS} at a time"));
        let full = self.together(&ways[..2], 2 * SLOTS, self.tokens_max.min(96))?;
        output::note(&format!("{} requests, {SLOTS} at a time", self.args.requests));
        let tail =
            self.together(if self.args.regret { &ways } else { &ways[..2] }, self.args.requests, self.tokens_max)?;
        output::note("trees with and without shared noise");
        let trees = if self.solo.has_drafter() { self.trees()? } else { Vec::new() };
        let (regret_fixed, regret_by_batch) = regret(&tail);
        Ok(Measured {
            threads: self.args.threads,
            temperature: self.temperature,
            learned_batches,
            learned_loss,
            learned_s,
            compared: self.compared,
            differences: self.differences,
            overhead_alone: overhead(&alone[1].1),
            overhead_tail: overhead(&tail[1].1),
            alone: lines(&alone),
            full: lines(&full),
            tail_batch_sizes: by_batch(&tail[0].1, &tail[1].1),
            tail: lines(&tail),
            regret_fixed,
            regret_by_batch,
            trees,
        })
    }

    /// Plain, adaptive, then every strategy of the plan that can draft.
    fn ways(&self) -> Vec<(String, Controller)> {
        let speculation = &self.solo.plan().speculation;
        let mut ways = vec![("plain".into(), Controller::Off), ("adaptive".into(), speculation.controller.clone())];
        if let Controller::Bandit { strategies, .. } = &speculation.controller {
            let is_ready = |s: &&Strategy| self.solo.has_drafter() || speculation.suffix() == Some(s.drafter);
            ways.extend(strategies.iter().filter(is_ready).map(|s| (self.name(s), Controller::Fixed(*s))));
        }
        ways
    }

    fn name(&self, s: &Strategy) -> String {
        let is_suffix = self.solo.plan().speculation.suffix() == Some(s.drafter);
        let mut name = format!("{} {}", if is_suffix { "suffix" } else { "eagle" }, s.depth);
        if s.width > 1 {
            name += &format!(" wide {} of {}", s.width, s.budget);
        }
        if s.suffix > 0 {
            name += &format!(" + suffix {}", s.suffix);
        }
        if s.chance_min > 0.0 {
            name += &format!(" from {:.0} %", s.chance_min * 100.0);
        }
        name
    }

    fn learn(&mut self) -> Result<(u64, f64, f64)> {
        let (count, seconds) = (self.args.learn_from, self.args.learn_s);
        if self.solo.plan().speculation.training.is_none() || count == 0 || seconds <= 0.0 {
            return Ok((0, 0.0, 0.0));
        }
        output::note(&format!("the drafter learns from {count} answers for {seconds:.0} s"));
        let how = How { keep_hidden: true, ..self.how(&Controller::Off, SLOTS, self.tokens_max) };
        let answers = self.solo.decode(&self.asked(LEARNED, count)?, &how, |_| ())?.answers;
        let (batches, loss) = self.solo.train(&answers, seconds)?;
        Ok((batches, loss, seconds))
    }

    /// Problems of the plan, another stretch for learning than for measuring.
    fn asked(&self, stream: u32, count: usize) -> Result<Vec<Asked>> {
        let one = |i: usize| {
            let prompt = self.solo.problem(i as u64 + if stream == LEARNED { 1 << 20 } else { 0 })?;
            Ok(Asked { prompt, noise: NoiseKey::new(self.solo.plan().seed, stream, 0, i as u32, 0) })
        };
        (0..count).map(one).collect()
    }

    fn how(&self, controller: &Controller, slots: usize, tokens_max: usize) -> How {
        let (controller, temperature) = (controller.clone(), self.temperature);
        How { slots, controller, temperature, tokens_max, keep_hidden: false, is_coupled: true }
    }

    /// Each request in every way before the next one.
    fn alone(&mut self, ways: &[(String, Controller)]) -> Result<Vec<(String, Decoded)>> {
        let mut all: Vec<(String, Decoded)> = ways.iter().map(|w| (w.0.clone(), Decoded::default())).collect();
        let mut controllers: Vec<_> = ways.iter().map(|w| self.solo.controller(&w.1)).collect();
        for asked in self.asked(STREAM, self.args.alone)? {
            for (i, (_, controller)) in ways.iter().enumerate() {
                let how = self.how(controller, 1, self.tokens_max);
                let decoded = self.solo.decode_with(&mut controllers[i], std::slice::from_ref(&asked), &how, |_| ())?;
                all[i].1.answers.extend(decoded.answers);
                all[i].1.moments.extend(decoded.moments);
                all[i].1.seconds += decoded.seconds;
            }
        }
        self.compare(&all);
        Ok(all)
    }

    fn together(
        &mut self,
        ways: &[(String, Controller)],
        requests: usize,
        tokens_max: usize,
    ) -> Result<Vec<(String, Decoded)>> {
        let asked = self.asked(STREAM, requests)?;
        let mut all = Vec::new();
        for (name, controller) in ways {
            let decoded = self.solo.decode(&asked, &self.how(controller, SLOTS, tokens_max), |_| ())?;
            all.push((name.clone(), decoded));
        }
        self.compare(&all);
        Ok(all)
    }

    /// Counts answers that are not those of the first way: tokens, and the bits of their log-probabilities.
    fn compare(&mut self, all: &[(String, Decoded)]) {
        for (_, other) in &all[1..] {
            for (plain, other) in all[0].1.answers.iter().zip(&other.answers) {
                let is_same = plain.tokens == other.tokens && plain.log_probs == other.log_probs;
                self.compared += 1;
                self.differences += usize::from(!is_same);
            }
        }
    }

    fn trees(&mut self) -> Result<Vec<Tree>> {
        let speculation = &self.solo.plan().speculation;
        let Some(drafter) = speculation.learned() else { return Ok(Vec::new()) };
        let asked = self.asked(STREAM, self.args.alone.min(8))?;
        let mut trees = Vec::new();
        for budget in BUDGETS {
            let (depth, width) = (budget.ilog2() as usize + 1, 4.min(budget / 2));
            let controller = Controller::Fixed(Strategy::tree(drafter, depth, width, budget));
            let how = self.how(&controller, self.args.alone.min(8), self.tokens_max);
            let coupled = self.solo.decode(&asked, &how, |_| ())?.accept_length();
            let uncoupled = self.solo.decode(&asked, &How { is_coupled: false, ..how }, |_| ())?.accept_length();
            trees.push(Tree { budget, depth, width, coupled, uncoupled, ratio: coupled / uncoupled });
        }
        Ok(trees)
    }
}

fn lines(all: &[(String, Decoded)]) -> Vec<Line> {
    let line = |(how, d): &(String, Decoded)| {
        let sum = |f: fn(&Moment) -> usize| d.moments.iter().map(f).sum::<usize>() as f64;
        let seconds = |f: fn(&Moment) -> f64| {
            d.moments.iter().map(f).fold(0.0, |a, b| a + b) * 1e3 / d.moments.len().max(1) as f64
        };
        let (drafted, tokens) = (sum(|m| m.drafted.0), sum(|m| m.drafted.1));
        Line {
            how: how.clone(),
            seconds: d.seconds,
            tokens_per_s: d.rate(),
            ratio: d.rate() / all[0].1.rate(),
            accept_length: d.accept_length(),
            drafted: drafted / sum(|m| m.requests).max(1.0),
            target_ms: seconds(|m| m.target_s),
            draft_ms: seconds(|m| m.draft_s),
            drafted_accept_length: if drafted > 0.0 { tokens / drafted } else { 1.0 },
        }
    };
    all.iter().map(line).collect()
}

/// Share of the cycles' time outside the target's and the drafter's forwards.
fn overhead(decoded: &Decoded) -> f64 {
    let sum = |f: fn(&Moment) -> f64| decoded.moments.iter().map(f).fold(0.0, |a, b| a + b);
    1.0 - (sum(|m| m.draft_s) + sum(|m| m.target_s)) / sum(|m| m.seconds).max(1e-9)
}

/// Tokens and seconds in each bucket of batch sizes.
fn buckets(decoded: &Decoded) -> [(f64, f64); BUCKETS] {
    let mut buckets = [(0.0, 0.0); BUCKETS];
    for m in &decoded.moments {
        let (tokens, seconds) = &mut buckets[bucket(m.requests)];
        *tokens += m.tokens as f64;
        *seconds += m.seconds;
    }
    buckets
}

fn by_batch(plain: &Decoded, adaptive: &Decoded) -> Vec<BatchLine> {
    let (plain, adaptive) = (buckets(plain), buckets(adaptive));
    let line = |i: usize| {
        let [plain, adaptive] = [plain[i], adaptive[i]].map(|(tokens, seconds)| (tokens / seconds.max(1e-9), seconds));
        let is_there = plain.1 > 0.0 && adaptive.1 > 0.0;
        is_there.then(|| BatchLine { batch_min: batch_sizes(i).0, seconds: adaptive.1, ratio: adaptive.0 / plain.0 })
    };
    (0..BUCKETS).filter_map(line).collect()
}

/// What adaptive decoding lost against the best way in hindsight: the best single one, and the best one at each batch size.
fn regret(tail: &[(String, Decoded)]) -> (Option<f64>, Option<f64>) {
    if tail.len() < 3 {
        return (None, None);
    }
    let fixed: Vec<&Decoded> = tail.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, t)| &t.1).collect();
    let adaptive = &tail[1].1;
    let best = fixed.iter().map(|d| d.seconds).fold(f64::INFINITY, f64::min);
    let all: Vec<_> = fixed.iter().map(|d| buckets(d)).collect();
    let (mut took, mut would) = (0.0, 0.0);
    for (i, (tokens, seconds)) in buckets(adaptive).into_iter().enumerate() {
        let rate = all.iter().map(|b| b[i].0 / b[i].1.max(1e-9)).fold(0.0, f64::max);
        if rate > 0.0 {
            took += seconds;
            would += tokens / rate;
        }
    }
    (Some(adaptive.seconds / best - 1.0), Some(took / would - 1.0))
}

impl Measured {
    fn text(&self) -> String {
        let mut text = format!(
            "\n{} threads, T = {}; the drafter learned {} micro-batches\n",
            self.threads, self.temperature, self.learned_batches
        );
        let parts = [("one request at a time", &self.alone), ("a full batch", &self.full), ("a long tail", &self.tail)];
        for (title, lines) in parts {
            text += &format!("\n  {title:<34} tokens/s   ratio  accept  drafted  target ms  draft ms\n");
            for l in lines {
                text += &format!(
                    "    {:<32} {:>8.1}  {:>5.2}x  {:>6.2}  {:>5.0} %  {:>9.3}  {:>8.3}\n",
                    l.how,
                    l.tokens_per_s,
                    l.ratio,
                    l.accept_length,
                    l.drafted * 100.0,
                    l.target_ms,
                    l.draft_ms
                );
            }
        }
        text += "\n  adaptive in the long tail, by requests decoded together\n";
        for b in &self.tail_batch_sizes {
            text += &format!("    from {:<3} {:>6.1} s  {:.2}x plain\n", b.batch_min, b.seconds, b.ratio);
        }
        if let (Some(fixed), Some(by_batch)) = (self.regret_fixed, self.regret_by_batch) {
            let (fixed, by_batch) = (fixed * 100.0, by_batch * 100.0);
            text += &format!(
                "  lost against the best single strategy {fixed:.1} %, against the best at each batch size {by_batch:.1} %\n"
            );
        }
        if !self.trees.is_empty() {
            text += "\n  accept length of trees   with shared noise  without\n";
        }
        for t in &self.trees {
            text += &format!("    {:>2} nodes {:>24.2} {:>12.2}  {:.2}x\n", t.budget, t.coupled, t.uncoupled, t.ratio);
        }
        text + &format!(
            "\n  neither target nor drafter: {:.1} % alone, {:.1} % in the rollout\n  {} answers compared with plain decoding, {} differ\n",
            self.overhead_alone * 100.0,
            self.overhead_tail * 100.0,
            self.compared,
            self.differences
        )
    }
}
