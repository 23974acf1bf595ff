//! The tokens that a learned drafter may propose, with their rows of the target's head. The head is a fifth of a small
//! target with a large vocabulary, and rollouts use few of its tokens.

use std::sync::Arc;

use kernels::{Draws, Matrix, NoiseKey, Pool, linear, noise};

use crate::layout::{count, parameters};
use crate::load::Config;
use crate::target::Target;
use crate::weights::storage_to_draft;

/// Up to so many tokens a target's whole vocabulary is used.
const WHOLE: usize = 1024;
/// Fewest tokens of a part.
const LEAST: usize = 512;
/// Forwards of the target that a drafted token saves each time it is said: drafts seldom get that far, and seldom guess a rare token.
/// An estimate of SmolLM2.
const SAVES: f64 = 0.15;
/// From this share of a vocabulary on all of it is drafted: no copy of the head is made.
const NEARLY_WHOLE: f64 = 0.75;

/// What a token outside the guessed nucleus is behind by: the target's own may hold it nevertheless.
const OUTSIDE: f32 = 3.0;

/// Where a token is guessed: how and with which noise the target will draw it, and how far logits are believed against that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) draws: Draws,
    pub(crate) noise: &'a NoiseKey,
    /// Of the token in its answer.
    pub(crate) position: u32,
    /// See [`Sharpness`](super::sharpness::Sharpness).
    pub(crate) sharpness: f32,
}

/// A token that may be guessed, with its score: sharpness times logit, plus noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    pub(crate) score: f32,
    /// Divided by T, if there is noise.
    pub(crate) logit: f32,
    /// Less what a token outside the nucleus is behind by.
    pub(crate) noise: f32,
}

/// What a drafter drafts with that has a head of its own: ids of the target's tokens, ascending, and a row of the head for each.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnHead {
    pub(crate) ids: Vec<u32>,
    pub(crate) rows: Vec<f32>,
}

/// A target, and the part of its vocabulary that is drafted.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    target: Arc<Target>,
    /// Ids in order; none if all are drafted.
    ids: Option<Arc<Vec<u32>>>,
    /// Drafters learn with it, too.
    head: Matrix,
}

/// The tokens to draft for this target, from how often each was seen; none for all of them. A token is drafted if it is seen so often
/// that guessing it saves more of the target's forwards than its row of the head, read at each level of a draft, takes of them. If
/// hardly any is, the first ones of the vocabulary are, too.
#[must_use]
pub fn worth_drafting(counts: &[u64], target: &Config) -> Option<Arc<Vec<u32>>> {
    let total: u64 = counts.iter().sum();
    if counts.len() <= WHOLE || total == 0 {
        return None;
    }
    // Of an embedding that is not the head, a forward reads a row or two.
    let aside = if target.tied { 0 } else { target.vocab * target.hidden };
    let row = target.hidden as f64 / (count(&parameters(target)) - aside) as f64;
    let mut ranked: Vec<u32> = (0..u32::try_from(counts.len()).unwrap_or(u32::MAX)).collect();
    ranked.sort_by_key(|id| std::cmp::Reverse(counts[*id as usize]));
    let pays = |id: &u32| counts[*id as usize] as f64 * SAVES > row * total as f64;
    ranked.truncate(ranked.partition_point(pays).max(LEAST));
    if ranked.len() as f64 >= NEARLY_WHOLE * counts.len() as f64 {
        return None;
    }
    ranked.sort_unstable();
    Some(Arc::new(ranked))
}

impl Vocabulary {
    /// All tokens of the target.
    #[must_use]
    pub fn whole(target: &Arc<Target>) -> Self {
        Self { target: target.clone(), ids: None, head: target.head.clone() }
    }

