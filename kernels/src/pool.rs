//! The threads of one device. They belong to it alone: a device of k threads never uses more, and devices do not share.
//!
//! Work is split by output elements, never along a sum, so that the number of threads changes no bit.
//!
//! What may be given up can run interruptibly: as soon as somebody else has work for the device, its kernels do nothing any
//! more, so that it ends within the part of a kernel that is running.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work looks for it before it goes to sleep: longer than the gaps between two kernels of a
/// layer.
const AWAKE: Duration = Duration::from_micros(20);
/// Looks before it asks for the time, or lets another thread have the core.
const LOOKS: usize = 64;

/// A task: called once for each part.
type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that work together on one kernel at a time. The caller is one of them; by default it is alone.
#[derive(Debug, Default)]
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    waiting: Arc<AtomicUsize>,
    is_interruptible: AtomicBool,
    /// Parts of kernels so far.
    parts: Arc<AtomicU64>,
}

/// What helpers and their caller agree on. A layer of a small model is many jobs of microseconds: none waits for a lock,
/// and none asks the system for anything, unless a helper sleeps or is late.
///
/// A helper counts itself `inside` before it looks again whether the job is still open, and a caller closes the job before
/// it looks who is inside, both in one order for all: so either the helper finds it closed, or the caller waits for it.
#[derive(Debug)]
struct Shared {
    /// Held by the one caller that the helpers work for.
    turn: Mutex<()>,
    /// Odd while a job is open, one more at each opening and each closing; helpers poll it before they sleep.
    state: AtomicUsize,
    /// The open job.
    job: AtomicPtr<Job<'static>>,
    /// Next part to do.
    next: AtomicUsize,
    /// Helpers that are inside the job, or about to find that it is closed.
    inside: AtomicUsize,
    has_panicked: AtomicBool,
    /// Helpers that sleep, or are about to.
    sleepers: AtomicUsize,
    /// Held to fall asleep and to wake others.
    sleep: Mutex<()>,
    wake: Condvar,
    is_over: AtomicBool,
}

/// What one call of [`Pool::run`] has to do; it lives as long as that.
struct Job<'a> {
    task: &'a Task<'a>,
    parts: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parts of a split for each thread.
const PARTS: usize = 3;
/// The same of what may be interrupted, which is so between parts: a kernel over hundreds of rows takes as long as a cycle of decoding.
const PARTS_INTERRUPTIBLE: usize = 16;

impl Pool {
    /// A pool of `threads` threads, the caller included.
    ///
    /// # Errors
    /// If the system refuses a thread; those that it gave have ended.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self::default();
        for i in 1..threads {
            let shared = pool.shared.clone();
            let helper = std::thread::Builder::new().name(format!("kernel{i}")).spawn(move || shared.help())?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    /// The same that counts the parts of kernels it runs: who sees this number stand still knows that nothing is computed.
    #[must_use]
    pub fn counted_by(mut self, parts: Arc<AtomicU64>) -> Self {
        self.parts = parts;
        self
    }

    /// The same that is interrupted by others: by as much work as this number says is waiting for it. It is theirs to count.
    #[must_use]
    pub fn interrupted_by(mut self, waiting: Arc<AtomicUsize>) -> Self {
        self.waiting = waiting;
        self
    }

    /// Runs `task`; nothing if work was waiting before it ended. Its kernels do nothing any more from then on, and whatever it
    /// wrote is worth nothing. One caller at a time.
    pub fn interruptibly<R>(&self, task: impl FnOnce() -> R) -> Option<R> {
        self.is_interruptible.store(true, Ordering::Relaxed);
        let until = Until(&self.is_interruptible);
        let result = (!self.is_waited_for()).then(task);
        drop(until);
        result.filter(|_| !self.is_waited_for())
    }

    /// Whether what runs interruptibly was interrupted, so that other work than kernels need not be done either.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.is_interruptible.load(Ordering::Relaxed) && self.is_waited_for()
    }

    /// Nothing if what runs interruptibly was interrupted, and is to return at once.
    #[must_use]
    pub fn goes_on(&self) -> Option<()> {
        (!self.is_interrupted()).then_some(())
    }

    fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task` once for every part, on any of the threads, and returns when all parts are done. While the threads are at
    /// work for another caller, this one does all parts itself. Once it was interrupted, no part begins any more.
    ///
    /// # Panics
    /// If a part panics.
    pub fn run(&self, parts: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.is_interrupted() {
            return;
        }
        let task = &|part: usize| {
            self.parts.fetch_add(1, Ordering::Relaxed);
            if !self.is_interrupted() {
                task(part);
            }
        };
        if self.helpers.is_empty() || parts <= 1 {
            return (0..parts).for_each(task);
        }
        let _turn = match self.shared.turn.try_lock() {
            Ok(turn) => turn,
            // A part has panicked once.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..parts).for_each(task),
        };
        self.shared.has_panicked.store(false, Ordering::Relaxed);
        let job = Job { task, parts };
        let finish = self.shared.open(&job);
        self.shared.work(&job);
        drop(finish);
        assert!(!self.shared.has_panicked.swap(false, Ordering::Relaxed), "a part of a kernel panicked");
    }

    /// Splits `0..len` into ranges whose bounds are multiples of `grain`, a few for each thread, so that one that is held up
    /// does not hold up all, and runs them.
    pub fn split(&self, len: usize, grain: usize, task: impl Fn(Range<usize>) + Sync) {
        let grains = len.div_ceil(grain);
        let each = match (self.is_interruptible.load(Ordering::Relaxed), self.threads()) {
            (true, _) => PARTS_INTERRUPTIBLE,
            (false, 1) => 1,
            (false, _) => PARTS,
        };
        let parts = (each * self.threads()).min(grains).max(1);
        let bound = |i: usize| (grains * i / parts * grain).min(len);
        self.run(parts, &|i| task(bound(i)..bound(i + 1)));
    }
}

/// Ends what is interruptible, also by a panic.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // Another state, in which no job is open.
        self.shared.state.fetch_add(2, Ordering::SeqCst);
        self.shared.wake_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

/// Waits for the helpers also when the caller's own part panics.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_add(1, Ordering::SeqCst);
        // A helper that is not at work any more waits for this core, perhaps.
        while polls_while(&|| self.0.inside.load(Ordering::SeqCst) > 0) {
            std::thread::yield_now();
        }
    }
}

/// Whether something still holds after some looks.
fn polls_while(holds: &dyn Fn() -> bool) -> bool {
    for _ in 0..LOOKS {
        if !holds() {
            return false;
        }
        std::hint::spin_loop();
    }
    true
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            turn: Mutex::default(),
            state: AtomicUsize::new(0),
            job: AtomicPtr::new(null_mut()),
            next: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            has_panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::default(),
            wake: Condvar::new(),
            is_over: AtomicBool::new(false),
        }
    }
}

impl Shared {
    /// Opens a job, until what is returned is dropped: no helper uses it any longer.
    fn open<'a>(&'a self, job: &'a Job<'a>) -> Finish<'a> {
        self.job.store((&raw const *job).cast_mut().cast(), Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.state.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_all();
        }
        Finish(self)
    }

    fn wake_all(&self) {
        // Not between a helper's last look and its sleep.
        drop(lock(&self.sleep));
        self.wake.notify_all();
    }

    fn work(&self, job: &Job<'_>) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= job.parts {
                return;
            }
            (job.task)(part);
        }
    }

    /// What a helper does until all is over.
    fn help(&self) {
        let mut seen = 0;
        while let Some(state) = self.wait(seen) {
            seen = state;
            if state % 2 == 0 {
                continue;
            }
            self.inside.fetch_add(1, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) == state {
                // SAFETY: the job is open, and whoever closes it waits until nobody is inside before it ends.
                let job = unsafe { &*self.job.load(Ordering::Relaxed) };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.work(job))).is_err() {
                    self.has_panicked.store(true, Ordering::Relaxed);
                }
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Another state than the one that was seen; nothing once all is over.
    fn wait(&self, seen: usize) -> Option<usize> {
        let is_seen = || self.state.load(Ordering::SeqCst) == seen;
        if polls_while(&is_seen) {
            let until = Instant::now() + AWAKE;
            while polls_while(&is_seen) && Instant::now() < until {}
        }
        if is_seen() {
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let mut asleep = lock(&self.sleep);
            while is_seen() {
                asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
            }
            drop(asleep);
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
        // In this order: whoever sees the last state sees that all is over.
        let state = self.state.load(Ordering::SeqCst);
        (!self.is_over.load(Ordering::SeqCst)).then_some(state)
    }
}

/// A slice that threads write to at places of their own.
pub(crate) struct Shares<'a, T = f32> {
    first: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shares<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shares<'_, T> {}

// SAFETY: threads get disjoint parts only, as the callers of `part` and `pointer` promise.
unsafe impl<T: Send> Sync for Shares<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shares<'_, T> {}

impl<'a, T> Shares<'a, T> {
    pub(crate) fn of(slice: &'a mut [T]) -> Self {
        Self { first: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No other part that is in use at the same time may overlap it.
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} numbers", self.len);
        // SAFETY: inside the slice; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(range.start), range.len()) }
    }

    pub(crate) fn pointer(&self) -> *mut T {
        self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_interrupted_does_nothing_more() {
        let waiting = Arc::new(AtomicUsize::new(0));
        for threads in [1, 3] {
            let pool = Pool::new(threads).unwrap().interrupted_by(waiting.clone());
            let done = AtomicUsize::new(0);
            let count = |_| {
                done.fetch_add(1, Ordering::Relaxed);
            };
            let kernel = || pool.run(1, &count);
            waiting.store(1, Ordering::Relaxed);
            kernel();
            assert_eq!(done.load(Ordering::Relaxed), 1, "only what is interruptible is interrupted");
            assert_eq!(pool.interruptibly(kernel), None);
            waiting.store(0, Ordering::Relaxed);
            assert_eq!(pool.interruptibly(|| 7), Some(7));
            let task = || {
                kernel();
                waiting.store(1, Ordering::Relaxed);
                kernel();
            };
            assert_eq!(pool.interruptibly(task), None);
            assert_eq!(done.load(Ordering::Relaxed), 2, "the second one did nothing");
            waiting.store(0, Ordering::Relaxed);
            let stop_at = |part| {
                done.fetch_add(1, Ordering::Relaxed);
                waiting.fetch_add(usize::from(part >= 3), Ordering::Relaxed);
            };
            assert_eq!(pool.interruptibly(|| pool.run(1_000_000, &stop_at)), None);
            assert!(done.load(Ordering::Relaxed) < 500_000, "nor did most parts of the first one");
            waiting.store(0, Ordering::Relaxed);
            let covered = AtomicUsize::new(0);
            let split = || {
                pool.split(900, 1, |range| {
                    covered.fetch_add(range.len(), Ordering::Relaxed);
                    waiting.store(1, Ordering::Relaxed);
                })
            };
            assert_eq!(pool.interruptibly(split), None);
            assert!(covered.load(Ordering::Relaxed) < 900, "it is split");
            waiting.store(0, Ordering::Relaxed);
        }
    }

    #[test]
    fn every_part_is_done_once_and_panics_come_through() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            for parts in [0, 1, 3, 64] {
                let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                pool.run(parts, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{parts} parts on {threads} threads");
            }
            let mut covered = vec![0.0; 100];
            let shares = Shares::of(&mut covered);
            // SAFETY: ranges of a split are disjoint.
            pool.split(100, 16, |range| unsafe { shares.part(range) }.iter_mut().for_each(|v| *v += 1.0));
            assert!(covered.iter().all(|v| *v == 1.0));
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(8, &|i| assert!(i != 5, "part five"));
            }));
            assert!(failed.is_err());
            // All threads are there again: each waits for the others in its part.
            let (here, until) = (AtomicUsize::new(0), Instant::now() + Duration::from_secs(60));
            pool.run(threads, &|_| {
                here.fetch_add(1, Ordering::SeqCst);
                while here.load(Ordering::SeqCst) < threads {
                    assert!(Instant::now() < until, "a helper is gone");
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_pool_ends_whatever_its_helpers_are_at() {
        for i in 0..3_000 {
            let pool = Pool::new(2 + i % 3).unwrap();
            (0..i % 4).for_each(|_| pool.run(3, &|_| {}));
        }
    }

    #[test]
    fn short_jobs_one_after_the_other_find_helpers_awake_asleep_and_late() {
        let (pool, sum) = (Pool::new(4).unwrap(), AtomicUsize::new(0));
        for job in 0..30_000 {
            // What a helper that is late would use after its end.
            let own = [job; 5];
            pool.run(5, &|i| {
                sum.fetch_add(own[i], Ordering::Relaxed);
            });
            if job % 3_000 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        assert_eq!(sum.into_inner(), (0..30_000).sum::<usize>() * 5);
    }
}
