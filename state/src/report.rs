//! The report of a run, from its replayed journal.

use std::collections::BTreeMap;

use crate::device::Phase;
use crate::metrics::{Bar, BatchMetrics, PhaseSpan, Report, StepMetrics, add_levels, nearest_rank};
use crate::run::RunState;

/// What there is to tell of a run. `is_running`: a process works on it now.
#[must_use]
pub fn report(run: &RunState, is_running: bool) -> Report {
    let history = &run.history;
    // An empty sum of floats is -0.0.
    let sum = |f: fn(&StepMetrics) -> f64| history.iter().map(f).fold(0.0, |a, b| a + b);
    let of_kind = |kind: &'static str| history.iter().filter(move |m| m.kind == kind);
    let grpo = |f: fn(&StepMetrics) -> f64| of_kind("grpo").map(f).collect();
    let share =
        |f: fn(&StepMetrics) -> Option<f64>| of_kind("grpo").filter_map(|m| Some((m.begun + m.step, f(m)?))).collect();
    // Evaluations decode too, but neither learn nor train the drafter.
    let grpo_sum = |f: fn(&StepMetrics) -> f64| of_kind("grpo").map(f).fold(0.0, |a, b| a + b);
    let (rollout_s, tokens) = (grpo_sum(|m| m.rollout_s), of_kind("grpo").map(|m| m.tokens).sum::<u64>());
    // The same tokens at each step's estimated plain rate.
    let rated = || of_kind("grpo").filter(|m| m.plain_tokens_per_s > 0.0);
    let plain_s: f64 = rated().map(|m| m.tokens as f64 / m.plain_tokens_per_s).sum();
    let rated_tokens: u64 = rated().map(|m| m.tokens).sum();
    // Those in between, of which a training may have many, say neither what it began with nor what it came to.
    let first = history.iter().position(|m| m.kind == "grpo").or_else(|| history.iter().position(StepMetrics::learns));
    let last = history.iter().rposition(StepMetrics::learns).filter(|last| {
        let StepMetrics { begun, step, of, .. } = history[*last];
        begun + step + 1 == of
    });
    let accuracy = |steps: &[StepMetrics]| steps.iter().rfind(|m| m.kind == "evaluate").map(|m| m.accuracy);
    let accuracy_before = accuracy(&history[..first.unwrap_or(history.len())]);
    let accuracy_after = last.and_then(|last| accuracy(&history[last..]));
    let status = match (run.is_complete, is_running) {
        (true, _) => "complete",
        (false, true) => "running",
        (false, false) => "interrupted",
    };
    Report {
        name: run.plan.as_ref().map(|p| p.name.clone()).unwrap_or_default(),
        status: status.into(),
        steps: history.iter().filter(|m| m.learns()).count(),
        wall_s: sum(|m| m.wall_s),
        rollout_s,
        update_s: sum(|m| m.update_s),
        tokens,
        tokens_per_s: if rollout_s > 0.0 { tokens as f64 / rollout_s } else { 0.0 },
        plain_tokens_per_s: if plain_s > 0.0 { rated_tokens as f64 / plain_s } else { 0.0 },
        accept_length: grpo(|m| m.accept_length),
        learned_accept_length: grpo(|m| m.learned_accept_length),
        acceptance_by_level: acceptance(of_kind("grpo")),
        drafter_held_out: share(|m| m.drafter_held_out),
        drafter_held_out_top3: share(|m| m.drafter_held_out_top3),
        drafter_held_out_before: share(|m| m.drafter_held_out_before),
        drafter_held_out_before_top3: share(|m| m.drafter_held_out_before_top3),
        drafter_discarded: of_kind("grpo").map(|m| m.drafter_discarded).sum(),
        preemption_s: preemption(of_kind("grpo")),
        preemptions: histogram(of_kind("grpo").flat_map(|m| &m.preemptions_s)),
        idle_s: grpo_sum(|m| m.idle_s),
        idle_used_s: grpo_sum(|m| m.idle_used_s),
        idle_rested_s: grpo_sum(|m| m.idle_rested_s),
        idle_by_device_s: idle_by_device(of_kind("grpo")),
        lent: of_kind("grpo").map(|m| m.lent).sum(),
        borrowed_s: grpo_sum(|m| m.borrowed_s),
        by_batch: by_batch(of_kind("grpo")),
        accuracy_before,
        accuracy_after,
        weights_blake3: run.weights_blake3.clone(),
        kernels: run.kernels.clone(),
        devices: run.devices.clone(),
        history: history.clone(),
    }
}

