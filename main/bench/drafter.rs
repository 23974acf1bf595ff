//! What training the drafter in idle time costs, and what it brings: whole runs, in pairs that take turns step by step.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use actors::{Asked, DecodeOptions, Layout, Packing, Precision, Solo, Stalls};
use kernels::NoiseKey;
use serde::Serialize;
use state::metrics::{Report, StepMetrics, VersionMetrics};
use state::plan::{Controller, Drafter as Drafts, Part, Plan, Step, Strategy};
use state::report::preemption;

use crate::commands::{Result, load, report_of};
use crate::compare::in_turns;
use crate::failure::Failure;
use crate::number;
use crate::output;
use crate::signals::Signal;

/// Separates the noise of these answers from that of rollouts and evaluations.
const STREAM: u32 = 8;
/// Levels of the chain that every cycle drafts, so that accept lengths can be compared.
const DEPTH: usize = 4;

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Drafter {
    /// A workflow with a step of GRPO and a drafter that learns.
    file: PathBuf,
    /// Steps of GRPO of each run, 4 at least.
    #[arg(long, default_value_t = 24, value_parser = number::steps)]
    steps: usize,
    /// Learning rate of the policy instead of the workflow's: a larger one makes it drift further from its drafter.
    #[arg(long, allow_negative_numbers = true, value_parser = number::learning_rate)]
    lr: Option<f64>,
    /// Answers that the warm drafter learned from beforehand.
    #[arg(long, default_value_t = 64)]
    warm_from: usize,
    /// Seconds that it learned for.
    #[arg(long, default_value_t = 20, value_parser = number::seconds)]
    warm_s: u64,
    /// Folder for the runs; those of an earlier measurement there are removed. Default: runs/bench-drafter-NAME.
    #[arg(long)]
    out: Option<PathBuf>,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Measured {
    steps: usize,
    /// Medians over pairs of steps, of the run that trains its drafter to the one that does not; neither drafts.
    interference_step: f64,
    interference_rollout: f64,
    /// Of the time in which devices waited; and of that without what was left to rest, because versions had stopped getting better.
    idle_used: f64,
    idle_used_unless_rested: f64,
    /// Median over pairs of steps, of the run that lends answers to the one that does not, and how many it lent.
    lending_rollout: f64,
    lent: u64,
    /// Of all runs that learn.
    preemptions: usize,
    preemption_p50_ms: f64,
    preemption_p99_ms: f64,
    /// Mean of a single answer's cycles.
    cycle_ms: f64,
    drift_kl: f64,
    accept_lengths: Vec<Way>,
    acceptance_by_level: Vec<f64>,
    /// The step in which most versions drafted.
    swap: Vec<VersionMetrics>,
    padded_per_s: f64,
    packed_per_s: f64,
    stall_sync_ms: f64,
    stall_async_ms: f64,
    stall_selective_ms: f64,
    identical: bool,
}

/// Accept length of a drafter over the first and the last quarter of the steps.
#[derive(Serialize)]
struct Way {
    drafter: &'static str,
    first: f64,
    last: f64,
    held_out_last: Option<f64>,
}

struct Bench<'a> {
    args: &'a Drafter,
    plan: Plan,
    learned: usize,
    dir: PathBuf,
}

pub(crate) fn drafter(args: &Drafter) -> Result<ExitCode> {
    let mut plan = load(&args.file)?;
    let (Some(mut grpo), Some(learned), true) =
        (plan.grpo().cloned(), plan.speculation.learned(), plan.speculation.training.is_some())
    else {
        return Err(Failure::NothingToTeach { path: args.file.clone() });
    };
    (grpo.steps, grpo.part) = (args.steps, Part::whole(args.steps));
    grpo.optimizer.lr = args.lr.unwrap_or(grpo.optimizer.lr);
    plan.steps = vec![Step::Grpo(grpo)];
    let dir = args.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("bench-drafter-{}", plan.name)));
    let bench = Bench { args, plan, learned, dir };
    match bench.measure()? {
        Err(signal) => {
            output::note("stopped; the same command begins anew");
            Ok(signal.code())
        }
        Ok(measured) => output::measured(args.json, &measured, &measured.text(), measured.identical),
    }
}

