//! A linear layer: a matrix and, where the model has one, a bias.

use crate::{error::Result, ops::Ops, tensor::TensorSource};

pub(super) struct Linear<'a, O: Ops> {
    pub weight: O::Weight<'a>,   // [out, in]
    pub bias: Option<O::Tensor>, // [1, out]
}

impl<'a, O: Ops> Linear<'a, O> {
    /// Loads `name.weight` and, if `biased`, `name.bias`.
    pub fn load(source: &'a dyn TensorSource, ops: &O, name: &str, biased: bool) -> Result<Self> {
        let weight = ops.weight(source, &format!("{name}.weight"))?;
        let bias = if biased { Some(ops.parameter(source, &format!("{name}.bias"))?) } else { None };
        Ok(Self { weight, bias })
    }

    /// Several layers over one input: `[tokens, in]` to `[tokens, out]` of each.
    pub fn apply_all<const N: usize>(layers: [&Self; N], ops: &O, x: &O::Tensor) -> Result<[O::Tensor; N]> {
        ops.linears(x, layers.map(|layer| (&layer.weight, layer.bias.as_ref())))
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn apply(&self, ops: &O, x: &O::Tensor) -> Result<O::Tensor> {
        ops.linear(x, &self.weight, self.bias.as_ref())
    }
}
