//! What the devices share of speculation: the controller's measurements, the drafter's newest version, the buffer it
//! learns from. All of it is on the side of *when*: losing it changes no token.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use kernels::{Draws, NoiseKey, Pool};
use models::drafter::buffer::{Buffer, Example};
use models::drafter::eagle::{Eagle, reads};
use models::drafter::learn::{Guesses, Workspace};
use models::drafter::share::Lengths;
use models::drafter::vocabulary::{Vocabulary, worth_drafting};
use models::drafter::{Calibration, Drafter, suffix::Suffix};
use models::{Answer, Hidden, Target, Weights};
use state::plan::{self, Speculation};
use state::speculation::Controller;
use state::watchdog::{PutOff, Watchdog};

use crate::chooser::Chooser;
use crate::error::Result;
use crate::experience::{Experience, Habits, processor};
use crate::learning::maker::{Left, Maker};
use crate::learning::{Learned, Learning, Lesson, Shared};
use crate::progress::Observer;
use crate::said::Said;

/// Separates the noise that choices of the controller are drawn with from others.
const CHOICES: u32 = 9;

/// Drafters in the order of the plan.
pub(crate) type Drafters = Vec<Option<Box<dyn Drafter>>>;

/// A published version of the drafter.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) version: u64,
    /// As they were learned.
    pub(crate) weights: Arc<Weights>,
    /// The same, as devices draft with them.
    pub(crate) to_draft: Weights,
}

impl Published {
    pub(crate) fn new(version: u64, weights: &Weights) -> Self {
        Self { version, weights: Arc::new(weights.clone()), to_draft: weights.to_draft() }
    }
}

pub(crate) struct Speculator {
    pub(crate) plan: Speculation,
    pub(crate) controller: Mutex<Chooser>,
    published: Mutex<Option<Published>>,
    learner: Mutex<Maker>,
    pub(crate) buffer: Mutex<Buffer>,
    /// How often each token was seen, in the data and in rollouts.
    seen: Mutex<Vec<u64>>,
    /// What was answered lately, for suffix drafters, and how many answers there have been.
    said: Mutex<Said>,
    said_count: AtomicU64,
    pub(crate) calibration: Arc<Mutex<Calibration>>,
    /// Of guesses without noise, as evaluations draw: their gaps mean something else. Soon learned, so not kept.
    greedy: Arc<Mutex<Calibration>>,
    pub(crate) watchdog: Mutex<Watchdog>,
    /// Of answers that ended lately, on whichever device.
    pub(crate) lengths: Lengths,
    /// Choices of the controller so far, in all sessions.
    choices: AtomicU64,
    /// Somebody timed what rows cost in this session, or is at it.
    is_probed: AtomicBool,
    seed: u64,
}

/// Longest time that the learner is waited for: a parameter's part of a step takes a fraction of it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same of one that is held for good, most likely.
const A_MOMENT: Duration = Duration::from_secs(1);
/// Between two looks at what is waited for.
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

/// A lock that outlives the panic of its holder: every value behind these locks is whole between operations.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same of one whose holder may hang.
pub(crate) fn lock_within<T>(mutex: &Mutex<T>, patience: Duration) -> Option<MutexGuard<'_, T>> {
    let until = Instant::now() + patience;
    lock_until(mutex, &mut || Instant::now() > until)
}

/// The same until `stop` says so, which is asked while somebody else holds it: a parameter's part of a step takes about as long as a look.
pub(crate) fn lock_until<'a, T>(mutex: &'a Mutex<T>, stop: &mut dyn FnMut() -> bool) -> Option<MutexGuard<'a, T>> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if stop() => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(BETWEEN_LOOKS),
        }
    }
}

