//! Work shared out over threads, with results that do not depend on their number.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// `f(state, 0..n)` in order, on up to `threads` threads, each of which makes its own `state`. They take the next `i` as they are done.
///
/// # Panics
/// If `f` does.
pub fn map<S, T: Send>(n: usize, threads: usize, state: impl Fn() -> S + Sync, f: impl Fn(&mut S, usize) -> T + Sync) -> Vec<T> {
    let threads = threads.clamp(1, n.max(1));
    if threads == 1 {
        let mut state = state();
        return (0..n).map(|i| f(&mut state, i)).collect();
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        let (mut state, mut done) = (state(), Vec::new());
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return done;
            }
            done.push((i, f(&mut state, i)));
        }
    };
    let mut results: Vec<(usize, T)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    results.sort_unstable_by_key(|&(i, _)| i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// `f(state, i, jobs[i])` for each of `jobs`, with results in order, on up to `threads` threads.
pub(super) fn map_jobs<S, J: Send, T: Send>(
    jobs: Vec<J>,
    threads: usize,
    state: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, usize, J) -> T + Sync,
) -> Vec<T> {
    let jobs: Vec<Mutex<Option<J>>> = jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
    map(jobs.len(), threads, state, |state, i| {
        let job = jobs[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        f(state, i, job.expect("map calls once for each i"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for threads in [0, 1, 3, 100] {
            assert_eq!(map(50, threads, || 7, |seven, i| i * *seven), (0..50).map(|i| i * 7).collect::<Vec<_>>());
            let mut out = vec![0; 50];
            map_jobs(out.iter_mut().collect(), threads, || (), |(), i, out| *out = i * i);
            assert_eq!(out, (0..50).map(|i| i * i).collect::<Vec<_>>());
        }
        assert_eq!(map(0, 4, || (), |(), i| i), Vec::<usize>::new());
    }
}
