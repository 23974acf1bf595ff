//! The data: terms in order, a template with a place for the question.

use std::path::Path;

use state::plan::{Chains, Data, Fields, Source};

use super::check::Check;
use super::model::resolved;
use crate::nearest::nearest;
use crate::spec;

/// Stands for the question in a template.
pub(super) const QUESTION: &str = "{question}";

pub(super) fn lower(check: &mut Check<'_>, data: &spec::Data, folder: &Path) -> Data {
    check.count("data.heldout", data.heldout(), 0, 1_000_000_000);
    let (source, template, chat) = match data {
        spec::Data::Chains(chains) => (Source::Chains(lower_chains(check, chains)), &chains.template, chains.chat),
        spec::Data::Jsonl(jsonl) => {
            let path = resolved(check, "data.path", &jsonl.path, folder);
            (Source::Jsonl(path, fields(check, jsonl)), &jsonl.template, jsonl.chat)
        }
    };
    check_template(check, template);
    Data { source, template: template.clone(), chat, heldout: data.heldout() }
}

/// Names of a file's fields, if any of them is given.
fn fields(check: &mut Check<'_>, spec: &spec::Jsonl) -> Option<Fields> {
    let given = [("question", &spec.question), ("answer", &spec.answer), ("solution", &spec.solution)];
    for (field, name) in given {
        if name.as_ref().is_some_and(|name| name.trim().is_empty()) {
            let help = format!("write the name that the file has for it, such as `{field}: \"{field}\"`");
            check.wrong("workflow::empty", &format!("data.{field}"), "the name of a field is empty", help);
        }
    }
    let name = |(field, name): (&str, &Option<String>)| name.clone().unwrap_or_else(|| field.to_owned());
    let [question, answer, _] = given.map(name);
    let solution = spec.solution.clone();
    given.iter().any(|(_, name)| name.is_some()).then_some(Fields { question, answer, solution })
}

/// Fills in what the file leaves open so that it agrees with what it says.
fn lower_chains(check: &mut Check<'_>, spec: &spec::Chains) -> Chains {
    let terms_min = spec.terms_min;
    let terms_max = spec.terms_max.unwrap_or(terms_min.max(40));
    let tail_min = spec.tail_min.unwrap_or(terms_min.max(20).min(terms_max));
    let terms_mean = spec.terms_mean.unwrap_or((terms_min.max(5) as f64).min(terms_max as f64));
    // `3+5=8;` for every term but the first, the last one without `;`, then `#6`.
    let attempt = terms_max.saturating_sub(1).saturating_mul(6).saturating_add(1);
    let check_steps = spec.check_steps.unwrap_or(usize::MAX).min(terms_max.saturating_sub(1).max(1));
    // With `?` before it.
    let one_check = check_steps.saturating_mul(6).saturating_add(2);
    let checks = if spec.check > 0.0 { spec.checks_max } else { 0 };
    let chains = Chains {
        terms_min,
        terms_mean,
        terms_max,
        tail: spec.tail,
        tail_min,
        check: spec.check,
        checks_max: spec.checks_max,
        check_steps,
        solution_max: spec
            .solution_max
            .unwrap_or(usize::MAX)
            .min(one_check.saturating_mul(checks).saturating_add(attempt)),
    };
    check.probability("data.tail", chains.tail);
    check.probability("data.check", chains.check);
    check.count("data.checks_max", chains.checks_max, 1, 1000);
    check.count("data.check_steps", spec.check_steps.unwrap_or(1), 1, 1 << 20);
    if spec.solution_max.is_some_and(|given| given < attempt) {
        let message = format!("a solution of {terms_max} terms has {attempt} characters without any check");
        let help = format!("write `solution_max: {attempt}` or more, or a smaller `terms_max`");
        check.wrong("workflow::order", "data.solution_max", message, help);
    }
    let is_counted = check.count("data.terms_min", terms_min, 2, 1 << 20);
    if check.count("data.terms_max", terms_max, 2, 1 << 20) && is_counted {
        order(check, &chains);
    }
    chains
}

fn order(check: &mut Check<'_>, chains: &Chains) {
    let Chains { terms_min, terms_mean, terms_max, tail, tail_min, .. } = *chains;
    if terms_max < terms_min {
        let message = format!("`terms_max` {terms_max} is below `terms_min` {terms_min}");
        check.wrong("workflow::order", "data.terms_max", message, format!("write `terms_max: {terms_min}` or more"));
        return;
    }
    let between = format!("from `terms_min` {terms_min} to `terms_max` {terms_max}");
    let (low, high) = (terms_min as f64, terms_max as f64);
    let near = if terms_mean.is_nan() { low } else { terms_mean.clamp(low, high) };
    let help = format!("write `terms_mean: {near:.1}`");
    check.range("data.terms_mean", terms_mean, (low..=high).contains(&terms_mean), &between, &help);
    let help = format!("write `tail_min: {}`, or `tail: 0.0` for no long tail", tail_min.clamp(terms_min, terms_max));
    let is_good = tail <= 0.0 || (terms_min..=terms_max).contains(&tail_min);
    check.range("data.tail_min", tail_min, is_good, &between, &help);
}

fn check_template(check: &mut Check<'_>, template: &str) {
    let mut has_question = false;
    for (before, word) in placeholders(template) {
        let whole = format!("{{{word}}}");
        let is_latex = before.is_some_and(|c| c.is_ascii_alphabetic());
        has_question |= whole == QUESTION;
        if whole != QUESTION && !is_latex {
            let near = nearest(word, &["question"]).map(|_| format!("did you mean `{QUESTION}`?"));
            let help = near
                .unwrap_or_else(|| format!("only `{QUESTION}` is replaced; put a space after `{{` to keep the text"));
            let message = format!("a template knows no `{whole}`");
            check.wrong_part("workflow::template", "data.template", &whole, message, help);
            has_question |= nearest(word, &["question"]).is_some();
        }
    }
    if !has_question {
        let message = format!("the template has no `{QUESTION}`: every prompt would be the same");
        let help = format!("write `template: \"{QUESTION}\"`, with your words around it");
        check.wrong("workflow::template", "data.template", message, help);
    }
}

/// Words in braces, each with the character before the brace.
fn placeholders(template: &str) -> Vec<(Option<char>, &str)> {
    let mut found = Vec::new();
    for (at, _) in template.match_indices('{') {
        let rest = &template[at + 1..];
        let Some(end) = rest.find(|c: char| !c.is_alphanumeric() && c != '_') else { continue };
        if end > 0 && rest[end..].starts_with('}') {
            found.push((template[..at].chars().next_back(), &rest[..end]));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::placeholders;

    #[test]
    fn words_in_braces_are_placeholders() {
        let found = placeholders("{question} \\boxed{answer} { x } {} {a{b} {é}{");
        let words: Vec<_> = found.into_iter().collect();
        assert_eq!(words, [(None, "question"), (Some('d'), "answer"), (Some('a'), "b"), (Some(' '), "é")]);
    }
}
