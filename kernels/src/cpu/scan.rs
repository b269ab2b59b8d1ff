//! The selective scan of a state-space model (Mamba, Gu and Dao, 2023).
//!
//! A vector holds 16 channels, so that the sum over the state needs no horizontal additions; rates and states are
//! transposed for that once a call.

use std::ops::Range;

use super::matmul::Output;
use super::pool::for_each_piece;
use super::scratch::Buffer;
use super::simd::Simd;
use super::{Cpu, Kernel};

/// Channels whose operands are gathered at a time: whole cache lines of a token's row.
const GROUP: usize = 64;

/// Tokens whose operands are gathered at a time.
const TILE: usize = 32;

/// State updates below which no other thread is asked to help.
const SEQUENTIAL: usize = 1 << 13;

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
    /// If the lengths do not fit together, or there are no channels or no states.
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

        // Wide tasks read long pieces of rows; four a thread even out what threads do beside.
        let width = channels.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(GROUP);
        let width = if tokens * states < SEQUENTIAL { channels } else { width };
        let out = &Output::new(out, tokens, channels);
        for_each_piece(state, width * state_size, |index, state| {
            self.dispatch(Task { scan, first: index * width, state, tokens, out });
        });
    }
}

/// The scan of a few consecutive channels, the first of which is `first`.
struct Task<'a> {
    scan: &'a SelectiveScan<'a>,
    first: usize,
    state: &'a mut [f32], // [width, state_size]
    tokens: usize,
    out: &'a Output<'a>, // [tokens, channels]
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let SelectiveScan { a, b, c, d, .. } = *self.scan;
        let size = a.len() / d.len();
        let width = self.state.len() / size;
        let blocks = width.div_ceil(16);
        let mut passed = Buffer::zeros(blocks * 16); // d
        passed[..width].copy_from_slice(&d[self.first..][..width]);
        let (passed, _) = passed.as_chunks::<16>();
        let mut rates = Buffer::zeros(blocks * size * 16); // [blocks, state_size, 16]
        let (rates, _) = rates.as_chunks_mut::<16>();
        let mut states = Buffer::zeros(blocks * size * 16); // [blocks, state_size, 16]
        let (states, _) = states.as_chunks_mut::<16>();
        let a = a[self.first * size..][..width * size].chunks(16 * size);
        for (rates, a) in rates.chunks_exact_mut(size).zip(a) {
            transpose(simd, a, rates);
            // The decay is a power of two below, so the rates carry the factor.
            for rates in rates {
                simd.store(simd.mul(simd.load(rates), simd.splat(std::f32::consts::LOG2_E)), rates);
            }
        }
        for (states, state) in states.chunks_exact_mut(size).zip(self.state.chunks(16 * size)) {
            transpose(simd, state, states);
        }

        let tile = self.tokens.min(TILE);
        let mut gathered = [Buffer::zeros(tile * GROUP), Buffer::zeros(tile * GROUP)];
        let [x, delta] = gathered.each_mut().map(|buffer| buffer.as_chunks_mut::<GROUP>().0);
        for start in (0..self.tokens).step_by(TILE) {
            let tokens = (self.tokens - start).min(TILE);
            let inputs = b[start * size..].chunks_exact(size).zip(c[start * size..].chunks_exact(size));
            for first in (0..width).step_by(GROUP) {
                let columns = first..(first + GROUP).min(width);
                self.gather(self.scan.x, start, columns.clone(), &mut x[..tokens]);
                self.gather(self.scan.delta, start, columns.clone(), &mut delta[..tokens]);
                for lane in 0..columns.len().div_ceil(16) {
                    let block = first / 16 + lane;
                    let (rates, states) = (&rates[block * size..][..size], &mut states[block * size..][..size]);
                    let d = simd.load(&passed[block]);
                    for ((x, delta), (b, c)) in x[..tokens].iter_mut().zip(delta.iter()).zip(inputs.clone()) {
                        let (x, delta) = (&mut x.as_chunks_mut().0[lane], simd.load(&delta.as_chunks().0[lane]));
                        let input = simd.mul(delta, simd.load(x));
                        let mut sum = simd.mul(d, simd.load(x));
                        for ((rate, h), (&b, &c)) in rates.iter().zip(states.iter_mut()).zip(b.iter().zip(c)) {
                            let decay = simd.exp2(simd.mul(delta, simd.load(rate)));
                            let next = simd.mul_add(decay, simd.load(h), simd.mul(input, simd.splat(b)));
                            simd.store(next, h);
                            sum = simd.mul_add(next, simd.splat(c), sum);
                        }
                        simd.store(sum, x);
                    }
                }
                for (token, sums) in (start..).zip(&x[..tokens]) {
                    let columns = self.first + columns.start..self.first + columns.end;
                    // SAFETY: every task has channels of its own, and this one makes one reference at a time.
                    let out = unsafe { self.out.segment(token, columns) };
                    out.copy_from_slice(&sums[..out.len()]);
                }
            }
        }
        for (states, state) in states.chunks_exact(size).zip(self.state.chunks_mut(16 * size)) {
            transpose_back(simd, states, state);
        }
    }
}

impl Task<'_> {
    /// Copies a few of the task's columns for the tokens from `start`. Rows are far apart in memory: to ask for many at
    /// a time hides the latency that one at a time, between the computations, would cost.
    #[inline(always)]
    fn gather(&self, from: &[f32], start: usize, columns: Range<usize>, to: &mut [[f32; GROUP]]) {
        let channels = self.scan.d.len();
        for (to, from) in to.iter_mut().zip(from[start * channels..].chunks_exact(channels)) {
            let from = &from[self.first..][columns.clone()];
            match from.try_into() {
                Ok(whole) => *to = whole,
                Err(_) => to[..from.len()].copy_from_slice(from),
            }
        }
    }
}

/// Rows of at most 16 channels, `[width, state_size]`, to lanes, `[state_size, 16]`; missing lanes are zero.
#[inline(always)]
fn transpose<S: Simd>(simd: S, from: &[f32], to: &mut [[f32; 16]]) {
    let size = to.len();
    for (block, to) in to.chunks_mut(16).enumerate() {
        let mut padded = [[0.0; 16]; 16]; // [channels, states]
        let mut rows = [&[0.0; 16]; 16];
        for ((row, padded), from) in rows.iter_mut().zip(&mut padded).zip(from.chunks_exact(size)) {
            let from = &from[block * 16..][..to.len()];
            *row = match from.try_into() {
                Ok(whole) => whole,
                Err(_) => {
                    padded[..from.len()].copy_from_slice(from);
                    padded
                }
            };
        }
        to.copy_from_slice(&transpose_block(simd, rows)[..to.len()]);
    }
}

/// The inverse of [`transpose`].
#[inline(always)]
fn transpose_back<S: Simd>(simd: S, from: &[[f32; 16]], to: &mut [f32]) {
    let size = from.len();
    for (block, from) in from.chunks(16).enumerate() {
        let mut rows = [&[0.0; 16]; 16]; // [states, channels]
        rows.iter_mut().zip(from).for_each(|(row, from)| *row = from);
        let columns = transpose_block(simd, rows);
        for (to, column) in to.chunks_exact_mut(size).zip(&columns) {
            to[block * 16..][..from.len()].copy_from_slice(&column[..from.len()]);
        }
    }
}

#[inline(always)]
fn transpose_block<S: Simd>(simd: S, rows: [&[f32; 16]; 16]) -> [[f32; 16]; 16] {
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
