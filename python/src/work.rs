//! Long work on a thread of its own, while the calling thread reports progress and looks out for Ctrl-C.

use std::{
    panic::resume_unwind,
    process,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bkpack::{
    Result,
    progress::{Observer, Unit},
};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::errors::{exception, option, whole};

/// How often progress is reported and signals are looked for.
const INTERVAL: Duration = Duration::from_millis(50);

/// Runs `work` without the interpreter; calls `progress(stage, done, total, unit)` from this thread meanwhile. An
/// exception, of `progress` or of a signal's handler, stops the work and is raised when it has cleaned up after itself.
pub fn run<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    threads: Option<i64>,
    work: impl FnOnce(&dyn Observer) -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(threads).map_err(|error| exception(py, &error))?;
    let board = Board::default();
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _finished = Finished(&board);
            pool.install(|| work(&board))
        });
        let mut stopped = Ok(());
        let mut finished = false;
        while !finished && stopped.is_ok() {
            let reports;
            (reports, finished) = py.detach(|| board.wait());
            let tell = |report: Report| match progress {
                Some(progress) => progress.call1(report.arguments()).map(drop),
                None => Ok(()),
            };
            stopped = reports.into_iter().try_for_each(tell).and_then(|()| py.check_signals());
        }
        if stopped.is_err() {
            board.cancelled.store(true, Ordering::Relaxed);
        }
        let outcome = py.detach(|| worker.join()).unwrap_or_else(|panic| resume_unwind(panic));
        stopped?;
        outcome.map_err(|error| exception(py, &error))
    })
}

/// The threads that work is done on: all cores, or as many as asked for.
///
/// # Errors
/// Zero threads, or more than the system gives.
pub fn pool(threads: Option<i64>) -> Result<Arc<ThreadPool>> {
    /// The pool of all cores with the process that it was made in: a forked child has the record of it, but no threads.
    static SHARED: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let build = |threads: usize| {
        let built = ThreadPoolBuilder::new().num_threads(threads).build();
        built.map(Arc::new).map_err(|error| option("--threads", error.to_string()))
    };
    if let Some(threads) = threads {
        return build(whole::<u16>("--threads", threads, 1)?.into());
    }
    let mut shared = lock(&SHARED);
    if let Some((_, pool)) = shared.as_ref().filter(|(process, _)| *process == process::id()) {
        return Ok(pool.clone());
    }
    let pool = build(0)?;
    // A parent's pool is not dropped: nobody is left to answer.
    std::mem::forget(shared.replace((process::id(), pool.clone())));
    Ok(pool)
}

/// What a stage has come to.
#[derive(Clone)]
struct Report {
    stage: String,
    done: u64,
    total: u64,
    unit: Unit,
}

impl Report {
    fn arguments(self) -> (String, u64, u64, &'static str) {
        let unit = match self.unit {
            Unit::Bytes => "bytes",
            Unit::Tokens => "tokens",
        };
        (self.stage, self.done, self.total, unit)
    }
}

/// Where the work leaves its progress for the calling thread.
#[derive(Default)]
struct Board {
    state: Mutex<State>,
    changed: Condvar,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct State {
    current: Option<Report>,
    /// Not told yet: the begin of a stage, and how far it is.
    untold: Vec<Report>,
    finished: bool,
}

impl Board {
    /// Waits for the end of the work, at most for the interval; what there is to tell, and whether it is the end.
    fn wait(&self) -> (Vec<Report>, bool) {
        let running = |state: &mut State| !state.finished;
        let waited = self.changed.wait_timeout_while(lock(&self.state), INTERVAL, running);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.untold), state.finished)
    }
}

impl Observer for Board {
    fn begin(&self, stage: &str, total: u64, unit: Unit) {
        let report = Report { stage: stage.to_owned(), done: 0, total, unit };
        let mut state = lock(&self.state);
        state.untold.push(report.clone());
        state.current = Some(report);
    }

    fn advance(&self, amount: u64) {
        let mut state = lock(&self.state);
        let Some(current) = &mut state.current else { return };
        current.done += amount;
        let report = current.clone();
        match state.untold.last_mut() {
            Some(last) if last.done > 0 && last.stage == report.stage => *last = report,
            _ => state.untold.push(report),
        }
    }

    fn end(&self) {
        lock(&self.state).current = None;
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Says that the work is over, however it ended.
struct Finished<'a>(&'a Board);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).finished = true;
        self.0.changed.notify_all();
    }
}

/// What a panic elsewhere left behind is still plain data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
