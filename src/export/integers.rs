//! Packed matrices on the integer grids of other layouts: wider codes, smaller groups where need be, the same values.

use std::{borrow::Cow, fmt};

use bkpack_kernels::{Data, FloatType, Grid, Matrix, bits, matrix::stream_bytes, reference};
use rayon::prelude::*;

use super::{
    Fidelity,
    plain::{Rounding, rounding},
};

/// The smallest group that larger ones are split into.
const LEAST_GROUP: usize = 32;

const SMALL_GROUPS: &str = "its columns do not split into equal groups of 32 or more";

/// How the matrix of a linear layer stands in another layout: unsigned codes `u` in dense streams, weight
/// `(u - 2^(bits-1)) * scale` or `(u - zero point) * scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Integers {
    pub bits: u32,
    /// Columns that share a scale; divides the columns.
    pub group: usize,
    /// Whether a row has one group.
    pub whole_row: bool,
    pub symmetric: bool,
}

impl fmt::Display for Integers {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}-bit", self.bits)?;
        if !self.symmetric {
            f.write_str(" asym")?;
        }
        if self.whole_row { f.write_str(" per row") } else { write!(f, " g{}", self.group) }
    }
}

impl Integers {
    /// The narrowest of `widths` that holds the codes of a quantized matrix; `Err` says why it stays plain.
    ///
    /// Groups that do not divide the columns, and those of more than 128, are split into equal ones that share a scale,
    /// but into none of less than [`LEAST_GROUP`].
    pub fn holding(matrix: &Matrix, widths: &[u32]) -> Result<Self, &'static str> {
        let Data::Quantized { layout, .. } = matrix.data() else { return Err("its values are plain") };
        let (needed, symmetric) = match layout.grid {
            Grid::Int { bits, symmetric } => (bits, symmetric),
            // -1, 0 and +1 are codes of two bits.
            Grid::Ternary | Grid::Binary => (2, true),
        };
        let bits = *widths.iter().find(|&&width| width >= needed).ok_or("its codes are too wide")?;
        let cols = matrix.cols();
        let whole_row = layout.group >= cols;
        let group = match greatest_common_divisor(layout.group.min(cols), cols) {
            group if !whole_row && group > 128 && group.is_multiple_of(128) => 128,
            group => group,
        };
        if group < layout.group.min(cols).min(LEAST_GROUP) {
            return Err(SMALL_GROUPS);
        }
        Ok(Self { bits, group, whole_row, symmetric })
    }

    /// The same in groups of the largest of `sizes` that divides its own.
    pub fn in_groups_of(self, sizes: &[usize]) -> Result<Self, &'static str> {
        let group = *sizes.iter().find(|&&size| self.group.is_multiple_of(size)).ok_or(SMALL_GROUPS)?;
        Ok(Self { group, whole_row: false, ..self })
    }

    /// Gives layers that differ in their groups alone one group size, if there is one of at least [`LEAST_GROUP`] that
    /// divides all.
    pub fn unify(layers: &mut [&mut Self]) {
        let scheme = |layer: &Self| (layer.bits, layer.symmetric);
        let alike = layers.windows(2).all(|pair| scheme(pair[0]) == scheme(pair[1]));
        if !alike || layers.iter().all(|layer| layer.whole_row) {
            return;
        }
        let group = layers.iter().fold(0, |group, layer| greatest_common_divisor(layer.group, group));
        if group >= LEAST_GROUP {
            let group = if group.is_multiple_of(128) { 128 } else { group };
            layers.iter_mut().for_each(|layer| **layer = Self { group, whole_row: false, ..**layer });
        }
    }

    /// Groups of a row.
    pub fn groups(&self, cols: usize) -> usize {
        cols / self.group
    }

    /// 32-bit words of a row of codes.
    pub fn words(&self, cols: usize) -> usize {
        stream_bytes(cols, self.bits) / 4
    }

    /// The zero point of a symmetric grid.
    pub const fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Every row's codes as a dense stream: U32 `[rows, words]`.
    pub fn codes<'a>(&self, matrix: &Matrix<'a>) -> Cow<'a, [u8]> {
        let Data::Quantized { layout, codes, .. } = matrix.data() else { unreachable!("made for quantized matrices") };
        if layout.grid.stream_bits() == Some(self.bits) {
            return Cow::Borrowed(codes);
        }
        let middle = self.middle();
        let moved: [u8; 256] = std::array::from_fn(|code| {
            let code = code as u8;
            match layout.grid {
                Grid::Int { bits, symmetric: true } => code.wrapping_sub(1 << (bits - 1)).wrapping_add(middle),
                Grid::Int { symmetric: false, .. } => code,
                Grid::Ternary => code.wrapping_sub(1).wrapping_add(middle),
                Grid::Binary => code.wrapping_mul(2).wrapping_sub(1).wrapping_add(middle),
            }
        });
        let (cols, from) = (matrix.cols(), layout.code_bytes(matrix.cols()));
        let to = stream_bytes(cols, self.bits);
        let mut output = vec![0; matrix.rows() * to];
        let rows = output.par_chunks_mut(to).zip(codes.par_chunks(from));
        rows.for_each_init(
            || vec![0; cols],
            |row, (output, codes)| {
                bits::unpack_row(layout.grid, codes, row);
                row.iter_mut().for_each(|code| *code = moved[usize::from(*code)]);
                bits::pack_stream(row, self.bits, output);
            },
        );
        Cow::Owned(output)
    }

    /// Every group's scale: `[rows, groups]`.
    pub fn scales(&self, matrix: &Matrix) -> Vec<f32> {
        let Data::Quantized { layout, scale_type, scales, .. } = matrix.data() else {
            unreachable!("made for quantized matrices")
        };
        let stored = layout.groups(matrix.cols());
        let groups = self.groups(matrix.cols());
        let scale = |index: usize| {
            let (row, group) = (index / groups, index % groups);
            reference::float(scale_type, scales, row * stored + group * self.group / layout.group)
        };
        (0..matrix.rows() * groups).map(scale).collect()
    }

    /// Every group's zero point, that of the middle code where the grid is symmetric: `[rows, groups]`.
    pub fn zeros(&self, matrix: &Matrix) -> Vec<u8> {
        let Data::Quantized { layout, zeros, .. } = matrix.data() else { unreachable!("made for quantized matrices") };
        let groups = self.groups(matrix.cols());
        if self.symmetric {
            return vec![self.middle(); matrix.rows() * groups];
        }
        let mut output = Vec::with_capacity(matrix.rows() * groups);
        let mut row = vec![0; layout.groups(matrix.cols())];
        for stream in zeros.chunks(layout.zero_bytes(matrix.cols())) {
            bits::unpack_row(layout.grid, stream, &mut row);
            output.extend((0..groups).map(|group| row[group * self.group / layout.group]));
        }
        output
    }

    /// Codes that share a column, as a dense stream down the rows: U32 `[words, columns]`.
    pub fn pack_columns(&self, codes: &[u8], columns: usize) -> Vec<u8> {
        let rows = codes.len() / columns;
        let bytes = stream_bytes(rows, self.bits);
        let mut output = vec![0; bytes * columns];
        let (mut column, mut stream) = (vec![0; rows], vec![0; bytes]);
        for index in 0..columns {
            column.iter_mut().enumerate().for_each(|(row, code)| *code = codes[row * columns + index]);
            bits::pack_stream(&column, self.bits, &mut stream);
            for (word, bytes) in stream.chunks_exact(4).enumerate() {
                output[(word * columns + index) * 4..][..4].copy_from_slice(bytes);
            }
        }
        output
    }

    /// What becomes of the scales in another type.
    pub fn scale_rounding(&self, matrix: &Matrix, to: FloatType) -> Rounding {
        match matrix.data() {
            Data::Quantized { scale_type, .. } if scale_type == to => Rounding::Exact,
            _ => rounding(&self.scales(matrix), to),
        }
    }

    /// The same as the plan of an export says it.
    pub fn scale_fidelity(&self, matrix: &Matrix, to: FloatType) -> Result<Fidelity, String> {
        self.scale_rounding(matrix, to).fidelity("scales", "a scale of ", to)
    }
}

/// A matrix of 4-byte words, its rows made columns.
pub(super) fn transpose_words(words: &[u8], columns: usize) -> Vec<u8> {
    let rows = words.len() / 4 / columns;
    let mut output = vec![0; words.len()];
    for (index, word) in words.chunks_exact(4).enumerate() {
        let (row, column) = (index / columns, index % columns);
        output[(column * rows + row) * 4..][..4].copy_from_slice(word);
    }
    output
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
