//! From weights to codes and scales: round-to-nearest, or the scale that a search finds.

use half::f16;

use super::{
    Cpu, Kernel,
    scale_search::{Group, magnitude_sum, search_asymmetric, search_symmetric, search_ternary, weighted_mean},
    simd::{LANES, Simd},
};
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

/// How scales and codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rounding {
    /// The scale is the largest magnitude over the largest code (ternary, binary: the mean magnitude); codes are the
    /// nearest.
    Nearest,
    /// The scale of integers is searched for the least squared error of the group, each error weighted by the
    /// magnitude of its weight: large weights tend to meet large activations, and clipping them costs the most. The
    /// scale of ternary weights is searched for the least squared error. Where the mean square `d` of each input is known,
    /// errors are weighted by `d * sqrt(mean of w^2 + w^2)` instead, for every grid, as llama.cpp does.
    Search,
}

/// Everything that decides the codes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizeOptions {
    pub layout: Layout,
    /// F16 or F32: scales are rounded to it before codes are chosen.
    pub scale_type: FloatType,
    pub rounding: Rounding,
    /// A ternary weight is zero below this share of its scale.
    pub ternary_threshold: f32,
}

/// What a look at every weight of a matrix tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// How many values are NaN or infinite.
    pub non_finite: usize,
    /// The largest magnitude of all groups.
    pub largest: f32,
    /// The smallest among the largest magnitudes of the groups that are not all zero; infinite if all are.
    pub smallest: f32,
}

impl Range {
    /// The range of nothing.
    pub const EMPTY: Range = Range { non_finite: 0, largest: 0.0, smallest: f32::INFINITY };

    /// The range of two pieces together.
    pub fn merge(self, other: Range) -> Range {
        Range {
            non_finite: self.non_finite + other.non_finite,
            largest: self.largest.max(other.largest),
            smallest: self.smallest.min(other.smallest),
        }
    }
}

impl Cpu {
    /// The range of `count` rows of a float matrix from `first_row` on, in groups of `group` columns.
    ///
    /// # Panics
    /// If the matrix is quantized or the rows are not there.
    pub fn range(self, matrix: &Matrix, first_row: usize, count: usize, group: usize) -> Range {
        let Data::Float { dtype, values } = matrix.data() else { panic!("ranges are of float matrices") };
        let row_bytes = matrix.cols() * dtype.bytes();
        let rows = &values[first_row * row_bytes..(first_row + count) * row_bytes];
        self.dispatch(ScanRange { rows, row_bytes, dtype, group })
    }

    /// Quantizes rows `x` `[rows, cols]` into `codes` `[rows, code_bytes]`, `scales` `[rows, groups]` and `zeros`
    /// `[rows, zero_bytes]`. All values must be finite. Runs on the calling thread.
    ///
    /// `input_squares` `[cols]` is what [`Rounding::Search`] weights errors by where it is known: the mean square of each
    /// input, up to a common factor, finite and not negative. A group whose inputs are all zero is searched as without.
    ///
    /// # Panics
    /// If a length does not fit the layout.
    #[expect(clippy::too_many_arguments, reason = "three inputs and three outputs")]
    pub fn quantize_rows(
        self,
        options: &QuantizeOptions,
        cols: usize,
        x: &[f32],
        input_squares: Option<&[f32]>,
        codes: &mut [u8],
        scales: &mut [u8],
        zeros: &mut [u8],
    ) {
        if cols > 0 {
            self.dispatch(QuantizeRows { options, cols, x, input_squares, given: false, codes, scales, zeros });
        }
    }

    /// Chooses the codes of rows `x` `[rows, cols]` on scales `[rows, groups]` that are given as they are stored, whatever
    /// [`QuantizeOptions::rounding`] says; the grid has no zero points. All values must be finite. Runs on the calling
    /// thread.
    ///
    /// # Panics
    /// If a length does not fit the layout, the grid has zero points, or scales are BF16, which no encoding has.
    pub fn round_rows(self, options: &QuantizeOptions, cols: usize, x: &[f32], scales: &[u8], codes: &mut [u8]) {
        assert!(!options.layout.grid.has_zero_points(), "zero points are not given");
        assert!(options.scale_type != FloatType::BF16, "scales are F16 or F32");
        if cols > 0 {
            let (mut scales, input_squares, zeros) = (scales.to_vec(), None, &mut [][..]);
            let scales = &mut scales[..];
            self.dispatch(QuantizeRows { options, cols, x, input_squares, given: true, codes, scales, zeros });
        }
    }
}

struct ScanRange<'a> {
    rows: &'a [u8],
    row_bytes: usize,
    dtype: FloatType,
    group: usize,
}

