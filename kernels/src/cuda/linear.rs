//! Products with matrices as they are stored, and rows of them.

use std::cell::OnceCell;

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
pub(super) const GEMV_THREADS: u32 = 256;

/// Shared memory for scales, beside that for terms and weights.
const SCALES: u32 = 1 << 10;

/// Values in BF16, each made when a product first asks for it.
#[derive(Debug, Default)]
pub(super) struct BfloatTerms {
    /// Rounded.
    one: OnceCell<Buffer>, // bf16 [rows, padded]
    /// As the sum of two.
    two: OnceCell<[Buffer; 2]>, // bf16 [rows, padded] each
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
        let arguments = Arguments::of_matrix(table).buffer(&ids).buffer(&out.buffer);
        let encoding = table.encoding_name();
        // SAFETY: embed(table, tokens, out) reads an id for each block of the grid and writes as many rows.
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
        let of_floats =
            || Arguments::of_matrix(weight).buffer(&x.buffer).optional(bias).buffer(&out.buffer).u32(tokens);
        if x.rows() <= FEW {
            let suffix = if tokens <= 1 {
                "_t1"
            } else if tokens <= 4 {
                "_t4"
            } else {
                "_t8"
            };
            let grid = if tokens == 0 { 0 } else { rows.div_ceil(GEMV_THREADS / 16) };
            // SAFETY: gemv(w, x, bias, out, tokens), whose shapes are checked above.
            unsafe { self.launch(encoding, ["gemv_", encoding, suffix], line(grid, GEMV_THREADS), of_floats())? };
        } else if !weight.suits_tensor_cores() {
            let shape = LaunchShape { grid: [rows.div_ceil(64), tokens.div_ceil(64), 1], block: 256, shared_bytes: 0 };
            // SAFETY: gemm_plain(w, x, bias, out, tokens), whose shapes are checked above.
            unsafe { self.launch(encoding, ["gemm_plain_", encoding, ""], shape, of_floats())? };
        } else {
            let exact = precision == Precision::Exact || weight.is_plain();
            let weights = if exact && weight.splits_weights() { 32 << 10 } else { 16 << 10 };
            let activations = if exact { 32 << 10 } else { 16 << 10 };
            let grid = [rows.div_ceil(128), tokens.div_ceil(64), 1];
            let shape = LaunchShape { grid, block: 256, shared_bytes: activations + weights + SCALES };
            let padded = x.cols().next_multiple_of(TERM_COLS) as u32;
            let matrix = Arguments::of_matrix(weight);
            let (arguments, suffix) = match exact {
                true => {
                    let [high, low] = self.two_terms(x)?;
                    (matrix.buffer(high).buffer(low), "_exact")
                }
                false => (matrix.buffer(self.one_term(x)?), "_bf16"),
            };
            let arguments = arguments.optional(bias).buffer(&out.buffer).u32(tokens).u32(padded);
            // SAFETY: gemm_exact(w, high, low, bias, out, tokens, padded), and gemm_bf16 without low, whose shapes are
            // checked above; the terms have `padded` columns.
            unsafe { self.launch(encoding, ["gemm_", encoding, suffix], shape, arguments)? };
        }
        Ok(out)
    }

    /// Values rounded to BF16.
    fn one_term<'a>(&self, x: &'a DeviceValues) -> Result<&'a Buffer> {
        if let Some(high) = x.terms.two.get().map(|[high, _]| high).or(x.terms.one.get()) {
            return Ok(high);
        }
        let high = self.term(x)?;
        self.split_activations(x, &high, None)?;
        Ok(x.terms.one.get_or_init(|| high))
    }

    /// Values as the sums of two terms.
    fn two_terms<'a>(&self, x: &'a DeviceValues) -> Result<&'a [Buffer; 2]> {
        if let Some(terms) = x.terms.two.get() {
            return Ok(terms);
        }
        let [high, low] = [self.term(x)?, self.term(x)?];
        self.split_activations(x, &high, Some(&low))?;
        Ok(x.terms.two.get_or_init(|| [high, low]))
    }

    /// Room for a term of each value.
    fn term(&self, x: &DeviceValues) -> Result<Buffer> {
        self.buffer(x.rows() * x.cols().next_multiple_of(TERM_COLS), size_of::<u16>())
    }

    fn split_activations(&self, x: &DeviceValues, high: &Buffer, low: Option<&Buffer>) -> Result<()> {
        let padded = x.cols().next_multiple_of(TERM_COLS);
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(high)
            .optional(low)
            .u32(size("tokens", x.rows())?)
            .u32(size("columns", x.cols())?)
            .u32(padded as u32);
        let shape = elements((x.rows() * padded).div_ceil(8));
        // SAFETY: split_activations(x, high, low, tokens, cols, padded) writes all of each term, which have that room.
        unsafe { self.launch("elementwise", ["split_activations", "", ""], shape, arguments) }
    }
}
