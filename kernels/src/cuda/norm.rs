//! Norms of rows.

use super::{Cuda, context::Arguments, error::Result, line, size, values::DeviceValues};

/// Threads for a row of so many columns.
fn threads(cols: usize) -> u32 {
    cols.div_ceil(4).next_multiple_of(32).clamp(32, 256) as u32
}

impl Cuda {
    /// `x / sqrt(mean(x^2) + epsilon) * gain`; the mean runs over as many columns as `gain` has.
    ///
    /// # Panics
    /// If the columns of `x` are no multiple of those of `gain`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](super::CudaError::OutOfMemory), [`CudaError::Call`](super::CudaError::Call).
    pub fn rms_norm(&self, x: &DeviceValues, gain: &DeviceValues, epsilon: f32) -> Result<DeviceValues> {
        let cols = gain.len();
        assert!(cols > 0 && x.cols().is_multiple_of(cols), "{} columns are no multiple of {cols}", x.cols());
        let out = self.scratch(x.rows(), x.cols())?;
        let arguments =
            Arguments::default().buffer(&x.buffer).buffer(&gain.buffer).buffer(&out.buffer).u32(size("columns", cols)?);
        let shape = line(size("rows", x.len() / cols)?, threads(cols));
        // SAFETY: rms_norm(x, gain, out, cols, epsilon), a block a row of `cols` values.
        unsafe { self.launch("norm", ["rms_norm", "", ""], shape, arguments.f32(epsilon))? };
        Ok(out)
    }

    /// `(x - mean) / sqrt(variance + epsilon) * gain + bias`, row by row.
    ///
    /// # Panics
    /// If `gain` and `bias` have not as many columns as `x`.
    ///
    /// # Errors
    /// As [`rms_norm`](Self::rms_norm).
    pub fn layer_norm(
        &self,
        x: &DeviceValues,
        gain: &DeviceValues,
        bias: &DeviceValues,
        epsilon: f32,
    ) -> Result<DeviceValues> {
        assert!(gain.len() == x.cols() && bias.len() == x.cols(), "a gain and a bias for each column");
        let out = self.scratch(x.rows(), x.cols())?;
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&gain.buffer)
            .buffer(&bias.buffer)
            .buffer(&out.buffer)
            .u32(size("columns", x.cols())?)
            .f32(epsilon);
        let shape = line(size("rows", x.rows())?, threads(x.cols()));
        // SAFETY: layer_norm(x, gain, bias, out, cols, epsilon), a block a row.
        unsafe { self.launch("norm", ["layer_norm", "", ""], shape, arguments)? };
        Ok(out)
    }
}
