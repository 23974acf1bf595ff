//! The file format. Every type here is lowered to its counterpart in `state::plan` at once.
//!
//! Only what a reader must decide is required: the name, the model, the data and the steps; the shape of a tiny
//! model; the size of a step and its learning rate.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};
use state::plan::Compute;

mod speculation;
mod steps;

pub(crate) use speculation::*;
pub(crate) use steps::*;

/// A whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Workflow {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) seed: u64,
    pub(crate) model: Model,
    #[serde(default)]
    pub(crate) compute: Compute,
    pub(crate) data: Data,
    pub(crate) steps: Vec<Step>,
    pub(crate) rewards: Option<Vec<Reward>>,
    #[serde(default)]
    pub(crate) sampling: Sampling,
    #[serde(default)]
    pub(crate) devices: Devices,
    #[serde(default)]
    pub(crate) speculation: Speculation,
    #[serde(default)]
    pub(crate) supervision: Supervision,
    #[serde(default)]
    pub(crate) checkpoint: Checkpoint,
}

/// Where the target comes from.
#[derive(Debug, Deserialize)]
pub(crate) enum Model {
    Tiny(Tiny),
    HuggingFace(PathBuf),
    Gguf(PathBuf),
}

/// A small model with character tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tiny {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) ffn: usize,
    #[serde(default = "Tiny::positions_max")]
    pub(crate) positions_max: usize,
    pub(crate) weights: Option<PathBuf>,
    pub(crate) sha256: Option<String>,
}

impl Tiny {
    fn positions_max() -> usize {
        512
    }
}

/// Where problems come from.
#[derive(Debug, Deserialize)]
pub(crate) enum Data {
    Chains(Chains),
    Jsonl(Jsonl),
}

impl Data {
    pub(crate) fn heldout(&self) -> usize {
        match self {
            Self::Chains(chains) => chains.heldout,
            Self::Jsonl(jsonl) => jsonl.heldout,
        }
    }
}

/// Generated arithmetic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Chains {
    pub(crate) terms_min: usize,
    pub(crate) terms_mean: Option<f64>,
    pub(crate) terms_max: Option<usize>,
    pub(crate) tail: f64,
    pub(crate) tail_min: Option<usize>,
    pub(crate) check: f64,
    pub(crate) checks_max: usize,
    pub(crate) check_steps: Option<usize>,
    pub(crate) solution_max: Option<usize>,
    pub(crate) template: String,
    pub(crate) chat: bool,
    pub(crate) heldout: usize,
}

impl Default for Chains {
    fn default() -> Self {
        Self {
            terms_min: 2,
            terms_mean: None,
            terms_max: None,
            tail: 0.1,
            tail_min: None,
            check: 0.0,
            checks_max: 5,
            check_steps: None,
            solution_max: None,
            template: question(),
            chat: false,
            heldout: 0,
        }
    }
}

/// Problems from a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Jsonl {
    pub(crate) path: PathBuf,
    pub(crate) question: Option<String>,
    pub(crate) answer: Option<String>,
    pub(crate) solution: Option<String>,
    #[serde(default = "question")]
    pub(crate) template: String,
    #[serde(default)]
    pub(crate) chat: bool,
    #[serde(default)]
    pub(crate) heldout: usize,
}

fn question() -> String {
    "{question}".to_owned()
}

/// How tokens are drawn.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Sampling {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) tokens_max: usize,
    pub(crate) stop: Vec<String>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, tokens_max: 256, stop: Vec::new() }
    }
}

/// Processors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Devices {
    pub(crate) cpu: usize,
    pub(crate) threads: usize,
    pub(crate) slots_max: usize,
    pub(crate) cache_tokens_max: usize,
}

impl Default for Devices {
    fn default() -> Self {
        Self { cpu: 0, threads: 1, slots_max: 16, cache_tokens_max: 0 }
    }
}

/// When a device fails.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Supervision {
    pub(crate) restarts_max: usize,
    pub(crate) period_s: f64,
    pub(crate) backoff_ms: u64,
    pub(crate) silent_s: f64,
}

impl Default for Supervision {
    fn default() -> Self {
        Self { restarts_max: 5, period_s: 60.0, backoff_ms: 100, silent_s: 300.0 }
    }
}

/// When progress becomes durable.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Checkpoint {
    pub(crate) every: usize,
    pub(crate) keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: 1, keep: 2 }
    }
}

/// Tells an absent field (`None`) from `None` in the file (`Some(None)`).
pub(crate) fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(from).map(Some)
}
