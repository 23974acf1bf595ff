//! Watches the learned drafter's version in use, and puts it off until there is another one if it is of no use whatever is tried.
//!
//! * **WATCH-1** A version that guesses nothing right, alone or beside what another drafter proposes, is put off: its weights or its
//!   target are not what they should be.
//! * **WATCH-2** A version that in most cycles takes longer to draft than its draft could save if all of it were right is put off: each
//!   level saves one forward of the target at most.
//! * **WATCH-3** A newer version begins with nothing against it, and an older one is not in use any more.
//!
//! Neither is for a controller to find out: one that always drafts would never stop.

use serde::{Deserialize, Serialize};

/// Request-cycles after which a version is known well enough to be put off.
const CYCLES: f64 = 512.0;
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

/// What one cycle, or several, showed of a version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    /// Request-cycles in which it guessed.
    pub cycles: f64,
    /// Guesses that were right.
    pub right: f64,
    /// Those of them in which drafting took no longer than its draft could have saved.
    pub in_time: f64,
    /// Those in which it took longer.
    pub late: f64,
}

impl Watched {
    fn all(&mut self) -> [&mut f64; 4] {
        let Self { cycles, right, in_time, late } = self;
        [cycles, right, in_time, late]
    }
}

/// The watchdog of one run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Watchdog {
    version: u64,
    sum: Watched,
}

impl Watchdog {
    /// Takes in what a version did.
    pub fn observe(&mut self, version: u64, watched: Watched) {
        if version > self.version {
            *self = Self { version, ..Self::default() };
        }
        if version == self.version {
            let mut watched = watched;
            self.sum.all().into_iter().zip(watched.all()).for_each(|(sum, new)| *sum += *new);
        }
        // A version that was good for long may be of no use any more.
        while self.sum.cycles >= 2.0 * CYCLES {
            self.sum.all().into_iter().for_each(|sum| *sum /= 2.0);
        }
    }

    /// Whether this version is put off, and why.
    #[must_use]
    pub fn put_off(&self, version: u64) -> Option<PutOff> {
        let Watched { cycles, right, in_time, late } = self.sum;
        if version != self.version || cycles < CYCLES {
            return None;
        }
        if right < FLOOR * cycles {
            return Some(PutOff::GuessesNothing);
        }
        (late > in_time).then_some(PutOff::TakesTooLong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guesses(cycles: u32, right: u32) -> Watched {
        Watched { cycles: cycles.into(), right: right.into(), in_time: cycles.into(), late: 0.0 }
    }

    #[test]
    fn a_version_that_guesses_nothing_right_is_put_off() {
        let mut watchdog = Watchdog::default();
        watchdog.observe(3, guesses(500, 0));
        assert_eq!(watchdog.put_off(3), None, "too early to tell");
        watchdog.observe(3, guesses(20, 1));
        assert_eq!((watchdog.put_off(3), watchdog.put_off(4)), (Some(PutOff::GuessesNothing), None));
        watchdog.observe(4, guesses(1000, 100));
        watchdog.observe(3, guesses(1000, 0));
        assert_eq!((watchdog.put_off(4), watchdog.put_off(3)), (None, None), "an older one is not in use any more");
        (0..1000).for_each(|_| watchdog.observe(4, guesses(500, 1000)));
        assert_eq!(watchdog.put_off(4), None);
        (0..14).for_each(|_| watchdog.observe(4, guesses(500, 0)));
        assert_eq!(watchdog.put_off(4), Some(PutOff::GuessesNothing), "the target has moved away from it");
    }

    #[test]
    fn a_version_that_takes_longer_than_it_could_save_is_put_off() {
        let mut watchdog = Watchdog::default();
        let late = Watched { cycles: 16.0, right: 30.0, in_time: 0.0, late: 16.0 };
        let in_time = Watched { in_time: 16.0, late: 0.0, ..late };
        (0..31).for_each(|_| watchdog.observe(1, late));
        assert_eq!(watchdog.put_off(1), None, "too early to tell");
        watchdog.observe(1, late);
        assert_eq!(watchdog.put_off(1), Some(PutOff::TakesTooLong));
        (0..64).for_each(|i| watchdog.observe(2, if i % 3 == 0 { late } else { in_time }));
        assert_eq!(watchdog.put_off(2), None, "the machine does something else now and then");
    }
}
