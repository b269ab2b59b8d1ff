//! Choosing the next token from its logits.

use bkpack_kernels::Cpu;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::error::{Error, Result};

/// Draws tokens: the most likely one at temperature 0, else at random from the smallest set of tokens whose
/// probabilities reach `top_p`.
#[derive(Debug)]
pub struct Sampler {
    cpu: Cpu,
    temperature: f32,
    top_p: f32,
    random: StdRng,
    /// Tokens that may be drawn, kept for its memory.
    nucleus: Vec<u32>,
}

impl Sampler {
    /// The same seed draws the same tokens from the same logits.
    ///
    /// # Errors
    /// [`Error::Option`] if the temperature is negative or not finite, or `top_p` is not above 0 and at most 1.
    pub fn new(cpu: Cpu, temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !temperature.is_finite() || temperature < 0.0 {
            let why = format!("{temperature} is not a finite number of at least 0");
            return Err(Error::Option { option: "--temperature", why });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Option { option: "--top-p", why: format!("{top_p} is not above 0 and at most 1") });
        }
        Ok(Self { cpu, temperature, top_p, random: StdRng::seed_from_u64(seed), nucleus: Vec::new() })
    }

    /// Draws a token from its logits, `[vocab_size]`, which are overwritten.
    pub fn draw(&mut self, logits: &mut [f32]) -> u32 {
        let top = self.cpu.arg_max(logits);
        if self.temperature == 0.0 {
            return top as u32;
        }
        // Subtracting the largest first keeps a tiny temperature from overflowing.
        let largest = logits[top];
        logits.iter_mut().for_each(|logit| *logit = (*logit - largest) / self.temperature);
        self.cpu.softmax(logits);
        self.find_nucleus(logits);
        let total: f32 = self.nucleus.iter().map(|&token| logits[token as usize]).sum();
        let mut rest = self.random.random::<f32>() * total;
        let drawn = self.nucleus.iter().copied().find(|&token| {
            rest -= logits[token as usize];
            rest < 0.0
        });
        drawn.unwrap_or(top as u32)
    }

    /// The smallest set of tokens whose probabilities reach `top_p`.
    fn find_nucleus(&mut self, probabilities: &[f32]) {
        let (tokens, nucleus) = (0..probabilities.len() as u32, &mut self.nucleus);
        nucleus.clear();
        if self.top_p == 1.0 {
            nucleus.extend(tokens);
            return;
        }
        // Even all together, tokens below this probability do not reach what the nucleus may leave out.
        let negligible = (1.0 - self.top_p) / probabilities.len() as f32;
        let probability = |token: &u32| probabilities[*token as usize];
        nucleus.extend(tokens.filter(|token| probability(token) >= negligible));
        nucleus.sort_unstable_by(|a, b| probability(b).total_cmp(&probability(a)).then(a.cmp(b)));
        let mut sum = 0.0;
        let before_reached = |token: &&u32| {
            let reached = sum >= self.top_p;
            sum += probability(token);
            !reached
        };
        let size = nucleus.iter().take_while(before_reached).count();
        nucleus.truncate(size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 3.0, 1.0, 2.0, f32::NEG_INFINITY];

    fn frequencies(temperature: f32, top_p: f32) -> [f64; 5] {
        let draws = 20_000;
        let mut sampler = Sampler::new(Cpu::detect(), temperature, top_p, 7).unwrap();
        let mut counts = [0.0; 5];
        (0..draws).for_each(|_| counts[sampler.draw(&mut LOGITS.clone()) as usize] += 1.0 / f64::from(draws));
        counts
    }

    fn expected(weights: [f64; 5]) -> [f64; 5] {
        let sum: f64 = weights.iter().sum();
        weights.map(|weight| weight / sum)
    }

    fn assert_close(found: [f64; 5], expected: [f64; 5]) {
        // Five standard deviations of a frequency over 20,000 draws are below 0.018.
        assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 0.018), "{found:?} {expected:?}");
    }

    #[test]
    fn temperature_zero_is_greedy() {
        assert_eq!(frequencies(0.0, 1.0)[1], frequencies(1e-30, 0.5)[1]);
        assert!(frequencies(0.0, 1.0)[1] > 0.999);
    }

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        assert_close(frequencies(1.0, 1.0), expected(LOGITS.map(|logit| f64::from(logit).exp())));
        assert_close(frequencies(2.0, 1.0), expected(LOGITS.map(|logit| (f64::from(logit) / 2.0).exp())));
    }

    #[test]
    fn the_nucleus_leaves_out_the_tail() {
        // Probabilities 0.644, 0.237, 0.087, 0.032: two reach 0.8, three reach 0.9.
        let weights =
            |kept: &[usize]| std::array::from_fn(|i| if kept.contains(&i) { f64::from(LOGITS[i]).exp() } else { 0.0 });
        assert_close(frequencies(1.0, 0.8), expected(weights(&[1, 3])));
        assert_close(frequencies(1.0, 0.9), expected(weights(&[1, 2, 3])));
        assert_close(frequencies(1.0, 1e-6), expected(weights(&[1])));
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for (temperature, top_p) in
            [(-1.0, 1.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, f32::NAN)]
        {
            assert!(matches!(Sampler::new(Cpu::detect(), temperature, top_p, 0), Err(Error::Option { .. })));
        }
    }
}
