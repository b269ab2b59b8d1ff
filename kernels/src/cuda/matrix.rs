//! Matrices on the card: the bytes of the file, each part in memory of its own.

use std::rc::Rc;

use super::{
    Cuda,
    error::{CudaError, Result},
    memory::Buffer,
};
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

/// Bytes that are copied to the card in one call: the driver copies what is mapped from a file through memory of its own.
const CHUNK: usize = 64 << 20;

/// A matrix as kernels take it; the layout is that of `struct Matrix` in kernels/cuda.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct RawMatrix {
    codes: u64,
    scales: u64,
    zeros: u64,
    rows: u64,
    cols: u64,
    group: u64,
    groups: u64,
    code_bytes: u64,
    zero_bytes: u64,
    scale_type: u32,
    reserved: u32,
}

/// A matrix `[rows, cols]` in the card's memory, exactly as it lies in the file.
#[derive(Clone, Debug)]
pub struct DeviceMatrix {
    rows: usize,
    cols: usize,
    encoding: DeviceEncoding,
    codes: Part,
    scales: Option<Part>,
    zeros: Option<Part>,
}

/// The bytes of a matrix from its first row on.
#[derive(Clone, Debug)]
struct Part {
    buffer: Rc<Buffer>,
    offset: usize,
    row_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
enum DeviceEncoding {
    Float(FloatType),
    Quantized { layout: Layout, scale_type: FloatType },
}

impl Part {
    fn pointer(&self) -> u64 {
        self.buffer.pointer() + self.offset as u64
    }
}

impl DeviceMatrix {
    /// Rows: the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Cuts it into `parts` of equally many rows, first rows first; all share the memory.
    ///
    /// # Panics
    /// If the rows are no multiple of `parts`.
    pub fn split(&self, parts: usize) -> Vec<Self> {
        assert!(parts > 0 && self.rows.is_multiple_of(parts), "{} rows cannot be cut into {parts} parts", self.rows);
        let rows = self.rows / parts;
        let piece = |part: &Part, index: usize| {
            let offset = part.offset + index * rows * part.row_bytes;
            Part { buffer: part.buffer.clone(), offset, row_bytes: part.row_bytes }
        };
        let one = |index| Self {
            rows,
            codes: piece(&self.codes, index),
            scales: self.scales.as_ref().map(|part| piece(part, index)),
            zeros: self.zeros.as_ref().map(|part| piece(part, index)),
            ..*self
        };
        (0..parts).map(one).collect()
    }

    /// The name of its encoding: of the module of its kernels, and in theirs.
    pub(super) fn encoding_name(&self) -> &'static str {
        match self.encoding {
            DeviceEncoding::Float(FloatType::F32) => "f32",
            DeviceEncoding::Float(FloatType::F16) => "f16",
            DeviceEncoding::Float(FloatType::BF16) => "bf16",
            DeviceEncoding::Quantized { layout, .. } => match layout.grid {
                Grid::Int { bits, .. } => {
                    const INTEGERS: [&str; 7] = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"];
                    INTEGERS[bits as usize - 2]
                }
                Grid::Ternary => "ternary",
                Grid::Binary => "binary",
            },
        }
    }

    /// Whether its values are floats and not codes.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.encoding, DeviceEncoding::Float(_))
    }

    /// Whether the tensor-core kernels can run it: a group must not end within their step.
    pub(super) fn suits_tensor_cores(&self) -> bool {
        match self.encoding {
            DeviceEncoding::Float(_) => true,
            DeviceEncoding::Quantized { layout, .. } => layout.group.is_multiple_of(32) || layout.group >= self.cols,
        }
    }

    /// Whether its values need two BF16 terms, as the activations do.
    pub(super) fn splits_weights(&self) -> bool {
        matches!(self.encoding, DeviceEncoding::Float(FloatType::F32 | FloatType::F16))
    }

    /// The memory of its codes, scales and zero points.
    pub(super) fn buffers(&self) -> [Option<&Buffer>; 3] {
        [Some(&self.codes), self.scales.as_ref(), self.zeros.as_ref()].map(|part| part.map(|part| &*part.buffer))
    }

    pub(super) fn raw(&self) -> RawMatrix {
        let (group, groups, scale_type) = match self.encoding {
            DeviceEncoding::Float(_) => (self.cols.max(1), 0, 0),
            DeviceEncoding::Quantized { layout, scale_type } => {
                (layout.group.min(self.cols.max(1)), layout.groups(self.cols), u32::from(scale_type == FloatType::F16))
            }
        };
        RawMatrix {
            codes: self.codes.pointer(),
            scales: self.scales.as_ref().map_or(0, Part::pointer),
            zeros: self.zeros.as_ref().map_or(0, Part::pointer),
            rows: self.rows as u64,
            cols: self.cols as u64,
            group: group as u64,
            groups: groups as u64,
            code_bytes: self.codes.row_bytes as u64,
            zero_bytes: self.zeros.as_ref().map_or(0, |part| part.row_bytes) as u64,
            scale_type,
            reserved: 0,
        }
    }
}

impl Cuda {
    /// Copies a matrix to the card as it is stored.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::TooLarge`].
    pub fn matrix(&self, matrix: &Matrix<'_>) -> Result<DeviceMatrix> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        for (what, found) in [("a matrix with rows", rows), ("a matrix with columns", cols)] {
            let most = i32::MAX as usize;
            if found > most {
                return Err(CudaError::TooLarge { what, found, most });
            }
        }
        let part = |bytes: &[u8]| -> Result<Part> {
            // Kernels read whole vectors, and may read past the end of what is stored.
            let buffer = self.with_room(|| Buffer::new(&self.context, bytes.len().next_multiple_of(16)))?;
            for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
                self.context.upload(chunk, &buffer, index * CHUNK)?;
            }
            Ok(Part { buffer: Rc::new(buffer), offset: 0, row_bytes: bytes.len().checked_div(rows).unwrap_or(0) })
        };
        let (encoding, codes, scales, zeros) = match matrix.data() {
            Data::Float { dtype, values } => (DeviceEncoding::Float(dtype), part(values)?, None, None),
            Data::Quantized { layout, codes, scale_type, scales, zeros } => {
                let zeros = if zeros.is_empty() { None } else { Some(part(zeros)?) };
                (DeviceEncoding::Quantized { layout, scale_type }, part(codes)?, Some(part(scales)?), zeros)
            }
        };
        Ok(DeviceMatrix { rows, cols, encoding, codes, scales, zeros })
    }
}
