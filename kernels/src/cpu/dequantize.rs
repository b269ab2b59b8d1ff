//! From packed rows to f32.

use std::ops::Range;

use super::pool::for_each_piece;
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::bits::{TERNARY_PER_BYTE, stream_code};
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

/// Columns that are decoded at a time: they and their scales stay in the first-level cache.
const BLOCK: usize = 256;

/// Values of a task: callers that run in tasks of their own ask for no more.
const VALUES_A_TASK: usize = 1 << 16;

/// Buffers of [`decode`], one a task.
struct Scratch {
    // Codes are loaded a vector at a time, also where a group ends earlier.
    codes: [u8; BLOCK + 64],
    // A block touches at most as many groups as it has columns.
    scales: [f32; BLOCK],
}

impl Scratch {
    fn new() -> Self {
        Self { codes: [0; BLOCK + 64], scales: [0.0; BLOCK] }
    }
}

/// The five codes of each ternary byte, in the low bytes of a little-endian word.
const TERNARY_CODES: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut rest = byte;
        let mut digit = 0;
        while digit < TERNARY_PER_BYTE {
            table[byte][digit] = (rest % 3) as u8;
            rest /= 3;
            digit += 1;
        }
        byte += 1;
    }
    table
};

/// Unpacks codes of one row so that `(code - zero) * scale` is the weight on every grid: binary codes come out doubled.
///
/// `columns` starts at a multiple of 64, and `out` is at least 64 longer; what follows the last column is unspecified.
#[inline(always)]
pub(super) fn unpack_codes<S: Simd>(simd: S, grid: Grid, row: &[u8], columns: Range<usize>, out: &mut [u8]) {
    debug_assert!(columns.start.is_multiple_of(64) && out.len() >= columns.len() + 64);
    let Some(bits) = grid.stream_bits() else { return unpack_ternary(row, columns, out) };
    let width = 8 * bits as usize;
    let chunks = &mut out.as_chunks_mut::<64>().0[..columns.len().div_ceil(64)];
    for (out, stream) in chunks.iter_mut().zip(row[columns.start / 64 * width..].chunks(width)) {
        *out = if stream.len() == width {
            simd.unpack64(stream, bits)
        } else {
            let mut padded = [0; 64];
            padded[..stream.len()].copy_from_slice(stream);
            simd.unpack64(&padded, bits)
        };
        if grid == Grid::Binary {
            for code in out {
                *code *= 2;
            }
        }
    }
}

#[inline(always)]
fn unpack_ternary(row: &[u8], columns: Range<usize>, out: &mut [u8]) {
    let bytes = &row[columns.start / TERNARY_PER_BYTE..columns.end.div_ceil(TERNARY_PER_BYTE)];
    let Some((&first, rest)) = bytes.split_first() else { return };
    let skipped = columns.start % TERNARY_PER_BYTE;
    out[..8 - skipped].copy_from_slice(&TERNARY_CODES[usize::from(first)][skipped..]);
    // Eight bytes are stored for each five; the next store overwrites the rest.
    let mut at = TERNARY_PER_BYTE - skipped;
    for &byte in rest {
        out[at..at + 8].copy_from_slice(&TERNARY_CODES[usize::from(byte)]);
        at += TERNARY_PER_BYTE;
    }
}

/// Widens scales that lie back to back.
#[inline(always)]
pub(super) fn load_floats<S: Simd>(simd: S, dtype: FloatType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(bytes.len(), out.len() * dtype.bytes());
    for (out, bytes) in out.chunks_mut(LANES).zip(bytes.chunks(LANES * dtype.bytes())) {
        let mut padded = [0; 64];
        let bytes = if out.len() == LANES {
            bytes
        } else {
            padded[..bytes.len()].copy_from_slice(bytes);
            &padded
        };
        let v = match dtype {
            FloatType::F32 => simd.load_f32(bytes.first_chunk().expect("16 values")),
            FloatType::F16 => simd.load_f16(bytes.first_chunk().expect("16 values")),
            FloatType::BF16 => simd.load_bf16(bytes.first_chunk().expect("16 values")),
        };
        match out.first_chunk_mut() {
            Some(out) => simd.store(v, out),
            None => simd.store_partial(v, out),
        }
    }
}

/// What is subtracted from the codes of group `group`, as unpacked by [`unpack_codes`].
#[inline(always)]
pub(super) fn zero_point(grid: Grid, zeros: &[u8], group: usize) -> f32 {
    match grid {
        Grid::Int { bits, symmetric: true } => (1u32 << (bits - 1)) as f32,
        Grid::Int { bits, symmetric: false } => f32::from(stream_code(zeros, bits, group)),
        Grid::Ternary | Grid::Binary => 1.0,
    }
}

/// One row of a quantized matrix.
#[derive(Clone, Copy)]
pub(super) struct PackedRow<'a> {
    pub(super) layout: Layout,
    pub(super) scale_type: FloatType,
    pub(super) codes: &'a [u8],
    pub(super) scales: &'a [u8],
    pub(super) zeros: &'a [u8],
}

