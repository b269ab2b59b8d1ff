//! From a matrix of floats to the bytes of its parts. Pure functions of the matrix and the options.

pub mod cost;
pub mod gptq;
pub mod hessian;

use std::borrow::Cow;

use bkpack_kernels::{
    Cpu, Data, FloatType, Grid, Layout, Matrix,
    cpu::quantize::{QuantizeOptions, Range},
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::tensor::TensorData;

/// The bytes of a quantized matrix; reused from tensor to tensor.
#[derive(Debug, Default)]
pub struct Quantized {
    pub codes: Vec<u8>,  // [rows, code_bytes]
    pub scales: Vec<u8>, // [rows, groups]
    pub zeros: Vec<u8>,  // [rows, zero_bytes]
}

impl Quantized {
    /// The data of a tensor that was quantized with these options.
    pub fn into_data(self, options: &QuantizeOptions) -> TensorData<'static> {
        TensorData::Quantized {
            layout: options.layout,
            codes: self.codes.into(),
            scale_type: options.scale_type,
            scales: self.scales.into(),
            zeros: self.zeros.into(),
        }
    }
}

/// Weights of one task: large enough to hide its cost, small enough to stay in a core's cache.
const WEIGHTS_PER_TASK: usize = 1 << 16;

fn rows_per_task(cols: usize) -> usize {
    (WEIGHTS_PER_TASK / cols.max(1)).max(1)
}

/// Looks at every weight: how many are not finite, and the range of group magnitudes.
pub fn range(cpu: Cpu, matrix: &Matrix, group: usize) -> Range {
    let step = rows_per_task(matrix.cols());
    (0..matrix.rows().div_ceil(step))
        .into_par_iter()
        .map(|task| {
            let first = task * step;
            cpu.range(matrix, first, step.min(matrix.rows() - first), group)
        })
        .reduce(|| Range::EMPTY, Range::merge)
}

/// The type of a matrix's scales: F16, or F32 where a scale could overflow it or vanish in it.
pub fn scale_type(layout: Layout, range: Range) -> FloatType {
    let levels = match layout.grid {
        // A subnormal F16 keeps few digits: below 16 of its steps a scale counts as vanished.
        Grid::Int { bits, .. } => 16.0 * f32::from((1u16 << bits) - 1),
        // The mean of a group is at least its largest magnitude over its length.
        Grid::Ternary | Grid::Binary => layout.group as f32,
    };
    let overflows = range.largest > f16::MAX.to_f32();
    let vanishes = range.smallest / levels < f16::MIN_POSITIVE_SUBNORMAL.to_f32();
    if overflows || vanishes { FloatType::F32 } else { FloatType::F16 }
}

/// Quantizes a matrix of floats on all threads of the pool; the bytes do not depend on their number.
pub fn quantize(cpu: Cpu, matrix: &Matrix, options: &QuantizeOptions, output: &mut Quantized) {
    quantize_calibrated(cpu, matrix, options, None, output);
}

/// As [`quantize`], where the mean squares of the inputs, up to a common factor, may weight the search for scales:
/// `input_squares` is `[cols]`, finite and not negative.
///
/// # Panics
/// If `input_squares` is of another length.
pub fn quantize_calibrated(
    cpu: Cpu,
    matrix: &Matrix,
    options: &QuantizeOptions,
    input_squares: Option<&[f32]>,
    output: &mut Quantized,
) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let layout = options.layout;
    let code_bytes = layout.code_bytes(cols);
    let scale_bytes = layout.groups(cols) * options.scale_type.bytes();
    let zero_bytes = layout.zero_bytes(cols);
    output.codes.resize(rows * code_bytes, 0);
    output.scales.resize(rows * scale_bytes, 0);
    output.zeros.resize(rows * zero_bytes, 0);
    if rows * cols == 0 {
        return;
    }
    let step = rows_per_task(cols);
    let chunks = output.codes.par_chunks_mut(step * code_bytes).zip(output.scales.par_chunks_mut(step * scale_bytes));
    // Without zero points there is nothing to split: every task gets an empty slice.
    let zeros: Vec<&mut [u8]> = match zero_bytes {
        0 => (0..rows.div_ceil(step)).map(|_| &mut [][..]).collect(),
        _ => output.zeros.chunks_mut(step * zero_bytes).collect(),
    };
    chunks.zip(zeros).enumerate().for_each_init(Vec::new, |scratch, (task, ((codes, scales), zeros))| {
        let first = task * step;
        let x = float_rows(cpu, matrix, first, step.min(rows - first), scratch);
        cpu.quantize_rows(options, cols, x, input_squares, codes, scales, zeros);
    });
}

