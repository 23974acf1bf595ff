//! Versions on held-out answers: guess by guess, as they would draft.

use models::Weights;
use models::drafter::Calibration;
use models::drafter::buffer::Window;
use models::drafter::learn::{Guesses, guess};
use models::optim::Mean;
use state::drafter::{Duel, GUESSES_MIN};
use state::plan::DrafterShape;

use super::{Lesson, fitting, share};
use crate::error::Result;
use crate::speculator::Published;

/// Tokens that one version reads before it is the other one's turn, unless one window has more or there is no time for as many.
pub(super) const EXAM_TOKENS: usize = 128;
/// Tokens from which it is found out what the update has left of a version.
pub(super) const GLANCE_TOKENS: usize = 192;
/// Guesses of what one policy said of which a share is told: half of the quickstart's answers have fewer tokens than say enough for a
/// verdict, and a line over many steps averages what luck there is.
pub(super) const TOLD_MIN: usize = 24;

/// Held-out windows, and what two versions make of them, as far as they were read. It outlives interruptions, but no update of the
/// policy, and is over as soon as it is clear which of the two is better.
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
    /// Of what the policy of the exam said: guesses, those that were right at once, and within three.
    own: [usize; 3],
    read: usize,
    together: usize,
}

impl Default for Paper {
    fn default() -> Self {
        Self { guesses: Guesses::default(), own: [0; 3], read: 0, together: EXAM_TOKENS }
    }
}

impl Exam {
    /// Number of the version in use; 0 if there is none.
    pub(super) fn version(&self) -> u64 {
        self.published.as_ref().map_or(0, |published| published.version)
    }

    /// Share of its guesses that the version in use has right, if they are enough to tell something.
    pub(super) fn share_in_use(&self) -> Option<f64> {
        let guesses = &self.by_in_use.guesses.right;
        let right = guesses.iter().filter(|right| **right).count();
        (guesses.len() >= GUESSES_MIN).then(|| share(right, guesses.len()))
    }

    /// Whether it is known what the version in use, if there is one, makes of all windows.
    pub(super) fn is_in_use_read(&self) -> bool {
        self.read_in_use_to() >= self.windows.len()
    }

    /// Windows that the version in use has read: where there is none, the newest one has them for itself.
    fn read_in_use_to(&self) -> usize {
        if self.published.is_some() { self.by_in_use.read } else { self.windows.len() }
    }

    /// How the two compare on the windows that both have read.
    pub(super) fn duel(&self) -> Duel {
        let in_use = self.published.as_ref().map(|_| self.by_in_use.guesses.right.as_slice());
        Duel::of(&self.by_newest.guesses.right, in_use)
    }

    /// Goes on, one version after the other; whether it is over.
    pub(super) fn read(&mut self, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        loop {
            let in_use = self.read_in_use_to();
            if !self.read_newest(self.turn(self.by_newest.read).min(in_use), lesson, stop)? {
                return Ok(false);
            }
            if self.duel().is_clear(self.levels) {
                return Ok(true);
            }
            if self.by_newest.read < in_use {
                continue;
            }
            if self.is_in_use_read() {
                return Ok(true);
            }
            if !self.read_in_use(self.turn(self.by_in_use.read), lesson, stop)? {
                return Ok(false);
            }
        }
    }

    /// The end of the windows that a version reads in its turn, from this one on.
    fn turn(&self, from: usize) -> usize {
        from + fitting(self.windows[from..].iter(), EXAM_TOKENS)
    }

    /// The newest version reads on up to the end of so many windows; whether it has.
    fn read_newest(&mut self, windows: usize, lesson: &Lesson<'_>, stop: &mut dyn FnMut() -> bool) -> Result<bool> {
        // Here, and not where the learner is held, for which others wait: numbers may be rounded for it.
        if let Some(Newest::Learned(version, mean)) = &self.newest {
            if stop() {
                return Ok(false);
            }
            self.newest = Some(Newest::Drafting(Published::new(*version, &mean.weights())));
        }
        let Some(Newest::Drafting(newest)) = &self.newest else { return Ok(false) };
        let version = (&newest.to_draft, self.shape, self.levels);
        let calibration = &self.calibration;
        self.by_newest.go_on(version, (&self.windows[..windows], self.policy, calibration), lesson, stop)
    }

    /// The same with the version in use.
    pub(super) fn read_in_use(
        &mut self,
        windows: usize,
        lesson: &Lesson<'_>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        let Some(published) = &self.published else { return Ok(true) };
        let version = (&published.to_draft, self.shape, self.levels);
        let calibration = &self.calibration;
        self.by_in_use.go_on(version, (&self.windows[..windows], self.policy, calibration), lesson, stop)
    }
}

impl Paper {
    /// Shares of tokens that the version guessed at once, and within three guesses: of those of the exam's policy, or of all if they
    /// are few; nothing if these are, too.
    pub(super) fn shares(&self) -> Option<(f64, f64)> {
        self.own_shares().or_else(|| shares(self.guesses.first, GUESSES_MIN))
    }

    /// The same of those of the exam's policy.
    pub(super) fn own_shares(&self) -> Option<(f64, f64)> {
        shares(self.own, TOLD_MIN)
    }

    /// A version reads these windows, as far as it has not; whether it has read all.
    fn go_on(
        &mut self,
        version: (&Weights, DrafterShape, usize),
        (windows, policy, calibration): (&[Window], u32, &Calibration),
        lesson: &Lesson<'_>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        while let Some(rest) = windows.get(self.read..).filter(|rest| !rest.is_empty()) {
            if stop() {
                return Ok(false);
            }
            let is_own = rest[0].policy() == policy;
            let alike = rest.iter().take_while(|window| (window.policy() == policy) == is_own);
            let some = &rest[..fitting(alike, self.together)];
            let workspace = &mut **lesson.workspace.borrow_mut();
            match guess(lesson.pool, lesson.vocabulary, version, some, (lesson.draws, calibration), workspace)? {
                None => self.together /= 2,
                Some(guesses) => {
                    if is_own {
                        self.own.iter_mut().zip(guesses.first).for_each(|(sum, more)| *sum += more);
                    }
                    self.guesses.extend(guesses);
                    self.read += some.len();
                }
            }
        }
        Ok(true)
    }
}

fn shares([guesses, right, among_three]: [usize; 3], least: usize) -> Option<(f64, f64)> {
    (guesses >= least).then(|| (share(right, guesses), share(among_three, guesses)))
}
