//! The loss of what a drafter says ahead, and its gradients.

use std::iter::successors;

use kernels::{Pool, Turned, input_gradient, softmax};
use state::plan::NetworkKind;

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
    (vocabulary, kind): (&Vocabulary, NetworkKind),
    gradients: &mut Gradients,
) -> f64 {
    let mut passes = batch.forward(pool, network, vocabulary);
    // The head runs once over the guesses of all levels.
    let used: Vec<Vec<f32>> = passes.iter().enumerate().map(|(level, p)| batch.used(level, &p.predicted)).collect();
    let predicted = used.concat();
    let weights: Vec<f32> = successors(Some(1.0), |weight| Some(weight * DECAY)).take(passes.len()).collect();
    let guesses: Vec<Guess> =
        weights.iter().enumerate().flat_map(|(level, w)| batch.wanted(level).map(|d| (d, *w))).collect();
    let by_entropy = match kind {
        NetworkKind::Eagle => CROSS_ENTROPY,
        NetworkKind::Eagle3 => 1.0,
    };
    let mut d = vec![0.0; predicted.len()];
    let (entropy, read) = entropy(pool, batch, vocabulary, (&network.leave(pool, &predicted), &guesses), by_entropy);
    network.leave_backward(pool, (&predicted, &read), &mut d, gradients);
    let regression = match kind {
        NetworkKind::Eagle => regression(batch, &predicted, &guesses, &mut d),
        NetworkKind::Eagle3 => 0.0,
    };
    let (mut rest, mut slopes) = (d.as_slice(), Vec::new());
    for (level, pass) in passes.iter().enumerate() {
        let (own, later) = rest.split_at(used[level].len());
        let mut all = vec![0.0; pass.predicted.len()];
        batch.place(level, own, &mut all);
        slopes.push(all);
        rest = later;
    }
    backward(pool, batch, (network, vocabulary), &mut passes, slopes, gradients);
    entropy + regression
}

/// A guess: which drawn token it is to be, and its weight.
type Guess = (usize, f32);

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
            Some(above) => kernels::add(above, &network.by_entered(pool, &here[0])),
            None => network.enter_backward(pool, batch.kept(), &here[0], gradients),
        }
    }
}

/// Cross-entropy of the drafted tokens that the head reads from `read` against those that it reads from the true hidden states,
/// and its derivative by `read`.
fn entropy(
    pool: &Pool,
    batch: &Batch,
    vocabulary: &Vocabulary,
    (read, guesses): (&[f32], &[Guess]),
    weight: f32,
) -> (f64, Vec<f32>) {
    let vocab = vocabulary.size();
    let (mut chances, mut found, mut entropy) = (Vec::new(), Vec::new(), 0.0);
    vocabulary.logits_into(pool, batch.last(), &mut chances);
    for chances in chances.chunks_exact_mut(vocab) {
        if pool.is_interrupted() {
            break;
        }
        softmax(chances);
    }
    vocabulary.logits_into(pool, read, &mut found);
    for (found, (drawn, own)) in found.chunks_exact_mut(vocab).zip(guesses) {
        if pool.is_interrupted() {
            break;
        }
        let (wanted, scale) = (&chances[drawn * vocab..][..vocab], weight * own);
        // -Σ w ln softmax(l) = ln Σ exp(l) - Σ w l, and the first is what softmax took off the likeliest.
        let (most, at) = largest(found);
        let mean: f64 = wanted.iter().zip(&*found).map(|(w, logit)| f64::from(w * (logit - most))).sum();
        softmax(found);
        entropy -= f64::from(scale) * (mean + f64::from(found[at].max(f32::MIN_POSITIVE)).ln());
        found.iter_mut().zip(wanted).for_each(|(found, wanted)| *found = (*found - wanted) * scale);
    }
    let mut d = vec![0.0; read.len()];
    input_gradient(pool, &found, vocabulary.head(), &mut d, false, &mut Turned::default());
    (entropy, d)
}

/// The largest number and its place.
fn largest(values: &[f32]) -> (f32, usize) {
    let pairs = values.iter().copied().zip(0..);
    pairs.fold((f32::NEG_INFINITY, 0), |most, next| if next.0 > most.0 { next } else { most })
}

/// SmoothL1 of hidden states, their mean; adds its derivative to `d`.
fn regression(batch: &Batch, predicted: &[f32], guesses: &[Guess], d: &mut [f32]) -> f64 {
    let width = predicted.len() / guesses.len().max(1);
    let mut sum = 0.0;
    let rows = d.chunks_exact_mut(width).zip(predicted.chunks_exact(width));
    for ((d, predicted), (drawn, weight)) in rows.zip(guesses) {
        let (wanted, scale) = (&batch.last()[drawn * width..][..width], weight / width as f32);
        for ((d, predicted), wanted) in d.iter_mut().zip(predicted).zip(wanted) {
            let difference = predicted - wanted;
            // d² / 2 below 1, d - 1/2 above: its slope is the smaller of d and 1.
            let near = difference.clamp(-1.0, 1.0);
            sum += f64::from(scale * near * (difference - near * 0.5));
            *d += near * scale;
        }
    }
    sum
}
