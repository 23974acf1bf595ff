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

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Its log-probability under `softmax(logits / T)`, T = 1 if greedy, of all tokens whatever the nucleus.
    pub log_prob: f32,
}

/// Draws a token from each row: logits `(r, n)`, the key and position of each row's noise; replaces `drawn` `(r)`.
///
/// # Panics
/// If rows are not of one length.
pub fn draw(pool: &Pool, logits: &[f32], draws: Draws, places: &[(NoiseKey, u32)], drawn: &mut Vec<Drawn>) {
    drawn.clear();
    drawn.resize(places.len(), Drawn::default());
    let n = logits.len() / places.len().max(1);
    assert_eq!(logits.len(), n * places.len(), "logits of {} rows", places.len());
    let Draws { temperature, top_p } = draws;
    let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
    let shares = Shares::of(drawn);
    pool.split(places.len(), (LOGITS / n.max(1)).max(1), |rows| {
        // SAFETY: ranges of a split are disjoint.
        let drawn = unsafe { shares.part(rows.clone()) };
        for (drawn, row) in drawn.iter_mut().zip(rows) {
            let (logits, (key, position)) = (&logits[row * n..(row + 1) * n], places[row]);
            let token = nucleus::sample(logits, temperature, top_p, &key, position);
            *drawn = Drawn { token, log_prob: log_prob(logits, token, inverse) };
        }
    });
}
