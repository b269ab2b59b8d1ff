//! Which of ggml's types holds a tensor: the smallest that keeps every value, or else the one that it is rounded to.

use bkpack_kernels::{Cpu, Data, FloatType, Grid, Layout, Matrix, bits, reference};
use half::f16;
use rayon::prelude::*;

use super::{
    Options,
    blocks::{BlockType, minimum_is_exact},
    entry::Piece,
};
use crate::{
    error::Result,
    export::{
        Fidelity,
        plain::{Rounding, TensorRounding},
    },
    format::PackedFile,
    tensor::{Tensor, TensorSource},
};

/// How a tensor is stored in the export.
#[derive(Clone, Debug)]
pub(super) struct Fit {
    pub kind: BlockType,
    /// Whether codes and scales move as they are; else values are dequantized, and rounded to the type.
    pub moved: bool,
    pub fidelity: Fidelity,
}

impl Fit {
    /// F32, which holds every value of every encoding.
    pub(super) fn wide() -> Self {
        Self { kind: BlockType::F32, moved: false, fidelity: Fidelity::Lossless }
    }
}

/// A row of a quantized matrix: the weight of column `i` is `(codes[i] - zeros[g]) * scales[g]` in its group `g`.
#[derive(Default)]
pub(super) struct CodedRow {
    pub codes: Vec<u8>,
    pub zeros: Vec<i32>,
    pub scales: Vec<f32>,
}

impl CodedRow {
    /// Reads a row; `None` of a matrix of plain values.
    pub(super) fn read(&mut self, w: &Matrix, row: usize) -> Option<Layout> {
        let Data::Quantized { layout, codes, scale_type, scales, zeros } = w.data() else { return None };
        let (cols, groups) = (w.cols(), layout.groups(w.cols()));
        let width = layout.code_bytes(cols);
        self.codes.resize(cols, 0);
        bits::unpack_row(layout.grid, &codes[row * width..][..width], &mut self.codes);
        let zeros = &zeros[row * layout.zero_bytes(cols)..];
        let zero = |group: usize| match layout.grid {
            Grid::Int { bits, symmetric: true } => 1 << (bits - 1),
            Grid::Int { bits, symmetric: false } => i32::from(bits::stream_code(zeros, bits, group)),
            Grid::Ternary | Grid::Binary => 1,
        };
        if layout.grid == Grid::Binary {
            // -1 and +1 are the codes 0 and 2 of the ternary grid.
            self.codes.iter_mut().for_each(|code| *code *= 2);
        }
        self.zeros.clear();
        self.zeros.extend((0..groups).map(zero));
        self.scales.clear();
        self.scales.extend((0..groups).map(|group| reference::float(scale_type, scales, row * groups + group)));
        Some(layout)
    }
}

/// Chooses the type for a matrix that is made of these rows. Values are read where the encodings alone do not decide.
///
/// # Errors
/// A tensor that cannot be read.
pub(super) fn fit(packed: &PackedFile, pieces: &[Piece], cols: usize, options: &Options) -> Result<Fit> {
    let mut tensors = Vec::with_capacity(pieces.len());
    for piece in pieces {
        tensors.push((packed.tensor(&piece.tensor)?, piece));
    }
    let all_plain = tensors.iter().all(|(tensor, _)| matches!(tensor.matrix().data(), Data::Float { .. }));
    if all_plain {
        return Ok(plain(&tensors, options, None));
    }
    Ok(match exact(&tensors, cols) {
        Ok(kind) => Fit { kind, moved: true, fidelity: Fidelity::Lossless },
        Err(why) => match options.requantize.then(|| requantized(&tensors, cols)).flatten() {
            Some(kind) => {
                let why = format!("{why}, so it is rounded to {}", kind.name());
                Fit { kind, moved: false, fidelity: Fidelity::Rounded { why } }
            }
            None => plain(&tensors, options, Some(why)),
        },
    })
}

type Pieces<'a, 'b> = [(Tensor<'a>, &'b Piece)];

/// What must be known of codes and scales to choose a type that holds them.
#[derive(Clone, Copy)]
struct Extent {
    lowest: i32,
    highest: i32,
    largest_code: u8,
    /// Every scale is an F16 without loss.
    scales: bool,
    /// Every group's minimum, too.
    minima: bool,
}

impl Extent {
    const NONE: Self = Self { lowest: 0, highest: 0, largest_code: 0, scales: true, minima: true };

    fn and(self, other: Self) -> Self {
        Self {
            lowest: self.lowest.min(other.lowest),
            highest: self.highest.max(other.highest),
            largest_code: self.largest_code.max(other.largest_code),
            scales: self.scales && other.scales,
            minima: self.minima && other.minima,
        }
    }

    /// What the rows of a piece hold. The grid alone tells the levels where there are no zero points.
    fn of(w: &Matrix, piece: &Piece) -> Option<Self> {
        let Data::Quantized { layout, scale_type, .. } = w.data() else { return None };
        let levels = match layout.grid {
            Grid::Int { bits, symmetric: true } => Some((-(1 << (bits - 1)), (1 << (bits - 1)) - 1)),
            Grid::Int { symmetric: false, .. } => None,
            Grid::Ternary | Grid::Binary => Some((-1, 1)),
        };
        if let (Some((lowest, highest)), FloatType::F16) = (levels, scale_type) {
            return Some(Self { lowest, highest, minima: false, ..Self::NONE });
        }
        let of_row = |row: &mut CodedRow, index: usize| {
            row.read(w, index);
            let mut extent = Self::NONE;
            for (group, &scale) in row.scales.iter().enumerate() {
                let codes = &row.codes[layout.group_range(group, w.cols())];
                let (least, most) =
                    codes.iter().fold((u8::MAX, 0), |(low, high), &code| (low.min(code), high.max(code)));
                let (zero, half) = (row.zeros[group], f16::from_f32(scale));
                let exact = half.to_f32().to_bits() == scale.to_bits();
                extent = extent.and(Self {
                    lowest: i32::from(least) - zero,
                    highest: i32::from(most) - zero,
                    largest_code: most,
                    scales: exact,
                    minima: exact && minimum_is_exact(zero, half),
                });
            }
            extent
        };
        let rows = piece.rows.clone().into_par_iter().map_init(CodedRow::default, of_row);
        let mut extent = rows.reduce(|| Self::NONE, Self::and);
        if let Some((lowest, highest)) = levels {
            extent = Self { lowest, highest, minima: false, ..extent };
        }
        Some(extent)
    }
}

