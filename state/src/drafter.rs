//! What becomes of a learned drafter: which of its versions devices use, and when its learning may rest.
//!
//! * **DRAFT-1** A version that guesses worse than the one in use is not published, nor one of which nothing is known beside one of which
//!   something is, unless it is the ninth in a row.
//! * **DRAFT-2** After [`ROLLBACK_AFTER`] versions in a row that are worse by more than chance explains, learning goes on from the one in
//!   use.
//! * **DRAFT-3** Learning rests only while its versions have stopped getting better, and never for more than
//!   [`PAUSE_MAX`] opportunities in a row.
//! * **DRAFT-4** As soon as the version in use guesses clearly worse than it did, because the target has moved on, the rest ends.
//!
//! Scores are of answers that were held out from learning.

use serde::{Deserialize, Serialize};

/// Versions in a row that may be worse than the one in use.
pub const ROLLBACK_AFTER: u32 = 4;
/// Opportunities to learn that are left out in a row, at most.
pub const PAUSE_MAX: u32 = 8;
/// Versions in a row that are left out because nothing is known of them, at most: where little is ever held out, what was known of the one in
/// use is soon old.
const UNKNOWN_MAX: u32 = 8;
/// Deviations that chance explains.
const CHANCE: f64 = 2.0;
/// The same where it is looked at again and again.
const CLEAR: f64 = 4.0;
/// Guesses from which on a score tells something.
pub const GUESSES_MIN: usize = 64;
/// Versions before learning may rest.
const SCORES_MIN: u32 = 16;
/// Weight of the newest version in the means.
const NEW: f64 = 1.0 / 16.0;
/// Versions that on average guess right so many more of the held-out tokens than the one before are getting better. Against the
/// version before on the same tokens this is known far better than from their shares, which change with the tokens.
const RISING: f64 = 0.002;
/// A fall of the share by so much is the target's doing.
const FALLEN: f64 = 0.03;

/// Two versions on the same held-out guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Duel {
    /// Guesses.
    pub guesses: usize,
    /// Right guesses of the newer version.
    pub right: usize,
    /// Guesses that only the newer version had right, and only the one in use.
    pub only: (usize, usize),
    /// None is in use: any version is better than nothing to draft with.
    pub is_alone: bool,
}

impl Duel {
    /// Compares guess by guess. A version alone wins against one that is never right.
    #[must_use]
    pub fn of(newer: &[bool], in_use: Option<&[bool]>) -> Self {
        let mut duel = Self { guesses: newer.len(), is_alone: in_use.is_none(), ..Self::default() };
        for (i, newer) in newer.iter().enumerate() {
            let old = in_use.and_then(|guesses| guesses.get(i)).copied().unwrap_or(false);
            duel.right += usize::from(*newer);
            duel.only.0 += usize::from(*newer && !old);
            duel.only.1 += usize::from(old && !*newer);
        }
        duel
    }

    /// By how much more of the guesses the newer version had right, as a share of them.
    #[must_use]
    pub fn gain(self) -> f64 {
        (self.only.0 as f64 - self.only.1 as f64) / self.guesses.max(1) as f64
    }

    /// Whether more guesses would hardly change which version is better. It may be asked again and again. Guesses at so many levels
    /// ahead of a token are right or wrong together: at worst they count as one.
    #[must_use]
    pub fn is_clear(self, levels: usize) -> bool {
        let (won, lost) = (self.only.0 as f64, self.only.1 as f64);
        self.guesses >= GUESSES_MIN * levels && (won - lost).abs() > CLEAR * ((won + lost) * levels as f64).sqrt()
    }

    /// Whether the newer version is worse by more than chance explains: the sign test, by its normal approximation.
    fn is_worse(self) -> bool {
        let (won, lost) = (self.only.0 as f64, self.only.1 as f64);
        lost - won > CHANCE * (lost + won).sqrt()
    }
}

/// What is to be done with a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Devices are to use it.
    Publish,
    /// It is left out; learning goes on from it.
    Discard,
    /// It is left out, and learning goes on from the version in use.
    RollBack,
    /// It is left out, and nothing is known of it: a later one is examined.
    Leave,
}

/// The machine of one learned drafter.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Publication {
    /// A version waits for its score.
    is_due: bool,
    /// The version in use was scored, or has learned elsewhere: what nobody knows does not replace it.
    is_proven: bool,
    /// Versions in a row of which nothing was known.
    unknown: u32,
    worse: u32,
    scores: u32,
    /// Mean share of right guesses, and by how much it rose from version to version.
    share: f64,
    gain: f64,
    /// Opportunities that a rest leaves out, and those that this one has left out so far.
    pause: u32,
    left_out: u32,
}

