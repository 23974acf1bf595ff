//! A workflow with speculation and without.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use actors::{Options, Progress};
use serde::Serialize;
use state::metrics::{Report, StepMetrics};
use state::plan::Plan;
use tokio::sync::Notify;

use crate::commands::{Result, load, report_of, shell, watched};
use crate::failure::Failure;
use crate::show::Show;
use crate::signals::Signal;
use crate::{output, show};

/// What a comparison found; the keys of its JSON form.
#[derive(Serialize)]
struct Comparison {
    /// Of steps of GRPO; null without any.
    rollout_ratio: Option<f64>,
    step_ratio: Option<f64>,
    identical: bool,
    weights_blake3_with: String,
    weights_blake3_without: String,
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
    idle_rested_s: f64,
    lent: u64,
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
            idle_rested_s: r.idle_rested_s,
            lent: r.lent,
            accuracy_before: r.accuracy_before,
            accuracy_after: r.accuracy_after,
        }
    }
}

pub(crate) fn compare(file: &Path, out: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let mut plan = load(file)?;
    // One device has nobody to lend to.
    plan.speculation.lending &= plan.devices.cpu != 1;
    let plain = plan.without_speculation();
    if plain == plan {
        return Err(Failure::NothingToCompare { path: file.into() });
    }
    let again = match &out {
        Some(dir) => format!("taper compare {} --out {}", shell(file), shell(dir)),
        None => format!("taper compare {}", shell(file)),
    };
    let dir = out.unwrap_or_else(|| Path::new("runs").join(format!("compare-{}", plan.name)));
    let sides = [dir.join("without"), dir.join("with")];
    output::note("with speculation, drafter training and lending, and after each step the same one without");
    if let Some(signal) = in_turns([(&plain, &sides[0]), (&plan, &sides[1])])? {
        output::note(&format!("stopped; `{again}` begins both runs anew"));
        return Ok(signal.code());
    }
    let reports = [report_of(&sides[0])?, report_of(&sides[1])?];
    let comparison = Comparison::of(&reports[1], &reports[0]);
    let places = format!("  saved in {} and {}\n", sides[1].display(), sides[0].display());
    let text = show::report(&reports[1]) + &comparison.text() + &places;
    output::measured(json, &comparison, &text, comparison.identical)
}

/// Two runs, step by step in turns: a machine that is slower for a while is so for both. Shows the progress of the second. If
/// one fails, the other one ends too.
pub(crate) fn in_turns(runs: [(&Plan, &Path); 2]) -> Result<Option<Signal>> {
    let (turns, show, stop) = (Arc::new(Turns::default()), Arc::new(Show::new()), Arc::new(Notify::new()));
    let run = |me: usize| {
        let (turns, show) = (turns.clone(), show.clone());
        let _leaving = Leaving { turns: turns.clone(), me };
        let observer = move |progress: Progress| {
            if let Progress::StepBegan { .. } = progress {
                turns.next(me);
            }
            if me == 1 || matches!(progress, Progress::DeviceLost { .. } | Progress::Warning(_)) {
                show.tell(&progress);
            }
        };
        let options = Options { dir: runs[me].1.into(), fresh: true, waits_for_disk: true, ..Options::default() };
        let result = watched(runs[me].0, options, observer, stop.notified());
        if result.is_err() {
            // Kept until the other one waits for it, if it does not yet.
            stop.notify_one();
        }
        result
    };
    let [first, second] = std::thread::scope(|scope| {
        let first = scope.spawn(|| run(0));
        let second = run(1);
        [first.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), second]
    });
    show.finish();
    // Another pair may follow in this process.
    kernels::memory::give_back();
    let (first, second) = (first?, second?);
    Ok(first.or(second))
}

/// Whose turn it is, of two.
#[derive(Default)]
struct Turns {
    /// The one, and who has left.
    state: Mutex<(usize, [bool; 2])>,
    changed: Condvar,
}

impl Turns {
    /// Lets the other one have its turn, and waits for the next of one's own.
    fn next(&self, me: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = 1 - me;
        self.changed.notify_all();
        while state.0 != me && !state.1[1 - me] {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Has no turns any more when it is dropped, also by a panic.
struct Leaving {
    turns: Arc<Turns>,
    me: usize,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.turns.state.lock().unwrap_or_else(PoisonError::into_inner).1[self.me] = true;
        self.turns.changed.notify_all();
    }
}

impl Comparison {
    fn of(with: &Report, without: &Report) -> Self {
        let sum = |r: &Report, f: fn(&StepMetrics) -> f64| -> f64 {
            r.history.iter().filter(|m| m.kind == "grpo").map(f).sum()
        };
        let ratio = |f: fn(&StepMetrics) -> f64| Some(sum(without, f) / sum(with, f)).filter(|ratio| ratio.is_finite());
        Self {
            rollout_ratio: ratio(|m| m.rollout_s),
            step_ratio: ratio(|m| m.wall_s),
            identical: with.weights_blake3 == without.weights_blake3,
            weights_blake3_with: with.weights_blake3.clone(),
            weights_blake3_without: without.weights_blake3.clone(),
            with: Side::of(with),
            without: Side::of(without),
        }
    }

    fn text(&self) -> String {
        let same = if self.identical { "byte-identical" } else { "DIFFERENT" };
        let ratios = match (self.rollout_ratio, self.step_ratio) {
            (Some(rollout), Some(step)) => format!("rollouts {rollout:.2}x, steps {step:.2}x as fast as without"),
            _ => "no steps of GRPO, whose rollouts could be faster".into(),
        };
        format!(
            "\n  {ratios} (`x plain` compares with plain cycles of the same run)\n  final weights: {same}\n    with    {}\n    without {}\n",
            self.weights_blake3_with, self.weights_blake3_without
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_alternate_and_end_when_one_leaves() {
        let (turns, order) = (Arc::new(Turns::default()), Mutex::new(Vec::new()));
        let run = |me: usize, steps: usize| {
            let _leaving = Leaving { turns: turns.clone(), me };
            for _ in 0..steps {
                turns.next(me);
                order.lock().unwrap().push(me);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| run(0, 5));
            run(1, 9);
        });
        let order = order.into_inner().unwrap();
        assert_eq!(order.len(), 14);
        assert!(order[..10].windows(2).all(|pair| pair[0] != pair[1]), "{order:?}");
    }
}
