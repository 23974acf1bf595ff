//! Progress on stderr while a run works, and its report on stdout.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use actors::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use state::metrics::{BatchMetrics, Report, StepMetrics};
use state::speculation::controller::{batch_sizes, bucket};

use crate::{output, picture};

/// Share of a run's time from which on waiting for checkpoints is worth a word.
const DEAR: f64 = 0.2;
/// Levels of drafts that are told.
const LEVELS: usize = 8;

/// Bars for the stage and for the step in it; lines where there is no terminal.
pub(crate) struct Show {
    bars: MultiProgress,
    stage: ProgressBar,
    step: ProgressBar,
    shown: Mutex<usize>,
    /// Warnings that were shown: of two runs that read the same files both have the same ones.
    warned: Mutex<BTreeSet<String>>,
}

impl Show {
    pub(crate) fn new() -> Self {
        let bars = MultiProgress::new();
        let style =
            |template: &str| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = |template: &str| bars.add(ProgressBar::no_length().with_style(style(template)));
        let stage = bar("{prefix:>10} {bar:30} {pos}/{len} steps  {elapsed_precise}  {eta_precise} left");
        let step = bar("{prefix:>10} {bar:30} {pos}/{len} {msg}");
        stage.enable_steady_tick(Duration::from_millis(500));
        Self { bars, stage, step, shown: Mutex::new(usize::MAX), warned: Mutex::default() }
    }

    pub(crate) fn line(&self, text: &str) {
        if self.bars.is_hidden() {
            output::note(text);
        } else {
            let _ = self.bars.println(text);
        }
    }

    /// Parts of a line, over several where the terminal is narrow.
    fn parts(&self, parts: &[String]) {
        let width = console::Term::stderr().size_checked().map_or(usize::MAX, |(_, columns)| usize::from(columns));
        self.line(&wrapped(parts, if self.bars.is_hidden() { usize::MAX } else { width }));
    }

    pub(crate) fn tell(&self, progress: &Progress) {
        match progress {
            Progress::SessionBegan { dir, from, again } => self.line(&session(dir, *from, *again)),
            Progress::StepBegan { stage, step, kind } => self.begin(*stage, *step, kind),
            Progress::Scored(_) | Progress::Decided(_) => {}
            Progress::Groups { done, total } => self.advance("rollout", "groups", *done, *total),
            Progress::MicroBatches { done, total } => self.advance("update", "micro-batches", *done, *total),
            Progress::StepDone(metrics) => {
                self.stage.set_position((metrics.begun + metrics.step) as u64 + 1);
                if let Some(parts) = step_line(metrics) {
                    self.parts(&parts);
                }
            }
            Progress::DeviceLost { device, reason, after_ms } => {
                self.line(&format!("  device {device} was lost ({reason}); it starts again in {after_ms} ms"));
            }
            Progress::Warning(text) => {
                if self.warned.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
                    self.line(&format!("warning: {text}"));
                }
            }
            Progress::AlreadyComplete => {
                self.line("the run is already complete: nothing to do; `taper run` with --fresh begins anew");
            }
            Progress::Stopping => {
                self.line("  stopping once what is being computed is durable; a second signal stops at once");
            }
        }
    }

    fn begin(&self, stage: (usize, usize), step: (usize, usize), kind: &'static str) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if *shown != stage.0 {
            *shown = stage.0;
            self.stage.reset();
            self.stage.set_prefix(kind);
            self.stage.set_length(step.1 as u64);
            self.stage.set_position(step.0 as u64);
            // Steps of earlier sessions do not say how fast this one is.
            self.stage.tick();
            self.stage.reset_eta();
        }
        self.stage.set_position(step.0 as u64);
    }

    fn advance(&self, what: &'static str, unit: &'static str, done: usize, total: usize) {
        self.step.set_prefix(what);
        self.step.set_message(unit);
        self.step.set_length(total as u64);
        self.step.set_position(done as u64);
    }

    pub(crate) fn finish(&self) {
        self.stage.finish_and_clear();
        self.step.finish_and_clear();
    }
}

/// Where a session works, and where it goes on.
fn session(dir: &Path, from: Option<(&str, usize, usize)>, again: usize) -> String {
    let Some((kind, step, steps)) = from else { return format!("a run begins in {}", dir.display()) };
    let again = match again {
        0 => String::new(),
        steps => format!("; {} after its last checkpoint, done again", output::count(steps as u64, "step")),
    };
    format!("the run in {} goes on at {kind} {}/{steps}{again}", dir.display(), step + 1)
}

/// Parts with two spaces between, in lines no longer than `width` where that is possible; later ones are indented.
fn wrapped(parts: &[String], width: usize) -> String {
    let (mut text, mut column) = (String::new(), 0);
    for part in parts {
        let length = part.chars().count();
        if column > 0 && column + 2 + length >= width {
            text += "\n         ";
            column = 9;
        }
        let gap = if text.is_empty() { "" } else { "  " };
        text += &format!("{gap}{part}");
        column += gap.len() + length;
    }
    text
}

