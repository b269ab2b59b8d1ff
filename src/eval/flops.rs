//! How much a token computes and reads, counted from the forward pass itself.

use serde::Serialize;

use crate::{
    error::Result,
    model::{Model, reduce::Reduction},
    ops::count::CountOps,
    tensor::TensorSource,
};

/// Means over the tokens of one window, the logits of every position included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TokenCost {
    /// Floating-point operations, as [`CountOps`] counts them, to the nearest one.
    pub flops_per_token: u64,
    /// Bytes of the matrices, as they are stored, that decoding one token reads.
    pub weight_bytes_per_token: u64,
}

/// Counts what a token of a window of `ctx` costs in a model from which something may be left out.
///
/// # Errors
/// As [`Model::load`] and [`Model::reduce`].
///
/// # Panics
/// If `ctx` is 0 or exceeds the model's context.
pub fn token_cost(source: &dyn TensorSource, reduction: &Reduction, ctx: usize) -> Result<TokenCost> {
    let ops = CountOps::default();
    let mut model = Model::load(source, &ops)?;
    model.reduce(reduction)?;
    let mut state = model.state(ctx)?;
    // What is computed once when the model is loaded is none of a token's.
    ops.take();
    let hidden = model.forward(&vec![0; ctx], &mut state)?;
    model.logits(&hidden, 0, ctx)?;
    let counts = ops.take();
    let mean = |total: u128| ((total + ctx as u128 / 2) / ctx as u128) as u64;
    Ok(TokenCost { flops_per_token: mean(counts.flops), weight_bytes_per_token: mean(counts.matrix_bytes) })
}
