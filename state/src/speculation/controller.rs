//! Chooses how to draft from what was measured: numbers only, so that it can be replayed on a laptop.
//!
//! * **CTRL-1** A strategy whose drafter is not ready is never chosen.
//! * **CTRL-2** Choices depend only on the observations, the draws and the readiness passed in.
//! * **CTRL-3** A controller restored from its serialised form makes the choices it would have made.
//! * **CTRL-4** Where all strategies are slower, exploring them loses no more than about [`LOSS_MAX`] of the time measured there, or twice
//!   as much as long as luck may explain it.
//!
//! Choices change when tokens appear, never which.

mod arm;
mod bandit;
mod prior;
mod skill;

use serde::{Deserialize, Serialize};

use crate::plan::{self, Strategy, TableRow};
use arm::Arm;
use bandit::{Bandit, Cycle, Situation};
use prior::{Plain, Times};

pub use bandit::LOSS_MAX;
pub use skill::Skill;

/// Batch sizes are told apart by these buckets: 1, 2, 3–4, 5–8, 9–16, 17–32, 33 and more.
pub const BUCKETS: usize = 7;
/// Measurements kept of plain decoding where the plan names no window.
const PLAIN_WINDOW: usize = 64;

/// What was measured of cycles with one batch size and strategy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Tokens emitted.
    pub tokens: u64,
    /// Tokens that were to be expected of the drafts, where their drafter can tell: what comes of one draft is mostly luck.
    pub promised: Option<f64>,
    /// Request-cycles.
    pub requests: usize,
    /// Rows that the target verified: one for each request, and one for each drafted token.
    pub rows: usize,
    /// Time.
    pub seconds: f64,
    /// Of that, spent on what earlier cycles had left undone, if they drafted in another way: the price of a change, and
    /// not of the strategy.
    pub catch_up_s: f64,
    /// Of that, spent on drafting, without catching up.
    pub draft_s: f64,
}

/// Chooses a strategy, or none, for every cycle, and learns from the cycle's time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Controller {
    rule: Rule,
    /// Plain decoding in each bucket.
    plain: Vec<Arm>,
    /// Decoding as it is done lately in each bucket: a cycle of one token for each of its requests, and the time that takes.
    now: Vec<Arm>,
    window: usize,
    /// Rows and seconds of the target's forwards, timed before anything was decoded.
    probed: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Rule {
    Off,
    Fixed(Strategy),
    Bandit(Bandit),
    Table(Vec<TableRow>),
}

impl Controller {
    /// A controller that has measured nothing.
    #[must_use]
    pub fn new(config: &plan::Controller) -> Self {
        let plain = vec![Arm::default(); BUCKETS];
        let now = plain.clone();
        let (rule, window) = match config {
            plan::Controller::Off => (Rule::Off, PLAIN_WINDOW),
            plan::Controller::Fixed(strategy) => (Rule::Fixed(*strategy), PLAIN_WINDOW),
            plan::Controller::Table(rows) => (Rule::Table(rows.clone()), PLAIN_WINDOW),
            plan::Controller::Bandit { strategies, epsilon, window } => {
                (Rule::Bandit(Bandit::new(strategies, *epsilon)), (*window).max(1))
            }
        };
        Self { rule, plain, now, window, probed: Vec::new() }
    }

    /// The same where the strategies' drafters are others now: of plain decoding it still knows.
    #[must_use]
    pub fn with_other_drafters(mut self) -> Self {
        if let Rule::Bandit(bandit) = &mut self.rule {
            *bandit = bandit.anew();
        }
        self
    }

    /// Whether it would be of use to know what rows cost before that is measured.
    #[must_use]
    pub fn wants_probe(&self) -> bool {
        matches!(self.rule, Rule::Bandit(_))
    }

    /// Whether it was told.
    #[must_use]
    pub fn is_probed(&self) -> bool {
        !self.probed.is_empty()
    }

    /// Learns what rows cost, from seconds of the target's forwards over so many: it stands in for plain cycles of as many requests
    /// until these are measured.
    pub fn probe(&mut self, mut forwards: Vec<(f64, f64)>) {
        forwards.retain(|(rows, seconds)| *rows >= 1.0 && *seconds > 0.0 && seconds.is_finite());
        forwards.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.probed = forwards;
    }

    /// Learns what an exam says of a drafter (an index into the plan's list): it stands in for what strategies have not shown yet.
    pub fn examined(&mut self, drafter: usize, skill: Skill) {
        if let Rule::Bandit(bandit) = &mut self.rule {
            bandit.examined(drafter, skill);
        }
    }

    /// Whether it chooses by this configuration: one that was saved is of no use for another.
    #[must_use]
    pub fn is_of(&self, config: &plan::Controller) -> bool {
        match (&self.rule, config) {
            (Rule::Off, plan::Controller::Off) => true,
            (Rule::Fixed(strategy), plan::Controller::Fixed(other)) => strategy == other,
            (Rule::Table(rows), plan::Controller::Table(others)) => rows == others,
            (Rule::Bandit(bandit), plan::Controller::Bandit { strategies, epsilon, window }) => {
                bandit.is_of(strategies, *epsilon) && self.window == (*window).max(1)
            }
            _ => false,
        }
    }

