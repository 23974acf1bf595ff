//! How fast a model's rollouts decode with speculation, and whether the answers stay the same.

#[path = "rollout/report.rs"]
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use actors::DecodeOptions;
use state::plan::{Controller, Strategy};

use super::race::{Race, SLOTS};
use crate::commands::Result;
use crate::number;
use crate::output;
use report::{Lengths, Measured, Shape, Tree, by_batch, in_short, lines, of_full_cycles, overhead, regret};

/// Nodes of the trees that are compared with and without shared noise.
const BUDGETS: [usize; 4] = [4, 8, 16, 32];

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Rollout {
    /// A workflow, or the folder of a run with its trained drafter.
    model: PathBuf,
    /// Threads of the device.
    #[arg(long, default_value_t = 1, value_parser = number::threads)]
    threads: usize,
    /// Answers of the rollout with a long tail.
    #[arg(long, default_value_t = 128, value_parser = number::at_least_one)]
    requests: usize,
    /// Of these decoded together, at most.
    #[arg(long, default_value_t = SLOTS, value_parser = number::at_least_one)]
    slots: usize,
    /// Answers decoded alone, one after the other.
    #[arg(long, default_value_t = 12, value_parser = number::at_least_one)]
    alone: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long, value_parser = number::at_least_one)]
    tokens: Option<usize>,
    /// Answers that a drafter learns from before it is measured; a run's drafter goes on. Few are soon known by heart.
    #[arg(long, default_value_t = 256)]
    learn_from: usize,
    /// Seconds that it learns for, at most.
    #[arg(long, default_value_t = 120, value_parser = number::seconds)]
    learn_s: u64,
    /// Measure every strategy on the long-tailed rollout too: what would the best choice in hindsight have gained?
    #[arg(long)]
    regret: bool,
    /// Leave out what comes last and takes as long as all the rest: trees of several sizes and shapes, with the target's noise and without.
    #[arg(long)]
    no_trees: bool,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn rollout(args: &Rollout) -> Result<ExitCode> {
    let mut race = Race::open(&args.model, args.threads, args.tokens)?;
    let measured = measure(args, &mut race)?;
    output::measured(args.json, &measured, &measured.text(), measured.differences == 0)
}

fn measure(args: &Rollout, race: &mut Race) -> Result<Measured> {
    let learned = race.learn(args.learn_from, args.learn_s as f64)?;
    let mut ways = vec![Race::plain(), race.adaptive()];
    ways.extend(race.strategies());
    let tokens_max = race.tokens_max;
    output::note("one request at a time");
    let alone = race.run(&ways, args.alone, 1, tokens_max)?;
    output::note(&in_short(&alone));
    output::note(&format!("a full batch, {SLOTS} at a time"));
    let full = race.run(&ways[..2], 2 * SLOTS, SLOTS, tokens_max.min(96))?;
    output::note(&in_short(&full));
    output::note(&format!("{} requests, {} at a time", args.requests, args.slots));
    let some = if args.regret { &ways[..] } else { &ways[..2] };
    let tail = race.run(some, args.requests, args.slots, tokens_max)?;
    output::note(&in_short(&tail));
    let trees = if race.solo.has_drafter() && !args.no_trees { trees(args, race)? } else { Vec::new() };
    let (regret_fixed, regret_by_batch) = regret(&tail);
    Ok(Measured {
        threads: args.threads,
        temperature: race.solo.plan().sampling.temperature,
        learned_batches: learned.batches,
        learned_loss: learned.loss,
        learned_s: learned.seconds,
        prompts_measured: race.prompts.count(),
        prompts_learned: learned.prompts.count(),
        repeat: [&race.prompts, &learned.prompts].map(|prompts| prompts.repeat),
        compared: race.compared,
        differences: race.differences,
        overhead_alone: overhead(&alone[1].1),
        overhead_tail: overhead(&tail[1].1),
        alone: lines(&alone),
        full: lines(&full),
        full_cycles_ratio: of_full_cycles(&full[0].1, &full[1].1, SLOTS),
        tail_batch_sizes: by_batch(&tail[0].1, &tail[1].1),
        tail: lines(&tail),
        tail_lengths: Lengths::of(&tail[0].1.answers, (race.group(), args.slots)),
        regret_fixed,
        regret_by_batch,
        trees,
    })
}

fn trees(args: &Rollout, race: &Race) -> Result<Vec<Tree>> {
    let Some(drafter) = race.solo.plan().speculation.learned() else { return Ok(Vec::new()) };
    output::note("trees with and without shared noise");
    let asked = race.measured(args.alone.min(8), 1)?;
    let mut trees = Vec::new();
    let accept_length = |is_coupled: bool, (depth, width, budget): (usize, usize, usize)| -> Result<f64> {
        let controller = Controller::Fixed(Strategy::tree(drafter, depth, width, budget));
        let options = DecodeOptions { is_coupled, ..race.options(&controller, asked.len(), race.tokens_max) };
        Ok(race.solo.decode(&asked, &options)?.accept_length())
    };
    // How likely guesses are is learned apart for both, and of one side much may be known already.
    for is_coupled in [true, false] {
        accept_length(is_coupled, (8, 4, 16))?;
    }
    for budget in BUDGETS {
        let best = |is_coupled: bool| -> Result<Shape> {
            let mut best = Shape::default();
            for (depth, width) in shapes(budget) {
                let accept_length = accept_length(is_coupled, (depth, width, budget))?;
                if accept_length > best.accept_length {
                    best = Shape { depth, width, accept_length };
                }
            }
            Ok(best)
        };
        let (coupled, uncoupled) = (best(true)?, best(false)?);
        let ratio = coupled.accept_length / uncoupled.accept_length;
        trees.push(Tree { budget, coupled, uncoupled, ratio });
    }
    Ok(trees)
}

/// Depths and widths of trees of so many nodes, from narrow and deep to wide and shallow, and one that may become any of these.
fn shapes(budget: usize) -> [(usize, usize); 4] {
    let width = 4.min(budget / 2);
    [(budget, 1), (budget.div_ceil(2), 2), ((budget.ilog2() as usize + 1).max(budget / width), width), (budget, budget)]
}
