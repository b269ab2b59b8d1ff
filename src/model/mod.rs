//! Models: each architecture written once over [`Ops`], found by the name in config.json.

pub mod config;
pub mod llama;
pub mod rope;
pub mod sample;

use serde_json::Value;

use self::{config::LlamaConfig, llama::Llama};
use crate::{
    error::{Error, Result},
    ops::Ops,
    tensor::TensorSource,
};

/// The architectures that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
}

impl Architecture {
    /// The names in config.json that are known, for messages.
    pub const SUPPORTED: &str = "LlamaForCausalLM";

    /// The architecture that config.json names first; `None` if it names none, or one that is not known.
    pub fn from_config(config: &Value) -> Option<Self> {
        match architecture_name(config)? {
            "LlamaForCausalLM" => Some(Architecture::Llama),
            _ => None,
        }
    }

    /// The architecture of a model that is to be run.
    ///
    /// # Errors
    /// [`Error::MissingConfig`] without config.json, [`Error::UnknownArchitecture`] if it names no known one.
    fn of(source: &dyn TensorSource) -> Result<(Self, &Value)> {
        let path = source.path();
        let config = source.config().ok_or_else(|| Error::MissingConfig { path: path.to_owned() })?;
        let architecture = Self::from_config(config).ok_or_else(|| Error::UnknownArchitecture {
            path: path.to_owned(),
            architecture: architecture_name(config).unwrap_or("(none)").to_owned(),
            supported: Self::SUPPORTED,
        })?;
        Ok((architecture, config))
    }
}

fn architecture_name(config: &Value) -> Option<&str> {
    config.get("architectures")?.get(0)?.as_str()
}

/// A tensor that an architecture needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    pub name: String,
    pub shape: Vec<usize>,
}

/// The tensors that a model needs according to its config.json, with their exact shapes.
///
/// A tied output head is not among them: the embedding stands in for it.
///
/// # Errors
/// As [`LlamaConfig::parse`]; [`Error::MissingConfig`] and [`Error::UnknownArchitecture`].
pub fn expected_tensors(source: &dyn TensorSource) -> Result<Vec<ExpectedTensor>> {
    let (architecture, config) = Architecture::of(source)?;
    match architecture {
        Architecture::Llama => Ok(llama::expected_tensors(&LlamaConfig::parse(source.path(), config)?)),
    }
}

/// Checks that a model of a known architecture has every tensor it needs, in the shape that config.json asks for.
///
/// # Errors
/// As [`expected_tensors`]; [`Error::MissingTensor`] and [`Error::ShapeMismatch`].
pub fn check_shapes(source: &dyn TensorSource) -> Result<()> {
    check_expected(source, &expected_tensors(source)?)
}

fn check_expected(source: &dyn TensorSource, expected: &[ExpectedTensor]) -> Result<()> {
    for ExpectedTensor { name, shape } in expected {
        let path = || source.path().to_owned();
        let found = source.shape(name).ok_or_else(|| Error::MissingTensor { path: path(), tensor: name.clone() })?;
        if found != shape {
            let (found, expected) = (found.to_vec(), shape.clone());
            return Err(Error::ShapeMismatch { path: path(), tensor: name.clone(), found, expected });
        }
    }
    Ok(())
}

/// A model that can be run, its weights borrowed from its source.
pub enum Model<'a, O: Ops> {
    Llama(Llama<'a, O>),
}

/// What a model remembers of one text: the state that its next tokens continue.
pub struct State<O: Ops> {
    /// One for each attention layer.
    caches: Vec<O::Cache>,
    /// Tokens seen.
    positions: usize,
    /// Tokens that fit.
    capacity: usize,
}

impl<O: Ops> State<O> {
    /// Tokens seen so far.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Forgets the text.
    pub fn clear(&mut self, ops: &O) {
        self.caches.iter_mut().for_each(|cache| ops.clear(cache));
        self.positions = 0;
    }
}

impl<'a, O: Ops> Model<'a, O> {
    /// Loads a model of any known architecture.
    ///
    /// # Errors
    /// As [`check_shapes`] and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        let (architecture, _) = Architecture::of(source)?;
        match architecture {
            Architecture::Llama => Ok(Model::Llama(Llama::load(source, ops)?)),
        }
    }

    /// The number of token ids.
    pub fn vocab_size(&self) -> usize {
        match self {
            Model::Llama(model) => model.config().vocab_size,
        }
    }

    /// The longest context, in tokens.
    pub fn max_positions(&self) -> usize {
        match self {
            Model::Llama(model) => model.config().max_positions,
        }
    }

    /// The state before a text of at most `capacity` tokens.
    pub fn state(&self, capacity: usize) -> Result<State<O>> {
        match self {
            Model::Llama(model) => model.state(capacity),
        }
    }

    /// Runs the next tokens of a text: the final hidden states, `[tokens, hidden_size]`, for [`logits`](Self::logits).
    ///
    /// # Errors
    /// [`Error::Tokens`] for an id outside of the vocabulary, or more tokens than the state has room for.
    pub fn forward(&self, tokens: &[u32], state: &mut State<O>) -> Result<O::Tensor> {
        match self {
            Model::Llama(model) => model.forward(tokens, state),
        }
    }

    /// The logits of the rows `first..first + count` of hidden states: `[count, vocab_size]`.
    pub fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        match self {
            Model::Llama(model) => model.logits(hidden, first, count),
        }
    }
}

/// Checks that every token has a row of the embedding; `source_name` is where they came from.
///
/// # Errors
/// [`Error::Tokens`] names the first that has none.
pub fn check_tokens(source_name: &str, tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().position(|&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(index) => Err(Error::Tokens {
            source_name: source_name.to_owned(),
            why: format!(
                "token {} at position {index} is outside of the model's vocabulary of {vocab_size}",
                tokens[index]
            ),
        }),
    }
}
