//! Shape of an answer, whatever it says.

use super::Answer;

/// 1 if the answer contains `marker` exactly once (overlaps aside) and was not cut; an empty marker is never there.
pub(super) fn value(marker: &str, answer: &Answer<'_>) -> f32 {
    let is_once = !marker.is_empty() && answer.text.matches(marker).count() == 1;
    f32::from(u8::from(is_once && !answer.truncated))
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;

    #[test]
    fn one_marker_and_an_end() {
        let check = |marker: &str, text: &str, truncated: bool, expected: f32| {
            let answer = Answer { truncated, ..answer(text, "6") };
            assert_eq!(value(marker, &answer), expected, "{marker:?} {text:?} {truncated}");
        };
        check("#", "8-2=6#6", false, 1.0);
        check("#", "8-2=6#6", true, 0.0);
        check("#", "8-2=6#6#6", false, 0.0);
        check("#", "8-2=6", false, 0.0);
        check("#", "", false, 0.0);
        check("", "", false, 0.0);
    }
}
