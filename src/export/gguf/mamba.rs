//! Mamba as llama.cpp has it: architecture `mamba`.

use serde_json::Value as Json;

use super::{
    container::{Metadata, Value},
    entry::{Content, Description, Entry, Order, Piece},
};
use crate::{error::Result, format::PackedFile, model::config::MambaConfig, tensor::TensorSource};

/// The context that llama.cpp is told: the state does not grow, so it bounds nothing.
const CONTEXT: usize = 1 << 20;

/// Describes a Mamba model.
///
/// # Errors
/// As [`MambaConfig::parse`].
pub(super) fn describe(packed: &PackedFile, config: &Json) -> Result<Description> {
    let config = MambaConfig::parse(packed.path(), config)?;
    let mut refusals = Vec::new();
    if config.intermediate_size != 2 * config.hidden_size {
        refusals.push(format!(
            "llama.cpp runs Mamba only where the inner size, here {}, is twice the hidden size, {}",
            config.intermediate_size, config.hidden_size
        ));
    }
    if config.use_bias {
        refusals.push("llama.cpp's mamba has no bias in the input and output projections (use_bias)".into());
    }
    let vocab_size = config.vocab_size;
    Ok(Description {
        metadata: metadata(&config),
        entries: entries(&config),
        vocab_size,
        refusals,
        warnings: Vec::new(),
    })
}

fn metadata(config: &MambaConfig) -> Metadata {
    let mut metadata = vec![("general.architecture".to_owned(), Value::String("mamba".into()))];
    let mut add = |key: &str, value: Value| metadata.push((format!("mamba.{key}"), value));
    add("vocab_size", Value::count(config.vocab_size));
    add("context_length", Value::count(CONTEXT));
    add("embedding_length", Value::count(config.hidden_size));
    add("block_count", Value::count(config.layers));
    // It has neither, but llama.cpp asks.
    add("feed_forward_length", Value::U32(0));
    add("attention.head_count", Value::U32(0));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
    add("ssm.conv_kernel", Value::count(config.conv_kernel));
    add("ssm.inner_size", Value::count(config.intermediate_size));
    add("ssm.state_size", Value::count(config.state_size));
    add("ssm.time_step_rank", Value::count(config.time_step_rank));
    add("ssm.dt_b_c_rms", Value::Bool(false));
    metadata
}

fn entries(config: &MambaConfig) -> Vec<Entry> {
    let MambaConfig { vocab_size, hidden_size: hidden, intermediate_size: channels, .. } = *config;
    let MambaConfig { state_size: states, time_step_rank: rank, conv_kernel: kernel, .. } = *config;
    let plain = Order::AsTheyAre;
    let embedding = "backbone.embeddings.weight".to_owned();
    let mut entries = vec![Entry::matrix("token_embd.weight".into(), embedding, [vocab_size, hidden], plain)];
    for layer in 0..config.layers {
        let ours = |part: &str| format!("backbone.layers.{layer}.{part}");
        let theirs = |part: &str| format!("blk.{layer}.{part}");
        let vector = |to: &str, from: &str, length| Entry::vector(theirs(to), ours(from), length, plain);
        let matrix = |to: &str, from: &str, shape| Entry::matrix(theirs(to), ours(from), shape, plain);
        entries.push(vector("attn_norm.weight", "norm.weight", hidden));
        entries.push(matrix("ssm_in.weight", "mixer.in_proj.weight", [2 * channels, hidden]));
        // [channels, 1, kernel] in the packed file; the middle dimension is dropped.
        let convolution = Piece { tensor: ours("mixer.conv1d.weight"), rows: 0..channels, order: plain };
        entries.push(Entry {
            name: theirs("ssm_conv1d.weight"),
            shape: vec![channels, kernel],
            content: Content::Rows(vec![convolution]),
            wide: true,
        });
        entries.push(if config.use_conv_bias {
            vector("ssm_conv1d.bias", "mixer.conv1d.bias", channels)
        } else {
            // llama.cpp insists on one.
            let content = Content::Values(vec![0.0; channels]);
            Entry { name: theirs("ssm_conv1d.bias"), shape: vec![channels], content, wide: true }
        });
        entries.push(matrix("ssm_x.weight", "mixer.x_proj.weight", [rank + 2 * states, channels]));
        entries.push(matrix("ssm_dt.weight", "mixer.dt_proj.weight", [channels, rank]));
        entries.push(vector("ssm_dt.bias", "mixer.dt_proj.bias", channels));
        let content = Content::NegativeExp(ours("mixer.A_log"));
        entries.push(Entry { name: theirs("ssm_a"), shape: vec![channels, states], content, wide: true });
        entries.push(vector("ssm_d", "mixer.D", channels));
        entries.push(matrix("ssm_out.weight", "mixer.out_proj.weight", [hidden, channels]));
    }
    entries.push(Entry::vector("output_norm.weight".into(), "backbone.norm_f.weight".into(), hidden, plain));
    if !config.tie_word_embeddings {
        entries.push(Entry::matrix("output.weight".into(), "lm_head.weight".into(), [vocab_size, hidden], plain));
    }
    entries
}
