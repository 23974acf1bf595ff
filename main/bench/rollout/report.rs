//! What was measured, in numbers and for people.

use actors::{CycleStats, Decoded};
use models::Answer;
use serde::Serialize;
use state::metrics::nearest_rank;
use state::speculation::controller::{BUCKETS, batch_sizes, bucket};
use state::watchdog::PutOff;

use crate::output;

/// Keys of the JSON form.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) threads: usize,
    pub(super) temperature: f32,
    /// Micro-batches the drafter learned, its last loss, and seconds.
    pub(super) learned_batches: u64,
    pub(super) learned_loss: Option<f64>,
    pub(super) learned_s: f64,
    /// Different prompts of the measured answers, and of those that the drafter learned from here.
    pub(super) prompts_measured: usize,
    pub(super) prompts_learned: usize,
    /// Whether some of either were asked for several problems.
    #[serde(skip)]
    pub(super) repeat: [bool; 2],
    /// Answers that were compared with those of plain decoding, and those that differ.
    pub(super) compared: usize,
    pub(super) differences: usize,
    /// One request at a time.
    pub(super) alone: Vec<Line>,
    /// A full batch.
    pub(super) full: Vec<Line>,
    /// Adaptive tokens a second of it against plain ones, of cycles alone in which all slots are full.
    pub(super) full_cycles_ratio: Option<f64>,
    /// The long-tailed rollout.
    pub(super) tail: Vec<Line>,
    pub(super) tail_lengths: Lengths,
    pub(super) tail_batch_sizes: Vec<BatchLine>,
    /// Seconds over those of the best single strategy, and over those of the best one at each batch size, in hindsight.
    pub(super) regret_fixed: Option<f64>,
    pub(super) regret_by_batch: Option<f64>,
    /// Accept length of trees with shared noise and without.
    pub(super) trees: Vec<Tree>,
    /// Share of adaptive decoding's time that is neither the target's forwards nor drafting, alone and in the rollout.
    pub(super) overhead_alone: f64,
    pub(super) overhead_tail: f64,
}

/// One way to decode.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) how: String,
    pub(super) seconds: f64,
    pub(super) tokens_per_s: f64,
    /// As fast as plain decoding.
    pub(super) ratio: f64,
    pub(super) accept_length: f64,
    /// Share of request-cycles with a draft, and tokens of those.
    pub(super) drafted: f64,
    pub(super) drafted_accept_length: f64,
    /// Milliseconds of a cycle in the target, and in the drafter.
    pub(super) target_ms: f64,
    pub(super) draft_ms: f64,
    /// Why the learned drafter was put off by the end, if it was: what follows is plain decoding.
    pub(super) drafter_off: Option<PutOff>,
}

/// How long answers are, in tokens.
#[derive(Debug, Serialize)]
pub(super) struct Lengths {
    pub(super) median: usize,
    /// Nine of ten are not longer.
    pub(super) most: usize,
    pub(super) longest: usize,
    /// Answers that were cut.
    pub(super) truncated: usize,
    /// Of each answer, and of its prompt, in the order of the requests, and requests decoded together at most: for others to decode as
    /// much. Those that follow each other in a group have the same prompt.
    pub(super) answers: Vec<usize>,
    pub(super) prompts: Vec<usize>,
    pub(super) group: usize,
    pub(super) slots: usize,
}

impl Lengths {
    pub(super) fn of(answers: &[Answer], (group, slots): (usize, usize)) -> Self {
        let lengths: Vec<usize> = answers.iter().map(|answer| answer.log_probs.len()).collect();
        let mut sorted = lengths.clone();
        sorted.sort_unstable();
        let [median, most, longest] = [50, 90, 100].map(|percent| nearest_rank(&sorted, percent).unwrap_or(0));
        let truncated = answers.iter().filter(|answer| answer.truncated).count();
        let prompts = answers.iter().map(|answer| answer.prompt).collect();
        Self { median, most, longest, truncated, answers: lengths, prompts, group, slots }
    }
}

/// A batch size in the long-tailed rollout.
#[derive(Debug, Serialize)]
pub(super) struct BatchLine {
    pub(super) batch_min: usize,
    pub(super) seconds: f64,
    pub(super) ratio: f64,
}

/// Trees of equal size, in the shape that is best with shared noise, and in the one that is best without.
#[derive(Debug, Serialize)]
pub(super) struct Tree {
    pub(super) budget: usize,
    pub(super) coupled: Shape,
    pub(super) uncoupled: Shape,
    pub(super) ratio: f64,
}

/// Shape of a tree, and what came of it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Shape {
    pub(super) depth: usize,
    pub(super) width: usize,
    pub(super) accept_length: f64,
}

