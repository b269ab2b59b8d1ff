//! Many tokens rounded to INT8 times packed weights.
//!
//! A task unpacks a strip of weight rows once into panels, in the order in which integer dot products take them, and runs
//! the strip, which then lies in the second-level cache, past its tokens. On tiles see [`amx`](super::amx).

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::amx::{self, Amx};
use super::dequantize::zero_point;
use super::matmul::{Output, tokens_a_task};
use super::matmul_int8::{Block, Quantize, blocks};
use super::panel::{self, Panel, PanelShape};
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::{Grid, Layout, Matrix};

/// Bytes of codes that a strip may hold: a part of the second-level cache of one core.
const STRIP_BYTES: usize = 1 << 18;

/// How many tokens and how many vectors of weight rows a tile of accumulators spans.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    vectors: usize,
    amx: bool,
}

/// The tile of the vector instructions.
const fn registers<S: Simd>() -> Shape {
    if S::REGISTERS >= 32 {
        Shape { tokens: 8, vectors: 3, amx: false }
    } else {
        Shape { tokens: 4, vectors: 1, amx: false }
    }
}

struct RegisterShape;

impl Kernel for RegisterShape {
    type Output = Shape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Shape {
        registers::<S>()
    }
}

/// Rounded activations. Those of tokens that are multiplied together lie together, token `t` of `height` from `first` on
/// at `first * units + unit * height + t`, or for AMX at `(first + t) * units + unit`; and scales and sums likewise at
/// `first * blocks + block * height + t`.
#[derive(Default)]
pub(super) struct Activations {
    pub(super) tokens: usize,
    pub(super) units: usize,
    /// The bytes of four codes each.
    pub(super) codes: Vec<i32>,
    pub(super) scales: Vec<f32>,
    /// Of the codes.
    pub(super) sums: Vec<f32>,
    /// The same, times the zero point that all weights share, negated; or just the same where there is none.
    starts: Vec<i32>,
}

/// How many of the tokens that remain a tile takes: a power of two up to `most`, which is one.
fn height(most: usize, remaining: usize) -> usize {
    if remaining >= most { most } else { 1 << remaining.ilog2() }
}

