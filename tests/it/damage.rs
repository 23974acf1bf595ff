//! Damaged folders: never silently begun anew; what can be made good is, with the same weights.

use std::fs;
use std::path::{Path, PathBuf};

use taper::state::journal::{Journal, SledJournal};

use super::{
    at_step, at_work, checkpoints_of, completed, long, message, refusal, report, signalled, taper, text, with_problems,
    workflow,
};

/// A run that was stopped in the middle.
fn stopped(folder: &Path) -> (PathBuf, PathBuf) {
    let (file, dir) = (long(folder), folder.join("run"));
    signalled(at_work(&["run", text(&file), "--out", text(&dir)], &dir, 3), "INT");
    (file, dir)
}

/// The same of one whose checkpoints hold a drafter by now: when there is one is up to idle time.
fn stopped_with_drafter(folder: &Path) -> (PathBuf, PathBuf) {
    let (file, dir) = (long(folder), folder.join("run"));
    let mut child = at_work(&["run", text(&file), "--out", text(&dir)], &dir, 1);
    let holds_drafter = |name: &String| dir.join("checkpoints").join(name).join("drafter.safetensors").exists();
    while !checkpoints_of(&dir).iter().any(holds_drafter) {
        assert!(child.try_wait().unwrap().is_none(), "no drafter was published in the whole run");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    signalled(child, "INT");
    (file, dir)
}

/// Weights of the same run, left alone.
fn expected(folder: &Path) -> String {
    let dir = folder.join("whole");
    completed(&["run", text(&long(folder)), "--out", text(&dir)]);
    report(&dir).weights_blake3
}

/// Ends a run; what it warned of.
fn resumed(arguments: &[&str]) -> String {
    let output = taper(arguments);
    let message = message(&output);
    assert!(output.status.success(), "{message}");
    message.lines().filter(|l| l.starts_with("warning:")).map(|l| format!("{l}\n")).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn spoil(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_run_without_its_journal_does_not_begin_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = stopped(folder.path());
    let (journal, backup) = (dir.join("journal"), folder.path().join("backup"));
    copy(&journal, &backup);
    let before = checkpoints_of(&dir);
    let newest = before.last().unwrap();
    let missing = || fs::remove_dir_all(&journal).unwrap();
    let empty = || fs::create_dir_all(&journal).unwrap();
    let cut = || {
        copy(&backup, &journal);
        fs::write(journal.join("db"), "").unwrap();
    };
    let damages: [&dyn Fn(); 3] = [&missing, &empty, &cut];
    for damage in damages {
        damage();
        for arguments in
            [&["run", text(&file), "--out", text(&dir)][..], &["resume", text(&dir)], &["report", text(&dir)]]
        {
            let message = refusal(arguments);
            for part in [text(&dir), newest.as_str(), text(&journal), "--fresh"] {
                assert!(message.contains(part), "{part}: {message}");
            }
            assert_eq!(checkpoints_of(&dir), before);
        }
    }
    fs::remove_dir_all(&journal).unwrap();
    copy(&backup, &journal);
    completed(&["resume", text(&dir)]);
    fs::remove_dir_all(&journal).unwrap();
    completed(&["run", text(&workflow(folder.path(), |w| w)), "--out", text(&dir), "--fresh"]);
    assert_eq!(report(&dir).steps, 18);
}

#[test]
fn a_journal_that_lost_its_end_is_not_rolled_back_silently() {
    let folder = tempfile::tempdir().unwrap();
    let (_, dir) = stopped(folder.path());
    let (earlier, later) = (folder.path().join("earlier"), folder.path().join("later"));
    copy(&dir, &earlier);
    signalled(at_work(&["resume", text(&dir)], &dir, 4), "INT");
    // An older journal, but for the number of events that were committed.
    let count = fs::read(dir.join("journal/count")).unwrap();
    fs::remove_dir_all(dir.join("journal")).unwrap();
    copy(&earlier.join("journal"), &dir.join("journal"));
    fs::write(dir.join("journal/count"), count).unwrap();
    copy(&dir, &later);
    // One that has only its beginning, and is none the worse for what it knows.
    let begun = folder.path().join("begun");
    copy(&dir, &begun);
    let journal = begun.join("journal");
    let events = SledJournal::open_read_only(&journal).unwrap().events().unwrap();
    fs::remove_dir_all(&journal).unwrap();
    let mut first = SledJournal::open(&journal).unwrap();
    first.append(&events[0]).unwrap();
    first.commit().unwrap();
    drop(first);
    let message = refusal(&["resume", text(&begun)]);
    assert!(message.contains("its journal ends before its checkpoints"), "{message}");
    let message = refusal(&["resume", text(&dir)]);
    assert!(message.contains("lost its last") && message.contains(checkpoints_of(&dir).last().unwrap()), "{message}");
    copy(&earlier.join("checkpoints"), &later.join("checkpoints"));
    let warnings = resumed(&["resume", text(&later)]);
    assert!(warnings.contains("lost its last") && warnings.lines().count() == 1, "{warnings}");
    assert_eq!(report(&later).weights_blake3, expected(folder.path()));
}

#[test]
fn an_older_checkpoint_stands_in_for_a_damaged_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_, dir) = stopped(folder.path());
    let kept = checkpoints_of(&dir);
    assert_eq!(kept.len(), 2, "{kept:?}");
    let file = |name: &str, part: &str| dir.join("checkpoints").join(name).join(part);
    spoil(&file(&kept[1], "weights.safetensors"));
    let other = folder.path().join("other");
    copy(&dir, &other);
    let spoken = taper(&["generate", text(&dir), "1+2?"]);
    let warning = message(&spoken);
    assert!(spoken.status.success() && warning.contains(&format!("going on from {}", kept[0])), "{warning}");
    // An older model does not take the place of what the run exports; elsewhere it may be written.
    assert!(refusal(&["export", text(&dir)]).contains("has learned more"));
    completed(&["export", text(&dir), "--to", text(&folder.path().join("out"))]);
    let warnings = resumed(&["resume", text(&dir)]);
    assert!(warnings.contains(&kept[1]) && warnings.contains(&format!("going on from {}", kept[0])), "{warnings}");
    assert_eq!(warnings.lines().count(), 1, "{warnings}");
    assert_eq!(report(&dir).weights_blake3, expected(folder.path()));
    assert_eq!(report(&dir).steps, 128);
    fs::write(other.join("checkpoints").join(&kept[0]).join("manifest.json"), "{").unwrap();
    let message = refusal(&["resume", text(&other)]);
    assert!(message.contains(&kept[1]) && message.contains("--fresh"), "{message}");
}

