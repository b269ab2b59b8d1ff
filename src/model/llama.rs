//! The Llama family: the whole architecture.

use super::{
    Architecture, LayerState, Pass, Rotation, Visit, check_shapes,
    config::LlamaConfig,
    linear::Linear,
    mixture::{Choice, ExpertLinear, mixture},
    reduce::{Reduction, retain},
};
use crate::{
    error::Result,
    ops::{Ops, Step, try_map},
    tensor::TensorSource,
};

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A model of the Llama family: pre-norm blocks of grouped-query attention with rotary positions and a gated MLP.
///
/// Mistral's attention sees a window, Mixtral's MLP is a mixture of experts, Qwen2 has biases, and Qwen3 normalizes the
/// query and key of each head.
pub struct Llama<'a, O: Ops> {
    ops: &'a O,
    config: LlamaConfig,
    embedding: O::Weight<'a>, // [vocab, hidden]
    layers: Vec<Layer<'a, O>>,
    final_norm: O::Tensor,         // [1, hidden]
    head: Option<O::Weight<'a>>,   // [vocab, hidden]; the embedding where absent
    inverse_frequencies: Vec<f32>, // [head_dim / 2]
}

struct Layer<'a, O: Ops> {
    attention_norm: O::Tensor, // [1, hidden]
    query: Linear<'a, O>,      // [heads * head_dim, hidden]
    key: Linear<'a, O>,        // [kv_heads * head_dim, hidden]
    value: Linear<'a, O>,      // [kv_heads * head_dim, hidden]
    output: Linear<'a, O>,     // [hidden, heads * head_dim]
    /// Gains of the norms of each head's query and key.
    head_norms: Option<[O::Tensor; 2]>, // [1, head_dim]
    mlp_norm: O::Tensor,       // [1, hidden]
    mlp: Mlp<'a, O>,
}

enum Mlp<'a, O: Ops> {
    Dense(Gated<'a, O>),
    Mixture { router: O::Weight<'a> /* [experts, hidden] */, experts: Gated<'a, O> },
}

/// Gated MLPs: the experts of a mixture, or one.
struct Gated<'a, O: Ops> {
    gate: ExpertLinear<'a, O>, // [intermediate, hidden]
    up: ExpertLinear<'a, O>,   // [intermediate, hidden]
    down: ExpertLinear<'a, O>, // [hidden, intermediate]
}

impl<'a, O: Ops> Gated<'a, O> {
    /// `[rows, hidden]` to `[rows, hidden]`.
    fn apply(&self, ops: &O, x: &O::Tensor, choice: &Choice<'_, O>) -> Result<O::Tensor> {
        let [gate, up] = ExpertLinear::apply_all([&self.gate, &self.up], ops, x, choice)?; // [rows, intermediate]
        let gated = ops.silu_multiply(gate, up)?;
        self.down.apply(ops, &gated, choice)
    }
}

/// How the experts of a mixture are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertNames {
    /// A matrix each: `block_sparse_moe.experts.E.w1`, `w2`, `w3`.
    Single,
    /// All in one tensor: `mlp.experts.gate_up_proj` `[experts, 2 * intermediate, hidden]` and `down_proj`.
    Stacked,
}

impl ExpertNames {
    /// What the first layer has, which is taken for all.
    pub(crate) fn of(source: &dyn TensorSource) -> Self {
        match source.shape("model.layers.0.mlp.experts.gate_up_proj") {
            Some(_) => ExpertNames::Stacked,
            None => ExpertNames::Single,
        }
    }

    /// The weight of a layer that chooses among experts.
    pub(crate) const fn router(self) -> &'static str {
        match self {
            ExpertNames::Single => "block_sparse_moe.gate.weight",
            ExpertNames::Stacked => "mlp.gate.weight",
        }
    }
}

/// Tells each tensor that the model needs; a tied head is none of them.
pub(super) fn visit_tensors(source: &dyn TensorSource, config: &LlamaConfig, visit: &mut Visit) -> Result<()> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    visit(EMBEDDING.into(), &[config.vocab_size, hidden])?;
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        visit(name("input_layernorm.weight"), &[hidden])?;
        visit(name("post_attention_layernorm.weight"), &[hidden])?;
        if config.head_norms {
            visit(name("self_attn.q_norm.weight"), &[config.head_dim])?;
            visit(name("self_attn.k_norm.weight"), &[config.head_dim])?;
        }
        let mut linear = |part: &str, rows: usize, cols: usize, biased: bool| {
            visit(name(&format!("{part}.weight")), &[rows, cols])?;
            if biased { visit(name(&format!("{part}.bias")), &[rows]) } else { Ok(()) }
        };
        linear("self_attn.q_proj", query, hidden, config.qkv_bias)?;
        linear("self_attn.k_proj", kv, hidden, config.qkv_bias)?;
        linear("self_attn.v_proj", kv, hidden, config.qkv_bias)?;
        linear("self_attn.o_proj", hidden, query, config.output_bias)?;
        let Some(experts) = config.experts else {
            linear("mlp.gate_proj", intermediate, hidden, config.mlp_bias)?;
            linear("mlp.up_proj", intermediate, hidden, config.mlp_bias)?;
            linear("mlp.down_proj", hidden, intermediate, config.mlp_bias)?;
            continue;
        };
        let names = ExpertNames::of(source);
        visit(name(names.router()), &[experts.count, hidden])?;
        match names {
            ExpertNames::Stacked => {
                visit(name("mlp.experts.gate_up_proj"), &[experts.count, 2 * intermediate, hidden])?;
                visit(name("mlp.experts.down_proj"), &[experts.count, hidden, intermediate])?;
            }
            ExpertNames::Single => {
                for expert in 0..experts.count {
                    let name = |part: &str| name(&format!("block_sparse_moe.experts.{expert}.{part}.weight"));
                    visit(name("w1"), &[intermediate, hidden])?;
                    visit(name("w3"), &[intermediate, hidden])?;
                    visit(name("w2"), &[hidden, intermediate])?;
                }
            }
        }
    }
    visit(FINAL_NORM.into(), &[hidden])?;
    if !config.tie_word_embeddings {
        visit(HEAD.into(), &[config.vocab_size, hidden])?;
    }
    Ok(())
}

