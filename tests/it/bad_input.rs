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
    assert!(other.contains("shape"), "{other}");
    save("empty.jsonl", b"\n\n");
    save("bad.jsonl", b"{\"question\": \"1+1\", \"answer\": \"#### 2\"}\n{oops}\n");
    let jsonl = |name: &'static str| move |w: String| with_problems(&w, name, 20);
    assert!(with(&jsonl("empty.jsonl")).contains("empty.jsonl"));
    assert!(with(&jsonl("bad.jsonl")).contains("bad.jsonl"));
    assert!(with(&jsonl("none.jsonl")).contains("none.jsonl"));
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
    let message = refused(&workflow(folder.path(), |w| w.replace("seed: 5", "seed: 6")), &out);
    assert!(message.contains("--fresh"), "{message}");
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
