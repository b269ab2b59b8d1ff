//! Activations times packed weights: few tokens one way, many another.
//!
//! See [`gemv`](super::gemv), [`gemm_exact`](super::gemm_exact) and [`gemm_int8`](super::gemm_int8).

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::{Range, RangeInclusive};

use super::ahead::announce;
use super::gemm_prepare::Prepared;
use super::gemv::{Arithmetic, MAX_TOKENS, WEIGHTS_AT_A_TIME};
use super::pool::for_each_in_shares;
use super::simd::LANES;
use super::{Cpu, gemm_exact, gemm_int8};
use crate::matrix::{Data, Matrix};

/// Tokens of a task of a product of many: with fewer it spends too much of its time unpacking, and with more they no longer
/// lie in cache while panels run past them.
const TOKENS_A_TASK: RangeInclusive<usize> = 64..=512;

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

    pub(super) fn tokens(&self) -> usize {
        self.tokens
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

/// How many tokens and how many vectors of weight rows a product takes at a time.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) vectors: usize,
}

/// How a product of many tokens is split into tasks: each has a panel of weight rows and some tiles of tokens.
#[derive(Clone, Copy)]
pub(super) struct Split {
    rows: usize,
    panel_rows: usize,
    tiles: usize,
    tiles_a_task: usize,
}

impl Split {
    /// Splits `rows` weight rows, of `all_rows` that are multiplied at a time, and `tokens` tokens in `tiles` so that all
    /// threads have work.
    pub(super) fn new(shape: Shape, rows: usize, all_rows: usize, tokens: usize, tiles: usize) -> Self {
        let panel_rows = shape.vectors * LANES;
        let parts = (4 * rayon::current_num_threads()).div_ceil(all_rows.div_ceil(panel_rows).max(1));
        let tokens_a_task = tokens.div_ceil(parts).clamp(*TOKENS_A_TASK.start(), *TOKENS_A_TASK.end());
        Self { rows, panel_rows, tiles, tiles_a_task: tokens_a_task.div_ceil(shape.tokens) }
    }

    fn panels(self) -> usize {
        self.rows.div_ceil(self.panel_rows)
    }

    pub(super) fn tasks(self) -> usize {
        self.panels() * self.tiles.div_ceil(self.tiles_a_task)
    }

    /// The rows and the tiles of a task; those of the next are most often the rows that follow, and the same tiles.
    pub(super) fn task(self, task: usize) -> (Range<usize>, Range<usize>) {
        let part = |index: usize, size: usize, all: usize| index * size..all.min((index + 1) * size);
        let (panel, tiles) = (task % self.panels(), task / self.panels());
        (part(panel, self.panel_rows, self.rows), part(tiles, self.tiles_a_task, self.tiles))
    }
}

