//! What a step measured: phases over time, lengths, idle time.

use std::ops::Range;

use state::device::Phase;
use state::metrics::{PhaseSpan, StepMetrics, nearest_rank};

/// Phases of one device since the step began.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    spans: Vec<PhaseSpan>,
    current: Option<(Phase, f64)>,
    /// When it first took over answers of another device.
    borrowed_s: Option<f64>,
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

    /// From now on it decodes answers of another device.
    pub(crate) fn borrow(&mut self, now_s: f64) {
        self.borrowed_s.get_or_insert(now_s);
    }

    /// When it first did, in this step, if it has.
    pub(crate) fn take_borrowed(&mut self) -> Option<f64> {
        self.borrowed_s.take()
    }

    /// Ends the picture of a step; the next one begins in the same phase at 0.
    pub(crate) fn take(&mut self, now_s: f64) -> Vec<PhaseSpan> {
        let phase = self.current.map(|c| c.0);
        self.close(now_s);
        self.current = phase.map(|p| (p, 0.0));
        std::mem::take(&mut self.spans)
    }
}

/// Of the length of a step: so short a wait is not seen in its picture.
const BLINK: f64 = 1e-3;

/// Leaves out blinks, so that stretches of one phase become one: a step has as many as micro-batches, and a journal keeps them all.
pub(crate) fn thin(spans: &mut Vec<PhaseSpan>, step_s: f64) {
    let mut kept: Vec<PhaseSpan> = Vec::new();
    for span in spans.drain(..) {
        let blink_s = step_s * BLINK;
        if span.phase == Phase::Idle && span.end_s - span.start_s < blink_s {
            continue;
        }
        match kept.last_mut().filter(|last| last.phase == span.phase && span.start_s - last.end_s < blink_s) {
            Some(last) => last.end_s = span.end_s,
            None => kept.push(span),
        }
    }
    *spans = kept;
}

/// Seconds of `phase` within this time.
fn seconds(spans: &[PhaseSpan], phase: Phase, time: &Range<f64>) -> f64 {
    let inside = |s: &PhaseSpan| (s.end_s.min(time.end) - s.start_s.max(time.start)).max(0.0);
    // Not `sum`: that of nothing is -0.
    spans.iter().filter(|s| s.phase == phase).map(inside).fold(0.0, |all, span_s| all + span_s)
}

/// Fills in lengths of answers, in tokens.
pub(crate) fn lengths(metrics: &mut StepMetrics, mut lengths: Vec<usize>) {
    lengths.sort_unstable();
    let count = lengths.len();
    metrics.rollouts = count;
    metrics.length_mean = lengths.iter().sum::<usize>() as f64 / count.max(1) as f64;
    metrics.length_p75 = nearest_rank(&lengths, 75).unwrap_or(0);
    metrics.length_max = lengths.last().copied().unwrap_or(0);
}

/// Fills in idle time from the timeline: what devices waited before the last one had drained.
/// Devices learned for `learned_s` of it, which is less than their phases last: who waits for a first answer, or for the learner, does
/// not learn. Learning rested from `rests_s` on, if it did.
pub(crate) fn idle(metrics: &mut StepMetrics, learned_s: f64, rests_s: Option<f64>) {
    let until_s = metrics.rollout_s;
    let (rollout, rest) = (0.0..until_s, rests_s.unwrap_or(until_s)..until_s);
    let all = |phase, time| metrics.timeline.iter().map(|t| seconds(t, phase, time)).sum();
    let waited_s = metrics.timeline.iter().map(|t| (until_s - seconds(t, Phase::Rollout, &rollout)).max(0.0)).sum();
    let (teaching_s, rested_s): (f64, f64) = (all(Phase::DraftTrain, &rollout), all(Phase::Idle, &rest));
    (metrics.idle_s, metrics.idle_used_s, metrics.idle_rested_s) = (waited_s, learned_s.min(teaching_s), rested_s);
}

/// Fills in for how long devices decoded what they had borrowed, each from this moment on.
pub(crate) fn borrowed(metrics: &mut StepMetrics, since_s: &[Option<f64>]) {
    let of = |(spans, since_s): (&Vec<PhaseSpan>, &Option<f64>)| {
        since_s.map_or(0.0, |since_s| seconds(spans, Phase::Rollout, &(since_s..metrics.rollout_s)))
    };
    metrics.borrowed_s = metrics.timeline.iter().zip(since_s).map(of).fold(0.0, |all, device_s| all + device_s);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(spans: &[(Phase, f64, f64)]) -> Vec<PhaseSpan> {
        spans.iter().map(|&(phase, start_s, end_s)| PhaseSpan { phase, start_s, end_s }).collect()
    }

    #[test]
    fn blinks_are_left_out() {
        let mut many = spans(&[
            (Phase::Rollout, 0.0, 4.0),
            (Phase::Idle, 4.0, 5.0),
            (Phase::Update, 5.0, 6.0),
            (Phase::Idle, 6.0, 6.001),
            (Phase::Update, 6.001, 7.0),
            (Phase::Idle, 7.0, 8.0),
            (Phase::Update, 8.0, 10.0),
        ]);
        thin(&mut many, 10.0);
        let updates = [(Phase::Update, 5.0, 7.0), (Phase::Idle, 7.0, 8.0), (Phase::Update, 8.0, 10.0)];
        assert_eq!(many[2..], spans(&updates));
        assert_eq!(many.len(), 5);
    }

    #[test]
    fn idle_time_is_used_rested_or_neither() {
        let timeline = vec![
            spans(&[(Phase::Rollout, 0.0, 10.0), (Phase::Idle, 10.0, 12.0)]),
            // Learns, rests, borrows an answer, and rests again.
            spans(&[
                (Phase::Rollout, 0.0, 3.0),
                (Phase::DraftTrain, 3.0, 5.0),
                (Phase::Idle, 5.0, 6.0),
                (Phase::Rollout, 6.0, 8.0),
                (Phase::Idle, 8.0, 12.0),
            ]),
            // Runs dry when the other one rests already; was idle before for a moment.
            spans(&[(Phase::Idle, 0.0, 0.5), (Phase::Rollout, 0.5, 7.0), (Phase::Idle, 7.0, 12.0)]),
        ];
        let mut metrics = StepMetrics { rollout_s: 10.0, timeline, ..StepMetrics::default() };
        idle(&mut metrics, 1.5, Some(5.0));
        let of = |m: &StepMetrics| [m.idle_s, m.idle_used_s, m.idle_rested_s];
        assert_eq!(of(&metrics), [8.5, 1.5, 1.0 + 2.0 + 3.0]);
        // An order to stop may find the device at work for a moment more.
        idle(&mut metrics, 2.1, None);
        assert_eq!(of(&metrics), [8.5, 2.0, 0.0]);
        borrowed(&mut metrics, &[None, Some(5.9), Some(6.5)]);
        assert!((metrics.borrowed_s - 2.5).abs() < 1e-9, "{}", metrics.borrowed_s);
    }
}
