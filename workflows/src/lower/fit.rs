//! Whether prompts, answers and solutions fit into the positions of a tiny model.

use state::plan::{Data, Model, Plan, Source, Step};

use super::check::Check;
use super::data::QUESTION;

/// Checks the longest sequences of a plan. Other models say only when they are loaded how long these may be.
pub(super) fn check(check: &mut Check<'_>, plan: &Plan) {
    let Model::Tiny { shape, .. } = &plan.model else { return };
    let (positions, answer) = (shape.positions_max, plan.sampling.tokens_max);
    let prompt = prompt_max(&plan.data);
    let needed = prompt.saturating_add(answer);
    if needed > positions {
        let message = format!(
            "prompts of {prompt} tokens and answers of {answer} need {needed} positions, `positions_max` is {positions}"
        );
        let room = positions.saturating_sub(prompt);
        let help = if room > 0 {
            format!("write `tokens_max: {room}`, or `positions_max: {needed}`")
        } else {
            format!("write `positions_max: {needed}`")
        };
        let path = if check.is_given("sampling.tokens_max") { "sampling.tokens_max" } else { "model.positions_max" };
        check.wrong("workflow::too_long", path, message, help);
    }
    if plan.steps.iter().any(|step| matches!(step, Step::Sft(_))) {
        solutions(check, plan, prompt, positions);
    }
}

fn solutions(check: &mut Check<'_>, plan: &Plan, prompt: usize, positions: usize) {
    let Source::Chains(chains) = &plan.data.source else { return };
    // The end is a token too.
    let needed = prompt.saturating_add(chains.solution_max).saturating_add(1);
    if needed > positions {
        let terms = chains.terms_max;
        let message = format!(
            "a solution of {terms} terms needs {needed} positions with its prompt, `positions_max` is {positions}"
        );
        let smaller = if chains.check > 0.0 { "`terms_max` or `solution_max`" } else { "`terms_max`" };
        let help = format!("write `positions_max: {needed}`, or a smaller {smaller} in `data`");
        check.wrong("workflow::too_long", "model.positions_max", message, help);
    }
}

/// Longest prompt in characters, each a token, as far as the plan tells.
fn prompt_max(data: &Data) -> usize {
    let around = data.template.replace(QUESTION, "").chars().count();
    let question = match &data.source {
        Source::Chains(chains) => chains.terms_max.saturating_mul(2),
        Source::Jsonl(..) => 1,
    };
    around.saturating_add(question)
}
