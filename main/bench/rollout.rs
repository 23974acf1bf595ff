//! How fast a model's rollouts decode with speculation, and whether the answers stay the same. Ways to decode take turns every
//! few cycles, because machines are noisy.

#[path = "rollout/report.rs"]
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use actors::{Asked, DecodeOptions, Decoded, Solo};
use kernels::NoiseKey;
use state::plan::{Controller, Strategy};

use crate::commands::Result;
use crate::generate::open;
use crate::output;
use report::{Measured, Tree, by_batch, lines, overhead, regret};

/// Separates the noise of measured rollouts from others, and that of answers the drafter learns from.
const STREAM: u32 = 4;
const LEARNED: u32 = 5;
/// Requests decoded together in the long-tailed rollout, at most.
const SLOTS: usize = 32;
/// Seconds of a turn.
const TURN_S: f64 = 0.02;
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
    #[arg(long, default_value_t = 128, value_parser = at_least_one)]
    requests: usize,
    /// Answers decoded alone, one after the other.
    #[arg(long, default_value_t = 12, value_parser = at_least_one)]
    alone: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long)]
    tokens: Option<usize>,
    /// Answers that a drafter learns from before it is measured; a run's drafter goes on.
    #[arg(long, default_value_t = 64)]
    learn_from: usize,
    /// Seconds that it learns for, at most.
    #[arg(long, default_value_t = 120)]
    learn_s: u64,
    /// Measure every strategy on the long-tailed rollout too: what would the best choice in hindsight have gained?
    #[arg(long)]
    regret: bool,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "write a number from 1 on".into())
}

struct Bench<'a> {
    args: &'a Rollout,
    solo: Solo,
    tokens_max: usize,
    compared: usize,
    differences: usize,
}

pub(crate) fn rollout(args: &Rollout) -> Result<ExitCode> {
    let (solo, _) = open(&args.model, args.threads.max(1))?;
    let tokens_max = args.tokens.unwrap_or(solo.plan().sampling.tokens_max).max(1);
    let mut bench = Bench { args, solo, tokens_max, compared: 0, differences: 0 };
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
        let alone = self.race(&ways, self.args.alone, 1, self.tokens_max)?;
        output::note(&format!("{SLOTS} at a time"));
        let full = self.race(&ways[..2], 2 * SLOTS, SLOTS, self.tokens_max.min(96))?;
        output::note(&format!("{} requests, {SLOTS} at a time", self.args.requests));
        let some = if self.args.regret { &ways[..] } else { &ways[..2] };
        let tail = self.race(some, self.args.requests, SLOTS, self.tokens_max)?;
        output::note("trees with and without shared noise");
        let trees = if self.solo.has_drafter() { self.trees()? } else { Vec::new() };
        let (regret_fixed, regret_by_batch) = regret(&tail);
        Ok(Measured {
            threads: self.args.threads,
            temperature: self.solo.plan().sampling.temperature,
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

    /// Micro-batches, the last loss, seconds.
    fn learn(&mut self) -> Result<(u64, f64, f64)> {
        let (count, seconds) = (self.args.learn_from, self.args.learn_s);
        if self.solo.plan().speculation.training.is_none() || count == 0 || seconds == 0 {
            return Ok((0, 0.0, 0.0));
        }
        output::note(&format!("the drafter learns from {count} answers for {seconds} s"));
        let options = DecodeOptions { keep_hidden: true, ..self.options(&Controller::Off, SLOTS, self.tokens_max) };
        let answers = self.solo.decode(&self.asked(LEARNED, count)?, &options)?.answers;
        let began = Instant::now();
        let (batches, loss) = self.solo.train(&answers, seconds as f64)?;
        Ok((batches, loss, began.elapsed().as_secs_f64()))
    }

    /// Problems of the plan: training problems to learn from, held-out ones to measure with.
    fn asked(&self, stream: u32, count: usize) -> Result<Vec<Asked>> {
        let one = |i: usize| {
            let prompt = match stream {
                LEARNED => self.solo.problem(i as u64)?,
                _ => self.solo.heldout(i as u64)?,
            };
            Ok(Asked { prompt, noise: NoiseKey::new(self.solo.plan().seed, stream, 0, i as u32, 0) })
        };
        (0..count).map(one).collect()
    }

    fn options(&self, controller: &Controller, slots: usize, tokens_max: usize) -> DecodeOptions {
        DecodeOptions { tokens_max, ..DecodeOptions::of(self.solo.plan(), slots, controller.clone()) }
    }

    /// The same requests in every way, in turns of the same time.
    fn race(
        &mut self,
        ways: &[(String, Controller)],
        requests: usize,
        slots: usize,
        tokens_max: usize,
    ) -> Result<Vec<(String, Decoded)>> {
        let asked = self.asked(STREAM, requests)?;
        let begin = |way: &(String, Controller)| self.solo.begin(&asked, &self.options(&way.1, slots, tokens_max));
        let mut sessions = ways.iter().map(begin).collect::<std::result::Result<Vec<_>, _>>()?;
        while let Some(session) =
            sessions.iter_mut().filter(|s| !s.is_done()).min_by(|a, b| a.seconds().total_cmp(&b.seconds()))
        {
            let until = session.seconds() + TURN_S;
            while !session.is_done() && session.seconds() < until {
                session.cycle()?;
            }
        }
        let decoded = sessions.into_iter().map(|session| session.finish());
        let all: Vec<(String, Decoded)> = ways.iter().map(|way| way.0.clone()).zip(decoded).collect();
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
            let options = self.options(&controller, asked.len(), self.tokens_max);
            let coupled = self.solo.decode(&asked, &options)?.accept_length();
            let without = DecodeOptions { is_coupled: false, ..options };
            let uncoupled = self.solo.decode(&asked, &without)?.accept_length();
            trees.push(Tree { budget, depth, width, coupled, uncoupled, ratio: coupled / uncoupled });
        }
        Ok(trees)
    }
}
