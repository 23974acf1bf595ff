//! Bucketed ε-greedy bandit with an off arm, after BEG-MAB (Hu et al. 2025, "Taming the Long Tail", section on the
//! adaptive rollout engine).
//!
//! Differences from it: plain decoding is an arm; speeds are compared at one batch size; a change of the best arm needs a margin and
//! what luck does not explain; exploring has a budget of time; arms that are not in use keep few measurements, since a drafter in
//! training gets better; what drafts promise counts beside what they bring; and what an arm does at other batch sizes stands in for
//! measurements that are missing ([`prior`](super::prior)).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::prior::{Habits, Plain, Scale, Trust, catch_up_s, hope, risk_s};
use super::skill::{Hoped, Skill};
use super::{BUCKETS, Measured};
use crate::plan::Strategy;

/// Share of the time so far that exploring may lose at a batch size with arms that are not the fastest, an equal part each: a short
/// rollout is not the place for dear ones.
pub const LOSS_MAX: f64 = 0.005;
/// Cycles with drafts after which a plain one is due. What plain decoding did before the machine changed its mind would keep a
/// strategy in use that only looks faster.
const PLAIN_EVERY: u32 = 32;
/// It is due this much later where drafting looks so many times faster that a machine's mood hardly explains it.
const CLEARLY: f64 = 2.0;
const LATER: u32 = 8;
/// Measurements of plain decoding before anything else is tried; a strategy with fewer is new.
const TRIALS: usize = 2;
/// Measurements of an arm from which on they count alone; with fewer, what is expected of it, or only hoped, counts too.
const TRUST: f64 = 8.0;
const TRUST_HOPE: f64 = 2.0;
/// An arm that was not tried is expected to be so much faster, or nothing would come of near ties.
const OPTIMISM: f64 = 1.05;
/// A challenger must be this much faster, beside the error of what was measured of it.
const HYSTERESIS: f64 = 0.01;
/// What may be the fastest, being new, or because luck may have been against it, is worth so many times as much, together with them.
const OPEN: f64 = 2.0;
/// Cycles within which a strategy that is only hoped for is to win back what it may lose at first.
const WON_BACK: f64 = 32.0;
/// Standard errors by which a challenger is believed less.
const DOUBT: f64 = 0.5;
/// Measurements kept of a strategy that is not in use.
const CHALLENGER_WINDOW: usize = 48;
/// Weight of plain decoding when exploring; strategies have up to 1. Its speed changes least.
const PLAIN_WEIGHT: f64 = 0.1;
/// Smallest weight of a strategy when exploring.
const WEIGHT_MIN: f64 = 0.05;
/// Share of the account forgotten at each observation.
const FORGET: f64 = 1.0 / 4096.0;

/// Measurements of all buckets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Bandit {
    strategies: Vec<Strategy>,
    epsilon: f64,
    buckets: Vec<Bucket>,
    /// Of each strategy.
    habits: Vec<Habits>,
    /// What exams said of drafters, by their index in the plan.
    #[serde(default)]
    skills: BTreeMap<usize, Skill>,
}

/// The batch that is chosen for, and what is known of plain decoding.
pub(super) struct Situation<'a> {
    pub(super) batch: usize,
    pub(super) bucket: usize,
    pub(super) plain: Plain<'a>,
}

/// What one cycle measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Cycle {
    /// Tokens a second.
    pub(super) rate: f64,
    /// Seconds it took, without catching up, and those.
    pub(super) seconds: f64,
    pub(super) catch_up_s: f64,
    /// Tokens per request-cycle.
    pub(super) accept_length: f64,
    /// Tokens that were to be expected, if that is known.
    #[serde(default)]
    pub(super) promised: Option<f64>,
}

impl Cycle {
    pub(super) fn tokens(self) -> f64 {
        self.rate * self.seconds
    }

    /// Tokens as far as they are believed, the rest being what was promised, as far as that is kept.
    pub(super) fn tokens_believed(self, share: f64, trust: Trust) -> f64 {
        let (tokens, requests) = (self.tokens(), self.batch());
        let expected = self.promised.map_or(tokens, |promised| requests + (promised - requests) * trust.kept);
        expected + share * (tokens - expected)
    }

    /// The same of this cycle alone.
    pub(super) fn tokens_believed_alone(self, trust: Trust) -> f64 {
        self.tokens_believed(self.batch() / (self.batch() + 1.0), trust)
    }

    /// Requests that took part.
    pub(super) fn batch(self) -> f64 {
        self.tokens() / self.accept_length
    }
}

