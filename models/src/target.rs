//! The target: a decoder of the Llama family. One forward serves training, prefill, decoding and verification; only
//! the way rows attend differs. Keys and values live outside.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use kernels::{RopeTable, embed, linear, rms_norm};

use crate::layer::{Attend, Layer, Rows, heads};
use crate::load::Config;
use crate::weights::Weights;

/// A target model over one version of its weights.
#[derive(Debug, Clone)]
pub struct Target {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    rope: RopeTable,
}

/// How each layer's rows attend: layer, queries, keys, values.
pub(crate) type AttendLayer<'a> = dyn FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a;

impl Target {
    /// For decoding: records no operations.
    ///
    /// # Errors
    /// If the weights are of another layout than `config`'s.
    pub fn new(config: &Config, weights: &Weights, rope: &RopeTable) -> Result<Self> {
        Self::over(config, weights.plain(), rope)
    }

    /// For training: records operations on the weights.
    ///
    /// # Errors
    /// If the weights are of another layout than `config`'s.
    pub fn trained(config: &Config, weights: &Weights, rope: &RopeTable) -> Result<Self> {
        Self::over(config, weights.tracked(), rope)
    }

    /// The table of rotations that all versions of a model share.
    #[must_use]
    pub fn rope_table(config: &Config) -> RopeTable {
        RopeTable::new(config.head_dim, config.rope_theta, config.positions_max)
    }

    fn over(config: &Config, tensors: Vec<Tensor>, rope: &RopeTable) -> Result<Self> {
        let short = || candle_core::Error::Msg("the weights have fewer parameters than the model".into());
        let mut tensors = tensors.into_iter();
        let embedding = tensors.next().ok_or_else(short)?;
        let layers =
            (0..config.layers).map(|_| Layer::new(config, &mut tensors).ok_or_else(short)).collect::<Result<_>>()?;
        let norm = tensors.next().ok_or_else(short)?;
        let head = if config.tied { embedding.clone() } else { tensors.next().ok_or_else(short)? };
        Ok(Self { config: config.clone(), embedding, layers, norm, head, rope: rope.clone() })
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Embedding of tokens, `(r, hidden)`.
    pub(crate) fn embed(&self, ids: &Arc<Vec<u32>>) -> Result<Tensor> {
        embed(ids, &self.embedding)
    }

    /// Hidden states after the final norm, `(r, hidden)`, of rows at `positions`.
    pub(crate) fn hidden(
        &self,
        ids: &Arc<Vec<u32>>,
        positions: &Arc<Vec<u32>>,
        attend: &mut AttendLayer<'_>,
    ) -> Result<Tensor> {
        let rows = Rows { positions, rope: &self.rope };
        let mut x = self.embed(ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let mut attend_here = |q: &Tensor, k: &Tensor, v: &Tensor| attend(i, q, k, v);
            x = layer.forward(&x, &rows, &mut attend_here as &mut Attend<'_>)?;
        }
        rms_norm(&x, &self.norm, self.config.eps)
    }

    /// Hidden states of whole sequences laid end to end.
    ///
    /// # Errors
    /// If a token or a position is outside the model's tables.
    pub fn hidden_of_sequences(&self, sequences: &[&[u32]]) -> Result<Tensor> {
        let ids = Arc::new(sequences.concat());
        let lengths = Arc::new(sequences.iter().map(|s| s.len()).collect::<Vec<_>>());
        let positions = sequences.iter().flat_map(|s| 0..u32::try_from(s.len()).unwrap_or(u32::MAX)).collect();
        let shape = heads(&self.config);
        let mut attend =
            |_: usize, q: &Tensor, k: &Tensor, v: &Tensor| kernels::attend_sequences(q, k, v, &lengths, shape);
        self.hidden(&ids, &Arc::new(positions), &mut attend)
    }

    /// Logits `(r, vocab)` of hidden states `(r, hidden)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.head, self.config.vocab)
    }

    /// Log-probabilities `(r)` of `targets` under `softmax(logits / T)`; `inverse_temperature` is 1/T.
    ///
    /// # Errors
    /// If shapes do not fit or a token is outside the vocabulary.
    pub fn log_probs(&self, hidden: &Tensor, targets: Vec<u32>, inverse_temperature: f32) -> Result<Tensor> {
        kernels::log_probs(hidden, &self.head, self.config.vocab, targets, inverse_temperature)
    }
}
