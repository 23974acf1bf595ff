//! R1: killed at any moment and resumed, a run ends with the weights of one that was left alone.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kernels::NoiseKey;
use taper::{Failing, Fault, Moment, Options, Report};

use super::{at_step, at_work, checkpoints_of, completed, long, message, report, signalled, taper, text, workflow};

#[test]
fn a_run_killed_ten_times_ends_with_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    killed_ten_times(folder.path(), &workflow(folder.path(), |w| w.replace("steps: 10", "steps: 60")));
}

/// A version is published after each micro-batch of the drafter, and checkpoints hold it: kills meet that, too.
#[test]
fn so_does_one_that_is_killed_while_its_drafter_learns() {
    let folder = tempfile::tempdir().unwrap();
    let alone = killed_ten_times(folder.path(), &long(folder.path()));
    let versions = alone.history.iter().map(|m| m.drafter_version).max();
    assert!(versions > Some(0), "nothing was published, {} s of idle time used", alone.idle_used_s);
}

/// Not at any moment, but while the drafter learns for certain, and right after a version was published.
#[test]
fn so_does_one_that_is_killed_in_drafter_training_or_right_after_a_publication() {
    let folder = tempfile::tempdir().unwrap();
    let (file, whole) = (long(folder.path()), folder.path().join("whole"));
    completed(&["run", text(&file), "--out", text(&whole)]);
    let mut unsaved = 0;
    for (moment, version) in [("look 1", 0), ("look 60", 0), ("published 1", 1), ("published 4", 4)] {
        let dir = folder.path().join(moment.replace(' ', "-"));
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["crash::is_killed_at_a_moment", "--exact", "--ignored"]);
        let output = child.env(FILE, &file).env(DIR, &dir).env(MOMENT, moment).output().unwrap();
        assert_eq!(output.status.signal(), Some(6), "{moment}: {}", String::from_utf8_lossy(&output.stdout));
        let killed = report(&dir);
        assert_eq!(killed.status, "interrupted", "{moment}");
        // No step that was done has it.
        unsaved += usize::from(killed.history.iter().all(|step| step.drafter_version < version));
        completed(&["resume", text(&dir)]);
        let resumed = report(&dir);
        let done = |report: &Report| (report.weights_blake3.clone(), report.history.len());
        assert_eq!(done(&resumed), done(&report(&whole)), "{moment}, after {} steps", killed.steps);
        assert!(killed.steps < resumed.steps, "{moment}");
    }
    assert!(unsaved > 0, "no kill met a version that was just published");
}

const FILE: &str = "TAPER_TEST_FILE";
const DIR: &str = "TAPER_TEST_DIR";
const MOMENT: &str = "TAPER_TEST_MOMENT";

