//! Sweeps: models packed at several widths, or run with several amounts of compute, and measured; one result file each,
//! in the schema of docs/results.md. What is measured already is not measured again.

mod compute;
mod scratch;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    str::FromStr,
    time::Instant,
};

use bkpack_kernels::{Cpu, FloatType, Grid, cpu::quantize::Rounding};
use serde::Serialize;
use serde_json::{Number, Value, json};

pub use self::compute::{ComputeResult, Configuration, LayerRanking};
use self::scratch::Scratch;
use super::perplexity::{BaselineComparison, Evaluation, Options, Protocol, evaluate};
use crate::{
    checkpoint::Checkpoint,
    encoding::{GroupSize, Request},
    error::{Error, Result},
    format::{self, PackedFile},
    json, model,
    ops::cpu::Activations,
    pack::{PackOptions, Packing},
    policy::Policy,
    progress::Observer,
    tensor::{CalibrationText, TensorSource},
};

/// A width at which every matrix of a model is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    Float(FloatType),
    /// 2 to 8 bits.
    Int(u32),
    Ternary,
    Binary,
}

impl Precision {
    /// `fp32`, `int8`, `ternary`.
    pub fn name(self) -> String {
        match self {
            Precision::Float(FloatType::F32) => "fp32".into(),
            Precision::Float(FloatType::F16) => "fp16".into(),
            Precision::Float(FloatType::BF16) => "bf16".into(),
            Precision::Int(bits) => format!("int{bits}"),
            Precision::Ternary => "ternary".into(),
            Precision::Binary => "binary".into(),
        }
    }

    /// Bits of a weight without its scales; 1.58 for ternary.
    fn bit_width(self) -> Number {
        match self {
            Precision::Float(dtype) => (8 * dtype.bytes()).into(),
            Precision::Int(bits) => bits.into(),
            Precision::Ternary => Number::from_f64(1.58).expect("a finite number"),
            Precision::Binary => 1.into(),
        }
    }

    fn request(self, group: GroupSize, asymmetric: bool) -> Request {
        let grid = match self {
            Precision::Float(dtype) => return Request::Float(dtype),
            Precision::Int(bits) => Grid::Int { bits, symmetric: !asymmetric },
            Precision::Ternary => Grid::Ternary,
            Precision::Binary => Grid::Binary,
        };
        Request::Quantize { grid, group }
    }
}

impl FromStr for Precision {
    type Err = String;

    /// Reads the name, or the number of bits.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "fp32" | "32" => Precision::Float(FloatType::F32),
            "fp16" | "16" => Precision::Float(FloatType::F16),
            "bf16" => Precision::Float(FloatType::BF16),
            "ternary" | "1.58" => Precision::Ternary,
            "binary" | "1" => Precision::Binary,
            _ => match text.strip_prefix("int").unwrap_or(text).parse() {
                Ok(bits @ 2..=8) => Precision::Int(bits),
                _ => {
                    return Err(
                        "use fp32, fp16, bf16, int8 to int2, ternary or binary (or 32, 16, 8 ... 1.58, 1)".into()
                    );
                }
            },
        })
    }
}

/// A model of a sweep.
#[derive(Debug)]
pub struct Subject {
    /// What its results are named after.
    pub name: String,
    pub checkpoint: Checkpoint,
    /// The text, as its tokenizer cuts it.
    pub tokens: Vec<u32>,
    /// Tokens of a window.
    ctx: usize,
    /// BLAKE3 of its config and its weights.
    blake3: String,
}

