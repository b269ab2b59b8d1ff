//! A softplus whose relative error is small for large negative values, too.

use candle_core::WithDType;

use super::function::Function;

/// `log(1 + exp(x))`, element by element.
pub(super) struct Softplus;

impl Function<1> for Softplus {
    const NAME: &str = "softplus";

    fn shape(&self, [x]: [&[usize]; 1]) -> Vec<usize> {
        x.to_vec()
    }

    fn forward<T: WithDType>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        x.iter().map(|x| T::from_f64(softplus(x.to_f64()))).collect()
    }

    fn backward<T: WithDType>(&self, [x]: [&[T]; 1], _: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        [x.iter().zip(gradient).map(|(x, gradient)| T::from_f64(gradient.to_f64() * sigmoid(x.to_f64()))).collect()]
    }
}
