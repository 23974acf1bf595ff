//! Who proposes tokens. The decode loop knows only this trait; whatever is proposed, the emitted tokens are the target's.

pub mod buffer;
mod calibration;
pub mod eagle;
mod guess;
pub mod hybrid;
pub mod learn;
mod network;
pub mod share;
mod sharpness;
pub mod suffix;
pub mod uncoupled;
pub mod vocabulary;

use kernels::{Draws, NoiseKey};
use state::plan::Strategy;

use crate::error::Result;
use crate::target::Hidden;
pub use calibration::Calibration;
pub use guess::Known;
use state::speculation::{Accepted, DraftTree};
pub use vocabulary::Vocabulary;

/// What a drafter may see of a request.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Identity of the request on this device, used for another one only after this one has ended or left.
    pub id: u64,
    /// Prompt and answer so far; the last token has not been through the target.
    pub tokens: &'a [u32],
    /// Length of the prompt.
    pub prompt: usize,
    /// Target hidden states, [`Hidden::width`] numbers a row, of the first tokens, shared by the group, and of the following ones.
    /// Together one row for each token but the last; empty if none are kept.
    pub hidden: [&'a [f32]; 2],
    /// Noise of the answer.
    pub noise: NoiseKey,
    /// How the target draws its tokens.
    pub draws: Draws,
    /// Deepest level that can still be accepted.
    pub depth_max: usize,
    /// Tokens that the answer is expected to have before it.
    pub remainder: f32,
    /// A chain of tokens that another drafter proposes, for one that takes it into its draft; mostly none.
    pub proposal: &'a [u32],
}

impl<'a> Context<'a> {
    /// The target's hidden states of one of the tokens, `width` numbers.
    pub(crate) fn hidden_row(&self, row: usize, width: usize) -> &'a [f32] {
        let shared = self.hidden[0].len() / width;
        match row.checked_sub(shared) {
            None => &self.hidden[0][row * width..(row + 1) * width],
            Some(row) => &self.hidden[1][row * width..(row + 1) * width],
        }
    }
}

/// Proposes tokens.
pub trait Drafter: Send {
    /// Hidden states of the target that it reads.
    fn reads(&self) -> Hidden {
        Hidden::Nothing
    }

    /// One draft for each request.
    ///
    /// # Errors
    /// If the drafter cannot guess.
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>>;

    /// Tokens of the last drafts that are expected to be right, of all requests together, if the drafter can tell.
    fn promised(&self) -> Option<f64> {
        None
    }

    /// What is known of the requests, for the version that takes this one's place.
    fn known(&mut self) -> Known {
        Known::default()
    }

    /// What the target made of the last drafts: the trees in the order of their requests, and what it accepted of each.
    fn verified(&mut self, _trees: &[DraftTree], _accepted: &[Accepted]) {}

    /// Whether a network alone guessed the last draft of a request.
    fn learned(&self, _request: usize) -> bool {
        false
    }

    /// Tokens among those accepted of the last draft of a request that a network guessed; nothing if it guessed none at all.
    fn guessed(&self, _request: usize, _accepted: &Accepted) -> Option<usize> {
        None
    }

    /// Seconds of the last draft that went into what earlier cycles had left undone.
    fn catch_up_s(&self) -> f64 {
        0.0
    }

    /// An answer that ended elsewhere, or in an earlier session, or is known already.
    fn recall(&mut self, _tokens: &[u32], _prompt: usize) {}

    /// The request has left without an end.
    fn left(&mut self, _id: u64) {}

    /// The request has ended with these tokens (prompt and answer).
    fn ended(&mut self, _id: u64, _tokens: &[u32], _prompt: usize) {}
}
