//! Steps: sizes that divide, optimisers that move.

use state::plan::{Evaluate, Export, Grpo, Optimizer, Part, Sft, Step};

use super::check::Check;
use crate::nearest::{divisor, divisor_at_most};
use crate::spec;

/// Steps of a workflow, at most.
const STEPS_MAX: usize = 1000;
/// Optimiser steps of one step, at most.
const OPTIMIZER_STEPS_MAX: usize = 1_000_000_000;
/// Micro-batch where the file names none, at most.
const MICRO_BATCH: usize = 8;

pub(super) fn lower(check: &mut Check<'_>, steps: &[spec::Step]) -> Vec<Step> {
    if steps.is_empty() {
        let help = "add a step, for instance `Evaluate(problems: 100)`";
        check.wrong("workflow::no_steps", "steps", "there are no steps: nothing would be done", help);
    }
    check.range("steps", steps.len(), steps.len() <= STEPS_MAX, "at most 1000 steps", "use fewer, longer steps");
    steps.iter().enumerate().map(|(index, step)| one(check, &format!("steps[{index}]"), step)).collect()
}

fn one(check: &mut Check<'_>, path: &str, step: &spec::Step) -> Step {
    match step {
        spec::Step::Sft(sft) => Step::Sft(lower_sft(check, path, sft)),
        spec::Step::Grpo(grpo) => Step::Grpo(lower_grpo(check, path, grpo)),
        spec::Step::Evaluate(evaluate) => {
            check.count(&format!("{path}.problems"), evaluate.problems, 1, 1_000_000_000);
            let spec::Evaluate { problems, temperature } = *evaluate;
            check.at_least_zero(&format!("{path}.temperature"), temperature.into());
            Step::Evaluate(Evaluate { problems, temperature })
        }
        spec::Step::Export(export) => {
            check.path(&format!("{path}.to"), &export.to);
            Step::Export(Export { to: export.to.clone(), precision: export.precision })
        }
    }
}

fn lower_sft(check: &mut Check<'_>, path: &str, sft: &spec::Sft) -> Sft {
    let spec::Sft { steps, batch, .. } = *sft;
    check.count(&format!("{path}.steps"), steps, 1, OPTIMIZER_STEPS_MAX);
    let is_counted = check.count(&format!("{path}.batch"), batch, 1, 1 << 20);
    let total = is_counted.then_some(batch);
    let micro_batch = micro_batch(check, path, sft.micro_batch, total, "`batch`");
    optimizer(check, path, &sft.optimizer, steps);
    meanwhile(check, path, steps, sft.evaluate.as_ref());
    Sft { steps, batch, micro_batch, optimizer: sft.optimizer.clone(), part: Part::whole(steps) }
}

fn lower_grpo(check: &mut Check<'_>, path: &str, grpo: &spec::Grpo) -> Grpo {
    let spec::Grpo { steps, prompts, group, clip, kl, normalize, .. } = *grpo;
    check.count(&format!("{path}.steps"), steps, 1, OPTIMIZER_STEPS_MAX);
    let is_counted = check.count(&format!("{path}.prompts"), prompts, 1, 1 << 20);
    let total = (groups(check, path, group) && is_counted).then(|| prompts.saturating_mul(group));
    let micro_batch = micro_batch(check, path, grpo.micro_batch, total, "`prompts` * `group`");
    check_clip(check, path, clip);
    check.at_least_zero(&format!("{path}.kl"), kl.into());
    optimizer(check, path, &grpo.optimizer, steps);
    meanwhile(check, path, steps, grpo.evaluate.as_ref());
    let (optimizer, part) = (grpo.optimizer.clone(), Part::whole(steps));
    Grpo { steps, prompts, group, micro_batch, clip, kl, normalize, optimizer, part }
}

fn meanwhile(check: &mut Check<'_>, path: &str, steps: usize, evaluate: Option<&spec::Meanwhile>) {
    let Some(spec::Meanwhile { every, problems, temperature }) = evaluate else { return };
    let at = format!("{path}.evaluate.every");
    if check.count(&at, *every, 1, OPTIMIZER_STEPS_MAX) {
        let help = format!("write `every: {}`", steps.div_ceil(STEPS_MAX));
        let few = steps.div_ceil(*every) <= STEPS_MAX;
        check.range(&at, *every, few, "large enough for at most 1000 evaluations", &help);
    }
    check.count(&format!("{path}.evaluate.problems"), *problems, 1, 1_000_000_000);
    check.at_least_zero(&format!("{path}.evaluate.temperature"), (*temperature).into());
}

