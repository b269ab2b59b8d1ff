//! From a checkpoint to a packed file: what each tensor becomes, and how large it will be.

mod rival;
mod write;

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use bkpack_kernels::{
    Cpu, Data, FloatType, Matrix,
    cpu::quantize::{QuantizeOptions, Range, Rounding},
};
use half::f16;
use serde::Serialize;
use serde_json::json;

use crate::{
    checkpoint::Checkpoint,
    encoding::{Encoding, FloatName, Request},
    error::{Error, Result},
    folder::TRAVELLING_FILES,
    format::{self, FilePlan, PlannedFile, PlannedTensor, Source, SourceFile},
    policy::{
        Alternative, Choice, Decision, Line, Policy, Recipe, SizedAlternative, TensorInfo,
        reason::{Instead, Reason, Why},
    },
    progress::{Observer, Unit},
    quant::{self, Quantized},
    tensor::{CalibrationText, Tensor, TensorSource, matrix_shape},
};

pub use self::{rival::Rival, write::Writing};

/// A ternary weight is zero below this share of its scale, unless told otherwise.
pub const DEFAULT_TERNARY_THRESHOLD: f32 = 0.5;

/// What decides the bytes of a packed file, apart from the checkpoint.
#[derive(Debug)]
pub struct PackOptions {
    pub policy: Policy,
    pub rounding: Rounding,
    /// Whether weights are rounded with error feedback.
    pub feedback: bool,
    /// The text that the policy or the rounding goes by.
    pub calibration: Option<Calibration>,
    pub ternary_threshold: f32,
    /// Scales `[rows, groups]` by tensor that weights are rounded to as they are, instead of scales that are chosen.
    pub scales: HashMap<String, Vec<f32>>,
    /// Keep a tensor with NaN or infinite values as FP32 instead of refusing it.
    pub allow_nonfinite: bool,
    /// The most bytes of data in one file.
    pub shard_bytes: Option<u64>,
}

impl PackOptions {
    /// What `bkpack convert` does unless told otherwise: scales searched for least error, one file, no weight that is not
    /// finite.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            rounding: Rounding::Search,
            feedback: false,
            calibration: None,
            ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
            scales: HashMap::new(),
            allow_nonfinite: false,
            shard_bytes: None,
        }
    }

    /// How a tensor of this encoding is quantized; `None` for plain values.
    pub fn quantize_options(&self, encoding: Encoding) -> Option<QuantizeOptions> {
        let (layout, scale_type) = encoding.layout()?;
        let Self { rounding, ternary_threshold, .. } = *self;
        Some(QuantizeOptions { layout, scale_type, rounding, ternary_threshold })
    }

    /// The encoding that a tensor of a checkpoint gets with these values, if `alternative` is what its policy says.
    ///
    /// # Errors
    /// As [`Packing::plan`].
    pub fn encoding(
        &self,
        checkpoint: &Checkpoint,
        (name, tensor): (&str, &Tensor),
        alternative: Alternative,
        cpu: Cpu,
    ) -> Result<Encoding> {
        Ok(Decider::new(checkpoint, name, tensor, self, cpu).outcome(alternative)?.encoding)
    }

    /// The bytes of a tensor of this encoding, which is no plain values.
    ///
    /// # Panics
    /// If it is plain values, or scales are given that do not fit it.
    pub fn quantize(&self, cpu: Cpu, name: &str, matrix: &Matrix, encoding: Encoding, output: &mut Quantized) {
        let options = self.quantize_options(encoding).expect("not plain values");
        match self.scales.get(name) {
            Some(scales) => quant::round_to_scales(cpu, matrix, &options, scales, output),
            None => quant::quantize(cpu, matrix, &options, output),
        }
    }
}

/// The text that a policy or calibrated rounding goes by, for the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Calibration {
    pub text: CalibrationText,
    pub windows: usize,
    /// Tokens of a window.
    pub ctx: usize,
}

