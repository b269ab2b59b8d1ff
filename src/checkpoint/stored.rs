//! A tensor as a file stores it: where its bytes are, in which type and order, and how they are read.

use std::{borrow::Cow, collections::HashMap, ops::Range, path::Path, sync::Arc};

use super::{
    archive::{Deflated, Stored},
    dtype::{Element, Strided, gather},
};
use crate::{
    error::{Error, Result, short},
    tensor::{ComplexPart, checked_elements},
};

/// How often the bytes of a file may be seen through its tensors, on average: tied weights are stored once and named
/// once for each place that uses them, in some models for each layer.
const MOST_SHARING: u64 = 16;

/// One tensor of a file.
#[derive(Clone, Debug)]
pub(super) struct StoredTensor {
    pub name: String,
    pub shape: Vec<usize>,
    /// The stored number, or each half of a complex one.
    pub element: Element,
    /// Whether a value is two elements, the real part first.
    pub complex: bool,
    pub big_endian: bool,
    pub place: Place,
    /// Byte of the first value within its place.
    pub start: usize,
    /// Bytes from one value to the next in each dimension; `None` for row-major order without gaps.
    pub strides: Option<Vec<usize>>,
}

/// Bytes of a file.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// A stretch of the file itself.
    Mapped(Range<usize>),
    /// A member of an archive, stored as it is.
    Stored(Arc<Stored>),
    /// A compressed member of an archive.
    Deflated(Deflated),
}

impl Place {
    /// Bytes that can be read there.
    pub fn len(&self) -> usize {
        match self {
            Place::Mapped(range) => range.len(),
            Place::Stored(member) => member.range.len(),
            Place::Deflated(member) => member.size,
        }
    }

    /// Where its first byte lies in the file.
    fn start(&self) -> usize {
        match self {
            Place::Mapped(range) => range.start,
            Place::Stored(member) => member.range.start,
            Place::Deflated(member) => member.range.start,
        }
    }

    /// The bytes, borrowed from the file where they are stored as they are.
    ///
    /// # Errors
    /// A sentence about a member of an archive that is broken.
    pub fn read<'a>(&self, file: &'a [u8]) -> Result<Cow<'a, [u8]>, String> {
        match self {
            Place::Mapped(range) => Ok(Cow::Borrowed(&file[range.clone()])),
            Place::Stored(member) => member.read(file).map(Cow::Borrowed),
            Place::Deflated(member) => member.inflate(file).map(Cow::Owned),
        }
    }

    /// The first bytes, at most `limit` of them, checked against no CRC.
    ///
    /// # Errors
    /// As [`Place::read`].
    pub fn head<'a>(&self, file: &'a [u8], limit: usize) -> Result<Cow<'a, [u8]>, String> {
        let range = match self {
            Place::Mapped(range) => range,
            Place::Stored(member) => &member.range,
            Place::Deflated(member) => return member.inflate_head(file, limit).map(Cow::Owned),
        };
        Ok(Cow::Borrowed(&file[range.start..range.end.min(range.start.saturating_add(limit))]))
    }
}

impl StoredTensor {
    /// Checks that every value lies within the place, and that there are no more of them than the place has bytes for.
    pub fn check_extent(&self) -> Result<(), String> {
        let overflow = || format!("shape {:?} overflows", self.shape);
        let elements = checked_elements(&self.shape).ok_or_else(overflow)?;
        let bytes = elements.checked_mul(self.value_bytes()).ok_or_else(overflow)?;
        let end = match &self.strides {
            // A read tensor may not be larger than what is stored: a stride of zero would repeat a value without end.
            _ if bytes > self.place.len() => None,
            _ if elements == 0 => Some(self.start),
            None => self.start.checked_add(bytes),
            Some(strides) => self
                .shape
                .iter()
                .zip(strides)
                .try_fold(self.start.checked_add(self.value_bytes()), |end, (&size, &stride)| {
                    Some(end?.checked_add((size - 1).checked_mul(stride)?))
                })
                .flatten(),
        };
        match end {
            Some(end) if end <= self.place.len() => Ok(()),
            _ => Err(format!(
                "shape {:?} asks for values beyond the {} bytes that are stored; a view must be made contiguous before \
                 it is saved",
                self.shape,
                self.place.len()
            )),
        }
    }