impl<'a, O: Ops> Llama<'a, O> {
    /// Loads the model; every tensor's shape is checked against config.json first.
    ///
    /// # Errors
    /// As [`check_shapes`] and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        check_shapes(source)?;
        let (architecture, config) = Architecture::of(source)?;
        let config = LlamaConfig::parse(source.path(), architecture, config)?;
        let head = if config.tie_word_embeddings { None } else { Some(ops.weight(source, HEAD)?) };
        Ok(Self {
            ops,
            embedding: ops.weight(source, EMBEDDING)?,
            layers: (0..config.layers).map(|layer| Layer::load(source, ops, &config, layer)).collect::<Result<_>>()?,
            final_norm: ops.parameter(source, FINAL_NORM)?,
            head,
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            config,
        })
    }

    /// What config.json says.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Leaves out layers whose flag is not set, experts and positions.
    pub(super) fn reduce(&mut self, kept: &[bool], reduction: &Reduction) {
        retain(&mut self.layers, kept);
        retain(&mut self.config.windows, kept);
        self.config.layers = self.layers.len();
        if let Some(most) = reduction.attention_window {
            self.config.windows.iter_mut().for_each(|window| *window = most.min(*window));
        }
        if let (Some(experts), Some(chosen)) = (&mut self.config.experts, reduction.experts_per_token) {
            experts.chosen = chosen;
        }
    }

    /// The name of the matrix that gives the logits.
    pub(super) fn head_name(&self) -> &'static str {
        if self.config.tie_word_embeddings { EMBEDDING } else { HEAD }
    }

    /// What one layer remembers before a text of at most `capacity` tokens.
    pub(super) fn layer_state(&self, capacity: usize) -> Result<LayerState<O>> {
        self.ops.cache(self.config.kv_heads, self.config.head_dim, capacity).map(LayerState::Attention)
    }

    /// The input of the first block, `[tokens, hidden]`.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<O::Tensor> {
        self.ops.embed(&self.embedding, tokens)
    }

    /// Cosines and sines of `tokens` positions from `first`, `[tokens, head_dim / 2]`.
    pub(super) fn rotation(&self, first: usize, tokens: usize) -> Result<Rotation<O>> {
        self.ops.rotations(&self.inverse_frequencies, first, tokens)
    }

    /// The input of the first block for one token, and the cosines and sines of its position, out of those of all.
    pub(super) fn embed_step(&self, step: Step, (cos, sin): &Rotation<O>) -> Result<(O::Tensor, Rotation<O>)> {
        let rotation = (self.ops.row_at_step(cos, step)?, self.ops.row_at_step(sin, step)?);
        Ok((self.ops.embed_step(&self.embedding, step)?, rotation))
    }

    /// The back end.
    pub(super) fn ops(&self) -> &'a O {
        self.ops
    }

    /// One block: `[tokens, hidden]` to `[tokens, hidden]`.
    pub(super) fn block(&self, layer: usize, x: O::Tensor, pass: &Pass<O>, cache: &mut O::Cache) -> Result<O::Tensor> {
        let (layer, window) = (&self.layers[layer], self.config.windows[layer]);
        let attended = self.attention(layer, &x, pass, cache, window)?;
        let x = self.ops.add(x, attended)?;
        let transformed = self.mlp(layer, &x, pass)?;
        self.ops.add(x, transformed)
    }

    /// The final hidden states, `[tokens, hidden]`.
    pub(super) fn finish(&self, x: &O::Tensor) -> Result<O::Tensor> {
        self.ops.rms_norm(x, &self.final_norm, self.config.rms_norm_eps)
    }

    /// Grouped-query attention of one block: `[tokens, hidden]` to `[tokens, hidden]`.
    fn attention(
        &self,
        layer: &Layer<'a, O>,
        x: &O::Tensor,
        pass: &Pass<O>,
        cache: &mut O::Cache,
        window: usize,
    ) -> Result<O::Tensor> {
        let (ops, config) = (self.ops, &self.config);
        let x = ops.rms_norm(x, &layer.attention_norm, config.rms_norm_eps)?;
        // [tokens, heads * head_dim], and [tokens, kv_heads * head_dim] twice
        let [mut query, mut key, value] = Linear::apply_all([&layer.query, &layer.key, &layer.value], ops, &x)?;
        if let Some([query_norm, key_norm]) = &layer.head_norms {
            query = ops.rms_norm(&query, query_norm, config.rms_norm_eps)?;
            key = ops.rms_norm(&key, key_norm, config.rms_norm_eps)?;
        }
        let (cos, sin) = pass.rotation.as_ref().expect("made for this architecture");
        let query = ops.rope(query, config.heads, cos, sin)?;
        let key = ops.rope(key, config.kv_heads, cos, sin)?;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let attended = ops.attention(query, key, value, cache, config.heads, scale, window)?;
        layer.output.apply(ops, &attended) // [tokens, heads * head_dim] to [tokens, hidden]
    }

    /// The MLP of one block: `[tokens, hidden]` to `[tokens, hidden]`.
    fn mlp(&self, layer: &Layer<'a, O>, x: &O::Tensor, pass: &Pass<O>) -> Result<O::Tensor> {
        let (ops, config) = (self.ops, &self.config);
        let x = ops.rms_norm(x, &layer.mlp_norm, config.rms_norm_eps)?;
        match &layer.mlp {
            // One expert, always taken.
            Mlp::Dense(gated) => gated.apply(ops, &x, &Choice::One(0)),
            Mlp::Mixture { router, experts } => {
                let chosen = config.experts.map_or(1, |experts| experts.chosen);
                let logits = ops.linear(&x, router, None)?; // [tokens, experts]
                let apply = |x: &O::Tensor, choice: &Choice<'_, O>| experts.apply(ops, x, choice);
                mixture(ops, &x, &logits, (chosen, config.hidden_size), pass, apply)
            }
        }
    }

    /// The logits of the rows `first..first + count` of final hidden states: `[count, vocab]`.
    pub(super) fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        let hidden = self.ops.rows(hidden, first, count)?;
        self.ops.linear(&hidden, self.head.as_ref().unwrap_or(&self.embedding), None)
    }
}

