//! What this machine can do: fused multiply-adds on registers, and reading memory.

use std::hint::black_box;
use std::time::Instant;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::Kernel;
use bkpack_kernels::cpu::simd::Simd;
use rayon::prelude::*;

/// Seconds of the fastest of several runs, which together take about half a second.
pub fn fastest(mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || begin.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

/// Independent chains of fused multiply-adds that stay in registers: enough to hide their latency, on AVX2 no more than
/// its registers hold.
struct FmaProbe<const CHAINS: usize>;

const ROUNDS: usize = 1 << 16;

impl<const CHAINS: usize> Kernel for FmaProbe<CHAINS> {
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

/// GFLOP/s of all threads.
fn fma_peak(cpu: Cpu) -> f64 {
    let threads = rayon::current_num_threads();
    let rate = |chains: usize, seconds: f64| (threads * chains * ROUNDS * 32) as f64 / seconds / 1e9;
    let few = fastest(|| drop(rayon::broadcast(|_| black_box(cpu.dispatch(FmaProbe::<6>)))));
    let many = fastest(|| drop(rayon::broadcast(|_| black_box(cpu.dispatch(FmaProbe::<12>)))));
    rate(6, few).max(rate(12, many))
}

/// GB/s of all threads reading a buffer much larger than the caches.
fn read_bandwidth() -> f64 {
    let buffer = vec![1u64; 1 << 26];
    let part = buffer.len().div_ceil(rayon::current_num_threads());
    let seconds = fastest(|| {
        black_box(
            buffer.par_chunks(part).map(|part| part.iter().fold(0u64, |sum, &v| sum.wrapping_add(v))).sum::<u64>(),
        );
    });
    (buffer.len() * 8) as f64 / seconds / 1e9
}

/// The back end that the environment names, and its limits.
pub struct Machine {
    pub cpu: Cpu,
    /// GFLOP/s of fused multiply-adds.
    pub fma: f64,
    /// GB/s of reading memory.
    pub bandwidth: f64,
}

/// Measures the machine, and prints what it is.
pub fn machine() -> Machine {
    let cpu = match Cpu::from_environment() {
        Ok(cpu) => cpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let (fma, bandwidth) = (fma_peak(cpu), read_bandwidth());
    println!(
        "{} on {} threads: {fma:.0} GFLOP/s f32 FMA, {bandwidth:.1} GB/s read",
        cpu.isa(),
        rayon::current_num_threads()
    );
    Machine { cpu, fma, bandwidth }
}