/// The smallest type that holds codes and scales as they are; otherwise why there is none.
fn exact(tensors: &Pieces, cols: usize) -> Result<BlockType, String> {
    const BY_SIZE: [BlockType; 6] =
        [BlockType::Tq2_0, BlockType::Q4_0, BlockType::Q4_1, BlockType::Q5_0, BlockType::Q5_1, BlockType::Q8_0];
    const LEAST: usize = 32;
    let mut extent = Extent::NONE;
    // Columns of the largest block that no group ends within.
    let mut aligned = 256;
    for (tensor, _) in tensors {
        let Data::Quantized { layout, .. } = tensor.matrix().data() else {
            return Err("other experts of this layer are not quantized".into());
        };
        let whole =
            |block: usize| cols.is_multiple_of(block) && (layout.group >= cols || layout.group.is_multiple_of(block));
        if !cols.is_multiple_of(LEAST) {
            return Err(format!("rows of {cols} columns are no whole blocks of {LEAST}"));
        }
        if !whole(LEAST) {
            return Err(format!("groups of {} columns are no whole blocks of {LEAST}", layout.group));
        }
        if !whole(aligned) {
            aligned = LEAST;
        }
    }
    for (tensor, piece) in tensors {
        extent = extent.and(Extent::of(&tensor.matrix(), piece).unwrap_or(Extent::NONE));
    }
    if !extent.scales {
        return Err("its scales need F32, which no block type has".into());
    }
    let holds = |kind: &BlockType| {
        let levels = kind.levels().is_some_and(|(low, high)| low <= extent.lowest && extent.highest <= high);
        let codes = kind.codes().is_some_and(|most| extent.minima && extent.largest_code <= most);
        kind.columns() <= aligned && (levels || codes)
    };
    BY_SIZE.into_iter().find(holds).ok_or_else(|| {
        let Extent { lowest, highest, .. } = extent;
        format!("no block type holds codes from {lowest} to {highest} around their zero points")
    })
}

/// The type that values are rounded to instead of F16; `None` where the rows are no whole blocks of any.
fn requantized(tensors: &Pieces, cols: usize) -> Option<BlockType> {
    let bits = |tensor: &Tensor| match tensor.matrix().data() {
        Data::Quantized { layout: Layout { grid: Grid::Int { bits, .. }, .. }, .. } => bits,
        Data::Quantized { .. } => 2,
        Data::Float { .. } => 8,
    };
    let kind = match tensors.iter().map(|(tensor, _)| bits(tensor)).max()? {
        ..=4 if cols.is_multiple_of(256) => BlockType::Q4K,
        ..=4 => BlockType::Q5_0,
        ..=6 if cols.is_multiple_of(256) => BlockType::Q6K,
        _ => BlockType::Q8_0,
    };
    // A block's scale is an F16 no larger than its largest weight, and as small as a four-thousandth of it.
    const LEAST: f32 = 1.0 / 256.0;
    let largest = rounding(tensors, FloatType::F16).largest;
    let fits = cols.is_multiple_of(kind.columns()) && (LEAST..=f16::MAX.to_f32()).contains(&largest);
    fits.then_some(kind)
}

/// The float type for values that are plain, or that no block type holds, which `why` says.
fn plain(tensors: &Pieces, options: &Options, why: Option<String>) -> Fit {
    let is = |wanted: FloatType| {
        tensors.iter().all(|(tensor, _)| matches!(tensor.matrix().data(), Data::Float { dtype, .. } if dtype == wanted))
    };
    let dtype = options.dtype.unwrap_or(if is(FloatType::BF16) { FloatType::BF16 } else { FloatType::F16 });
    let kind = BlockType::from(dtype);
    let verdict = match dtype {
        dtype if is(dtype) => Rounding::Exact,
        dtype => rounding(tensors, dtype).verdict(dtype),
    };
    let fidelity = match verdict {
        Rounding::Exact => Fidelity::Lossless,
        Rounding::Vanishes(_) | Rounding::Overflows(_) => return Fit::wide(),
        Rounding::Rounded => Fidelity::Rounded {
            why: match why {
                Some(why) => format!("{why}, so it is rounded to {}", kind.name()),
                None => format!("rounded to {}", kind.name()),
            },
        },
    };
    Fit { kind, moved: false, fidelity }
}

/// What a float type makes of the values.
fn rounding(tensors: &Pieces, to: FloatType) -> TensorRounding {
    let cpu = Cpu::detect();
    let none = || TensorRounding::NONE;
    let of_piece = |(tensor, piece): &(Tensor, &Piece)| {
        let w = tensor.matrix();
        let of_row = |values: &mut Vec<f32>, row: usize| {
            values.resize(w.cols(), 0.0);
            cpu.dequantize(&w, row, values);
            TensorRounding::of(values, to)
        };
        piece.rows.clone().into_par_iter().map_init(Vec::new, of_row).reduce(none, TensorRounding::merge)
    };
    tensors.iter().map(of_piece).fold(none(), TensorRounding::merge)
}