impl Kernel for ScanRange<'_> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        match self.dtype {
            FloatType::F32 => self.scan::<S, WideF32, 64>(s),
            FloatType::F16 => self.scan::<S, WideF16, 32>(s),
            FloatType::BF16 => self.scan::<S, WideBF16, 32>(s),
        }
    }
}

/// Loads 16 stored values, which take `BYTES`. A trait, since a closure would not be compiled with the CPU's features.
trait Wide<const BYTES: usize> {
    fn load<S: Simd>(s: S, from: &[u8; BYTES]) -> S::F32;
}

struct WideF32;
struct WideF16;
struct WideBF16;

impl Wide<64> for WideF32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u8; 64]) -> S::F32 {
        s.load_f32(from)
    }
}

impl Wide<32> for WideF16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u8; 32]) -> S::F32 {
        s.load_f16(from)
    }
}

impl Wide<32> for WideBF16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u8; 32]) -> S::F32 {
        s.load_bf16(from)
    }
}

/// Magnitudes seen so far, lane by lane, and how many of them were not finite.
struct Seen<S: Simd> {
    largest: S::F32,
    bad: S::F32,
}

impl<S: Simd> Seen<S> {
    #[inline(always)]
    fn look(&mut self, s: S, values: S::F32) {
        let magnitude = s.abs(values);
        self.bad = s.add(self.bad, s.select_ge(s.splat(f32::MAX), magnitude, s.splat(0.0), s.splat(1.0)));
        self.largest = s.max(magnitude, self.largest);
    }
}

impl ScanRange<'_> {
    #[inline(always)]
    fn scan<S: Simd, W: Wide<BYTES>, const BYTES: usize>(&self, s: S) -> Range {
        let mut range = Range::EMPTY;
        if self.row_bytes == 0 {
            return range;
        }
        let group_bytes = self.group.saturating_mul(BYTES / LANES);
        for row in self.rows.chunks_exact(self.row_bytes) {
            for group in row.chunks(group_bytes) {
                let mut seen = Seen::<S> { largest: s.splat(0.0), bad: s.splat(0.0) };
                let (full, tail) = group.as_chunks::<BYTES>();
                for bytes in full {
                    seen.look(s, W::load(s, bytes));
                }
                if !tail.is_empty() {
                    let mut padded = [0; BYTES];
                    padded[..tail.len()].copy_from_slice(tail);
                    seen.look(s, W::load(s, &padded));
                }
                let largest = s.max_lane(seen.largest);
                range.largest = range.largest.max(largest);
                if largest > 0.0 {
                    range.smallest = range.smallest.min(largest);
                }
                // Counted in f32: exact up to 2^24 in a group, and never zero where there is one.
                range.non_finite += s.sum(seen.bad) as usize;
            }
        }
        range
    }
}

struct QuantizeRows<'a> {
    options: &'a QuantizeOptions,
    cols: usize,
    x: &'a [f32],
    input_squares: Option<&'a [f32]>, // [cols]
    /// Whether `scales` holds the scales already.
    given: bool,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zeros: &'a mut [u8],
}

/// A group's outcome: its scale as stored, and its zero point.
struct GroupScale {
    scale: f32,
    zero: u8,
}

