//! The element types that checkpoints store floats in, and the type that each is read as.

use std::sync::LazyLock;

use bkpack_kernels::FloatType;
use half::{bf16, f16};

/// A stored real number; a complex one is two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    Small(Float8),
}

/// The 8-bit floats, named as the OCP and the AMD (FNUZ) documents do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Float8 {
    /// Bias 7, no infinity, NaN where all bits but the sign are set.
    E4M3,
    /// Bias 15, the upper half of an F16.
    E5M2,
    /// Bias 8, neither infinity nor negative zero: its code is NaN.
    E4M3Fnuz,
    /// Bias 16, neither infinity nor negative zero: its code is NaN.
    E5M2Fnuz,
    /// A power of two without sign or zero; the largest code is NaN.
    E8M0,
}

impl Element {
    /// Bytes of one stored value.
    pub fn bytes(self) -> usize {
        match self {
            Element::F64 => 8,
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
            Element::Small(_) => 1,
        }
    }

    /// The type that it is read as: its own, or for F64 the nearest F32, or for 8 bits a type that holds every value.
    pub fn float_type(self) -> FloatType {
        match self {
            Element::F64 | Element::F32 => FloatType::F32,
            Element::F16 => FloatType::F16,
            // Powers of two from 2^-127 to 2^127, which F16 does not reach.
            Element::BF16 | Element::Small(Float8::E8M0) => FloatType::BF16,
            Element::Small(_) => FloatType::F16,
        }
    }

    /// Whether stored bytes in row-major, little-endian order are what is read.
    pub fn is_native(self) -> bool {
        matches!(self, Element::F32 | Element::F16 | Element::BF16)
    }
}

impl Float8 {
    /// The little-endian bits, in [`Element::float_type`], of every code.
    pub fn table(self) -> &'static [[u8; 2]; 256] {
        static TABLES: LazyLock<[[[u8; 2]; 256]; 5]> = LazyLock::new(|| {
            use Float8::*;
            [E4M3, E5M2, E4M3Fnuz, E5M2Fnuz, E8M0].map(|format| {
                std::array::from_fn(|code| {
                    let value = format.decode(code as u8);
                    match format {
                        E8M0 => bf16::from_f32(value).to_le_bytes(),
                        _ => f16::from_f32(value).to_le_bytes(),
                    }
                })
            })
        });
        &TABLES[self as usize]
    }

    fn decode(self, code: u8) -> f32 {
        let (mantissa_bits, bias) = match self {
            Float8::E4M3 => (3, 7),
            Float8::E5M2 => (2, 15),
            Float8::E4M3Fnuz => (3, 8),
            Float8::E5M2Fnuz => (2, 16),
            Float8::E8M0 if code == 0xff => return f32::NAN,
            Float8::E8M0 => return 2f32.powi(i32::from(code) - 127),
        };
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        let exponent = i32::from(code & 0x7f) >> mantissa_bits;
        let mantissa = f32::from(code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits) as f32;
        match (self, code & 0x7f) {
            (Float8::E4M3, 0x7f) | (Float8::E5M2, 0x7d..) => f32::NAN,
            (Float8::E4M3Fnuz | Float8::E5M2Fnuz, 0) if code == 0x80 => f32::NAN,
            (Float8::E5M2, 0x7c) => sign * f32::INFINITY,
            _ if exponent == 0 => sign * mantissa * 2f32.powi(1 - bias),
            _ => sign * (1.0 + mantissa) * 2f32.powi(exponent - bias),
        }
    }
}

/// Where the values of a tensor lie in bytes: row-major logical order over any strides.
pub(super) struct Strided<'a> {
    /// Byte of the first value.
    pub start: usize,
    pub shape: &'a [usize],
    /// Bytes from one value to the next in each dimension.
    pub strides: &'a [usize],
}

/// The values in row-major order as [`Element::float_type`], little-endian.
///
/// # Errors
/// The first F64 that is finite and too large for F32.
///
/// # Panics
/// If a value lies outside `bytes`.
pub(super) fn gather(bytes: &[u8], at: &Strided, element: Element, big_endian: bool) -> Result<Vec<u8>, f64> {
    let mut overflow = None;
    let values = match element {
        Element::F64 => collect(bytes, at, big_endian, |stored: [u8; 8]| {
            let wide = f64::from_le_bytes(stored);
            let narrow = wide as f32;
            if narrow.is_infinite() && wide.is_finite() {
                overflow.get_or_insert(wide);
            }
            narrow.to_le_bytes()
        }),
        Element::F32 => collect(bytes, at, big_endian, |stored: [u8; 4]| stored),
        Element::F16 | Element::BF16 => collect(bytes, at, big_endian, |stored: [u8; 2]| stored),
        Element::Small(format) => {
            let table = format.table();
            collect(bytes, at, big_endian, |[code]: [u8; 1]| table[usize::from(code)])
        }
    };
    overflow.map_or(Ok(values), Err)
}

/// Rows and columns copied at a time: a transposed matrix then reuses each cache line that it touches.
const TILE: usize = 64;

