//! The weights of causal attention.

use candle_core::WithDType;
use rayon::prelude::*;

use super::function::Function;

/// The softmax of scaled scores over the positions that a token sees; zero elsewhere.
///
/// Scores are `[.., tokens, positions]`, the tokens the last of the positions.
pub(super) struct CausalSoftmax {
    pub tokens: usize,
    pub positions: usize,
    /// Each token sees so many positions up to its own.
    pub window: usize,
    pub scale: f64,
}

impl CausalSoftmax {
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.positions - self.tokens + row % self.tokens + 1;
        end.saturating_sub(self.window)..end
    }
}

impl Function<1> for CausalSoftmax {
    const NAME: &str = "causal softmax";

    fn shape(&self, [scores]: [&[usize]; 1]) -> Vec<usize> {
        scores.to_vec()
    }

    fn forward<T: WithDType>(&self, [scores]: [&[T]; 1]) -> Vec<T> {
        let mut out = vec![T::zero(); scores.len()];
        let rows = out.par_chunks_exact_mut(self.positions).zip(scores.par_chunks_exact(self.positions));
        rows.enumerate().for_each(|(row, (out, scores))| {
            let visible = self.visible(row);
            let (out, scores) = (&mut out[visible.clone()], &scores[visible]);
            let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(score.to_f64()));
            let power = |score: &T| (self.scale * (score.to_f64() - largest)).exp();
            let powers: Vec<f64> = scores.iter().map(power).collect();
            let sum: f64 = powers.iter().sum();
            out.iter_mut().zip(powers).for_each(|(out, power)| *out = T::from_f64(power / sum));
        });
        out
    }

    fn backward<T: WithDType>(&self, _: [&[T]; 1], weights: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        let mut out = vec![T::zero(); weights.len()];
        let rows = out.par_chunks_exact_mut(self.positions).zip(weights.par_chunks_exact(self.positions));
        let rows = rows.zip(gradient.par_chunks_exact(self.positions));
        rows.enumerate().for_each(|(row, ((out, weights), gradient))| {
            let visible = self.visible(row);
            let (weights, gradient) = (&weights[visible.clone()], &gradient[visible.clone()]);
            let pairs = || weights.iter().zip(gradient).map(|(weight, gradient)| (weight.to_f64(), gradient.to_f64()));
            let mean: f64 = pairs().map(|(weight, gradient)| weight * gradient).sum();
            for (out, (weight, gradient)) in out[visible].iter_mut().zip(pairs()) {
                *out = T::from_f64(self.scale * weight * (gradient - mean));
            }
        });
        [out]
    }
}