impl Speculator {
    pub(crate) fn new(plan: &Speculation, seed: u64, experience: Experience, seen: Vec<u64>) -> Self {
        let Experience { published, learner, habits, buffer } = experience;
        let room = plan.training.as_ref().map_or((0, None), |t| (t.buffer_tokens_max, Some(t.buffer_bytes_max)));
        let habits = habits.filter(|habits| habits.seen.len() == seen.len());
        let habits = habits.unwrap_or_else(|| Habits::new(&plan.controller, seen));
        let Habits { controller, publication, calibration, watchdog, seen, said, lengths, choices, .. } = habits;
        let is_planned = controller.is_of(&plan.controller);
        let controller = if is_planned { controller } else { Controller::new(&plan.controller) };
        Self {
            plan: plan.clone(),
            controller: Mutex::new(Chooser::new(controller)),
            published: Mutex::new(published),
            learner: Mutex::new(Maker::Waits((learner, publication))),
            buffer: Mutex::new(buffer.with_room(room.0, room.1)),
            seen: Mutex::new(seen),
            said_count: AtomicU64::new(said.len() as u64),
            said: Mutex::new(said),
            calibration: Arc::new(Mutex::new(calibration)),
            greedy: Arc::default(),
            watchdog: Mutex::new(watchdog),
            lengths: Lengths::of(&lengths),
            choices: AtomicU64::new(choices),
            is_probed: AtomicBool::new(false),
            seed,
        }
    }

    /// The same, with chances of guesses that an earlier one has learned.
    pub(crate) fn calibrated(self, calibration: Arc<Mutex<Calibration>>) -> Self {
        Self { greedy: calibration.clone(), calibration, ..self }
    }

    /// The same whose controller tells this observer what it is told, and what it chooses.
    pub(crate) fn telling(mut self, observer: Observer) -> Self {
        let controller = self.controller.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.controller = Mutex::new(controller.telling(observer));
        self
    }

    /// Chooses as this controller would, on the machine it has measured.
    pub(crate) fn go_on_from(&self, controller: &Controller) {
        lock(&self.controller).go_on_from(controller);
        self.is_probed.store(controller.is_probed(), Ordering::Relaxed);
    }

    /// Tells the controller what rows cost, once a session: the machine may be another one.
    pub(crate) fn probe(&self, target: &Arc<Target>, pool: &Arc<Pool>) -> Result<()> {
        if lock(&self.controller).wants_probe() && !self.is_probed.swap(true, Ordering::Relaxed) {
            let forwards = models::probe::forwards(target, pool)?;
            lock(&self.controller).probe(forwards);
        }
        Ok(())
    }

    /// Two numbers of 0 up to 1 for the controller's next choice.
    pub(crate) fn draws(&self) -> [f64; 2] {
        let key = NoiseKey::new(self.seed, CHOICES, 0, 0, 0);
        let choice = self.choices.fetch_add(1, Ordering::Relaxed);
        [key.uniform(choice as u32, 0), key.uniform(choice as u32, 1)]
    }

    /// How often each token was seen.
    pub(crate) fn seen(&self) -> Vec<u64> {
        lock(&self.seen).clone()
    }

    /// Hidden states that rollouts keep.
    pub(crate) fn reads(&self) -> Hidden {
        let is_off = matches!(self.plan.controller, plan::Controller::Off) && self.plan.training.is_none();
        self.plan.shape().filter(|_| !is_off).map_or(Hidden::Nothing, reads)
    }

    pub(crate) fn published(&self) -> Option<Published> {
        lock(&self.published).clone()
    }

    /// Whether this version is put off wherever anything is known of it, and why.
    pub(crate) fn put_off(&self, version: u64) -> Option<PutOff> {
        lock(&self.watchdog).put_off_everywhere(version)
    }

    pub(crate) fn version(&self) -> u64 {
        lock(&self.published).as_ref().map_or(0, |p| p.version)
    }

    /// The tokens that are drafted for this target, from what was seen so far.
    pub(crate) fn vocabulary(&self, target: &Arc<Target>) -> Arc<Vocabulary> {
        let ids = self.plan.shape().and_then(|_| worth_drafting(&self.seen(), target.config()));
        Arc::new(Vocabulary::of(target, ids.as_ref()))
    }

