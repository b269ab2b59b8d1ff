//! The operations that a model's forward pass is written in, and the back ends that run them.

pub mod autograd;
pub mod count;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod recorder;

use smallvec::{SmallVec, smallvec};

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
    /// The value of [`causal_resolvent`](Self::causal_resolvent) at the last position.
    type Carry;
    /// What is kept of a step of decoding to repeat it.
    type StepGraph: Default;
    /// The layers that stand at one place in the experts of a mixture, for a step to choose among; `Infallible` where steps
    /// are not [repeated](Self::repeats_steps).
    type Experts;
    /// What a step has chosen, the experts and their weights; `Infallible` likewise.
    type Chosen;

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

    /// A tensor's values, row-major; a back end that keeps them elsewhere copies them to `buffer`.
    fn values<'a>(&self, x: &'a Self::Tensor, buffer: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        self.read(x, buffer)?;
        Ok(buffer)
    }

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

    /// [`linear`](Self::linear) of one input with several weights and their biases, which may read the input once.
    fn linears<const N: usize>(
        &self,
        x: &Self::Tensor,
        layers: [(&Self::Weight<'_>, Option<&Self::Tensor>); N],
    ) -> Result<[Self::Tensor; N]> {
        try_map(layers, |(weight, bias)| self.linear(x, weight, bias))
    }

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

    /// Cosines and sines for [`rope`](Self::rope), of the angle `position * frequency` for the `tokens` positions from
    /// `first`: each `[tokens, frequencies]`.
    fn rotations(&self, frequencies: &[f32], first: usize, tokens: usize) -> Result<(Self::Tensor, Self::Tensor)> {
        let rotations = angles(frequencies, first, tokens).map(|angle| (angle.cos(), angle.sin()));
        let (cos, sin) = rotations.unzip();
        Ok((self.constant(cos, frequencies.len())?, self.constant(sin, frequencies.len())?))
    }

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
    /// `last` is the value of the position before the first, and then of the last.
    fn causal_resolvent(&self, v: &Self::Tensor, z: [f32; 2], last: &mut Self::Carry) -> Result<Self::Tensor>;

    /// The value that [`causal_resolvent`](Self::causal_resolvent) begins a text with: zero.
    fn carry(&self) -> Result<Self::Carry>;

    /// Forgets the text.
    fn clear_carry(&self, last: &mut Self::Carry) -> Result<()> {
        *last = self.carry()?;
        Ok(())
    }

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
    ///
    /// A back end that says so has its own [`embed_step`](Self::embed_step), [`embed_at_step`](Self::embed_at_step),
    /// [`row_at_step`](Self::row_at_step), [`experts`](Self::experts), [`route_step`](Self::route_step),
    /// [`linear_chosen`](Self::linear_chosen) and [`sum_chosen`](Self::sum_chosen); the last four are asked of no other.
    fn repeats_steps(&self) -> bool {
        false
    }

    /// Runs one step of decoding and copies its logits to `out`.
    ///
    /// The back end may record what `run` does and repeat it for a later token without calling it again. So `run` decides
    /// nothing by values, chooses experts by [`route_step`](Self::route_step), and learns the token and the position through
    /// [`embed_step`](Self::embed_step), [`embed_at_step`](Self::embed_at_step) and [`row_at_step`](Self::row_at_step) alone.
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

    /// The row of `table` of the step's position: `[1, cols]`.
    fn embed_at_step(&self, table: &Self::Weight<'_>, step: Step) -> Result<Self::Tensor> {
        self.embed(table, &[step.position as u32])
    }

    /// The row of `x` of the step's position: `[1, cols]`.
    fn row_at_step(&self, x: &Self::Tensor, step: Step) -> Result<Self::Tensor> {
        self.rows(x, step.position, 1)
    }

    /// Makes ready for [`linear_chosen`](Self::linear_chosen) the layers `[out, in]` that stand at one place in the experts
    /// of a mixture, with their biases `[1, out]`.
    fn experts(&self, _layers: &[(&Self::Weight<'_>, Option<&Self::Tensor>)]) -> Result<Self::Experts> {
        not_repeated()
    }

    /// Chooses for the token of a step the `chosen` experts with the largest logits `[1, experts]`, without telling which.
    fn route_step(&self, _logits: &Self::Tensor, _chosen: usize) -> Result<Self::Chosen> {
        not_repeated()
    }

    /// [`linear`](Self::linear) of each chosen expert's layer: `x` is `[chosen, in]`, or `[1, in]` for all, the result is
    /// `[chosen, out]`.
    fn linear_chosen(
        &self,
        _x: &Self::Tensor,
        _layers: &Self::Experts,
        _chosen: &Self::Chosen,
    ) -> Result<Self::Tensor> {
        not_repeated()
    }

    /// The sum of what the chosen experts have computed, `[chosen, cols]`, each by its weight: `[1, cols]`.
    fn sum_chosen(&self, _y: &Self::Tensor, _chosen: &Self::Chosen) -> Result<Self::Tensor> {
        not_repeated()
    }
}

/// Stands in for what a back end that repeats no steps is not asked.
fn not_repeated() -> ! {
    unreachable!("a back end that repeats steps has this operation of its own")
}

/// What `apply` makes of each item, or its first error.
pub(crate) fn try_map<T, U, const N: usize>(items: [T; N], mut apply: impl FnMut(T) -> Result<U>) -> Result<[U; N]> {
    let mut failed = None;
    let made = items.map(|item| match failed {
        None => apply(item).map_err(|error| failed = Some(error)).ok(),
        Some(_) => None,
    });
    match failed {
        None => Ok(made.map(|made| made.expect("none failed"))),
        Some(error) => Err(error),
    }
}

/// One token that continues a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub token: u32,
    /// Positions before it.
    pub position: usize,
}

/// The angles of `tokens` positions from `first`, in f32 as transformers computes them: `[tokens, frequencies]`.
fn angles(frequencies: &[f32], first: usize, tokens: usize) -> impl Iterator<Item = f32> {
    let angle = |position: usize| frequencies.iter().map(move |frequency| position as f32 * frequency);
    (first..first + tokens).flat_map(angle)
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
    pub places: Places,
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
    /// Sorts the experts that tokens chose, `[tokens, chosen]`, by expert.
    pub(super) fn by_expert(choices: &[u32], chosen: usize, experts: usize) -> Places {
        let mut ends: Ends = smallvec![0; experts];
        choices.iter().for_each(|&expert| ends[expert as usize] += 1);
        // Where each expert's places start, and after they were filled in where they end.
        let mut start = 0;
        for end in &mut ends {
            start += std::mem::replace(end, start);
        }
        let mut places = smallvec![Place { token: 0, slot: 0 }; choices.len()];
        for (index, &expert) in choices.iter().enumerate() {
            let next = &mut ends[expert as usize];
            places[*next] = Place { token: (index / chosen) as u32, slot: (index % chosen) as u32 };
            *next += 1;
        }
        Places { places, ends }
    }
}

/// Where the places of each expert end. [experts]
type Ends = SmallVec<[usize; 64]>;

/// The tokens that each expert sees; on the stack for one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    places: SmallVec<[Place; 16]>, // [tokens * chosen], by expert
    ends: Ends,
}

impl Places {
    /// The experts that see tokens, each with these in their order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &[Place])> {
        let mut start = 0;
        let of_each = self.ends.iter().map(move |&end| &self.places[std::mem::replace(&mut start, end)..end]);
        of_each.enumerate().filter(|(_, places)| !places.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_by_expert_and_in_order() {
        // Three tokens choose two of four experts each; nobody chooses the third.
        let places = Place::by_expert(&[3, 0, 1, 3, 0, 1], 2, 4);
        let found: Vec<(usize, Vec<(u32, u32)>)> = places
            .iter()
            .map(|(expert, places)| (expert, places.iter().map(|place| (place.token, place.slot)).collect()))
            .collect();
        assert_eq!(found, [(0, vec![(0, 1), (2, 0)]), (1, vec![(1, 0), (2, 1)]), (3, vec![(0, 0), (1, 1)])]);
    }
}
