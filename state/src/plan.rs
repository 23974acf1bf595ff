//! A plan: a validated, fully resolved run. Values only, no choices left.
//!
//! `workflows` lowers RON text to a [`Plan`]; the actors execute it. The parameter types that a workflow file
//! spells out (drafters, rewards, sampling, supervision …) live here once and carry `Deserialize`.

mod check;
mod speculation;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use check::OutOfRange;
pub use speculation::{
    Controller, Drafter, DrafterShape, DrafterTraining, NetworkKind, Speculation, Strategy, TableRow,
};

/// One run, ready to execute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Short name, used for the run's folder.
    pub name: String,
    /// Key of every random number of the run.
    pub seed: u64,
    /// Where the target's weights and shape come from.
    pub model: Model,
    /// What its matrices are computed with.
    pub compute: Compute,
    /// Where prompts come from, and how they become text.
    pub data: Data,
    /// What is done, in order.
    pub steps: Vec<Step>,
    /// How tokens are drawn in rollouts.
    pub sampling: Sampling,
    /// What makes an answer good: a weighted sum.
    pub rewards: Vec<WeightedReward>,
    /// The processors to use.
    pub devices: Devices,
    /// Speculative decoding and drafter training.
    pub speculation: Speculation,
    /// When a device fails.
    pub supervision: Supervision,
    /// When progress becomes durable.
    pub checkpoint: Checkpoint,
}

/// What matrices, and attention, are computed with, in rollouts and in training alike. The optimiser's own copy is always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Compute {
    /// As they are trained.
    #[default]
    F32,
    /// Rounded after every step to the upper half of an f32, and so is what they are multiplied with; summed in f32. Keys and
    /// values are kept so, too. Half the bytes to keep and to stream, and twice the speed where processors multiply bf16.
    Bf16,
}

/// The target model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Model {
    /// A small Llama-style model with character tokens.
    Tiny {
        /// Its shape.
        shape: TinyShape,
        /// Weights to start from (a safetensors file); keyed random ones if absent.
        weights: Option<PathBuf>,
        /// Expected SHA-256 of the weights file, lower-case hex.
        sha256: Option<String>,
    },
    /// A folder with `config.json`, `*.safetensors` and `tokenizer.json`.
    HuggingFace(PathBuf),
    /// A GGUF file of architecture `llama`; weights are dequantised to f32.
    Gguf(PathBuf),
}

/// Shape of a [`Model::Tiny`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TinyShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Attention heads; `hidden` must be divisible by it.
    pub heads: usize,
    /// Key/value heads; must divide `heads`.
    pub kv_heads: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Longest sequence, in tokens.
    pub positions_max: usize,
}

/// Prompts and their reference answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Where problems come from.
    pub source: Source,
    /// Text of a prompt; `{question}` is replaced. For generators the default is the question itself.
    pub template: String,
    /// Wrap the prompt into the model's chat template.
    pub chat: bool,
    /// Held-out problems used by `Evaluate`.
    pub heldout: usize,
}

/// Where problems come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Source {
    /// One JSON object a line: with these fields, or in one of the public layouts: `question`/`answer` (with `####`), `problem`/`answer`,
    /// `prompt`/`response`, or `messages`.
    Jsonl(PathBuf, Option<Fields>),
    /// Generated one-digit sums `3+5-2?3+5=8;8-2=6#6`, with step-by-step solutions, some of which check themselves.
    Chains(Chains),
}

/// What the fields of a file of problems are called; `a.b` is the field `b` of the object in `a`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fields {
    /// A text, or messages of which the last is the user's.
    pub question: String,
    /// The final answer, or a text that ends with it behind `####`.
    pub answer: String,
    /// Worked text to fine-tune on.
    pub solution: Option<String>,
}

