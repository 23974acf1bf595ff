//! What choosing by measurements is worth: the workflow's controller against single strategies and tables, in rollouts that are
//! played again from recorded cycles while the drafter gets better.

#[path = "controller/replay.rs"]
mod replay;

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;
use state::plan::{Controller, Strategy, TableRow};
use state::speculation::controller::{BUCKETS, batch_sizes};

use super::race::{Race, SLOTS, Way};
use crate::commands::Result;
use crate::failure::Failure;
use crate::number;
use crate::output;
use replay::{Age, Replay};

/// How often the bandit plays, each time with other draws: what it explores when is luck.
const PLAYS: u64 = 8;

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Controllers {
    /// A workflow with a bandit, or the folder of a run with its trained drafter.
    model: PathBuf,
    /// Threads of the device.
    #[arg(long, default_value_t = 1, value_parser = number::threads)]
    threads: usize,
    /// Answers of a rollout.
    #[arg(long, default_value_t = 128, value_parser = number::at_least_one)]
    requests: usize,
    /// Answers decoded together, at most.
    #[arg(long, default_value_t = SLOTS, value_parser = number::at_least_one)]
    slots: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long, value_parser = number::at_least_one)]
    tokens: Option<usize>,
    /// Answers that the drafter learns from.
    #[arg(long, default_value_t = 256)]
    learn_from: usize,
    /// Seconds that it learns for in all; cycles are recorded before, in between and after. Before the first ones it learns until it can
    /// draft at all: a second, as a rule, and less than twice as long as this.
    #[arg(long, default_value_t = 60, value_parser = number::seconds)]
    learn_s: u64,
    /// How often cycles are recorded.
    #[arg(long, default_value_t = 4, value_parser = number::at_least_one)]
    ages: usize,
    /// Rollouts that are played again, from the youngest drafter to the oldest.
    #[arg(long, default_value_t = 24, value_parser = number::at_least_one)]
    rollouts: usize,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Measured {
    rollouts: usize,
    recorded_cycles: usize,
    /// Answers that were compared with those of plain decoding, and those that differ.
    compared: usize,
    differences: usize,
    /// Mean of the bandit's plays.
    adaptive_s: f64,
    /// The best way at each age of the drafter and batch size, known beforehand.
    hindsight_s: f64,
    fixed: Vec<Line>,
    tables: Vec<Line>,
    /// Seconds over those of the best single strategy, of the best table, and of the best way at each age and batch size.
    regret_fixed: f64,
    regret_table: f64,
    regret_hindsight: f64,
}

#[derive(Serialize)]
struct Line {
    how: String,
    seconds: f64,
}

pub(crate) fn controller(args: &Controllers) -> Result<ExitCode> {
    let mut race = Race::open(&args.model, args.threads, args.tokens)?;
    let bandit = race.solo.plan().speculation.controller.clone();
    let Controller::Bandit { strategies, .. } = &bandit else {
        return Err(Failure::NoBandit { path: args.model.clone() });
    };
    let replay = record(args, &mut race, strategies)?;
    let measured = measure(args, &race, &replay, &bandit);
    output::measured(args.json, &measured, &measured.text(), measured.differences == 0)
}

/// Cycles of plain decoding and of every strategy, at each age of the drafter.
fn record(args: &Controllers, race: &mut Race, strategies: &[Strategy]) -> Result<Replay> {
    let (learned, mut lessons) = (race.solo.plan().speculation.learned(), race.lessons(args.learn_from)?);
    let (mut ages, mut lengths) = (Vec::new(), Vec::new());
    for age in 0..args.ages {
        // A drafter that knows nothing cannot draft: it learns a little first.
        if age == 0 {
            race.learn_first(&std::mem::take(&mut lessons), args.learn_s as f64)?;
        } else {
            race.solo.train(&[], args.learn_s as f64 / (args.ages - 1) as f64)?;
        }
        if strategies.iter().any(|s| Some(s.drafter) == learned) {
            race.needs_drafter(&args.model)?;
        }
        output::note(&format!("recording {} of {}", age + 1, args.ages));
        let way = |s: &Strategy| -> Way { (race.name(s), Controller::Fixed(*s)) };
        let ways: Vec<Way> = std::iter::once(Race::plain()).chain(strategies.iter().map(way)).collect();
        let decoded = race.run(&ways, args.requests, args.slots, race.tokens_max)?;
        lengths = decoded[0].1.answers.iter().map(|answer| answer.log_probs.len()).collect();
        ages.push(Age::new(decoded.iter().map(|(_, decoded)| decoded.cycles.as_slice())));
    }
    Ok(Replay { lengths, ages, slots: args.slots, rollouts: args.rollouts, strategies: strategies.to_vec() })
}

