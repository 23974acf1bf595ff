//! Versions on held-out answers: guess by guess, as they would draft.

use models::Weights;
use models::drafter::Calibration;
use models::drafter::buffer::Window;
use models::drafter::learn::{Guesses, guess};
use models::optim::Mean;
use state::drafter::GUESSES_MIN;
use state::plan::DrafterShape;

use super::{Lesson, fitting, share};
use crate::error::Result;
use crate::speculator::Published;

/// Tokens of an exam that are read together, unless one window has more or there is no time for as many.
const EXAM_TOKENS: usize = 256;

/// Held-out windows, and what two versions make of them, as far as they were read. It outlives interruptions, but no update of the
/// policy.
pub(super) struct Exam {
    /// The policy that was rolled out when it began.
    pub(super) policy: u32,
    pub(super) windows: Vec<Window>,
    pub(super) shape: DrafterShape,
    pub(super) levels: usize,
    /// How logits were believed when it began.
    pub(super) calibration: Calibration,
    /// The version in use, and the newest one, if it is to be scored.
    pub(super) published: Option<Published>,
    pub(super) newest: Option<Newest>,
    pub(super) by_in_use: Paper,
    pub(super) by_newest: Paper,
}

/// A version that is to be scored.
pub(super) enum Newest {
    /// What it is to be made of.
    Learned(u64, Mean),
    /// As it drafts.
    Drafting(Published),
}

/// Guesses of one version, how many windows they are of, and how many tokens are read together next.
pub(super) struct Paper {
    pub(super) guesses: Guesses,
    read: usize,
    together: usize,
}

impl Default for Paper {
    fn default() -> Self {
        Self { guesses: Guesses::default(), read: 0, together: EXAM_TOKENS }
    }
}

impl Exam {
    /// Number of the version in use; 0 if there is none.
    pub(super) fn version(&self) -> u64 {
        self.published.as_ref().map_or(0, |published| published.version)
    }

    /// Windows that each of the two has read, on average.
    pub(super) fn read_by_each(&self) -> usize {
        self.by_in_use.read.midpoint(self.by_newest.read)
    }

    /// Whether it is known what the version in use makes of all windows.
    pub(super) fn is_in_use_read(&self) -> bool {
        self.by_in_use.read >= self.windows.len()
    }

    /// Goes on; whether it is over.
    pub(super) fn read(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        if !self.read_in_use(lesson, stop)? {
            return Ok(false);
        }
        // Here, and not where the learner is held, for which others wait: numbers may be rounded for it.
        if let Some(Newest::Learned(version, mean)) = &self.newest {
            if stop() {
                return Ok(false);
            }
            self.newest = Some(Newest::Drafting(Published::new(*version, &mean.weights())));
        }
        let Some(Newest::Drafting(newest)) = &self.newest else { return Ok(false) };
        self.by_newest.go_on(
            (&newest.to_draft, self.shape, self.levels),
            (&self.windows, &self.calibration),
            lesson,
            stop,
        )
    }

    /// The same with the version in use alone.
    pub(super) fn read_in_use(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
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
    /// Shares of tokens that the version guessed at once, and within three guesses; nothing of few.
    pub(super) fn shares(&self) -> Option<(f64, f64)> {
        let [guesses, right, among_three] = self.guesses.first;
        (guesses >= GUESSES_MIN).then(|| (share(right, guesses), share(among_three, guesses)))
    }

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
