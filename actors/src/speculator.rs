//! What the devices share of speculation: the controller's measurements, the drafter's newest version, the buffer it
//! learns from. All of it is on the side of *when*: losing it changes no token.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::{NoiseKey, Pool};
use models::drafter::buffer::{Buffer, Example};
use models::drafter::eagle::Eagle;
use models::drafter::learn::Learner;
use models::drafter::vocabulary::{Vocabulary, frequent};
use models::drafter::{Calibration, Drafter, suffix::Suffix};
use models::{Answer, Config, Target, Weights};
use state::plan::{self, Speculation};
use state::speculation::Controller;

use crate::error::Result;

/// Separates the noise that draws micro-batches from others.
const DRAWS: u32 = 6;
/// The same for choices of the controller.
const CHOICES: u32 = 9;

/// Drafters in the order of the plan.
pub(crate) type Drafters = Vec<Option<Box<dyn Drafter>>>;

/// A published version of the drafter.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) version: u64,
    pub(crate) weights: Arc<Weights>,
}

pub(crate) struct Speculator {
    pub(crate) plan: Speculation,
    config: Config,
    pub(crate) controller: Mutex<Controller>,
    published: Mutex<Option<Published>>,
    learner: Mutex<Option<Learner>>,
    buffer: Mutex<Buffer>,
    /// How often each token was seen, in the data and in rollouts.
    seen: Mutex<Vec<u64>>,
    calibration: Arc<Mutex<Calibration>>,
    /// Choices of the controller so far.
    choices: AtomicU64,
    seed: u64,
}

/// A lock that outlives the panic of its holder: every value behind these locks is whole between operations.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Speculator {
    pub(crate) fn new(
        plan: &Speculation,
        config: &Config,
        seed: u64,
        published: Option<Published>,
        seen: Vec<u64>,
    ) -> Self {
        Self {
            plan: plan.clone(),
            config: config.clone(),
            controller: Mutex::new(Controller::new(&plan.controller)),
            published: Mutex::new(published),
            learner: Mutex::new(None),
            buffer: Mutex::new(Buffer::new(plan.training.as_ref().map_or(0, |t| t.buffer_tokens_max))),
            seen: Mutex::new(seen),
            calibration: Arc::default(),
            choices: AtomicU64::new(0),
            seed,
        }
    }

    /// The same, with chances of guesses that an earlier one has learned.
    pub(crate) fn calibrated(self, calibration: Arc<Mutex<Calibration>>) -> Self {
        Self { calibration, ..self }
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

    /// Whether rollouts keep hidden states.
    pub(crate) fn wants_hidden(&self) -> bool {
        let is_off = matches!(self.plan.controller, plan::Controller::Off) && self.plan.training.is_none();
        self.plan.eagle_ffn().is_some() && !is_off
    }

    pub(crate) fn published(&self) -> Option<Published> {
        lock(&self.published).clone()
    }

    pub(crate) fn version(&self) -> u64 {
        lock(&self.published).as_ref().map_or(0, |p| p.version)
    }

    /// The tokens that are drafted for this target, from what was seen so far.
    pub(crate) fn vocabulary(&self, target: &Arc<Target>) -> Arc<Vocabulary> {
        let ids = self.plan.eagle_ffn().and_then(|_| frequent(&lock(&self.seen)));
        Arc::new(Vocabulary::of(target, ids.as_ref()))
    }

    /// The drafters of one device; the learned one only once a version was published. The suffix drafter of `earlier` ones goes
    /// on: it learns nothing from weights.
    pub(crate) fn drafters(
        &self,
        vocabulary: &Arc<Vocabulary>,
        pool: &Arc<Pool>,
        earlier: Drafters,
    ) -> Result<Drafters> {
        let published = self.published();
        let mut earlier = earlier.into_iter();
        let drafter = |d: &plan::Drafter| -> Result<Option<Box<dyn Drafter>>> {
            let earlier = earlier.next().flatten();
            Ok(match (d, &published) {
                (plan::Drafter::Suffix { match_min, match_max }, _) => {
                    Some(earlier.unwrap_or_else(|| Box::new(Suffix::new(*match_min, *match_max))))
                }
                (plan::Drafter::Eagle { ffn }, Some(p)) => {
                    let eagle = Eagle::new(vocabulary.clone(), &p.weights, *ffn, pool.clone())?;
                    Some(Box::new(eagle.calibrated(self.calibration.clone())))
                }
                (plan::Drafter::Eagle { .. }, None) => None,
            })
        };
        self.plan.drafters.iter().map(drafter).collect()
    }

    /// Takes in finished answers; the oldest leave when there are too many tokens.
    pub(crate) fn collect(&self, answers: &[Answer]) {
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
        let mut buffer = lock(&self.buffer);
        answers.iter().filter_map(Example::of).for_each(|example| buffer.push(example));
    }

    /// Trains the drafter on what the buffer holds until `stop` says so. Returns micro-batches and the last loss.
    pub(crate) fn train(
        &self,
        pool: &Pool,
        vocabulary: &Vocabulary,
        mut stop: impl FnMut() -> bool,
    ) -> Result<(u64, f64)> {
        let (Some(training), Some(ffn)) = (&self.plan.training, self.plan.eagle_ffn()) else { return Ok((0, 0.0)) };
        let mut held = lock(&self.learner);
        let learner = match held.as_mut() {
            Some(learner) => learner,
            None => held.insert(self.learner(training, ffn)?),
        };
        let (mut batches, mut loss, mut left) = (0, 0.0, None);
        while !stop() {
            let (key, mut draws) = (NoiseKey::new(self.seed, DRAWS, learner.steps(), 0, 0), 0);
            let uniform = || {
                draws += 1;
                key.uniform(0, draws)
            };
            let batch = lock(&self.buffer).draw(training.tokens_max, &mut left, uniform);
            if batch.is_empty() {
                break;
            }
            loss = learner.learn(pool, vocabulary, &batch)?;
            batches += 1;
            if batches % training.publish_every as u64 == 0 {
                self.publish(learner.weights());
            }
        }
        if batches % training.publish_every as u64 != 0 {
            self.publish(learner.weights());
        }
        Ok((batches, loss))
    }

    fn learner(&self, training: &plan::DrafterTraining, ffn: usize) -> Result<Learner> {
        let weights = match self.published() {
            Some(published) => (*published.weights).clone(),
            None => Learner::fresh(&self.config, ffn, self.seed)?,
        };
        Ok(Learner::new(&self.config, ffn, weights, training.lr))
    }

    fn publish(&self, weights: &Weights) {
        let version = self.version() + 1;
        *lock(&self.published) = Some(Published { version, weights: Arc::new(weights.clone()) });
    }
}