/// The process of a run that ends all of a sudden.
#[test]
#[ignore = "is a part of another test, which starts it"]
fn is_killed_at_a_moment() {
    let variable = |name: &str| std::env::var(name).ok();
    let (Some(file), Some(dir), Some(moment)) = (variable(FILE), variable(DIR), variable(MOMENT)) else { return };
    let plan = taper::parse(&std::fs::read_to_string(&file).unwrap(), Path::new(&file).parent().unwrap()).unwrap();
    let (what, count) = moment.split_once(' ').unwrap();
    let count = count.parse().unwrap();
    let moment = if what == "look" { Moment::Look(count) } else { Moment::Published(count) };
    let fault = Some(Fault { device: 1, moment, how: Failing::Kills });
    let options = Options { dir: dir.into(), fault, ..Options::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(taper::run(&plan, options, |_| {}, std::future::pending())).unwrap();
}

fn killed_ten_times(folder: &Path, file: &Path) -> Report {
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    completed(&["run", text(file), "--out", text(&whole)]);
    let alone = report(&whole);
    // Moments spread over a run's length, so that kills meet loading, training, decoding and checkpoints; short enough that the
    // run meets most of them on a machine that has become faster meanwhile.
    let mut longest_ms = alone.wall_s * 1000.0 * 0.15;
    let mut kills = killed_on_the_way(file, &killed, longest_ms);
    while kills < 5 {
        std::fs::remove_dir_all(&killed).unwrap();
        longest_ms /= 2.0;
        assert!(longest_ms > 1.0, "a run of {} s is over before it can be killed {kills} times", alone.wall_s);
        kills = killed_on_the_way(file, &killed, longest_ms);
    }
    completed(&["run", text(file), "--out", text(&killed)]);
    let resumed = report(&killed);
    assert_eq!(resumed.weights_blake3, alone.weights_blake3, "after {kills} kills");
    assert_eq!(resumed.history.len(), alone.history.len());
    let model = |dir: &Path| std::fs::read(dir.join("model/model.safetensors")).unwrap();
    assert_eq!(model(&killed), model(&whole));
    alone
}

/// Begins a run, or goes on with it, and kills it after a moment, ten times or until it is over; returns how many kills met it.
fn killed_on_the_way(file: &Path, killed: &Path, longest_ms: f64) -> usize {
    let key = NoiseKey::new(std::process::id().into(), 0, 0, 0, 0);
    let mut kills = 0;
    for attempt in 0.. {
        let mut child = Command::new(env!("CARGO_BIN_EXE_taper"))
            .args(["run", text(file), "--out", text(killed)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(30 + (key.uniform(0, attempt) * longest_ms) as u64));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status} after {kills} kills");
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        if kills == 10 {
            break;
        }
    }
    kills
}

/// An export that is killed leaves nothing or all of it, and does not stand in the way of the next one.
#[test]
fn an_export_killed_at_any_moment_is_whole_or_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = (long(folder.path()), folder.path().join("run"));
    completed(&["run", text(&file), "--out", text(&dir)]);
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let export = |to: &Path| ["export", text(&dir), "--drafter", "sglang", "--to", text(to)].map(str::to_owned);
    let began = Instant::now();
    completed(&export(&whole).each_ref().map(String::as_str));
    let length_ms = began.elapsed().as_secs_f64() * 1000.0;
    let files = |dir: &Path| ["config.json", "model.safetensors"].map(|name| std::fs::read(dir.join(name)).ok());
    for attempt in 0..12 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_taper"))
            .args(export(&killed))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros((length_ms * 1000.0 * f64::from(attempt) / 12.0) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!killed.exists() || files(&killed) == files(&whole), "a part of an export after kill {attempt}");
    }
    completed(&export(&killed).each_ref().map(String::as_str));
    assert_eq!(files(&killed), files(&whole));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("partial")), "{left:?}");
}

/// Two runs are at work, and both end.
#[test]
fn a_comparison_that_is_stopped_ends() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 2000"));
    let (both, began) = (folder.path().join("both"), Instant::now());
    let child = at_step(&["compare", text(&file), "--out", text(&both)], &both.join("with"), 12);
    let (working, stopping) = (began.elapsed(), Instant::now());
    let output = signalled(child, "INT");
    assert_eq!(output.status.code(), Some(130), "{}", message(&output));
    assert!(stopping.elapsed() < 20 * working.max(Duration::from_secs(1)), "it went on");
    for side in ["with", "without"] {
        assert_eq!(report(&both.join(side)).status, "interrupted");
    }
}

