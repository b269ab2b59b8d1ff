//! A trained tensor: its weights, and what the packed file will hold of them.

use bkpack_kernels::{Cpu, Grid};
use rayon::prelude::*;

use super::{
    adamw::{Slot, Update},
    grid::{read_scales, straight_through},
};
use crate::{
    checkpoint::Checkpoint,
    encoding::Encoding,
    error::Result,
    pack::PackOptions,
    policy::Alternative,
    quant::{self, Quantized},
    tensor::{Tensor, TensorData, matrix_shape},
};

/// Learned scales stay above this share of what each began at: one at zero would take its group's weights out of training.
const LEAST_SCALE: f32 = 1e-3;

/// A tensor that is trained.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    /// What the policy says of it.
    pub alternative: Alternative,
    /// Whether it is pulled to zero: matrices are; norms, biases and the like are not.
    pub decays: bool,
    pub weights: Slot,
    pub scales: Option<LearnedScales>,
}

/// Scales that are trained with the weights, `[rows, groups]`.
#[derive(Clone, Debug)]
pub(super) struct LearnedScales {
    /// What they were before training.
    pub initial: Vec<f32>,
    /// What is trained: multiples of these, so that the learning rate is a share of each, however small.
    pub multiples: Slot,
}

impl LearnedScales {
    pub fn values(&self) -> Vec<f32> {
        self.multiples.values.iter().zip(&self.initial).map(|(multiple, initial)| multiple * initial).collect()
    }
}

/// What the packed file holds of a tensor.
pub(super) struct Stored {
    pub tensor: Tensor<'static>,
    /// Dequantized, row-major.
    pub values: Vec<f32>,
}

/// How tensors are packed.
#[derive(Clone, Copy)]
pub(super) struct Packer<'a> {
    pub cpu: Cpu,
    pub checkpoint: &'a Checkpoint,
    pub options: &'a PackOptions,
}

impl Parameter {
    /// What would be packed now.
    ///
    /// # Errors
    /// As [`PackOptions::encoding`].
    pub fn stored(&self, packer: Packer) -> Result<Stored> {
        let Packer { cpu, checkpoint, options } = packer;
        let weights = Tensor::floats(self.shape.clone(), &self.weights.values);
        let encoding = options.encoding(checkpoint, (&self.name, &weights), self.alternative, cpu)?;
        let matrix = weights.matrix();
        let data = match (encoding, options.quantize_options(encoding), &self.scales) {
            (Encoding::Float { dtype }, _, _) => TensorData::Float {
                dtype: dtype.into(),
                values: quant::convert_float(cpu, &matrix, dtype.into()).into_owned().into(),
            },
            (_, Some(options), Some(scales)) => {
                let mut quantized = Quantized::default();
                quant::round_to_scales(cpu, &matrix, &options, &scales.values(), &mut quantized);
                quantized.into_data(&options)
            }
            (_, Some(options), None) => {
                let mut quantized = Quantized::default();
                quant::quantize(cpu, &matrix, &options, &mut quantized);
                quantized.into_data(&options)
            }
            (_, None, _) => unreachable!("every encoding but plain values has a layout"),
        };
        let tensor = Tensor::new(self.shape.clone(), data).expect("quantized to this layout");
        let mut values = vec![0.0; tensor.elements()];
        dequantize(cpu, &tensor, &mut values);
        Ok(Stored { tensor, values })
    }

    /// Begins to train the scales that packing would choose now; not where there are none, or zero points.
    pub fn learn_scales(&mut self, packer: Packer) -> Result<()> {
        let stored = self.stored(packer)?;
        if let TensorData::Quantized { layout, scale_type, scales, .. } = stored.tensor.data()
            && !layout.grid.has_zero_points()
        {
            let initial = read_scales(*scale_type, scales);
            self.scales = Some(LearnedScales { multiples: Slot::new(vec![1.0; initial.len()]), initial });
        }
        Ok(())
    }

    /// Turns the gradient of what was stored into that of the weights, in place, and returns that of the scales' multiples,
    /// where they are learned.
    pub fn through_rounding(&self, stored: &Stored, gradient: &mut [f32]) -> Vec<f32> {
        let mut of_scales = straight_through(&stored.tensor, &stored.values, &self.weights.values, gradient);
        let (Some(scales), TensorData::Quantized { layout, .. }) = (&self.scales, stored.tensor.data()) else {
            return Vec::new();
        };
        let (_, cols) = matrix_shape(&self.shape);
        let largest = match layout.grid {
            Grid::Int { bits, .. } => (1u32 << (bits - 1)) - 1,
            _ => 1,
        };
        // LSQ's factor keeps the gradient of a scale as large as that of its weights.
        let factor = 1.0 / ((layout.group.min(cols) * largest as usize) as f32).sqrt();
        of_scales.iter_mut().zip(&scales.initial).for_each(|(gradient, initial)| *gradient *= initial * factor);
        of_scales
    }

    /// One step along the gradients of the weights and of the scales' multiples.
    pub fn update(&mut self, gradient: &[f32], of_scales: &[f32], update: Update) {
        let weight_decay = if self.decays { update.weight_decay } else { 0.0 };
        self.weights.update(gradient, Update { weight_decay, ..update });
        if let Some(scales) = &mut self.scales {
            scales.multiples.update(of_scales, Update { weight_decay: 0.0, ..update });
            for multiple in scales.multiples.values.iter_mut().filter(|multiple| **multiple < LEAST_SCALE) {
                *multiple = LEAST_SCALE;
            }
        }
    }

    /// Whether all that is trained, and all that the optimizer remembers of it, is finite.
    pub fn is_finite(&self) -> bool {
        self.weights.is_finite() && self.scales.as_ref().is_none_or(|scales| scales.multiples.is_finite())
    }
}

/// All values of a tensor, on all threads of the pool.
fn dequantize(cpu: Cpu, tensor: &Tensor, values: &mut [f32]) {
    const TASK: usize = 1 << 16;
    let matrix = tensor.matrix();
    let step = (TASK / matrix.cols().max(1)).max(1);
    if !values.is_empty() {
        let pieces = values.par_chunks_mut(step * matrix.cols()).enumerate();
        pieces.for_each(|(piece, values)| cpu.dequantize(&matrix, piece * step, values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_scale_moves_by_no_larger_share_than_a_large_one() {
        let initial = vec![1.0, 1e-6, -1e-6, 0.0];
        let mut parameter = Parameter {
            name: "w".into(),
            shape: vec![4, 1],
            alternative: Alternative { request: "int4:row".parse().unwrap(), named: true, cost: None },
            decays: true,
            weights: Slot::new(vec![0.0; 4]),
            scales: Some(LearnedScales { multiples: Slot::new(vec![1.0; 4]), initial: initial.clone() }),
        };
        let values = |parameter: &Parameter| parameter.scales.as_ref().unwrap().values();
        assert_eq!(values(&parameter), initial);
        let update = |learning_rate| Update { step: 1, learning_rate, weight_decay: 0.01, shrink: 1.0 };
        parameter.update(&[0.0; 4], &[0.5, 0.5, -0.5, 0.5], update(1e-2));
        for (found, initial) in values(&parameter).iter().zip(&initial) {
            assert!((found - initial).abs() <= 1.01e-2 * initial.abs(), "{initial} became {found}");
        }
        // However far a step goes, a scale keeps its sign and does not vanish.
        parameter.update(&[0.0; 4], &[0.5; 4], update(1e3));
        let found = values(&parameter);
        assert_eq!(found, [1e-3, 1e-6 * 1e-3, -1e-6 * 1e-3, 0.0]);
    }
}
