//! One device without actors: to generate a text, and to measure how a model decodes.

mod decoded;
mod saved;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kernels::{Draws, NoiseKey, Pool};
use models::data::Problem;
use models::drafter::eagle::reads;
use models::drafter::{Calibration, Vocabulary};
use models::load::eagle::{self, Layout};
use models::load::export::{self, Precision};
use models::{Answer, Decoder, Decoding, Hidden, Stop, Target, Weights};
use state::metrics::add_levels;
use state::plan::{self, Model, Plan, Speculation};

pub use decoded::{CycleStats, Decoded};
use saved::Saved;

use crate::drafting::{Drafted, Drafting};
use crate::error::{Error, Result};
use crate::experience::Experience;
use crate::job::Job;
use crate::learning::Learned;
use crate::past::{Past, look};
use crate::speculator::{Published, Speculator, lock};

/// A model on one device, with the drafter of its run if it has one.
pub struct Solo {
    job: Arc<Job>,
    weights: Arc<Weights>,
    target: Arc<Target>,
    pool: Arc<Pool>,
    /// Has the drafter and teaches it; holds what it learns from.
    learning: Arc<Speculator>,
    /// What is drafted by a drafter that has a head of its own.
    own_head: Option<Arc<Vocabulary>>,
    /// Of guesses without the target's noise, whose gaps mean something else.
    uncoupled: Arc<Mutex<Calibration>>,
    /// The same of greedy ones.
    greedy: Arc<Mutex<Calibration>>,
    /// What is to be known of its run's checkpoints.
    warnings: Vec<String>,
    is_older: bool,
}

/// A request: its prompt, and the noise that decides its answer. Those that follow each other with the same prompt are a group.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Tokens.
    pub prompt: Vec<u32>,
    /// Keyed noise.
    pub noise: NoiseKey,
}

/// How to decode.
#[derive(Debug, Clone)]
pub struct DecodeOptions {
    /// Requests decoded together, at most.
    pub slots: usize,
    /// Chooses drafts.
    pub controller: plan::Controller,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have together this probability; 1 is all of them.
    pub top_p: f32,
    /// Longest answer, in tokens.
    pub tokens_max: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Keys and values of so many tokens are kept, at most; 0: of all requests.
    pub cache_tokens_max: usize,
    /// Keep hidden states of answers, to train the drafter with.
    pub keep_hidden: bool,
    /// Guesses are ranked with the noise that the target is sampled with. Without, only to compare.
    pub is_coupled: bool,
}

impl DecodeOptions {
    /// As the plan's rollouts draw their answers.
    #[must_use]
    pub fn of(plan: &Plan, slots: usize, controller: plan::Controller) -> Self {
        let plan::Sampling { temperature, top_p, tokens_max, ref stop } = plan.sampling;
        let stop = stop.clone();
        let cache_tokens_max = plan.devices.cache_tokens_max;
        let (keep_hidden, is_coupled) = (false, true);
        Self { slots, controller, temperature, top_p, tokens_max, stop, cache_tokens_max, keep_hidden, is_coupled }
    }
}

/// Requests that are being answered. Cycles of several sessions can take turns, so that what disturbs the machine disturbs all.
pub struct Session<'a> {
    asked: &'a [Asked],
    slots: usize,
    decoder: Decoder,
    drafting: Drafting,
    next: usize,
    decoded: Decoded,
    /// Where its controller's measurements go.
    learning: Option<Arc<Speculator>>,
}

impl Solo {
    /// The model of a plan, with the weights that its run would begin with.
    ///
    /// # Errors
    /// If the model or the data cannot be used.
    pub fn load(plan: &Plan, threads: usize) -> Result<Self> {
        plan.check()?;
        let job = Job::load(plan)?;
        let weights = Arc::new(job.initial.clone());
        Self::of(job, weights, None, threads)
    }

