//! The imperative shell: a supervisor, one actor per device with its engine thread, a rewarder, a recorder; and [`Solo`], one
//! device without any of them.
//!
//! Decisions are made in `state`; tensors live in `models` and are touched only on engine threads. Actors carry control:
//! a message for answers that ended, a micro-batch or a step, never for each token.

mod chooser;
mod device;
mod drafting;
mod engine;
mod error;
mod experience;
mod folder;
mod identity;
mod job;
mod learning;
mod past;
mod progress;
mod recorder;
mod rewarder;
mod rollout;
mod run;
mod said;
mod solo;
mod speculator;
mod supervisor;
mod teaching;
mod update;

pub use engine::{Failing, Fault, Moment};
pub use error::{Error, Result};
pub use models::load::eagle::Layout;
pub use models::load::export::{Precision, real};
pub use past::{Past, inspect, look};
pub use progress::{Ended, Progress, ScoredAnswer, ScoredGroup};
pub use rewarder::OwnReward;
pub use run::{Options, check_inputs, may_start, run};
pub use solo::{Asked, CycleStats, DecodeOptions, Decoded, Session, Solo};
pub use teaching::{Packing, Stalls};
