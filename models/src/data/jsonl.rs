//! Problems from a file, one JSON object a line, in the public layouts.
//!
//! | fields | final answer | worked solution |
//! | --- | --- | --- |
//! | `question`, `answer` with `####` | after the last `####` | the whole answer, without `<<…>>` marks |
//! | `question`, `answer` | the answer | none |
//! | `problem`, `answer`, maybe `solution` | the answer | the solution |
//! | `prompt`, `response` | after the last `####`, else all | the response |
//! | `messages` (maybe system, then user, assistant) | as for `response` | the assistant's |

use std::path::Path;

use kernels::NoiseKey;
use serde_json::Value;

use super::Problem;
use crate::error::{Error, Result};
use crate::load::read;

/// Streams of noise: the split, and the order of a pass.
const SPLIT: u32 = 0x6a73_0001;
const ORDER: u32 = 0x6a73_0002;

/// The problems of a file: the held-out ones first, then those to train on.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    problems: Vec<Problem>,
    /// Of each, from 1.
    lines: Vec<usize>,
    heldout: usize,
    seed: u64,
}

impl Lines {
    pub(super) fn open(path: &Path, heldout: usize, seed: u64) -> Result<Self> {
        let parsed = parse(path, &read("dataset", path)?)?;
        let problems = parsed.len();
        if problems == 0 {
            return Err(Error::DatasetEmpty { path: path.into() });
        }
        if heldout >= problems {
            return Err(Error::HeldoutTooMany { path: path.into(), heldout, problems });
        }
        // The split does not depend on the seed, so that runs can be compared.
        let split = Permutation::new(problems as u64, NoiseKey::new(0, SPLIT, 0, 0, 0));
        let in_order = (0..problems as u64).map(|i| parsed[split.at(i) as usize].clone());
        let (lines, problems) = in_order.unzip();
        Ok(Self { problems, lines, heldout, seed })
    }

    /// Each with its line in the file, from 1.
    pub(super) fn all(&self) -> impl Iterator<Item = (usize, &Problem)> {
        self.lines.iter().copied().zip(&self.problems)
    }

    pub(super) fn training(&self) -> usize {
        self.problems.len() - self.heldout
    }

    pub(super) fn problem(&self, index: u64) -> &Problem {
        let (pass, place) = (index / self.training() as u64, index % self.training() as u64);
        let key = NoiseKey::new(self.seed, ORDER, 0, pass as u32, (pass >> 32) as u32);
        let order = Permutation::new(self.training() as u64, key);
        &self.problems[self.heldout + order.at(place) as usize]
    }

    pub(super) fn heldout(&self, index: u64) -> &Problem {
        let held = self.heldout;
        assert!(index < held as u64, "held-out problem {index} was asked of {held}");
        &self.problems[index as usize]
    }
}

/// A keyed order of `0..n` without a table: a Feistel network on the next power of four, walked until within `n`.
struct Permutation {
    n: u64,
    half: u32,
    key: NoiseKey,
}

impl Permutation {
    fn new(n: u64, key: NoiseKey) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self { n, half: bits.div_ceil(2).max(1), key }
    }

    fn at(&self, index: u64) -> u64 {
        let mut at = self.shuffle(index);
        while at >= self.n {
            at = self.shuffle(at);
        }
        at
    }

    fn shuffle(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half) - 1;
        let (mut left, mut right) = (value >> self.half, value & mask);
        for round in 0..6 {
            let noise = u64::from(self.key.words(right as u32, round)[0]);
            (left, right) = (right, left ^ (noise & mask));
        }
        left << self.half | right
    }
}

/// Problems and their lines, from 1.
fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<(usize, Problem)>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let lines = bytes.split(|b| *b == b'\n').enumerate();
    let (mut problems, mut first, mut others) = (Vec::new(), None, Vec::new());
    for (i, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        match problem(line) {
            Ok(problem) => problems.push((i + 1, problem)),
            Err(reason) if first.is_none() => first = Some((i + 1, reason)),
            Err(_) => others.push(i + 1),
        }
    }
    let Some((line, reason)) = first else { return Ok(problems) };
    Err(Error::DatasetLine { path: path.into(), line, reason: format!("{reason}{}", also(&others)) })
}