/// A conversion whose every size is known.
///
/// ```
/// use bkpack::{checkpoint, format::PackedFile, pack::{PackOptions, Packing}, policy::Policy, progress::Silent};
/// use bkpack_kernels::Cpu;
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let output = folder.path().join("model.bkpack");
/// let checkpoint = checkpoint::open("fixtures/llama".as_ref())?;
/// let options = PackOptions::new(Policy::uniform("int4:g64".parse()?, &["embed".into()], &[])?);
/// let packing = Packing::plan(&checkpoint, &options, &output, Cpu::detect(), &Silent)?;
/// let planned = packing.file_bytes(); // exact, and nothing is written yet
/// let written = packing.write(Cpu::detect(), false, &Silent)?;
/// assert_eq!(written, [output.clone()]);
/// assert_eq!(output.metadata().unwrap().len(), planned);
/// PackedFile::open(&output)?.check_contents(&Silent)?;
/// # Ok::<_, bkpack::Error>(())
/// ```
pub struct Packing<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a PackOptions,
    output: PathBuf,
    outline: Vec<TensorInfo>,
    prospects: Vec<Prospect>, // [tensors]
    /// Which of its alternatives each tensor gets.
    choice: Vec<usize>, // [tensors]
    tensors: Vec<PlannedTensor>,
    travelling: Vec<PlannedFile>,
    files: Vec<FilePlan>,
    /// What the user should know whatever the choice: a tied head left out.
    notices: Vec<String>,
}

impl<'a> Packing<'a> {
    /// Looks at every weight and decides every tensor's encoding and place.
    ///
    /// # Errors
    /// A NaN or infinite weight, a value that its float type cannot hold, a pattern that matches nothing, a policy that
    /// does not fit the checkpoint.
    pub fn plan(
        checkpoint: &'a Checkpoint,
        options: &'a PackOptions,
        output: &Path,
        cpu: Cpu,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let policy = &options.policy;
        policy.exceptions.check_patterns(checkpoint.names())?;
        let mut notices = Vec::new();
        let outline = outline(checkpoint, policy, &mut notices)?;
        let decisions = policy.resolve(&outline)?;
        observer.begin("Reading", checkpoint.tensor_bytes(), Unit::Bytes);
        let mut prospects = Vec::with_capacity(outline.len());
        for (info, decision) in outline.iter().zip(decisions) {
            observer.check()?;
            let tensor = checkpoint.tensor(&info.name)?;
            let mut decider = Decider::new(checkpoint, &info.name, &tensor, options, cpu);
            let outcomes = decider.decide(&decision.alternatives)?;
            let sized = decision.alternatives.iter().zip(&outcomes).map(|(&alternative, outcome)| {
                let bytes = planned(checkpoint, info, outcome.encoding, None).stored_bytes() as u64;
                SizedAlternative { alternative, bytes }
            });
            prospects.push(Prospect { sized: sized.collect(), decision, outcomes });
            observer.advance(tensor.matrix().bytes() as u64);
        }
        observer.end();
        let mut travelling = Vec::new();
        for name in TRAVELLING_FILES {
            if let Some(bytes) = checkpoint.file(name)? {
                travelling.push(PlannedFile { name: name.into(), bytes: bytes.into_owned() });
            }
        }
        let output = output.to_owned();
        let mut packing = Self {
            checkpoint,
            options,
            output,
            outline,
            prospects,
            choice: Vec::new(),
            tensors: Vec::new(),
            travelling,
            files: Vec::new(),
            notices,
        };
        packing.settle(packing.choose()?, None)?;
        Ok(packing)
    }

    /// Which alternative each tensor gets.
    fn choose(&self) -> Result<Vec<usize>> {
        let policy = &self.options.policy;
        let Choice::Budget(budget) = &policy.choice else { return Ok(vec![0; self.outline.len()]) };
        let sized: Vec<Vec<SizedAlternative>> = self.prospects.iter().map(|prospect| prospect.sized.clone()).collect();
        budget.choose(&policy.components, &self.outline, &sized, |choice| self.bytes_of(choice, None))
    }

    /// Plans for this choice, which is a preset's if one was adopted.
    fn settle(&mut self, choice: Vec<usize>, adopted: Option<String>) -> Result<()> {
        self.tensors = self.planned(&choice);
        self.files = self.plan_files(&self.tensors, adopted.as_deref());
        self.choice = choice;
        self.check_unique_names()
    }

