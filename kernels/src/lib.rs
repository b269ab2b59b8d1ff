//! Compute kernels of bkpack: packed matrices, quantization and the operations of a forward pass.
//!
//! Every kernel is written once over a small vector trait and runs on every instruction set; [`mod@reference`] holds the
//! scalar oracle that each is tested against. No files, no JSON. Parallel loops run on as many threads as the caller's
//! rayon pool has: those of a forward pass on threads that the crate keeps for them, the others in that pool.

pub mod bits;
pub mod cpu;
pub mod cuda;
pub mod matrix;
pub mod reference;
pub mod reference_ops;
pub mod reference_sequence;

pub use cpu::{Arithmetic, Cpu, Isa};
pub use matrix::{Data, FloatType, Grid, Layout, Matrix, MatrixError};