    /// Bytes of the values as they are read.
    pub fn read_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.float_type().bytes()
    }

    /// The values, or one part of complex ones, in the element's [`Element::float_type`]: row-major, little-endian.
    ///
    /// # Errors
    /// A member of an archive that is broken, an F64 that F32 cannot hold.
    pub fn read<'a>(&self, path: &Path, file: &'a [u8], part: Option<ComplexPart>) -> Result<Cow<'a, [u8]>> {
        let bytes = self.place.read(file).map_err(|why| {
            let tensor = short(&self.name);
            Error::Zip { path: path.to_owned(), why: format!("tensor {tensor}: {why}") }
        })?;
        if self.element.is_native() && !self.complex && !self.big_endian && self.strides.is_none() {
            let range = self.start..self.start + self.read_bytes();
            return Ok(match bytes {
                Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
                Cow::Owned(mut bytes) => {
                    bytes.truncate(range.end);
                    bytes.drain(..range.start);
                    Cow::Owned(bytes)
                }
            });
        }
        let row_major;
        let strides = match &self.strides {
            Some(strides) => strides,
            None => {
                row_major = row_major_strides(&self.shape, self.value_bytes());
                &row_major
            }
        };
        let imaginary = if part == Some(ComplexPart::Imaginary) { self.element.bytes() } else { 0 };
        let at = Strided { start: self.start + imaginary, shape: &self.shape, strides };
        let values = gather(&bytes, &at, self.element, self.big_endian).map_err(|value| {
            let tensor = self.name.clone();
            Error::NarrowingRange { path: path.to_owned(), tensor, value }
        })?;
        Ok(Cow::Owned(values))
    }

    fn value_bytes(&self) -> usize {
        self.element.bytes() * if self.complex { 2 } else { 1 }
    }
}

/// Checks that the tensors of a file together are no more than [`MOST_SHARING`] times what it stores: views of one
/// storage could ask for a thousand times the file. Each tensor's own extent has been checked.
pub(super) fn check_sharing(path: &Path, tensors: &[StoredTensor]) -> Result<()> {
    let bytes = |tensor: &StoredTensor| (tensor.shape.iter().product::<usize>() * tensor.value_bytes()) as u64;
    let viewed: u64 = tensors.iter().map(bytes).fold(0, u64::saturating_add);
    let places: HashMap<usize, usize> =
        tensors.iter().map(|tensor| (tensor.place.start(), tensor.place.len())).collect();
    let stored: u64 = places.values().map(|&length| length as u64).sum();
    match viewed > stored.saturating_mul(MOST_SHARING) {
        true => Err(Error::Sharing { path: path.to_owned(), viewed, stored }),
        false => Ok(()),
    }
}

/// The strides in bytes of values of `size` bytes in row-major order.
fn row_major_strides(shape: &[usize], size: usize) -> Vec<usize> {
    strides(shape.iter().rev(), size).rev().collect()
}

/// The strides in bytes of values of `size` bytes in column-major (Fortran) order.
pub(super) fn column_major_strides(shape: &[usize], size: usize) -> Vec<usize> {
    strides(shape.iter(), size).collect()
}

/// The stride of each dimension, the fastest first.
fn strides<'a>(fastest_first: impl Iterator<Item = &'a usize>, size: usize) -> impl DoubleEndedIterator<Item = usize> {
    let scan = fastest_first.scan(size, |next, &dimension| {
        let stride = *next;
        *next = next.saturating_mul(dimension);
        Some(stride)
    });
    scan.collect::<Vec<_>>().into_iter()
}
