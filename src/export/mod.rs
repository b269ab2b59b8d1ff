//! Packed models in the layouts of other runtimes: what would become of each tensor, and the writing of it.

pub mod gguf;

use serde::Serialize;

use crate::encoding::Encoding;

/// What becomes of one tensor of a packed file in another runtime's layout.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExportedTensor {
    /// Its name in the packed file.
    pub name: String,
    /// Its names in the export: codes, scales and so on, or the one tensor that holds all.
    pub names: Vec<String>,
    pub shape: Vec<usize>,
    /// How the packed file holds it.
    pub encoding: Encoding,
    /// How the export holds it, in that runtime's words: `Q4_0`, `pack-quantized 4-bit g128`, `F16`.
    pub target: String,
    /// Bytes of its data in the export.
    pub bytes: u64,
    pub fidelity: Fidelity,
}

/// Whether an exported tensor stands for the values of the packed one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Fidelity {
    /// Every value is the same, bit for bit, once it is dequantized in f32.
    Lossless,
    /// Values are rounded; `why` in a few words.
    Rounded { why: String },
}

/// A runtime that would not load an export, or not run it as it is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// `llama.cpp`, `vLLM`, `transformers`, `MLX`; the layout's own name where the layout itself cannot hold the model.
    pub runtime: String,
    /// The rule, the tensor at fault, and what to do: one sentence.
    pub why: String,
}

/// What an export would be, known before any of it is written.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub tensors: Vec<ExportedTensor>,
    /// Bytes on disk, everything counted.
    pub file_bytes: u64,
    /// What makes the export impossible; nothing is written where this is not empty.
    pub refusals: Vec<Refusal>,
    /// Runtimes of this layout that would not take it, though others do.
    pub warnings: Vec<Refusal>,
    /// What else the user should know, a sentence each.
    pub notices: Vec<String>,
}

impl Plan {
    /// A plan of nothing.
    pub(crate) fn empty() -> Self {
        Self { tensors: Vec::new(), file_bytes: 0, refusals: Vec::new(), warnings: Vec::new(), notices: Vec::new() }
    }
}