    /// Some tokens of the target, ids in ascending order; all if none.
    ///
    /// # Panics
    /// If an id is beyond the target's vocabulary.
    #[must_use]
    pub fn of(target: &Arc<Target>, ids: Option<&Arc<Vec<u32>>>) -> Self {
        let Some(ids) = ids.filter(|ids| !ids.is_empty()) else { return Self::whole(target) };
        let mut rows = Vec::new();
        kernels::embed(ids, &target.head, &mut rows);
        Self::with_rows(target, ids.clone(), &rows)
    }

    /// Some tokens of the target with a head of their own, a row each; ids in ascending order.
    ///
    /// # Panics
    /// If there are not as many rows, of the target's width, as ids.
    #[must_use]
    pub fn with_head(target: &Arc<Target>, head: &OwnHead) -> Self {
        Self::with_rows(target, Arc::new(head.ids.clone()), &head.rows)
    }

    fn with_rows(target: &Arc<Target>, ids: Arc<Vec<u32>>, rows: &[f32]) -> Self {
        let (n, k) = (ids.len(), target.head.k());
        let storage = storage_to_draft(n * k, target.head.storage());
        let head = Matrix::new(&Arc::new(kernels::pack(rows, n, k)), n, k, storage);
        Self { target: target.clone(), ids: Some(ids), head }
    }

    /// The target.
    #[must_use]
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Tokens that are drafted.
    #[must_use]
    pub fn size(&self) -> usize {
        self.head.n()
    }

    /// Ids of these in the target, in order.
    pub(crate) fn ids(&self) -> Vec<u32> {
        match &self.ids {
            Some(ids) => ids.to_vec(),
            None => (0..u32::try_from(self.size()).unwrap_or(u32::MAX)).collect(),
        }
    }

    pub(crate) fn head(&self) -> &Matrix {
        &self.head
    }

    /// Logits `(r, size)` of hidden states `(r, hidden)`.
    pub(crate) fn logits_into(&self, pool: &Pool, hidden: &[f32], logits: &mut Vec<f32>) {
        logits.resize(hidden.len() / self.head.k() * self.size(), 0.0);
        linear(pool, hidden, &self.head, logits);
    }

