//! How the learned drafter learns while a device would be idle: window by window until the device is needed, a step of the
//! optimiser every micro-batch, and versions that devices use once held-out answers have shown that they guess no worse.

use kernels::{NoiseKey, Pool};
use models::drafter::Vocabulary;
use models::drafter::buffer::Window;
use models::drafter::learn::{Guesses, Learner, guess};
use models::{RawWeights, Target, Weights};
use state::drafter::{Duel, GUESSES_MIN, Publication, Verdict};
use state::plan::{DrafterShape, DrafterTraining};

use crate::error::Result;
use crate::speculator::{Speculator, lock};

/// Separates the noise that draws micro-batches from others.
const DRAWS: u32 = 6;
/// Steps after which the first version is published, at most.
const FIRST_AFTER: u32 = 8;
/// Steps after which another level is learned: what is said from a bad guess teaches nothing, and costs as much.
const LEVEL_AFTER: u32 = 400;

/// The learner of a drafter, and what becomes of its versions.
pub(crate) struct Learning {
    training: DrafterTraining,
    shape: DrafterShape,
    seed: u64,
    learner: Learner,
    publication: Publication,
    /// Windows of the step that was begun, and one that did not fit into it.
    pending: Vec<Window>,
    left: Option<Window>,
    /// A version waits for its score.
    is_due: bool,
    /// One that was begun.
    exam: Option<Exam>,
}

/// What an opportunity to learn was used for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Learned {
    /// Micro-batches, and the loss of the last one.
    pub(crate) batches: u64,
    pub(crate) loss: f64,
    /// Shares of held-out tokens that the newest scored version guessed at once, and within three guesses.
    pub(crate) held_out: Option<(f64, f64)>,
    /// Versions that were worse than the one in use.
    pub(crate) discarded: u64,
}

/// Where and for what it learns now.
pub(crate) struct Lesson<'a> {
    pub(crate) speculator: &'a Speculator,
    pub(crate) pool: &'a Pool,
    pub(crate) vocabulary: &'a Vocabulary,
    /// Sampling temperature of the answers.
    pub(crate) temperature: f32,
}

/// Held-out windows, and what two versions make of them, as far as they were read. It outlives interruptions: idle times may be
/// shorter than an exam.
#[derive(Default)]
struct Exam {
    windows: Vec<Window>,
    in_use: Paper,
    newest: Paper,
}

/// Guesses of one version, and how many windows they are of.
#[derive(Default)]
struct Paper {
    guesses: Guesses,
    read: usize,
}

impl Learning {
    /// Goes on from an earlier learner or `published` weights, or begins with fresh ones.
    pub(crate) fn new(
        (target, shape): (&Target, DrafterShape),
        training: &DrafterTraining,
        seed: u64,
        published: Option<&Weights>,
        (learner, publication): (Option<&RawWeights>, Publication),
    ) -> Result<Self> {
        // One of another shape is as good as none.
        let config = target.config();
        let earlier = learner.and_then(|raw| Learner::from_raw((config, shape), raw, training.lr).ok());
        let learner = match (earlier, published) {
            (Some(learner), _) => learner,
            (None, Some(weights)) => Learner::new(config, shape, weights.clone(), training.lr),
            (None, None) => Learner::new(config, shape, Learner::fresh(target, shape, seed)?, training.lr),
        };
        let training = training.clone();
        Ok(Self {
            training,
            shape,
            seed,
            learner,
            publication,
            pending: Vec::new(),
            left: None,
            is_due: false,
            exam: None,
        })
    }

    pub(crate) fn learner(&self) -> &Learner {
        &self.learner
    }

    pub(crate) fn publication(&self) -> &Publication {
        &self.publication
    }

    /// Learns until `stop` says so, which is asked before every window, or until nothing is to be gained for now. A window that is
    /// interrupted is read again another time.
    pub(crate) fn go_on(&mut self, lesson: &Lesson<'_>, mut stop: impl FnMut() -> bool) -> Result<Learned> {
        // An order to stop is given once.
        let mut has_stopped = false;
        let stop = &mut || {
            has_stopped = has_stopped || stop();
            has_stopped
        };
        let mut learned = Learned::default();
        if !self.is_worth_it(lesson, stop)? {
            return Ok(learned);
        }
        while !stop() {
            if self.is_due {
                self.is_due = !self.judge(lesson, &mut learned, stop)?;
                continue;
            }
            if self.pending.is_empty() {
                self.pending = self.draw(lesson.speculator);
                let grown = 1 + (self.learner.steps() / LEVEL_AFTER) as usize;
                self.learner.set_levels(grown.min(self.training.levels));
            }
            let Some(window) = self.pending.last() else { break };
            if !self.learner.read(lesson.pool, lesson.vocabulary, std::slice::from_ref(window))? {
                continue;
            }
            self.pending.pop();
            if self.pending.is_empty() {
                learned.loss = self.learner.step(lesson.pool);
                learned.batches += 1;
                self.is_due = self.learner.steps().is_multiple_of(self.publish_every(lesson.speculator));
            }
        }
        Ok(learned)
    }

