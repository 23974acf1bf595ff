//! Bad input: one clear message, exit code 2, nothing half-written.

use std::fs;
use std::path::Path;

use super::{completed, refusal, text, with_problems, workflow};

/// Runs a workflow that must fail; returns what it says.
fn refused(file: &Path, out: &Path) -> String {
    refusal(&["run", text(file), "--out", text(out)])
}

#[test]
fn broken_workflows_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let broken = Path::new(env!("CARGO_MANIFEST_DIR")).join("workflows/tests/broken");
    let mut count = 0;
    for entry in fs::read_dir(broken).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "ron") {
            refused(&path, &out);
            assert!(!out.exists(), "{} left a folder", path.display());
            count += 1;
        }
    }
    assert!(count >= 30);
}

#[test]
fn unusable_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    completed(&["run", text(&workflow(folder.path(), |w| w)), "--out", text(&good)]);
    let weights = fs::read(good.join("model/model.safetensors")).unwrap();
    let out = folder.path().join("out");
    let with = |change: &dyn Fn(String) -> String| refused(&workflow(folder.path(), change), &out);
    let from = |file: &str| {
        let file = file.to_owned();
        move |w: String| w.replace("ffn: 64,", &format!("ffn: 64, weights: \"{file}\","))
    };
    let save = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    save("cut", &weights[..weights.len() / 2]);
    save("header", &weights[..20]);
    save("empty", b"");
    save("text", b"these are no weights");
    let mut nan = weights.clone();
    let last = nan.len() - 4;
    nan[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    save("nan", &nan);
    for name in ["cut", "header", "empty", "text", "nan", "missing"] {
        let message = with(&from(name));
        assert!(message.contains(name), "{name}: {message}");
    }
    let other = with(&|w| from("good/model/model.safetensors")(w).replace("hidden: 32", "hidden: 48"));
    assert!(other.contains("shape") && other.contains("model.safetensors"), "{other}");
    let file = workflow(folder.path(), |w| from("good/model/model.safetensors")(w).replace("hidden: 32", "hidden: 48"));
    assert!(refusal(&["check", text(&file)]).contains("shape"), "a check reads what a run would");
    save("empty.jsonl", b"\n\n");
    save("bad.jsonl", b"{\"question\": \"1+1\", \"answer\": \"#### 2\"}\n{oops}\n\n[]\n");
    let jsonl = |name: &'static str| move |w: String| with_problems(&w, name, 20);
    assert!(with(&jsonl("empty.jsonl")).contains("empty.jsonl"));
    let bad = with(&jsonl("bad.jsonl"));
    assert!(bad.contains("bad.jsonl") && bad.contains("(line 4 is bad, too)"), "{bad}");
    assert!(with(&jsonl("none.jsonl")).contains("none.jsonl"));
    // The shuffled order of problems is nobody's business.
    let problem = |question: &str, steps: usize| {
        format!("{{\"question\": \"{question}\", \"answer\": \"{}#2\"}}\n", "1+1=2;".repeat(steps))
    };
    let lines = |odd: usize| (1..=40).map(|i| problem(if i == odd { "1+é" } else { "1+1?" }, 1)).collect::<String>();
    for odd in [1, 17, 40] {
        save("odd.jsonl", lines(odd).as_bytes());
        let file = workflow(folder.path(), jsonl("odd.jsonl"));
        for message in [refused(&file, &out), refusal(&["check", text(&file)])] {
            assert!(message.contains(&format!("line {odd} of")) && message.contains("`1+é`"), "{message}");
        }
    }
    // Twenty are held out, and not learned from.
    save("long.jsonl", problem("1+1?", 40).replace("#2", "#### 2").repeat(24).as_bytes());
    let told = super::taper(&["check", text(&workflow(folder.path(), jsonl("long.jsonl")))]);
    let message = super::message(&told);
    assert!(told.status.success() && message.contains("4 of 4 solutions are cut"), "{message}");
    fs::rename(good.join("model/tokenizer.json"), good.join("model/elsewhere")).unwrap();
    let hf = |w: String| {
        let (start, end) = (w.find("model:").unwrap(), w.find("data:").unwrap());
        format!("{}model: HuggingFace(\"good/model\"), {}", &w[..start], &w[end..])
    };
    assert!(with(&hf).contains("tokenizer"));
    assert!(!out.exists());
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    // A file where the folder should be: refused for root too.
    fs::write(folder.path().join("taken"), "").unwrap();
    let message = refused(&file, &folder.path().join("taken/run"));
    assert!(message.contains("taken"), "{message}");
    // /proc takes no folders, /dev/full no bytes.
    assert!(refused(&file, Path::new("/proc/taper")).contains("/proc/taper"));
}

#[test]
fn another_workflow_does_not_take_over_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    completed(&["run", text(&workflow(folder.path(), |w| w)), "--out", text(&out)]);
    let before = super::report(&out);
    let other = |w: String| w.replace("seed: 5", "seed: 6").replace("steps: 10", "steps: 11");
    let message = refused(&workflow(folder.path(), other), &out);
    assert!(message.contains("--fresh") && message.contains("(not the same: `seed`, `steps`)"), "{message}");
    assert_eq!(super::report(&out), before);
}

