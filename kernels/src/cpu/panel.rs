//! Weight rows unpacked and transposed, for products of many tokens.

use std::ops::Range;

use super::dequantize::{unpack_codes, zero_point};
use super::rounding::Block;
use super::simd::{Aligned, LANES, Simd};
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

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

/// Buffers of [`Panel::build`], one a thread.
#[derive(Default)]
pub(super) struct Scratch {
    unpacked: Vec<u8>,       // [LANES, columns of a part and room for one load past them]
    zeros: Vec<u8>,          // [LANES, groups of a part and room for one load past them]
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
        grow(&mut self.codes, (last.unit - first.unit + shape.longest) * shape.vectors, Unit([0; LANES]));
        grow(&mut self.scales, groups.len() * shape.vectors, Aligned([0.0; LANES]));
        grow(&mut self.minus_zeros, groups.len() * shape.vectors, Aligned([0; LANES]));
        let ahead = |block: &Block| 4 * (block.unit - first.unit) == block.columns.start - first.columns.start;
        let bits = layout.grid.stream_bits().filter(|_| blocks.iter().all(ahead));
        for vector in 0..shape.vectors {
            let sixteen =
                Sixteen::new(w, std::array::from_fn(|lane| (rows.start + vector * LANES + lane).min(rows.end - 1)));
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
        rows: &Sixteen,
        groups: Range<usize>,
        vector: usize,
        shape: PanelShape,
        scratch: &mut Scratch,
    ) {
        let grid = rows.layout.grid;
        // Where unpacking may start.
        let first_zero = groups.start / 64 * 64;
        let width = (groups.end - first_zero).next_multiple_of(64) + 64;
        if grid.has_zero_points() {
            grow(&mut scratch.zeros, LANES * width, 0);
            for (row, zeros) in rows.indices.into_iter().zip(scratch.zeros.chunks_exact_mut(width)) {
                let from = &rows.zeros[row * rows.zero_bytes..][..rows.zero_bytes];
                unpack_codes(simd, grid, from, first_zero..groups.end, zeros);
            }
        }
        if shape.signed {
            grow(&mut scratch.subtract, groups.len(), [0; 64]);
        }
        let bytes = rows.scale_type.bytes();
        let scale_bytes = rows.groups * bytes;
        let starts = rows.indices.map(|row| row * scale_bytes + groups.start * bytes);
        for start in starts {
            simd.prefetch(rows.scales.as_ptr().wrapping_add(shape.vectors * LANES * scale_bytes + start));
        }
        let same = zero_point(grid_without_zeros(grid), &[], 0);
        for (index, group) in groups.enumerate() {
            let at = index * shape.vectors + vector;
            let scales = match rows.scale_type {
                FloatType::F32 => {
                    let mut bytes = [0; 64];
                    for (start, to) in starts.iter().zip(bytes.as_chunks_mut::<4>().0) {
                        to.copy_from_slice(&rows.scales[start + 4 * index..][..4]);
                    }
                    simd.load_f32(&bytes)
                }
                half => {
                    let mut bytes = [0; 32];
                    for (start, to) in starts.iter().zip(bytes.as_chunks_mut::<2>().0) {
                        to.copy_from_slice(&rows.scales[start + 2 * index..][..2]);
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
        rows: &Sixteen,
        (blocks, vector, shape): (&[Block], usize, PanelShape),
        scratch: &Scratch,
    ) {
        let window = const { &WINDOWS[BITS] };
        let bytes_a_quad = 2 * window.units * BITS;
        let ([start, ..], [.., end]) = (blocks, blocks) else { return };
        let units = end.units().end - start.unit;
        let first_byte = start.columns.start / 8 * BITS;
        let (first_column, first_group) = (start.columns.start, start.group);
        let &Sixteen { codes, code_bytes, indices, .. } = rows;
        let starts = indices.map(|row| row * code_bytes);
        assert!(starts.iter().all(|start| start + code_bytes <= codes.len()));
        // The panel after this one.
        let ahead = shape.vectors * LANES * code_bytes;
        let mut padded = [[0; 16]; LANES];
        for (quad, first) in (0..units).step_by(4 * window.units).enumerate() {
            let at = first_byte + quad * bytes_a_quad;
            let mut words = [&[0; 16]; LANES];
            if at + 16 <= code_bytes {
                for (words, start) in words.iter_mut().zip(starts) {
                    // SAFETY: these 16 bytes are within `code_bytes` from `start` on, which are within the codes, as
                    // asserted.
                    *words = unsafe { &*codes.as_ptr().add(start + at).cast::<[u8; 16]>() };
                }
            } else {
                for ((words, start), padded) in words.iter_mut().zip(starts).zip(&mut padded) {
                    let bytes = &codes[start + at..start + code_bytes];
                    padded.fill(0);
                    padded[..bytes.len()].copy_from_slice(bytes);
                    *words = padded;
                }
            }
            // Once for each cache line.
            if at % 64 < bytes_a_quad {
                for start in starts {
                    simd.prefetch(codes.as_ptr().wrapping_add(start + at + ahead));
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
                        let group = (first_column + 4 * unit) / rows.layout.group;
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
        rows: &Sixteen,
        (blocks, vector, shape): (&[Block], usize, PanelShape),
        scratch: &mut Scratch,
    ) {
        let ([start, ..], [.., end]) = (blocks, blocks) else { return };
        let columns = start.columns.start..end.columns.end;
        let width = columns.len().next_multiple_of(64) + 64;
        grow(&mut scratch.unpacked, LANES * width, 0);
        let &Sixteen { layout, code_bytes, indices, .. } = rows;
        let bytes = [columns.start, columns.end].map(|column| layout.code_bytes(column));
        for (row, to) in indices.into_iter().zip(scratch.unpacked.chunks_exact_mut(width)) {
            let codes = &rows.codes[row * code_bytes..][..code_bytes];
            unpack_codes(simd, layout.grid, codes, columns.clone(), to);
            for line in (bytes[0]..bytes[1]).step_by(64) {
                simd.prefetch(codes.as_ptr().wrapping_add(shape.vectors * LANES * code_bytes + line));
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

/// Makes room for `count` values where there is less.
pub(super) fn grow<T: Copy>(values: &mut Vec<T>, count: usize, value: T) {
    if values.len() < count {
        values.resize(count, value);
    }
}

/// 16 rows of a quantized matrix, by their indices.
struct Sixteen<'a> {
    indices: [usize; LANES],
    layout: Layout,
    codes: &'a [u8],
    code_bytes: usize,
    scale_type: FloatType,
    scales: &'a [u8],
    /// Of a row.
    groups: usize,
    zeros: &'a [u8],
    zero_bytes: usize,
}

impl<'a> Sixteen<'a> {
    #[inline(always)]
    fn new(w: &Matrix<'a>, indices: [usize; LANES]) -> Self {
        let Data::Quantized { layout, codes, scale_type, scales, zeros } = w.data() else {
            unreachable!("the matrix is quantized")
        };
        let (code_bytes, groups) = (layout.code_bytes(w.cols()), layout.groups(w.cols()));
        let zero_bytes = layout.zero_bytes(w.cols());
        Self { indices, layout, codes, code_bytes, scale_type, scales, groups, zeros, zero_bytes }
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
        assert_eq!(parts(usize::MAX, 300, 256), [0..256, 256..300]);
        assert_eq!(parts(1, 0, 256), []);
    }
}