    /// Bytes of the whole file for this choice, which may be a preset's.
    fn bytes_of(&self, choice: &[usize], adopted: Option<&str>) -> u64 {
        format::planned_bytes(&self.output, &self.plan_files(&self.planned(choice), adopted))
    }

    fn planned(&self, choice: &[usize]) -> Vec<PlannedTensor> {
        let one = |(info, (prospect, &index)): (&TensorInfo, (&Prospect, &usize))| {
            let reason = self.reason(info, prospect, index);
            planned(self.checkpoint, info, prospect.outcomes[index].encoding, reason)
        };
        self.outline.iter().zip(self.prospects.iter().zip(choice)).map(one).collect()
    }

    /// Why a tensor has the encoding that was chosen; `None` where the record of the policy says it all.
    fn reason(&self, info: &TensorInfo, prospect: &Prospect, index: usize) -> Option<Reason> {
        let by = self.options.policy.by(info, &prospect.decision, &prospect.sized, index);
        let request = prospect.sized[index].alternative.request;
        let instead = prospect.outcomes[index].unmet.clone().map(|why| Instead::of(request, why));
        (by.is_some() || instead.is_some()).then_some(Reason { by, instead })
    }

    /// What the user should know: tensors that became other than asked for, kept ones with NaN, a tied head left out.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = self.notices.clone();
        let mut left_alone = 0;
        for (info, (prospect, &index)) in self.outline.iter().zip(self.prospects.iter().zip(&self.choice)) {
            match &prospect.outcomes[index].unmet {
                None => {}
                Some(Why::LeftAsBf16) => left_alone += 1,
                Some(why) => notices.push(format!("{} {}", info.name, why.sentence())),
            }
        }
        if left_alone > 0 {
            let tensors = if left_alone == 1 { "1 tensor".into() } else { format!("{left_alone} tensors") };
            notices.push(format!("{tensors} kept as BF16 where the policy says FP16: the same size, without a loss"));
        }
        notices
    }

    /// A tensor may be named like a part of another one, like a travelling file, or like what safetensors keeps its
    /// metadata under; one file cannot hold both.
    fn check_unique_names(&self) -> Result<()> {
        let mut names = HashSet::from(["__metadata__"]);
        match self.files.iter().flat_map(|file| &file.parts).find(|part| !names.insert(part.name.as_str())) {
            None => Ok(()),
            Some(part) => {
                let why = "the header, a part of another tensor or a travelling file needs this name; rename it".into();
                Err(Error::Parts { path: self.checkpoint.path().to_owned(), tensor: part.name.clone(), why })
            }
        }
    }

    fn plan_files(&self, tensors: &[PlannedTensor], adopted: Option<&str>) -> Vec<FilePlan> {
        let files = self.checkpoint.weight_files().iter();
        let files = files.map(|file| SourceFile::unhashed(file.name(), file.bytes().len() as u64));
        let source = Source { kind: self.checkpoint.kind().name().into(), files: files.collect() };
        let mut policy = self.options.policy.record();
        policy["rounding"] = match (self.options.feedback, self.options.rounding) {
            _ if !self.options.scales.is_empty() => json!("learned"),
            (true, _) => json!("gptq"),
            (false, Rounding::Nearest) => json!("rtn"),
            (false, Rounding::Search) => json!("search"),
        };
        if let Some(calibration) = &self.options.calibration {
            policy["calibration"] = json!(calibration);
        }
        if tensors.iter().any(|tensor| matches!(tensor.encoding, Encoding::Ternary { .. })) {
            policy["ternary_threshold"] = json!(self.options.ternary_threshold);
        }
        if let Some(name) = adopted {
            policy["adopted"] = json!(name);
        }
        let config = self.checkpoint.config().cloned();
        format::plan(&self.output, source, policy, config, tensors, &self.travelling, self.options.shard_bytes)
    }

    /// How a tensor is quantized; `None` for plain values.
    fn quantize_options(&self, encoding: Encoding) -> Option<QuantizeOptions> {
        self.options.quantize_options(encoding)
    }

    /// Every tensor with its encoding.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Component, encoding, weights and stored bytes of each tensor.
    pub fn lines(&self) -> Vec<(String, String, u64, u64)> {
        let line = |tensor: &PlannedTensor| {
            let (weights, bytes) = (tensor.elements() as u64, tensor.stored_bytes() as u64);
            (tensor.component.clone(), tensor.encoding.to_string(), weights, bytes)
        };
        self.tensors.iter().map(line).collect()
    }

    /// The recipe that packs the same: what was decided for each tensor, its bytes and predicted cost.
    pub fn recipe(&self) -> String {
        let lines: Vec<Line> = self
            .tensors
            .iter()
            .zip(self.prospects.iter().zip(&self.choice))
            .map(|(tensor, (prospect, &index))| {
                let chosen = prospect.sized[index].alternative;
                let request = match (chosen.request, tensor.encoding) {
                    (Request::Keep, _)
                    | (_, Encoding::Int { .. } | Encoding::Ternary { .. } | Encoding::Binary { .. }) => chosen.request,
                    (_, Encoding::Float { dtype }) => Request::Float(dtype.into()),
                };
                Line { name: tensor.name.clone(), request, bytes: tensor.stored_bytes() as u64, cost: chosen.cost }
            })
            .collect();
        Recipe::render(&lines, self.file_bytes(), &self.options.policy.record())
    }

    /// Bytes that will be on disk, everything counted; exact.
    pub fn file_bytes(&self) -> u64 {
        format::planned_bytes(&self.output, &self.files)
    }
}

