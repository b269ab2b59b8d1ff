//! Dequantized weights in a float type, and what rounding to it does to them.

use std::borrow::Cow;

use bkpack_kernels::{Cpu, Data, FloatType, Matrix};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Fidelity;
use crate::{encoding::FloatName, format::PackedTensor, quant::convert_float};

/// What a float type does to values, the worst that it does last.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) enum Rounding {
    /// It holds each of them.
    Exact,
    /// It holds some of them but nearly.
    Rounded,
    /// This one becomes zero, or keeps too few digits to stand for itself.
    Vanishes(f32),
    /// This one is beyond its range.
    Overflows(f32),
}

impl Rounding {
    fn merge(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// Whether every value is still there, exactly or nearly.
    pub fn holds(self) -> bool {
        matches!(self, Rounding::Exact | Rounding::Rounded)
    }

    /// As the plan of an export says it: `what` is rounded, and the sentence of a value that is lost begins with `one`.
    pub fn fidelity(self, what: &str, one: &str, to: FloatType) -> Result<Fidelity, String> {
        let name = FloatName::from(to).name();
        let lost =
            |value: f32, how| Err(format!("holds {one}{value:?}, which is too {how} for {name}; use --dtype fp32"));
        match self {
            Rounding::Exact => Ok(Fidelity::Lossless),
            Rounding::Rounded => Ok(Fidelity::Rounded { why: format!("{what} to {name}") }),
            Rounding::Vanishes(value) => lost(value, "small"),
            Rounding::Overflows(value) => lost(value, "large"),
        }
    }
}

/// Compares values, each of which counts, with themselves in another type.
pub(super) fn rounding(values: &[f32], to: FloatType) -> Rounding {
    // Below 16 of its steps a value counts as vanished.
    let (converted, least): (fn(f32) -> f32, f32) = match to {
        FloatType::F32 => return Rounding::Exact,
        FloatType::F16 => (|value| f16::from_f32(value).to_f32(), 16.0 * f16::MIN_POSITIVE_SUBNORMAL.to_f32()),
        FloatType::BF16 => (|value| bf16::from_f32(value).to_f32(), 16.0 * bf16::MIN_POSITIVE_SUBNORMAL.to_f32()),
    };
    let mut found = Rounding::Exact;
    for &value in values {
        let there = converted(value);
        if there == value || value.is_nan() {
            continue;
        }
        found = match there {
            there if there.is_infinite() => return Rounding::Overflows(value),
            _ if value.abs() < least => Rounding::Vanishes(value),
            _ => found.merge(Rounding::Rounded),
        };
    }
    found
}

/// What a float type does to a tensor as a whole, whose small values may vanish beside larger ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorRounding {
    worst: Rounding,
    pub largest: f32,
}

impl TensorRounding {
    pub const NONE: Self = Self { worst: Rounding::Exact, largest: 0.0 };

    pub fn of(values: &[f32], to: FloatType) -> Self {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        Self { worst: rounding(values, to), largest }
    }

    pub fn merge(self, other: Self) -> Self {
        Self { worst: self.worst.merge(other.worst), largest: self.largest.max(other.largest) }
    }

    /// The verdict. A tensor without one value that is a normal number of the type vanishes.
    pub fn verdict(self, to: FloatType) -> Rounding {
        let normal = if to == FloatType::F16 { f16::MIN_POSITIVE.to_f32() } else { f32::MIN_POSITIVE };
        match self.worst {
            Rounding::Rounded | Rounding::Vanishes(_) if self.largest < normal => Rounding::Vanishes(self.largest),
            Rounding::Vanishes(_) => Rounding::Rounded,
            worst => worst,
        }
    }
}

/// Weights that are looked at together.
const CHUNK: usize = 1 << 16;

/// What becomes of a tensor's values in a float type.
pub(super) fn plain_fidelity(
    cpu: Cpu,
    tensor: &PackedTensor,
    matrix: &Matrix,
    to: FloatType,
) -> Result<Fidelity, String> {
    let same = matches!(matrix.data(), Data::Float { dtype, .. } if dtype == to);
    if same || to == FloatType::F32 {
        return Ok(Fidelity::Lossless);
    }
    let step = (CHUNK / matrix.cols().max(1)).max(1);
    let look = |first: usize| {
        let mut values = vec![0.0; step.min(matrix.rows() - first) * matrix.cols()];
        cpu.dequantize(matrix, first, &mut values);
        TensorRounding::of(&values, to)
    };
    let chunks = (0..matrix.rows()).into_par_iter().step_by(step);
    let found = chunks.map(look).reduce(|| TensorRounding::NONE, TensorRounding::merge);
    let what = if tensor.encoding.layout().is_some() { "dequantized" } else { "converted" };
    found.verdict(to).fidelity(what, "", to)
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