impl Bench<'_> {
    fn measure(&self) -> Result<std::result::Result<Measured, Signal>> {
        let solo = Solo::load(&self.plan, 1)?;
        let answers = solo.decode(&self.asked(&solo, self.args.warm_from)?, &self.plainly(true))?.answers;
        let packing = solo.packing(&answers)?;
        let stalls = solo.stalls(&self.dir)?;
        output::note(&format!("a drafter learns from {} answers for {} s", self.args.warm_from, self.args.warm_s));
        solo.train(&answers, self.args.warm_s as f64)?;
        let warm = self.dir.join("warm-drafter");
        solo.export_drafter(&warm, (Layout::Taper, ""), Precision::F32)?;
        let quiet = |trains: bool| self.variant(Controller::Off, None, trains);
        let fixed = Controller::Fixed(Strategy::chain(self.learned, DEPTH));
        let drafting = |from: Option<&Path>, trains| self.variant(fixed.clone(), from, trains);
        output::note("runs without drafts: one trains its drafter, one does not");
        let [plain, training] = match self.pair([("plain", quiet(false)), ("training", quiet(true))])? {
            Ok(reports) => reports,
            Err(signal) => return Ok(Err(signal)),
        };
        output::note(&format!(
            "runs that always draft {DEPTH} tokens: a warm drafter, and the same one that goes on learning"
        ));
        let warm_runs = [("static", drafting(Some(&warm), false)), ("adaptive", drafting(Some(&warm), true))];
        let [fixed_warm, adaptive_warm] = match self.pair(warm_runs)? {
            Ok(reports) => reports,
            Err(signal) => return Ok(Err(signal)),
        };
        output::note("and drafters that know nothing at first");
        let cold_runs = [("untrained", drafting(None, true)), ("plain-again", quiet(false))];
        let [adaptive_cold, again] = match self.pair(cold_runs)? {
            Ok(reports) => reports,
            Err(signal) => return Ok(Err(signal)),
        };
        output::note("and without drafters: one lends answers to the device that has run dry, one does not");
        let mut lends = quiet(false);
        lends.speculation.lending = true;
        let [lending, alone] = match self.pair([("lending", lends), ("alone", quiet(false))])? {
            Ok(reports) => reports,
            Err(signal) => return Ok(Err(signal)),
        };
        let reports = [&plain, &training, &fixed_warm, &adaptive_warm, &adaptive_cold, &again, &lending, &alone];
        let drift_kl = self.drift(&solo)?;
        Ok(Ok(Measured::of(reports, drift_kl, packing, stalls)))
    }

    /// The run with another controller, a drafter to begin with, and training or none.
    fn variant(&self, controller: Controller, from: Option<&Path>, trains: bool) -> Plan {
        let mut plan = self.plan.clone();
        plan.speculation.controller = controller;
        plan.speculation.lending = false;
        if !trains {
            plan.speculation.training = None;
        }
        for drafter in &mut plan.speculation.drafters {
            if let Drafts::Learned { weights, .. } = drafter {
                *weights = from.map(Path::to_path_buf);
            }
        }
        plan
    }

    fn pair(&self, runs: [(&str, Plan); 2]) -> Result<std::result::Result<[Report; 2], Signal>> {
        let dirs = [0, 1].map(|i| self.dir.join(runs[i].0));
        match in_turns([(&runs[0].1, &dirs[0]), (&runs[1].1, &dirs[1])])? {
            Some(signal) => Ok(Err(signal)),
            None => Ok(Ok([report_of(&dirs[0])?, report_of(&dirs[1])?])),
        }
    }

    /// Problems behind those of the runs.
    fn asked(&self, solo: &Solo, count: usize) -> Result<Vec<Asked>> {
        let first = self.plan.grpo().map_or(0, |grpo| grpo.steps * grpo.prompts) as u64;
        let one = |i: u64| {
            let noise = NoiseKey::new(self.plan.seed, STREAM, 0, i as u32, 0);
            Ok(Asked { prompt: solo.problem(first + i)?, noise })
        };
        (0..count.max(8) as u64).map(one).collect()
    }

    fn plainly(&self, keep_hidden: bool) -> DecodeOptions {
        let options = DecodeOptions::of(&self.plan, self.plan.devices.slots_max, Controller::Off);
        DecodeOptions { keep_hidden, ..options }
    }

    /// How far the policy has moved: KL(policy at the end, policy at first), from answers drawn at the end.
    fn drift(&self, before: &Solo) -> Result<f64> {
        let after = Solo::of_run(&self.dir.join("adaptive"), 1)?;
        let answers = after.decode(&self.asked(&after, 64)?, &self.plainly(false))?.answers;
        Ok(before.divergence(&answers))
    }
}

