//! Models: each architecture written once over [`Ops`], found by the name in config.json.

pub mod config;
pub mod core_activations;
mod linear;
pub mod llama;
pub mod mamba;
mod mixture;
pub mod reduce;
pub mod resnet_bk;
pub mod rope;
pub mod sample;
mod step;

use std::{
    fmt::Display,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use serde_json::Value;

use self::{
    config::{LlamaConfig, MambaConfig, ResNetBkConfig},
    core_activations::CoreTrace,
    llama::Llama,
    mamba::Mamba,
    resnet_bk::ResNetBk,
};
use crate::{
    error::{Error, Result},
    ops::{Ops, Step},
    tensor::TensorSource,
};

/// The architectures that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Mixtral,
    Qwen2,
    Qwen3,
    Mamba,
    ResNetBk,
}

impl Architecture {
    const ALL: [(&str, Architecture); 7] = [
        ("LlamaForCausalLM", Architecture::Llama),
        ("MistralForCausalLM", Architecture::Mistral),
        ("MixtralForCausalLM", Architecture::Mixtral),
        ("Qwen2ForCausalLM", Architecture::Qwen2),
        ("Qwen3ForCausalLM", Architecture::Qwen3),
        ("MambaForCausalLM", Architecture::Mamba),
        ("ResNetBKForCausalLM", Architecture::ResNetBk),
    ];

    /// The architecture that config.json names first; `None` if it names none, or one that is not known.
    pub fn from_config(config: &Value) -> Option<Self> {
        let name = architecture_name(config)?;
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, architecture)| architecture)
    }

    /// The names in config.json that are known, for messages.
    fn supported() -> String {
        Self::ALL.map(|(name, _)| name).join(", ")
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
            supported: Self::supported(),
        })?;
        Ok((architecture, config))
    }
}

fn architecture_name(config: &Value) -> Option<&str> {
    config.get("architectures")?.get(0)?.as_str()
}

/// Is told the name and shape of each tensor that an architecture needs; its error ends the telling.
pub type Visit<'a> = dyn FnMut(String, &[usize]) -> Result<()> + 'a;

/// Tells the tensors that a model needs according to its config.json. A tied output head is not among them: the embedding
/// stands in for it.
///
/// # Errors
/// As [`LlamaConfig::parse`]; [`Error::MissingConfig`] and [`Error::UnknownArchitecture`]; the first that `visit` returns.
pub fn visit_tensors(source: &dyn TensorSource, visit: &mut Visit) -> Result<()> {
    let (architecture, config) = Architecture::of(source)?;
    let path = source.path();
    match architecture {
        Architecture::Mamba => mamba::visit_tensors(&MambaConfig::parse(path, config)?, visit),
        Architecture::ResNetBk => resnet_bk::visit_tensors(&ResNetBkConfig::parse(path, config)?, visit),
        family => llama::visit_tensors(source, &LlamaConfig::parse(path, family, config)?, visit),
    }
}

/// Checks that a model of a known architecture has every tensor it needs, in the shape that config.json asks for.
///
/// # Errors
/// As [`visit_tensors`]; [`Error::MissingTensor`] and [`Error::ShapeMismatch`] for the first tensor at fault.
pub fn check_shapes(source: &dyn TensorSource) -> Result<()> {
    let path = || source.path().to_owned();
    // One by one: a config may claim more tensors than memory has room for their names.
    visit_tensors(source, &mut |name, expected| match source.shape(&name) {
        None => Err(Error::MissingTensor { path: path(), tensor: name }),
        Some(found) if found != expected => {
            let (found, expected) = (found.to_vec(), expected.to_vec());
            Err(Error::ShapeMismatch { path: path(), tensor: name, found, expected })
        }
        Some(_) => Ok(()),
    })
}

