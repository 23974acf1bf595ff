//! An update in progress: micro-batches to devices in any order, then one of them takes the step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use models::Target;
use state::device;
use state::plan::{Grpo, Optimizer, Part, Sft};

use super::{Activity, State};
use crate::engine::Command;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::speculator::lock;
use crate::update::{Item, Objective, Sums, Update};

pub(crate) struct Updating {
    update: Arc<Update>,
    pending: VecDeque<usize>,
    /// Micro-batch of each busy device; none if it is of a sum that was given up.
    doing: BTreeMap<usize, Option<usize>>,
    done: usize,
    finisher: Option<usize>,
    /// Seconds since the step began.
    began_s: f64,
}

impl Updating {
    /// Whether all micro-batches are in, and no device is busy with a sum that was given up: the step must not end before it does.
    fn is_summed(&self) -> bool {
        self.done == self.update.parts.len() && self.doing.is_empty()
    }
}

impl State {
    pub(super) fn begin_sft(&mut self, sft: &Sft) -> Result<()> {
        let (first, _) = self.cursor();
        let item = |i: u64| -> Result<Item> {
            let sequence = self.job.solution(&self.job.dataset.problem(i))?;
            Ok(Item { sequence, recorded: Vec::new(), advantage: 0.0 })
        };
        let items: Vec<Option<Item>> =
            (first..first + sft.batch as u64).map(|i| Ok(Some(item(i)?))).collect::<Result<_>>()?;
        self.metrics.tokens = items.iter().flatten().map(|i| i.sequence.answer().len() as u64).sum();
        self.begin_update(Objective::Likelihood, items, sft.micro_batch, 1.0, (&sft.optimizer, sft.part))
    }

    pub(super) fn begin_policy_update(&mut self, grpo: &Grpo, items: Vec<Option<Item>>) {
        let job = self.job.clone();
        let reference = match grpo.kl == 0.0 {
            true => None,
            // The weights that the run started from.
            false => match Target::new(&job.config, &job.initial, &job.rope) {
                Ok(target) => Some(Arc::new(target)),
                Err(error) => return self.give_up(Error::Model(error)),
            },
        };
        let objective = Objective::Reward { grpo: grpo.clone(), reference };
        let temperature = job.plan.sampling.temperature;
        let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
        if let Err(error) = self.begin_update(objective, items, grpo.micro_batch, inverse, (&grpo.optimizer, grpo.part))
        {
            self.give_up(error);
        }
    }

    fn begin_update(
        &mut self,
        objective: Objective,
        items: Vec<Option<Item>>,
        micro_batch: usize,
        inverse_temperature: f32,
        (optimizer, part): (&Optimizer, Part),
    ) -> Result<()> {
        let tokens = items.iter().flatten().map(|i| i.sequence.answer().len()).sum::<usize>().max(1);
        let parts: Vec<Vec<Item>> = items.chunks(micro_batch).map(|c| c.iter().flatten().cloned().collect()).collect();
        let update = Update {
            target: Target::new(&self.job.config, &self.weights, &self.job.rope)?,
            weights: self.weights.clone(),
            objective,
            tokens,
            inverse_temperature,
            optimizer: optimizer.clone(),
            step: (part.begun + self.position.step, part.of),
            adam: self.adam.clone(),
            sums: Sums::new(parts.len()),
            parts: Arc::new(parts),
            outcome: Mutex::new(None),
        };
        let pending = longest_first(&update);
        let began_s = self.began.elapsed().as_secs_f64();
        let update = Arc::new(update);
        self.activity =
            Activity::Updating(Updating { update, pending, doing: BTreeMap::new(), done: 0, finisher: None, began_s });
        (0..self.seats.len()).for_each(|device| self.feed(device));
        Ok(())
    }

