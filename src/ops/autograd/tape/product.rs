//! Products of matrices, forward and backward, all by the one kernel that multiplies with a transposed matrix.

use bkpack_kernels::{Cpu, Data, FloatType, Matrix as KernelMatrix};

/// The transpose of a matrix with so many columns.
pub(super) fn transpose(values: &[f32], cols: usize) -> Vec<f32> {
    /// Rows and columns that stay in cache together.
    const TILE: usize = 32;
    let rows = values.len().checked_div(cols).unwrap_or(0);
    let mut out = vec![0.0; values.len()];
    for first_row in (0..rows).step_by(TILE) {
        for first_col in (0..cols).step_by(TILE) {
            let last_row = rows.min(first_row + TILE);
            for col in first_col..cols.min(first_col + TILE) {
                for row in first_row..last_row {
                    out[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    out
}

/// `a * b^T`: `[m, k]` and `[n, k]` to `[m, n]`.
pub(super) fn multiply(cpu: Cpu, a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (a.len() / k, b.len() / k);
    let values = bytemuck::cast_slice(b);
    let matrix = KernelMatrix::new(n, k, Data::Float { dtype: FloatType::F32, values }).expect("whole rows");
    let mut out = vec![0.0; m * n];
    cpu.matmul(a, &matrix, &mut out);
    out
}