    /// The strategy of the next cycle of `batch` running requests; `None` is plain decoding.
    ///
    /// `draw` are two uniform numbers from 0 up to 1; `ready` tells whether a drafter (an index into the plan's list)
    /// can draft now.
    pub fn choose(&mut self, batch: usize, draw: [f64; 2], ready: &dyn Fn(usize) -> bool) -> Option<Strategy> {
        match &mut self.rule {
            Rule::Bandit(bandit) => {
                let plain = Plain { arms: &self.plain, probed: &self.probed };
                let situation = Situation { batch, bucket: bucket(batch), plain };
                bandit.choose(situation, draw, ready)
            }
            Rule::Off | Rule::Fixed(_) | Rule::Table(_) => self.keep(batch, ready),
        }
    }

    /// The same for a cycle that tells nothing, because prompts go along: what is in use, and nothing is tried.
    #[must_use]
    pub fn keep(&self, batch: usize, ready: &dyn Fn(usize) -> bool) -> Option<Strategy> {
        let strategy = match &self.rule {
            Rule::Off => None,
            Rule::Fixed(strategy) => Some(*strategy),
            Rule::Table(rows) => rows.iter().find(|row| batch <= row.batch_max).and_then(|row| row.strategy),
            Rule::Bandit(bandit) => bandit.in_use(bucket(batch)),
        };
        strategy.filter(|strategy| ready(strategy.drafter))
    }

    /// Learns from one cycle, or several alike.
    ///
    /// Without tokens, requests or a positive time it tells nothing and is left out.
    pub fn observe(&mut self, batch: usize, strategy: Option<Strategy>, measured: Measured) {
        let Measured { tokens, promised, requests, seconds, catch_up_s, .. } = measured;
        let promised = promised.filter(|tokens| tokens.is_finite() && *tokens > 0.0);
        let steady_s = seconds - catch_up_s;
        if tokens == 0
            || requests == 0
            || !seconds.is_finite()
            || seconds <= 0.0
            || steady_s.is_nan()
            || steady_s <= 0.0
        {
            return;
        }
        let bucket = bucket(batch);
        let (rate, accept_length) = (tokens as f64 / steady_s, tokens as f64 / requests as f64);
        let cycle = Cycle { rate, seconds: steady_s, catch_up_s, accept_length, promised };
        let a_token_each = Cycle { seconds: batch.max(1) as f64 / rate, promised: None, ..cycle };
        self.now[bucket].observe(a_token_each, self.window);
        if let Rule::Bandit(bandit) = &mut self.rule {
            let plain = Plain { arms: &self.plain, probed: &self.probed };
            let situation = Situation { batch, bucket, plain };
            bandit.observe(situation, strategy, (cycle, &measured), self.window);
        }
        // Without drafts, a strategy's cycle is a plain one but for the looking. Or plain decoding, while it is not in use, would be
        // known from long ago only.
        let is_plain = strategy.is_none() || measured.rows == requests;
        let plain_s = steady_s - measured.draft_s;
        if is_plain && plain_s > 0.0 {
            let window = match &self.rule {
                Rule::Bandit(bandit) => bandit.plain_window(bucket, self.window),
                Rule::Off | Rule::Fixed(_) | Rule::Table(_) => self.window,
            };
            let rate = tokens as f64 / plain_s;
            let plain = Cycle { rate, seconds: plain_s, catch_up_s: 0.0, accept_length, promised: None };
            self.plain[bucket].observe(plain, window);
        }
    }

    /// Tokens a second of plain cycles at about this batch size, if any were measured.
    #[must_use]
    pub fn plain_rate(&self, batch: usize) -> Option<f64> {
        self.plain[bucket(batch)].rate()
    }

    /// How many times faster so many requests would go on if another device took half of them; 1 where that is not known.
    #[must_use]
    pub fn gain_of_halving(&self, batch: usize) -> f64 {
        let gain = self.pace(batch).zip(self.pace(batch.div_ceil(2))).map_or(1.0, |(all, half)| all / half);
        if gain.is_finite() { gain } else { 1.0 }
    }

    /// Seconds that each of so many requests waits for a token, decoding as it is done now; nothing for more than were ever
    /// together.
    fn pace(&self, batch: usize) -> Option<f64> {
        let is_known = self.now[bucket(batch)..].iter().any(|arm| arm.rate().is_some());
        Times::of(Plain { arms: &self.now, probed: &[] }).seconds(batch as f64).filter(|_| is_known)
    }

    /// Tokens per request-cycle of a strategy of the bandit at about this batch size, bonus included, if measured.
    #[must_use]
    pub fn accept_length(&self, batch: usize, strategy: Strategy) -> Option<f64> {
        match &self.rule {
            Rule::Bandit(bandit) => bandit.accept_length(bucket(batch), strategy),
            Rule::Off | Rule::Fixed(_) | Rule::Table(_) => None,
        }
    }
}

/// Smallest and largest batch size of a bucket; the last one has no largest.
#[must_use]
pub fn batch_sizes(bucket: usize) -> (usize, Option<usize>) {
    let min = if bucket == 0 { 1 } else { (1 << (bucket - 1)) + 1 };
    (min, (bucket + 1 < BUCKETS).then_some(1 << bucket))
}

/// Index of the bucket of a batch size; an empty batch counts as 1.
#[must_use]
pub fn bucket(batch: usize) -> usize {
    let bits = batch.max(1).next_power_of_two().trailing_zeros() as usize;
    bits.min(BUCKETS - 1)
}

#[cfg(test)]
mod tests;
