//! The Llama family: the whole architecture.

use super::{Architecture, ExpectedTensor, State, check_expected, check_tokens, config::LlamaConfig, rope};
use crate::{
    error::{Error, Result},
    ops::Ops,
    tensor::TensorSource,
};

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A model of the Llama family: pre-norm blocks of grouped-query attention with rotary positions and a gated MLP.
pub struct Llama<'a, O: Ops> {
    ops: &'a O,
    config: LlamaConfig,
    path: &'a std::path::Path,
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
    mlp_norm: O::Tensor,       // [1, hidden]
    gate: Linear<'a, O>,       // [intermediate, hidden]
    up: Linear<'a, O>,         // [intermediate, hidden]
    down: Linear<'a, O>,       // [hidden, intermediate]
}

struct Linear<'a, O: Ops> {
    weight: O::Weight<'a>,   // [out, in]
    bias: Option<O::Tensor>, // [1, out]
}

impl<'a, O: Ops> Linear<'a, O> {
    fn load(source: &'a dyn TensorSource, ops: &O, name: String, biased: bool) -> Result<Self> {
        let weight = ops.weight(source, &format!("{name}.weight"))?;
        let bias = if biased { Some(ops.vector(source, &format!("{name}.bias"))?) } else { None };
        Ok(Self { weight, bias })
    }

    fn apply(&self, ops: &O, x: &O::Tensor) -> Result<O::Tensor> {
        ops.linear(x, &self.weight, self.bias.as_ref())
    }
}

/// The tensors that the model needs; a tied head is none of them.
pub(super) fn expected_tensors(config: &LlamaConfig) -> Vec<ExpectedTensor> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut expected = Vec::new();
    let mut expect = |name: String, shape: &[usize]| expected.push(ExpectedTensor { name, shape: shape.to_vec() });
    expect(EMBEDDING.into(), &[config.vocab_size, hidden]);
    for layer in 0..config.layers {
        expect(format!("model.layers.{layer}.input_layernorm.weight"), &[hidden]);
        expect(format!("model.layers.{layer}.post_attention_layernorm.weight"), &[hidden]);
        for (name, rows, cols, biased) in [
            ("self_attn.q_proj", query, hidden, config.attention_bias),
            ("self_attn.k_proj", kv, hidden, config.attention_bias),
            ("self_attn.v_proj", kv, hidden, config.attention_bias),
            ("self_attn.o_proj", hidden, query, config.attention_bias),
            ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
            ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
        ] {
            expect(format!("model.layers.{layer}.{name}.weight"), &[rows, cols]);
            if biased {
                expect(format!("model.layers.{layer}.{name}.bias"), &[rows]);
            }
        }
    }
    expect(FINAL_NORM.into(), &[hidden]);
    if !config.tie_word_embeddings {
        expect(HEAD.into(), &[config.vocab_size, hidden]);
    }
    expected
}

