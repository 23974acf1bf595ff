//! Output that is closed or full: a report ends quietly or says so, a training goes on.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::{completed, message, report, text, workflow};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    command.args(arguments);
    command
}

/// Runs with a stdout that no one reads.
fn unread(arguments: &[&str]) -> Output {
    let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

fn finished(folder: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let (file, dir) = (workflow(folder, |w| w), folder.join("run"));
    completed(&["run", text(&file), "--out", text(&dir)]);
    (file, dir)
}

#[test]
fn a_report_without_a_reader_ends_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = finished(folder.path());
    let commands = [&["report", text(&dir), "--json"][..], &["report", text(&dir)], &["check", text(&file), "--json"]];
    for arguments in commands {
        let output = unread(arguments);
        assert_eq!((output.status.code(), message(&output).as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn a_report_to_a_full_disk_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = finished(folder.path());
    for arguments in [&["report", text(&dir), "--json"][..], &["check", text(&file)]] {
        let output = command(arguments).stdout(File::create("/dev/full").unwrap()).output().unwrap();
        let message = message(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.starts_with("error: cannot write to stdout"), "{message}");
    }
}

#[test]
fn a_training_goes_on_without_a_reader() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let (unheard, full) = (folder.path().join("unheard"), folder.path().join("full"));
    let mut child = command(&["run", text(&file), "--out", text(&unheard)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(report(&unheard).status, "complete");
    let nowhere = || File::options().write(true).open("/dev/full").unwrap();
    let status = command(&["run", text(&file), "--out", text(&full)])
        .env("TAPER_LOG", "trace")
        .stdout(nowhere())
        .stderr(nowhere())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(report(&full).status, "complete");
}
