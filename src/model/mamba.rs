//! Mamba: the whole architecture.

use super::{Architecture, LayerState, Visit, check_shapes, config::MambaConfig, linear::Linear, reduce::retain};
use crate::{
    error::Result,
    ops::{Ops, Scan, Step},
    tensor::TensorSource,
};

const EMBEDDING: &str = "backbone.embeddings.weight";
const FINAL_NORM: &str = "backbone.norm_f.weight";
const HEAD: &str = "lm_head.weight";

/// A Mamba model (Gu and Dao, 2023, <https://arxiv.org/abs/2312.00752>): blocks of a causal convolution and a scan whose
/// steps depend on the input. What it remembers of a text does not grow with the text.
pub struct Mamba<'a, O: Ops> {
    ops: &'a O,
    config: MambaConfig,
    embedding: O::Weight<'a>, // [vocab, hidden]
    layers: Vec<Layer<'a, O>>,
    final_norm: O::Tensor,       // [1, hidden]
    head: Option<O::Weight<'a>>, // [vocab, hidden]; the embedding where absent
}

struct Layer<'a, O: Ops> {
    norm: O::Tensor,              // [1, hidden]
    input: Linear<'a, O>,         // [2 * channels, hidden]
    conv: O::Tensor,              // [channels, kernel]
    conv_bias: Option<O::Tensor>, // [1, channels]
    selection: O::Weight<'a>,     // [rank + 2 * states, channels]
    time_step: Linear<'a, O>,     // [channels, rank]
    a: O::Tensor,                 // [channels, states]
    d: O::Tensor,                 // [1, channels]
    output: Linear<'a, O>,        // [hidden, channels]
}

/// Tells each tensor that the model needs; a tied head is none of them.
pub(super) fn visit_tensors(config: &MambaConfig, visit: &mut Visit) -> Result<()> {
    let MambaConfig { vocab_size, hidden_size, intermediate_size: channels, state_size, time_step_rank, .. } = *config;
    visit(EMBEDDING.into(), &[vocab_size, hidden_size])?;
    for layer in 0..config.layers {
        let name = |part: &str| format!("backbone.layers.{layer}.{part}");
        visit(name("norm.weight"), &[hidden_size])?;
        visit(name("mixer.in_proj.weight"), &[2 * channels, hidden_size])?;
        visit(name("mixer.conv1d.weight"), &[channels, 1, config.conv_kernel])?;
        visit(name("mixer.x_proj.weight"), &[time_step_rank + 2 * state_size, channels])?;
        visit(name("mixer.dt_proj.weight"), &[channels, time_step_rank])?;
        visit(name("mixer.dt_proj.bias"), &[channels])?;
        visit(name("mixer.A_log"), &[channels, state_size])?;
        visit(name("mixer.D"), &[channels])?;
        visit(name("mixer.out_proj.weight"), &[hidden_size, channels])?;
        if config.use_conv_bias {
            visit(name("mixer.conv1d.bias"), &[channels])?;
        }
        if config.use_bias {
            visit(name("mixer.in_proj.bias"), &[2 * channels])?;
            visit(name("mixer.out_proj.bias"), &[hidden_size])?;
        }
    }
    visit(FINAL_NORM.into(), &[hidden_size])?;
    if !config.tie_word_embeddings {
        visit(HEAD.into(), &[vocab_size, hidden_size])?;
    }
    Ok(())
}

