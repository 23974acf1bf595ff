//! How a cycle's drafted tokens are shared out among its requests: where they are likely to be right, and where much is left to say.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use state::speculation::DraftTree;
use state::speculation::tree::ROOT;

/// Answers that expectations rest on, at most: of the newest few of a large step all would be long.
const LENGTHS: usize = 256;

/// Lengths of answers that ended, the newest last. Clones share them: what one decoder sees end, all know.
#[derive(Debug, Clone, Default)]
pub struct Lengths(Arc<Mutex<VecDeque<usize>>>);

impl Lengths {
    /// Of answers that are known already, in tokens, the newest last.
    #[must_use]
    pub fn of(tokens: &[usize]) -> Self {
        let lengths = Self::default();
        tokens.iter().for_each(|tokens| lengths.observe(*tokens));
        lengths
    }

    /// As they are now.
    #[must_use]
    pub fn to_vec(&self) -> Vec<usize> {
        self.lock().iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns from an answer of so many tokens.
    pub fn observe(&self, tokens: usize) {
        let mut lengths = self.lock();
        lengths.push_back(tokens);
        let excess = lengths.len().saturating_sub(LENGTHS);
        lengths.drain(..excess);
    }

    /// Tokens that an answer of so many has before it: the mean of those that went on beyond that, and of one that doubles, as
    /// lengths with a long tail do.
    #[must_use]
    pub fn remainder(&self, tokens: usize) -> f32 {
        let lengths = self.lock();
        let longer = lengths.iter().filter(|length| **length > tokens).map(|length| length - tokens);
        let (count, sum) = longer.fold((1, tokens + 1), |(count, sum), rest| (count + 1, sum + rest));
        sum as f32 / count as f32
    }
}

/// A request's guesses that came true, beside those that were to be expected: some are easier to guess than others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Record {
    expected: f32,
    right: f32,
}

/// Guesses that the expectation itself is worth.
const PRIOR: f32 = 8.0;
/// Share forgotten at each guess.
const FORGET: f32 = 1.0 / 64.0;

impl Record {
    /// Learns from a guess of this chance.
    pub(super) fn observe(&mut self, chance: f32, is_right: bool) {
        self.expected += chance - FORGET * self.expected;
        self.right += f32::from(u8::from(is_right)) - FORGET * self.right;
    }

    /// A chance as it is for this request, 0 to 1.
    pub(super) fn correct(&self, chance: f32) -> f32 {
        (chance * (self.right + PRIOR) / (self.expected + PRIOR)).min(1.0)
    }
}

/// What a node has to reach while trees grow to be among the best in the end.
pub(super) struct Bounds {
    worth: Vec<f32>,
    /// Chance, by request.
    each: Vec<f32>,
    /// Chance times worth.
    all: f32,
}

impl Bounds {
    /// From the chances of each request's nodes, those so far and those that are hoped for, and its budget, what a token of each is worth, and the budget of all; of all, 0
    /// is no limit.
    pub(super) fn of(chances: impl Iterator<Item = (Vec<f32>, usize)>, worth: Vec<f32>, budget_all: usize) -> Self {
        let (mut each, mut best) = (Vec::new(), Vec::new());
        for ((mut chances, budget), worth) in chances.zip(&worth) {
            each.push(nth_best(&mut chances, budget));
            // Of one request no more than its own budget are left.
            best.extend(chances.iter().take(budget).map(|chance| chance * worth));
        }
        Self { worth, each, all: nth_best(&mut best, budget_all) }
    }

    /// Whether a node of this chance would be among the best.
    pub(super) fn allow(&self, request: usize, chance: f32) -> bool {
        chance >= self.each[request] && chance * self.worth[request] >= self.all
    }
}

/// The nth largest value, behind the larger ones then; 0 if there are fewer, or n is.
fn nth_best(values: &mut [f32], n: usize) -> f32 {
    if n == 0 || values.len() < n {
        return 0.0;
    }
    *values.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
}

/// Leaves the `budget` best nodes of all trees, by chance times what a token of their request is worth. A node is never likelier
/// than its parent, so that what is left are trees. Returns which nodes are left of each.
pub(super) fn keep(trees: &mut [DraftTree], chances: &[Vec<f32>], worth: &[f32], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<(usize, usize)> =
        trees.iter().enumerate().flat_map(|(request, tree)| (0..tree.len()).map(move |node| (request, node))).collect();
    let value = |(request, node): &(usize, usize)| chances[*request][*node] * worth[*request];
    // Stable: of equal ones the parent comes first.
    order.sort_by(|a, b| value(b).total_cmp(&value(a)));
    order.truncate(budget);
    let mut kept = vec![Vec::new(); trees.len()];
    order.into_iter().for_each(|(request, node)| kept[request].push(node));
    for (tree, kept) in trees.iter_mut().zip(&mut kept) {
        kept.sort_unstable();
        *tree = part(tree, kept);
    }
    kept
}

