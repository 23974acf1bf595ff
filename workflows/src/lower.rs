//! The file format → a plan, or everything that makes no sense in it.

mod check;
mod data;
mod fit;
mod model;
mod rewards;
mod rules;
mod speculation;
mod steps;

use std::path::Path;

use state::plan::{Checkpoint, Devices, Plan, Sampling, Supervision};
use state::supervise::BACKOFF_MS_MAX;

use crate::problem::Problem;
use crate::spec::{self, Workflow};
use crate::tree::Tree;
use check::Check;

/// Lowers a file. Relative paths are taken from `folder`.
pub(crate) fn lower(workflow: &Workflow, text: &str, tree: &Tree, folder: &Path) -> Result<Plan, Vec<Problem>> {
    let mut check = Check::new(text, tree);
    name(&mut check, &workflow.name);
    let plan = Plan {
        name: workflow.name.clone(),
        seed: workflow.seed,
        model: model::lower(&mut check, &workflow.model, folder),
        compute: workflow.compute,
        data: data::lower(&mut check, &workflow.data, folder),
        steps: steps::lower(&mut check, &workflow.steps),
        sampling: sampling(&mut check, &workflow.sampling),
        rewards: rewards::lower(&mut check, workflow.rewards.as_deref(), &workflow.data),
        devices: devices(&mut check, &workflow.devices),
        speculation: speculation::lower(&mut check, &workflow.speculation, folder),
        supervision: supervision(&mut check, &workflow.supervision),
        checkpoint: checkpoint(&mut check, &workflow.checkpoint),
    };
    rules::check(&mut check, &plan, &workflow.steps);
    fit::check(&mut check, &plan);
    let plan = check.finish(plan)?;
    Ok(Plan { steps: steps::divided(plan.steps, &workflow.steps), ..plan })
}

/// A run's name is the name of its folder.
fn name(check: &mut Check<'_>, name: &str) {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    if !name.is_empty() && name.len() <= 64 && name.chars().all(is_plain) {
        return;
    }
    let lower = name.to_lowercase();
    let words: Vec<&str> = lower.split(|c| !is_plain(c)).filter(|word| !word.is_empty()).collect();
    let plain: String = words.join("-").chars().take(64).collect();
    let proposal = if plain.is_empty() { "my-run" } else { &plain };
    let message = "a name has 1 to 64 characters of `a` to `z`, `0` to `9`, `-` and `_`";
    check.wrong("workflow::name", "name", message, format!("write `name: \"{proposal}\"`"));
}

fn sampling(check: &mut Check<'_>, sampling: &spec::Sampling) -> Sampling {
    let spec::Sampling { temperature, top_p, tokens_max, ref stop } = *sampling;
    let is_share = top_p > 0.0 && top_p <= 1.0;
    check.range("sampling.top_p", top_p, is_share, "above 0 and up to 1", "write `top_p: 1.0` to draw from all tokens");
    check.at_least_zero("sampling.temperature", temperature.into());
    check.count("sampling.tokens_max", tokens_max, 1, 1 << 20);
    if stop.iter().any(String::is_empty) {
        let message = "an empty text would end every answer at once";
        check.wrong(
            "workflow::out_of_range",
            "sampling.stop",
            message,
            "write texts such as `stop: [\"\\n\\n\"]`, or leave `stop` out",
        );
    }
    Sampling { temperature, top_p, tokens_max, stop: stop.clone() }
}

fn devices(check: &mut Check<'_>, devices: &spec::Devices) -> Devices {
    let spec::Devices { cpu, threads, slots_max, cache_tokens_max } = *devices;
    check.count("devices.cpu", cpu, 0, 4096);
    check.count("devices.threads", threads, 1, 1024);
    check.count("devices.slots_max", slots_max, 1, 65_536);
    check.count("devices.cache_tokens_max", cache_tokens_max, 0, 1 << 40);
    Devices { cpu, threads, slots_max, cache_tokens_max }
}

fn supervision(check: &mut Check<'_>, supervision: &spec::Supervision) -> Supervision {
    let spec::Supervision { restarts_max, period_s, backoff_ms, silent_s } = *supervision;
    check.count("supervision.restarts_max", restarts_max, 0, 1_000_000);
    if check.positive("supervision.period_s", period_s) {
        let is_good = period_s <= 1e9;
        check.range("supervision.period_s", period_s, is_good, "at most 1000000000 seconds", "write `period_s: 60.0`");
    }
    let is_good = backoff_ms <= BACKOFF_MS_MAX;
    let wanted = "at most a minute, 60000";
    check.range("supervision.backoff_ms", backoff_ms, is_good, wanted, "write `backoff_ms: 100`");
    // One kernel has to end within it, on the slowest machine.
    let is_good = silent_s == 0.0 || (60.0..=1e6).contains(&silent_s);
    let wanted = "0, which is no limit, or 60 to 1000000 seconds";
    check.range("supervision.silent_s", silent_s, is_good, wanted, "write `silent_s: 300.0`");
    Supervision { restarts_max, period_s, backoff_ms, silent_s }
}

fn checkpoint(check: &mut Check<'_>, checkpoint: &spec::Checkpoint) -> Checkpoint {
    let spec::Checkpoint { every, keep } = *checkpoint;
    check.count("checkpoint.every", every, 1, 1_000_000_000);
    check.count("checkpoint.keep", keep, 1, 1_000_000);
    Checkpoint { every, keep }
}
