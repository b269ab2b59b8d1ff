//! The loss of a language model.

use candle_core::WithDType;
use rayon::prelude::*;

use super::function::Function;

/// The negative log-likelihood of each target under the softmax of its row, in nats.
pub(super) struct CrossEntropy {
    pub classes: usize,
    pub targets: Vec<u32>, // [rows]
}

/// The largest logit and the sum of the exponentials of the differences to it.
fn partition<T: WithDType>(row: &[T]) -> (f64, f64) {
    let largest = row.iter().fold(f64::NEG_INFINITY, |largest, x| largest.max(x.to_f64()));
    (largest, row.iter().map(|x| (x.to_f64() - largest).exp()).sum())
}

impl Function<1> for CrossEntropy {
    const NAME: &str = "cross-entropy";

    fn shape(&self, _: [&[usize]; 1]) -> Vec<usize> {
        vec![self.targets.len(), 1]
    }

    fn forward<T: WithDType>(&self, [logits]: [&[T]; 1]) -> Vec<T> {
        let loss = |(row, &target): (&[T], &u32)| {
            let (largest, sum) = partition(row);
            T::from_f64(largest + sum.ln() - row[target as usize].to_f64())
        };
        logits.par_chunks_exact(self.classes).zip(&self.targets).map(loss).collect()
    }

    fn backward<T: WithDType>(&self, [logits]: [&[T]; 1], _: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        let mut out = vec![T::zero(); logits.len()];
        let rows = out.par_chunks_exact_mut(self.classes).zip(logits.par_chunks_exact(self.classes));
        rows.zip(&self.targets).zip(gradient).for_each(|(((out, row), &target), gradient)| {
            let ((largest, sum), gradient) = (partition(row), gradient.to_f64());
            for (out, x) in out.iter_mut().zip(row) {
                *out = T::from_f64(gradient * (x.to_f64() - largest).exp() / sum);
            }
            out[target as usize] -= T::from_f64(gradient);
        });
        [out]
    }
}
