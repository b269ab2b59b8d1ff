//! Pools of threads that calls share.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    thread::available_parallelism,
};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::failure::Failure;

/// The most threads that a call can ask for.
const MOST: usize = 1024;

/// Pools by their number of threads; they stay until the process ends, since starting threads takes longer than most calls.
static POOLS: Mutex<BTreeMap<usize, Arc<ThreadPool>>> = Mutex::new(BTreeMap::new());

/// The pool of so many threads, 0 for as many as there are processors; `None` for one, which is the calling thread.
pub(crate) fn pool(threads: usize) -> Result<Option<Arc<ThreadPool>>, Failure> {
    let threads = match threads {
        0 => available_parallelism().map_or(1, usize::from).min(MOST),
        threads if threads > MOST => return Err(Failure::Threads { asked: threads, most: MOST }),
        threads => threads,
    };
    if threads == 1 {
        return Ok(None);
    }
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get(&threads) {
        return Ok(Some(pool.clone()));
    }
    let name = |index| format!("bkpack-{index}");
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    let pool = Arc::new(pool.map_err(|error| Failure::NoThreads(threads, error))?);
    pools.insert(threads, pool.clone());
    Ok(Some(pool))
}
