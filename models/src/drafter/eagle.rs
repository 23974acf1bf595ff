//! The learned drafter: a tree of what its network predicts. Coupled drafting: candidates are ranked by logits / T, as far as they
//! are believed, plus the noise that the target will be sampled with, so that a perfect drafter is always accepted.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kernels::{Heads, KeyValues, Pool, Scratch, attend};
use state::plan::{DrafterShape, Strategy};

use super::guess::{Guess, Guessed, Known, Records, agree, chain, guessed, promised, rival};
use super::network::{Network, Pass};
use super::share::{Bounds, keep};
use super::sharpness::{CANDIDATES, Favourites};
use super::vocabulary::{Candidate, Place};
use super::{Calibration, Context, Drafter, Vocabulary};
use crate::error::Result;
use crate::target::Hidden;
use crate::weights::Weights;
use state::speculation::tree::{Accepted, DraftTree, ROOT};

pub use super::network::{config, parameters, random, reads, weights};

/// Memory that forwards reuse.
#[derive(Debug, Default)]
struct Memory {
    kept: Vec<f32>,
    pass: Pass,
    logits: Vec<f32>,
}

/// Rows that the drafter looks back on where it meets a request in the middle. All of them would cost a long answer more than
/// its drafts save. Where it meets many at a time it looks back on fewer of each, or they would all wait for that.
const WINDOW: usize = 192;
const WINDOW_MIN: usize = 32;
const WINDOWS: usize = 1024;

/// What the drafter keeps of a request: keys and values of the rows already seen, and its last prediction.
#[derive(Debug)]
struct Seen {
    /// Position of the first row.
    first: usize,
    rows: KeyValues,
    /// Predicted hidden state of the last token.
    prediction: Vec<f32>,
}

/// The drafter of one device.
#[derive(Debug)]
pub struct Eagle {
    vocabulary: Arc<Vocabulary>,
    network: Network,
    reads: Hidden,
    heads: Heads,
    pool: Arc<Pool>,
    seen: BTreeMap<u64, Seen>,
    records: Known,
    memory: Memory,
    catch_up_s: f64,
    /// Tokens of the last drafts that are expected to be right.
    promised: f64,
    calibration: Arc<Mutex<Calibration>>,
    /// The guesses of each tree of the last draft.
    guesses: Vec<Vec<Guess>>,
    /// What else might have been guessed in them.
    favourites: Vec<Favourites>,
    /// The requests of the last draft.
    drafted: Vec<u64>,
}

/// A node that may get children: its place in the tree, its prediction, and the nodes above it as rows of this draft.
#[derive(Debug, Clone)]
struct Leaf {
    request: usize,
    node: usize,
    token: u32,
    guessed: Guessed,
    chance: f32,
    hidden: Vec<f32>,
    above: Vec<usize>,
}