    /// The model of a run as its newest checkpoint has it, and its drafter.
    ///
    /// # Errors
    /// If there is no run in the folder, or its checkpoint cannot be read.
    pub fn of_run(dir: &Path, threads: usize) -> Result<Self> {
        let Past { state, events, is_running, .. } = look(dir)?;
        let Some(mut plan) = state.plan else { return Err(Error::NoRun { dir: dir.into() }) };
        // A checkpoint has all that the file had that the run began with, and that may be gone. Only a drafter to begin with is held
        // against it.
        let has_drafter = plan.drafter_weights().is_some();
        if let (Some(_), Model::Tiny { weights, .. }) = (&state.checkpoint, &mut plan.model) {
            weights.take_if(|path| !has_drafter || !path.exists());
        }
        let mut job = Job::load(&plan)?;
        let mut saved = Saved::read(dir, &job, &events);
        for _ in 1..LOOKS {
            // A run that has gone on has pruned what it had when it was looked at.
            if saved.is_ok() || !is_running {
                break;
            }
            saved = Saved::read(dir, &job, &look(dir)?.events);
        }
        let Saved { weights, is_older, habits, drafter, warnings } = saved?;
        // What the run drafts is what it has seen.
        let habits = habits.filter(|habits| habits.seen.len() == job.seen.len());
        if let Some(habits) = &habits {
            job.seen.clone_from(&habits.seen);
        }
        let has_drafter = drafter.is_some();
        let solo = Self { warnings, is_older, ..Self::of(job, weights, drafter, threads)? };
        if let Some(habits) = habits.filter(|_| has_drafter) {
            lock(&solo.learning.calibration).clone_from(&habits.calibration);
            let are_of_here = habits.are_of_here() && threads == plan.devices.threads;
            *lock(&solo.learning.watchdog) = if are_of_here { habits.watchdog } else { habits.watchdog.elsewhere() };
            if are_of_here {
                solo.learning.go_on_from(&habits.controller);
            }
        }
        Ok(solo)
    }

    fn of(job: Job, weights: Arc<Weights>, drafter: Option<Published>, threads: usize) -> Result<Self> {
        let target = Arc::new(Target::new(&job.config, &weights, &job.rope)?);
        let drafter = drafter.or_else(|| job.first_drafter());
        let learning = learning(&job, drafter);
        Ok(Self::with((Arc::new(job), weights, target, Arc::new(Pool::new(threads)?)), learning))
    }

    /// With chances that know nothing yet beside those of `learning`.
    fn with(
        (job, weights, target, pool): (Arc<Job>, Arc<Weights>, Arc<Target>, Arc<Pool>),
        learning: Arc<Speculator>,
    ) -> Self {
        let (own_head, uncoupled, greedy, warnings, is_older) = Default::default();
        Self { job, weights, target, pool, learning, own_head, uncoupled, greedy, warnings, is_older }
    }

    /// What is to be known of its run's checkpoints: that the newest one, or its drafter, is damaged, or that there is none yet.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether the run has learned more than the weights it was loaded with.
    #[must_use]
    pub fn is_older(&self) -> bool {
        self.is_older
    }

