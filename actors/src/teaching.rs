//! What teaching a drafter costs, measured on one device: samples in packed and in padded batches, and what a checkpoint of the
//! drafter makes its trainer wait.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use models::drafter::buffer::{Example, Window};
use models::drafter::learn::{Learner, Workspace, learning_rate};
use models::load::export::{Precision, write_tensors};
use models::train::{Sequence, log_probs};
use models::{Answer, RawWeights};

use crate::error::{Error, Result};
use crate::solo::Solo;

/// Samples of a padded batch.
const BATCH: usize = 8;

/// Samples a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Packing {
    /// Each batch as long as its longest sample, for all of them.
    pub padded: f64,
    /// Samples laid end to end.
    pub packed: f64,
}

/// Seconds for which the trainer of a drafter waits for its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stalls {
    /// Everything a drafter computes with, the target's embedding and head among it, written to disk and synced.
    pub sync: f64,
    /// The same, copied for somebody who writes it later.
    pub asynchronous: f64,
    /// What is trained and its moments, copied: what a run does.
    pub selective: f64,
}

impl Solo {
    /// Mean log-probability that this model gives to each token of answers, at the plan's temperature, less than they had when
    /// they were drawn: an estimate of the divergence of the model that drew them from this one, in nats a token.
    #[must_use]
    pub fn divergence(&self, answers: &[Answer]) -> f64 {
        let sequence = |a: &Answer| Sequence { tokens: a.tokens.clone(), prompt: a.prompt };
        let sequences: Vec<Sequence> = answers.iter().map(sequence).collect();
        let temperature = self.plan().sampling.temperature;
        let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
        let (mut sum, mut tokens) = (0.0, 0);
        for (sequences, answers) in sequences.chunks(BATCH).zip(answers.chunks(BATCH)) {
            for (here, there) in log_probs(self.pool(), self.target(), sequences, inverse).iter().zip(answers) {
                sum += there.log_probs.iter().zip(here).map(|(there, here)| f64::from(there - here)).sum::<f64>();
                tokens += here.len();
            }
        }
        sum / f64::from(u32::try_from(tokens.max(1)).unwrap_or(u32::MAX))
    }

    /// Teaches a new drafter each answer once, both ways; the answers need hidden states.
    ///
    /// # Errors
    /// If the plan has no learned drafter.
    pub fn packing(&self, answers: &[Answer]) -> Result<Packing> {
        let examples: Vec<Arc<Example>> = answers.iter().filter_map(Example::of).map(Arc::new).collect();
        let seconds = |batches: &[Vec<Window>]| -> Result<f64> {
            let (mut learner, mut workspace) = (self.fresh_learner()?, Workspace::default());
            let (vocabulary, began) = (self.vocabulary(), Instant::now());
            for batch in batches {
                learner.learn(self.pool(), &vocabulary, batch, &mut workspace)?;
            }
            Ok(began.elapsed().as_secs_f64())
        };
        let together = |examples: &[Arc<Example>]| examples.iter().map(Example::whole).collect::<Vec<Window>>();
        let packed: Vec<Vec<Window>> = examples.chunks(BATCH).map(together).collect();
        let padded = |examples: &[Arc<Example>]| {
            let longest = examples.iter().map(|e| e.whole().size()).max().unwrap_or(0);
            examples.iter().map(|e| Arc::new(e.padded(longest)).whole()).collect::<Vec<Window>>()
        };
        let padded: Vec<Vec<Window>> = examples.chunks(BATCH).map(padded).collect();
        // Once to warm up.
        seconds(&packed)?;
        let samples = examples.len() as f64;
        Ok(Packing { padded: samples / seconds(&padded)?, packed: samples / seconds(&packed)? })
    }

    /// Writes and copies the drafter as its checkpoints do; a file in `folder` is written and removed.
    ///
    /// # Errors
    /// If the plan has no learned drafter, or the file cannot be written.
    pub fn stalls(&self, folder: &Path) -> Result<Stalls> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let file = &folder.join("stall.safetensors");
        let learner = self.fresh_learner()?;
        let all = || {
            let mut raw = learner.to_raw();
            let is_read = |name: &str| name.contains("embed_tokens") || name.contains("lm_head");
            raw.tensors.extend(self.weights().to_raw_of(is_read).tensors);
            raw
        };
        let write = || -> Result<()> {
            write_tensors(file, &all(), Precision::F32)?;
            std::fs::File::open(file).and_then(|f| f.sync_all()).map_err(Error::io("write", file))
        };
        let began = Instant::now();
        write()?;
        let sync = began.elapsed().as_secs_f64();
        let copied = |copy: &dyn Fn() -> RawWeights| {
            let began = Instant::now();
            let raw = copy();
            let seconds = began.elapsed().as_secs_f64();
            drop(raw);
            seconds
        };
        let (asynchronous, selective) = (copied(&all), copied(&|| learner.to_raw()));
        std::fs::remove_file(file).map_err(Error::io("remove", file))?;
        Ok(Stalls { sync, asynchronous, selective })
    }

    fn fresh_learner(&self) -> Result<Learner> {
        let plan = &self.plan().speculation;
        let none = || Error::NoDrafter { name: self.plan().name.clone() };
        let shape = plan.shape().ok_or_else(none)?;
        let training = plan.training.as_ref().ok_or_else(none)?;
        let fresh = Learner::fresh(self.target(), shape, self.plan().seed)?;
        let config = self.target().config();
        let lr = training.lr.unwrap_or_else(|| learning_rate(config));
        Ok(Learner::new(config, shape, fresh, lr).with_levels(training.levels))
    }
}
