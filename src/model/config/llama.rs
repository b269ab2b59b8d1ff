//! The Llama family: Llama itself and the architectures that differ from it in a few places.

use std::{ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};

use super::{Fields, MAX_DIMENSION, MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS};
use crate::{
    error::Result,
    model::{
        Architecture,
        rope::{Rope, RopeScaling},
    },
};

/// What defines a model of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// The longest context, in tokens.
    pub max_positions: usize,
    /// How many of the last positions the attention of each layer sees, its own included; `usize::MAX` for all.
    pub windows: Vec<usize>, // [layers]
    pub rms_norm_eps: f32,
    pub rope: Rope,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the gate, up and down projections have a bias.
    pub mlp_bias: bool,
    /// Whether each head's query and key are normalized before they are turned.
    pub head_norms: bool,
    /// The experts of each layer's MLP; `None` where the MLP is dense.
    pub experts: Option<Experts>,
    /// Whether the embedding serves as output head.
    pub tie_word_embeddings: bool,
}

/// A sparse mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// Experts that each token goes through.
    pub chosen: usize,
}

impl LlamaConfig {
    /// Tokens of the narrowest sliding window, if there is one that a text within the model's positions outgrows.
    pub fn narrowest_window(&self) -> Option<usize> {
        self.windows.iter().min().copied().filter(|&window| window < self.max_positions)
    }

    /// Reads and checks the configuration of an architecture of this family; `path` is the model's, for errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) names the first field that is absent, of the wrong type, out of
    /// range or not supported.
    pub fn parse(path: &Path, architecture: Architecture, config: &Value) -> Result<Self> {
        let fields = Fields::new(path, config)?;
        let defaults = Defaults::of(architecture);
        let hidden_size = fields.required("hidden_size", 1..=MAX_DIMENSION)?;
        let heads = fields.required("num_attention_heads", 1..=hidden_size)?;
        let kv_heads = match fields.integer("num_key_value_heads", 1..=heads)? {
            Some(kv_heads) => kv_heads,
            // Hugging Face reads null as one for each head, and a missing field as the architecture's default.
            None if fields.has("num_key_value_heads") => heads,
            None => defaults.kv_heads.unwrap_or(heads),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(fields.error("num_key_value_heads", format!("{kv_heads} does not divide the {heads} heads")));
        }
        let head_dim = match fields.integer("head_dim", 1..=MAX_DIMENSION)?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let why = format!("absent, and the hidden size {hidden_size} is no multiple of the {heads} heads");
                return Err(fields.error("head_dim", why));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("{head_dim} is odd, but rotary embedding turns pairs")));
        }
        if heads * head_dim > MAX_DIMENSION {
            return Err(fields.error("head_dim", format!("{heads} heads of {head_dim} are too large")));
        }
        let activation = fields.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(fields.error("hidden_act", format!("{activation:?} is not supported, only \"silu\"")));
        }
        let max_positions =
            fields.integer("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(defaults.max_positions);
        let layers = fields.required("num_hidden_layers", 1..=MAX_LAYERS)?;
        // The others have no such fields: Hugging Face's models do not look at them.
        let biased =
            matches!(architecture, Architecture::Llama | Architecture::Qwen3) && fields.flag("attention_bias")?;
        Ok(Self {
            vocab_size: fields.required("vocab_size", 1..=MAX_DIMENSION)?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size", 1..=MAX_DIMENSION)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            windows: parse_windows(&fields, architecture, layers)?,
            rms_norm_eps: fields.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(defaults.rms_norm_eps) as f32,
            rope: parse_rope(&fields, max_positions, defaults.rope_theta)?,
            qkv_bias: biased || architecture == Architecture::Qwen2,
            output_bias: biased,
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias")?,
            head_norms: architecture == Architecture::Qwen3,
            experts: if architecture == Architecture::Mixtral { Some(parse_experts(&fields)?) } else { None },
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
        })
    }
}

/// What Hugging Face takes for a field that config.json leaves out.
struct Defaults {
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    max_positions: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
}

