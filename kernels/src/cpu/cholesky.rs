//! The Cholesky factor of a symmetric matrix, in f64.

use rayon::prelude::*;

use super::simd::Simd;
use super::{Cpu, Kernel};

/// Columns that are factored before the rest of the matrix is updated.
const BLOCK: usize = 64;

/// Rows and columns of a tile of the update, held in registers.
const ROWS: usize = 4;
const COLUMNS: usize = 16;

impl Cpu {
    /// Replaces the lower triangle of the symmetric `a` `[n, n]`, row-major, by the `L` with `L L^T = a`. What stands above
    /// the diagonal is neither read nor kept.
    ///
    /// # Errors
    /// The first column that has no positive pivot: the matrix is not positive definite, or not finite. `a` is then
    /// half done.
    ///
    /// # Panics
    /// If `a` is not `n * n` long.
    pub fn cholesky(self, a: &mut [f64], n: usize) -> Result<(), usize> {
        assert_eq!(a.len(), n * n, "the matrix is not square");
        for start in (0..n).step_by(BLOCK) {
            let end = n.min(start + BLOCK);
            factor_diagonal(a, n, start, end)?;
            let (above, below) = a.split_at_mut(end * n);
            let diagonal = &above[start * n..];
            below.par_chunks_mut(n).for_each(|row| solve(diagonal, n, start, &mut row[..end]));
            // The factored columns, transposed for the update: [columns / COLUMNS, end - start, COLUMNS].
            let width = end - start;
            let mut tiles = vec![[0.0; COLUMNS]; (n - end).div_ceil(COLUMNS) * width];
            tiles.par_chunks_mut(width).zip(below.par_chunks(COLUMNS * n)).for_each(|(tile, rows)| {
                for (lane, row) in rows.chunks_exact(n).enumerate() {
                    for (to, &from) in tile.iter_mut().zip(&row[start..end]) {
                        to[lane] = from;
                    }
                }
            });
            below.par_chunks_mut(ROWS * n).enumerate().for_each(|(index, rows)| {
                self.dispatch(Update { rows, n, columns: (start, end), first: index * ROWS, tiles: &tiles });
            });
        }
        Ok(())
    }
}

/// Factors the block on the diagonal, to which all columns before `start` have been applied.
fn factor_diagonal(a: &mut [f64], n: usize, start: usize, end: usize) -> Result<(), usize> {
    for i in start..end {
        let (above, row) = a.split_at_mut(i * n);
        solve(&above[start * n..], n, start, &mut row[..i]);
        let pivot = row[i] - row[start..i].iter().map(|value| value * value).sum::<f64>();
        if !(pivot > 0.0 && pivot < f64::INFINITY) {
            return Err(i);
        }
        row[i] = pivot.sqrt();
    }
    Ok(())
}

/// Solves `l * factor^T = row` for the columns from `start` on, in place. `factor` begins with row `start`.
fn solve(factor: &[f64], n: usize, start: usize, row: &mut [f64]) {
    for j in start..row.len() {
        let factor = &factor[(j - start) * n..][..=j];
        let sum: f64 = row[start..j].iter().zip(&factor[start..j]).map(|(a, b)| a * b).sum();
        row[j] = (row[j] - sum) / factor[j];
    }
}

/// Subtracts the products of the factored columns from some rows below them, up to the diagonal or a little past it.
struct Update<'a> {
    rows: &'a mut [f64], // [ROWS or fewer, n]
    n: usize,
    columns: (usize, usize),
    /// How many rows lie between the factored block and these.
    first: usize,
    tiles: &'a [[f64; COLUMNS]], // [columns / COLUMNS, factored columns]
}

impl Kernel for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (start, end) = self.columns;
        let count = self.rows.len() / self.n;
        let mut left = [[0.0; ROWS]; BLOCK];
        for (r, row) in self.rows.chunks_exact(self.n).enumerate() {
            for (left, &value) in left.iter_mut().zip(&row[start..end]) {
                left[r] = value;
            }
        }
        let tiles = self.tiles.chunks_exact(end - start).take((self.first + count).div_ceil(COLUMNS));
        for (tile, right) in tiles.enumerate() {
            let mut sums = [[0.0; COLUMNS]; ROWS];
            for (left, right) in left.iter().zip(right) {
                for r in 0..ROWS {
                    for c in 0..COLUMNS {
                        sums[r][c] += left[r] * right[c];
                    }
                }
            }
            let column = end + tile * COLUMNS;
            for (row, sums) in self.rows.chunks_exact_mut(self.n).zip(&sums) {
                for (value, sum) in row[column..].iter_mut().zip(sums) {
                    *value -= sum;
                }
            }
        }
    }
}
