//! A rollout in progress: answers to devices, verdicts back, loans and drafter training in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use kernels::NoiseKey;
use models::data::Problem;
use models::{Answer, Decoding, Target};
use state::algorithm::advantages;
use state::device;
use state::metrics::{BatchMetrics, VersionMetrics};
use state::plan::{Evaluate, Grpo, Step};
use state::step::{Effect, Event, IdleUse, RequestId, Size, StepMachine};

use super::{Activity, State, measure};
use crate::engine::Command;
use crate::error::{Error, Result};
use crate::progress::{Progress, ScoredAnswer, ScoredGroup};
use crate::rewarder::{Score, Verdict};
use crate::rollout::{Group, Rollout};
use crate::speculator::lock;
use crate::update::Item;

/// Separate the noise of rollouts and of evaluations from other uses.
const STREAM: u32 = 1;
const EVALUATION: u32 = 2;

pub(crate) struct Rolling {
    rollout: Arc<Rollout>,
    machine: StepMachine,
    verdicts: Vec<Option<Vec<Verdict>>>,
    /// Seconds since the step began when the last group was done.
    drained_s: f64,
    /// When drafter training was told to stop on devices, until it has.
    preempted: BTreeMap<usize, Instant>,
}

impl State {
    pub(super) fn begin_grpo(&mut self, grpo: &Grpo) -> Result<()> {
        let (first, number) = self.cursor();
        let job = self.job.clone();
        let group = |i: u64| {
            let noise = |sample| NoiseKey::new(job.plan.seed, STREAM, number, i as u32, sample);
            let noise = (0..u32::try_from(grpo.group).unwrap_or(u32::MAX)).map(noise).collect();
            self.group(job.dataset.problem(i), noise)
        };
        let groups = (first..first + grpo.prompts as u64).map(group).collect::<Result<_>>()?;
        self.speculator.begin_policy(number);
        self.begin_rollout(groups, job.plan.sampling.temperature, true);
        Ok(())
    }

    pub(super) fn begin_evaluate(&mut self, evaluate: &Evaluate) -> Result<()> {
        let job = self.job.clone();
        // The same noise at every evaluation, so that a difference is the policy's.
        let noise = |i: u64| NoiseKey::new(job.plan.seed, EVALUATION, 0, i as u32, 0);
        let problems = 0..evaluate.problems as u64;
        let groups = problems.map(|i| self.group(job.dataset.heldout(i), vec![noise(i)])).collect::<Result<_>>()?;
        self.begin_rollout(groups, evaluate.temperature, false);
        Ok(())
    }

    fn group(&self, problem: Problem, noise: Vec<NoiseKey>) -> Result<Group> {
        Ok(Group { prompt: self.job.prompt(&problem)?, problem, noise })
    }

    /// Drafters learn from the answers of one that `teaches`.
    fn begin_rollout(&mut self, groups: Vec<Group>, temperature: f32, teaches: bool) {
        let job = &self.job;
        let decoding = Decoding {
            temperature,
            top_p: job.plan.sampling.top_p,
            tokens_max: job.plan.sampling.tokens_max,
            eos: job.config.eos.clone(),
            stop: job.stop.clone(),
            hidden: self.speculator.reads(),
        };
        let target = match Target::new(&job.config, &self.weights, &job.rope) {
            Ok(target) => Arc::new(target),
            Err(error) => return self.give_up(Error::Model(error)),
        };
        let size = Size {
            groups: groups.len(),
            samples: groups.first().map_or(1, |g| g.noise.len()),
            devices: self.seats.len(),
            slots_max: job.plan.devices.slots_max,
        };
        let training = teaches && job.plan.speculation.training.is_some();
        let idle = IdleUse { training, lending: job.plan.speculation.lending };
        let machine = StepMachine::new(size, idle);
        let verdicts = vec![None; groups.len()];
        self.rollouts += 1;
        let speculator = (self.speculator.clone(), teaches);
        let rollout = Rollout::new(self.rollouts, target, decoding, groups, speculator);
        let rollout = Arc::new(rollout.with_cache_max(job.plan.devices.cache_tokens_max));
        self.activity =
            Activity::Rolling(Rolling { rollout, machine, verdicts, drained_s: 0.0, preempted: BTreeMap::new() });
        for device in 0..self.seats.len() {
            if self.seats[device].machine.is_up() {
                self.offer(device);
            } else {
                self.rolling_without(device);
            }
        }
    }

    /// Tells the machine that a device is there.
    pub(super) fn offer(&mut self, device: usize) {
        let epoch = self.seats[device].machine.epoch();
        self.advance(Event::DeviceReady { device, epoch });
    }

    pub(super) fn rolling_without(&mut self, device: usize) {
        if let Activity::Rolling(rolling) = &mut self.activity {
            rolling.preempted.remove(&device);
            rolling.rollout.forget_loans_of(device);
        }
        self.advance(Event::DeviceLost { device });
    }