#[test]
fn variables_that_mean_nothing_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    for (name, value) in [("TAPER_KERNELS", "neon"), ("TAPER_LOG", "a=b=c")] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_taper"))
            .args(["check", text(&file)])
            .env(name, value)
            .output()
            .unwrap();
        let message = super::message(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(&format!("{name}={value} means nothing; write `")), "{message}");
    }
}

#[test]
fn a_check_tells_which_files_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone.gguf");
    let start = "model: Tiny(hidden: 32, layers: 2, heads: 2, ffn: 64, positions_max: 160)";
    let file = workflow(folder.path(), |w| w.replace(start, &format!("model: Gguf(\"{}\")", text(&gone))));
    let output = super::taper(&["check", text(&file), "--json"]);
    assert!(output.status.success());
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["name"], &found["missing"]), (&"small".into(), &vec![text(&gone)].into()));
    assert!(super::message(&output).contains("gone.gguf is not there"));
}

#[test]
fn a_run_without_speculation_has_nothing_to_compare() {
    let folder = tempfile::tempdir().unwrap();
    let file =
        workflow(folder.path(), |w| w.replace("devices:", "speculation: (drafters: [], lending: false), devices:"));
    let out = folder.path().join("both");
    let message = refusal(&["compare", text(&file), "--out", text(&out)]);
    assert!(message.contains("nothing to compare"), "{message}");
    assert!(!out.exists());
}

#[test]
fn what_generates_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let refused = |arguments: &[&str]| refusal(&[&["generate", text(&file)], arguments].concat());
    let cases: [(&[&str], &str); 7] = [
        (&[""], "the prompt is empty"),
        (&["1+2?", "--tokens", "0"], "--tokens 0"),
        (&["1+2?", "--threads", "0"], "from 1 to 1024"),
        (&["1+2?", "--threads", "100000"], "from 1 to 1024"),
        (&["1+2?", "--stop", ""], "--stop"),
        (&["1+2?", "--temperature", "-1"], "--temperature -1"),
        (&["1+2?", "--top-p", "-0.5"], "--top-p -0.5"),
    ];
    for (arguments, expected) in cases {
        let message = refused(arguments);
        assert!(message.contains(expected), "{message}");
    }
    // A file without end, which holds no text.
    assert!(refusal(&["check", "/dev/zero"]).contains("UTF-8"));
}

#[test]
fn answers_that_cannot_be_scored_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let line = |i: usize, answer: &str| format!("{{\"question\": \"{i}+1\", \"answer\": \"{answer}\"}}\n");
    let lines = (0..40).map(|i| line(i, if i % 4 == 0 { "none" } else { "2" })).collect::<String>();
    fs::write(folder.path().join("some.jsonl"), lines).unwrap();
    let file = workflow(folder.path(), |w| {
        let w = with_problems(&w, "some.jsonl", 20);
        let (start, end) = (w.find("Sft(").unwrap(), w.find("Evaluate(").unwrap());
        let w = format!("{}{}", &w[..start], &w[end..]);
        w.replace("rewards: [", "rewards: [Numeric(marker: \"#\"), ")
    });
    let dir = folder.path().join("run");
    let output = super::taper(&["run", text(&file), "--out", text(&dir)]);
    let told = super::message(&output);
    assert!(output.status.success() && told.contains("could not be scored ("), "{told}");
    assert!(told.contains(" not scored") && told.contains("no answer to 10 of 40 problems can be scored"), "{told}");
    let shown = super::taper(&["report", text(&dir)]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("answers could not be scored"), "{shown}");
    // A step of which none can be scored changes no weight, and the run goes on.
    let alone = workflow(folder.path(), |w| {
        let w = with_problems(&w, "some.jsonl", 20).replace("rewards: [", "rewards: [Numeric(marker: \"#\"), ");
        w.replace("prompts: 6", "prompts: 1")
    });
    let dir = folder.path().join("alone");
    super::completed(&["run", text(&alone), "--out", text(&dir)]);
    let report = super::report(&dir);
    let steps: Vec<_> = report.history.iter().filter(|m| m.kind == "grpo").collect();
    let lost = steps.iter().filter(|m| m.failed == m.rollouts).count();
    assert!(lost > 0 && lost < steps.len(), "{lost} of {} steps", steps.len());
    // Where that is so of all problems, there is no run.
    fs::write(folder.path().join("none.jsonl"), (0..40).map(|i| line(i, "none")).collect::<String>()).unwrap();
    let none = workflow(folder.path(), |w| {
        with_problems(&w, "none.jsonl", 20).replace("rewards: [", "rewards: [Numeric(marker: \"#\"), ")
    });
    assert!(refusal(&["check", text(&none)]).contains("no answer to any of the 40 problems"));
}

#[test]
fn a_comparison_without_grpo_has_no_ratios() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| {
        let (start, end) = (w.find("Grpo(").unwrap(), w.rfind("Evaluate(").unwrap());
        format!("{}{}", &w[..start], &w[end..])
    });
    let output = super::taper(&["compare", text(&file), "--out", text(&folder.path().join("both")), "--json"]);
    assert!(output.status.success(), "{}", super::message(&output));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["rollout_ratio"].is_null() && found["identical"] == true, "{found}");
}
