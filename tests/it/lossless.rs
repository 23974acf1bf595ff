//! The whole learns the same with and without speculation, and on another number of devices.

use taper::Report;

use super::{at_step, completed, report, signalled, taper, text, with_idle_time, workflow};

#[test]
fn speculation_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), with_idle_time);
    let both = folder.path().join("both");
    let output = taper(&["compare", text(&file), "--out", text(&both), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["identical"], true);
    assert_eq!(found["weights_blake3_with"], found["weights_blake3_without"]);
    assert!(found["with"].get("history").is_none() && found["without"].get("history").is_none());
    // The comparison compares something: drafts were made with speculation only.
    let (with, without) = (report(&both.join("with")), report(&both.join("without")));
    let drafted = |side: &Report| side.history.iter().map(|m| m.drafted_cycles).sum::<u64>();
    assert!(drafted(&with) > 0 && drafted(&without) == 0);
    assert!(with.lent > 0 && without.lent == 0, "answers went on on the other device");
    assert_eq!(found["with"]["tokens"], with.tokens);
    // A second comparison takes the place of the first. Now idle time is for the drafter alone.
    let file = workflow(folder.path(), |w| {
        with_idle_time(w).replace("devices:", "speculation: (lending: false),\n    devices:")
    });
    completed(&["compare", text(&file), "--out", text(&both)]);
    assert_eq!(taper::inspect(&both.join("with")).unwrap().sessions, 1);
    let learned = report(&both.join("with"));
    assert!(learned.history.iter().any(|m| m.drafter_batches > 0), "the drafter was trained");
    assert!(learned.idle_used_s > 0.0 && learned.idle_used_s <= learned.idle_s);
    assert_eq!((learned.lent, learned.weights_blake3), (0, with.weights_blake3));
}

#[test]
fn evaluations_in_between_change_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let cosine = |w: String| {
        let w = w.replace("steps: 10", "steps: 240").replace("every: 2,", "every: 7,");
        w.replace("(lr: 1e-3)", "(lr: 1e-3, warmup: 3, schedule: Cosine)")
    };
    completed(&["run", text(&workflow(folder.path(), cosine)), "--out", text(&whole)]);
    let file = workflow(folder.path(), |w| {
        let during = |every: usize| format!("evaluate: (every: {every}, problems: 5, temperature: 1.0), optimizer");
        let w = cosine(w).replace("kl: 0.01, optimizer", &format!("kl: 0.01, {}", during(50)));
        w.replace("micro_batch: 4, optimizer", &format!("micro_batch: 4, {}", during(8)))
    });
    // Stopped in the second part, and killed.
    signalled(at_step(&["run", text(&file), "--out", text(&parts)], &parts, 8 + 60), "INT");
    let mut killed = at_step(&["resume", text(&parts)], &parts, 8 + 110);
    killed.kill().unwrap();
    killed.wait().unwrap();
    completed(&["run", text(&file), "--out", text(&parts)]);
    let (whole, parts) = (report(&whole), report(&parts));
    assert_eq!(whole.weights_blake3, parts.weights_blake3);
    // One before, four in between, one after; none where supervised steps end with the first part.
    let kinds = |kind: &str| parts.history.iter().filter(|m| m.kind == kind).count();
    assert_eq!([kinds("sft"), kinds("grpo"), kinds("evaluate")], [8, 240, 6]);
    let of = |report: &Report| -> Vec<_> {
        let steps = report.history.iter().filter(|m| m.kind == "grpo");
        steps.map(|m| (m.begun + m.step, m.of, m.lr.to_bits(), m.grad_norm.to_bits())).collect()
    };
    assert_eq!(of(&whole), of(&parts), "the schedule and the optimiser go on");
}

#[test]
fn the_number_of_devices_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let mut hashes = Vec::new();
    for devices in [
        "cpu: 1, slots_max: 8",
        "cpu: 2, slots_max: 4",
        "cpu: 3, slots_max: 24",
        "cpu: 2, slots_max: 8, cache_tokens_max: 200",
    ] {
        let file = workflow(folder.path(), |w| w.replace("cpu: 2, slots_max: 8", devices));
        let dir = folder.path().join(devices.replace([':', ' ', ','], "-"));
        completed(&["run", text(&file), "--out", text(&dir)]);
        hashes.push(report(&dir).weights_blake3);
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}
