//! Weight rows unpacked for integer dot products.

use std::ops::Range;

use super::dequantize::{PackedRow, Row, row, unpack_codes, zero_point};
use super::rounding::Block;
use super::simd::{Aligned, LANES, Simd};
use crate::matrix::{FloatType, Grid, Layout, Matrix};

/// Four codes of each of 16 weight rows: a byte a code, 32 bits a row.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(super) struct Unit(pub(super) [i32; LANES]);

/// Some columns of a few vectors of weight rows, unpacked. Absent rows hold what a row before them does.
#[derive(Default)]
pub(super) struct Panel {
    pub(super) codes: Vec<Unit>,                        // [units, vectors]
    pub(super) scales: Vec<Aligned<[f32; LANES]>>,      // [groups, vectors]
    pub(super) minus_zeros: Vec<Aligned<[i32; LANES]>>, // [groups, vectors]
}

/// How panels are laid out.
#[derive(Clone, Copy)]
pub(super) struct PanelShape {
    /// Units of the longest block.
    pub(super) longest: usize,
    pub(super) vectors: usize,
    /// Whether zero points are subtracted from the codes, which are then signed.
    pub(super) signed: bool,
}

/// Buffers of [`Panel::build`], one a task.
#[derive(Default)]
pub(super) struct Scratch {
    unpacked: Vec<u8>,       // [LANES, cols and room for one load past them]
    zeros: Vec<u8>,          // [LANES, groups and room for one load past them]
    subtract: Vec<[u8; 64]>, // [groups]
}

/// Cuts blocks where panels may end: with a block, and at a multiple of 64 columns. Each part has `columns` or as many
/// more as that takes; the last may have fewer.
pub(super) fn parts(blocks: &[Block], columns: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let first = blocks.get(start)?.columns.start;
        let ends = |block: &Block| block.columns.end - first >= columns && block.columns.end.is_multiple_of(64);
        let count = blocks[start..].iter().position(ends).map_or(blocks.len() - start, |last| last + 1);
        let part = start..start + count;
        start = part.end;
        Some(part)
    })
}

impl Panel {
    /// Unpacks `blocks` of `rows`, at most `vectors * LANES`; at least one of each. The first block starts at a multiple of
    /// 64 columns.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "what, from where, to where")]
    pub(super) fn build<S: Simd>(
        &mut self,
        simd: S,
        w: &Matrix,
        layout: Layout,
        rows: Range<usize>,
        blocks: &[Block],
        shape: PanelShape,
        scratch: &mut Scratch,
    ) {
        let ([first, ..], [.., last]) = (blocks, blocks) else { return };
        let groups = first.group..last.group + 1;
        self.codes.resize((last.unit - first.unit + shape.longest) * shape.vectors, Unit([0; LANES]));
        self.scales.resize(groups.len() * shape.vectors, Aligned([0.0; LANES]));
        self.minus_zeros.resize(groups.len() * shape.vectors, Aligned([0; LANES]));
        let ahead = |block: &Block| 4 * (block.unit - first.unit) == block.columns.start - first.columns.start;
        let bits = layout.grid.stream_bits().filter(|_| blocks.iter().all(ahead));
        for vector in 0..shape.vectors {
            let mut sixteen = [None; LANES];
            for (lane, row_of_lane) in sixteen.iter_mut().enumerate() {
                if let Row::Packed(row) = row(w, (rows.start + vector * LANES + lane).min(rows.end - 1)) {
                    *row_of_lane = Some(row);
                }
            }
            let sixteen = sixteen.map(|row| row.expect("the matrix is quantized"));
            self.numbers(simd, &sixteen, groups.clone(), vector, shape, scratch);
            let to = (blocks, vector, shape);
            match bits {
                None => self.rows(simd, &sixteen, to, scratch),
                Some(1) => self.streams::<S, 1>(simd, &sixteen, to, scratch),
                Some(2) => self.streams::<S, 2>(simd, &sixteen, to, scratch),
                Some(3) => self.streams::<S, 3>(simd, &sixteen, to, scratch),
                Some(4) => self.streams::<S, 4>(simd, &sixteen, to, scratch),
                Some(5) => self.streams::<S, 5>(simd, &sixteen, to, scratch),
                Some(6) => self.streams::<S, 6>(simd, &sixteen, to, scratch),
                Some(7) => self.streams::<S, 7>(simd, &sixteen, to, scratch),
                Some(_) => self.streams::<S, 8>(simd, &sixteen, to, scratch),
            }
        }
    }

