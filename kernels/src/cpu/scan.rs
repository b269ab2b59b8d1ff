//! The selective scan of a state-space model (Mamba, Gu and Dao, 2023).
//!
//! A vector holds 16 channels, so that the sum over the state needs no horizontal additions; rates and states are
//! transposed for that once a call, and stay in the first-level cache while all tokens pass.

use rayon::prelude::*;

use super::simd::Simd;
use super::{Cpu, Kernel};

/// Channels of one task: whole cache lines of a token's row.
const TASK: usize = 64;

/// State updates below which no other thread is asked to help.
const SEQUENTIAL: usize = 1 << 14;

/// The operands of [`Cpu::selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan<'a> {
    /// The input, `[tokens, channels]`.
    pub x: &'a [f32],
    /// The step sizes, after softplus, `[tokens, channels]`.
    pub delta: &'a [f32],
    /// The rates of decay, negative, `[channels, state_size]`.
    pub a: &'a [f32],
    /// What enters the state, `[tokens, state_size]`.
    pub b: &'a [f32],
    /// What is read from the state, `[tokens, state_size]`.
    pub c: &'a [f32],
    /// What is passed by the state, `[channels]`.
    pub d: &'a [f32],
}

impl Cpu {
    /// The selective scan: token after token, `h = exp(delta * a) * h + delta * b * x` and `out = sum of c * h + d * x`,
    /// with a state `h` of `state_size` values for each channel (Hugging Face's `MambaMixer.slow_forward`).
    ///
    /// `state` is `[channels, state_size]`, zero before the first token, and is left as the next token finds it: a
    /// sequence in pieces gives the same bits as in one call. `out` is `[tokens, channels]`.
    ///
    /// # Panics
    /// If the lengths do not fit together there are no channels, or states have no values.
    pub fn selective_scan(self, scan: &SelectiveScan, state: &mut [f32], out: &mut [f32]) {
        let SelectiveScan { x, delta, a, b, c, d } = *scan;
        let channels = d.len();
        assert!(channels > 0 && x.len().is_multiple_of(channels), "x is not whole rows of {channels} channels");
        let (tokens, state_size) = (x.len() / channels, a.len() / channels);
        assert_eq!((delta.len(), out.len()), (x.len(), x.len()), "delta and out need {tokens} x {channels}");
        let states = channels * state_size;
        assert!(state_size > 0, "states of no values");
        assert_eq!((a.len(), state.len()), (states, states), "a and state need {channels} x {state_size}");
        let inputs = tokens * state_size;
        assert_eq!((b.len(), c.len()), (inputs, inputs), "b and c need {tokens} x {state_size}");

        let pieces = state.chunks_mut(TASK * state_size).enumerate();
        let mut tasks: Vec<Task> = pieces
            .map(|(index, state)| Task { scan, first: index * TASK, state, out: Vec::with_capacity(tokens) })
            .collect();
        for row in out.chunks_exact_mut(channels) {
            row.chunks_mut(TASK).zip(&mut tasks).for_each(|(piece, task)| task.out.push(piece));
        }
        if tokens * states < SEQUENTIAL {
            tasks.into_iter().for_each(|task| self.dispatch(task));
        } else {
            tasks.into_par_iter().for_each(|task| self.dispatch(task));
        }
    }
}

