//! AdamW with saveable moments, over packed parameters. Every sum runs in the order of the layout.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use kernels::{AdamRule, AdamTensor, Pool, Storage, adam_step, approach, sum_of_squares};
use state::plan::{Optimizer, Schedule};

use crate::error::Result;
use crate::load::RawWeights;
use crate::weights::Weights;

/// Gradients of all parameters, in the order and packing of their weights.
pub type Gradients = Vec<Vec<f32>>;

/// Moments of AdamW (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    steps: u64,
    first: Gradients,
    second: Gradients,
}

/// Learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule.
#[must_use]
pub fn learning_rate(optimizer: &Optimizer, step: usize, steps: usize) -> f64 {
    if step < optimizer.warmup {
        return optimizer.lr * (step + 1) as f64 / optimizer.warmup as f64;
    }
    match optimizer.schedule {
        Schedule::Constant => optimizer.lr,
        Schedule::Cosine => {
            let done = (step - optimizer.warmup) as f64 / (steps - optimizer.warmup).max(1) as f64;
            optimizer.lr * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * done).cos()))
        }
    }
}

/// Euclidean norm over all gradients.
#[must_use]
pub fn norm(pool: &Pool, gradients: &Gradients) -> f64 {
    gradients.iter().map(|values| sum_of_squares(pool, values)).sum::<f64>().sqrt()
}

/// Adds `other` to `gradients`, element by element.
pub fn add(gradients: &mut Gradients, other: &Gradients) {
    gradients.iter_mut().zip(other).for_each(|(to, from)| kernels::add(to, from));
}

/// Sum of micro-batches as a balanced binary tree over their indices: the same bits however they were spread and whenever
/// they arrive. Neighbours are added as soon as both are there: if they come in order, no more sums wait than the tree has levels.
#[derive(Debug)]
pub struct TreeSum {
    parts: usize,
    /// By level, from the micro-batches up, and index.
    waiting: BTreeMap<(usize, usize), Gradients>,
}

impl TreeSum {
    /// Nothing yet of so many micro-batches.
    #[must_use]
    pub fn new(parts: usize) -> Self {
        Self { parts, waiting: BTreeMap::new() }
    }

    /// Takes in one micro-batch; returns those that were added to others, to be used again.
    pub fn insert(&mut self, part: usize, mut sum: Gradients) -> Vec<Gradients> {
        let mut spare = Vec::new();
        let (mut level, mut index, mut width) = (0, part, self.parts);
        while width > 1 {
            let neighbour = index ^ 1;
            // The last one of an odd number goes up alone.
            if neighbour < width {
                let Some(mut other) = self.waiting.remove(&(level, neighbour)) else { break };
                // The left one plus the right one.
                if neighbour < index {
                    std::mem::swap(&mut sum, &mut other);
                }
                add(&mut sum, &other);
                spare.push(other);
            }
            (level, index, width) = (level + 1, index / 2, width.div_ceil(2));
        }
        self.waiting.insert((level, index), sum);
        spare
    }

    /// The sum of all, once they are there.
    pub fn take(&mut self) -> Option<Gradients> {
        let levels = self.parts.max(1).next_power_of_two().trailing_zeros() as usize;
        self.waiting.remove(&(levels, 0))
    }
}

impl AdamW {
    /// No moments yet.
    #[must_use]
    pub fn new(weights: &Weights) -> Self {
        let zeros = weights.zeros();
        Self { steps: 0, first: zeros.clone(), second: zeros }
    }

    /// One step: new weights from the old and their gradients, which are `factor` times what is given, clipped to `clip_norm`, in the
    /// memory of the gradients. Returns the norm before clipping.
    pub fn step(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        gradients: (Gradients, f64),
        optimizer: &Optimizer,
        lr: f64,
    ) -> (Weights, f64) {
        let mut stride = self.begin(pool, weights, gradients, (optimizer, lr));
        loop {
            if let Some(weights) = self.advance(pool, &mut stride) {
                return (weights, stride.norm);
            }
        }
    }