impl<'a, O: Ops> Layer<'a, O> {
    fn load(source: &'a dyn TensorSource, ops: &O, config: &LlamaConfig, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = |part: &str| ops.parameter(source, &format!("{}.weight", name(part)));
        let linear = |part: &str, biased: bool| Linear::load(source, ops, &name(part), biased);
        let only = |part: &str| linear(part, config.mlp_bias).map(ExpertLinear::alone);
        let head_norms = match config.head_norms {
            true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
            false => None,
        };
        let mlp = match config.experts {
            Some(experts) => Mlp::load_mixture(source, ops, experts.count, &name)?,
            None => Mlp::Dense(Gated {
                gate: only("mlp.gate_proj")?,
                up: only("mlp.up_proj")?,
                down: only("mlp.down_proj")?,
            }),
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            query: linear("self_attn.q_proj", config.qkv_bias)?,
            key: linear("self_attn.k_proj", config.qkv_bias)?,
            value: linear("self_attn.v_proj", config.qkv_bias)?,
            output: linear("self_attn.o_proj", config.output_bias)?,
            head_norms,
            mlp_norm: norm("post_attention_layernorm")?,
            mlp,
        })
    }
}

impl<'a, O: Ops> Mlp<'a, O> {
    fn load_mixture(
        source: &'a dyn TensorSource,
        ops: &O,
        count: usize,
        name: &impl Fn(&str) -> String,
    ) -> Result<Self> {
        let names = ExpertNames::of(source);
        let router = ops.weight(source, &name(names.router()))?;
        let [gate, up, down] = match names {
            ExpertNames::Single => try_map(["w1", "w3", "w2"], |part| {
                let name = |expert: usize| name(&format!("block_sparse_moe.experts.{expert}.{part}"));
                (0..count).map(|expert| Linear::load(source, ops, &name(expert), false)).collect::<Result<Vec<_>>>()
            })?,
            ExpertNames::Stacked => {
                let split = |part: &str, parts: usize| -> Result<Vec<_>> {
                    let matrices = ops.split(ops.weight(source, &name(part))?, parts)?.into_iter();
                    Ok(matrices.map(|weight| Linear { weight, bias: None }).collect())
                };
                // Each expert's gate comes before its up.
                let mut both = split("mlp.experts.gate_up_proj", 2 * count)?.into_iter();
                let (gates, ups) = std::iter::from_fn(|| both.next().zip(both.next())).unzip();
                [gates, ups, split("mlp.experts.down_proj", count)?]
            }
        };
        let [gate, up, down] = try_map([gate, up, down], |layers| ExpertLinear::of_mixture(ops, layers))?;
        Ok(Mlp::Mixture { router, experts: Gated { gate, up, down } })
    }
}
