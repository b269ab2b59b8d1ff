//! The quantized activations of the Birman-Schwinger core of a ResNet-BK layer, and what they were before and after.

use super::Pass;
use crate::{
    error::Result,
    ops::Ops,
    tensor::{ActivationQuantization, TensorSource},
};

/// The component that [`ActivationQuantization`] records them under.
pub const COMPONENT: &str = "bk_core";

/// The name of the scales `[3, groups]` of one layer; rows v, Re G, Im G.
pub fn scale_name(layer: usize) -> String {
    format!("blocks.{layer}.bk_layer.activation_scale")
}

/// The largest code of a width: the grid is symmetric.
pub fn largest_code(bits: u32) -> f32 {
    ((1u32 << (bits - 1)) - 1) as f32
}

/// The record of the core's quantized activations, where the model has one.
pub fn core_record(source: &dyn TensorSource) -> Option<&ActivationQuantization> {
    source.activations().iter().find(|record| record.component == COMPONENT)
}

/// The grid of one layer's activations.
pub(super) struct CoreGrid<O: Ops> {
    potential: O::Tensor, // [positions, 1]
    resolvent: O::Tensor, // [positions, 2]
    largest: f32,
}

impl<O: Ops> CoreGrid<O> {
    /// The grid of a layer for `positions` positions, where the model has one.
    ///
    /// # Panics
    /// If the record has fewer positions.
    pub fn load(source: &dyn TensorSource, ops: &O, layer: usize, positions: usize) -> Result<Option<Self>> {
        let name = scale_name(layer);
        let Some(record) = core_record(source).filter(|record| record.scales.contains(&name)) else { return Ok(None) };
        let mut scales = Vec::new(); // [3, groups]
        ops.read(&ops.parameter(source, &name)?, &mut scales)?;
        let groups = scales.len() / 3;
        // A record may claim a group larger than any model; its scale serves all positions.
        let group = usize::try_from(record.group_size).unwrap_or(usize::MAX);
        let scale = |row: usize, position: usize| scales[row * groups + position / group];
        let potential = (0..positions).map(|position| scale(0, position)).collect();
        let resolvent = (0..positions).flat_map(|position| [scale(1, position), scale(2, position)]).collect();
        Ok(Some(Self {
            potential: ops.constant(potential, 1)?,
            resolvent: ops.constant(resolvent, 2)?,
            largest: largest_code(record.bits),
        }))
    }

    /// Rounds the potential `[tokens, 1]` of the positions of a pass.
    pub fn round_potential(&self, ops: &O, v: O::Tensor, pass: &Pass<O>) -> Result<O::Tensor> {
        ops.round_to_grid(v, &pass.positions(ops, &self.potential)?, self.largest)
    }

    /// Rounds the resolvent `[tokens, 2]` of the positions of a pass.
    pub fn round_resolvent(&self, ops: &O, g: O::Tensor, pass: &Pass<O>) -> Result<O::Tensor> {
        ops.round_to_grid(g, &pass.positions(ops, &self.resolvent)?, self.largest)
    }
}

/// v, Re G and Im G of one layer over the tokens of a call.
#[derive(Clone, Debug, Default)]
pub struct CoreValues {
    pub v: Vec<f32>,    // [tokens]
    pub re_g: Vec<f32>, // [tokens]
    pub im_g: Vec<f32>, // [tokens]
}

impl CoreValues {
    pub(super) fn read<O: Ops>(ops: &O, potential: &O::Tensor, resolvent: &O::Tensor) -> Result<Self> {
        let (mut v, mut g) = (Vec::new(), Vec::new());
        ops.read(potential, &mut v)?;
        ops.read(resolvent, &mut g)?;
        let (pairs, _) = g.as_chunks::<2>();
        Ok(Self {
            v,
            re_g: pairs.iter().map(|pair| pair[0]).collect(),
            im_g: pairs.iter().map(|pair| pair[1]).collect(),
        })
    }

    /// In the order of the rows of the scales.
    pub fn rows(&self) -> [&[f32]; 3] {
        [&self.v, &self.re_g, &self.im_g]
    }
}

/// What one layer's core computed in the last call.
#[derive(Clone, Debug, Default)]
pub struct CoreTrace {
    /// Without rounding: neither of v nor of G.
    pub exact: CoreValues,
    /// What the layer went on with.
    pub used: CoreValues,
}