/// Which lines are bad beside the first one that is.
fn also(others: &[usize]) -> String {
    let shown: Vec<String> = others.iter().take(10).map(usize::to_string).collect();
    match (others.len(), shown.join(", ")) {
        (0, _) => String::new(),
        (1, line) => format!(" (line {line} is bad, too)"),
        (count, lines) if count > shown.len() => format!(" ({count} more lines are bad: {lines} …)"),
        (count, lines) => format!(" ({count} more lines are bad: {lines})"),
    }
}

/// What is wrong, without the place, which is one in the line.
fn what(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
}

fn problem(line: &[u8]) -> std::result::Result<Problem, String> {
    let value: Value =
        serde_json::from_slice(line).map_err(|e| format!("not a JSON object, column {}: {}", e.column(), what(&e)))?;
    let Value::Object(fields) = &value else {
        return Err(format!("found {}, wanted a JSON object", kind(&value)));
    };
    let text = |name: &str| text(fields.get(name), name);
    let has = |name: &str| fields.contains_key(name);
    if has("messages") {
        return conversation(&value["messages"]);
    }
    match () {
        () if has("question") && has("answer") => marked(text("question")?, text("answer")?, false),
        () if has("problem") && has("answer") => {
            let is_blank = |value: &Value| value.is_null() || value.as_str().is_some_and(|text| text.trim().is_empty());
            let solution = if is_blank(&value["solution"]) { None } else { Some(text("solution")?) };
            Ok(Problem { question: text("problem")?, answer: text("answer")?, solution })
        }
        () if has("prompt") && has("answer") => marked(text("prompt")?, text("answer")?, false),
        () if has("prompt") && has("response") => marked(text("prompt")?, text("response")?, true),
        () => Err(format!(
            "found fields [{}], wanted question, problem or prompt and answer, prompt and response, or messages",
            fields.keys().cloned().collect::<Vec<_>>().join(", ")
        )),
    }
}

/// A text that is not empty; numbers are taken as written.
fn text(value: Option<&Value>, name: &str) -> std::result::Result<String, String> {
    let text = match value {
        Some(Value::String(text)) => text.trim().to_owned(),
        Some(Value::Number(number)) => number.to_string(),
        other => return Err(format!("`{name}` is {}, wanted a text", kind(other.unwrap_or(&Value::Null)))),
    };
    match text.is_empty() {
        true => Err(format!("`{name}` is empty, wanted a text")),
        false => Ok(text),
    }
}

/// Splits `steps #### final`. Without the mark the whole is the final answer, and the solution only if `worked`.
fn marked(question: String, answer: String, worked: bool) -> std::result::Result<Problem, String> {
    match answer.rsplit_once("####") {
        Some((_, last)) if last.trim().is_empty() => Err("nothing follows `####`, wanted the final answer".into()),
        Some((_, last)) => {
            let (last, solution) = (last.trim().to_owned(), Some(without_marks(&answer)));
            Ok(Problem { question, answer: last, solution })
        }
        None => Ok(Problem { question, solution: worked.then(|| answer.clone()), answer }),
    }
}

/// Removes calculator marks: `48/2 = <<48/2=24>>24` is `48/2 = 24`.
fn without_marks(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<<")
        && let Some((_, after)) = after.split_once(">>")
    {
        out.push_str(before);
        rest = after;
    }
    out + rest
}

