//! Random inputs, and the comparison of a result with the oracle and with every other instruction set.

use std::hash::{BuildHasher, RandomState};

use bkpack_kernels::Cpu;

/// Half an ulp of 1: the largest relative error of one rounding to f32.
pub const UNIT: f64 = f32::EPSILON as f64 / 2.0;

/// Relative error granted to the vectorised `exp` for arguments whose own rounding is accounted for elsewhere.
pub const EXP: f64 = 4.0 * UNIT;

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Random {
    pub seed: u64,
    state: u64,
}

impl Random {
    pub fn new() -> Self {
        let seed = match std::env::var("BKPACK_TEST_SEED") {
            Ok(text) => text.parse().expect("BKPACK_TEST_SEED is an unsigned integer"),
            Err(_) => RandomState::new().hash_one(0),
        };
        Self { seed, state: seed }
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-range..range`.
    pub fn values(&mut self, count: usize, range: f32) -> Vec<f32> {
        (0..count).map(|_| ((self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0) * range).collect()
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }
}

/// Runs `operation` on every instruction set, demands the same bits from all, and returns them.
pub fn run_everywhere(context: &str, operation: impl Fn(Cpu) -> Vec<f32>) -> Vec<f32> {
    let mut all = Cpu::available().into_iter().map(|cpu| (cpu.isa(), operation(cpu)));
    let (first_isa, first) = all.next().expect("the scalar instruction set is always there");
    for (isa, other) in all {
        for (index, (a, b)) in first.iter().zip(&other).enumerate() {
            let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same, "{context}: {a:e} on {first_isa:?}, {b:e} on {isa:?} at {index}");
        }
    }
    first
}

/// Demands `|actual - expected| <= tolerance(index)` everywhere.
pub fn assert_close(context: &str, actual: &[f32], expected: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(actual.len(), expected.len(), "{context}");
    for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - e).abs();
        let limit = tolerance(index);
        assert!(error <= limit, "{context}: {a:e} instead of {e:e} at {index}: error {error:e}, limit {limit:e}");
    }
}
