//! Equality of text.

use super::{Answer, after_last};

/// 1 if what follows the last `marker` equals the reference, white space at both ends aside; fails if the reference
/// is empty, which an empty answer would equal.
pub(super) fn value(marker: &str, answer: &Answer<'_>) -> Result<f32, String> {
    let reference = answer.reference.trim();
    if reference.is_empty() {
        return Err("the reference answer is empty: give the problem an answer".into());
    }
    let is_equal = after_last(answer.text, marker).is_some_and(|found| found.trim() == reference);
    Ok(f32::from(u8::from(is_equal)))
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;

    #[test]
    fn the_text_after_the_last_marker_counts() {
        let check = |marker: &str, text: &str, reference: &str, expected: f32| {
            assert_eq!(value(marker, &answer(text, reference)), Ok(expected), "{marker:?} {text:?} {reference:?}");
        };
        check("#", "3+5=8;8-2=6#6", "6", 1.0);
        check("#", "3+5=8;8-2=6#6 ", " 6", 1.0);
        check("#", "3+5=8;8-2=6#66", "6", 0.0);
        check("#", "#6#7", "6", 0.0);
        check("#", "#6#", "6", 0.0);
        check("#", "6", "6", 0.0);
        check("#", "", "6", 0.0);
        check("", "6", "6", 1.0);
        check("####", "so ###### 6", "6", 1.0);
        check("答", "答えは答6", "6", 1.0);
    }
}