#[test]
fn a_checkpoint_made_on_stopping_stands_in_for_a_damaged_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 120").replace("every: 2", "every: 1000"));
    let [dir, whole] = ["run", "whole"].map(|name| folder.path().join(name));
    completed(&["run", text(&file), "--out", text(&whole)]);
    signalled(at_step(&["run", text(&file), "--out", text(&dir)], &dir, 20), "INT");
    let steps = report(&dir).steps;
    signalled(at_step(&["resume", text(&dir)], &dir, steps + 10), "INT");
    let kept = checkpoints_of(&dir);
    assert!(kept.len() == 2 && kept[0].starts_with("002-"), "{kept:?}");
    spoil(&dir.join("checkpoints").join(&kept[1]).join("weights.safetensors"));
    let warnings = resumed(&["resume", text(&dir)]);
    assert!(warnings.contains(&kept[1]) && warnings.contains(&format!("going on from {}", kept[0])), "{warnings}");
    assert_eq!(
        (report(&dir).weights_blake3, report(&dir).steps),
        (report(&whole).weights_blake3, report(&whole).steps)
    );
}

#[test]
fn other_data_or_weights_are_not_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let line = |i: usize| format!("{{\"question\": \"{}+{}?\", \"answer\": \"{}\"}}\n", i / 6, i % 6, i / 6 + i % 6);
    let (data, weights) = (folder.path().join("sums.jsonl"), folder.path().join("weights.safetensors"));
    fs::write(&data, (0..54).map(line).collect::<String>()).unwrap();
    completed(&["run", text(&workflow(folder.path(), Into::into)), "--out", text(&folder.path().join("first"))]);
    fs::copy(folder.path().join("first/model/model.safetensors"), &weights).unwrap();
    let file = workflow(folder.path(), |w| {
        let w = with_problems(&w, "sums.jsonl", 10).replace("steps: 10", "steps: 200");
        w.replace("positions_max: 160", "positions_max: 160, weights: \"weights.safetensors\"")
    });
    let dir = folder.path().join("run");
    signalled(at_work(&["run", text(&file), "--out", text(&dir)], &dir, 1), "INT");
    // A line more, and another number in a tensor; what stands before them stays.
    let longer = [fs::read(&data).unwrap(), line(55).into_bytes()].concat();
    let mut other = fs::read(&weights).unwrap();
    *other.last_mut().unwrap() ^= 1;
    for (input, changed) in [(&data, longer), (&weights, other)] {
        let before = fs::read(input).unwrap();
        fs::write(input, changed).unwrap();
        let message = refusal(&["resume", text(&dir)]);
        assert!(message.contains(text(input)) && message.contains("--fresh"), "{message}");
        fs::write(input, before).unwrap();
    }
    completed(&["resume", text(&dir)]);
    // By now the run has weights of its own.
    fs::remove_file(&weights).unwrap();
    completed(&["generate", text(&dir), "1+2?"]);
    completed(&["export", text(&dir), "--to", text(&folder.path().join("out"))]);
}

