//! The scalar oracle: plain loops that are obviously right, for tests to compare kernels with.

use half::f16;

use crate::bits::{stream_code, ternary_code};
use crate::cpu::activation_blocks;
use crate::matrix::{Data, FloatType, Grid, Matrix};

/// The value of a float that lies little-endian at `index` of `bytes`.
///
/// # Panics
/// If the bytes end before it.
pub fn float(dtype: FloatType, bytes: &[u8], index: usize) -> f32 {
    let value = &bytes[index * dtype.bytes()..][..dtype.bytes()];
    match (dtype, value) {
        (FloatType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (FloatType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32_const(),
        (FloatType::BF16, &[a, b]) => f32::from_le_bytes([0, 0, a, b]),
        _ => unreachable!("the slice is as long as the type"),
    }
}

/// A quantized weight as the integer that its code stands for, and the scale of its group; `None` in a float matrix.
///
/// # Panics
/// If `row` or `col` is outside the matrix.
pub fn level(w: &Matrix, row: usize, col: usize) -> Option<(i32, f32)> {
    assert!(row < w.rows() && col < w.cols());
    let Data::Quantized { layout, codes, scale_type, scales, zeros } = w.data() else { return None };
    let codes = &codes[row * layout.code_bytes(w.cols())..];
    let code = match layout.grid.stream_bits() {
        Some(bits) => stream_code(codes, bits, col),
        None => ternary_code(codes, col),
    };
    let code = i32::from(code);
    let group = col / layout.group;
    let level = match layout.grid {
        Grid::Int { bits, symmetric: true } => code - (1 << (bits - 1)),
        Grid::Int { bits, symmetric: false } => {
            code - i32::from(stream_code(&zeros[row * layout.zero_bytes(w.cols())..], bits, group))
        }
        Grid::Ternary => code - 1,
        Grid::Binary => 2 * code - 1,
    };
    Some((level, float(scale_type, scales, row * layout.groups(w.cols()) + group)))
}

/// One weight: the integer level times the scale, one f32 rounding.
///
/// # Panics
/// If `row` or `col` is outside the matrix.
pub fn weight(w: &Matrix, row: usize, col: usize) -> f32 {
    match (level(w, row, col), w.data()) {
        (Some((level, scale)), _) => level as f32 * scale,
        (None, Data::Float { dtype, values }) => float(dtype, values, row * w.cols() + col),
        (None, Data::Quantized { .. }) => unreachable!("a quantized matrix has levels"),
    }
}

/// The whole matrix as f32: [rows, cols].
pub fn dequantize(w: &Matrix) -> Vec<f32> {
    (0..w.rows()).flat_map(|row| (0..w.cols()).map(move |col| weight(w, row, col))).collect()
}

/// `x * w^T` in f64. `x` is [tokens, cols], the result [tokens, rows].
///
/// # Panics
/// If `x` is not whole rows of `w.cols()` values.
pub fn matmul(x: &[f32], tokens: usize, w: &Matrix) -> Vec<f64> {
    assert_eq!(x.len(), tokens * w.cols());
    let weights = dequantize(w);
    let mut out = Vec::with_capacity(tokens * w.rows());
    for token in 0..tokens {
        let x = &x[token * w.cols()..][..w.cols()];
        for row in 0..w.rows() {
            let weights = &weights[row * w.cols()..][..w.cols()];
            out.push(x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum());
        }
    }
    out
}

/// One block of activations rounded to INT8: the codes and their scale, `absmax / 127` in f32, or NaN where an activation
/// is not finite.
pub fn quantize_activations(x: &[f32]) -> (Vec<i8>, f32) {
    if !x.iter().all(|v| v.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let scale = x.iter().fold(0f32, |most, v| most.max(v.abs())) / 127.0;
    let codes = x.iter().map(|v| if scale > 0.0 { (v / scale).round_ties_even() as i8 } else { 0 }).collect();
    (codes, scale)
}

/// `x * w^T` with activations rounded to INT8 in the blocks of [`activation_blocks`], everything after that in f64.
/// `x` is [tokens, cols], the result [tokens, rows]. A float matrix takes its activations as they are.
///
/// # Panics
/// If `x` is not whole rows of `w.cols()` values.
pub fn matmul_int8(x: &[f32], tokens: usize, w: &Matrix) -> Vec<f64> {
    let Data::Quantized { layout, .. } = w.data() else { return matmul(x, tokens, w) };
    assert_eq!(x.len(), tokens * w.cols());
    let mut out = Vec::with_capacity(tokens * w.rows());
    for token in 0..tokens {
        let x = &x[token * w.cols()..][..w.cols()];
        for row in 0..w.rows() {
            let mut sum = 0.0;
            for block in activation_blocks(layout.group, w.cols()) {
                let (codes, scale) = quantize_activations(&x[block.clone()]);
                let (_, weight_scale) = level(w, row, block.start).expect("the matrix is quantized");
                let levels = block.map(|col| level(w, row, col).expect("the matrix is quantized").0);
                let dot: i32 = levels.zip(codes).map(|(level, code)| level * i32::from(code)).sum();
                sum += f64::from(dot) * f64::from(weight_scale) * f64::from(scale);
            }
            out.push(sum);
        }
    }
    out
}
