//! What no run can be made of. `workflows` says it with places and proposals; a plan that was put together in Rust, or read from
//! elsewhere, is looked at once more before anything is done with it.

use std::fmt::Display;

use super::{Controller, Grpo, Plan, Sft, Step};

/// A value of a plan that nothing can be done with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} of the plan is {value}; it is to be {wanted}")]
pub struct OutOfRange {
    /// Where it stands.
    pub field: String,
    /// What it is.
    pub value: String,
    /// What it may be.
    pub wanted: &'static str,
}

type Result = std::result::Result<(), OutOfRange>;

impl Plan {
    /// # Errors
    /// With the first value that would stop a run, or never end it.
    pub fn check(&self) -> Result {
        let Self { devices, sampling, supervision, checkpoint, .. } = self;
        some("devices.threads", devices.threads)?;
        some("devices.slots_max", devices.slots_max)?;
        some("sampling.tokens_max", sampling.tokens_max)?;
        let heat = sampling.temperature;
        check("sampling.temperature", heat, heat >= 0.0 && heat.is_finite(), "a number from 0 on")?;
        let top_p = sampling.top_p;
        check("sampling.top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        for (field, seconds) in
            [("supervision.silent_s", supervision.silent_s), ("supervision.period_s", supervision.period_s)]
        {
            check(field, seconds, (0.0..=1e9).contains(&seconds), "seconds from 0 to a billion")?;
        }
        some("checkpoint.every", checkpoint.every)?;
        self.steps.iter().enumerate().try_for_each(|(i, step)| self.check_step(&format!("steps[{i}]"), step))?;
        self.check_speculation()
    }

    fn check_step(&self, at: &str, step: &Step) -> Result {
        let counts = match step {
            Step::Sft(sft) => vec![("steps", sft.steps), ("batch", sft.batch), ("micro_batch", sft.micro_batch)],
            Step::Grpo(grpo) => vec![
                ("steps", grpo.steps),
                ("prompts", grpo.prompts),
                ("group", grpo.group),
                ("micro_batch", grpo.micro_batch),
            ],
            Step::Evaluate(evaluate) => {
                let fits = evaluate.problems <= self.data.heldout;
                check(&format!("{at}.problems"), evaluate.problems, fits, "at most `data.heldout`")?;
                vec![("problems", evaluate.problems)]
            }
            Step::Export(_) => Vec::new(),
        };
        counts.into_iter().try_for_each(|(name, count)| some(&format!("{at}.{name}"), count))?;
        let (Step::Sft(Sft { steps, part, optimizer, .. }) | Step::Grpo(Grpo { steps, part, optimizer, .. })) = step
        else {
            return Ok(());
        };
        let fits = part.begun.checked_add(*steps).is_some_and(|end| end <= part.of);
        check(&format!("{at}.part.of"), part.of, fits, "the steps before the part and its own, at least")?;
        let warms = optimizer.warmup <= part.of;
        check(&format!("{at}.optimizer.warmup"), optimizer.warmup, warms, "at most the steps of the training")
    }

    fn check_speculation(&self) -> Result {
        let speculation = &self.speculation;
        if let Some(training) = &speculation.training {
            some("speculation.training.tokens_max", training.tokens_max)?;
            some("speculation.training.publish_every", training.publish_every)?;
        }
        let strategies = match &speculation.controller {
            Controller::Off => Vec::new(),
            Controller::Fixed(strategy) => vec![*strategy],
            Controller::Table(rows) => rows.iter().filter_map(|row| row.strategy).collect(),
            Controller::Bandit { strategies, .. } => strategies.clone(),
        };
        strategies.iter().try_for_each(|strategy| {
            let is_there = strategy.drafter < speculation.drafters.len();
            check("drafter of a strategy", strategy.drafter, is_there, "the place of one in `speculation.drafters`")
        })
    }
}

fn some(field: &str, count: usize) -> Result {
    check(field, count, count > 0, "1 or more")
}

fn check(field: &str, value: impl Display, is_good: bool, wanted: &'static str) -> Result {
    if is_good { Ok(()) } else { Err(OutOfRange { field: field.into(), value: value.to_string(), wanted }) }
}
