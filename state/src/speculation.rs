//! Speculation: the draft as a tree of guesses, the rule that accepts them, and the choice of how to draft.
//!
//! Nothing here changes what is sampled: the target's own tokens are emitted, whatever was guessed. Only the time it
//! takes depends on the drafts.

pub mod controller;
pub mod decision;
pub mod tree;

pub use controller::{Controller, Measured, Skill};
pub use decision::Decision;
pub use tree::{Accepted, DraftTree, accept};
