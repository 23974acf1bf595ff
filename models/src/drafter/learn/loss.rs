//! The loss of what a drafter says ahead, and its gradients.

use std::iter::successors;

use kernels::{Pool, Turned, distance, input_gradient, softmax};
use state::plan::NetworkKind;

use super::batch::Batch;
use crate::drafter::Vocabulary;
use crate::drafter::network::{Network, Pass};
use crate::layer;
use crate::optim::Gradients;

/// Weight of what the head makes of predictions beside SmoothL1.
const BESIDE: f32 = 0.1;
/// Share of the total variation in it; the rest is cross-entropy, which also teaches who is far off. A token is accepted as often as
/// the two distributions overlap (Leviathan et al. 2023, section 3.3; with shared noise about as often: Daliri et al. 2024), so where a
/// small network cannot follow the target everywhere, it learns to where that counts (Zhou et al. 2024, "DistillSpec").
const VARIATION: f32 = 0.9;
/// Weight of a level against the one above it.
const DECAY: f32 = 0.8;

/// Memory that calls reuse.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Predictions in use, level after level, and the gradient by them.
    predicted: Vec<f32>,
    d: Vec<f32>,
    head: Head,
    /// Gradients by each level's predictions, its keys and values, and what enters it.
    slopes: Vec<Vec<f32>>,
    by: Vec<[Vec<f32>; 2]>,
    entered: Vec<f32>,
    layer: layer::Gradient,
    turned: Turned,
}

/// What the head reads from true hidden states, and from predictions, and the gradient by what it reads.
#[derive(Debug, Default)]
struct Head {
    chances: Vec<f32>,
    found: Vec<f32>,
    d: Vec<f32>,
    turned: Turned,
}

impl Memory {
    /// Bytes that it holds, about.
    pub(super) fn held(&self) -> usize {
        let Self { predicted, d, head, slopes, by, entered, .. } = self;
        let all = [predicted, d, &head.chances, &head.found, &head.d, entered]
            .into_iter()
            .chain(slopes)
            .chain(by.iter().flatten());
        all.map(|values| values.capacity() * size_of::<f32>()).sum()
    }
}

/// The loss, summed over all guesses; its gradients are added to `gradients`. Nothing if the pool was interrupted.
pub(super) fn gradient(
    pool: &Pool,
    batch: &Batch,
    network: &Network,
    (vocabulary, kind): (&Vocabulary, NetworkKind),
    gradients: &mut Gradients,
    (passes, memory): (&mut Vec<Pass>, &mut Memory),
) -> Option<f64> {
    batch.forward(pool, network, vocabulary, passes)?;
    // The head runs once over the guesses of all levels.
    let Memory { predicted, d, head, slopes, .. } = &mut *memory;
    predicted.clear();
    passes.iter().enumerate().for_each(|(level, p)| batch.used_into(level, &p.predicted, predicted));
    let weights = successors(Some(1.0), |weight| Some(weight * DECAY)).take(passes.len());
    let guesses: Vec<Guess> =
        weights.enumerate().flat_map(|(level, w)| batch.wanted(level).map(move |d| (d, w))).collect();
    let weights = match kind {
        NetworkKind::Eagle => (BESIDE, VARIATION),
        NetworkKind::Eagle3 => (1.0, 0.0),
    };
    let by_head = head.loss(pool, batch, vocabulary, (&network.leave(pool, predicted), &guesses), weights)?;
    zeros(d, predicted.len());
    network.leave_backward(pool, (predicted, &head.d), d, gradients);
    let regression = match kind {
        NetworkKind::Eagle => regression(batch, predicted, &guesses, d),
        NetworkKind::Eagle3 => 0.0,
    };
    let mut rest = d.as_slice();
    slopes.resize_with(passes.len(), Vec::new);
    for ((level, pass), slopes) in passes.iter().enumerate().zip(slopes) {
        let (own, later) = rest.split_at(batch.used_len(level));
        zeros(slopes, pass.predicted.len());
        batch.place(level, own, slopes);
        rest = later;
    }
    backward(pool, batch, (network, vocabulary), passes, memory, gradients)?;
    Some(by_head + regression)
}

/// A guess: which drawn token it is to be, and its weight.
type Guess = (usize, f32);

/// So many zeros, in the same memory.
fn zeros(values: &mut Vec<f32>, len: usize) {
    values.clear();
    values.resize(len, 0.0);
}

/// From the gradients by each level's predictions, the last level first: a prediction is what the next level stands on.
fn backward(
    pool: &Pool,
    batch: &Batch,
    (network, vocabulary): (&Network, &Vocabulary),
    passes: &mut [Pass],
    memory: &mut Memory,
    gradients: &mut Gradients,
) -> Option<()> {
    let Memory { slopes, by, entered, layer, turned, .. } = memory;
    by.resize_with(passes.len(), Default::default);
    for (by, pass) in by.iter_mut().zip(&*passes) {
        by.iter_mut().zip(pass.values.keys_values()).for_each(|(by, rows)| zeros(by, rows.len()));
    }
    for level in (0..passes.len()).rev() {
        pool.goes_on()?;
        let (above, here) = passes.split_at_mut(level);
        let mut attention = batch.ahead((pool, network), above, &mut by[..=level]);
        let d = &mut slopes[level];
        let rows = (batch.rows(level, vocabulary), &mut attention as &mut dyn crate::layer::Attention);
        network.predict_backward(pool, &mut here[0], rows, d, gradients, (layer, turned));
        let (above, here) = slopes.split_at_mut(level);
        match above.last_mut() {
            Some(above) => kernels::add(above, network.by_entered(pool, &here[0], (entered, turned))),
            None => network.enter_backward(pool, batch.kept(), &here[0], gradients),
        }
    }
    Some(())
}

impl Head {
    /// How far the drafted tokens that the head reads from `read` are from those that it reads from the true hidden states, `weight` of
    /// it, and the `share` of total variation in that; its derivative by `read` is left in memory. Nothing if the pool was interrupted.
    fn loss(
        &mut self,
        pool: &Pool,
        batch: &Batch,
        vocabulary: &Vocabulary,
        (read, guesses): (&[f32], &[Guess]),
        (weight, share): (f32, f32),
    ) -> Option<f64> {
        let Self { chances, found, d, turned } = self;
        let (vocab, mut loss) = (vocabulary.size(), 0.0);
        vocabulary.logits_into(pool, batch.last(), chances);
        for chances in chances.chunks_exact_mut(vocab) {
            pool.goes_on()?;
            softmax(chances);
        }
        vocabulary.logits_into(pool, read, found);
        for (found, (drawn, own)) in found.chunks_exact_mut(vocab).zip(guesses) {
            pool.goes_on()?;
            let far = distance(found, &chances[drawn * vocab..][..vocab], share, weight * own);
            loss += f64::from(weight * own) * f64::from((1.0 - share) * far.entropy + share * far.variation);
        }
        d.resize(read.len(), 0.0);
        input_gradient(pool, found, vocabulary.head(), d, false, turned);
        pool.goes_on()?;
        Some(loss)
    }
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