/// One row of a matrix as it lies in the file.
#[derive(Clone, Copy)]
pub(super) enum Row<'a> {
    Float { dtype: FloatType, values: &'a [u8] },
    Packed(PackedRow<'a>),
}

/// The bytes of row `row`.
#[inline(always)]
pub(super) fn row<'a>(w: &Matrix<'a>, row: usize) -> Row<'a> {
    #[inline(always)]
    fn part(bytes: &[u8], width: usize, row: usize) -> &[u8] {
        &bytes[row * width..][..width]
    }
    match w.data() {
        Data::Float { dtype, values } => Row::Float { dtype, values: part(values, w.cols() * dtype.bytes(), row) },
        Data::Quantized { layout, codes, scale_type, scales, zeros } => Row::Packed(PackedRow {
            layout,
            scale_type,
            codes: part(codes, layout.code_bytes(w.cols()), row),
            scales: part(scales, layout.groups(w.cols()) * scale_type.bytes(), row),
            zeros: part(zeros, layout.zero_bytes(w.cols()), row),
        }),
    }
}

/// Decodes at most [`BLOCK`] columns of a row into `out`, which is as long as `columns`; `columns` starts at a multiple
/// of 64.
#[inline(always)]
fn decode<S: Simd>(simd: S, row: Row, columns: Range<usize>, scratch: &mut Scratch, out: &mut [f32]) {
    let row = match row {
        Row::Float { dtype, values } => {
            let bytes = columns.start * dtype.bytes()..columns.end * dtype.bytes();
            return load_floats(simd, dtype, &values[bytes], out);
        }
        Row::Packed(row) => row,
    };
    let Layout { grid, group } = row.layout;
    unpack_codes(simd, grid, row.codes, columns.clone(), &mut scratch.codes);
    let groups = columns.start / group..columns.end.div_ceil(group);
    let scales = &mut scratch.scales[..groups.len()];
    let width = row.scale_type.bytes();
    load_floats(simd, row.scale_type, &row.scales[groups.start * width..groups.end * width], scales);

    let mut start = 0;
    for (index, &scale) in groups.zip(&*scales) {
        let end = columns.end.min((index + 1).saturating_mul(group)) - columns.start;
        let zero = simd.splat(zero_point(grid, row.zeros, index));
        let scale = simd.splat(scale);
        while start < end {
            let codes = scratch.codes[start..].first_chunk().expect("the buffer is a vector longer than the block");
            let v = simd.mul(simd.sub(simd.load_u8(codes), zero), scale);
            match out[start..end].first_chunk_mut() {
                Some(out) => simd.store(v, out),
                None => simd.store_partial(v, &mut out[start..end]),
            }
            start += LANES.min(end - start);
        }
    }
}

/// Decodes one whole row.
struct DecodeRow<'a> {
    w: &'a Matrix<'a>,
    row: usize,
    out: &'a mut [f32], // [cols]
}

impl Kernel for DecodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut scratch = Scratch::new();
        let row = row(self.w, self.row);
        for (i, out) in self.out.chunks_mut(BLOCK).enumerate() {
            decode(simd, row, i * BLOCK..i * BLOCK + out.len(), &mut scratch, out);
        }
    }
}

impl Cpu {
    /// Dequantizes rows of `w` from `first_row` on, bit for bit as the format defines them. `out` is [rows, cols] for any
    /// number of rows.
    ///
    /// # Panics
    /// If `out` is not whole rows, or they run past the last one.
    pub fn dequantize(self, w: &Matrix, first_row: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(w.cols()), "the output is not whole rows");
        let rows = out.len() / w.cols();
        assert!(w.rows() >= rows && first_row <= w.rows() - rows, "the output runs past the last row");
        self.decode_rows(w, out, |i| first_row + i);
    }

    /// Dequantizes one row, `[cols]`, on the calling thread alone.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length.
    pub fn dequantize_row(self, w: &Matrix, row: usize, out: &mut [f32]) {
        assert!(row < w.rows() && out.len() == w.cols(), "the output is not a row of the matrix");
        self.dispatch(DecodeRow { w, row, out });
    }

    /// Dequantizes the rows that `rows` names, as an embedding does. `out` is [rows.len(), cols].
    ///
    /// # Panics
    /// If an index is not below `w.rows()` or `out` has another length.
    pub fn gather_rows(self, w: &Matrix, rows: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * w.cols(), "the output is not one row for each index");
        self.decode_rows(w, out, |i| rows[i] as usize);
    }

    fn decode_rows(self, w: &Matrix, out: &mut [f32], row: impl Fn(usize) -> usize + Sync) {
        let cols = w.cols().max(1);
        let rows_a_task = VALUES_A_TASK.div_ceil(cols);
        for_each_piece(out, rows_a_task * cols, |piece, out| {
            for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                self.dispatch(DecodeRow { w, row: row(piece * rows_a_task + i), out });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bits::ternary_code;

    #[test]
    fn ternary_table_agrees_with_the_layout() {
        for byte in 0..=255 {
            let codes = TERNARY_CODES[usize::from(byte)].iter().take(TERNARY_PER_BYTE);
            for (digit, &code) in codes.enumerate() {
                assert_eq!(code, ternary_code(&[byte], digit));
            }
        }
    }
}
