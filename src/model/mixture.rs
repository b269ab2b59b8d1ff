//! A sparse mixture of experts: each token goes through the few that its router likes most.

use smallvec::SmallVec;

use super::{Pass, linear::Linear};
use crate::{
    error::Result,
    ops::{Ops, try_map},
};

/// The layers that stand at one place in the experts of a mixture.
pub(super) struct ExpertLinear<'a, O: Ops> {
    layers: Vec<Linear<'a, O>>, // [experts]
    /// For steps, where the back end [repeats](Ops::repeats_steps) them and there is a mixture.
    together: Option<O::Experts>,
}

/// Which experts the rows of an input go through.
pub(super) enum Choice<'c, O: Ops> {
    /// All through one.
    One(usize),
    /// One row for each that a step has chosen, or one for all of these.
    Chosen(&'c O::Chosen),
}

impl<'a, O: Ops> ExpertLinear<'a, O> {
    /// Those of a mixture, a layer of each expert.
    pub fn of_mixture(ops: &O, layers: Vec<Linear<'a, O>>) -> Result<Self> {
        let together = if ops.repeats_steps() {
            let all: Vec<_> = layers.iter().map(|layer| (&layer.weight, layer.bias.as_ref())).collect();
            Some(ops.experts(&all)?)
        } else {
            None
        };
        Ok(Self { layers, together })
    }

    /// That of the one expert where there is no mixture.
    pub fn alone(layer: Linear<'a, O>) -> Self {
        Self { layers: vec![layer], together: None }
    }

    /// Several layers over one input: `[rows, in]` to `[rows, out]` of each.
    pub fn apply_all<const N: usize>(
        layers: [&Self; N],
        ops: &O,
        x: &O::Tensor,
        choice: &Choice<'_, O>,
    ) -> Result<[O::Tensor; N]> {
        match choice {
            Choice::One(expert) => Linear::apply_all(layers.map(|layer| &layer.layers[*expert]), ops, x),
            Choice::Chosen(chosen) => try_map(layers, |layer| {
                let together = layer.together.as_ref().expect("made for a back end that repeats steps");
                ops.linear_chosen(x, together, chosen)
            }),
        }
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn apply(&self, ops: &O, x: &O::Tensor, choice: &Choice<'_, O>) -> Result<O::Tensor> {
        let [y] = Self::apply_all([self], ops, x, choice)?;
        Ok(y)
    }
}

/// The weighted sum of what the `chosen` experts of each token compute: `x` `[tokens, width]` to `[tokens, width]`.
///
/// `logits` is the router's `[tokens, experts]`; `experts` runs rows through some of them.
pub(super) fn mixture<O: Ops>(
    ops: &O,
    x: &O::Tensor,
    logits: &O::Tensor,
    (chosen, width): (usize, usize),
    pass: &Pass<O>,
    experts: impl Fn(&O::Tensor, &Choice<'_, O>) -> Result<O::Tensor>,
) -> Result<O::Tensor> {
    if pass.step.is_some() && ops.repeats_steps() {
        let chosen = ops.route_step(logits, chosen)?;
        let y = experts(x, &Choice::Chosen(&chosen))?; // [chosen, width]
        return ops.sum_chosen(&y, &chosen);
    }
    let routing = ops.route(logits, chosen)?;
    let mut sum = ops.zeros(pass.tokens, width)?;
    for (index, places) in routing.places.iter() {
        let rows: SmallVec<[u32; 16]> = places.iter().map(|place| place.token).collect();
        let y = experts(&ops.gather(x, &rows)?, &Choice::One(index))?; // [places, width]
        sum = ops.scatter_add(sum, &y, places, &routing.weights)?;
    }
    Ok(sum)
}
