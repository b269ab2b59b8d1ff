//! The error of quantized activations in a model's Birman-Schwinger core.

use serde::Serialize;

use crate::{
    model::core_activations::{CoreTrace, core_record},
    tensor::TensorSource,
};

/// The relative error of quantized activations over all layers and positions: the mean absolute difference to what the
/// same inputs give without rounding, over the mean absolute value of the latter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CoreError {
    pub bits: u32,
    pub v: f64,
    /// Of the resolvent's real part, with the error that comes from v.
    pub re_g: f64,
    pub im_g: f64,
}

/// Sums over all layers and positions; rows v, Re G, Im G.
#[derive(Default)]
pub(super) struct CoreErrors {
    difference: [f64; 3],
    magnitude: [f64; 3],
}

impl CoreErrors {
    pub fn add(&mut self, trace: &CoreTrace) {
        for (row, (exact, used)) in trace.exact.rows().into_iter().zip(trace.used.rows()).enumerate() {
            let pairs = exact.iter().zip(used);
            self.difference[row] += pairs.map(|(exact, used)| f64::from((exact - used).abs())).sum::<f64>();
            self.magnitude[row] += exact.iter().map(|exact| f64::from(exact.abs())).sum::<f64>();
        }
    }

    /// `None` where the model's activations are not quantized.
    pub fn relative(&self, source: &dyn TensorSource) -> Option<CoreError> {
        let record = core_record(source)?;
        // No error in what is zero throughout.
        let relative = |row: usize| self.difference[row] / self.magnitude[row].max(f64::MIN_POSITIVE);
        Some(CoreError { bits: record.bits, v: relative(0), re_g: relative(1), im_g: relative(2) })
    }
}
