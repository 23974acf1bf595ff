//! A draft: a tree of guessed tokens below a request's last token, and the rule of what the target accepts of it.
//!
//! * **TREE-1** A parent stands before its children.
//! * **TREE-2** The emitted tokens are those of plain decoding, for any tree: duplicates among siblings, wrong guesses
//!   and empty trees included.
//! * **TREE-3** As many tokens are emitted as the tree allows, and always one: accept length = accepted nodes + 1.

/// Parent of a node directly below the last token.
pub const ROOT: usize = usize::MAX;

/// Guessed tokens; every parent stands before its children.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DraftTree {
    /// Token of each node.
    pub tokens: Vec<u32>,
    /// Index of each node's parent, or [`ROOT`].
    pub parents: Vec<usize>,
}

/// What the target makes of a draft.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Accepted nodes from the top down.
    pub nodes: Vec<usize>,
    /// Tokens of the accepted nodes and the bonus token: those of plain decoding.
    pub tokens: Vec<u32>,
}

impl DraftTree {
    /// A chain of guesses.
    #[must_use]
    pub fn chain(tokens: Vec<u32>) -> Self {
        let parents = (0..tokens.len()).map(|node| node.checked_sub(1).unwrap_or(ROOT)).collect();
        Self { tokens, parents }
    }

    /// Adds a guess below `parent`; returns its index.
    ///
    /// # Panics
    /// If `parent` is neither [`ROOT`] nor a node of the tree (TREE-1).
    pub fn push(&mut self, parent: usize, token: u32) -> usize {
        let nodes = self.len();
        assert!(parent == ROOT || parent < nodes, "parent {parent} of node {nodes} does not stand before it");
        self.tokens.push(token);
        self.parents.push(parent);
        nodes
    }

    /// The guess of this token below `parent`, if there is one.
    #[must_use]
    pub fn child(&self, parent: usize, token: u32) -> Option<usize> {
        (0..self.len()).find(|&node| self.parents[node] == parent && self.tokens[node] == token)
    }

    /// Number of guesses.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was guessed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Levels above a node's own: 0 directly below the last token.
    #[must_use]
    pub fn depth(&self, node: usize) -> usize {
        self.upwards(node).count() - 1
    }

    /// Levels of the deepest branch.
    #[must_use]
    pub fn levels(&self) -> usize {
        (0..self.len()).map(|node| self.depth(node) + 1).max().unwrap_or(0)
    }

    /// The node and those above it, from the top down.
    #[must_use]
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path: Vec<usize> = self.upwards(node).collect();
        path.reverse();
        path
    }

    fn upwards(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(node), |&node| Some(self.parents[node]).filter(|&parent| parent != ROOT))
    }
}

