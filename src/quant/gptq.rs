//! Calibrated rounding: scales weighted by the inputs' second moments, and error feedback between columns (GPTQ: Frantar et
//! al., arXiv 2210.17323; the same as LDLQ: Chee et al., arXiv 2307.13304).

use bkpack_kernels::{
    Cpu, Matrix,
    cpu::{Feedback, quantize::QuantizeOptions},
};
use rayon::prelude::*;

use super::{Quantized, float_rows, hessian::Hessian, quantize_calibrated};

/// The damping that is tried first, as a share of the mean of the Hessian's diagonal. 1 % is GPTQ's.
const DAMPING: f64 = 0.01;

/// An input of the layer was NaN or infinite during calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the calibration data hold NaN or infinite values, or overflow, at input {column}")]
pub struct NonFiniteInput {
    pub column: usize,
}

/// What rounding needs of a Hessian; made once for all matrices that share their input (query, key and value).
#[derive(Clone, Debug)]
pub struct Factor {
    feedback: Feedback,
    /// Mean squares of the inputs, up to a common factor, damped. [cols]
    squares: Vec<f32>,
    damping: f64,
    tokens: u64,
}

/// What calibrated rounding cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqReport {
    /// `tr((W - Q) H (W - Q)^T)` over tokens: the mean squared error of the layer's output, summed over outputs.
    pub loss: f64,
    /// What was added to the diagonal, as a share of its mean.
    pub damping: f64,
}

impl Factor {
    /// Factors the damped Hessian. Columns with the largest second moments are rounded first, so that all others can make
    /// up for their errors: on a trained model this costs less than the natural order, even where that searches each
    /// group's scale again among the weights that feedback has moved. Inputs that are always zero neither give nor take
    /// feedback.
    ///
    /// Needs `8 * cols^2` bytes while it works and holds `2 * cols^2`; the result is the same for any number of threads.
    ///
    /// # Errors
    /// The first input with a second moment that is not finite.
    pub fn new(cpu: Cpu, hessian: &Hessian) -> Result<Self, NonFiniteInput> {
        let n = hessian.cols();
        if let Some(column) = (0..n).find(|&a| (0..=a).any(|b| !hessian.get(a, b).is_finite())) {
            return Err(NonFiniteInput { column });
        }
        let diagonal = hessian.diagonal();
        let live = diagonal.iter().filter(|&&square| square > 0.0).count();
        let mean = diagonal.iter().sum::<f64>() / live.max(1) as f64;
        // In units of the mean, nothing below overflows or vanishes.
        let unit = if mean > 0.0 { mean } else { 1.0 };
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));

        // H = R R^T is the Cholesky factorization with rows and columns in reverse: R[i][j] is lower[n-1-i][n-1-j].
        let mut lower = vec![0.0; n * n];
        let mut damping = DAMPING;
        loop {
            lower.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
                let a = order[n - 1 - i];
                for (j, value) in row[..=i].iter_mut().enumerate() {
                    *value = hessian.get(a, order[n - 1 - j]) / unit;
                }
                row[i] += if diagonal[a] > 0.0 { damping } else { 1.0 };
            });
            if cpu.cholesky(&mut lower, n).is_ok() {
                break;
            }
            damping *= 10.0;
        }
        let entry = |i: usize, j: usize| lower[(n - 1 - i) * n + (n - 1 - j)];
        let loss = order.iter().enumerate().map(|(place, &column)| {
            let added = if diagonal[column] > 0.0 { damping } else { 1.0 };
            [entry(place, place).powi(2) * unit, added * unit]
        });
        let loss = loss.collect();
        let feedback = Feedback::new(order, loss, |i, j| (entry(i, j) / entry(j, j)) as f32);
        let squares = diagonal.iter().map(|square| (square / unit + damping) as f32).collect();
        Ok(Self { feedback, squares, damping, tokens: hessian.tokens() })
    }

    /// Mean squares of the inputs, up to a common factor, damped: what the search for scales is weighted by. `[cols]`
    pub fn squares(&self) -> &[f32] {
        &self.squares
    }
}

/// Rows of one task: a multiple of the kernel's panels.
const ROWS_PER_TASK: usize = 48;

/// Quantizes a matrix of floats with error feedback, on the scales that `options` chooses with the inputs' second moments.
/// Runs on all threads of the pool; the bytes do not depend on their number.
///
/// # Panics
/// If matrix and factor differ in columns.
pub fn quantize(
    cpu: Cpu,
    matrix: &Matrix,
    factor: &Factor,
    options: &QuantizeOptions,
    output: &mut Quantized,
) -> GptqReport {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!(cols, factor.feedback.cols(), "the Hessian is of another number of columns");
    quantize_calibrated(cpu, matrix, options, Some(&factor.squares), output);
    if rows * cols == 0 {
        return GptqReport { loss: 0.0, damping: factor.damping };
    }
    let layout = options.layout;
    let scale_bytes = layout.groups(cols) * options.scale_type.bytes();
    let zero_bytes = layout.zero_bytes(cols);
    let Quantized { codes, scales, zeros } = output;
    let losses: Vec<f64> = codes
        .par_chunks_mut(ROWS_PER_TASK * layout.code_bytes(cols))
        .enumerate()
        .map_init(Vec::new, |scratch, (task, codes)| {
            let first = task * ROWS_PER_TASK;
            let last = rows.min(first + ROWS_PER_TASK);
            let x = float_rows(cpu, matrix, first, last - first, scratch);
            let (scales, zeros) =
                (&scales[first * scale_bytes..last * scale_bytes], &zeros[first * zero_bytes..last * zero_bytes]);
            cpu.round_with_feedback(options, &factor.feedback, x, scales, zeros, codes)
        })
        .collect();
    GptqReport { loss: losses.iter().sum::<f64>() / factor.tokens.max(1) as f64, damping: factor.damping }
}
