//! A few tokens times packed weights: decoding is fused with the dot products, and every weight is read once.

use std::ops::Range;

use super::Kernel;
use super::dequantize::{BLOCK, PackedRow, Row, Scratch, decode, load_floats, row, unpack_codes, zero_point};
use super::matmul::Output;
use super::simd::{LANES, Simd};
use crate::matrix::{Grid, Matrix};

/// The most tokens that this kernel takes.
pub(super) const MAX_TOKENS: usize = 7;

/// Columns of activations in a row, padded with zeros for whole chunks of codes.
pub(super) fn padded_columns(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

/// Dot products of some rows with all tokens.
pub(super) struct Gemv<'a> {
    pub(super) x: &'a [f32], // [tokens, padded_columns]
    pub(super) w: &'a Matrix<'a>,
    pub(super) rows: Range<usize>,
    pub(super) out: &'a Output<'a>,
}

impl Kernel for Gemv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = padded_columns(self.w.cols());
        let at_a_time = if S::REGISTERS >= 32 { MAX_TOKENS } else { 2 };
        for (i, x) in self.x.chunks(at_a_time * width).enumerate() {
            let first = i * at_a_time;
            match x.len() / width {
                1 => self.tokens::<S, 1>(simd, first, x),
                2 => self.tokens::<S, 2>(simd, first, x),
                3 => self.tokens::<S, 3>(simd, first, x),
                4 => self.tokens::<S, 4>(simd, first, x),
                5 => self.tokens::<S, 5>(simd, first, x),
                6 => self.tokens::<S, 6>(simd, first, x),
                7 => self.tokens::<S, 7>(simd, first, x),
                tokens => unreachable!("{tokens} tokens at a time"),
            }
        }
    }
}

/// Two partial sums for each token: over the columns of even and of odd vectors.
type Sums<S, const T: usize> = [[<S as Simd>::F32; 2]; T];

impl Gemv<'_> {
    #[inline(always)]
    fn tokens<S: Simd, const T: usize>(&self, simd: S, first_token: usize, x: &[f32]) {
        let cols = self.w.cols();
        let width = padded_columns(cols);
        let mut tokens = [x; T];
        for (i, token) in tokens.iter_mut().enumerate() {
            *token = &x[i * width..][..width];
        }
        let mut scratch = Scratch::new();
        let mut weights = [0.0; BLOCK];
        let mut groups = Groups::default();
        for index in self.rows.clone() {
            let row = row(self.w, index);
            let mut sums = [[simd.splat(0.0); 2]; T];
            if let Row::Packed(row) = row
                && pairs_share_a_group(&row, cols)
            {
                groups.load(simd, &row, cols);
                match row.layout.grid.stream_bits() {
                    Some(bits @ 1..=4) => narrow_dot(simd, bits, &row, &groups, &tokens, &mut sums),
                    _ => wide_dot(simd, &row, &groups, &tokens, &mut scratch.codes, &mut sums),
                }
                self.store(simd, index, first_token, &sums);
                continue;
            }
            for start in (0..cols).step_by(BLOCK) {
                let columns = start..cols.min(start + BLOCK);
                let whole = columns.len().next_multiple_of(2 * LANES);
                weights[columns.len()..whole].fill(0.0);
                let decoded = &mut weights[..columns.len()];
                decode(simd, row, columns, &mut scratch, decoded);
                for (i, w) in weights[..whole].as_chunks::<LANES>().0.as_chunks::<2>().0.iter().enumerate() {
                    let w = [simd.load(&w[0]), simd.load(&w[1])];
                    for (sums, x) in sums.iter_mut().zip(&tokens) {
                        let (x, _) = x[start + 2 * LANES * i..].as_chunks::<LANES>();
                        sums[0] = simd.mul_add(w[0], simd.load(&x[0]), sums[0]);
                        sums[1] = simd.mul_add(w[1], simd.load(&x[1]), sums[1]);
                    }
                }
            }
            self.store(simd, index, first_token, &sums);
        }
    }

    #[inline(always)]
    fn store<S: Simd, const T: usize>(&self, simd: S, row: usize, first_token: usize, sums: &Sums<S, T>) {
        for (i, sums) in sums.iter().enumerate() {
            let sum = simd.sum(simd.add(sums[0], sums[1]));
            // SAFETY: every task has rows of its own, and this one makes one reference at a time.
            let out = unsafe { self.out.segment(first_token + i, row..row + 1) };
            out[0] = sum;
        }
    }
}

