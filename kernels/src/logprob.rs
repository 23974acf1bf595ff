//! Log-probability of chosen tokens without keeping `(r, vocabulary)` logits: rows go through the head in chunks.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::dispatch::simd;
use crate::linear;
use crate::math;
use crate::tensor::{copied, output, tensor, values};

const ROWS: usize = 48;

/// `log softmax(h Wᵀ / T)[target]` of each row: h `(r, k)`, packed head with n outputs; result `(r)`.
/// `inverse_temperature` is 1/T. Differentiable in both.
///
/// # Errors
/// If shapes do not fit or a target is outside the vocabulary.
pub fn log_probs(
    hidden: &Tensor,
    head: &Tensor,
    n: usize,
    targets: Vec<u32>,
    inverse_temperature: f32,
) -> Result<Tensor> {
    hidden.apply_op2(head, LogProbs { n, targets: Arc::new(targets), inverse_temperature })
}

struct LogProbs {
    n: usize,
    targets: Arc<Vec<u32>>,
    inverse_temperature: f32,
}

impl CustomOp2 for LogProbs {
    fn name(&self) -> &'static str {
        "log_probs"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = l1.shape().dims2()?;
        if rows != self.targets.len() || l2.shape().dims3()?.1 != k {
            bail!("log_probs: hidden {:?}, head {:?}, {} targets", l1.shape(), l2.shape(), self.targets.len());
        }
        if let Some(t) = self.targets.iter().find(|t| **t as usize >= self.n) {
            bail!("log_probs: token {t} is outside a vocabulary of {}", self.n);
        }
        let (hidden, head) = (values(s1, l1, "log_probs")?, values(s2, l2, "log_probs")?);
        let mut result = Vec::with_capacity(rows);
        for (h, targets) in hidden.chunks(ROWS * k).zip(self.targets.chunks(ROWS)) {
            let logits = self.logits(h, head, k);
            result.extend(
                logits.chunks_exact(self.n).zip(targets).map(|(l, t)| log_prob(l, *t, self.inverse_temperature)),
            );
        }
        Ok(output(result, rows))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (h, w, g) = (copied(hidden)?, copied(head)?, copied(grad)?);
        let k = hidden.dim(1)?;
        let (mut dh, mut dw) = (Vec::with_capacity(h.len()), vec![0.0; w.len()]);
        for ((h, g), targets) in h.chunks(ROWS * k).zip(g.chunks(ROWS)).zip(self.targets.chunks(ROWS)) {
            let mut d = self.logits(h, &w, k);
            for ((d, g), t) in d.chunks_exact_mut(self.n).zip(g).zip(targets) {
                logits_gradient(d, *t, self.inverse_temperature, *g);
            }
            dh.extend(linear::input_gradient(&d, &w, g.len(), k, self.n));
            linear::weight_gradient(h, &d, &mut dw, g.len(), k, self.n);
        }
        Ok((Some(tensor(dh, hidden.shape())?), Some(tensor(dw, head.shape())?)))
    }
}

impl LogProbs {
    fn logits(&self, hidden: &[f32], head: &[f32], k: usize) -> Vec<f32> {
        let rows = hidden.len() / k;
        let mut logits = vec![0.0; rows * self.n];
        linear::product(hidden, head, &mut logits, rows, k, self.n);
        logits
    }
}

simd! {
    /// `log softmax(logits / T)[target]`.
    #[must_use]
    pub fn log_prob(logits: &[f32], target: u32, inverse_temperature: f32) -> f32 {
        let (max, sum) = partition(logits, inverse_temperature);
        (logits[target as usize] * inverse_temperature - max) - math::ln(sum)
    }
}

simd! {
    /// Replaces logits by `g d log_prob(target) / d logits`.
    fn logits_gradient(logits: &mut [f32], target: u32, inverse_temperature: f32, g: f32) {
        let (max, sum) = partition(logits, inverse_temperature);
        let scale = -g * inverse_temperature / sum;
        for l in logits.iter_mut() {
            *l = scale * math::exp(*l * inverse_temperature - max);
        }
        logits[target as usize] += g * inverse_temperature;
    }
}

/// Largest scaled logit, and the sum of exponentials relative to it.
#[inline(always)]
fn partition(logits: &[f32], inverse_temperature: f32) -> (f32, f32) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(l * inverse_temperature));
    (max, math::lane_sum(logits.len(), |i| math::exp(logits[i] * inverse_temperature - max)))
}
