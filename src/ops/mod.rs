//! The operations that a model's forward pass is written in, and the back ends that run them.

pub mod cpu;

use crate::{error::Result, tensor::TensorSource};

/// A back end: every architecture is written once over these operations.
///
/// A tensor is a matrix of f32 values, `[rows, cols]`, one row a token. Operations take by value what they may overwrite
/// and return what they computed, so a back end that records gradients can follow them.
///
/// # Panics
/// Operations may panic on shapes that do not fit together: models check the shapes of all weights when they are loaded.
///
/// # Errors
/// Loading fails as [`TensorSource::tensor`] does; operations fail where a device does.
pub trait Ops {
    /// Values that flow through the model, or parameters used element by element.
    type Tensor;
    /// A matrix `[out, in]` in whatever form it is stored; it may borrow from its source.
    type Weight<'a>;
    /// The keys and values of the positions that one attention layer has seen.
    type Cache;

    /// Loads a matrix, as it is stored.
    fn weight<'a>(&self, source: &'a dyn TensorSource, name: &str) -> Result<Self::Weight<'a>>;

    /// Loads a vector of `n` parameters (a norm's gain, a bias) as `[1, n]`.
    fn vector(&self, source: &dyn TensorSource, name: &str) -> Result<Self::Tensor>;

    /// A tensor of given values, whose number is a multiple of `cols`.
    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Self::Tensor>;

    /// Copies a tensor's values to `out`, row-major.
    fn read(&self, x: &Self::Tensor, out: &mut Vec<f32>) -> Result<()>;

    /// A copy of the rows `first..first + count`.
    fn rows(&self, x: &Self::Tensor, first: usize, count: usize) -> Result<Self::Tensor>;

    /// The rows of `table` `[vocabulary, cols]` that `tokens` name: `[tokens, cols]`.
    fn embed(&self, table: &Self::Weight<'_>, tokens: &[u32]) -> Result<Self::Tensor>;

    /// `x * weight^T + bias`: `[tokens, in]` and `[out, in]` to `[tokens, out]`; `bias` is `[1, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Weight<'_>, bias: Option<&Self::Tensor>) -> Result<Self::Tensor>;

    /// `x / sqrt(mean(x^2) + epsilon) * gain`, row by row; `gain` is `[1, cols]`.
    fn rms_norm(&self, x: &Self::Tensor, gain: &Self::Tensor, epsilon: f32) -> Result<Self::Tensor>;

    /// Rotary position embedding: turns element `i` of each head `[head_dim]` with element `i + head_dim / 2`.
    ///
    /// `x` is `[tokens, heads * head_dim]`; `cos` and `sin` are `[tokens, head_dim / 2]`.
    fn rope(&self, x: Self::Tensor, heads: usize, cos: &Self::Tensor, sin: &Self::Tensor) -> Result<Self::Tensor>;

    /// An empty cache with room for `capacity` positions.
    fn cache(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Self::Cache>;

    /// Forgets every position.
    fn clear(&self, cache: &mut Self::Cache);

    /// Causal grouped-query attention over the cache, to which `key` and `value` are appended first.
    ///
    /// `query` is `[tokens, heads * head_dim]`, `key` and `value` are `[tokens, kv_heads * head_dim]`, the result is
    /// `[tokens, heads * head_dim]`. Each token sees every position up to its own.
    fn attention(
        &self,
        query: Self::Tensor,
        key: Self::Tensor,
        value: Self::Tensor,
        cache: &mut Self::Cache,
        heads: usize,
        scale: f32,
    ) -> Result<Self::Tensor>;

    /// `gate / (1 + exp(-gate)) * up`, element by element.
    fn silu_multiply(&self, gate: Self::Tensor, up: Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`, element by element.
    fn add(&self, x: Self::Tensor, y: Self::Tensor) -> Result<Self::Tensor>;
}
