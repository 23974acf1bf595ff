//! Texts and measurements from the command line.

use super::{completed, refusal, report, taper, text, with_idle_time, workflow};

fn json(arguments: &[&str]) -> serde_json::Value {
    let output = taper(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_prompt_gets_the_same_text_with_and_without_speculation() {
    let folder = tempfile::tempdir().unwrap();
    let (file, dir) = (workflow(folder.path(), |w| w), folder.path().join("run"));
    completed(&["run", text(&file), "--out", text(&dir)]);
    for model in [&file, &dir, &dir.join("model")] {
        let arguments = ["generate", text(model), "3+5-2?", "--tokens", "40", "--threads", "1", "--seed", "3"];
        let found = json(&[&arguments[..], &["--compare", "--json"]].concat());
        assert_eq!(found["identical"], true, "{}", model.display());
        assert!((1..=40).contains(&found["tokens"].as_u64().unwrap()));
        // What is shown as it grows is the same text.
        let streamed = taper(&arguments);
        assert_eq!(String::from_utf8_lossy(&streamed.stdout).trim_end_matches('\n'), found["text"]);
    }
}

#[test]
fn measured_answers_are_those_of_plain_decoding() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let small = ["--requests", "6", "--alone", "2", "--tokens", "24", "--learn-from", "4", "--learn-s", "1"];
    let found = json(&[&["bench", "rollout", text(&file), "--regret", "--json"], &small[..]].concat());
    assert_eq!(found["differences"], 0);
    assert!(found["compared"].as_u64().unwrap() > 6);
    assert!(found["learned_batches"].as_u64().unwrap() > 0);
    // Sixteen groups of four in the full batch, and four lessons.
    assert!((10..=16).contains(&found["prompts_measured"].as_u64().unwrap()), "{}", found["prompts_measured"]);
    assert!((1..=4).contains(&found["prompts_learned"].as_u64().unwrap()), "{}", found["prompts_learned"]);
    assert!(["overhead_alone", "overhead_tail"].iter().all(|key| (0.0..1.0).contains(&found[key].as_f64().unwrap())));
    assert_eq!(found["alone"][0]["how"], "plain");
    assert!(found["alone"].as_array().unwrap().len() > 2, "every strategy: {}", found["alone"]);
    assert!(found["trees"].as_array().unwrap().iter().all(|t| t["coupled"]["accept_length"].as_f64().unwrap() >= 1.0));
}

#[test]
fn figures_are_drawn_with_their_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let (file, to) = (workflow(folder.path(), |w| w), folder.path().join("figures"));
    let small = ["--answers", "16", "--requests", "6", "--tokens", "24", "--learn-from", "8", "--learn-s", "2"];
    let found = json(&[&["bench", "paper", text(&file), "--json", "--to", text(&to)], &small[..]].concat());
    let rows = |name: &str| std::fs::read_to_string(to.join(format!("{name}.csv"))).unwrap().lines().count() - 1;
    assert_eq!(["grid", "width", "batch"].map(rows), [25, 5, 30]);
    assert!(rows("running") > 10 && rows("levels") > 0);
    for name in ["grid", "width", "batch", "running", "levels"] {
        assert!(std::fs::read_to_string(to.join(format!("{name}.svg"))).unwrap().starts_with("<svg"), "{name}");
        assert_eq!(found[name].as_array().unwrap().len(), rows(name), "{name}");
    }
    // One alone, and what cannot be drawn.
    let one = folder.path().join("one");
    completed(&[&["bench", "paper", text(&file), "--figure", "width", "--to", text(&one)], &small[..]].concat());
    assert_eq!(std::fs::read_dir(&one).unwrap().count(), 2);
    assert!(refusal(&["bench", "paper", text(&file), "--to", "/proc/none"]).contains("cannot write /proc/none"));
    let none = workflow(folder.path(), |w| w.replace("devices:", "speculation: (drafters: [Suffix()]), devices:"));
    assert!(refusal(&["bench", "paper", text(&none), "--to", text(&one)]).contains("no drafter that learns"));
}

#[test]
fn an_exported_drafter_drafts_as_in_its_run_and_is_where_another_run_begins() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, other) = (folder.path().join("run"), folder.path().join("other"));
    let often =
        |w: String| w.replace("devices:", "speculation: (training: (publish_every: 1), lending: false),\n    devices:");
    let file = workflow(folder.path(), |w| often(with_idle_time(w)));
    completed(&["run", text(&file), "--out", text(&dir)]);
    for engine in ["sglang", "vllm", "taper"] {
        let found = json(&["export", text(&dir), "--drafter", engine, "--json"]);
        assert_eq!(found["folder"], text(&dir.join(format!("drafter-{engine}"))));
        assert_eq!(found["drafter"]["accept_length_folder"], found["drafter"]["accept_length_run"], "{engine}");
        assert!(found["drafter"]["accept_length_run"].as_f64().unwrap() > 1.0);
    }
    // From the exported one on, with other bytes nowhere.
    let begins = |path: &str| {
        let drafters = format!("speculation: (drafters: [Eagle(weights: \"{path}\")], training: None),\n    devices:");
        workflow(folder.path(), |w| with_idle_time(w).replace("devices:", &drafters))
    };
    completed(&["run", text(&begins("run/drafter-taper")), "--out", text(&other)]);
    let [first, second] = [&dir, &other].map(|dir| report(dir));
    assert_eq!(first.weights_blake3, second.weights_blake3);
    assert!(second.history.iter().all(|m| m.drafter_batches == 0));
    assert!(second.history.iter().any(|m| m.learned_accept_length > 0.0), "it drafts without training");
    // The model, too; and what is not a drafter, or no run, is told.
    let found = json(&["export", text(&dir), "--to", text(&folder.path().join("out")), "--json"]);
    assert!(found["drafter"].is_null() && folder.path().join("out/model.safetensors").is_file());
    assert!(
        refusal(&["run", text(&begins("out")), "--out", text(&folder.path().join("third"))]).contains("config.json")
    );
    assert!(refusal(&["export", text(folder.path()), "--drafter", "vllm"]).contains("holds no run"));
    for own in ["checkpoints/model", "nowhere/../checkpoints", "model/../journal/model"] {
        let message = refusal(&["export", text(&dir), "--to", text(&dir.join(own))]);
        assert!(message.contains("name another folder"), "{message}");
    }
}

