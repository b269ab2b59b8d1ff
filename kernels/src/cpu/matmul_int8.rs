//! Activations rounded to INT8 times packed weights: exact integer dot products, f32 scales.
//!
//! Lanes are weight rows. A task unpacks 16 rows, transposes their codes by fours of columns, and runs the panel over
//! all tokens, so a token's result does not depend on the others.

use std::ops::Range;

use rayon::prelude::*;

use super::dequantize::{Row, load_floats, row, unpack_codes, zero_point};
use super::gemv::{Arithmetic, MAX_TOKENS};
use super::matmul::{Output, tokens_a_task};
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::{Data, Layout, Matrix};

/// The columns that share one activation scale when activations are rounded to INT8.
///
/// Blocks restart at each weight group and are `min(group, 64)` columns wide; the last block of a group, and of the row,
/// may be shorter. So no block crosses a group, and at most 64 products of a code (at most 255) and an activation (at most
/// 127) add up to an integer that f32 holds exactly.
pub fn activation_blocks(group: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let group_end = cols.min((start / group + 1).saturating_mul(group));
        let block = start..group_end.min(start + 64);
        start = block.end;
        (!block.is_empty()).then_some(block)
    })
}

/// A block and where it stands.
#[derive(Clone)]
struct Block {
    columns: Range<usize>,
    group: usize,
    /// Where its codes start in units of four; each block is padded to whole units.
    unit: usize,
}

impl Block {
    fn units(&self) -> Range<usize> {
        self.unit..self.unit + self.columns.len().div_ceil(4)
    }
}

fn blocks(layout: Layout, cols: usize) -> Vec<Block> {
    let mut unit = 0;
    activation_blocks(layout.group, cols)
        .map(|columns| {
            let block = Block { group: columns.start / layout.group, columns, unit };
            unit = block.units().end;
            block
        })
        .collect()
}

/// Rounded activations of all tokens.
struct Activations {
    units: usize,
    codes: Vec<[i8; 4]>, // [tokens, units]
    scales: Vec<f32>,    // [tokens, blocks]
    sums: Vec<f32>,      // [tokens, blocks], of the codes; exact
}

/// Rounds the activations of one token.
struct Quantize<'a> {
    x: &'a [f32], // [cols]
    blocks: &'a [Block],
    codes: &'a mut [[i8; 4]], // [units], zero
    scales: &'a mut [f32],    // [blocks]
    sums: &'a mut [f32],      // [blocks]
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, block) in self.blocks.iter().enumerate() {
            let x = &self.x[block.columns.clone()];
            let zero = simd.splat(0.0);
            let (mut most, mut poison) = (zero, zero);
            for x in x.chunks(LANES) {
                let x = simd.load_partial(x);
                most = simd.max(simd.abs(x), most);
                // Stays zero until infinity or NaN makes it NaN.
                poison = simd.mul_add(x, zero, poison);
            }
            let scale = simd.max_lane(most) / 127.0 + simd.sum(poison);
            self.scales[i] = scale;
            let codes = self.codes[block.units()].as_flattened_mut();
            let mut sum = 0;
            if scale > 0.0 {
                for (x, codes) in x.chunks(LANES).zip(codes.chunks_mut(LANES)) {
                    let mut rounded = [0.0; LANES];
                    simd.store(simd.round_even(simd.div(simd.load_partial(x), simd.splat(scale))), &mut rounded);
                    for (code, rounded) in codes.iter_mut().zip(rounded) {
                        *code = rounded as i8;
                        sum += i32::from(*code);
                    }
                }
            }
            self.sums[i] = sum as f32;
        }
    }
}