    /// Begins what [`AdamW::step`] does at once. Until it is over, some moments are those before it and some those after it.
    pub(crate) fn begin(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        (gradients, factor): (Gradients, f64),
        (optimizer, lr): (&Optimizer, f64),
    ) -> Stride {
        assert_eq!(gradients.len(), weights.masters().len(), "a gradient for each parameter");
        let norm = factor * norm(pool, &gradients);
        let scale = factor * if norm > optimizer.clip_norm { optimizer.clip_norm / norm } else { 1.0 };
        let (old, gradients, optimizer) = (weights.clone(), gradients.into(), optimizer.clone());
        Stride { old, gradients, masters: Vec::new(), rounded: Vec::new(), optimizer, lr, scale, norm }
    }

    /// Takes one more parameter through it; the new weights, once it was the last one.
    pub(crate) fn advance(&mut self, pool: &Pool, stride: &mut Stride) -> Option<Weights> {
        let Stride { old, gradients, masters, rounded, optimizer, lr, scale, .. } = stride;
        let i = masters.len();
        // One that is begun and left out changes nothing.
        self.steps += u64::from(i == 0);
        if let Some(mut new) = gradients.pop_front() {
            let features = old.features(i);
            let decay = if features.is_some() { optimizer.weight_decay } else { 0.0 };
            let rounds = features.filter(|_| old.storage() == Storage::Bf16);
            let mut halves = vec![0; if rounds.is_some() { new.len() } else { 0 }];
            let tensor = AdamTensor {
                old: &old.masters()[i],
                new: &mut new,
                first: &mut self.first[i],
                second: &mut self.second[i],
                rounded: rounds.map(|features| (halves.as_mut_slice(), features)),
            };
            adam_step(pool, rule(optimizer, *lr, decay, *scale, self.steps), tensor);
            masters.push(new);
            rounded.push(halves);
        }
        gradients.is_empty().then(|| old.replaced(std::mem::take(masters), std::mem::take(rounded)))
    }

    /// Moments as a checkpoint holds them, in packed form.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        let mut raw = RawWeights::default();
        keep(&mut raw, "first", &self.first);
        keep(&mut raw, "second", &self.second);
        // Exact in f32 up to 2^24 steps.
        raw.tensors.insert("steps".into(), (vec![1], vec![self.steps as f32]));
        raw
    }

    /// Moments of a checkpoint of the same weights.
    ///
    /// # Errors
    /// If one is missing or of another size.
    pub fn from_raw(weights: &Weights, raw: &RawWeights) -> Result<Self> {
        let steps = take(raw, "steps".into(), 1)?[0] as u64;
        Ok(Self { steps, first: kept(weights, raw, "first")?, second: kept(weights, raw, "second")? })
    }
}

/// Mean of weights over their last steps, newer ones counting for more. At a constant learning rate steps wander about a place that none
/// of them hits: their mean is nearer to it (Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging").
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Average {
    /// A version that was made of them shares them until they move on: making one copies nothing.
    masters: Vec<Arc<Vec<f32>>>,
    /// Steps in it.
    steps: u32,
    /// The parameter whose newest numbers are taken in next.
    next: usize,
}

impl Average {
    /// Steps that count, about.
    const SPAN: f32 = 100.0;

    /// Of weights that took no step yet, and are forgotten soon.
    pub(crate) fn new(weights: &Weights) -> Self {
        let masters = weights.masters().to_vec();
        Self { steps: 0, next: masters.len(), masters }
    }

    /// Of weights that are such a mean themselves, of so many steps, of which there may be enough.
    pub(crate) fn of_mean(weights: &Weights, steps: Option<u32>) -> Self {
        let enough = Self::SPAN as u32 * 9;
        Self { steps: steps.map_or(enough, |steps| steps.min(enough)), ..Self::new(weights) }
    }

    /// Steps in it.
    pub(crate) fn steps(&self) -> u32 {
        self.steps
    }

    /// There is another step to be taken in.
    pub(crate) fn begin(&mut self) {
        self.next = 0;
        self.steps = self.steps.saturating_add(1);
    }

