//! What the user probably meant: the nearest name, the nearest number that divides.

/// The name among `names` that is few typing mistakes away from `word`.
pub(crate) fn nearest<'n>(word: &str, names: &[&'n str]) -> Option<&'n str> {
    let word = word.to_lowercase();
    let mistakes_max = match word.chars().count() {
        0..=2 => 1,
        3..=5 => 2,
        _ => 3,
    };
    let scored = names.iter().map(|name| (distance(&word, &name.to_lowercase()), *name));
    scored
        .filter(|(mistakes, name)| *mistakes <= mistakes_max && *mistakes < name.len())
        .min_by_key(|(d, _)| *d)
        .map(|(_, name)| name)
}

/// Insertions, deletions, replacements and swaps of neighbours between two words (Damerau 1964, restricted).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0_usize; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 { i + j } else { cheapest(&rows, &a, &b, i, j) };
        }
    }
    rows[a.len()][b.len()]
}

fn cheapest(rows: &[Vec<usize>], a: &[char], b: &[char], i: usize, j: usize) -> usize {
    let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
    let best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
    let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
    if swapped { best.min(rows[i - 2][j - 2] + 1) } else { best }
}

/// The divisor of `whole` nearest to `wanted`; the smaller one of two.
pub(crate) fn divisor(whole: usize, wanted: usize) -> usize {
    let small = (1..).take_while(|d| d * d <= whole).filter(|d| whole.is_multiple_of(*d));
    let all = small.flat_map(|d| [d, whole / d]);
    all.min_by_key(|d| (d.abs_diff(wanted), *d)).unwrap_or(1)
}

/// The largest divisor of `whole` that is at most `limit`.
pub(crate) fn divisor_at_most(whole: usize, limit: usize) -> usize {
    (1..=limit.max(1)).rev().find(|d| whole.is_multiple_of(*d)).unwrap_or(1)
}

/// The positive multiple of `unit` nearest to `wanted`.
pub(crate) fn multiple(unit: usize, wanted: usize) -> usize {
    let below = wanted / unit * unit;
    let above = below.saturating_add(unit);
    if below > 0 && wanted - below <= above - wanted { below } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_mistakes_are_forgiven_and_other_words_are_not() {
        let names = ["prompts", "group", "micro_batch", "lr"];
        assert_eq!(nearest("groop", &names), Some("group"));
        assert_eq!(nearest("microbatch", &names), Some("micro_batch"));
        assert_eq!(nearest("rl", &names), Some("lr"));
        assert_eq!(nearest("GROUP", &names), Some("group"));
        assert_eq!(nearest("temperature", &names), None);
        assert_eq!(nearest("x", &names), None);
    }

    #[test]
    fn numbers_are_near() {
        assert_eq!(divisor(64, 6), 4);
        assert_eq!(divisor(12, 5), 4);
        assert_eq!(divisor(7, 5), 7);
        assert_eq!(divisor_at_most(32, 8), 8);
        assert_eq!(divisor_at_most(7, 6), 1);
        assert_eq!(multiple(4, 130), 128);
        assert_eq!(multiple(4, 1), 4);
    }
}
