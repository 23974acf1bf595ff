//! What a run is: pure machines, plain values, and the journal that makes events durable.
//!
//! Knows nothing of time, randomness, tensors, actors or logs. The journal is the only part that touches files.

pub mod device;
pub mod metrics;
pub mod plan;
