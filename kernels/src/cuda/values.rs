//! Values on the card, made, moved and read.

use super::{
    Cuda,
    context::Arguments,
    elements,
    error::{CudaError, Result},
    linear::BfloatTerms,
    memory::Buffer,
    size,
};

/// Values in the card's memory, `[rows, cols]`, row-major.
#[derive(Debug)]
pub struct DeviceValues {
    pub(super) buffer: Buffer, // f32 [rows, cols]
    rows: usize,
    cols: usize,
    /// The same in BF16, once a product has needed it; of the values as they are.
    pub(super) terms: BfloatTerms,
}

impl DeviceValues {
    /// Rows: one a token.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The number of values.
    pub(super) fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// The same values before a kernel changes them in place.
    pub(super) fn changing(mut self) -> Self {
        self.terms = BfloatTerms::default();
        self
    }
}

impl Cuda {
    /// Values yet to be written.
    pub(super) fn scratch(&self, rows: usize, cols: usize) -> Result<DeviceValues> {
        let too_large = || CudaError::TooLarge { what: "a tensor with rows", found: rows, most: isize::MAX as usize };
        let count = rows.checked_mul(cols).ok_or_else(too_large)?;
        Ok(DeviceValues { buffer: self.buffer(count, size_of::<f32>())?, rows, cols, terms: BfloatTerms::default() })
    }

    /// Values of the host, whose number is a multiple of `cols`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn values(&self, values: &[f32], cols: usize) -> Result<DeviceValues> {
        let out = self.scratch(values.len() / cols, cols)?;
        self.context.upload(bytemuck::cast_slice(values), &out.buffer, 0)?;
        Ok(out)
    }

    /// Zeros, `[rows, cols]`.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn zeros(&self, rows: usize, cols: usize) -> Result<DeviceValues> {
        let mut out = self.scratch(rows, cols)?;
        self.zero(&mut out)?;
        Ok(out)
    }

    /// Sets every value to zero.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn zero(&self, x: &mut DeviceValues) -> Result<()> {
        let bytes = x.len() * size_of::<f32>();
        x.terms = BfloatTerms::default();
        self.context.zero(&mut x.buffer, bytes)
    }

    /// Copies values to the host, once they are computed.
    ///
    /// # Errors
    /// [`CudaError::Call`]; failures of kernels launched before show here.
    pub fn read(&self, x: &DeviceValues, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.resize(x.len(), 0.0);
        self.context.download(&x.buffer, bytemuck::cast_slice_mut(out))
    }

    /// A copy of the rows `first..first + count`.
    ///
    /// # Panics
    /// If there are fewer rows.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn rows(&self, x: &DeviceValues, first: usize, count: usize) -> Result<DeviceValues> {
        assert!(first + count <= x.rows, "{} rows hold no {count} from {first}", x.rows);
        let mut out = self.scratch(count, x.cols)?;
        let row_bytes = x.cols * size_of::<f32>();
        self.context.copy(&x.buffer, first * row_bytes, &mut out.buffer, count * row_bytes)?;
        Ok(out)
    }

    /// A copy of the columns `first..first + count`.
    ///
    /// # Panics
    /// If there are fewer columns.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn columns(&self, x: &DeviceValues, first: usize, count: usize) -> Result<DeviceValues> {
        assert!(first + count <= x.cols, "{} columns hold no {count} from {first}", x.cols);
        let out = self.scratch(x.rows, count)?;
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&out.buffer)
            .u64(out.len())
            .u32(size("columns", x.cols)?)
            .u32(first as u32)
            .u32(count as u32);
        // SAFETY: copy_columns(x, out, n, cols, first, count) reads columns that `x` has and writes all of `out`.
        unsafe { self.launch("elementwise", ["copy_columns", "", ""], elements(out.len()), arguments)? };
        Ok(out)
    }

    /// Copies of the rows that `rows` names, in its order.
    ///
    /// # Panics
    /// If a row is not there.
    ///
    /// # Errors
    /// As [`values`](Self::values).
    pub fn gather(&self, x: &DeviceValues, rows: &[u32]) -> Result<DeviceValues> {
        assert!(rows.iter().all(|&row| (row as usize) < x.rows), "a row beyond {} is asked for", x.rows);
        let names = self.uploaded(bytemuck::cast_slice(rows))?;
        // SAFETY: the buffer holds as many row numbers, each checked above.
        unsafe { self.gather_by(x, Arguments::default().buffer(&x.buffer).buffer(&names), rows.len()) }
    }

    /// The rows of `x` whose numbers lie on the card.
    ///
    /// # Safety
    /// `arguments` begin with the values of `x` and a pointer to `count` row numbers, each below the rows of `x`.
    pub(super) unsafe fn gather_by(
        &self,
        x: &DeviceValues,
        arguments: Arguments<'_>,
        count: usize,
    ) -> Result<DeviceValues> {
        let out = self.scratch(count, x.cols)?;
        let arguments = arguments.buffer(&out.buffer).u64(out.len()).u32(size("columns", x.cols)?);
        // SAFETY: gather_rows(x, rows, out, n, cols) reads rows that `x` has, as the caller promises.
        unsafe { self.launch("elementwise", ["gather_rows", "", ""], elements(out.len()), arguments)? };
        Ok(out)
    }
}