/// What is told of a step; of every tenth of an SFT stage.
fn step_line(m: &StepMetrics) -> Option<Vec<String>> {
    let at = format!("{:>9} {}/{}", m.kind, m.begun + m.step + 1, m.of);
    let parts = match m.kind.as_str() {
        "sft" if (m.begun + m.step + 1).is_multiple_of(10) || m.step + 1 == m.steps => {
            vec![at, format!("loss {:.4}", m.loss), format!("{:.0} tokens/s", m.tokens as f64 / m.wall_s.max(1e-9))]
        }
        "grpo" => [
            vec![
                at,
                format!("reward {:.3}", m.reward),
                format!("accuracy {:.0} %", m.accuracy * 100.0),
                format!("length {:.0} mean {} p75 {} max", m.length_mean, m.length_p75, m.length_max),
                match m.kl {
                    Some(kl) => format!("entropy {:.2} KL {kl:.4}", m.entropy),
                    None => format!("entropy {:.2}", m.entropy),
                },
                accepted(m),
                format!("{:.0} tokens/s, {}", m.tokens_per_s, times_plain(m.tokens_per_s, m.plain_tokens_per_s)),
                format!("idle {:.1} s, {} used", m.idle_s, percent(m.idle_used_s, m.idle_s)),
                format!("{:.1} s", m.wall_s),
            ],
            not_scored(m),
            m.drafter_off.map(|why| format!("drafter off: {why}")).into_iter().collect(),
        ]
        .concat(),
        "evaluate" => {
            let accuracy = format!("accuracy {:.1} % of {} held-out problems", m.accuracy * 100.0, m.rollouts);
            [vec![at, accuracy, format!("{:.1} s", m.wall_s)], not_scored(m)].concat()
        }
        _ => return None,
    };
    Some(parts)
}

/// The accept length of cycles with drafts.
fn accepted(m: &StepMetrics) -> String {
    if m.drafted_cycles > 0 { format!("accept {:.2}", m.accept_length) } else { "no drafts".into() }
}

/// Such answers teach nothing, and count as wrong in accuracies.
fn not_scored(m: &StepMetrics) -> Vec<String> {
    if m.failed > 0 { vec![format!("{} of {} not scored", m.failed, m.rollouts)] } else { Vec::new() }
}

fn times_plain(rate: f64, plain: f64) -> String {
    if plain > 0.0 { format!("{:.2}x plain", rate / plain) } else { "plain rate not measured".into() }
}

fn percent(part: f64, whole: f64) -> String {
    // A sum of nothing is -0, which adding 0 mends.
    if whole > 0.0 { format!("{:.0} %", part / whole * 100.0 + 0.0) } else { "0 %".into() }
}

/// The report for people.
pub(crate) fn report(r: &Report) -> String {
    let checkpoint_s = r.history.iter().map(|m| m.checkpoint_s).fold(0.0, |sum, s| sum + s);
    let mut text = format!(
        "\n{} is {}: {} in {:.1} s (rollout {:.1} s, update {:.1} s, waiting for checkpoints {checkpoint_s:.1} s)\n",
        r.name,
        r.status,
        output::count(r.steps as u64, "optimiser step"),
        r.wall_s,
        r.rollout_s,
        r.update_s
    );
    if checkpoint_s > DEAR * r.wall_s {
        text += "  fewer checkpoints would take less of that: `checkpoint: (every: …)` in the workflow\n";
    }
    text += &match (r.accuracy_before, r.accuracy_after) {
        (Some(before), Some(after)) => {
            format!("  accuracy on held-out problems: {:.1} % before, {:.1} % after\n", before * 100.0, after * 100.0)
        }
        (Some(only), None) => format!("  accuracy on held-out problems: {:.1} %\n", only * 100.0),
        (None, Some(after)) => format!("  accuracy on held-out problems: {:.1} % after\n", after * 100.0),
        _ => String::new(),
    };
    let (failed, all) = r.history.iter().fold((0, 0), |(failed, all), m| (failed + m.failed, all + m.rollouts));
    if failed > 0 {
        text += &format!("  {failed} of {all} answers could not be scored\n");
    }
    if r.tokens > 0 {
        let rate = times_plain(r.tokens_per_s, r.plain_tokens_per_s);
        text += &format!("  {} tokens sampled, {:.0} tokens/s, {rate}\n", r.tokens, r.tokens_per_s);
    }
    text += &batches(r);
    let drafting: Vec<f64> = r.learned_accept_length.iter().copied().filter(|a| *a > 0.0).collect();
    if let (Some(first), Some(last)) = (drafting.first(), drafting.last()) {
        text += &format!("  accept length of the learned drafter: {first:.2} at first, {last:.2} at last\n");
    }
    text += &drafter(r);
    if r.idle_s > 0.0 {
        text += &format!("  devices waited {:.1} s for the last answers", r.idle_s);
        if r.idle_used_s > 0.0 {
            text += &format!("; {} of it went to teaching the drafter", percent(r.idle_used_s, r.idle_s));
        }
        if r.idle_rested_s > 0.0 {
            let rested = percent(r.idle_rested_s, r.idle_s);
            text += &format!(", {rested} passed without, as it had stopped getting better");
        }
        if let [first, rest @ ..] = r.idle_by_device_s.as_slice()
            && !rest.is_empty()
        {
            let each = rest.iter().fold(format!("{first:.1}"), |all, idle_s| format!("{all}, {idle_s:.1}"));
            text += &format!(" ({each} s by device)");
        }
        text += "\n";
    }
    if r.lent > 0 {
        let borrowed_s = r.borrowed_s;
        text += &format!("  {} answers went on on a device that had run dry, for {borrowed_s:.1} s in all\n", r.lent);
    }
    text += &format!("  weights {}  kernels {}  devices {}\n", r.weights_blake3, r.kernels, r.devices.join(", "));
    if let Some(step) = r.history.iter().rev().find(|m| m.kind == "grpo") {
        text += &format!(
            "\n  step {} of {}, by device:\n{}",
            step.begun + step.step + 1,
            step.of,
            picture::timeline(step, &r.devices)
        );
    }
    text
}

