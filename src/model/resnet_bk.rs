//! ResNet-BK: the whole architecture.

use super::{
    Architecture, LayerState, Pass, Visit, check_shapes,
    config::ResNetBkConfig,
    core_activations::{CoreGrid, CoreTrace, CoreValues, core_record},
    linear::Linear,
    mixture::{Choice, ExpertLinear, mixture},
    reduce::{Reduction, retain},
};
use crate::{
    error::Result,
    ops::{Ops, Step, try_map},
    tensor::TensorSource,
};

const TOKEN_EMBEDDING: &str = "token_embedding.weight";
const POSITION_EMBEDDING: &str = "position_embedding.weight";
const FINAL_NORM: &str = "layer_norm_final";
const HEAD: &str = "lm_head";

/// A ResNet-BK model: blocks of a sparse mixture of experts whose output sets the potential of a tridiagonal operator;
/// the diagonal of the operator's resolvent (the Birman-Schwinger core) mixes the positions in linear time.
pub struct ResNetBk<'a, O: Ops> {
    ops: &'a O,
    config: ResNetBkConfig,
    max_positions: usize,
    token_embedding: O::Weight<'a>,    // [vocab, hidden]
    position_embedding: O::Weight<'a>, // [max_positions, hidden]
    positions: Vec<u32>,               // 0, 1, ...: the rows of the above
    layers: Vec<Layer<'a, O>>,
    final_norm: Norm<O>,
    head: Linear<'a, O>, // [vocab, hidden]
}

struct Layer<'a, O: Ops> {
    norm: Norm<O>,
    router: Linear<'a, O>, // [experts, hidden]
    experts: Experts<'a, O>,
    potential: Linear<'a, O>, // [1, hidden]
    output: Linear<'a, O>,    // [hidden, 2]
    scale: O::Tensor,         // [1, 1]
    /// Where the activations of the core are quantized.
    grid: Option<CoreGrid<O>>,
}

struct Norm<O: Ops> {
    gain: O::Tensor, // [1, hidden]
    bias: O::Tensor, // [1, hidden]
}

struct Experts<'a, O: Ops> {
    up: ExpertLinear<'a, O>,   // [2 * hidden, hidden]
    down: ExpertLinear<'a, O>, // [hidden, 2 * hidden]
}

/// Tells each tensor that the model needs.
pub(super) fn visit_tensors(config: &ResNetBkConfig, visit: &mut Visit) -> Result<()> {
    let hidden = config.hidden_size;
    visit(TOKEN_EMBEDDING.into(), &[config.vocab_size, hidden])?;
    visit(POSITION_EMBEDDING.into(), &[config.max_positions, hidden])?;
    for layer in 0..config.layers {
        visit(format!("blocks.{layer}.bk_layer.bk_scale"), &[])?;
    }
    let mut both = |name: String, weight: &[usize], bias: usize| {
        visit(format!("{name}.weight"), weight)?;
        visit(format!("{name}.bias"), &[bias])
    };
    for layer in 0..config.layers {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        both(name("layer_norm"), &[hidden], hidden)?;
        both(name("bk_layer.moe_ffn.gating_network"), &[config.experts.count, hidden], config.experts.count)?;
        for expert in 0..config.experts.count {
            let name = |part: &str| name(&format!("bk_layer.moe_ffn.experts.{expert}.{part}"));
            both(name("0"), &[2 * hidden, hidden], 2 * hidden)?;
            both(name("3"), &[hidden, 2 * hidden], hidden)?;
        }
        both(name("bk_layer.v_proj"), &[1, hidden], 1)?;
        both(name("bk_layer.output_proj"), &[hidden, 2], hidden)?;
    }
    both(FINAL_NORM.into(), &[hidden], hidden)?;
    both(HEAD.into(), &[config.vocab_size, hidden], config.vocab_size)?;
    Ok(())
}