/// Steps with the evaluations during them: a training becomes parts, with one between each two. That after the last part is a step
/// of its own, or not wanted.
pub(super) fn divided(steps: Vec<Step>, given: &[spec::Step]) -> Vec<Step> {
    steps.into_iter().zip(given).flat_map(|(step, given)| parts(step, given)).collect()
}

fn parts(step: Step, given: &spec::Step) -> Vec<Step> {
    let during = match given {
        spec::Step::Sft(sft) => sft.evaluate.as_ref(),
        spec::Step::Grpo(grpo) => grpo.evaluate.as_ref(),
        spec::Step::Evaluate(_) | spec::Step::Export(_) => None,
    };
    let (Some(part), Some(during)) = (step.part(), during) else { return vec![step] };
    let (problems, temperature) = (during.problems, during.temperature);
    let mut steps = Vec::new();
    for begun in (0..part.of).step_by(during.every) {
        if begun > 0 {
            steps.push(Step::Evaluate(Evaluate { problems, temperature }));
        }
        let (count, part) = (during.every.min(part.of - begun), Part { begun, ..part });
        steps.push(match step.clone() {
            Step::Sft(sft) => Step::Sft(Sft { steps: count, part, ..sft }),
            Step::Grpo(grpo) => Step::Grpo(Grpo { steps: count, part, ..grpo }),
            other => other,
        });
    }
    steps
}

fn groups(check: &mut Check<'_>, path: &str, group: usize) -> bool {
    let at = format!("{path}.group");
    if group == 1 {
        let message = "a group of 1: GRPO compares the answers of a group with each other";
        check.wrong("workflow::out_of_range", &at, message, "write `group: 2` or more, for instance 8");
        return false;
    }
    check.count(&at, group, 2, 4096)
}

/// The micro-batch; `total` is what it must divide, absent if that is wrong itself.
fn micro_batch(check: &mut Check<'_>, path: &str, given: Option<usize>, total: Option<usize>, what: &str) -> usize {
    let (Some(total), Some(wanted)) = (total, given) else {
        return given.or(total.map(|total| divisor_at_most(total, MICRO_BATCH))).unwrap_or(1);
    };
    let at = format!("{path}.micro_batch");
    if check.count(&at, wanted, 1, 1 << 20) && !total.is_multiple_of(wanted) {
        let message = format!("`micro_batch` {wanted} does not divide {what}, {total}");
        let help = format!("write `micro_batch: {}`", divisor(total, wanted));
        check.wrong("workflow::not_divisible", &at, message, help);
    }
    wanted
}

fn check_clip(check: &mut Check<'_>, path: &str, clip: (f32, f32)) {
    let help = "write `clip: (0.2, 0.2)`";
    let low = clip.0 > 0.0 && clip.0 <= 1.0;
    check.range(&format!("{path}.clip.0"), clip.0, low, "above 0 and at most 1 on its lower side", help);
    let high = clip.1 > 0.0 && clip.1.is_finite();
    check.range(&format!("{path}.clip.1"), clip.1, high, "a number above 0 on its upper side", help);
}

fn optimizer(check: &mut Check<'_>, step: &str, optimizer: &Optimizer, steps: usize) {
    let at = |field: &str| format!("{step}.optimizer.{field}");
    check.learning_rate(&at("lr"), optimizer.lr);
    check.positive(&at("clip_norm"), optimizer.clip_norm);
    check.at_least_zero(&at("weight_decay"), optimizer.weight_decay);
    for (side, beta) in [("betas.0", optimizer.betas.0), ("betas.1", optimizer.betas.1)] {
        let is_good = (0.0..1.0).contains(&beta);
        check.range(&at(side), beta, is_good, "from 0 up to, but not including, 1", "write `betas: (0.9, 0.95)`");
    }
    if optimizer.warmup > steps && steps > 0 {
        let message = format!("`warmup` {} is longer than the {steps} steps here", optimizer.warmup);
        let help = format!("write `warmup: {}`", (steps / 10).max(1));
        check.wrong("workflow::order", &at("warmup"), message, help);
    }
}
