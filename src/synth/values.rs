//! Random values, block by block: a block depends on the seed, the tensor's name and its place in the tensor, and on
//! nothing else, so that bytes depend neither on threads nor on which other tensors are written.

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::StandardNormal;

use super::tensors::{Draw, SynthTensor};
use crate::tensor::matrix_shape;

/// Values of a block; the last of a tensor is shorter.
pub(super) const BLOCK: usize = 1 << 16;

/// One column of so many is larger, by this factor.
const OUTLIER_EVERY: usize = 256;
const OUTLIER_FACTOR: f32 = 8.0;

/// Fills `values` with those of `tensor` from element `start` on, which begins a block.
pub(super) fn fill(tensor: &SynthTensor, seed: u64, start: usize, values: &mut [f32]) {
    let mut random = generator(seed, &tensor.name, start as u64);
    let mut normal = |mean: f32, std: f32| mean + std * random.sample::<f32, _>(StandardNormal);
    let (_, cols) = matrix_shape(&tensor.shape);
    match tensor.draw {
        Draw::Matrix { std } => {
            values.fill_with(|| normal(0.0, std));
            enlarge_outliers(tensor, seed, start, values);
        }
        Draw::Normal { mean, std } => values.fill_with(|| normal(mean, std)),
        Draw::Constant(value) => values.fill(value),
        Draw::LogOfColumn => {
            let columns = (start..).map(|element| element % cols);
            values.iter_mut().zip(columns).for_each(|(value, column)| *value = ((column + 1) as f32).ln());
        }
        Draw::TimeStepBias { min, max } => values.fill_with(|| {
            let step = random.random_range(min.ln()..max.ln()).exp();
            // The inverse of softplus: ln(exp(step) - 1).
            step + (-(-step).exp_m1()).ln()
        }),
    }
}

/// Multiplies a few columns, the same ones in every block of the tensor.
fn enlarge_outliers(tensor: &SynthTensor, seed: u64, start: usize, values: &mut [f32]) {
    let (_, cols) = matrix_shape(&tensor.shape);
    let mut random = generator(seed, &tensor.name, u64::MAX);
    for _ in 0..cols / OUTLIER_EVERY {
        // Below 2^32 on every platform, so that the same column comes out everywhere.
        let column = random.random_range(0..cols as u32) as usize;
        let first = (column + cols - start % cols) % cols;
        values.iter_mut().skip(first).step_by(cols).for_each(|value| *value *= OUTLIER_FACTOR);
    }
}

/// Independent random numbers for each seed, tensor and place. Xoshiro256++ gives the same ones on every platform.
fn generator(seed: u64, name: &str, place: u64) -> Xoshiro256PlusPlus {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&place.to_le_bytes()).update(name.as_bytes());
    Xoshiro256PlusPlus::from_seed(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], draw: Draw) -> SynthTensor {
        SynthTensor { name: "x.weight".into(), shape: shape.to_vec(), draw }
    }

    fn values(tensor: &SynthTensor, seed: u64) -> Vec<f32> {
        let mut values = vec![f32::NAN; tensor.elements()];
        values.chunks_mut(BLOCK).enumerate().for_each(|(block, values)| fill(tensor, seed, block * BLOCK, values));
        values
    }

    /// Mean, standard deviation and kurtosis.
    fn moments(values: &[f32]) -> (f64, f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let moment = |power| values.iter().map(|&value| (f64::from(value) - mean).powi(power)).sum::<f64>() / count;
        (mean, moment(2).sqrt(), moment(4) / moment(2).powi(2))
    }

    #[test]
    fn values_are_gaussian_but_for_a_few_columns() {
        // Rows that no block ends with.
        let (rows, cols) = (700, 768);
        let values = values(&tensor(&[rows, cols], Draw::Matrix { std: 0.02 }), 0);
        let deviations: Vec<f64> = (0..cols)
            .map(|column| moments(&values.iter().skip(column).step_by(cols).copied().collect::<Vec<_>>()).1)
            .collect();
        let (large, usual): (Vec<f64>, Vec<f64>) = deviations.into_iter().partition(|&deviation| deviation > 0.05);
        assert_eq!(large.len(), 3);
        assert!(large.iter().all(|deviation| (0.13..0.19).contains(deviation)), "{large:?}");
        assert!(usual.iter().all(|deviation| (0.016..0.024).contains(deviation)));

        let plain = self::values(&tensor(&[1 << 20], Draw::Normal { mean: 1.0, std: 0.02 }), 0);
        let (mean, deviation, kurtosis) = moments(&plain);
        assert!((mean - 1.0).abs() < 1e-4 && (deviation - 0.02).abs() < 1e-4 && (kurtosis - 3.0).abs() < 0.05);
        let beyond = plain.iter().filter(|&&value| (value - 1.0).abs() > 0.08).count();
        // Four standard deviations are exceeded by 6.3e-5 of all: 66 here.
        assert!((30..120).contains(&beyond), "{beyond}");
    }

    #[test]
    fn blocks_seeds_and_names_give_other_values() {
        let draw = Draw::Normal { mean: 0.0, std: 1.0 };
        let of = |seed, name: &str| values(&SynthTensor { name: name.into(), shape: vec![3 * BLOCK], draw }, seed);
        let first = of(0, "a");
        assert_eq!(first, of(0, "a"));
        for other in [of(1, "a"), of(0, "b"), [&first[BLOCK..], &first[..BLOCK]].concat()] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} values are the same");
        }
    }

    #[test]
    fn mambas_own_parameters_are_as_it_begins_with_them() {
        let logs = values(&tensor(&[2 * BLOCK / 16 + 3, 16], Draw::LogOfColumn), 0);
        assert!(logs.chunks(16).all(|row| row == &logs[..16]));
        assert!((0..16).all(|column| (logs[column].exp() - (column + 1) as f32).abs() < 1e-4));
        let biases = values(&tensor(&[10_000], Draw::TimeStepBias { min: 0.001, max: 0.1 }), 0);
        let steps: Vec<f32> = biases.iter().map(|bias| bias.exp().ln_1p()).collect();
        assert!(steps.iter().all(|step| (0.00099..0.101).contains(step)));
        let below = steps.iter().filter(|&&step| step < 0.01).count();
        assert!((4700..5300).contains(&below), "half of them are below the geometric mean: {below}");
    }
}
