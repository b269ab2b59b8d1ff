//! Quantization against a scalar oracle: round-to-nearest to the bit, the search by its error; and the range scan.

use std::collections::BTreeMap;

use bkpack_kernels::{
    Cpu, Data, FloatType, Grid, Layout, Matrix, bits,
    cpu::quantize::{QuantizeOptions, Range, Rounding},
    reference,
};
use half::{bf16, f16};

const THRESHOLD: f32 = 0.5;

fn grids() -> Vec<Grid> {
    let mut grids = vec![Grid::Ternary, Grid::Binary];
    for bits in 2..=8 {
        grids.extend([true, false].map(|symmetric| Grid::Int { bits, symmetric }));
    }
    grids
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Above 0, at most 1.
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) + 1) as f32 / (1 << 24) as f32
    }

    fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

/// What a group of weights can look like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Normal,
    HeavyTailed,
    AllPositive,
    FarFromZero,
    Constant,
    Zero,
    NegativeZero,
    OneOutlier,
    HalfSteps,
    Tiny,
    Huge,
    Largest,
}

const KINDS: [Kind; 12] = [
    Kind::Normal,
    Kind::HeavyTailed,
    Kind::AllPositive,
    Kind::FarFromZero,
    Kind::Constant,
    Kind::Zero,
    Kind::NegativeZero,
    Kind::OneOutlier,
    Kind::HalfSteps,
    Kind::Tiny,
    Kind::Huge,
    Kind::Largest,
];

impl Kind {
    fn weights(self, count: usize, random: &mut Random) -> Vec<f32> {
        let outlier = random.next() as usize % count.max(1);
        let weight = |index: usize| match self {
            Kind::Normal => 0.02 * random.normal(),
            Kind::HeavyTailed => 0.02 * random.normal() / random.uniform().sqrt(),
            Kind::AllPositive => random.uniform(),
            Kind::FarFromZero => -5.0 - 0.1 * random.uniform(),
            Kind::Constant => 0.37,
            Kind::Zero => 0.0,
            Kind::NegativeZero => -0.0,
            Kind::OneOutlier if index == outlier => -7.0,
            Kind::OneOutlier => 0.001 * random.normal(),
            // Multiples of half a step of the larger grids: ties, which round to even.
            Kind::HalfSteps => ((random.next() % 511) as f32 - 255.0) / 2.0,
            Kind::Tiny => 1e-30 * random.normal(),
            Kind::Huge => 1e30 * random.normal(),
            Kind::Largest => f32::MAX * (2.0 * random.uniform() - 1.0),
        };
        (0..count).map(weight).collect()
    }

    /// Whether F16 holds its scales; elsewhere the caller asks for F32.
    fn fits_f16(self) -> bool {
        !matches!(self, Kind::Tiny | Kind::Huge | Kind::Largest)
    }
}

/// The bytes of a quantized matrix.
#[derive(Debug, PartialEq)]
struct Packed {
    codes: Vec<u8>,
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Packed {
    fn matrix<'a>(&'a self, rows: usize, cols: usize, options: &QuantizeOptions) -> Matrix<'a> {
        let Packed { codes, scales, zeros } = self;
        let (layout, scale_type) = (options.layout, options.scale_type);
        Matrix::new(rows, cols, Data::Quantized { layout, codes, scale_type, scales, zeros }).unwrap()
    }
}

fn quantize(cpu: Cpu, options: &QuantizeOptions, cols: usize, x: &[f32]) -> Packed {
    let rows = x.len() / cols;
    // Filled with what must be overwritten.
    let mut packed = Packed {
        codes: vec![0xa5; rows * options.layout.code_bytes(cols)],
        scales: vec![0xa5; rows * options.layout.groups(cols) * options.scale_type.bytes()],
        zeros: vec![0xa5; rows * options.layout.zero_bytes(cols)],
    };
    cpu.quantize_rows(options, cols, x, None, &mut packed.codes, &mut packed.scales, &mut packed.zeros);
    packed
}

fn options(grid: Grid, group: usize, scale_type: FloatType, rounding: Rounding) -> QuantizeOptions {
    QuantizeOptions { layout: Layout { grid, group }, scale_type, rounding, ternary_threshold: THRESHOLD }
}