/// What one task needs to round activations.
#[derive(Default)]
struct Rounding {
    codes: Vec<i32>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Activations {
    fn round(
        &mut self,
        cpu: Cpu,
        x: &[f32],
        cols: usize,
        grid: Grid,
        (blocks, units): (&[Block], usize),
        shape: Shape,
    ) {
        self.tokens = x.len() / cols;
        self.units = units;
        let padded = self.tokens.next_multiple_of(shape.tokens);
        let factor = if grid.has_zero_points() { 1.0 } else { -zero_point(grid, &[], 0) };
        zeros(&mut self.codes, padded * units);
        zeros(&mut self.scales, padded * blocks.len());
        zeros(&mut self.sums, padded * blocks.len());
        zeros(&mut self.starts, padded * blocks.len());
        let Self { codes, scales, sums, starts, .. } = self;
        let per_block = shape.tokens * blocks.len();
        let numbers = scales.par_chunks_exact_mut(per_block).zip(sums.par_chunks_exact_mut(per_block));
        let numbers = numbers.zip(starts.par_chunks_exact_mut(per_block));
        let parts = x.par_chunks(shape.tokens * cols).zip(codes.par_chunks_exact_mut(shape.tokens * units));
        parts.zip(numbers).for_each_init(Rounding::default, |buffers, ((x, codes), ((scales, sums), starts))| {
            buffers.codes.resize(units, 0);
            buffers.scales.resize(blocks.len(), 0.0);
            buffers.sums.resize(blocks.len(), 0.0);
            let count = x.len() / cols;
            let (mut first, mut high) = (0, 0);
            for (token, x) in x.chunks_exact(cols).enumerate() {
                if token == first + high {
                    first = token;
                    high = if shape.amx { shape.tokens } else { height(shape.tokens, count - token) };
                }
                let rounded = bytemuck::cast_slice_mut(&mut buffers.codes);
                let (own_scales, own_sums) = (&mut buffers.scales, &mut buffers.sums);
                cpu.dispatch(Quantize { x, blocks, codes: rounded, scales: own_scales, sums: own_sums });
                if shape.amx {
                    codes[token * units..][..units].copy_from_slice(&buffers.codes);
                } else {
                    scatter(&buffers.codes, &mut codes[first * units + token - first..], high);
                }
                let at = first * blocks.len() + token - first;
                scatter(&buffers.scales, &mut scales[at..], high);
                scatter(&buffers.sums, &mut sums[at..], high);
                for (&sum, start) in buffers.sums.iter().zip(starts[at..].iter_mut().step_by(high)) {
                    *start = (factor * sum) as i32;
                }
            }
        });
    }
}

fn zeros<T: Copy + Default>(values: &mut Vec<T>, count: usize) {
    values.clear();
    values.resize(count, T::default());
}

fn scatter<T: Copy>(from: &[T], to: &mut [T], stride: usize) {
    let to = &mut to[..(from.len() - 1) * stride + 1];
    for (i, &from) in from.iter().enumerate() {
        to[i * stride] = from;
    }
}

impl Cpu {
    /// See [`matmul_int8`](Self::matmul_int8).
    pub(super) fn gemm_int8(self, x: &[f32], w: &Matrix, layout: Layout, out: &Output) {
        let (rows, cols) = (w.rows(), w.cols());
        let mut blocks = blocks(layout, cols);
        let amx = self.amx.filter(|_| amx::pays(&blocks));
        let (shape, units) = match amx {
            Some(_) => (Shape { tokens: amx::TOKENS, vectors: amx::VECTORS, amx: true }, amx::pad(&mut blocks)),
            None => (self.dispatch(RegisterShape), blocks.last().map_or(0, |block| block.units().end)),
        };
        let blocks = &blocks[..];
        let mut rounded = ACTIVATIONS.take();
        rounded.round(self, x, cols, layout.grid, (blocks, units), shape);
        let activations = &rounded;

        let panel_rows = shape.vectors * LANES;
        let panels = rows.div_ceil(panel_rows);
        let fit = STRIP_BYTES / (panel_rows * activations.units * 4);
        let strip_rows = fit.min(panels / (4 * rayon::current_num_threads())).max(1) * panel_rows;
        let strips = rows.div_ceil(strip_rows);
        let tokens_a_task = tokens_a_task(activations.tokens, strips).next_multiple_of(shape.tokens);
        let parts = activations.tokens.div_ceil(tokens_a_task);
        (0..strips * parts).into_par_iter().for_each(|task| {
            let (strip, part) = (task / parts, task % parts);
            let mut buffers = BUFFERS.take();
            self.dispatch(Strip {
                activations,
                tokens: part * tokens_a_task..activations.tokens.min((part + 1) * tokens_a_task),
                w,
                layout,
                rows: strip * strip_rows..rows.min((strip + 1) * strip_rows),
                blocks,
                out,
                buffers: &mut buffers,
                amx,
            });
            BUFFERS.set(buffers);
        });
        ACTIVATIONS.set(rounded);
    }
}

thread_local! {
    // Taken while they are used, so that a product that the thread starts meanwhile has its own. Fresh memory for each
    // task would cost more than the unpacking.
    static BUFFERS: Cell<Buffers> = Cell::default();
    static ACTIVATIONS: Cell<Activations> = Cell::default();
}

#[derive(Default)]
struct Buffers {
    scratch: panel::Scratch,
    panels: Vec<Panel>,
    sums: Vec<[f32; LANES]>, // of one tile
}

/// Some tokens times a strip of weight rows.
struct Strip<'a> {
    activations: &'a Activations,
    tokens: Range<usize>,
    w: &'a Matrix<'a>,
    layout: Layout,
    rows: Range<usize>,
    blocks: &'a [Block],
    out: &'a Output<'a>,
    buffers: &'a mut Buffers,
    amx: Option<Amx>,
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let grid = self.layout.grid;
        let most = if self.amx.is_some() { amx::VECTORS } else { registers::<S>().vectors };
        // The difference of an eight-bit code and a zero point needs nine bits.
        let signed = self.amx.is_some() && grid != Grid::Int { bits: 8, symmetric: false };
        let count = self.build(simd, most, signed);
        if let Some(amx) = self.amx {
            let tiles = amx.configure(self.blocks[0].units().len(), signed);
            for first in self.tokens.clone().step_by(amx::TOKENS) {
                for panel in &self.buffers.panels[..count] {
                    tiles.multiply(simd, self.activations, first, panel, self.blocks, self.out);
                }
            }
        } else if S::REGISTERS >= 32 {
            self.register_tiles::<S, false, 8, 3>(simd, count);
        } else if grid.max_code() < 128 {
            self.register_tiles::<S, true, 4, 1>(simd, count);
        } else {
            self.register_tiles::<S, false, 4, 1>(simd, count);
        }
    }
}