/// The tree of some nodes, in order, each with its parent.
fn part(tree: &DraftTree, kept: &[usize]) -> DraftTree {
    let place = |parent: usize| match kept.binary_search(&parent) {
        _ if parent == ROOT => ROOT,
        Ok(place) => place,
        Err(_) => unreachable!("a node is never likelier than its parent"),
    };
    let parents = kept.iter().map(|node| place(tree.parents[*node])).collect();
    DraftTree { tokens: kept.iter().map(|node| tree.tokens[*node]).collect(), parents }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A and B; below A its children C and D; below B the likely E; below C its equal F.
    fn tree() -> (DraftTree, Vec<f32>) {
        let parents = vec![ROOT, ROOT, 0, 0, 1, 2];
        (DraftTree { tokens: (0..6).collect(), parents }, vec![0.6, 0.5, 0.4, 0.1, 0.45, 0.4])
    }

    #[test]
    fn the_likeliest_nodes_stay_and_make_a_tree() {
        let kept = |budget| {
            let (tree, chances) = tree();
            let mut trees = [tree];
            let kept = keep(&mut trees, &[chances], &[1.0], budget);
            assert_eq!(kept[0].len(), trees[0].len());
            (trees[0].tokens.clone(), trees[0].parents.clone())
        };
        assert_eq!(kept(9).0, [0, 1, 2, 3, 4, 5]);
        assert_eq!(kept(5), (vec![0, 1, 2, 4, 5], vec![ROOT, ROOT, 0, 1, 2]));
        assert_eq!(kept(4), (vec![0, 1, 2, 4], vec![ROOT, ROOT, 0, 1]));
        assert_eq!(kept(1), (vec![0], vec![ROOT]));
    }

    #[test]
    fn requests_share_by_chance_and_by_what_is_left() {
        let sizes = |worth: [f32; 2]| {
            let (tree, chances) = tree();
            let mut trees = [tree.clone(), tree];
            keep(&mut trees, &[chances.clone(), chances], &worth, 6);
            trees.map(|tree| tree.len())
        };
        assert_eq!(sizes([1.0, 1.0]), [3, 3]);
        assert_eq!(sizes([2.0, 1.0]), [5, 1]);
        assert_eq!(sizes([1.0, 100.0]), [0, 6]);
    }

    /// Trees of three requests, grown level by level; below nodes that the bounds do not allow nothing grows.
    fn grown(case: u32, budgets: (usize, usize), worth: &[f32], is_bounded: bool) -> Vec<Vec<(u32, f32)>> {
        let key = kernels::NoiseKey::new(6, 0, 0, case, 0);
        let mut trees = vec![DraftTree::default(); worth.len()];
        let mut chances: Vec<Vec<f32>> = vec![Vec::new(); worth.len()];
        // Request, node, name; a child's name and chance follow from its parent's.
        let mut leaves: Vec<(usize, usize, u32, f32)> =
            (0..worth.len()).map(|i| (i, ROOT, i as u32 + 1, 1.0)).collect();
        for _ in 0..4 {
            let mut next = Vec::new();
            for (request, node, name, chance) in leaves {
                for child in 0..3 {
                    let name = name * 4 + child;
                    // Eighths, so that there are ties.
                    let chance = chance * (1.0 + (key.uniform(name, 0) * 8.0).floor() as f32) / 8.0;
                    chances[request].push(chance);
                    next.push((request, trees[request].push(node, name), name, chance));
                }
            }
            if is_bounded {
                let each = chances.iter().map(|chances| (chances.clone(), budgets.0));
                let bounds = Bounds::of(each, worth.to_vec(), budgets.1);
                next.retain(|(request, _, _, chance)| bounds.allow(*request, *chance));
            }
            leaves = next;
        }
        for request in 0..trees.len() {
            let kept = keep(&mut trees[request..=request], &chances[request..=request], &[1.0], budgets.0);
            chances[request] = kept[0].iter().map(|node| chances[request][*node]).collect();
        }
        if budgets.1 > 0 {
            let kept = keep(&mut trees, &chances, worth, budgets.1);
            chances =
                kept.iter().zip(chances).map(|(kept, all)| kept.iter().map(|node| all[*node]).collect()).collect();
        }
        trees.iter().zip(chances).map(|(tree, chances)| tree.tokens.iter().copied().zip(chances).collect()).collect()
    }

    #[test]
    fn what_the_bounds_do_not_allow_would_not_be_kept() {
        for case in 0..300 {
            let budgets = (1 + case as usize % 9, [0, 3, 6, 14][case as usize % 4]);
            let worth = [[1.0, 1.0, 1.0], [3.0, 0.5, 1.0], [0.1, 1.0, 8.0]][case as usize % 3];
            assert_eq!(grown(case, budgets, &worth, true), grown(case, budgets, &worth, false), "case {case}");
        }
    }

    #[test]
    fn who_has_spoken_long_has_more_before_it() {
        let lengths = Lengths::default();
        assert_eq!([lengths.remainder(0), lengths.remainder(99)], [1.0, 100.0]);
        [10, 10, 10, 200].into_iter().for_each(|length| lengths.clone().observe(length));
        assert_eq!(Lengths::of(&lengths.to_vec()).to_vec(), [10, 10, 10, 200]);
        assert!(lengths.remainder(5) < lengths.remainder(20));
        assert_eq!(lengths.remainder(200), 201.0);
        (0..LENGTHS).for_each(|_| lengths.observe(10));
        assert_eq!(lengths.remainder(99), 100.0, "the long one is forgotten");
    }

    #[test]
    fn a_record_makes_chances_those_of_its_request() {
        let mut record = Record::default();
        assert!((record.correct(0.5) - 0.5).abs() < 1e-6);
        (0..200).for_each(|i| record.observe(0.5, i % 4 == 0));
        assert!((record.correct(0.5) - 0.25).abs() < 0.05, "{}", record.correct(0.5));
        (0..400).for_each(|_| record.observe(0.5, true));
        assert!((record.correct(0.4) - 0.8).abs() < 0.1 && record.correct(0.9) == 1.0);
    }
}
