//! How the learned drafter learns while devices would be idle: packed windows of answers until a device is needed, a step of the
//! optimiser every micro-batch, and versions that devices use once held-out answers have shown that they guess no worse.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use kernels::{Draws, NoiseKey, Pool};
use models::drafter::buffer::Window;
use models::drafter::learn::{Guesses, Learner, Reader, Reading, Workspace, guess, learning_rate};
use models::drafter::{Calibration, Vocabulary};
use models::optim::Gradients;
use models::{RawWeights, Target, Weights};
use state::drafter::{Duel, GUESSES_MIN, Publication, Verdict};
use state::plan::{DrafterShape, DrafterTraining};

use crate::error::Result;
use crate::speculator::{Published, Speculator, lock};

/// Separates the noise that draws micro-batches from others.
const DRAWS: u32 = 6;
/// Steps after which the first version is published, at most.
const FIRST_AFTER: u32 = 8;
/// Steps after which another level is learned: what is said from a bad guess teaches nothing, and costs as much.
const LEVEL_AFTER: u32 = 400;
/// Tokens of the shortest windows that are made of longer ones.
const WINDOW_MIN: usize = 64;
/// Tokens of an exam that are read together, unless one window has more or there is no time for as many.
const EXAM_TOKENS: usize = 256;
/// Between two looks at what another device finds out.
const A_MOMENT: Duration = Duration::from_micros(200);

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
    /// A version waits for its score.
    is_due: bool,
    /// An exam that was begun.
    exam: Option<Box<Exam>>,
    /// Who reads an exam, if anybody does: a lost device leaves none behind.
    examiner: Weak<()>,
    /// Levels that are learned from the start, beside the first.
    head_start: u32,
    /// Devices that learn, and what one of them found out for all.
    at_work: usize,
    is_worth_it: Option<bool>,
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
    /// How the answers were drawn.
    pub(crate) draws: Draws,
    /// The device's memory for what is read.
    pub(crate) workspace: RefCell<&'a mut Workspace>,
}

/// Held-out windows, and what two versions make of them, as far as they were read. It outlives interruptions: idle times may be
/// shorter than an exam.
struct Exam {
    windows: Vec<Window>,
    shape: DrafterShape,
    levels: usize,
    /// How logits were believed when it began.
    calibration: Calibration,
    /// The version in use, and the newest one, if it is to be scored.
    published: Option<Published>,
    newest: Option<Published>,
    by_in_use: Paper,
    by_newest: Paper,
}

/// Guesses of one version, how many windows they are of, and how many tokens are read together next.
struct Paper {
    guesses: Guesses,
    read: usize,
    together: usize,
}

impl Default for Paper {
    fn default() -> Self {
        Self { guesses: Guesses::default(), read: 0, together: EXAM_TOKENS }
    }
}

impl Exam {
    /// Goes on; whether it is over.
    fn read(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        let is_over = self.read_in_use(lesson, stop)?;
        let Some(newest) = self.newest.as_ref().filter(|_| is_over) else { return Ok(false) };
        self.by_newest.go_on(
            (&newest.to_draft, self.shape, self.levels),
            (&self.windows, &self.calibration),
            lesson,
            stop,
        )
    }

    /// The same with the version in use alone.
    fn read_in_use(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        let Some(published) = &self.published else { return Ok(true) };
        self.by_in_use.go_on(
            (&published.to_draft, self.shape, self.levels),
            (&self.windows, &self.calibration),
            lesson,
            stop,
        )
    }
}

