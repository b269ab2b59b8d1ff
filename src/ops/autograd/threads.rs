//! candle's own threads, kept from waiting for each other.

use std::{
    sync::{Mutex, PoisonError, mpsc},
    thread,
};

use candle_core::utils::barrier_pool;

/// Runs `work` on one of candle's own threads while the caller sleeps.
///
/// candle cuts element-wise operations into pieces for threads of its own and waits for them by spinning: with other
/// work on the machine that took three times as long as one thread alone, whatever number of threads was asked for. What
/// runs on one of these threads is not cut. Matrix products and the operations of this program still run on the pool of
/// the process.
///
/// # Panics
/// As `work` does. Never returns if called from within `work`.
pub(super) fn uncut<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let (sender, receiver) = mpsc::channel();
    let (task, receiver) = (Mutex::new(Some((work, sender))), Mutex::new(receiver));
    let result = Mutex::new(None);
    let caller = thread::current().id();
    barrier_pool().execute(|index| {
        // The caller has index 0 only where candle has no threads of its own, and then cuts nothing.
        if index == 0
            && let Some((work, sender)) = task.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            // The receiver lives as long as this call.
            let _ = sender.send(work());
        }
        if thread::current().id() == caller {
            // After a panic of the work the sender is gone, and candle passes the panic on.
            let received = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
            *result.lock().unwrap_or_else(PoisonError::into_inner) = received;
        }
    });
    result.into_inner().unwrap_or_else(PoisonError::into_inner).expect("a panic of the work was passed on")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_panics_come_back() {
        let text = String::from("text");
        assert_eq!(uncut(|| text.len()), 4);
        let panicked = thread::spawn(|| uncut(|| -> usize { panic!("of the work") })).join();
        assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"of the work"));
    }
}
