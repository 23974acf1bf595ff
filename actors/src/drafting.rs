//! Speculative decoding on one device: its drafters, kept up to date, under the controller that all devices share.

use std::sync::Arc;
use std::time::Instant;

use kernels::Pool;
use models::drafter::hybrid::Hybrid;
use models::drafter::uncoupled::Uncoupled;
use models::drafter::{Drafter, Vocabulary};
use models::{Answer, Cycle, Decoder};
use state::plan::Strategy;
use state::speculation::Measured;
use state::watchdog::Watched;

use crate::error::Result;
use crate::speculator::{Drafters, Speculator, lock};

/// The drafters of one device, for one target.
pub(crate) struct Drafting {
    pub(crate) speculator: Arc<Speculator>,
    vocabulary: Arc<Vocabulary>,
    /// At which its target's tokens are drawn.
    temperature: f32,
    drafters: Drafters,
    /// Version of the learned drafter among them.
    version: u64,
    pool: Arc<Pool>,
    /// Answers that the suffix drafter has heard of, of all devices'.
    heard: u64,
    /// How the cycle before drafted.
    last: Option<Strategy>,
    /// Guesses are ranked with the target's noise.
    pub(crate) is_coupled: bool,
}

/// A cycle and what is to be told of it.
pub(crate) struct Drafted {
    pub(crate) cycle: Cycle,
    pub(crate) strategy: Option<Strategy>,
    pub(crate) seconds: f64,
    /// What a plain cycle would have taken for these tokens, where that was measured.
    pub(crate) plain_s: Option<f64>,
    /// Version of the learned drafter.
    pub(crate) version: u64,
}

impl Drafting {
    /// With the suffix drafter of an earlier target, if there was one: it learns nothing from weights.
    pub(crate) fn new(
        speculator: &Arc<Speculator>,
        (vocabulary, temperature): (&Arc<Vocabulary>, f32),
        pool: &Arc<Pool>,
        earlier: Option<Self>,
    ) -> Result<Self> {
        speculator.probe(vocabulary.target(), pool)?;
        let heard = earlier.as_ref().map_or(0, |e| e.heard);
        let mut earlier = earlier.map(|e| e.drafters).unwrap_or_default();
        // Its requests are others', by the same numbers.
        earlier.iter_mut().flatten().for_each(|drafter| drop(drafter.known()));
        let (drafters, version) = speculator.drafters((vocabulary, temperature), pool, earlier)?;
        let (speculator, vocabulary, pool) = (speculator.clone(), vocabulary.clone(), pool.clone());
        let (last, is_coupled) = (None, true);
        Ok(Self { version, heard, speculator, vocabulary, temperature, drafters, pool, last, is_coupled })
    }

    /// One cycle with the strategy that the controller chooses.
    pub(crate) fn cycle(&mut self, decoder: &mut Decoder) -> Result<Drafted> {
        self.swap()?;
        let speculator = self.speculator.clone();
        speculator.listen(&mut self.drafters, &mut self.heard);
        let batch = decoder.decoding();
        let put_off = lock(&speculator.watchdog).put_off(self.version, batch);
        let learned = speculator.plan.learned().filter(|_| put_off.is_some());
        let ready: Vec<bool> =
            self.drafters.iter().enumerate().map(|(i, drafter)| Some(i) != learned && drafter.is_some()).collect();
        // A cycle that prompts go along with says little of a strategy: nothing is tried in it.
        let strategy = match decoder.is_prefilling() {
            true => lock(&speculator.controller).keep(batch, &|drafter| ready.get(drafter) == Some(&true)),
            false => lock(&speculator.controller).choose(batch, speculator.draws(), &ready),
        };
        let began = Instant::now();
        let mut cycle = self.decode(decoder, strategy)?;
        // After another way to draft, catching up is the price of the change. Else it is that of drafting in this way: for requests
        // that are new, for a new version, and for those that the suffix drafter had something for until now.
        if self.last == strategy {
            cycle.draft_s += std::mem::take(&mut cycle.catch_up_s);
        }
        self.last = strategy;
        cycle.waiting.iter().for_each(|id| self.left(*id));
        for answer in &cycle.ended {
            self.ended(answer);
        }
        lock(&speculator.watchdog).observe(self.version, watched(&cycle));
        let seconds = began.elapsed().as_secs_f64();
        if cycle.prefilled > 0 || !cycle.waiting.is_empty() {
            return Ok(Drafted { cycle, strategy, seconds, plain_s: None, version: self.version });
        }
        let Cycle { requests, rows, catch_up_s, draft_s, promised, .. } = cycle;
        let tokens = cycle.tokens as u64;
        let mut controller = lock(&speculator.controller);
        controller.observe(
            batch,
            strategy,
            Measured { tokens, promised, requests, rows, seconds, catch_up_s, draft_s },
        );
        // A plain cycle took what a plain cycle takes, whatever held it up.
        let plain_s = match strategy {
            None => Some(seconds),
            Some(_) => controller.plain_rate(batch).map(|rate| tokens as f64 / rate),
        };
        drop(controller);
        Ok(Drafted { cycle, strategy, seconds, plain_s, version: self.version })
    }

    /// Hot swap between two cycles: only the learned drafter is replaced.
    fn swap(&mut self) -> Result<()> {
        if self.speculator.version() == self.version {
            return Ok(());
        }
        let earlier = std::mem::take(&mut self.drafters);
        (self.drafters, self.version) =
            self.speculator.drafters((&self.vocabulary, self.temperature), &self.pool, earlier)?;
        Ok(())
    }

    fn decode(&mut self, decoder: &mut Decoder, strategy: Option<Strategy>) -> Result<Cycle> {
        let suffix = strategy.filter(|s| s.suffix > 0).and_then(|_| self.speculator.plan.suffix());
        let mut hybrid;
        let drafter: Option<&mut dyn Drafter> = match (strategy, suffix) {
            (Some(s), Some(suffix)) => match self.drafters.get_disjoint_mut([suffix, s.drafter]) {
                Ok([Some(suffix), Some(learned)]) => {
                    hybrid = Hybrid::new(suffix.as_mut(), learned.as_mut());
                    Some(&mut hybrid)
                }
                _ => None,
            },
            (Some(s), None) => self.drafters[s.drafter].as_deref_mut().map(|drafter| drafter as &mut dyn Drafter),
            (None, _) => None,
        };
        match drafter.zip(strategy.as_ref()) {
            Some((drafter, strategy)) if !self.is_coupled => {
                Ok(decoder.cycle(Some((&mut Uncoupled(drafter), strategy)))?)
            }
            draft => Ok(decoder.cycle(draft)?),
        }
    }

    /// A request goes on on another device.
    pub(crate) fn left(&mut self, id: u64) {
        self.drafters.iter_mut().flatten().for_each(|drafter| drafter.left(id));
    }

    fn ended(&mut self, answer: &Answer) {
        for drafter in self.drafters.iter_mut().flatten() {
            drafter.ended(answer.id, &answer.tokens, answer.prompt);
        }
    }
}

/// What a cycle shows of the learned drafter.
fn watched(cycle: &Cycle) -> Watched {
    let Cycle { requests, guessed, deepest, draft_s, target_s, .. } = *cycle;
    Watched { batch: requests, guessed, timed: (cycle.prefilled == 0).then_some((deepest, draft_s, target_s)) }
}

#[cfg(test)]
mod tests;
