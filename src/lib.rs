//! bkpack: packs a full-precision language-model checkpoint into one verified file, runs it, and measures the cost.
//!
//! Start at [`checkpoint::open`] and [`pack::Packing`] to pack, at [`format::PackedFile`] to read, at
//! [`model::Model`] to run, at [`eval::perplexity::evaluate`] to measure. The library never prints and never exits.
//!
//! ```no_run
//! use bkpack::{Result, format::PackedFile, tensor::TensorSource};
//!
//! fn embedding() -> Result<Vec<f32>> {
//!     let packed = PackedFile::open("model.bkpack".as_ref())?;
//!     let tensor = packed.tensor("model.embed_tokens.weight")?; // borrowed from the memory map
//!     let mut weights = vec![0.0; tensor.elements()];
//!     bkpack_kernels::Cpu::detect().dequantize(&tensor.matrix(), 0, &mut weights);
//!     Ok(weights)
//! }
//! ```

pub mod checkpoint;
pub mod encoding;
pub mod error;
pub mod eval;
pub mod export;
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
pub mod synth;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