    /// The drafters of one device, and the version of the learned one, which is there only once one was published. Of `earlier`
    /// ones the suffix drafter goes on, since it learns nothing from weights, and what the learned one knows of its requests.
    pub(crate) fn drafters(
        &self,
        (vocabulary, temperature): (&Arc<Vocabulary>, f32),
        pool: &Arc<Pool>,
        earlier: Drafters,
    ) -> Result<(Drafters, u64)> {
        let published = self.published();
        let calibration = if temperature == 0.0 { &self.greedy } else { &self.calibration };
        let mut earlier = earlier.into_iter();
        let drafter = |d: &plan::Drafter| -> Result<Option<Box<dyn Drafter>>> {
            let earlier = earlier.next().flatten();
            Ok(match (d, &published) {
                (plan::Drafter::Suffix { match_min, match_max }, _) => {
                    Some(earlier.unwrap_or_else(|| Box::new(Suffix::new(*match_min, *match_max))))
                }
                (plan::Drafter::Learned { shape, .. }, Some(p)) => {
                    let eagle = Eagle::new(vocabulary.clone(), &p.to_draft, *shape, pool.clone())?;
                    let known = earlier.map(|mut earlier| earlier.known()).unwrap_or_default();
                    Some(Box::new(eagle.calibrated(calibration.clone()).knowing(known)))
                }
                (plan::Drafter::Learned { .. }, None) => None,
            })
        };
        let drafters = self.plan.drafters.iter().map(drafter).collect::<Result<_>>()?;
        Ok((drafters, published.as_ref().map_or(0, |p| p.version)))
    }

    /// Tells the suffix drafter among these what was answered since it had heard of so many answers, on whichever device and in
    /// whichever session.
    pub(crate) fn listen(&self, drafters: &mut Drafters, heard: &mut u64) {
        let suffix = self.plan.suffix().and_then(|i| drafters.get_mut(i)?.as_mut());
        let Some(suffix) = suffix.filter(|_| self.said_count.load(Ordering::Acquire) > *heard) else { return };
        let said = lock(&self.said);
        // Again, as it belongs to what is said now.
        let count = self.said_count.load(Ordering::Acquire);
        let new = said.newest((count - *heard) as usize);
        drop(said);
        new.iter().for_each(|(tokens, prompt)| suffix.recall(tokens, *prompt));
        *heard = count;
    }

    /// Answers that come from now on are those of the policy after so many steps.
    pub(crate) fn begin_policy(&self, steps: u32) {
        lock(&self.buffer).begin_policy(steps);
    }

    /// Takes in finished answers; the oldest leave when there are too many tokens.
    pub(crate) fn collect(&self, answers: &[Answer]) {
        if self.plan.suffix().is_some() {
            let mut said = lock(&self.said);
            said.push(answers);
            self.said_count.fetch_add(answers.len() as u64, Ordering::Release);
        }
        if self.plan.training.is_none() {
            return;
        }
        let mut seen = lock(&self.seen);
        for token in answers.iter().flat_map(|a| &a.tokens[a.prompt..]) {
            if let Some(count) = seen.get_mut(*token as usize) {
                *count += 1;
            }
        }
        drop(seen);
        // Copied before others wait for the buffer.
        let examples: Vec<Example> = answers.iter().filter_map(Example::of).collect();
        let mut buffer = lock(&self.buffer);
        examples.into_iter().for_each(|example| buffer.push(example));
    }

    /// Trains the drafter on what the buffer holds until `stop` says so, or until nothing is to be gained for now. If the learner is
    /// given up meanwhile, another one goes on.
    pub(crate) fn train(
        &self,
        (pool, vocabulary): (&Pool, &Vocabulary),
        (draws, workspace): (Draws, &mut Workspace),
        mut stop: impl FnMut() -> bool,
    ) -> Result<Learned> {
        let lesson = Lesson { speculator: self, pool, vocabulary, draws, workspace: RefCell::new(workspace) };
        let mut learned = Learned::default();
        loop {
            let Some(learning) = self.learning(vocabulary.target(), &mut stop)? else { return Ok(learned) };
            learned = learned.and(learning.go_on(&lesson, &mut stop)?);
            if !learning.is_given_up() || stop() {
                return Ok(learned);
            }
        }
    }