impl Eagle {
    /// A drafter over these weights that proposes tokens of this vocabulary, and computes on these threads.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn new(vocabulary: Arc<Vocabulary>, weights: &Weights, shape: DrafterShape, pool: Arc<Pool>) -> Result<Self> {
        let config = vocabulary.target().config();
        let network = Network::new(config, shape, weights)?;
        let (heads, reads) = (network.heads(), reads(shape));
        let (seen, records, memory) = (BTreeMap::new(), Known::default(), Memory::default());
        let (calibration, guesses, favourites, drafted) = Default::default();
        let (catch_up_s, promised) = (0.0, 0.0);
        Ok(Self {
            vocabulary,
            network,
            reads,
            heads,
            pool,
            seen,
            records,
            memory,
            catch_up_s,
            promised,
            calibration,
            guesses,
            favourites,
            drafted,
        })
    }

    /// The same, with chances that others learn from too, or that an earlier version has learned.
    #[must_use]
    pub fn calibrated(self, calibration: Arc<Mutex<Calibration>>) -> Self {
        Self { calibration, ..self }
    }

    /// The same with what an earlier version has found out about requests.
    #[must_use]
    pub fn knowing(self, records: Known) -> Self {
        Self { records, ..self }
    }

    /// Brings every request's rows up to its last token; leaves the prediction of the last token's hidden state. Returns how
    /// many rows it ran.
    fn catch_up(&mut self, requests: &[Context<'_>]) -> usize {
        let config = self.vocabulary.target().config();
        let (width, each) = (config.hidden, self.reads.width(config));
        let (mut ids, mut positions, mut owner) = (Vec::new(), Vec::new(), Vec::new());
        self.memory.kept.clear();
        self.meet(requests);
        for (i, request) in requests.iter().enumerate() {
            let last = request.tokens.len() - 1;
            let Some(seen) = self.seen.get(&request.id) else { continue };
            for row in seen.first + seen.rows.rows()..last {
                ids.push(request.tokens[row + 1]);
                positions.push(u32::try_from(row).unwrap_or(u32::MAX));
                self.memory.kept.extend_from_slice(request.hidden_row(row, each));
                owner.push(i);
            }
        }
        if ids.is_empty() {
            return 0;
        }
        self.network.enter(&self.pool, &self.memory.kept, &mut self.memory.pass.entered);
        self.extend(requests, &ids, &positions, &owner);
        for (row, request) in owner.iter().enumerate() {
            if let Some(seen) = self.seen.get_mut(&requests[*request].id) {
                seen.prediction.clear();
                seen.prediction.extend_from_slice(&self.memory.pass.predicted[row * width..(row + 1) * width]);
            }
        }
        owner.len()
    }

    /// Where to look back to in requests that it has not seen; after a pause that is longer than its window, one is met anew.
    fn meet(&mut self, requests: &[Context<'_>]) {
        let is_known = |request: &&Context<'_>| {
            let seen = self.seen.get(&request.id);
            seen.is_some_and(|seen| seen.first + seen.rows.rows() + WINDOW + 1 >= request.tokens.len())
        };
        let new: Vec<&Context<'_>> = requests.iter().filter(|request| !is_known(request)).collect();
        let window = (WINDOWS / new.len().max(1)).clamp(WINDOW_MIN, WINDOW);
        for request in new {
            let first = (request.tokens.len() - 1).saturating_sub(window);
            self.seen.insert(request.id, Seen { first, rows: KeyValues::new(self.heads), prediction: Vec::new() });
        }
    }

    /// Runs rows of known hidden states, which have entered, through the network and keeps their keys and values. Rows of a
    /// request stand together, in order.
    fn extend(&mut self, requests: &[Context<'_>], ids: &[u32], positions: &[u32], owner: &[usize]) {
        let (seen, shape) = (&mut self.seen, self.heads);
        let (width, kv_width) = (shape.width(), shape.kv_width());
        let longest = owner.chunk_by(|a, b| a == b).map(<[usize]>::len).max().unwrap_or(0);
        let order: Vec<usize> = (0..longest).collect();
        let chain: Vec<&[usize]> = (1..=longest).map(|n| &order[..n]).collect();
        let (mut scratch, mut fresh) = (Scratch::default(), KeyValues::new(shape));
        let mut attend_own = |[q, k, v]: [&[f32]; 3], out: &mut [f32]| {
            let mut first = 0;
            for group in owner.chunk_by(|a, b| a == b) {
                let last = first + group.len();
                let Some(seen) = seen.get_mut(&requests[group[0]].id) else { continue };
                let here = first * kv_width..last * kv_width;
                fresh.clear();
                fresh.extend(&k[here.clone()], &v[here.clone()]);
                let context = kernels::Context { shared: &[&seen.rows], fresh: &fresh, paths: &chain[..group.len()] };
                let at = first * width..last * width;
                attend(&q[at.clone()], context, shape, &mut scratch, &mut out[at]);
                seen.rows.extend(&k[here.clone()], &v[here]);
                first = last;
            }
        };
        let (target, pass) = (self.vocabulary.target(), &mut self.memory.pass);
        self.network.run(target, &self.pool, (ids, positions), &mut attend_own, pass);
    }

    /// Predictions below nodes of the trees. Each row attends to its request's rows and to the rows above it.
    fn deepen(&mut self, requests: &[Context<'_>], leaves: &mut [Leaf], level: usize, drafts: &mut [KeyValues]) {
        let shape = self.heads;
        let (width, kv_width) = (shape.width(), shape.kv_width());
        let ids: Vec<u32> = leaves.iter().map(|l| l.token).collect();
        let position = |l: &Leaf| u32::try_from(requests[l.request].tokens.len() - 1 + level).unwrap_or(u32::MAX);
        let positions: Vec<u32> = leaves.iter().map(position).collect();
        self.memory.pass.entered.clear();
        leaves.iter().for_each(|l| self.memory.pass.entered.extend_from_slice(&l.hidden));
        for group in leaves.chunk_by_mut(|a, b| a.request == b.request) {
            let first = drafts[group[0].request].rows();
            group.iter_mut().enumerate().for_each(|(i, leaf)| leaf.above.push(first + i));
        }
        let known = &*leaves;
        let (seen, mut scratch) = (&self.seen, Scratch::default());
        let mut attend_path = |[q, k, v]: [&[f32]; 3], out: &mut [f32]| {
            let mut first = 0;
            for group in known.chunk_by(|a, b| a.request == b.request) {
                let last = first + group.len();
                let draft = &mut drafts[group[0].request];
                let here = first * kv_width..last * kv_width;
                draft.extend(&k[here.clone()], &v[here]);
                let Some(seen) = seen.get(&requests[group[0].request].id) else { continue };
                let paths: Vec<&[usize]> = group.iter().map(|l| l.above.as_slice()).collect();
                let context = kernels::Context { shared: &[&seen.rows], fresh: draft, paths: &paths };
                let at = first * width..last * width;
                attend(&q[at.clone()], context, shape, &mut scratch, &mut out[at]);
                first = last;
            }
        };
        let (target, pass) = (self.vocabulary.target(), &mut self.memory.pass);
        self.network.run(target, &self.pool, (&ids, &positions), &mut attend_path, pass);
        let predicted = self.memory.pass.predicted.chunks_exact(self.vocabulary.target().config().hidden);
        for (leaf, hidden) in leaves.iter_mut().zip(predicted) {
            leaf.hidden.clear();
            leaf.hidden.extend_from_slice(hidden);
        }
    }
}

impl Drafter for Eagle {
    fn reads(&self) -> Hidden {
        self.reads
    }

    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let began = Instant::now();
        let mut trees = self.propose(requests);
        let asked: Vec<usize> = (0..requests.len()).filter(|request| self.has_room(*request, strategy)).collect();
        let rest: Vec<Context<'_>> = asked.iter().map(|request| requests[*request]).collect();
        let rows = self.catch_up(&rest);
        // A cycle before with the same strategy leaves at most so many.
        let usual = rest.len() * (strategy.depth + 1);
        let unusual = rows.saturating_sub(usual) as f64 / rows.max(1) as f64;
        self.catch_up_s = began.elapsed().as_secs_f64() * unusual;
        let root = |request: usize| Leaf {
            request,
            node: ROOT,
            token: 0,
            guessed: Guessed { gap: 0.0, usual: 1.0 },
            chance: 1.0,
            hidden: self.seen.get(&requests[request].id).map(|s| s.prediction.clone()).unwrap_or_default(),
            above: Vec::new(),
        };
        // A prompt of one token has no hidden state before it to draft from.
        let mut leaves: Vec<Leaf> = asked.into_iter().map(root).filter(|l| !l.hidden.is_empty()).collect();
        let mut drafts: Vec<KeyValues> = requests.iter().map(|_| KeyValues::new(self.heads)).collect();
        let budgets: Vec<usize> = requests.iter().map(|r| strategy.budget.max(r.proposal.len())).collect();
        self.favourites = vec![Favourites::default(); requests.len()];
        for level in 0..strategy.depth {
            let grown = self.grow(requests, &leaves, level, strategy, &mut trees);
            if grown.is_empty() || level + 1 == strategy.depth {
                break;
            }
            leaves = self.promising(grown, requests, (&budgets, strategy.budget_all), level + 1..strategy.depth);
            if leaves.is_empty() {
                break;
            }
            self.deepen(requests, &mut leaves, level, &mut drafts);
        }
        self.drafted = requests.iter().map(|r| r.id).collect();
        for request in 0..trees.len() {
            self.keep(&mut trees[request..=request], &[1.0], (request, budgets[request]));
        }
        if strategy.budget_all > 0 {
            let worth: Vec<f32> = requests.iter().map(|r| r.remainder).collect();
            self.keep(&mut trees, &worth, (0, strategy.budget_all));
        }
        self.promised = trees.iter().zip(&self.guesses).map(|(tree, guesses)| promised(tree, guesses)).sum();
        Ok(trees)
    }

    fn promised(&self) -> Option<f64> {
        Some(self.promised)
    }

    fn known(&mut self) -> Known {
        std::mem::take(&mut self.records)
    }

    fn verified(&mut self, trees: &[DraftTree], accepted: &[Accepted]) {
        let mut calibration = lock(&self.calibration);
        for (accepted, favourites) in accepted.iter().zip(&self.favourites) {
            calibration.sharpness.observe(favourites, accepted);
        }
        for (((tree, accepted), guesses), id) in trees.iter().zip(accepted).zip(&self.guesses).zip(&self.drafted) {
            let records = self.records.0.entry(*id).or_default();
            let is_right = |node: usize| accepted.nodes.contains(&node);
            for (node, guess) in guesses.iter().enumerate() {
                if tree.parents[node] == ROOT || is_right(tree.parents[node]) {
                    records.observe(guess, is_right(node), &mut calibration);
                }
            }
        }
    }

    fn catch_up_s(&self) -> f64 {
        self.catch_up_s
    }

    fn learned(&self, request: usize) -> bool {
        self.guesses[request].iter().all(|guess| guess.proposed.is_none())
    }

    fn guessed(&self, request: usize, accepted: &Accepted) -> Option<usize> {
        guessed(&self.guesses[request], accepted)
    }

    fn left(&mut self, id: u64) {
        self.seen.remove(&id);
        self.records.0.remove(&id);
    }

    fn ended(&mut self, id: u64, _: &[u32], _: usize) {
        self.left(id);
    }
}

impl Eagle {
    /// How guesses of a request came true so far.
    fn records(&self, request: &Context<'_>) -> Records {
        self.records.0.get(&request.id).copied().unwrap_or_default()
    }

    /// Trees of what is proposed, with chances.
    fn propose(&mut self, requests: &[Context<'_>]) -> Vec<DraftTree> {
        let calibration = lock(&self.calibration);
        self.guesses = requests.iter().map(|r| chain(r.proposal.len(), &self.records(r), &calibration)).collect();
        requests.iter().map(|r| DraftTree::chain(r.proposal.to_vec())).collect()
    }

    /// Whether the network may guess something for a request that is as likely as what is proposed, and as the strategy wants it.
    fn has_room(&self, request: usize, strategy: &Strategy) -> bool {
        let chain = &self.guesses[request];
        let last = chain.last().filter(|_| chain.len() >= strategy.budget).map_or(0.0, |last| last.chance);
        chain.is_empty() || rival(chain, strategy.depth) > last.max(strategy.chance_min)
    }

    /// Leaves the `budget` best nodes of these trees, those of request `first` and the following ones.
    fn keep(&mut self, trees: &mut [DraftTree], worth: &[f32], (first, budget): (usize, usize)) {
        let nodes: usize = trees.iter().map(DraftTree::len).sum();
        if nodes <= budget {
            return;
        }
        let guesses = &mut self.guesses[first..first + trees.len()];
        let chances: Vec<Vec<f32>> = guesses.iter().map(|all| all.iter().map(|guess| guess.chance).collect()).collect();
        let favourites = &mut self.favourites[first..];
        for ((guesses, favourites), kept) in
            guesses.iter_mut().zip(favourites).zip(keep(trees, &chances, worth, budget))
        {
            favourites.keep(&kept);
            *guesses = kept.into_iter().map(|node| guesses[node]).collect();
        }
    }

    /// Leaves whose children are to be among the best nodes in the end, if first choices are right as often as they usually are on the
    /// levels to come. Most of what else the network would be asked is left out of the trees again.
    fn promising(
        &self,
        mut leaves: Vec<Leaf>,
        requests: &[Context<'_>],
        (budgets, budget_all): (&[usize], usize),
        levels: Range<usize>,
    ) -> Vec<Leaf> {
        let calibration = lock(&self.calibration);
        let first: Vec<f32> = levels.map(|level| calibration.first(level)).collect();
        drop(calibration);
        let hopes = |leaf: &Leaf| {
            let record = self.records(&requests[leaf.request]).guessed;
            first.iter().scan(leaf.chance, move |chance, first| {
                *chance *= record.correct(*first);
                Some(*chance)
            })
        };
        let of = |guesses: &Vec<Guess>| guesses.iter().map(|guess| guess.chance).collect();
        let mut chances: Vec<Vec<f32>> = self.guesses.iter().map(of).collect();
        leaves.iter().for_each(|leaf| chances[leaf.request].extend(hopes(leaf)));
        let worth = requests.iter().map(|request| request.remainder).collect();
        let bounds = Bounds::of(chances.into_iter().zip(budgets.iter().copied()), worth, budget_all);
        leaves.retain(|leaf| hopes(leaf).next().is_some_and(|child| bounds.allow(leaf.request, child)));
        leaves
    }

    /// Adds one level: of the children of each request's leaves together the `width` likeliest. Returns the new leaves.
    fn grow(
        &mut self,
        requests: &[Context<'_>],
        leaves: &[Leaf],
        level: usize,
        strategy: &Strategy,
        trees: &mut [DraftTree],
    ) -> Vec<Leaf> {
        let hidden: Vec<f32> = leaves.iter().flat_map(|l| l.hidden.iter().copied()).collect();
        if hidden.is_empty() {
            return Vec::new();
        }
        let read = self.network.leave(&self.pool, &hidden);
        self.vocabulary.logits_into(&self.pool, &read, &mut self.memory.logits);
        let logits = self.memory.logits.chunks_exact(self.vocabulary.size());
        // A copy: other devices draft at the same time.
        let calibration = lock(&self.calibration).clone();
        let sharpness = calibration.sharpness.value(level);
        let mut grown: Vec<Leaf> = Vec::new();
        for (leaf, logits) in leaves.iter().zip(logits).filter(|(leaf, _)| level < requests[leaf.request].depth_max) {
            let request = &requests[leaf.request];
            let record = self.records(request).guessed;
            let position = u32::try_from(request.tokens.len() - request.prompt + level).unwrap_or(u32::MAX);
            let place = Place { draws: request.draws, noise: &request.noise, position, sharpness };
            // One more than wanted: the best one's gap is its distance to the second.
            let best = self.vocabulary.best(logits, &place, CANDIDATES.max(strategy.width + 1));
            self.favourites[leaf.request].add(leaf.node, &best);
            let second = best.get(1).map_or(f32::NEG_INFINITY, |second| second.score);
            for (rank, Candidate { token, score, .. }) in best.iter().copied().take(strategy.width).enumerate() {
                let gap = score - if rank == 0 { second } else { best[0].score };
                let usual = calibration.chance(level, gap);
                let chance = leaf.chance * record.correct(usual);
                if chance >= strategy.chance_min {
                    grown.push(Leaf { token, guessed: Guessed { gap, usual }, chance, ..leaf.clone() });
                }
            }
        }
        // Stable: requests in order, each one's children likeliest first.
        grown.sort_by(|a, b| a.request.cmp(&b.request).then(b.chance.total_cmp(&a.chance)));
        let mut kept: Vec<Leaf> = Vec::new();
        for mut leaf in grown {
            let same = kept.iter().rev().take_while(|k| k.request == leaf.request).count();
            if same < strategy.width {
                self.place(&mut leaf, trees, level);
                kept.push(leaf);
            }
        }
        kept
    }

    /// Gives a guess its node: that of a proposal it agrees with, or a new one.
    fn place(&mut self, leaf: &mut Leaf, trees: &mut [DraftTree], level: usize) {
        let (tree, guesses) = (&mut trees[leaf.request], &mut self.guesses[leaf.request]);
        let Leaf { guessed, chance, .. } = *leaf;
        leaf.node = match tree.child(leaf.node, leaf.token) {
            Some(node) => {
                agree(guesses, node, guessed, chance);
                node
            }
            None => {
                guesses.push(Guess { level, chance, guessed: Some(guessed), proposed: None });
                tree.push(leaf.node, leaf.token)
            }
        };
        leaf.chance = guesses[leaf.node].chance;
    }
}

fn lock(calibration: &Mutex<Calibration>) -> MutexGuard<'_, Calibration> {
    calibration.lock().unwrap_or_else(PoisonError::into_inner)
}