/// Rounds a matrix of floats to the nearest codes on given scales, `[rows, groups]`, which are stored in the type that
/// `options` names; the grid has no zero points. Runs on all threads of the pool.
///
/// # Panics
/// If the scales are of another number, or the grid has zero points.
pub fn round_to_scales(cpu: Cpu, matrix: &Matrix, options: &QuantizeOptions, scales: &[f32], output: &mut Quantized) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let (code_bytes, groups) = (options.layout.code_bytes(cols), options.layout.groups(cols));
    assert_eq!(scales.len(), rows * groups, "a scale for each group");
    let scale_bytes = groups * options.scale_type.bytes();
    output.codes.resize(rows * code_bytes, 0);
    output.scales.resize(rows * scale_bytes, 0);
    output.zeros.clear();
    if rows * cols == 0 {
        return;
    }
    write_floats(scales, options.scale_type, &mut output.scales);
    let step = rows_per_task(cols);
    let chunks = output.codes.par_chunks_mut(step * code_bytes).zip(output.scales.par_chunks(step * scale_bytes));
    chunks.enumerate().for_each_init(Vec::new, |scratch, (task, (codes, scales))| {
        let first = task * step;
        let x = float_rows(cpu, matrix, first, step.min(rows - first), scratch);
        cpu.round_rows(options, cols, x, scales, codes);
    });
}

/// Rows as f32: in place where they already are, else widened into `scratch`.
fn float_rows<'a>(cpu: Cpu, matrix: &Matrix<'a>, first: usize, count: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    let cols = matrix.cols();
    if let Data::Float { dtype: FloatType::F32, values } = matrix.data()
        && let Ok(values) = bytemuck::try_cast_slice(&values[first * cols * 4..(first + count) * cols * 4])
        && cfg!(target_endian = "little")
    {
        return values;
    }
    scratch.resize(count * cols, 0.0);
    cpu.dequantize(matrix, first, scratch);
    scratch
}

/// A matrix's values in another float type, rounded to nearest even; borrowed if it already is that type.
pub fn convert_float<'a>(cpu: Cpu, matrix: &Matrix<'a>, to: FloatType) -> Cow<'a, [u8]> {
    match matrix.data() {
        Data::Float { dtype, values } if dtype == to => return Cow::Borrowed(values),
        _ => {}
    }
    let (cols, step) = (matrix.cols(), rows_per_task(matrix.cols()));
    let mut output = vec![0; matrix.rows() * cols * to.bytes()];
    if !output.is_empty() {
        output.par_chunks_mut(step * cols * to.bytes()).enumerate().for_each(|(task, bytes)| {
            let mut floats = vec![0.0; bytes.len() / to.bytes()];
            cpu.dequantize(matrix, task * step, &mut floats);
            write_floats(&floats, to, bytes);
        });
    }
    Cow::Owned(output)
}

/// Rounds to a float type, little-endian; `bytes` has room for exactly these values.
pub(crate) fn write_floats(floats: &[f32], to: FloatType, bytes: &mut [u8]) {
    match to {
        FloatType::F32 => {
            for (float, bytes) in floats.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = float.to_le_bytes();
            }
        }
        FloatType::F16 => {
            let mut halves = vec![f16::ZERO; floats.len()];
            halves.convert_from_f32_slice(floats);
            for (half, bytes) in halves.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = half.to_le_bytes();
            }
        }
        FloatType::BF16 => {
            for (float, bytes) in floats.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = bf16::from_f32(*float).to_le_bytes();
            }
        }
    }
}
