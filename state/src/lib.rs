//! What a run is: pure machines, plain values, and the journal that makes events durable.
//!
//! Knows nothing of time, randomness, tensors, actors or logs. The journal is the only part that touches files.

pub mod algorithm;
pub mod device;
pub mod drafter;
pub mod error;
pub mod journal;
pub mod metrics;
pub mod plan;
pub mod report;
pub mod reward;
pub mod run;
pub mod speculation;
pub mod step;
pub mod supervise;
pub mod watchdog;

pub use error::Error;
