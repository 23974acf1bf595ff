//! What a decoding made and took.

use models::Answer;
use state::plan::Strategy;
use state::watchdog::PutOff;

/// One cycle of a decoding, in short.
#[derive(Debug, Clone, Copy, Default)]
pub struct CycleStats {
    /// Seconds since the decoding began, at the cycle's end.
    pub at_s: f64,
    /// Seconds of the cycle; of that in the drafter (with catching up), and in the target.
    pub seconds: f64,
    /// Drafting.
    pub draft_s: f64,
    /// The target's forward.
    pub target_s: f64,
    /// Requests, rows through the target, tokens emitted.
    pub requests: usize,
    /// One for each request and each drafted token.
    pub rows: usize,
    /// Rows of prompts that went along.
    pub prefilled: usize,
    /// Tokens emitted.
    pub tokens: usize,
    /// Tokens that were to be expected, where the drafter can tell.
    pub promised: Option<f64>,
    /// Requests with a draft, and the tokens they emitted.
    pub drafted: (usize, usize),
    /// How it drafted.
    pub strategy: Option<Strategy>,
}

/// What a decoding made and took.
#[derive(Debug, Default)]
pub struct Decoded {
    /// In the order of the requests.
    pub answers: Vec<Answer>,
    /// Every cycle.
    pub cycles: Vec<CycleStats>,
    /// For each level of the learned drafter's drafts, how often its guesses were to decide because all above were right, and
    /// how often one was right.
    pub levels: Vec<(u64, u64)>,
    /// Why the learned drafter was put off by the end, if it was.
    pub put_off: Option<PutOff>,
    /// Of admitting and decoding.
    pub seconds: f64,
}

impl Decoded {
    /// Tokens of all answers.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.answers.iter().map(|a| a.log_probs.len()).sum()
    }

    /// Tokens a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.tokens() as f64 / self.seconds.max(1e-9)
    }

    /// Tokens of a request in a cycle, bonus included.
    #[must_use]
    pub fn accept_length(&self) -> f64 {
        let requests: usize = self.cycles.iter().map(|m| m.requests).sum();
        self.cycles.iter().map(|m| m.tokens).sum::<usize>() as f64 / requests.max(1) as f64
    }

    /// Forwards of the target that decoded; those of prompts alone are not counted.
    #[must_use]
    pub fn forwards(&self) -> usize {
        self.cycles.iter().filter(|m| m.requests > 0).count()
    }
}
