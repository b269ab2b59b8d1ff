//! Activations of many tokens times packed weights in f32.
//!
//! A task unpacks some columns of a panel of weight rows, transposed, and runs them, which then lie in cache, past its
//! tokens.

use std::cell::Cell;
use std::ops::Range;

use super::dequantize::{Row, load_floats, row};
use super::matmul::{Output, Shape, Split};
use super::panel::{self, Panel, PanelShape};
use super::rounding::Block;
use super::simd::{Aligned, LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::{Data, Layout, Matrix};

/// Columns that are unpacked at a time, or some more. Their products are added before they join those of the columns before.
const COLUMNS: usize = 256;

/// The tile of accumulators in registers.
pub(super) struct RegisterShape;

impl Kernel for RegisterShape {
    type Output = Shape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Shape {
        if S::REGISTERS >= 32 { Shape { tokens: 8, vectors: 3 } } else { Shape { tokens: 6, vectors: 1 } }
    }
}

/// Columns that share a scale and lie between two multiples of 64, so that they are unpacked together.
fn blocks(layout: Layout, cols: usize) -> Vec<Block> {
    let (mut start, mut unit) = (0, 0);
    let next = || {
        let group = start / layout.group;
        let end = cols.min((group + 1).saturating_mul(layout.group)).min((start / 64 + 1) * 64);
        let block = Block { columns: start..end, group, unit };
        (start, unit) = (end, block.units().end);
        (!block.columns.is_empty()).then_some(block)
    };
    std::iter::from_fn(next).collect()
}

/// A product, split into tasks.
pub(super) struct Job<'a> {
    x: &'a [f32], // tiles of [cols, tokens of the tile]
    w: &'a Matrix<'a>,
    blocks: Vec<Block>,
    out: Output<'a>,
    /// Tokens of a tile.
    height: usize,
    split: Split,
}

impl<'a> Job<'a> {
    /// `x` is as [`Prepared::interleaved`](super::gemm_prepare::Prepared::interleaved) gives it; `w` is one of the weights
    /// that have `all_rows` rows together.
    pub(super) fn new(cpu: Cpu, x: &'a [f32], w: &'a Matrix<'a>, out: Output<'a>, all_rows: usize) -> Self {
        let shape = cpu.dispatch(RegisterShape);
        let tiles = out.tokens().div_ceil(shape.tokens);
        let split = Split::new(shape, w.rows(), all_rows, out.tokens(), tiles);
        let blocks = match w.data() {
            Data::Quantized { layout, .. } => blocks(layout, w.cols()),
            Data::Float { .. } => Vec::new(),
        };
        Self { x, w, blocks, out, height: shape.tokens, split }
    }

    pub(super) fn tasks(&self) -> usize {
        self.split.tasks()
    }

    pub(super) fn run(&self, cpu: Cpu, task: usize) {
        let &Self { x, w, ref blocks, ref out, height, split } = self;
        let (rows, tiles) = split.task(task);
        let tokens = tiles.start * height..out.tokens().min(tiles.end * height);
        let x = &x[tokens.start * w.cols()..tokens.end * w.cols()];
        let mut buffers = BUFFERS.take();
        cpu.dispatch(Product { x, first_token: tokens.start, w, blocks, rows, out, buffers: &mut buffers });
        BUFFERS.set(buffers);
    }
}

thread_local! {
    // Taken while they are used, so that a product that the thread starts meanwhile has its own.
    static BUFFERS: Cell<Buffers> = Cell::default();
}

#[derive(Default)]
struct Buffers {
    scratch: panel::Scratch,
    codes: Panel,
    rows: Vec<[f32; COLUMNS]>,           // [LANES]
    weights: Vec<Aligned<[f32; LANES]>>, // [columns, vectors]
}

/// Some tokens times a panel of weight rows.
struct Product<'a> {
    x: &'a [f32], // tiles of [cols, tokens of the tile]
    first_token: usize,
    w: &'a Matrix<'a>,
    blocks: &'a [Block],
    rows: Range<usize>,
    out: &'a Output<'a>,
    buffers: &'a mut Buffers,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.rows.len().div_ceil(LANES) {
            _ if S::REGISTERS < 32 => self.multiply::<S, 6, 1>(simd),
            1 => self.multiply::<S, 8, 1>(simd),
            2 => self.multiply::<S, 8, 2>(simd),
            _ => self.multiply::<S, 8, 3>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn multiply<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        let cols = self.w.cols();
        let mut parts = panel::parts(self.blocks, COLUMNS);
        let mut start = 0;
        while start < cols {
            let end = match (self.w.data(), parts.next()) {
                (Data::Quantized { layout, .. }, Some(part)) => {
                    let blocks = &self.blocks[part];
                    self.buffers.unpack::<S, N>(simd, self.w, layout, self.rows.clone(), blocks)
                }
                _ => self.buffers.widen::<S, N>(simd, self.w, self.rows.clone(), start..cols.min(start + COLUMNS)),
            };
            let weights = &self.buffers.weights.as_chunks::<N>().0[..end - start];
            for (i, x) in self.x.chunks(M * cols).enumerate() {
                let height = x.len() / cols;
                let x = &x[height * start..height * end];
                let to = To { out: self.out, token: self.first_token + i * M, rows: &self.rows, add: start > 0 };
                match height {
                    1 => tile::<S, 1, N>(simd, x, weights, to),
                    2 => tile::<S, 2, N>(simd, x, weights, to),
                    3 => tile::<S, 3, N>(simd, x, weights, to),
                    4 => tile::<S, 4, N>(simd, x, weights, to),
                    5 => tile::<S, 5, N>(simd, x, weights, to),
                    6 => tile::<S, 6, N>(simd, x, weights, to),
                    7 => tile::<S, 7, N>(simd, x, weights, to),
                    8 => tile::<S, 8, N>(simd, x, weights, to),
                    height => unreachable!("a tile of {height} tokens"),
                }
            }
            start = end;
        }
    }
}

