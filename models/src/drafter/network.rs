//! The network of the learned drafter: one decoder layer over [embedding of the next token ; target hidden state], with the
//! target's embedding and head (Li et al. 2024, "EAGLE"). As there, the layer does not normalise its input, and nothing
//! normalises what it predicts.

use kernels::{Matrix, Pool, Turned, add_linear, linear, weight_gradient};

use crate::error::{Error, Result};
use crate::layer::{self, Attend, Layer, Rows, Sequences, Values, matrix};
use crate::layout::{self, Parameter, ParameterShape};
use crate::load::{Config, RawWeights};
use crate::weights::Weights;

/// Shape of the drafter of a target.
#[must_use]
pub fn config(target: &Config, ffn: usize) -> Config {
    let ffn = if ffn == 0 { target.ffn } else { ffn };
    Config { layers: 1, ffn, ..target.clone() }
}

/// Its parameters: two halves of the mixing matrix, and one layer.
#[must_use]
pub fn parameters(config: &Config) -> Vec<Parameter> {
    let shape = ParameterShape::Matrix(config.hidden, config.hidden);
    let mix = |half: &str| Parameter { name: format!("fc_{half}.weight"), shape };
    let mut all = vec![mix("token"), mix("hidden")];
    all.extend(layout::layer_without_norm(config, "layers.0."));
    all
}

/// Weights of a drafter of `target` from what a file held.
///
/// # Errors
/// If a parameter is missing or has another shape.
pub fn weights(target: &Config, ffn: usize, raw: &RawWeights) -> Result<Weights> {
    let config = config(target, ffn);
    Weights::with_layout(parameters(&config), config.storage, raw)
}

/// The network over one version of its weights.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    mix_token: Matrix,
    mix_hidden: Matrix,
    layer: Layer,
}

impl Network {
    pub(crate) fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let wrong = || Error::Layout { found: weights.layout().len() };
        let mut parameters = weights.loaded();
        let mix_token = matrix(&mut parameters).ok_or_else(wrong)?;
        let mix_hidden = matrix(&mut parameters).ok_or_else(wrong)?;
        let layer = Layer::without_norm(config, &mut parameters).ok_or_else(wrong)?;
        Ok(Self { mix_token, mix_hidden, layer })
    }

    /// The layer's input, `(r, hidden)`: embeddings of tokens mixed with the hidden states before them.
    pub(crate) fn mix(&self, pool: &Pool, embedded: &[f32], hidden: &[f32], mixed: &mut Vec<f32>) {
        mixed.resize(hidden.len(), 0.0);
        linear(pool, embedded, &self.mix_token, mixed);
        add_linear(pool, hidden, &self.mix_hidden, mixed);
    }

    /// Mixed rows become predicted hidden states of the tokens whose embeddings went into them.
    pub(crate) fn predict(
        &self,
        pool: &Pool,
        mixed: &mut [f32],
        rows: Rows<'_>,
        attend: &mut Attend<'_>,
        values: &mut Values,
    ) {
        self.layer.forward(pool, mixed, rows, attend, values);
    }

    /// Backward over sequences laid end to end, from `d`, the gradient by the predictions, with the values of
    /// [`Network::predict`]; adds to `gradients`, in the order of [`parameters`].
    pub(crate) fn backward(
        &self,
        pool: &Pool,
        [embedded, hidden, mixed]: [&[f32]; 3],
        values: &mut Values,
        sequences: Sequences<'_>,
        d: &mut [f32],
        gradients: &mut [Vec<f32>],
    ) {
        let mut memory = layer::Gradient::default();
        self.layer.backward(pool, (mixed, Some(values)), sequences, d, &mut gradients[2..], &mut memory);
        let mut turned = Turned::default();
        for (i, (weight, x)) in [(&self.mix_token, embedded), (&self.mix_hidden, hidden)].into_iter().enumerate() {
            weight_gradient(pool, x, d, &mut gradients[i], [weight.n(), weight.k()], &mut turned);
        }
    }
}
