//! Rounding with error feedback: each column is rounded after the errors of the columns before it have been taken into
//! account (GPTQ: Frantar et al., 2022; LDLQ: Chee et al., 2023; the two are the same).
//!
//! With `H = R R^T`, `R` upper triangular, and errors `E = W - Q`, the loss `tr(E H E^T)` is the squared norm of `E R`, whose
//! column `j` is `R_jj (e_j + sum over i < j of e_i R_ij / R_jj)`. So column `j` of `Q` is chosen nearest to
//! `w_j + sum over i < j of e_i R_ij / R_jj`: no inverse is needed, and the sums are products of matrices.

use super::dequantize::load_floats;
use super::quantize::{QuantizeOptions, pack_row};
use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};
use crate::bits;
use crate::matrix::Grid;

/// Columns in a tile of the factor.
const TILE: usize = 8;

/// How errors pass from column to column, for all rows of a matrix.
#[derive(Clone, Debug)]
pub struct Feedback {
    order: Vec<usize>,
    loss: Vec<[f64; 2]>,
    /// Tile `t` holds rows `0..min(cols, (t + 1) * TILE)` of columns `t * TILE..(t + 1) * TILE`; zero outside the triangle.
    factor: Vec<[f32; TILE]>,
}

impl Feedback {
    /// Columns are rounded in `order`, a permutation; `i` and `j` below are places in it.
    ///
    /// `factor(i, j)` for `i < j` is the share of the error at `i` that is added to the weight at `j` before it is rounded.
    /// `loss[j]` is what the squared distance of that sum from the rounded weight counts in the loss, and what the squared
    /// error of the weight itself is counted less (the damping).
    ///
    /// # Panics
    /// If `order` and `loss` differ in length.
    pub fn new(order: Vec<usize>, loss: Vec<[f64; 2]>, factor: impl Fn(usize, usize) -> f32) -> Self {
        let cols = order.len();
        assert_eq!(cols, loss.len());
        let mut tiles = Vec::with_capacity(tile_start(cols.div_ceil(TILE)));
        for first in (0..cols).step_by(TILE) {
            for i in 0..cols.min(first + TILE) {
                tiles.push(std::array::from_fn(|lane| {
                    let j = first + lane;
                    if i < j && j < cols { factor(i, j) } else { 0.0 }
                }));
            }
        }
        Self { order, loss, factor: tiles }
    }

    /// Columns of the matrices it is for.
    pub fn cols(&self) -> usize {
        self.order.len()
    }
}

/// Rows of the factor in the tiles before tile `index`.
const fn tile_start(index: usize) -> usize {
    TILE * index * (index + 1) / 2
}

impl Cpu {
    /// Rounds rows `x` `[rows, cols]` to `codes` `[rows, code_bytes]` with error feedback, on the scales
    /// `[rows, groups]` and zero points `[rows, zero_bytes]` that are there. Returns the loss that `feedback` defines, summed over
    /// rows. Fastest for multiples of 48 rows; runs on the calling thread.
    ///
    /// # Panics
    /// If a length does not fit the layout.
    pub fn round_with_feedback(
        self,
        options: &QuantizeOptions,
        feedback: &Feedback,
        x: &[f32],
        scales: &[u8],
        zeros: &[u8],
        codes: &mut [u8],
    ) -> f64 {
        if x.is_empty() {
            return 0.0;
        }
        self.dispatch(RoundRows { options, feedback, x, scales, zeros, codes })
    }
}

struct RoundRows<'a> {
    options: &'a QuantizeOptions,
    feedback: &'a Feedback,
    x: &'a [f32],
    scales: &'a [u8],
    zeros: &'a [u8],
    codes: &'a mut [u8],
}

impl Kernel for RoundRows<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        if S::REGISTERS >= 32 { self.panels::<S, TILE, 3>(simd) } else { self.panels::<S, 4, 1>(simd) }
    }
}

