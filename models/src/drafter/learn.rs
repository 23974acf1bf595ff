//! Training of the learned drafter on rollouts just made: hidden states by SmoothL1, tokens by cross-entropy against the
//! target's own distribution (Li et al. 2024, "EAGLE", section 4.2). Embedding and head stay the target's.

use kernels::{NoiseKey, Pool, Turned, input_gradient, softmax};
use state::plan::{Optimizer, Schedule};

use super::Vocabulary;
use super::buffer::Window;
use super::eagle;
use super::network::Network;
use crate::error::Result;
use crate::layer::{Rows, Sequences, Values, heads};
use crate::load::{Config, RawWeights};
use crate::optim::{AdamW, Gradients};
use crate::target::Packed;
use crate::weights::Weights;

/// Weight of the cross-entropy beside SmoothL1.
const CROSS_ENTROPY: f32 = 0.1;

/// Weights of the drafter in training, with the moments of its optimiser.
#[derive(Debug, Clone)]
pub struct Learner {
    config: Config,
    weights: Weights,
    adam: AdamW,
    optimizer: Optimizer,
    steps: u32,
    /// Of the step to come.
    sum: Sum,
}

/// Gradients of some windows, summed over their guesses.
#[derive(Debug, Clone, Default)]
struct Sum {
    gradients: Gradients,
    guesses: usize,
    loss: f64,
}

impl Learner {
    /// Starts from `weights`.
    #[must_use]
    pub fn new(target: &Config, ffn: usize, weights: Weights, lr: f64) -> Self {
        let optimizer = Optimizer {
            lr,
            betas: (0.9, 0.95),
            weight_decay: 0.0,
            clip_norm: 0.5,
            warmup: 0,
            schedule: Schedule::Constant,
        };
        let (config, adam) = (eagle::config(target, ffn), AdamW::new(&weights));
        Self { config, adam, weights, optimizer, steps: 0, sum: Sum::default() }
    }

    /// A fresh drafter: keyed random, but its mixing starts as a copy of the hidden state.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn fresh(target: &Config, ffn: usize, seed: u64) -> Result<Weights> {
        let config = eagle::config(target, ffn);
        let mut raw = Weights::random_layout(eagle::parameters(&config), config.storage, seed, 1)?.to_raw();
        if let Some((_, values)) = raw.tensors.get_mut("fc_hidden.weight") {
            (0..config.hidden).for_each(|i| values[i * config.hidden + i] += 1.0);
        }
        eagle::weights(target, ffn, &raw)
    }

    /// Goes on from other weights, with an optimiser that has seen nothing.
    pub fn restart(&mut self, weights: Weights) {
        self.adam = AdamW::new(&weights);
        (self.weights, self.sum) = (weights, Sum::default());
    }

    /// Weights, moments and steps, as a checkpoint keeps them: numbers by name.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        let mut raw = self.adam.to_raw();
        raw.tensors.extend(self.weights.to_raw().tensors);
        // Exact in f32 up to 2^24.
        raw.tensors.insert("learned".into(), (vec![1], vec![self.steps as f32]));
        raw
    }

    /// Goes on from what [`Learner::to_raw`] kept.
    ///
    /// # Errors
    /// If it is of another shape.
    pub fn from_raw((target, ffn): (&Config, usize), raw: &RawWeights, lr: f64) -> Result<Self> {
        let weights = eagle::weights(target, ffn, raw)?;
        let adam = AdamW::from_raw(&weights, raw)?;
        let steps = raw.tensors.get("learned").and_then(|steps| steps.1.first()).map_or(0, |steps| *steps as u32);
        Ok(Self { adam, steps, ..Self::new(target, ffn, weights, lr) })
    }

    /// Steps of the optimiser.
    #[must_use]
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The weights so far.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Some windows and one step of the optimiser; returns the loss. A loss that is not finite changes nothing, and neither do
    /// windows without a token of an answer, whose loss is 0.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn learn(&mut self, pool: &Pool, vocabulary: &Vocabulary, windows: &[Window]) -> Result<f64> {
        self.read(pool, vocabulary, windows)?;
        Ok(self.step(pool))
    }

    /// Reads windows for the next step, which but for rounding is the same however they are spread over calls.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn read(&mut self, pool: &Pool, vocabulary: &Vocabulary, windows: &[Window]) -> Result<()> {
        let batch = Batch::new(windows, self.config.hidden);
        if batch.used.is_empty() {
            return Ok(());
        }
        let network = Network::new(&self.config, &self.weights)?;
        let Sum { gradients, guesses, loss } = &mut self.sum;
        if *guesses == 0 {
            gradients.resize(self.weights.masters().len(), Vec::new());
            for (gradient, master) in gradients.iter_mut().zip(self.weights.masters()) {
                gradient.clear();
                gradient.resize(master.len(), 0.0);
            }
        }
        *loss += batch.gradient(pool, &network, vocabulary, gradients);
        *guesses += batch.used.len();
        Ok(())
    }

    /// One step of the optimiser on what was read since the last one; returns the loss of a guess.
    pub fn step(&mut self, pool: &Pool) -> f64 {
        self.steps = self.steps.wrapping_add(1);
        let Sum { gradients, guesses, loss } = &mut self.sum;
        if *guesses == 0 {
            return 0.0;
        }
        let (mean, scale) = (*loss / *guesses as f64, 1.0 / *guesses as f32);
        gradients.iter_mut().flatten().for_each(|slope| *slope *= scale);
        if mean.is_finite() {
            let sum = std::mem::take(gradients);
            self.weights = self.adam.step(pool, &self.weights, sum, &self.optimizer, self.optimizer.lr).0;
        }
        (*guesses, *loss) = (0, 0.0);
        mean
    }
}

