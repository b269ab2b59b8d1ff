//! Threads for the parallel loops of a forward pass.
//!
//! Decoding a token takes hundreds of parallel loops of a few microseconds each: less than it takes to wake a thread that
//! sleeps. So the threads of this pool, made once, wait for the next loop awake for a short while before they sleep, and
//! a loop neither allocates nor takes a lock that anyone waits for. The calling thread works too, and in the end waits
//! only for those that took part: one that sleeps through a loop delays nobody. Who waits asks memory for what is read
//! [next](super::ahead).

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use super::{ahead::ask, simd::Aligned};

/// How long a thread waits awake.
const AWAKE: Duration = Duration::from_micros(50);

/// Looks at the pool between two looks at the clock.
const LOOKS: usize = 64;

/// Looks at the pool before the processor is offered to others: some 25 microseconds, in which a worker that runs ends its last
/// task. The offer costs half a microsecond, too much for every loop.
const LOOKS_BEFORE_YIELD: usize = 1024;

static POOL: Pool = Pool {
    workers: Mutex::new(Vec::new()),
    state: AtomicU64::new(0),
    next: AtomicUsize::new(0),
    job: UnsafeCell::new(None),
    panic: Mutex::new(None),
};

/// Calls `run` with each of `0..tasks`, in any order, on the calling thread and as many others as its rayon pool has:
/// [`rayon::current_num_threads`] in all.
///
/// Within a task, or while another thread uses the pool, tasks run on the calling thread.
///
/// # Panics
/// With the panic of a task.
pub(super) fn for_each(tasks: usize, run: impl Fn(usize) + Sync) {
    let mut first = 0;
    while first < tasks {
        let helpers = rayon::current_num_threads().min(tasks - first) - 1;
        let Some(mut workers) = POOL.enter(helpers) else {
            run(first);
            first += 1;
            continue;
        };
        let share = |_| {
            while let Some(task) = POOL.next_task(tasks) {
                run(task);
            }
        };
        let panic = POOL.run(&mut workers, helpers, first, &share);
        drop(workers);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        first = tasks;
    }
}

