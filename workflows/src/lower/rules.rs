//! Rules between parts of a plan.

use std::path::{Component, Path, PathBuf};

use state::plan::{Model, Plan, Step};
use state::run::{CHECKPOINTS, JOURNAL};

use super::check::Check;
use crate::spec;

/// Checks that the parts of a plan agree.
pub(super) fn check(check: &mut Check<'_>, plan: &Plan, given: &[spec::Step]) {
    for (index, (step, given)) in plan.steps.iter().zip(given).enumerate() {
        let path = format!("steps[{index}]");
        if let spec::Step::Sft(spec::Sft { evaluate: Some(during), .. })
        | spec::Step::Grpo(spec::Grpo { evaluate: Some(during), .. }) = given
        {
            heldout(check, &format!("{path}.evaluate"), during.problems, plan);
        }
        match step {
            Step::Evaluate(evaluate) => heldout(check, &path, evaluate.problems, plan),
            Step::Grpo(_) => comparable(check, &path, plan),
            Step::Export(export) => {
                taken(check, &path, &export.to);
                overwritten(check, &path, index, plan);
            }
            Step::Sft(_) => {}
        }
    }
    chat(check, plan);
}

fn heldout(check: &mut Check<'_>, path: &str, problems: usize, plan: &Plan) {
    let heldout = plan.data.heldout;
    if heldout == 0 {
        let help = format!("add `heldout: {}` to `data`", problems.max(1));
        let message = "`Evaluate` needs held-out problems, and `data.heldout` is 0";
        check.wrong("workflow::heldout", path, message, help);
    } else if problems > heldout {
        let message = format!("`problems` {problems} is more than `data.heldout` {heldout}");
        let help = format!("write `problems: {heldout}`, or `heldout: {problems}` in `data`");
        check.wrong("workflow::heldout", &format!("{path}.problems"), message, help);
    }
}

/// Groups need answers that differ and rewards that tell them apart.
fn comparable(check: &mut Check<'_>, path: &str, plan: &Plan) {
    if plan.rewards.is_empty() {
        let help = "add a reward, for instance `Exact(marker: \"#\")`, or remove `rewards` for the usual one";
        check.wrong(
            "workflow::no_rewards",
            "rewards",
            format!("`{path}` is a `Grpo` step, and there are no rewards"),
            help,
        );
    }
    if plan.sampling.temperature == 0.0 {
        let message = format!("with temperature 0 all answers of a group are the same, and `{path}` learns nothing");
        check.wrong(
            "workflow::greedy",
            "sampling.temperature",
            message,
            "write `temperature: 1.0`; `Evaluate` is greedy unless it says otherwise",
        );
    }
}

/// An export that would take the place of what the run needs.
fn taken(check: &mut Check<'_>, path: &str, to: &Path) {
    let mut wrong = |message: String| {
        let help = "name another folder, for instance `to: \"model\"`";
        check.wrong("workflow::taken", &format!("{path}.to"), message, help);
    };
    match direct(to).components().next() {
        None if !to.as_os_str().is_empty() => wrong("that is the run's own folder".into()),
        Some(Component::Normal(first)) if first == CHECKPOINTS || first == JOURNAL => {
            wrong(format!("the run keeps its own `{}` there", first.display()));
        }
        _ => {}
    }
}

/// A path without detours.
fn direct(path: &Path) -> PathBuf {
    let mut direct = PathBuf::new();
    for part in path.components() {
        let is_below = matches!(direct.components().next_back(), Some(Component::Normal(_)));
        match part {
            Component::CurDir => {}
            Component::ParentDir if is_below => drop(direct.pop()),
            part => direct.push(part),
        }
    }
    direct
}

fn overwritten(check: &mut Check<'_>, path: &str, index: usize, plan: &Plan) {
    let folder = |step: &Step| match step {
        Step::Export(export) => Some(direct(&export.to)),
        _ => None,
    };
    let mine = plan.steps.get(index).and_then(folder);
    if let Some(first) = plan.steps[..index].iter().position(|step| folder(step) == mine) {
        let message = format!("`steps[{first}]` exports to the same folder");
        check.wrong("workflow::duplicate", &format!("{path}.to"), message, "give each export a folder of its own");
    }
}

fn chat(check: &mut Check<'_>, plan: &Plan) {
    if plan.data.chat && matches!(plan.model, Model::Tiny { .. }) {
        let help = "write `chat: false`";
        check.wrong("workflow::chat", "data.chat", "a `Tiny` model has no chat template", help);
    }
}