impl<'a, O: Ops> Mamba<'a, O> {
    /// Loads the model; every tensor's shape is checked against config.json first.
    ///
    /// # Errors
    /// As [`check_shapes`] and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        check_shapes(source)?;
        let (_, config) = Architecture::of(source)?;
        let config = MambaConfig::parse(source.path(), config)?;
        let head = if config.tie_word_embeddings { None } else { Some(ops.weight(source, HEAD)?) };
        Ok(Self {
            ops,
            embedding: ops.weight(source, EMBEDDING)?,
            layers: (0..config.layers).map(|layer| Layer::load(source, ops, &config, layer)).collect::<Result<_>>()?,
            final_norm: ops.parameter(source, FINAL_NORM)?,
            head,
            config,
        })
    }

    /// What config.json says.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// Leaves out layers whose flag is not set.
    pub(super) fn reduce(&mut self, kept: &[bool]) {
        retain(&mut self.layers, kept);
        self.config.layers = self.layers.len();
    }

    /// The name of the matrix that gives the logits.
    pub(super) fn head_name(&self) -> &'static str {
        if self.config.tie_word_embeddings { EMBEDDING } else { HEAD }
    }

    /// What one layer remembers before a text.
    pub(super) fn layer_state(&self) -> Result<LayerState<O>> {
        let MambaConfig { intermediate_size: channels, state_size, conv_kernel, .. } = self.config;
        let history = self.ops.zeros(conv_kernel - 1, channels)?;
        Ok(LayerState::Mamba { history, scan: self.ops.zeros(channels, state_size)? })
    }

    /// The input of the first block, `[tokens, hidden]`.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<O::Tensor> {
        self.ops.embed(&self.embedding, tokens)
    }

    /// The input of the first block for one token, `[1, hidden]`.
    pub(super) fn embed_step(&self, step: Step) -> Result<O::Tensor> {
        self.ops.embed_step(&self.embedding, step)
    }

    /// The back end.
    pub(super) fn ops(&self) -> &'a O {
        self.ops
    }

    /// The final hidden states, `[tokens, hidden]`.
    pub(super) fn finish(&self, x: &O::Tensor) -> Result<O::Tensor> {
        self.ops.rms_norm(x, &self.final_norm, self.config.norm_eps)
    }

    /// One block: `[tokens, hidden]` to `[tokens, hidden]`.
    pub(super) fn block(
        &self,
        layer: usize,
        x: O::Tensor,
        history: &mut O::Tensor,
        state: &mut O::Tensor,
    ) -> Result<O::Tensor> {
        let (ops, config, layer) = (self.ops, &self.config, &self.layers[layer]);
        let (channels, states, rank) = (config.intermediate_size, config.state_size, config.time_step_rank);
        let normed = ops.rms_norm(&x, &layer.norm, config.norm_eps)?;
        let projected = layer.input.apply(ops, &normed)?; // [tokens, 2 * channels]
        let (inner, gate) = (ops.columns(&projected, 0, channels)?, ops.columns(&projected, channels, channels)?);
        let inner = ops.silu(ops.depthwise_conv(&inner, &layer.conv, layer.conv_bias.as_ref(), history)?)?;
        let selected = ops.linear(&inner, &layer.selection, None)?; // [tokens, rank + 2 * states]
        let time_step = layer.time_step.apply(ops, &ops.columns(&selected, 0, rank)?)?; // [tokens, channels]
        let delta = ops.softplus(time_step)?;
        let (b, c) = (ops.columns(&selected, rank, states)?, ops.columns(&selected, rank + states, states)?);
        let scan = Scan { x: &inner, delta: &delta, a: &layer.a, b: &b, c: &c, d: &layer.d };
        let y = ops.selective_scan(scan, state)?; // [tokens, channels]
        let mixed = layer.output.apply(ops, &ops.silu_multiply(gate, y)?)?; // [tokens, hidden]
        ops.add(x, mixed)
    }

    /// The logits of the rows `first..first + count` of final hidden states: `[count, vocab]`.
    pub(super) fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        let hidden = self.ops.rows(hidden, first, count)?;
        self.ops.linear(&hidden, self.head.as_ref().unwrap_or(&self.embedding), None)
    }
}

impl<'a, O: Ops> Layer<'a, O> {
    fn load(source: &'a dyn TensorSource, ops: &O, config: &MambaConfig, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("backbone.layers.{layer}.{part}");
        let parameter = |part: &str| ops.parameter(source, &name(part));
        Ok(Self {
            norm: parameter("norm.weight")?,
            input: Linear::load(source, ops, &name("mixer.in_proj"), config.use_bias)?,
            conv: parameter("mixer.conv1d.weight")?,
            conv_bias: if config.use_conv_bias { Some(parameter("mixer.conv1d.bias")?) } else { None },
            selection: ops.weight(source, &name("mixer.x_proj.weight"))?,
            time_step: Linear::load(source, ops, &name("mixer.dt_proj"), true)?,
            a: ops.negative_exp(parameter("mixer.A_log")?)?,
            d: parameter("mixer.D")?,
            output: Linear::load(source, ops, &name("mixer.out_proj"), config.use_bias)?,
        })
    }
}
