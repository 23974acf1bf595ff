//! How the learned drafter learns while devices would be idle: packed windows of answers until a device is needed, a step of the
//! optimiser every micro-batch, and versions that devices use once held-out answers have shown that they guess no worse.

mod exam;
pub(crate) mod maker;
mod shared;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use kernels::{Draws, NoiseKey, Pool};
use models::drafter::Vocabulary;
use models::drafter::buffer::Window;
use models::drafter::learn::{Learner, Reader, Reading, Workspace, learning_rate};
use models::optim::Gradients;
use models::{RawWeights, Target, Weights};
use state::drafter::{GUESSES_MIN, Publication, Verdict};
use state::plan::{DrafterShape, DrafterTraining};

use crate::error::Result;
use crate::speculator::{Speculator, lock};
use exam::{EXAM_TOKENS, Exam, GLANCE_TOKENS, Newest, TOLD_MIN};
pub(crate) use shared::Shared;

/// Separates the noise that draws micro-batches from others.
const DRAWS: u32 = 6;
/// Steps after which the first version is published, at most.
const FIRST_AFTER: u32 = 8;
/// Steps after which another level is learned: what is said from a bad guess teaches nothing, and costs as much.
const LEVEL_AFTER: u32 = 400;
/// Tokens of the shortest windows that are made of longer ones.
const WINDOW_MIN: usize = 64;
/// Held-out tokens of a policy that say enough alone.
const OWN_MIN: usize = 512;
/// Versions of an opportunity, together no better than those before, after which the rest of it is left out.
const TRIES: u32 = 16;

/// The learner of a drafter, and what becomes of its versions.
pub(crate) struct Learning {
    training: DrafterTraining,
    shape: DrafterShape,
    seed: u64,
    learner: Learner,
    publication: Publication,
    /// Windows that nobody reads yet, of the micro-batch drawn last, and one that did not fit into it.
    pending: Vec<Window>,
    left: Option<Window>,
    /// Micro-batches drawn, and tokens of the last one; windows in those that were begun; and windows read since the last step.
    drawn: u32,
    drawn_tokens: usize,
    begun: VecDeque<usize>,
    read: usize,
    /// Tokens that a device reads in one go, at most: as many as it lately had time for.
    together: usize,
    /// An exam that was begun.
    exam: Option<Box<Exam>>,
    /// The same of one that shows what the update has left of the version in use.
    glance: Option<Box<Exam>>,
    /// The policy was updated before anything was known of a version that is due: the next one is its last chance.
    sits_again: bool,
    /// The policy by whose held-out answers the version in use was examined first.
    first_examined: Option<u32>,
    /// Who reads an exam, if anybody does: a lost device leaves none behind.
    examiner: Weak<()>,
    /// Levels that are learned from the start, beside the first.
    head_start: u32,
    /// What one of the devices that learn found out for all.
    is_worth_it: Option<bool>,
    tries: Tries,
}

/// Versions of the opportunity that were scored, and how many more of the guesses they had right than the one in use, as shares.
#[derive(Debug, Default)]
struct Tries {
    count: u32,
    gain: f64,
}

/// What an opportunity to learn was used for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Learned {
    /// Seconds at work: reading windows, exams, steps.
    pub(crate) seconds: f64,
    /// Micro-batches, and the loss of the last one.
    pub(crate) batches: u64,
    pub(crate) loss: Option<f64>,
    /// Shares of held-out tokens that the newest scored version guessed at once, and within three guesses, of this policy's if they
    /// are enough.
    pub(crate) held_out: Option<(f64, f64)>,
    /// The same of the version in use, before any other was published for the policy that is rolled out.
    pub(crate) before: Option<(f64, f64)>,
    /// Versions that were worse than the one in use.
    pub(crate) discarded: u64,
    /// The opportunity was left out, or the rest of it: versions had stopped getting better.
    pub(crate) rests: bool,
}

impl Learned {
    /// This and what came after it.
    pub(crate) fn and(self, later: Self) -> Self {
        Self {
            seconds: self.seconds + later.seconds,
            batches: self.batches + later.batches,
            loss: later.loss.or(self.loss),
            held_out: later.held_out.or(self.held_out),
            before: self.before.or(later.before),
            discarded: self.discarded + later.discarded,
            rests: later.rests,
        }
    }
}

