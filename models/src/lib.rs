//! Tensors: targets, drafters, decoding, learning, loaders. Knows nothing of actors, workflow files or groups' rewards.

mod cache;
pub mod chat;
pub mod data;
pub mod decode;
pub mod drafter;
pub mod error;
mod layer;
pub mod layout;
pub mod load;
pub mod optim;
pub mod probe;
pub mod request;
pub mod sha;
pub mod stop;
pub mod target;
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use decode::{Cycle, Decoder, Decoding};
pub use error::{Error, Result};
pub use load::{Config, RawWeights};
pub use request::{Answer, Request, Running};
pub use stop::Stop;
pub use target::{Hidden, Target};
pub use weights::Weights;
