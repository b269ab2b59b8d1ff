//! Rotary position embedding: the angles, computed in f32 step by step as transformers does.

use std::f32::consts::TAU;

/// How positions turn into angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of frequencies.
    pub theta: f32,
    /// How frequencies are stretched for contexts longer than those of pretraining.
    pub scaling: RopeScaling,
}

/// The kinds of stretching that are supported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear { factor: f32 },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        /// The context of pretraining, in tokens.
        original_max_position_embeddings: f32,
    },
}

impl Rope {
    /// The angle that each position adds, in radians: `[head_dim / 2]`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2).map(|i| self.stretched(1.0 / self.theta.powf((2 * i) as f32 / head_dim as f32))).collect()
    }

    fn stretched(&self, frequency: f32) -> f32 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let wavelength = TAU / frequency;
                if wavelength > original_max_position_embeddings / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_max_position_embeddings / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };

    /// The formulas of transformers' `modeling_rope_utils`, in f64.
    fn by_hand(rope: &Rope, head_dim: usize) -> Vec<f64> {
        let plain = |i: usize| 1.0 / f64::from(rope.theta).powf(2.0 * i as f64 / head_dim as f64);
        let scaled = |frequency: f64| match rope.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / f64::from(factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let [factor, low, high, original] =
                    [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings].map(f64::from);
                let wavelength = 2.0 * PI / frequency;
                let smooth = (original / wavelength - low) / (high - low);
                let between = (1.0 - smooth) * frequency / factor + smooth * frequency;
                let outside = if wavelength > original / low { frequency / factor } else { frequency };
                let is_between = wavelength >= original / high && wavelength <= original / low;
                if is_between { between } else { outside }
            }
        };
        (0..head_dim / 2).map(plain).map(scaled).collect()
    }

    #[test]
    fn frequencies_are_those_of_transformers() {
        for (theta, scaling, head_dim) in [
            (10_000.0, RopeScaling::Default, 32),
            (100_000.0, RopeScaling::Default, 64),
            (10_000.0, RopeScaling::Linear { factor: 2.5 }, 128),
            (500_000.0, LLAMA3, 64),
            (500_000.0, LLAMA3, 128),
        ] {
            let rope = Rope { theta, scaling };
            let found = rope.inverse_frequencies(head_dim);
            let expected = by_hand(&rope, head_dim);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!((f64::from(*found) / expected - 1.0).abs() < 2e-6, "{rope:?}: {found} {expected}");
            }
        }
    }

    #[test]
    fn llama3_keeps_stretches_and_interpolates() {
        // theta 500,000 over 64 elements: wavelengths 2 pi 500,000^(i/32) against the bounds 2048 and 8192.
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.inverse_frequencies(64);
        let scaled = Rope { theta: 500_000.0, scaling: LLAMA3 }.inverse_frequencies(64);
        let ratio = |i: usize| plain[i] / scaled[i];
        assert_eq!((ratio(0), ratio(14)), (1.0, 1.0)); // wavelength 1,956
        assert!(ratio(15) > 1.0 && ratio(17) < 32.0, "{} {}", ratio(15), ratio(17)); // 2,947 and 6,695
        assert_eq!((ratio(18), ratio(31)), (32.0, 32.0)); // 10,089
    }
}
