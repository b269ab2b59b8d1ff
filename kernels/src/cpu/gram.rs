//! The Gram matrix `X^T X` of a stream of activations, accumulated in f64.
//!
//! It is symmetric, so only panels of [`PANEL`] columns down to the diagonal are kept: panel `p` holds rows
//! `0..min(cols, (p + 1) * PANEL)` of columns `p * PANEL..(p + 1) * PANEL`, row-major.

use rayon::prelude::*;

use super::simd::{LANES, Simd};
use super::{Cpu, Kernel};

/// Columns in a panel: a multiple of the tiles of every instruction set.
const PANEL: usize = 48;

/// Vectors in a row of a panel.
const VECTORS: usize = PANEL / LANES;

/// Tokens whose products are summed in f32 before the sum is added in f64.
const TOKENS_A_SUM: usize = 256;

/// Tokens that are rearranged at a time, which bounds the memory that takes.
const TOKENS_A_PASS: usize = 8 * TOKENS_A_SUM;

/// One token's values in the columns of a panel.
type PanelRow = [[f32; LANES]; VECTORS];

/// Values in the Gram matrix of `cols` columns: about half of `cols^2`.
pub const fn gram_len(cols: usize) -> usize {
    let whole = cols / PANEL;
    let last = if cols.is_multiple_of(PANEL) { 0 } else { cols * PANEL };
    PANEL * PANEL * (whole * (whole + 1) / 2) + last
}

/// Where the product of columns `a` and `b` stands, in either order.
pub const fn gram_index(a: usize, b: usize) -> usize {
    let (row, col) = if a < b { (a, b) } else { (b, a) };
    let panel = col / PANEL;
    PANEL * PANEL * (panel * (panel + 1) / 2) + row * PANEL + col % PANEL
}

impl Cpu {
    /// Adds the products of each two columns of `x` `[tokens, cols]` to `gram` `[gram_len(cols)]`.
    ///
    /// Products are summed in f32 with one rounding each over 256 tokens and these sums in f64, so an entry is off by at
    /// most `256 * 2^-24`, 1.5e-5, of the sum of the magnitudes of its products.
    ///
    /// # Panics
    /// If the lengths of `x` and `gram` do not fit `cols`.
    pub fn add_gram(self, x: &[f32], cols: usize, gram: &mut [f64]) {
        assert_eq!(gram.len(), gram_len(cols), "the Gram matrix is of another number of columns");
        if cols == 0 {
            return;
        }
        assert!(x.len().is_multiple_of(cols), "the activations are not whole rows");
        let mut packed = Vec::new();
        for x in x.chunks(TOKENS_A_PASS * cols) {
            let tokens = x.len() / cols;
            packed.clear();
            packed.resize(cols.div_ceil(PANEL) * tokens, [[0.0; LANES]; VECTORS]);
            packed.par_chunks_mut(tokens).enumerate().for_each(|(panel, rows)| {
                let columns = panel * PANEL..cols.min((panel + 1) * PANEL);
                for (to, from) in rows.iter_mut().zip(x.chunks_exact(cols)) {
                    to.as_flattened_mut()[..columns.len()].copy_from_slice(&from[columns.clone()]);
                }
            });
            let mut panels = Vec::new();
            let mut rest = &mut *gram;
            while !rest.is_empty() {
                let rows = cols.min((panels.len() + 1) * PANEL);
                let (panel, after) = rest.split_at_mut(rows * PANEL);
                panels.push(panel.as_chunks_mut::<PANEL>().0);
                rest = after;
            }
            // The last panel is the longest.
            panels.into_par_iter().enumerate().rev().with_max_len(1).for_each(|(index, out)| {
                self.dispatch(GramPanel { packed: &packed, tokens, index, out });
            });
        }
    }
}

struct GramPanel<'a> {
    packed: &'a [PanelRow], // [panels, tokens]
    tokens: usize,
    index: usize,
    out: &'a mut [[f64; PANEL]], // [rows]
}

impl Kernel for GramPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::REGISTERS >= 32 { self.tiles::<S, 8, VECTORS>(simd) } else { self.tiles::<S, 6, 1>(simd) }
    }
}

impl GramPanel<'_> {
    /// In tiles of `M` rows and `N` vectors of columns.
    #[inline(always)]
    fn tiles<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        for start in (0..self.tokens).step_by(TOKENS_A_SUM) {
            let tokens = TOKENS_A_SUM.min(self.tokens - start);
            let columns = &self.packed[self.index * self.tokens + start..][..tokens];
            for (panel, out) in self.out.chunks_mut(PANEL).enumerate() {
                let rows = &self.packed[panel * self.tokens + start..][..tokens];
                for (tile, out) in out.chunks_mut(M).enumerate() {
                    for vector in (0..VECTORS).step_by(N) {
                        let sums = products::<S, M, N>(simd, rows, tile * M, columns, vector);
                        for (sums, out) in sums.iter().zip(&mut *out) {
                            add::<S, N>(simd, sums, &mut out[vector * LANES..]);
                        }
                    }
                }
            }
        }
    }
}

/// Sums over tokens of the products of `M` columns of `rows` from `first` on with `N` vectors of `columns`.
#[inline(always)]
fn products<S: Simd, const M: usize, const N: usize>(
    simd: S,
    rows: &[PanelRow],
    first: usize,
    columns: &[PanelRow],
    vector: usize,
) -> [[S::F32; N]; M] {
    let mut sums = [[simd.splat(0.0); N]; M];
    for (rows, columns) in rows.iter().zip(columns) {
        let Some(rows) = rows.as_flattened()[first..].first_chunk::<M>() else { break };
        let Some(columns) = columns[vector..].first_chunk::<N>() else { break };
        let mut right = [simd.splat(0.0); N];
        for n in 0..N {
            right[n] = simd.load(&columns[n]);
        }
        for m in 0..M {
            let left = simd.splat(rows[m]);
            for n in 0..N {
                sums[m][n] = simd.mul_add(left, right[n], sums[m][n]);
            }
        }
    }
    sums
}

#[inline(always)]
fn add<S: Simd, const N: usize>(simd: S, sums: &[S::F32; N], out: &mut [f64]) {
    for (&sum, out) in sums.iter().zip(out.as_chunks_mut::<LANES>().0) {
        let mut lanes = [0.0; LANES];
        simd.store(sum, &mut lanes);
        for (out, lane) in out.iter_mut().zip(lanes) {
            *out += f64::from(lane);
        }
    }
}
