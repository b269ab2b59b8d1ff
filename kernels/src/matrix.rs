//! What a matrix looks like to a kernel: borrowed bytes, exactly as they lie in the file.
//!
//! Nothing here is copied, and no byte needs to be aligned: kernels use unaligned little-endian loads.

use std::ops::Range;

/// A floating-point type as it lies in a file, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    F32,
    F16,
    BF16,
}

impl FloatType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::BF16 => 2,
        }
    }
}

/// The grid that the codes of a quantized matrix stand on.
///
/// With `c` the unsigned code, `z` the group's zero point and `s` the group's scale, a weight is
/// `(c - 2^(bits-1)) * s` (symmetric), `(c - z) * s` (asymmetric), `(c - 1) * s` (ternary) or
/// `(2c - 1) * s` (binary), computed in f32 with one rounding. A scale may be negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grid {
    /// 2 to 8 bits in a dense little-endian bitstream.
    Int { bits: u32, symmetric: bool },
    /// {-1, 0, +1}, five codes to a byte, base 3, first column the lowest digit.
    Ternary,
    /// {-1, +1}, one bit each.
    Binary,
}

impl Grid {
    /// Bits of one code in the dense stream; `None` for ternary, which packs five codes to a byte.
    pub const fn stream_bits(self) -> Option<u32> {
        match self {
            Grid::Int { bits, .. } => Some(bits),
            Grid::Binary => Some(1),
            Grid::Ternary => None,
        }
    }

    /// Whether each group carries a zero point of its own.
    pub const fn has_zero_points(self) -> bool {
        matches!(self, Grid::Int { symmetric: false, .. })
    }

    /// The largest code.
    pub const fn max_code(self) -> u8 {
        match self {
            Grid::Int { bits, .. } => ((1u32 << bits) - 1) as u8,
            Grid::Ternary => 2,
            Grid::Binary => 1,
        }
    }
}

/// A grid and the number of columns that share a scale: all the arithmetic of the row layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    pub grid: Grid,
    /// Columns in a group; at least 1. The last group of a row may be shorter.
    pub group: usize,
}

impl Layout {
    /// Groups in a row of `cols` columns.
    pub const fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group)
    }

    /// The columns of group `index` in a row of `cols`.
    pub fn group_range(&self, index: usize, cols: usize) -> Range<usize> {
        index * self.group..cols.min((index + 1).saturating_mul(self.group))
    }

    /// Bytes of one row of codes: whole 32-bit words, or whole bytes for ternary.
    pub const fn code_bytes(&self, cols: usize) -> usize {
        match self.grid.stream_bits() {
            Some(bits) => stream_bytes(cols, bits),
            None => cols.div_ceil(5),
        }
    }

    /// Bytes of one row of zero points: a dense stream as wide as the codes; 0 without zero points.
    pub const fn zero_bytes(&self, cols: usize) -> usize {
        match self.grid {
            Grid::Int { bits, symmetric: false } => stream_bytes(self.groups(cols), bits),
            _ => 0,
        }
    }
}

/// Bytes of a dense bitstream of `count` codes of `bits` bits, in whole 32-bit words.
pub const fn stream_bytes(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(32) * 4
}

/// The bytes behind a matrix.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// Plain values.
    Float { dtype: FloatType, values: &'a [u8] }, // [rows, cols]
    /// Codes with group-wise scales.
    Quantized {
        layout: Layout,
        codes: &'a [u8], // [rows, code_bytes]
        scale_type: FloatType,
        scales: &'a [u8], // [rows, groups]
        zeros: &'a [u8],  // [rows, zero_bytes]
    },
}

/// Why bytes do not form a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    #[error("the {part} hold {found} bytes where the shape needs {expected}")]
    Length { part: &'static str, expected: usize, found: usize },
    #[error("the shape is too large for this machine")]
    Overflow,
    #[error("a group needs at least one column")]
    EmptyGroup,
    #[error("{0} bits are not between 2 and 8")]
    Bits(u32),
    #[error("scales are F16 or F32, not BF16")]
    ScaleType,
}

/// A matrix `[rows, cols]`, row-major, over borrowed bytes whose lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    rows: usize,
    cols: usize,
    data: Data<'a>,
}

impl<'a> Matrix<'a> {
    /// Checks every length against the shape.
    pub fn new(rows: usize, cols: usize, data: Data<'a>) -> Result<Self, MatrixError> {
        let check = |part, per_row: usize, found: usize| {
            let expected = rows.checked_mul(per_row).ok_or(MatrixError::Overflow)?;
            if expected == found { Ok(()) } else { Err(MatrixError::Length { part, expected, found }) }
        };
        cols.checked_mul(32).ok_or(MatrixError::Overflow)?;
        match data {
            Data::Float { dtype, values } => check("values", cols * dtype.bytes(), values.len())?,
            Data::Quantized { layout, codes, scale_type, scales, zeros } => {
                if layout.group == 0 {
                    return Err(MatrixError::EmptyGroup);
                }
                if let Grid::Int { bits, .. } = layout.grid
                    && !(2..=8).contains(&bits)
                {
                    return Err(MatrixError::Bits(bits));
                }
                if scale_type == FloatType::BF16 {
                    return Err(MatrixError::ScaleType);
                }
                check("codes", layout.code_bytes(cols), codes.len())?;
                check("scales", layout.groups(cols) * scale_type.bytes(), scales.len())?;
                check("zero points", layout.zero_bytes(cols), zeros.len())?;
            }
        }
        Ok(Self { rows, cols, data })
    }

    /// Rows: the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes behind it.
    pub fn data(&self) -> Data<'a> {
        self.data
    }

    /// Bytes that the kernels read to use the whole matrix once.
    pub fn bytes(&self) -> usize {
        match self.data {
            Data::Float { values, .. } => values.len(),
            Data::Quantized { codes, scales, zeros, .. } => codes.len() + scales.len() + zeros.len(),
        }
    }
}