impl Subject {
    /// Looks at a model; `options` are those of the sweep.
    ///
    /// # Errors
    /// As [`Protocol::new`]; [`Error::MissingConfig`] and its like for a model that cannot be run; [`Error::Tokens`] where
    /// the tokens do not fill one window.
    pub fn new(name: String, checkpoint: Checkpoint, tokens: Vec<u32>, options: &Options) -> Result<Self> {
        model::config::check_not_synthetic(&checkpoint)?;
        model::check_shapes(&checkpoint)?;
        let ctx = Protocol::new(options.ctx, options.skip, model::max_positions(&checkpoint)?)?.ctx;
        if tokens.len() < ctx {
            let why = format!("{} tokens do not fill one window of {ctx}; pass a smaller --ctx", tokens.len());
            return Err(Error::Tokens { source_name: "the text".into(), why });
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}\n", checkpoint.config()).as_bytes());
        for file in checkpoint.weight_files() {
            hasher.update(format!("{:?}\n", file.name()).as_bytes()).update_rayon(file.bytes());
        }
        Ok(Self { name, checkpoint, tokens, ctx, blake3: hasher.finalize().to_hex().to_string() })
    }

    /// Tokens of a window.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Tokens that one measurement runs.
    pub fn measured_tokens(&self) -> u64 {
        (self.tokens.len() - self.tokens.len() % self.ctx) as u64
    }
}

/// How everything in a sweep is packed and measured.
#[derive(Debug)]
pub struct Sweep {
    pub cpu: Cpu,
    /// Where results go.
    pub folder: PathBuf,
    pub text: CalibrationText,
    pub options: Options,
    pub group: GroupSize,
    pub asymmetric: bool,
    pub rounding: Rounding,
    /// Patterns of tensors that keep their source precision.
    pub keep: Vec<String>,
    /// Leave packed files beside their results.
    pub keep_packed: bool,
    /// Measure again what is there, and replace it.
    pub force: bool,
}

/// What was measured on a text, under which conditions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    pub version: u32,
    pub producer: String,
    pub architecture: Option<String>,
    /// `None` where the model computes NaN or infinity.
    pub perplexity: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    pub looks_ahead: Option<bool>,
    #[serde(flatten)]
    pub baseline: Option<BaselineComparison>,
    pub precision: String,
    pub encoding: String,
    pub file_bytes: u64,
    pub parameters: u64,
    pub bits_per_weight: f64,
    pub ratio_fp32: f64,
    pub eval_seconds: f64,
    pub tokens_per_second: Option<f64>,
    pub protocol: Conditions,
    /// As in the packed file's manifest.
    pub policy: Value,
    pub hashes: Hashes,
    /// Of everything that the figures depend on.
    pub key: String,
}

/// What was measured on, and how.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conditions {
    pub text: CalibrationText,
    pub ctx: usize,
    pub skip: usize,
    pub windows: usize,
    pub scored: usize,
    pub activations: Activations,
}

/// BLAKE3 in hex.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hashes {
    /// Of the checkpoint's config and files of weights.
    pub source: String,
    pub packed: String,
}

/// The result of one model at one width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizationResult {
    pub bit_width: Number,
    pub model: String,
    pub pack_seconds: f64,
    #[serde(flatten)]
    pub measured: Measured,
}

/// A packed file of a sweep; its folder, if it is a temporary one, goes with it.
#[derive(Debug)]
pub struct Packed {
    file: PackedFile,
    blake3: String,
    encoding: String,
    precision: Precision,
    seconds: f64,
    _scratch: Option<Scratch>,
}

