//! The tensors of each family: names and shapes as Hugging Face has them, and how their values are drawn.

use serde_json::Value;

/// The keys under which a config.json says how many layers there are.
pub(super) const LAYER_COUNTS: [&str; 2] = ["num_hidden_layers", "n_layers"];

/// The usual standard deviation of a trained matrix.
const STD: f32 = 0.02;

/// One tensor to be written.
#[derive(Clone, Debug)]
pub(super) struct SynthTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub draw: Draw,
}

/// How values are drawn. Trained weights of the family are about like this, and a forward pass stays finite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Draw {
    /// Gaussian around zero; a few columns are larger, as they are in trained matrices.
    Matrix { std: f32 },
    /// Gaussian.
    Normal { mean: f32, std: f32 },
    /// All the same.
    Constant(f32),
    /// `ln(1), ..., ln(columns)` in each row: Mamba's `A_log`.
    LogOfColumn,
    /// What softplus turns into step sizes, which are log-uniform between these: Mamba's `dt_proj.bias`.
    TimeStepBias { min: f32, max: f32 },
}

const MATRIX: Draw = Draw::Matrix { std: STD };
const NORM: Draw = Draw::Normal { mean: 1.0, std: STD };
const BIAS: Draw = Draw::Normal { mean: 0.0, std: STD };

impl SynthTensor {
    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A size in a preset's config.
///
/// # Panics
/// If it is absent: a mistake in `presets.json`.
pub(super) fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("the preset has no {key}")) as usize
}

/// The tensors of the model that a preset's config describes, in the order of the layers.
///
/// # Panics
/// If the config lacks a size or is of an unknown family: a mistake in `presets.json`.
pub(super) fn tensors(config: &Value) -> Vec<SynthTensor> {
    let mut list = List(Vec::new());
    match config["model_type"].as_str() {
        Some("llama" | "mistral" | "mixtral" | "qwen2" | "qwen3") => transformer(config, &mut list),
        Some("mamba") => mamba(config, &mut list),
        Some("resnet_bk") => resnet_bk(config, &mut list),
        other => panic!("no family {other:?}"),
    }
    list.0
}

struct List(Vec<SynthTensor>);

impl List {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], draw: Draw) {
        self.0.push(SynthTensor { name: name.into(), shape: shape.to_vec(), draw });
    }

    /// The weight of a linear layer, `[out, in]`, and its bias, `[out]`.
    fn linear(&mut self, name: &str, rows: usize, cols: usize, biased: bool) {
        self.add(format!("{name}.weight"), &[rows, cols], MATRIX);
        if biased {
            self.add(format!("{name}.bias"), &[rows], BIAS);
        }
    }
}

fn transformer(config: &Value, list: &mut List) {
    let get = |key| size(config, key);
    let family = config["model_type"].as_str();
    let (vocab, hidden, intermediate) = (get("vocab_size"), get("hidden_size"), get("intermediate_size"));
    let (heads, kv_heads) = (get("num_attention_heads"), get("num_key_value_heads"));
    let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |head_dim| head_dim as usize);
    list.add("model.embed_tokens.weight", &[vocab, hidden], MATRIX);
    for layer in 0..get("num_hidden_layers") {
        let prefix = format!("model.layers.{layer}");
        let attention = format!("{prefix}.self_attn");
        // Qwen2 has biases though its config does not say so.
        let biased = family == Some("qwen2");
        list.add(format!("{prefix}.input_layernorm.weight"), &[hidden], NORM);
        list.linear(&format!("{attention}.q_proj"), heads * head_dim, hidden, biased);
        list.linear(&format!("{attention}.k_proj"), kv_heads * head_dim, hidden, biased);
        list.linear(&format!("{attention}.v_proj"), kv_heads * head_dim, hidden, biased);
        list.linear(&format!("{attention}.o_proj"), hidden, heads * head_dim, false);
        if family == Some("qwen3") {
            list.add(format!("{attention}.q_norm.weight"), &[head_dim], NORM);
            list.add(format!("{attention}.k_norm.weight"), &[head_dim], NORM);
        }
        list.add(format!("{prefix}.post_attention_layernorm.weight"), &[hidden], NORM);
        if family == Some("mixtral") {
            let experts = get("num_local_experts");
            list.linear(&format!("{prefix}.block_sparse_moe.gate"), experts, hidden, false);
            for expert in 0..experts {
                let prefix = format!("{prefix}.block_sparse_moe.experts.{expert}");
                list.linear(&format!("{prefix}.w1"), intermediate, hidden, false);
                list.linear(&format!("{prefix}.w2"), hidden, intermediate, false);
                list.linear(&format!("{prefix}.w3"), intermediate, hidden, false);
            }
        } else {
            list.linear(&format!("{prefix}.mlp.gate_proj"), intermediate, hidden, false);
            list.linear(&format!("{prefix}.mlp.up_proj"), intermediate, hidden, false);
            list.linear(&format!("{prefix}.mlp.down_proj"), hidden, intermediate, false);
        }
    }
    list.add("model.norm.weight", &[hidden], NORM);
    if config["tie_word_embeddings"] == false {
        list.linear("lm_head", vocab, hidden, false);
    }
}

