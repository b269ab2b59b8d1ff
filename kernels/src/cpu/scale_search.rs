//! The search for a group's scale: candidates, what each takes off the error, and the best of them.
//!
//! Every error counts as much as its importance says; `importance` has the shape of `weights`, is nowhere negative, and
//! is zero where a group is padded to whole vectors.

use super::simd::{LANES, Simd};

/// Sum of the magnitudes of a group.
#[inline(always)]
pub(super) fn magnitude_sum<S: Simd>(s: S, weights: &[[f32; LANES]]) -> f32 {
    let mut sum = s.splat(0.0);
    for weight in weights {
        sum = s.add(sum, s.abs(s.load(weight)));
    }
    s.sum(sum)
}

/// The weights of a group in whole vectors, and how much the error of each counts.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) weights: &'a [[f32; LANES]],
    pub(super) importance: &'a [[f32; LANES]],
}

/// The mean magnitude of a group, each weight counted by its importance.
#[inline(always)]
pub(super) fn weighted_mean<S: Simd>(s: S, group: Group) -> f32 {
    let (mut sum, mut number) = (s.splat(0.0), s.splat(0.0));
    for (weight, importance) in group.weights.iter().zip(group.importance) {
        let importance = s.load(importance);
        sum = s.mul_add(importance, s.abs(s.load(weight)), sum);
        number = s.add(number, importance);
    }
    s.sum(sum) / s.sum(number)
}

/// With codes `q = clamp(round(w * inverse), low, high)` and importance `d`: the sums of `d w q` and of `d q q`.
///
/// The best scale for these codes is their quotient, and `(sum d w q)^2 / sum d q q` is what it takes off the squared
/// error weighted by `d`.
#[inline(always)]
fn fit<S: Simd>(s: S, group: Group, inverse: f32, low: f32, high: f32) -> (f32, f32) {
    let (inverse, low, high) = (s.splat(inverse), s.splat(low), s.splat(high));
    let (mut products, mut squares) = (s.splat(0.0), s.splat(0.0));
    for (weight, importance) in group.weights.iter().zip(group.importance) {
        let weight = s.load(weight);
        let level = s.min(s.max(s.round_even(s.mul(weight, inverse)), low), high);
        let weighted = s.mul(s.load(importance), level);
        products = s.mul_add(weight, weighted, products);
        squares = s.mul_add(level, weighted, squares);
    }
    (s.sum(products), s.sum(squares))
}

/// The best scale found so far.
struct Best {
    gain: f32,
    scale: f32,
    zero: u8,
}

impl Best {
    /// Tries codes of `scale`; keeps the scale that fits them best if it beats what is held.
    #[inline(always)]
    fn consider<S: Simd>(&mut self, s: S, group: Group, scale: f32, zero: u8, bits: u32) -> bool {
        let inverse = 1.0 / scale;
        if !inverse.is_finite() {
            return false;
        }
        let low = -f32::from(zero);
        let (products, squares) = fit(s, group, inverse, low, low + ((1u32 << bits) - 1) as f32);
        if squares == 0.0 {
            return false;
        }
        let gain = products * (products / squares);
        let better = gain > self.gain;
        if better {
            *self = Best { gain, scale: products / squares, zero };
        }
        better
    }

    /// Alternates codes and scale until nothing improves, at most `rounds` times.
    #[inline(always)]
    fn refine<S: Simd>(&mut self, s: S, group: Group, bits: u32, rounds: usize) {
        for _ in 0..rounds {
            if !self.consider(s, group, self.scale, self.zero, bits) {
                break;
            }
        }
    }
}

/// Shares of the full range that are tried as clipping points. The fewer the levels, the more clipping pays.
const CLIP_STEPS: usize = 16;

#[inline(always)]
fn clip(step: usize, bits: u32) -> f32 {
    let least = 1.0 - [0.7, 0.55, 0.4, 0.25, 0.15, 0.08, 0.05][bits as usize - 2];
    least + (1.03 - least) * step as f32 / (CLIP_STEPS - 1) as f32
}

/// The grid has one more level below zero than above, so both signs of the scale are tried.
#[inline(always)]
pub(super) fn search_symmetric<S: Simd>(s: S, group: Group, bits: u32, low: f32, high: f32) -> f32 {
    let half = (1u32 << (bits - 1)) as f32;
    let mut best = Best { gain: 0.0, scale: 0.0, zero: half as u8 };
    // Round-to-nearest is tried first: what is chosen is no worse, up to the rounding of the stored scale.
    best.consider(s, group, high.max(-low) / (half - 1.0), half as u8, bits);
    for step in 0..CLIP_STEPS {
        let clip = clip(step, bits);
        for (below, above, sign) in [(low, high, 1.0), (-high, -low, -1.0)] {
            // The scale at which both ends just fit, sign apart.
            let scale = clip * (-below / half).max(above / (half - 1.0));
            best.consider(s, group, sign * scale, half as u8, bits);
        }
    }
    best.refine(s, group, bits, 4);
    best.scale
}

/// Scale and zero point of an asymmetric group: clipping points, and zero points around the one that centres them.
#[inline(always)]
pub(super) fn search_asymmetric<S: Simd>(s: S, group: Group, bits: u32, low: f32, high: f32) -> (f32, u8) {
    let top = ((1u32 << bits) - 1) as f32;
    let mut best = Best { gain: 0.0, scale: 0.0, zero: 0 };
    // Round-to-nearest is tried first: what is chosen is no worse, up to the rounding of the stored scale. Its zero point
    // also serves a range far from zero.
    let nearest = (high - low) / top;
    best.consider(s, group, nearest, (-low / nearest).round_ties_even().clamp(0.0, top) as u8, bits);
    for step in 0..CLIP_STEPS {
        let scale = clip(step, bits) * (high - low) / top;
        // The clipped range keeps its middle in the middle.
        let middle = (top / 2.0 - (high + low) / 2.0 / scale).round_ties_even();
        for shift in [-1.0, 0.0, 1.0] {
            let zero = middle + shift;
            if (0.0..=top).contains(&zero) {
                best.consider(s, group, scale, zero as u8, bits);
            }
        }
    }
    best.refine(s, group, bits, 4);
    (best.scale, best.zero)
}

/// The scale of least squared error when weights below `threshold` times the scale are zero.
#[inline(always)]
pub(super) fn search_ternary<S: Simd>(s: S, group: Group, count: usize, threshold: f32) -> f32 {
    const STEPS: usize = 48;
    let mean = magnitude_sum(s, group.weights) / count as f32;
    let (mut best_gain, mut best) = (0.0, mean);
    for step in 0..=STEPS {
        // Round-to-nearest is tried first: what is chosen is no worse, up to the rounding of the stored scale.
        let share = if step == 0 { 1.0 } else { 0.5 + 3.0 * (step - 1) as f32 / (STEPS - 1) as f32 };
        let scale = mean * share;
        let (limit, zero) = (s.splat(threshold * scale), s.splat(0.0));
        let (mut kept, mut number) = (zero, zero);
        for (weight, importance) in group.weights.iter().zip(group.importance) {
            let magnitude = s.abs(s.load(weight));
            let importance = s.select_ge(magnitude, limit, s.load(importance), zero);
            kept = s.mul_add(magnitude, importance, kept);
            number = s.add(number, importance);
        }
        let gain = scale * (2.0 * s.sum(kept) - scale * s.sum(number));
        if gain > best_gain {
            (best_gain, best) = (gain, scale);
        }
    }
    best
}