    /// The plan it was loaded from.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.job.plan
    }

    /// Writes the learned drafter to a folder, for Taper or for an engine; `verifier` is where vLLM finds its target: a folder or a name.
    ///
    /// # Errors
    /// If there is none, or the folder cannot be written.
    pub fn export_drafter(&self, folder: &Path, reader: (Layout, &str), precision: Precision) -> Result<()> {
        let (Some(published), Some(shape)) = (self.learning.published(), self.job.plan.speculation.shape()) else {
            return Err(Error::NoDrafter { name: self.job.plan.name.clone() });
        };
        let raw = published.weights.to_raw();
        Ok(eagle::export_drafter(folder, &self.vocabulary(), (&raw, shape), reader, precision)?)
    }

    /// The same model with the drafter of such a folder, and the tokens and the head that are there, believed as far as this one's
    /// is by now.
    ///
    /// # Errors
    /// If there is no drafter of this model in it.
    pub fn with_drafter(&self, folder: &Path) -> Result<Self> {
        let Self { job, weights, target, pool, .. } = self;
        let (drafter, head) = job.read_drafter(target, folder)?;
        let learning = learning(job, Some(Published::new(1, &drafter)));
        lock(&learning.calibration).clone_from(&lock(&self.learning.calibration));
        let solo = Self::with((job.clone(), weights.clone(), target.clone(), pool.clone()), learning);
        let own_head = head.map(|head| Arc::new(Vocabulary::with_head(target, &head)));
        Ok(Self { own_head, ..solo })
    }

    /// Writes the model as a Hugging Face folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn export(&self, folder: &Path, precision: Precision) -> Result<()> {
        let (job, chat) = (&self.job, self.job.chat_source.as_deref());
        Ok(export::export(folder, &job.config, &self.weights.to_raw(), precision, &job.tokenizer, chat)?)
    }

    /// Whether a learned drafter can draft.
    #[must_use]
    pub fn has_drafter(&self) -> bool {
        self.learning.published().is_some()
    }

    /// Tokens of a prompt as the plan's template has it; `raw`: as it stands.
    ///
    /// # Errors
    /// If it has no tokens, or too many.
    pub fn prompt(&self, text: &str, raw: bool) -> Result<Vec<u32>> {
        if raw {
            return Ok(self.job.tokenizer.encode_first(text)?);
        }
        self.job.prompt(&Problem { question: text.into(), answer: String::new(), solution: None })
    }

    /// Whether the model has a chat template.
    #[must_use]
    pub fn has_chat(&self) -> bool {
        self.job.chat.is_some()
    }

    /// Tokens of a question in the model's chat template.
    ///
    /// # Errors
    /// If it has none, or refuses the question.
    pub fn chat(&self, text: &str) -> Result<Vec<u32>> {
        let chat = self.job.chat.as_ref().ok_or(models::Error::NoChatTemplate)?;
        Ok(self.job.tokenizer.encode(&chat.prompt(text)?)?)
    }

    /// The prompt of training problem `index`.
    ///
    /// # Errors
    /// If it cannot be made into tokens.
    pub fn problem(&self, index: u64) -> Result<Vec<u32>> {
        self.job.prompt(&self.job.dataset.problem(index))
    }

    /// The prompt of held-out problem `index`, the first one after the last; of a training problem if none are held out.
    ///
    /// # Errors
    /// If it cannot be made into tokens.
    pub fn heldout(&self, index: u64) -> Result<Vec<u32>> {
        match self.job.plan.data.heldout as u64 {
            0 => self.problem(index),
            count => self.job.prompt(&self.job.dataset.heldout(index % count)),
        }
    }

    /// Text of tokens.
    #[must_use]
    pub fn text(&self, tokens: &[u32]) -> String {
        self.job.tokenizer.decode(tokens)
    }

    /// What ends answers with these options, to be told what of their text is the answer.
    #[must_use]
    pub fn stop(&self, options: &DecodeOptions) -> Option<Stop> {
        Stop::new(&options.stop, &self.job.tokenizer)
    }

    /// Begins to answer requests. The plan's own controller goes on from what it measured in sessions that are finished, as it does in
    /// a run; another one has measured nothing.
    ///
    /// # Errors
    /// If the drafter's weights are of another layout.
    pub fn begin<'a>(&self, asked: &'a [Asked], options: &DecodeOptions) -> Result<Session<'a>> {
        let (job, plan) = (&self.job, &self.job.plan.speculation);
        let speculation = Speculation { controller: options.controller.clone(), training: None, ..plan.clone() };
        let seen = self.learning.seen();
        let speculator = Speculator::new(&speculation, job.plan.seed, with(self.learning.published()), seen);
        let calibration = match (options.is_coupled, options.temperature == 0.0) {
            (false, _) => &self.uncoupled,
            (true, true) => &self.greedy,
            (true, false) => &self.learning.calibration,
        };
        let speculator = Arc::new(speculator.calibrated(calibration.clone()));
        let learning = (options.is_coupled && options.controller == plan.controller).then(|| self.learning.clone());
        if let Some(learning) = &learning {
            speculator.go_on_from(&lock(&learning.controller));
            *lock(&speculator.watchdog) = *lock(&learning.watchdog);
        }
        let decoding = Decoding {
            temperature: options.temperature,
            top_p: options.top_p,
            tokens_max: options.tokens_max,
            eos: job.config.eos.clone(),
            stop: self.stop(options),
            hidden: if options.keep_hidden { plan.shape().map_or(Hidden::Nothing, reads) } else { speculator.reads() },
        };
        let drawn = (&self.vocabulary(), decoding.temperature);
        let mut drafting = Drafting::new(&speculator, drawn, &self.pool, None)?;
        drafting.is_coupled = options.is_coupled;
        let decoder = Decoder::new(self.target.clone(), decoding, self.pool.clone());
        let decoder = decoder.with_cache_max(options.cache_tokens_max).with_lengths(self.learning.lengths.clone());
        let (slots, decoded) = (options.slots.max(1), Decoded::default());
        Ok(Session { asked, slots, decoder, drafting, next: 0, decoded, learning })
    }

    /// Answers all requests.
    ///
    /// # Errors
    /// If a prompt leaves no room for an answer.
    pub fn decode(&self, asked: &[Asked], options: &DecodeOptions) -> Result<Decoded> {
        let mut session = self.begin(asked, options)?;
        while !session.is_done() {
            session.cycle()?;
        }
        Ok(session.finish())
    }

    /// Trains the learned drafter on answers for at most so many seconds; returns micro-batches and the last loss, if there is one.
    ///
    /// # Errors
    /// If the weights of the drafter are of another layout.
    pub fn train(&self, answers: &[Answer], seconds: f64) -> Result<(u64, Option<f64>)> {
        self.learning.collect(answers);
        if lock(&self.learning.buffer).tokens() == 0 {
            return Ok((0, None));
        }
        // Until it is made, there is nothing to measure.
        self.learning.learning(&self.target, &mut || false)?;
        let (began, vocabulary) = (Instant::now(), self.vocabulary());
        let stop = || began.elapsed().as_secs_f64() >= seconds;
        let plan::Sampling { temperature, top_p, .. } = self.job.plan.sampling;
        let (draws, mut workspace) = (Draws { temperature, top_p }, models::drafter::learn::Workspace::default());
        let mut learned = Learned::default();
        // It rests where versions get no better; here nobody waits, and later ones may.
        while !stop() {
            let more = self.learning.train((&self.pool, &vocabulary), (draws, &mut workspace), stop)?;
            learned = learned.and(more);
            if more.batches == 0 && !more.rests {
                break;
            }
        }
        Ok((learned.batches, learned.loss))
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn vocabulary(&self) -> Arc<Vocabulary> {
        self.own_head.clone().unwrap_or_else(|| self.learning.vocabulary(&self.target))
    }
}