/// Generator of arithmetic chains. The number of terms is heavy-tailed:
/// `terms_min` plus a geometric amount with mean `terms_mean - terms_min`, and with chance `tail` uniform in
/// `tail_min..=terms_max` instead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chains {
    /// Fewest terms, at least 2.
    pub terms_min: usize,
    /// Mean number of terms of an ordinary problem.
    pub terms_mean: f64,
    /// Most terms.
    pub terms_max: usize,
    /// Chance of a problem from the long tail, 0 to 1.
    pub tail: f64,
    /// Fewest terms of a problem from the tail.
    pub tail_min: usize,
    /// Chance that a solution checks itself, 0 to 1: after its answer come `?` and its last steps again.
    pub check: f64,
    /// Most checks of a solution; one that checks itself does so 1 to `checks_max` times, each number as likely.
    pub checks_max: usize,
    /// Most steps that a check repeats.
    pub check_steps: usize,
    /// Longest solution with its checks, in characters; checks that do not fit are left out.
    pub solution_max: usize,
}

/// One stage of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// Supervised fine-tuning on the data's worked solutions.
    Sft(Sft),
    /// Group-relative policy optimisation.
    Grpo(Grpo),
    /// Accuracy on held-out problems.
    Evaluate(Evaluate),
    /// Writes the weights as a Hugging Face folder.
    Export(Export),
}

impl Step {
    /// As reports name it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sft(_) => "sft",
            Self::Grpo(_) => "grpo",
            Self::Evaluate(_) => "evaluate",
            Self::Export(_) => "export",
        }
    }

    /// Of one that learns, which part of its training it is.
    #[must_use]
    pub fn part(&self) -> Option<Part> {
        match self {
            Self::Sft(sft) => Some(sft.part),
            Self::Grpo(grpo) => Some(grpo.part),
            Self::Evaluate(_) | Self::Export(_) => None,
        }
    }

    /// Whether it learns.
    #[must_use]
    pub fn changes_weights(&self) -> bool {
        self.part().is_some()
    }
}

/// Supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sft {
    /// Optimiser steps.
    pub steps: usize,
    /// Problems a step.
    pub batch: usize,
    /// Problems a micro-batch; divides `batch`.
    pub micro_batch: usize,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Of a training that evaluations divide, which part this is.
    pub part: Part,
}

/// A part of a training: its optimiser and its schedule go on from the part before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Optimiser steps before it.
    pub begun: usize,
    /// Those of the whole training.
    pub of: usize,
}

impl Part {
    /// A training of so many steps that nothing divides.
    #[must_use]
    pub fn whole(steps: usize) -> Self {
        Self { begun: 0, of: steps }
    }
}

/// GRPO (Shao et al. 2024, "DeepSeekMath", section 4), one optimiser step a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grpo {
    /// Optimiser steps.
    pub steps: usize,
    /// Prompts a step.
    pub prompts: usize,
    /// Answers a prompt.
    pub group: usize,
    /// Rollouts a micro-batch; divides `prompts * group`.
    pub micro_batch: usize,
    /// PPO clip range below and above 1.
    pub clip: (f32, f32),
    /// Weight of the k3 estimate of KL(policy, reference) in the loss; 0 needs no reference.
    pub kl: f32,
    /// Divide advantages by the group's standard deviation.
    pub normalize: bool,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Of a training that evaluations divide, which part this is.
    pub part: Part,
}

/// Accuracy on held-out problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluate {
    /// Held-out problems asked; at most `data.heldout`.
    pub problems: usize,
    /// Temperature of the answers; 0 is greedy. Sampled answers are the same at every evaluation of a run but for the policy.
    pub temperature: f32,
}

/// Writes the policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Export {
    /// Folder, relative to the run's folder unless absolute.
    pub to: PathBuf,
    /// How numbers are stored.
    pub precision: Precision,
}

/// How an export stores numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Precision {
    /// As they are trained.
    #[default]
    F32,
    /// Rounded to half: half the size.
    F16,
}

/// AdamW (Loshchilov and Hutter 2019) with warm-up and decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// First and second moment decay.
    #[serde(default = "Optimizer::default_betas")]
    pub betas: (f64, f64),
    /// Decoupled weight decay (matrices only).
    #[serde(default)]
    pub weight_decay: f64,
    /// Largest gradient norm.
    #[serde(default = "Optimizer::default_clip_norm")]
    pub clip_norm: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup: usize,
    /// What follows the warm-up.
    #[serde(default)]
    pub schedule: Schedule,
}

