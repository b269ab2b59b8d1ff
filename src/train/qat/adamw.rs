//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the course of its learning rate.

use std::f64::consts::PI;

use rayon::prelude::*;

/// How much of the mean gradient, and of the mean squared one, is kept from step to step.
const FIRST: f32 = 0.9;
const SECOND: f32 = 0.95;
const EPSILON: f32 = 1e-8;

/// Values of one task: they are independent of each other.
const TASK: usize = 1 << 14;

/// Values that are trained, and what the optimizer remembers of their gradients.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    pub values: Vec<f32>,
    /// Means of the gradients.
    pub first: Vec<f32>,
    /// Means of their squares.
    pub second: Vec<f32>,
}

/// What an update depends on beside the gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    /// Updates up to this one, from 1.
    pub step: u64,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// What the gradient is multiplied by first.
    pub shrink: f64,
}

impl Slot {
    pub fn new(values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Self { values, first: zeros.clone(), second: zeros }
    }

    /// Whether no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        [&self.values, &self.first, &self.second]
            .into_iter()
            .all(|values| values.par_chunks(TASK).all(|values| values.iter().all(|value| value.is_finite())))
    }

    /// One step along a gradient of as many values.
    pub fn update(&mut self, gradient: &[f32], update: Update) {
        let step = i32::try_from(update.step).unwrap_or(i32::MAX);
        // The means begin at zero, which they must not be weighted with.
        let first_bias = 1.0 - f64::from(FIRST).powi(step);
        let second_bias = 1.0 - f64::from(SECOND).powi(step);
        let rate = (update.learning_rate / first_bias) as f32;
        let root = (1.0 / second_bias) as f32;
        let kept = (1.0 - update.learning_rate * update.weight_decay) as f32;
        let shrink = update.shrink as f32;
        let values = self.values.par_chunks_mut(TASK).zip(gradient.par_chunks(TASK));
        let moments = self.first.par_chunks_mut(TASK).zip(self.second.par_chunks_mut(TASK));
        values.zip(moments).for_each(|((values, gradient), (first, second))| {
            for (((value, gradient), first), second) in values.iter_mut().zip(gradient).zip(first).zip(second) {
                let gradient = gradient * shrink;
                *first += (1.0 - FIRST) * (gradient - *first);
                *second += (1.0 - SECOND) * (gradient * gradient - *second);
                *value = *value * kept - rate * *first / ((*second * root).sqrt() + EPSILON);
            }
        });
    }
}

/// The sum of squares, added up in an order that does not depend on the number of threads.
pub(super) fn squares(gradient: &[f32]) -> f64 {
    let of_task = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    let tasks: Vec<f64> = gradient.par_chunks(TASK).map(of_task).collect();
    tasks.iter().sum()
}

/// The learning rate of a step, from 1: it rises over `warmup` steps to `highest` and falls along a cosine to zero after
/// the last of `steps`.
pub fn learning_rate(step: u64, steps: u64, warmup: u64, highest: f64) -> f64 {
    if step <= warmup {
        return highest * step as f64 / warmup as f64;
    }
    let share = (step - warmup - 1) as f64 / (steps - warmup).max(1) as f64;
    highest * 0.5 * (1.0 + (PI * share.min(1.0)).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_that_of_the_paper() {
        let (values, gradients) = ([0.5f64, -2.0, 3.0], [[0.1f64, -0.2, 0.0], [0.3, 0.4, -1e-3]]);
        let mut slot = Slot::new(values.iter().map(|&value| value as f32).collect());
        let (rate, decay) = (1e-2, 0.1);
        let (mut expected, mut first, mut second) = (values, [0.0; 3], [0.0; 3]);
        for (index, gradient) in gradients.iter().enumerate() {
            let step = index as u64 + 1;
            let update = Update { step, learning_rate: rate, weight_decay: decay, shrink: 1.0 };
            slot.update(&gradient.map(|gradient| gradient as f32), update);
            for i in 0..3 {
                first[i] = 0.9 * first[i] + 0.1 * gradient[i];
                second[i] = 0.95 * second[i] + 0.05 * gradient[i] * gradient[i];
                let (m, v) =
                    (first[i] / (1.0 - 0.9f64.powi(step as i32)), second[i] / (1.0 - 0.95f64.powi(step as i32)));
                expected[i] -= rate * (m / (v.sqrt() + 1e-8) + decay * expected[i]);
            }
        }
        for (found, expected) in slot.values.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} instead of {expected}");
        }
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f64> = (1..=10).map(|step| learning_rate(step, 10, 4, 1.0)).collect();
        assert_eq!(rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]) && rates[9] > 0.0 && rates[9] < 0.1);
        assert_eq!(learning_rate(1, 1, 0, 0.5), 0.5);
    }
}