impl Buffers {
    /// Unpacks `blocks`, at least one, of `rows` of a quantized matrix, transposed. Absent rows hold what the last one does.
    /// Gives the column after the last.
    #[inline(always)]
    fn unpack<S: Simd, const N: usize>(
        &mut self,
        simd: S,
        w: &Matrix,
        layout: Layout,
        rows: Range<usize>,
        blocks: &[Block],
    ) -> usize {
        let (first, last) = (&blocks[0], &blocks[blocks.len() - 1]);
        let longest = blocks.iter().map(|block| block.units().len()).max().unwrap_or(0);
        let shape = PanelShape { longest, vectors: N, signed: false };
        self.codes.build(simd, w, layout, rows, blocks, shape, &mut self.scratch);
        self.weights.resize(COLUMNS * N, Aligned([0.0; LANES]));
        let weights = self.weights.as_chunks_mut::<N>().0;
        let codes = self.codes.codes.as_chunks::<N>().0;
        for block in blocks {
            let group = block.group - first.group;
            let columns = block.columns.start - first.columns.start..block.columns.end - first.columns.start;
            let units = &codes[block.unit - first.unit..][..block.units().len()];
            for n in 0..N {
                let scale = simd.load(&self.codes.scales[group * N + n]);
                let minus_zero = simd.i32_to_f32(simd.load_i32(&self.codes.minus_zeros[group * N + n]));
                let zero = simd.neg(minus_zero);
                for (to, unit) in weights[columns.clone()].chunks_mut(4).zip(units) {
                    let codes = simd.load_bytes(bytemuck::cast_ref(&unit[n].0));
                    for (to, level) in to.iter_mut().zip(simd.levels::<false>(codes, zero)) {
                        simd.store(simd.mul(level, scale), &mut to[n]);
                    }
                }
            }
        }
        last.columns.end
    }

    /// Widens `columns`, at most [`COLUMNS`], of `rows` of a float matrix, transposed. Absent rows are zero. Gives the column
    /// after the last.
    #[inline(always)]
    fn widen<S: Simd, const N: usize>(
        &mut self,
        simd: S,
        w: &Matrix,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> usize {
        self.rows.resize(LANES, [0.0; COLUMNS]);
        self.weights.resize(COLUMNS * N, Aligned([0.0; LANES]));
        let Some(sixteen) = self.rows.first_chunk_mut::<LANES>() else { unreachable!("there are as many") };
        for n in 0..N {
            for (lane, to) in sixteen.iter_mut().enumerate() {
                let index = rows.start + n * LANES + lane;
                match (index < rows.end).then(|| row(w, index)) {
                    Some(Row::Float { dtype, values }) => {
                        let bytes = columns.start * dtype.bytes()..columns.end * dtype.bytes();
                        load_floats(simd, dtype, &values[bytes], &mut to[..columns.len()]);
                    }
                    _ => to.fill(0.0),
                }
            }
            for four in 0..columns.len().div_ceil(4) {
                let mut words = [&[0; 16]; LANES];
                for (words, values) in words.iter_mut().zip(&*sixteen) {
                    *words = &bytemuck::cast_ref::<[f32; COLUMNS], [[u8; 16]; COLUMNS / 4]>(values)[four];
                }
                for (k, v) in simd.transpose_words(words).into_iter().enumerate() {
                    simd.store(v, &mut self.weights[(4 * four + k) * N + n]);
                }
            }
        }
        columns.end
    }
}

/// Where a tile goes.
struct To<'a> {
    out: &'a Output<'a>,
    token: usize,
    rows: &'a Range<usize>,
    /// Whether to add to what is there.
    add: bool,
}

/// `M` tokens times `N` vectors of weight rows: an outer product for each column.
#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    x: &[f32],
    weights: &[[Aligned<[f32; LANES]>; N]],
    To { out, token, rows, add }: To,
) {
    let mut sums = [[simd.splat(0.0); N]; M];
    for (x, w) in x.as_chunks::<M>().0.iter().zip(weights) {
        let mut weights = [simd.splat(0.0); N];
        for n in 0..N {
            weights[n] = simd.load(&w[n]);
        }
        for m in 0..M {
            let x = simd.splat(x[m]);
            for n in 0..N {
                sums[m][n] = simd.mul_add(x, weights[n], sums[m][n]);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        // SAFETY: every task has rows or tokens of its own, and this one makes one reference at a time.
        let to = unsafe { out.segment(token + m, rows.clone()) };
        for (to, &sum) in to.chunks_mut(LANES).zip(sums) {
            match to.first_chunk_mut() {
                Some(to) => simd.store(if add { simd.add(simd.load(to), sum) } else { sum }, to),
                None => simd.store_partial(if add { simd.add(simd.load_partial(to), sum) } else { sum }, to),
            }
        }
    }
}
