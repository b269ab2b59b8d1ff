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

/// The cost of a matrix quantized without calibration, `sum_ij rows[i] cols[j] (w_ij - q_ij)^2`. Estimated on a part of the rows where there are many; the same for any number of threads.
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
        cpu.quantize_rows(options, cols, x, None, &mut codes, &mut scales, &mut zeros);
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

#[cfg(test)]
mod tests {
    use bkpack_kernels::{Grid, Layout, cpu::quantize::Rounding};
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::quant::{Quantized, quantize};

    /// A matrix, the weights of its rows and those of its columns.
    fn case(rows: usize, cols: usize) -> (Vec<u8>, Vec<f64>, Vec<f32>) {
        let mut random = StdRng::seed_from_u64((rows * 1000 + cols) as u64);
        let values = (0..rows * cols).flat_map(|_| (random.random::<f32>() - 0.5).to_le_bytes()).collect();
        let by_row = (0..rows).map(|_| random.random::<f64>()).collect();
        let by_col = (0..cols).map(|_| random.random::<f32>()).collect();
        (values, by_row, by_col)
    }

    fn options(bits: u32, symmetric: bool) -> QuantizeOptions {
        QuantizeOptions {
            layout: Layout { grid: Grid::Int { bits, symmetric }, group: 32 },
            scale_type: FloatType::F16,
            rounding: Rounding::Search,
            ternary_threshold: 0.5,
        }
    }

    #[test]
    fn costs_are_those_of_what_would_be_packed() {
        let cpu = Cpu::detect();
        for (rows, cols) in [(1, 1), (3, 40), (70, 96), (300, 257)] {
            let (values, by_row, by_col) = case(rows, cols);
            let matrix = Matrix::new(rows, cols, Data::Float { dtype: FloatType::F32, values: &values }).unwrap();
            let curvature = Curvature { rows: &by_row, cols: &by_col };
            let brute = |decoded: &Matrix| {
                let (mut x, mut y) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
                cpu.dequantize(&matrix, 0, &mut x);
                cpu.dequantize(decoded, 0, &mut y);
                let one = |index: usize| {
                    by_row[index / cols] * f64::from(by_col[index % cols]) * f64::from(x[index] - y[index]).powi(2)
                };
                (0..rows * cols).map(one).sum::<f64>()
            };
            // Sums of at most 16 products in f32, each of three roundings.
            let near = |found: f64, expected: f64| (found - expected).abs() <= 2e-6 * expected;
            for (bits, symmetric) in [(2, true), (4, false), (8, true)] {
                let options = options(bits, symmetric);
                let mut packed = Quantized::default();
                quantize(cpu, &matrix, &options, &mut packed);
                let data = Data::Quantized {
                    layout: options.layout,
                    codes: &packed.codes,
                    scale_type: options.scale_type,
                    scales: &packed.scales,
                    zeros: &packed.zeros,
                };
                let expected = brute(&Matrix::new(rows, cols, data).unwrap());
                let found = quantized_cost(cpu, &matrix, &options, curvature);
                assert!(near(found, expected), "{rows}x{cols} int{bits}: {found} instead of {expected}");
            }
            let halves = crate::quant::convert_float(cpu, &matrix, FloatType::BF16);
            let expected =
                brute(&Matrix::new(rows, cols, Data::Float { dtype: FloatType::BF16, values: &halves }).unwrap());
            let found = float_cost(cpu, &matrix, FloatType::BF16, curvature);
            assert!(near(found, expected), "{rows}x{cols} bf16: {found} instead of {expected}");
            assert_eq!(float_cost(cpu, &matrix, FloatType::F32, curvature), 0.0);
        }
    }

    #[test]
    fn a_part_of_the_rows_stands_for_all() {
        let cpu = Cpu::detect();
        let (rows, cols) = (8 * MOST_WEIGHTS / 64, 64);
        let (values, by_row, by_col) = case(rows, cols);
        let whole = Matrix::new(rows, cols, Data::Float { dtype: FloatType::F32, values: &values }).unwrap();
        let estimate = quantized_cost(cpu, &whole, &options(4, true), Curvature { rows: &by_row, cols: &by_col });
        let pieces = values.chunks(MOST_WEIGHTS * 4).zip(by_row.chunks(MOST_WEIGHTS / cols)).map(|(values, rows)| {
            let data = Data::Float { dtype: FloatType::F32, values };
            let matrix = Matrix::new(rows.len(), cols, data).unwrap();
            quantized_cost(cpu, &matrix, &options(4, true), Curvature { rows, cols: &by_col })
        });
        let exact: f64 = pieces.sum();
        // 4,096 of 32,768 rows, whose costs vary by about a tenth once their weights are taken out.
        assert!((estimate / exact - 1.0).abs() < 0.01, "{estimate} instead of {exact}");
    }

    #[test]
    fn nothing_costs_nothing() {
        let matrix = Matrix::new(0, 5, Data::Float { dtype: FloatType::F32, values: &[] }).unwrap();
        let curvature = Curvature { rows: &[], cols: &[1.0; 5] };
        assert_eq!(quantized_cost(Cpu::detect(), &matrix, &options(4, true), curvature), 0.0);
    }
}
