//! Ways to decode that take turns every few cycles, because machines are noisy, and are compared answer by answer.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use actors::{Asked, DecodeOptions, Decoded, Solo};
use kernels::NoiseKey;
use models::Answer;
use state::plan::{Controller, NetworkKind, Strategy};

use crate::commands::Result;
use crate::failure::Failure;
use crate::generate::open;
use crate::output;

/// Separates the noise of measured rollouts from others, and that of answers the drafter learns from.
const STREAM: u32 = 4;
const LEARNED: u32 = 5;
/// Requests decoded together in a rollout, at most.
pub(super) const SLOTS: usize = 32;
/// Seconds of a turn.
const TURN_S: f64 = 0.02;

/// A name and a way to decode.
pub(super) type Way = (String, Controller);

/// A model, and what its ways to decode had to be the same in.
pub(super) struct Race {
    pub(super) solo: Solo,
    pub(super) tokens_max: usize,
    /// Answers that were compared with those of plain decoding, and those that differ.
    pub(super) compared: usize,
    pub(super) differences: usize,
    /// Those of all measurements.
    pub(super) prompts: Prompts,
}

/// What a drafter learned, and from what.
#[derive(Default)]
pub(super) struct Learned {
    /// Micro-batches, and the loss of the last one.
    pub(super) batches: u64,
    pub(super) loss: Option<f64>,
    pub(super) seconds: f64,
    pub(super) prompts: Prompts,
}

/// Prompts that were asked.
#[derive(Default)]
pub(super) struct Prompts {
    different: BTreeSet<Vec<u32>>,
    /// Some are those of several problems of one measurement.
    pub(super) repeat: bool,
}

impl Prompts {
    /// Adds those of one measurement, one a problem.
    fn add<'a>(&mut self, prompts: impl Iterator<Item = &'a [u32]>) {
        let mut here = BTreeSet::new();
        for prompt in prompts {
            self.repeat |= !here.insert(prompt);
        }
        self.different.extend(here.into_iter().map(<[u32]>::to_vec));
    }

    /// How many different ones.
    pub(super) fn count(&self) -> usize {
        self.different.len()
    }
}

impl Race {
    /// The model of a workflow or of a run; answers of so many tokens at most, or as many as its workflow says.
    pub(super) fn open(model: &Path, threads: usize, tokens: Option<usize>) -> Result<Self> {
        let (solo, _) = open(model, threads)?;
        let tokens_max = tokens.unwrap_or(solo.plan().sampling.tokens_max);
        Ok(Self { solo, tokens_max, compared: 0, differences: 0, prompts: Prompts::default() })
    }

    pub(super) fn plain() -> Way {
        ("plain".into(), Controller::Off)
    }

    /// What the workflow does.
    pub(super) fn adaptive(&self) -> Way {
        ("adaptive".into(), self.solo.plan().speculation.controller.clone())
    }

    /// Every strategy of the plan's bandit that can draft.
    pub(super) fn strategies(&self) -> Vec<Way> {
        let speculation = &self.solo.plan().speculation;
        let Controller::Bandit { strategies, .. } = &speculation.controller else { return Vec::new() };
        let is_ready = |s: &&Strategy| self.solo.has_drafter() || speculation.suffix() == Some(s.drafter);
        strategies.iter().filter(is_ready).map(|s| (self.name(s), Controller::Fixed(*s))).collect()
    }