    /// Scales and zero points.
    #[inline(always)]
    fn numbers<S: Simd>(
        &mut self,
        simd: S,
        rows: &[PackedRow; LANES],
        groups: Range<usize>,
        vector: usize,
        shape: PanelShape,
        scratch: &mut Scratch,
    ) {
        let grid = rows[0].layout.grid;
        // Where unpacking may start.
        let first_zero = groups.start / 64 * 64;
        let width = (groups.end - first_zero).next_multiple_of(64) + 64;
        if grid.has_zero_points() {
            scratch.zeros.resize(LANES * width, 0);
            for (row, zeros) in rows.iter().zip(scratch.zeros.chunks_exact_mut(width)) {
                unpack_codes(simd, grid, row.zeros, first_zero..groups.end, zeros);
            }
        }
        scratch.subtract.resize(if shape.signed { groups.len() } else { 0 }, [0; 64]);
        for row in rows {
            let ahead = shape.vectors * LANES * row.scales.len() + groups.start * row.scale_type.bytes();
            simd.prefetch(row.scales.as_ptr().wrapping_add(ahead));
        }
        let same = zero_point(grid_without_zeros(grid), &[], 0);
        for (index, group) in groups.enumerate() {
            let at = index * shape.vectors + vector;
            let scales = match rows[0].scale_type {
                FloatType::F32 => {
                    let mut bytes = [0; 64];
                    for (row, to) in rows.iter().zip(bytes.as_chunks_mut::<4>().0) {
                        *to = row.scales.as_chunks().0[group];
                    }
                    simd.load_f32(&bytes)
                }
                half => {
                    let mut bytes = [0; 32];
                    for (row, to) in rows.iter().zip(bytes.as_chunks_mut::<2>().0) {
                        *to = row.scales.as_chunks().0[group];
                    }
                    if half == FloatType::F16 { simd.load_f16(&bytes) } else { simd.load_bf16(&bytes) }
                }
            };
            simd.store(scales, &mut self.scales[at]);
            let mut zeros = [same as u8; LANES];
            if grid.has_zero_points() {
                for (lane, zero) in zeros.iter_mut().enumerate() {
                    *zero = scratch.zeros[lane * width + group - first_zero];
                }
            }
            self.minus_zeros[at] = Aligned(zeros.map(|zero| -i32::from(zero)));
            if shape.signed {
                for (to, zero) in scratch.subtract[index].as_chunks_mut().0.iter_mut().zip(zeros) {
                    *to = [zero; 4];
                }
            }
        }
    }

    /// Codes of dense streams whose units follow one another: words are transposed first and unpacked then.
    #[inline(always)]
    fn streams<S: Simd, const BITS: usize>(
        &mut self,
        simd: S,
        rows: &[PackedRow; LANES],
        (blocks, vector, shape): (&[Block], usize, PanelShape),
        scratch: &Scratch,
    ) {
        let window = const { &WINDOWS[BITS] };
        let bytes_a_quad = 2 * window.units * BITS;
        let ([start, ..], [.., end]) = (blocks, blocks) else { return };
        let units = end.units().end - start.unit;
        let first_byte = start.columns.start / 8 * BITS;
        let (first_column, first_group) = (start.columns.start, start.group);
        // The panel after this one.
        let ahead = shape.vectors * LANES * rows[0].codes.len();
        let mut padded = [[0; 16]; LANES];
        for (quad, first) in (0..units).step_by(4 * window.units).enumerate() {
            let start = first_byte + quad * bytes_a_quad;
            let mut words = [&[0; 16]; LANES];
            let asks = start % 64 < bytes_a_quad;
            if start + 16 <= rows[0].codes.len() {
                for (row, words) in rows.iter().zip(&mut words) {
                    *words = row.codes[start..].first_chunk().expect("rows are equally long");
                    if asks {
                        simd.prefetch(words.as_ptr().wrapping_add(ahead));
                    }
                }
            } else {
                for ((row, words), padded) in rows.iter().zip(&mut words).zip(&mut padded) {
                    let bytes = &row.codes[start..];
                    padded.fill(0);
                    padded[..bytes.len()].copy_from_slice(bytes);
                    *words = padded;
                }
            }
            let transposed = match &window.order {
                Some(order) => simd.transpose_ordered(words, order),
                None => simd.transpose_words(words),
            };
            for (word, &words) in transposed.iter().enumerate() {
                for i in 0..window.units {
                    let unit = first + word * window.units + i;
                    if unit >= units {
                        return;
                    }
                    let shift = if window.units == 1 { window.shift[word] as usize } else { i * 4 * BITS };
                    let codes = simd.unpack_lanes(words, BITS as u32, shift as u32);
                    let to = &mut self.codes[unit * shape.vectors + vector].0;
                    simd.store(codes, bytemuck::cast_mut(to));
                    if BITS == 1 {
                        // See `unpack_codes`.
                        to.iter_mut().for_each(|codes| *codes <<= 1);
                    }
                    if shape.signed {
                        let group = (first_column + 4 * unit) / rows[0].layout.group;
                        subtract(to, &scratch.subtract[group - first_group]);
                    }
                }
            }
        }
    }