impl<'a, O: Ops> ResNetBk<'a, O> {
    /// Loads the model; every tensor's shape is checked against config.json first.
    ///
    /// # Errors
    /// As [`check_shapes`] and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        check_shapes(source)?;
        let (_, config) = Architecture::of(source)?;
        let config = ResNetBkConfig::parse(source.path(), config)?;
        // Positions without scales cannot be run with quantized activations.
        let scaled = core_record(source).map_or(u64::MAX, |record| record.positions);
        let max_positions = config.max_positions.min(usize::try_from(scaled).unwrap_or(usize::MAX));
        let layers = (0..config.layers).map(|layer| Layer::load(source, ops, &config, layer, max_positions));
        Ok(Self {
            ops,
            token_embedding: ops.weight(source, TOKEN_EMBEDDING)?,
            position_embedding: ops.weight(source, POSITION_EMBEDDING)?,
            layers: layers.collect::<Result<_>>()?,
            positions: (0..config.max_positions as u32).collect(),
            max_positions,
            final_norm: Norm::load(source, ops, FINAL_NORM)?,
            head: Linear::load(source, ops, HEAD, true)?,
            config,
        })
    }

    /// What config.json says.
    pub fn config(&self) -> &ResNetBkConfig {
        &self.config
    }

    /// Leaves out layers whose flag is not set, and experts.
    pub(super) fn reduce(&mut self, kept: &[bool], reduction: &Reduction) {
        retain(&mut self.layers, kept);
        self.config.layers = self.layers.len();
        if let Some(chosen) = reduction.experts_per_token {
            self.config.experts.chosen = chosen;
        }
    }

    /// The longest context, in tokens.
    pub(super) fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Whether the activations of the core are rounded.
    pub(super) fn quantizes_core(&self) -> bool {
        self.layers.iter().any(|layer| layer.grid.is_some())
    }

    pub(super) fn keep_core_exact(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.grid = None);
        self.max_positions = self.config.max_positions;
    }

    /// What one layer remembers before a text.
    pub(super) fn layer_state(&self) -> Result<LayerState<O>> {
        Ok(LayerState::Resolvent { last: self.ops.carry()? })
    }

    /// The input of the first block, `[tokens, hidden]`, for positions from `first`.
    pub(super) fn embed(&self, tokens: &[u32], first: usize) -> Result<O::Tensor> {
        let positions = &self.positions[first..first + tokens.len()];
        let embedded = self.ops.embed(&self.token_embedding, tokens)?;
        self.ops.add(embedded, self.ops.embed(&self.position_embedding, positions)?)
    }

    /// The input of the first block for one token, `[1, hidden]`.
    pub(super) fn embed_step(&self, step: Step) -> Result<O::Tensor> {
        let embedded = self.ops.embed_step(&self.token_embedding, step)?;
        self.ops.add(embedded, self.ops.embed_at_step(&self.position_embedding, step)?)
    }

    /// One block: `[tokens, hidden]` to `[tokens, hidden]`; what its core computes goes to `core` where a text begins.
    pub(super) fn block(
        &self,
        layer: usize,
        x: O::Tensor,
        pass: &Pass<O>,
        last: &mut O::Carry,
        core: Option<&mut Vec<CoreTrace>>,
    ) -> Result<O::Tensor> {
        let (ops, layer) = (self.ops, &self.layers[layer]);
        let normed = layer.norm.apply(ops, &x, self.config.norm_eps)?;
        let features = self.experts(layer, &normed, pass)?; // [tokens, hidden]
        let potential = layer.potential.apply(ops, &features)?;
        let potential = ops.clamp(potential, self.config.v_max)?; // [tokens, 1]
        let traced = match core {
            Some(core) if pass.first == 0 => Some((core, self.exact_core(&potential)?)),
            _ => None,
        };
        let (potential, resolvent) = self.core(layer, potential, last, pass)?;
        if let Some((core, exact)) = traced {
            core.push(CoreTrace { exact, used: CoreValues::read(ops, &potential, &resolvent)? });
        }
        let mixed = layer.output.apply(ops, &resolvent)?; // [tokens, hidden]
        ops.add(x, ops.add_scaled(features, &mixed, &layer.scale)?)
    }

    /// The back end.
    pub(super) fn ops(&self) -> &'a O {
        self.ops
    }

    /// The final hidden states, `[tokens, hidden]`.
    pub(super) fn finish(&self, x: &O::Tensor) -> Result<O::Tensor> {
        self.final_norm.apply(self.ops, x, self.config.norm_eps)
    }

    /// The mixture of experts of one block: `[tokens, hidden]` to `[tokens, hidden]`.
    fn experts(&self, layer: &Layer<'a, O>, x: &O::Tensor, pass: &Pass<O>) -> Result<O::Tensor> {
        let logits = layer.router.apply(self.ops, x)?; // [tokens, experts]
        let shape = (self.config.experts.chosen, self.config.hidden_size);
        let apply = |x: &O::Tensor, choice: &Choice<'_, O>| layer.experts.apply(self.ops, x, choice);
        mixture(self.ops, x, &logits, shape, pass, apply)
    }

    /// The potential `[tokens, 1]` and its resolvent `[tokens, 2]`, rounded where the layer's activations are quantized.
    fn core(
        &self,
        layer: &Layer<'a, O>,
        potential: O::Tensor,
        last: &mut O::Carry,
        pass: &Pass<O>,
    ) -> Result<(O::Tensor, O::Tensor)> {
        let Some(grid) = &layer.grid else {
            let resolvent = self.resolvent(&potential, last)?;
            return Ok((potential, resolvent));
        };
        let potential = grid.round_potential(self.ops, potential, pass)?;
        let resolvent = self.resolvent(&potential, last)?;
        Ok((potential, grid.round_resolvent(self.ops, resolvent, pass)?))
    }

    /// What the core computes without rounding, at the start of a text.
    fn exact_core(&self, potential: &O::Tensor) -> Result<CoreValues> {
        CoreValues::read(self.ops, potential, &self.resolvent(potential, &mut self.ops.carry()?)?)
    }

    /// `[tokens, 1]` to `[tokens, 2]`.
    fn resolvent(&self, potential: &O::Tensor, last: &mut O::Carry) -> Result<O::Tensor> {
        let resolvent = match self.config.causal {
            true => self.ops.causal_resolvent(potential, self.config.z, last)?,
            false => self.ops.resolvent(potential, self.config.z)?,
        };
        self.ops.clamp(resolvent, self.config.feature_clamp)
    }

    /// The logits of the rows `first..first + count` of final hidden states: `[count, vocab]`.
    pub(super) fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        self.head.apply(self.ops, &self.ops.rows(hidden, first, count)?)
    }
}