impl<'a, O: Ops> Llama<'a, O> {
    /// Loads the model; every tensor's shape is checked against config.json first.
    ///
    /// # Errors
    /// As [`check_shapes`](super::check_shapes) and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        let (_, config) = Architecture::of(source)?;
        let config = LlamaConfig::parse(source.path(), config)?;
        check_expected(source, &expected_tensors(&config))?;
        let head = if config.tie_word_embeddings { None } else { Some(ops.weight(source, HEAD)?) };
        Ok(Self {
            ops,
            path: source.path(),
            embedding: ops.weight(source, EMBEDDING)?,
            layers: (0..config.layers).map(|layer| Layer::load(source, ops, &config, layer)).collect::<Result<_>>()?,
            final_norm: ops.vector(source, FINAL_NORM)?,
            head,
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            config,
        })
    }

    /// What config.json says.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The state before a text of at most `capacity` tokens.
    pub fn state(&self, capacity: usize) -> Result<State<O>> {
        let cache = |_| self.ops.cache(self.config.kv_heads, self.config.head_dim, capacity);
        Ok(State { caches: (0..self.config.layers).map(cache).collect::<Result<_>>()?, positions: 0, capacity })
    }

    /// Runs the next tokens of a text: the final hidden states, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tokens`] for an id outside of the vocabulary, or more tokens than the state has room for.
    pub fn forward(&self, tokens: &[u32], state: &mut State<O>) -> Result<O::Tensor> {
        let source_name = || self.path.display().to_string();
        check_tokens(&source_name(), tokens, self.config.vocab_size)?;
        if tokens.len() > state.capacity - state.positions {
            let why = format!(
                "{} tokens more than {} do not fit the context of {}",
                tokens.len(),
                state.positions,
                state.capacity
            );
            return Err(Error::Tokens { source_name: source_name(), why });
        }
        let ops = self.ops;
        let (cos, sin) = rope::rotations(&self.inverse_frequencies, state.positions, tokens.len());
        let pairs = self.inverse_frequencies.len();
        let (cos, sin) = (ops.constant(cos, pairs)?, ops.constant(sin, pairs)?); // [tokens, head_dim / 2]

        let mut x = ops.embed(&self.embedding, tokens)?; // [tokens, hidden]
        for (layer, cache) in self.layers.iter().zip(&mut state.caches) {
            let attended = self.attention(layer, &x, &cos, &sin, cache)?;
            x = ops.add(x, attended)?;
            let transformed = self.mlp(layer, &x)?;
            x = ops.add(x, transformed)?;
        }
        state.positions += tokens.len();
        ops.rms_norm(&x, &self.final_norm, self.config.rms_norm_eps)
    }

    /// Grouped-query attention of one block: `[tokens, hidden]` to `[tokens, hidden]`.
    fn attention(
        &self,
        layer: &Layer<'a, O>,
        x: &O::Tensor,
        cos: &O::Tensor,
        sin: &O::Tensor,
        cache: &mut O::Cache,
    ) -> Result<O::Tensor> {
        let (ops, config) = (self.ops, &self.config);
        let x = ops.rms_norm(x, &layer.attention_norm, config.rms_norm_eps)?;
        let query = ops.rope(layer.query.apply(ops, &x)?, config.heads, cos, sin)?; // [tokens, heads * head_dim]
        let key = ops.rope(layer.key.apply(ops, &x)?, config.kv_heads, cos, sin)?; // [tokens, kv_heads * head_dim]
        let value = layer.value.apply(ops, &x)?; // [tokens, kv_heads * head_dim]
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let attended = ops.attention(query, key, value, cache, config.heads, scale)?; // [tokens, heads * head_dim]
        layer.output.apply(ops, &attended)
    }

    /// The gated MLP of one block: `[tokens, hidden]` to `[tokens, hidden]`.
    fn mlp(&self, layer: &Layer<'a, O>, x: &O::Tensor) -> Result<O::Tensor> {
        let ops = self.ops;
        let x = ops.rms_norm(x, &layer.mlp_norm, self.config.rms_norm_eps)?;
        let gated = ops.silu_multiply(layer.gate.apply(ops, &x)?, layer.up.apply(ops, &x)?)?; // [tokens, intermediate]
        layer.down.apply(ops, &gated)
    }

    /// The logits of the rows `first..first + count` of final hidden states: `[count, vocab]`.
    pub fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        let hidden = self.ops.rows(hidden, first, count)?;
        self.ops.linear(&hidden, self.head.as_ref().unwrap_or(&self.embedding), None)
    }
}

impl<'a, O: Ops> Layer<'a, O> {
    fn load(source: &'a dyn TensorSource, ops: &O, config: &LlamaConfig, layer: usize) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = |part: &str| ops.vector(source, &format!("{}.weight", name(part)));
        let attention = |part: &str| Linear::load(source, ops, name(part), config.attention_bias);
        let mlp = |part: &str| Linear::load(source, ops, name(part), config.mlp_bias);
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            query: attention("self_attn.q_proj")?,
            key: attention("self_attn.k_proj")?,
            value: attention("self_attn.v_proj")?,
            output: attention("self_attn.o_proj")?,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: mlp("mlp.gate_proj")?,
            up: mlp("mlp.up_proj")?,
            down: mlp("mlp.down_proj")?,
        })
    }
}