    fn advance(&mut self, event: Event) {
        let Activity::Rolling(rolling) = &mut self.activity else { return };
        let gain = |batch| lock(&self.speculator.controller).gain_of_halving(batch);
        for effect in rolling.machine.apply(event, &gain) {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        let Activity::Rolling(rolling) = &mut self.activity else { return };
        let rollout = rolling.rollout.clone();
        match effect {
            Effect::Assign { device, group, samples } => {
                self.request(device, device::Event::Assigned, Command::Decode { rollout, group, samples });
            }
            Effect::Score { group } => {
                rolling.drained_s = self.began.elapsed().as_secs_f64();
                let _ = self.rewarder.cast(Score { rollout, group });
            }
            Effect::Lend { device, loan } => {
                rollout.begin_loan(loan, device);
                self.send(device, Command::Lend { rollout, loan });
            }
            Effect::Borrow { device, loan } => {
                rollout.hand_over(loan, device);
                let now_s = self.began.elapsed().as_secs_f64();
                self.seats[device].timeline.borrow(now_s);
                self.request(device, device::Event::Assigned, Command::Borrow { rollout, loan });
            }
            Effect::TrainDrafter { device, training } => {
                let command = Command::TrainDrafter { rollout, training };
                self.request(device, device::Event::TrainingRequested, command);
            }
            Effect::PreemptDrafter { device } => {
                rolling.preempted.insert(device, Instant::now());
                self.request(device, device::Event::PreemptionRequested, Command::Preempt);
            }
            Effect::StartUpdate => self.rolled_out(),
        }
    }

    pub(super) fn answers_ended(&mut self, device: usize, epoch: u64, rollout: u64, answers: Vec<RequestId>) {
        for request in answers {
            let Some(machine) = self.machine_of(rollout) else { return };
            if machine.held(device) == 1 && machine.is_held(device, request) {
                self.note(device, device::Event::Drained { epoch });
            }
            self.advance(Event::Ended { device, epoch, request });
        }
    }

    pub(super) fn lent(&mut self, device: usize, epoch: u64, rollout: u64, loan: u64, requests: Vec<RequestId>) {
        let Some(machine) = self.machine_of(rollout) else { return };
        if machine.held(device) == requests.len() {
            self.note(device, device::Event::Drained { epoch });
        }
        self.advance(Event::Lent { device, epoch, loan, requests });
    }

    /// The machine of this rollout, if it is going on.
    fn machine_of(&self, rollout: u64) -> Option<&StepMachine> {
        match &self.activity {
            Activity::Rolling(rolling) if rolling.rollout.number == rollout => Some(&rolling.machine),
            _ => None,
        }
    }

    pub(super) fn drafter_stopped(&mut self, device: usize, epoch: u64, training: u64) {
        self.note(device, device::Event::TrainingStopped { epoch });
        if let Activity::Rolling(rolling) = &mut self.activity
            && let Some(preempted) = rolling.preempted.remove(&device)
        {
            self.metrics.preemptions_s.push(preempted.elapsed().as_secs_f64());
        }
        self.advance(Event::DrafterStopped { device, epoch, training });
    }

    pub(super) fn scored(&mut self, rollout: u64, group: usize, mut verdicts: Vec<Verdict>) {
        let Activity::Rolling(rolling) = &mut self.activity else { return };
        if rolling.rollout.number != rollout {
            return;
        }
        self.observer.tell(Progress::Scored(Box::new(told(&rolling.rollout, group, &mut verdicts))));
        rolling.verdicts[group] = Some(verdicts);
        let done = rolling.verdicts.iter().flatten().count();
        self.observer.tell(Progress::Groups { done, total: rolling.verdicts.len() });
        self.advance(Event::Scored { group });
    }

    /// All groups are scored: measure, then learn from them or record the evaluation.
    fn rolled_out(&mut self) {
        let next = Activity::Recording { then: None };
        let Activity::Rolling(rolling) = std::mem::replace(&mut self.activity, next) else { return };
        self.measure(&rolling);
        let job = self.job.clone();
        match job.plan.steps.get(self.position.stage) {
            Some(Step::Grpo(grpo)) => {
                let items = items(&rolling, grpo);
                // Where no answer could be scored, there is nothing to learn: the weights stay as they are.
                if items.iter().any(Option::is_some) { self.begin_policy_update(grpo, items) } else { self.commit() }
            }
            _ => self.commit(),
        }
    }

    fn measure(&mut self, rolling: &Rolling) {
        let now_s = self.began.elapsed().as_secs_f64();
        let verdicts: Vec<&Verdict> = rolling.verdicts.iter().flatten().flatten().collect();
        let answers: Vec<_> = (0..rolling.verdicts.len()).flat_map(|g| rolling.rollout.answers(g)).collect();
        let scores: Vec<f32> = verdicts.iter().filter_map(|v| v.outcome.score()).collect();
        let counts = rolling.rollout.counts();
        let m = &mut self.metrics;
        measure::lengths(m, answers.iter().map(|a| a.log_probs.len()).collect());
        m.truncated = answers.iter().filter(|a| a.truncated).count();
        m.failed = verdicts.len() - scores.len();
        if let (true, Some(reason)) = (!self.has_warned, verdicts.iter().find_map(|v| v.outcome.failure())) {
            self.has_warned = true;
            let (failed, all) = (m.failed, verdicts.len());
            let so = "they teach nothing, and count as wrong in accuracies";
            let text = format!("{failed} of {all} answers could not be scored ({reason}): {so}");
            self.observer.tell(Progress::Warning(text));
        }
        m.reward = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len().max(1) as f64;
        m.accuracy = verdicts.iter().filter(|v| v.is_correct).count() as f64 / verdicts.len().max(1) as f64;
        m.rollout_s = rolling.drained_s;
        // What counts is the finished answers; a lost device's tokens were decoded twice.
        m.tokens = answers.iter().map(|a| a.log_probs.len() as u64).sum();
        let surprise: f64 = answers.iter().flat_map(|a| &a.log_probs).map(|log_prob| -f64::from(*log_prob)).sum();
        m.entropy = surprise / m.tokens.max(1) as f64;
        m.by_batch = counts.by_batch.into_iter().filter(|b| b.cycles > 0).collect();
        m.cycles = m.by_batch.iter().map(|b| b.cycles).sum();
        let seconds = |f: fn(&BatchMetrics) -> f64| m.by_batch.iter().map(f).fold(0.0, |a, b| a + b);
        let (rated_s, plain_s) = (seconds(|b| b.rated_s), seconds(|b| b.plain_s));
        (m.drafted_cycles, m.drafted_tokens) = counts.drafted;
        let ratio =
            |(cycles, tokens): (u64, u64), none: f64| if cycles > 0 { tokens as f64 / cycles as f64 } else { none };
        m.accept_length = ratio(counts.drafted, 1.0);
        m.learned_accept_length = ratio(counts.learned, 0.0);
        m.by_level.clone_from(&counts.levels);
        let version = |(version, (cycles, tokens))| VersionMetrics { version, cycles, tokens };
        m.by_version = counts.versions.into_iter().map(version).collect();
        m.tokens_per_s = m.tokens as f64 / m.rollout_s.max(1e-9);
        m.plain_tokens_per_s = if plain_s > 0.0 { m.tokens_per_s * rated_s / plain_s } else { 0.0 };
        (m.drafter_batches, m.drafter_loss) = (counts.training.batches, counts.training.loss);
        (m.drafter_held_out, m.drafter_held_out_top3) = counts.training.held_out.unzip();
        (m.drafter_held_out_before, m.drafter_held_out_before_top3) = counts.training.before.unzip();
        m.drafter_discarded = counts.training.discarded;
        m.lent = counts.lent;
        m.drafter_version = self.speculator.version();
        m.drafter_off = self.speculator.put_off(m.drafter_version);
        let borrowed: Vec<_> = self.seats.iter_mut().map(|s| s.timeline.take_borrowed()).collect();
        m.timeline = self.seats.iter_mut().map(|s| s.timeline.take(now_s)).collect();
        measure::borrowed(m, &borrowed);
        let since = |rests: Instant| rests.saturating_duration_since(self.began).as_secs_f64();
        measure::idle(m, counts.training.seconds, counts.rests_since.map(since));
    }
}

/// What is told of a group; takes the texts.
fn told(rollout: &Rollout, group: usize, verdicts: &mut [Verdict]) -> ScoredGroup {
    let one = |(answer, verdict): (&Answer, &mut Verdict)| ScoredAnswer {
        text: std::mem::take(&mut verdict.text),
        tokens: answer.log_probs.len(),
        truncated: answer.truncated,
        drafter_version: rollout.drafter_version(group, answer.sample),
        is_correct: verdict.is_correct,
        outcome: verdict.outcome.clone(),
    };
    let Problem { question, answer: reference, .. } = rollout.groups[group].problem.clone();
    let answers = rollout.answers(group).iter().zip(verdicts).map(one).collect();
    ScoredGroup { group, question, reference, answers }
}

/// Answers with their advantages, in the order of groups and samples; a failed one teaches nothing but keeps its place.
fn items(rolling: &Rolling, grpo: &Grpo) -> Vec<Option<Item>> {
    let mut items = Vec::new();
    for (group, verdicts) in rolling.verdicts.iter().enumerate() {
        let outcomes: Vec<_> = verdicts.iter().flatten().map(|v| v.outcome.clone()).collect();
        for (answer, advantage) in rolling.rollout.answers(group).into_iter().zip(advantages(&outcomes, grpo.normalize))
        {
            items.push(advantage.map(|advantage| Item::of(answer, advantage)));
        }
    }
    items
}
