//! The loss of what a drafter says ahead, and its gradients.

use kernels::{Pool, Turned, input_gradient, softmax};
use state::plan::Network as Kind;

use super::batch::Batch;
use crate::drafter::Vocabulary;
use crate::drafter::network::{Network, Pass};
use crate::optim::Gradients;

/// Weight of the cross-entropy beside SmoothL1.
const CROSS_ENTROPY: f32 = 0.1;
/// Weight of a level against the one above it.
const DECAY: f32 = 0.8;

/// The loss, summed over all guesses; its gradients are added to `gradients`.
pub(super) fn gradient(
    pool: &Pool,
    batch: &Batch,
    network: &Network,
    (vocabulary, kind): (&Vocabulary, Kind),
    gradients: &mut Gradients,
) -> f64 {
    let mut passes = batch.forward(pool, network, vocabulary);
    let wanted = Wanted::new(pool, batch, vocabulary, kind);
    let (mut loss, mut weight, mut slopes) = (0.0, 1.0, Vec::new());
    for (level, pass) in passes.iter().enumerate() {
        let (own, slope) = wanted.level(pool, level, weight, (network, pass), gradients);
        loss += own;
        slopes.push(slope);
        weight *= std::env::var("DECAY").map_or(DECAY, |v| v.parse().unwrap());
    }
    backward(pool, batch, (network, vocabulary), &mut passes, slopes, gradients);
    loss
}

/// From the gradients by each level's predictions, the last level first: a prediction is what the next level stands on.
fn backward(
    pool: &Pool,
    batch: &Batch,
    (network, vocabulary): (&Network, &Vocabulary),
    passes: &mut [Pass],
    mut slopes: Vec<Vec<f32>>,
    gradients: &mut Gradients,
) {
    let zeros = |pass: &Pass| pass.values.keys_values().map(|rows| vec![0.0; rows.len()]);
    let mut by: Vec<[Vec<f32>; 2]> = passes.iter().map(zeros).collect();
    for level in (0..passes.len()).rev() {
        let (above, here) = passes.split_at_mut(level);
        let mut attention = batch.ahead(pool, above, &mut by[..=level]);
        let d = &mut slopes[level];
        let rows = (batch.rows(level, vocabulary), &mut attention as &mut dyn crate::layer::Attention);
        network.predict_backward(pool, &mut here[0], rows, d, gradients);
        let (above, here) = slopes.split_at_mut(level);
        match above.last_mut() {
            Some(above) => kernels::add(above, &here[0]),
            None => network.enter_backward(pool, batch.kept(), &here[0], gradients),
        }
    }
}

/// What the guesses should be.
struct Wanted<'a> {
    batch: &'a Batch,
    vocabulary: &'a Vocabulary,
    kind: Kind,
    /// Probabilities of the drafted tokens under the target, for each drawn token.
    chances: Vec<f32>,
}

impl<'a> Wanted<'a> {
    fn new(pool: &Pool, batch: &'a Batch, vocabulary: &'a Vocabulary, kind: Kind) -> Self {
        let mut chances = Vec::new();
        vocabulary.logits_into(pool, batch.last(), &mut chances);
        chances.chunks_exact_mut(vocabulary.size()).for_each(softmax);
        Self { batch, vocabulary, kind, chances }
    }

    /// A level's part of the loss, and its derivative by all its predictions.
    fn level(
        &self,
        pool: &Pool,
        level: usize,
        weight: f32,
        (network, pass): (&Network, &Pass),
        gradients: &mut Gradients,
    ) -> (f64, Vec<f32>) {
        let predicted = self.batch.used(level, &pass.predicted);
        let (by_entropy, by_states) = match self.kind {
            Kind::Eagle => (
                weight * std::env::var("CE").map_or(CROSS_ENTROPY, |v| v.parse().unwrap()),
                weight * std::env::var("REG").map_or(1.0, |v| v.parse().unwrap()),
            ),
            Kind::Eagle3 => (weight, 0.0),
        };
        let mut d = vec![0.0; predicted.len()];
        let (entropy, read) = self.entropy(pool, level, &network.leave(pool, &predicted), by_entropy);
        network.leave_backward(pool, (&predicted, &read), &mut d, gradients);
        let regression = if by_states > 0.0 { self.regression(level, &predicted, by_states, &mut d) } else { 0.0 };
        let mut all = vec![0.0; pass.predicted.len()];
        self.batch.place(level, &d, &mut all);
        (entropy + regression, all)
    }

    /// Cross-entropy of the drafted tokens that the head reads from `read` against those that it reads from the true hidden
    /// states, and its derivative by `read`.
    fn entropy(&self, pool: &Pool, level: usize, read: &[f32], weight: f32) -> (f64, Vec<f32>) {
        let vocab = self.vocabulary.size();
        let (mut found, mut entropy) = (Vec::new(), 0.0);
        self.vocabulary.logits_into(pool, read, &mut found);
        for (found, drawn) in found.chunks_exact_mut(vocab).zip(self.batch.wanted(level)) {
            if pool.is_interrupted() {
                break;
            }
            softmax(found);
            for (wanted, found) in self.chances[drawn * vocab..][..vocab].iter().zip(found) {
                entropy -= f64::from(*wanted) * f64::from(found.max(f32::MIN_POSITIVE)).ln();
                *found = (*found - wanted) * weight;
            }
        }
        let mut d = vec![0.0; read.len()];
        input_gradient(pool, &found, self.vocabulary.head(), &mut d, false, &mut Turned::default());
        (entropy * f64::from(weight), d)
    }

    /// SmoothL1 of hidden states, their mean; adds its derivative to `d`.
    fn regression(&self, level: usize, predicted: &[f32], weight: f32, d: &mut [f32]) -> f64 {
        let width = self.vocabulary.head().k();
        let scale = weight / width as f32;
        let mut sum = 0.0;
        let rows = d.chunks_exact_mut(width).zip(predicted.chunks_exact(width));
        for ((d, predicted), drawn) in rows.zip(self.batch.wanted(level)) {
            let wanted = &self.batch.last()[drawn * width..][..width];
            for ((d, predicted), wanted) in d.iter_mut().zip(predicted).zip(wanted) {
                let difference = predicted - wanted;
                // d² / 2 below 1, d - 1/2 above: its slope is the smaller of d and 1.
                let near = difference.clamp(-1.0, 1.0);
                sum += f64::from(near * (difference - near * 0.5));
                *d += near * scale;
            }
        }
        sum * f64::from(scale)
    }
}
