//! How long work tells its caller where it stands, and how the caller stops it.

use crate::error::{Error, Result};

/// Receives progress; asked now and then whether to go on.
pub trait Observer: Sync {
    /// A stage begins: what it does, how much there is, in which unit.
    fn begin(&self, stage: &str, total: u64, unit: Unit);
    /// So much more of the stage is done.
    fn advance(&self, amount: u64);
    /// What the stage has come to, in a few words.
    fn status(&self, _text: &str) {}
    /// The stage is over.
    fn end(&self);
    /// Whether the caller wants to stop.
    fn cancelled(&self) -> bool;

    /// [`Error::Cancelled`] once the caller wants to stop.
    fn check(&self) -> Result<()> {
        if self.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// What progress is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Tokens,
}

/// Ignores progress and never stops.
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// Passes on nothing but whether to stop: a small work within a stage.
pub struct Unshown<'a>(pub &'a dyn Observer);

impl Observer for Unshown<'_> {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}