/// What one version of a drafter makes of held-out answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guesses {
    /// For each token whether it was the drafter's first choice.
    pub right: Vec<bool>,
    /// Tokens that were among its first three.
    pub among_three: usize,
}

/// Guesses each token of the windows' answers from the true tokens and hidden states before it, with the noise it was drawn
/// with.
///
/// # Errors
/// If the weights are of another layout.
pub fn guess(
    pool: &Pool,
    vocabulary: &Vocabulary,
    (weights, ffn): (&Weights, usize),
    windows: &[Window],
    temperature: f32,
) -> Result<Guesses> {
    let config = eagle::config(vocabulary.target().config(), ffn);
    let network = Network::new(&config, weights)?;
    let batch = Batch::new(windows, config.hidden);
    let (mut guesses, mut logits) = (Guesses::default(), Vec::new());
    if batch.used.is_empty() {
        return Ok(guesses);
    }
    let predicted = batch.predict(pool, &network, vocabulary).predicted;
    let row = |at: &usize| &predicted[at * config.hidden..(at + 1) * config.hidden];
    vocabulary.logits_into(pool, &batch.used.iter().flat_map(row).copied().collect::<Vec<_>>(), &mut logits);
    for (logits, Drawn { token, noise, position }) in logits.chunks_exact(vocabulary.size()).zip(&batch.drawn) {
        let best = vocabulary.best(logits, temperature, noise, *position, 3);
        let place = best.iter().position(|(guess, _)| guess == token);
        guesses.right.push(place == Some(0));
        guesses.among_three += usize::from(place.is_some());
    }
    Ok(guesses)
}

/// A token of an answer, and what drew it.
struct Drawn {
    token: u32,
    noise: NoiseKey,
    position: u32,
}

/// What a forward made of a batch.
struct Forward {
    embedded: Vec<f32>,
    mixed: Vec<f32>,
    values: Values,
    predicted: Vec<f32>,
}

/// Rows of all windows: row t sees token t + 1 and the hidden state of token t, and predicts that of token t + 1.
struct Batch {
    packed: Packed,
    seen: Vec<f32>,
    /// Rows whose prediction a draft would use: those of answers.
    used: Vec<usize>,
    /// The true hidden states of these, and the tokens that a draft would guess from them.
    wanted: Vec<f32>,
    drawn: Vec<Drawn>,
}

