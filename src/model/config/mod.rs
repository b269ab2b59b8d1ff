//! The model's config.json, as Hugging Face writes it today and wrote it before; every field of it is untrusted.

mod llama;
mod mamba;
mod resnet_bk;

use std::{ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};

pub use self::{
    llama::{Experts, LlamaConfig},
    mamba::MambaConfig,
    resnet_bk::ResNetBkConfig,
};
use crate::{
    error::{Error, Result},
    tensor::TensorSource,
};

/// The largest dimension that is believed: products of two of them do not overflow.
const MAX_DIMENSION: usize = 1 << 24;
/// The largest number of layers that is believed.
const MAX_LAYERS: usize = 1 << 12;
/// The largest number of experts of a layer that is believed.
const MAX_EXPERTS: usize = 1 << 12;
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

    /// A flag that is off unless set.
    fn flag(&self, key: &'static str) -> Result<bool> {
        self.flag_or(key, false)
    }

    fn flag_or(&self, key: &'static str, default: bool) -> Result<bool> {
        Ok(self.read(key, Value::as_bool, || "true or false".into())?.unwrap_or(default))
    }

    fn text(&self, key: &'static str) -> Result<Option<&'a str>> {
        self.read(key, Value::as_str, || "a string".into())
    }

    fn array(&self, key: &'static str) -> Result<Option<&'a [Value]>> {
        self.read(key, |value| value.as_array().map(Vec::as_slice), || "a list".into())
    }

    /// Whether the object has the field at all, be it null.
    fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
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
