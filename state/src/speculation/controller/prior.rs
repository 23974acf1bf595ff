//! What a strategy is expected to do at a batch size where it was hardly measured, from what it did at others.
//!
//! Verifying `r` rows takes the target about as long as a plain cycle of `r` requests, so plain cycles of all batch sizes
//! give the price of a draft's rows; how much of a draft is accepted hardly depends on the batch.

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::bandit::Cycle;
use super::skill::{Hoped, accepted};
use super::{batch_sizes, bucket};
use crate::plan::Strategy;

/// Share of what a strategy did that each new cycle replaces.
const RENEW: f64 = 1.0 / 32.0;
/// Cycles from which on something is expected.
const SEEN_MIN: f64 = 4.0;
/// Rows that are hoped to take as long as one, as long as only one batch size was measured: reading the weights takes longer than
/// computing with them.
const FREE_ROWS: f64 = 8.0;
/// Beyond what was measured a row costs what the last ones did: at most this part of the largest batch is told apart from smaller ones.
const FLAT: f64 = 4.0;
/// Share of a draft that is hoped to be accepted while nothing is known of the drafter.
const ACCEPTED: f64 = 0.75;
/// Times as long as usual from which on a cycle's time is not its strategy's doing.
const STOOD_STILL: f64 = 8.0;
/// Rows that catching up may take a request, about, and what such a row is thought to cost, in the target's, before that was measured.
const CATCH_UP_ROWS: f64 = 64.0;
const CATCH_UP_ROW: f64 = 0.1;
/// Tokens for which promises are believed before any was seen to be kept, and the share of them forgotten with each that is promised.
const BELIEVED: f64 = 16.0;
const FORGET: f64 = 1.0 / 256.0;
/// Times as many tokens as an earlier exam let hope for from which on a drafter is another one.
const BETTER: f64 = 1.15;
/// Part of its nodes from which on a draft counts as a whole one.
const WHOLE: f64 = 0.9;

/// What is known of plain decoding: cycles by bucket, and forwards that were timed before, rows and seconds in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plain<'a> {
    pub(super) arms: &'a [Arm],
    pub(super) probed: &'a [(f64, f64)],
}

/// Seconds of a cycle by its batch size.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Times {
    /// Mean batch size and seconds of each bucket that was measured, in order.
    points: Vec<(f64, f64)>,
}

impl Times {
    pub(super) fn of(Plain { arms, probed }: Plain<'_>) -> Self {
        let measured = Self { points: arms.iter().filter_map(|arm| Some((arm.tokens()?, arm.seconds()?))).collect() };
        let forwards = Self { points: probed.to_vec() };
        // A cycle is more than a forward, and a machine has moods: forwards tell how cycles compare.
        let ratio = |&(rows, seconds): &(f64, f64)| Some(seconds / forwards.seconds(rows)?);
        let ratios: Vec<f64> = measured.points.iter().filter_map(ratio).collect();
        let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
        let is_new = |rows: f64| arms.get(bucket(rows as usize)).is_some_and(|arm| arm.tokens().is_none());
        let mut points = measured.points;
        if ratio.is_finite() {
            points.extend(probed.iter().filter(|(rows, _)| is_new(*rows)).map(|&(rows, s)| (rows, s * ratio)));
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        Self { points }
    }

    /// Seconds of a cycle with so many rows: between measured ones on a line, above them at the price of a row in the last
    /// stretch, below them as the smallest. Nothing if nothing was measured.
    pub(super) fn seconds(&self, rows: f64) -> Option<f64> {
        let above = self.points.iter().position(|point| point.0 >= rows);
        let (low, high) = match (above, &self.points[..]) {
            (_, []) => return None,
            (Some(0), [first, ..]) => return Some(first.1),
            (None, [only]) => return Some(only.1 * (rows / only.0.max(FREE_ROWS)).max(1.0)),
            (Some(at), points) => (points[at - 1], points[at]),
            (None, points) => {
                let (low, high) = (points[points.len() - 2], points[points.len() - 1]);
                // Between few and many the first rows may have cost nothing, and the last ones all.
                ((low.0.max(high.0 / FLAT), low.1), high)
            }
        };
        // Noise can make more rows look faster than fewer.
        let slope = ((high.1 - low.1) / (high.0 - low.0).max(1e-9)).max(0.0);
        Some(low.1 + slope * (rows - low.0))
    }

    /// Tokens a second of plain cycles of so many requests.
    fn rate(&self, batch: f64) -> Option<f64> {
        self.seconds(batch).map(|seconds| batch / seconds)
    }
}

/// Brings the speeds of a bucket to one batch size. Its batches shrink as a rollout goes on, and what was measured of 32 requests says
/// little of 17 unless plain cycles say how to compare.
pub(super) struct Scale {
    pub(super) times: Times,
    /// Tokens a second of plain cycles at the batch size that speeds are stated for.
    usual: Option<f64>,
}

impl Scale {
    pub(super) fn of(plain: Plain<'_>, bucket: usize) -> Self {
        let (times, (min, max)) = (Times::of(plain), batch_sizes(bucket));
        let usual = times.rate((min as f64 * max.unwrap_or(2 * min) as f64).sqrt());
        Self { times, usual }
    }

