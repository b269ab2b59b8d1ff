//! Many tokens rounded to INT8 times packed weights.
//!
//! A task unpacks some columns of a panel of weight rows, in the order in which integer dot products take them, and runs
//! them, which then lie in cache, past its tokens. On tiles see [`amx`](super::amx).

use std::cell::Cell;
use std::ops::Range;

use super::gemm_prepare::{Rounded, Tile};
use super::matmul::{Output, Shape, Split};
use super::panel::{self, Panel, PanelShape};
use super::rounding::Block;
use super::simd::{Aligned, LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::{Grid, Layout, Matrix};

/// Columns that are unpacked at a time, or some more: so many that their scales are widened together, so few that they lie
/// in the nearest caches while tokens run past them.
const COLUMNS: usize = 1024;

/// The tile of the vector instructions.
pub(super) struct RegisterShape;

impl Kernel for RegisterShape {
    type Output = Shape;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Shape {
        if S::REGISTERS >= 32 { Shape { tokens: 8, vectors: 3 } } else { Shape { tokens: 4, vectors: 1 } }
    }
}

/// A product, split into tasks.
pub(super) struct Job<'a> {
    x: &'a Rounded,
    w: &'a Matrix<'a>,
    layout: Layout,
    out: Output<'a>,
    split: Split,
}

impl<'a> Job<'a> {
    /// `w` is one of the weights that have `all_rows` rows together.
    pub(super) fn new(
        cpu: Cpu,
        x: &'a Rounded,
        w: &'a Matrix<'a>,
        layout: Layout,
        out: Output<'a>,
        all_rows: usize,
    ) -> Self {
        let split = Split::new(x.shape(cpu), w.rows(), all_rows, out.tokens(), x.tiles().len());
        Self { x, w, layout, out, split }
    }

    pub(super) fn tasks(&self) -> usize {
        self.split.tasks()
    }

    pub(super) fn run(&self, cpu: Cpu, task: usize) {
        let &Self { x, w, layout, ref out, split } = self;
        let (rows, tiles) = split.task(task);
        let mut buffers = BUFFERS.take();
        cpu.dispatch(Product { x, tiles: &x.tiles()[tiles], w, layout, rows, out, buffers: &mut buffers });
        BUFFERS.set(buffers);
    }
}

thread_local! {
    // Taken while they are used, so that a product that the thread starts meanwhile has its own. Fresh memory for each
    // task would cost more than the unpacking.
    static BUFFERS: Cell<Buffers> = Cell::default();
}

#[derive(Default)]
struct Buffers {
    scratch: panel::Scratch,
    panel: Panel,
    results: Vec<Aligned<[f32; LANES]>>, // [tokens, vectors]
}

/// Some tokens times a panel of weight rows.
struct Product<'a> {
    x: &'a Rounded,
    tiles: &'a [Tile],
    w: &'a Matrix<'a>,
    layout: Layout,
    rows: Range<usize>,
    out: &'a Output<'a>,
    buffers: &'a mut Buffers,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let grid = self.layout.grid;
        if let Some(amx) = self.x.amx {
            // The difference of an eight-bit code and a zero point needs nine bits.
            let signed = grid != Grid::Int { bits: 8, symmetric: false };
            let tiles = amx.configure(self.x.blocks[0].units().len(), signed);
            self.multiply(simd, tiles);
        } else if S::REGISTERS >= 32 {
            self.registers::<S, false, 8>(simd);
        } else if grid.max_code() < 128 {
            self.registers::<S, true, 4>(simd);
        } else {
            self.registers::<S, false, 4>(simd);
        }
    }
}

/// How a tile of tokens is multiplied with a panel.
pub(super) trait Multiply {
    /// Vectors of weight rows of a panel.
    const VECTORS: usize;
    /// Whether the zero points are subtracted from the codes of weights.
    fn signed(&self) -> bool;
    /// Adds the products of `blocks`, which are those of the panel, to `results`: [places, [`VECTORS`](Self::VECTORS)].
    fn add<S: Simd>(
        &self,
        simd: S,
        x: (&Rounded, &Tile),
        panel: &Panel,
        blocks: Range<usize>,
        results: &mut [Aligned<[f32; LANES]>],
    );
}

