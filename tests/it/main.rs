//! Whole runs of the real program: crash and resume, losslessness, lost devices, bad input.

mod bad_input;
mod crash;
mod devices;
mod lossless;

use std::path::Path;
use std::process::{Command, Output};

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

fn report(dir: &Path) -> Report {
    let output = taper(&["report", text(dir), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}