impl Defaults {
    fn of(architecture: Architecture) -> Self {
        let llama =
            Self { kv_heads: None, head_dim: None, max_positions: 2048, rms_norm_eps: 1e-6, rope_theta: 10_000.0 };
        match architecture {
            Architecture::Mistral => Self { kv_heads: Some(8), max_positions: 1 << 17, ..llama },
            Architecture::Mixtral => {
                Self { kv_heads: Some(8), max_positions: 1 << 17, rms_norm_eps: 1e-5, rope_theta: 1e6, ..llama }
            }
            Architecture::Qwen2 => Self { kv_heads: Some(32), max_positions: 1 << 15, ..llama },
            Architecture::Qwen3 => Self { kv_heads: Some(32), head_dim: Some(128), max_positions: 1 << 15, ..llama },
            _ => llama,
        }
    }
}

/// The window of each layer. Mistral and Mixtral have one for all layers; Qwen lists the layers that have it.
fn parse_windows(fields: &Fields, architecture: Architecture, layers: usize) -> Result<Vec<usize>> {
    const DEFAULT_WINDOW: usize = 4096;
    const FIRST_WINDOWED_LAYER: usize = 28;
    let window = fields.integer("sliding_window", 1..=MAX_POSITIONS)?;
    match architecture {
        // Hugging Face reads a missing field as 4096, and null as no window.
        Architecture::Mistral if !fields.has("sliding_window") => Ok(vec![DEFAULT_WINDOW; layers]),
        Architecture::Mistral | Architecture::Mixtral => Ok(vec![window.unwrap_or(usize::MAX); layers]),
        Architecture::Qwen2 | Architecture::Qwen3 if fields.flag("use_sliding_window")? => {
            let window = match window {
                None if fields.has("sliding_window") => usize::MAX,
                window => window.unwrap_or(DEFAULT_WINDOW),
            };
            let of_kind = |windowed: bool| if windowed { window } else { usize::MAX };
            let Some(kinds) = fields.array("layer_types")? else {
                let first = fields.integer("max_window_layers", 0..=MAX_LAYERS)?.unwrap_or(FIRST_WINDOWED_LAYER);
                return Ok((0..layers).map(|layer| of_kind(layer >= first)).collect());
            };
            if kinds.len() != layers {
                let why = format!("names {} layers where num_hidden_layers says {layers}", kinds.len());
                return Err(fields.error("layer_types", why));
            }
            let kinds = kinds.iter().map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(of_kind(false)),
                Some("sliding_attention") => Ok(of_kind(true)),
                _ => Err(fields
                    .error("layer_types", format!("{kind} is neither \"full_attention\" nor \"sliding_attention\""))),
            });
            kinds.collect()
        }
        _ => Ok(vec![usize::MAX; layers]),
    }
}

fn parse_experts(fields: &Fields) -> Result<Experts> {
    let count = fields.required("num_local_experts", 1..=MAX_EXPERTS)?;
    let chosen = fields.required("num_experts_per_tok", 1..=count)?;
    Ok(Experts { count, chosen })
}