impl Product<'_> {
    #[inline(always)]
    fn registers<S: Simd, const SEVEN_BITS: bool, const M: usize>(self, simd: S) {
        let zeros = self.layout.grid.has_zero_points();
        match (self.rows.len().div_ceil(LANES), zeros) {
            (1, false) => self.multiply(simd, Registers::<SEVEN_BITS, false, M, 1>),
            (1, true) => self.multiply(simd, Registers::<SEVEN_BITS, true, M, 1>),
            // On other instruction sets a panel has one vector.
            _ if S::REGISTERS < 32 => unreachable!("a panel of one vector"),
            (2, false) => self.multiply(simd, Registers::<SEVEN_BITS, false, M, 2>),
            (2, true) => self.multiply(simd, Registers::<SEVEN_BITS, true, M, 2>),
            (_, false) => self.multiply(simd, Registers::<SEVEN_BITS, false, M, 3>),
            (_, true) => self.multiply(simd, Registers::<SEVEN_BITS, true, M, 3>),
        }
    }

    #[inline(always)]
    fn multiply<S: Simd, X: Multiply>(self, simd: S, by: X) {
        let Buffers { scratch, panel, results } = self.buffers;
        let tiles = self.tiles;
        let places: usize = tiles.iter().map(|tile| tile.places).sum();
        results.clear();
        results.resize(places * X::VECTORS, Aligned([0.0; LANES]));
        let shape = PanelShape { longest: self.x.blocks[0].units().len(), vectors: X::VECTORS, signed: by.signed() };
        for blocks in panel::parts(&self.x.blocks, COLUMNS) {
            panel.build(simd, self.w, self.layout, self.rows.clone(), &self.x.blocks[blocks.clone()], shape, scratch);
            let mut results = &mut results[..];
            for tile in tiles {
                let (own, others) = results.split_at_mut(tile.places * X::VECTORS);
                by.add(simd, (self.x, tile), panel, blocks.clone(), own);
                results = others;
            }
        }
        let mut results = &results[..];
        for tile in tiles {
            let (own, others) = results.split_at(tile.places * X::VECTORS);
            for (token, results) in own.chunks_exact(X::VECTORS).take(tile.tokens).enumerate() {
                // SAFETY: every task has rows or tokens of its own, and this one makes one reference at a time.
                let to = unsafe { self.out.segment(tile.first_token + token, self.rows.clone()) };
                for (to, result) in to.chunks_mut(LANES).zip(results) {
                    match to.first_chunk_mut() {
                        Some(to) => simd.store(simd.load(result), to),
                        None => simd.store_partial(simd.load(result), to),
                    }
                }
            }
            results = others;
        }
    }
}

/// `M` tokens, or a lower power of two, times `N` vectors of weight rows in registers. With `SEVEN_BITS`, all codes are
/// below 128; with `ZEROS`, groups have zero points of their own.
struct Registers<const SEVEN_BITS: bool, const ZEROS: bool, const M: usize, const N: usize>;

impl<const SEVEN_BITS: bool, const ZEROS: bool, const M: usize, const N: usize> Multiply
    for Registers<SEVEN_BITS, ZEROS, M, N>
{
    const VECTORS: usize = N;

    fn signed(&self) -> bool {
        false
    }

    #[inline(always)]
    fn add<S: Simd>(
        &self,
        simd: S,
        (x, tile): (&Rounded, &Tile),
        panel: &Panel,
        blocks: Range<usize>,
        results: &mut [Aligned<[f32; LANES]>],
    ) {
        let blocks = (&x.blocks[blocks.clone()], blocks.start);
        match tile.tokens {
            1 => add::<S, SEVEN_BITS, ZEROS, 1, N>(simd, tile, panel, blocks, results),
            2 => add::<S, SEVEN_BITS, ZEROS, 2, N>(simd, tile, panel, blocks, results),
            4 if M > 4 => add::<S, SEVEN_BITS, ZEROS, 4, N>(simd, tile, panel, blocks, results),
            _ => add::<S, SEVEN_BITS, ZEROS, M, N>(simd, tile, panel, blocks, results),
        }
    }
}

/// Adds the products of `M` tokens and `N` vectors of weight rows over `blocks`, the first of which is the
/// `first_block`-th, to `results`.
#[inline(always)]
fn add<S: Simd, const SEVEN_BITS: bool, const ZEROS: bool, const M: usize, const N: usize>(
    simd: S,
    tile: &Tile,
    panel: &Panel,
    (blocks, first_block): (&[Block], usize),
    results: &mut [Aligned<[f32; LANES]>],
) {
    let Some(first) = blocks.first() else { return };
    let codes = &tile.codes.as_chunks::<M>().0[first.unit..];
    let scales = &tile.scales.as_chunks::<M>().0[first_block..];
    let starts = &tile.starts.as_chunks::<M>().0[first_block..];
    let weights = panel.codes.as_chunks::<N>().0;
    let weight_scales = panel.scales.as_chunks::<N>().0;
    let minus_zeros = panel.minus_zeros.as_chunks::<N>().0;
    let results = &mut results.as_chunks_mut::<N>().0[..M];
    for (index, block) in blocks.iter().enumerate() {
        let group = block.group - first.group;
        let mut dots = [[simd.splat_i32(0); N]; M];
        for m in 0..M {
            let start = simd.splat_i32(starts[index][m]);
            for n in 0..N {
                dots[m][n] = start;
                if ZEROS {
                    dots[m][n] = simd.mul_i32(start, simd.load_i32(&minus_zeros[group][n]));
                }
            }
        }
        let units = block.unit - first.unit..block.units().end - first.unit;
        for (unit, codes) in weights[units.clone()].iter().zip(&codes[units]) {
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
            weight_scale[n] = simd.load(&weight_scales[group][n]);
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
}