    /// Tokens a second at the usual batch size, from those at another one.
    pub(super) fn of_rate(&self, rate: f64, batch: f64) -> f64 {
        let ratio = self.usual.zip(self.times.rate(batch)).map_or(1.0, |(usual, here)| usual / here);
        if ratio.is_finite() { rate * ratio } else { rate }
    }

    /// The same of what an arm measured.
    pub(super) fn of_arm(&self, arm: &Arm) -> Option<f64> {
        Some(self.of_rate(arm.rate()?, arm.batch()?))
    }
}

/// How far a strategy's promises are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Trust {
    /// Tokens that were right for each that was promised.
    pub(super) kept: f64,
    /// How far that may be off, as a share of it.
    pub(super) error: f64,
}

impl Default for Trust {
    /// Of what promises nothing.
    fn default() -> Self {
        Self { kept: 1.0, error: 0.0 }
    }
}

/// What a strategy did lately, at whatever batch sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Habits {
    /// Tokens and target rows of a request in a cycle.
    tokens: f64,
    rows: f64,
    /// Seconds spent drafting, in plain cycles of the same batch size.
    drafting: f64,
    /// Cycles seen, up to where the newest ones replace the oldest.
    seen: f64,
    /// The same of cycles after which another drafter had drafted or none, and the seconds that catching up took each request in them.
    changes: f64,
    catch_up_s: f64,
    /// Drafted tokens that were promised to be right, and those that were, the newest counting most.
    #[serde(default)]
    promised: f64,
    #[serde(default)]
    kept: f64,
    /// Tokens that an exam let hope for when it was last found to have become better.
    #[serde(default)]
    hoped: f64,
}

impl Habits {
    /// Whether an exam lets hope for clearly more tokens than ever before: what was seen counts little then.
    pub(super) fn is_outgrown(&mut self, hoped: f64) -> bool {
        let is_outgrown = hoped > BETTER * self.hoped;
        if is_outgrown {
            self.hoped = hoped;
            self.seen = self.seen.min(SEEN_MIN);
        }
        is_outgrown
    }

    pub(super) fn observe(&mut self, tokens: f64, rows: f64, drafting: f64) {
        self.seen = (self.seen + 1.0).min(1.0 / RENEW);
        for (mean, new) in [(&mut self.tokens, tokens), (&mut self.rows, rows), (&mut self.drafting, drafting)] {
            *mean += (new - *mean) / self.seen;
        }
    }

    /// Learns how many tokens of drafts were right that so many were promised of.
    pub(super) fn observe_promise(&mut self, promised: f64, right: f64) {
        let forgotten = (FORGET * promised).min(1.0);
        for (sum, new) in [(&mut self.promised, promised), (&mut self.kept, right)] {
            *sum += new - forgotten * *sum;
        }
    }

    /// How far promises are kept.
    pub(super) fn trust(&self) -> Trust {
        Trust {
            kept: (self.kept + BELIEVED) / (self.promised + BELIEVED),
            // Each token is right or not: about as its count's root.
            error: (self.kept + BELIEVED).sqrt().recip(),
        }
    }

    /// Learns what catching up took each request in a cycle after others that another drafter drafted for, or none.
    pub(super) fn observe_change(&mut self, catch_up_s: f64) {
        self.changes = (self.changes + 1.0).min(1.0 / RENEW);
        self.catch_up_s += (catch_up_s - self.catch_up_s) / self.changes;
    }

    /// Seconds that catching up is expected to take each request, if that was seen.
    pub(super) fn catch_up_s(&self) -> Option<f64> {
        (self.changes > 0.0).then_some(self.catch_up_s)
    }

