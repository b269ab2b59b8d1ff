//! Speed of the matrix products, beside what this machine can do: fused multiply-adds on registers, and reading memory.
//!
//! `cargo bench -p bkpack-kernels --bench matmul`; `BKPACK_ISA` chooses the instruction set and `RAYON_NUM_THREADS` the
//! threads.

use std::hint::black_box;
use std::time::Instant;

use bkpack_kernels::cpu::Kernel;
use bkpack_kernels::cpu::simd::Simd;
use bkpack_kernels::{Cpu, Data, FloatType, Grid, Layout, Matrix};
use half::f16;
use rayon::prelude::*;

/// Seconds of the fastest of several runs, which together take about half a second.
fn fastest(mut run: impl FnMut()) -> f64 {
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

/// Bytes that look random: a full-period generator modulo 2^64, top byte.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

#[derive(Clone, Copy)]
enum Encoding {
    F16,
    Quantized(Layout),
}

struct Weights {
    rows: usize,
    cols: usize,
    encoding: Encoding,
    values: Vec<u8>, // or codes
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Weights {
    fn new(rows: usize, cols: usize, encoding: Encoding) -> Self {
        let small = |count: usize| f16::from_f32(0.01).to_le_bytes().repeat(count);
        let (values, scales, zeros) = match encoding {
            Encoding::F16 => (small(rows * cols), Vec::new(), Vec::new()),
            Encoding::Quantized(layout) => {
                let mut codes = noise(rows * layout.code_bytes(cols));
                if layout.grid == Grid::Ternary {
                    codes.iter_mut().for_each(|code| *code %= 243);
                }
                (codes, small(rows * layout.groups(cols)), noise(rows * layout.zero_bytes(cols)))
            }
        };
        Self { rows, cols, encoding, values, scales, zeros }
    }

    fn matrix(&self) -> Matrix<'_> {
        let data = match self.encoding {
            Encoding::F16 => Data::Float { dtype: FloatType::F16, values: &self.values },
            Encoding::Quantized(layout) => Data::Quantized {
                layout,
                codes: &self.values,
                scale_type: FloatType::F16,
                scales: &self.scales,
                zeros: &self.zeros,
            },
        };
        Matrix::new(self.rows, self.cols, data).expect("the lengths follow from the shape")
    }
}

fn main() {
    let cpu = match Cpu::from_environment() {
        Ok(cpu) => cpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let peak = fma_peak(cpu);
    let bandwidth = read_bandwidth();
    println!(
        "{} on {} threads: {peak:.0} GFLOP/s f32 FMA, {bandwidth:.1} GB/s read",
        cpu.isa(),
        rayon::current_num_threads()
    );

    let int = |bits, symmetric, group| Encoding::Quantized(Layout { grid: Grid::Int { bits, symmetric }, group });
    let ternary = Encoding::Quantized(Layout { grid: Grid::Ternary, group: 128 });
    let binary = Encoding::Quantized(Layout { grid: Grid::Binary, group: 128 });
    let encodings = [
        ("f16", Encoding::F16),
        ("int8 g128", int(8, true, 128)),
        ("int4 g128", int(4, true, 128)),
        ("int4 g32 asymmetric", int(4, false, 32)),
        ("int3 g128", int(3, true, 128)),
        ("ternary g128", ternary),
        ("binary g128", binary),
    ];

    println!("\nmany tokens: GFLOP/s and share of the FMA probe, f32 activations then INT8");
    for (name, encoding) in encodings {
        let shapes: &[(usize, usize)] =
            if name == "int4 g128" { &[(576, 1536), (1536, 576), (49152, 576)] } else { &[(1536, 576)] };
        for &(rows, cols) in shapes {
            let weights = Weights::new(rows, cols, encoding);
            for tokens in [8, 64, 256, 1024] {
                let x = vec![0.5; tokens * cols];
                let mut out = vec![0.0; tokens * rows];
                let rate = |product: fn(Cpu, &[f32], &Matrix, &mut [f32]), out: &mut [f32]| {
                    let seconds = fastest(|| product(cpu, &x, &weights.matrix(), out));
                    (2 * rows * cols * tokens) as f64 / seconds / 1e9
                };
                let exact = rate(Cpu::matmul, &mut out);
                let int8 = rate(Cpu::matmul_int8, &mut out);
                println!(
                    "{name:20} [{rows:5}, {cols:4}] x {tokens:4}  {exact:7.1} {:4.0} %  {int8:7.1} {:4.0} %",
                    100.0 * exact / peak,
                    100.0 * int8 / peak,
                );
            }
        }
    }

    println!("\nfew tokens, about 100 MB of codes: GB/s of packed bytes and share of the read probe, f32 then INT8");
    for (name, encoding) in encodings {
        let cols = 4096;
        let row_bytes = match encoding {
            Encoding::F16 => cols * 2,
            Encoding::Quantized(layout) => layout.code_bytes(cols),
        };
        let rows = 100_000_000 / row_bytes;
        let weights = Weights::new(rows, cols, encoding);
        let w = weights.matrix();
        for tokens in [1, 4] {
            let x = vec![0.5; tokens * cols];
            let mut out = vec![0.0; tokens * rows];
            let exact = w.bytes() as f64 / fastest(|| cpu.matmul(&x, &w, &mut out)) / 1e9;
            let int8 = w.bytes() as f64 / fastest(|| cpu.matmul_int8(&x, &w, &mut out)) / 1e9;
            println!(
                "{name:20} [{rows:6}, {cols}] x {tokens}  {exact:6.2} {:4.0} %  {int8:6.2} {:4.0} %",
                100.0 * exact / bandwidth,
                100.0 * int8 / bandwidth,
            );
        }
    }
}
