//! A sparse mixture of experts: each token goes through the few that its router likes most.

use smallvec::SmallVec;

use crate::{error::Result, ops::Ops};

/// The weighted sum of what the `chosen` experts of each token compute: `x` `[tokens, width]` to `[tokens, width]`.
///
/// `logits` is the router's `[tokens, experts]`; `expert` runs one of them on the tokens that chose it.
pub(super) fn mixture<O: Ops>(
    ops: &O,
    x: &O::Tensor,
    logits: &O::Tensor,
    chosen: usize,
    (tokens, width): (usize, usize),
    expert: impl Fn(usize, &O::Tensor) -> Result<O::Tensor>,
) -> Result<O::Tensor> {
    let routing = ops.route(logits, chosen)?;
    let mut sum = ops.zeros(tokens, width)?;
    for (index, places) in routing.places.iter() {
        let rows: SmallVec<[u32; 16]> = places.iter().map(|place| place.token).collect();
        let y = expert(index, &ops.gather(x, &rows)?)?; // [places, width]
        sum = ops.scatter_add(sum, &y, places, &routing.weights)?;
    }
    Ok(sum)
}
