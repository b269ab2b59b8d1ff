//! Several weights over the same input: q, k and v, or gate and up.

use super::Cpu;
use crate::matrix::Matrix;

/// How a matrix product takes its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// As they are, in f32: [`Cpu::matmul`].
    Exact,
    /// Rounded to INT8 where the weights have codes: [`Cpu::matmul_int8`].
    Int8,
}

impl Cpu {
    /// `out = x * w^T` for several weights over the same activations, bit for bit what separate products give. `x` is
    /// [tokens, cols] for all of `weights`, each of `outs` is [tokens, rows] of its own weight.
    ///
    /// # Panics
    /// If there are not as many outputs as weights, the weights differ in columns, or lengths do not belong to the same
    /// number of tokens.
    pub fn matmul_group(self, x: &[f32], weights: &[Matrix], outs: &mut [&mut [f32]], arithmetic: Arithmetic) {
        assert_eq!(weights.len(), outs.len(), "one output for each weight");
        for (w, out) in weights.iter().zip(outs) {
            match arithmetic {
                Arithmetic::Exact => self.matmul(x, w, out),
                Arithmetic::Int8 => self.matmul_int8(x, w, out),
            }
        }
    }
}