thread_local! {
    // Taken while it is used, so that a product that the thread starts meanwhile has its own.
    static PREPARED: Cell<Prepared> = Cell::default();
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
        self.matmul_group(x, std::slice::from_ref(w), &mut [out], Arithmetic::Exact);
    }

    /// `out = x * w^T` with activations rounded to INT8 while it runs. `x` is [tokens, cols], `out` is [tokens, rows].
    ///
    /// Activations are rounded symmetrically, half to even, with one f32 scale `absmax / 127` for each block of
    /// [`activation_blocks`](super::activation_blocks); a block with an activation that is not finite makes the token's
    /// result NaN. Integer dot products are exact; scales and sums over blocks are f32. A float matrix has no codes, and is
    /// multiplied as [`matmul`](Self::matmul) does.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul_int8(self, x: &[f32], w: &Matrix, out: &mut [f32]) {
        self.matmul_group(x, std::slice::from_ref(w), &mut [out], Arithmetic::Int8);
    }

    /// `out = x * w^T` for several weights over the same activations, bit for bit what separate products give. `x` is
    /// [tokens, cols] for all of `weights`, each of `outs` is [tokens, rows] of its own weight.
    ///
    /// Eight weights at a time share one parallel region, and activations are prepared once for all of them that take them in
    /// the same form.
    ///
    /// # Panics
    /// If there are not as many outputs as weights, the weights differ in columns, or lengths do not belong to the same
    /// number of tokens.
    pub fn matmul_group(self, x: &[f32], weights: &[Matrix], outs: &mut [&mut [f32]], arithmetic: Arithmetic) {
        assert_eq!(weights.len(), outs.len(), "one output for each weight");
        let cols = weights.first().map_or(0, Matrix::cols);
        assert!(weights.iter().all(|w| w.cols() == cols), "the weights differ in columns");
        if cols == 0 {
            return outs.iter_mut().for_each(|out| out.fill(0.0));
        }
        assert!(x.len().is_multiple_of(cols), "the activations are not whole rows");
        for (weights, outs) in weights.chunks(WEIGHTS_AT_A_TIME).zip(outs.chunks_mut(WEIGHTS_AT_A_TIME)) {
            if x.len() <= MAX_TOKENS * cols {
                self.few_tokens(x, cols, weights, outs, arithmetic);
            } else {
                self.many_tokens(x, cols, weights, outs, arithmetic);
            }
        }
    }

    /// Some tokens times at most [`WEIGHTS_AT_A_TIME`] weights of `cols` columns, at least one.
    fn many_tokens(self, x: &[f32], cols: usize, weights: &[Matrix], outs: &mut [&mut [f32]], arithmetic: Arithmetic) {
        let mut prepared = PREPARED.take();
        prepared.clear();
        let mut forms = [None; WEIGHTS_AT_A_TIME];
        for (w, form) in weights.iter().zip(&mut forms) {
            match (arithmetic, w.data()) {
                (Arithmetic::Int8, Data::Quantized { layout, .. }) => {
                    *form = Some((layout, prepared.round(self, x, cols, layout)));
                }
                _ => prepared.interleave(self, x, cols),
            }
        }
        let all_rows = weights.iter().map(Matrix::rows).sum();
        let mut jobs = [const { None }; WEIGHTS_AT_A_TIME];
        for (((w, out), form), job) in weights.iter().zip(outs).zip(forms).zip(&mut jobs) {
            let out = Output::new(out, x.len() / cols, w.rows());
            *job = Some(match form {
                Some((layout, index)) => {
                    Job::Int8(gemm_int8::Job::new(self, prepared.rounded(index), w, layout, out, all_rows))
                }
                None => Job::Exact(gemm_exact::Job::new(self, prepared.interleaved(), w, out, all_rows)),
            });
        }
        let tasks = jobs.iter().flatten().map(Job::tasks).sum();
        let run = |mut task| {
            for job in jobs.iter().flatten() {
                let tasks = job.tasks();
                if task < tasks {
                    return match job {
                        Job::Exact(job) => job.run(self, task),
                        Job::Int8(job) => job.run(self, task),
                    };
                }
                task -= tasks;
            }
        };
        for_each_in_shares(tasks, || announce(weights, rayon::current_num_threads()), run);
        PREPARED.set(prepared);
    }
}

/// One weight of a call.
enum Job<'a> {
    Exact(gemm_exact::Job<'a>),
    Int8(gemm_int8::Job<'a>),
}

impl Job<'_> {
    fn tasks(&self) -> usize {
        match self {
            Job::Exact(job) => job.tasks(),
            Job::Int8(job) => job.tasks(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_row_and_tile_once() {
        for threads in [1, 3, 64] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (rows, tokens) in [(0, 9usize), (1, 8), (48, 64), (49, 129), (576, 512), (1000, 1100)] {
                let tiles = tokens.div_ceil(8);
                let shape = Shape { tokens: 8, vectors: 3 };
                let split = pool.install(|| Split::new(shape, rows, rows + 100, tokens, tiles));
                let mut times = vec![0; rows * tiles];
                for (rows, own) in (0..split.tasks()).map(|task| split.task(task)) {
                    assert!(rows.len() <= 48 && own.len() <= 512 / 8);
                    rows.for_each(|row| own.clone().for_each(|tile| times[row * tiles + tile] += 1));
                }
                assert!(times.iter().all(|&times| times == 1), "{rows} rows, {tokens} tokens, {threads} threads");
            }
        }
    }
}
