//! R1: killed at any moment and resumed, a run ends with the weights of one that was left alone.

use std::process::{Command, Stdio};
use std::time::Duration;

use kernels::NoiseKey;

use super::{completed, report, text, workflow};

#[test]
fn a_run_killed_ten_times_ends_with_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 60"));
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    completed(&["run", text(&file), "--out", text(&whole)]);
    let alone = report(&whole);
    // Moments spread over a run's length, so that kills meet loading, training, decoding and checkpoints.
    let key = NoiseKey::new(std::process::id().into(), 0, 0, 0, 0);
    let length_ms = alone.wall_s * 1000.0;
    let mut kills = 0;
    for attempt in 0.. {
        let mut child = Command::new(env!("CARGO_BIN_EXE_taper"))
            .args(["run", text(&file), "--out", text(&killed)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(30 + (key.uniform(0, attempt) * length_ms * 0.3) as u64));
        let is_over = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        kills += usize::from(!is_over);
        if is_over || kills == 10 {
            break;
        }
    }
    completed(&["run", text(&file), "--out", text(&killed)]);
    let resumed = report(&killed);
    assert_eq!(resumed.weights_sha256, alone.weights_sha256, "after {kills} kills");
    assert_eq!(resumed.history.len(), alone.history.len());
    assert!(kills >= 5, "only {kills} kills met the run");
    let model = |dir: &std::path::Path| std::fs::read(dir.join("model/model.safetensors")).unwrap();
    assert_eq!(model(&killed), model(&whole));
}

#[test]
fn an_interrupted_run_says_so_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 200"));
    let dir = folder.path().join("run");
    let child = Command::new(env!("CARGO_BIN_EXE_taper"))
        .args(["run", text(&file), "--out", text(&dir)])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report(&dir).status, "interrupted");
    completed(&["resume", text(&dir)]);
    let report = report(&dir);
    assert_eq!((report.status.as_str(), report.steps), ("complete", 208));
}
