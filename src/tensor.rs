//! Tensors as they are stored: types, shapes, and the one trait behind which models and checkpoints look alike.

pub mod mixed;

use std::{borrow::Cow, cmp::Ordering, collections::HashSet, path::Path};

use bkpack_kernels::{Data, FloatType, Layout, Matrix, MatrixError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// A stored tensor: borrowed from a memory map where possible.
///
/// Its shape is seen as a matrix whose columns are the last dimension and whose rows are all others together.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    shape: Vec<usize>,
    data: TensorData<'a>,
}

/// The bytes of a stored tensor.
#[derive(Clone, Debug)]
pub enum TensorData<'a> {
    /// Plain values, row-major, little-endian.
    Float { dtype: FloatType, values: Cow<'a, [u8]> },
    /// Codes with group-wise scales; see [`Data::Quantized`].
    Quantized {
        layout: Layout,
        codes: Cow<'a, [u8]>,
        scale_type: FloatType,
        scales: Cow<'a, [u8]>,
        zeros: Cow<'a, [u8]>,
    },
}

impl<'a> Tensor<'a> {
    /// Checks that the bytes fit the shape.
    pub fn new(shape: Vec<usize>, data: TensorData<'a>) -> Result<Self, MatrixError> {
        let tensor = Self { shape, data };
        checked_elements(&tensor.shape).ok_or(MatrixError::Overflow)?;
        tensor.view()?;
        Ok(tensor)
    }

    /// A tensor of F32 values, on little-endian machines borrowed.
    ///
    /// # Panics
    /// If the values do not fill the shape.
    pub fn floats(shape: Vec<usize>, values: &'a [f32]) -> Self {
        let values = match cfg!(target_endian = "little") {
            true => Cow::Borrowed(bytemuck::cast_slice(values)),
            false => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        };
        Self::new(shape, TensorData::Float { dtype: FloatType::F32, values }).expect("the values fill the shape")
    }

    /// The same tensor, its bytes borrowed from this one.
    pub fn borrowed(&self) -> Tensor<'_> {
        fn borrow(bytes: &[u8]) -> Cow<'_, [u8]> {
            Cow::Borrowed(bytes)
        }
        let data = match &self.data {
            TensorData::Float { dtype, values } => TensorData::Float { dtype: *dtype, values: borrow(values) },
            TensorData::Quantized { layout, codes, scale_type, scales, zeros } => TensorData::Quantized {
                layout: *layout,
                codes: borrow(codes),
                scale_type: *scale_type,
                scales: borrow(scales),
                zeros: borrow(zeros),
            },
        };
        Tensor { shape: self.shape.clone(), data }
    }

    /// Its dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its stored bytes.
    pub fn data(&self) -> &TensorData<'a> {
        &self.data
    }

    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor as the kernels see it: `[rows, last dimension]`; a vector is one row, a scalar `[1, 1]`.
    pub fn matrix(&self) -> Matrix<'_> {
        self.view().expect("lengths were checked when the tensor was made")
    }

    /// [`matrix`](Self::matrix) for as long as the bytes live; `None` where some of them are the tensor's own.
    pub fn borrowed_matrix(&self) -> Option<Matrix<'a>> {
        let data = match &self.data {
            TensorData::Float { dtype, values: Cow::Borrowed(values) } => Data::Float { dtype: *dtype, values },
            TensorData::Quantized {
                layout,
                codes: Cow::Borrowed(codes),
                scale_type,
                scales: Cow::Borrowed(scales),
                zeros: Cow::Borrowed(zeros),
            } => Data::Quantized { layout: *layout, codes, scale_type: *scale_type, scales, zeros },
            _ => return None,
        };
        let (rows, cols) = matrix_shape(&self.shape);
        Some(Matrix::new(rows, cols, data).expect("lengths were checked when the tensor was made"))
    }

    /// Cuts the tensor's matrix into `parts` of equally many rows, first rows first.
    ///
    /// # Panics
    /// If the rows are no multiple of `parts`.
    pub fn split(self, parts: usize) -> Vec<Tensor<'a>> {
        let (rows, cols) = matrix_shape(&self.shape);
        assert!(parts > 0 && rows.is_multiple_of(parts), "{rows} rows cannot be cut into {parts} parts");
        let piece = |bytes: &Cow<'a, [u8]>, part: usize| {
            let length = bytes.len() / parts;
            match bytes {
                Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[part * length..][..length]),
                Cow::Owned(bytes) => Cow::Owned(bytes[part * length..][..length].to_vec()),
            }
        };
        let data = |part: usize| match &self.data {
            TensorData::Float { dtype, values } => TensorData::Float { dtype: *dtype, values: piece(values, part) },
            TensorData::Quantized { layout, codes, scale_type, scales, zeros } => TensorData::Quantized {
                layout: *layout,
                codes: piece(codes, part),
                scale_type: *scale_type,
                scales: piece(scales, part),
                zeros: piece(zeros, part),
            },
        };
        (0..parts).map(|part| Tensor { shape: vec![rows / parts, cols], data: data(part) }).collect()
    }

    fn view(&self) -> Result<Matrix<'_>, MatrixError> {
        let (rows, cols) = matrix_shape(&self.shape);
        let data = match &self.data {
            TensorData::Float { dtype, values } => Data::Float { dtype: *dtype, values },
            TensorData::Quantized { layout, codes, scale_type, scales, zeros } => {
                Data::Quantized { layout: *layout, codes, scale_type: *scale_type, scales, zeros }
            }
        };
        Matrix::new(rows, cols, data)
    }
}