pub(super) fn lines(all: &[(String, Decoded)]) -> Vec<Line> {
    let line = |(how, d): &(String, Decoded)| {
        let sum = |f: fn(&CycleStats) -> usize| d.cycles.iter().map(f).sum::<usize>() as f64;
        let seconds = |f: fn(&CycleStats) -> f64| {
            d.cycles.iter().map(f).fold(0.0, |a, b| a + b) * 1e3 / d.cycles.len().max(1) as f64
        };
        let (drafted, tokens) = (sum(|m| m.drafted.0), sum(|m| m.drafted.1));
        Line {
            how: how.clone(),
            seconds: d.seconds,
            tokens_per_s: d.rate(),
            ratio: d.rate() / all[0].1.rate(),
            accept_length: d.accept_length(),
            drafted: drafted / sum(|m| m.requests).max(1.0),
            target_ms: seconds(|m| m.target_s),
            draft_ms: seconds(|m| m.draft_s),
            drafter_off: d.put_off,
            drafted_accept_length: if drafted > 0.0 { tokens / drafted } else { 1.0 },
        }
    };
    all.iter().map(line).collect()
}

/// A line for who waits for the rest: plain decoding, and the others beside it.
pub(super) fn in_short(all: &[(String, Decoded)]) -> String {
    let lines = lines(all);
    let ratios: Vec<String> = lines.iter().skip(1).map(|l| format!("{} {:.2}x", l.how, l.ratio)).collect();
    format!("  plain {:.1} tokens/s; {}", lines[0].tokens_per_s, ratios.join("; "))
}

/// Share of the time of a whole decoding outside the target's forwards, those of prompts among them, and outside drafting, with catching
/// up: for admitting, choosing, drawing, accepting and measuring.
pub(super) fn overhead(decoded: &Decoded) -> f64 {
    let sum = |f: fn(&CycleStats) -> f64| decoded.cycles.iter().map(f).fold(0.0, |a, b| a + b);
    1.0 - (sum(|m| m.draft_s) + sum(|m| m.target_s)) / decoded.seconds.max(1e-9)
}

/// Tokens and seconds in each bucket of batch sizes. Cycles of prompts alone are in none.
fn buckets(decoded: &Decoded) -> [(f64, f64); BUCKETS] {
    let mut buckets = [(0.0, 0.0); BUCKETS];
    for m in decoded.cycles.iter().filter(|m| m.requests > 0) {
        let (tokens, seconds) = &mut buckets[bucket(m.requests)];
        *tokens += m.tokens as f64;
        *seconds += m.seconds;
    }
    buckets
}

/// Tokens a second of cycles with so many requests, of the second against the first; nothing if one has none. Prompts that go along take
/// their part of a cycle's time.
pub(super) fn of_full_cycles(plain: &Decoded, adaptive: &Decoded, slots: usize) -> Option<f64> {
    let rate = |decoded: &Decoded| {
        let full = decoded.cycles.iter().filter(|m| m.requests == slots);
        let (tokens, seconds) = full.fold((0.0, 0.0), |(tokens, seconds), m| {
            let own = (m.rows - m.prefilled) as f64 / m.rows.max(1) as f64;
            (tokens + m.tokens as f64, seconds + own * m.seconds)
        });
        (seconds > 0.0).then(|| tokens / seconds)
    };
    Some(rate(adaptive)? / rate(plain)?)
}

pub(super) fn by_batch(plain: &Decoded, adaptive: &Decoded) -> Vec<BatchLine> {
    let (plain, adaptive) = (buckets(plain), buckets(adaptive));
    let line = |i: usize| {
        let [plain, adaptive] = [plain[i], adaptive[i]].map(|(tokens, seconds)| (tokens / seconds.max(1e-9), seconds));
        let is_there = plain.1 > 0.0 && adaptive.1 > 0.0;
        is_there.then(|| BatchLine { batch_min: batch_sizes(i).0, seconds: adaptive.1, ratio: adaptive.0 / plain.0 })
    };
    (0..BUCKETS).filter_map(line).collect()
}

/// What adaptive decoding lost against the best way in hindsight: the best single one, and the best one at each batch size.
pub(super) fn regret(tail: &[(String, Decoded)]) -> (Option<f64>, Option<f64>) {
    if tail.len() < 3 {
        return (None, None);
    }
    let fixed: Vec<&Decoded> = tail.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, t)| &t.1).collect();
    let adaptive = &tail[1].1;
    let best = fixed.iter().map(|d| d.seconds).fold(f64::INFINITY, f64::min);
    let all: Vec<_> = fixed.iter().map(|d| buckets(d)).collect();
    let (mut took, mut would) = (0.0, 0.0);
    for (i, (tokens, seconds)) in buckets(adaptive).into_iter().enumerate() {
        let rate = all.iter().map(|b| b[i].0 / b[i].1.max(1e-9)).fold(0.0, f64::max);
        if rate > 0.0 {
            took += seconds;
            would += tokens / rate;
        }
    }
    (Some(adaptive.seconds / best - 1.0), Some(took / would - 1.0))
}