fn collect<const FROM: usize, const TO: usize>(
    bytes: &[u8],
    at: &Strided,
    big_endian: bool,
    mut convert: impl FnMut([u8; FROM]) -> [u8; TO],
) -> Vec<u8> {
    let dimension = |from_last: usize| match at.shape.len().checked_sub(from_last) {
        Some(index) => (at.shape[index], at.strides[index]),
        None => (1, 0),
    };
    let ((cols, col_stride), (rows, row_stride)) = (dimension(1), dimension(2));
    let outer = at.shape.len().saturating_sub(2);
    let mut values = vec![0; at.shape.iter().product::<usize>() * TO];
    for (index, matrix) in values.chunks_exact_mut(rows * cols * TO).enumerate() {
        let (mut start, mut rest) = (at.start, index);
        for (size, stride) in at.shape[..outer].iter().zip(&at.strides[..outer]).rev() {
            start += rest % size * stride;
            rest /= size;
        }
        for (first_row, first_col) in tiles(rows, cols) {
            for row in first_row..rows.min(first_row + TILE) {
                for col in first_col..cols.min(first_col + TILE) {
                    let from = start + row * row_stride + col * col_stride;
                    let mut stored: [u8; FROM] = bytes[from..from + FROM].try_into().expect("as long as the element");
                    if big_endian {
                        stored.reverse();
                    }
                    let to = (row * cols + col) * TO;
                    matrix[to..to + TO].copy_from_slice(&convert(stored));
                }
            }
        }
    }
    values
}

fn tiles(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(TILE).flat_map(move |row| (0..cols).step_by(TILE).map(move |col| (row, col)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(format: Float8, code: u8) -> f32 {
        let bits = format.table()[usize::from(code)];
        match format {
            Float8::E8M0 => bf16::from_le_bytes(bits).to_f32(),
            _ => f16::from_le_bytes(bits).to_f32(),
        }
    }

    /// The corner values that the documents of the formats list.
    #[test]
    fn eight_bit_floats_have_their_documented_values() {
        let exact = |power: i32| 2f32.powi(power);
        for (format, code, value) in [
            (Float8::E4M3, 0x7e, 448.0),
            (Float8::E4M3, 0x01, exact(-9)),
            (Float8::E4M3, 0x08, exact(-6)),
            (Float8::E4M3, 0xb8, -1.0),
            (Float8::E5M2, 0x7b, 57344.0),
            (Float8::E5M2, 0x01, exact(-16)),
            (Float8::E5M2, 0xfc, f32::NEG_INFINITY),
            (Float8::E4M3Fnuz, 0x7f, 240.0),
            (Float8::E4M3Fnuz, 0x01, exact(-10)),
            (Float8::E5M2Fnuz, 0x7f, 57344.0),
            (Float8::E5M2Fnuz, 0x01, exact(-17)),
            (Float8::E8M0, 0x00, exact(-127)),
            (Float8::E8M0, 0x7f, 1.0),
            (Float8::E8M0, 0xfe, exact(127)),
        ] {
            assert_eq!(decoded(format, code), value, "{format:?} {code:#x}");
        }
        for (format, code) in [
            (Float8::E4M3, 0x7f),
            (Float8::E4M3, 0xff),
            (Float8::E5M2, 0x7d),
            (Float8::E4M3Fnuz, 0x80),
            (Float8::E5M2Fnuz, 0x80),
            (Float8::E8M0, 0xff),
        ] {
            assert!(decoded(format, code).is_nan(), "{format:?} {code:#x}");
        }
    }

    #[test]
    fn widening_eight_bits_is_exact() {
        for format in [Float8::E4M3, Float8::E5M2, Float8::E4M3Fnuz, Float8::E5M2Fnuz, Float8::E8M0] {
            for code in 0..=255 {
                let (value, widened) = (format.decode(code), decoded(format, code));
                assert!(
                    value.to_bits() == widened.to_bits() || value.is_nan() && widened.is_nan(),
                    "{format:?} {code}"
                );
            }
        }
    }

    #[test]
    fn strides_are_followed_in_logical_order() {
        // [2, 3, 70] of F16 whose values count up along the first dimension, then the second, then the third.
        let (shape, strides) = ([2, 3, 70], [2, 4, 12]);
        let stored: Vec<u8> = (0..420u16).flat_map(u16::to_be_bytes).collect();
        let at = Strided { start: 0, shape: &shape, strides: &strides };
        let gathered = gather(&stored, &at, Element::F16, true).unwrap();
        let expected = (0..2).flat_map(|i| (0..3).flat_map(move |j| (0..70).map(move |k| (i + 2 * j + 6 * k) as u16)));
        assert_eq!(gathered, expected.flat_map(u16::to_le_bytes).collect::<Vec<_>>());
    }

    #[test]
    fn an_f64_beyond_f32_is_reported_and_infinity_is_not() {
        let stored: Vec<u8> = [1.5f64, f64::INFINITY, -1e39].iter().flat_map(|value| value.to_le_bytes()).collect();
        let at = |shape| Strided { start: 0, shape, strides: &[8] };
        assert_eq!(gather(&stored, &at(&[3]), Element::F64, false), Err(-1e39));
        let expected: Vec<u8> = [1.5f32, f32::INFINITY].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(gather(&stored, &at(&[2]), Element::F64, false), Ok(expected));
    }
}