impl Measured {
    fn of(reports: [&Report; 8], drift_kl: f64, packing: Packing, stalls: Stalls) -> Self {
        let [plain, training, fixed_warm, adaptive_warm, adaptive_cold, _, lending, alone] = reports;
        let ratios = |with: &Report, without: &Report, f: fn(&StepMetrics) -> f64| {
            median(with.history.iter().zip(&without.history).map(|(with, without)| f(with) / f(without).max(1e-9)))
        };
        let ratio = |f| ratios(training, plain, f);
        let learning = || [training, adaptive_warm, adaptive_cold].into_iter().flat_map(|r| &r.history);
        let (p50, p99) = preemption(learning()).unwrap_or_default();
        let single = training.by_batch.iter().find(|b| b.batch_min == 1);
        let most = [adaptive_cold, adaptive_warm].into_iter().flat_map(|r| &r.history);
        let way = |drafter, report: &Report| {
            let lengths: Vec<f64> = report.learned_accept_length.iter().copied().filter(|a| *a > 0.0).collect();
            let quarter = lengths.len().div_ceil(4);
            let (first, last) = (mean(&lengths[..quarter]), mean(&lengths[lengths.len() - quarter..]));
            Way { drafter, first, last, held_out_last: report.drafter_held_out.last().map(|(_, share)| *share) }
        };
        Self {
            steps: plain.history.len(),
            interference_step: ratio(|m| m.wall_s),
            interference_rollout: ratio(|m| m.rollout_s),
            lending_rollout: ratios(lending, alone, |m| m.rollout_s),
            lent: lending.lent,
            idle_used: training.idle_used_s / training.idle_s.max(1e-9),
            idle_used_unless_rested: training.idle_used_s / (training.idle_s - training.idle_rested_s).max(1e-9),
            preemptions: learning().map(|m| m.preemptions_s.len()).sum(),
            preemption_p50_ms: p50 * 1e3,
            preemption_p99_ms: p99 * 1e3,
            cycle_ms: single.map_or(0.0, |b| b.busy_s / b.cycles.max(1) as f64 * 1e3),
            drift_kl,
            accept_lengths: vec![
                way("warm, static", fixed_warm),
                way("warm, goes on learning", adaptive_warm),
                way("untrained, learns", adaptive_cold),
            ],
            acceptance_by_level: adaptive_warm.acceptance_by_level.clone(),
            swap: most.max_by_key(|m| m.by_version.len()).map(|m| m.by_version.clone()).unwrap_or_default(),
            padded_per_s: packing.padded,
            packed_per_s: packing.packed,
            stall_sync_ms: stalls.sync * 1e3,
            stall_async_ms: stalls.asynchronous * 1e3,
            stall_selective_ms: stalls.selective * 1e3,
            identical: reports.iter().all(|report| report.weights_blake3 == plain.weights_blake3),
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "\n{} steps a run\n\n  with training in idle time, without drafts, against without training (medians of pairs)\n    \
             steps take {:.3}x, rollouts {:.3}x as long; {:.0} % of the idle time used, {:.0} % of what was not \
             left to rest\n    stopping it ({} times, all runs that learn) takes {:.2} ms (median), {:.2} ms (99 %); a cycle of one answer takes {:.2} ms\n\n  \
             with lending instead, against waiting: rollouts {:.3}x as long, {} answers lent\n\n  \
             accept length at depth {DEPTH}          first quarter  last quarter  held-out guesses right\n",
            self.steps,
            self.interference_step,
            self.interference_rollout,
            self.idle_used * 100.0,
            self.idle_used_unless_rested * 100.0,
            self.preemptions,
            self.preemption_p50_ms,
            self.preemption_p99_ms,
            self.cycle_ms,
            self.lending_rollout,
            self.lent,
        );
        for way in &self.accept_lengths {
            let share = way.held_out_last.map_or_else(|| "-".into(), |share| format!("{:.0} %", share * 100.0));
            text += &format!("    {:<28} {:>12.2} {:>13.2} {share:>12}\n", way.drafter, way.first, way.last);
        }
        let levels: Vec<String> =
            self.acceptance_by_level.iter().map(|share| format!("{:.0} %", share * 100.0)).collect();
        text += &format!("    the policy has moved by {:.4} nats a token (KL)\n", self.drift_kl);
        text += &format!("    right guesses by level: {}\n\n  versions within one tail\n", levels.join(", "));
        for v in &self.swap {
            let length = v.tokens as f64 / v.cycles.max(1) as f64;
            text += &format!("    version {:>4}  {:>5} cycles  accept length {length:.2}\n", v.version, v.cycles);
        }
        text += &format!(
            "\n  samples a second of training: {:.1} padded, {:.1} packed ({:.2}x)\n  \
             a checkpoint of the drafter stops its training for {:.2} ms written at once, {:.2} ms copied whole, {:.2} ms \
             copied as far as it is trained ({:.1}x)\n  weights of all runs: {}\n",
            self.padded_per_s,
            self.packed_per_s,
            self.packed_per_s / self.padded_per_s.max(1e-9),
            self.stall_sync_ms,
            self.stall_async_ms,
            self.stall_selective_ms,
            self.stall_sync_ms / self.stall_selective_ms.max(1e-9),
            if self.identical { "byte-identical" } else { "DIFFERENT" },
        );
        text
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = |at: usize| values.get(at).copied().unwrap_or(0.0);
    f64::midpoint(middle(values.len().saturating_sub(1) / 2), middle(values.len() / 2))
}
