//! `--fresh` removes what a run made, and nothing else.

use std::fs;

use super::{at_work, checkpoints_of, completed, long, refusal, text, workflow};

#[test]
fn beginning_anew_keeps_files_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let dir = folder.path().join("run");
    let mine =
        ["notes.txt", "checkpoints/notes.txt", "checkpoints/best/notes.txt", "journal/notes.txt", "data/config.json"];
    completed(&["run", text(&file), "--out", text(&dir)]);
    for name in mine {
        fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        fs::write(dir.join(name), name).unwrap();
    }
    completed(&["run", text(&file), "--out", text(&dir)]);
    assert_eq!(taper::inspect(&dir).unwrap().sessions, 1, "it was complete");
    // Less is kept than there was, and nothing is exported.
    let shorten = |w: String| w.replace("Export(to: \"model\"),", "").replace("keep: 2", "keep: 1");
    let short = workflow(folder.path(), shorten);
    completed(&["run", text(&short), "--out", text(&dir), "--fresh"]);
    let state = taper::inspect(&dir).unwrap();
    assert!(state.is_complete && state.sessions == 1);
    assert!(!dir.join("model").exists());
    assert_eq!(checkpoints_of(&dir), ["002-000010", "best", "notes.txt"]);
    for name in mine {
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), name);
    }
    // A file beside an exported model is somebody's: neither goes, and a run that would replace them does not begin.
    let file = workflow(folder.path(), |w| w);
    completed(&["run", text(&file), "--out", text(&dir), "--fresh"]);
    fs::write(dir.join("model/notes.txt"), "mine").unwrap();
    assert!(refusal(&["run", text(&file), "--out", text(&dir), "--fresh"]).contains("`notes.txt` is in it"));
    assert!(taper::inspect(&dir).unwrap().is_complete, "the earlier run is as it was");
    let short = workflow(folder.path(), shorten);
    completed(&["run", text(&short), "--out", text(&dir), "--fresh"]);
    assert_eq!(fs::read_to_string(dir.join("model/notes.txt")).unwrap(), "mine");
}

#[test]
fn an_export_is_refused_before_anything_is_learned_wherever_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("Export(to: \"model\"),", "Export(to: \"../../other\"),"));
    let (dir, other) = (folder.path().join("runs/run"), folder.path().join("other"));
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("keep.txt"), "mine").unwrap();
    // The run's folder, through which the path leads, is not there yet.
    assert!(refusal(&["run", text(&file), "--out", text(&dir)]).contains("`keep.txt` is in it"));
    assert!(!dir.exists());
}

#[test]
fn a_run_at_work_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let file = long(folder.path());
    let dir = folder.path().join("run");
    let mut child = at_work(&["run", text(&file), "--out", text(&dir)], &dir, 1);
    let message = refusal(&["run", text(&file), "--out", text(&dir), "--fresh"]);
    assert!(message.contains("another taper process is using"), "{message}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!checkpoints_of(&dir).is_empty());
    assert!(!taper::inspect(&dir).unwrap().history.is_empty());
}

#[test]
fn a_journal_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let dir = folder.path().join("life");
    let page = dir.join("journal/monday.txt");
    fs::create_dir_all(page.parent().unwrap()).unwrap();
    fs::write(&page, "dear diary").unwrap();
    for fresh in [&["--fresh"][..], &[]] {
        let message = refusal(&[&["run", text(&file), "--out", text(&dir)], fresh].concat());
        assert!(message.contains(text(&dir.join("journal"))), "{message}");
    }
    assert_eq!(fs::read_to_string(&page).unwrap(), "dear diary");
    assert_eq!(fs::read_dir(page.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_folder_without_a_run_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w.replace("Export(to: \"model\"),", "Export(to: \"other\"),"));
    let dir = folder.path().join("mine");
    let mine = ["model/config.json", "model/model.safetensors", "other/notes.txt"];
    for name in mine {
        fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        fs::write(dir.join(name), name).unwrap();
    }
    // Its export would replace a folder of somebody else's, which is found before anything is learned.
    assert!(refusal(&["run", text(&file), "--out", text(&dir), "--fresh"]).contains("other"));
    assert!(!dir.join("journal").exists());
    for name in mine {
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), name);
    }
}

#[test]
fn a_mistake_in_the_model_leaves_the_earlier_run() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    completed(&["run", text(&workflow(folder.path(), |w| w)), "--out", text(&dir)]);
    let wrong = workflow(folder.path(), |w| w.replace("ffn: 64,", "ffn: 64, weights: \"missing\","));
    refusal(&["run", text(&wrong), "--out", text(&dir), "--fresh"]);
    assert!(taper::inspect(&dir).unwrap().is_complete);
}
