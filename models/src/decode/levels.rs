//! What became of drafts, level by level.

use state::speculation::tree::ROOT;
use state::speculation::{Accepted, DraftTree};

/// Adds what became of each level of a draft.
pub(super) fn count_levels(tree: &DraftTree, accepted: &Accepted, levels: &mut Vec<(u64, u64)>) {
    levels.resize(levels.len().max(tree.levels()), (0, 0));
    let right = accepted.nodes.len();
    // Below the last right guess others may have been made, or none: another branch may be the deeper one.
    let last = accepted.nodes.last().copied().unwrap_or(ROOT);
    let decided = right + usize::from(tree.parents.contains(&last));
    for (level, (count, accepted)) in levels.iter_mut().enumerate().take(decided) {
        *count += 1;
        *accepted += u64::from(level < right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_count_where_something_was_guessed() {
        // A with child C, and B alone: the deeper branch is not the one that is right.
        let tree = DraftTree { tokens: vec![1, 2, 3], parents: vec![ROOT, ROOT, 0] };
        let levels = |nodes: &[usize]| {
            let mut levels = Vec::new();
            count_levels(&tree, &Accepted { nodes: nodes.to_vec(), tokens: Vec::new() }, &mut levels);
            levels
        };
        assert_eq!(levels(&[]), [(1, 0), (0, 0)]);
        assert_eq!(levels(&[1]), [(1, 1), (0, 0)], "nothing was guessed below it");
        assert_eq!(levels(&[0]), [(1, 1), (1, 0)]);
        assert_eq!(levels(&[0, 2]), [(1, 1), (1, 1)]);
    }
}