impl Measured {
    /// How much the answers that were measured and learned from can differ.
    fn prompts(&self) -> String {
        let again = |repeat: bool| if repeat { " (some more than once)" } else { "" };
        let [measured, learned] = self.repeat.map(again);
        let mut text = format!(
            "{} different prompts measured on{measured}, {} learned from{learned}\n",
            self.prompts_measured, self.prompts_learned
        );
        if self.repeat.contains(&true) {
            text += "note: prompts repeat, whose answers are alike; give the data more problems (`heldout` for those measured on), or ask \
                     for fewer answers\n";
        }
        text
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "\n{}, T = {}; the drafter learned {} micro-batches\n{}",
            output::count(self.threads as u64, "thread"),
            self.temperature,
            self.learned_batches,
            self.prompts()
        );
        let parts = [("one request at a time", &self.alone), ("a full batch", &self.full), ("a long tail", &self.tail)];
        for (title, lines) in parts {
            text += &format!("\n  {title:<34} tokens/s   ratio  accept  drafted  target ms  draft ms\n");
            for l in lines {
                text += &format!(
                    "    {:<32} {:>8.1}  {:>5.2}x  {:>6.2}  {:>5.0} %  {:>9.3}  {:>8.3}\n",
                    l.how,
                    l.tokens_per_s,
                    l.ratio,
                    l.accept_length,
                    l.drafted * 100.0,
                    l.target_ms,
                    l.draft_ms
                );
                if let Some(why) = l.drafter_off {
                    text += &format!("      the learned drafter was put off: {why}\n");
                }
            }
        }
        if let Some(ratio) = self.full_cycles_ratio {
            text += &format!("\n  adaptive in a full batch, while it is full: {ratio:.3}x plain\n");
        }
        let Lengths { median, most, longest, truncated, .. } = self.tail_lengths;
        text += &format!(
            "\n  answers of the long tail: half have at most {median} tokens, nine of ten {most}, the longest {longest}; {truncated} were cut\n"
        );
        text += "\n  adaptive in the long tail, by requests decoded together\n";
        for b in &self.tail_batch_sizes {
            let seconds = output::seconds(b.seconds);
            text += &format!("    from {:<3} {seconds:>8}  {:.2}x plain\n", b.batch_min, b.ratio);
        }
        if let (Some(fixed), Some(by_batch)) = (self.regret_fixed, self.regret_by_batch) {
            let (fixed, by_batch) = (fixed * 100.0, by_batch * 100.0);
            text += &format!(
                "  lost against the best single strategy {fixed:.1} %, against the best at each batch size {by_batch:.1} %\n"
            );
        }
        if !self.trees.is_empty() {
            text += "\n  accept length of trees       with shared noise            without\n";
        }
        let shape = |s: &Shape| format!("{:.2} ({} deep, {} wide)", s.accept_length, s.depth, s.width);
        for t in &self.trees {
            let (coupled, uncoupled) = (shape(&t.coupled), shape(&t.uncoupled));
            text += &format!("    {:>2} nodes {coupled:>30} {uncoupled:>24}  {:.2}x\n", t.budget, t.ratio);
        }
        text + &format!(
            "\n  neither target nor drafter: {:.1} % alone, {:.1} % in the rollout\n  {} answers compared with plain decoding, {} differ\n",
            self.overhead_alone * 100.0,
            self.overhead_tail * 100.0,
            self.compared,
            self.differences
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_neither_target_nor_drafter_is_overhead() {
        let cycle = |requests, draft_s, target_s| {
            let (rows, prefilled, tokens) = (requests, 1 - requests, requests);
            CycleStats { draft_s, target_s, requests, rows, prefilled, tokens, ..CycleStats::default() }
        };
        // A prompt's forward is the target's. Cycles say less of their seconds than the whole decoding took.
        let cycles = vec![cycle(0, 0.0, 2.0), cycle(1, 1.0, 3.0), cycle(1, 0.5, 1.5)];
        let decoded = Decoded { cycles, seconds: 10.0, ..Decoded::default() };
        assert!((overhead(&decoded) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn a_full_batch_is_full() {
        let cycle = |requests, prefilled, tokens, seconds| {
            let rows = requests + prefilled;
            CycleStats { requests, rows, prefilled, tokens, seconds, ..CycleStats::default() }
        };
        // Half of the second cycle is a prompt's; what is decoded at the end, when few are left, does not count.
        let plain = vec![cycle(4, 0, 4, 1.0), cycle(4, 4, 4, 2.0), cycle(1, 0, 1, 0.1)];
        let adaptive = vec![cycle(4, 0, 6, 2.0), cycle(1, 0, 5, 0.1)];
        let [plain, adaptive] = [plain, adaptive].map(|cycles| Decoded { cycles, ..Decoded::default() });
        assert_eq!(of_full_cycles(&plain, &adaptive, 4), Some(0.75));
        assert_eq!(of_full_cycles(&plain, &adaptive, 8), None);
    }
}