/// Rotary embedding: one object since transformers 5 (`rope_parameters`), `rope_theta` and `rope_scaling` before.
fn parse_rope(fields: &Fields, max_positions: usize, default_theta: f64) -> Result<Rope> {
    const THETA: RangeInclusive<f64> = 1.0..=1e12;
    const FACTOR: RangeInclusive<f64> = 1.0..=1e6;
    const POSITIONS: RangeInclusive<f64> = 1.0..=MAX_POSITIONS as f64;

    let scaling = match fields.object("rope_parameters")? {
        Some(object) => Some(object),
        None => fields.object("rope_scaling")?,
    };
    // With no object of its own, every parameter has its default.
    let empty = Map::new();
    let scaling = scaling.unwrap_or(Fields { path: fields.path, object: &empty, parent: Some("rope_parameters") });

    let rotated = match scaling.number("partial_rotary_factor", 0.0..=1.0)? {
        Some(factor) => Some(factor),
        None => fields.number("partial_rotary_factor", 0.0..=1.0)?,
    };
    if rotated.is_some_and(|factor| factor != 1.0) {
        return Err(fields.error("partial_rotary_factor", "only 1 is supported".into()));
    }
    let theta = match scaling.number("rope_theta", THETA)? {
        Some(theta) => theta,
        None => fields.number("rope_theta", THETA)?.unwrap_or(default_theta),
    };
    let kind = match scaling.text("rope_type")? {
        Some(kind) => kind,
        None => scaling.text("type")?.unwrap_or("default"),
    };
    let factor = |key| scaling.number(key, FACTOR)?.ok_or_else(|| scaling.absent(key)).map(|value| value as f32);
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor("factor")? },
        "llama3" => {
            let key = "original_max_position_embeddings";
            let original = match scaling.number(key, POSITIONS)? {
                Some(original) => original,
                None => fields.number(key, POSITIONS)?.unwrap_or(max_positions as f64),
            };
            let (low, high) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low >= high {
                let why = format!("{low} is not below high_freq_factor, {high}");
                return Err(scaling.error("low_freq_factor", why));
            }
            RopeScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original as f32,
            }
        }
        other => {
            let why = format!("{other:?} is not supported (supported: default, linear, llama3)");
            return Err(scaling.error("rope_type", why));
        }
    };
    Ok(Rope { theta: theta as f32, scaling })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Error;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
            "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024
        })
    }

    fn with(changes: Value) -> Value {
        let mut config = base();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    fn parse(config: &Value) -> Result<LlamaConfig> {
        LlamaConfig::parse(Path::new("model"), Architecture::Llama, config)
    }

    #[test]
    fn both_spellings_give_the_same_config() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512});
        let mut today = llama3.clone();
        today["rope_theta"] = json!(500000.0);
        let today = parse(&with(json!({"rope_parameters": today, "dtype": "float32"}))).unwrap();
        let before = with(json!({"rope_theta": 500000.0, "rope_scaling": llama3, "torch_dtype": "float32"}));
        assert_eq!(today, parse(&before).unwrap());
        assert_eq!(today.rope.theta, 500000.0);
        assert_eq!(
            today.rope.scaling,
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 512.0
            }
        );

        let today = with(json!({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}}));
        let before = with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
        assert_eq!(parse(&today).unwrap(), parse(&before).unwrap());
        let plain = with(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}));
        assert_eq!(parse(&plain).unwrap(), parse(&with(json!({"rope_scaling": null}))).unwrap());
    }

    #[test]
    fn what_may_be_absent_has_a_default() {
        let mut config = base();
        let object = config.as_object_mut().unwrap();
        for key in ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings"] {
            object.remove(key);
        }
        let config = parse(&config).unwrap();
        assert_eq!((config.kv_heads, config.head_dim, config.max_positions), (8, 32, 2048));
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::Default });
        assert!(!config.qkv_bias && !config.output_bias && !config.mlp_bias && !config.tie_word_embeddings);
        assert_eq!(parse(&with(json!({"head_dim": 64}))).unwrap().head_dim, 64);
    }

    #[test]
    fn what_must_be_there_is_named() {
        let fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
        for field in fields {
            let mut config = base();
            config.as_object_mut().unwrap().remove(field);
            assert!(matches!(parse(&config), Err(Error::Config { field: found, .. }) if found == field), "{field}");
        }
    }

    #[test]
    fn malformed_fields_are_errors_that_name_them() {
        let huge = u64::MAX;
        for (field, changes) in [
            ("vocab_size", json!({"vocab_size": huge})),
            ("vocab_size", json!({"vocab_size": 0})),
            ("vocab_size", json!({"vocab_size": 4096.5})),
            ("vocab_size", json!({"vocab_size": [4096]})),
            ("hidden_size", json!({"hidden_size": -256})),
            ("hidden_size", json!({"hidden_size": huge / 2})),
            ("hidden_size", json!({"hidden_size": "256"})),
            ("intermediate_size", json!({"intermediate_size": 1e300})),
            ("num_hidden_layers", json!({"num_hidden_layers": 0})),
            ("num_hidden_layers", json!({"num_hidden_layers": huge})),
            ("num_attention_heads", json!({"num_attention_heads": 0})),
            ("num_attention_heads", json!({"num_attention_heads": 257})),
            ("num_key_value_heads", json!({"num_key_value_heads": 0})),
            ("num_key_value_heads", json!({"num_key_value_heads": 3})),
            ("num_key_value_heads", json!({"num_key_value_heads": 16})),
            ("head_dim", json!({"head_dim": 31})),
            ("head_dim", json!({"head_dim": 0})),
            ("head_dim", json!({"head_dim": 1 << 24})),
            ("head_dim", json!({"num_attention_heads": 7, "num_key_value_heads": 7})),
            ("max_position_embeddings", json!({"max_position_embeddings": 0})),
            ("max_position_embeddings", json!({"max_position_embeddings": huge})),
            ("rms_norm_eps", json!({"rms_norm_eps": -1e-6})),
            ("rms_norm_eps", json!({"rms_norm_eps": "1e-6"})),
            ("hidden_act", json!({"hidden_act": "gelu"})),
            ("hidden_act", json!({"hidden_act": 1})),
            ("attention_bias", json!({"attention_bias": 1})),
            ("tie_word_embeddings", json!({"tie_word_embeddings": "yes"})),
            ("rope_theta", json!({"rope_theta": 0.0})),
            ("partial_rotary_factor", json!({"partial_rotary_factor": 0.5})),
            ("partial_rotary_factor", json!({"rope_parameters": {"partial_rotary_factor": 0.5}})),
            ("rope_parameters", json!({"rope_parameters": "default"})),
            ("rope_parameters", json!({"rope_parameters": {"rope_type": 3}})),
            ("rope_parameters", json!({"rope_parameters": {"rope_theta": "1e4"}})),
            ("rope_scaling", json!({"rope_scaling": {"type": "linear"}})),
            ("rope_scaling", json!({"rope_scaling": {"type": "linear", "factor": 0}})),
            (
                "rope_scaling",
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4}}),
            ),
        ] {
            match parse(&with(changes.clone())) {
                Err(Error::Config { field: found, .. }) => assert_eq!(found, field, "{changes}"),
                other => panic!("{changes}: {other:?}"),
            }
        }
        assert!(matches!(parse(&json!([])), Err(Error::Json { .. })));
    }

    #[test]
    fn null_and_absent_are_what_hugging_face_takes_them_for() {
        let of = |architecture, changes| LlamaConfig::parse(Path::new("model"), architecture, &with(changes)).unwrap();
        let windows = |architecture, changes| of(architecture, changes).windows[0];
        let null = || json!({"sliding_window": null, "use_sliding_window": true, "max_window_layers": 0});
        assert_eq!(windows(Architecture::Mistral, json!({})), 4096);
        assert_eq!(windows(Architecture::Mistral, null()), usize::MAX);
        assert_eq!(windows(Architecture::Qwen2, null()), usize::MAX);
        let used = json!({"use_sliding_window": true, "max_window_layers": 2, "sliding_window": 8});
        let all = usize::MAX;
        let windows = of(Architecture::Qwen2, used.clone()).windows;
        assert_eq!((&windows[..2], &windows[2..]), (&[all; 2][..], &[8; 4][..]));
        let mut kinds = used;
        kinds["layer_types"] = json!([
            "sliding_attention",
            "full_attention",
            "full_attention",
            "full_attention",
            "full_attention",
            "sliding_attention"
        ]);
        assert_eq!(of(Architecture::Qwen3, kinds).windows, [8, all, all, all, all, 8]);
        assert_eq!(of(Architecture::Qwen2, json!({"sliding_window": 8})).windows, [all; 6]);

        assert_eq!(of(Architecture::Mistral, json!({"num_key_value_heads": null})).kv_heads, 8);
        assert_eq!(
            of(Architecture::Qwen3, json!({"num_attention_heads": 16, "num_key_value_heads": null})).kv_heads,
            16
        );
        let biased = json!({"attention_bias": true, "mlp_bias": true});
        let biases = |architecture| {
            let config = of(architecture, biased.clone());
            (config.qkv_bias, config.output_bias, config.mlp_bias)
        };
        assert_eq!(biases(Architecture::Llama), (true, true, true));
        assert_eq!(biases(Architecture::Mistral), (false, false, false));
        assert_eq!(biases(Architecture::Qwen2), (true, false, false));
        assert_eq!(biases(Architecture::Qwen3), (true, true, false));
    }

    #[test]
    fn other_kinds_of_rope_are_refused_by_name() {
        for kind in ["yarn", "dynamic", "longrope", "su"] {
            let error = parse(&with(json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}}))).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("rope_scaling") && text.contains(&format!("{kind:?}")), "{text}");
        }
    }
}