impl Paper {
    /// Goes on with a version's paper; whether it is complete.
    fn go_on(
        &mut self,
        version: (&Weights, DrafterShape, usize),
        (windows, calibration): (&[Window], &Calibration),
        lesson: &Lesson<'_>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        while let Some(rest) = windows.get(self.read..).filter(|rest| !rest.is_empty()) {
            if stop() {
                return Ok(false);
            }
            let some = &rest[..fitting(rest.iter(), self.together)];
            let workspace = &mut **lesson.workspace.borrow_mut();
            match guess(lesson.pool, lesson.vocabulary, version, some, (lesson.draws, calibration), workspace)? {
                None => self.together /= 2,
                Some(guesses) => {
                    self.guesses.extend(guesses);
                    self.read += some.len();
                }
            }
        }
        Ok(true)
    }
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
        // Weights from elsewhere have learned; an earlier learner knows how much.
        let learner = match (earlier, published) {
            (Some(learner), _) => learner,
            (None, Some(weights)) => {
                Learner::new(config, shape, weights.clone(), lr).taught().with_levels(training.levels)
            }
            (None, None) => Learner::new(config, shape, Learner::fresh(target, shape, seed)?, lr),
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
            is_due: false,
            exam: None,
            examiner: Weak::new(),
            head_start,
            at_work: 0,
            is_worth_it: None,
        })
    }

    /// The learner, without a step that is half taken.
    fn learner(&mut self) -> &Learner {
        self.learner.finish_step(&Pool::default());
        &self.learner
    }

    /// What another one goes on from: the learner, and how its versions did.
    pub(crate) fn left(&mut self) -> (Option<RawWeights>, Publication) {
        (Some(self.learner().to_raw()), self.publication.clone())
    }

    /// Learns until `stop` says so, which is asked between readings, or until nothing is to be gained for now. Windows whose reading
    /// is interrupted are read again another time. Several devices may learn together.
    pub(crate) fn go_on(
        learning: &Mutex<Self>,
        lesson: &Lesson<'_>,
        mut stop: impl FnMut() -> bool,
    ) -> Result<Learned> {
        // An order to stop is given once.
        let mut has_stopped = false;
        let stop = &mut || {
            has_stopped = has_stopped || stop();
            has_stopped
        };
        let mut learned = Learned::default();
        lock(learning).at_work += 1;
        let _leaving = Leaving(learning);
        if !Self::is_worth_it(learning, lesson, stop)? {
            return Ok(learned);
        }
        while !stop() {
            let task = lock(learning).next(lesson, &mut learned);
            match task {
                Task::Read(windows, reader) => {
                    let workspace = &mut **lesson.workspace.borrow_mut();
                    let reading = reader.read(lesson.pool, lesson.vocabulary, &windows, workspace)?;
                    let spent = lock(learning).take_in(windows, reading);
                    spent.into_iter().for_each(|spent| workspace.give_back(spent));
                }
                Task::Examine(mut exam, examiner) => {
                    let is_over = exam.read(lesson, stop)?;
                    let mut learning = lock(learning);
                    drop(examiner);
                    match is_over {
                        true => learning.judge(exam, lesson.speculator, &mut learned),
                        false => learning.exam = Some(exam),
                    }
                }
                Task::Step => {}
                Task::Rest => break,
            }
        }
        Ok(learned)
    }

    /// What a device is to do next. A step comes first that is due, a parameter at a time: others wait for the learner meanwhile.
    fn next(&mut self, lesson: &Lesson<'_>, learned: &mut Learned) -> Task {
        let speculator = lesson.speculator;
        if self.step(lesson, learned) {
            return Task::Step;
        }
        if self.is_due && !self.is_examined() {
            let (mut exam, examiner) = self.begin_exam(speculator);
            exam.newest.get_or_insert_with(|| Published::new(speculator.version() + 1, &self.learner.average()));
            return Task::Examine(exam, examiner);
        }
        if self.pending.is_empty() {
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
        let most = self.together.min(self.drawn_tokens.div_ceil(self.at_work.max(1)));
        let kept = self.pending.len() - fitting(self.pending.iter().rev(), most);
        let windows = self.pending.split_off(kept);
        if windows.is_empty() { Task::Rest } else { Task::Read(windows, Box::new(self.learner.reader())) }
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
        learned.loss = self.learner.begin_step(lesson.pool);
        learned.batches += 1;
        self.is_due |= self.learner.steps().is_multiple_of(self.publish_every(lesson.speculator));
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

    /// While it has settled, the version in use has to show first whether the target has moved on. An opportunity that is too
    /// short for that is used up by it. One device finds out for all that are at work.
    fn is_worth_it(learning: &Mutex<Self>, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        loop {
            let mut held = lock(learning);
            if held.is_worth_it.is_none() && (!held.publication.has_settled() || lesson.speculator.version() == 0) {
                held.is_worth_it = Some(held.publication.takes(None));
            }
            if let Some(is_worth_it) = held.is_worth_it {
                return Ok(is_worth_it);
            }
            if !held.is_examined() {
                let (exam, examiner) = held.begin_exam(lesson.speculator);
                drop(held);
                return Self::has_moved_on(learning, (exam, examiner), lesson, stop);
            }
            drop(held);
            if stop() {
                return Ok(false);
            }
            std::thread::sleep(A_MOMENT);
        }
    }

    fn has_moved_on(
        learning: &Mutex<Self>,
        (mut exam, examiner): (Box<Exam>, Arc<()>),
        lesson: &Lesson<'_>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        let is_over = exam.read_in_use(lesson, stop)?;
        let mut held = lock(learning);
        drop(examiner);
        let guesses = &exam.by_in_use.guesses.right;
        let right = guesses.iter().filter(|right| **right).count();
        let share = (guesses.len() >= GUESSES_MIN).then(|| share(right, guesses.len()));
        // A newer version that waits for its score goes on with the same exam.
        held.exam = (!is_over || held.is_due).then_some(exam);
        if !is_over {
            return Ok(false);
        }
        let takes = held.publication.takes(share);
        held.is_worth_it = Some(takes);
        Ok(takes)
    }

    /// The exam that was begun, if it is of the version in use, or one on held-out answers; and what says that it is being read.
    fn begin_exam(&mut self, speculator: &Speculator) -> (Box<Exam>, Arc<()>) {
        let version = speculator.version();
        let earlier = self.exam.take().filter(|exam| exam.published.as_ref().map_or(0, |p| p.version) == version);
        let exam = earlier.unwrap_or_else(|| {
            // Anything is better than nothing to draft with: the first version need not show what it knows.
            let held_out = || lock(&speculator.buffer).held_out(self.training.tokens_max);
            let windows = if version > 0 { held_out() } else { Vec::new() };
            let (newest, by_in_use, by_newest) = Default::default();
            let (shape, levels, calibration) =
                (self.shape, self.training.levels, lock(&speculator.calibration).clone());
            let published = speculator.published();
            Box::new(Exam { windows, shape, levels, calibration, published, newest, by_in_use, by_newest })
        });
        let examiner = Arc::default();
        self.examiner = Arc::downgrade(&examiner);
        (exam, examiner)
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

    /// Scores the newest version against the one in use, and does what follows.
    fn judge(&mut self, exam: Box<Exam>, speculator: &Speculator, learned: &mut Learned) {
        let Exam { published, newest: Some(version), by_in_use, by_newest, .. } = *exam else { return };
        self.is_due = false;
        let (newest, in_use) = (by_newest.guesses, by_in_use.guesses);
        let duel = Duel::of(&newest.right, published.as_ref().map(|_| in_use.right.as_slice()));
        let [guesses, right, among_three] = newest.first;
        if guesses >= GUESSES_MIN {
            learned.held_out = Some((share(right, guesses), share(among_three, guesses)));
        }
        match self.publication.judge(duel) {
            Verdict::Publish => {
                // Of the version in use it is known already.
                lock(&speculator.calibration).learn(&newest);
                speculator.publish(version);
            }
            Verdict::Discard => learned.discarded += 1,
            Verdict::RollBack => {
                learned.discarded += 1;
                if let Some(published) = published {
                    self.learner.restart((*published.weights).clone());
                }
            }
        }
    }
}

/// What a device is to do.
enum Task {
    /// Read windows with these weights.
    Read(Vec<Window>, Box<Reader>),
    /// Have versions sit an exam; who holds the second reads it.
    Examine(Box<Exam>, Arc<()>),
    /// A part of a step of the optimiser was taken.
    Step,
    /// There is nothing to learn from.
    Rest,
}

/// A device at work; it leaves also when it is lost.
struct Leaving<'a>(&'a Mutex<Learning>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut learning = lock(self.0);
        learning.at_work -= 1;
        // The next one to come is another opportunity.
        learning.is_worth_it = learning.is_worth_it.filter(|_| learning.at_work > 0);
    }
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