impl Cpu {
    /// `out = x * w^T` with activations rounded to INT8 while it runs. `x` is [tokens, cols], `out` is [tokens, rows].
    ///
    /// Activations are rounded symmetrically, half to even, with one f32 scale `absmax / 127` for each block of
    /// [`activation_blocks`]; a block with an activation that is not finite makes the token's result NaN. Integer dot
    /// products are exact; scales and sums over blocks are f32. A float matrix has no codes, and is multiplied as
    /// [`matmul`](Self::matmul) does.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul_int8(self, x: &[f32], w: &Matrix, out: &mut [f32]) {
        let (rows, cols) = (w.rows(), w.cols());
        let Data::Quantized { layout, .. } = w.data() else { return self.matmul(x, w, out) };
        if rows == 0 || cols == 0 {
            out.fill(0.0);
            return;
        }
        assert!(x.len().is_multiple_of(cols), "the activations are not whole rows");
        let tokens = x.len() / cols;
        if tokens <= MAX_TOKENS {
            return self.few_tokens(x, cols, std::slice::from_ref(w), &mut [out], Arithmetic::Int8);
        }
        let out = &Output::new(out, tokens, rows);
        let blocks = &blocks(layout, cols)[..];
        let units = blocks.last().map_or(0, |block| block.units().end);
        let mut activations = Activations {
            units,
            codes: vec![[0; 4]; tokens * units],
            scales: vec![0.0; tokens * blocks.len()],
            sums: vec![0.0; tokens * blocks.len()],
        };
        let tokens_in = x.par_chunks_exact(cols).zip(activations.codes.par_chunks_exact_mut(units));
        let blocks_out = activations.scales.par_chunks_exact_mut(blocks.len());
        let blocks_out = blocks_out.zip(activations.sums.par_chunks_exact_mut(blocks.len()));
        tokens_in.zip(blocks_out).for_each(|((x, codes), (scales, sums))| {
            self.dispatch(Quantize { x, blocks, codes, scales, sums });
        });

        let row_tasks = rows.div_ceil(LANES);
        let tokens_a_task = tokens_a_task(tokens, row_tasks);
        let token_tasks = tokens.div_ceil(tokens_a_task);
        let activations = &activations;
        (0..row_tasks * token_tasks).into_par_iter().for_each_init(Panel::default, |panel, task| {
            let (row, token) = (task / token_tasks * LANES, task % token_tasks * tokens_a_task);
            self.dispatch(Multiply {
                activations,
                tokens: token..tokens.min(token + tokens_a_task),
                w,
                rows: row..rows.min(row + LANES),
                blocks,
                out,
                panel,
            });
        });
    }
}

/// 16 weight rows; the lanes of absent rows hold what an earlier panel left, and are not stored.
#[derive(Default)]
struct Panel {
    unpacked: Vec<u8>,              // [LANES, cols and room for one load past them]
    codes: Vec<[f32; LANES]>,       // [units]: the bits of four codes in each lane
    floats: Vec<f32>,               // [groups] of one row
    scales: Vec<[f32; LANES]>,      // [groups]
    minus_zeros: Vec<[f32; LANES]>, // [groups]
}

impl Panel {
    #[inline(always)]
    fn build<S: Simd>(&mut self, simd: S, w: &Matrix, rows: Range<usize>, blocks: &[Block]) {
        let cols = w.cols();
        let width = cols.next_multiple_of(64) + 64;
        self.unpacked.resize(LANES * width, 0);
        for (lane, index) in rows.enumerate() {
            let Row::Packed(row) = row(w, index) else { return };
            let Layout { grid, .. } = row.layout;
            let groups = row.layout.groups(cols);
            unpack_codes(simd, grid, row.codes, 0..cols, &mut self.unpacked[lane * width..][..width]);
            self.floats.resize(groups, 0.0);
            self.scales.resize(groups, [0.0; LANES]);
            self.minus_zeros.resize(groups, [0.0; LANES]);
            load_floats(simd, row.scale_type, row.scales, &mut self.floats);
            for group in 0..groups {
                self.scales[group][lane] = self.floats[group];
                self.minus_zeros[group][lane] = -zero_point(grid, row.zeros, group);
            }
        }
        self.codes.resize(blocks.last().map_or(0, |block| block.units().end).next_multiple_of(4), [0.0; LANES]);
        for block in blocks {
            let units = block.units();
            for first in units.clone().step_by(4) {
                let column = block.columns.start + 4 * (first - units.start);
                let mut words = [&[0; 16]; LANES];
                for (lane, words) in words.iter_mut().enumerate() {
                    let codes = &self.unpacked[lane * width + column..];
                    *words = codes.first_chunk().expect("a row has room for one load past its columns");
                }
                let transposed = simd.transpose_words(words);
                for (to, v) in self.codes[first..units.end.min(first + 4)].iter_mut().zip(transposed) {
                    simd.store(v, to);
                }
            }
        }
    }
}