/// The scan of at most [`TASK`] consecutive channels, the first of which is `first`.
struct Task<'a> {
    scan: &'a SelectiveScan<'a>,
    first: usize,
    state: &'a mut [f32], // [width, state_size]
    /// For each token `[width]`.
    out: Vec<&'a mut [f32]>,
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let SelectiveScan { x, delta, a, b, c, d } = *self.scan;
        let (channels, size) = (d.len(), a.len() / d.len());
        // The decay is a power of two in the kernel, so the rates carry the factor.
        let to_log2 = simd.splat(std::f32::consts::LOG2_E);
        let mut rates = vec![[0.0; 16]; size]; // [state_size, 16]
        let mut states = vec![[0.0; 16]; size]; // [state_size, 16]
        for (index, state) in self.state.chunks_mut(16 * size).enumerate() {
            let (first, width) = (self.first + index * 16, state.len() / size);
            transpose(simd, &a[first * size..][..width * size], &mut rates);
            for rates in &mut rates {
                simd.store(simd.mul(simd.load(rates), to_log2), rates);
            }
            transpose(simd, state, &mut states);
            let d = load(simd, &d[first..][..width]);
            let inputs = b.chunks_exact(size).zip(c.chunks_exact(size));
            for (token, (out, (b, c))) in self.out.iter_mut().zip(inputs).enumerate() {
                let start = token * channels + first;
                let (x, delta) = (load(simd, &x[start..][..width]), load(simd, &delta[start..][..width]));
                let input = simd.mul(delta, x);
                let mut sum = simd.mul(d, x);
                for ((rate, h), (&b, &c)) in rates.iter().zip(&mut states).zip(b.iter().zip(c)) {
                    let decay = simd.exp2(simd.mul(delta, simd.load(rate)));
                    let next = simd.mul_add(decay, simd.load(h), simd.mul(input, simd.splat(b)));
                    simd.store(next, h);
                    sum = simd.mul_add(next, simd.splat(c), sum);
                }
                store(simd, sum, &mut out[index * 16..][..width]);
            }
            transpose_back(simd, &states, state);
        }
    }
}

/// The values of at most 16 channels; missing lanes are zero.
#[inline(always)]
fn load<S: Simd>(simd: S, from: &[f32]) -> S::F32 {
    match from.try_into() {
        Ok(whole) => simd.load(whole),
        Err(_) => simd.load_partial(from),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, v: S::F32, to: &mut [f32]) {
    match <&mut [f32; 16]>::try_from(&mut *to) {
        Ok(whole) => simd.store(v, whole),
        Err(_) => simd.store_partial(v, to),
    }
}

/// Rows of at most 16 channels, `[width, state_size]`, to lanes, `[state_size, 16]`; missing lanes are zero.
#[inline(always)]
fn transpose<S: Simd>(simd: S, from: &[f32], to: &mut [[f32; 16]]) {
    let size = to.len();
    for (block, to) in to.chunks_mut(16).enumerate() {
        let mut rows = [[0.0; 16]; 16]; // [channels, states]
        for (row, from) in rows.iter_mut().zip(from.chunks_exact(size)) {
            store(simd, load(simd, &from[block * 16..][..to.len()]), &mut row[..to.len()]);
        }
        let columns = transpose_block(simd, &rows);
        to.copy_from_slice(&columns[..to.len()]);
    }
}

/// The inverse of [`transpose`].
#[inline(always)]
fn transpose_back<S: Simd>(simd: S, from: &[[f32; 16]], to: &mut [f32]) {
    let size = from.len();
    for (block, from) in from.chunks(16).enumerate() {
        let mut rows = [[0.0; 16]; 16]; // [states, channels]
        rows[..from.len()].copy_from_slice(from);
        let columns = transpose_block(simd, &rows);
        for (to, column) in to.chunks_exact_mut(size).zip(&columns) {
            let to = &mut to[block * 16..][..from.len()];
            store(simd, load(simd, &column[..to.len()]), to);
        }
    }
}

#[inline(always)]
fn transpose_block<S: Simd>(simd: S, rows: &[[f32; 16]; 16]) -> [[f32; 16]; 16] {
    let mut columns = [[0.0; 16]; 16];
    for (quarter, columns) in columns.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut words = [&[0; 16]; 16];
        for (words, row) in words.iter_mut().zip(rows) {
            *words = bytemuck::cast_ref(&row.as_chunks::<4>().0[quarter]);
        }
        for (column, v) in columns.iter_mut().zip(simd.transpose_words(words)) {
            simd.store(v, column);
        }
    }
    columns
}
