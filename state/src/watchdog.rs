//! Watches the learned drafter's version in use, and puts it off until there is another one if it is of no use whatever is tried.
//!
//! * **WATCH-1** A version that guesses nothing right, alone or beside what another drafter proposes, is put off: its weights or its
//!   target are not what they should be.
//! * **WATCH-2** At a batch size where a version in most cycles takes longer to draft than its draft could save if all of it were right, it
//!   is put off: each level saves one forward of the target at most.
//! * **WATCH-3** A newer version begins with nothing against it, and an older one is not in use any more.
//!
//! Neither is for a controller to find out: one that always drafts would never stop.

use serde::{Deserialize, Serialize};

use crate::speculation::controller::{BUCKETS, bucket};

/// Request-cycles after which it is known whether a version guesses anything.
const GUESSED_MIN: f64 = 512.0;
/// Cycles at one batch size after which it is known how long it takes.
const TIMED_MIN: f64 = 256.0;
/// Right guesses of a request-cycle below which a version guesses as good as nothing right.
const FLOOR: f64 = 0.02;

/// Why a version is put off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PutOff {
    /// Its guesses are hardly ever right.
    GuessesNothing,
    /// It drafts for longer than its drafts could ever save.
    TakesTooLong,
}

impl std::fmt::Display for PutOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::GuessesNothing => "it guesses nothing right",
            Self::TakesTooLong => "it drafts for longer than its drafts could save",
        })
    }
}

/// What a cycle showed of a version.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Watched {
    /// Requests that were decoded together.
    pub batch: usize,
    /// Those of them for which it guessed, and its guesses that were right.
    pub guessed: (usize, usize),
    /// Levels of the deepest draft, and seconds of drafting and of the target's forward; nothing where prompts went along, whose rows take
    /// time of their own.
    pub timed: Option<(usize, f64, f64)>,
}

/// Of two kinds of things, how many were seen lately.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Counts(f64, f64);

impl Counts {
    /// Adds more, and forgets half once there are twice as many as needed: what was good for long may be of no use any more.
    fn add(&mut self, more: (f64, f64), needed: f64) {
        *self = Self(self.0 + more.0, self.1 + more.1);
        while self.0 >= 2.0 * needed {
            *self = Self(self.0 / 2.0, self.1 / 2.0);
        }
    }
}

/// The watchdog of one run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Watchdog {
    version: u64,
    /// Request-cycles with guesses, and right guesses.
    guessed: Counts,
    /// By bucket of batch sizes: cycles, and those that took too long.
    timed: [Counts; BUCKETS],
}

impl Watchdog {
    /// Takes in what a version did.
    pub fn observe(&mut self, version: u64, Watched { batch, guessed, timed }: Watched) {
        if version > self.version {
            *self = Self { version, ..Self::default() };
        }
        if version != self.version || guessed.0 == 0 {
            return;
        }
        self.guessed.add((guessed.0 as f64, guessed.1 as f64), GUESSED_MIN);
        if let Some((levels, draft_s, target_s)) = timed {
            let is_late = draft_s > levels as f64 * target_s;
            self.timed[bucket(batch)].add((1.0, f64::from(u8::from(is_late))), TIMED_MIN);
        }
    }

    /// The same on other devices: what took its time there says nothing here.
    #[must_use]
    pub fn elsewhere(self) -> Self {
        Self { timed: Default::default(), ..self }
    }

    /// Whether this version is put off for so many requests, and why.
    #[must_use]
    pub fn put_off(&self, version: u64, batch: usize) -> Option<PutOff> {
        self.guesses_nothing(version).or_else(|| {
            let is_late = version == self.version && self.is_late(bucket(batch));
            is_late.then_some(PutOff::TakesTooLong)
        })
    }

    /// Whether this version is put off at every batch size of which anything is known.
    #[must_use]
    pub fn put_off_everywhere(&self, version: u64) -> Option<PutOff> {
        self.guesses_nothing(version).or_else(|| {
            let mut known = (0..BUCKETS).filter(|bucket| self.timed[*bucket].0 >= TIMED_MIN).peekable();
            let is_late = version == self.version && known.peek().is_some() && known.all(|bucket| self.is_late(bucket));
            is_late.then_some(PutOff::TakesTooLong)
        })
    }

    fn guesses_nothing(&self, version: u64) -> Option<PutOff> {
        let Counts(cycles, right) = self.guessed;
        let is_useless = version == self.version && cycles >= GUESSED_MIN && right < FLOOR * cycles;
        is_useless.then_some(PutOff::GuessesNothing)
    }