    /// The learner that devices teach, as soon as there is one; nothing if `stop` says so before, or nothing is to be learned.
    pub(crate) fn learning(&self, target: &Arc<Target>, stop: &mut dyn FnMut() -> bool) -> Result<Option<Arc<Shared>>> {
        let (Some(training), Some(shape)) = (&self.plan.training, self.plan.shape()) else { return Ok(None) };
        let make = || {
            let (target, training, seed) = (target.clone(), training.clone(), self.seed);
            let published = self.published();
            move |(learner, publication): Left| {
                let weights = published.as_ref().map(|p| &*p.weights);
                Learning::new((&target, shape), &training, seed, weights, (learner.as_deref(), publication))
            }
        };
        loop {
            let Some(mut maker) = lock_until(&self.learner, stop) else { return Ok(None) };
            let learning = maker.get(make)?;
            drop(maker);
            if learning.is_some() || stop() {
                return Ok(learning);
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }

    /// A device hangs that trained the drafter, and may hold its learner, which is left to it: another one goes on, from the same
    /// state if nobody holds it, from the version in use if not. Who teaches the first one goes on with the other.
    pub(crate) fn give_up_learner(&self) {
        let Some(mut maker) = lock_within(&self.learner, PATIENCE) else { return };
        if let Some(learning) = maker.made() {
            learning.give_up();
            let left = learning.within(A_MOMENT).map(|mut learning| learning.left());
            *maker = Maker::Waits(left.unwrap_or_default());
        }
    }

    /// What a checkpoint keeps. Of a learner that cannot be had there is nothing but its published version.
    pub(crate) fn experience(&self) -> Experience {
        let (learner, publication) = self.learned().unwrap_or_default();
        let controller = Controller::clone(&lock(&self.controller));
        let said = lock(&self.said).clone();
        let calibration = lock(&self.calibration).clone();
        let (lengths, choices) = (self.lengths.to_vec(), self.choices.load(Ordering::Relaxed));
        let (seen, processor) = (self.seen(), processor());
        let watchdog = *lock(&self.watchdog);
        let habits = Habits { controller, publication, calibration, watchdog, seen, said, lengths, choices, processor };
        let habits = Some(habits);
        Experience { published: self.published(), learner, habits, buffer: lock(&self.buffer).clone() }
    }

    /// The learner and its record, or what is left of them; nothing if they cannot be had.
    fn learned(&self) -> Option<Left> {
        let maker = lock_within(&self.learner, PATIENCE)?;
        let (made, left) = (maker.made(), maker.left());
        drop(maker);
        made.map_or(left, |learning| Some(learning.within(PATIENCE)?.left()))
    }

    /// The learner, if there is one already.
    pub(crate) fn at_work(&self) -> Option<Arc<Shared>> {
        lock(&self.learner).made()
    }

    /// Tells the controller what the learned drafter has shown to know.
    pub(crate) fn examined(&self, guesses: &Guesses) {
        if let Some((drafter, skill)) = self.plan.learned().zip(guesses.skill()) {
            lock(&self.controller).examined(drafter, skill);
        }
    }

    /// Devices are to use this version; an older one comes too late.
    pub(crate) fn publish(&self, version: Published) {
        let mut published = lock(&self.published);
        if published.as_ref().is_none_or(|in_use| in_use.version < version.version) {
            *published = Some(version);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_whose_holder_hangs_is_waited_for_in_vain() {
        let mutex = Mutex::new(3);
        let held = lock(&mutex);
        assert!(lock_within(&mutex, Duration::from_millis(5)).is_none());
        drop(held);
        assert_eq!(lock_within(&mutex, PATIENCE).as_deref(), Some(&3));
    }

    #[test]
    fn a_session_goes_on_with_what_the_one_before_drew_and_knew_of_lengths() {
        let plan =
            Speculation { drafters: Vec::new(), controller: plan::Controller::Off, training: None, lending: false };
        let begin = |experience| Speculator::new(&plan, 3, experience, vec![0]);
        let before = begin(Experience::default());
        let drawn: Vec<[f64; 2]> = (0..3).map(|_| before.draws()).collect();
        [7, 40].into_iter().for_each(|tokens| before.lengths.observe(tokens));
        let kept = serde_json::to_string(&before.experience().habits).unwrap();
        let again = begin(Experience { habits: serde_json::from_str(&kept).unwrap(), ..Experience::default() });
        assert_eq!(again.lengths.to_vec(), [7, 40]);
        let next = again.draws();
        assert!(next == before.draws() && !drawn.contains(&next), "{next:?} after {drawn:?}");
    }
}
