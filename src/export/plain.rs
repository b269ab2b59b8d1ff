//! Dequantized weights in a float type, and what rounding to it does to them.

use std::borrow::Cow;

use bkpack_kernels::{Cpu, Data, FloatType, Matrix};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Fidelity;
use crate::{encoding::FloatName, quant::convert_float};

/// What a float type does to values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rounding {
    /// It holds each of them.
    Exact,
    /// It holds some of them but nearly.
    Rounded,
    /// This one is beyond its range.
    Overflow(f32),
}

impl Rounding {
    fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Rounding::Overflow(_), _) | (Rounding::Rounded, Rounding::Exact) => self,
            _ => other,
        }
    }

    /// As the plan of an export says it; the sentence of an overflow names the type.
    pub fn fidelity(self, what: &str, to: FloatType) -> Result<Fidelity, String> {
        let name = FloatName::from(to).name();
        match self {
            Rounding::Exact => Ok(Fidelity::Lossless),
            Rounding::Rounded => Ok(Fidelity::Rounded { why: format!("{what} to {name}") }),
            Rounding::Overflow(value) => Err(format!("holds {value}, which {name} cannot hold; use another --dtype")),
        }
    }
}

/// Compares values with themselves in another type.
pub(super) fn rounding(values: &[f32], to: FloatType) -> Rounding {
    let converted = |value: f32| match to {
        FloatType::F32 => value,
        FloatType::F16 => f16::from_f32(value).to_f32(),
        FloatType::BF16 => bf16::from_f32(value).to_f32(),
    };
    let mut found = Rounding::Exact;
    for &value in values {
        match converted(value) {
            there if there == value || value.is_nan() => {}
            there if there.is_infinite() => return Rounding::Overflow(value),
            _ => found = Rounding::Rounded,
        }
    }
    found
}

/// Weights that are looked at together.
const CHUNK: usize = 1 << 16;

/// What becomes of a tensor's values in a float type.
pub(super) fn plain_rounding(cpu: Cpu, matrix: &Matrix, to: FloatType) -> Rounding {
    match matrix.data() {
        _ if to == FloatType::F32 => return Rounding::Exact,
        Data::Float { dtype, .. } if dtype == to => return Rounding::Exact,
        _ => {}
    }
    let step = (CHUNK / matrix.cols().max(1)).max(1);
    let look = |first: usize| {
        let mut values = vec![0.0; step.min(matrix.rows() - first) * matrix.cols()];
        cpu.dequantize(matrix, first, &mut values);
        rounding(&values, to)
    };
    let chunks = (0..matrix.rows()).into_par_iter().step_by(step);
    chunks.map(look).reduce(|| Rounding::Exact, Rounding::merge)
}

/// A tensor's values in a float type, little-endian.
pub(super) fn plain_bytes<'a>(cpu: Cpu, matrix: &Matrix<'a>, to: FloatType) -> Cow<'a, [u8]> {
    convert_float(cpu, matrix, to)
}

/// Values in a float type, little-endian.
pub(super) fn float_bytes(values: &[f32], to: FloatType) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * to.bytes()];
    crate::quant::write_floats(values, to, &mut bytes);
    bytes
}