/// [`for_each`] where each thread takes tasks on from where it took the last, as far as there are of its share, and then
/// helps the others. Threads are numbered, the calling one with 0, and have the same number in every loop. `before` is
/// called before others take part, if they may.
///
/// # Panics
/// With the panic of a task.
pub(super) fn for_each_in_shares(tasks: usize, before: impl FnOnce(), run: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads();
    let mut taken = TAKEN.take();
    taken.clear();
    taken.resize_with(threads, || Aligned(AtomicUsize::new(0)));
    let next_of = |share: usize| {
        let [start, end] = [share, share + 1].map(|share| share * tasks / threads);
        // A look costs less than taking.
        let left = start + taken[share].load(Ordering::Relaxed) < end;
        let task = left.then(|| start + taken[share].fetch_add(1, Ordering::Relaxed));
        task.filter(|&task| task < end)
    };
    let take = |own: usize| {
        for share in (own..threads).chain(0..own) {
            while let Some(task) = next_of(share) {
                run(task);
            }
        }
    };
    let mut panic = None;
    loop {
        if let Some(mut workers) = POOL.enter(threads - 1) {
            before();
            panic = POOL.run(&mut workers, threads - 1, 0, &take);
            break;
        }
        match (0..threads).find_map(next_of) {
            Some(task) => run(task),
            None => break,
        }
    }
    TAKEN.set(taken);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

thread_local! {
    /// How many tasks of each thread's share were taken; kept for its memory.
    static TAKEN: Cell<Vec<Aligned<AtomicUsize>>> = const { Cell::new(Vec::new()) }; // [threads]
}

/// Calls `run` with the pieces of `size` values that `values` is cut into (the last may be shorter) and their indices.
pub(super) fn for_each_piece<T: Send>(values: &mut [T], size: usize, run: impl Fn(usize, &mut [T]) + Sync) {
    let (first, len) = (Pointer(values.as_mut_ptr()), values.len());
    for_each(len.div_ceil(size), |index| {
        let start = index * size;
        // SAFETY: the piece lies within `values`, which is borrowed for the whole loop, and every index comes once.
        let piece = unsafe { std::slice::from_raw_parts_mut(first.add(start), size.min(len - start)) };
        run(index, piece);
    });
}

/// Where values start that threads take pieces of.
struct Pointer<T>(*mut T);

// SAFETY: it only says where values are that may be sent; who makes references from it answers for these.
unsafe impl<T: Send> Sync for Pointer<T> {}

impl<T> Pointer<T> {
    /// # Safety
    /// The result is within the values or at their end.
    unsafe fn add(&self, count: usize) -> *mut T {
        // SAFETY: the caller promises it.
        unsafe { self.0.add(count) }
    }
}

/// What each thread does in a loop; it is told its number, 0 for the calling thread.
type Share<'a> = dyn Fn(usize) + Sync + 'a;

/// What a task panicked with.
type Panic = Box<dyn Any + Send>;

struct Pool {
    /// Locked by the thread whose loop runs.
    workers: Mutex<Vec<Worker>>,
    /// From the lowest bits: 16 bits for the workers that are in the loop, 16 for how many may enter (none between
    /// loops), 32 for the number of the loop.
    state: AtomicU64,
    /// The next task.
    next: AtomicUsize,
    /// Written while no worker is in the loop and none may enter.
    job: UnsafeCell<Option<&'static Share<'static>>>,
    panic: Mutex<Option<Panic>>,
}

// SAFETY: all but `job` is `Sync`. `job` is written by the one thread that holds the lock on `workers`, before `state`
// admits workers and after all have left; workers read it between entering and leaving. The share it holds is `Sync`.
unsafe impl Sync for Pool {}

struct Worker {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

const ENTERED: u64 = 0xffff;
const ADMITTED: u64 = ENTERED << 16;
const MOST_HELPERS: usize = ENTERED as usize;

const fn admitted(state: u64) -> usize {
    ((state & ADMITTED) >> 16) as usize
}

const fn number(state: u64) -> u64 {
    state >> 32
}

impl Pool {
    /// The right to run a loop with helpers; `None` where a loop is running, or none are wanted.
    fn enter(&self, helpers: usize) -> Option<MutexGuard<'_, Vec<Worker>>> {
        if helpers == 0 {
            return None;
        }
        match self.workers.try_lock() {
            Ok(workers) => Some(workers),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn next_task(&self, tasks: usize) -> Option<usize> {
        Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&task| task < tasks)
    }

    /// Lets `helpers` workers run `share` beside the calling thread, tasks from `first` on; gives the first panic.
    fn run(&'static self, workers: &mut Vec<Worker>, helpers: usize, first: usize, share: &Share) -> Option<Panic> {
        let helpers = self.make_workers(workers, helpers.min(MOST_HELPERS));
        // SAFETY: only the lifetime changes. No worker uses the reference after it left the loop, and this function
        // neither returns nor unwinds before all have left and none can enter.
        let endless = unsafe { std::mem::transmute::<&Share<'_>, &'static Share<'static>>(share) };
        // SAFETY: this thread holds the lock on `workers`, no worker is in a loop, and none may enter one.
        unsafe { *self.job.get() = Some(endless) };
        self.next.store(first, Ordering::Relaxed);
        let before = number(self.state.load(Ordering::Relaxed));
        // Sequentially consistent, as are a worker's last look before it sleeps and its mark: one sees the other.
        self.state.store((before + 1) << 32 | (helpers as u64) << 16, Ordering::SeqCst);
        for worker in &workers[..helpers] {
            if worker.asleep.load(Ordering::SeqCst) && worker.asleep.swap(false, Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        self.share(share, 0);
        self.state.fetch_and(!ADMITTED, Ordering::Relaxed);
        let mut looks = 0;
        while self.state.load(Ordering::Acquire) & ENTERED > 0 {
            looks += 1;
            if looks % LOOKS_BEFORE_YIELD == 0 {
                // A worker that has no processor cannot finish.
                thread::yield_now();
            } else if !ask(0) {
                spin_loop();
            }
        }
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Makes workers until there are `wanted`; gives how many of these there are.
    fn make_workers(&'static self, workers: &mut Vec<Worker>, wanted: usize) -> usize {
        while workers.len() < wanted {
            let (index, asleep) = (workers.len(), Arc::new(AtomicBool::new(false)));
            let mark = asleep.clone();
            let made = thread::Builder::new().name(format!("bkpack-{index}")).spawn(move || self.work(index, &mark));
            // Fewer threads give the same results.
            let Ok(handle) = made else { break };
            workers.push(Worker { thread: handle.thread().clone(), asleep });
        }
        wanted.min(workers.len())
    }

    /// Runs a share; a panic is kept, and leaves no more tasks to those who take them from the pool.
    fn share(&self, share: &Share, thread: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| share(thread))) {
            self.next.store(usize::MAX / 2, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// What the worker of an index does all its life.
    fn work(&self, index: usize, asleep: &AtomicBool) {
        let mut last = 0;
        loop {
            let state = self.wait(index, last, asleep);
            let entered = self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed);
            if entered.is_err() {
                // Another worker entered or left first, or the loop is over.
                continue;
            }
            last = number(state);
            // SAFETY: `job` was written before the state that this worker entered with, and is not written again before
            // it leaves.
            if let Some(share) = unsafe { *self.job.get() } {
                self.share(share, index + 1);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state of a loop other than `last` that the worker may enter.
    fn wait(&self, index: usize, last: u64, asleep: &AtomicBool) -> u64 {
        let enterable = |ordering| {
            let state = self.state.load(ordering);
            (admitted(state) > index && number(state) != last).then_some(state)
        };
        loop {
            let start = Instant::now();
            loop {
                for _ in 0..LOOKS {
                    if let Some(state) = enterable(Ordering::Relaxed) {
                        return state;
                    }
                    if !ask(index + 1) {
                        spin_loop();
                    }
                }
                if start.elapsed() > AWAKE {
                    break;
                }
            }
            asleep.store(true, Ordering::SeqCst);
            let state = enterable(Ordering::SeqCst);
            if state.is_none() {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            if let Some(state) = state {
                return state;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{HashMap, HashSet},
        panic,
        sync::Barrier,
    };

    use super::*;

    fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    /// How often each task ran.
    fn counts(tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        for_each(tasks, |task| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7] {
            with_threads(threads, || {
                for tasks in (0..50).chain([1000]) {
                    assert_eq!(counts(tasks), vec![1; tasks], "{threads} threads");
                }
            });
        }
    }

    /// Runs three tasks of which each waits for the other two, which needs three threads; gives how many took part.
    fn three_at_once(workers: &mut Vec<Worker>) -> usize {
        let (barrier, seen) = (Barrier::new(3), Mutex::new(HashSet::new()));
        let share = |_| {
            while POOL.next_task(3).is_some() {
                barrier.wait();
                seen.lock().unwrap().insert(thread::current().id());
            }
        };
        assert!(POOL.run(workers, 2, 0, &share).is_none());
        seen.into_inner().unwrap().len()
    }

    fn lock_pool() -> MutexGuard<'static, Vec<Worker>> {
        POOL.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn threads_share_the_tasks() {
        assert_eq!(three_at_once(&mut lock_pool()), 3);
    }

    #[test]
    fn a_loop_takes_the_pool_when_another_leaves_it() {
        with_threads(3, || {
            let (start, started, left) = (Barrier::new(2), Barrier::new(2), Barrier::new(3));
            thread::scope(|scope| {
                scope.spawn(|| {
                    let held = lock_pool();
                    start.wait();
                    started.wait();
                    drop(held);
                });
                start.wait();
                for_each(4, |task| {
                    // The first task runs while the pool is held; the others need a thread each.
                    if task == 0 {
                        started.wait();
                        while POOL.enter(1).is_none() {}
                    } else {
                        left.wait();
                    }
                });
            });
        });
    }

    #[test]
    fn loops_nest_and_run_from_several_threads() {
        with_threads(4, || {
            let sum = AtomicUsize::new(0);
            let nested = || {
                for_each(8, |outer| {
                    for_each(8, |inner| {
                        sum.fetch_add(8 * outer + inner, Ordering::Relaxed);
                    });
                });
            };
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(nested);
                }
            });
            rayon::join(nested, nested);
            assert_eq!(sum.into_inner(), 6 * 63 * 64 / 2);
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        with_threads(3, || {
            for _ in 0..20 {
                let result = panic::catch_unwind(|| for_each(100, |task| assert!(task != 40, "task 40")));
                let message = result.unwrap_err();
                assert_eq!(message.downcast_ref::<&str>(), Some(&"task 40"));
                assert_eq!(counts(100), vec![1; 100]);
            }
        });
    }

    #[test]
    fn each_thread_has_its_number() {
        let (mut workers, caller, seen) = (lock_pool(), thread::current().id(), Mutex::new(HashMap::new()));
        for _ in 0..200 {
            let calls = [const { AtomicUsize::new(0) }; 4];
            let run = |number: usize| {
                calls[number].fetch_add(1, Ordering::Relaxed);
                let id = thread::current().id();
                assert_eq!(*seen.lock().unwrap().entry(number).or_insert(id), id);
                // Leaves the others time to come.
                while number == 0 && calls[1].load(Ordering::Relaxed) == 0 {
                    thread::yield_now();
                }
            };
            assert!(POOL.run(&mut workers, 3, 0, &run).is_none());
            let calls = calls.map(AtomicUsize::into_inner);
            assert!(calls[0] == 1 && calls.iter().all(|&calls| calls <= 1), "{calls:?}");
        }
        assert_eq!(seen.into_inner().unwrap()[&0], caller);
    }

    #[test]
    fn shares_cover_the_tasks() {
        for threads in [1, 3] {
            with_threads(threads, || {
                for tasks in (0..20).chain([1000]) {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    let run = |task: usize| {
                        for_each_in_shares(
                            2,
                            || (),
                            |_| {
                                counts[task].fetch_add(1, Ordering::Relaxed);
                            },
                        );
                    };
                    for_each_in_shares(tasks, || (), run);
                    assert!(counts.into_iter().all(|count| count.into_inner() == 2), "{threads} threads");
                }
            });
        }
    }

    #[test]
    fn shares_are_run_alone_while_the_pool_is_in_use() {
        with_threads(3, || {
            let (start, started) = (Barrier::new(2), Barrier::new(2));
            let (calls, caller) = (Mutex::new(Vec::new()), thread::current().id());
            thread::scope(|scope| {
                scope.spawn(|| {
                    let held = lock_pool();
                    start.wait();
                    started.wait();
                    drop(held);
                });
                start.wait();
                let before = || assert!(calls.lock().unwrap().starts_with(&[0, 1, 2, 3, 4]));
                for_each_in_shares(30, before, |task| {
                    calls.lock().unwrap().push(task);
                    if task <= 4 {
                        assert_eq!(thread::current().id(), caller);
                    }
                    if task == 4 {
                        started.wait();
                    }
                });
            });
            let mut calls = calls.into_inner().unwrap();
            calls.sort_unstable();
            assert_eq!(calls, (0..30).collect::<Vec<_>>());
            let result = panic::catch_unwind(|| for_each_in_shares(30, || (), |task| assert!(task != 20, "task 20")));
            assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"task 20"));
            assert_eq!(counts(100), vec![1; 100]);
        });
    }

    #[test]
    fn pieces_cover_the_values() {
        with_threads(3, || {
            for len in [0, 1, 7, 64, 100] {
                let mut values: Vec<usize> = vec![0; len];
                for_each_piece(&mut values, 7, |index, piece| {
                    assert!(piece.len() == 7 || index == len / 7);
                    piece.iter_mut().enumerate().for_each(|(i, value)| *value += 7 * index + i);
                });
                assert_eq!(values, (0..len).collect::<Vec<_>>());
            }
        });
    }

    #[test]
    fn threads_sleep_when_there_is_nothing_to_do_and_wake() {
        let mut workers = lock_pool();
        assert_eq!(POOL.make_workers(&mut workers, 2), 2);
        let start = Instant::now();
        while !workers.iter().all(|worker| worker.asleep.load(Ordering::SeqCst)) {
            assert!(start.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(three_at_once(&mut workers), 3);
    }
}