/// Rows and columns of a shape: the last dimension is the columns.
pub fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match shape.split_last() {
        Some((cols, rest)) => (rest.iter().product(), *cols),
        None => (1, 1),
    }
}

/// The number of elements of a shape; `None` where it overflows.
pub fn checked_elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &dimension| product.checked_mul(dimension))
}

/// Whatever holds named tensors: a checkpoint in any file format, or a packed file.
pub trait TensorSource: Send + Sync {
    /// Where it lies; errors name it.
    fn path(&self) -> &Path;

    /// The model's config.json, where there is one.
    fn config(&self) -> Option<&Value>;

    /// Every tensor's name, in [`natural_order`].
    fn names(&self) -> &[String];

    /// The shape of a tensor; `None` if there is no such tensor.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// A tensor's stored bytes, borrowed where the format allows it.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>>;

    /// A file that belongs to the model (tokenizer.json, ...); `None` if it has none of that name.
    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>>;

    /// Bytes on disk, everything counted.
    fn file_bytes(&self) -> u64;

    /// What the user should know of how it was read, a sentence each.
    fn notices(&self) -> &[String] {
        &[]
    }

    /// Which half of a complex tensor this tensor is; `None` if it is real through and through.
    fn complex_part(&self, _name: &str) -> Option<ComplexPart> {
        None
    }

    /// Scales for quantized activations, where the model carries any.
    fn activations(&self) -> &[ActivationQuantization] {
        &[]
    }

    /// The number of weights: the elements of all tensors but the scales of activations. One that is tied is stored, and
    /// counted, once.
    fn parameters(&self) -> u64 {
        let scales: HashSet<&String> = self.activations().iter().flat_map(|record| &record.scales).collect();
        let weights = self.names().iter().filter(|name| !scales.contains(name));
        weights.filter_map(|name| self.shape(name)).map(|shape| shape.iter().product::<usize>() as u64).sum()
    }
}

/// Which half of a complex tensor `X` a real tensor holds; the tensor is named `X.real` or `X.imag`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComplexPart {
    Real,
    Imaginary,
}

impl ComplexPart {
    /// What the half's name adds to the complex tensor's.
    pub const fn suffix(self) -> &'static str {
        match self {
            ComplexPart::Real => ".real",
            ComplexPart::Imaginary => ".imag",
        }
    }

    /// The half that belongs to this one.
    pub const fn other(self) -> Self {
        match self {
            ComplexPart::Real => ComplexPart::Imaginary,
            ComplexPart::Imaginary => ComplexPart::Real,
        }
    }
}

/// How the activations of one component are quantized. The JSON form is part of the format.
///
/// A value `x` at position `p` of a window becomes `clamp(round_half_even(x / s), -L, L) * s`, where
/// `L = 2^(bits - 1) - 1` and `s` is the scale of the value's row and of column `p / group_size`; where `s` is zero it
/// becomes zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationQuantization {
    /// `bk_core`: v, Re G and Im G of each ResNet-BK layer.
    pub component: String,
    /// 4 or 8.
    pub bits: u32,
    /// Positions that share a scale.
    pub group_size: u64,
    /// Positions that have a scale.
    pub positions: u64,
    /// Windows of the calibration text that the scales come from.
    pub samples: u64,
    /// The calibration text.
    pub text: CalibrationText,
    /// The F32 tensors of the scales, one a layer: the layer's name and `.activation_scale`; rows v, Re G, Im G.
    pub scales: Vec<String>, // each [3, groups]
}

impl ActivationQuantization {
    /// Columns of a tensor of scales.
    ///
    /// # Panics
    /// If the group size is 0, which no record of an opened model has.
    pub fn groups(&self) -> u64 {
        self.positions.div_ceil(self.group_size)
    }
}

/// A text that something was calibrated on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationText {
    pub name: String,
    /// Of its bytes, in lowercase hex.
    pub blake3: String,
}

impl CalibrationText {
    /// The record of a text file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn of(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, blake3: blake3::hash(&bytes).to_hex().to_string() })
    }
}

/// Orders names as people count: runs of digits by value, so `layers.2` comes before `layers.10`.
pub fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.as_bytes(), b.as_bytes());
    loop {
        match (left.first(), right.first()) {
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (x_run, x_rest) = digits(left);
                let (y_run, y_rest) = digits(right);
                let by_value = (x_run.len(), x_run).cmp(&(y_run.len(), y_run));
                if by_value != Ordering::Equal {
                    return by_value;
                }
                (left, right) = (x_rest, y_rest);
            }
            (Some(x), Some(y)) if x == y => (left, right) = (&left[1..], &right[1..]),
            (None, None) => return a.cmp(b),
            (x, y) => return x.cmp(&y),
        }
    }
}

/// The leading run of digits without its leading zeros, and what follows.
fn digits(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let start = text[..end].iter().position(|&byte| byte != b'0').unwrap_or(end);
    (&text[start..end], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ordered_as_people_count() {
        let mut names = ["layers.10.w", "layers.2.w", "embed", "layers.2.a", "layers.02.w", "layers"];
        names.sort_by(|a, b| natural_order(a, b));
        assert_eq!(names, ["embed", "layers", "layers.2.a", "layers.02.w", "layers.2.w", "layers.10.w"]);
    }

    #[test]
    fn a_tensor_whose_bytes_do_not_fit_is_refused() {
        let values = Cow::Borrowed(&[0u8; 12][..]);
        assert!(Tensor::new(vec![2, 2], TensorData::Float { dtype: FloatType::F32, values }).is_err());
    }
}
