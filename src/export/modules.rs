//! What the tensors of a packed model are to the programs that load an export: linear layers, embeddings, routers.

use serde_json::Value;

use super::Refusal;
use crate::{
    format::{PackedFile, PackedTensor},
    model::Architecture,
    policy::ComponentRules,
    tensor::TensorSource,
};

/// What a tensor is to its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role<'a> {
    /// The weight of the linear layer of this name.
    Linear(&'a str),
    /// The table of the embedding of this name.
    Embedding(&'a str),
    /// The weight of the layer of this name that chooses among experts.
    Router(&'a str),
    /// Norms, biases, convolutions, stacks of experts.
    Other,
}

/// The tensors of one packed model, and what each is.
pub(super) struct Modules {
    rules: ComponentRules,
    architecture: Option<String>,
}

impl Modules {
    pub fn of(packed: &PackedFile) -> Self {
        let name = packed.config().and_then(|config| config["architectures"][0].as_str());
        Self { rules: ComponentRules::builtin(), architecture: name.map(str::to_owned) }
    }

    /// What a tensor is.
    pub fn role<'a>(&self, tensor: &'a PackedTensor) -> Role<'a> {
        let Some(module) = tensor.name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2) else {
            return Role::Other;
        };
        if [".block_sparse_moe.gate", ".mlp.gate", ".gating_network"].iter().any(|name| module.ends_with(name)) {
            return Role::Router(module);
        }
        // By the name alone: a tiny embedding is one too.
        let large = [1 << 16, 1 << 16];
        match self.rules.component(self.architecture.as_deref(), &tensor.name, &large) {
            "embedding" => Role::Embedding(module),
            "plain" => Role::Other,
            _ => Role::Linear(module),
        }
    }

    /// The model's architecture as its config.json names it.
    pub fn architecture(&self) -> Option<&str> {
        self.architecture.as_deref()
    }

    /// What makes a folder for other runtimes impossible, whatever the layout.
    pub fn refusals(&self, packed: &PackedFile, layout: &str) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut refuse = |why: String| refusals.push(Refusal { runtime: layout.to_owned(), why });
        match packed.config() {
            None => {
                let why = "no config.json is inside, and no runtime loads a folder without one; see convert --config";
                refuse(why.into());
            }
            Some(config) if Architecture::from_config(config) == Some(Architecture::ResNetBk) => {
                let why =
                    "no runtime of this layout has the architecture ResNetBKForCausalLM; safetensors and npz hold it";
                refuse(why.into());
            }
            Some(_) => {}
        }
        if let Some(tensor) = packed.tensors().iter().find(|tensor| tensor.complex.is_some()) {
            refuse(format!(
                "tensor {} is half of a complex one, which this layout cannot hold; safetensors and npz can",
                tensor.name
            ));
        }
        refusals
    }
}

/// Whether the output head shares the table of the embedding.
pub(super) fn is_tied(packed: &PackedFile) -> bool {
    let tied = |config: &Value| config["tie_word_embeddings"].as_bool();
    packed.config().and_then(tied).unwrap_or(false)
}

/// The tensors that hold scales of quantized activations, which only bkpack runs.
pub(super) fn is_activation_scale(packed: &PackedFile, name: &str) -> bool {
    packed.activations().iter().any(|record| record.scales.iter().any(|scale| scale == name))
}
