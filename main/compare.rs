//! A workflow with speculation and without.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use state::metrics::{Report, StepMetrics};

use crate::commands::{Result, load, report_of, shell, work};
use crate::failure::Failure;
use crate::{output, show};

/// What a comparison found; the keys of its JSON form.
#[derive(Serialize)]
struct Comparison {
    rollout_ratio: f64,
    step_ratio: f64,
    identical: bool,
    weights_sha256_with: String,
    weights_sha256_without: String,
    with: Side,
    without: Side,
}

/// One of the two runs, in short; `taper report` tells the rest.
#[derive(Serialize)]
struct Side {
    steps: usize,
    wall_s: f64,
    rollout_s: f64,
    update_s: f64,
    tokens: u64,
    tokens_per_s: f64,
    idle_s: f64,
    idle_used_s: f64,
    accuracy_before: Option<f64>,
    accuracy_after: Option<f64>,
}

impl Side {
    fn of(r: &Report) -> Self {
        Self {
            steps: r.steps,
            wall_s: r.wall_s,
            rollout_s: r.rollout_s,
            update_s: r.update_s,
            tokens: r.tokens,
            tokens_per_s: r.tokens_per_s,
            idle_s: r.idle_s,
            idle_used_s: r.idle_used_s,
            accuracy_before: r.accuracy_before,
            accuracy_after: r.accuracy_after,
        }
    }
}

pub(crate) fn compare(file: &Path, out: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let plan = load(file)?;
    let plain = plan.without_speculation();
    if plain == plan {
        return Err(Failure::NothingToCompare { path: file.into() });
    }
    let again = match &out {
        Some(dir) => format!("taper compare {} --out {}", shell(file), shell(dir)),
        None => format!("taper compare {}", shell(file)),
    };
    let dir = out.unwrap_or_else(|| Path::new("runs").join(format!("compare-{}", plan.name)));
    let mut reports = Vec::new();
    for (name, plan) in [("without", &plain), ("with", &plan)] {
        let dir = dir.join(name);
        output::note(&format!("{name} speculation and drafter training:"));
        if let Some(signal) = work(plan, &dir, true)? {
            output::note(&format!("stopped; `{again}` begins both runs anew"));
            return Ok(signal.code());
        }
        reports.push(report_of(&dir)?);
    }
    let comparison = Comparison::of(&reports[1], &reports[0]);
    if json {
        output::json(&comparison)?;
    } else {
        output::report(&(show::report(&reports[1]) + &comparison.text()))?;
    }
    Ok(if comparison.identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Comparison {
    fn of(with: &Report, without: &Report) -> Self {
        let sum = |r: &Report, f: fn(&StepMetrics) -> f64| -> f64 {
            r.history.iter().filter(|m| m.kind == "grpo").map(f).sum()
        };
        let ratio = |f: fn(&StepMetrics) -> f64| sum(without, f) / sum(with, f).max(1e-9);
        Self {
            rollout_ratio: ratio(|m| m.rollout_s),
            step_ratio: ratio(|m| m.wall_s),
            identical: with.weights_sha256 == without.weights_sha256,
            weights_sha256_with: with.weights_sha256.clone(),
            weights_sha256_without: without.weights_sha256.clone(),
            with: Side::of(with),
            without: Side::of(without),
        }
    }

    fn text(&self) -> String {
        let same = if self.identical { "byte-identical" } else { "DIFFERENT" };
        format!(
            "\n  rollouts {:.2}x, steps {:.2}x as fast as without\n  final weights: {same}\n    with    {}\n    without {}\n",
            self.rollout_ratio, self.step_ratio, self.weights_sha256_with, self.weights_sha256_without
        )
    }
}
