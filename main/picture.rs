//! A picture of one step: what each device did over time.

use state::device::Phase;
use state::metrics::{Bar, StepMetrics};

use crate::output;

const WIDTH: usize = 68;

fn letter(phase: Phase) -> char {
    match phase {
        Phase::Idle => '·',
        Phase::Rollout => '█',
        Phase::DraftTrain => '▒',
        Phase::Update => '░',
    }
}

/// One line a device, and a legend.
pub(crate) fn timeline(step: &StepMetrics, devices: &[String]) -> String {
    let end_s = step.timeline.iter().flatten().fold(0.0, |end: f64, s| end.max(s.end_s));
    if end_s <= 0.0 {
        return String::new();
    }
    let mut text = String::new();
    for (device, spans) in step.timeline.iter().enumerate() {
        let at = |column: usize| {
            let time_s = (column as f64 + 0.5) / WIDTH as f64 * end_s;
            let span = spans.iter().find(|s| s.start_s <= time_s && time_s < s.end_s);
            letter(span.map_or(Phase::Idle, |s| s.phase))
        };
        let name = devices.get(device).map_or("device", String::as_str);
        text.push_str(&format!("  {name:>6} {}\n", (0..WIDTH).map(at).collect::<String>()));
    }
    let mark = (step.rollout_s / end_s * WIDTH as f64) as usize;
    let (rollout, all) = (output::seconds(step.rollout_s), output::seconds(end_s));
    text.push_str(&format!("  {:>6} {}^ last answer, {rollout} of {all}\n", "", " ".repeat(mark.min(WIDTH))));
    text.push_str("         █ rollout   ▒ drafter training   ░ update   · idle\n");
    text
}

/// Widest bar of a histogram.
const BAR: usize = 40;

/// A line for each bar.
pub(crate) fn histogram(bars: &[Bar]) -> String {
    let most = bars.iter().map(|bar| bar.count).max().unwrap_or(0).max(1);
    let line = |bar: &Bar| {
        let width = (bar.count * BAR).div_ceil(most);
        format!("{:>14} or less  {} {}\n", output::seconds(bar.up_to_s), "▒".repeat(width), bar.count)
    };
    bars.iter().map(line).collect()
}
