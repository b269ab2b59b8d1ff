//! Products with packed matrices, every encoding in both arithmetic modes.

use crate::measure::{Bench, Figure, Work};
use bkpack_kernels::{Cpu, Data, FloatType, Grid, Layout, Matrix};
use half::{bf16, f16};

/// Bytes that look random: a full-period generator modulo 2^64, top byte.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// Activations from -1 to 1.
fn activations(count: usize) -> Vec<f32> {
    noise(count).into_iter().map(|byte| f32::from(byte) / 127.5 - 1.0).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Encoding {
    Float(FloatType),
    Quantized(Layout),
}

impl Encoding {
    /// Bytes of the values or codes of one row.
    fn row_bytes(self, cols: usize) -> usize {
        match self {
            Encoding::Float(dtype) => cols * dtype.bytes(),
            Encoding::Quantized(layout) => layout.code_bytes(cols),
        }
    }
}

/// Every encoding, under the name that filters see.
fn encodings() -> Vec<(String, Encoding)> {
    let quantized = |grid, group| Encoding::Quantized(Layout { grid, group });
    let floats = [("f32", FloatType::F32), ("f16", FloatType::F16), ("bf16", FloatType::BF16)];
    let mut all: Vec<_> = floats.into_iter().map(|(name, dtype)| (name.to_owned(), Encoding::Float(dtype))).collect();
    for bits in (2..=8).rev() {
        all.push((format!("int{bits} g128"), quantized(Grid::Int { bits, symmetric: true }, 128)));
    }
    all.push(("int4 g32 asymmetric".into(), quantized(Grid::Int { bits: 4, symmetric: false }, 32)));
    all.push(("int8 g32".into(), quantized(Grid::Int { bits: 8, symmetric: true }, 32)));
    all.push(("ternary g128".into(), quantized(Grid::Ternary, 128)));
    all.push(("binary g128".into(), quantized(Grid::Binary, 128)));
    all
}

/// Bytes of a cache line.
const LINE: usize = 64;

struct Weights {
    rows: usize,
    cols: usize,
    encoding: Encoding,
    values: Vec<u8>, // or codes; from the first cache line on, as in a packed file
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Weights {
    fn new(rows: usize, cols: usize, encoding: Encoding) -> Self {
        let room = LINE.div_ceil(encoding.row_bytes(cols));
        let f16s = |count: usize| f16::from_f32(0.01).to_le_bytes().repeat(count);
        let (values, scales, zeros) = match encoding {
            Encoding::Float(FloatType::F16) => (f16s((rows + room) * cols), Vec::new(), Vec::new()),
            Encoding::Float(FloatType::BF16) => {
                (bf16::from_f32(0.01).to_le_bytes().repeat((rows + room) * cols), Vec::new(), Vec::new())
            }
            Encoding::Float(FloatType::F32) => {
                (0.01f32.to_le_bytes().repeat((rows + room) * cols), Vec::new(), Vec::new())
            }
            Encoding::Quantized(layout) => {
                let mut codes = noise((rows + room) * layout.code_bytes(cols));
                if layout.grid == Grid::Ternary {
                    codes.iter_mut().for_each(|code| *code %= 243);
                }
                (codes, f16s(rows * layout.groups(cols)), noise(rows * layout.zero_bytes(cols)))
            }
        };
        Self { rows, cols, encoding, values, scales, zeros }
    }

    fn matrix(&self) -> Matrix<'_> {
        let values = &self.values[self.values.as_ptr().align_offset(LINE)..];
        let values = &values[..self.rows * self.encoding.row_bytes(self.cols)];
        let data = match self.encoding {
            Encoding::Float(dtype) => Data::Float { dtype, values },
            Encoding::Quantized(layout) => Data::Quantized {
                layout,
                codes: values,
                scale_type: FloatType::F16,
                scales: &self.scales,
                zeros: &self.zeros,
            },
        };
        Matrix::new(self.rows, self.cols, data).expect("the lengths follow from the shape")
    }
}

/// Times one product in both arithmetic modes; floats have but one.
fn product(bench: &mut Bench, label: &str, figure: Figure, weights: &Weights, tokens: usize) {
    let (rows, cols, w) = (weights.rows, weights.cols, weights.matrix());
    let x = activations(tokens * cols);
    let mut out = vec![0.0; tokens * rows];
    let operations = 2 * rows * cols * tokens;
    let bytes = w.bytes() + 4 * (x.len() + out.len());
    let cpu: Cpu = bench.cpu;
    let exact = Work { bytes, flops: operations, ..Work::default() };
    bench.line(&format!("{label}  exact"), figure, exact, || cpu.matmul(&x, &w, &mut out));
    if matches!(weights.encoding, Encoding::Quantized(_)) {
        let int8 = Work { bytes, int8_operations: operations, ..Work::default() };
        bench.line(&format!("{label}  int8"), figure, int8, || cpu.matmul_int8(&x, &w, &mut out));
    }
}

/// About 100 MB of codes, which no cache holds, in rows as long as a large and a small model's.
pub fn few_tokens(bench: &mut Bench) {
    for ((name, encoding), cols) in encodings().into_iter().flat_map(|one| [4096, 576].map(|cols| (one.clone(), cols)))
    {
        let rows = 100_000_000 / encoding.row_bytes(cols);
        let labels = [1, 4].map(|tokens| (tokens, format!("gemv  {name:20} [{rows}, {cols}] x {tokens}")));
        let wanted = |label: &str| ["exact", "int8"].iter().any(|mode| bench.wants(&format!("{label}  {mode}")));
        if !labels.iter().any(|(_, label)| wanted(label)) {
            continue;
        }
        let weights = Weights::new(rows, cols, encoding);
        for (tokens, label) in labels {
            product(bench, &label, Figure::Bytes, &weights, tokens);
        }
    }
}

/// A layer of SmolLM2 and a square one; for the usual widths SmolLM2's other shapes, too.
pub fn many_tokens(bench: &mut Bench) {
    for (name, encoding) in encodings() {
        let mut shapes = vec![(1536, 576), (4096, 4096)];
        if ["int8 g128", "int4 g128"].contains(&name.as_str()) {
            shapes.extend([(576, 1536), (49152, 576)]);
        }
        for (rows, cols) in shapes {
            let weights = Weights::new(rows, cols, encoding);
            for tokens in [8, 64, 256, 512] {
                let label = format!("gemm  {name:20} [{rows}, {cols}] x {tokens}");
                product(bench, &label, Figure::Operations, &weights, tokens);
            }
        }
    }
}
