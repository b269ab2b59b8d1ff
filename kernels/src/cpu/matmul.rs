//! Activations times packed weights in f32.
//!
//! Many tokens: a task decodes and transposes [`BLOCK`] columns of a panel of weight rows at a time and multiplies the
//! panel, which then lies in cache, with every token. Few tokens: see [`gemv`](super::gemv).

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::dequantize::{BLOCK, Scratch, decode, row};
use super::gemv::{Arithmetic, MAX_TOKENS};
use super::pool::for_each_init;
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::matrix::Matrix;

/// Tokens below which a task spends too much of its time decoding.
const MIN_TOKENS_A_TASK: usize = 128;

/// The output of a matrix product, written by tasks that each have a part of its own. [tokens, rows]
pub(super) struct Output<'a> {
    values: *mut f32,
    tokens: usize,
    rows: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a mutable borrow of plain numbers; that tasks do not overlap is the promise that `segment` asks for.
unsafe impl Send for Output<'_> {}
// SAFETY: as above; `segment` is the only access.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(super) fn new(values: &'a mut [f32], tokens: usize, rows: usize) -> Self {
        assert_eq!(values.len(), tokens * rows, "the output is not one value for each token and row");
        Self { values: values.as_mut_ptr(), tokens, rows, borrow: PhantomData }
    }

    /// The outputs of one token for consecutive weight rows.
    ///
    /// # Safety
    /// No other reference to any of these values exists while the result lives.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that segments do not overlap")]
    #[inline(always)]
    pub(super) unsafe fn segment(&self, token: usize, rows: Range<usize>) -> &mut [f32] {
        assert!(token < self.tokens && rows.start <= rows.end && rows.end <= self.rows);
        // SAFETY: the range was checked against the borrowed slice of tokens * rows values; that it is not aliased is
        // the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(token * self.rows + rows.start), rows.len()) }
    }
}

/// Splits the tokens so that all threads have work, in parts of at least [`MIN_TOKENS_A_TASK`]. `row_tasks` is the number
/// of parts that the weight rows make.
pub(super) fn tokens_a_task(tokens: usize, row_tasks: usize) -> usize {
    let parts = (4 * rayon::current_num_threads()).div_ceil(row_tasks.max(1));
    tokens.div_ceil(parts).max(MIN_TOKENS_A_TASK)
}

impl Cpu {
    /// `out = x * w^T` with activations as they are. `x` is [tokens, cols], `out` is [tokens, rows].
    ///
    /// A token's result depends on how many others are in the call in one way only: up to 7 tokens its sums run in another
    /// order than from 8 on.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(self, x: &[f32], w: &Matrix, out: &mut [f32]) {
        let (rows, cols) = (w.rows(), w.cols());
        if rows == 0 || cols == 0 {
            out.fill(0.0);
            return;
        }
        assert!(x.len().is_multiple_of(cols), "the activations are not whole rows");
        let tokens = x.len() / cols;
        if tokens <= MAX_TOKENS {
            return self.few_tokens(x, cols, std::slice::from_ref(w), &mut [out], Arithmetic::Exact);
        }
        let out = &Output::new(out, tokens, rows);
        let shape = self.dispatch(TileShape);
        let panel_rows = shape.vectors * LANES;
        let panels = rows.div_ceil(panel_rows);
        let tiles_a_task = tokens_a_task(tokens, panels).div_ceil(shape.tokens);
        let packed = pack_activations(x, cols, shape.tokens);
        let tiles: Vec<&[f32]> = packed.chunks(tiles_a_task * shape.tokens * cols).collect();
        for_each_init(panels * tiles.len(), Buffers::default, |buffers, task| {
            let (panel, part) = (task / tiles.len(), task % tiles.len());
            self.dispatch(Gemm {
                x: tiles[part],
                first_token: part * tiles_a_task * shape.tokens,
                w,
                rows: panel * panel_rows..rows.min((panel + 1) * panel_rows),
                out,
                buffers,
            });
        });
    }
}

/// How many tokens and how many vectors of weight rows a tile of accumulators in registers spans.
#[derive(Clone, Copy)]
struct TileShape;

struct Tile {
    tokens: usize,
    vectors: usize,
}

impl Kernel for TileShape {
    type Output = Tile;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Tile {
        if S::REGISTERS >= 32 { Tile { tokens: 8, vectors: 3 } } else { Tile { tokens: 6, vectors: 1 } }
    }
}

/// Interleaves each `height` tokens so that a tile reads them in order: [tokens / height, cols, height]. The last tile
/// has as many tokens as remain.
fn pack_activations(x: &[f32], cols: usize, height: usize) -> Vec<f32> {
    let mut packed = vec![0.0; x.len()];
    packed.par_chunks_mut(height * cols).zip(x.par_chunks(height * cols)).for_each(|(to, from)| {
        let height = from.len() / cols;
        for (token, from) in from.chunks_exact(cols).enumerate() {
            for (to, &value) in to[token..].iter_mut().step_by(height).zip(from) {
                *to = value;
            }
        }
    });
    packed
}