fn measure(args: &Controllers, race: &Race, replay: &Replay, bandit: &Controller) -> Measured {
    let seed = race.solo.plan().seed;
    let name = |strategy: &Strategy| race.name(strategy);
    let line = |how: String, controller: Controller| Line { how, seconds: replay.seconds(&controller, seed) };
    let mut fixed = vec![line("plain".into(), Controller::Off)];
    fixed.extend(replay.strategies.iter().map(|s| line(name(s), Controller::Fixed(*s))));
    let mut tables = Vec::new();
    for strategy in &replay.strategies {
        for batch_max in [1, 2, 4, 8, 16].into_iter().filter(|most| *most < args.slots) {
            let row = TableRow { batch_max, strategy: Some(*strategy) };
            tables.push(line(format!("up to {batch_max}: {}", name(strategy)), Controller::Table(vec![row])));
        }
    }
    for (i, age) in replay.ages.iter().enumerate() {
        tables
            .push(line(format!("the best of recording {}", i + 1), Controller::Table(tuned(age, &replay.strategies))));
    }
    let plays: Vec<f64> = (0..PLAYS).map(|play| replay.seconds(bandit, seed.wrapping_add(play))).collect();
    let (adaptive_s, hindsight_s) = (plays.iter().sum::<f64>() / PLAYS as f64, replay.hindsight());
    let best = |lines: &[Line]| lines.iter().map(|line| line.seconds).fold(f64::INFINITY, f64::min);
    Measured {
        rollouts: args.rollouts,
        recorded_cycles: replay.ages.iter().map(Age::cycles).sum(),
        compared: race.compared,
        differences: race.differences,
        regret_fixed: adaptive_s / best(&fixed) - 1.0,
        regret_table: adaptive_s / best(&tables) - 1.0,
        regret_hindsight: adaptive_s / hindsight_s - 1.0,
        adaptive_s,
        hindsight_s,
        fixed,
        tables,
    }
}

/// The table of what is best at an age for each bucket of batch sizes, a strategy or plain decoding.
fn tuned(age: &Age, strategies: &[Strategy]) -> Vec<TableRow> {
    let row = |bucket: usize| {
        let (batch_min, batch_max) = batch_sizes(bucket);
        let strategy = age.best(batch_min).checked_sub(1).map(|best| strategies[best]);
        TableRow { batch_max: batch_max.unwrap_or(65_536), strategy }
    };
    (0..BUCKETS).map(row).collect()
}

impl Measured {
    fn text(&self) -> String {
        let mut text = format!(
            "\n{} rollouts played again from {} recorded cycles, while the drafter gets better\n\n",
            self.rollouts, self.recorded_cycles
        );
        let mut add = |how: &str, seconds: f64| text += &format!("    {how:<44} {seconds:>9.3} s\n");
        add("adaptive", self.adaptive_s);
        add("the best at each age and batch size", self.hindsight_s);
        self.fixed.iter().for_each(|line| add(&line.how, line.seconds));
        let mut tables: Vec<&Line> = self.tables.iter().collect();
        tables.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        tables.iter().take(5).for_each(|line| add(&format!("table: {}", line.how), line.seconds));
        let percent = |regret: f64| regret * 100.0;
        text + &format!(
            "    … and {} tables that are slower\n\n  adaptive lost {:.1} % against the best single strategy, {:.1} % against the best \
             of {} tables,\n  {:.1} % against the best way at each age and batch size\n  {} answers compared with plain decoding, {} \
             differ\n",
            self.tables.len().saturating_sub(5),
            percent(self.regret_fixed),
            percent(self.regret_table),
            self.tables.len(),
            percent(self.regret_hindsight),
            self.compared,
            self.differences
        )
    }
}

#[cfg(test)]
mod tests {
    use actors::CycleStats;

    use super::*;

    #[test]
    fn a_tuned_table_is_plain_where_that_is_best() {
        let strategy = Strategy::chain(0, 2);
        let cycle = |(requests, tokens): (usize, usize), strategy| CycleStats {
            seconds: 1.0,
            requests,
            tokens,
            strategy,
            ..CycleStats::default()
        };
        // Drafts pay for two together, not for one, nor for eight.
        let plain = [(1, 2), (2, 2), (8, 8)].map(|of| cycle(of, None));
        let drafted = [(1, 1), (2, 4), (8, 4)].map(|of| cycle(of, Some(strategy)));
        let rows = tuned(&Age::new([&plain[..], &drafted[..]].into_iter()), &[strategy]);
        let chosen: Vec<_> = rows.iter().map(|row| (row.batch_max, row.strategy)).collect();
        assert_eq!(chosen[..4], [(1, None), (2, Some(strategy)), (4, None), (8, None)]);
        assert_eq!(rows.len(), BUCKETS);
    }
}