/// Walks down while a child equals the target's own token there.
///
/// `root_target` is the target's token after the request's last token, `targets[i]` the one after node `i`. Cutting
/// behind a token that ends the answer is the caller's business.
///
/// # Panics
/// If there are not as many `targets` as nodes.
#[must_use]
pub fn accept(tree: &DraftTree, root_target: u32, targets: &[u32]) -> Accepted {
    assert_eq!(targets.len(), tree.len(), "one target token a node");
    // Every node that equals the target's token below an accepted parent is followed, since of two equal siblings the
    // second may be the one with children.
    let mut lengths = vec![0usize; tree.len()];
    for (node, &parent) in tree.parents.iter().enumerate() {
        let (above, expected) = if parent == ROOT { (0, root_target) } else { (lengths[parent], targets[parent]) };
        let is_reached = parent == ROOT || above > 0;
        lengths[node] = if is_reached && tree.tokens[node] == expected { above + 1 } else { 0 };
    }
    let deepest = (0..tree.len()).rev().max_by_key(|&node| lengths[node]).filter(|&node| lengths[node] > 0);
    let nodes = deepest.map_or_else(Vec::new, |node| tree.path(node));
    let bonus = deepest.map_or(root_target, |node| targets[node]);
    let tokens = nodes.iter().map(|&node| tree.tokens[node]).chain([bonus]).collect();
    Accepted { nodes, tokens }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A target whose next token depends on all tokens before it.
    fn next(context: &[u32], vocabulary: u32) -> u32 {
        let mixed = context.iter().fold(17u32, |mixed, token| mixed.wrapping_mul(0x9e37_79b1).wrapping_add(token + 1));
        (mixed >> 16) % vocabulary
    }

    fn targets(tree: &DraftTree, prompt: &[u32], vocabulary: u32) -> (u32, Vec<u32>) {
        let after = |node: usize| {
            let path = tree.path(node).into_iter().map(|node| tree.tokens[node]);
            next(&prompt.iter().copied().chain(path).collect::<Vec<_>>(), vocabulary)
        };
        (next(prompt, vocabulary), (0..tree.len()).map(after).collect())
    }

    fn plain(prompt: &[u32], vocabulary: u32, count: usize) -> Vec<u32> {
        let mut context = prompt.to_vec();
        for _ in 0..count {
            context.push(next(&context, vocabulary));
        }
        context[prompt.len()..].to_vec()
    }

    fn any_tree() -> impl Strategy<Value = DraftTree> {
        prop::collection::vec((any::<prop::sample::Index>(), 0u32..3), 0..40).prop_map(|nodes| {
            let mut tree = DraftTree::default();
            for (parent, token) in nodes {
                let parent = parent.index(tree.len() + 1).checked_sub(1).unwrap_or(ROOT);
                tree.push(parent, token);
            }
            tree
        })
    }

    #[test]
    fn an_empty_tree_emits_the_bonus() {
        assert_eq!(accept(&DraftTree::default(), 7, &[]), Accepted { nodes: vec![], tokens: vec![7] });
    }

    #[test]
    fn a_chain_is_accepted_up_to_the_first_difference() {
        let tree = DraftTree::chain(vec![1, 2, 3]);
        assert_eq!(accept(&tree, 1, &[2, 9, 4]), Accepted { nodes: vec![0, 1], tokens: vec![1, 2, 9] });
        assert_eq!(accept(&tree, 5, &[2, 3, 4]), Accepted { nodes: vec![], tokens: vec![5] });
        assert_eq!(accept(&tree, 1, &[2, 3, 4]), Accepted { nodes: vec![0, 1, 2], tokens: vec![1, 2, 3, 4] });
    }

    #[test]
    fn of_two_equal_siblings_the_one_with_the_right_child_wins() {
        let mut tree = DraftTree::default();
        tree.push(ROOT, 1);
        let second = tree.push(ROOT, 1);
        tree.push(second, 2);
        assert_eq!(accept(&tree, 1, &[2, 2, 3]), Accepted { nodes: vec![1, 2], tokens: vec![1, 2, 3] });
        assert_eq!(tree.depth(2), 1);
        assert_eq!(
            [(ROOT, 1), (1, 2), (0, 2)].map(|(parent, token)| tree.child(parent, token)),
            [Some(0), Some(2), None]
        );
    }

    proptest! {
        #[test]
        fn tree_2_and_3(tree in any_tree(), prompt in prop::collection::vec(0u32..3, 0..5), vocabulary in 1u32..4) {
            let (root_target, targets) = targets(&tree, &prompt, vocabulary);
            let accepted = accept(&tree, root_target, &targets);
            prop_assert_eq!(accepted.tokens.len(), accepted.nodes.len() + 1);
            let expected = plain(&prompt, vocabulary, tree.len() + 1);
            prop_assert_eq!(&accepted.tokens[..], &expected[..accepted.tokens.len()]);
            let longest = (0..tree.len())
                .map(|node| tree.path(node))
                .filter(|path| path.iter().zip(&expected).all(|(&node, &token)| tree.tokens[node] == token))
                .map(|path| path.len())
                .max();
            prop_assert_eq!(accepted.nodes.len(), longest.unwrap_or(0));
        }
    }
}