    /// Chance of each level of this strategy's drafts to be right after those above it, as if it were the same for all; nothing if this cannot
    /// be told, because it was hardly seen, often drafts less, or has the suffix drafter's tokens in its drafts.
    pub(super) fn chance(&self, strategy: &Strategy) -> Option<f64> {
        if !self.is_seen() || strategy.suffix > 0 || self.rows - 1.0 < WHOLE * strategy.budget as f64 {
            return None;
        }
        // The sum grows with the chance: halved until it is found to a thousandth.
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..10 {
            let middle = f64::midpoint(low, high);
            match accepted(strategy.depth as f64, |_| middle) < self.tokens - 1.0 {
                true => low = middle,
                false => high = middle,
            }
        }
        Some(high)
    }

    /// Seconds of a cycle of so many requests and rows, catching up included, as far as they can be the strategy's doing: where it took much longer than
    /// its rows cost, a process was stopped, or a device hung.
    pub(super) fn believable(&self, (batch, rows): (f64, f64), cycle: &Cycle, plain: &Times) -> f64 {
        let within = |took_s: f64, usual_s: Option<f64>| match usual_s {
            Some(usual_s) if took_s > STOOD_STILL * usual_s => usual_s,
            _ => took_s,
        };
        let catch_up_s = plain.seconds(batch * CATCH_UP_ROWS);
        within(cycle.seconds, self.usual(batch, rows, plain)) + within(cycle.catch_up_s, catch_up_s)
    }

    /// Seconds of a cycle of so many requests and rows, drafting included.
    fn usual(&self, batch: f64, rows: f64, plain: &Times) -> Option<f64> {
        Some(plain.seconds(rows)? + self.drafting * plain.seconds(batch)?)
    }

    /// Whether it was seen so often that nothing else counts.
    pub(super) fn is_known(&self) -> bool {
        self.seen * RENEW >= 1.0
    }

    /// Whether it was seen often enough for something to be expected.
    pub(super) fn is_seen(&self) -> bool {
        self.seen >= SEEN_MIN
    }

    /// What a cycle of `batch` requests is expected to do; nothing if this cannot be told yet. How long it takes is soon known. How many
    /// tokens it brings is luck for long, and until then what may be hoped of this strategy counts, too.
    pub(super) fn forecast(
        &self,
        (strategy, hoped): (&Strategy, Option<&Hoped>),
        batch: f64,
        plain: &Times,
    ) -> Option<Forecast> {
        if !self.is_seen() {
            return None;
        }
        let seconds = self.usual(batch, batch * self.rows, plain)?;
        let most = strategy.depth.min(strategy.budget) as f64;
        let levels = if strategy.width == 1 { most.min(self.rows - 1.0) } else { most };
        let hoped = hoped.map_or(self.tokens, |hoped| 1.0 + hoped.accepted(levels));
        let tokens = hoped + (self.tokens - hoped) * self.seen * RENEW;
        (seconds > 0.0).then_some(Forecast { tokens: batch * tokens, seconds })
    }
}

/// What a cycle is expected to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forecast {
    pub(super) tokens: f64,
    pub(super) seconds: f64,
}

impl Forecast {
    /// Tokens a second.
    pub(super) fn rate(self) -> f64 {
        self.tokens / self.seconds
    }
}

/// Seconds that catching up is thought to take each of so many requests before it was seen.
pub(super) fn catch_up_s(batch: f64, plain: &Times) -> f64 {
    CATCH_UP_ROW * plain.seconds(batch * CATCH_UP_ROWS).unwrap_or(0.0) / batch
}

/// Seconds that a cycle of a strategy that never drafted would lose if nothing of its largest drafts were accepted.
pub(super) fn risk_s(strategy: Strategy, batch: f64, plain: &Times) -> Option<f64> {
    Some((plain.seconds(batch * (1.0 + drafted_most(strategy, batch)))? - plain.seconds(batch)?).max(0.0))
}

/// Tokens that a strategy drafts for each of so many requests, at most.
fn drafted_most(strategy: Strategy, batch: f64) -> f64 {
    (strategy.budget as f64).min(strategy.drafted_max() as f64 / batch)
}

/// What a strategy that never drafted is expected to do: what it would do if its drafts cost nothing and most of them were accepted, or as many as
/// is known of its drafter. Where even that is slower than plain decoding, because the target would have to compute too many rows, it is
/// not worth a try.
pub(super) fn hope(strategy: Strategy, batch: f64, (plain, hoped): (&Times, Option<&Hoped>)) -> Option<Forecast> {
    let most = drafted_most(strategy, batch);
    let depth = most.min(strategy.depth as f64);
    let of = |levels: f64| {
        let drafted = if strategy.width == 1 { levels } else { most };
        let accepted = hoped.map_or(ACCEPTED * levels, |hoped| hoped.accepted(levels));
        Some(Forecast { tokens: batch * (1.0 + accepted), seconds: plain.seconds(batch * (1.0 + drafted))? })
    };
    // Where drafts end at guesses that are not likely, they are hoped to end where that is best.
    let ends = if strategy.chance_min > 0.0 { 1 } else { depth.ceil() as usize };
    let levels = (ends..depth.ceil() as usize).map(|levels| levels as f64).chain([depth]);
    levels.filter_map(of).max_by(|a, b| a.rate().total_cmp(&b.rate()))
}