/// A single exchange. A system message goes before the question, since not every chat template has that role.
fn conversation(messages: &Value) -> std::result::Result<Problem, String> {
    let Value::Array(messages) = messages else {
        return Err(format!("`messages` is {}, wanted a list", kind(messages)));
    };
    let roles: Vec<&str> = messages.iter().map(|m| m["role"].as_str().unwrap_or("none")).collect();
    let content = |i: usize| text(messages[i].get("content"), "content");
    match roles[..] {
        ["user", "assistant"] => marked(content(0)?, content(1)?, true),
        ["system", "user", "assistant"] => marked(format!("{}\n\n{}", content(0)?, content(1)?), content(2)?, true),
        _ => Err(format!("`messages` has roles [{}], wanted user and assistant once each", roles.join(", "))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "absent or null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;

    use super::*;

    fn open(text: &str, heldout: usize) -> Result<Lines> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Lines::open(file.path(), heldout, 1)
    }

    fn check(line: &str, question: &str, answer: &str, solution: Option<&str>) {
        let wanted = Problem { question: question.into(), answer: answer.into(), solution: solution.map(String::from) };
        assert_eq!(*open(line, 0).unwrap().problem(0), wanted, "{line}");
    }

    #[test]
    fn public_layouts_are_read() {
        check(
            r#"{"question": "q", "answer": "2+2 = <<2+2=4>>4 <<x\n#### 1,004 "}"#,
            "q",
            "1,004",
            Some("2+2 = 4 <<x\n#### 1,004"),
        );
        check(r#"{"question": "q", "answer": 51, "id": "x"}"#, "q", "51", None);
        check(r#"{"problem": "p", "answer": "\\frac12", "solution": "s"}"#, "p", "\\frac12", Some("s"));
        check("\u{feff}{\"prompt\": \"p\", \"response\": \"r\"}\r\n", "p", "r", Some("r"));
        let chat = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a #### 7"}]}"#;
        check(&chat.replace('\n', ""), "s\n\nu", "7", Some("a #### 7"));
    }

    #[test]
    fn bad_lines_are_named() {
        let good = r#"{"question": "q", "answer": "a"}"#;
        let bad = [
            "{\"question\": ",
            "[1]",
            "{}",
            r#"{"question": "q"}"#,
            r#"{"question": "q", "answer": null}"#,
            r#"{"question": " ", "answer": "a"}"#,
            r#"{"question": "q", "answer": "steps ####  "}"#,
            r#"{"messages": 3}"#,
            r#"{"messages": [{"role": "user", "content": "u"}]}"#,
            r#"{"messages": [3, {}]}"#,
        ];
        for bad in bad {
            match open(&format!("{good}\n\n  \n{bad}\n{good}"), 0) {
                Err(Error::DatasetLine { line: 4, reason, .. }) => assert!(!reason.is_empty()),
                other => panic!("{bad}: {other:?}"),
            }
        }
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), b"\xff\xfe\n").unwrap();
        assert!(matches!(Lines::open(path.path(), 0, 1), Err(Error::DatasetLine { line: 1, .. })));
    }

    #[test]
    fn nothing_to_train_on_is_an_error() {
        assert!(matches!(open("", 0), Err(Error::DatasetEmpty { .. })));
        assert!(matches!(open("\n \n", 0), Err(Error::DatasetEmpty { .. })));
        let one = r#"{"question": "q", "answer": "a"}"#;
        assert!(matches!(open(one, 1), Err(Error::HeldoutTooMany { heldout: 1, problems: 1, .. })));
        assert!(matches!(Lines::open(Path::new("/nowhere"), 0, 1), Err(Error::FileMissing { .. })));
    }

    #[test]
    fn every_pass_shows_each_training_problem_once() {
        for (total, heldout) in [(1, 0), (2, 1), (5, 2), (64, 10), (1000, 100)] {
            let text: String = (0..total).map(|i| format!("{{\"question\": \"{i}\", \"answer\": \"a\"}}\n")).collect();
            let lines = open(&text, heldout).unwrap();
            let held: BTreeSet<_> = (0..heldout as u64).map(|i| lines.heldout(i).question.clone()).collect();
            assert_eq!(held.len(), heldout);
            let n = lines.training() as u64;
            let pass = |p: u64| (p * n..(p + 1) * n).map(|i| lines.problem(i).question.clone()).collect::<Vec<_>>();
            for p in 0..3 {
                let seen: BTreeSet<_> = pass(p).into_iter().collect();
                assert_eq!(seen.len(), total - heldout);
                assert!(seen.is_disjoint(&held));
            }
            assert!(n < 20 || pass(0) != pass(1), "passes have the same order");
        }
    }
}
