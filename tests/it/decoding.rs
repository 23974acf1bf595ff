//! Texts and measurements from the command line.

use super::{completed, taper, text, workflow};

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
    assert_eq!(found["alone"][0]["how"], "plain");
    assert!(found["alone"].as_array().unwrap().len() > 2, "every strategy: {}", found["alone"]);
    assert!(found["trees"].as_array().unwrap().iter().all(|t| t["coupled"].as_f64().unwrap() >= 1.0));
}
