//! Whole runs of the real program: crash and resume, losslessness, lost devices, bad input.

mod bad_input;
mod crash;
mod damage;
mod decoding;
mod devices;
mod embed;
mod fresh;
mod lossless;
mod output;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use taper::Report;

/// A small run whose rewards always differ, so that every step of GRPO moves the weights.
const WORKFLOW: &str = r#"Workflow(
    name: "small", seed: 5,
    model: Tiny(hidden: 32, layers: 2, heads: 2, ffn: 64, positions_max: 160),
    data: Chains(terms_min: 2, terms_mean: 3.0, terms_max: 8, tail: 0.2, tail_min: 6, heldout: 20),
    steps: [
        Sft(steps: 8, batch: 16, micro_batch: 4, optimizer: (lr: 1e-2, warmup: 2)),
        Evaluate(problems: 10),
        Grpo(steps: 10, prompts: 6, group: 4, micro_batch: 4, kl: 0.01, optimizer: (lr: 1e-3)),
        Evaluate(problems: 10),
        Export(to: "model"),
    ],
    rewards: [Exact(marker: "\#", weight: 1.0), Length(weight: 0.5)],
    sampling: (temperature: 1.0, tokens_max: 96),
    devices: (cpu: 2, slots_max: 8),
    checkpoint: (every: 2, keep: 2),
)"#;

fn workflow(folder: &Path, change: impl Fn(String) -> String) -> std::path::PathBuf {
    let path = folder.join("small.ron");
    std::fs::write(&path, change(WORKFLOW.replace("\\#", "#"))).unwrap();
    path
}

/// The same with problems from a file.
fn with_problems(workflow: &str, name: &str, heldout: usize) -> String {
    let (start, end) = (workflow.find("data:").unwrap(), workflow.find("steps:").unwrap());
    format!("{}data: Jsonl(path: \"{name}\", heldout: {heldout}), {}", &workflow[..start], &workflow[end..])
}

/// Steps enough that some device runs dry and learns also on a busy machine: a step takes milliseconds.
fn with_idle_time(workflow: String) -> String {
    assert!(workflow.contains("steps: 10"));
    workflow.replace("steps: 10", "steps: 60")
}

fn taper(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_taper")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn completed(arguments: &[&str]) {
    let output = taper(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A workflow that takes a while, and has a drafter after each micro-batch: idle time is for learning alone.
fn long(folder: &Path) -> std::path::PathBuf {
    let often = "speculation: (training: (publish_every: 1), lending: false),\n    devices:";
    workflow(folder, |w| w.replace("steps: 10", "steps: 120").replace("devices:", often))
}

/// A run at work that has written `checkpoints` checkpoints of GRPO, those from earlier sessions not counted.
fn at_work(arguments: &[&str], dir: &Path, checkpoints: usize) -> Child {
    let earlier = checkpoints_of(dir);
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < checkpoints {
        std::thread::sleep(Duration::from_millis(2));
        let names = checkpoints_of(dir);
        seen.extend(
            names.into_iter().filter(|n| n.starts_with("002-") && !n.ends_with(".partial") && !earlier.contains(n)),
        );
        assert!(child.try_wait().unwrap().is_none(), "{arguments:?} ended too early");
    }
    child
}

/// A run at work that has done so many steps.
fn at_step(arguments: &[&str], dir: &Path, wanted: usize) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_taper")).args(arguments).stderr(Stdio::piped()).spawn().unwrap();
    // A run that has just begun has nothing to report.
    let steps = || {
        let output = taper(&["report", text(dir), "--json"]);
        serde_json::from_slice::<Report>(&output.stdout).map_or(0, |report| report.steps)
    };
    while steps() < wanted {
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// Names in the folder of checkpoints, oldest first.
fn checkpoints_of(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What a child says after a signal.
fn signalled(child: Child, signal: &str) -> Output {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a command says that must end with one error and exit code 2.
fn refusal(arguments: &[&str]) -> String {
    let output = taper(arguments);
    let message = message(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

fn report(dir: &Path) -> Report {
    let output = taper(&["report", text(dir), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