impl Sweep {
    /// Makes the folder of the results, and removes what sweeps that were killed left in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn prepare_folder(&self) -> Result<()> {
        let prepared = std::fs::create_dir_all(&self.folder).and_then(|()| scratch::remove_abandoned(&self.folder));
        prepared.map_err(Error::io(&self.folder))
    }

    /// Where the result of a model at a width goes.
    pub fn quantization_path(&self, subject: &Subject, precision: Precision) -> PathBuf {
        self.folder.join(format!("{}_quant_{}.json", subject.name, precision.name()))
    }

    /// The result that is there already.
    ///
    /// # Errors
    /// [`Error::BadOutput`] where the file holds something else, unless it may be replaced.
    pub fn done(&self, subject: &Subject, precision: Precision) -> Result<Option<Value>> {
        self.found(&self.quantization_path(subject, precision), &self.key(subject, precision, &Value::Null))
    }

    /// Packs a model at one width, measures it against the source, and writes the result.
    ///
    /// # Errors
    /// As [`Packing::plan`], [`Packing::write`] and [`evaluate`]; a model that computes NaN or infinity is a result.
    pub fn quantization(
        &self,
        subject: &Subject,
        precision: Precision,
        observer: &dyn Observer,
    ) -> Result<QuantizationResult> {
        let packed = self.pack(subject, precision, observer)?;
        let start = Instant::now();
        let evaluated =
            evaluate(self.cpu, &packed.file, Some(&subject.checkpoint), &subject.tokens, &self.options, observer);
        let key = self.key(subject, precision, &Value::Null);
        let result = QuantizationResult {
            bit_width: precision.bit_width(),
            model: subject.name.clone(),
            pack_seconds: packed.seconds,
            measured: self.measured(subject, &packed, evaluated, start.elapsed().as_secs_f64(), key)?,
        };
        store(&self.quantization_path(subject, precision), &result)?;
        Ok(result)
    }

    /// Packs a model; where packed files are not kept, it goes with what is returned.
    ///
    /// # Errors
    /// As [`Packing::plan`] and [`Packing::write`].
    pub fn pack(&self, subject: &Subject, precision: Precision, observer: &dyn Observer) -> Result<Packed> {
        let start = Instant::now();
        let request = precision.request(self.group, self.asymmetric && matches!(precision, Precision::Int(_)));
        let options =
            PackOptions { rounding: self.rounding, ..PackOptions::new(Policy::uniform(request, &self.keep, &[])?) };
        let scratch = match self.keep_packed {
            true => None,
            false => Some(Scratch::create(&self.folder).map_err(Error::io(&self.folder))?),
        };
        let folder = scratch.as_ref().map_or(self.folder.as_path(), Scratch::path);
        let path = folder.join(format!("{}_{}.bkpack", subject.name, precision.name()));
        // A sweep that was stopped before its result leaves the packed file.
        let replace = self.force || (self.keep_packed && packed_before(&path, subject, &options));
        format::check_output(&path, replace)?;
        let packing = Packing::plan(&subject.checkpoint, &options, &path, self.cpu, observer)?;
        packing.write(self.cpu, replace, observer)?;
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut File::open(&path).map_err(Error::io(&path))?, &mut hasher).map_err(Error::io(&path))?;
        Ok(Packed {
            file: PackedFile::open(&path)?,
            blake3: hasher.finalize().to_hex().to_string(),
            encoding: request.to_string(),
            precision,
            seconds: start.elapsed().as_secs_f64(),
            _scratch: scratch,
        })
    }

    fn measured(
        &self,
        subject: &Subject,
        packed: &Packed,
        evaluated: Result<Evaluation>,
        seconds: f64,
        key: String,
    ) -> Result<Measured> {
        let (evaluation, failure) = match evaluated {
            Ok(evaluation) => (Some(evaluation), None),
            Err(Error::Output { path, why }) if path == subject.checkpoint.path() => {
                (None, Some(format!("the baseline is to blame, not the packed model: {why}")))
            }
            // The sentence names a packed file that may be gone; the reason is what counts.
            Err(Error::Output { why, .. }) => (None, Some(why)),
            Err(error) => return Err(error),
        };
        let evaluation = evaluation.as_ref();
        let windows = subject.tokens.len() / subject.ctx;
        let (parameters, file_bytes) = (packed.file.parameters(), packed.file.file_bytes());
        let config = subject.checkpoint.config();
        Ok(Measured {
            version: 1,
            producer: concat!("bkpack ", env!("CARGO_PKG_VERSION")).into(),
            architecture: config.and_then(|config| config["architectures"][0].as_str()).map(str::to_owned),
            perplexity: evaluation.map(|evaluation| evaluation.ppl).filter(|ppl| ppl.is_finite()),
            failure,
            looks_ahead: evaluation.map(|evaluation| evaluation.looks_ahead),
            baseline: evaluation.and_then(|evaluation| evaluation.baseline),
            precision: packed.precision.name(),
            encoding: packed.encoding.clone(),
            file_bytes,
            parameters,
            bits_per_weight: 8.0 * file_bytes as f64 / parameters as f64,
            ratio_fp32: 4.0 * parameters as f64 / file_bytes as f64,
            eval_seconds: seconds,
            tokens_per_second: evaluation.map(|evaluation| evaluation.tokens_per_second),
            protocol: Conditions {
                text: self.text.clone(),
                ctx: subject.ctx,
                skip: self.options.skip,
                windows,
                scored: windows * (subject.ctx - self.options.skip),
                activations: self.options.activations,
            },
            policy: packed.file.manifest().policy.clone(),
            hashes: Hashes { source: subject.blake3.clone(), packed: packed.blake3.clone() },
            key,
        })
    }

    /// A hash of everything that a figure depends on: another program version may round differently, so it counts.
    fn key(&self, subject: &Subject, precision: Precision, rest: &Value) -> String {
        let request = precision.request(self.group, self.asymmetric && matches!(precision, Precision::Int(_)));
        let options = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": subject.name,
            "source": subject.blake3,
            "text": self.text.name,
            "ctx": subject.ctx,
            "skip": self.options.skip,
            "activations": self.options.activations,
            "allow_lookahead": self.options.allow_lookahead,
            "encoding": request.to_string(),
            "rounding": format!("{:?}", self.rounding),
            "keep": self.keep,
            "rest": rest,
        });
        let mut hasher = blake3::Hasher::new();
        hasher.update(options.to_string().as_bytes()).update(bytemuck::cast_slice(&subject.tokens));
        hasher.finalize().to_hex().to_string()
    }

    /// What a file holds, if it is the result with this key.
    fn found(&self, path: &Path, key: &str) -> Result<Option<Value>> {
        if self.force || std::fs::metadata(path).is_err() {
            return Ok(None);
        }
        match json::read_small(path).and_then(|bytes| json::parse::<Value>(path, &bytes)) {
            Ok(value) if value["key"] == *key => Ok(Some(value)),
            _ => {
                let why = "is no result of this model, text and options; pass --force to replace it, or another folder";
                Err(Error::BadOutput { path: path.to_owned(), why: why.into() })
            }
        }
    }
}

