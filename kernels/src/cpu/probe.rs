//! What a machine can do at most: the limits that benchmarks put their figures beside.
//!
//! A rate is the best of several runs on all threads of the pool, so that what else the machine does counts little.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::simd::Simd;
use super::{Cpu, Kernel};

/// How long runs of one rate are repeated.
const REPEAT: Duration = Duration::from_millis(300);

/// Seconds of the fastest of at least three runs, which together take at least `repeat`.
pub fn fastest(repeat: Duration, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < repeat {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

/// Rounds of a loop whose operands stay in registers.
const ROUNDS: usize = 1 << 16;

/// Rounds of a loop of dot products of tiles, each of which takes as long as many of those.
const TILE_ROUNDS: usize = 1 << 12;

impl Cpu {
    /// Bytes a second that all threads together read from `bytes` with loads as wide as the instruction set has.
    ///
    /// Each thread reads a part of its own, as one, two, four or eight streams: the best of these counts. What fits the
    /// caches measures the caches; pages that were never written are all one page of zeros.
    pub fn read_rate(self, bytes: &[u8]) -> f64 {
        let lines = bytes.as_chunks::<64>().0;
        let best = fastest(REPEAT / 4, || self.read::<1>(lines));
        let best = best.min(fastest(REPEAT / 4, || self.read::<2>(lines)));
        let best = best.min(fastest(REPEAT / 4, || self.read::<4>(lines)));
        let best = best.min(fastest(REPEAT / 4, || self.read::<8>(lines)));
        size_of_val(lines) as f64 / best
    }

    fn read<const STREAMS: usize>(self, lines: &[[u8; 64]]) {
        let part = lines.len().div_ceil(rayon::current_num_threads()).max(1);
        rayon::broadcast(|thread| {
            let start = lines.len().min(thread.index() * part);
            let lines = &lines[start..lines.len().min(start + part)];
            black_box(self.dispatch(Read::<STREAMS> { lines }));
        });
    }

    /// Floating-point operations a second of fused multiply-adds in f32, two each, on registers alone.
    pub fn fma_rate(self) -> f64 {
        // AVX2 holds twelve chains of half as many lanes no longer in its registers.
        let few = self.rate::<_, 6>(MultiplyAdd::<6>);
        few.max(self.rate::<_, 12>(MultiplyAdd::<12>))
    }

    /// Operations a second of 8-bit integer dot products, a multiplication and an addition for each of their products,
    /// on registers alone: of tiles where products of many tokens run on them.
    pub fn int8_rate(self) -> f64 {
        if let Some(amx) = self.amx {
            let run = || rayon::broadcast(|_| amx.spin(TILE_ROUNDS)).into_iter().sum::<usize>();
            let operations = run();
            return operations as f64
                / fastest(REPEAT / 2, || {
                    black_box(run());
                });
        }
        // A dot product has four products to a lane where a fused multiply-add has one.
        let few = self.rate::<_, 6>(Dot::<6>);
        4.0 * few.max(self.rate::<_, 12>(Dot::<12>))
    }

    /// Exponentials a second, as [`Simd::exp2`] computes them, on registers alone.
    pub fn exp_rate(self) -> f64 {
        self.rate::<_, 8>(Exp::<8>) / 2.0
    }

    /// Operations a second where each step of a chain has two a lane.
    fn rate<K: Kernel + Copy + Sync, const CHAINS: usize>(self, kernel: K) -> f64
    where
        K::Output: Send,
    {
        let seconds = fastest(REPEAT / 2, || drop(rayon::broadcast(|_| black_box(self.dispatch(kernel)))));
        (rayon::current_num_threads() * CHAINS * ROUNDS * 32) as f64 / seconds
    }
}

/// Reads every line once.
struct Read<'a, const STREAMS: usize> {
    lines: &'a [[u8; 64]],
}

/// Lines that a stream reads in one step.
const STEP: usize = 4;

impl<const STREAMS: usize> Kernel for Read<'_, STREAMS> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let steps = self.lines.as_chunks::<STEP>().0;
        let length = steps.len() / STREAMS;
        let mut streams = [&steps[..0]; STREAMS];
        for (index, stream) in streams.iter_mut().enumerate() {
            *stream = &steps[index * length..][..length];
        }
        // A maximum is computed in the same time whatever the bytes are; sums slow down on subnormal numbers.
        let mut most = [simd.splat(0.0); STREAMS];
        for step in 0..length {
            for (most, stream) in most.iter_mut().zip(streams) {
                let [a, b, c, d] = &stream[step];
                let (a, b) = (simd.load_f32(a), simd.load_f32(b));
                let (c, d) = (simd.load_f32(c), simd.load_f32(d));
                *most = simd.max(simd.max(simd.max(a, b), simd.max(c, d)), *most);
            }
        }
        let mut rest = simd.splat(0.0);
        for line in &self.lines[STREAMS * length * STEP..] {
            rest = simd.max(simd.load_f32(line), rest);
        }
        for most in most {
            rest = simd.max(most, rest);
        }
        simd.max_lane(rest)
    }
}