#[cfg(test)]
mod tests {
    use super::super::BUCKETS;
    use super::*;

    fn plain(points: &[(f64, f64)]) -> Times {
        let arm = |&(tokens, seconds): &(f64, f64)| {
            let mut arm = Arm::default();
            arm.observe(
                Cycle { rate: tokens / seconds, seconds, catch_up_s: 0.0, accept_length: 1.0, promised: None },
                4,
            );
            arm
        };
        let mut arms: Vec<Arm> = points.iter().map(arm).collect();
        arms.insert(1, Arm::default());
        Times::of(Plain { arms: &arms, probed: &[] })
    }

    #[test]
    fn plain_cycles_are_interpolated() {
        let cycles = plain(&[(1.0, 2.0), (4.0, 5.0), (8.0, 7.0)]);
        let seconds = [0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 16.0].map(|rows| cycles.seconds(rows).unwrap());
        assert_eq!(seconds, [2.0, 2.0, 3.0, 5.0, 6.0, 7.0, 11.0]);
        assert_eq!(Times::default().seconds(3.0), None);
        assert_eq!([3.0, 16.0].map(|rows| plain(&[(2.0, 4.0)]).seconds(rows).unwrap()), [4.0, 8.0]);
        assert_eq!([3.0, 64.0].map(|rows| plain(&[(16.0, 4.0)]).seconds(rows).unwrap()), [4.0, 16.0]);
        assert_eq!(plain(&[(2.0, 4.0), (4.0, 3.0)]).seconds(8.0), Some(4.0), "noise");
    }

    #[test]
    fn forwards_that_were_timed_stand_in_for_cycles() {
        let probed = [(1.0, 1.0), (8.0, 3.0), (32.0, 9.0)];
        let mut arms = vec![Arm::default(); BUCKETS];
        let seconds = |arms: &[Arm], rows: [f64; 4]| {
            let times = Times::of(Plain { arms, probed: &probed });
            rows.map(|rows| times.seconds(rows).unwrap_or(0.0))
        };
        assert_eq!(seconds(&arms, [1.0; 4]), [0.0; 4], "how long a cycle takes is not known");
        // A cycle takes twice as long as its forward.
        arms[0].observe(Cycle { rate: 0.5, seconds: 2.0, catch_up_s: 0.0, accept_length: 1.0, promised: None }, 4);
        assert_eq!(seconds(&arms, [1.0, 8.0, 20.0, 32.0]), [2.0, 6.0, 12.0, 18.0]);
        // What was measured counts, and says how the rest compares.
        arms[3]
            .observe(Cycle { rate: 8.0 / 12.0, seconds: 12.0, catch_up_s: 0.0, accept_length: 1.0, promised: None }, 4);
        assert_eq!(seconds(&arms, [1.0, 8.0, 20.0, 32.0]), [2.0, 12.0, 19.5, 27.0]);
    }

    #[test]
    fn promises_are_believed_as_far_as_they_are_kept() {
        let mut habits = Habits::default();
        assert_eq!(habits.trust().kept, 1.0);
        for i in 0..400 {
            habits.observe_promise(2.0, if i % 2 == 0 { 3.0 } else { 0.0 });
        }
        let seen = habits.trust();
        assert!((seen.kept - 0.75).abs() < 0.03 && (0.05..0.1).contains(&seen.error), "{seen:?}");
        (0..400).for_each(|_| habits.observe_promise(0.0, 0.0));
        assert_eq!(habits.trust(), seen, "nothing was promised");
    }

