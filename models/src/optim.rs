//! AdamW with saveable moments, over packed parameters. Every sum runs in the order of the layout.

use state::plan::{Optimizer, Schedule};

use crate::error::Result;
use crate::load::RawWeights;
use crate::weights::Weights;

const EPSILON: f32 = 1e-8;

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
pub fn norm(gradients: &Gradients) -> f64 {
    gradients.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt()
}

/// Adds `other` to `gradients`, element by element.
pub fn add(gradients: &mut Gradients, other: &Gradients) {
    for (to, from) in gradients.iter_mut().zip(other) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
}

/// Sum of micro-batches as a balanced binary tree over their indices: the same bits however they were spread.
#[must_use]
pub fn tree_sum(mut parts: Vec<Gradients>) -> Gradients {
    while parts.len() > 1 {
        let mut sums = Vec::with_capacity(parts.len().div_ceil(2));
        let mut rest = parts.into_iter();
        while let Some(mut left) = rest.next() {
            if let Some(right) = rest.next() {
                add(&mut left, &right);
            }
            sums.push(left);
        }
        parts = sums;
    }
    parts.pop().unwrap_or_default()
}

impl AdamW {
    /// No moments yet.
    #[must_use]
    pub fn new(weights: &Weights) -> Self {
        let zeros = weights.zeros();
        Self { steps: 0, first: zeros.clone(), second: zeros }
    }

    /// One step: new weights from the old and their gradients, clipped to `clip_norm`. Returns the norm before clipping.
    ///
    /// # Errors
    /// If a tensor cannot be read or made.
    pub fn step(
        &mut self,
        weights: &Weights,
        gradients: &Gradients,
        optimizer: &Optimizer,
        lr: f64,
    ) -> Result<(Weights, f64)> {
        self.steps += 1;
        let norm = norm(gradients);
        let scale = if norm > optimizer.clip_norm { optimizer.clip_norm / norm } else { 1.0 };
        let mut values = weights.packed_values()?;
        let is_matrix: Vec<bool> = weights.matrices().collect();
        for (i, values) in values.iter_mut().enumerate() {
            let decay = if is_matrix[i] { optimizer.weight_decay } else { 0.0 };
            let rule = Rule::new(optimizer, lr, decay, scale, self.steps);
            rule.apply(values, &gradients[i], &mut self.first[i], &mut self.second[i]);
        }
        Ok((weights.replaced(values)?, norm))
    }

    /// Moments as a checkpoint holds them, in packed form.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        let mut raw = RawWeights::default();
        for (name, moments) in [("first", &self.first), ("second", &self.second)] {
            for (i, values) in moments.iter().enumerate() {
                raw.tensors.insert(format!("{name}.{i}"), (vec![values.len()], values.clone()));
            }
        }
        // Exact in f32 up to 2^24 steps.
        raw.tensors.insert("steps".into(), (vec![1], vec![self.steps as f32]));
        raw
    }

    /// Moments of a checkpoint of the same weights.
    ///
    /// # Errors
    /// If one is missing or of another size.
    pub fn from_raw(weights: &Weights, raw: &RawWeights) -> Result<Self> {
        let take = |name: String, len: usize| -> Result<Vec<f32>> {
            let missing =
                || crate::Error::MissingTensor { name: name.clone(), place: "the checkpoint's moments".into() };
            let (shape, values) = raw.tensors.get(&name).ok_or_else(missing)?;
            if values.len() == len {
                return Ok(values.clone());
            }
            Err(crate::Error::TensorShape { name, found: shape.clone(), expected: vec![len] })
        };
        let moments = |kind: &str| -> Result<Gradients> {
            weights.packed_lengths().enumerate().map(|(i, n)| take(format!("{kind}.{i}"), n)).collect()
        };
        let steps = take("steps".into(), 1)?[0] as u64;
        Ok(Self { steps, first: moments("first")?, second: moments("second")? })
    }
}

/// The update of one element, with everything that is the same for all.
struct Rule {
    beta1: f32,
    beta2: f32,
    scale: f32,
    keep: f32,
    rate: f32,
    second_correction: f32,
}

impl Rule {
    fn new(optimizer: &Optimizer, lr: f64, decay: f64, scale: f64, steps: u64) -> Self {
        let (beta1, beta2) = optimizer.betas;
        let power = i32::try_from(steps).unwrap_or(i32::MAX);
        Self {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            scale: scale as f32,
            keep: (1.0 - lr * decay) as f32,
            rate: (lr / (1.0 - beta1.powi(power))) as f32,
            second_correction: (1.0 / (1.0 - beta2.powi(power))) as f32,
        }
    }

    fn apply(&self, values: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((value, gradient), m), v) in values.iter_mut().zip(gradients).zip(first).zip(second) {
            let gradient = gradient * self.scale;
            *m = self.beta1 * *m + (1.0 - self.beta1) * gradient;
            *v = self.beta2 * *v + (1.0 - self.beta2) * gradient * gradient;
            *value = *value * self.keep - self.rate * *m / ((*v * self.second_correction).sqrt() + EPSILON);
        }
    }
}
