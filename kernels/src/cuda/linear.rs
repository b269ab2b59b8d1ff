//! Products with matrices as they are stored, and rows of them.

use super::{
    Cuda, MOST_BLOCKS, THREADS,
    context::{Arguments, LaunchShape},
    elements,
    error::Result,
    line,
    matrix::DeviceMatrix,
    memory::Buffer,
    size,
    values::DeviceValues,
};

/// How activations enter the product of a quantized matrix with more than eight tokens, which tensor cores compute. Fewer
/// tokens, and plain matrices, always see them in f32 or in two terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As the sum of two BF16 terms: 16 bits of each value.
    Exact,
    /// Rounded to BF16: 8 bits of each value.
    Bfloat,
}

/// Columns of the terms are a multiple of this, filled with zeros.
const TERM_COLS: usize = 64;

/// Tokens up to which a row of the matrix is read once for all of them.
const FEW: usize = 8;

/// Threads of a block that multiplies few tokens; 16 of them take a row.
const GEMV_THREADS: u32 = 256;

/// Shared memory for scales, beside that for terms and weights.
const SCALES: u32 = 1 << 10;

/// Values as one or two BF16 terms each.
#[derive(Debug)]
pub(super) struct BfloatTerms {
    high: Buffer, // bf16 [rows, padded]
    low: Buffer,  // bf16 [rows, padded]
}

/// The grid of embed and dequantization.
pub(super) fn embed_shape(count: u32, cols: usize) -> LaunchShape {
    let blocks = cols.div_ceil(THREADS as usize).min(MOST_BLOCKS as usize) as u32;
    LaunchShape { grid: [count, blocks, 1], block: THREADS, shared_bytes: 0 }
}

impl Cuda {
    /// The rows of `table` that `tokens` name: `[tokens, cols]`.
    ///
    /// # Panics
    /// If a token has no row.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](super::CudaError::OutOfMemory), [`CudaError::Call`](super::CudaError::Call).
    pub fn embed(&self, table: &DeviceMatrix, tokens: &[u32]) -> Result<DeviceValues> {
        assert!(tokens.iter().all(|&token| (token as usize) < table.rows()), "a token has no row in the table");
        let count = size("tokens", tokens.len())?;
        let ids = self.uploaded(bytemuck::cast_slice(tokens))?;
        let out = self.scratch(tokens.len(), table.cols())?;
        let arguments = Arguments::of_matrix(table.raw()).buffer(&ids).u64(0).buffer(&out.buffer).u32(count);
        let encoding = table.encoding_name();
        // SAFETY: embed(table, tokens, first, out, count) reads `count` ids and writes as many rows.
        unsafe { self.launch(encoding, ["embed_", encoding, ""], embed_shape(count, table.cols()), arguments)? };
        Ok(out)
    }

    /// `x * weight^T + bias`: `[tokens, in]` and `[out, in]` to `[tokens, out]`; `bias` is `[1, out]`.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn linear(
        &self,
        x: &DeviceValues,
        weight: &DeviceMatrix,
        bias: Option<&DeviceValues>,
        precision: Precision,
    ) -> Result<DeviceValues> {
        assert_eq!(x.cols(), weight.cols(), "columns of the input and of the matrix");
        assert!(bias.is_none_or(|bias| bias.len() == weight.rows()), "one bias for each row");
        let out = self.scratch(x.rows(), weight.rows())?;
        let tokens = size("tokens", x.rows())?;
        let rows = size("rows", weight.rows())?;
        let bias = bias.map(|bias| &bias.buffer);
        let encoding = weight.encoding_name();
        let plain = |arguments: Arguments| arguments.buffer(&x.buffer).optional(bias).buffer(&out.buffer).u32(tokens);
        if x.rows() <= FEW {
            let suffix = if tokens <= 1 {
                "_t1"
            } else if tokens <= 4 {
                "_t4"
            } else {
                "_t8"
            };
            let grid = if tokens == 0 { 0 } else { rows.div_ceil(GEMV_THREADS / 16) };
            let arguments = plain(Arguments::of_matrix(weight.raw()));
            // SAFETY: gemv(w, x, bias, out, tokens), whose shapes are checked above.
            unsafe { self.launch(encoding, ["gemv_", encoding, suffix], line(grid, GEMV_THREADS), arguments)? };
        } else if !weight.suits_tensor_cores() {
            let shape = LaunchShape { grid: [rows.div_ceil(64), tokens.div_ceil(64), 1], block: 256, shared_bytes: 0 };
            let arguments = plain(Arguments::of_matrix(weight.raw()));
            // SAFETY: gemm_plain(w, x, bias, out, tokens), whose shapes are checked above.
            unsafe { self.launch(encoding, ["gemm_plain_", encoding, ""], shape, arguments)? };
        } else {
            let exact = precision == Precision::Exact || weight.is_plain();
            let terms = self.terms(x)?;
            let low = exact.then_some(&terms.low);
            let weights = if exact && weight.splits_weights() { 32 << 10 } else { 16 << 10 };
            let activations = if exact { 32 << 10 } else { 16 << 10 };
            let grid = [rows.div_ceil(128), tokens.div_ceil(64), 1];
            let shape = LaunchShape { grid, block: 256, shared_bytes: activations + weights + SCALES };
            let padded = x.cols().next_multiple_of(TERM_COLS) as u32;
            let arguments = Arguments::of_matrix(weight.raw())
                .buffer(&terms.high)
                .optional(low)
                .optional(bias)
                .buffer(&out.buffer)
                .u32(tokens)
                .u32(padded);
            let name = ["gemm_", encoding, if exact { "_exact" } else { "_bf16" }];
            // SAFETY: gemm(w, high, low, bias, out, tokens, padded), whose shapes are checked above; the terms have
            // `padded` columns.
            unsafe { self.launch(encoding, name, shape, arguments)? };
        }
        Ok(out)
    }

    /// The BF16 terms of values, made once.
    fn terms<'a>(&self, x: &'a DeviceValues) -> Result<&'a BfloatTerms> {
        if let Some(terms) = x.terms.get() {
            return Ok(terms);
        }
        let padded = x.cols().next_multiple_of(TERM_COLS);
        let term = || self.buffer(x.rows() * padded, size_of::<u16>());
        let terms = BfloatTerms { high: term()?, low: term()? };
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&terms.high)
            .buffer(&terms.low)
            .u32(size("tokens", x.rows())?)
            .u32(size("columns", x.cols())?)
            .u32(padded as u32);
        let shape = elements((x.rows() * padded).div_ceil(8));
        // SAFETY: split_activations(x, high, low, tokens, cols, padded) writes all of both terms.
        unsafe { self.launch("elementwise", ["split_activations", "", ""], shape, arguments)? };
        Ok(x.terms.get_or_init(|| terms))
    }
}