impl Kernel for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { options, cols, x, input_squares, given, codes, scales, zeros } = self;
        let layout = options.layout;
        let (groups, code_bytes, zero_bytes) = (layout.groups(cols), layout.code_bytes(cols), layout.zero_bytes(cols));
        let scale_bytes = groups * options.scale_type.bytes();
        let rows = x.len() / cols;
        assert_eq!(x.len(), rows * cols);
        assert_eq!(
            (codes.len(), scales.len(), zeros.len()),
            (rows * code_bytes, rows * scale_bytes, rows * zero_bytes)
        );
        assert!(input_squares.is_none_or(|squares| squares.len() == cols));

        // One row of unpacked codes, with room for the whole vectors that the last group is written in.
        let mut row_codes = vec![0u8; cols.next_multiple_of(64) + LANES];
        let mut row_zeros = vec![0u8; groups.next_multiple_of(64)];
        let mut padded: Vec<[f32; LANES]> = vec![[0.0; LANES]; layout.group.min(cols).div_ceil(LANES)];
        let mut importance = padded.clone();
        for row in 0..rows {
            for (group, row_zero) in row_zeros[..groups].iter_mut().enumerate() {
                let columns = layout.group_range(group, cols);
                let weights = &x[row * cols..][columns.clone()];
                let (full, tail) = weights.as_chunks::<LANES>();
                let weights: &[[f32; LANES]] = if tail.is_empty() {
                    full
                } else {
                    let padded = &mut padded[..full.len() + 1];
                    padded[..full.len()].copy_from_slice(full);
                    padded[full.len()] = [0.0; LANES];
                    padded[full.len()][..tail.len()].copy_from_slice(tail);
                    padded
                };
                let count = columns.len();
                let place = (row * groups + group) * options.scale_type.bytes();
                // Whole vectors: what runs into the next group is overwritten by it.
                let target = columns.start..columns.start + weights.len() * LANES;
                if given {
                    let scale = match options.scale_type {
                        FloatType::F32 => f32::from_le_bytes(std::array::from_fn(|byte| scales[place + byte])),
                        _ => f16::from_le_bytes([scales[place], scales[place + 1]]).to_f32(),
                    };
                    let chosen = GroupScale { scale, zero: symmetric_zero(layout.grid) };
                    write_codes(s, options, weights, &chosen, &mut row_codes[target]);
                    continue;
                }
                let (low, high) = extremes(s, weights);
                let unit = unit(high.max(-low));
                let ends = (low * unit, high * unit);
                let scaled: Vec<[f32; LANES]>;
                let moderate = if unit == 1.0 {
                    weights
                } else {
                    scaled = weights.iter().map(|lanes| lanes.map(|weight| weight * unit)).collect();
                    &scaled
                };
                let importance = &mut importance[..weights.len()];
                if options.rounding == Rounding::Search {
                    let squares = input_squares.map(|squares| &squares[columns.clone()]);
                    weigh(s, layout.grid, moderate, squares, count, importance);
                }
                let chosen = choose_scale(s, options, Group { weights: moderate, importance }, ends, count, unit);
                write_codes(s, options, weights, &chosen, &mut row_codes[target]);
                *row_zero = chosen.zero;
                match options.scale_type {
                    FloatType::F32 => scales[place..place + 4].copy_from_slice(&chosen.scale.to_le_bytes()),
                    _ => scales[place..place + 2].copy_from_slice(&f16::from_f32(chosen.scale).to_le_bytes()),
                }
            }
            row_codes[cols..].fill(0);
            let packed = &mut codes[row * code_bytes..(row + 1) * code_bytes];
            match layout.grid.stream_bits() {
                Some(bits) => pack_row(s, &row_codes, bits, packed),
                None => crate::bits::pack_ternary(&row_codes[..cols], packed),
            }
            if let Grid::Int { bits, symmetric: false } = layout.grid {
                pack_row(s, &row_zeros, bits, &mut zeros[row * zero_bytes..(row + 1) * zero_bytes]);
            }
        }
    }
}