/// One bucket. Arms are indices into the strategies; `None` is plain decoding, measured by the controller.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Bucket {
    arms: Vec<Arm>,
    /// The arm in use.
    incumbent: Option<usize>,
    /// Cycles since plain decoding was measured.
    since_plain: u32,
    /// Seconds measured.
    total_s: f64,
    /// Seconds that the incumbent would have saved while an arm was explored: plain decoding, then each strategy. An
    /// account each, so that a slow arm does not use up what a nearly best one needs.
    lost_s: Vec<f64>,
}

impl Bandit {
    pub(super) fn new(strategies: &[Strategy], epsilon: f64) -> Self {
        let count = strategies.len();
        let bucket = Bucket { arms: vec![Arm::default(); count], lost_s: vec![0.0; 1 + count], ..Bucket::default() };
        let (buckets, habits) = (vec![bucket; BUCKETS], vec![Habits::default(); count]);
        Self { strategies: strategies.to_vec(), epsilon, buckets, habits, skills: BTreeMap::new() }
    }

    /// The same that has measured nothing.
    pub(super) fn anew(&self) -> Self {
        Self::new(&self.strategies, self.epsilon)
    }

    pub(super) fn is_of(&self, strategies: &[Strategy], epsilon: f64) -> bool {
        self.strategies == strategies && self.epsilon == epsilon
    }

    pub(super) fn choose(
        &mut self,
        Situation { batch, bucket, plain }: Situation<'_>,
        draw: [f64; 2],
        ready: &dyn Fn(usize) -> bool,
    ) -> Option<Strategy> {
        let strategies = &self.strategies;
        let usable: Vec<usize> = (0..strategies.len()).filter(|&arm| ready(strategies[arm].drafter)).collect();
        let (scale, batch) = (Scale::of(plain, bucket), batch as f64);
        let expect = |(habits, strategy): (&Habits, &Strategy)| {
            // Not asked for at every cycle: it takes a look at all strategies.
            let hoped = if habits.is_known() { None } else { self.hoped(strategy) };
            let trusted = if hoped.is_some() || habits.is_seen() { TRUST } else { TRUST_HOPE };
            let forecast = habits.forecast((strategy, hoped.as_ref()), batch, &scale.times);
            let forecast = forecast.or_else(|| hope(*strategy, batch, (&scale.times, hoped.as_ref())))?;
            let catch_up_s = batch * self.catch_up_s(strategy).unwrap_or_else(|| catch_up_s(batch, &scale.times));
            let rate = scale.of_rate(forecast.rate(), batch);
            let risk_s = if habits.is_seen() { 0.0 } else { risk_s(*strategy, batch, &scale.times)? };
            Some(Expected { rate, seconds: forecast.seconds, catch_up_s, risk_s, trusted })
        };
        let expected = self.habits.iter().zip(strategies).map(expect).collect();
        let known = Known { strategies, plain: &plain.arms[bucket], scale, expected };
        let chosen = self.buckets[bucket].choose(&known, &usable, self.epsilon, draw);
        chosen.map(|arm| strategies[arm])
    }

    /// The strategy in use in a bucket, once it was measured there.
    pub(super) fn in_use(&self, bucket: usize) -> Option<Strategy> {
        let bucket = &self.buckets[bucket];
        bucket.incumbent.filter(|arm| !bucket.is_new(*arm)).map(|arm| self.strategies[arm])
    }

    pub(super) fn observe(
        &mut self,
        Situation { batch, bucket, plain }: Situation<'_>,
        strategy: Option<Strategy>,
        (cycle, measured): (Cycle, &Measured),
        window: usize,
    ) {
        let arm = match strategy {
            None => None,
            Some(strategy) => match self.strategies.iter().position(|known| *known == strategy) {
                // Not an arm of this plan, so nothing to learn for it.
                None => return,
                found => found,
            },
        };
        let (requests, scale) = (measured.requests as f64, Scale::of(plain, bucket));
        let trust = arm.zip(cycle.promised).map_or_else(Trust::default, |(arm, _)| self.habits[arm].trust());
        if let Some((arm, promised)) = arm.zip(cycle.promised) {
            let [promised, right] = [promised, cycle.tokens()].map(|tokens| (tokens - requests).max(0.0));
            self.habits[arm].observe_promise(promised, right);
        }
        let habits = arm.map(|arm| self.habits[arm]).unwrap_or_default();
        let took_s = habits.believable((batch as f64, measured.rows as f64), &cycle, &scale.times);
        if let Some(arm) = arm
            && let Some(plain_s) = scale.times.seconds(batch as f64)
        {
            let (rows, tokens) = (measured.rows as f64 / requests, cycle.tokens_believed_alone(trust) / requests);
            self.habits[arm].observe(tokens, rows, measured.draft_s / plain_s);
            // Also where there was nothing to catch up on: some drafters never have, and a trial may follow another one.
            if self.buckets[bucket].is_change(&self.strategies, arm) {
                self.habits[arm].observe_change(cycle.catch_up_s / requests);
            }
        }
        self.buckets[bucket].observe((&plain.arms[bucket], &scale), arm, (cycle, took_s, trust), window);
    }

