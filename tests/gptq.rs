//! Calibrated rounding against plain f64 references, and on inputs that are degenerate.

use bkpack::quant::{
    Quantized,
    gptq::{self, Factor},
    hessian::Hessian,
    quantize, quantize_calibrated,
};
use bkpack_kernels::{
    Cpu, Data, FloatType, Grid, Layout, Matrix, bits,
    cpu::quantize::{QuantizeOptions, Rounding},
    reference,
};

const GRIDS: [Grid; 7] = [
    Grid::Int { bits: 2, symmetric: true },
    Grid::Int { bits: 3, symmetric: false },
    Grid::Int { bits: 4, symmetric: true },
    Grid::Int { bits: 4, symmetric: false },
    Grid::Int { bits: 8, symmetric: true },
    Grid::Ternary,
    Grid::Binary,
];

/// SplitMix64: every seed gives its own sequence, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Close to normal, with a standard deviation of one.
    fn weight(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
        (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
    }
}

fn options(grid: Grid, group: usize) -> QuantizeOptions {
    let layout = Layout { grid, group };
    QuantizeOptions { layout, scale_type: FloatType::F16, rounding: Rounding::Search, ternary_threshold: 0.5 }
}

fn random(count: usize, factor: f32, random: &mut Random) -> Vec<f32> {
    (0..count).map(|_| random.weight() * factor).collect()
}

/// Inputs with strong correlations and columns of very different size: mixtures of a few sources, and noise.
fn correlated(tokens: usize, cols: usize, seed: &mut Random) -> Vec<f32> {
    let sources = cols.div_ceil(4);
    let mixing = random(sources * cols, 1.0, seed);
    let sizes: Vec<f32> = (0..cols).map(|_| (1.5 * seed.weight()).exp()).collect();
    let mut x = Vec::with_capacity(tokens * cols);
    for _ in 0..tokens {
        let source = random(sources, 1.0, seed);
        for col in 0..cols {
            let mixed: f32 = (0..sources).map(|k| source[k] * mixing[k * cols + col]).sum();
            x.push(sizes[col] * (mixed / (sources as f32).sqrt() + 0.3 * seed.weight()));
        }
    }
    x
}

fn hessian(cpu: Cpu, x: &[f32], cols: usize) -> Hessian {
    let mut hessian = Hessian::new(cols);
    hessian.add(cpu, x);
    hessian
}

fn matrix(bytes: &[u8], cols: usize) -> Matrix<'_> {
    Matrix::new(bytes.len() / 4 / cols.max(1), cols, Data::Float { dtype: FloatType::F32, values: bytes }).unwrap()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn packed<'a>(quantized: &'a Quantized, rows: usize, cols: usize, options: &QuantizeOptions) -> Matrix<'a> {
    let Quantized { codes, scales, zeros } = quantized;
    let (layout, scale_type) = (options.layout, options.scale_type);
    Matrix::new(rows, cols, Data::Quantized { layout, codes, scale_type, scales, zeros }).unwrap()
}

/// `tr((W - Q) H (W - Q)^T) / tokens`, by the definition.
fn loss(weights: &[f32], quantized: &Matrix, hessian: &Hessian) -> f64 {
    let (cols, decoded) = (quantized.cols(), reference::dequantize(quantized));
    let errors: Vec<f64> = weights.iter().zip(&decoded).map(|(&w, &q)| f64::from(w) - f64::from(q)).collect();
    let mut sum = 0.0;
    for row in errors.chunks(cols) {
        for a in 0..cols {
            sum += row[a] * (0..cols).map(|b| hessian.get(a, b) * row[b]).sum::<f64>();
        }
    }
    sum / hessian.tokens() as f64
}

fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn the_hessian_is_the_sum_of_products() {
    let mut seed = Random(1);
    for (tokens, cols) in [(1, 1), (3, 7), (300, 48), (257, 49), (700, 131), (2100, 20)] {
        let x = correlated(tokens, cols, &mut seed);
        let found = hessian(Cpu::detect(), &x, cols);
        assert_eq!((found.cols(), found.tokens()), (cols, tokens as u64));
        for a in 0..cols {
            for b in 0..cols {
                let products = x.chunks(cols).map(|row| f64::from(row[a]) * f64::from(row[b]));
                let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                let error = (found.get(a, b) - exact).abs();
                assert!(error <= 1.5e-5 * size, "{tokens} tokens, columns {a} and {b} of {cols}: off by {error:e}");
            }
        }
        assert_eq!(found.diagonal()[cols - 1], found.get(cols - 1, cols - 1));
        for cpu in Cpu::available() {
            for threads in [1, 3] {
                let other = in_pool(threads, || hessian(cpu, &x, cols));
                let same = (0..cols).all(|a| (0..=a).all(|b| other.get(a, b).to_bits() == found.get(a, b).to_bits()));
                assert!(same, "{tokens} tokens of {cols} columns differ on {} with {threads} threads", cpu.isa());
            }
        }
    }
}

#[test]
fn a_merge_is_the_sum_of_both() {
    let (cpu, cols) = (Cpu::detect(), 50);
    let x = correlated(512, cols, &mut Random(2));
    let (first, second) = x.split_at(256 * cols);
    let mut merged = hessian(cpu, first, cols);
    merged.merge(&hessian(cpu, second, cols));
    // Cut where the sums are cut.
    assert_eq!(merged, hessian(cpu, &x, cols));
    merged.merge(&Hessian::new(cols));
    assert_eq!(merged, hessian(cpu, &x, cols));
}

/// Error feedback by the book: columns by falling second moment, the matrix inverted, the remaining weights moved.
fn textbook(weights: &[f32], start: &Matrix, hessian: &Hessian, damping: f64, options: &QuantizeOptions) -> Vec<u8> {
    let (n, top) = (hessian.cols(), f64::from(options.layout.grid.max_code()));
    let diagonal = hessian.diagonal();
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
    let mut codes = vec![0; weights.len()];
    for (row, weights) in weights.chunks(n).enumerate() {
        let mut current: Vec<f64> = weights.iter().map(|&weight| weight.into()).collect();
        for (done, &column) in order.iter().enumerate() {
            let (level, scale) = reference::level(start, row, column).unwrap();
            let code = f64::from(code(start, row, column));
            let zero = code - f64::from(level);
            let rounded = (current[column] / f64::from(scale)).round_ties_even() + zero;
            let rounded = rounded.clamp(0.0, top);
            codes[row * n + column] = rounded as u8;
            let error = current[column] - (rounded - zero) * f64::from(scale);
            // The remaining weights move by the minimum of the quadratic form given this column's error.
            let rest = &order[done + 1..];
            let entry = |a: usize, b: usize| hessian.get(a, b) + if a == b { damping * mean } else { 0.0 };
            let system: Vec<Vec<f64>> = rest
                .iter()
                .map(|&a| rest.iter().map(|&b| entry(a, b)).chain([entry(a, column) * error]).collect())
                .collect();
            for (&column, moved) in rest.iter().zip(solve(system)) {
                current[column] += moved;
            }
        }
    }
    codes
}

/// Gaussian elimination of `[a | b]` with pivots on the diagonal: `a` is positive definite.
fn solve(mut system: Vec<Vec<f64>>) -> Vec<f64> {
    let n = system.len();
    for pivot in 0..n {
        let line = system[pivot].clone();
        for (row, values) in system.iter_mut().enumerate() {
            if row != pivot {
                let share = values[pivot] / line[pivot];
                for (value, from) in values.iter_mut().zip(&line) {
                    *value -= share * from;
                }
            }
        }
    }
    (0..n).map(|row| system[row][n] / system[row][row]).collect()
}

fn code(matrix: &Matrix, row: usize, column: usize) -> u8 {
    let Data::Quantized { layout, codes, .. } = matrix.data() else { panic!("a quantized matrix") };
    let codes = &codes[row * layout.code_bytes(matrix.cols())..];
    match layout.grid.stream_bits() {
        Some(bits) => bits::stream_code(codes, bits, column),
        None => bits::ternary_code(codes, column),
    }
}