/// On three devices, of which two may train at the same time.
#[test]
fn an_eagle3_learns_changes_no_byte_and_begins_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, speculation: &str| {
        let speculation = format!("speculation: ({speculation}),\n    devices:");
        let file = workflow(folder.path(), |w| {
            let w = with_idle_time(w).replace("layers: 2", "layers: 4");
            w.replace("cpu: 2", "cpu: 3").replace("devices:", &speculation)
        });
        let dir = folder.path().join(name);
        (["run".to_owned(), text(&file).into(), "--out".into(), text(&dir).into()], dir)
    };
    let go = |(arguments, dir): ([String; 4], std::path::PathBuf)| {
        completed(&arguments.each_ref().map(String::as_str));
        dir
    };
    let dir = go(run("learns", "drafters: [Eagle3(ffn: 48), Suffix()], training: (publish_every: 1), lending: false"));
    let learned = report(&dir);
    assert!(learned.history.iter().any(|m| m.drafter_batches > 0 && m.drafter_version > 1));
    for engine in ["sglang", "vllm", "taper"] {
        let found = json(&["export", text(&dir), "--drafter", engine, "--json"]);
        assert_eq!(found["drafter"]["accept_length_folder"], found["drafter"]["accept_length_run"], "{engine}");
    }
    let plain = report(&go(run("plain", "controller: Off")));
    assert_eq!(plain.weights_blake3, learned.weights_blake3);
    let other = run("other", "drafters: [Eagle3(weights: \"learns/drafter-vllm\")], training: None");
    completed(&["check", &other.0[1]]);
    let other = go(other);
    let other = report(&other);
    assert_eq!(other.weights_blake3, learned.weights_blake3);
    assert!(other.history.iter().any(|m| m.learned_accept_length > 0.0), "it drafts without training");
    // Written down as the other kind.
    let (arguments, _) = run("wrong", "drafters: [Eagle(ffn: 48, weights: \"learns/drafter-vllm\")], training: None");
    let refused = refusal(&arguments.each_ref().map(String::as_str));
    assert!(refused.contains("is an `Eagle3` where the workflow says `Eagle`"), "{refused}");
}

#[test]
fn every_way_to_decode_is_compared_with_plain_decoding() {
    let folder = tempfile::tempdir().unwrap();
    // What a token was followed by is repeated: texts of a model that knows nothing have no longer matches.
    let drafters = "speculation: (drafters: [Eagle(), Suffix(match_min: 1)]),\n    devices:";
    let file = workflow(folder.path(), |w| w.replace("devices:", drafters));
    let small = ["--requests", "9", "--tokens", "24", "--learn-from", "8", "--learn-s", "1"];
    let found = json(&[&["bench", "lossless", text(&file), "--json"], &small[..]].concat());
    assert_eq!(found["differences"], 0);
    let ways = found["ways"].as_array().unwrap();
    assert_eq!(found["answers"].as_u64().unwrap(), 9 * 4 * ways.len() as u64);
    let drafters: std::collections::BTreeSet<_> = ways.iter().map(|way| way["drafter"].as_str().unwrap()).collect();
    assert_eq!(drafters, ["eagle", "eagle + suffix", "eagle3", "eagle3 + suffix", "none", "suffix"].into());
    assert!(ways.iter().any(|way| way["accept_length"].as_f64().unwrap() > 1.0));
    let drafts = |way: &&serde_json::Value| way["drafter"] != "none" && way["controller"] != "bandit";
    assert!(ways.iter().filter(drafts).all(|way| way["drafted"].as_u64().unwrap() > 0), "{ways:?}");
    // What does not draft shows nothing.
    let few = [&small[..6], &["--learn-s", "0"]].concat();
    assert!(refusal(&[&["bench", "lossless", text(&file)], &few[..]].concat()).contains("cannot draft yet"));
    let none = workflow(folder.path(), |w| {
        w.replace("devices:", "speculation: (drafters: [Suffix(match_min: 24)]), devices:")
    });
    let message = refusal(&[&["bench", "lossless", text(&none)], &small[..]].concat());
    assert!(message.contains("nothing was drafted by suffix (fixed: suffix 8), suffix (table)"), "{message}");
}

#[test]
fn strategies_are_recorded_once_there_is_a_drafter() {
    let folder = tempfile::tempdir().unwrap();
    let file = workflow(folder.path(), |w| w);
    let small = ["--requests", "8", "--tokens", "24", "--ages", "2", "--rollouts", "2", "--learn-s", "1"];
    let found = json(&[&["bench", "controller", text(&file), "--learn-from", "8", "--json"], &small[..]].concat());
    assert_eq!(found["differences"], 0);
    assert!(found["adaptive_s"].as_f64().unwrap() > 0.0);
    let refused = refusal(&[&["bench", "controller", text(&file), "--learn-from", "0"], &small[..]].concat());
    assert!(refused.contains("cannot draft yet"), "{refused}");
}
