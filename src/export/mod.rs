//! Packed models in the layouts of other runtimes: what would become of each tensor, and the writing of it.
//!
//! [`plan`] says what an export would be; [`export`] writes it, if nothing makes it impossible.

mod compressed_tensors;
mod folder;
mod fused;
mod gguf;
mod gptq;
mod integers;
mod mlx;
mod modules;
mod npz;
mod plain;
mod safetensors;
mod schemes;

use std::{fs::File, io::Read, path::Path};

use bkpack_kernels::FloatType;
use serde::Serialize;

use self::folder::FolderExport;
use crate::{
    encoding::Encoding,
    error::{Error, Result},
    folder::check_disk,
    format::{self, PackedFile, refuse_file_of_packed},
    progress::Observer,
    tensor::TensorSource,
};

/// A layout that a packed model can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// One file for llama.cpp.
    Gguf,
    /// A folder for vLLM and transformers: `pack-quantized` of compressed-tensors.
    CompressedTensors,
    /// A folder for MLX (mlx_lm).
    Mlx,
    /// A folder for GPTQModel and what loads its checkpoints, version 2 of the layout.
    Gptq,
    /// A Hugging Face folder of dequantized weights.
    Safetensors,
    /// One file of NumPy arrays.
    Npz,
}

impl Target {
    /// The name as the command line has it.
    pub const fn name(self) -> &'static str {
        match self {
            Target::Gguf => "gguf",
            Target::CompressedTensors => "compressed-tensors",
            Target::Mlx => "mlx",
            Target::Gptq => "gptq",
            Target::Safetensors => "safetensors",
            Target::Npz => "npz",
        }
    }
}

/// What to make of a packed model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Type of what is plain in the export, and of the scales where the layout leaves their type open. By default F32
    /// for dequantized weights; the packed type, with F32 for BF16, beside the codes of [`Target::Npz`]; F16 else, but BF16
    /// for what [`Target::Gguf`] finds as BF16, and F32 for its vectors.
    pub dtype: Option<FloatType>,
    /// Round what the layout cannot hold as it is to the nearest of its own types, where it has any (GGUF's K-quants).
    pub requantize: bool,
    /// Weights in place of codes and scales ([`Target::Npz`]).
    pub dequantize: bool,
}

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
    /// Every value is the same once it is dequantized in f32, but for the sign of a zero in MLX.
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
    /// Stops an export that is not possible.
    ///
    /// # Errors
    /// [`Error::Export`] with the first reason and the number of others.
    pub fn check(&self, packed: &Path, target: Target) -> Result<()> {
        let Some(first) = self.refusals.first() else { return Ok(()) };
        let more = match self.refusals.len() - 1 {
            0 => String::new(),
            1 => " (and 1 more reason; see check-export)".into(),
            more => format!(" (and {more} more reasons; see check-export)"),
        };
        let why = format!("{}{more}", first.why);
        Err(Error::Export { path: packed.to_owned(), target: target.name(), why })
    }

    /// A plan of nothing.
    pub(crate) fn empty() -> Self {
        Self { tensors: Vec::new(), file_bytes: 0, refusals: Vec::new(), warnings: Vec::new(), notices: Vec::new() }
    }
}

/// Says what an export would be: every tensor, every byte, every runtime that would refuse it. Nothing is written.
///
/// # Errors
/// A packed file that cannot be read; an option that the target has no use for; [`Error::Cancelled`].
pub fn plan(packed: &PackedFile, target: Target, options: &Options, observer: &dyn Observer) -> Result<Plan> {
    check_options(target, options)?;
    match target {
        Target::Gguf => Ok(gguf::prepare(packed, options, observer)?.plan),
        Target::Npz => Ok(npz::NpzExport::new(packed, options, observer)?.plan),
        _ => Ok(prepare_folder(packed, target, options, observer)?.plan),
    }
}

/// Refuses an output that an export must not take the place of.
///
/// With `force` it may be a file of the same kind, or a folder that an export wrote.
///
/// # Errors
/// [`Error::Option`] if it is the input itself; [`Error::Exists`] unless `force`; [`Error::BadOutput`], [`Error::Io`].
pub fn check_output(packed: &PackedFile, target: Target, output: &Path, force: bool) -> Result<()> {
    refuse_file_of_packed(packed, output)?;
    let magic: &[u8] = match target {
        Target::Gguf => b"GGUF",
        Target::Npz => b"PK",
        _ => return folder::check_folder(packed, output, force),
    };
    format::check_output(output, force)?;
    if output.exists() {
        let mut start = Vec::new();
        let file = File::open(output).map_err(Error::io(output))?;
        file.take(magic.len() as u64).read_to_end(&mut start).map_err(Error::io(output))?;
        if start != magic {
            let why = format!("is no {} file, and --force replaces nothing else", target.name());
            return Err(Error::BadOutput { path: output.to_owned(), why });
        }
    }
    Ok(())
}

/// Writes a packed model in another layout: all of it appears under its name, or nothing. Returns what was planned.
///
/// The packed file's contents are checked first, so that no damage is written anew.
///
/// # Errors
/// What [`check_output`] refuses and [`PackedFile::check_contents`] finds; [`Error::Export`] if the target cannot hold
/// the model; [`Error::Io`], [`Error::Cancelled`]. All but the last two come before anything is written.
pub fn export(
    packed: &PackedFile,
    target: Target,
    options: &Options,
    output: &Path,
    force: bool,
    observer: &dyn Observer,
) -> Result<Plan> {
    check_options(target, options)?;
    check_output(packed, target, output, force)?;
    let ready = |plan: &Plan| {
        plan.check(packed.path(), target)?;
        if matches!(target, Target::Gguf | Target::Npz) {
            let home = output.parent().filter(|home| !home.as_os_str().is_empty()).unwrap_or(Path::new("."));
            check_disk(output, home, plan.file_bytes)?;
        }
        packed.check_contents(observer)
    };
    match target {
        Target::Gguf => {
            let export = gguf::prepare(packed, options, observer)?;
            ready(&export.plan)?;
            export.write(output, force, observer)?;
            Ok(export.plan)
        }
        Target::Npz => {
            let export = npz::NpzExport::new(packed, options, observer)?;
            ready(&export.plan)?;
            export.write(output, force, observer)?;
            Ok(export.plan)
        }
        _ => {
            let export = prepare_folder(packed, target, options, observer)?;
            ready(&export.plan)?;
            export.write(output, force, observer)?;
            Ok(export.plan)
        }
    }
}

fn prepare_folder<'a>(
    packed: &'a PackedFile,
    target: Target,
    options: &Options,
    observer: &dyn Observer,
) -> Result<FolderExport<'a>> {
    match target {
        Target::CompressedTensors => compressed_tensors::prepare(packed, options, observer),
        Target::Mlx => mlx::prepare(packed, options, observer),
        Target::Gptq => gptq::prepare(packed, options, observer),
        Target::Safetensors => safetensors::prepare(packed, options, observer),
        Target::Gguf | Target::Npz => unreachable!("one file, not a folder"),
    }
}

/// An option without effect is a mistake.
fn check_options(target: Target, options: &Options) -> Result<()> {
    let refuse =
        |option, only: &str| Err(Error::Option { option, why: format!("is for {only}, not for {}", target.name()) });
    match options {
        Options { requantize: true, .. } if target != Target::Gguf => refuse("--requantize", "gguf"),
        Options { dequantize: true, .. } if target != Target::Npz => refuse("--dequantize", "npz"),
        _ => Ok(()),
    }
}