/// The tensors that the packed file will hold.
pub(crate) fn outline(checkpoint: &Checkpoint, policy: &Policy, notices: &mut Vec<String>) -> Result<Vec<TensorInfo>> {
    let architecture = checkpoint.config().and_then(|config| config["architectures"][0].as_str());
    let tied = tied_head(checkpoint)?;
    if let Some(name) = tied {
        notices.push(format!("{name} is tied to the embedding and stored once, as the embedding"));
    }
    let stored = checkpoint.names().iter().filter(|name| tied != Some(name.as_str()));
    let info = |name: &String| {
        let shape = checkpoint.shape(name).expect("a name of the checkpoint").to_vec();
        let (component, rule) = policy.components.classify(architecture, name, &shape);
        TensorInfo { name: name.clone(), component: component.to_owned(), rule, shape }
    };
    Ok(stored.map(info).collect())
}

/// A tensor as it will stand in the packed file.
fn planned(checkpoint: &Checkpoint, info: &TensorInfo, encoding: Encoding, reason: Option<Reason>) -> PlannedTensor {
    PlannedTensor {
        name: info.name.clone(),
        shape: info.shape.clone(),
        component: info.component.clone(),
        complex: checkpoint.complex_part(&info.name),
        encoding,
        reason: reason.map(|reason| json!(reason)),
    }
}

/// What a tensor may become, and what that comes to.
struct Prospect {
    decision: Decision,
    sized: Vec<SizedAlternative>, // [alternatives]
    outcomes: Vec<Outcome>,       // [alternatives]
}

/// What one alternative comes to, now that the tensor's values can be seen.
struct Outcome {
    encoding: Encoding,
    /// Why the encoding is not the one that was asked for.
    unmet: Option<Why>,
}

/// Decides the encodings of one tensor.
struct Decider<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    tensor: &'a Tensor<'a>,
    options: &'a PackOptions,
    cpu: Cpu,
    /// What the weights are like, by columns of a group: each takes a look at all of them.
    ranges: HashMap<usize, Range>,
}

