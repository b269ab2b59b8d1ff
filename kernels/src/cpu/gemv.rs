//! A few tokens times packed weights: decoding is fused with the dot products, and every weight is read once.

use std::ops::Range;

use super::dequantize::{BLOCK, PackedRow, Row, Scratch, decode, load_floats, row, unpack_codes, zero_point};
use super::matmul::Output;
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::{Grid, Matrix};

/// The most tokens that this kernel takes.
pub(super) const MAX_TOKENS: usize = 7;

/// Columns of activations in a row, padded with zeros for whole chunks of codes.
pub(super) fn padded_columns(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

impl Cpu {
    /// `out = w * x` on the calling thread alone: bit for bit what [`matmul`](Self::matmul) gives for one token. `x` is
    /// `[cols]`, `out` is `[rows]`.
    ///
    /// # Panics
    /// If `x` or `out` has another length.
    pub fn matvec(self, x: &[f32], w: &Matrix, out: &mut [f32]) {
        let (rows, cols) = (w.rows(), w.cols());
        assert_eq!((x.len(), out.len()), (cols, rows), "the vectors do not fit the matrix");
        if cols == 0 {
            out.fill(0.0);
            return;
        }
        let mut activations = vec![0.0; padded_columns(cols)];
        activations[..cols].copy_from_slice(x);
        self.dispatch(Gemv { x: &activations, w, rows: 0..rows, out: &Output::new(out, 1, rows) });
    }
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

/// Two partial sums for each token, so that additions wait less for one another.
type Sums<S, const T: usize> = [[<S as Simd>::F32; T]; 2];

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
            let mut sums = [[simd.splat(0.0); T]; 2];
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
                    for (t, x) in tokens.iter().enumerate() {
                        let (x, _) = x[start + 2 * LANES * i..].as_chunks::<LANES>();
                        sums[0][t] = simd.mul_add(w[0], simd.load(&x[0]), sums[0][t]);
                        sums[1][t] = simd.mul_add(w[1], simd.load(&x[1]), sums[1][t]);
                    }
                }
            }
            self.store(simd, index, first_token, &sums);
        }
    }

    #[inline(always)]
    fn store<S: Simd, const T: usize>(&self, simd: S, row: usize, first_token: usize, sums: &Sums<S, T>) {
        let [even, odd] = sums;
        for t in 0..T {
            let sum = simd.sum(simd.add(even[t], odd[t]));
            // SAFETY: every task has rows of its own, and this one makes one reference at a time.
            let out = unsafe { self.out.segment(first_token + t, row..row + 1) };
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
    /// Zero points before they are widened.
    codes: Vec<u8>,
}

impl Groups {
    #[inline(always)]
    fn load<S: Simd>(&mut self, simd: S, row: &PackedRow, cols: usize) {
        let count = row.layout.groups(cols);
        self.cols = cols;
        self.scales.resize(count, 0.0);
        load_floats(simd, row.scale_type, row.scales, &mut self.scales);
        let grid = row.layout.grid;
        if !grid.has_zero_points() {
            self.zeros.resize(count, zero_point(grid, row.zeros, 0));
            return;
        }
        self.zeros.resize(count, 0.0);
        self.codes.resize(count.next_multiple_of(64) + 64, 0);
        unpack_codes(simd, grid, row.zeros, 0..count, &mut self.codes);
        for (i, zeros) in self.zeros.chunks_mut(LANES).enumerate() {
            let v = simd.load_u8(self.codes[LANES * i..].first_chunk().expect("64 codes of room"));
            match zeros.first_chunk_mut() {
                Some(zeros) => simd.store(v, zeros),
                None => simd.store_partial(v, zeros),
            }
        }
    }
}

/// Whether every pair of vectors lies in one group, so that its scale can wait until after the products.
fn pairs_share_a_group(row: &PackedRow, cols: usize) -> bool {
    row.layout.group.is_multiple_of(2 * LANES) || row.layout.group >= cols
}

/// Adds the products of one pair of vectors to a sum of each token. The scale is applied to the sum of two products: half
/// a multiplication a vector, and no weight is rounded.
#[inline(always)]
fn add_pair<S: Simd, const T: usize>(
    simd: S,
    w: [S::F32; 2],
    scale: S::F32,
    tokens: &[&[f32]; T],
    column: usize,
    sums: &mut [S::F32; T],
) {
    // Iterator adaptors are not always inlined here, and a call would spill the registers.
    for t in 0..T {
        let (x, _) = tokens[t][column..column + 2 * LANES].as_chunks::<LANES>();
        let products = simd.mul(w[0], simd.load(&x[0]));
        let products = simd.mul_add(w[1], simd.load(&x[1]), products);
        sums[t] = simd.mul_add(products, scale, sums[t]);
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
    let [even, odd] = sums;
    let binary = row.layout.grid == Grid::Binary;
    let width = 4 * bits as usize;
    let mut padded = [0; 32];
    for (group, (&zero, &scale)) in groups.zeros.iter().zip(&groups.scales).enumerate() {
        let columns = row.layout.group_range(group, groups.cols);
        let (zero, scale) = (simd.splat(if binary { 0.5 * zero } else { zero }), simd.splat(scale));
        let mut column = columns.start;
        while column < columns.end {
            let rest = &row.codes[width * (column / 32)..];
            let stream = match rest.first_chunk::<32>() {
                Some(stream) => stream,
                None => {
                    padded.fill(0);
                    padded[..rest.len()].copy_from_slice(rest);
                    &padded
                }
            };
            let w = decode_pair(simd, stream, bits, binary, zero);
            add_pair(simd, w, scale, tokens, column, even);
            if column + 32 < columns.end {
                let w = decode_pair(simd, &stream[width..], bits, binary, zero);
                add_pair(simd, w, scale, tokens, column + 32, odd);
            }
            column += 64;
        }
    }
}

/// Binary codes stand for `2 * (code - zero / 2)`; there `zero` is already halved.
#[inline(always)]
fn decode_pair<S: Simd>(simd: S, stream: &[u8], bits: u32, binary: bool, zero: S::F32) -> [S::F32; 2] {
    let [a, b] = simd.decode32(stream.first_chunk().expect("32 codes are at most 16 bytes"), bits, zero);
    if binary { [simd.add(a, a), simd.add(b, b)] } else { [a, b] }
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
    let [even, odd] = sums;
    let group = row.layout.group;
    for start in (0..groups.cols).step_by(BLOCK) {
        let block = start..groups.cols.min(start + BLOCK);
        unpack_codes(simd, row.layout.grid, row.codes, block.clone(), codes);
        for index in block.start / group..block.end.div_ceil(group) {
            let columns = row.layout.group_range(index, groups.cols);
            let end = columns.end.min(block.end);
            let (zero, scale) = (simd.splat(groups.zeros[index]), simd.splat(groups.scales[index]));
            let mut column = columns.start.max(block.start);
            while column < end {
                let codes =
                    codes[column - start..].first_chunk::<64>().expect("the buffer is 64 longer than the block");
                let codes = codes.as_chunks::<LANES>().0;
                let w = [simd.sub(simd.load_u8(&codes[0]), zero), simd.sub(simd.load_u8(&codes[1]), zero)];
                add_pair(simd, w, scale, tokens, column, even);
                if column + 32 < end {
                    let w = [simd.sub(simd.load_u8(&codes[2]), zero), simd.sub(simd.load_u8(&codes[3]), zero)];
                    add_pair(simd, w, scale, tokens, column + 32, odd);
                }
                column += 64;
            }
        }
    }
}
