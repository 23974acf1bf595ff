//! Steps and rewards of the file format.

use std::path::PathBuf;

use serde::Deserialize;
use state::plan::Optimizer;
use state::plan::Precision;

/// One stage of a run.
#[derive(Debug, Deserialize)]
pub(crate) enum Step {
    Sft(Sft),
    Grpo(Grpo),
    Evaluate(Evaluate),
    Export(Export),
}

/// Supervised fine-tuning.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sft {
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    pub(crate) micro_batch: Option<usize>,
    pub(crate) optimizer: Optimizer,
    pub(crate) evaluate: Option<Meanwhile>,
}

/// Evaluations during a training.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Meanwhile {
    pub(crate) every: usize,
    pub(crate) problems: usize,
    #[serde(default)]
    pub(crate) temperature: f32,
}

/// Group-relative policy optimisation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Grpo {
    pub(crate) steps: usize,
    pub(crate) prompts: usize,
    pub(crate) group: usize,
    pub(crate) micro_batch: Option<usize>,
    #[serde(default = "Grpo::clip")]
    pub(crate) clip: (f32, f32),
    #[serde(default)]
    pub(crate) kl: f32,
    #[serde(default = "Grpo::normalize")]
    pub(crate) normalize: bool,
    pub(crate) optimizer: Optimizer,
    pub(crate) evaluate: Option<Meanwhile>,
}

impl Grpo {
    fn clip() -> (f32, f32) {
        (0.2, 0.2)
    }

    fn normalize() -> bool {
        true
    }
}

/// Accuracy on held-out problems.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Evaluate {
    pub(crate) problems: usize,
    #[serde(default)]
    pub(crate) temperature: f32,
}

/// Writes the policy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Export {
    pub(crate) to: PathBuf,
    #[serde(default)]
    pub(crate) precision: Precision,
}

/// A rule that scores an answer.
#[derive(Debug, Deserialize)]
pub(crate) enum Reward {
    Exact(Marked),
    Numeric(Marked),
    Format(Marked),
    Steps(Steps),
    Length(Weight),
}

/// A reward that looks for a text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Marked {
    pub(crate) marker: Option<String>,
    #[serde(default = "one")]
    pub(crate) weight: f32,
}

/// A reward that compares steps.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Steps {
    pub(crate) separator: Option<String>,
    #[serde(default = "one")]
    pub(crate) weight: f32,
}

/// A reward without further parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Weight {
    #[serde(default = "one")]
    pub(crate) weight: f32,
}

fn one() -> f32 {
    1.0
}