impl Optimizer {
    fn default_betas() -> (f64, f64) {
        (0.9, 0.95)
    }
    fn default_clip_norm() -> f64 {
        1.0
    }
}

/// Learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Schedule {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Half a cosine down to a tenth of the peak.
    Cosine,
}

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have together this probability; 1 is all of them.
    pub top_p: f32,
    /// Longest answer, in tokens.
    pub tokens_max: usize,
    /// Texts that end an answer; rewards read what comes before.
    pub stop: Vec<String>,
}

/// A reward and its weight in the sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightedReward {
    /// The reward.
    pub reward: Reward,
    /// Its weight.
    pub weight: f32,
}

/// A rule that scores an answer from its text and the reference answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reward {
    /// 1 if what follows the last `marker` equals the reference answer, else 0.
    Exact {
        /// Text before the final answer, for instance `#` or `####`.
        marker: String,
    },
    /// 1 if the last number after the last `marker` (or of the whole text if `marker` is empty) equals the reference.
    Numeric {
        /// Text before the final answer.
        marker: String,
    },
    /// 1 if the answer contains `marker` exactly once and was not cut.
    Format {
        /// Text that must be there.
        marker: String,
    },
    /// Share of the worked solution's steps that the answer gives in order, from the first to the first that differs.
    Steps {
        /// Text between two steps.
        separator: String,
    },
    /// Minus the share of `tokens_max` that was used.
    Length,
}

/// Processors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// CPU devices, each with an engine thread of its own. 0: as many as cores, divided by `threads`.
    pub cpu: usize,
    /// Threads of each device, the engine's included.
    pub threads: usize,
    /// Requests decoded together on one device, at most.
    pub slots_max: usize,
    /// Tokens whose keys and values a device keeps, at most, in whole pages, those of a shared prompt once; 0: of all its requests. The
    /// youngest that have no room wait; one alone always goes on.
    pub cache_tokens_max: usize,
}

/// OTP-style supervision of the devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Supervision {
    /// Restarts of a device tolerated within `period_s` before the run stops.
    pub restarts_max: usize,
    /// Length of the period, in seconds.
    pub period_s: f64,
    /// Wait before the first restart, doubled for each further one up to a minute.
    pub backoff_ms: u64,
    /// Seconds after which a device that has work and computes nothing is given up and started again; 0: never. A thread cannot be
    /// ended from outside: what it holds is free once it wakes up, or the process ends.
    pub silent_s: f64,
}

/// Durable progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between two checkpoints.
    pub every: usize,
    /// Checkpoints kept.
    pub keep: usize,
}

impl Plan {
    /// The first step of GRPO.
    #[must_use]
    pub fn grpo(&self) -> Option<&Grpo> {
        self.steps.iter().find_map(|step| if let Step::Grpo(grpo) = step { Some(grpo) } else { None })
    }

    /// Folder of the drafter that the learned drafter begins with.
    #[must_use]
    pub fn drafter_weights(&self) -> Option<&Path> {
        self.speculation.drafters.iter().find_map(|drafter| match drafter {
            Drafter::Learned { weights, .. } => weights.as_deref(),
            Drafter::Suffix { .. } => None,
        })
    }

    /// Files and folders that a run reads.
    #[must_use]
    pub fn inputs(&self) -> Vec<&Path> {
        let model = match &self.model {
            Model::Tiny { weights, .. } => weights.as_deref(),
            Model::HuggingFace(path) | Model::Gguf(path) => Some(path.as_path()),
        };
        let data = match &self.data.source {
            Source::Jsonl(path, _) => Some(path.as_path()),
            Source::Chains(_) => None,
        };
        [model, data, self.drafter_weights()].into_iter().flatten().collect()
    }

    /// The same run without speculation, drafter training and lending: what it must equal, byte for byte.
    #[must_use]
    pub fn without_speculation(&self) -> Self {
        let mut plan = self.clone();
        plan.speculation.controller = Controller::Off;
        plan.speculation.training = None;
        plan.speculation.lending = false;
        plan
    }
}
