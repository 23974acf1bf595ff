//! The rows of a cycle.

use std::ops::Range;

use state::speculation::DraftTree;

/// Rows that go through the target together: each request's last token and its draft, then stretches of prompts.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// For each slot, and then for each prompt, its rows of the batch.
    pub(super) rows: Vec<Range<usize>>,
    /// For each row the rows of its slot or prompt it stands below, from the first on, itself last.
    pub(super) paths: Vec<Vec<usize>>,
}

impl Batch {
    /// Adds the last of a request's tokens, and its draft.
    pub(super) fn push_draft(&mut self, tokens: &[u32], tree: &DraftTree) {
        let (first, length) = (self.ids.len(), tokens.len());
        self.ids.push(tokens[length - 1]);
        self.paths.push(vec![0]);
        for node in 0..tree.len() {
            self.ids.push(tree.tokens[node]);
            self.paths.push(std::iter::once(0).chain(tree.path(node).into_iter().map(|n| n + 1)).collect());
        }
        let depth = |path: &Vec<usize>| u32::try_from(length - 2 + path.len()).unwrap_or(u32::MAX);
        self.positions.extend(self.paths[first..].iter().map(depth));
        self.rows.push(first..self.ids.len());
    }

    /// Adds a stretch of a prompt.
    pub(super) fn push_stretch(&mut self, prompt: &[u32], stretch: Range<usize>) {
        let (first, count) = (self.ids.len(), stretch.len());
        self.ids.extend(&prompt[stretch.clone()]);
        self.positions.extend(stretch.map(|at| u32::try_from(at).unwrap_or(u32::MAX)));
        self.paths.extend((0..count).map(|last| (0..=last).collect()));
        self.rows.push(first..first + count);
    }
}
