//! Routing of tokens to experts.

use super::{Cuda, context::Arguments, error::Result, line, size, values::DeviceValues};

impl Cuda {
    /// The `chosen` experts with the largest logits `[tokens, experts]` of each token, `[tokens, chosen]`, and the softmax
    /// over them, `[tokens, chosen]`.
    ///
    /// # Panics
    /// If there are fewer experts.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](super::CudaError::OutOfMemory), [`CudaError::Call`](super::CudaError::Call).
    pub fn route(&self, logits: &DeviceValues, chosen: usize) -> Result<(Vec<u32>, DeviceValues)> {
        let (tokens, experts) = (logits.rows(), logits.cols());
        assert!((1..=experts).contains(&chosen), "{chosen} of {experts} experts");
        let weights = self.scratch(tokens, chosen)?;
        let mut choices = vec![0u32; tokens * chosen];
        let buffer = self.buffer(choices.len(), size_of::<u32>())?;
        let arguments = Arguments::default()
            .buffer(&logits.buffer)
            .buffer(&buffer)
            .buffer(&weights.buffer)
            .u32(size("tokens", tokens)?)
            .u32(size("experts", experts)?)
            .u32(size("choices", chosen)?);
        // SAFETY: route(logits, chosen, weights, tokens, experts, k) writes `tokens * k` of both.
        unsafe { self.launch("route", ["route", "", ""], line(tokens.div_ceil(4) as u32, 128), arguments)? };
        self.context.download(&buffer, bytemuck::cast_slice_mut(&mut choices))?;
        Ok((choices, weights))
    }
}
