//! The whole learns the same with and without speculation, and on another number of devices.

use super::{completed, report, taper, text, workflow};

#[test]
fn speculation_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let output = taper(&["compare", text(&file), "--out", text(&folder.path().join("both")), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["identical"], true);
    assert_eq!(found["weights_sha256_with"], found["weights_sha256_without"]);
    // The comparison compares something: drafts were made with speculation only.
    let drafted = |side: &str| {
        found[side]["history"].as_array().unwrap().iter().map(|m| m["drafted_cycles"].as_u64().unwrap()).sum::<u64>()
    };
    assert!(drafted("with") > 0 && drafted("without") == 0);
    let batches: u64 =
        found["with"]["history"].as_array().unwrap().iter().map(|m| m["drafter_batches"].as_u64().unwrap()).sum();
    assert!(batches > 0, "the drafter was trained");
    let idle = |key: &str| found["with"][key].as_f64().unwrap();
    assert!(idle("idle_used_s") > 0.0 && idle("idle_used_s") <= idle("idle_s"));
}

#[test]
fn the_number_of_devices_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let mut hashes = Vec::new();
    for devices in ["cpu: 1, slots_max: 8", "cpu: 2, slots_max: 4", "cpu: 3, slots_max: 24"] {
        let file = workflow(folder.path(), |w| w.replace("cpu: 2, slots_max: 8", devices));
        let dir = folder.path().join(devices.replace([':', ' ', ','], "-"));
        completed(&["run", text(&file), "--out", text(&dir)]);
        hashes.push(report(&dir).weights_sha256);
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}