fn mamba(config: &Value, list: &mut List) {
    let get = |key| size(config, key);
    let (hidden, inner, states) = (get("hidden_size"), get("intermediate_size"), get("state_size"));
    let (rank, kernel) = (get("time_step_rank"), get("conv_kernel"));
    let step = |key: &str| config[key].as_f64().expect("a step size") as f32;
    let step_bias = Draw::TimeStepBias { min: step("time_step_min"), max: step("time_step_max") };
    // A convolution has few inputs, so its weights are larger: uniform from -bound to bound in PyTorch.
    let kernel_std = 1.0 / (3.0 * kernel as f32).sqrt();
    list.add("backbone.embeddings.weight", &[get("vocab_size"), hidden], MATRIX);
    for layer in 0..get("num_hidden_layers") {
        let prefix = format!("backbone.layers.{layer}");
        let mixer = format!("{prefix}.mixer");
        list.add(format!("{prefix}.norm.weight"), &[hidden], NORM);
        list.add(format!("{mixer}.A_log"), &[inner, states], Draw::LogOfColumn);
        list.add(format!("{mixer}.D"), &[inner], Draw::Constant(1.0));
        let convolution = Draw::Normal { mean: 0.0, std: kernel_std };
        list.add(format!("{mixer}.conv1d.weight"), &[inner, 1, kernel], convolution);
        list.add(format!("{mixer}.conv1d.bias"), &[inner], BIAS);
        list.linear(&format!("{mixer}.in_proj"), 2 * inner, hidden, false);
        list.linear(&format!("{mixer}.x_proj"), rank + 2 * states, inner, false);
        list.linear(&format!("{mixer}.dt_proj"), inner, rank, false);
        list.add(format!("{mixer}.dt_proj.bias"), &[inner], step_bias);
        list.linear(&format!("{mixer}.out_proj"), hidden, inner, false);
    }
    list.add("backbone.norm_f.weight", &[hidden], NORM);
}

fn resnet_bk(config: &Value, list: &mut List) {
    let get = |key| size(config, key);
    let (vocab, width, experts) = (get("vocab_size"), get("d_model"), get("num_experts"));
    let layer_norm = |list: &mut List, name: &str| {
        list.add(format!("{name}.weight"), &[width], NORM);
        list.add(format!("{name}.bias"), &[width], BIAS);
    };
    list.add("token_embedding.weight", &[vocab, width], MATRIX);
    list.add("position_embedding.weight", &[get("n_seq"), width], MATRIX);
    for layer in 0..get("n_layers") {
        let prefix = format!("blocks.{layer}");
        let bk = format!("{prefix}.bk_layer");
        layer_norm(list, &format!("{prefix}.layer_norm"));
        list.linear(&format!("{bk}.moe_ffn.gating_network"), experts, width, true);
        for expert in 0..experts {
            list.linear(&format!("{bk}.moe_ffn.experts.{expert}.0"), 2 * width, width, true);
            list.linear(&format!("{bk}.moe_ffn.experts.{expert}.3"), width, 2 * width, true);
        }
        list.linear(&format!("{bk}.v_proj"), 1, width, true);
        list.linear(&format!("{bk}.output_proj"), width, 2, true);
        list.add(format!("{bk}.bk_scale"), &[], Draw::Constant(1.0));
    }
    layer_norm(list, "layer_norm_final");
    list.linear("lm_head", vocab, width, true);
}
