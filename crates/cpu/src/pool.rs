//! A thread pool for about a hundred short parallel regions a token.
//!
//! Workers spin for some tens of microseconds after a region and then park; a region allocates
//! nothing. The caller works too, and it waits only for workers that joined: one that wakes late,
//! because the machine is busy, holds nobody up. Tasks are claimed one by one from a counter, so
//! who runs what differs from run to run, and results must not depend on it.
//!
//! One atomic word carries the protocol, from the low end: 16 bits count the workers inside the
//! region, one bit says that the region is open to join, the rest is the region's number. A worker
//! joins by a compare-exchange that succeeds only while the region is open; the caller closes the
//! region and waits for the count to fall to zero. The job is written only while the region is
//! closed and the count is zero, and is read only between joining and leaving: that is what makes
//! it sound to lend the workers a borrowed closure.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, Thread};

/// Most threads a pool will have: the width of the counter in the state word is far more, this
/// keeps a mistyped number harmless.
pub const THREADS_MAX: usize = 1024;

const INSIDE: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const REGION: u64 = 1 << 17;

/// Spins before parking: each is one `pause`, so this is some 50 µs, longer than the serial work
/// between two regions of a token.
const SPINS: u32 = 4096;

type Body = dyn Fn(usize) + Sync;

struct Job {
    body: *const Body,
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Box<[AtomicBool]>,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written by the holder of
// `Pool::region` while the region is closed and nobody is inside, and read only by threads inside,
// which joined by an acquiring compare-exchange after the releasing store that opened the region.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is never dereferenced outside a region, and the closure behind
// it is Sync.
unsafe impl Send for Shared {}

/// Threads that wait for short parallel regions.
pub struct Pool {
    shared: Arc<Shared>,
    region: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// A pool of `threads` threads in all: the caller of [`Pool::run`] is one of them, so `new(1)`
    /// starts none. 0 is taken as 1, and more than [`THREADS_MAX`] as that. Threads that the system
    /// refuses to start are left out.
    pub fn new(threads: usize) -> Pool {
        let wanted = threads.clamp(1, THREADS_MAX) - 1;
        fn nothing(_: usize) {}
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { body: &nothing, tasks: 0 }),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            parked: (0..wanted).map(|_| AtomicBool::new(false)).collect(),
        });
        // Spinning steals the core from the thread it waits for when there are more threads than cores.
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let spins = if threads > cores { 0 } else { SPINS };
        let mut workers = Vec::with_capacity(wanted);
        for index in 0..wanted {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("tersor-cpu-{}", index + 1));
            match builder.spawn(move || work(&shared, index, spins)) {
                Ok(handle) => workers.push(handle),
                Err(_) => break,
            }
        }
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Pool { shared, region: Mutex::new(()), workers, handles }
    }

    /// Threads that may run tasks, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(task)` once for every task of `0..tasks` and returns when all have ended. Tasks
    /// run in any order on any thread.
    ///
    /// A region started while another is running (from inside a task, or by another thread) runs on
    /// its caller alone, so nothing deadlocks.
    ///
    /// # Panics
    /// If a task panics, the tasks not yet begun are dropped and the first panic is resumed here,
    /// after all threads have left the region.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        let guard = if tasks > 1 && !self.workers.is_empty() {
            match self.region.try_lock() {
                Ok(guard) => Some(guard),
                // A panic was resumed through an earlier region: the pool itself is in order again.
                Err(std::sync::TryLockError::Poisoned(e)) => Some(e.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            }
        } else {
            None
        };
        let Some(_guard) = guard else {
            (0..tasks).for_each(body);
            return;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker holds the pointer after this function has
        // seen the count of threads inside fall to zero, below, and between here and there nothing
        // returns or unwinds (`claim` catches panics).
        let lent: *const Body = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Body>(body) };
        // SAFETY: the region is closed and nobody is inside: this thread holds the region lock, and
        // the last holder left it so.
        unsafe { *shared.job.get() = Job { body: lent, tasks } };
        shared.next.store(0, Ordering::Relaxed);
        let opened = (shared.state.load(Ordering::Relaxed) + REGION) | OPEN;
        // Sequentially consistent with the worker's `parked` store: either it sees the region or we
        // see it parked.
        shared.state.store(opened, Ordering::SeqCst);
        for (parked, handle) in shared.parked.iter().zip(&self.handles).take(tasks - 1) {
            if parked.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        claim(shared, body, tasks);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut waited = 0u32;
        while shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            waited = waited.saturating_add(1);
            if waited < SPINS {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        for worker in self.workers.drain(..) {
            // Workers catch the panics of tasks, so there is none to report here.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// Claims and runs tasks until none is left. Never unwinds.
fn claim(shared: &Shared, body: &(dyn Fn(usize) + Sync), tasks: usize) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            // The counter passes `tasks` by at most one a thread, far from overflow.
            let task = shared.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            body(task);
        }
    }));
    if let Err(panic) = result {
        // No further task begins. Threads add at most one each to the counter: halfway up it cannot wrap.
        shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        shared.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
    }
}