    /// The `count` best tokens by sharpness times logits / T plus the target's own noise, best first. Where the target draws from a
    /// nucleus, what is not in the guessed one is less likely.
    pub(crate) fn best(&self, logits: &[f32], place: &Place<'_>, count: usize) -> Vec<Candidate> {
        let Place { draws, noise: key, position, sharpness } = *place;
        let (mut perturbed, temperature) = (Vec::with_capacity(logits.len()), draws.temperature / sharpness);
        match &self.ids {
            None => noise::perturb(logits, temperature, key, position, &mut perturbed),
            Some(ids) => noise::perturb_some(logits, ids, temperature, key, position, &mut perturbed),
        }
        if let Some(nucleus) = draws.nucleus(logits) {
            perturbed.iter_mut().for_each(|score| *score -= OUTSIDE);
            nucleus.into_iter().for_each(|at| perturbed[at as usize] += OUTSIDE);
        }
        let mut best: Vec<(usize, f32)> = Vec::with_capacity(count + 1);
        for (at, score) in perturbed.into_iter().enumerate() {
            if best.len() < count || score > best[best.len() - 1].1 {
                let place = best.partition_point(|(_, s)| *s >= score);
                best.insert(place, (at, score));
                best.truncate(count);
            }
        }
        let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
        let candidate = |(at, score): (usize, f32)| {
            let token = self.ids.as_ref().map_or(at as u32, |ids| ids[at]);
            let logit = logits[at] * inverse;
            Candidate { token, score, logit: logit / sharpness, noise: score - logit }
        };
        best.into_iter().map(candidate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Weights;
    use kernels::Storage;
    use state::plan::TinyShape;

    fn target() -> Arc<Target> {
        let shape = TinyShape { hidden: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 32, positions_max: 32 };
        // A part is stored in bf16 on some machines; then the whole has to be, too.
        let config = Config { storage: Storage::Bf16, ..Config::tiny(&shape).unwrap() };
        let weights = Weights::random(&config, 1).unwrap();
        Arc::new(Target::new(&config, &weights, &Target::rope_table(&config)).unwrap())
    }

    #[test]
    fn a_part_ranks_its_tokens_as_the_whole_does() {
        let (target, pool) = (target(), Pool::default());
        let ids: Arc<Vec<u32>> = Arc::new((0..80).filter(|id| id % 3 != 1).collect());
        let (whole, part) = (Vocabulary::whole(&target), Vocabulary::of(&target, Some(&ids)));
        assert_eq!((whole.size(), part.size()), (80, ids.len()));
        for position in 0..200 {
            let key = NoiseKey::new(3, 1, position, 0, 0);
            let hidden: Vec<f32> = (0..16).map(|i| key.uniform(7, i) as f32 * 4.0 - 2.0).collect();
            let best = |vocabulary: &Vocabulary, temperature: f32, width: usize| {
                let draws = Draws { temperature, top_p: 1.0 };
                let mut logits = Vec::new();
                vocabulary.logits_into(&pool, &hidden, &mut logits);
                let place = Place { draws, noise: &key, position, sharpness: 1.5 };
                vocabulary.best(&logits, &place, width)
            };
            for temperature in [0.0, 1.0] {
                let mut wanted: Vec<u32> = best(&whole, temperature, 80).iter().map(|b| b.token).collect();
                assert_eq!(best(&whole, temperature, 1)[0].token, wanted[0]);
                wanted.retain(|id| ids.contains(id));
                let found: Vec<u32> = best(&part, temperature, 5).iter().map(|b| b.token).collect();
                assert_eq!(found, wanted[..5]);
            }
        }
    }

    #[test]
    fn what_is_outside_the_nucleus_is_seldom_guessed() {
        let target = target();
        let whole = Vocabulary::whole(&target);
        // Probabilities 1/2, 1/4, 1/8 and little.
        let logits: Vec<f32> = (0..80).map(|id| [8.0, 4.0, 2.0, 0.03][id.min(3)]).map(f32::ln).collect();
        let draws = Draws { temperature: 1.0, top_p: 0.7 };
        let mut seen = [0; 80];
        let mut same = 0;
        for position in 0..300 {
            let key = NoiseKey::new(3, 1, 0, 0, 0);
            let best = whole.best(&logits, &Place { draws, noise: &key, position, sharpness: 1.0 }, 4);
            assert_eq!(best.len(), 4, "the target's nucleus may be another");
            same += usize::from(best[0].token == kernels::nucleus::sample(&logits, 1.0, 0.7, &key, position));
            seen[best[0].token as usize] += 1;
        }
        // A quarter is outside; that much noise is seldom enough to be guessed nevertheless.
        assert!(same > 285 && seen[0] > seen[1] && seen[1] > 60, "{same} of 300 guessed, {seen:?}");
    }

    #[test]
    fn tokens_that_pay_are_drafted() {
        let large = Config { layers: 1000, ..target().config().clone() };
        assert_eq!(worth_drafting(&[5; 80], &large), None);
        assert_eq!(worth_drafting(&[0; 5000], &large), None);
        let mut counts = vec![0; 5000];
        (0..2000).for_each(|id| counts[4999 - id] = if id < 600 { 100 } else { 1 });
        let ids = worth_drafting(&counts, &large).unwrap();
        assert!(ids.is_sorted() && ids.len() == 600 && ids[0] == 4400, "{}", ids.len());
        // Beside a larger target a row costs less.
        let larger = Config { layers: 10_000, ..large.clone() };
        assert_eq!(worth_drafting(&counts, &larger).unwrap().len(), 2000);
        assert_eq!(worth_drafting(&[5; 5000], &larger), None);
        counts.fill(0);
        counts[4000] = 9;
        let ids = worth_drafting(&counts, &large).unwrap();
        assert!(ids.contains(&4000) && ids.len() == LEAST, "where hardly one pays a few are drafted nevertheless");
    }
}
