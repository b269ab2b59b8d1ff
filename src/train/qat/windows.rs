//! The windows of a text, in the order that they are trained on.

use std::ops::Range;

use rand::{SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};

use super::options::Options;
use crate::tensor::CalibrationText;

/// Memory for the logits of one model and their gradient: positions are taken in slices.
const LOGITS_BYTES: usize = 64 << 20;

/// What is trained on.
#[derive(Clone, Debug)]
pub struct Data {
    pub text: CalibrationText,
    pub tokens: Vec<u32>,
    /// What the perplexity is measured on along the way, never trained on.
    pub validation: Option<Vec<u32>>,
    /// Steps between two such measurements.
    pub validate_every: u64,
}

impl Data {
    /// The windows of a step: those of the text in an order of their own each time it is gone through.
    pub(super) fn windows(
        &self,
        step: u64,
        options: &Options,
        (ctx, bos): (usize, Option<u32>),
    ) -> impl Iterator<Item = Window> {
        let count = (self.tokens.len() / ctx) as u64;
        let mut order: (u64, Vec<u32>) = (u64::MAX, Vec::new());
        let (seed, first) = (options.seed, (step - 1) * options.batch as u64);
        let window = move |place: u64| {
            let (round, place) = (place / count, place % count);
            if order.0 != round {
                order = (round, shuffled(count as u32, seed, round));
            }
            let index = order.1[place as usize] as usize;
            let tokens = &self.tokens[index * ctx..][..ctx];
            let mut inputs = tokens.to_vec();
            if let Some(bos) = bos {
                inputs[0] = bos;
            }
            Window { inputs, targets: tokens[1..].to_vec() }
        };
        (first..first + options.batch as u64).map(window)
    }
}

/// What the model sees and what it is to predict.
pub(super) struct Window {
    pub inputs: Vec<u32>,  // [ctx]
    pub targets: Vec<u32>, // [ctx - 1]
}

impl Window {
    /// Positions whose logits and gradients fit the memory set aside for them.
    pub fn slices(&self, vocab_size: usize) -> impl Iterator<Item = Range<usize>> {
        let rows = (LOGITS_BYTES / (2 * vocab_size * size_of::<f32>())).max(1);
        let count = self.targets.len();
        (0..count).step_by(rows).map(move |first| first..count.min(first + rows))
    }
}

/// The order of windows in one round through the text.
fn shuffled(count: u32, seed: u64, round: u64) -> Vec<u32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&round.to_le_bytes());
    let mut order: Vec<u32> = (0..count).collect();
    order.shuffle(&mut Xoshiro256PlusPlus::from_seed(hasher.finalize().into()));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_comes_once_a_round_in_an_order_of_its_seed() {
        let (first, second) = (shuffled(100, 3, 0), shuffled(100, 3, 1));
        assert!(first != second && first != shuffled(100, 4, 0));
        for mut order in [first, second] {
            order.sort_unstable();
            assert!(order.into_iter().eq(0..100));
        }
    }

    #[test]
    fn slices_cover_every_position() {
        let window = Window { inputs: vec![0; 300], targets: vec![0; 299] };
        let slices: Vec<_> = window.slices(150_000).collect();
        assert!(slices.len() > 1 && slices.iter().cloned().flatten().eq(0..299));
    }
}