/// Some tokens times 16 weight rows.
struct Multiply<'a> {
    activations: &'a Activations,
    tokens: Range<usize>,
    w: &'a Matrix<'a>,
    rows: Range<usize>,
    blocks: &'a [Block],
    out: &'a Output<'a>,
    panel: &'a mut Panel,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.panel.build(simd, self.w, self.rows.clone(), self.blocks);
        let Data::Quantized { layout, .. } = self.w.data() else { return };
        if layout.grid.max_code() < 128 { self.tiles::<S, true>(simd) } else { self.tiles::<S, false>(simd) }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const SEVEN_BITS: bool>(&self, simd: S) {
        let at_a_time = if S::REGISTERS >= 32 { 8 } else { 4 };
        for start in self.tokens.clone().step_by(at_a_time) {
            match at_a_time.min(self.tokens.end - start) {
                1 => self.tile::<S, SEVEN_BITS, 1>(simd, start),
                2 => self.tile::<S, SEVEN_BITS, 2>(simd, start),
                3 => self.tile::<S, SEVEN_BITS, 3>(simd, start),
                4 => self.tile::<S, SEVEN_BITS, 4>(simd, start),
                5 => self.tile::<S, SEVEN_BITS, 5>(simd, start),
                6 => self.tile::<S, SEVEN_BITS, 6>(simd, start),
                7 => self.tile::<S, SEVEN_BITS, 7>(simd, start),
                _ => self.tile::<S, SEVEN_BITS, 8>(simd, start),
            }
        }
    }

    /// `M` tokens from `first` on; with `SEVEN_BITS`, all codes are below 128.
    #[inline(always)]
    fn tile<S: Simd, const SEVEN_BITS: bool, const M: usize>(&self, simd: S, first: usize) {
        let Activations { units, codes, scales, sums } = self.activations;
        let mut out = [simd.splat(0.0); M];
        for (index, block) in self.blocks.iter().enumerate() {
            let mut tokens = [&codes[..0]; M];
            for (m, token) in tokens.iter_mut().enumerate() {
                *token = &codes[(first + m) * units..][block.units()];
            }
            let mut dots = [simd.splat_i32(0); M];
            for (unit, codes) in self.panel.codes[block.units()].iter().enumerate() {
                let codes = bytemuck::cast_ref(codes);
                for m in 0..M {
                    dots[m] = if SEVEN_BITS {
                        simd.dot_u7i8(codes, tokens[m][unit], dots[m])
                    } else {
                        simd.dot_u8i8(codes, tokens[m][unit], dots[m])
                    };
                }
            }
            let minus_zero = simd.load(&self.panel.minus_zeros[block.group]);
            let scale = simd.load(&self.panel.scales[block.group]);
            for m in 0..M {
                let at = (first + m) * self.blocks.len() + index;
                // Both terms and their sum are integers below 2^24, so this is exact.
                let dot = simd.mul_add(minus_zero, simd.splat(sums[at]), simd.i32_to_f32(dots[m]));
                let scale = simd.mul(scale, simd.splat(scales[at]));
                out[m] = simd.mul_add(dot, scale, out[m]);
            }
        }
        for (m, &v) in out.iter().enumerate() {
            // SAFETY: every task has rows or tokens of its own, and this one makes one reference at a time.
            let to = unsafe { self.out.segment(first + m, self.rows.clone()) };
            match to.first_chunk_mut() {
                Some(to) => simd.store(v, to),
                None => simd.store_partial(v, to),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_restart_at_groups() {
        let blocks = |group, cols| activation_blocks(group, cols).collect::<Vec<_>>();
        assert_eq!(blocks(32, 70), [0..32, 32..64, 64..70]);
        assert_eq!(blocks(100, 230), [0..64, 64..100, 100..164, 164..200, 200..230]);
        assert_eq!(blocks(1, 3), [0..1, 1..2, 2..3]);
        assert_eq!(blocks(usize::MAX, 65), [0..64, 64..65]);
        assert_eq!(blocks(7, 0), []);
    }
}
