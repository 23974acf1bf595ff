//! Speculation as a plan has it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Speculative decoding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speculation {
    /// Who drafts.
    pub drafters: Vec<Drafter>,
    /// Who chooses the shape of the draft.
    pub controller: Controller,
    /// Training of learned drafters in idle time.
    pub training: Option<DrafterTraining>,
    /// Whether a device that has run dry takes over answers of a busy one, where that ends the step sooner.
    pub lending: bool,
}

/// Whatever proposes tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Drafter {
    /// Longest match of the last tokens in the request itself, its siblings' and earlier answers to the prompt.
    Suffix {
        /// Shortest match that drafts.
        match_min: usize,
        /// Longest match looked for.
        match_max: usize,
    },
    /// One decoder layer that sees the next token and what the target made of the tokens before it.
    Learned {
        /// Its shape.
        shape: DrafterShape,
        /// Folder of an exported drafter to begin with; an untrained one if absent.
        weights: Option<PathBuf>,
    },
}

/// Shape of a drafter that learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrafterShape {
    /// Which network it is.
    pub network: NetworkKind,
    /// Width of its feed-forward network; 0: that of the weights to begin with, or the target's.
    pub ffn: usize,
}

impl DrafterShape {
    /// The same, as wide as one that was found if nothing is said of its width.
    #[must_use]
    pub const fn as_wide_as(self, found: Self) -> Self {
        if self.ffn == 0 { Self { ffn: found.ffn, ..self } } else { self }
    }

    /// An EAGLE drafter with a feed-forward network of this width.
    #[must_use]
    pub const fn eagle(ffn: usize) -> Self {
        Self { network: NetworkKind::Eagle, ffn }
    }

    /// An EAGLE-3 drafter with a feed-forward network of this width.
    #[must_use]
    pub const fn eagle3(ffn: usize) -> Self {
        Self { network: NetworkKind::Eagle3, ffn }
    }
}

/// Network of a drafter that learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkKind {
    /// Predicts the target's last hidden state from the one before and a token (Li et al. 2024, "EAGLE").
    Eagle,
    /// Predicts tokens from hidden states of three layers of the target, and from what it said itself (Li et al. 2025, "EAGLE-3").
    Eagle3,
}

/// Chooses a draft shape, or none, for every cycle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Controller {
    /// Plain decoding.
    Off,
    /// Always the same strategy.
    Fixed(Strategy),
    /// Bucketed epsilon-greedy bandit with an off arm (TLT's BEG-MAB).
    Bandit {
        /// Arms beside `off`.
        strategies: Vec<Strategy>,
        /// Chance of exploring, 0 to 1.
        epsilon: f64,
        /// Measurements kept an arm.
        window: usize,
    },
    /// A strategy for each batch size, written down beforehand: in the order of their largest batch; plain decoding above.
    Table(Vec<TableRow>),
}

/// A row of a table of strategies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRow {
    /// Most requests decoded together that it is for.
    pub batch_max: usize,
    /// How it drafts; none: plain decoding.
    pub strategy: Option<Strategy>,
}

/// Drafted tokens of a cycle, at most, whatever its strategy allows each request.
const DRAFTED_MAX: usize = 512;

/// One way to draft.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Strategy {
    /// Index into `Speculation::drafters`.
    pub drafter: usize,
    /// Levels of the tree.
    pub depth: usize,
    /// Nodes of a level, at most, and tokens looked at below each; 1 is a chain.
    pub width: usize,
    /// Tokens that `drafter` drafts for a request in a cycle, at most.
    pub budget: usize,
    /// Longest chain of the suffix drafter that this strategy's drafter takes into its tree where there is a match: as many of
    /// both together as `budget` allows, or as the chain has; 0: it is not asked.
    pub suffix: usize,
    /// The learned drafter leaves out tokens with a smaller estimated chance to be accepted, 0 to 1.
    pub chance_min: f32,
    /// Tokens that the learned drafter drafts for all requests of a cycle together, at most: where they are likely to be right, and
    /// where much is left to say; 0: as many as `budget` allows each, up to 512 together.
    pub budget_all: usize,
}

impl Strategy {
    /// One token a level.
    #[must_use]
    pub const fn chain(drafter: usize, depth: usize) -> Self {
        Self::tree(drafter, depth, 1, depth)
    }

    /// The best `width` tokens of each level, `budget` in all.
    #[must_use]
    pub const fn tree(drafter: usize, depth: usize, width: usize, budget: usize) -> Self {
        Self { drafter, depth, width, budget, suffix: 0, chance_min: 0.0, budget_all: 0 }
    }

    /// The same, with the suffix drafter's chain of up to `depth` tokens in it where it finds a match.
    #[must_use]
    pub const fn with_suffix(self, depth: usize) -> Self {
        Self { suffix: depth, ..self }
    }

    /// The same, without tokens that are unlikely to be accepted.
    #[must_use]
    pub const fn with_chance_min(self, chance_min: f32) -> Self {
        Self { chance_min, ..self }
    }

    /// Tokens that it drafts for all requests of a cycle together, at most: a forward over very many takes long, and their logits much
    /// memory.
    #[must_use]
    pub const fn drafted_max(&self) -> usize {
        if self.budget_all > 0 && self.budget_all < DRAFTED_MAX { self.budget_all } else { DRAFTED_MAX }
    }

    /// The same, with at most so many tokens for all requests together.
    #[must_use]
    pub const fn with_budget_all(self, budget_all: usize) -> Self {
        Self { budget_all, ..self }
    }
}

/// Training of the learned drafter while the device would be idle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrafterTraining {
    /// Peak learning rate; none: what suits the model's width.
    pub lr: Option<f64>,
    /// Tokens a micro-batch, at most.
    pub tokens_max: usize,
    /// Tokens that are guessed ahead of each token of a window, each from the guess before it, at least one (training-time test:
    /// Li et al. 2025, "EAGLE-3", section 3.2).
    pub levels: usize,
    /// Micro-batches between two published versions.
    pub publish_every: usize,
    /// Tokens with hidden states kept for training, at most.
    pub buffer_tokens_max: usize,
    /// Bytes of these hidden states, at most, with those of answers that are held out from training.
    pub buffer_bytes_max: usize,
}

impl Speculation {
    /// Which drafter is the suffix drafter.
    #[must_use]
    pub fn suffix(&self) -> Option<usize> {
        self.drafters.iter().position(|drafter| matches!(drafter, Drafter::Suffix { .. }))
    }

    /// Which drafter learns.
    #[must_use]
    pub fn learned(&self) -> Option<usize> {
        self.drafters.iter().position(|drafter| matches!(drafter, Drafter::Learned { .. }))
    }

    /// The same whose learned drafter is as wide as one that was found, where nothing is said of its width.
    #[must_use]
    pub fn as_wide_as(mut self, found: DrafterShape) -> Self {
        for drafter in &mut self.drafters {
            if let Drafter::Learned { shape, .. } = drafter {
                *shape = shape.as_wide_as(found);
            }
        }
        self
    }

    /// Shape of the learned drafter; none if no drafter learns.
    #[must_use]
    pub fn shape(&self) -> Option<DrafterShape> {
        self.drafters.iter().find_map(|drafter| match drafter {
            Drafter::Learned { shape, .. } => Some(*shape),
            Drafter::Suffix { .. } => None,
        })
    }
}