/// What a task needs to build panels.
struct Buffers {
    scratch: Scratch,
    rows: Vec<[f32; BLOCK]>,  // [LANES]
    panel: Vec<[f32; LANES]>, // [BLOCK, vectors]
}

impl Default for Buffers {
    fn default() -> Self {
        Self { scratch: Scratch::new(), rows: vec![[0.0; BLOCK]; LANES], panel: Vec::new() }
    }
}

/// All tokens of a task times one panel of weight rows.
struct Gemm<'a> {
    x: &'a [f32], // tiles of [cols, tokens of the tile]
    first_token: usize,
    w: &'a Matrix<'a>,
    rows: Range<usize>,
    out: &'a Output<'a>,
    buffers: &'a mut Buffers,
}

impl Kernel for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::REGISTERS >= 32 { self.panels::<S, 8, 3>(simd) } else { self.panels::<S, 6, 1>(simd) }
    }
}

impl Gemm<'_> {
    #[inline(always)]
    fn panels<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        let cols = self.w.cols();
        for start in (0..cols).step_by(BLOCK) {
            let columns = start..cols.min(start + BLOCK);
            build_panel::<S, N>(simd, self.w, self.rows.clone(), columns.clone(), self.buffers);
            let panel = &self.buffers.panel.as_chunks::<N>().0[..columns.len()];
            for (i, x) in self.x.chunks(M * cols).enumerate() {
                let height = x.len() / cols;
                let x = &x[height * columns.start..height * columns.end];
                let to =
                    Place { out: self.out, token: self.first_token + i * M, rows: self.rows.clone(), add: start > 0 };
                match height {
                    1 => tile::<S, 1, N>(simd, x, panel, to),
                    2 => tile::<S, 2, N>(simd, x, panel, to),
                    3 => tile::<S, 3, N>(simd, x, panel, to),
                    4 => tile::<S, 4, N>(simd, x, panel, to),
                    5 => tile::<S, 5, N>(simd, x, panel, to),
                    6 => tile::<S, 6, N>(simd, x, panel, to),
                    7 => tile::<S, 7, N>(simd, x, panel, to),
                    8 => tile::<S, 8, N>(simd, x, panel, to),
                    height => unreachable!("a tile of {height} tokens"),
                }
            }
        }
    }
}

/// Decodes `columns` of `rows` into the panel, transposed: [columns, N, LANES]. Absent rows are zero.
#[inline(always)]
fn build_panel<S: Simd, const N: usize>(
    simd: S,
    w: &Matrix,
    rows: Range<usize>,
    columns: Range<usize>,
    buffers: &mut Buffers,
) {
    buffers.panel.resize(BLOCK * N, [0.0; LANES]);
    for n in 0..N {
        for (lane, decoded) in buffers.rows.iter_mut().enumerate() {
            let index = rows.start + n * LANES + lane;
            if index < rows.end {
                decode(simd, row(w, index), columns.clone(), &mut buffers.scratch, &mut decoded[..columns.len()]);
            } else {
                decoded.fill(0.0);
            }
        }
        let Some(decoded) = buffers.rows.first_chunk::<LANES>() else { return };
        for four in 0..columns.len().div_ceil(4) {
            let mut words = [&[0; 16]; LANES];
            for (words, decoded) in words.iter_mut().zip(decoded) {
                *words = &bytemuck::cast_ref::<[f32; BLOCK], [[u8; 16]; BLOCK / 4]>(decoded)[four];
            }
            for (k, v) in simd.transpose_words(words).into_iter().enumerate() {
                simd.store(v, &mut buffers.panel[(4 * four + k) * N + n]);
            }
        }
    }
}

/// Where a tile goes.
struct Place<'a> {
    out: &'a Output<'a>,
    token: usize,
    rows: Range<usize>,
    /// Whether to add to what is there.
    add: bool,
}

/// `M` tokens times `N` vectors of weight rows: an outer product for each column.
#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(simd: S, x: &[f32], panel: &[[[f32; LANES]; N]], to: Place) {
    let mut sums = [[simd.splat(0.0); N]; M];
    for (x, w) in x.as_chunks::<M>().0.iter().zip(panel) {
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
        let out = unsafe { to.out.segment(to.token + m, to.rows.clone()) };
        for (out, &sum) in out.chunks_mut(LANES).zip(sums) {
            match out.first_chunk_mut() {
                Some(out) => simd.store(if to.add { simd.add(simd.load(out), sum) } else { sum }, out),
                None => simd.store_partial(if to.add { simd.add(simd.load_partial(out), sum) } else { sum }, out),
            }
        }
    }
}