impl Strip<'_> {
    /// Unpacks the rows in panels of `most` vectors, and returns how many panels they make. Without AMX, what does not
    /// fill one makes panels of one vector.
    #[inline(always)]
    fn build<S: Simd>(&mut self, simd: S, most: usize, signed: bool) -> usize {
        let Buffers { scratch, panels, .. } = &mut *self.buffers;
        let (mut first, mut count) = (self.rows.start, 0);
        while first < self.rows.end {
            let remaining = self.rows.end - first;
            let vectors = if self.amx.is_some() || remaining > (most - 1) * LANES { most } else { 1 };
            let rows = first..first + remaining.min(vectors * LANES);
            if panels.len() == count {
                panels.push(Panel::default());
            }
            let shape = PanelShape { blocks: self.blocks, units: self.activations.units, vectors, signed };
            first = rows.end;
            panels[count].build(simd, self.w, self.layout, rows, shape, scratch);
            count += 1;
        }
        count
    }

    #[inline(always)]
    fn register_tiles<S: Simd, const SEVEN_BITS: bool, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        count: usize,
    ) {
        // On the heap: what the compiler keeps in registers and spills is stored twice.
        let mut sums = std::mem::take(&mut self.buffers.sums);
        sums.resize(M * N, [0.0; LANES]);
        if self.layout.grid.has_zero_points() {
            self.tiles::<S, SEVEN_BITS, true, M, N>(simd, count, &mut sums);
        } else {
            self.tiles::<S, SEVEN_BITS, false, M, N>(simd, count, &mut sums);
        }
        self.buffers.sums = sums;
    }

    #[inline(always)]
    fn tiles<S: Simd, const SEVEN_BITS: bool, const ZEROS: bool, const M: usize, const N: usize>(
        &self,
        simd: S,
        count: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let mut first = self.tokens.start;
        while first < self.tokens.end {
            let high = height(M, self.tokens.end - first);
            for panel in &self.buffers.panels[..count] {
                let whole = panel.rows.len() > (N - 1) * LANES;
                match high {
                    1 if whole => self.tile::<S, SEVEN_BITS, ZEROS, 1, N>(simd, first, panel, sums),
                    2 if whole => self.tile::<S, SEVEN_BITS, ZEROS, 2, N>(simd, first, panel, sums),
                    4 if whole => self.tile::<S, SEVEN_BITS, ZEROS, 4, N>(simd, first, panel, sums),
                    _ if whole => self.tile::<S, SEVEN_BITS, ZEROS, M, N>(simd, first, panel, sums),
                    1 => self.tile::<S, SEVEN_BITS, ZEROS, 1, 1>(simd, first, panel, sums),
                    2 => self.tile::<S, SEVEN_BITS, ZEROS, 2, 1>(simd, first, panel, sums),
                    4 => self.tile::<S, SEVEN_BITS, ZEROS, 4, 1>(simd, first, panel, sums),
                    _ => self.tile::<S, SEVEN_BITS, ZEROS, M, 1>(simd, first, panel, sums),
                }
            }
            first += high;
        }
    }

    /// `M` tokens times `N` vectors of weight rows. With `SEVEN_BITS`, all codes are below 128; with `ZEROS`, groups have
    /// zero points of their own.
    #[inline(always)]
    fn tile<S: Simd, const SEVEN_BITS: bool, const ZEROS: bool, const M: usize, const N: usize>(
        &self,
        simd: S,
        first: usize,
        panel: &Panel,
        results: &mut [[f32; LANES]],
    ) {
        let Activations { units, codes, scales, starts, .. } = self.activations;
        let codes = codes[first * units..][..M * units].as_chunks::<M>().0;
        let numbers = first * self.blocks.len()..(first + M) * self.blocks.len();
        let scales = scales[numbers.clone()].as_chunks::<M>().0;
        let starts = starts[numbers].as_chunks::<M>().0;
        let weights = panel.codes.as_chunks::<N>().0;
        let weight_scales = panel.scales.as_chunks::<N>().0;
        let minus_zeros = panel.minus_zeros.as_chunks::<N>().0;
        let results = &mut results.as_chunks_mut::<N>().0[..M];
        for result in results.as_flattened_mut() {
            simd.store(simd.splat(0.0), result);
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let mut dots = [[simd.splat_i32(0); N]; M];
            for m in 0..M {
                let start = simd.splat_i32(starts[index][m]);
                for n in 0..N {
                    dots[m][n] = start;
                    if ZEROS {
                        dots[m][n] = simd.mul_i32(start, simd.load_i32(&minus_zeros[block.group][n]));
                    }
                }
            }
            for (unit, codes) in weights[block.units()].iter().zip(&codes[block.units()]) {
                let mut weights = [simd.splat_i32(0); N];
                for n in 0..N {
                    weights[n] = simd.load_i32(&unit[n].0);
                }
                for m in 0..M {
                    let code = simd.splat_i32(codes[m]);
                    for n in 0..N {
                        dots[m][n] = if SEVEN_BITS {
                            simd.dot_u7i8(weights[n], code, dots[m][n])
                        } else {
                            simd.dot_u8i8(weights[n], code, dots[m][n])
                        };
                    }
                }
            }
            let mut weight_scale = [simd.splat(0.0); N];
            for n in 0..N {
                weight_scale[n] = simd.load(&weight_scales[block.group][n]);
            }
            for m in 0..M {
                let scale = simd.splat(scales[index][m]);
                for n in 0..N {
                    let dot = simd.i32_to_f32(dots[m][n]);
                    let scale = simd.mul(weight_scale[n], scale);
                    let result = &mut results[m][n];
                    simd.store(simd.mul_add(dot, scale, simd.load(result)), result);
                }
            }
        }
        for (m, results) in results.iter().enumerate() {
            // SAFETY: every task has rows or tokens of its own, and this one makes one reference at a time.
            let to = unsafe { self.out.segment(first + m, panel.rows.clone()) };
            for (to, result) in to.chunks_mut(LANES).zip(results) {
                match to.first_chunk_mut() {
                    Some(to) => simd.store(simd.load(result), to),
                    None => simd.store_partial(simd.load(result), to),
                }
            }
        }
    }
}
