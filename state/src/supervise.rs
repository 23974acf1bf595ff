//! Whether a lost device is started again, and when: restart intensity after OTP's supervisors.
//!
//! * **SUP-1** Within any `period_s` in which it was well, a device is restarted at most `restarts_max` times; the next loss escalates.
//! * **SUP-2** The wait doubles with every loss still within the period, from `backoff_ms` to [`BACKOFF_MS_MAX`].
//! * **SUP-3** Devices do not count against each other.
//! * **SUP-4** A device is silent only if at [`LOOKS`] looks in a row it had work and had done nothing since the look before. Looks
//!   count, not time: where the whole process was held up, so were they.

use std::collections::BTreeMap;

use crate::plan::Supervision;

/// Longest wait before a restart, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 60_000;
/// Looks at a device within the time after which it is silent.
pub const LOOKS: u32 = 8;

/// What to do about a lost device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Start it again.
    Restart {
        /// After this many milliseconds.
        after_ms: u64,
    },
    /// Stop the run, with a checkpoint if one can be made.
    Escalate {
        /// What to tell the user.
        reason: String,
    },
}

/// Remembers the losses of all devices.
#[derive(Debug, Clone)]
pub struct Supervisor {
    config: Supervision,
    /// Times of restarts within the period, in seconds, of each device.
    restarts: BTreeMap<usize, Vec<f64>>,
}

impl Supervisor {
    /// A supervisor that has seen no loss.
    #[must_use]
    pub fn new(config: &Supervision) -> Self {
        Self { config: config.clone(), restarts: BTreeMap::new() }
    }

    /// Decides about the loss of `device` at `now_s`, in seconds of a clock that does not go back.
    #[must_use]
    pub fn lost(&mut self, now_s: f64, device: usize) -> Decision {
        let Supervision { restarts_max, period_s, backoff_ms, .. } = self.config;
        let recent = self.restarts.entry(device).or_default();
        recent.retain(|&restart_s| now_s - restart_s < period_s);
        if recent.len() >= restarts_max {
            let reason = format!(
                "device {device} was lost again after {} restarts within {period_s} s (restarts_max {restarts_max})",
                recent.len()
            );
            return Decision::Escalate { reason };
        }
        let doublings = u32::try_from(recent.len()).unwrap_or(u32::MAX);
        recent.push(now_s);
        let factor = 2u64.checked_pow(doublings).unwrap_or(u64::MAX);
        Decision::Restart { after_ms: backoff_ms.saturating_mul(factor).min(BACKOFF_MS_MAX) }
    }
}

/// What is seen of one device by looking now and then.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silence {
    before: Option<u64>,
    looks: u32,
}

impl Silence {
    /// Takes in how much it has done so far, or that it has no work; returns whether it is silent.
    pub fn look(&mut self, done: Option<u64>) -> bool {
        let is_still = done.is_some() && done == self.before;
        self.looks = if is_still { self.looks + 1 } else { 0 };
        self.before = done;
        self.looks >= LOOKS
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn supervisor(restarts_max: usize, period_s: f64, backoff_ms: u64) -> Supervisor {
        Supervisor::new(&Supervision { restarts_max, period_s, backoff_ms, silent_s: 0.0 })
    }

    #[test]
    fn waits_double_and_then_the_run_stops() {
        let mut supervisor = supervisor(3, 60.0, 100);
        for (now_s, after_ms) in [(0.0, 100), (1.0, 200), (2.0, 400)] {
            assert_eq!(supervisor.lost(now_s, 0), Decision::Restart { after_ms });
        }
        let Decision::Escalate { reason } = supervisor.lost(3.0, 0) else { panic!("restarted once more") };
        assert_eq!(reason, "device 0 was lost again after 3 restarts within 60 s (restarts_max 3)");
        assert_eq!(supervisor.lost(3.0, 1), Decision::Restart { after_ms: 100 });
        assert_eq!(supervisor.lost(60.0, 0), Decision::Restart { after_ms: 400 });
        assert_eq!(supervisor.lost(200.0, 0), Decision::Restart { after_ms: 100 });
    }

    #[test]
    fn the_wait_has_a_bound_and_no_restart_may_be_allowed() {
        let mut many = supervisor(200, 1e9, 1000);
        for _ in 0..199 {
            assert!(matches!(many.lost(0.0, 0), Decision::Restart { .. }));
        }
        assert_eq!(many.lost(0.0, 0), Decision::Restart { after_ms: BACKOFF_MS_MAX });
        assert!(matches!(supervisor(0, 60.0, 100).lost(0.0, 0), Decision::Escalate { .. }));
    }

    #[test]
    fn who_has_work_and_does_nothing_is_silent() {
        let mut silence = Silence::default();
        let mut looks = |done: Option<u64>, count: u32| (0..count).map(|_| silence.look(done)).collect::<Vec<_>>();
        assert!(!looks(Some(4), LOOKS).contains(&true), "the first look has none before it");
        assert!(!looks(Some(5), LOOKS).contains(&true));
        assert!(!looks(None, 3 * LOOKS).contains(&true), "it waits for work");
        assert!(!looks(Some(5), LOOKS).contains(&true));
        assert_eq!(looks(Some(5), 1), [true]);
    }

    proptest! {
        #[test]
        fn sup_1(gaps in prop::collection::vec(0.0f64..20.0, 1..60), restarts_max in 0usize..5) {
            let mut supervisor = supervisor(restarts_max, 30.0, 10);
            let (mut now_s, mut restarts) = (0.0, Vec::new());
            for gap in gaps {
                now_s += gap;
                if let Decision::Restart { .. } = supervisor.lost(now_s, 0) {
                    restarts.push(now_s);
                }
                let recent = restarts.iter().filter(|&&restart_s| now_s - restart_s < 30.0).count();
                prop_assert!(recent <= restarts_max);
            }
        }
    }
}