/// Looks at the checkpoints of a run that is at work, at most.
const LOOKS: usize = 6;

fn learning(job: &Job, drafter: Option<Published>) -> Arc<Speculator> {
    let (plan, seen) = (&job.plan, job.seen.clone());
    Arc::new(Speculator::new(&plan.speculation, plan.seed, with(drafter), seen))
}

fn with(published: Option<Published>) -> Experience {
    Experience { published, ..Experience::default() }
}

impl Session<'_> {
    /// Whether all requests are answered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.next == self.asked.len() && self.decoder.running() == 0
    }

    /// Seconds so far.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.decoded.seconds
    }

    /// Prompt and answer so far of each running request, with the place of its group among the requests.
    pub fn progress(&self) -> impl Iterator<Item = (usize, &[u32])> {
        self.decoder.requests().map(|request| (request.group, request.tokens.as_slice()))
    }

    /// Admits what there is room for, and runs one cycle.
    ///
    /// # Errors
    /// If a prompt leaves no room for an answer.
    pub fn cycle(&mut self) -> Result<()> {
        let began = Instant::now();
        while self.next < self.asked.len() && self.decoder.running() < self.slots {
            self.admit()?;
        }
        let drafted = self.drafting.cycle(&mut self.decoder)?;
        self.decoded.seconds += began.elapsed().as_secs_f64();
        self.decoded.cycles.push(CycleStats::of(&drafted, self.decoded.seconds));
        add_levels(&mut self.decoded.levels, &drafted.cycle.levels);
        self.decoded.answers.extend(drafted.cycle.ended);
        Ok(())
    }

    /// Requests that follow each other with the same prompt are a group: their prompt goes through the target once. Those that
    /// there is no room for begin later.
    fn admit(&mut self) -> Result<()> {
        let (asked, room) = (self.asked, self.slots - self.decoder.running());
        let Asked { prompt, .. } = &asked[self.next];
        let earlier = asked[..self.next].iter().rev().take_while(|other| other.prompt == *prompt).count();
        let group = asked[self.next..].iter().take_while(|other| other.prompt == *prompt).take(room);
        let samples: Vec<(usize, NoiseKey)> = (earlier..).zip(group.map(|asked| asked.noise)).collect();
        self.decoder.admit(self.next - earlier, prompt, &samples)?;
        self.next += samples.len();
        Ok(())
    }

    /// Hands requests that it is answering over to another session of the same model, half of those that are decoding with what was
    /// made of them so far; `anew`: the younger half of all, which is to be made again there.
    ///
    /// # Errors
    /// If one of them leaves no room there for more of its answer.
    pub fn hand_over(&mut self, to: &mut Session<'_>, anew: bool) -> Result<()> {
        if anew {
            for (id, request) in self.decoder.export(self.decoder.running() / 2) {
                self.drafting.left(id);
                to.decoder.import(request)?;
            }
            return Ok(());
        }
        for running in self.decoder.halve() {
            self.drafting.left(running.id());
            to.decoder.take_over(running)?;
        }
        Ok(())
    }

    /// What it made; answers in the order of their requests.
    #[must_use]
    pub fn finish(mut self) -> Decoded {
        let speculator = &self.drafting.speculator;
        if let Some(learning) = &self.learning {
            lock(&learning.controller).go_on_from(&lock(&speculator.controller));
            *lock(&learning.watchdog) = *lock(&speculator.watchdog);
        }
        self.decoded.put_off = speculator.put_off(speculator.version());
        self.decoded.answers.sort_by_key(|answer| (answer.group, answer.sample));
        self.decoded
    }
}

impl CycleStats {
    fn of(drafted: &Drafted, at_s: f64) -> Self {
        let cycle = &drafted.cycle;
        Self {
            at_s,
            seconds: drafted.seconds,
            draft_s: cycle.draft_s + cycle.catch_up_s,
            target_s: cycle.target_s,
            requests: cycle.requests,
            rows: cycle.rows,
            prefilled: cycle.prefilled,
            tokens: cycle.tokens,
            promised: cycle.promised,
            drafted: cycle.drafted,
            strategy: drafted.strategy,
        }
    }
}

#[cfg(test)]
mod tests;