impl Batch {
    fn new(windows: &[Window], width: usize) -> Self {
        let (mut tokens, mut seen, mut used, mut wanted) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut positions, mut first, mut drawn) = (Vec::new(), 0, Vec::new());
        for Window { example, tokens: at } in windows {
            let rows = at.start..at.end.max(at.start + 2) - 2;
            tokens.push(&example.tokens[rows.start + 1..rows.end + 1]);
            positions.extend(rows.clone().map(|row| u32::try_from(row).unwrap_or(u32::MAX)));
            seen.extend_from_slice(&example.hidden[rows.start * width..rows.end * width]);
            // Row t tells of token t + 2, which a draft guesses if it belongs to the answer.
            for row in rows.clone().filter(|row| row + 2 >= example.prompt) {
                used.push(first + row - rows.start);
                wanted.extend_from_slice(&example.hidden[(row + 1) * width..(row + 2) * width]);
                let position = u32::try_from(row + 2 - example.prompt).unwrap_or(u32::MAX);
                drawn.push(Drawn { token: example.tokens[row + 2], noise: example.noise, position });
            }
            first += rows.len();
        }
        Self { packed: Packed { positions, ..Packed::new(&tokens) }, seen, used, wanted, drawn }
    }

    /// The loss, summed over the guesses; its gradients are added to `gradients`.
    fn gradient(&self, pool: &Pool, network: &Network, vocabulary: &Vocabulary, gradients: &mut Gradients) -> f64 {
        let Forward { embedded, mixed, mut values, predicted } = self.predict(pool, network, vocabulary);
        let (loss, mut d) = self.loss(pool, vocabulary, &predicted);
        let inputs = [embedded.as_slice(), &self.seen, &mixed];
        let sequences = Sequences { rows: self.rows(vocabulary), lengths: &self.packed.lengths };
        network.backward(pool, inputs, &mut values, sequences, &mut d, gradients);
        loss
    }

    fn predict(&self, pool: &Pool, network: &Network, vocabulary: &Vocabulary) -> Forward {
        let target = vocabulary.target();
        let (mut embedded, mut mixed, mut values) = (Vec::new(), Vec::new(), Values::default());
        kernels::embed(&self.packed.ids, &target.embedding, &mut embedded);
        network.mix(pool, &embedded, &self.seen, &mut mixed);
        let mut predicted = mixed.clone();
        let mut attend = |qkv: [&[f32]; 3], out: &mut [f32]| {
            kernels::attend_sequences(pool, qkv, &self.packed.lengths, heads(target.config()), out);
        };
        network.predict(pool, &mut predicted, self.rows(vocabulary), &mut attend, &mut values);
        Forward { embedded, mixed, values, predicted }
    }

    fn rows<'a>(&'a self, vocabulary: &'a Vocabulary) -> Rows<'a> {
        Rows { positions: &self.packed.positions, rope: vocabulary.target().rope() }
    }

    /// The loss of the rows in use, summed, and its derivative by all predictions: SmoothL1 by hidden states, and the cross-entropy of the
    /// drafted tokens that the target's head reads from them against those it reads from the true ones.
    fn loss(&self, pool: &Pool, vocabulary: &Vocabulary, predicted: &[f32]) -> (f64, Vec<f32>) {
        let (width, vocab) = (vocabulary.head().k(), vocabulary.size());
        let mut all = vec![0.0; predicted.len()];
        let count = self.used.len() * width;
        let row = |at: &usize| at * width..(at + 1) * width;
        let predicted: Vec<f32> = self.used.iter().flat_map(|at| predicted[row(at)].iter().copied()).collect();
        let (mut wanted, mut found) = (Vec::new(), Vec::new());
        vocabulary.logits_into(pool, &self.wanted, &mut wanted);
        vocabulary.logits_into(pool, &predicted, &mut found);
        let mut entropy = 0.0;
        for (wanted, found) in wanted.chunks_exact_mut(vocab).zip(found.chunks_exact_mut(vocab)) {
            softmax(wanted);
            softmax(found);
            for (wanted, found) in wanted.iter().zip(found) {
                entropy -= f64::from(*wanted) * f64::from(found.max(f32::MIN_POSITIVE)).ln();
                *found = (*found - wanted) * CROSS_ENTROPY;
            }
        }
        let mut d = vec![0.0; count];
        input_gradient(pool, &found, vocabulary.head(), &mut d, false, &mut Turned::default());
        let mut regression = 0.0;
        for ((d, predicted), wanted) in d.iter_mut().zip(&predicted).zip(&self.wanted) {
            let difference = predicted - wanted;
            // d² / 2 below 1, d - 1/2 above: its slope is the smaller of d and 1.
            let near = difference.clamp(-1.0, 1.0);
            regression += f64::from(near * (difference - near * 0.5));
            *d += near / width as f32;
        }
        self.used.iter().zip(d.chunks_exact(width)).for_each(|(at, d)| all[row(at)].copy_from_slice(d));
        (regression / width as f64 + f64::from(CROSS_ENTROPY) * entropy, all)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use state::plan::TinyShape;

    use super::super::buffer::Example;
    use super::*;
    use crate::target::Target;

    /// A small target with large weights, so that its logits differ, and two answers with the hidden states of other tokens.
    fn classroom() -> (Arc<Target>, Vec<Window>) {
        let shape = TinyShape { hidden: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 24, positions_max: 64 };
        let config = Config::tiny(&shape).unwrap();
        let mut raw = Weights::random(&config, 5).unwrap().to_raw();
        raw.tensors.values_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value *= 8.0));
        let target = Target::new(&config, &Weights::from_raw(&config, &raw).unwrap(), &Target::rope_table(&config));
        let target = Arc::new(target.unwrap());
        let example = |sample: u32, length: u32| {
            let tokens: Vec<u32> = (0..length).map(|i| (i * i + sample) % config.vocab as u32).collect();
            let hidden = target.hidden_of_sequences(&Pool::default(), &[&tokens[..tokens.len() - 1]]);
            let noise = NoiseKey::new(1, 0, 0, 0, sample);
            Arc::new(Example { tokens, hidden, prompt: 3, noise }).whole()
        };
        let windows = vec![example(1, 12), example(2, 7)];
        (target, windows)
    }

    #[test]
    fn gradients_are_differences_of_the_loss() {
        let (target, windows) = classroom();
        let (vocabulary, pool) = (Vocabulary::whole(&target), Pool::default());
        let raw = Learner::fresh(target.config(), 10, 9).unwrap().to_raw();
        let config = eagle::config(target.config(), 10);
        let batch = Batch::new(&windows, config.hidden);
        let of = |raw: &RawWeights| {
            let weights = eagle::weights(target.config(), 10, raw).unwrap();
            let network = Network::new(&config, &weights).unwrap();
            let mut gradients = weights.zeros();
            let loss = batch.gradient(&pool, &network, &vocabulary, &mut gradients);
            let rounded = vec![Vec::new(); gradients.len()];
            (loss, weights.replaced(gradients, rounded).to_raw())
        };
        let (_, gradients) = of(&raw);
        for name in raw.tensors.keys() {
            let slopes = &gradients.tensors[name].1;
            // The steepest one is the least drowned in rounding.
            let at = (0..slopes.len()).max_by(|a, b| slopes[*a].abs().total_cmp(&slopes[*b].abs())).unwrap();
            let moved = |by: f32| {
                let mut raw = raw.clone();
                raw.tensors.get_mut(name).unwrap().1[at] += by;
                of(&raw).0
            };
            let step = 1e-2;
            let difference = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            let slope = f64::from(slopes[at]);
            assert!(
                (difference - slope).abs() < 0.02 * slope.abs() + 1e-5,
                "{name}[{at}]: {slope}, found {difference}"
            );
        }
    }

    #[test]
    fn windows_together_are_windows_apart() {
        let (target, windows) = classroom();
        let (vocabulary, pool) = (Vocabulary::whole(&target), Pool::default());
        let weights = Learner::fresh(target.config(), 10, 9).unwrap();
        let network = Network::new(&eagle::config(target.config(), 10), &weights).unwrap();
        let of = |windows: &[Window]| {
            let mut gradients = weights.zeros();
            Batch::new(windows, target.config().hidden).gradient(&pool, &network, &vocabulary, &mut gradients);
            gradients.concat()
        };
        let apart = windows.iter().map(|window| of(std::slice::from_ref(window)));
        let apart = apart.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
        let largest = apart.iter().fold(0.0_f32, |most, slope| most.max(slope.abs()));
        for (together, apart) in of(&windows).iter().zip(&apart) {
            assert!((together - apart).abs() <= 1e-5 * largest, "{together} and {apart}");
        }
    }

    #[test]
    fn guesses_are_those_of_the_drafts() {
        let (target, windows) = classroom();
        let (vocabulary, pool) = (Vocabulary::whole(&target), Pool::default());
        let weights = Learner::fresh(target.config(), 10, 9).unwrap();
        let guesses = guess(&pool, &vocabulary, (&weights, 10), &windows, 0.8).unwrap();
        assert_eq!(guesses.right.len(), 9 + 4, "every token of the answers");
        assert!(guesses.among_three >= guesses.right.iter().filter(|right| **right).count());
        // One token further on, the same forward guesses the same.
        let cut: Vec<Window> = windows.iter().map(|w| Window { tokens: 0..w.tokens.end - 1, ..w.clone() }).collect();
        let fewer = guess(&pool, &vocabulary, (&weights, 10), &cut, 0.8).unwrap();
        assert_eq!([&guesses.right[..8], &guesses.right[9..12]].concat(), fewer.right);
    }
}
