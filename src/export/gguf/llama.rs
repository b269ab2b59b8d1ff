//! The Llama family as llama.cpp has it: architectures `llama` (Mistral and Mixtral, too), `qwen2` and `qwen3`.

use serde_json::Value as Json;

use super::{
    container::{Metadata, Value},
    entry::{Content, Description, Entry, Order, Piece},
};
use crate::{
    error::Result,
    format::PackedFile,
    model::{
        Architecture,
        config::{Experts, LlamaConfig},
        llama::ExpertNames,
        rope::{Rope, RopeScaling},
    },
    tensor::TensorSource,
};

/// llama.cpp's limit (`LLAMA_MAX_EXPERTS`).
const MAX_EXPERTS: usize = 512;

/// Describes a model of the family.
///
/// # Errors
/// As [`LlamaConfig::parse`].
pub(super) fn describe(packed: &PackedFile, architecture: Architecture, config: &Json) -> Result<Description> {
    let config = LlamaConfig::parse(packed.path(), architecture, config)?;
    let name = match architecture {
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        _ => "llama",
    };
    Ok(Description {
        metadata: metadata(name, &config),
        entries: entries(packed, name, &config),
        vocab_size: config.vocab_size,
        refusals: refusals(name, &config),
        warnings: warnings(&config),
    })
}

fn metadata(name: &str, config: &LlamaConfig) -> Metadata {
    let mut metadata = vec![("general.architecture".to_owned(), Value::String(name.into()))];
    let mut add = |key: &str, value: Value| metadata.push((format!("{name}.{key}"), value));
    add("vocab_size", Value::count(config.vocab_size));
    add("context_length", Value::count(config.max_positions));
    add("embedding_length", Value::count(config.hidden_size));
    add("block_count", Value::count(config.layers));
    add("feed_forward_length", Value::count(config.intermediate_size));
    add("attention.head_count", Value::count(config.heads));
    add("attention.head_count_kv", Value::count(config.kv_heads));
    add("attention.key_length", Value::count(config.head_dim));
    add("attention.value_length", Value::count(config.head_dim));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    add("rope.dimension_count", Value::count(config.head_dim));
    add("rope.freq_base", Value::F32(config.rope.theta));
    if let RopeScaling::Linear { factor } = config.rope.scaling {
        add("rope.scaling.type", Value::String("linear".into()));
        add("rope.scaling.factor", Value::F32(factor));
    }
    if let Some(experts) = config.experts {
        add("expert_count", Value::count(experts.count));
        add("expert_used_count", Value::count(experts.chosen));
    }
    metadata
}

