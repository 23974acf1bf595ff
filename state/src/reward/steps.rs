//! Progress along the worked solution: credit for how far an answer was right, where the final answer alone says little.

use super::Answer;

/// Share of the solution's steps, split at `separator`, that the answer repeats from the beginning, each in its place; 1 only
/// if nothing follows them. Fails if there is no solution.
pub(super) fn value(separator: &str, answer: &Answer<'_>) -> Result<f32, String> {
    let Some(solution) = answer.solution.map(str::trim).filter(|s| !s.is_empty()) else {
        return Err("the problem has no worked solution to compare steps with: give it one, or use `Exact`".into());
    };
    let steps = |text: &str| -> Vec<String> { text.trim().split(separator).map(|s| s.trim().to_owned()).collect() };
    let (wanted, found) = (steps(solution), steps(answer.text));
    let same = wanted.iter().zip(&found).take_while(|(a, b)| a == b).count();
    // An answer that goes on after the end has one step more than it should.
    Ok(same as f32 / wanted.len().max(found.len().min(wanted.len() + 1)) as f32)
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;

    #[test]
    fn steps_count_from_the_beginning() {
        let check = |text: &str, expected: f32| {
            let answer = Answer { solution: Some("3+5=8;8-2=6;6+1=7#7"), ..answer(text, "7") };
            assert_eq!(value(";", &answer), Ok(expected), "{text:?}");
        };
        check("3+5=8;8-2=6;6+1=7#7", 1.0);
        check(" 3+5=8; 8-2=6;6+1=7#7 ", 1.0);
        check("3+5=8;8-2=6;6+1=8#8", 2.0 / 3.0);
        check("3+5=8;8-2=5;6+1=7#7", 1.0 / 3.0);
        check("8-2=6;6+1=7#7", 0.0);
        check("3+5=8;8-2=6;6+1=7#7;", 0.75);
        check("", 0.0);
        assert!(value(";", &answer("3+5=8", "8")).unwrap_err().contains("solution"));
    }
}
