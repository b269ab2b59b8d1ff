//! The operations that a model's forward pass is written in, and the back ends that run them.

pub mod autograd;
pub mod count;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod recorder;

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
    /// What is kept of a step of decoding to repeat it.
    type StepGraph: Default;

    /// Loads a matrix, as it is stored.
    fn weight<'a>(&self, source: &'a dyn TensorSource, name: &str) -> Result<Self::Weight<'a>>;

    /// Cuts a matrix into `parts` matrices of equally many rows, first rows first.
    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>>;

    /// Loads parameters that are used element by element (a norm's gain, a bias): `[rows, last dimension]`, a vector or
    /// a scalar as one row.
    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<Self::Tensor>;

    /// A tensor of given values, whose number is a multiple of `cols`.
    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Self::Tensor>;

    /// A tensor of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// Copies a tensor's values to `out`, row-major.
    fn read(&self, x: &Self::Tensor, out: &mut Vec<f32>) -> Result<()>;

    /// A copy of the rows `first..first + count`.
    fn rows(&self, x: &Self::Tensor, first: usize, count: usize) -> Result<Self::Tensor>;

    /// A copy of the columns `first..first + count`.
    fn columns(&self, x: &Self::Tensor, first: usize, count: usize) -> Result<Self::Tensor>;

    /// Copies of the rows that `rows` names, in its order.
    fn gather(&self, x: &Self::Tensor, rows: &[u32]) -> Result<Self::Tensor>;

    /// The rows of `table` `[vocabulary, cols]` that `tokens` name: `[tokens, cols]`.
    fn embed(&self, table: &Self::Weight<'_>, tokens: &[u32]) -> Result<Self::Tensor>;

    /// `x * weight^T + bias`: `[tokens, in]` and `[out, in]` to `[tokens, out]`; `bias` is `[1, out]`.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Weight<'_>, bias: Option<&Self::Tensor>) -> Result<Self::Tensor>;

    /// `x / sqrt(mean(x^2) + epsilon) * gain`; the mean runs over as many columns as `gain` `[1, n]` has, so each head
    /// of a row `[heads * n]` is normalized by itself.
    fn rms_norm(&self, x: &Self::Tensor, gain: &Self::Tensor, epsilon: f32) -> Result<Self::Tensor>;

    /// `(x - mean) / sqrt(variance + epsilon) * gain + bias`, row by row; `gain` and `bias` are `[1, cols]`.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        gain: &Self::Tensor,
        bias: &Self::Tensor,
        epsilon: f32,
    ) -> Result<Self::Tensor>;

    /// Rotary position embedding: turns element `i` of each head `[head_dim]` with element `i + head_dim / 2`.
    ///
    /// `x` is `[tokens, heads * head_dim]`; `cos` and `sin` are `[tokens, head_dim / 2]`.
    fn rope(&self, x: Self::Tensor, heads: usize, cos: &Self::Tensor, sin: &Self::Tensor) -> Result<Self::Tensor>;

    /// An empty cache with room for `capacity` positions.
    fn cache(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Self::Cache>;

    /// Forgets every position.
    fn clear(&self, cache: &mut Self::Cache);

    /// Sets every element to zero.
    fn zero(&self, x: &mut Self::Tensor) -> Result<()>;

    /// Causal grouped-query attention over the cache, to which `key` and `value` are appended first.
    ///
    /// `query` is `[tokens, heads * head_dim]`, `key` and `value` are `[tokens, kv_heads * head_dim]`, the result is
    /// `[tokens, heads * head_dim]`. Each token sees the last `window` positions up to its own.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the operation's definition")]
    fn attention(
        &self,
        query: Self::Tensor,
        key: Self::Tensor,
        value: Self::Tensor,
        cache: &mut Self::Cache,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<Self::Tensor>;

    /// `gate / (1 + exp(-gate)) * up`, element by element.
    fn silu_multiply(&self, gate: Self::Tensor, up: Self::Tensor) -> Result<Self::Tensor>;

    /// `x + y`, element by element.
    fn add(&self, x: Self::Tensor, y: Self::Tensor) -> Result<Self::Tensor>;

    /// `x + scale * y`; `scale` is `[1, 1]`.
    fn add_scaled(&self, x: Self::Tensor, y: &Self::Tensor, scale: &Self::Tensor) -> Result<Self::Tensor>;

    /// `max(x, 0)`.
    fn relu(&self, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `x / (1 + exp(-x))`.
    fn silu(&self, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `log(1 + exp(x))`.
    fn softplus(&self, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `-exp(x)`.
    fn negative_exp(&self, x: Self::Tensor) -> Result<Self::Tensor>;

    /// `x` limited to `-limit..=limit`.
    fn clamp(&self, x: Self::Tensor, limit: f32) -> Result<Self::Tensor>;

    /// Rounds every element to a multiple of its own scale: `clamp(round(x / scale), -largest, largest) * scale`, halves
    /// to even; a zero scale gives zero. `scales` has the shape of `x`.
    fn round_to_grid(&self, x: Self::Tensor, scales: &Self::Tensor, largest: f32) -> Result<Self::Tensor>;

    /// Causal depthwise convolution: `y[t, c] = bias[c] + sum_j weight[c, j] * x[t - kernel + 1 + j, c]`.
    ///
    /// `x` is `[tokens, channels]`, `weight` is `[channels, kernel]`, `bias` is `[1, channels]`. `history`
    /// `[kernel - 1, channels]` holds the rows before the first, oldest first, and then those before the next call's.
    fn depthwise_conv(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        history: &mut Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// The selective scan of Mamba (Gu and Dao, 2023): `h = exp(delta * a) * h + delta * b * x`, `y = c * h + d * x`.
    ///
    /// `x` and `delta` are `[tokens, channels]`, `a` is `[channels, states]`, `b` and `c` are `[tokens, states]`, `d` is
    /// `[1, channels]`; `state` `[channels, states]` is `h` before and after. The result is `[tokens, channels]`.
    fn selective_scan(&self, scan: Scan<'_, Self::Tensor>, state: &mut Self::Tensor) -> Result<Self::Tensor>;

    /// The diagonal of `(H - zI)^-1` with `H = tridiag(1, v - 2, 1)`: `v` `[positions, 1]` to `[positions, 2]`, real and
    /// imaginary part.
    fn resolvent(&self, v: &Self::Tensor, z: [f32; 2]) -> Result<Self::Tensor>;

    /// The same with each position's matrix cut off after it, so that none sees a later one.
    ///
    /// `last` is the value of the position before the first (zero at the start), and then of the last.
    fn causal_resolvent(&self, v: &Self::Tensor, z: [f32; 2], last: &mut [f64; 2]) -> Result<Self::Tensor>;

    /// Chooses for each token the `chosen` experts with the largest logits `[tokens, experts]`.
    fn route(&self, logits: &Self::Tensor, chosen: usize) -> Result<Routing<Self::Tensor>>;

    /// `sum[token] += weights[token, slot] * y[i]` for the `i`-th place: what an expert computed, back to its tokens.
    fn scatter_add(
        &self,
        sum: Self::Tensor,
        y: &Self::Tensor,
        places: &[Place],
        weights: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// Whether [`step`](Self::step) gains from a `run` that can be repeated.
    fn repeats_steps(&self) -> bool {
        false
    }

    /// Runs one step of decoding and copies its logits to `out`.
    ///
    /// The back end may record what `run` does and repeat it for a later token without calling it again. So `run` decides
    /// nothing by values, and learns the token and the position through [`embed_step`](Self::embed_step) and
    /// [`row_at_step`](Self::row_at_step) alone.
    fn step(
        &self,
        _graph: &mut Self::StepGraph,
        _step: Step,
        run: &mut dyn FnMut() -> Result<Self::Tensor>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        self.read(&run()?, out)
    }

    /// The row of `table` of the step's token: `[1, cols]`.
    fn embed_step(&self, table: &Self::Weight<'_>, step: Step) -> Result<Self::Tensor> {
        self.embed(table, &[step.token])
    }

    /// The row of `x` of the step's position: `[1, cols]`.
    fn row_at_step(&self, x: &Self::Tensor, step: Step) -> Result<Self::Tensor> {
        self.rows(x, step.position, 1)
    }
}

/// One token that continues a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub token: u32,
    /// Positions before it.
    pub position: usize,
}

/// The operands of [`Ops::selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct Scan<'a, T> {
    pub x: &'a T,     // [tokens, channels]
    pub delta: &'a T, // [tokens, channels]
    pub a: &'a T,     // [channels, states]
    pub b: &'a T,     // [tokens, states]
    pub c: &'a T,     // [tokens, states]
    pub d: &'a T,     // [1, channels]
}

/// Which expert each token goes through.
#[derive(Clone, Debug)]
pub struct Routing<T> {
    /// For each expert its tokens, in their order.
    pub places: Vec<Vec<Place>>, // [experts]
    /// The softmax over each token's chosen logits.
    pub weights: T, // [tokens, chosen]
}

/// A token that an expert sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub token: u32,
    /// Which of the token's choices the expert is.
    pub slot: u32,
}

impl Place {
    /// Sorts the experts that tokens chose, `[tokens, chosen]`, by expert: for each of `experts` its tokens, in order.
    pub(super) fn by_expert(choices: &[u32], chosen: usize, experts: usize) -> Vec<Vec<Place>> {
        let mut places = vec![Vec::new(); experts];
        for (token, choices) in choices.chunks_exact(chosen).enumerate() {
            for (slot, &expert) in choices.iter().enumerate() {
                places[expert as usize].push(Place { token: token as u32, slot: slot as u32 });
            }
        }
        places
    }
}
