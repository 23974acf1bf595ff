//! One rollout: groups to decode, and what came of them. Shared by the devices that work on it.

use std::sync::{Arc, Mutex};

use kernels::NoiseKey;
use models::data::Problem;
use models::drafter::Vocabulary;
use models::{Answer, Decoding, Target};

use state::metrics::BatchMetrics;
use state::speculation::controller::BUCKETS;

use crate::speculator::{Speculator, lock};

/// One prompt and its samples.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) problem: Problem,
    pub(crate) prompt: Vec<u32>,
    pub(crate) noise: Vec<NoiseKey>,
}

/// What a device counted in a rollout.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Request-cycles that had a draft, and the tokens they emitted.
    pub(crate) drafted: (u64, u64),
    /// The learned drafter's part of `drafted`.
    pub(crate) learned: (u64, u64),
    /// By bucket of batch sizes.
    pub(crate) by_batch: [BatchMetrics; BUCKETS],
    pub(crate) drafter_batches: u64,
    pub(crate) drafter_loss: f64,
}

pub(crate) struct Rollout {
    /// Distinguishes this rollout from earlier ones.
    pub(crate) number: u64,
    pub(crate) target: Arc<Target>,
    pub(crate) decoding: Decoding,
    pub(crate) groups: Vec<Group>,
    pub(crate) speculator: Arc<Speculator>,
    pub(crate) vocabulary: Arc<Vocabulary>,
    /// Answers by group, in the order of their samples once a group is complete.
    answers: Vec<Mutex<Vec<Answer>>>,
    counts: Mutex<Counts>,
}

impl Rollout {
    pub(crate) fn new(
        number: u64,
        target: Arc<Target>,
        decoding: Decoding,
        groups: Vec<Group>,
        speculator: Arc<Speculator>,
    ) -> Self {
        let answers = groups.iter().map(|_| Mutex::new(Vec::new())).collect();
        let vocabulary = speculator.vocabulary(&target);
        Self { number, target, decoding, groups, speculator, vocabulary, answers, counts: Mutex::default() }
    }

    /// Forgets what a lost device had made of a group.
    pub(crate) fn restart(&self, group: usize) {
        lock(&self.answers[group]).clear();
    }

    /// Takes in an answer; whether its group is complete.
    pub(crate) fn add(&self, answer: Answer) -> bool {
        let group = answer.group;
        let mut answers = lock(&self.answers[group]);
        answers.push(answer);
        answers.sort_by_key(|a| a.sample);
        answers.len() == self.groups[group].noise.len()
    }

    pub(crate) fn answers(&self, group: usize) -> Vec<Answer> {
        lock(&self.answers[group]).clone()
    }

    /// Feeds a complete group to the drafter's buffer and drops its hidden states.
    pub(crate) fn harvest(&self, group: usize) {
        let mut answers = lock(&self.answers[group]);
        self.speculator.collect(&answers);
        answers.iter_mut().for_each(|a| a.hidden = Vec::new());
    }

    pub(crate) fn count(&self, f: impl FnOnce(&mut Counts)) {
        f(&mut lock(&self.counts));
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.counts).clone()
    }
}
