//! One rollout: groups to decode, and what came of them. Shared by the devices that work on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kernels::NoiseKey;
use models::data::Problem;
use models::drafter::Vocabulary;
use models::{Answer, Cycle, Decoding, Request, Running, Target};

use state::metrics::{BatchMetrics, add_levels};
use state::speculation::controller::BUCKETS;

use crate::learning::Learned;
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
    /// Answers that went on on another device.
    pub(crate) lent: u64,
    /// By bucket of batch sizes.
    pub(crate) by_batch: [BatchMetrics; BUCKETS],
    /// Its levels and its versions.
    pub(crate) levels: Vec<(u64, u64)>,
    pub(crate) versions: BTreeMap<u64, (u64, u64)>,
    /// Of all trainings of the drafter together.
    pub(crate) training: Learned,
    /// Since when learning rests: for the rest of the rollout.
    pub(crate) rests_since: Option<Instant>,
}

impl Counts {
    /// Adds what came of a cycle's drafts.
    pub(crate) fn add_drafts(&mut self, cycle: &Cycle, version: u64) {
        let add = |sum: &mut (u64, u64), new: (u64, u64)| *sum = (sum.0 + new.0, sum.1 + new.1);
        let wide = |new: (usize, usize)| (new.0 as u64, new.1 as u64);
        add(&mut self.drafted, wide(cycle.drafted));
        add(&mut self.learned, wide(cycle.learned));
        if cycle.learned.0 > 0 {
            add(self.versions.entry(version).or_default(), wide(cycle.learned));
        }
        add_levels(&mut self.levels, &cycle.levels);
    }

    /// Adds what an idle device taught the drafter.
    pub(crate) fn learned_in_idle_time(&mut self, learned: Learned) {
        self.training = self.training.and(learned);
        self.rests_since = self.rests_since.or_else(|| learned.rests.then(Instant::now));
    }
}

/// Requests on their way, and the device at which they are: gone if that one is lost.
struct Loan {
    at: usize,
    requests: Vec<Running>,
}

/// What an answer has said: all that its further tokens depend on beside its noise.
#[derive(Debug, Clone, Default)]
struct Note {
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

pub(crate) struct Rollout {
    /// Distinguishes this rollout from earlier ones.
    pub(crate) number: u64,
    pub(crate) target: Arc<Target>,
    pub(crate) decoding: Decoding,
    /// Tokens whose keys and values a device keeps, at most; 0: no limit.
    pub(crate) cache_tokens_max: usize,
    pub(crate) groups: Vec<Group>,
    pub(crate) speculator: Arc<Speculator>,
    pub(crate) vocabulary: Arc<Vocabulary>,
    /// Its answers are for the drafter to learn from; those of an evaluation are not.
    teaches: bool,
    /// Answers by group, in the order of their samples once a group is complete.
    answers: Vec<Mutex<Vec<Answer>>>,
    /// Requests on their way from one device to another, by loan.
    lent: Mutex<BTreeMap<u64, Loan>>,
    /// What answers that have not ended had said when it was last noted, by group and sample.
    notes: Mutex<BTreeMap<(usize, usize), Note>>,
    /// Version of the drafter that was in use where an answer ended, by group and sample; 0: none.
    drafter_versions: Mutex<BTreeMap<(usize, usize), u64>>,
    counts: Mutex<Counts>,
}

impl Rollout {
    pub(crate) fn new(
        number: u64,
        target: Arc<Target>,
        decoding: Decoding,
        groups: Vec<Group>,
        (speculator, teaches): (Arc<Speculator>, bool),
    ) -> Self {
        let answers = groups.iter().map(|_| Mutex::new(Vec::new())).collect();
        let vocabulary = speculator.vocabulary(&target);
        let (lent, notes, drafter_versions, counts) = Default::default();
        let cache_tokens_max = 0;
        Self {
            number,
            target,
            decoding,
            cache_tokens_max,
            groups,
            speculator,
            vocabulary,
            teaches,
            answers,
            lent,
            notes,
            drafter_versions,
            counts,
        }
    }

