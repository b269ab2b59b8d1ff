//! Experts: which of them a token goes through, and their layers.

use std::rc::Rc;

use bytemuck::{Pod, Zeroable};

use super::{
    Cuda, MOST_BLOCKS,
    context::{Arguments, LaunchShape},
    elements,
    error::{CudaError, Result},
    line,
    linear::GEMV_THREADS,
    matrix::{DeviceMatrix, RawMatrix},
    memory::{Buffer, Memory},
    size,
    values::DeviceValues,
};

/// The most experts of a layer: their numbers are exact in f32.
const MOST_EXPERTS: usize = 1 << 24;

/// The layers `[out, in]` that stand at one place in the experts of a mixture, of one shape and any encodings.
pub struct DeviceExperts {
    count: usize,
    rows: usize,
    cols: usize,
    /// For each encoding a table of all layers, in which those of another are empty.
    tables: Vec<(&'static str, Buffer)>, // [experts] each
    /// All that the tables point to.
    memory: Vec<Rc<Memory>>,
}

/// A layer as kernels take it; that of `struct ExpertLayer` in kernels/cuda.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct RawLayer {
    weight: RawMatrix,
    bias: u64,
}

// SAFETY: integers alone, for which zeros are values.
unsafe impl Zeroable for RawLayer {}
// SAFETY: integers of 8 bytes, and two of 4 side by side, so that there is no padding.
unsafe impl Pod for RawLayer {}

impl Cuda {
    /// Makes layers ready to be chosen among.
    ///
    /// # Panics
    /// If there are none, or their shapes or those of their biases `[1, out]` differ.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`]; [`CudaError::TooLarge`] for more than 2^24.
    pub fn experts(&self, layers: &[(&DeviceMatrix, Option<&DeviceValues>)]) -> Result<DeviceExperts> {
        let (rows, cols) = layers.first().map(|(weight, _)| (weight.rows(), weight.cols())).expect("an expert");
        let fits = |&(weight, bias): &(&DeviceMatrix, Option<&DeviceValues>)| {
            (weight.rows(), weight.cols()) == (rows, cols) && bias.is_none_or(|bias| bias.len() == rows)
        };
        assert!(layers.iter().all(fits), "layers of one shape");
        check_count(layers.len())?;
        let mut encodings: Vec<&'static str> = layers.iter().map(|(weight, _)| weight.encoding_name()).collect();
        encodings.sort_unstable();
        encodings.dedup();
        let table = |encoding| {
            let layer = |&(weight, bias): &(&DeviceMatrix, Option<&DeviceValues>)| match weight.encoding_name() {
                own if own == encoding => {
                    RawLayer { weight: weight.raw(), bias: bias.map_or(0, |bias| bias.buffer.pointer()) }
                }
                _ => RawLayer::zeroed(),
            };
            let layers: Vec<RawLayer> = layers.iter().map(layer).collect();
            Ok((encoding, self.uploaded(bytemuck::cast_slice(&layers))?))
        };
        let parts = layers
            .iter()
            .flat_map(|(weight, bias)| weight.buffers().into_iter().flatten().chain(bias.map(|bias| &bias.buffer)));
        Ok(DeviceExperts {
            count: layers.len(),
            rows,
            cols,
            tables: encodings.into_iter().map(table).collect::<Result<_>>()?,
            memory: parts.map(|buffer| buffer.memory().clone()).collect(),
        })
    }