    /// Learns what an exam says of a drafter. What strategies of one that has become clearly better did before tells little: where they are
    /// not in use they are new again.
    pub(super) fn examined(&mut self, drafter: usize, skill: Skill) {
        for (arm, strategy) in self.strategies.iter().enumerate().filter(|(_, strategy)| strategy.drafter == drafter) {
            let hoped = skill.hoped(strategy).map_or(1.0, |hoped| 1.0 + hoped.accepted(strategy.depth as f64));
            if self.habits[arm].is_outgrown(hoped) {
                let others = self.buckets.iter_mut().filter(|bucket| bucket.incumbent != Some(arm));
                others.for_each(|bucket| bucket.arms[arm] = Arm::default());
            }
        }
        self.skills.insert(drafter, skill);
    }

    /// The best chance of a level of its drafter's drafts that any strategy has seen which looked at no more tokens of a level; or what an
    /// exam says of the drafter, if that is more: what was seen may be from before it had learned.
    fn hoped(&self, of: &Strategy) -> Option<Hoped> {
        let tells = |strategy: &Strategy| strategy.drafter == of.drafter && strategy.width <= of.width;
        let like = self.habits.iter().zip(&self.strategies).filter(|(_, strategy)| tells(strategy));
        let seen = like.filter_map(|(habits, strategy)| habits.chance(strategy)).max_by(f64::total_cmp);
        let examined = self.skills.get(&of.drafter).and_then(|skill| skill.hoped(of));
        let accepted = |hoped: &Hoped| hoped.accepted(of.depth as f64);
        seen.map(Hoped::like).into_iter().chain(examined).max_by(|a, b| accepted(a).total_cmp(&accepted(b)))
    }

    /// Seconds that the drafter of a strategy takes for each request after cycles in which it was not asked, if that was seen.
    fn catch_up_s(&self, of: &Strategy) -> Option<f64> {
        let like = self.habits.iter().zip(&self.strategies).filter(|(_, strategy)| strategy.drafter == of.drafter);
        like.filter_map(|(habits, _)| habits.catch_up_s()).max_by(f64::total_cmp)
    }

    /// Plain measurements kept in a bucket: few while it is not in use, since they stretch over a long time.
    pub(super) fn plain_window(&self, bucket: usize, window: usize) -> usize {
        if self.buckets[bucket].incumbent.is_some() { window.min(CHALLENGER_WINDOW) } else { window }
    }

    pub(super) fn accept_length(&self, bucket: usize, strategy: Strategy) -> Option<f64> {
        let arm = self.strategies.iter().position(|known| *known == strategy)?;
        self.buckets[bucket].arms[arm].accept_length()
    }
}

/// What a strategy's cycle is expected to do.
struct Expected {
    /// Tokens a second at the bucket's usual batch size.
    rate: f64,
    seconds: f64,
    /// What the drafter has to catch up on takes, where it was not asked in the cycle before.
    catch_up_s: f64,
    /// What it may lose where nothing is known but hopes.
    risk_s: f64,
    /// Measurements that make it unimportant.
    trusted: f64,
}

/// What is known beside a bucket's own measurements: the strategies, plain decoding there, and what is expected of each.
struct Known<'a> {
    strategies: &'a [Strategy],
    plain: &'a Arm,
    scale: Scale,
    expected: Vec<Option<Expected>>,
}

impl Bucket {
    fn choose(&mut self, known: &Known<'_>, usable: &[usize], epsilon: f64, draw: [f64; 2]) -> Option<usize> {
        if known.plain.count() < TRIALS {
            return None;
        }
        self.elect(known, usable);
        let is_clear = self.rate(known, self.incumbent) >= CLEARLY * self.rate(known, None);
        if self.since_plain >= PLAIN_EVERY * if is_clear { LATER } else { 1 } {
            return None;
        }
        if draw[0] < epsilon {
            return self.explore(known, usable, draw[1]);
        }
        self.incumbent
    }