    #[test]
    fn a_strategy_is_expected_to_do_as_it_did() {
        let cycles = plain(&[(1.0, 1.0), (8.0, 1.7), (16.0, 4.1)]);
        let mut habits = Habits::default();
        let chain = (&Strategy::chain(0, 3), None);
        assert_eq!(habits.forecast(chain, 1.0, &cycles), None);
        (0..200).for_each(|i| habits.observe(if i < 100 { 1.0 } else { 3.0 }, 4.0, 0.25));
        // 4 rows: 1.3 s, and 0.25 s for the draft.
        let rate = habits.forecast(chain, 1.0, &cycles).unwrap().rate();
        assert!((rate - 3.0 / 1.55).abs() < 0.1, "{rate}");
        let hoped = [1.0, 16.0].map(|batch| {
            hope(Strategy::chain(0, 4), batch, (&cycles, None)).unwrap().rate() * cycles.seconds(batch).unwrap() / batch
        });
        assert!(hoped[0] > 2.0 && hoped[1] < 1.0, "times plain decoding: {hoped:?}");
        let shared = hope(Strategy::chain(0, 4).with_budget_all(8), 16.0, (&cycles, None)).unwrap().rate();
        assert!(shared > 1.1 * hope(Strategy::chain(0, 4), 16.0, (&cycles, None)).unwrap().rate(), "few rows for all");
        let [eight, two] = [8.0, 2.0].map(|batch| habits.forecast(chain, batch, &cycles).unwrap().rate());
        assert!(eight < two * 4.0);
        // Unlucky at first.
        let mut habits = Habits::default();
        (0..4).for_each(|_| habits.observe(1.0, 4.0, 0.25));
        let hoped = Hoped::like(0.8);
        let tokens = |habits: &Habits, hoped| habits.forecast((chain.0, hoped), 1.0, &cycles).unwrap().tokens;
        assert!(tokens(&habits, None) == 1.0 && tokens(&habits, Some(&hoped)) > 2.8);
        (0..200).for_each(|_| habits.observe(1.0, 4.0, 0.25));
        assert!((tokens(&habits, Some(&hoped)) - 1.0).abs() < 1e-9, "it was not luck");
    }

    #[test]
    fn a_machine_that_stood_still_is_not_believed() {
        let cycles = plain(&[(1.0, 1.0), (8.0, 1.7)]);
        let took = |seconds: f64, catch_up_s: f64, plain: &Times| {
            let cycle = Cycle { rate: 1.0, seconds, catch_up_s, accept_length: 1.0, promised: None };
            Habits::default().believable((1.0, 8.0), &cycle, plain)
        };
        assert_eq!([took(5.0, 0.5, &cycles), took(13.0, 40.0, &cycles)], [5.5, 53.0], "dear is not still");
        assert!((took(1_000.0, 0.0, &cycles) - 1.7).abs() < 1e-9 && took(1.7, 1_000.0, &cycles) < 10.0);
        assert_eq!(took(1_000.0, 0.0, &Times::default()), 1_000.0, "nothing is known");
    }

    #[test]
    fn what_a_drafter_does_tells_what_to_hope_of_it() {
        let cycles = plain(&[(1.0, 1.0), (8.0, 1.2), (32.0, 2.4)]);
        let (short, long) = (Strategy::chain(0, 2), Strategy::chain(0, 5));
        let chance = |tokens: f64, rows: f64| {
            let mut habits = Habits::default();
            (0..8).for_each(|_| habits.observe(tokens, rows, 0.0));
            habits.chance(&short)
        };
        // 0.4 + 0.4².
        assert!((chance(1.56, 3.0).unwrap() - 0.4).abs() < 2e-3);
        assert!(chance(3.0, 3.0) > Some(0.99) && chance(1.0, 3.0) < Some(2e-3));
        assert_eq!((chance(1.2, 1.3), Habits::default().chance(&short)), (None, None), "it hardly drafts");
        let mut habits = Habits::default();
        (0..8).for_each(|_| habits.observe(6.0, 9.0, 0.0));
        assert_eq!(
            habits.chance(&Strategy { suffix: 8, ..short }),
            None,
            "the suffix drafter's tokens may be among them"
        );
        // At 20 requests a chain of 5 is worth a try only if its drafter is good.
        let gain = |strategy: Strategy, chance: Option<f64>| {
            let hoped = chance.map(Hoped::like);
            hope(strategy, 20.0, (&cycles, hoped.as_ref())).unwrap().rate() * cycles.seconds(20.0).unwrap() / 20.0
        };
        let chances = [None, Some(0.9), Some(0.4)];
        let gains = chances.map(|chance| gain(long, chance));
        assert!(gains[0] > 1.0 && gains[1] > 1.0 && gains[2] < 0.7, "{gains:?}");
        let gains = chances.map(|chance| gain(long.with_chance_min(0.3), chance));
        assert!(gains[0] > 1.0 && gains[1] > 1.0 && (0.8..1.0).contains(&gains[2]), "it drafts one token: {gains:?}");
    }
}