fn work(shared: &Shared, index: usize, spins: u32) {
    let mut seen = 0u64;
    let mut idle = 0u32;
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let state = shared.state.load(Ordering::Acquire);
        if state & OPEN != 0 && state / REGION != seen {
            if shared.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                seen = state / REGION;
                idle = 0;
                // SAFETY: this thread is inside the region, so the job is not written and the
                // closure behind it is alive until it leaves.
                let (body, tasks) = unsafe {
                    let job = &*shared.job.get();
                    (&*job.body, job.tasks)
                };
                claim(shared, body, tasks);
                shared.state.fetch_sub(1, Ordering::Release);
            }
            continue;
        }
        if idle < spins {
            idle += 1;
            std::hint::spin_loop();
            continue;
        }
        let parked = &shared.parked[index];
        parked.store(true, Ordering::SeqCst);
        let state = shared.state.load(Ordering::SeqCst);
        let news = state & OPEN != 0 && state / REGION != seen;
        if !news && !shared.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        parked.store(false, Ordering::Relaxed);
        idle = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_at_any_width() {
        for threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|t| {
                    counts[t].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "threads {threads} tasks {tasks}");
            }
        }
    }

    #[test]
    fn many_short_regions_with_pauses_lose_nothing() {
        let pool = Pool::new(4);
        let sum = AtomicUsize::new(0);
        for region in 0..20_000usize {
            pool.run(5, &|t| {
                sum.fetch_add(t + region, Ordering::Relaxed);
            });
            if region % 2_000 == 0 {
                // Long enough for every worker to park.
                thread::sleep(std::time::Duration::from_millis(3));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), (0..20_000usize).map(|r| 10 + 5 * r).sum::<usize>());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for round in 0..50usize {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(16, &|t| {
                    if t == round % 16 {
                        panic!("task {t} of round {round}");
                    }
                });
            }));
            let message = *caught.expect_err("the panic is resumed").downcast::<String>().unwrap();
            assert_eq!(message, format!("task {} of round {round}", round % 16));
            let count = AtomicUsize::new(0);
            pool.run(9, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 9);
        }
    }

    #[test]
    fn nested_and_concurrent_regions_do_not_deadlock() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        thread::scope(|s| {
            let body = || {
                for _ in 0..200 {
                    pool.run(4, &|_| {
                        pool.run(3, &|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            };
            // Joined one by one: a thread sanitizer without the standard library's source sees no end of a scope.
            let callers = [(); 3].map(|()| s.spawn(body));
            callers.into_iter().for_each(|caller| caller.join().expect("a caller"));
        });
        assert_eq!(count.load(Ordering::Relaxed), 3 * 200 * 12);
    }
}