    /// Replaces the incumbent if it cannot draft, or if another is faster by the margin.
    fn elect(&mut self, known: &Known<'_>, usable: &[usize]) {
        if self.incumbent.is_some_and(|arm| !usable.contains(&arm)) {
            self.incumbent = None;
        }
        let rate = |arm: Option<usize>| match arm {
            Some(challenger) if arm != self.incumbent => self.rate(known, arm) * (1.0 - self.doubt(known, challenger)),
            _ => self.rate(known, arm),
        };
        let others = candidates(usable).filter(|&arm| arm == self.incumbent || self.is_worth_its_risk(known, arm));
        let best = others.max_by(|&a, &b| rate(a).total_cmp(&rate(b))).unwrap_or(None);
        // Plain decoding needs no margin, so that a near tie is never lost to it.
        let margin = if best.is_some() { HYSTERESIS } else { 0.0 };
        if rate(best) > (1.0 + margin) * rate(self.incumbent) {
            self.incumbent = best;
        }
    }

    /// Whether a strategy of which there are only hopes would soon win back what it may lose, or the time so far is long enough for that.
    fn is_worth_its_risk(&self, known: &Known<'_>, arm: Option<usize>) -> bool {
        let risk_s = self.risk_s(known, arm);
        let gain = self.rate(known, arm) / self.rate(known, self.incumbent) - 1.0;
        risk_s <= WON_BACK * gain * self.seconds(known, self.incumbent) || self.is_affordable(known, arm)
    }

    /// Seconds that an arm which is new may lose.
    fn risk_s(&self, known: &Known<'_>, arm: Option<usize>) -> f64 {
        let new = arm.filter(|arm| self.arms[*arm].count() == 0);
        new.and_then(|arm| known.expected[arm].as_ref()).map_or(0.0, |expected| expected.risk_s)
    }

    /// An arm other than the incumbent that can still lose time, the nearly as fast ones more often.
    fn explore(&self, known: &Known<'_>, usable: &[usize], draw: f64) -> Option<usize> {
        let best = self.rate(known, self.incumbent);
        let weight = |arm: Option<usize>| match arm {
            None if known.plain.count() < CHALLENGER_WINDOW => 1.0,
            None => PLAIN_WEIGHT,
            Some(arm) if self.is_new(arm) => 1.0,
            some => (self.rate(known, some) / best).powi(4).clamp(WEIGHT_MIN, 1.0),
        };
        let others: Vec<Option<usize>> =
            candidates(usable).filter(|&arm| arm != self.incumbent && self.is_affordable(known, arm)).collect();
        let mut left = draw * others.iter().map(|&arm| weight(arm)).sum::<f64>();
        for &arm in &others {
            left -= weight(arm);
            if left < 0.0 {
                return arm;
            }
        }
        others.last().copied().unwrap_or(self.incumbent)
    }

    /// Tokens a second: what was measured, and as long as that is little, what is expected.
    fn rate(&self, known: &Known<'_>, arm: Option<usize>) -> f64 {
        let Some(arm) = arm else { return known.scale.of_arm(known.plain).unwrap_or(0.0) };
        match (known.scale.of_arm(&self.arms[arm]), &known.expected[arm]) {
            (Some(measured), Some(Expected { rate, .. })) => {
                let trust = self.trust(known, arm);
                trust * measured + (1.0 - trust) * rate
            }
            (None, Some(Expected { rate, .. })) => rate * OPTIMISM,
            (measured, None) => measured.unwrap_or(0.0),
        }
    }

    /// How far an arm's measurements count alone.
    fn trust(&self, known: &Known<'_>, arm: usize) -> f64 {
        let count = self.arms[arm].count() as f64;
        known.expected[arm].as_ref().map_or(1.0, |expected| (count / expected.trusted).min(1.0))
    }

    /// Seconds of a cycle of an arm.
    fn seconds(&self, known: &Known<'_>, arm: Option<usize>) -> f64 {
        let Some(arm) = arm else { return known.plain.seconds().unwrap_or(0.0) };
        let expected = || known.expected[arm].as_ref().map(|expected| expected.seconds);
        self.arms[arm].seconds().or_else(expected).unwrap_or(0.0)
    }

