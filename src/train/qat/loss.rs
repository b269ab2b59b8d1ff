//! What a model is trained to do: to predict the text, and to predict what a teacher predicts.

use bkpack_kernels::{Cpu, cpu::Comparison};
use rayon::prelude::*;

use super::options::Distillation;

/// The losses of a few positions, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Negative log-likelihoods of the targets, in nats.
    pub cross_entropy: f64,
    /// Divergences of the student from the teacher, both softened by the temperature, in nats.
    pub divergence: f64,
}

impl Losses {
    /// Adds those of other positions.
    pub fn add(&mut self, other: Self) {
        self.cross_entropy += other.cross_entropy;
        self.divergence += other.divergence;
    }

    /// What is to become small; `distillation` where there is a teacher.
    pub fn objective(&self, distillation: Option<Distillation>) -> f64 {
        match distillation {
            None => self.cross_entropy,
            Some(Distillation { alpha, temperature }) => {
                alpha * temperature.powi(2) * self.divergence + (1.0 - alpha) * self.cross_entropy
            }
        }
    }
}

/// A teacher's logits for the same positions, and how much they count.
#[derive(Clone, Copy, Debug)]
pub struct Teaching<'a> {
    pub logits: &'a [f32], // [positions, vocabulary]
    pub distillation: Distillation,
}

/// The losses of positions with logits `[positions, vocabulary]`, and the gradient of `weight` times the
/// [objective](Losses::objective) with respect to the logits.
///
/// # Panics
/// If the lengths do not fit together, or there are no targets.
pub fn loss_and_gradient(
    cpu: Cpu,
    logits: &[f32],
    targets: &[u32],
    teaching: Option<Teaching>,
    weight: f64,
) -> (Losses, Vec<f32>) {
    let vocabulary = logits.len() / targets.len();
    let mut nll = vec![0.0; targets.len()];
    cpu.cross_entropy(logits, targets, &mut nll);
    let mut losses = Losses { cross_entropy: nll.iter().sum(), divergence: 0.0 };
    let Some(Teaching { logits: teacher, distillation: Distillation { alpha, temperature } }) = teaching else {
        let mut gradient = logits.to_vec();
        gradient.par_chunks_exact_mut(vocabulary).zip(targets).for_each(|(row, &target)| {
            cpu.softmax(row);
            row[target as usize] -= 1.0;
            row.iter_mut().for_each(|value| *value *= weight as f32);
        });
        return (losses, gradient);
    };
    assert_eq!(teacher.len(), logits.len(), "a teacher of the same vocabulary");
    let soften = |logits: &[f32]| -> Vec<f32> {
        let inverse = (1.0 / temperature) as f32;
        logits.par_iter().with_min_len(1 << 14).map(|logit| logit * inverse).collect()
    };
    let (mut student_soft, mut teacher_soft) = (soften(logits), soften(teacher));
    let mut compared = vec![Comparison::default(); targets.len()];
    cpu.compare_logits(&teacher_soft, &student_soft, vocabulary, &mut compared);
    losses.divergence = compared.iter().map(|position| position.kl_divergence).sum();
    let (hard, soft) = ((weight * (1.0 - alpha)) as f32, (weight * alpha * temperature) as f32);
    let mut gradient = logits.to_vec();
    let rows = gradient.par_chunks_exact_mut(vocabulary).zip(targets);
    let softened = student_soft.par_chunks_exact_mut(vocabulary).zip(teacher_soft.par_chunks_exact_mut(vocabulary));
    rows.zip(softened).for_each(|((row, &target), (student, teacher))| {
        cpu.softmax(row);
        cpu.softmax(student);
        cpu.softmax(teacher);
        row[target as usize] -= 1.0;
        for ((value, student), teacher) in row.iter_mut().zip(student).zip(teacher) {
            *value = hard * *value + soft * (*student - *teacher);
        }
    });
    (losses, gradient)
}