/// Packs a row of codes, zero after its end, into a dense stream.
#[inline(always)]
pub(super) fn pack_row<S: Simd>(s: S, codes: &[u8], bits: u32, packed: &mut [u8]) {
    let step = 8 * bits as usize;
    let mut blocks = packed.chunks_exact_mut(step);
    let mut index = 0;
    let (blocks_of_codes, _) = codes.as_chunks::<64>();
    for block in &mut blocks {
        s.pack64(&blocks_of_codes[index], bits, block);
        index += 1;
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        let mut last = [0; 64];
        s.pack64(&blocks_of_codes[index], bits, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// The power of two that a group with this largest magnitude is multiplied by, so that neither its sums nor their
/// squares overflow or vanish: 1 unless it is extreme.
fn unit(largest: f32) -> f32 {
    const MODERATE: i32 = 40;
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    if largest == 0.0 || exponent.abs() <= MODERATE {
        return 1.0;
    }
    // The power of two with the opposite exponent, kept among the normal numbers.
    f32::from_bits(((127 - exponent).clamp(1, 253) as u32) << 23)
}

/// Rounds a scale to the type that it is stored in; one that is not zero stays so.
fn stored_scale(scale: f32, scale_type: FloatType) -> f32 {
    if scale_type == FloatType::F32 || scale == 0.0 {
        return scale.clamp(-f32::MAX, f32::MAX);
    }
    let rounded = f16::from_f32(scale).to_f32().clamp(-f16::MAX.to_f32(), f16::MAX.to_f32());
    if rounded == 0.0 { f16::from_bits(1).to_f32().copysign(scale) } else { rounded }
}

/// How much the error of each weight counts in the search, which see [`Rounding::Search`].
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    grid: Grid,
    weights: &[[f32; LANES]],
    input_squares: Option<&[f32]>,
    count: usize,
    importance: &mut [[f32; LANES]],
) {
    let largest = input_squares.map_or(0.0, |squares| squares.iter().copied().fold(0.0, f32::max));
    let flat = importance.as_flattened_mut();
    flat[count..].fill(0.0);
    let mut variance = s.splat(0.0);
    for weight in weights {
        variance = s.mul_add(s.load(weight), s.load(weight), variance);
    }
    let variance = s.sum(variance) / count as f32;
    match (input_squares, grid) {
        (Some(squares), _) if largest > 0.0 && variance > 0.0 => {
            // The largest square counts 1, so that no sum overflows or vanishes.
            for ((importance, weight), square) in flat.iter_mut().zip(weights.as_flattened()).zip(squares) {
                *importance = square / largest * (variance + weight * weight).sqrt();
            }
        }
        (_, Grid::Int { .. }) => {
            for (weight, importance) in weights.iter().zip(importance) {
                s.store(s.abs(s.load(weight)), importance);
            }
        }
        (_, Grid::Ternary | Grid::Binary) => flat[..count].fill(1.0),
    }
}

/// The code of zero on a grid without zero points.
fn symmetric_zero(grid: Grid) -> u8 {
    match grid {
        Grid::Int { bits, .. } => 1 << (bits - 1),
        Grid::Ternary | Grid::Binary => 0,
    }
}

/// The scale of weights that were multiplied by `unit`, and their zero point. `low` and `high` are their extremes.
#[inline(always)]
fn choose_scale<S: Simd>(
    s: S,
    options: &QuantizeOptions,
    group: Group,
    (low, high): (f32, f32),
    count: usize,
    unit: f32,
) -> GroupScale {
    let largest = high.max(-low);
    let search = options.rounding == Rounding::Search;
    let (scale, zero) = match options.layout.grid {
        Grid::Int { bits, symmetric: true } => {
            let half = 1 << (bits - 1);
            let nearest = largest / (half - 1) as f32;
            let scale = if search { search_symmetric(s, group, bits, low, high) } else { nearest };
            (scale, half as u8)
        }
        Grid::Int { bits, symmetric: false } => {
            let top = ((1u32 << bits) - 1) as f32;
            let scale = stored_scale((high - low) / top / unit, options.scale_type) * unit;
            if scale == 0.0 {
                (0.0, 0)
            } else if search {
                search_asymmetric(s, group, bits, low, high)
            } else {
                (scale, (-low / scale).round_ties_even().clamp(0.0, top) as u8)
            }
        }
        Grid::Ternary if search => (search_ternary(s, group, count, options.ternary_threshold), 0),
        Grid::Binary if search => (weighted_mean(s, group), 0),
        Grid::Ternary | Grid::Binary => (magnitude_sum(s, group.weights) / count as f32, 0),
    };
    GroupScale { scale: stored_scale(scale / unit, options.scale_type), zero }
}

#[inline(always)]
fn write_codes<S: Simd>(
    s: S,
    options: &QuantizeOptions,
    weights: &[[f32; LANES]],
    chosen: &GroupScale,
    codes: &mut [u8],
) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    // A scale that was given may be negative.
    let sign = s.splat(1f32.copysign(chosen.scale));
    let codes = codes.as_chunks_mut::<LANES>().0;
    match options.layout.grid {
        Grid::Int { bits, .. } => {
            if chosen.scale == 0.0 {
                codes.iter_mut().for_each(|code| *code = [chosen.zero; LANES]);
                return;
            }
            let (scale, offset) = (s.splat(chosen.scale), s.splat(chosen.zero.into()));
            let top = s.splat(((1u32 << bits) - 1) as f32);
            for (weight, code) in weights.iter().zip(codes) {
                let level = s.add(s.round_even(s.div(s.load(weight), scale)), offset);
                *code = s.to_u8(s.min(s.max(level, zero), top));
            }
        }
        Grid::Ternary => {
            let scale = chosen.scale.abs();
            let threshold = s.splat(if scale == 0.0 { f32::INFINITY } else { options.ternary_threshold * scale });
            for (weight, code) in weights.iter().zip(codes) {
                let weight = s.mul(s.load(weight), sign);
                let above = s.select_ge(weight, threshold, one, zero);
                let below = s.select_ge(s.neg(weight), threshold, one, zero);
                *code = s.to_u8(s.sub(s.add(one, above), below));
            }
        }
        Grid::Binary => {
            for (weight, code) in weights.iter().zip(codes) {
                *code = s.to_u8(s.select_ge(s.mul(s.load(weight), sign), zero, one, zero));
            }
        }
    }
}

/// Smallest and largest weight, zero included.
#[inline(always)]
fn extremes<S: Simd>(s: S, weights: &[[f32; LANES]]) -> (f32, f32) {
    let (mut low, mut high) = (s.splat(0.0), s.splat(0.0));
    for weight in weights {
        let weight = s.load(weight);
        low = s.min(weight, low);
        high = s.max(weight, high);
    }
    (s.min_lane(low), s.max_lane(high))
}
