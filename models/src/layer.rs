//! One decoder layer of the Llama family, used by targets and by the learned drafter.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use kernels::{Heads, RopeTable, linear, rms_norm, rope, swiglu};

use crate::load::Config;

/// Mixes the rows: gets queries, keys (both turned by their positions) and values of all rows, returns what each attends to.
pub(crate) type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a;

/// Everything a layer needs to know of its rows.
pub(crate) struct Rows<'a> {
    pub(crate) positions: &'a Arc<Vec<u32>>,
    pub(crate) rope: &'a RopeTable,
}

#[derive(Debug, Clone)]
pub(crate) struct Layer {
    heads: Heads,
    hidden: usize,
    ffn: usize,
    eps: f32,
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

pub(crate) fn heads(config: &Config) -> Heads {
    Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
}

impl Layer {
    /// Takes its parameters in the order of `layout::layer`.
    pub(crate) fn new(config: &Config, parameters: &mut impl Iterator<Item = Tensor>) -> Option<Self> {
        let mut next = || parameters.next();
        Some(Self {
            heads: heads(config),
            hidden: config.hidden,
            ffn: config.ffn,
            eps: config.eps,
            attention_norm: next()?,
            q: next()?,
            k: next()?,
            v: next()?,
            o: next()?,
            ffn_norm: next()?,
            gate: next()?,
            up: next()?,
            down: next()?,
        })
    }

    /// x and the result: `(r, hidden)`.
    pub(crate) fn forward(&self, x: &Tensor, rows: &Rows<'_>, attend: &mut Attend<'_>) -> Result<Tensor> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let normed = rms_norm(x, &self.attention_norm, self.eps)?;
        let q = rope(&linear(&normed, &self.q, heads * head_dim)?, rows.positions, rows.rope)?;
        let k = rope(&linear(&normed, &self.k, kv_heads * head_dim)?, rows.positions, rows.rope)?;
        let v = linear(&normed, &self.v, kv_heads * head_dim)?;
        let x = (x + linear(&attend(&q, &k, &v)?, &self.o, self.hidden)?)?;
        let normed = rms_norm(&x, &self.ffn_norm, self.eps)?;
        let gated = swiglu(&linear(&normed, &self.gate, self.ffn)?, &linear(&normed, &self.up, self.ffn)?)?;
        x + linear(&gated, &self.down, self.hidden)?
    }
}
