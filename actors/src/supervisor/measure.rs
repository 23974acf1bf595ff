//! What a step measured: phases over time, lengths, idle time.

use state::device::Phase;
use state::metrics::{PhaseSpan, StepMetrics};

/// Phases of one device since the step began.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    spans: Vec<PhaseSpan>,
    current: Option<(Phase, f64)>,
}

impl Timeline {
    /// The device is in `phase` from `now_s` on.
    pub(crate) fn enter(&mut self, phase: Phase, now_s: f64) {
        if self.current.is_some_and(|(p, _)| p == phase) {
            return;
        }
        self.close(now_s);
        self.current = Some((phase, now_s));
    }

    fn close(&mut self, now_s: f64) {
        if let Some((phase, start_s)) = self.current.take() {
            self.spans.push(PhaseSpan { phase, start_s, end_s: now_s });
        }
    }

    /// Ends the picture of a step; the next one begins in the same phase at 0.
    pub(crate) fn take(&mut self, now_s: f64) -> Vec<PhaseSpan> {
        let phase = self.current.map(|c| c.0);
        self.close(now_s);
        self.current = phase.map(|p| (p, 0.0));
        std::mem::take(&mut self.spans)
    }
}

/// Seconds of `phase` before `until_s`.
pub(crate) fn seconds(spans: &[PhaseSpan], phase: Phase, until_s: f64) -> f64 {
    spans.iter().filter(|s| s.phase == phase).map(|s| (s.end_s.min(until_s) - s.start_s).max(0.0)).sum()
}

/// Fills in lengths of answers, in tokens.
pub(crate) fn lengths(metrics: &mut StepMetrics, mut lengths: Vec<usize>) {
    lengths.sort_unstable();
    let count = lengths.len();
    metrics.rollouts = count;
    metrics.length_mean = lengths.iter().sum::<usize>() as f64 / count.max(1) as f64;
    metrics.length_p75 = lengths.get(count * 3 / 4).copied().unwrap_or(0);
    metrics.length_max = lengths.last().copied().unwrap_or(0);
}

/// Fills in idle time from the timeline: what devices waited before the last one had drained.
pub(crate) fn idle(metrics: &mut StepMetrics) {
    let until_s = metrics.rollout_s;
    metrics.idle_s = metrics.timeline.iter().map(|t| (until_s - seconds(t, Phase::Rollout, until_s)).max(0.0)).sum();
    metrics.idle_used_s = metrics.timeline.iter().map(|t| seconds(t, Phase::DraftTrain, until_s)).sum();
}