fn entries(packed: &PackedFile, name: &str, config: &LlamaConfig) -> Vec<Entry> {
    let LlamaConfig { vocab_size, hidden_size: hidden, intermediate_size: intermediate, head_dim, .. } = *config;
    let (query, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
    // Only `llama` turns neighbouring elements; Qwen's architectures do as transformers does.
    let turned = if name == "llama" { Order::Interleaved { head_dim } } else { Order::AsTheyAre };
    let plain = Order::AsTheyAre;
    let embedding = "model.embed_tokens.weight".to_owned();
    let mut entries = vec![Entry::matrix("token_embd.weight".into(), embedding, [vocab_size, hidden], plain)];
    if let RopeScaling::Llama3 { .. } = config.rope.scaling {
        let factors = frequency_divisors(&config.rope, head_dim);
        entries.push(Entry {
            name: "rope_freqs.weight".into(),
            shape: vec![factors.len()],
            content: Content::Values(factors),
            wide: true,
        });
    }
    for layer in 0..config.layers {
        let ours = |part: &str| format!("model.layers.{layer}.{part}");
        let theirs = |part: &str| format!("blk.{layer}.{part}");
        let mut vector = |to: &str, from: &str, length: usize| {
            entries.push(Entry::vector(theirs(to), ours(from), length, plain));
        };
        vector("attn_norm.weight", "input_layernorm.weight", hidden);
        vector("ffn_norm.weight", "post_attention_layernorm.weight", hidden);
        if config.head_norms {
            vector("attn_q_norm.weight", "self_attn.q_norm.weight", head_dim);
            vector("attn_k_norm.weight", "self_attn.k_norm.weight", head_dim);
        }
        let mut linear = |to: &str, from: &str, shape: [usize; 2], order: Order, biased: bool| {
            let (to_weight, from_weight) = (format!("{to}.weight"), format!("{from}.weight"));
            entries.push(Entry::matrix(theirs(&to_weight), ours(&from_weight), shape, order));
            if biased {
                let (to_bias, from_bias) = (format!("{to}.bias"), format!("{from}.bias"));
                entries.push(Entry::vector(theirs(&to_bias), ours(&from_bias), shape[0], order));
            }
        };
        linear("attn_q", "self_attn.q_proj", [query, hidden], turned, config.qkv_bias);
        linear("attn_k", "self_attn.k_proj", [kv, hidden], turned, config.qkv_bias);
        linear("attn_v", "self_attn.v_proj", [kv, hidden], plain, config.qkv_bias);
        linear("attn_output", "self_attn.o_proj", [hidden, query], plain, config.output_bias);
        match config.experts {
            None => {
                linear("ffn_gate", "mlp.gate_proj", [intermediate, hidden], plain, config.mlp_bias);
                linear("ffn_up", "mlp.up_proj", [intermediate, hidden], plain, config.mlp_bias);
                linear("ffn_down", "mlp.down_proj", [hidden, intermediate], plain, config.mlp_bias);
            }
            Some(experts) => mixture(packed, config, experts, layer, &mut entries),
        }
    }
    entries.push(Entry::vector("output_norm.weight".into(), "model.norm.weight".into(), hidden, plain));
    if !config.tie_word_embeddings {
        entries.push(Entry::matrix("output.weight".into(), "lm_head.weight".into(), [vocab_size, hidden], plain));
    }
    entries
}

/// The experts of one layer: llama.cpp has each of the three matrices of all experts in one tensor.
fn mixture(packed: &PackedFile, config: &LlamaConfig, experts: Experts, layer: usize, entries: &mut Vec<Entry>) {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let ours = |part: &str| format!("model.layers.{layer}.{part}");
    let theirs = |part: &str| format!("blk.{layer}.{part}.weight");
    let piece = |tensor: String, rows| Piece { tensor, rows, order: Order::AsTheyAre };
    let stack = |name: String, rows: usize, cols: usize, pieces: Vec<Piece>| Entry {
        name,
        shape: vec![experts.count, rows, cols],
        content: Content::Rows(pieces),
        wide: false,
    };
    let names = ExpertNames::of(packed);
    let router = Entry::matrix(theirs("ffn_gate_inp"), ours(names.router()), [experts.count, hidden], Order::AsTheyAre);
    entries.push(Entry { wide: true, ..router });
    if names == ExpertNames::Stacked {
        let half = |which: usize| {
            let rows = |expert| (2 * expert + which) * intermediate..(2 * expert + which + 1) * intermediate;
            (0..experts.count).map(|expert| piece(ours("mlp.experts.gate_up_proj"), rows(expert))).collect()
        };
        let down = vec![piece(ours("mlp.experts.down_proj"), 0..experts.count * hidden)];
        entries.push(stack(theirs("ffn_gate_exps"), intermediate, hidden, half(0)));
        entries.push(stack(theirs("ffn_up_exps"), intermediate, hidden, half(1)));
        entries.push(stack(theirs("ffn_down_exps"), hidden, intermediate, down));
    } else {
        for (to, part, rows, cols) in [
            ("ffn_gate_exps", "w1", intermediate, hidden),
            ("ffn_up_exps", "w3", intermediate, hidden),
            ("ffn_down_exps", "w2", hidden, intermediate),
        ] {
            let name = |expert| ours(&format!("block_sparse_moe.experts.{expert}.{part}.weight"));
            let pieces = (0..experts.count).map(|expert| piece(name(expert), 0..rows)).collect();
            entries.push(stack(theirs(to), rows, cols, pieces));
        }
    }
}

/// What llama.cpp divides each frequency by: `[head_dim / 2]`.
fn frequency_divisors(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let plain = Rope { scaling: RopeScaling::Default, ..*rope }.inverse_frequencies(head_dim);
    plain.iter().zip(rope.inverse_frequencies(head_dim)).map(|(plain, stretched)| plain / stretched).collect()
}

fn refusals(name: &str, config: &LlamaConfig) -> Vec<String> {
    let mut refusals = Vec::new();
    if name == "qwen2" && config.heads * config.head_dim != config.hidden_size {
        refusals.push(format!(
            "its {} heads of {} are not as wide as the hidden size {}, which llama.cpp takes for granted in qwen2",
            config.heads, config.head_dim, config.hidden_size
        ));
    }
    if name == "qwen3" && config.output_bias {
        refusals.push("llama.cpp's qwen3 has no bias in the attention's output projection (attention_bias)".into());
    }
    if name != "llama" && matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) {
        refusals.push(format!("llama.cpp's {name} cannot scale rotary frequencies as Llama 3 does (rope_type llama3)"));
    }
    if let Some(experts) = config.experts.filter(|experts| experts.count > MAX_EXPERTS) {
        refusals.push(format!("{} experts are more than the {MAX_EXPERTS} that llama.cpp allows", experts.count));
    }
    refusals
}

fn warnings(config: &LlamaConfig) -> Vec<String> {
    let Some(narrowest) = config.narrowest_window() else { return Vec::new() };
    vec![format!(
        "has no sliding window for this architecture: beyond {narrowest} tokens its attention sees more than the model was \
         made for; keep contexts at {narrowest} tokens or below"
    )]
}
