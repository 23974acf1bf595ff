//! Speculation in the file format.

use std::path::PathBuf;

use serde::Deserialize;
use state::plan::NetworkKind;

use super::given;

/// Speculative decoding.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Speculation {
    pub(crate) drafters: Option<Vec<Drafter>>,
    pub(crate) controller: Option<Controller>,
    #[serde(deserialize_with = "given")]
    pub(crate) training: Option<Option<Training>>,
    pub(crate) lending: bool,
}

impl Default for Speculation {
    fn default() -> Self {
        Self { drafters: None, controller: None, training: None, lending: true }
    }
}

/// Whatever proposes tokens.
#[derive(Debug, Clone, Deserialize)]
pub(crate) enum Drafter {
    Eagle(Eagle),
    Eagle3(Eagle),
    Suffix(Suffix),
}

/// A decoder layer that learns.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Eagle {
    pub(crate) ffn: usize,
    pub(crate) weights: Option<PathBuf>,
}

/// Longest match.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Suffix {
    pub(crate) match_min: usize,
    pub(crate) match_max: usize,
}

impl Default for Suffix {
    fn default() -> Self {
        Self { match_min: 4, match_max: 24 }
    }
}

/// A drafter as a strategy calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename = "Drafter")]
pub(crate) enum Word {
    Eagle,
    Eagle3,
    Suffix,
}

impl Word {
    /// The network of a drafter that learns.
    pub(crate) fn network(self) -> Option<NetworkKind> {
        match self {
            Self::Eagle => Some(NetworkKind::Eagle),
            Self::Eagle3 => Some(NetworkKind::Eagle3),
            Self::Suffix => None,
        }
    }
}

impl Drafter {
    pub(crate) fn word(&self) -> Word {
        match self {
            Self::Eagle(_) => Word::Eagle,
            Self::Eagle3(_) => Word::Eagle3,
            Self::Suffix(_) => Word::Suffix,
        }
    }
}

/// Chooses a draft shape.
#[derive(Debug, Deserialize)]
pub(crate) enum Controller {
    Off,
    Fixed(Strategy),
    Bandit(Bandit),
    Table(Vec<TableRow>),
    Threshold(TableRow),
}

/// A strategy for batches up to a size, or `None` for plain decoding, which must be written.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TableRow {
    pub(crate) batch_max: usize,
    #[serde(deserialize_with = "Option::deserialize")]
    pub(crate) strategy: Option<Strategy>,
}

/// A controller that measures.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bandit {
    pub(crate) strategies: Vec<Strategy>,
    #[serde(default = "Bandit::epsilon")]
    pub(crate) epsilon: f64,
    #[serde(default = "Bandit::window")]
    pub(crate) window: usize,
}

impl Bandit {
    pub(crate) fn epsilon() -> f64 {
        0.05
    }

    pub(crate) fn window() -> usize {
        64
    }
}

/// One way to draft.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Strategy {
    pub(crate) drafter: Word,
    pub(crate) depth: usize,
    #[serde(default = "Strategy::width")]
    pub(crate) width: usize,
    pub(crate) budget: Option<usize>,
    #[serde(default)]
    pub(crate) suffix: usize,
    #[serde(default)]
    pub(crate) chance_min: f32,
    #[serde(default)]
    pub(crate) budget_all: usize,
}

impl Strategy {
    fn width() -> usize {
        1
    }
}

/// Training of the learned drafter.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Training {
    pub(crate) lr: Option<f64>,
    pub(crate) tokens_max: usize,
    pub(crate) levels: usize,
    pub(crate) publish_every: usize,
    pub(crate) buffer_tokens_max: usize,
    pub(crate) buffer_bytes_max: usize,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            lr: None,
            tokens_max: 256,
            levels: 3,
            publish_every: 32,
            buffer_tokens_max: 65_536,
            // That many tokens of a target 4,096 numbers wide.
            buffer_bytes_max: 1 << 30,
        }
    }
}