/// Bytes of the tensors that a model needs, as they are stored; a tied head counts once.
///
/// # Errors
/// As [`visit_tensors`] and [`TensorSource::tensor`]; [`Error::MissingTensor`].
pub fn weight_bytes(source: &dyn TensorSource) -> Result<u64> {
    check_shapes(source)?;
    let mut bytes = 0;
    visit_tensors(source, &mut |name, _| {
        bytes += source.tensor(&name)?.matrix().bytes() as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// The longest context of a model, in tokens; `usize::MAX` where its architecture sets no limit.
///
/// # Errors
/// As [`visit_tensors`].
pub fn max_positions(source: &dyn TensorSource) -> Result<usize> {
    let (architecture, config) = Architecture::of(source)?;
    let path = source.path();
    Ok(match architecture {
        Architecture::Mamba => usize::MAX,
        Architecture::ResNetBk => ResNetBkConfig::parse(path, config)?.max_positions,
        family => LlamaConfig::parse(path, family, config)?.max_positions,
    })
}

/// A model that can be run, its weights borrowed from its source: a packed file or a checkpoint.
///
/// ```
/// use bkpack::{checkpoint, model::Model, ops::{Ops, cpu::{Activations, CpuOps}}};
/// use bkpack_kernels::Cpu;
///
/// let source = checkpoint::open("fixtures/llama".as_ref())?;
/// let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
/// let model = Model::load(&source, &ops)?;
///
/// let mut state = model.state(16)?; // room for 16 positions
/// let hidden = model.forward(&[17, 250, 1023], &mut state)?; // [3, hidden_size]
/// let mut logits = Vec::new();
/// ops.read(&model.logits(&hidden, 2, 1)?, &mut logits)?; // those after the last token
/// assert_eq!((logits.len(), state.positions()), (model.vocab_size(), 3));
/// # assert!(logits.iter().all(|logit| logit.is_finite()));
/// # Ok::<_, bkpack::Error>(())
/// ```
pub struct Model<'a, O: Ops> {
    path: &'a Path,
    network: Network<'a, O>,
    /// Tells it from every other, and from itself before it was reduced or its core was kept exact.
    id: u64,
}

/// A number that no model has had.
fn new_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

enum Network<'a, O: Ops> {
    Llama(Llama<'a, O>),
    Mamba(Mamba<'a, O>),
    ResNetBk(ResNetBk<'a, O>),
}

/// What all blocks are told of the tokens that run through them.
pub(crate) struct Pass<O: Ops> {
    /// The position of the first token. In a step no value may depend on it: a repetition has another.
    first: usize,
    tokens: usize,
    /// Of the tokens, where the architecture has a rotary embedding.
    rotation: Option<Rotation<O>>, // [tokens, head_dim / 2]
    /// Set while a step runs, which a back end may repeat for other tokens: positions are then looked up by `row_at_step`.
    step: Option<Step>,
}

impl<O: Ops> Pass<O> {
    /// The rows of a table `[positions, cols]` that belong to the tokens.
    fn positions(&self, ops: &O, table: &O::Tensor) -> Result<O::Tensor> {
        match self.step {
            Some(step) => ops.row_at_step(table, step),
            None => ops.rows(table, self.first, self.tokens),
        }
    }
}

/// Cosines and sines of the rotary embedding.
type Rotation<O> = (<O as Ops>::Tensor, <O as Ops>::Tensor);

/// What a model remembers of one text: the state that its next tokens continue.
pub struct State<O: Ops> {
    layers: Vec<LayerState<O>>,
    /// Tokens seen.
    positions: usize,
    /// Tokens that fit.
    capacity: usize,
    /// What each layer's core computed in the last call, if that is recorded.
    core: Option<Vec<CoreTrace>>, // [layers]
    /// Of every position that fits, once steps need them.
    rotations: Option<Rotation<O>>, // [capacity, head_dim / 2]
    step: O::StepGraph,
    /// The id of the model that it was made by: the only one whose steps it may hold.
    model: u64,
}

/// What one layer remembers.
enum LayerState<O: Ops> {
    /// Keys and values of the positions seen.
    Attention(O::Cache),
    /// The last inputs of the convolution, `[kernel - 1, channels]`, and the scan's state, `[channels, states]`.
    Mamba { history: O::Tensor, scan: O::Tensor },
    /// The last position's value of the resolvent.
    Resolvent { last: O::Carry },
}

impl<O: Ops> State<O> {
    /// Tokens seen so far.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// What the back end keeps of [`step`](Model::step) to repeat it.
    pub fn step_graph(&self) -> &O::StepGraph {
        &self.step
    }

    /// Records what the Birman-Schwinger core of each layer computes in a call that begins a text.
    pub fn record_core(&mut self) {
        self.core = Some(Vec::new());
    }

    /// What was recorded in the last call, a layer each; empty for architectures without such a core.
    pub fn core(&self) -> &[CoreTrace] {
        self.core.as_deref().unwrap_or_default()
    }

    /// Forgets the text.
    pub fn clear(&mut self, ops: &O) -> Result<()> {
        for layer in &mut self.layers {
            match layer {
                LayerState::Attention(cache) => ops.clear(cache),
                LayerState::Mamba { history, scan } => {
                    ops.zero(history)?;
                    ops.zero(scan)?;
                }
                LayerState::Resolvent { last } => ops.clear_carry(last)?,
            }
        }
        self.positions = 0;
        Ok(())
    }
}

impl<'a, O: Ops> Model<'a, O> {
    /// Loads a model of any known architecture.
    ///
    /// # Errors
    /// As [`check_shapes`] and [`Ops::weight`].
    pub fn load(source: &'a dyn TensorSource, ops: &'a O) -> Result<Self> {
        let (architecture, _) = Architecture::of(source)?;
        let network = match architecture {
            Architecture::Mamba => Network::Mamba(Mamba::load(source, ops)?),
            Architecture::ResNetBk => Network::ResNetBk(ResNetBk::load(source, ops)?),
            _ => Network::Llama(Llama::load(source, ops)?),
        };
        Ok(Model { path: source.path(), network, id: new_id() })
    }

    /// The number of token ids.
    pub fn vocab_size(&self) -> usize {
        match &self.network {
            Network::Llama(model) => model.config().vocab_size,
            Network::Mamba(model) => model.config().vocab_size,
            Network::ResNetBk(model) => model.config().vocab_size,
        }
    }

    /// The longest context, in tokens; `usize::MAX` where the architecture sets no limit.
    pub fn max_positions(&self) -> usize {
        match &self.network {
            Network::Llama(model) => model.config().max_positions,
            Network::Mamba(_) => usize::MAX,
            Network::ResNetBk(model) => model.max_positions(),
        }
    }

    /// Whether a text must be run in one call, because its positions see those after them.
    pub fn runs_whole(&self) -> bool {
        matches!(&self.network, Network::ResNetBk(model) if !model.config().causal)
    }

    /// Refuses to continue a text token by token where the model [runs texts whole](Self::runs_whole).
    ///
    /// # Errors
    /// [`Error::NotSequential`].
    pub fn check_sequential(&self) -> Result<()> {
        if self.runs_whole() { Err(Error::NotSequential { path: self.path.to_owned() }) } else { Ok(()) }
    }

    /// How many layers have a Birman-Schwinger core.
    pub fn core_layers(&self) -> usize {
        if let Network::ResNetBk(model) = &self.network { model.config().layers } else { 0 }
    }

    /// Whether activations are rounded to a calibrated grid.
    pub fn quantizes_core(&self) -> bool {
        matches!(&self.network, Network::ResNetBk(model) if model.quantizes_core())
    }

    /// Leaves activations as they are computed, whatever the model records.
    pub fn keep_core_exact(&mut self) {
        if let Network::ResNetBk(model) = &mut self.network {
            model.keep_core_exact();
            self.id = new_id();
        }
    }

    /// The state before a text of at most `capacity` tokens.
    pub fn state(&self, capacity: usize) -> Result<State<O>> {
        let layer_state = |_| match &self.network {
            Network::Llama(model) => model.layer_state(capacity),
            Network::Mamba(model) => model.layer_state(),
            Network::ResNetBk(model) => model.layer_state(),
        };
        let layers = (0..self.layers()).map(layer_state).collect::<Result<_>>()?;
        let step = O::StepGraph::default();
        Ok(State { layers, positions: 0, capacity, core: None, rotations: None, step, model: self.id })
    }

    /// Runs the next tokens of a text: the final hidden states, `[tokens, hidden_size]`, for [`logits`](Self::logits).
    ///
    /// # Errors
    /// [`Error::Tokens`] for an id outside of the vocabulary, or more tokens than the state has room for;
    /// [`Error::NotSequential`] where a model that [runs texts whole](Self::runs_whole) is to continue one.
    ///
    /// # Panics
    /// If the state was made by a model of another config.
    pub fn forward(&self, tokens: &[u32], state: &mut State<O>) -> Result<O::Tensor> {
        self.check_next(tokens, state)?;
        if let Some(core) = &mut state.core {
            core.clear();
        }
        let (x, pass) = self.embed(tokens, state.positions)?;
        let hidden = self.run(x, &pass, state)?;
        state.positions += tokens.len();
        Ok(hidden)
    }

    /// Checks that tokens can continue a text.
    fn check_next(&self, tokens: &[u32], state: &State<O>) -> Result<()> {
        check_tokens(self.path.display(), tokens, self.vocab_size())?;
        let seen = state.positions;
        if tokens.len() > state.capacity - seen {
            let why = format!("{} tokens more than {seen} do not fit the context of {}", tokens.len(), state.capacity);
            return Err(Error::Tokens { source_name: self.path.display().to_string(), why });
        }
        if seen > 0 { self.check_sequential() } else { Ok(()) }
    }

    /// All blocks, and what comes after them.
    fn run(&self, mut x: O::Tensor, pass: &Pass<O>, state: &mut State<O>) -> Result<O::Tensor> {
        for layer in 0..self.layers() {
            x = self.block(layer, x, pass, state)?;
        }
        self.finish(&x)
    }

    fn ops(&self) -> &'a O {
        match &self.network {
            Network::Llama(model) => model.ops(),
            Network::Mamba(model) => model.ops(),
            Network::ResNetBk(model) => model.ops(),
        }
    }

    /// The number of blocks.
    pub fn layers(&self) -> usize {
        match &self.network {
            Network::Llama(model) => model.config().layers,
            Network::Mamba(model) => model.config().layers,
            Network::ResNetBk(model) => model.config().layers,
        }
    }

    /// What the names of each block's tensors begin with.
    pub fn block_prefixes(&self) -> Vec<String> {
        let root = match &self.network {
            Network::Llama(_) => "model.layers",
            Network::Mamba(_) => "backbone.layers",
            Network::ResNetBk(_) => "blocks",
        };
        (0..self.layers()).map(|layer| format!("{root}.{layer}.")).collect()
    }

    /// The name of the matrix that gives the logits: that of the embedding where the two are tied.
    pub fn head_name(&self) -> &'static str {
        match &self.network {
            Network::Llama(model) => model.head_name(),
            Network::Mamba(model) => model.head_name(),
            Network::ResNetBk(_) => "lm_head.weight",
        }
    }

    /// The input of the first block, `[tokens, hidden_size]`, for tokens of the vocabulary from position `first` on, and
    /// what all blocks are told.
    pub(crate) fn embed(&self, tokens: &[u32], first: usize) -> Result<(O::Tensor, Pass<O>)> {
        let (x, rotation) = match &self.network {
            Network::Llama(model) => (model.embed(tokens)?, Some(model.rotation(first, tokens.len())?)),
            Network::Mamba(model) => (model.embed(tokens)?, None),
            Network::ResNetBk(model) => (model.embed(tokens, first)?, None),
        };
        Ok((x, Pass { first, tokens: tokens.len(), rotation, step: None }))
    }

    /// One block: `[tokens, hidden_size]` to `[tokens, hidden_size]`.
    pub(crate) fn block(&self, layer: usize, x: O::Tensor, pass: &Pass<O>, state: &mut State<O>) -> Result<O::Tensor> {
        match (&self.network, &mut state.layers[layer]) {
            (Network::Llama(model), LayerState::Attention(cache)) => model.block(layer, x, pass, cache),
            (Network::Mamba(model), LayerState::Mamba { history, scan }) => model.block(layer, x, history, scan),
            (Network::ResNetBk(model), LayerState::Resolvent { last }) => {
                model.block(layer, x, pass, last, state.core.as_mut())
            }
            _ => panic!("a state belongs to its model"),
        }
    }

    /// The final hidden states.
    pub(crate) fn finish(&self, x: &O::Tensor) -> Result<O::Tensor> {
        match &self.network {
            Network::Llama(model) => model.finish(x),
            Network::Mamba(model) => model.finish(x),
            Network::ResNetBk(model) => model.finish(x),
        }
    }

    /// The logits of the rows `first..first + count` of hidden states: `[count, vocab_size]`.
    pub fn logits(&self, hidden: &O::Tensor, first: usize, count: usize) -> Result<O::Tensor> {
        match &self.network {
            Network::Llama(model) => model.logits(hidden, first, count),
            Network::Mamba(model) => model.logits(hidden, first, count),
            Network::ResNetBk(model) => model.logits(hidden, first, count),
        }
    }
}

/// Checks that every token has a row of the embedding; `source_name` is where they came from.
///
/// # Errors
/// [`Error::Tokens`] names the first that has none.
pub fn check_tokens(source_name: impl Display, tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().position(|&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(index) => Err(Error::Tokens {
            source_name: source_name.to_string(),
            why: format!(
                "token {} at position {index} is outside of the model's vocabulary of {vocab_size}",
                tokens[index]
            ),
        }),
    }
}
