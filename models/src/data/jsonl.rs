//! Problems from a file, one JSON object a line, in the public layouts.
//!
//! | fields | final answer | worked solution |
//! | --- | --- | --- |
//! | `question`, `answer` with `####` | after the last `####` | the whole answer, without `<<…>>` marks |
//! | `question`, `answer` | the answer | none |
//! | `problem`, `answer`, maybe `solution` | the answer | the solution |
//! | `prompt`, `response` | after the last `####`, else all | the response |
//! | `messages` (maybe system, then user, assistant) | as for `response` | the assistant's |
//!
//! Where the plan names the fields, a line is read as `question`, `answer`, and the solution as named.

use std::path::Path;

use kernels::NoiseKey;
use serde_json::{Map, Value};
use state::plan::Fields;

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
    pub(super) fn open(path: &Path, fields: Option<&Fields>, heldout: usize, seed: u64) -> Result<Self> {
        let parsed = parse(path, fields, &read("dataset", path)?)?;
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
fn parse(path: &Path, fields: Option<&Fields>, bytes: &[u8]) -> Result<Vec<(usize, Problem)>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let lines = bytes.split(|b| *b == b'\n').enumerate();
    let (mut problems, mut first, mut others) = (Vec::new(), None, Vec::new());
    for (i, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        match problem(line, fields) {
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

fn problem(line: &[u8], names: Option<&Fields>) -> std::result::Result<Problem, String> {
    let value: Value =
        serde_json::from_slice(line).map_err(|e| format!("not a JSON object, column {}: {}", e.column(), what(&e)))?;
    let Value::Object(fields) = &value else {
        return Err(format!("found {}, wanted a JSON object", kind(&value)));
    };
    if let Some(names) = names {
        return named(fields, names);
    }
    let text = |name: &str| text(fields.get(name), name);
    let has = |name: &str| fields.contains_key(name);
    if has("messages") {
        return conversation(&value["messages"]);
    }
    match () {
        () if has("question") && has("answer") => marked(text("question")?, text("answer")?, false),
        () if has("problem") && has("answer") => {
            let solution = if is_blank(&value["solution"]) { None } else { Some(text("solution")?) };
            Ok(Problem { question: text("problem")?, answer: text("answer")?, solution })
        }
        () if has("prompt") && has("answer") => marked(text("prompt")?, text("answer")?, false),
        () if has("prompt") && has("response") => marked(text("prompt")?, text("response")?, true),
        () => Err(format!(
            "found fields [{}], wanted question, problem or prompt and answer, prompt and response, or messages; `data` can name \
             others: `question: \"FIELD\", answer: \"FIELD\"`",
            listed(fields)
        )),
    }
}

/// What the fields of these names say.
fn named(fields: &Map<String, Value>, names: &Fields) -> std::result::Result<Problem, String> {
    let field = |name: &str| {
        find(fields, name).ok_or_else(|| format!("no field `{name}`, which `data` names, in [{}]", listed(fields)))
    };
    let question = match field(&names.question)? {
        Value::Array(messages) => asked(messages, &names.question)?,
        value => text(Some(value), &names.question)?,
    };
    let problem = marked(question, text(Some(field(&names.answer)?), &names.answer)?, false)?;
    let Some(name) = &names.solution else { return Ok(problem) };
    match field(name)? {
        value if is_blank(value) => Ok(problem),
        value => Ok(Problem { solution: Some(text(Some(value), name)?), ..problem }),
    }
}

/// The field `a.b`, or else `b` of the object in `a`.
fn find<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let inside = || {
        let (outer, inner) = name.split_once('.')?;
        find(fields.get(outer)?.as_object()?, inner)
    };
    fields.get(name).or_else(inside)
}

fn listed(fields: &Map<String, Value>) -> String {
    fields.keys().cloned().collect::<Vec<_>>().join(", ")
}

fn is_blank(value: &Value) -> bool {
    value.is_null() || value.as_str().is_some_and(|text| text.trim().is_empty())
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
    match messages.split_last() {
        Some((last, before)) if last["role"] == "assistant" => {
            marked(asked(before, "messages")?, text(last.get("content"), "content")?, true)
        }
        _ => Err(format!("`messages` has roles [{}], wanted user and assistant once each", roles(messages))),
    }
}

/// What a user asks, maybe behind a system message.
fn asked(messages: &[Value], name: &str) -> std::result::Result<String, String> {
    let content = |message: &Value| text(message.get("content"), "content");
    match messages {
        [user] if user["role"] == "user" => content(user),
        [system, user] if system["role"] == "system" && user["role"] == "user" => {
            Ok(format!("{}\n\n{}", content(system)?, content(user)?))
        }
        _ => Err(format!("`{name}` has roles [{}], wanted one user message before any answer", roles(messages))),
    }
}

fn roles(messages: &[Value]) -> String {
    let roles: Vec<&str> = messages.iter().map(|m| m["role"].as_str().unwrap_or("none")).collect();
    roles.join(", ")
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
        Lines::open(file.path(), None, heldout, 1)
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
    fn fields_have_the_names_that_the_plan_gives() {
        let names = |solution: Option<&str>| Fields {
            question: "prompt".into(),
            answer: "reward.truth".into(),
            solution: solution.map(String::from),
        };
        let read = |line: &str, solution| problem(line.as_bytes(), Some(&names(solution)));
        let wanted = |question: &str, answer: &str, solution: Option<&str>| {
            Ok(Problem { question: question.into(), answer: answer.into(), solution: solution.map(String::from) })
        };
        let line = r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "reward": {"truth": "steps #### 34", "style": "rule"}, "why": "w", "question": "another"}"#;
        assert_eq!(read(line, None), wanted("s\n\nq", "34", Some("steps #### 34")));
        assert_eq!(read(line, Some("why")), wanted("s\n\nq", "34", Some("w")));
        // A name with a dot in it is that first. Who has no solution has none.
        let line = r#"{"prompt": "q", "reward.truth": 7, "reward": {"truth": 8}, "why": null}"#;
        assert_eq!(read(line, Some("why")), wanted("q", "7", None));
        assert!(
            read(line, Some("whi")).unwrap_err().contains("no field `whi`"),
            "a slip is no answer without solution"
        );
        for (line, told) in [
            (
                r#"{"prompt": "q", "reward": {"truths": 1}}"#,
                "no field `reward.truth`, which `data` names, in [prompt, reward]",
            ),
            (r#"{"prompt": "q", "reward": {"truth": {}}}"#, "`reward.truth` is an object, wanted a text"),
            (r#"{"prompt": "q", "reward": {"truth": ""}}"#, "`reward.truth` is empty"),
            (r#"{"prompt": [{"role": "assistant", "content": "a"}], "reward": {"truth": 1}}"#, "roles [assistant]"),
        ] {
            let found = read(line, None).unwrap_err();
            assert!(found.contains(told), "{line}: {found}");
        }
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
        assert!(matches!(Lines::open(path.path(), None, 0, 1), Err(Error::DatasetLine { line: 1, .. })));
    }

    #[test]
    fn nothing_to_train_on_is_an_error() {
        assert!(matches!(open("", 0), Err(Error::DatasetEmpty { .. })));
        assert!(matches!(open("\n \n", 0), Err(Error::DatasetEmpty { .. })));
        let one = r#"{"question": "q", "answer": "a"}"#;
        assert!(matches!(open(one, 1), Err(Error::HeldoutTooMany { heldout: 1, problems: 1, .. })));
        assert!(matches!(Lines::open(Path::new("/nowhere"), None, 0, 1), Err(Error::FileMissing { .. })));
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