    fn is_late(&self, bucket: usize) -> bool {
        let Counts(cycles, late) = self.timed[bucket];
        cycles >= TIMED_MIN && 2.0 * late > cycles
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guesses(cycles: usize, right: usize) -> Watched {
        Watched { batch: 1, guessed: (cycles, right), timed: None }
    }

    /// A cycle of so many requests, of two levels, in a target of a second.
    fn drafts(batch: usize, draft_s: f64) -> Watched {
        Watched { batch, guessed: (batch, 2 * batch), timed: Some((2, draft_s, 1.0)) }
    }

    #[test]
    fn a_version_that_guesses_nothing_right_is_put_off() {
        let mut watchdog = Watchdog::default();
        watchdog.observe(3, guesses(500, 0));
        assert_eq!(watchdog.put_off(3, 1), None, "too early to tell");
        watchdog.observe(3, guesses(20, 1));
        assert_eq!((watchdog.put_off(3, 1), watchdog.put_off(4, 1)), (Some(PutOff::GuessesNothing), None));
        assert_eq!(watchdog.elsewhere().put_off_everywhere(3), Some(PutOff::GuessesNothing));
        watchdog.observe(4, guesses(1000, 100));
        watchdog.observe(3, guesses(1000, 0));
        assert_eq!(
            (watchdog.put_off(4, 1), watchdog.put_off(3, 1)),
            (None, None),
            "an older one is not in use any more"
        );
        (0..1000).for_each(|_| watchdog.observe(4, guesses(500, 1000)));
        assert_eq!(watchdog.put_off(4, 1), None);
        (0..14).for_each(|_| watchdog.observe(4, guesses(500, 0)));
        assert_eq!(watchdog.put_off(4, 1), Some(PutOff::GuessesNothing), "the target has moved away from it");
    }

    #[test]
    fn a_version_that_takes_longer_than_it_could_save_is_put_off_there() {
        let mut watchdog = Watchdog::default();
        (0..255).for_each(|_| watchdog.observe(1, drafts(16, 2.1)));
        assert_eq!(watchdog.put_off(1, 16), None, "too early to tell");
        watchdog.observe(1, drafts(16, 2.1));
        assert_eq!((watchdog.put_off(1, 16), watchdog.put_off(1, 1)), (Some(PutOff::TakesTooLong), None));
        assert_eq!(watchdog.put_off_everywhere(1), Some(PutOff::TakesTooLong), "of other batch sizes nothing is known");
        assert_eq!(watchdog.elsewhere().put_off(1, 16), None);
        // The machine does something else now and then.
        (0..600).for_each(|i| watchdog.observe(1, drafts(1, if i % 3 == 0 { 9.0 } else { 1.9 })));
        assert_eq!((watchdog.put_off(1, 1), watchdog.put_off_everywhere(1)), (None, None));
        assert_eq!(watchdog.put_off(1, 16), Some(PutOff::TakesTooLong));
    }

    proptest! {
        #[test]
        fn invariants_hold(cycles in proptest::collection::vec((0..3_u64, 1..40_usize, 0..9_usize, 0.0..4.0_f64), 1..2_000)) {
            let (mut watchdog, mut newest) = (Watchdog::default(), 0);
            // Since the newest version: its guesses, right ones, and late cycles by bucket.
            let (mut guessed, mut right, mut late) = (0, 0, [0; BUCKETS]);
            for (step, batch, hits, draft_s) in cycles {
                let version = newest + step / 2;
                if version > newest {
                    (newest, guessed, right, late) = (version, 0, 0, [0; BUCKETS]);
                }
                watchdog.observe(version, Watched { guessed: (batch, hits), ..drafts(batch, draft_s) });
                (guessed, right) = (guessed + batch, right + hits);
                late[bucket(batch)] += usize::from(draft_s > 2.0);
                for batch in [1, 2, 4, 8, 16, 32, 64] {
                    match watchdog.put_off(newest, batch) {
                        Some(PutOff::GuessesNothing) => prop_assert!(guessed >= 512, "WATCH-1: {guessed} guesses, {right} right"),
                        Some(PutOff::TakesTooLong) => prop_assert!(late[bucket(batch)] > 128, "WATCH-2"),
                        None => {}
                    }
                    prop_assert!(watchdog.put_off(newest + 1, batch).is_none(), "WATCH-3");
                    prop_assert!(newest == 0 || watchdog.put_off(newest - 1, batch).is_none(), "WATCH-3");
                }
            }
        }
    }
}
