//! Speed of the matrix products, beside what this machine can do: fused multiply-adds on registers, and reading memory.
//!
//! `cargo bench -p bkpack-kernels --bench matmul`; `BKPACK_ISA` chooses the instruction set and `RAYON_NUM_THREADS` the
//! threads.

mod probe;

use bkpack_kernels::{Cpu, Data, FloatType, Grid, Layout, Matrix};
use half::f16;
use probe::fastest;

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
    let probe::Machine { cpu, fma: peak, bandwidth } = probe::machine();
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
