//! Whatever is done to a file: an answer, never a panic, and every place inside the text.

use std::path::Path;

const QUICKSTART: &str = include_str!("../quickstart.ron");

/// Parses and draws every problem.
fn survive(text: &str) {
    match workflows::parse(text, Path::new("x")) {
        Ok(plan) => drop(workflows::describe(&plan).to_string()),
        Err(problems) => {
            assert!(!problems.is_empty());
            for problem in problems {
                let end = problem.offset + problem.length;
                assert!(text.get(problem.offset..end).is_some(), "{problem}: {}..{end}", problem.offset);
                assert!(
                    problem.help.is_some() && !problem.message.contains('\n') && problem.message.len() < 300,
                    "{problem}"
                );
                drop(problem.render(text));
            }
        }
    }
}

#[test]
fn any_line_may_be_missing() {
    for skipped in 0..QUICKSTART.lines().count() {
        let lines = QUICKSTART.lines().enumerate().filter(|(index, _)| *index != skipped);
        survive(&lines.map(|(_, line)| format!("{line}\n")).collect::<String>());
    }
}

#[test]
fn any_byte_may_be_another() {
    for at in 0..QUICKSTART.len() {
        for flip in [0x01, 0x20, 0x40, 0x80] {
            let mut bytes = QUICKSTART.as_bytes().to_vec();
            bytes[at] ^= flip;
            survive(&String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn any_prefix_or_suffix_may_be_all() {
    for (at, _) in QUICKSTART.char_indices() {
        survive(&QUICKSTART[..at]);
        survive(&QUICKSTART[at..]);
    }
}

#[test]
fn any_value_may_be_huge_or_strange() {
    let values = [
        "0",
        "1",
        "-1",
        "1000000000000000000",
        "18446744073709551615",
        "1e308",
        "1e999",
        "NaN",
        "-inf",
        "\"\"",
        "()",
        "[]",
        "None",
        "Eagle()",
    ];
    let words = QUICKSTART.match_indices(": ").map(|(at, _)| at + 2);
    for start in words.filter(|at| !QUICKSTART[..*at].lines().last().unwrap_or_default().contains("//")) {
        let end = QUICKSTART[start..].find([',', ')', '\n']).map_or(QUICKSTART.len(), |length| start + length);
        for value in values {
            survive(&format!("{}{value}{}", &QUICKSTART[..start], &QUICKSTART[end..]));
        }
    }
}

#[test]
fn depth_and_length_are_bounded() {
    for open in ["(", "[", "a(", "a:(", "/*", "Some(", "r#", "\"", "{"] {
        for count in [10, 100, 1000, 40_000] {
            survive(&open.repeat(count));
            survive(&format!("Workflow(name: {}", open.repeat(count)));
        }
    }
    survive(&" ".repeat(1 << 20));
    survive(&format!("Workflow(steps: [{}])", "Export(to: \"\"),".repeat(10_000)));
    survive(&format!("Workflow({})", "a: 1,".repeat(40_000)));
    survive(&format!(
        "Workflow(name: \"\", model: Gguf(\"\"), data: Chains(), steps: [{}])",
        "Export(to: \"\"),".repeat(10_000)
    ));
    survive(&format!("Workflow({}: 1)", "é".repeat(1000)));
}