/// What a panel of `N` vectors of rows needs; every value of a row stands in its lane.
struct Panel<const N: usize> {
    weights: Vec<[[f32; LANES]; N]>, // [cols], in the order of rounding
    errors: Vec<[[f32; LANES]; N]>,  // [cols], in the order of rounding
    scales: Vec<[[f32; LANES]; N]>,  // [groups]
    zeros: Vec<[[f32; LANES]; N]>,   // [groups]
    codes: Vec<[[u8; LANES]; N]>,    // [cols]
}

impl RoundRows<'_> {
    /// In panels of `N` vectors of rows; sums for `M` columns at a time are held in registers.
    #[inline(always)]
    fn panels<S: Simd, const M: usize, const N: usize>(self, simd: S) -> f64 {
        let Self { options, feedback, x, scales, zeros, codes } = self;
        let (layout, scale_type, cols) = (options.layout, options.scale_type, feedback.cols());
        let (groups, code_bytes, zero_bytes) = (layout.groups(cols), layout.code_bytes(cols), layout.zero_bytes(cols));
        let rows = x.len() / cols;
        let scale_bytes = groups * scale_type.bytes();
        assert_eq!(x.len(), rows * cols);
        assert_eq!(
            (codes.len(), scales.len(), zeros.len()),
            (rows * code_bytes, rows * scale_bytes, rows * zero_bytes)
        );

        let zero = match layout.grid {
            Grid::Int { bits, symmetric: true } => (1u32 << (bits - 1)) as f32,
            _ => 0.0,
        };
        let mut panel = Panel::<N> {
            weights: vec![[[0.0; LANES]; N]; cols],
            errors: vec![[[0.0; LANES]; N]; cols],
            scales: vec![[[0.0; LANES]; N]; groups],
            zeros: vec![[[zero; LANES]; N]; groups],
            codes: vec![[[0; LANES]; N]; cols],
        };
        let mut row_scales = vec![0.0; groups];
        let mut row_codes = vec![0u8; cols.next_multiple_of(64)];
        let mut total = 0.0;
        for first in (0..rows).step_by(N * LANES) {
            let count = rows.min(first + N * LANES) - first;
            if count < N * LANES {
                // Absent rows are zero on a scale of zero, and so without error.
                panel.weights.as_flattened_mut().as_flattened_mut().fill(0.0);
                panel.scales.as_flattened_mut().as_flattened_mut().fill(0.0);
            }
            for row in 0..count {
                let (vector, lane) = (row / LANES, row % LANES);
                let weights = &x[(first + row) * cols..][..cols];
                for (to, &column) in panel.weights.iter_mut().zip(&feedback.order) {
                    to[vector][lane] = weights[column];
                }
                let scales = &scales[(first + row) * scale_bytes..][..scale_bytes];
                load_floats(simd, scale_type, scales, &mut row_scales);
                for (to, &scale) in panel.scales.iter_mut().zip(&row_scales) {
                    to[vector][lane] = scale;
                }
                if let Grid::Int { bits, symmetric: false } = layout.grid {
                    let zeros = &zeros[(first + row) * zero_bytes..][..zero_bytes];
                    for (group, to) in panel.zeros.iter_mut().enumerate() {
                        to[vector][lane] = bits::stream_code(zeros, bits, group).into();
                    }
                }
            }
            let losses = round_panel::<S, M, N>(simd, options, feedback, &mut panel);
            total += losses.as_flattened()[..count].iter().sum::<f64>();
            for row in 0..count {
                let (vector, lane) = (row / LANES, row % LANES);
                for (to, from) in row_codes.iter_mut().zip(&panel.codes) {
                    *to = from[vector][lane];
                }
                let packed = &mut codes[(first + row) * code_bytes..][..code_bytes];
                match layout.grid.stream_bits() {
                    Some(bits) => pack_row(simd, &row_codes, bits, packed),
                    None => bits::pack_ternary(&row_codes[..cols], packed),
                }
            }
        }
        total
    }
}

