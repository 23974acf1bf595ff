//! Runs from Rust: rewards of the program's own, and what it is told of answers.

use std::path::Path;
use std::sync::{Arc, Mutex};

use taper::state::algorithm::Outcome;
use taper::state::reward::Answer;
use taper::{Error, Options, OwnReward, Plan, Progress, ScoredGroup, run};

use super::{WORKFLOW, completed, taper, text, workflow};

fn plan() -> Plan {
    taper::parse(&WORKFLOW.replace("\\#", "#"), Path::new(".")).unwrap()
}

fn reward(name: &str, score: impl Fn(&Answer<'_>) -> Outcome + Send + Sync + 'static) -> Option<OwnReward> {
    Some(OwnReward { name: name.into(), score: Arc::new(score) })
}

/// Runs the plan, and returns all groups that were scored.
fn scored(plan: &Plan, options: Options) -> taper::Result<Vec<ScoredGroup>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let groups = Arc::new(Mutex::new(Vec::new()));
    let told = groups.clone();
    let observer = move |progress| {
        if let Progress::Scored(group) = progress {
            told.lock().unwrap().push(*group);
        }
    };
    runtime.block_on(run(plan, options, observer, std::future::pending()))?;
    Ok(std::mem::take(&mut *groups.lock().unwrap()))
}

#[test]
fn a_reward_of_ones_own_decides_what_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let options = |name: &str, reward| Options { dir: folder.path().join(name), reward, ..Options::default() };
    let plan = Plan { rewards: Vec::new(), ..plan() };
    let short = |answer: &Answer<'_>| {
        assert!(answer.question.ends_with('?') && !answer.reference.is_empty());
        Outcome::Scored(-(answer.tokens as f32))
    };
    let groups = scored(&plan, options("short", reward("short", short))).unwrap();
    assert_eq!(groups.len(), 10 * 6 + 2 * 10, "each group once");
    for answer in groups.iter().flat_map(|group| &group.answers) {
        assert_eq!(answer.outcome, Outcome::Scored(-(answer.tokens as f32)));
    }
    let weights = |name: &str| taper::inspect(&folder.path().join(name)).unwrap().weights_blake3;
    let long = |answer: &Answer<'_>| Outcome::Scored(answer.tokens as f32);
    scored(&plan, options("long", reward("long", long))).unwrap();
    assert_ne!(weights("short"), weights("long"));
    // It goes on with the same one only, and begins with nothing where nothing can be scored.
    let other = scored(&plan, options("short", reward("long", long)));
    assert!(matches!(other, Err(Error::OtherRun { parts, .. }) if parts.contains("reward")));
    let panics = |_: &Answer<'_>| panic!("meant to panic");
    let groups = scored(&plan, options("none", reward("none", panics))).unwrap();
    assert!(groups.iter().flat_map(|group| &group.answers).all(|answer| answer.outcome.failure().is_some()));
}

#[test]
fn a_plan_that_nothing_can_be_done_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut Plan), field: &str| {
        let mut plan = plan();
        change(&mut plan);
        let dir = folder.path().join("run");
        let error = scored(&plan, Options { dir: dir.clone(), ..Options::default() }).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
        assert!(!dir.exists());
    };
    refused(&|plan| plan.devices.threads = 0, "devices.threads");
    refused(&|plan| plan.checkpoint.every = 0, "checkpoint.every");
    refused(&|plan| plan.data.heldout = 3, "steps[1].problems");
    refused(&|plan| plan.supervision.silent_s = f64::INFINITY, "supervision.silent_s");
    refused(&|plan| plan.sampling.tokens_max = 0, "sampling.tokens_max");
}

#[test]
fn answers_are_written_as_lines() {
    let folder = tempfile::tempdir().unwrap();
    let (file, lines) = (workflow(folder.path(), |w| w), folder.path().join("answers.jsonl"));
    let dir = folder.path().join("run");
    completed(&["run", text(&file), "--out", text(&dir), "--answers", text(&lines)]);
    let all = std::fs::read_to_string(&lines).unwrap();
    let all: Vec<serde_json::Value> = all.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(all.len(), 10 * 6 * 4 + 2 * 10);
    let place = |line: &serde_json::Value| ["stage", "step", "group", "sample"].map(|key| line[key].as_u64().unwrap());
    assert!(all.is_sorted_by_key(place));
    let history = super::report(&dir).history;
    for step in history.iter().filter(|m| m.kind == "grpo") {
        let of_step = |line: &&serde_json::Value| place(line)[..2] == [step.stage as u64, step.step as u64];
        let scores: Vec<f64> = all.iter().filter(of_step).map(|line| line["score"].as_f64().unwrap()).collect();
        assert!((scores.iter().sum::<f64>() / scores.len() as f64 - step.reward).abs() < 1e-6);
        let learned = history.iter().filter(|m| m.learns() && (m.stage, m.step) < (step.stage, step.step)).count();
        assert!(all.iter().filter(of_step).all(|line| line["policy_version"] == learned));
        assert!(all.iter().filter(of_step).all(|line| line["drafter_version"].is_u64()));
        assert!(step.entropy > 0.0 && step.lr > 0.0 && step.grad_norm > 0.0 && step.kl.is_some());
    }
    // A file that cannot be written is told before anything is done.
    let output =
        taper(&["run", text(&file), "--out", text(&folder.path().join("other")), "--answers", text(folder.path())]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!folder.path().join("other").exists());
}
