//! Cost of a long answer.

use super::Answer;

/// Minus the used share of the allowed tokens; fails if none are allowed.
pub(super) fn value(answer: &Answer<'_>) -> Result<f32, String> {
    if answer.tokens_max == 0 {
        return Err("tokens_max is 0: allow answers at least one token".into());
    }
    Ok(-(answer.tokens as f32 / answer.tokens_max as f32))
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;

    #[test]
    fn the_share_is_negative() {
        let check = |tokens: usize, expected: f32| {
            assert_eq!(value(&Answer { tokens, ..answer("", "") }), Ok(expected));
        };
        check(0, 0.0);
        check(5, -0.25);
        check(20, -1.0);
    }
}
