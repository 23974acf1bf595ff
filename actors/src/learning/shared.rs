//! A learner that several devices teach together. One of them may hang while it holds the learner: the others wait for it until it is given up
//! at most, and look for orders meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::exam::Exam;
use super::{Learned, Learning, Lesson, Task, Tries};
use crate::error::Result;
use crate::speculator::{lock_until, lock_within};

/// Between two looks at what another device finds out.
const A_MOMENT: Duration = Duration::from_micros(200);
/// Between two looks whether there is anything to learn from.
const UNTIL_ANSWERS: Duration = Duration::from_millis(1);

/// A learner, and how many devices teach it.
pub(crate) struct Shared {
    learning: Mutex<Learning>,
    at_work: AtomicUsize,
    is_given_up: AtomicBool,
}

impl Shared {
    pub(crate) fn new(learning: Learning) -> Self {
        Self { learning: Mutex::new(learning), at_work: AtomicUsize::new(0), is_given_up: AtomicBool::new(false) }
    }

    /// The learner, if it can be had within this time.
    pub(crate) fn within(&self, patience: Duration) -> Option<MutexGuard<'_, Learning>> {
        lock_within(&self.learning, patience)
    }

    #[cfg(test)]
    pub(super) fn lock(&self) -> MutexGuard<'_, Learning> {
        crate::speculator::lock(&self.learning)
    }

    /// Whoever teaches it stops at the next look, and what it makes from now on is not used.
    pub(crate) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    /// The learner, as soon as no other device has it; nothing if `stop` says so before, or it was given up.
    fn hold(&self, stop: &mut dyn FnMut() -> bool) -> Option<MutexGuard<'_, Learning>> {
        lock_until(&self.learning, &mut || self.is_given_up() || stop()).filter(|_| !self.is_given_up())
    }

    /// The same for what must not be lost: an order to stop is heard, and waits.
    fn hold_on(&self, stop: &mut dyn FnMut() -> bool) -> Option<MutexGuard<'_, Learning>> {
        self.hold(&mut || {
            stop();
            false
        })
    }

    /// Learns until `stop` says so, which is asked between readings, or until nothing is to be gained for now. Windows whose reading
    /// is interrupted are read again another time. Several devices may learn together.
    pub(crate) fn go_on(&self, lesson: &Lesson<'_>, mut stop: impl FnMut() -> bool) -> Result<Learned> {
        // An order to stop is given once; and each look shows that the device is well.
        let mut has_stopped = false;
        let stop = &mut || {
            has_stopped = stop() || has_stopped;
            has_stopped
        };
        let mut learned = Learned::default();
        let Some(_leaving) = self.enter(stop) else { return Ok(learned) };
        if !self.is_worth_it(lesson, &mut learned, stop)? {
            return Ok(Learned { rests: !stop() && !self.is_given_up(), ..learned });
        }
        while !stop() {
            let at_work = self.at_work.load(Ordering::Relaxed);
            let Some(mut held) = self.hold(stop) else { break };
            let began = Instant::now();
            let task = held.next(lesson, at_work, &mut learned);
            drop(held);
            // What comes after it is waiting for the learner.
            let work = |learned: &mut Learned| learned.seconds += began.elapsed().as_secs_f64();
            match task {
                Task::Read(windows, reader) => {
                    let workspace = &mut **lesson.workspace.borrow_mut();
                    let reading = reader.read(lesson.pool, lesson.vocabulary, &windows, workspace)?;
                    work(&mut learned);
                    let spent = self.hold_on(stop).and_then(|mut held| held.take_in(windows, reading));
                    spent.into_iter().for_each(|spent| workspace.give_back(spent));
                }
                Task::Examine(mut exam, examiner) => {
                    let is_over = exam.read(lesson, stop)?;
                    work(&mut learned);
                    let Some(mut held) = self.hold_on(stop) else { break };
                    drop(examiner);
                    match is_over {
                        true => {
                            held.note_first(&exam, &mut learned);
                            held.judge(exam, lesson.speculator, &mut learned);
                        }
                        false => held.exam = Some(exam),
                    }
                }
                Task::Glance(mut exam, examiner) => {
                    let is_over = exam.read_in_use(exam.windows.len(), lesson, stop)?;
                    work(&mut learned);
                    let Some(mut held) = self.hold_on(stop) else { break };
                    drop(examiner);
                    match is_over {
                        true => {
                            held.note_first(&exam, &mut learned);
                            // Once, whatever it told.
                            held.first_examined = Some(exam.policy);
                        }
                        false => held.glance = Some(exam),
                    }
                }
                Task::Step => work(&mut learned),
                // Who has run dry before any answer has ended waits for the first.
                Task::Nothing => std::thread::sleep(UNTIL_ANSWERS),
                Task::Rest => {
                    learned.rests = true;
                    break;
                }
            }
        }
        Ok(learned)
    }

    /// The first device to come has an opportunity that nobody knows anything of.
    pub(super) fn enter(&self, stop: &mut dyn FnMut() -> bool) -> Option<Leaving<'_>> {
        let mut held = self.hold(stop)?;
        if self.at_work.fetch_add(1, Ordering::Relaxed) == 0 {
            held.is_worth_it = None;
            held.tries = Tries::default();
        }
        Some(Leaving(&self.at_work))
    }

    /// While it has settled, the version in use has to show first whether the target has moved on. An opportunity that is too
    /// short for that is used up by it. One device finds out for all that are at work.
    pub(super) fn is_worth_it(
        &self,
        lesson: &Lesson<'_>,
        learned: &mut Learned,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        loop {
            let Some(mut held) = self.hold(stop) else { return Ok(false) };
            held.end_outdated(lesson.speculator, learned);
            if held.is_worth_it.is_none() && (!held.publication.has_settled() || lesson.speculator.version() == 0) {
                held.is_worth_it = Some(held.publication.takes(None));
            }
            if let Some(is_worth_it) = held.is_worth_it {
                return Ok(is_worth_it);
            }
            if !held.is_examined() {
                let (exam, examiner) = held.begin_exam(lesson.speculator);
                drop(held);
                return self.has_moved_on((exam, examiner), (lesson, learned), stop);
            }
            drop(held);
            if stop() {
                return Ok(false);
            }
            std::thread::sleep(A_MOMENT);
        }
    }

    fn has_moved_on(
        &self,
        (mut exam, examiner): (Box<Exam>, Arc<()>),
        (lesson, learned): (&Lesson<'_>, &mut Learned),
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        let began = Instant::now();
        let is_over = exam.read_in_use(exam.windows.len(), lesson, stop)?;
        learned.seconds += began.elapsed().as_secs_f64();
        let Some(mut held) = self.hold_on(stop) else { return Ok(false) };
        drop(examiner);
        let share = exam.share_in_use();
        if is_over {
            held.note_first(&exam, learned);
            lesson.speculator.examined(&exam.by_in_use.guesses);
        }
        // A newer version that waits for its score goes on with the same exam.
        held.exam = (!is_over || held.publication.is_due()).then_some(exam);
        if !is_over {
            return Ok(false);
        }
        let takes = held.publication.takes(share);
        held.is_worth_it = Some(takes);
        Ok(takes)
    }
}

/// A device at work; it leaves also when it is lost.
pub(super) struct Leaving<'a>(&'a AtomicUsize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