    /// Gives an idle device the next micro-batch, or the last duty.
    pub(super) fn feed(&mut self, device: usize) {
        let is_up = self.seats[device].machine.is_up();
        let Activity::Updating(updating) = &mut self.activity else { return };
        if !is_up || updating.doing.contains_key(&device) {
            return;
        }
        let update = updating.update.clone();
        let command = if let Some(part) = updating.pending.pop_front() {
            updating.doing.insert(device, Some(part));
            Command::Compute { update, part }
        } else if updating.is_summed() && updating.finisher.is_none() {
            updating.finisher = Some(device);
            Command::Finish { update }
        } else {
            return;
        };
        self.request(device, device::Event::UpdateRequested, command);
    }

    pub(super) fn computed(&mut self, device: usize, epoch: u64, part: usize) {
        self.note(device, device::Event::UpdateFinished { epoch });
        let Activity::Updating(updating) = &mut self.activity else { return };
        if updating.doing.remove(&device) == Some(Some(part)) {
            updating.done += 1;
            self.observer.tell(Progress::MicroBatches { done: updating.done, total: updating.update.parts.len() });
        }
        self.feed(device);
    }

    /// A lost device may have held a part of the sum: if it was at work, all is done again.
    pub(super) fn updating_without(&mut self, device: usize) {
        let Activity::Updating(updating) = &mut self.activity else { return };
        // Of a sum that was given up before, nothing is missed.
        if updating.doing.remove(&device).flatten().is_some() || updating.finisher == Some(device) {
            updating.finisher = None;
            updating.done = 0;
            updating.update = Arc::new(updating.update.anew());
            updating.pending = longest_first(&updating.update);
            // Others are still busy with the sum that was given up.
            updating.doing.values_mut().for_each(|part| *part = None);
        }
        (0..self.seats.len()).for_each(|device| self.feed(device));
    }

    pub(super) fn updated(&mut self, device: usize, epoch: u64) {
        self.note(device, device::Event::UpdateFinished { epoch });
        let Activity::Updating(updating) = &self.activity else { return };
        let Some(outcome) = lock(&updating.update.outcome).take() else { return };
        let now_s = self.began.elapsed().as_secs_f64();
        self.metrics.update_s = now_s - updating.began_s;
        (self.metrics.loss, self.metrics.kl) = (outcome.loss, outcome.kl);
        (self.metrics.grad_norm, self.metrics.lr) = (outcome.norm, outcome.lr);
        if !outcome.is_finite {
            let (kind, step) = (self.metrics.kind.clone(), self.metrics.begun + self.metrics.step);
            return self.give_up(Error::NotFinite { kind, step, norm: outcome.norm });
        }
        (self.weights, self.adam) = (outcome.weights, outcome.adam);
        self.append_timeline(now_s);
        self.commit();
    }

    /// Adds the update to the picture of the step.
    fn append_timeline(&mut self, now_s: f64) {
        let offset = self.metrics.timeline.iter().flatten().fold(0.0, |end: f64, s| end.max(s.end_s));
        self.metrics.timeline.resize(self.seats.len(), Vec::new());
        for (seat, spans) in self.seats.iter_mut().zip(&mut self.metrics.timeline) {
            spans.extend(seat.timeline.take(now_s).into_iter().filter(|s| s.end_s > offset).map(|mut s| {
                s.start_s = s.start_s.max(offset);
                s
            }));
        }
    }
}

/// Stretches of neighbouring micro-batches, so many at most, that are handed out one after the other.
const STRETCHES_MAX: usize = 8;

/// Micro-batches in the order in which they are handed out: stretches with a long one first, so that no device begins it when
/// the others are done. Within a stretch neighbours follow each other, so that few sums wait. The order of the sum is another
/// one, and fixed.
fn longest_first(update: &Update) -> VecDeque<usize> {
    let count = update.parts.len();
    let width = count.div_ceil(STRETCHES_MAX).next_power_of_two();
    let parts: Vec<usize> = (0..count).collect();
    let mut stretches: Vec<&[usize]> = parts.chunks(width).collect();
    let longest = |stretch: &[usize]| stretch.iter().map(|part| update.tokens_of(*part)).max();
    stretches.sort_by_key(|stretch| std::cmp::Reverse(longest(stretch)));
    stretches.concat().into()
}
