//! The manifest: one JSON document in the header that says what each tensor is and what its bytes hash to.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::tensor::ActivationQuantization;

/// What a packed file says of itself. Unknown fields are ignored, except inside an encoding, a part and a record of
/// activations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version.
    pub version: u64,
    /// The program and version that wrote it.
    pub producer: String,
    /// What it was packed from.
    pub source: Source,
    /// How encodings were chosen, as the producer records it.
    pub policy: Value,
    /// The model's config.json; null where the checkpoint had none.
    #[serde(deserialize_with = "Option::deserialize")]
    pub config: Option<Value>,
    /// Which shard this is; absent in a model of one file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardInfo>,
    /// The logical tensors, in natural order of their names.
    pub tensors: Vec<TensorEntry>,
    /// How activations are quantized; absent where they are not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub activations: Vec<ActivationQuantization>,
    /// Files that travel with the model.
    pub files: Vec<FileEntry>,
}

/// The checkpoint that a model was packed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// `huggingface`, `safetensors`, `npz` or `torch`.
    pub kind: String,
    pub files: Vec<SourceFile>,
}

/// One file of weights of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceFile {
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

impl SourceFile {
    /// A file whose hash is not known yet.
    pub fn unhashed(name: String, bytes: u64) -> Self {
        Self { name, bytes, blake3: super::ZERO_HASH.into() }
    }
}

/// The place of a file among the shards of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// From 1.
    pub index: u64,
    pub count: u64,
    /// The same in all shards of one conversion: a hash of producer, source, policy and where the model was cut.
    pub set: String,
}

/// One logical tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub name: String,
    pub shape: Vec<u64>,
    /// Which component of the model it belongs to (`other`, `embedding`, ...).
    pub component: String,
    /// Which half of a complex tensor it is; see [`crate::tensor::ComplexPart`].
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub complex: Option<Value>,
    /// A tagged object; see [`crate::encoding::Encoding`].
    pub encoding: Value,
    /// Why it has this encoding, where the policy does not say it, as the producer records it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Value>,
    /// An object from roles to parts; see [`Parts`].
    pub parts: Value,
}

/// A field that is there, null included: only its absence is `None`.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// The stored tensors that make up a logical one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// Plain values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Part>,
    /// Codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<Part>,
    /// A scale a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Part>,
    /// A zero point a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_point: Option<Part>,
}

/// One stored tensor and the BLAKE3 of its bytes, in lowercase hex.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub name: String,
    pub blake3: String,
}

/// A file that travels with the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub part: Part,
}