/// Independent chains of fused multiply-adds: enough of them hide their latency.
#[derive(Clone, Copy)]
struct MultiplyAdd<const CHAINS: usize>;

impl<const CHAINS: usize> Kernel for MultiplyAdd<CHAINS> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let factor = simd.splat(black_box(0.999));
        let term = simd.splat(black_box(0.001));
        let mut sums = [factor; CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, factor, term);
            }
        }
        let mut total = simd.splat(0.0);
        for sum in sums {
            total = simd.add(total, sum);
        }
        simd.sum(total)
    }
}

/// Independent chains of dot products of bytes below 128 with signed bytes.
#[derive(Clone, Copy)]
struct Dot<const CHAINS: usize>;

impl<const CHAINS: usize> Kernel for Dot<CHAINS> {
    type Output = i32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> i32 {
        let codes = simd.splat_i32(black_box(0x0303_0303));
        let mut activations = simd.splat_i32(0x01fe_03fc);
        let mut sums = [simd.splat_i32(0); CHAINS];
        for _ in 0..ROUNDS {
            // Where the product is an instruction of its own, one that never changes would be taken out of the loop.
            activations = black_box(activations);
            for sum in &mut sums {
                *sum = simd.dot_u7i8(codes, activations, *sum);
            }
        }
        sums.into_iter().fold(0, |total: i32, sum| total.wrapping_add(simd.sum_i32(sum)))
    }
}

/// Independent chains of exponentials.
#[derive(Clone, Copy)]
struct Exp<const CHAINS: usize>;

impl<const CHAINS: usize> Kernel for Exp<CHAINS> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut values = [simd.splat(black_box(-0.5)); CHAINS];
        for _ in 0..ROUNDS {
            for value in &mut values {
                *value = simd.exp2(*value);
            }
        }
        let mut total = simd.splat(0.0);
        for value in values {
            total = simd.add(total, value);
        }
        simd.sum(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read_by_any_number_of_streams() {
        for cpu in Cpu::available() {
            for count in [0, 1, 4, 31, 32, 67] {
                for last in 0..count {
                    let mut lines = vec![[0; 64]; count];
                    lines[last][60..].copy_from_slice(&7f32.to_le_bytes());
                    let lines = &lines[..];
                    assert_eq!(cpu.dispatch(Read::<1> { lines }), 7.0);
                    assert_eq!(cpu.dispatch(Read::<2> { lines }), 7.0);
                    assert_eq!(cpu.dispatch(Read::<8> { lines }), 7.0);
                }
            }
        }
    }

    #[test]
    fn rates_are_of_this_world() {
        for cpu in Cpu::available() {
            for rate in [cpu.read_rate(&vec![1; 1 << 20]), cpu.fma_rate(), cpu.int8_rate(), cpu.exp_rate()] {
                assert!((1e6..1e17).contains(&rate), "{rate} on {}", cpu.isa());
            }
        }
        assert_eq!(Cpu::detect().read_rate(&[]), 0.0);
    }
}