#[test]
fn feedback_is_that_of_the_textbook() {
    let (cpu, mut seed) = (Cpu::detect(), Random(3));
    for grid in [2, 3, 4].into_iter().flat_map(|bits| [true, false].map(|symmetric| Grid::Int { bits, symmetric })) {
        let (rows, cols) = (5, 21);
        let hessian = hessian(cpu, &correlated(100, cols, &mut seed), cols);
        let weights = random(rows * cols, 0.1, &mut seed);
        let values = bytes(&weights);
        let options = options(grid, 8);
        let factor = Factor::new(cpu, &hessian).unwrap();
        let mut found = Quantized::default();
        let report = gptq::quantize(cpu, &matrix(&values, cols), &factor, &options, &mut found);
        let found = packed(&found, rows, cols, &options);
        let expected = textbook(&weights, &found, &hessian, report.damping, &options);
        for row in 0..rows {
            for col in 0..cols {
                assert_eq!(code(&found, row, col), expected[row * cols + col], "{grid:?}, row {row}, column {col}");
            }
        }
        let exact = loss(&weights, &found, &hessian);
        assert!((report.loss - exact).abs() <= 1e-4 * exact, "{grid:?}: {} instead of {exact}", report.loss);
    }
}

#[test]
fn without_correlations_it_is_the_weighted_search() {
    let (cpu, mut seed) = (Cpu::detect(), Random(4));
    let (rows, cols) = (50, 133);
    // Each token is one input alone, of its own size.
    let mut x = vec![0.0; cols * cols];
    for (index, size) in random(cols, 1.0, &mut seed).into_iter().enumerate() {
        x[index * (cols + 1)] = size + 3.0;
    }
    let hessian = hessian(cpu, &x, cols);
    let factor = Factor::new(cpu, &hessian).unwrap();
    let values = bytes(&random(rows * cols, 0.02, &mut seed));
    for grid in GRIDS {
        for group in [32, 50, cols] {
            let options = options(grid, group);
            let (mut plain, mut fed_back) = (Quantized::default(), Quantized::default());
            quantize_calibrated(cpu, &matrix(&values, cols), &options, Some(factor.squares()), &mut plain);
            gptq::quantize(cpu, &matrix(&values, cols), &factor, &options, &mut fed_back);
            assert_eq!(parts(&plain), parts(&fed_back), "{options:?}");
        }
    }
}

fn parts(quantized: &Quantized) -> [&[u8]; 3] {
    [&quantized.codes, &quantized.scales, &quantized.zeros]
}

