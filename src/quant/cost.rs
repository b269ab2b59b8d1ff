//! What an encoding costs a matrix: its squared error, weighted by how much the loss minds each weight.

use bkpack_kernels::{Cpu, Data, FloatType, Matrix, cpu::quantize::QuantizeOptions};
use rayon::prelude::*;

use super::{float_rows, write_floats};

/// How much the loss minds a change of each weight of a matrix: `rows[i] * cols[j]`.
#[derive(Clone, Copy, Debug)]
pub struct Curvature<'a> {
    pub rows: &'a [f64], // [rows]
    pub cols: &'a [f32], // [cols]
}

/// The cost of a matrix quantized without feedback, `sum_ij rows[i] cols[j] (w_ij - q_ij)^2`; the search for scales is
/// weighted by `cols`. Estimated on a part of the rows where there are many; the same for any number of threads.
///
/// # Panics
/// If the curvature is of other rows or columns.
pub fn quantized_cost(cpu: Cpu, matrix: &Matrix, options: &QuantizeOptions, curvature: Curvature) -> f64 {
    let (cols, layout) = (matrix.cols(), options.layout);
    let (code_bytes, zero_bytes) = (layout.code_bytes(cols), layout.zero_bytes(cols));
    let scale_bytes = layout.groups(cols) * options.scale_type.bytes();
    cost(cpu, matrix, curvature, |x, decoded| {
        let rows = x.len() / cols;
        let mut codes = vec![0; rows * code_bytes];
        let mut scales = vec![0; rows * scale_bytes];
        let mut zeros = vec![0; rows * zero_bytes];
        cpu.quantize_rows(options, cols, x, Some(curvature.cols), &mut codes, &mut scales, &mut zeros);
        let data =
            Data::Quantized { layout, codes: &codes, scale_type: options.scale_type, scales: &scales, zeros: &zeros };
        let quantized = Matrix::new(rows, cols, data).expect("quantized to this layout");
        cpu.dequantize(&quantized, 0, decoded);
    })
}

/// The cost of a matrix as plain values of another type, which see [`quantized_cost`].
///
/// # Panics
/// If the curvature is of other rows or columns.
pub fn float_cost(cpu: Cpu, matrix: &Matrix, to: FloatType, curvature: Curvature) -> f64 {
    let cols = matrix.cols();
    cost(cpu, matrix, curvature, |x, decoded| {
        let mut values = vec![0; x.len() * to.bytes()];
        write_floats(x, to, &mut values);
        let data = Data::Float { dtype: to, values: &values };
        cpu.dequantize(&Matrix::new(x.len() / cols, cols, data).expect("as many values"), 0, decoded);
    })
}

/// Weights of a matrix that are looked at: of larger ones evenly spread rows stand for all.
const MOST_WEIGHTS: usize = 1 << 18;

/// Weights of one task.
const TASK_WEIGHTS: usize = 1 << 13;

/// Adds up the weighted squared differences between rows and what `decode` makes of them.
fn cost(cpu: Cpu, matrix: &Matrix, curvature: Curvature, decode: impl Fn(&[f32], &mut [f32]) + Sync) -> f64 {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!((rows, cols), (curvature.rows.len(), curvature.cols.len()), "a curvature of another matrix");
    if rows * cols == 0 {
        return 0.0;
    }
    let step = (TASK_WEIGHTS / cols).max(1);
    let tasks = rows.div_ceil(step);
    let stride = (rows * cols).div_ceil(MOST_WEIGHTS).min(tasks);
    let sums: Vec<[f64; 2]> = (0..tasks.div_ceil(stride))
        .into_par_iter()
        .map_init(
            || (Vec::new(), Vec::new()),
            |(scratch, decoded), task| {
                let first = task * stride * step;
                let count = step.min(rows - first);
                let x = float_rows(cpu, matrix, first, count, scratch);
                decoded.resize(count * cols, 0.0);
                decode(x, decoded);
                let weights = &curvature.rows[first..first + count];
                let rows = x.chunks_exact(cols).zip(decoded.chunks_exact(cols)).zip(weights);
                let errors = rows.map(|((x, decoded), weight)| weight * weighted_error(x, decoded, curvature.cols));
                [errors.sum(), weights.iter().sum()]
            },
        )
        .collect();
    let [error, seen] = sums.iter().fold([0.0; 2], |sum, more| [sum[0] + more[0], sum[1] + more[1]]);
    // Rows count by their weight, and so do those that were left out.
    if seen > 0.0 { error * curvature.rows.iter().sum::<f64>() / seen } else { 0.0 }
}

/// `sum_j cols[j] (x_j - y_j)^2`, in blocks whose sums are f64.
fn weighted_error(x: &[f32], y: &[f32], cols: &[f32]) -> f64 {
    /// Values added up in f32.
    const BLOCK: usize = 64;
    let blocks = x.chunks(BLOCK).zip(y.chunks(BLOCK)).zip(cols.chunks(BLOCK));
    let block = |((x, y), cols): ((&[f32], &[f32]), &[f32])| {
        let mut lanes = [0.0f32; 16];
        for ((x, y), cols) in x.chunks(16).zip(y.chunks(16)).zip(cols.chunks(16)) {
            for (lane, ((x, y), col)) in lanes.iter_mut().zip(x.iter().zip(y).zip(cols)) {
                *lane += col * (x - y) * (x - y);
            }
        }
        lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>()
    };
    blocks.map(block).sum()
}
