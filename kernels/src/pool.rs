//! The threads of one device. They belong to it alone: a device of k threads never uses more, and devices do not share.
//!
//! Work is split by output elements, never along a sum, so that the number of threads changes no bit.
//!
//! What may be given up can run interruptibly: as soon as somebody else has work for the device, its kernels do nothing any
//! more, so that it ends within the part of a kernel that is running.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Polls before a thread without work goes to sleep: about 20 µs, longer than the gaps between two kernels of a layer.
const POLLS: usize = 4_000;

/// A task: called once for each part.
type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that work together on one kernel at a time. The caller is one of them.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    waiting: Arc<AtomicUsize>,
    is_interruptible: AtomicBool,
    /// Parts of kernels so far.
    parts: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Held by the one caller that the helpers work for.
    turn: Mutex<()>,
    job: Mutex<Job>,
    wake: Condvar,
    /// Number of the newest job; helpers poll it before they sleep.
    newest: AtomicUsize,
    /// Next part to do.
    next: AtomicUsize,
    /// Helpers that are inside the job.
    inside: AtomicUsize,
    has_panicked: AtomicBool,
}

#[derive(Debug, Default)]
struct Job {
    number: usize,
    task: Option<TaskPointer>,
    parts: usize,
    is_over: bool,
}

#[derive(Debug, Clone, Copy)]
struct TaskPointer(*const Task<'static>);

// SAFETY: the pointer is used only between the beginning and the end of `Pool::run`, which outlives it, and its target
// is `Sync`.
unsafe impl Send for TaskPointer {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Pool {
    fn default() -> Self {
        Self::new(1)
    }
}

/// Parts of a split for each thread.
const PARTS: usize = 3;

impl Pool {
    /// A pool of `threads` threads, the caller included.
    ///
    /// # Panics
    /// If the system refuses a thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helper = |i: usize| {
            let shared = shared.clone();
            let body = move || shared.help();
            std::thread::Builder::new().name(format!("kernel{i}")).spawn(body).expect("the system refused a thread")
        };
        let helpers = (1..threads.max(1)).map(helper).collect();
        let (waiting, is_interruptible, parts) = Default::default();
        Self { shared, helpers, waiting, is_interruptible, parts }
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
        let Ok(_turn) = self.shared.turn.try_lock() else { return (0..parts).for_each(task) };
        self.shared.has_panicked.store(false, Ordering::Relaxed);
        // SAFETY: only the lifetime is forgotten; `finish` waits until no helper can use the pointer any more.
        let forgotten = TaskPointer(unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) });
        self.shared.begin(forgotten, parts);
        let finish = Finish(&self.shared);
        self.shared.work(task, parts);
        drop(finish);
        assert!(!self.shared.has_panicked.swap(false, Ordering::Relaxed), "a part of a kernel panicked");
    }

    /// Splits `0..len` into ranges whose bounds are multiples of `grain`, a few for each thread, so that one that is held up
    /// does not hold up all, and runs them.
    pub fn split(&self, len: usize, grain: usize, task: impl Fn(Range<usize>) + Sync) {
        let grains = len.div_ceil(grain);
        // What may be interrupted is so between parts.
        let is_whole = self.helpers.is_empty() && !self.is_interruptible.load(Ordering::Relaxed);
        let parts = if is_whole { 1 } else { (PARTS * self.threads()).min(grains).max(1) };
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
        lock(&self.shared.job).is_over = true;
        self.shared.newest.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

/// Waits for the helpers also when the caller's own part panics.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        // No helper enters any more: entering takes the lock and finds no task.
        lock(&self.0.job).task = None;
        while self.0.inside.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

impl Shared {
    fn begin(&self, task: TaskPointer, parts: usize) {
        let mut job = lock(&self.job);
        job.number += 1;
        job.task = Some(task);
        job.parts = parts;
        self.next.store(0, Ordering::Relaxed);
        self.newest.store(job.number, Ordering::Release);
        drop(job);
        self.wake.notify_all();
    }

    fn work(&self, task: &Task<'_>, parts: usize) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            task(part);
        }
    }

    fn help(&self) {
        let mut seen = 0;
        loop {
            for _ in 0..POLLS {
                if self.newest.load(Ordering::Acquire) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut job = lock(&self.job);
            while job.number == seen && !job.is_over {
                job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
            if job.is_over {
                return;
            }
            seen = job.number;
            let Some(task) = job.task else { continue };
            let parts = job.parts;
            self.inside.fetch_add(1, Ordering::Relaxed);
            drop(job);
            // SAFETY: `run` does not return before `inside` is back at zero.
            let task = unsafe { &*task.0 };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.work(task, parts))).is_err() {
                self.has_panicked.store(true, Ordering::Relaxed);
            }
            self.inside.fetch_sub(1, Ordering::Release);
        }
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
            let pool = Pool::new(threads).interrupted_by(waiting.clone());
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
                waiting.fetch_add(usize::from(part == 3), Ordering::Relaxed);
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
            let pool = Pool::new(threads);
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
            pool.run(2, &|_| {});
        }
    }
}
