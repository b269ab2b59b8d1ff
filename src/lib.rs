//! bkpack: packs a full-precision language-model checkpoint into one verified file, runs it, and measures the cost.

pub mod checkpoint;
pub mod encoding;
pub mod error;
pub mod eval;
pub mod format;
mod json;
mod mmap;
pub mod model;
pub mod ops;
pub mod pack;
pub mod policy;
pub mod progress;
pub mod quant;
pub mod report;
pub mod tensor;

pub use error::{Error, Result};
