//! The journal: the events that a run is made of, in order and durable.
//!
//! A run is what its journal says: the run replays it. The only part of this crate that touches files.
//!
//! * **JOURNAL-1** After [`Journal::commit`] returns, the events appended so far survive the end of the process and,
//!   as far as the disk keeps its promises, of the machine.
//! * **JOURNAL-2** What is read is a prefix of what was appended, and reading says how much was lost.
//! * **JOURNAL-3** Damage is an error or a shorter prefix, never another event and never a panic.

mod memory;
mod process;
mod record;
mod sled;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::metrics::StepMetrics;
use crate::plan::Plan;

pub use self::sled::{Recovery, SledJournal};
pub use memory::MemoryJournal;
pub use process::has_ended;
pub use record::VERSION;

/// Something that happened to a run. Variants are only appended, and [`VERSION`] is raised when one changes,
/// or the same plan comes to mean other numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The run began; the first event of a journal.
    RunStarted {
        /// What is to be done.
        plan: Box<Plan>,
        /// SHA-256 of what decides in the plan what is learned, lower-case hex.
        plan_sha256: String,
        /// Version of the noise function that tokens are drawn with.
        noise_version: u32,
        /// What it is done with.
        inputs: Inputs,
    },
    /// A process took up the run.
    SessionStarted {
        /// Number of the session, from 0.
        n: u32,
        /// Names of the devices.
        devices: Vec<String>,
        /// Kernel variant in use.
        kernels: String,
        /// What is to be done, if that is not what the session before was told: the same is learned, in another way.
        plan: Option<Box<Plan>>,
    },
    /// A step of a stage ended.
    StepCommitted {
        /// What it measured, and which step it was.
        metrics: Box<StepMetrics>,
        /// BLAKE3 of the weights after it, lower-case hex.
        weights_blake3: String,
        /// Folder name of the checkpoint made after it, if one was.
        checkpoint: Option<String>,
    },
    /// A device was lost, and is started again after a wait.
    DeviceRestarted {
        /// Index of the device.
        device: usize,
        /// Stage of the plan, from 0.
        stage: usize,
        /// Step within the stage, from 0.
        step: usize,
        /// Why it was lost.
        reason: String,
    },
    /// All steps are done.
    RunCompleted {
        /// BLAKE3 of the final weights, lower-case hex.
        weights_blake3: String,
    },
    /// The session was asked to stop before the end.
    Interrupted {
        /// Folder name of the checkpoint made after the last step, if that had none.
        checkpoint: Option<String>,
    },
}

/// What a run reads from outside its folder. The plan has only the names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// SHA-256 of the first weights' BLAKE3 and the model's shape, lower-case hex.
    pub model_sha256: String,
    /// SHA-256 of the problems as the model reads them, lower-case hex.
    pub data_sha256: String,
}

/// Where events go.
pub trait Journal {
    /// Adds an event after all others.
    ///
    /// # Errors
    /// If the event cannot be encoded or the store fails.
    fn append(&mut self, event: &Event) -> Result<(), Error>;

    /// All events, oldest first.
    ///
    /// # Errors
    /// If the store fails or a record is damaged.
    fn events(&self) -> Result<Vec<Event>, Error>;

    /// Makes all appended events durable.
    ///
    /// # Errors
    /// If the store or the disk fails; the events may or may not be durable then.
    fn commit(&mut self) -> Result<(), Error>;
}

#[cfg(test)]
mod tests;