impl<'a> Decider<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        name: &'a str,
        tensor: &'a Tensor<'a>,
        options: &'a PackOptions,
        cpu: Cpu,
    ) -> Self {
        Self { checkpoint, name, tensor, options, cpu, ranges: HashMap::new() }
    }

    fn decide(&mut self, alternatives: &[Alternative]) -> Result<Vec<Outcome>> {
        alternatives.iter().map(|&alternative| self.outcome(alternative)).collect()
    }

    fn outcome(&mut self, alternative: Alternative) -> Result<Outcome> {
        let matrix = self.tensor.matrix();
        let (_, cols) = matrix_shape(self.tensor.shape());
        let layout = match alternative.request {
            Request::Quantize { grid, group } => Some(bkpack_kernels::Layout { grid, group: group.columns(cols) }),
            _ => None,
        };
        let group = layout.map_or(cols, |layout| layout.group);
        let range = *self.ranges.entry(group).or_insert_with(|| quant::range(self.cpu, &matrix, group));
        let float = |dtype: FloatType, unmet| Outcome { encoding: Encoding::Float { dtype: dtype.into() }, unmet };
        if range.non_finite > 0 {
            if !self.options.allow_nonfinite {
                let first = first_non_finite(self.cpu, self.tensor);
                let (path, tensor) = (self.checkpoint.path().to_owned(), self.name.to_owned());
                return Err(Error::NonFinite { path, tensor, count: range.non_finite, first });
            }
            return Ok(float(FloatType::F32, Some(Why::NonFinite { count: range.non_finite })));
        }
        let Data::Float { dtype: source, .. } = matrix.data() else { unreachable!("a checkpoint holds floats") };
        Ok(match (alternative.request, layout) {
            (_, Some(layout)) => {
                let scale = quant::scale_type(layout, range);
                let row = layout.code_bytes(cols) + layout.groups(cols) * scale.bytes() + layout.zero_bytes(cols);
                if row * matrix.rows() >= matrix.bytes() {
                    return Ok(float(source, Some(Why::Grows { columns: cols })));
                }
                Outcome { encoding: Encoding::quantized(layout, scale), unmet: None }
            }
            // A policy that asks for FP16 asks for 16 bits: BF16 serves it where FP16 would lose range.
            (Request::Float(FloatType::F16), _) if !alternative.named && source == FloatType::BF16 => {
                float(source, Some(Why::LeftAsBf16))
            }
            (Request::Float(FloatType::F16), _) if !alternative.named && range.largest > f16::MAX.to_f32() => {
                check_float_range(self.checkpoint, self.name, range, FloatType::BF16)?;
                float(FloatType::BF16, Some(Why::Fp16Range { largest: range.largest }))
            }
            (Request::Float(to), _) => {
                check_float_range(self.checkpoint, self.name, range, to)?;
                float(to, None)
            }
            (_, None) => float(source, None),
        })
    }
}

fn check_float_range(checkpoint: &Checkpoint, name: &str, range: Range, to: FloatType) -> Result<()> {
    let largest = match to {
        FloatType::F16 => f16::MAX.to_f32(),
        FloatType::BF16 => half::bf16::MAX.to_f32(),
        FloatType::F32 => f32::MAX,
    };
    if range.largest <= largest {
        return Ok(());
    }
    let (path, tensor) = (checkpoint.path().to_owned(), name.to_owned());
    Err(Error::FloatRange { path, tensor, value: range.largest, dtype: FloatName::from(to).name() })
}

pub(crate) fn first_non_finite(cpu: Cpu, tensor: &Tensor) -> usize {
    let matrix = tensor.matrix();
    let mut row = vec![0.0; matrix.cols()];
    for index in 0..matrix.rows() {
        cpu.dequantize(&matrix, index, &mut row);
        if let Some(column) = row.iter().position(|value| !value.is_finite()) {
            return index * matrix.cols() + column;
        }
    }
    0
}

/// The name of a head that config.json ties to the embedding and that is byte for byte the same.
pub(crate) fn tied_head(checkpoint: &dyn TensorSource) -> Result<Option<&'static str>> {
    const HEAD: &str = "lm_head.weight";
    const EMBEDDINGS: [&str; 2] = ["model.embed_tokens.weight", "backbone.embeddings.weight"];
    let tied = checkpoint.config().is_some_and(|config| config["tie_word_embeddings"] == json!(true));
    let embedding = EMBEDDINGS.into_iter().find(|name| checkpoint.shape(name).is_some());
    let (true, Some(embedding), Some(_)) = (tied, embedding, checkpoint.shape(HEAD)) else { return Ok(None) };
    let (head, embedding) = (checkpoint.tensor(HEAD)?, checkpoint.tensor(embedding)?);
    let same = head.shape() == embedding.shape()
        && match (head.matrix().data(), embedding.matrix().data()) {
            (Data::Float { dtype: a, values: x }, Data::Float { dtype: b, values: y }) => a == b && x == y,
            _ => false,
        };
    Ok(same.then_some(HEAD))
}
