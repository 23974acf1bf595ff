//! Device operations: one seam for everything that touches numbers in bulk.
//!
//! Every operation fixes the order of summation of each output element by that element's own indices, never by the
//! number of rows, the neighbours in a batch, or the instruction set. So a token's logits have the same bits in a batch
//! of 1 and of 16, in a draft tree, and in the training forward (invariants L1 and L2 of ARCHITECTURE.md).
//! Operations are candle custom ops with an explicit backward; they know nothing of models or of learning.
//!
//! Legend of shapes: `r` rows (tokens), `k` input features, `n` output features, `p = ceil(n / PANEL)` panels.

mod attention;
mod dispatch;
mod embed;
mod lanes;
mod linear;
mod logprob;
pub mod math;
pub mod noise;
mod norm;
mod rope;
mod swiglu;
mod tensor;

pub use attention::{Context, Heads, KeyRun, Scratch, attend, attend_sequences, push_key};
pub use dispatch::variant;
pub use embed::embed;
pub use linear::{PANEL, linear, pack, unpack};
pub use logprob::{log_prob, log_probs};
pub use noise::NoiseKey;
pub use norm::rms_norm;
pub use rope::{RopeTable, rope};
pub use swiglu::swiglu;