    /// Codes of any grid in any blocks: rows are unpacked first and transposed then.
    #[inline(always)]
    fn rows<S: Simd>(
        &mut self,
        simd: S,
        rows: &[PackedRow; LANES],
        (blocks, vector, shape): (&[Block], usize, PanelShape),
        scratch: &mut Scratch,
    ) {
        let ([start, ..], [.., end]) = (blocks, blocks) else { return };
        let columns = start.columns.start..end.columns.end;
        let width = columns.len().next_multiple_of(64) + 64;
        scratch.unpacked.resize(LANES * width, 0);
        for (row, codes) in rows.iter().zip(scratch.unpacked.chunks_exact_mut(width)) {
            unpack_codes(simd, row.layout.grid, row.codes, columns.clone(), codes);
            let [from, to] = [columns.start, columns.end].map(|column| row.layout.code_bytes(column));
            for line in (from..to).step_by(64) {
                simd.prefetch(row.codes.as_ptr().wrapping_add(shape.vectors * LANES * row.codes.len() + line));
            }
        }
        for block in blocks {
            let units = block.units();
            for first in units.clone().step_by(4) {
                let column = block.columns.start - columns.start + 4 * (first - units.start);
                let mut words = [&[0; 16]; LANES];
                for (lane, words) in words.iter_mut().enumerate() {
                    let codes = &scratch.unpacked[lane * width + column..];
                    *words = codes.first_chunk().expect("a row has room for one load past its columns");
                }
                let transposed = simd.transpose_words(words);
                for (unit, v) in (first..units.end.min(first + 4)).zip(transposed) {
                    let to = &mut self.codes[(unit - start.unit) * shape.vectors + vector].0;
                    simd.store(v, bytemuck::cast_mut(to));
                    if shape.signed {
                        subtract(to, &scratch.subtract[block.group - start.group]);
                    }
                }
            }
        }
    }
}

/// Subtracts bytes, which may wrap.
#[inline(always)]
fn subtract(from: &mut [i32; LANES], bytes: &[u8; 64]) {
    let from: &mut [u8; 64] = bytemuck::cast_mut(from);
    for (from, byte) in from.iter_mut().zip(bytes) {
        *from = from.wrapping_sub(*byte);
    }
}

/// The grid of the same width whose zero point is the same everywhere.
fn grid_without_zeros(grid: Grid) -> Grid {
    match grid {
        Grid::Int { bits, .. } => Grid::Int { bits, symmetric: true },
        other => other,
    }
}

/// How 16 bytes of a stream become four words of whole units of codes.
struct Window {
    /// Units of a word.
    units: usize,
    /// The byte of the stream that lands in each byte of the words; `None` where they follow one another.
    order: Option<[u8; 16]>,
    /// The bit of each word at which its unit starts, where it has but one.
    shift: [u32; 4],
}

/// For each width in bits. A unit of four codes starts at a whole or at half a byte.
const WINDOWS: [Window; 9] = {
    let mut table = [const { Window { units: 8, order: None, shift: [0; 4] } }; 9];
    let mut bits = 1;
    while bits <= 8 {
        let units = match bits {
            1 => 8,
            2 => 4,
            3 | 4 => 2,
            _ => 1,
        };
        let mut order = [0; 16];
        let mut word = 0;
        while word < 4 {
            let nibble = word * units * bits;
            table[bits].shift[word] = 4 * (nibble % 2) as u32;
            let mut byte = 0;
            while byte < 4 {
                // A byte past the window belongs to no code of the word.
                let from = nibble / 2 + byte;
                order[4 * word + byte] = if from < 16 { from as u8 } else { 15 };
                byte += 1;
            }
            word += 1;
        }
        table[bits].units = units;
        if units * bits != 8 {
            table[bits].order = Some(order);
        }
        bits += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::super::rounding::blocks;
    use super::*;

    #[test]
    fn parts_end_with_a_block_at_a_multiple_of_64() {
        let parts = |group, cols, columns| -> Vec<Range<usize>> {
            let blocks = blocks(Layout { grid: Grid::Ternary, group }, cols);
            let ends = |part: Range<usize>| blocks[part.start].columns.start..blocks[part.end - 1].columns.end;
            parts(&blocks, columns).map(ends).collect()
        };
        assert_eq!(parts(128, 1000, 256), [0..256, 256..512, 512..768, 768..1000]);
        assert_eq!(parts(48, 1000, 256), [0..384, 384..768, 768..1000]);
        assert_eq!(parts(100, 1700, 256), [0..1600, 1600..1700]);
        assert_eq!(parts(usize::MAX, 100, 256), [0..100]);
        assert_eq!(parts(1, 0, 256), []);
    }
}