impl Publication {
    /// Of a drafter that has learned elsewhere.
    #[must_use]
    pub fn of_taught() -> Self {
        Self { is_proven: true, ..Self::default() }
    }

    /// So many steps were taken that the newest version is to be scored.
    pub fn fall_due(&mut self) {
        self.is_due = true;
    }

    /// Whether a version waits for its score.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.is_due
    }

    /// There was no time to score the version that was due: a later one will be.
    pub fn pass_over(&mut self) {
        self.is_due = false;
    }

    /// Takes in the score of the version that was due. One of few guesses is published if none is in use, or one of which as little is
    /// known, or if that goes on: the one that has learned for longer is the better guess.
    #[must_use]
    pub fn judge(&mut self, duel: Duel) -> Verdict {
        self.is_due = false;
        if duel.guesses < GUESSES_MIN {
            self.unknown += 1;
            let is_best = duel.is_alone || !self.is_proven || (self.unknown > UNKNOWN_MAX && !duel.is_worse());
            return if is_best { Verdict::Publish } else { Verdict::Leave };
        }
        (self.is_proven, self.unknown) = (true, 0);
        let share = duel.right as f64 / duel.guesses as f64;
        if duel.is_worse() {
            self.worse += 1;
            if self.worse < ROLLBACK_AFTER {
                return Verdict::Discard;
            }
            self.worse = 0;
            return Verdict::RollBack;
        }
        self.worse = 0;
        let gain = duel.gain();
        if self.scores == 0 {
            (self.share, self.gain) = (share, gain);
        }
        self.scores += 1;
        self.share += NEW * (share - self.share);
        self.gain += NEW * (gain - self.gain);
        // Versions that are each a little worse, as chance may explain, would lead down step by step.
        if gain < 0.0 { Verdict::Discard } else { Verdict::Publish }
    }

    /// Whether learning should rest now: its versions have stopped getting better.
    #[must_use]
    pub fn has_settled(&self) -> bool {
        self.scores >= SCORES_MIN && self.gain < RISING
    }

    /// An opportunity to learn: a device has run dry. `share` are the right guesses of the version in use, if there is one and its
    /// guesses tell something.
    /// Whether to take it.
    #[must_use]
    pub fn takes(&mut self, share: Option<f64>) -> bool {
        let Some(share) = share.filter(|_| self.has_settled()) else {
            (self.pause, self.left_out) = (0, 0);
            return true;
        };
        if share < self.share - FALLEN {
            (self.pause, self.left_out, self.scores) = (0, 0, 0);
            return true;
        }
        if self.left_out < self.pause {
            self.left_out += 1;
            return false;
        }
        // Still settled after this one: the next rest is longer.
        (self.pause, self.left_out) = ((self.pause * 2).clamp(1, PAUSE_MAX), 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn duel(right: usize, only: (usize, usize)) -> Duel {
        Duel { guesses: 1000, right, only, is_alone: false }
    }

    #[test]
    fn guesses_are_compared_one_by_one() {
        let found = Duel::of(&[true, true, false, false], Some(&[true, false, true, false]));
        assert_eq!(found, Duel { guesses: 4, right: 2, only: (1, 1), is_alone: false });
        assert_eq!(Duel::of(&[true, false], None), Duel { guesses: 2, right: 1, only: (1, 0), is_alone: true });
    }

    #[test]
    fn it_is_clear_who_is_better_where_luck_would_have_to_be_great() {
        let is_clear = |only| duel(300, only).is_clear(1);
        assert!(is_clear((17, 0)) && is_clear((0, 17)) && is_clear((129, 4)) && is_clear((0, 1000)));
        assert!(![(0, 0), (16, 0), (28, 26), (60, 30)].into_iter().any(is_clear));
        assert!(!duel(300, (48, 0)).is_clear(3) && duel(300, (49, 0)).is_clear(3), "they may be one token's");
        assert!(!Duel { guesses: 3 * GUESSES_MIN - 1, ..duel(0, (90, 0)) }.is_clear(3), "too few guesses");
        assert_eq!(Duel::of(&[], Some(&[])).gain(), 0.0);
    }

    #[test]
    fn few_guesses_tell_nothing() {
        let mut publication = Publication::default();
        let _ = publication.judge(duel(600, (600, 0)));
        let before = publication.clone();
        let unknown = Duel::of(&[], Some(&[]));
        assert_eq!(Publication::default().judge(unknown), Verdict::Publish, "as little is known of the one in use");
        assert_eq!(Publication::of_taught().judge(unknown), Verdict::Leave);
        publication.fall_due();
        assert!(publication.is_due());
        assert_eq!(publication.judge(Duel::of(&[], None)), Verdict::Publish, "better than nothing");
        let few = GUESSES_MIN - 1;
        for (newer, in_use) in
            [(vec![], vec![]), (vec![false; few], vec![true; few]), (vec![true; few], vec![false; few])]
        {
            publication.fall_due();
            assert_eq!(publication.judge(Duel::of(&newer, Some(&in_use))), Verdict::Leave);
        }
        let unknown = publication.unknown;
        assert_eq!(Publication { unknown: before.unknown, ..publication.clone() }, before, "nothing is due any more");
        let verdicts: Vec<Verdict> =
            (unknown..=UNKNOWN_MAX).map(|_| publication.judge(Duel::of(&[], Some(&[])))).collect();
        assert!(verdicts.starts_with(&[Verdict::Leave; 4]) && verdicts.ends_with(&[Verdict::Publish]), "{verdicts:?}");
        let enough = Duel::of(&[true; GUESSES_MIN], Some(&[false; GUESSES_MIN]));
        assert_eq!(publication.judge(enough), Verdict::Publish);
    }

    #[test]
    fn worse_versions_are_left_out_and_learning_rolls_back() {
        let mut publication = Publication::default();
        assert_eq!(publication.judge(duel(600, (600, 0))), Verdict::Publish);
        assert_eq!(
            publication.judge(duel(595, (20, 25))),
            Verdict::Discard,
            "chance explains it, and it is no reason to go back"
        );
        assert_eq!(publication.judge(duel(600, (20, 20))), Verdict::Publish, "as good");
        for i in 1..=ROLLBACK_AFTER {
            let verdict = publication.judge(duel(560, (20, 60)));
            assert_eq!(verdict, if i < ROLLBACK_AFTER { Verdict::Discard } else { Verdict::RollBack });
        }
        assert_eq!(publication.judge(duel(560, (20, 60))), Verdict::Discard, "counted anew");
        assert_eq!(publication.judge(duel(610, (30, 20))), Verdict::Publish);
    }

    #[test]
    fn learning_rests_longer_and_longer_and_wakes_when_the_target_moves() {
        let mut publication = Publication::default();
        for version in 0..100 {
            assert!(publication.takes(Some(0.5)) || publication.has_settled());
            let gain = if version < 40 { 5 } else { 0 };
            let _ = publication.judge(duel(300 + 5 * version.min(40), (10, 10 - gain)));
        }
        // It was right in half of its guesses.
        assert!(publication.has_settled());
        let mut taken =
            |share: f64, n: usize| -> Vec<usize> { (0..n).filter(|_| publication.takes(Some(share))).collect() };
        let at = taken(0.5, 40);
        let gaps: Vec<usize> = at.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.is_sorted() && gaps.iter().all(|gap| *gap <= PAUSE_MAX as usize + 1), "{at:?}");
        assert_eq!(gaps.last(), Some(&(PAUSE_MAX as usize + 1)));
        assert_eq!(taken(0.45, 9), (0..9).collect::<Vec<_>>(), "it guesses worse than before");
    }

    #[test]
    fn a_drafter_that_gets_better_never_rests() {
        let mut publication = Publication::default();
        for version in 0..200 {
            assert!(publication.takes(Some(0.2)), "version {version}");
            let _ = publication.judge(duel(200 + 4 * version, (12, 5)));
        }
    }

    proptest! {
        #[test]
        fn invariants_hold(scores in proptest::collection::vec((0..1000_usize, 0..200_usize, 0..200_usize, any::<bool>()), 1..200)) {
            let mut publication = Publication::default();
            let (mut discarded, mut left_out) = (0, 0);
            for (right, won, lost, is_opportunity) in scores {
                if is_opportunity {
                    left_out = if publication.takes(Some(right as f64 / 1000.0)) { 0 } else { left_out + 1 };
                    prop_assert!(left_out <= PAUSE_MAX, "DRAFT-3");
                }
                let found = duel(right, (won, lost));
                let is_worse = lost as f64 - won as f64 > CHANCE * ((won + lost) as f64).sqrt();
                let verdict = publication.judge(found);
                prop_assert_eq!(verdict != Verdict::Publish, lost > won, "DRAFT-1");
                discarded = if verdict == Verdict::Discard && is_worse { discarded + 1 } else { 0 };
                prop_assert!(discarded < ROLLBACK_AFTER && (is_worse || verdict != Verdict::RollBack), "DRAFT-2");
            }
        }
    }
}
