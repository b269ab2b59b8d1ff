//! Norms over groups of as many columns as the gain has.

use candle_core::WithDType;

use super::function::Function;

/// `x / sqrt(mean(x^2) + epsilon) * gain`.
pub(super) struct RmsNorm {
    pub epsilon: f64,
}

/// `(x - mean) / sqrt(variance + epsilon) * gain + bias`.
pub(super) struct LayerNorm {
    pub epsilon: f64,
}

/// A group less its mean (where `centred`), and one over its standard deviation.
fn normalize<T: WithDType>(group: &[T], centred: bool, epsilon: f64) -> (Vec<f64>, f64) {
    let length = group.len() as f64;
    let mut values: Vec<f64> = group.iter().map(|x| x.to_f64()).collect();
    if centred {
        let mean = values.iter().sum::<f64>() / length;
        values.iter_mut().for_each(|x| *x -= mean);
    }
    let squares: f64 = values.iter().map(|x| x * x).sum();
    let factor = 1.0 / (squares / length + epsilon).sqrt();
    values.iter_mut().for_each(|x| *x *= factor);
    (values, factor)
}

fn forward<T: WithDType>(x: &[T], gain: &[T], bias: Option<&[T]>, epsilon: f64) -> Vec<T> {
    let mut out = Vec::with_capacity(x.len());
    for group in x.chunks_exact(gain.len()) {
        let (normal, _) = normalize(group, bias.is_some(), epsilon);
        let scaled = normal.iter().zip(gain).map(|(x, gain)| x * gain.to_f64());
        match bias {
            Some(bias) => out.extend(scaled.zip(bias).map(|(x, bias)| T::from_f64(x + bias.to_f64()))),
            None => out.extend(scaled.map(T::from_f64)),
        }
    }
    out
}

/// The gradients of `x`, gain and bias; the last without meaning where the norm is not `centred`.
fn backward<T: WithDType>(x: &[T], gain: &[T], gradient: &[T], centred: bool, epsilon: f64) -> [Vec<T>; 3] {
    let length = gain.len() as f64;
    let mut of_x = Vec::with_capacity(x.len());
    let (mut of_gain, mut of_bias) = (vec![0.0; gain.len()], vec![0.0; gain.len()]);
    for (group, gradient) in x.chunks_exact(gain.len()).zip(gradient.chunks_exact(gain.len())) {
        let (normal, factor) = normalize(group, centred, epsilon);
        let mut of_normal = Vec::with_capacity(gain.len());
        for (index, (gradient, normal)) in gradient.iter().zip(&normal).enumerate() {
            let gradient = gradient.to_f64();
            of_gain[index] += gradient * normal;
            of_bias[index] += gradient;
            of_normal.push(gradient * gain[index].to_f64());
        }
        let mean = if centred { of_normal.iter().sum::<f64>() / length } else { 0.0 };
        let along = of_normal.iter().zip(&normal).map(|(gradient, normal)| gradient * normal).sum::<f64>() / length;
        let pairs = of_normal.iter().zip(&normal);
        of_x.extend(pairs.map(|(gradient, normal)| T::from_f64(factor * (gradient - mean - normal * along))));
    }
    let narrow = |values: Vec<f64>| values.into_iter().map(T::from_f64).collect();
    [of_x, narrow(of_gain), narrow(of_bias)]
}

impl Function<2> for RmsNorm {
    const NAME: &str = "RMS norm";

    fn shape(&self, [x, _]: [&[usize]; 2]) -> Vec<usize> {
        x.to_vec()
    }

    fn forward<T: WithDType>(&self, [x, gain]: [&[T]; 2]) -> Vec<T> {
        forward(x, gain, None, self.epsilon)
    }

    fn backward<T: WithDType>(&self, [x, gain]: [&[T]; 2], _: &[T], gradient: &[T]) -> [Vec<T>; 2] {
        let [of_x, of_gain, _] = backward(x, gain, gradient, false, self.epsilon);
        [of_x, of_gain]
    }
}

impl Function<3> for LayerNorm {
    const NAME: &str = "layer norm";

    fn shape(&self, [x, _, _]: [&[usize]; 3]) -> Vec<usize> {
        x.to_vec()
    }

    fn forward<T: WithDType>(&self, [x, gain, bias]: [&[T]; 3]) -> Vec<T> {
        forward(x, gain, Some(bias), self.epsilon)
    }

    fn backward<T: WithDType>(&self, [x, gain, _]: [&[T]; 3], _: &[T], gradient: &[T]) -> [Vec<T>; 3] {
        backward(x, gain, gradient, true, self.epsilon)
    }
}