/// The sum of magnitudes in the kernels' order: 16 running sums, then halves onto halves.
fn magnitude_sum(weights: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for (index, weight) in weights.iter().enumerate() {
        lanes[index % 16] += weight.abs();
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// A scale as it is stored: rounded, but neither to zero nor to infinity.
fn stored(scale: f32, scale_type: FloatType) -> f32 {
    if scale_type == FloatType::F32 || scale == 0.0 {
        return scale;
    }
    let (least, most) = (f16::from_bits(1).to_f32(), f16::MAX.to_f32());
    f16::from_f32(scale).to_f32().clamp(least, most)
}

/// Round-to-nearest of one group by the textbook: scale, zero point, codes.
fn nearest(options: &QuantizeOptions, weights: &[f32]) -> (f32, u8, Vec<u8>) {
    let low = weights.iter().copied().fold(0f32, f32::min);
    let high = weights.iter().copied().fold(0f32, f32::max);
    let stored = |scale| stored(scale, options.scale_type);
    let codes = |code: &dyn Fn(f32) -> f32| weights.iter().map(|&weight| code(weight) as u8).collect();
    match options.layout.grid {
        Grid::Int { bits, symmetric } => {
            let (top, half) = (((1u32 << bits) - 1) as f32, (1u32 << (bits - 1)) as f32);
            let scale = stored(if symmetric { high.max(-low) / (half - 1.0) } else { (high - low) / top });
            let zero = match (symmetric, scale == 0.0) {
                (true, _) => half,
                (false, true) => 0.0,
                (false, false) => (-low / scale).round_ties_even().clamp(0.0, top),
            };
            let code = |weight: f32| {
                let level = if scale == 0.0 { 0.0 } else { (weight / scale).round_ties_even() };
                (level + zero).clamp(0.0, top)
            };
            (scale, zero as u8, codes(&code))
        }
        Grid::Ternary => {
            let scale = stored(magnitude_sum(weights) / weights.len() as f32);
            let code = |weight: f32| match weight.abs() >= THRESHOLD * scale && scale > 0.0 {
                true if weight > 0.0 => 2.0,
                true => 0.0,
                false => 1.0,
            };
            (scale, 0, codes(&code))
        }
        Grid::Binary => {
            let code = |weight: f32| if weight >= 0.0 { 1.0 } else { 0.0 };
            (stored(magnitude_sum(weights) / weights.len() as f32), 0, codes(&code))
        }
    }
}

/// Round-to-nearest of a matrix.
fn oracle(options: &QuantizeOptions, cols: usize, x: &[f32]) -> Packed {
    let layout = options.layout;
    let mut packed = Packed { codes: Vec::new(), scales: Vec::new(), zeros: Vec::new() };
    for row in x.chunks(cols) {
        let (mut row_codes, mut row_zeros) = (Vec::new(), Vec::new());
        for weights in row.chunks(layout.group) {
            let (scale, zero, codes) = nearest(options, weights);
            row_codes.extend(codes);
            row_zeros.push(zero);
            match options.scale_type {
                FloatType::F32 => packed.scales.extend(scale.to_le_bytes()),
                _ => packed.scales.extend(f16::from_f32(scale).to_le_bytes()),
            }
        }
        let mut bytes = vec![0; layout.code_bytes(cols)];
        bits::pack_row(layout.grid, &row_codes, &mut bytes);
        packed.codes.extend(bytes);
        if let Grid::Int { bits, symmetric: false } = layout.grid {
            let mut bytes = vec![0; layout.zero_bytes(cols)];
            bits::pack_stream(&row_zeros, bits, &mut bytes);
            packed.zeros.extend(bytes);
        }
    }
    packed
}

/// How much the squared error of a weight counts for the search: large weights of integer grids count more.
fn importance(grid: Grid, weight: f32) -> f64 {
    match grid {
        Grid::Int { .. } => f64::from(weight.abs()),
        Grid::Ternary | Grid::Binary => 1.0,
    }
}

/// How far one group is from what it was, by the measure of the search.
#[derive(Debug, Default)]
struct GroupError {
    /// Squared error.
    error: f64,
    /// Squared norm.
    norm: f64,
    /// What rounding the scale to F16 can add to the squared error of the best scale.
    stored: f64,
}

fn group_errors(packed: &Packed, options: &QuantizeOptions, cols: usize, x: &[f32]) -> Vec<GroupError> {
    let matrix = packed.matrix(x.len() / cols, cols, options);
    let mut groups = Vec::new();
    for row in 0..matrix.rows() {
        for group in 0..options.layout.groups(cols) {
            let mut sums = GroupError::default();
            for col in options.layout.group_range(group, cols) {
                let (level, scale) = reference::level(&matrix, row, col).unwrap();
                let importance = importance(options.layout.grid, x[row * cols + col]);
                let weight = f64::from(x[row * cols + col]);
                let value = f64::from(reference::weight(&matrix, row, col));
                assert!(value.is_finite(), "{options:?}: {weight} became {value}");
                sums.error += importance * (value - weight).powi(2);
                sums.norm += importance * weight * weight;
                if options.scale_type == FloatType::F16 {
                    // Half a unit in the last place of 11 bits, or of the subnormal numbers.
                    let half_unit = (f64::from(scale.abs()) / 2048.0).max(2f64.powi(-25));
                    sums.stored += importance * (f64::from(level) * half_unit).powi(2);
                }
            }
            groups.push(sums);
        }
    }
    groups
}

/// Shapes with ragged tails, single rows and columns, and no rows; `usize::MAX` stands for one group a row.
const SHAPES: [(usize, usize); 9] = [(3, 1), (1, 5), (2, 16), (4, 33), (1, 127), (2, 128), (3, 300), (1, 704), (0, 64)];
const GROUPS: [usize; 7] = [1, 7, 32, 64, 128, 256, usize::MAX];

/// Calls `check` with options, columns and weights for every grid, scale type, group, shape and kind.
fn for_all(rounding: Rounding, mut check: impl FnMut(Kind, &QuantizeOptions, usize, &[f32])) {
    let mut random = Random(1);
    for kind in KINDS {
        for (rows, cols) in SHAPES {
            let x = kind.weights(rows * cols, &mut random);
            for group in GROUPS {
                for grid in grids() {
                    for scale_type in [FloatType::F16, FloatType::F32] {
                        if scale_type == FloatType::F32 || kind.fits_f16() {
                            check(kind, &options(grid, group.min(cols), scale_type, rounding), cols, &x);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn nearest_is_the_textbook_to_the_bit_on_every_instruction_set() {
    let mut checked = 0;
    for_all(Rounding::Nearest, |kind, options, cols, x| {
        // The oracle's sums overflow.
        if kind == Kind::Largest {
            return;
        }
        let expected = oracle(options, cols, x);
        for cpu in Cpu::available() {
            let found = quantize(cpu, options, cols, x);
            assert_eq!(found, expected, "{kind:?}, {options:?}, {cols} columns on {}", cpu.isa());
            checked += 1;
        }
    });
    assert!(checked > 10_000, "{checked}");
}

#[test]
fn the_search_gives_the_same_bytes_on_every_instruction_set() {
    for_all(Rounding::Search, |kind, options, cols, x| {
        let expected = quantize(Cpu::available()[0], options, cols, x);
        for cpu in Cpu::available() {
            let found = quantize(cpu, options, cols, x);
            assert_eq!(found, expected, "{kind:?}, {options:?}, {cols} columns on {}", cpu.isa());
        }
    });
}

#[test]
fn codes_fit_their_grid_and_padding_is_zero() {
    for rounding in [Rounding::Nearest, Rounding::Search] {
        for_all(rounding, |kind, options, cols, x| {
            let packed = quantize(Cpu::detect(), options, cols, x);
            let faulty = bits::invalid_code_row(&options.layout, cols, &packed.codes).or(bits::invalid_zero_row(
                &options.layout,
                cols,
                &packed.zeros,
            ));
            assert_eq!(faulty, None, "{kind:?}, {options:?}, {cols} columns");
        });
    }
}

#[test]
fn every_scale_and_every_weight_is_finite() {
    for rounding in [Rounding::Nearest, Rounding::Search] {
        for_all(rounding, |kind, options, cols, x| {
            let packed = quantize(Cpu::detect(), options, cols, x);
            let scales = packed.scales.len() / options.scale_type.bytes();
            let finite =
                (0..scales).all(|index| reference::float(options.scale_type, &packed.scales, index).is_finite());
            assert!(finite, "{kind:?}, {options:?}, {cols} columns: a scale is not finite");
            let weights = reference::dequantize(&packed.matrix(x.len() / cols, cols, options));
            // At the end of the float range a step past the largest weight overflows; nothing else may.
            let finite = weights.iter().all(|weight| weight.is_finite());
            assert!(finite || kind == Kind::Largest, "{kind:?}, {options:?}, {cols} columns: a weight is not finite");
        });
    }
}

/// What comparing sums of f32 can cost, as a share of the squared norm.
const SLACK: f64 = 1e-6;

#[test]
fn the_search_is_never_worse_than_nearest() {
    // By kind and encoding: how many groups are worse, and the one that is so by most.
    let mut worse: BTreeMap<String, (usize, f64, String)> = BTreeMap::new();
    for_all(Rounding::Search, |kind, search, cols, x| {
        // Squares of the largest floats need care that the two sums do not take; its scales are checked above.
        if kind == Kind::Largest {
            return;
        }
        let nearest = QuantizeOptions { rounding: Rounding::Nearest, ..*search };
        let errors = |options| group_errors(&quantize(Cpu::detect(), options, cols, x), options, cols, x);
        for (found, limit) in errors(search).into_iter().zip(errors(&nearest)) {
            if found.error > limit.error + SLACK * limit.norm + found.stored {
                let (found, limit) = (found.error / found.norm, limit.error / limit.norm);
                let key = format!("{kind:?}, {:?}, {:?} scales", search.layout.grid, search.scale_type);
                let entry = worse.entry(key).or_default();
                entry.0 += 1;
                if found - limit > entry.1 {
                    let text = format!("{found:e} above {limit:e} in groups of {} of {cols}", search.layout.group);
                    (entry.1, entry.2) = (found - limit, text);
                }
            }
        }
    });
    assert!(worse.is_empty(), "{worse:#?}");
}

/// The least squared error of a group over a fine grid of scales, both signs, each with its best zero point, where the
/// scale of least squares replaces the one that chose the codes.
fn brute_force(weights: &[f32], bits: u32, symmetric: bool) -> f64 {
    const STEPS: usize = 1500;
    let top = f64::from((1u32 << bits) - 1);
    let half = f64::from(1u32 << (bits - 1));
    let zeros: Vec<f64> = if symmetric { vec![half] } else { (0..=top as u32).map(f64::from).collect() };
    let largest = weights.iter().fold(0.0, |most: f64, weight| most.max(f64::from(weight.abs())));
    let importance = |weight| importance(Grid::Int { bits, symmetric }, weight);
    let norm: f64 = weights.iter().map(|&weight| importance(weight) * f64::from(weight).powi(2)).sum();
    let mut least = norm;
    for step in 1..=STEPS {
        for sign in [1.0, -1.0] {
            let scale = sign * 2.2 * largest * step as f64 / STEPS as f64;
            for &zero in &zeros {
                let (mut products, mut squares) = (0.0, 0.0);
                for &weight in weights {
                    let (importance, weight) = (importance(weight), f64::from(weight));
                    let level = ((weight / scale).round() + zero).clamp(0.0, top) - zero;
                    products += importance * weight * level;
                    squares += importance * level * level;
                }
                if squares > 0.0 {
                    least = least.min(norm - products * products / squares);
                }
            }
        }
    }
    least
}

fn quantize_calibrated(cpu: Cpu, options: &QuantizeOptions, cols: usize, x: &[f32], squares: &[f32]) -> Packed {
    let mut packed = quantize(cpu, options, cols, x);
    let Packed { codes, scales, zeros } = &mut packed;
    cpu.quantize_rows(options, cols, x, Some(squares), codes, scales, zeros);
    packed
}

#[test]
fn the_calibrated_search_is_never_worse_than_nearest_by_its_measure() {
    let mut random = Random(7);
    let (mut found, mut uncalibrated) = (0.0, 0.0);
    for_all(Rounding::Search, |kind, search, cols, x| {
        if kind == Kind::Largest {
            return;
        }
        // Inputs of very different size, some always zero.
        let mut squares: Vec<f32> = (0..cols).map(|_| 1e-3 * (3.0 * random.normal()).exp()).collect();
        squares.iter_mut().step_by(5).for_each(|square| *square = 0.0);
        let layout = search.layout;
        let errors = |packed: &Packed| {
            let decoded = reference::dequantize(&packed.matrix(x.len() / cols, cols, search));
            let mut groups = Vec::new();
            for (weights, decoded) in x.chunks(cols).zip(decoded.chunks(cols)) {
                for columns in (0..layout.groups(cols)).map(|group| layout.group_range(group, cols)) {
                    let square = |weight: f32| f64::from(weight).powi(2);
                    let mean = weights[columns.clone()].iter().copied().map(square).sum::<f64>() / columns.len() as f64;
                    let (mut error, mut size) = (0.0, 0.0);
                    for column in columns {
                        let importance = f64::from(squares[column]) * (mean + square(weights[column])).sqrt();
                        error += importance * (f64::from(decoded[column]) - f64::from(weights[column])).powi(2);
                        size += importance * square(weights[column]).max(square(decoded[column]));
                    }
                    groups.push((error, size));
                }
            }
            groups
        };
        let calibrated = quantize_calibrated(Cpu::detect(), search, cols, x, &squares);
        for cpu in Cpu::available() {
            let other = quantize_calibrated(cpu, search, cols, x, &squares);
            assert_eq!(other, calibrated, "{kind:?}, {search:?}, {cols} columns on {}", cpu.isa());
        }
        let nearest = quantize(Cpu::detect(), &QuantizeOptions { rounding: Rounding::Nearest, ..*search }, cols, x);
        // What rounding scales to F16 adds is measured for the search without calibration.
        if search.scale_type == FloatType::F16 {
            return;
        }
        for ((error, size), (limit, _)) in errors(&calibrated).into_iter().zip(errors(&nearest)) {
            let limit = limit + 1e-5 * size;
            assert!(error <= limit, "{kind:?}, {search:?}, {cols} columns: {error:e} above {limit:e}");
        }
        if kind == Kind::Normal {
            let plain = quantize(Cpu::detect(), search, cols, x);
            found += errors(&calibrated).iter().map(|(error, _)| error).sum::<f64>();
            uncalibrated += errors(&plain).iter().map(|(error, _)| error).sum::<f64>();
        }
    });
    assert!(found < 0.9 * uncalibrated, "{found:e} against {uncalibrated:e} without calibration");
}

#[test]
fn inputs_that_are_all_zero_leave_the_search_as_it_is() {
    for_all(Rounding::Search, |kind, search, cols, x| {
        let calibrated = quantize_calibrated(Cpu::detect(), search, cols, x, &vec![0.0; cols]);
        let plain = quantize(Cpu::detect(), search, cols, x);
        assert_eq!(calibrated, plain, "{kind:?}, {search:?}, {cols} columns");
    });
}

#[test]
fn the_search_comes_close_to_brute_force() {
    let mut random = Random(3);
    for kind in [Kind::Normal, Kind::HeavyTailed, Kind::AllPositive] {
        for (bits, symmetric) in [(2, true), (2, false), (3, true), (3, false)] {
            for group in [32, 64] {
                let x = kind.weights(24 * group, &mut random);
                let search = options(Grid::Int { bits, symmetric }, group, FloatType::F32, Rounding::Search);
                let packed = quantize(Cpu::detect(), &search, x.len(), &x);
                let found: f64 = group_errors(&packed, &search, x.len(), &x).iter().map(|group| group.error).sum();
                let least: f64 = x.chunks(group).map(|group| brute_force(group, bits, symmetric)).sum();
                let excess = 100.0 * (found / least - 1.0);
                assert!(
                    excess < 5.0,
                    "{kind:?}, {bits} bits, symmetric {symmetric}, group {group}: {excess:.2} % above"
                );
            }
        }
    }
}

/// A float matrix of this type, with what it holds after rounding.
fn floats(dtype: FloatType, values: &[f32]) -> Vec<u8> {
    match dtype {
        FloatType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        FloatType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        FloatType::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

#[test]
fn the_range_counts_what_is_not_finite_and_finds_the_extremes() {
    let mut random = Random(5);
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        for (rows, cols) in [(1, 1), (3, 15), (2, 64), (5, 131), (1, 1000)] {
            for group in [1, 7, 32, 128, usize::MAX] {
                for bad in [0, 1, 20] {
                    let mut values = Kind::HeavyTailed.weights(rows * cols, &mut random);
                    values[..cols.min(40)].fill(0.0);
                    for _ in 0..bad {
                        let index = random.next() as usize % values.len();
                        values[index] = [f32::NAN, f32::INFINITY, -f32::INFINITY][random.next() as usize % 3];
                    }
                    let bytes = floats(dtype, &values);
                    let matrix = Matrix::new(rows, cols, Data::Float { dtype, values: &bytes }).unwrap();
                    let values = reference::dequantize(&matrix);
                    let groups: Vec<f32> = values
                        .chunks(cols)
                        .flat_map(|row| row.chunks(group.min(cols)))
                        .map(|group| group.iter().fold(0f32, |most, value| most.max(value.abs())))
                        .collect();
                    let expected = Range {
                        non_finite: values.iter().filter(|value| !value.is_finite()).count(),
                        largest: groups.iter().copied().fold(0.0, f32::max),
                        smallest: groups.iter().copied().filter(|&most| most > 0.0).fold(f32::INFINITY, f32::min),
                    };
                    for cpu in Cpu::available() {
                        let found = cpu.range(&matrix, 0, rows, group);
                        assert_eq!(found, expected, "{dtype:?} [{rows}, {cols}], group {group} on {}", cpu.isa());
                        let by_row =
                            (0..rows).map(|row| cpu.range(&matrix, row, 1, group)).fold(Range::EMPTY, Range::merge);
                        assert_eq!(by_row, expected);
                    }
                }
            }
        }
    }
}

#[test]
fn the_range_of_nothing_is_empty() {
    let matrix = Matrix::new(0, 64, Data::Float { dtype: FloatType::F32, values: &[] }).unwrap();
    assert_eq!(Cpu::detect().range(&matrix, 0, 0, 32), Range::EMPTY);
}

#[test]
fn given_scales_may_be_negative() {
    let mut random = Random(11);
    let weights = Kind::Normal.weights(200, &mut random);
    for grid in [Grid::Ternary, Grid::Binary, Grid::Int { bits: 4, symmetric: true }] {
        let layout = Layout { grid, group: 50 };
        let options = QuantizeOptions {
            layout,
            scale_type: FloatType::F32,
            rounding: Rounding::Nearest,
            ternary_threshold: THRESHOLD,
        };
        let scales: Vec<f32> = vec![0.02, -0.02, 0.01, -0.03];
        let scale_bytes = floats(FloatType::F32, &scales);
        for cpu in Cpu::available() {
            let mut codes = vec![0; layout.code_bytes(200)];
            cpu.round_rows(&options, 200, &weights, &scale_bytes, &mut codes);
            let (scales, zeros) = (&scale_bytes[..], &[][..]);
            let data = Data::Quantized { layout, codes: &codes, scale_type: FloatType::F32, scales, zeros };
            let matrix = Matrix::new(1, 200, data).unwrap();
            for (i, &weight) in weights.iter().enumerate() {
                let (level, scale) = reference::level(&matrix, 0, i).unwrap();
                let error = |level: i32| (weight - level as f32 * scale).abs();
                let others = if grid == Grid::Binary { [-1, 1] } else { [level - 1, level + 1] };
                for other in others {
                    let reached = match grid {
                        Grid::Int { .. } => (-8..=7).contains(&other),
                        _ => (-1..=1).contains(&other),
                    };
                    assert!(!reached || error(level) <= error(other), "{grid:?}, {i} on {}", cpu.isa());
                }
            }
        }
    }
}