    /// What the plan's drafter that learns is called; nothing if there is none.
    pub(super) fn network(&self) -> &'static str {
        self.solo.plan().speculation.shape().map_or("", |shape| match shape.network {
            NetworkKind::Eagle => "eagle",
            NetworkKind::Eagle3 => "eagle3",
        })
    }

    pub(super) fn name(&self, s: &Strategy) -> String {
        let is_suffix = self.solo.plan().speculation.suffix() == Some(s.drafter);
        let mut name = format!("{} {}", if is_suffix { "suffix" } else { self.network() }, s.depth);
        if s.width > 1 {
            name += &format!(" wide {} of {}", s.width, s.budget);
        }
        if s.suffix > 0 {
            name += &format!(" + suffix {}", s.suffix);
        }
        if s.chance_min > 0.0 {
            name += &format!(" from {:.0} %", s.chance_min * 100.0);
        }
        if s.budget_all > 0 {
            name += &format!(", {} in all", s.budget_all);
        }
        name
    }

    /// Has the drafter learn from so many answers for at most so many seconds.
    pub(super) fn learn(&self, count: usize, seconds: f64) -> Result<Learned> {
        let answers = if seconds > 0.0 { self.lessons(count)? } else { Vec::new() };
        if answers.is_empty() {
            return Ok(Learned::default());
        }
        output::note(&format!("the drafter learns from {} answers for {seconds} s", answers.len()));
        let began = Instant::now();
        let (batches, loss) = self.solo.train(&answers, seconds)?;
        let (seconds, mut prompts) = (began.elapsed().as_secs_f64(), Prompts::default());
        prompts.add(answers.iter().map(|answer| &answer.tokens[..answer.prompt]));
        Ok(Learned { batches, loss, seconds, prompts })
    }

    /// An error as long as the drafter of this model cannot draft: what is measured of its strategies would be plain decoding.
    pub(super) fn needs_drafter(&self, model: &Path) -> Result<()> {
        if self.solo.has_drafter() { Ok(()) } else { Err(Failure::NothingLearned { path: model.to_owned() }) }
    }

    /// Has the drafter learn for a second, and for ever longer until there is one to draft with: all in all for less than twice so many
    /// seconds.
    pub(super) fn learn_first(&self, lessons: &[Answer], seconds_max: f64) -> Result<()> {
        if lessons.is_empty() {
            return Ok(());
        }
        let mut seconds = 1.0;
        self.solo.train(lessons, seconds)?;
        while !self.solo.has_drafter() && 2.0 * seconds <= seconds_max {
            seconds *= 2.0;
            self.solo.train(&[], seconds)?;
        }
        Ok(())
    }

    /// Answers to learn from; none if the plan has no drafter that learns.
    pub(super) fn lessons(&self, count: usize) -> Result<Vec<Answer>> {
        if self.solo.plan().speculation.training.is_none() || count == 0 {
            return Ok(Vec::new());
        }
        let options = DecodeOptions { keep_hidden: true, ..self.options(&Controller::Off, SLOTS, self.tokens_max) };
        Ok(self.solo.decode(&self.asked(LEARNED, count, 1)?, &options)?.answers)
    }

    /// Answers to one prompt in the plan's rollouts.
    pub(super) fn group(&self) -> usize {
        self.solo.plan().grpo().map_or(1, |grpo| grpo.group)
    }

    /// Requests to measure with: held-out problems of the plan, each asked so many times one after the other.
    pub(super) fn measured(&self, count: usize, group: usize) -> Result<Vec<Asked>> {
        self.asked(STREAM, count, group)
    }

    fn asked(&self, stream: u32, count: usize, group: usize) -> Result<Vec<Asked>> {
        let one = |i: usize| {
            let (problem, sample) = (i / group, i % group);
            let prompt = match stream {
                LEARNED => self.solo.problem(problem as u64)?,
                _ => self.solo.heldout(problem as u64)?,
            };
            let noise = NoiseKey::new(self.solo.plan().seed, stream, 0, problem as u32, sample as u32);
            Ok(Asked { prompt, noise })
        };
        (0..count).map(one).collect()
    }

    pub(super) fn options(&self, controller: &Controller, slots: usize, tokens_max: usize) -> DecodeOptions {
        DecodeOptions { tokens_max, ..DecodeOptions::of(self.solo.plan(), slots, controller.clone()) }
    }

    /// The same requests in every way, in turns of the same time. The first way is the one that others are compared with. What is
    /// decoded together comes in groups, as in the plan's rollouts.
    pub(super) fn run(
        &mut self,
        ways: &[Way],
        requests: usize,
        slots: usize,
        tokens_max: usize,
    ) -> Result<Vec<(String, Decoded)>> {
        let group = if slots > 1 { self.group() } else { 1 };
        let asked = self.measured(requests, group)?;
        self.prompts.add(asked.iter().step_by(group).map(|asked| asked.prompt.as_slice()));
        let begin = |way: &Way| self.solo.begin(&asked, &self.options(&way.1, slots, tokens_max));
        let mut sessions = ways.iter().map(begin).collect::<std::result::Result<Vec<_>, _>>()?;
        while let Some(session) =
            sessions.iter_mut().filter(|s| !s.is_done()).min_by(|a, b| a.seconds().total_cmp(&b.seconds()))
        {
            let until = session.seconds() + TURN_S;
            while !session.is_done() && session.seconds() < until {
                session.cycle()?;
            }
        }
        let decoded = sessions.into_iter().map(|session| session.finish());
        let all: Vec<(String, Decoded)> = ways.iter().map(|way| way.0.clone()).zip(decoded).collect();
        self.compare(&all);
        Ok(all)
    }

    /// Counts answers that are not those of the first way: tokens, and the bits of their log-probabilities.
    fn compare(&mut self, all: &[(String, Decoded)]) {
        for (_, other) in &all[1..] {
            self.compared += all[0].1.answers.len();
            self.differences += differences(&all[0].1.answers, &other.answers);
        }
    }
}

/// Answers that are not those of plain decoding: tokens, and the bits of their log-probabilities. One that is missing differs.
pub(super) fn differences(plain: &[Answer], other: &[Answer]) -> usize {
    let bits = |answer: &Answer| answer.log_probs.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let id = |answer: &Answer| (answer.group, answer.sample);
    let is_same = |(a, b): &(&Answer, &Answer)| id(a) == id(b) && a.tokens == b.tokens && bits(a) == bits(b);
    plain.len().max(other.len()) - plain.iter().zip(other).filter(is_same).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_within_a_measurement_not_between_two() {
        let mut prompts = Prompts::default();
        let (one, two, three) = (&[1, 2][..], &[1][..], &[3][..]);
        prompts.add([one, two].into_iter());
        prompts.add([one, two, three].into_iter());
        assert_eq!((prompts.count(), prompts.repeat), (3, false));
        prompts.add([three, one, three].into_iter());
        assert_eq!((prompts.count(), prompts.repeat), (3, true));
    }
}
