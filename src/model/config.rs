//! The model's config.json, as Hugging Face writes it today and wrote it before; every field of it is untrusted.

use std::{ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};

use super::rope::{Rope, RopeScaling};
use crate::{
    error::{Error, Result},
    tensor::TensorSource,
};

/// The largest dimension that is believed: products of two of them do not overflow.
const MAX_DIMENSION: usize = 1 << 24;
/// The largest number of layers that is believed.
const MAX_LAYERS: usize = 1 << 12;
/// Positions are exact in f32 up to here.
const MAX_POSITIONS: usize = 1 << 24;

/// The key of config.json that marks a model whose weights are random; what made them is its value.
pub const SYNTHETIC_KEY: &str = "bkpack_synthetic";

/// Whether config.json says that the weights are random.
pub fn is_synthetic(config: &Value) -> bool {
    config.get(SYNTHETIC_KEY).is_some()
}

/// Refuses a model whose weights are random where its quality is asked for.
///
/// # Errors
/// [`Error::Synthetic`].
pub fn check_not_synthetic(source: &dyn TensorSource) -> Result<()> {
    match source.config() {
        Some(config) if is_synthetic(config) => Err(Error::Synthetic { path: source.path().to_owned() }),
        _ => Ok(()),
    }
}

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
    pub rms_norm_eps: f32,
    pub rope: Rope,
    /// Whether the query, key, value and output projections have a bias.
    pub attention_bias: bool,
    /// Whether the gate, up and down projections have a bias.
    pub mlp_bias: bool,
    /// Whether the embedding serves as output head.
    pub tie_word_embeddings: bool,
}

impl LlamaConfig {
    /// Reads and checks the configuration; `path` is the model's, for errors.
    ///
    /// # Errors
    /// [`Error::Config`] names the first field that is absent, of the wrong type, out of range or not supported.
    pub fn parse(path: &Path, config: &Value) -> Result<Self> {
        let fields = Fields::new(path, config)?;
        let hidden_size = fields.required("hidden_size", 1..=MAX_DIMENSION)?;
        let heads = fields.required("num_attention_heads", 1..=hidden_size)?;
        let kv_heads = fields.integer("num_key_value_heads", 1..=heads)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(fields.error("num_key_value_heads", format!("{kv_heads} does not divide the {heads} heads")));
        }
        let head_dim = match fields.integer("head_dim", 1..=MAX_DIMENSION)? {
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
        let max_positions = fields.integer("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(2048);
        Ok(Self {
            vocab_size: fields.required("vocab_size", 1..=MAX_DIMENSION)?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size", 1..=MAX_DIMENSION)?,
            layers: fields.required("num_hidden_layers", 1..=MAX_LAYERS)?,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rms_norm_eps: fields.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
            rope: parse_rope(&fields, max_positions)?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
        })
    }
}

/// Rotary embedding: one object since transformers 5 (`rope_parameters`), `rope_theta` and `rope_scaling` before.
fn parse_rope(fields: &Fields, max_positions: usize) -> Result<Rope> {
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
        None => fields.number("rope_theta", THETA)?.unwrap_or(10_000.0),
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

/// The token that begins a text: `bos_token_id` of config.json.
///
/// # Errors
/// [`Error::Config`] if it is no token id.
pub fn bos_token(source: &dyn TensorSource) -> Result<Option<u32>> {
    let Some(config) = source.config() else { return Ok(None) };
    let bos = Fields::new(source.path(), config)?.integer("bos_token_id", 0..=MAX_DIMENSION)?;
    Ok(bos.map(|id| id as u32))
}

/// The tokens that end a text: `eos_token_id`, one or a list, of generation_config.json or else of config.json.
///
/// # Errors
/// [`Error::Json`] if generation_config.json does not parse; [`Error::Config`] if the field holds no token ids.
pub fn eos_tokens(source: &dyn TensorSource) -> Result<Vec<u32>> {
    let generation: Option<Value> = match source.file("generation_config.json")? {
        Some(bytes) => Some(crate::json::parse(&source.path().join("generation_config.json"), &bytes)?),
        None => None,
    };
    let field = |config: Option<&Value>| config?.get("eos_token_id").filter(|id| !id.is_null()).cloned();
    let ids = match field(generation.as_ref()).or_else(|| field(source.config())) {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids,
        Some(id) => vec![id],
    };
    let valid = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    ids.iter().map(valid).collect::<Option<Vec<_>>>().ok_or_else(|| Error::Config {
        path: source.path().to_owned(),
        field: "eos_token_id",
        why: "must be a token id or a list of token ids".into(),
    })
}

/// Typed access to a JSON object; `null` is as good as absent.
struct Fields<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
    /// The field that holds the object, where it is not the whole file.
    parent: Option<&'static str>,
}

impl<'a> Fields<'a> {
    fn new(path: &'a Path, config: &'a Value) -> Result<Self> {
        match config {
            Value::Object(object) => Ok(Self { path, object, parent: None }),
            _ => Err(Error::Json { path: path.to_owned(), why: "config.json is not an object".into() }),
        }
    }

    fn error(&self, key: &'static str, why: String) -> Error {
        let path = self.path.to_owned();
        match self.parent {
            None => Error::Config { path, field: key, why },
            Some(parent) => Error::Config { path, field: parent, why: format!("{key}: {why}") },
        }
    }

    fn absent(&self, key: &'static str) -> Error {
        self.error(key, "absent".into())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Reads a field with `read`, which gives `None` for what is not `rule`.
    fn read<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
        rule: impl FnOnce() -> String,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(key, format!("{} is not {}", excerpt(value), rule())))
    }

    fn integer(&self, key: &'static str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let read = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|value| range.contains(value));
        self.read(key, read, || format!("an integer from {} to {}", range.start(), range.end()))
    }

    fn required(&self, key: &'static str, range: RangeInclusive<usize>) -> Result<usize> {
        self.integer(key, range)?.ok_or_else(|| self.absent(key))
    }

    fn number(&self, key: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let read = |value: &Value| value.as_f64().filter(|value| range.contains(value));
        self.read(key, read, || format!("a number from {} to {}", range.start(), range.end()))
    }

    fn flag(&self, key: &'static str) -> Result<bool> {
        Ok(self.read(key, Value::as_bool, || "true or false".into())?.unwrap_or(false))
    }

    fn text(&self, key: &'static str) -> Result<Option<&'a str>> {
        self.read(key, Value::as_str, || "a string".into())
    }

    fn object(&self, key: &'static str) -> Result<Option<Fields<'a>>> {
        let object = self.read(key, Value::as_object, || "an object".into())?;
        Ok(object.map(|object| Fields { path: self.path, object, parent: Some(key) }))
    }
}

/// A value as JSON, cut where it is long.
fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        LlamaConfig::parse(Path::new("model"), config)
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
        assert!(!config.attention_bias && !config.mlp_bias && !config.tie_word_embeddings);
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
    fn other_kinds_of_rope_are_refused_by_name() {
        for kind in ["yarn", "dynamic", "longrope", "su"] {
            let error = parse(&with(json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}}))).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("rope_scaling") && text.contains(&format!("{kind:?}")), "{text}");
        }
    }
}
