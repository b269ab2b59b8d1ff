//! What a budget's choice could be replaced by: mixes that need no data, at about the same size.

use std::collections::HashMap;

use bkpack_kernels::Cpu;

use super::Packing;
use crate::{
    encoding::Encoding,
    error::Result,
    policy::{Choice, Preset, SizedAlternative},
    quant::{self, Quantized},
    tensor::{Tensor, TensorData, TensorSource},
};

/// Another choice for all tensors.
#[derive(Clone, Debug)]
pub struct Rival {
    pub name: String,
    /// Bytes of the whole file.
    pub bytes: u64,
    /// Whether the file meets the target.
    pub fits: bool,
    choice: Vec<usize>,
}

impl Packing<'_> {
    /// Presets to measure a budget's choice against: of uniform encodings the largest that fit, with and without zero
    /// points, and the next larger one; of those with embeddings and head at 8 bits the largest that fits. None where the
    /// policy is no budget.
    pub fn rivals(&self) -> Vec<Rival> {
        let Choice::Budget(budget) = &self.options.policy.choice else { return Vec::new() };
        let target = budget.target_bytes(&self.outline);
        let sized: Vec<Vec<SizedAlternative>> = self.prospects.iter().map(|prospect| prospect.sized.clone()).collect();
        let rivals: Vec<(Preset, Rival)> = Preset::all()
            .into_iter()
            .filter_map(|preset| {
                let choice = preset.choice(&self.outline, &sized)?;
                let bytes = self.bytes_of(&choice, Some(&preset.name()));
                Some((preset, Rival { name: preset.name(), bytes, fits: bytes <= target, choice }))
            })
            .collect();
        let largest = |wanted: &dyn Fn(&Preset) -> bool| {
            let fitting = rivals.iter().filter(|(preset, rival)| rival.fits && wanted(preset));
            fitting.max_by_key(|(_, rival)| rival.bytes)
        };
        let larger = rivals.iter().filter(|(preset, rival)| !rival.fits && preset.is_uniform());
        let found = [
            largest(&|preset| preset.is_uniform() && preset.is_symmetric()),
            largest(&|preset| preset.is_uniform() && !preset.is_symmetric()),
            largest(&|preset| !preset.is_uniform()),
            larger.min_by_key(|(_, rival)| rival.bytes),
        ];
        let mut different: Vec<Rival> = Vec::new();
        for (_, rival) in found.into_iter().flatten() {
            if rival.choice != self.choice && different.iter().all(|known| known.choice != rival.choice) {
                different.push(rival.clone());
            }
        }
        different
    }

    /// Packs as a rival does instead.
    ///
    /// # Errors
    /// A tensor that is named like a part of another one.
    ///
    /// # Panics
    /// If it is another packing's.
    pub fn adopt(&mut self, rival: &Rival) -> Result<()> {
        self.settle(rival.choice.clone(), Some(rival.name.clone()))
    }

    /// All matrices as they would be without calibrated rounding, by a rival's choice or, without one, by the packing's
    /// own; in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`](crate::checkpoint::Checkpoint).
    pub fn quantized(&self, cpu: Cpu, rival: Option<&Rival>) -> Result<HashMap<String, Tensor<'static>>> {
        let choice = rival.map_or(&self.choice, |rival| &rival.choice);
        let mut tensors = HashMap::new();
        for (info, (prospect, &index)) in self.outline.iter().zip(self.prospects.iter().zip(choice)) {
            let tensor = self.checkpoint.tensor(&info.name)?;
            let data = match prospect.outcomes[index].encoding {
                Encoding::Float { dtype } => TensorData::Float {
                    dtype: dtype.into(),
                    values: quant::convert_float(cpu, &tensor.matrix(), dtype.into()).into_owned().into(),
                },
                encoding => {
                    let options = self.quantize_options(encoding).expect("not plain values");
                    let mut quantized = Quantized::default();
                    quant::quantize(cpu, &tensor.matrix(), &options, &mut quantized);
                    quantized.into_data(&options)
                }
            };
            let tensor = Tensor::new(info.shape.clone(), data).expect("quantized to this layout");
            tensors.insert(info.name.clone(), tensor);
        }
        Ok(tensors)
    }
}