/// Rounds all columns of a panel in order; the loss of each row.
#[inline(always)]
fn round_panel<S: Simd, const M: usize, const N: usize>(
    simd: S,
    options: &QuantizeOptions,
    feedback: &Feedback,
    panel: &mut Panel<N>,
) -> [[f64; LANES]; N] {
    let cols = feedback.cols();
    let mut losses = [[0.0; LANES]; N];
    for first in (0..cols).step_by(M) {
        let tile = first / TILE;
        let factor = &feedback.factor[tile_start(tile)..];
        let lane = first % TILE;
        let mut sums = fed_back::<S, M, N>(simd, &factor[..first], lane, &panel.errors);
        for m in 0..M.min(cols - first) {
            let (place, column) = (first + m, feedback.order[first + m]);
            let group = column / options.layout.group;
            let [counts, less] = feedback.loss[place];
            let mut errors = [simd.splat(0.0); N];
            for n in 0..N {
                let weight = simd.load(&panel.weights[place][n]);
                let scale = simd.load(&panel.scales[group][n]);
                let target = simd.add(weight, sums[m][n]);
                let (level, code) = round(simd, options, target, scale, simd.load(&panel.zeros[group][n]));
                let value = simd.mul(level, scale);
                errors[n] = simd.sub(weight, value);
                panel.codes[column][n] = simd.to_u8(code);
                simd.store(errors[n], &mut panel.errors[place][n]);
                let mut distance = [0.0; LANES];
                simd.store(simd.sub(target, value), &mut distance);
                for lane in 0..LANES {
                    let (distance, error) = (f64::from(distance[lane]), f64::from(panel.errors[place][n][lane]));
                    losses[n][lane] += counts * (distance * distance) - less * (error * error);
                }
            }
            // The factor is zero up to its diagonal, so columns that are done stay as they are.
            let shares = &factor[place];
            for later in m + 1..M {
                let share = simd.splat(shares[lane + later]);
                for n in 0..N {
                    sums[later][n] = simd.mul_add(share, errors[n], sums[later][n]);
                }
            }
        }
    }
    losses
}

/// What all earlier columns' errors add to `M` columns of a tile from `lane` on.
#[inline(always)]
fn fed_back<S: Simd, const M: usize, const N: usize>(
    simd: S,
    factor: &[[f32; TILE]],
    lane: usize,
    errors: &[[[f32; LANES]; N]],
) -> [[S::F32; N]; M] {
    let mut sums = [[simd.splat(0.0); N]; M];
    for (shares, errors) in factor.iter().zip(errors) {
        let Some(shares) = shares[lane..].first_chunk::<M>() else { break };
        let mut right = [simd.splat(0.0); N];
        for n in 0..N {
            right[n] = simd.load(&errors[n]);
        }
        for m in 0..M {
            let share = simd.splat(shares[m]);
            for n in 0..N {
                sums[m][n] = simd.mul_add(share, right[n], sums[m][n]);
            }
        }
    }
    sums
}

/// The nearest level of the grid, in units of the scale, and its code; as `quantize` rounds.
#[inline(always)]
fn round<S: Simd>(s: S, options: &QuantizeOptions, target: S::F32, scale: S::F32, offset: S::F32) -> (S::F32, S::F32) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    // A scale of zero is replaced by infinity: every weight is then rounded to zero.
    let never = s.splat(f32::INFINITY);
    let scale = s.select_ge(zero, s.abs(scale), never, scale);
    match options.layout.grid {
        Grid::Int { bits, .. } => {
            let top = s.splat(((1u32 << bits) - 1) as f32);
            let code = s.add(s.round_even(s.div(target, scale)), offset);
            let code = s.min(s.max(code, zero), top);
            (s.sub(code, offset), code)
        }
        Grid::Ternary => {
            let threshold = s.mul(s.splat(options.ternary_threshold), scale);
            let above = s.select_ge(target, threshold, one, zero);
            let below = s.select_ge(s.neg(target), threshold, one, zero);
            let level = s.sub(above, below);
            (level, s.add(level, one))
        }
        Grid::Binary => {
            let code = s.select_ge(target, zero, one, zero);
            (s.sub(s.add(code, code), one), code)
        }
    }
}