/// The sum over steps, one row for each batch size that occurred.
fn by_batch<'a>(steps: impl Iterator<Item = &'a StepMetrics>) -> Vec<BatchMetrics> {
    let mut rows = BTreeMap::<usize, BatchMetrics>::new();
    for row in steps.flat_map(|m| &m.by_batch) {
        rows.entry(row.batch_min).or_default().add(row);
    }
    rows.into_values().collect()
}

/// Chance of each level of a draft, over all steps.
fn acceptance<'a>(steps: impl Iterator<Item = &'a StepMetrics>) -> Vec<f64> {
    let mut levels: Vec<(u64, u64)> = Vec::new();
    for step in steps {
        add_levels(&mut levels, &step.by_level);
    }
    levels.into_iter().map(|(decided, right)| right as f64 / decided.max(1) as f64).collect()
}

/// Median and 99th percentile of what stopping the drafter's training took, in seconds.
pub fn preemption<'a>(steps: impl Iterator<Item = &'a StepMetrics>) -> Option<(f64, f64)> {
    let mut seconds: Vec<f64> = steps.flat_map(|m| &m.preemptions_s).copied().collect();
    seconds.sort_by(f64::total_cmp);
    Some((nearest_rank(&seconds, 50)?, nearest_rank(&seconds, 99)?))
}

/// Seconds of each device in rollouts in which it did not decode.
fn idle_by_device<'a>(steps: impl Iterator<Item = &'a StepMetrics>) -> Vec<f64> {
    let mut idle = Vec::new();
    for step in steps {
        idle.resize(step.timeline.len().max(idle.len()), 0.0);
        for (idle, spans) in idle.iter_mut().zip(&step.timeline) {
            let inside = |s: &PhaseSpan| (s.end_s.min(step.rollout_s) - s.start_s).max(0.0);
            let decoding = spans.iter().filter(|s| s.phase == Phase::Rollout).map(inside).sum::<f64>();
            *idle += (step.rollout_s - decoding).max(0.0);
        }
    }
    idle
}

/// Durations by powers of two of a second, from the shortest to the longest.
fn histogram<'a>(seconds: impl Iterator<Item = &'a f64>) -> Vec<Bar> {
    let mut counts = BTreeMap::<i32, usize>::new();
    for seconds in seconds {
        // Shorter ones no clock tells apart.
        *counts.entry(seconds.max(1e-6).log2().ceil() as i32).or_default() += 1;
    }
    let (Some(first), Some(last)) = (counts.keys().next(), counts.keys().next_back()) else { return Vec::new() };
    let bar = |power: i32| Bar { up_to_s: f64::from(power).exp2(), count: counts.get(&power).copied().unwrap_or(0) };
    (*first..=*last).map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_counted_by_powers_of_two() {
        let bars = histogram([0.001, 0.0015, 0.007, 0.0].iter());
        let of = |bar: &Bar| (bar.up_to_s, bar.count);
        assert_eq!(of(&bars[0]), (2_f64.powi(-19), 1), "as short as a clock tells");
        let told: Vec<_> = bars.iter().filter(|bar| bar.count > 0).skip(1).map(of).collect();
        assert_eq!(told, [(2_f64.powi(-9), 2), (2_f64.powi(-7), 1)]);
        assert_eq!(bars.len(), 13, "empty ones between are there, too");
        assert!(histogram([].iter()).is_empty());
    }

    #[test]
    fn devices_wait_apart() {
        let span = |phase, start_s, end_s| PhaseSpan { phase, start_s, end_s };
        let step = StepMetrics {
            rollout_s: 2.0,
            timeline: vec![
                vec![span(Phase::Rollout, 0.0, 1.5), span(Phase::DraftTrain, 1.5, 2.0), span(Phase::Update, 2.0, 3.0)],
                vec![span(Phase::Rollout, 0.5, 2.25)],
            ],
            ..StepMetrics::default()
        };
        assert_eq!(idle_by_device([&step, &step].into_iter()), [1.0, 1.0]);
        assert_eq!(idle_by_device([].into_iter()), [0.0; 0]);
    }
}