#[test]
fn the_loss_is_never_above_that_of_the_plain_search() {
    let (cpu, mut seed) = (Cpu::detect(), Random(5));
    for (rows, cols) in [(40, 96), (7, 200), (1, 64), (64, 31)] {
        let hessian = hessian(cpu, &correlated(4 * cols, cols, &mut seed), cols);
        let factor = Factor::new(cpu, &hessian).unwrap();
        let weights = random(rows * cols, 0.02, &mut seed);
        let values = bytes(&weights);
        for grid in GRIDS {
            for group in [32, cols] {
                let options = options(grid, group.min(cols));
                let mut quantized = Quantized::default();
                quantize(cpu, &matrix(&values, cols), &options, &mut quantized);
                let plain = loss(&weights, &packed(&quantized, rows, cols, &options), &hessian);
                let report = gptq::quantize(cpu, &matrix(&values, cols), &factor, &options, &mut quantized);
                let found = loss(&weights, &packed(&quantized, rows, cols, &options), &hessian);
                assert!(found <= plain, "[{rows}, {cols}], {options:?}: {found} above {plain}");
                assert!((report.loss - found).abs() <= 1e-3 * found, "{options:?}: {} for {found}", report.loss);
            }
        }
    }
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_the_instruction_set() {
    let (rows, cols) = (101, 150);
    let mut seed = Random(6);
    let (x, values) = (correlated(400, cols, &mut seed), bytes(&random(rows * cols, 0.02, &mut seed)));
    for grid in GRIDS {
        let options = options(grid, 64);
        let run = |cpu, threads| {
            in_pool(threads, || {
                let factor = Factor::new(cpu, &hessian(cpu, &x, cols)).unwrap();
                let mut quantized = Quantized::default();
                let report = gptq::quantize(cpu, &matrix(&values, cols), &factor, &options, &mut quantized);
                (quantized, report)
            })
        };
        let (expected, report) = run(Cpu::detect(), 1);
        for cpu in Cpu::available() {
            for threads in [1, 2, 5] {
                let (found, other) = run(cpu, threads);
                assert_eq!(parts(&found), parts(&expected), "{grid:?} on {} with {threads} threads", cpu.isa());
                assert!((other.loss - report.loss).abs() <= 1e-9 * report.loss);
            }
        }
    }
}

#[test]
fn dead_duplicate_and_constant_inputs_do_no_harm() {
    let (cpu, mut seed) = (Cpu::detect(), Random(7));
    let (rows, cols, tokens) = (20, 70, 300);
    let mut x = correlated(tokens, cols, &mut seed);
    for row in x.chunks_mut(cols) {
        // A whole group and a column that are dead, two that are the same, one that never changes, one tiny, one huge.
        row[32..64].fill(0.0);
        row[3] = 0.0;
        row[5] = row[4];
        row[6] = 1.0;
        row[7] *= 1e-12;
        row[8] *= 1e6;
    }
    let hessian = hessian(cpu, &x, cols);
    let factor = Factor::new(cpu, &hessian).unwrap();
    let weights = random(rows * cols, 0.02, &mut seed);
    let values = bytes(&weights);
    for grid in GRIDS {
        let options = options(grid, 32);
        let (mut plain, mut found) = (Quantized::default(), Quantized::default());
        quantize_calibrated(cpu, &matrix(&values, cols), &options, Some(factor.squares()), &mut plain);
        let report = gptq::quantize(cpu, &matrix(&values, cols), &factor, &options, &mut found);
        assert!(report.loss.is_finite() && report.loss >= 0.0, "{grid:?}: {}", report.loss);
        let (plain, found) = (packed(&plain, rows, cols, &options), packed(&found, rows, cols, &options));
        assert!(reference::dequantize(&found).iter().all(|weight| weight.is_finite()));
        for row in 0..rows {
            for col in (32..64).chain([3]) {
                assert_eq!(code(&found, row, col), code(&plain, row, col), "{grid:?}, row {row}, dead column {col}");
            }
        }
    }
}

#[test]
fn no_tokens_rows_or_columns_are_fine() {
    let cpu = Cpu::detect();
    let values = bytes(&random(3 * 40, 0.02, &mut Random(8)));
    let factor = Factor::new(cpu, &Hessian::new(40)).unwrap();
    let options = options(Grid::Int { bits: 4, symmetric: true }, 32);
    let (mut plain, mut found) = (Quantized::default(), Quantized::default());
    quantize_calibrated(cpu, &matrix(&values, 40), &options, Some(factor.squares()), &mut plain);
    let report = gptq::quantize(cpu, &matrix(&values, 40), &factor, &options, &mut found);
    assert_eq!((report.loss, parts(&found)), (0.0, parts(&plain)));
    gptq::quantize(cpu, &matrix(&[], 40), &factor, &options, &mut found);
    assert_eq!(parts(&found), [&[0u8; 0][..]; 3]);
    let factor = Factor::new(cpu, &Hessian::new(0)).unwrap();
    let empty = Matrix::new(3, 0, Data::Float { dtype: FloatType::F32, values: &[] }).unwrap();
    gptq::quantize(cpu, &empty, &factor, &options, &mut found);
    assert_eq!(parts(&found), [&[0u8; 0][..]; 3]);
}

#[test]
fn inputs_that_are_not_finite_are_refused_by_number() {
    let cpu = Cpu::detect();
    for bad in [f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX] {
        let mut x = correlated(60, 70, &mut Random(9));
        x[5 * 70 + 61] = bad;
        let error = Factor::new(cpu, &hessian(cpu, &x, 70)).unwrap_err();
        assert_eq!(error.to_string(), "the calibration data hold NaN or infinite values, or overflow, at input 61");
    }
}
