//! How far the weights of two models are apart, tensor by tensor.

use std::ops::AddAssign;

use bkpack_kernels::Cpu;
use rayon::prelude::*;
use serde::Serialize;

use crate::{
    error::{Error, Result},
    progress::{Observer, Unit},
    tensor::{Tensor, TensorSource},
};

/// The distance of one tensor from its counterpart.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    pub name: String,
    pub shape: Vec<usize>,
    /// Norm of the difference over the norm of the first model's tensor; absent where that tensor is all zero.
    pub relative_error: Option<f64>,
    /// Signal-to-noise ratio in dB, 20 log10 of the inverse; absent where the tensors are equal or the first is zero.
    pub snr_db: Option<f64>,
    /// The largest magnitude of a difference.
    pub max_error: f32,
}

/// Two models' tensors side by side.
#[derive(Clone, Debug, Serialize)]
pub struct Differences {
    /// Tensors that both have, the worst first.
    pub tensors: Vec<Difference>,
    /// Names that only the first model has.
    pub only_first: Vec<String>,
    /// Names that only the second model has.
    pub only_second: Vec<String>,
    /// The relative error of all common weights taken together.
    pub relative_error: Option<f64>,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    signal: f64,
    noise: f64,
    largest: f32,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Sums) {
        self.signal += other.signal;
        self.noise += other.noise;
        self.largest = self.largest.max(other.largest);
    }
}

impl Sums {
    fn relative_error(self) -> Option<f64> {
        (self.signal > 0.0).then(|| (self.noise / self.signal).sqrt())
    }
}

/// Compares every tensor that both models have.
///
/// # Errors
/// A tensor whose shapes differ or that holds NaN or infinite values, cancellation.
pub fn compare(
    cpu: Cpu,
    first: &dyn TensorSource,
    second: &dyn TensorSource,
    observer: &dyn Observer,
) -> Result<Differences> {
    let only = |one: &dyn TensorSource, other: &dyn TensorSource| -> Vec<String> {
        one.names().iter().filter(|name| other.shape(name).is_none()).cloned().collect()
    };
    let (only_first, only_second) = (only(first, second), only(second, first));
    let common: Vec<&String> = first.names().iter().filter(|name| second.shape(name).is_some()).collect();
    let weights =
        common.iter().filter_map(|name| first.shape(name)).map(|shape| shape.iter().product::<usize>() as u64);
    observer.begin("Comparing", 4 * weights.sum::<u64>(), Unit::Bytes);
    let mut tensors = Vec::with_capacity(common.len());
    let mut total = Sums::default();
    for name in common {
        observer.check()?;
        let (a, b) = (first.tensor(name)?, second.tensor(name)?);
        if a.shape() != b.shape() {
            let why = format!("tensor {name} has shape {:?} in one model and {:?} in the other", a.shape(), b.shape());
            return Err(Error::Incomparable { why });
        }
        let sums = tensor_sums(cpu, &a, &b);
        if !(sums.signal + sums.noise).is_finite() {
            return Err(Error::Incomparable { why: format!("tensor {name} holds NaN or infinite values") });
        }
        let relative_error = sums.relative_error();
        tensors.push(Difference {
            name: name.clone(),
            shape: a.shape().to_vec(),
            relative_error,
            snr_db: relative_error.filter(|&error| error > 0.0).map(|error| -20.0 * error.log10()),
            max_error: sums.largest,
        });
        total += sums;
        observer.advance(4 * a.elements() as u64);
    }
    observer.end();
    let badness = |difference: &Difference| match difference.relative_error {
        Some(error) => error,
        None if difference.max_error == 0.0 => 0.0,
        None => f64::INFINITY,
    };
    tensors.sort_by(|a, b| badness(b).total_cmp(&badness(a)));
    Ok(Differences { tensors, only_first, only_second, relative_error: total.relative_error() })
}

fn tensor_sums(cpu: Cpu, a: &Tensor, b: &Tensor) -> Sums {
    const WEIGHTS_PER_TASK: usize = 1 << 16;
    let (a, b) = (a.matrix(), b.matrix());
    let (rows, cols) = (a.rows(), a.cols());
    let step = (WEIGHTS_PER_TASK / cols.max(1)).max(1);
    let tasks: Vec<Sums> = (0..rows.div_ceil(step))
        .into_par_iter()
        .map(|task| {
            let first = task * step;
            let count = step.min(rows - first) * cols;
            let (mut x, mut y) = (vec![0.0; count], vec![0.0; count]);
            cpu.dequantize(&a, first, &mut x);
            cpu.dequantize(&b, first, &mut y);
            let mut sums = Sums::default();
            for (x, y) in x.iter().zip(&y) {
                let error = f64::from(*x) - f64::from(*y);
                let signal = f64::from(*x).powi(2);
                sums += Sums { signal, noise: error * error, largest: error.abs() as f32 };
            }
            sums
        })
        .collect();
    // Added up in order, so that the result does not depend on the number of threads.
    let mut total = Sums::default();
    tasks.into_iter().for_each(|sums| total += sums);
    total
}