    /// Takes in one more parameter of the step that was begun; whether there was one.
    pub(crate) fn advance(&mut self, pool: &Pool, weights: &Weights) -> bool {
        let Some(mean) = self.masters.get_mut(self.next) else { return false };
        // The first ones are worth little: the last tenth of the steps counts, until there are enough.
        let share = (9.0 / (9.0 + self.steps as f32)).max(1.0 / Self::SPAN);
        approach(pool, Arc::make_mut(mean).as_mut_slice(), &weights.masters()[self.next], share);
        self.next += 1;
        true
    }

    /// The mean so far, of weights like these.
    pub(crate) fn mean(&self, like: &Weights) -> Mean {
        Mean { like: like.clone(), masters: self.masters.clone() }
    }

    /// As a checkpoint holds it, in packed form.
    pub(crate) fn to_raw(&self) -> RawWeights {
        let mut raw = RawWeights::default();
        keep(&mut raw, "average", self.masters.iter().map(|master| &**master));
        // Exact in f32 up to 2^24 steps.
        raw.tensors.insert("averaged".into(), (vec![1], vec![self.steps as f32]));
        raw
    }

    /// Of a checkpoint of the same weights.
    pub(crate) fn from_raw(weights: &Weights, raw: &RawWeights) -> Result<Self> {
        let masters: Vec<_> = kept(weights, raw, "average")?.into_iter().map(Arc::new).collect();
        Ok(Self { steps: take(raw, "averaged".into(), 1)?[0] as u32, next: masters.len(), masters })
    }
}

/// A mean of weights at some moment. To have it costs nothing.
#[derive(Debug, Clone)]
pub struct Mean {
    like: Weights,
    masters: Vec<Arc<Vec<f32>>>,
}

impl Mean {
    /// Weights to compute with, which may be rounded.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.like.with_masters(self.masters.clone())
    }
}

/// Puts numbers in the packing of weights into a checkpoint, under names of a kind.
fn keep<'a>(raw: &mut RawWeights, kind: &str, all: impl IntoIterator<Item = &'a Vec<f32>>) {
    for (i, values) in all.into_iter().enumerate() {
        raw.tensors.insert(format!("{kind}.{i}"), (vec![values.len()], values.clone()));
    }
}

/// What [`keep`] kept.
fn kept(weights: &Weights, raw: &RawWeights, kind: &str) -> Result<Gradients> {
    weights.masters().iter().enumerate().map(|(i, m)| take(raw, format!("{kind}.{i}"), m.len())).collect()
}

const MOMENTS: &str = "the checkpoint's moments";

fn take(raw: &RawWeights, name: String, len: usize) -> Result<Vec<f32>> {
    let missing = || crate::Error::MissingTensor { name: name.clone(), place: MOMENTS.into() };
    let (shape, values) = raw.tensors.get(&name).ok_or_else(missing)?;
    if values.len() == len {
        return Ok(values.clone());
    }
    Err(crate::Error::shape(name, shape, &[len], MOMENTS))
}

/// A step that is being taken, parameter by parameter.
#[derive(Debug, Clone)]
pub(crate) struct Stride {
    old: Weights,
    /// Of the parameters to come.
    gradients: VecDeque<Vec<f32>>,
    masters: Gradients,
    rounded: Vec<Vec<u16>>,
    optimizer: Optimizer,
    lr: f64,
    /// Of gradients, with clipping.
    scale: f64,
    /// Before clipping.
    pub(crate) norm: f64,
}

fn rule(optimizer: &Optimizer, lr: f64, decay: f64, scale: f64, steps: u64) -> AdamRule {
    let (beta1, beta2) = optimizer.betas;
    let power = i32::try_from(steps).unwrap_or(i32::MAX);
    AdamRule {
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        scale: scale as f32,
        keep: (1.0 - lr * decay) as f32,
        rate: (lr / (1.0 - beta1.powi(power))) as f32,
        second_correction: (1.0 / (1.0 - beta2.powi(power))) as f32,
    }
}