/// Where and for what it learns now.
pub(crate) struct Lesson<'a> {
    pub(crate) speculator: &'a Speculator,
    pub(crate) pool: &'a Pool,
    pub(crate) vocabulary: &'a Vocabulary,
    /// How the answers were drawn.
    pub(crate) draws: Draws,
    /// The device's memory for what is read.
    pub(crate) workspace: RefCell<&'a mut Workspace>,
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
        let lr = training.lr.unwrap_or_else(|| learning_rate(config));
        let earlier = learner.and_then(|raw| Learner::from_raw((config, shape), raw, lr).ok());
        // Weights from elsewhere have learned; an earlier learner knows how much. What versions of another one were worth says nothing.
        let (learner, publication) = match (earlier, published) {
            (Some(learner), _) => (learner, publication),
            (None, Some(weights)) => {
                let learner = Learner::new(config, shape, weights.clone(), lr).taught();
                (learner.with_levels(training.levels), Publication::of_taught())
            }
            (None, None) => {
                let fresh = Learner::fresh(target, shape, seed)?;
                (Learner::new(config, shape, fresh, lr), Publication::default())
            }
        };
        let levels = u32::try_from(learner.levels()).unwrap_or(u32::MAX);
        let head_start = (levels - 1).saturating_sub(learner.steps() / LEVEL_AFTER);
        Ok(Self {
            training: training.clone(),
            shape,
            seed,
            publication,
            drawn: learner.steps(),
            drawn_tokens: 0,
            learner,
            pending: Vec::new(),
            left: None,
            begun: VecDeque::new(),
            read: 0,
            together: training.tokens_max,
            exam: None,
            glance: None,
            sits_again: false,
            first_examined: None,
            examiner: Weak::new(),
            head_start,
            is_worth_it: None,
            tries: Tries::default(),
        })
    }

    /// The learner, without a step that is half taken.
    fn learner(&mut self) -> &Learner {
        self.learner.finish_step(&Pool::default());
        &self.learner
    }

    /// What another one goes on from: the learner, and how its versions did.
    pub(crate) fn left(&mut self) -> maker::Left {
        (Some(Arc::new(self.learner().to_raw())), self.publication.clone())
    }

    /// What one of so many devices at work is to do next. A step comes first that is due, a parameter at a time: others wait for the
    /// learner meanwhile.
    fn next(&mut self, lesson: &Lesson<'_>, at_work: usize, learned: &mut Learned) -> Task {
        if self.is_worth_it == Some(false) {
            return Task::Rest;
        }
        let speculator = lesson.speculator;
        if self.step(lesson, learned) {
            return Task::Step;
        }
        self.end_outdated(speculator, learned);
        if self.publication.is_due() && !self.is_examined() {
            let (mut exam, examiner) = self.begin_exam(speculator);
            exam.newest.get_or_insert_with(|| Newest::Learned(speculator.version() + 1, self.learner.mean()));
            return Task::Examine(exam, examiner);
        }
        if self.pending.is_empty() {
            if let Some((exam, examiner)) = self.first_look(speculator) {
                return Task::Glance(exam, examiner);
            }
            let grown = self.head_start + self.learner.steps() / LEVEL_AFTER;
            self.learner.set_levels(self.training.levels.min(1 + grown as usize));
            self.pending = self.draw(speculator);
            // Of an empty buffer nothing is begun.
            if !self.pending.is_empty() {
                self.begun.push_back(self.pending.len());
            }
            self.drawn_tokens = self.pending.iter().map(Window::size).sum();
        }
        // Its part of the micro-batch, packed, as far as there is time.
        let most = self.together.min(self.drawn_tokens.div_ceil(at_work.max(1)));
        let kept = self.pending.len() - fitting(self.pending.iter().rev(), most);
        let windows = self.pending.split_off(kept);
        if windows.is_empty() { Task::Nothing } else { Task::Read(windows, Box::new(self.learner.reader())) }
    }

    /// Takes in windows that were read, or takes them back; returns gradients that are not needed any more. After an interruption fewer
    /// tokens are read together, and windows of more are halved: there may never be time for all of them.
    fn take_in(&mut self, windows: Vec<Window>, reading: Option<Reading>) -> Option<Gradients> {
        if let Some(reading) = reading {
            self.read += windows.len();
            self.together = (2 * self.together).min(self.training.tokens_max);
            return self.learner.add(reading);
        }
        let tokens: usize = windows.iter().map(Window::size).sum();
        self.together = self.together.min(tokens / 2).max(WINDOW_MIN);
        for window in windows {
            if window.size() <= self.together || window.size() < 2 * WINDOW_MIN {
                self.pending.push(window);
                continue;
            }
            self.pending.extend(window.halves());
            if let Some(windows) = self.begun.back_mut() {
                *windows += 1;
            }
        }
        None
    }

    /// Goes on with a step, or begins one, once there are as many windows as in the micro-batch that was begun first, whichever they
    /// are. Whether there was one.
    fn step(&mut self, lesson: &Lesson<'_>, learned: &mut Learned) -> bool {
        if self.learner.go_on(lesson.pool) {
            return true;
        }
        let Some(windows) = self.begun.front().copied().filter(|windows| self.read >= *windows) else { return false };
        self.begun.pop_front();
        self.read -= windows;
        learned.loss = Some(self.learner.begin_step(lesson.pool));
        learned.batches += 1;
        if self.learner.steps().is_multiple_of(self.publish_every(lesson.speculator)) {
            self.publication.fall_due();
            self.sits_again = false;
        }
        true
    }

    /// Steps between versions; until there is one, devices have nothing to draft with.
    fn publish_every(&self, speculator: &Speculator) -> u32 {
        let every = u32::try_from(self.training.publish_every).unwrap_or(u32::MAX);
        if speculator.version() == 0 { every.min(FIRST_AFTER) } else { every }
    }

    /// Whether a device is reading an exam.
    fn is_examined(&self) -> bool {
        self.examiner.strong_count() > 0
    }

    /// The exam that was begun, if it is of the version in use and this policy, or one on held-out answers; and what says that it is
    /// being read.
    fn begin_exam(&mut self, speculator: &Speculator) -> (Box<Exam>, Arc<()>) {
        let (version, policy) = (speculator.version(), lock(&speculator.buffer).policy());
        let earlier = self.exam.take().filter(|exam| (exam.version(), exam.policy) == (version, policy));
        let exam = earlier.unwrap_or_else(|| {
            let mut windows = self.held_out(speculator, policy);
            // Anything is better than nothing to draft with: what the first version knows is only for the controller.
            if version == 0 {
                windows.truncate(fitting(windows.iter(), EXAM_TOKENS));
            }
            self.exam_of((policy, windows), speculator)
        });
        self.hand_out(exam)
    }

    /// An exam, and what says that it is being read.
    fn hand_out(&mut self, exam: Box<Exam>) -> (Box<Exam>, Arc<()>) {
        let examiner = Arc::default();
        self.examiner = Arc::downgrade(&examiner);
        (exam, examiner)
    }

    /// What two versions guess is compared under one policy. An exam that was not over until it was updated ends with what was read; if
    /// that says nothing, the newest version sits another one, but not a third, so that learning goes on. And where there was no time to find
    /// out whether there is something to learn, there is now.
    fn end_outdated(&mut self, speculator: &Speculator, learned: &mut Learned) {
        let policy = lock(&speculator.buffer).policy();
        let Some(exam) = self.exam.take_if(|exam| exam.policy != policy) else { return };
        let is_alone = exam.published.is_none();
        let is_known = is_alone || exam.duel().guesses >= GUESSES_MIN;
        match exam.newest {
            None if exam.is_in_use_read() || self.is_worth_it.is_some() => {}
            None => self.is_worth_it = Some(self.publication.takes(None)),
            Some(Newest::Drafting(_)) if is_known || self.sits_again => self.judge(exam, speculator, learned),
            Some(Newest::Learned(..)) if self.sits_again && !is_alone => self.publication.pass_over(),
            Some(_) => self.sits_again = true,
        }
    }

    /// What is held out, the newest first, of this policy alone if it has said enough.
    fn held_out(&self, speculator: &Speculator, policy: u32) -> Vec<Window> {
        let mut windows = lock(&speculator.buffer).held_out(self.training.tokens_max);
        let own: Vec<Window> = windows.iter().filter(|window| window.policy() == policy).cloned().collect();
        if own.iter().map(Window::size).sum::<usize>() >= OWN_MIN {
            windows = own;
        }
        windows.reverse();
        windows
    }

    /// The windows of the next micro-batch.
    fn draw(&mut self, speculator: &Speculator) -> Vec<Window> {
        self.drawn += 1;
        let (key, mut draws) = (NoiseKey::new(self.seed, DRAWS, self.drawn, 0, 0), 0);
        let uniform = || {
            draws += 1;
            key.uniform(0, draws)
        };
        lock(&speculator.buffer).draw(self.training.tokens_max, &mut self.left, uniform)
    }

    /// An exam in which the version in use alone reads some of what the policy has said since it was updated, if that says enough and was
    /// not done; and what says that it is being read. Versions that fall due sit exams of their own.
    fn first_look(&mut self, speculator: &Speculator) -> Option<(Box<Exam>, Arc<()>)> {
        let published = speculator.published().filter(|_| !self.is_examined())?;
        let (policy, said) = {
            let buffer = lock(&speculator.buffer);
            let policy = buffer.policy();
            if self.first_examined == Some(policy) || buffer.held_out_now() < TOLD_MIN {
                return None;
            }
            (policy, buffer.held_out(WINDOW_MIN))
        };
        let begun = self.glance.take().filter(|exam| (exam.version(), exam.policy) == (published.version, policy));
        let glance = begun.unwrap_or_else(|| {
            let mut tokens = 0;
            let own = said.into_iter().rev().filter(|window| window.policy() == policy);
            let is_wanted = |window: &Window| {
                tokens += window.size();
                tokens < GLANCE_TOKENS + window.size()
            };
            self.exam_of((policy, own.take_while(is_wanted).collect()), speculator)
        });
        Some(self.hand_out(glance))
    }

    /// An exam that nobody has read anything of.
    fn exam_of(&self, (policy, windows): (u32, Vec<Window>), speculator: &Speculator) -> Box<Exam> {
        let (newest, by_in_use, by_newest) = Default::default();
        let (shape, levels, calibration) = (self.shape, self.training.levels, lock(&speculator.calibration).clone());
        let published = speculator.published();
        Box::new(Exam { policy, windows, shape, levels, calibration, published, newest, by_in_use, by_newest })
    }

    /// Takes note of what the version in use knows of what the policy says, the first time that this is found out: before one that was
    /// taught by it is published.
    fn note_first(&mut self, exam: &Exam, learned: &mut Learned) {
        let shares = exam.by_in_use.own_shares();
        if shares.is_some() && self.first_examined.replace(exam.policy) != Some(exam.policy) {
            learned.before = shares;
        }
    }

    /// Scores the newest version against the one in use, and does what follows.
    fn judge(&mut self, exam: Box<Exam>, speculator: &Speculator, learned: &mut Learned) {
        let duel = exam.duel();
        let Exam { policy, published, newest: Some(Newest::Drafting(version)), by_in_use, by_newest, .. } = *exam
        else {
            return;
        };
        learned.held_out = by_newest.shares().or(learned.held_out);
        let verdict = self.publication.judge(duel);
        speculator.examined(if verdict == Verdict::Publish { &by_newest.guesses } else { &by_in_use.guesses });
        match verdict {
            Verdict::Leave => return,
            Verdict::Publish => {
                // Of the version in use it is known already.
                lock(&speculator.calibration).learn(&by_newest.guesses);
                speculator.publish(version);
                self.first_examined = Some(policy);
            }
            Verdict::Discard => learned.discarded += 1,
            Verdict::RollBack => {
                learned.discarded += 1;
                if let Some(published) = published {
                    self.learner.restart((*published.weights).clone());
                }
            }
        }
        // A tail may be longer than there is something to learn: whoever learns finds this at its next look.
        let Tries { count, gain } = &mut self.tries;
        (*count, *gain) = (*count + 1, *gain + duel.gain());
        if *count >= TRIES && *gain <= 0.0 && self.publication.has_settled() {
            self.is_worth_it = Some(false);
        }
    }
}

/// What a device is to do.
enum Task {
    /// Read windows with these weights.
    Read(Vec<Window>, Box<Reader>),
    /// Have versions sit an exam; who holds the second reads it.
    Examine(Box<Exam>, Arc<()>),
    /// Have the version in use read what this policy has said; who holds the second does.
    Glance(Box<Exam>, Arc<()>),
    /// A part of a step of the optimiser was taken.
    Step,
    /// There is nothing to learn from.
    Nothing,
    /// Versions have stopped getting better.
    Rest,
}

/// How many of these windows have together at most so many tokens; at least one, if there are any.
fn fitting<'a>(windows: impl Iterator<Item = &'a Window>, tokens_max: usize) -> usize {
    let mut tokens = 0;
    let fits = |(i, window): &(usize, &Window)| {
        tokens += window.size();
        *i == 0 || tokens <= tokens_max
    };
    windows.enumerate().take_while(fits).count()
}

fn share(count: usize, of: usize) -> f64 {
    count as f64 / of.max(1) as f64
}

#[cfg(test)]
mod tests;