/// What the learned drafter knows, and how soon its training gives way.
fn drafter(r: &Report) -> String {
    let mut text = String::new();
    let off = r.history.iter().rev().find(|m| m.kind == "grpo").and_then(|m| Some((m.drafter_version, m.drafter_off?)));
    if let Some((version, why)) = off {
        text += &format!("  it is off until there is a version after {version}: {why}\n");
    }
    if !r.acceptance_by_level.is_empty() {
        let levels: Vec<String> = r.acceptance_by_level.iter().take(LEVELS).map(|share| percent(*share, 1.0)).collect();
        text += &format!("  its guesses were right, where those before were: {}\n", levels.join(", "));
    }
    let ends =
        |shares: &[(usize, f64)]| Some((mean(&shares[..shares.len().div_ceil(4)])?, mean(last_quarter(shares))?));
    let told =
        [("after learning", &r.drafter_held_out), ("after an update, before learning", &r.drafter_held_out_before)];
    for (when, shares) in told {
        if let Some((first, last)) = ends(shares) {
            let (first, last, steps) =
                (percent(first, 1.0), percent(last, 1.0), output::count(shares.len() as u64, "step"));
            text += &format!(
                "  held-out tokens that it guessed at once, {when}: {first} at first, {last} at last ({steps})\n"
            );
        }
    }
    if r.drafter_discarded > 0 {
        let versions = output::count(r.drafter_discarded, "version");
        text += &format!("  {versions} of it guessed worse than the one in use: not used\n");
    }
    if let Some((median, most)) = r.preemption_s {
        let count = r.preemptions.iter().map(|bar| bar.count).sum::<usize>();
        text += &format!(
            "  its training gave way {}: after {} (median), {} (99 %)\n",
            output::count(count as u64, "time"),
            output::seconds(median),
            output::seconds(most)
        );
        text += &picture::histogram(&r.preemptions);
    }
    text
}

fn last_quarter(shares: &[(usize, f64)]) -> &[(usize, f64)] {
    &shares[shares.len() - shares.len().div_ceil(4)..]
}

fn mean(shares: &[(usize, f64)]) -> Option<f64> {
    (!shares.is_empty()).then(|| shares.iter().map(|(_, share)| share).sum::<f64>() / shares.len() as f64)
}

/// The batch sizes that are told apart no further than by the smallest of them.
pub(crate) fn together(batch_min: usize) -> String {
    match batch_sizes(bucket(batch_min)) {
        (min, Some(max)) if min == max => format!("{min}"),
        (min, Some(max)) => format!("{min} to {max}"),
        (min, None) => format!("{min} or more"),
    }
}

/// Where the time of rollouts went: a line for each batch size.
fn batches(r: &Report) -> String {
    let total_s: f64 = r.by_batch.iter().map(|b| b.busy_s).sum();
    let line = |b: &BatchMetrics| {
        let sizes = together(b.batch_min);
        format!(
            "    {sizes:>10} together  {:>5} of the time  {:>5} drafted  {}\n",
            percent(b.busy_s, total_s),
            percent(b.drafted_cycles as f64, b.cycles as f64),
            times_plain(b.plain_s, b.rated_s),
        )
    };
    r.by_batch.iter().map(line).collect()
}
