//! Dequantization and matrix products on every instruction set against the scalar oracle, over every grid, scale type
//! and kind of group, with ragged shapes. Each run draws a fresh seed, which failures name.

#[expect(dead_code, reason = "what compares instruction sets is not needed here")]
mod common;

use bkpack_kernels::bits::{invalid_code_row, pack_row, pack_stream};
use bkpack_kernels::cpu::activation_blocks;
use bkpack_kernels::reference;
use bkpack_kernels::{Arithmetic, Cpu, Data, FloatType, Grid, Layout, Matrix};
use common::Random;
use half::{bf16, f16};

fn pick<T: Copy>(random: &mut Random, from: &[T]) -> T {
    from[random.below(from.len())]
}

fn float_bytes(dtype: FloatType, values: &[f32]) -> Vec<u8> {
    let bytes = |v: &f32| match dtype {
        FloatType::F32 => v.to_le_bytes().to_vec(),
        FloatType::F16 => f16::from_f32(*v).to_le_bytes().to_vec(),
        FloatType::BF16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

#[derive(Clone, Copy, Debug)]
enum Encoding {
    Float(FloatType),
    Quantized(Layout, FloatType),
}

fn encodings() -> Vec<Encoding> {
    let mut grids = vec![Grid::Ternary, Grid::Binary];
    for bits in 2..=8 {
        grids.extend([true, false].map(|symmetric| Grid::Int { bits, symmetric }));
    }
    let mut all = [FloatType::F32, FloatType::F16, FloatType::BF16].map(Encoding::Float).to_vec();
    for grid in grids {
        for group in [1, 2, 3, 4, 5, 7, 8, 16, 32, 48, 64, 65, 100, 128, 256, 1 << 40] {
            for scale_type in [FloatType::F16, FloatType::F32] {
                all.push(Encoding::Quantized(Layout { grid, group }, scale_type));
            }
        }
    }
    all
}

/// The bytes of a random matrix.
struct Bytes {
    encoding: Encoding,
    rows: usize,
    cols: usize,
    values: Vec<u8>, // or codes
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Bytes {
    fn random(random: &mut Random, encoding: Encoding, rows: usize, cols: usize) -> Self {
        let mut bytes = Self { encoding, rows, cols, values: Vec::new(), scales: Vec::new(), zeros: Vec::new() };
        match encoding {
            Encoding::Float(dtype) => bytes.values = float_bytes(dtype, &random.values(rows * cols, 1.0)),
            Encoding::Quantized(layout, scale_type) => {
                bytes.values = vec![0; rows * layout.code_bytes(cols)];
                let most = usize::from(layout.grid.max_code());
                for row in bytes.values.chunks_mut(layout.code_bytes(cols).max(1)) {
                    let codes: Vec<u8> = (0..cols).map(|_| random.below(most + 1) as u8).collect();
                    pack_row(layout.grid, &codes, row);
                }
                assert_eq!(invalid_code_row(&layout, cols, &bytes.values), None);
                bytes.scales = float_bytes(scale_type, &random.values(rows * layout.groups(cols), 1.0));
                bytes.zeros = vec![0; rows * layout.zero_bytes(cols)];
                for row in bytes.zeros.chunks_mut(layout.zero_bytes(cols).max(1)) {
                    let zeros: Vec<u8> = (0..layout.groups(cols)).map(|_| random.below(most + 1) as u8).collect();
                    pack_stream(&zeros, layout.grid.stream_bits().unwrap(), row);
                }
            }
        }
        bytes
    }

    fn matrix(&self) -> Matrix<'_> {
        let data = match self.encoding {
            Encoding::Float(dtype) => Data::Float { dtype, values: &self.values },
            Encoding::Quantized(layout, scale_type) => {
                Data::Quantized { layout, codes: &self.values, scale_type, scales: &self.scales, zeros: &self.zeros }
            }
        };
        Matrix::new(self.rows, self.cols, data).unwrap()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

const ROWS: [usize; 9] = [0, 1, 2, 15, 16, 17, 48, 50, 97];
const COLS: [usize; 13] = [0, 1, 3, 5, 31, 63, 64, 65, 96, 128, 257, 320, 517];
const TOKENS: [usize; 11] = [0, 1, 2, 3, 5, 7, 8, 9, 13, 24, 300];

#[test]
fn dequantization_is_exact() {
    let mut random = Random::new();
    for encoding in encodings() {
        for cols in COLS {
            let rows = pick(&mut random, &ROWS);
            let bytes = Bytes::random(&mut random, encoding, rows, cols);
            let w = bytes.matrix();
            let expected = reference::dequantize(&w);
            let indices: Vec<u32> = (0..if rows == 0 { 0 } else { 5 }).map(|_| random.below(rows) as u32).collect();
            let context = format!("{encoding:?} [{rows}, {cols}] seed {}", random.seed);
            for cpu in Cpu::available() {
                let mut out = vec![f32::NAN; rows * cols];
                cpu.dequantize(&w, 0, &mut out);
                assert_eq!(bits(&out), bits(&expected), "{context} on {}", cpu.isa());
                let first = rows / 2;
                out.truncate((rows - first).min(3) * cols);
                cpu.dequantize(&w, first, &mut out);
                assert_eq!(bits(&out), bits(&expected[first * cols..][..out.len()]), "{context} on {}", cpu.isa());

                if rows > 0 {
                    let mut row = vec![f32::NAN; cols];
                    cpu.dequantize_row(&w, first, &mut row);
                    assert_eq!(bits(&row), bits(&expected[first * cols..][..cols]), "{context} on {}", cpu.isa());
                }

                let mut gathered = vec![f32::NAN; indices.len() * cols];
                cpu.gather_rows(&w, &indices, &mut gathered);
                for (i, &index) in indices.iter().enumerate() {
                    let row = &gathered[i * cols..][..cols];
                    assert_eq!(bits(row), bits(&expected[index as usize * cols..][..cols]), "{context}");
                }
            }
        }
    }
}

/// A bound of the rounding error of a sum of products over `cols` columns, relative to the sum of their magnitudes.
///
/// The longest chain of additions is one block of 256 columns followed by one addition a block; the rounding of the weight,
/// of the scale's multiplication and of the final reduction come on top.
fn relative_error(cols: usize) -> f64 {
    let roundings = (cols.min(256) + cols.div_ceil(256) + 8) as f64;
    let unit = f64::from(f32::EPSILON) / 2.0;
    roundings * unit / (1.0 - roundings * unit)
}

fn check_matmul(random: &mut Random, encoding: Encoding, rows: usize, cols: usize, tokens: usize) {
    let bytes = Bytes::random(random, encoding, rows, cols);
    let w = bytes.matrix();
    let x = random.values(tokens * cols, 1.0);
    let weights = reference::dequantize(&w);
    let expected = reference::matmul(&x, tokens, &w);
    let context = format!("{encoding:?} [{rows}, {cols}] x {tokens} seed {}", random.seed);
    let mut first: Option<Vec<u32>> = None;
    for cpu in Cpu::available() {
        let mut out = vec![f32::NAN; tokens * rows];
        cpu.matmul(&x, &w, &mut out);
        for (i, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
            let (token, row) = (i / rows, i % rows);
            let pairs = x[token * cols..][..cols].iter().zip(&weights[row * cols..][..cols]);
            let magnitude: f64 = pairs.map(|(&x, &w)| f64::from(x * w).abs()).sum();
            // Products of subnormal size lose their relative precision.
            let bound = relative_error(cols) * magnitude * (1.0 + 1e-6) + cols as f64 * 1e-44;
            let error = (f64::from(found) - expected).abs();
            assert!(error <= bound, "{context} on {}: [{token}, {row}] {found} for {expected}", cpu.isa());
        }
        let out = bits(&out);
        if tokens == 1 {
            let mut alone = vec![f32::NAN; rows];
            cpu.matvec(&x, &w, &mut alone);
            assert_eq!(bits(&alone), out, "{context} on {}", cpu.isa());
        }
        assert_eq!(&out, first.get_or_insert_with(|| out.clone()), "{context} on {}", cpu.isa());
    }
}

#[test]
fn matmul_agrees_with_the_oracle() {
    let mut random = Random::new();
    for encoding in encodings() {
        for _ in 0..6 {
            let (rows, cols, tokens) =
                (pick(&mut random, &ROWS), pick(&mut random, &COLS), pick(&mut random, &TOKENS[..10]));
            check_matmul(&mut random, encoding, rows, cols, tokens);
        }
    }
}

#[test]
fn matmul_takes_every_shape() {
    let mut random = Random::new();
    for rows in ROWS {
        for cols in COLS {
            for tokens in TOKENS {
                let encoding = pick(&mut random, &encodings());
                check_matmul(&mut random, encoding, rows, cols, tokens);
            }
        }
    }
}

fn check_matmul_int8(random: &mut Random, encoding: Encoding, rows: usize, cols: usize, tokens: usize) {
    let x = random.values(tokens * cols, 1.0);
    check_matmul_int8_of(random, encoding, rows, cols, &x);
}

fn check_matmul_int8_of(random: &mut Random, encoding: Encoding, rows: usize, cols: usize, x: &[f32]) {
    let bytes = Bytes::random(random, encoding, rows, cols);
    let w = bytes.matrix();
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let context = format!("{encoding:?} [{rows}, {cols}] x {tokens} seed {}", random.seed);
    let Encoding::Quantized(layout, _) = encoding else {
        for cpu in Cpu::available() {
            let [mut exact, mut int8] = [vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]];
            cpu.matmul(x, &w, &mut exact);
            cpu.matmul_int8(x, &w, &mut int8);
            assert_eq!(bits(&exact), bits(&int8), "{context}");
        }
        return;
    };
    let expected = reference::matmul_int8(x, tokens, &w);
    let blocks: Vec<_> = activation_blocks(layout.group, cols).collect();
    let few = tokens <= 7;
    // Many tokens: two multiplications a block, one addition for each. Few tokens: blocks are summed by lanes of four
    // columns or more, once for activations and once for weights, and the lanes last.
    let roundings = if few { 2 * blocks.len() + 8 } else { blocks.len() + 3 } as f64 * f64::from(f32::EPSILON) / 2.0;
    let mut magnitudes = Vec::new();
    for x in x.chunks(cols.max(1)).take(if cols == 0 { 0 } else { tokens }) {
        let rounded: Vec<_> = blocks.iter().map(|block| reference::quantize_activations(&x[block.clone()])).collect();
        for row in 0..rows {
            let (mut magnitude, mut quanta) = (0.0, 0.0);
            for (block, (codes, scale)) in blocks.iter().zip(&rounded) {
                let (_, weight_scale) = reference::level(&w, row, block.start).unwrap();
                let product = |(col, &code)| (col, reference::level(&w, row, col).unwrap().0 * i32::from(code));
                let products: Vec<(usize, i32)> = block.clone().zip(codes).map(product).collect();
                let parts = products.chunk_by(|(a, _), (b, _)| !few || a / 4 == b / 4);
                let dots: i32 = parts.map(|part| part.iter().map(|(_, product)| product).sum::<i32>().abs()).sum();
                magnitude += f64::from(dots) * f64::from(weight_scale).abs() * f64::from(*scale);
                // The product of both scales, and each sum, may be subnormal: a multiple of 2^-149.
                quanta += f64::from(dots) + 4.0;
            }
            magnitudes.push((magnitude, quanta * f64::from(f32::from_bits(1))));
        }
    }
    magnitudes.resize(tokens * rows, (0.0, 0.0));
    let mut first: Option<Vec<u32>> = None;
    for cpu in Cpu::available() {
        let mut out = vec![f32::NAN; tokens * rows];
        cpu.matmul_int8(x, &w, &mut out);
        for (i, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
            let bound = roundings / (1.0 - roundings) * magnitudes[i].0 + magnitudes[i].1;
            let error = (f64::from(found) - expected).abs();
            assert!(error <= bound, "{context} on {}: {i} is {found} for {expected}", cpu.isa());
        }
        let out = bits(&out);
        assert_eq!(&out, first.get_or_insert_with(|| out.clone()), "{context} on {}", cpu.isa());
    }
}

#[test]
fn matmul_int8_agrees_with_the_oracle() {
    let mut random = Random::new();
    for encoding in encodings() {
        for _ in 0..4 {
            let (rows, cols, tokens) =
                (pick(&mut random, &ROWS), pick(&mut random, &COLS), pick(&mut random, &TOKENS[..10]));
            check_matmul_int8(&mut random, encoding, rows, cols, tokens);
        }
    }
}

#[test]
fn matmul_int8_takes_every_shape() {
    let mut random = Random::new();
    for rows in ROWS {
        for cols in COLS {
            for tokens in TOKENS {
                let encoding = pick(&mut random, &encodings());
                if tokens < 300 || rows < 50 {
                    check_matmul_int8(&mut random, encoding, rows, cols, tokens);
                }
            }
        }
    }
}

fn integers(bits: u32, symmetric: bool, group: usize, scale_type: FloatType) -> Encoding {
    Encoding::Quantized(Layout { grid: Grid::Int { bits, symmetric }, group }, scale_type)
}

#[test]
fn rows_have_more_groups_than_are_widened_at_a_time() {
    let mut random = Random::new();
    for (bits, symmetric, group) in
        [(4, true, 128), (4, false, 128), (4, false, 16), (3, true, 64), (8, false, 64), (5, false, 32)]
    {
        let encoding = integers(bits, symmetric, group, pick(&mut random, &[FloatType::F16, FloatType::F32]));
        for tokens in [1, 3] {
            check_matmul(&mut random, encoding, 3, 600 * group + 5, tokens);
            check_matmul_int8(&mut random, encoding, 3, 600 * group + 5, tokens);
        }
    }
}

#[test]
fn long_rows_are_unpacked_in_parts() {
    let mut random = Random::new();
    let other = |grid, group| Encoding::Quantized(Layout { grid, group }, FloatType::F16);
    for encoding in [
        integers(4, true, 128, FloatType::F16),
        integers(4, false, 32, FloatType::F32),
        integers(8, false, 64, FloatType::F16),
        integers(3, true, 1 << 40, FloatType::F16),
        integers(6, false, 100, FloatType::F16),
        integers(5, false, 7, FloatType::F32),
        integers(2, true, 1, FloatType::F16),
        other(Grid::Ternary, 128),
        other(Grid::Binary, 2000),
    ] {
        for cols in [1024, 2048 + 64, 3333] {
            check_matmul(&mut random, encoding, 53, cols, 9);
            check_matmul_int8(&mut random, encoding, 53, cols, 15);
        }
    }
}

/// Where a scale is a subnormal number, quotients may be beyond what INT8 holds, or the scale is zero.
#[test]
fn activations_may_be_subnormal() {
    let mut random = Random::new();
    for most in [190, 63] {
        for tokens in [1, 3, 10] {
            let quanta = |_| (random.below(2 * most + 1) as i32 - most as i32) as f32 * f32::from_bits(1);
            let mut x: Vec<f32> = (0..tokens * 70).map(quanta).collect();
            x[0] = most as f32 * f32::from_bits(1);
            for (bits, symmetric, group) in [(4, true, 128), (8, false, 64), (3, true, 32)] {
                check_matmul_int8_of(&mut random, integers(bits, symmetric, group, FloatType::F32), 20, 70, &x);
            }
        }
    }
}

#[test]
fn neither_threads_nor_other_tokens_change_a_result() {
    let mut random = Random::new();
    let int = |bits, symmetric, group| integers(bits, symmetric, group, FloatType::F16);
    let encodings = [
        Encoding::Float(FloatType::F16),
        int(4, false, 32),
        int(4, true, 128),
        int(5, false, 7),
        int(8, false, 64),
        Encoding::Quantized(Layout { grid: Grid::Ternary, group: 128 }, FloatType::F32),
        Encoding::Quantized(Layout { grid: Grid::Binary, group: 100 }, FloatType::F16),
    ];
    for encoding in encodings {
        let (rows, cols, tokens) = (131, 300, 150);
        let bytes = Bytes::random(&mut random, encoding, rows, cols);
        let w = bytes.matrix();
        let x = random.values(tokens * cols, 1.0);
        for cpu in Cpu::available() {
            for product in [Cpu::matmul, Cpu::matmul_int8] {
                let context = format!("{encoding:?} seed {} on {}", random.seed, cpu.isa());
                let run = |threads: usize, x: &[f32]| {
                    let mut out = vec![f32::NAN; x.len() / cols * rows];
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| product(cpu, x, &w, &mut out));
                    bits(&out)
                };
                let whole = run(1, &x);
                assert_eq!(whole, run(5, &x), "{context}");
                for count in [8, 11, 130] {
                    let first = random.below(tokens - count);
                    let part = run(2, &x[first * cols..][..count * cols]);
                    assert_eq!(part, whole[first * rows..][..count * rows], "{context}");
                }
                let few = run(2, &x[..7 * cols]);
                for count in 1..7 {
                    let first = random.below(8 - count);
                    let part = run(count, &x[first * cols..][..count * cols]);
                    assert_eq!(part, few[first * rows..][..count * rows], "{count} tokens, {context}");
                }
            }
        }
    }
}

#[test]
fn a_group_of_weights_gives_what_each_gives_alone() {
    let mut random = Random::new();
    for round in 0..40 {
        let (cols, tokens) = (pick(&mut random, &COLS), pick(&mut random, &TOKENS[..9]));
        let count = pick(&mut random, &[0, 1, 2, 3, 7, 8, 9, 17]);
        let weights: Vec<Bytes> = (0..count)
            .map(|_| {
                let encoding = pick(&mut random, &encodings());
                let rows = pick(&mut random, &ROWS);
                Bytes::random(&mut random, encoding, rows, cols)
            })
            .collect();
        let matrices: Vec<Matrix> = weights.iter().map(Bytes::matrix).collect();
        let x = random.values(tokens * cols, 1.0);
        for cpu in Cpu::available() {
            for (arithmetic, alone) in [
                (Arithmetic::Exact, Cpu::matmul as fn(Cpu, &[f32], &Matrix, &mut [f32])),
                (Arithmetic::Int8, Cpu::matmul_int8),
            ] {
                let mut outs: Vec<Vec<f32>> = weights.iter().map(|w| vec![f32::NAN; tokens * w.rows]).collect();
                let mut parts: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut out[..]).collect();
                cpu.matmul_group(&x, &matrices, &mut parts, arithmetic);
                for (w, found) in matrices.iter().zip(&outs) {
                    let mut expected = vec![f32::NAN; tokens * w.rows()];
                    alone(cpu, &x, w, &mut expected);
                    let context = format!("round {round} seed {} on {}", random.seed, cpu.isa());
                    assert_eq!(bits(found), bits(&expected), "{context}");
                }
            }
        }
    }
}

/// Bytes that end where the memory that may be read ends.
#[cfg(target_os = "linux")]
mod guarded {
    use std::ffi::{c_int, c_long, c_void};

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            length: usize,
            protection: c_int,
            flags: c_int,
            file: c_int,
            offset: c_long,
        ) -> *mut c_void;
        fn mprotect(at: *mut c_void, length: usize, protection: c_int) -> c_int;
        fn munmap(at: *mut c_void, length: usize) -> c_int;
    }

    const PAGE: usize = 1 << 16;

    pub struct Guarded {
        map: *mut u8,
        mapped: usize,
        start: usize,
    }

    impl Guarded {
        pub fn new(bytes: &[u8]) -> Self {
            let readable = bytes.len().next_multiple_of(PAGE);
            let mapped = readable + PAGE;
            // SAFETY: a new private mapping of anonymous memory, of which the last page is made unreadable.
            unsafe {
                let map = mmap(std::ptr::null_mut(), mapped, 3, 0x22, -1, 0).cast::<u8>();
                assert!(!map.is_null() && map as isize != -1);
                assert_eq!(mprotect(map.add(readable).cast(), PAGE, 0), 0);
                let start = readable - bytes.len();
                map.add(start).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                Self { map, mapped, start }
            }
        }

        pub fn bytes(&self) -> &[u8] {
            let length = self.mapped - PAGE - self.start;
            // SAFETY: `new` wrote these bytes, and nothing writes them again while the mapping lives.
            unsafe { std::slice::from_raw_parts(self.map.add(self.start), length) }
        }
    }

    impl Drop for Guarded {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's own.
            unsafe { munmap(self.map.cast(), self.mapped) };
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_read_past_the_last_row() {
    let mut random = Random::new();
    for encoding in encodings() {
        let (rows, cols, tokens) =
            (pick(&mut random, &ROWS), pick(&mut random, &COLS), pick(&mut random, &TOKENS[..8]));
        let bytes = Bytes::random(&mut random, encoding, rows, cols);
        let [values, scales, zeros] =
            [&bytes.values, &bytes.scales, &bytes.zeros].map(|part| guarded::Guarded::new(part));
        let data = match encoding {
            Encoding::Float(dtype) => Data::Float { dtype, values: values.bytes() },
            Encoding::Quantized(layout, scale_type) => {
                let (codes, scales, zeros) = (values.bytes(), scales.bytes(), zeros.bytes());
                Data::Quantized { layout, codes, scale_type, scales, zeros }
            }
        };
        let w = Matrix::new(rows, cols, data).unwrap();
        let x = random.values(tokens * cols, 1.0);
        for cpu in Cpu::available() {
            for product in [Cpu::matmul, Cpu::matmul_int8] {
                let [mut found, mut expected] = [vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]];
                product(cpu, &x, &w, &mut found);
                product(cpu, &x, &bytes.matrix(), &mut expected);
                assert_eq!(bits(&found), bits(&expected), "{encoding:?} seed {}", random.seed);
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_token() {
    let mut random = Random::new();
    let rows = 21;
    // The second has three groups of 64: the last step of 128 columns has one of two.
    for (encoding, cols) in encodings().into_iter().flat_map(|encoding| [(encoding, 70), (encoding, 150)]) {
        let mut bytes = Bytes::random(&mut random, encoding, rows, cols);
        let (scale_type, part) = match encoding {
            Encoding::Float(dtype) => (dtype, &mut bytes.values),
            Encoding::Quantized(_, scale_type) => (scale_type, &mut bytes.scales),
        };
        let values = part.len() / rows;
        let nan = float_bytes(scale_type, &[f32::NAN]);
        part[9 * values..][..nan.len()].copy_from_slice(&nan);
        let w = bytes.matrix();
        for tokens in [1, 2, 3, 10] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x: Vec<f32> = random.values(tokens * cols, 1.0).iter().map(|v| v + 2.0).collect();
                if let Some(x) = x.get_mut(2 * cols - 1) {
                    *x = bad;
                }
                for cpu in Cpu::available() {
                    for product in [Cpu::matmul, Cpu::matmul_int8] {
                        let mut out = vec![0.0; tokens * rows];
                        product(cpu, &x, &w, &mut out);
                        for (i, v) in out.iter().enumerate() {
                            let finite = i / rows != 1 && i % rows != 9;
                            assert!(v.is_finite() == finite, "{encoding:?} {tokens} {i} seed {}", random.seed);
                        }
                    }
                }
            }
        }
    }
}