impl<'a, O: Ops> Layer<'a, O> {
    fn load(
        source: &'a dyn TensorSource,
        ops: &O,
        config: &ResNetBkConfig,
        layer: usize,
        positions: usize,
    ) -> Result<Self> {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        let linear = |part: &str| Linear::load(source, ops, &name(part), true);
        let [up, down] = try_map(["0", "3"], |part| {
            let layer = |expert: usize| linear(&format!("bk_layer.moe_ffn.experts.{expert}.{part}"));
            ExpertLinear::of_mixture(ops, (0..config.experts.count).map(layer).collect::<Result<_>>()?)
        })?;
        Ok(Self {
            norm: Norm::load(source, ops, &name("layer_norm"))?,
            router: linear("bk_layer.moe_ffn.gating_network")?,
            experts: Experts { up, down },
            potential: linear("bk_layer.v_proj")?,
            output: linear("bk_layer.output_proj")?,
            scale: ops.parameter(source, &name("bk_layer.bk_scale"))?,
            grid: CoreGrid::load(source, ops, layer, positions)?,
        })
    }
}

impl<O: Ops> Norm<O> {
    fn load(source: &dyn TensorSource, ops: &O, name: &str) -> Result<Self> {
        let parameter = |part: &str| ops.parameter(source, &format!("{name}.{part}"));
        Ok(Self { gain: parameter("weight")?, bias: parameter("bias")? })
    }

    fn apply(&self, ops: &O, x: &O::Tensor, epsilon: f32) -> Result<O::Tensor> {
        ops.layer_norm(x, &self.gain, &self.bias, epsilon)
    }
}

impl<O: Ops> Experts<'_, O> {
    /// `[rows, hidden]` to `[rows, hidden]`.
    fn apply(&self, ops: &O, x: &O::Tensor, choice: &Choice<'_, O>) -> Result<O::Tensor> {
        let raised = ops.relu(self.up.apply(ops, x, choice)?)?; // [rows, 2 * hidden]
        self.down.apply(ops, &raised, choice)
    }
}