    /// The `chosen` experts with the largest logits `[tokens, experts]` of each token, as numbers `[tokens, chosen]`, and
    /// the softmax over them, `[tokens, chosen]`. The numbers are f32, in which they are exact, so that they are values like
    /// any others to what holds and reads these.
    ///
    /// # Panics
    /// If there are fewer experts.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`]; [`CudaError::TooLarge`] for more than 2^24 experts.
    pub fn route(&self, logits: &DeviceValues, chosen: usize) -> Result<(DeviceValues, DeviceValues)> {
        let (tokens, experts) = (logits.rows(), logits.cols());
        assert!((1..=experts).contains(&chosen), "{chosen} of {experts} experts");
        check_count(experts)?;
        let (choices, weights) = (self.scratch(tokens, chosen)?, self.scratch(tokens, chosen)?);
        let arguments = Arguments::default()
            .buffer(&logits.buffer)
            .buffer(&choices.buffer)
            .buffer(&weights.buffer)
            .u32(size("tokens", tokens)?)
            .u32(experts as u32)
            .u32(chosen as u32);
        // SAFETY: route(logits, chosen, weights, tokens, experts, k) writes `tokens * k` of both.
        unsafe { self.launch("route", ["route", "", ""], line(tokens.div_ceil(4) as u32, 128), arguments)? };
        Ok((choices, weights))
    }

    /// `x * weight^T + bias` of the layer of each chosen expert, `choices` `[1, chosen]` being their numbers: `x` is
    /// `[chosen, in]`, or `[1, in]` for all; the result is `[chosen, out]`. A choice that is no expert gives NaN.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`]; [`CudaError::TooLarge`] for more than 65,535 choices.
    pub fn linear_chosen(
        &self,
        x: &DeviceValues,
        layers: &DeviceExperts,
        choices: &DeviceValues,
    ) -> Result<DeviceValues> {
        let chosen = choices.len();
        assert!(x.cols() == layers.cols && [1, chosen].contains(&x.rows()), "a row for all choices or one for each");
        if chosen > MOST_BLOCKS as usize {
            return Err(CudaError::TooLarge { what: "a choice of experts", found: chosen, most: MOST_BLOCKS as usize });
        }
        let out = self.scratch(chosen, layers.rows)?;
        let rows = size("rows", layers.rows)?;
        let stride = if x.rows() == 1 { 0 } else { size("columns", layers.cols)? };
        let grid = [rows.div_ceil(GEMV_THREADS / 16), chosen as u32, 1];
        let shape = LaunchShape { grid, block: GEMV_THREADS, shared_bytes: 0 };
        self.context.hold_memory(&layers.memory);
        for (encoding, table) in &layers.tables {
            let arguments = Arguments::default()
                .buffer(table)
                .u32(layers.count as u32)
                .buffer(&choices.buffer)
                .buffer(&x.buffer)
                .u32(stride)
                .buffer(&out.buffer)
                .u32(rows);
            // SAFETY: gemv_chosen(layers, experts, chosen, x, stride, out, rows), whose shapes are checked above; what the
            // table points to is held by `layers` and by a recording, and its entries are of this encoding or empty; numbers
            // of experts beyond the table are not looked up.
            unsafe { self.launch(encoding, ["gemv_", encoding, "_chosen"], shape, arguments)? };
        }
        Ok(out)
    }

    /// The sum of the rows of `y` `[n, cols]`, each multiplied by its weight of `weights` `[1, n]`: `[1, cols]`.
    ///
    /// # Panics
    /// If there is not a weight for each row.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn weighted_sum(&self, y: &DeviceValues, weights: &DeviceValues) -> Result<DeviceValues> {
        assert_eq!(weights.len(), y.rows(), "a weight for each row");
        let out = self.scratch(1, y.cols())?;
        let arguments = Arguments::default()
            .buffer(&weights.buffer)
            .buffer(&y.buffer)
            .buffer(&out.buffer)
            .u64(y.cols())
            .u32(size("rows", y.rows())?);
        // SAFETY: weighted_sum(weights, y, out, n, rows), shapes checked above.
        unsafe { self.launch("elementwise", ["weighted_sum", "", ""], elements(y.cols()), arguments)? };
        Ok(out)
    }
}

fn check_count(experts: usize) -> Result<()> {
    let too_large = CudaError::TooLarge { what: "a mixture of experts", found: experts, most: MOST_EXPERTS };
    if experts > MOST_EXPERTS { Err(too_large) } else { Ok(()) }
}
