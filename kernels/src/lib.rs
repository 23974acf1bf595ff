//! Device operations: one seam for everything that touches numbers in bulk.
//!
//! Every operation fixes the order of summation of each output element by that element's own indices, never by the
//! number of rows, the neighbours in a batch, the threads, or the instruction set. So a token's logits have the same bits
//! in a batch of 1 and of 16, in a draft tree, and in the training forward (invariants L1 and L2 of ARCHITECTURE.md).
//!
//! Operations are explicit: they read slices and write slices, each with its backward beside it and a plain specification
//! in [`mod@reference`]. They know nothing of models or of learning. Shapes that do not fit are mistakes of the caller and
//! panic.
//!
//! Legend of shapes: `r` rows (tokens), `k` input features, `n` output features, `p = ceil(n / PANEL)` panels.

mod adam;
mod attention;
mod dispatch;
mod distance;
mod draw;
mod embed;
mod lanes;
mod linear;
mod logprob;
pub mod math;
mod matrix;
pub mod memory;
pub mod noise;
mod norm;
pub mod nucleus;
mod pool;
mod product;
pub mod reference;
mod rope;
mod swiglu;
pub mod threads;
mod turn;

pub use adam::{AdamRule, AdamTensor, adam_step, approach, sum_of_squares};
pub use attention::{
    Context, Heads, KeyValues, Scratch, SequencesGradient, attend, attend_ahead, attend_ahead_gradient,
    attend_requests, attend_sequences,
};
pub use dispatch::{multiplies_pairs, variant};
pub use distance::{Distance, distance};
pub use draw::{Draws, Pick, draw};
pub use embed::{embed, embed_gradient};
pub use linear::{Turned, add, add_linear, input_gradient, linear, weight_gradient};
pub use logprob::{Chosen, log_prob, log_probs, log_probs_gradient, softmax};
pub use matrix::{Matrix, PANEL, Storage, from_bf16, pack, packed_len, round_to_bf16, to_bf16, unpack};
pub use noise::NoiseKey;
pub use norm::{rms_norm, rms_norm_gradient};
pub use pool::Pool;
pub use rope::{RopeTable, Turn, rope};
pub use swiglu::{swiglu, swiglu_gradient};
