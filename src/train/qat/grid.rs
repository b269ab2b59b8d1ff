//! What becomes of a weight's gradient on its way through rounding.

use bkpack_kernels::{FloatType, Grid};
use half::f16;
use rayon::prelude::*;

use crate::tensor::{Tensor, TensorData, matrix_shape};

/// Beyond half a step of the grid a weight is not rounded but clipped; a little more is allowed for the rounding of the
/// quotient itself.
const SLACK: f32 = 1.0 + 1e-4;

/// Turns the gradient of a quantized tensor's values into that of the weights that were rounded to them, in place, and
/// returns that of the scales, `[rows, groups]`.
///
/// Straight-through: a weight that was rounded, by at most half a step, gets the gradient of its value; one that was
/// clipped gets none. The gradient of a scale `s` is LSQ's: the sum over its group of the value's gradient times
/// `q - w / s` where `w` was rounded to the code `q`, and times `q` where it was clipped; a binary value is `±s`, whose
/// derivative is its sign. Of plain values every gradient passes, and there are no scales. With zero points the scales'
/// gradients are those of a grid whose zero points stay.
///
/// `values` are the tensor's, dequantized; all slices are row-major.
///
/// # Panics
/// If a slice has another number of values than the tensor.
pub fn straight_through(tensor: &Tensor, values: &[f32], weights: &[f32], gradient: &mut [f32]) -> Vec<f32> {
    let lengths = (values.len(), weights.len(), gradient.len());
    assert_eq!(lengths, (tensor.elements(), tensor.elements(), tensor.elements()), "a value for each weight");
    let TensorData::Quantized { layout, scale_type, scales, .. } = tensor.data() else { return Vec::new() };
    let (rows, cols) = matrix_shape(tensor.shape());
    let groups = layout.groups(cols);
    let mut of_scales = vec![0.0; rows * groups];
    if of_scales.is_empty() {
        return of_scales;
    }
    let scales = read_scales(*scale_type, scales);
    let rows = gradient.par_chunks_mut(cols).zip(values.par_chunks(cols)).zip(weights.par_chunks(cols));
    let rows = rows.zip(of_scales.par_chunks_mut(groups)).zip(scales.par_chunks(groups));
    rows.for_each(|((((gradient, values), weights), of_scales), scales)| {
        for (group, (of_scale, &scale)) in of_scales.iter_mut().zip(scales).enumerate() {
            let columns = layout.group_range(group, cols);
            let gradient = &mut gradient[columns.clone()];
            let pairs = values[columns.clone()].iter().zip(&weights[columns]);
            *of_scale = through_group(layout.grid, scale, pairs, gradient);
        }
    });
    of_scales
}

/// One group; returns the gradient of its scale.
fn through_group<'a>(
    grid: Grid,
    scale: f32,
    pairs: impl Iterator<Item = (&'a f32, &'a f32)>,
    gradient: &mut [f32],
) -> f32 {
    let magnitude = scale.abs();
    let mut of_scale = 0.0;
    for ((&value, &weight), gradient) in pairs.zip(gradient) {
        let clipped = match grid {
            Grid::Int { .. } => (weight - value).abs() > 0.5 * magnitude * SLACK,
            Grid::Ternary => weight.abs() > 1.5 * magnitude * SLACK,
            // The two values are 2 s apart.
            Grid::Binary => weight.abs() > 2.0 * magnitude * SLACK,
        };
        if scale != 0.0 {
            let rounded = clipped || grid == Grid::Binary;
            let slope = if rounded { value / scale } else { (value - weight) / scale };
            of_scale += *gradient * slope;
        }
        if clipped {
            *gradient = 0.0;
        }
    }
    of_scale
}

/// Scales as they are stored.
pub(super) fn read_scales(scale_type: FloatType, bytes: &[u8]) -> Vec<f32> {
    match scale_type {
        FloatType::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        _ => bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
    }
}
