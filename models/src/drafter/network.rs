//! The network of the learned drafter: one decoder layer that sees the next token and what the target made of the tokens before
//! it, with the target's embedding and head.
//!
//! `Eagle` (Li et al. 2024, "EAGLE") mixes [embedding ; hidden state], predicts hidden states, and reads tokens from them as the
//! target would. As there, its layer does not normalise its input, and nothing normalises what it predicts.
//!
//! `Eagle3` (Li et al. 2025, "EAGLE-3", section 3.1) fuses hidden states of three layers. Its attention reads [embedding ; stream],
//! both normalised; what comes out is its own, goes in again for the next token, and is normalised before tokens are read
//! from it. The head is the target's here, so that what is drafted can follow the rollouts (`Vocabulary`).

use std::borrow::Cow;
use std::sync::Arc;

use kernels::{
    Heads, Matrix, Pool, Turned, add_linear, input_gradient, linear, rms_norm, rms_norm_gradient, weight_gradient,
};
use state::plan::{DrafterShape, NetworkKind};

use crate::error::{Error, Result};
use crate::layer::{self, Attend, Attention, Layer, Reads, Rows, Values, matrix, vector};
use crate::layout::{self, Parameter, ParameterShape};
use crate::load::{Config, RawWeights};
use crate::target::{Hidden, TAPS, Target};
use crate::weights::{Weights, storage_to_learn};

/// Prefix of an `Eagle3`'s layer, as its public code has it.
const MIDLAYER: &str = "midlayer.";

/// Shape of the layer of a target's drafter.
#[must_use]
pub fn config(target: &Config, shape: DrafterShape) -> Config {
    let ffn = if shape.ffn == 0 { target.ffn } else { shape.ffn };
    Config { layers: 1, ffn, storage: storage_to_learn(target.storage), ..target.clone() }
}

/// Hidden states that it reads.
#[must_use]
pub fn reads(shape: DrafterShape) -> Hidden {
    match shape.network {
        NetworkKind::Eagle => Hidden::Last,
        NetworkKind::Eagle3 => Hidden::Taps,
    }
}

/// The parameters of a target's drafter.
#[must_use]
pub fn parameters(target: &Config, shape: DrafterShape) -> Vec<Parameter> {
    let config = config(target, shape);
    let hidden = config.hidden;
    let matrix = |name: &str, k: usize| Parameter { name: name.into(), shape: ParameterShape::Matrix(hidden, k) };
    let vector = |name: &str| Parameter { name: name.into(), shape: ParameterShape::Vector(hidden) };
    match shape.network {
        NetworkKind::Eagle => {
            let mut all = vec![matrix("fc_token.weight", hidden), matrix("fc_hidden.weight", hidden)];
            all.extend(layout::layer_reading(&config, hidden, "layers.0."));
            all
        }
        NetworkKind::Eagle3 => {
            let norm = |name: &str| vector(&format!("{MIDLAYER}{name}.weight"));
            let mut all = vec![matrix("fc.weight", TAPS * hidden), norm("input_layernorm"), norm("hidden_norm")];
            all.extend(layout::layer_reading(&config, 2 * hidden, MIDLAYER));
            all.push(vector("norm.weight"));
            all
        }
    }
}

/// A drafter of `target` with keyed random weights.
///
/// # Errors
/// Never: all parameters are made.
pub fn random(target: &Config, shape: DrafterShape, seed: u64) -> Result<Weights> {
    Weights::random_layout(parameters(target, shape), config(target, shape).storage, seed, 1)
}

/// Weights of a drafter of `target` from what a file held.
///
/// # Errors
/// If a parameter is missing or has another shape.
pub fn weights(target: &Config, shape: DrafterShape, raw: &RawWeights) -> Result<Weights> {
    Weights::with_layout(parameters(target, shape), config(target, shape).storage, raw)
}

/// How rows enter the layer and leave it.
#[derive(Debug, Clone)]
enum Ends {
    /// Halves of the matrix that mixes: of tokens, and of hidden states.
    Eagle([Matrix; 2]),
    /// The matrix that fuses, and the weight of the norm behind the layer.
    Eagle3(Matrix, Arc<Vec<f32>>),
}

/// The network over one version of its weights.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    ends: Ends,
    layer: Layer,
    hidden: usize,
    eps: f32,
}

/// A level of predictions on its way through the network: `(r, hidden)` each.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Embeddings of the tokens.
    pub(crate) embedded: Vec<f32>,
    /// What stands for what the target made of the tokens before: made of hidden states, or an earlier prediction.
    pub(crate) entered: Vec<f32>,
    /// The layer's input.
    mixed: Vec<f32>,
    pub(crate) values: Values,
    pub(crate) predicted: Vec<f32>,
}

impl Pass {
    /// Bytes that it holds, about.
    pub(crate) fn held(&self) -> usize {
        self.values.held() + 4 * self.predicted.capacity() * size_of::<f32>()
    }
}

impl Network {
    pub(crate) fn new(target: &Config, shape: DrafterShape, weights: &Weights) -> Result<Self> {
        let config = &config(target, shape);
        let mut parameters = weights.loaded();
        let network = Self::take(config, shape.network, &mut parameters);
        let is_whole = parameters.next().is_none();
        network.filter(|_| is_whole).ok_or(Error::Layout { found: weights.layout().len() })
    }

