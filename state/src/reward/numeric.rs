//! Equality of numbers.

use super::{Answer, Number, after_last};

/// Opens a final answer in LaTeX.
const BOXED: &str = "\\boxed{";

/// 1 if the last number after the last `marker` equals the reference's last number; fails if the reference has none.
///
/// A `\boxed{…}` after the marker (or opened by it) narrows the search to what it encloses.
pub(super) fn value(marker: &str, answer: &Answer<'_>) -> Result<f32, String> {
    let reference = Number::last_in(boxed(answer.reference))
        .ok_or_else(|| format!("the reference answer `{}` holds no number: use an exact reward", answer.reference))?;
    let found = after_last(answer.text, marker)
        .map(|rest| if marker.ends_with('{') { enclosed(rest) } else { boxed(rest) })
        .and_then(Number::last_in);
    Ok(f32::from(u8::from(found.is_some_and(|found| found == reference))))
}

/// Content of the last `\boxed{…}`, or the whole text.
fn boxed(text: &str) -> &str {
    text.rfind(BOXED).map_or(text, |start| enclosed(&text[start + BOXED.len()..]))
}

/// Text up to the brace that closes the one just opened; all of it if the text was cut before.
fn enclosed(text: &str) -> &str {
    let mut open = 1usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return &text[..at];
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;

    #[test]
    fn the_last_number_after_the_last_marker_counts() {
        let check = |marker: &str, text: &str, reference: &str, expected: f32| {
            assert_eq!(value(marker, &answer(text, reference)), Ok(expected), "{marker:?} {text:?} {reference:?}");
        };
        check("####", "6 apples\n#### 1,234", "1234", 1.0);
        check("####", "6 apples\n#### $1,234.00.", "1234", 1.0);
        check("####", "#### 3 #### 4", "3", 0.0);
        check("####", "#### 3 ####", "3", 0.0);
        check("####", "so it is 3", "3", 0.0);
        check("####", "", "3", 0.0);
        check("", "", "3", 0.0);
        check("", "first 2 then 3.", "3", 1.0);
        check("#", "4-7=-3#-3", "-3", 1.0);
        check("#", "4-7=−3#−3", "-3", 1.0);
        check("#", "4-7=-3#3", "-3", 0.0);
        check("", r"thus \boxed{42} on page 7", "42", 1.0);
        check("", r"\boxed{1} no, \boxed{\frac{1}{2}} it is 3", "0.5", 1.0);
        check(r"\boxed{", r"thus \boxed{42} on page 7", "42", 1.0);
        check("", r"thus \boxed{42", "42", 1.0);
        check("", r"thus 42 \boxed{}", "42", 0.0);
        check("answer is", "the answer is 50%", "50", 1.0);
        check("answer is", "the answer is NaN", "0", 0.0);
        check("", "42", r"so \boxed{42} (see 7)", 1.0);
    }
}
