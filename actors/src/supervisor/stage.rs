//! From step to step: begin it, commit it, go on.

use std::time::Instant;

use models::load::export::{Precision, export};
use models::optim::AdamW;
use state::metrics::StepMetrics;
use state::plan::{self, Export, Part, Plan, Step};
use state::run::{Position, steps_of};
use std::sync::Arc;

use super::{Activity, State, measure};
use crate::error::Result;
use crate::folder::Checkpoint;
use crate::progress::{Ended, Progress};
use crate::recorder::Record;

/// Training problems and optimiser steps that a plan uses before a position.
fn used_before(plan: &Plan, at: Position) -> (u64, u32) {
    let mut used = (0, 0);
    for (stage, step) in plan.steps.iter().enumerate().take(at.stage + 1) {
        let steps = if stage == at.stage { at.step } else { steps_of(step) };
        let problems = match step {
            Step::Sft(sft) => sft.batch,
            Step::Grpo(grpo) => grpo.prompts,
            Step::Evaluate(_) | Step::Export(_) => continue,
        };
        used.0 += (steps * problems) as u64;
        used.1 += u32::try_from(steps).unwrap_or(u32::MAX);
    }
    used
}

impl State {
    /// The next training problem, and the number of the optimiser step in the run.
    pub(super) fn cursor(&self) -> (u64, u32) {
        used_before(&self.job.plan, self.position)
    }

    pub(super) fn begin_step(&mut self) {
        let job = self.job.clone();
        let Some(step) = job.plan.steps.get(self.position.stage) else { return self.complete() };
        let steps = steps_of(step);
        let Position { stage, step: number } = self.position;
        let Part { begun, of } = step.part().unwrap_or(Part::whole(steps));
        let kind = step.kind();
        let policy_version = self.cursor().1;
        let place = StepMetrics { stage, step: number, steps, begun, of, policy_version, ..StepMetrics::default() };
        self.metrics = StepMetrics { kind: kind.into(), ..place };
        let place = (begun + number, of);
        self.observer.tell(Progress::StepBegan { stage: (stage, job.plan.steps.len()), step: place, kind });
        // An observer may make the step wait; its time begins when it does.
        self.began = Instant::now();
        if begun + number == 0 && step.changes_weights() {
            // Each training has an optimiser of its own.
            self.adam = Arc::new(AdamW::new(&self.weights));
        }
        let result = match step {
            Step::Sft(sft) => self.begin_sft(sft),
            Step::Grpo(grpo) => self.begin_grpo(grpo),
            Step::Evaluate(evaluate) => self.begin_evaluate(evaluate),
            Step::Export(to) => tokio::task::block_in_place(|| self.export(to)),
        };
        if let Err(error) = result {
            self.give_up(error);
        }
    }

    fn export(&mut self, to: &Export) -> Result<()> {
        let job = &self.job;
        let raw = self.weights.to_raw();
        let folder = self.folder.join(&to.to);
        let precision = match to.precision {
            plan::Precision::F32 => Precision::F32,
            plan::Precision::F16 => Precision::F16,
        };
        export(&folder, &job.config, &raw, precision, &job.tokenizer, job.chat_source.as_deref())?;
        self.commit();
        Ok(())
    }

    /// Makes the step durable; a checkpoint with it where the plan says so, and at the end of a stage.
    pub(super) fn commit(&mut self) {
        let plan = &self.job.plan;
        let Position { stage, step } = self.position;
        let changes_weights = plan.steps.get(stage).is_some_and(Step::changes_weights);
        let StepMetrics { begun, steps, .. } = self.metrics;
        let is_due = (begun + step + 1).is_multiple_of(plan.checkpoint.every) || step + 1 == steps;
        let name = format!("{stage:03}-{:06}", step + 1);
        if changes_weights {
            self.unsaved = (!is_due).then(|| name.clone());
        }
        let checkpoint = (changes_weights && is_due).then(|| (name, self.checkpoint()));
        tracing::info!(stage, step, kind = self.metrics.kind, "a step is done");
        // What the run waits for this record is part of the next step.
        self.metrics.checkpoint_s = self.waited_s;
        self.metrics.wall_s = self.began.elapsed().as_secs_f64() + self.waited_s;
        let wall_s = self.metrics.wall_s;
        self.metrics.timeline.iter_mut().for_each(|spans| measure::thin(spans, wall_s));
        let (metrics, weights) = (Box::new(self.metrics.clone()), self.weights.clone());
        self.untold = Some(metrics.clone());
        self.record(Record::Step { metrics, weights, checkpoint });
        self.waiting_from = Instant::now();
        self.activity = Activity::Recording { then: None };
        self.go_on();
    }

    /// All that the run would go on from after its last step.
    pub(super) fn checkpoint(&self) -> Box<Checkpoint> {
        let (weights, adam) = (self.weights.clone(), self.adam.clone());
        // A device that hangs may have the learner.
        let experience = tokio::task::block_in_place(|| self.speculator.experience());
        Box::new(Checkpoint { weights, adam, experience })
    }

    fn complete(&mut self) {
        self.record(Record::End { weights: self.weights.clone() });
        self.activity = Activity::Recording { then: Some(Ok(Ended::Complete)) };
    }

    pub(super) fn record(&mut self, record: Record) {
        let _ = self.recorder.cast(record);
        self.unrecorded += 1;
    }

    pub(super) fn committed(&mut self) {
        self.unrecorded -= 1;
        self.go_on();
    }

    /// A step is told of once, also if the run ends while it is recorded.
    fn tell_of_step(&mut self) {
        self.untold.take().into_iter().for_each(|metrics| self.observer.tell(Progress::StepDone(metrics)));
    }

    /// Ends what waits for records, if they are durable as far as it needs.
    pub(super) fn go_on(&mut self) {
        let Activity::Recording { then } = &mut self.activity else { return };
        match then.take_if(|_| self.unrecorded == 0) {
            Some(ended) => {
                self.tell_of_step();
                self.end(ended);
            }
            None if then.is_some() => {}
            None if self.unrecorded <= self.unrecorded_max => {
                self.waited_s = self.waiting_from.elapsed().as_secs_f64();
                self.tell_of_step();
                self.position = self.position.after(&self.job.plan);
                self.begin_step();
            }
            _ => {}
        }
    }
}