    /// Seconds that the drafter of an arm has to catch up for, because the incumbent does not ask it.
    fn catch_up_s(&self, known: &Known<'_>, arm: Option<usize>) -> f64 {
        let arm = arm.filter(|arm| self.is_change(known.strategies, *arm));
        arm.and_then(|arm| known.expected[arm].as_ref()).map_or(0.0, |expected| expected.catch_up_s)
    }

    /// By how much less an arm is believed, as a share, as far as what was measured of it is trusted: of many arms one always looks good
    /// by luck.
    fn doubt(&self, known: &Known<'_>, arm: usize) -> f64 {
        (DOUBT * self.trust(known, arm) * self.arms[arm].error()).min(1.0)
    }

    fn observe(
        &mut self,
        plain: (&Arm, &Scale),
        arm: Option<usize>,
        (cycle, took_s, trust): (Cycle, f64, Trust),
        window: usize,
    ) {
        // Held against what is believed of the incumbent.
        let believed = Cycle { rate: cycle.tokens_believed_alone(trust) / cycle.seconds, ..cycle };
        self.account(plain, arm, (believed, cycle.batch()), took_s);
        self.since_plain = if arm.is_some() { self.since_plain.saturating_add(1) } else { 0 };
        let Some(arm) = arm else { return };
        let window = if self.incumbent == Some(arm) { window } else { window.min(CHALLENGER_WINDOW) };
        self.arms[arm].observe_promised(cycle, window, trust);
    }

    /// Books the time, and what the incumbent would have saved of it. Gains of an explored arm pay for losses, but
    /// hardly any are saved up: luck goes both ways.
    fn account(
        &mut self,
        (plain, scale): (&Arm, &Scale),
        arm: Option<usize>,
        (cycle, batch): (Cycle, f64),
        took_s: f64,
    ) {
        let best = scale.of_arm(self.incumbent.map_or(plain, |arm| &self.arms[arm])).unwrap_or(0.0);
        let rate = scale.of_rate(cycle.rate, batch);
        let is_explored = arm != self.incumbent && best > 0.0;
        let lost_s = took_s - cycle.seconds * rate / best;
        let lost_s = if is_explored { lost_s } else { 0.0 };
        self.total_s = self.total_s * (1.0 - FORGET) + took_s;
        for account in &mut self.lost_s {
            *account *= 1.0 - FORGET;
        }
        let credit_s = self.share_s();
        let account = &mut self.lost_s[account(arm)];
        *account = (*account + lost_s).max(-credit_s);
    }

    /// Whether the time so far is long enough for what was lost and a cycle of this arm is expected to lose: by itself, or by all
    /// strategies, if it may be the fastest. Plain cycles have to be, now and then, and a baseline from few would let luck decide.
    fn is_affordable(&self, known: &Known<'_>, arm: Option<usize>) -> bool {
        let (rate, best) = (self.rate(known, arm), self.rate(known, self.incumbent));
        let loss_s = self.seconds(known, arm) * (1.0 - rate / best).max(0.0);
        let loss_s = loss_s.max(self.risk_s(known, arm)) + self.catch_up_s(known, arm);
        // It may be the fastest, if it is new, or if luck was against it.
        let is_open = arm.is_some_and(|arm| self.is_new(arm) || rate * (1.0 + self.arms[arm].error()) > best);
        let all_s: f64 = self.lost_s[1..].iter().sum();
        (arm.is_none() && (known.plain.count() as f64) < TRUST)
            || self.lost_s[account(arm)] + loss_s <= self.share_s()
            || (is_open && all_s + loss_s <= OPEN * LOSS_MAX * self.total_s)
    }

    /// Whether the incumbent does not ask this arm's drafter, so that it has to catch up.
    fn is_change(&self, strategies: &[Strategy], arm: usize) -> bool {
        self.incumbent.is_none_or(|incumbent| strategies[incumbent].drafter != strategies[arm].drafter)
    }

    fn is_new(&self, arm: usize) -> bool {
        self.arms[arm].count() < TRIALS
    }

    /// Seconds that one arm may have lost which is not the fastest.
    fn share_s(&self) -> f64 {
        LOSS_MAX / self.lost_s.len() as f64 * self.total_s
    }
}

/// Index of an arm's account of lost seconds.
fn account(arm: Option<usize>) -> usize {
    arm.map_or(0, |arm| arm + 1)
}

/// Plain decoding and the usable strategies.
fn candidates(usable: &[usize]) -> impl Iterator<Item = Option<usize>> + '_ {
    std::iter::once(None).chain(usable.iter().copied().map(Some))
}
