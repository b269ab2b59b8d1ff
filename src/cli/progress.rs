//! Progress bars on a terminal, and stopping at Ctrl-C.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bkpack::progress::{Observer, Unit};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Set by the first Ctrl-C; long work asks for it and cleans up after itself.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes the first Ctrl-C ask the work to stop, and the second end the process at once.
pub fn stop_on_interrupt() {
    let stop = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(super::INTERRUPTED.into());
        }
    };
    // Only fails where another handler is set, which nothing here does.
    let _ = ctrlc::set_handler(stop);
}

/// Draws a bar with rate and time left on standard error.
pub struct ProgressObserver {
    visible: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl ProgressObserver {
    /// An observer that draws only if `visible`.
    pub fn new(visible: bool) -> Self {
        Self { visible, bar: Mutex::new(None) }
    }

    /// Prints while the bar is out of the way.
    pub fn suspended<T>(&self, print: impl FnOnce() -> T) -> T {
        match &*self.bar.lock().expect("no panic while drawing") {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

/// Work that ended in an error left its bar where the message is to stand.
impl Drop for ProgressObserver {
    fn drop(&mut self) {
        self.end();
    }
}

impl Observer for ProgressObserver {
    fn begin(&self, stage: &str, total: u64, unit: Unit) {
        if !self.visible {
            return;
        }
        let template = match unit {
            Unit::Bytes => {
                "{prefix:>10} [{bar:20}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left"
            }
            Unit::Tokens => "{prefix:>10} [{bar:20}] {human_pos}/{human_len} tokens {per_sec} {eta} left {msg}",
        };
        let style = ProgressStyle::with_template(template).expect("the template is valid").progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
        bar.set_style(style);
        bar.set_prefix(stage.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        *self.bar.lock().expect("no panic while drawing") = Some(bar);
    }

    fn advance(&self, amount: u64) {
        if let Some(bar) = &*self.bar.lock().expect("no panic while drawing") {
            bar.inc(amount);
        }
    }

    fn status(&self, text: &str) {
        if let Some(bar) = &*self.bar.lock().expect("no panic while drawing") {
            bar.set_message(text.to_owned());
        }
    }

    fn end(&self) {
        if let Some(bar) = self.bar.lock().expect("no panic while drawing").take() {
            bar.finish_and_clear();
        }
    }

    fn cancelled(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }
}