    fn take(
        config: &Config,
        kind: NetworkKind,
        parameters: &mut dyn Iterator<Item = crate::weights::Loaded>,
    ) -> Option<Self> {
        let Config { hidden, eps, .. } = *config;
        let (ends, layer);
        match kind {
            NetworkKind::Eagle => {
                ends = Ends::Eagle([matrix(parameters)?, matrix(parameters)?]);
                layer = Layer::reading(config, Reads::Stream, parameters)?;
            }
            NetworkKind::Eagle3 => {
                let fuse = matrix(parameters)?;
                let norms = [vector(parameters)?, vector(parameters)?];
                layer = Layer::reading(config, Reads::Both(norms), parameters)?;
                ends = Ends::Eagle3(fuse, vector(parameters)?);
            }
        }
        Some(Self { ends, layer, hidden, eps })
    }

    /// Shape of its attention.
    pub(crate) fn heads(&self) -> Heads {
        self.layer.heads()
    }

    /// What the target made of tokens, [`Hidden::width`] numbers each, as the layer takes it.
    pub(crate) fn enter(&self, pool: &Pool, kept: &[f32], entered: &mut Vec<f32>) {
        match &self.ends {
            Ends::Eagle(_) => {
                entered.clear();
                entered.extend_from_slice(kept);
            }
            Ends::Eagle3(fuse, _) => {
                let taps = self.taps(kept);
                entered.resize(taps.len() / TAPS, 0.0);
                linear(pool, &taps, fuse, entered);
            }
        }
    }

    fn taps(&self, kept: &[f32]) -> Vec<f32> {
        let each = TAPS * self.hidden;
        kept.chunks_exact(each + self.hidden).flat_map(|row| &row[..each]).copied().collect()
    }

    /// Predictions behind tokens at these positions, and behind what has entered.
    pub(crate) fn run(
        &self,
        target: &Target,
        pool: &Pool,
        (ids, positions): (&[u32], &[u32]),
        attend: &mut Attend<'_>,
        pass: &mut Pass,
    ) {
        kernels::embed(ids, &target.embedding, &mut pass.embedded);
        self.predict(pool, Rows { positions, rope: target.rope(), beside: &[] }, attend, pass);
    }

    /// Predictions, from `pass.embedded` and `pass.entered`.
    pub(crate) fn predict(&self, pool: &Pool, rows: Rows<'_>, attend: &mut Attend<'_>, pass: &mut Pass) {
        let Pass { embedded, entered, mixed, values, predicted } = pass;
        match &self.ends {
            Ends::Eagle([token, hidden]) => {
                mixed.resize(entered.len(), 0.0);
                linear(pool, embedded, token, mixed);
                add_linear(pool, entered, hidden, mixed);
            }
            Ends::Eagle3(..) => mixed.clone_from(entered),
        }
        predicted.clone_from(mixed);
        self.layer.forward(pool, predicted, Rows { beside: embedded, ..rows }, attend, values);
    }

    /// Predictions as the head reads them.
    pub(crate) fn leave<'a>(&self, pool: &Pool, predicted: &'a [f32]) -> Cow<'a, [f32]> {
        match &self.ends {
            Ends::Eagle(_) => Cow::Borrowed(predicted),
            Ends::Eagle3(_, norm) => {
                let mut read = vec![0.0; predicted.len()];
                rms_norm(pool, predicted, norm, self.eps, &mut read);
                Cow::Owned(read)
            }
        }
    }

    /// Backward of [`Network::leave`] from `read`, the gradient by what the head reads; adds that by the predictions to `d`.
    pub(crate) fn leave_backward(
        &self,
        pool: &Pool,
        (predicted, read): (&[f32], &[f32]),
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
    ) {
        match (&self.ends, gradients.last_mut()) {
            (Ends::Eagle3(_, norm), Some(by_norm)) => {
                rms_norm_gradient(pool, predicted, norm, self.eps, read, d, by_norm);
            }
            _ => kernels::add(d, read),
        }
    }

    /// Backward of [`Network::predict`]: `d`, the gradient by the predictions, becomes that by the layer's input. Adds to
    /// `gradients`, in the order of [`parameters`].
    pub(crate) fn predict_backward(
        &self,
        pool: &Pool,
        pass: &mut Pass,
        (rows, attention): (Rows<'_>, &mut dyn Attention),
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
        (memory, turned): (&mut layer::Gradient, &mut Turned),
    ) {
        let Pass { embedded, entered, mixed, values, .. } = pass;
        let own = match self.ends {
            Ends::Eagle(_) => &mut gradients[2..],
            Ends::Eagle3(..) => &mut gradients[1..],
        };
        let rows = Rows { beside: embedded, ..rows };
        self.layer.backward(pool, (mixed, Some(values)), (rows, attention), d, own, memory);
        if let Ends::Eagle(halves) = &self.ends {
            for (i, (weight, x)) in halves.iter().zip([&*embedded, entered]).enumerate() {
                weight_gradient(pool, x, d, weight, &mut gradients[i], turned);
            }
        }
    }

    /// From `d`, the gradient by the layer's input, that by the prediction that entered, in `memory` if it is another.
    pub(crate) fn by_entered<'a>(
        &self,
        pool: &Pool,
        d: &'a [f32],
        (memory, turned): (&'a mut Vec<f32>, &mut Turned),
    ) -> &'a [f32] {
        match &self.ends {
            Ends::Eagle([_, hidden]) => {
                memory.resize(d.len(), 0.0);
                input_gradient(pool, d, hidden, memory, false, turned);
                memory
            }
            Ends::Eagle3(..) => d,
        }
    }

    /// Backward of [`Network::enter`] from `d`, the gradient by the layer's input.
    pub(crate) fn enter_backward(&self, pool: &Pool, kept: &[f32], d: &[f32], gradients: &mut [Vec<f32>]) {
        if let Ends::Eagle3(fuse, _) = &self.ends {
            weight_gradient(pool, &self.taps(kept), d, fuse, &mut gradients[0], &mut Turned::default());
        }
    }
}
