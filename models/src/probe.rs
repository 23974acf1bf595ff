//! What rows cost on this machine, measured before anything is decided: a forward over several takes about as long as one over a single row
//! while its weights come from memory, and longer once computing takes longer than reading them (Williams et al. 2009, "Roofline").

use std::sync::Arc;

use kernels::{NoiseKey, Pool};
use state::plan::Strategy;
use state::speculation::DraftTree;

use crate::decode::{Decoder, Decoding};
use crate::drafter::{Context, Drafter};
use crate::error::Result;
use crate::target::{Hidden, Target};

/// Rows of the forwards that are timed.
const ROWS: [usize; 3] = [1, 8, 32];
/// How often; the shortest counts.
const TIMES: usize = 2;

/// Drafts as many tokens as it is asked for, whichever.
struct Anything;

impl Drafter for Anything {
    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let chain = |request: &Context<'_>| DraftTree::chain(vec![0; strategy.depth.min(request.depth_max)]);
        Ok(requests.iter().map(chain).collect())
    }
}

/// Rows and seconds of some of this target's forwards on these threads.
///
/// # Errors
/// If the target has no room for a token.
pub fn forwards(target: &Arc<Target>, pool: &Arc<Pool>) -> Result<Vec<(f64, f64)>> {
    let tokens_max = target.config().positions_max;
    let hidden = Hidden::Nothing;
    let decoding = Decoding { temperature: 0.0, top_p: 1.0, tokens_max, eos: Vec::new(), stop: None, hidden };
    let mut decoder = Decoder::new(target.clone(), decoding, pool.clone());
    decoder.admit(0, &[0], &[(0, NoiseKey::new(0, 0, 0, 0, 0))])?;
    // It waits for a processor that rests.
    decoder.cycle(None)?;
    let mut forwards: Vec<(f64, f64)> = Vec::new();
    for rows in ROWS {
        // The first of each size waits for memory, too.
        let mut shortest = f64::INFINITY;
        for _ in 0..TIMES {
            let cycle = decoder.cycle(Some((&mut Anything, &Strategy::chain(0, rows - 1))))?;
            // Where little is left to say, fewer go along.
            if cycle.rows == rows {
                shortest = shortest.min(cycle.target_s);
            }
        }
        if shortest.is_finite() {
            forwards.push((rows as f64, shortest));
        }
    }
    Ok(forwards)
}

#[cfg(test)]
mod tests {
    use state::plan::TinyShape;

    use super::*;
    use crate::load::Config;
    use crate::weights::Weights;

    #[test]
    fn forwards_are_timed_as_far_as_there_is_room() {
        for (positions_max, expected) in [(128, vec![1.0, 8.0, 32.0]), (20, vec![1.0, 8.0]), (3, vec![1.0])] {
            let tiny = TinyShape { hidden: 16, layers: 2, heads: 2, kv_heads: 1, ffn: 24, positions_max };
            let config = Config::tiny(&tiny).unwrap();
            let weights = Weights::random(&config, 3).unwrap();
            let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap());
            let forwards = forwards(&target, &Arc::new(Pool::new(1).unwrap())).unwrap();
            assert_eq!(forwards.iter().map(|(rows, _)| *rows).collect::<Vec<_>>(), expected);
            assert!(forwards.iter().all(|(_, seconds)| *seconds > 0.0));
        }
    }
}
