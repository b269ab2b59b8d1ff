//! Speed of the operations along a sequence, beside what this machine can do.
//!
//! `cargo bench -p bkpack-kernels --bench sequence`; `BKPACK_ISA` chooses the instruction set and `RAYON_NUM_THREADS` the
//! threads.

mod probe;

use std::hint::black_box;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::simd::Simd;
use bkpack_kernels::cpu::{Kernel, KeyValueCache, SelectiveScan};
use probe::fastest;

/// Independent exponentials that stay in registers.
struct ExpProbe;

const ROUNDS: usize = 1 << 16;

impl Kernel for ExpProbe {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut values = [simd.splat(black_box(-0.5)); 4];
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

/// Billions of exponentials a second on all threads.
fn exp_peak(cpu: Cpu) -> f64 {
    let seconds = fastest(|| drop(rayon::broadcast(|_| black_box(cpu.dispatch(ExpProbe)))));
    (rayon::current_num_threads() * ROUNDS * 4 * 16) as f64 / seconds / 1e9
}

fn main() {
    let machine = probe::machine();
    let cpu = machine.cpu;
    let exp = exp_peak(cpu);
    println!("{exp:.2} G exponentials/s");

    println!("\nselective scan, state size 16: milliseconds, G state updates/s, share of the exponential probe");
    for (tokens, channels) in [(1, 1536), (1, 5120), (512, 512), (512, 1536), (512, 5120)] {
        let size = 16;
        let ones = |count: usize, value: f32| vec![value; count];
        let (x, delta) = (ones(tokens * channels, 0.5), ones(tokens * channels, 0.1));
        let (a, d) = (ones(channels * size, -1.0), ones(channels, 1.0));
        let (b, c) = (ones(tokens * size, 0.3), ones(tokens * size, 0.3));
        let scan = SelectiveScan { x: &x, delta: &delta, a: &a, b: &b, c: &c, d: &d };
        let (mut state, mut out) = (ones(channels * size, 0.0), ones(tokens * channels, 0.0));
        let seconds = fastest(|| cpu.selective_scan(&scan, &mut state, &mut out));
        let rate = (tokens * channels * size) as f64 / seconds / 1e9;
        println!("[{tokens:4}, {channels:4}]  {:8.3} ms  {rate:6.2}  {:4.0} %", 1e3 * seconds, 100.0 * rate / exp);
    }

    println!("\ndepthwise convolution, kernel 4: milliseconds, GB/s read and written, share of the read probe");
    for (tokens, channels) in [(1, 1536), (512, 1536), (512, 5120)] {
        let (x, weight) = (vec![0.5; tokens * channels], vec![0.1; channels * 4]);
        let (mut history, mut out) = (vec![0.0; 3 * channels], vec![0.0; tokens * channels]);
        let seconds = fastest(|| cpu.depthwise_conv(&x, &weight, None, &mut history, &mut out));
        let rate = (8 * tokens * channels + 4 * weight.len()) as f64 / seconds / 1e9;
        println!(
            "[{tokens:4}, {channels:4}]  {:8.3} ms  {rate:6.2}  {:4.0} %",
            1e3 * seconds,
            100.0 * rate / machine.bandwidth
        );
    }

    println!("\nattention, 9 heads of 64 over 3: milliseconds, GFLOP/s, share of the FMA probe");
    for (tokens, positions) in [(1, 4096), (2048, 2048)] {
        for window in [128, 1024, usize::MAX] {
            let q = vec![0.1; tokens * 9 * 64];
            let kv = vec![0.1; positions * 3 * 64];
            let mut cache = KeyValueCache::new(3, 64, positions);
            cache.append(&kv, &kv);
            let mut out = vec![0.0; q.len()];
            let seconds = fastest(|| cpu.attention(&q, 9, &cache, 0.125, window, &mut out));
            let seen: usize = (positions - tokens..positions).map(|position| (position + 1).min(window)).sum();
            let rate = (seen * 9 * 64 * 4) as f64 / seconds / 1e9;
            println!(
                "{tokens:4} of {positions:4}, window {:4}  {:8.3} ms  {rate:6.1}  {:4.0} %",
                window.min(positions),
                1e3 * seconds,
                100.0 * rate / machine.fma
            );
        }
    }

    println!("\nresolvent: nanoseconds a position");
    for positions in [1024, 1 << 20] {
        let v: Vec<f32> = (0..positions).map(|i| (i % 7) as f32 - 3.0).collect();
        let mut out = vec![0.0; 2 * positions];
        let seconds = fastest(|| cpu.resolvent(&v, [0.0, 1.0], &mut out));
        println!("{positions:8}  {:6.1}", 1e9 * seconds / positions as f64);
    }
}