#[test]
fn a_run_goes_on_where_its_files_have_gone() {
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = ["here", "there"].map(|name| folder.path().join(name));
    fs::create_dir(&here).unwrap();
    let line = |i: usize| format!("{{\"question\": \"{}+{}?\", \"answer\": \"{}\"}}\n", i / 6, i % 6, i / 6 + i % 6);
    fs::write(here.join("sums.jsonl"), (0..54).map(line).collect::<String>()).unwrap();
    let long = |w: String| with_problems(&w, "sums.jsonl", 10).replace("steps: 10", "steps: 100");
    let (file, dir) = (workflow(&here, long), here.join("run"));
    signalled(at_work(&["run", text(&file), "--out", text(&dir)], &dir, 1), "INT");
    fs::rename(&here, &there).unwrap();
    let (file, dir) = (there.join(file.file_name().unwrap()), there.join("run"));
    let message = refusal(&["resume", text(&dir)]);
    assert!(message.contains("sums.jsonl") && message.contains("taper run FILE --out"), "{message}");
    completed(&["run", text(&file), "--out", text(&dir)]);
    let whole = there.join("whole");
    completed(&["run", text(&file), "--out", text(&whole)]);
    assert_eq!(report(&dir).weights_blake3, report(&whole).weights_blake3);
}

#[test]
fn a_drafter_that_does_not_fit_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (_, dir) = stopped_with_drafter(folder.path());
    let newest = checkpoints_of(&dir).pop().unwrap();
    let [other, third, fourth] = ["other", "third", "fourth"].map(|name| folder.path().join(name));
    [&other, &third, &fourth].into_iter().for_each(|to| copy(&dir, to));
    let spoil_part = |dir: &Path, part: &str| spoil(&dir.join("checkpoints").join(&newest).join(part));
    spoil_part(&dir, "drafter.safetensors");
    spoil_part(&third, "speculation.json");
    // What a drafter learns from goes along, so that a run that goes on teaches it at once.
    spoil_part(&fourth, "examples.safetensors");
    let spoken = taper(&["generate", text(&dir), "1+2?"]);
    assert!(spoken.status.success() && message(&spoken).contains("its drafter cannot be used"), "{spoken:?}");
    let expected = expected(folder.path());
    let shape = "speculation: (drafters: [Eagle(ffn: 48)]), devices:";
    let file = workflow(folder.path(), |w| w.replace("steps: 10", "steps: 120").replace("devices:", shape));
    let resume = |dir| ["resume", text(dir)];
    let runs = [&resume(&dir)[..], &resume(&third), &resume(&fourth), &["run", text(&file), "--out", text(&other)]];
    for arguments in runs {
        let warnings = resumed(arguments);
        assert!(warnings.contains("drafter") && warnings.lines().count() == 1, "{warnings}");
    }
    for dir in [&dir, &other, &third, &fourth] {
        assert_eq!(report(dir).weights_blake3, expected);
    }
}

/// A disk that takes no more, for as long as files may not grow beyond `kilobytes`.
fn refusal_on_a_full_disk(arguments: &[&str], kilobytes: u32) -> String {
    let limited = format!("ulimit -f {kilobytes}; exec \"$@\"");
    let mut command = std::process::Command::new("bash");
    command.args(["-c", &limited, "bash", env!("CARGO_BIN_EXE_taper")]).args(arguments);
    let output = command.output().unwrap();
    let message = message(&output);
    assert!(output.status.code() == Some(1) && !message.contains("panicked"), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    message
}

#[test]
fn a_full_disk_ends_the_run_and_leaves_what_was_done() {
    let folder = tempfile::tempdir().unwrap();
    let (_, dir) = stopped(folder.path());
    let before = checkpoints_of(&dir);
    for kilobytes in [0, 20, 60, 150] {
        let message = refusal_on_a_full_disk(&["resume", text(&dir)], kilobytes);
        // A journal is read from a copy, which has no room either.
        let is_placed = message.contains(text(&dir)) || message.contains("taper-journal");
        assert!(is_placed && message.contains("File too large"), "{kilobytes} kB: {message}");
        assert_eq!(checkpoints_of(&dir), before, "{kilobytes} kB");
    }
    completed(&["resume", text(&dir)]);
    assert_eq!(report(&dir).weights_blake3, expected(folder.path()));
}