    /// Steps between versions; until there is one, devices have nothing to draft with.
    fn publish_every(&self, speculator: &Speculator) -> u32 {
        let every = u32::try_from(self.training.publish_every).unwrap_or(u32::MAX);
        if speculator.version() == 0 { every.min(FIRST_AFTER) } else { every }
    }

    /// While it has settled, the version in use has to show first whether the target has moved on. An opportunity that is too
    /// short for that is used up by it.
    fn is_worth_it(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        let published = lesson.speculator.published().filter(|_| self.publication.has_settled());
        let Some(published) = published else { return Ok(self.publication.takes(None)) };
        let mut exam = self.exam.take().unwrap_or_else(|| self.new_exam(lesson));
        let is_over = self.read_paper(lesson, &exam.windows, &published.weights, &mut exam.in_use, stop)?;
        let guesses = &exam.in_use.guesses;
        let right = guesses.right.iter().filter(|right| **right).count();
        let share = (guesses.right.len() >= GUESSES_MIN).then(|| share(right, guesses));
        // A newer version that waits for its score goes on with the same exam.
        self.exam = (!is_over || self.is_due).then_some(exam);
        Ok(is_over && self.publication.takes(share))
    }

    fn new_exam(&self, lesson: &Lesson<'_>) -> Exam {
        let windows = lock(&lesson.speculator.buffer).held_out(self.training.tokens_max);
        Exam { windows, ..Exam::default() }
    }

    /// The windows of the next micro-batch.
    fn draw(&mut self, speculator: &Speculator) -> Vec<Window> {
        let (key, mut draws) = (NoiseKey::new(self.seed, DRAWS, self.learner.steps(), 0, 0), 0);
        let uniform = || {
            draws += 1;
            key.uniform(0, draws)
        };
        lock(&speculator.buffer).draw(self.training.tokens_max, &mut self.left, uniform)
    }

    /// Scores the newest version against the one in use, and does what follows. Whether it came to an end.
    fn judge(&mut self, lesson: &Lesson<'_>, learned: &mut Learned, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        let mut exam = self.exam.take().unwrap_or_else(|| self.new_exam(lesson));
        let published = lesson.speculator.published();
        let mut is_over = match &published {
            Some(published) => self.read_paper(lesson, &exam.windows, &published.weights, &mut exam.in_use, stop)?,
            None => true,
        };
        is_over = is_over && self.read_paper(lesson, &exam.windows, self.learner.weights(), &mut exam.newest, stop)?;
        if !is_over {
            self.exam = Some(exam);
            return Ok(false);
        }
        let (newest, in_use) = (exam.newest.guesses, exam.in_use.guesses);
        let duel = Duel::of(&newest.right, published.as_ref().map(|_| in_use.right.as_slice()));
        if duel.guesses >= GUESSES_MIN {
            learned.held_out = Some((share(duel.right, &newest), share(newest.among_three, &newest)));
        }
        match self.publication.judge(duel) {
            Verdict::Publish => lesson.speculator.publish(self.learner.weights()),
            Verdict::Discard => learned.discarded += 1,
            Verdict::RollBack => {
                learned.discarded += 1;
                if let Some(published) = published {
                    self.learner.restart((*published.weights).clone());
                }
            }
        }
        Ok(true)
    }

    /// Goes on with a version's paper; whether it is complete.
    fn read_paper(
        &self,
        lesson: &Lesson<'_>,
        windows: &[Window],
        weights: &Weights,
        paper: &mut Paper,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        while let Some(window) = windows.get(paper.read) {
            if stop() {
                return Ok(false);
            }
            let one = std::slice::from_ref(window);
            let guesses = guess(lesson.pool, lesson.vocabulary, (weights, self.shape), one, lesson.temperature)?;
            let Some(guesses) = guesses else { continue };
            paper.guesses.right.extend(guesses.right);
            paper.guesses.among_three += guesses.among_three;
            paper.read += 1;
        }
        Ok(true)
    }
}

fn share(count: usize, guesses: &Guesses) -> f64 {
    count as f64 / guesses.right.len().max(1) as f64
}

#[cfg(test)]
mod tests;
