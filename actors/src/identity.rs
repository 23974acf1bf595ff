//! What of a run must be the same in all its sessions: whatever decides what is learned.

use std::path::{Path, PathBuf};

use state::journal::Inputs;
use state::plan::{Model, Plan, Source, Step};
use state::run::RunState;

use crate::error::{Error, Result};
use crate::job;
use crate::rewarder::OwnReward;

/// Fails if the folder holds a run in which something else would be learned.
pub(crate) fn check(state: &RunState, (plan, reward): (&Plan, Option<&OwnReward>), dir: &Path) -> Result<()> {
    let Some(before) = &state.plan else { return Ok(()) };
    if state.plan_sha256 != hash(plan, reward) {
        return Err(Error::OtherRun { dir: dir.into(), parts: differing(before, plan) });
    }
    let (found, supported) = (state.noise_version, kernels::noise::VERSION);
    if found != supported {
        return Err(Error::Noise { dir: dir.into(), found, supported });
    }
    Ok(())
}

/// What a run reads beside its folder has to be what it was when it began.
pub(crate) fn same_inputs(began: &RunState, now: &Inputs, plan: &Plan, dir: &Path) -> Result<()> {
    let then = &began.inputs;
    if began.plan.is_none() || then == now {
        return Ok(());
    }
    let (input, hashes, path) = if then.model_sha256 == now.model_sha256 {
        let path = if let Source::Jsonl(path, _) = &plan.data.source { Some(path) } else { None };
        ("data", [&then.data_sha256, &now.data_sha256], path)
    } else {
        let path = match &plan.model {
            Model::Tiny { weights, .. } => weights.as_ref(),
            Model::HuggingFace(path) | Model::Gguf(path) => Some(path),
        };
        ("model", [&then.model_sha256, &now.model_sha256], path)
    };
    let [expected, found] = hashes.map(Clone::clone);
    Err(Error::OtherInput {
        dir: dir.into(),
        input,
        path: path.cloned().unwrap_or_else(|| "(made by Taper)".into()),
        expected,
        found,
    })
}

/// A plan without the places of files: what they hold is compared instead, and where an export goes changes nothing of it.
fn without_places(plan: &Plan) -> Plan {
    let mut plan = plan.clone();
    match &mut plan.model {
        Model::Tiny { weights, .. } => weights.iter_mut().for_each(PathBuf::clear),
        Model::HuggingFace(path) | Model::Gguf(path) => path.clear(),
    }
    if let Source::Jsonl(path, _) = &mut plan.data.source {
        path.clear();
    }
    for step in &mut plan.steps {
        if let Step::Export(export) = step {
            export.to.clear();
        }
    }
    plan
}

/// Hash of the parts of a plan that decide what is learned, and of the name of a reward beside it.
pub(crate) fn hash(plan: &Plan, reward: Option<&OwnReward>) -> String {
    let plan = without_places(plan);
    let Plan { seed, model, compute, data, steps, sampling, rewards, .. } = &plan;
    let own = reward.map(|reward| &reward.name);
    job::hash(&(seed, model, compute, data, steps, sampling, rewards, own))
}

/// Which of them are not as they were, for people.
fn differing(before: &Plan, now: &Plan) -> String {
    let [before, now] = [before, now].map(without_places);
    let parts = [
        ("`seed`", before.seed == now.seed),
        ("`model`", before.model == now.model),
        ("`compute`", before.compute == now.compute),
        ("`data`", before.data == now.data),
        ("`steps`", before.steps == now.steps),
        ("`sampling`", before.sampling == now.sampling),
        ("`rewards`", before.rewards == now.rewards),
    ];
    let parts: Vec<&str> = parts.into_iter().filter(|(_, is_same)| !is_same).map(|(part, _)| part).collect();
    if parts.is_empty() { "the reward of the program that runs it".into() } else { parts.join(", ") }
}