/// Scales and zero points of one row, as f32.
#[derive(Default)]
struct Groups {
    cols: usize,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Groups {
    #[inline(always)]
    fn load<S: Simd>(&mut self, simd: S, row: &PackedRow, cols: usize) {
        let count = row.layout.groups(cols);
        self.cols = cols;
        self.scales.resize(count, 0.0);
        load_floats(simd, row.scale_type, row.scales, &mut self.scales);
        if row.layout.grid.has_zero_points() || self.zeros.len() != count {
            self.zeros.clear();
            for group in 0..count {
                self.zeros.push(zero_point(row.layout.grid, row.zeros, group));
            }
        }
    }
}

/// Whether every pair of vectors lies in one group, so that its scale can wait until after the products.
fn pairs_share_a_group(row: &PackedRow, cols: usize) -> bool {
    row.layout.group.is_multiple_of(2 * LANES) || row.layout.group >= cols
}

/// Steps through the groups of a row by pairs of vectors.
struct Cursor {
    group: usize,
    index: usize,
    end: usize,
}

impl Cursor {
    #[inline(always)]
    fn new(group: usize) -> Self {
        Self { group, index: 0, end: group }
    }

    /// The group of `column`, which is at most one pair past the last one asked for.
    #[inline(always)]
    fn group(&mut self, column: usize) -> usize {
        if column >= self.end {
            self.index += 1;
            self.end += self.group;
        }
        self.index
    }
}

/// Adds the products of one pair of vectors to the sums. The scale is applied to the sum of two products: half a
/// multiplication a vector, and no weight is rounded.
#[inline(always)]
fn add_pair<S: Simd, const T: usize>(
    simd: S,
    w: [S::F32; 2],
    scale: S::F32,
    tokens: &[&[f32]; T],
    column: usize,
    sums: &mut Sums<S, T>,
) {
    let half = column / (2 * LANES) % 2;
    for (sums, x) in sums.iter_mut().zip(tokens) {
        let (x, _) = x[column..column + 2 * LANES].as_chunks::<LANES>();
        let products = simd.mul(w[0], simd.load(&x[0]));
        let products = simd.mul_add(w[1], simd.load(&x[1]), products);
        sums[half] = simd.mul_add(products, scale, sums[half]);
    }
}

/// The dot products of a row of up to four bits, decoded in registers. Columns past the last meet activations of zero.
#[inline(always)]
fn narrow_dot<S: Simd, const T: usize>(
    simd: S,
    bits: u32,
    row: &PackedRow,
    groups: &Groups,
    tokens: &[&[f32]; T],
    sums: &mut Sums<S, T>,
) {
    let binary = row.layout.grid == Grid::Binary;
    let width = 4 * bits as usize;
    let mut cursor = Cursor::new(row.layout.group);
    for (i, pair) in row.codes.chunks(width).enumerate() {
        let column = 2 * LANES * i;
        let index = cursor.group(column);
        let mut padded = [0; 16];
        let stream = match row.codes[width * i..].first_chunk() {
            Some(stream) => stream,
            None => {
                padded[..pair.len()].copy_from_slice(pair);
                &padded
            }
        };
        let zero = groups.zeros[index];
        let w = if binary {
            let [a, b] = simd.decode32(stream, bits, simd.splat(zero * 0.5));
            [simd.add(a, a), simd.add(b, b)]
        } else {
            simd.decode32(stream, bits, simd.splat(zero))
        };
        add_pair(simd, w, simd.splat(groups.scales[index]), tokens, column, sums);
    }
}

/// The dot products of a row on any grid, by way of bytes. Columns past the last meet activations of zero.
#[inline(always)]
fn wide_dot<S: Simd, const T: usize>(
    simd: S,
    row: &PackedRow,
    groups: &Groups,
    tokens: &[&[f32]; T],
    codes: &mut [u8; BLOCK + 64],
    sums: &mut Sums<S, T>,
) {
    let mut cursor = Cursor::new(row.layout.group);
    for start in (0..groups.cols).step_by(BLOCK) {
        let columns = start..groups.cols.min(start + BLOCK);
        unpack_codes(simd, row.layout.grid, row.codes, columns.clone(), codes);
        let pairs = &codes.as_chunks::<LANES>().0.as_chunks::<2>().0[..columns.len().div_ceil(2 * LANES)];
        for (i, codes) in pairs.iter().enumerate() {
            let column = start + 2 * LANES * i;
            let index = cursor.group(column);
            let zero = simd.splat(groups.zeros[index]);
            let w = [simd.sub(simd.load_u8(&codes[0]), zero), simd.sub(simd.load_u8(&codes[1]), zero)];
            add_pair(simd, w, simd.splat(groups.scales[index]), tokens, column, sums);
        }
    }
}
