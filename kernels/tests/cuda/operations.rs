//! Every operation of a forward pass against the scalar oracle.

use super::{
    common::{Random, UNIT, assert_close},
    cuda, float_bytes, read,
};
use bkpack_kernels::{
    Data, FloatType, Grid, Layout, Matrix,
    bits::{pack_row, pack_stream},
    cpu::SelectiveScan,
    cuda::{CudaError, DeviceScan, DeviceValues, Precision},
    reference,
    reference_ops::{self as oracle, Heads},
    reference_sequence,
};

/// The bytes of a random matrix.
pub struct Bytes {
    pub rows: usize,
    cols: usize,
    float: Option<FloatType>,
    layout: Layout,
    scale_type: FloatType,
    values: Vec<u8>, // or codes
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Bytes {
    pub fn float(random: &mut Random, dtype: FloatType, rows: usize, cols: usize) -> Self {
        let values = float_bytes(dtype, &random.values(rows * cols, 1.0));
        let layout = Layout { grid: Grid::Binary, group: 1 };
        let (scales, zeros) = (Vec::new(), Vec::new());
        Self { rows, cols, float: Some(dtype), layout, scale_type: FloatType::F32, values, scales, zeros }
    }

    fn quantized(random: &mut Random, layout: Layout, rows: usize, cols: usize) -> Self {
        let most = usize::from(layout.grid.max_code());
        let mut codes = |count| (0..count).map(|_| random.below(most + 1) as u8).collect::<Vec<u8>>();
        let mut values = vec![0; rows * layout.code_bytes(cols)];
        values.chunks_mut(layout.code_bytes(cols)).for_each(|row| pack_row(layout.grid, &codes(cols), row));
        let mut zeros = vec![0; rows * layout.zero_bytes(cols)];
        if let (Some(bits), true) = (layout.grid.stream_bits(), layout.grid.has_zero_points()) {
            let groups = layout.groups(cols);
            zeros.chunks_mut(layout.zero_bytes(cols)).for_each(|row| pack_stream(&codes(groups), bits, row));
        }
        let scale_type = [FloatType::F16, FloatType::F32][random.below(2)];
        let scales = float_bytes(scale_type, &random.values(rows * layout.groups(cols), 1.0));
        Self { rows, cols, float: None, layout, scale_type, values, scales, zeros }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        let Self { layout, scale_type, values, scales, zeros, .. } = self;
        let data = match self.float {
            Some(dtype) => Data::Float { dtype, values },
            None => Data::Quantized { layout: *layout, codes: values, scale_type: *scale_type, scales, zeros },
        };
        Matrix::new(self.rows, self.cols, data).unwrap()
    }
}

/// A matrix of every encoding, in groups of one of these sizes.
pub fn matrices(random: &mut Random, rows: usize, cols: usize, groups: &[usize]) -> Vec<(String, Bytes)> {
    let mut all: Vec<(String, Bytes)> = [FloatType::F32, FloatType::F16, FloatType::BF16]
        .map(|dtype| (format!("{dtype:?}"), Bytes::float(random, dtype, rows, cols)))
        .into();
    let mut grids = vec![Grid::Ternary, Grid::Binary];
    for bits in 2..=8 {
        grids.extend([true, false].map(|symmetric| Grid::Int { bits, symmetric }));
    }
    for grid in grids {
        let group = groups[random.below(groups.len())];
        let layout = Layout { grid, group };
        all.push((format!("{layout:?}"), Bytes::quantized(random, layout, rows, cols)));
    }
    all
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn products() {
    let (cuda, mut random) = (cuda(), Random::new());
    // Ragged tiles; rows longer than the shared memory of a block; several tiles of rows and of tokens. Groups that do
    // and do not suit the tensor cores.
    for (rows, cols, batches) in [
        (9, 96, &[1, 3, 8, 9, 67][..]),
        (131, 37, &[1, 3, 8, 9, 67]),
        (5, 4133, &[1, 4, 7, 9]),
        (33, 1100, &[1, 8, 12]),
        (260, 192, &[130]),
    ] {
        let groups = if batches.contains(&67) { &[7, 32, 64, 1 << 40][..] } else { &[96, 128] };
        for (name, bytes) in matrices(&mut random, rows, cols, groups) {
            let w = bytes.matrix();
            let device = cuda.matrix(&w).unwrap();
            let weights = reference::dequantize(&w);
            for &tokens in batches {
                let x = random.values(tokens * cols, 2.0);
                let bias = (random.below(2) == 1).then(|| random.values(rows, 1.0));
                let mut expected = reference::matmul(&x, tokens, &w);
                if let Some(bias) = &bias {
                    expected.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += f64::from(*b));
                }
                let (x_device, bias) =
                    (cuda.values(&x, cols).unwrap(), bias.map(|bias| cuda.values(&bias, rows).unwrap()));
                let magnitude = |index: usize| -> f64 {
                    let (token, row) = (index / rows, index % rows);
                    let pairs = x[token * cols..][..cols].iter().zip(&weights[row * cols..][..cols]);
                    1.0 + pairs.map(|(&x, &w)| f64::from(x * w).abs()).sum::<f64>()
                };
                for precision in [Precision::Exact, Precision::Bfloat] {
                    let context = format!("seed {} {name} [{rows}, {cols}] x {tokens} {precision:?}", random.seed);
                    let out = cuda.linear(&x_device, &device, bias.as_ref(), precision).unwrap();
                    // Two BF16 terms miss 2^-18 of a value, and so do those of a weight; one misses 2^-9. The rest
                    // is the rounding of the sums.
                    let terms = if precision == Precision::Exact { 2f64.powi(-16) } else { 2f64.powi(-8) };
                    let relative = terms + (cols + 16) as f64 * UNIT;
                    assert_close(&context, &read(&cuda, &out), &expected, |index| relative * magnitude(index));
                }
            }
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn rows_of_matrices() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (name, bytes) in matrices(&mut random, 12, 45, &[7, 32, 64, 1 << 40]) {
        let w = bytes.matrix();
        let device = cuda.matrix(&w).unwrap();
        let all = reference::dequantize(&w);
        let rows = |rows: &[u32]| rows.iter().flat_map(|&row| &all[row as usize * 45..][..45]).copied().collect();
        let expected: Vec<f32> = rows(&[11, 0, 5, 5]);
        assert_eq!(read(&cuda, &cuda.embed(&device, &[11, 0, 5, 5]).unwrap()), expected, "{name}");
        // The second of three matrices of four rows.
        let part = &device.split(3)[1];
        let expected: Vec<f32> = rows(&[4, 7]);
        assert_eq!(read(&cuda, &cuda.embed(part, &[0, 3]).unwrap()), expected, "{name}");
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn element_by_element() {
    let (cuda, mut random) = (cuda(), Random::new());
    for count in [1, 3, 700] {
        let context = format!("seed {} {count}", random.seed);
        let (x, y) = (random.values(count, 9.0), random.values(count, 3.0));
        let on = |values: &[f32]| cuda.values(values, count).unwrap();
        let close = |found: DeviceValues, expected: Vec<f64>| {
            let found = read(&cuda, &found);
            assert_close(&context, &found, &expected, |i| 1e-6 * (1e-3 + expected[i].abs()));
        };
        let each = |f: fn(f32) -> f64| x.iter().map(|&x| f(x)).collect::<Vec<f64>>();
        close(cuda.silu(on(&x)).unwrap(), each(oracle::silu));
        close(cuda.softplus(on(&x)).unwrap(), each(oracle::softplus));
        close(cuda.negative_exp(on(&x)).unwrap(), each(|x| -f64::from(x).exp()));
        close(cuda.relu(on(&x)).unwrap(), each(|x| f64::from(x.max(0.0))));
        close(cuda.clamp(on(&x), 2.5).unwrap(), each(|x| f64::from(x.clamp(-2.5, 2.5))));
        close(cuda.add(on(&x), &on(&y)).unwrap(), oracle::add(&x, &y));
        close(cuda.silu_multiply(on(&x), &on(&y)).unwrap(), oracle::silu_multiply(&x, &y));
        let scaled = x.iter().zip(&y).map(|(&x, &y)| f64::from(0.375f32.mul_add(y, x))).collect();
        close(cuda.add_scaled(on(&x), &on(&y), &cuda.values(&[0.375], 1).unwrap()).unwrap(), scaled);
        let mut scales: Vec<f32> = y.iter().map(|y| y.abs()).collect();
        scales[0] = 0.0;
        let rounded = x.iter().zip(&scales).map(|(&x, &s)| oracle::round_to_grid(x, s, 7.0)).collect();
        close(cuda.round_to_grid(on(&x), &on(&scales), 7.0).unwrap(), rounded);
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn norms() {
    let (cuda, mut random) = (cuda(), Random::new());
    for cols in [1, 6, 45, 1030] {
        let context = format!("seed {} {cols}", random.seed);
        let (x, gain, bias) = (random.values(3 * cols, 4.0), random.values(cols, 2.0), random.values(cols, 1.0));
        let on = |values: &[f32], cols| cuda.values(values, cols).unwrap();
        let limit = |_| 4.0 * (cols as f64).sqrt() * (cols as f64 + 16.0) * UNIT;
        // Three heads of one row.
        let found = cuda.rms_norm(&on(&x, 3 * cols), &on(&gain, cols), 1e-5).unwrap();
        assert_close(&context, &read(&cuda, &found), &oracle::rms_norm(&x, &gain, 1e-5), limit);
        let found = cuda.layer_norm(&on(&x, cols), &on(&gain, cols), &on(&bias, cols), 1e-5).unwrap();
        if cols > 1 {
            assert_close(&context, &read(&cuda, &found), &oracle::layer_norm(&x, &gain, &bias, 1e-5), limit);
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn moving_values() {
    let cuda = cuda();
    let values: Vec<f32> = (0..35).map(|value| value as f32).collect();
    let x = cuda.values(&values, 7).unwrap();
    assert_eq!(read(&cuda, &cuda.rows(&x, 2, 2).unwrap()), values[14..28]);
    assert_eq!(read(&cuda, &cuda.rows(&x, 5, 0).unwrap()), []);
    let columns: Vec<f32> = values.chunks(7).flat_map(|row| &row[3..5]).copied().collect();
    assert_eq!(read(&cuda, &cuda.columns(&x, 3, 2).unwrap()), columns);
    let gathered: Vec<f32> = [4, 0].iter().flat_map(|row| &values[row * 7..][..7]).copied().collect();
    assert_eq!(read(&cuda, &cuda.gather(&x, &[4, 0]).unwrap()), gathered);
    let mut zeros = cuda.zeros(2, 3).unwrap();
    assert_eq!(read(&cuda, &zeros), [0.0; 6]);
    zeros = cuda.add(zeros, &cuda.values(&[2.0; 6], 3).unwrap()).unwrap();
    cuda.zero(&mut zeros).unwrap();
    assert_eq!(read(&cuda, &zeros), [0.0; 6]);

    let (y, weights) = (cuda.values(&[1.0, 2.0, 3.0, 4.0], 2).unwrap(), cuda.values(&[0.5, 2.0], 1).unwrap());
    let sum = cuda.scatter_add(cuda.values(&[10.0; 4], 2).unwrap(), &y, &[[1, 0], [0, 0]], &weights).unwrap();
    assert_eq!(read(&cuda, &sum), [11.5, 12.0, 12.0, 14.0]);
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
#[should_panic(expected = "a token occurs twice")]
fn a_token_that_is_added_to_twice() {
    let cuda = cuda();
    let [sum, y, weights] = [[1.0; 4]; 3].map(|values| cuda.values(&values, 2).unwrap());
    let _ = cuda.scatter_add(sum, &y, &[[1, 0], [1, 1]], &weights);
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn attention() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (heads, kv_heads, head_dim) in [(4, 2, 6), (5, 1, 40), (3, 3, 64)] {
        let shape = Heads { heads, kv_heads, head_dim };
        let tokens = 43;
        let context = format!("seed {} {shape:?}", random.seed);
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let (q, angles) = (random.values(tokens * width, 2.0), random.values(tokens * (head_dim / 2), 3.0));
        let (k, v) = (random.values(tokens * kv_width, 2.0), random.values(tokens * kv_width, 1.0));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();

        let on = |values: &[f32], cols| cuda.values(values, cols).unwrap();
        let pairs = head_dim / 2;
        let turned = cuda.rope(on(&q, width), heads, &on(&cos, pairs), &on(&sin, pairs)).unwrap();
        let expected = oracle::rope(&q, heads, head_dim, &cos, &sin);
        assert_close(&context, &read(&cuda, &turned), &expected, |_| 8.0 * UNIT * 4.0);

        let scale = 1.0 / (head_dim as f32).sqrt();
        for window in [usize::MAX, 11] {
            let expected = oracle::attention(&q, &k, &v, shape, scale, window);
            let mut cache = cuda.cache(kv_heads, head_dim, tokens + 3).unwrap();
            for (round, lengths) in [[35, 1, 5, 2], [43, 0, 0, 0]].into_iter().enumerate() {
                cache.clear();
                let (mut found, mut first) = (Vec::new(), 0);
                for length in lengths.into_iter().filter(|&length| length > 0) {
                    let part = |values: &[f32], width| on(&values[first * width..][..length * width], width);
                    let (q, k, v) = (part(&q, width), part(&k, kv_width), part(&v, kv_width));
                    let out = cuda.attention(&q, &k, &v, &mut cache, heads, scale, window).unwrap();
                    found.extend(read(&cuda, &out));
                    first += length;
                }
                // Weights that sum to 1 times values below 1; the error of a score goes into its weight.
                let context = format!("{context} window {window} round {round}");
                assert_close(&context, &found, &expected, |_| 64.0 * head_dim as f64 * UNIT);
            }
        }
    }
    assert!(matches!(cuda.cache(1, 300, 8), Err(CudaError::TooLarge { .. })));
}

/// Many positions before a few tokens, and before many: of the widest head that any card's prefill has room for, and
/// of one that asks for more shared memory than some cards give.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn wide_heads() {
    let (cuda, mut random) = (cuda(), Random::new());
    for head_dim in [128, 256] {
        let (heads, kv_heads) = (2, 1);
        let shape = Heads { heads, kv_heads, head_dim };
        let lengths = [300, 1, 35];
        let tokens: usize = lengths.iter().sum();
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let q = random.values(tokens * width, 2.0);
        let (k, v) = (random.values(tokens * kv_width, 2.0), random.values(tokens * kv_width, 1.0));
        let scale = 1.0 / (head_dim as f32).sqrt();
        let expected = oracle::attention(&q, &k, &v, shape, scale, usize::MAX);
        let mut cache = cuda.cache(kv_heads, head_dim, tokens).unwrap();
        let mut first = 0;
        for length in lengths {
            let part = |values: &[f32], width| cuda.values(&values[first * width..][..length * width], width).unwrap();
            let (q, k, v) = (part(&q, width), part(&k, kv_width), part(&v, kv_width));
            let out = cuda.attention(&q, &k, &v, &mut cache, heads, scale, usize::MAX).unwrap();
            let context = format!("seed {} {shape:?}, {length} after {first}", random.seed);
            let expected = &expected[first * width..][..length * width];
            assert_close(&context, &read(&cuda, &out), expected, |_| 64.0 * head_dim as f64 * UNIT);
            first += length;
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn convolution() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (channels, kernel) in [(1, 1), (19, 4), (300, 3)] {
        let (tokens, context) = (9, format!("seed {} {channels} {kernel}", random.seed));
        let x = random.values(tokens * channels, 3.0);
        let (weight, bias) = (random.values(channels * kernel, 1.0), random.values(channels, 1.0));
        let on = |values: &[f32], cols| cuda.values(values, cols).unwrap();
        let mut history = cuda.zeros(kernel - 1, channels).unwrap();
        let (mut found, mut first) = (Vec::new(), 0);
        for length in [1, 2, 5, 1] {
            let x = on(&x[first * channels..][..length * channels], channels);
            let bias = on(&bias, channels);
            let out = cuda.depthwise_conv(&x, &on(&weight, kernel), Some(&bias), &mut history).unwrap();
            found.extend(read(&cuda, &out));
            first += length;
        }
        let expected = reference_sequence::depthwise_conv(&x, &weight, &bias);
        let limit = (1.0 + 3.0 * kernel as f64) * (kernel + 1) as f64 * UNIT;
        assert_close(&context, &found, &expected, |_| limit);
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn scan() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (channels, states, tokens) in [(3, 1, 59), (70, 16, 59), (33, 21, 59), (33, 16, 600)] {
        let context = format!("seed {} {channels} {states} {tokens}", random.seed);
        let x = random.values(tokens * channels, 1.0);
        let delta: Vec<f32> = random.values(tokens * channels, 1.0).iter().map(|x| x.abs()).collect();
        let a: Vec<f32> = random.values(channels * states, 4.0).iter().map(|x| -x.abs()).collect();
        let (b, c) = (random.values(tokens * states, 1.0), random.values(tokens * states, 1.0));
        let d = random.values(channels, 1.0);
        let all = SelectiveScan { x: &x, delta: &delta, a: &a, b: &b, c: &c, d: &d };
        let (expected, last) = reference_sequence::selective_scan(&all);
        let on = |values: &[f32], cols| cuda.values(values, cols).unwrap();
        let (a, d) = (on(&a, states), on(&d, channels));
        for lengths in [[tokens, 0, 0], [tokens - 19, 2, 17]] {
            let mut state = cuda.zeros(channels, states).unwrap();
            let (mut found, mut first) = (Vec::new(), 0);
            for length in lengths.into_iter().filter(|&length| length > 0) {
                let part = |values: &[f32], width| on(&values[first * width..][..length * width], width);
                let (x, delta) = (part(&x, channels), part(&delta, channels));
                let (b, c) = (part(&b, states), part(&c, states));
                let scan = DeviceScan { x: &x, delta: &delta, a: &a, b: &b, c: &c, d: &d };
                found.extend(read(&cuda, &cuda.selective_scan(scan, &mut state).unwrap()));
                first += length;
            }
            // A state holds at most `tokens` inputs below 1, each multiplied by as many rounded factors.
            let limit = (tokens * tokens * states) as f64 * UNIT;
            assert_close(&context, &found, &expected, |_| limit);
            assert_close(&context, &read(&cuda, &state), &last, |_| limit);
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn resolvent() {
    let (cuda, mut random) = (cuda(), Random::new());
    let z = [0.25, 1.0];
    let v = random.values(5003, 3.0);
    let context = format!("seed {}", random.seed);
    let on = |values: &[f32]| cuda.values(values, 1).unwrap();

    // The oracle takes cubic time; the recursion from the left is the definition of the causal one.
    let short = &v[..60];
    let expected: Vec<f64> = reference_sequence::resolvent(short, z).into_iter().flatten().collect();
    assert_close(&context, &read(&cuda, &cuda.resolvent(&on(short), z).unwrap()), &expected, |_| 4.0 * UNIT);

    let sweep = |values: &mut dyn Iterator<Item = &f32>| {
        let mut last = [0.0; 2];
        let step = |&v: &f32| {
            let (re, im) = (f64::from(v) - 2.0 - f64::from(z[0]) - last[0], -f64::from(z[1]) - last[1]);
            let norm = re * re + im * im;
            last = [re / norm, -im / norm];
            last
        };
        values.map(step).collect::<Vec<[f64; 2]>>()
    };
    let left = sweep(&mut v.iter());
    let expected: Vec<f64> = left.iter().flatten().copied().collect();
    let mut last = cuda.carry().unwrap();
    for round in 0..2 {
        let mut found = Vec::new();
        for part in [&v[..1], &v[1..2200], &v[2200..]] {
            found.extend(read(&cuda, &cuda.causal_resolvent(&on(part), z, &mut last).unwrap()));
        }
        assert_close(&format!("{context} round {round}"), &found, &expected, |_| 4.0 * UNIT);
        cuda.clear_carry(&mut last).unwrap();
    }

    // The matrix is symmetric: each end's recursion meets at the position.
    let mut right = sweep(&mut v.iter().rev());
    right.reverse();
    let expected = (0..v.len()).flat_map(|i| {
        let before = if i > 0 { left[i - 1] } else { [0.0; 2] };
        let after = right.get(i + 1).copied().unwrap_or([0.0; 2]);
        let re = f64::from(v[i]) - 2.0 - f64::from(z[0]) - before[0] - after[0];
        let im = -f64::from(z[1]) - before[1] - after[1];
        let norm = re * re + im * im;
        [re / norm, -im / norm]
    });
    let expected: Vec<f64> = expected.collect();
    assert_close(&context, &read(&cuda, &cuda.resolvent(&on(&v), z).unwrap()), &expected, |_| 4.0 * UNIT);
}