/// What the controller was told is all that its choices depend on, also where it goes on from a checkpoint.
#[test]
fn choices_of_a_run_that_was_killed_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir, told) = (long(folder.path()), folder.path().join("run"), folder.path().join("decisions.jsonl"));
    let arguments = ["run", text(&file), "--out", text(&dir), "--decisions", text(&told)];
    let mut child = at_work(&arguments, &dir, 2);
    child.kill().unwrap();
    child.wait().unwrap();
    completed(&["resume", text(&dir), "--decisions", text(&told)]);
    let output = taper(&["decisions", text(&told), "--json"]);
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success() && again["differences"] == 0, "{again}");
    assert!(again["sessions"] == 2 && again["choices"].as_u64() > Some(1000), "{again}");
    let drafts = again["ways"].as_array().unwrap().iter().filter(|way| !way["strategy"].is_null()).count();
    assert!(drafts > 0, "{again}");
    assert!(super::refusal(&["decisions", text(&file)]).contains("line 1"));
}

#[test]
fn a_run_that_was_stopped_says_so_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    // So many steps that it is still at work when a busy machine delivers the third signal.
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 480"));
    let dir = folder.path().join("run");
    let run = ["run", text(&file), "--out", text(&dir)];
    let resume = ["resume", text(&dir)];
    for (arguments, signal, code) in [(&run[..], "INT", 130), (&resume[..], "TERM", 143), (&run[..], "HUP", 129)] {
        let output = signalled(at_work(arguments, &dir, 1), signal);
        let message = message(&output);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(&format!("`taper resume {}` goes on", dir.display())), "{message}");
        assert_eq!(report(&dir).status, "interrupted");
    }
    completed(&resume);
    let report = report(&dir);
    assert_eq!((report.status.as_str(), report.steps), ("complete", 488));
    for arguments in [&run[..], &resume[..]] {
        let output = taper(arguments);
        assert!(message(&output).contains("already complete"), "{}", message(&output));
        assert!(output.status.success());
    }
}

#[test]
fn a_run_that_is_stopped_keeps_its_last_step() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 200").replace("every: 2", "every: 1000"));
    let (whole, dir) = (folder.path().join("whole"), folder.path().join("run"));
    completed(&["run", text(&file), "--out", text(&whole)]);
    // Only the stages before GRPO end with a checkpoint.
    let child = at_step(&["run", text(&file), "--out", text(&dir)], &dir, 20);
    assert_eq!(signalled(child, "INT").status.code(), Some(130));
    // Eight steps of SFT come before.
    let steps = report(&dir).steps;
    assert_eq!(checkpoints_of(&dir).last(), Some(&format!("002-{:06}", steps - 8)));
    let mut child = at_work(&["resume", text(&dir)], &dir, 0);
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "there is more to do");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(report(&dir).steps >= steps, "no step was lost");
    completed(&["resume", text(&dir)]);
    assert_eq!(report(&dir).weights_blake3, report(&whole).weights_blake3);
}

/// What speculates may change between sessions: the newest is what the run goes on with.
#[test]
fn a_drafter_that_comes_later_is_resumed_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let without = |w: String| {
        let steps = w.replace("steps: 10", "steps: 120");
        steps.replace("devices:", "speculation: (drafters: [Suffix()], lending: false),\n    devices:")
    };
    let kill = |arguments: &[&str], checkpoints: usize| {
        let mut child = at_work(arguments, &dir, checkpoints);
        child.kill().unwrap();
        child.wait().unwrap();
    };
    kill(&["run", text(&workflow(folder.path(), without)), "--out", text(&dir)], 1);
    kill(&["run", text(&long(folder.path())), "--out", text(&dir)], 1);
    completed(&["resume", text(&dir)]);
    let last = report(&dir).history.iter().map(|m| m.drafter_version).max();
    assert!(last > Some(0), "no drafter was learned");
    completed(&["export", text(&dir), "--drafter", "sglang"]);
    assert!(dir.join("drafter-sglang/model.safetensors").is_file());
}

#[test]
fn a_run_at_work_is_running() {
    let folder = tempfile::tempdir().unwrap();
    let file = long(folder.path());
    let dir = folder.path().join("run");
    let mut child = at_work(&["run", text(&file), "--out", text(&dir)], &dir, 1);
    assert_eq!(report(&dir).status, "running");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(report(&dir).status, "interrupted");
}