/// Whether a file is what a sweep packs of these files of weights with these options.
fn packed_before(path: &Path, subject: &Subject, options: &PackOptions) -> bool {
    let Ok(file) = PackedFile::open(path) else { return false };
    let manifest = file.manifest();
    let mut policy = options.policy.record();
    policy["rounding"] = match options.rounding {
        Rounding::Nearest => json!("rtn"),
        Rounding::Search => json!("search"),
    };
    let same_policy =
        policy.as_object().is_some_and(|policy| policy.iter().all(|(key, value)| manifest.policy[key] == *value));
    let weights = subject.checkpoint.weight_files();
    same_policy
        && manifest.source.files.len() == weights.len()
        && manifest.source.files.iter().zip(weights).all(|(packed, file)| {
            packed.name == file.name()
                && packed.blake3 == blake3::Hasher::new().update_rayon(file.bytes()).finalize().to_hex().as_str()
        })
}

/// Writes a result in one step.
fn store(path: &Path, result: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(result).expect("plain numbers and strings");
    bytes.push(b'\n');
    let mut temporary = format::temporary_beside(path)?;
    temporary.write_all(&bytes).map_err(Error::io(path))?;
    format::persist(temporary, path, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_read_by_name_and_by_number() {
        for (name, number, width) in [
            ("fp32", "32", "32"),
            ("fp16", "16", "16"),
            ("int8", "8", "8"),
            ("int3", "3", "3"),
            ("ternary", "1.58", "1.58"),
            ("binary", "1", "1"),
        ] {
            let precision: Precision = name.parse().unwrap();
            assert_eq!(number.parse(), Ok(precision));
            assert_eq!((precision.name().as_str(), precision.bit_width().to_string().as_str()), (name, width));
        }
        for text in ["", "int", "int9", "int1", "fp8", "-4", "64"] {
            assert!(text.parse::<Precision>().is_err(), "{text}");
        }
    }
}
