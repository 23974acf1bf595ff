//! Tokens drawn from rows of logits, each with the noise of its own place.

use crate::logprob::log_prob;
use crate::noise::NoiseKey;
use crate::nucleus;
use crate::pool::{Pool, Shares};

/// Logits that are worth another thread.
const LOGITS: usize = 1 << 14;

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draws {
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have together this probability; 1 is all of them.
    pub top_p: f32,
}

impl Draws {
    /// The tokens that can be drawn, likeliest first; nothing if all can, or only the likeliest.
    #[must_use]
    pub fn nucleus(&self, logits: &[f32]) -> Option<Vec<u32>> {
        nucleus::cut(logits, self.temperature, self.top_p)
    }
}

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pick {
    /// The token.
    pub token: u32,
    /// Its log-probability under `softmax(logits / T)`, T = 1 if greedy, of all tokens whatever the nucleus.
    pub log_prob: f32,
}

/// Draws a token from each row: logits `(r, n)`, the key and position of each row's noise; replaces `picks` `(r)`.
///
/// # Panics
/// If shapes do not fit.
pub fn draw(
    pool: &Pool,
    (logits, n): (&[f32], usize),
    draws: Draws,
    places: &[(NoiseKey, u32)],
    picks: &mut Vec<Pick>,
) {
    assert_eq!(logits.len(), n * places.len(), "logits of {} rows", places.len());
    picks.clear();
    picks.resize(places.len(), Pick::default());
    let Draws { temperature, top_p } = draws;
    let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
    let shares = Shares::of(picks);
    pool.split(places.len(), (LOGITS / n.max(1)).max(1), |rows| {
        // SAFETY: ranges of a split are disjoint.
        let picks = unsafe { shares.part(rows.clone()) };
        for (pick, row) in picks.iter_mut().zip(rows) {
            let (logits, (key, position)) = (&logits[row * n..(row + 1) * n], places[row]);
            let token = nucleus::sample(logits, temperature, top_p, &key, position);
            *pick = Pick { token, log_prob: log_prob(logits, token, inverse) };
        }
    });
}