    /// Devices keep keys and values of so many tokens, at most.
    pub(crate) fn with_cache_max(self, cache_tokens_max: usize) -> Self {
        Self { cache_tokens_max, ..self }
    }

    /// Takes in an answer that ended while this version of the drafter was in use. The drafter learns from it at once, while its siblings may be what others wait for; then its hidden states
    /// are dropped. One that a device of which nothing was heard any more had given already is the same one.
    pub(crate) fn add(&self, mut answer: Answer, drafter_version: u64) {
        let mut answers = lock(&self.answers[answer.group]);
        if let Err(at) = answers.binary_search_by_key(&answer.sample, |a| a.sample) {
            if self.teaches {
                self.speculator.collect(std::slice::from_ref(&answer));
            }
            answer.hidden = Vec::new();
            let id = (answer.group, answer.sample);
            lock(&self.notes).remove(&id);
            lock(&self.drafter_versions).insert(id, drafter_version);
            answers.insert(at, answer);
        }
    }

    /// Keeps what running answers have said: if their device is lost, another one goes on from there.
    pub(crate) fn note<'a>(&self, requests: impl Iterator<Item = &'a Request>) {
        let mut notes = lock(&self.notes);
        for request in requests {
            let Note { tokens, log_probs } = notes.entry((request.group, request.sample)).or_default();
            let (known, said) = (log_probs.len(), request.log_probs.len());
            // One that was taken for lost, and goes on for a moment, may be behind.
            if known < said {
                tokens.extend_from_slice(&request.tokens[request.prompt + known..]);
                log_probs.extend_from_slice(&request.log_probs[known..]);
            }
        }
    }

    /// An answer as far as it was noted; nothing if it has said nothing.
    pub(crate) fn noted(&self, group: usize, sample: usize) -> Option<Request> {
        let Note { tokens, log_probs } = lock(&self.notes).get(&(group, sample)).cloned()?;
        let Group { prompt, noise, .. } = &self.groups[group];
        let (noise, tokens) = (noise[sample], [prompt.as_slice(), &tokens].concat());
        (!log_probs.is_empty()).then_some(Request { group, sample, noise, tokens, prompt: prompt.len(), log_probs })
    }

    /// A device is about to be asked for requests.
    pub(crate) fn begin_loan(&self, loan: u64, lender: usize) {
        lock(&self.lent).insert(loan, Loan { at: lender, requests: Vec::new() });
    }

    /// Leaves requests for another device, unless nobody waits for them any more.
    pub(crate) fn put_aside(&self, loan: u64, requests: Vec<Running>) {
        if let Some(loan) = lock(&self.lent).get_mut(&loan) {
            loan.requests = requests;
        }
    }

    /// What was put aside belongs to this device now.
    pub(crate) fn hand_over(&self, loan: u64, device: usize) {
        if let Some(loan) = lock(&self.lent).get_mut(&loan) {
            let moved = if loan.at == device { 0 } else { loan.requests.len() as u64 };
            loan.at = device;
            self.count(|c| c.lent += moved);
        }
    }

    /// What another device has left; nothing if this is no such loan.
    pub(crate) fn take_over(&self, loan: u64) -> Option<Vec<Running>> {
        Some(lock(&self.lent).remove(&loan)?.requests)
    }

    /// Forgets what is at a device that was lost: its answers go on from what was noted.
    pub(crate) fn forget_loans_of(&self, device: usize) {
        lock(&self.lent).retain(|_, loan| loan.at != device);
    }

    pub(crate) fn answers(&self, group: usize) -> Vec<Answer> {
        lock(&self.answers[group]).clone()
    }

    pub(crate) fn drafter_version(&self, group: usize, sample: usize) -> u64 {
        lock(&self.drafter_versions).get(&(group, sample)).copied().unwrap_or(0)
    }

    pub(crate) fn count(&self, f: impl FnOnce(&mut Counts)) {
        f(&mut lock(&self.counts));
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.counts).clone()
    }
}
