//! Folders of safetensors files: what every layout of one has in common.

use std::{
    borrow::Cow,
    collections::HashSet,
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use bkpack_kernels::{Cpu, FloatType};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{
    ExportedTensor, Fidelity, Plan, Refusal, Target, compressed_tensors, gptq,
    integers::Integers,
    mlx,
    modules::is_activation_scale,
    plain::{plain_bytes, plain_fidelity},
};
use crate::{
    checkpoint::header::Header,
    encoding::FloatName,
    error::{Error, Result},
    folder::{
        CONFIG, INDEX, PartialFolder, Shard, Shards, StoredTensor, TRAVELLING_FILES, check_target, to_json,
        weight_files,
    },
    format::{PackedFile, PackedTensor},
    mmap::FileMap,
    progress::{Observer, Unit},
    tensor::{ComplexPart, TensorSource},
};

/// The most data of one file of weights, as Hugging Face cuts them.
const SHARD_BYTES: u64 = 5_000_000_000;

/// The metadata key of the files of an export; its value is the layout.
const MARK: &str = "bkpack_export";

/// Where the header of a safetensors file has what is no tensor.
const METADATA: &str = "__metadata__";

/// The config of GPTQ, which another layout must not leave behind.
pub(super) const GPTQ_CONFIG: &str = "quantize_config.json";

/// How a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conversion {
    /// Dequantized, in this type.
    Plain(FloatType),
    /// Dequantized, with the other half of a complex tensor.
    Complex,
    /// Codes with scales of this type.
    CompressedTensors(Integers, FloatType),
    /// Codes with scales and offsets of this type.
    Mlx(Integers, FloatType),
    /// Codes with F16 scales, all transposed.
    Gptq(Integers),
}

/// A tensor of the packed file on its way into the export.
pub(super) struct Job<'a> {
    pub tensor: &'a PackedTensor,
    pub conversion: Conversion,
}

impl<'a> Job<'a> {
    fn stored(&self) -> Vec<StoredTensor> {
        let PackedTensor { name, shape, .. } = self.tensor;
        match &self.conversion {
            Conversion::Plain(dtype) => {
                let dtype = FloatName::from(*dtype).safetensors();
                vec![StoredTensor { name: name.clone(), dtype, shape: shape.clone() }]
            }
            Conversion::Complex => {
                let name = name.strip_suffix(ComplexPart::Real.suffix()).unwrap_or(name).to_owned();
                vec![StoredTensor { name, dtype: Dtype::C64, shape: shape.clone() }]
            }
            Conversion::CompressedTensors(integers, dtype) => compressed_tensors::stored(name, shape, integers, *dtype),
            Conversion::Mlx(integers, dtype) => mlx::stored(name, shape, integers, *dtype),
            Conversion::Gptq(integers) => gptq::stored(name, shape, integers),
        }
    }

    /// The bytes of each stored tensor.
    fn bytes(&self, cpu: Cpu, packed: &'a PackedFile) -> Result<Vec<Cow<'a, [u8]>>> {
        let name = &self.tensor.name;
        if self.conversion == Conversion::Complex {
            let name = name.strip_suffix(ComplexPart::Real.suffix()).unwrap_or(name);
            let values = packed.complex_values(cpu, name)?;
            let bytes = values.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
            return Ok(vec![Cow::Owned(bytes)]);
        }
        let tensor = packed.tensor(name)?;
        let matrix = tensor.matrix();
        let owned = |parts: Vec<Cow<[u8]>>| parts.into_iter().map(|part| Cow::Owned(part.into_owned())).collect();
        Ok(match &self.conversion {
            Conversion::Plain(dtype) => owned(vec![plain_bytes(cpu, &matrix, *dtype)]),
            Conversion::CompressedTensors(integers, dtype) => {
                owned(compressed_tensors::bytes(&matrix, integers, *dtype))
            }
            Conversion::Mlx(integers, dtype) => owned(mlx::bytes(&matrix, integers, *dtype)),
            Conversion::Gptq(integers) => owned(gptq::bytes(&matrix, integers)),
            Conversion::Complex => unreachable!("handled above"),
        })
    }

    /// How the export holds it, in the layout's words.
    fn description(&self) -> String {
        match &self.conversion {
            Conversion::Plain(dtype) => FloatName::from(*dtype).name().into(),
            Conversion::Complex => "C64".into(),
            Conversion::CompressedTensors(integers, _) => format!("pack-quantized {integers}"),
            Conversion::Mlx(integers, _) => format!("affine {}-bit g{}", integers.bits, integers.group),
            Conversion::Gptq(integers) => format!("gptq_v2 {integers}"),
        }
    }

    /// Whether its values stay the same; `Err` says why the conversion cannot hold them.
    fn fidelity(&self, cpu: Cpu, packed: &PackedFile) -> Result<Result<Fidelity, String>> {
        let tensor = packed.tensor(&self.tensor.name)?;
        let matrix = tensor.matrix();
        Ok(match &self.conversion {
            Conversion::Plain(dtype) => plain_fidelity(cpu, self.tensor, &matrix, *dtype),
            Conversion::Complex => Ok(Fidelity::Lossless),
            Conversion::CompressedTensors(integers, dtype) => integers.scale_fidelity(&matrix, *dtype),
            Conversion::Mlx(integers, dtype) => mlx::fidelity(&matrix, integers, *dtype),
            Conversion::Gptq(integers) => integers.scale_fidelity(&matrix, FloatType::F16),
        })
    }
}

/// A folder that is planned to the byte.
pub(super) struct FolderExport<'a> {
    pub plan: Plan,
    packed: &'a PackedFile,
    jobs: Vec<Job<'a>>,
    shards: Shards,
    files: Vec<(String, Cow<'a, [u8]>)>,
}

impl<'a> FolderExport<'a> {
    /// Plans the files of an export: the jobs' tensors, config files, and what else travels inside the packed file.
    pub fn new(
        packed: &'a PackedFile,
        target: Target,
        jobs: Vec<Job<'a>>,
        configs: Vec<(&str, Vec<u8>)>,
        mut refusals: Vec<Refusal>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let stored: Vec<Vec<StoredTensor>> = jobs.iter().map(Job::stored).collect();
        let mut names = HashSet::new();
        if let Some(twice) = stored.iter().flatten().find(|tensor| !names.insert(&tensor.name)) {
            let why = format!("two tensors of the export would be named {}; rename one of them", twice.name);
            refusals.push(Refusal { runtime: target.name().into(), why });
        }
        if names.iter().any(|name| *name == METADATA) {
            let why = format!("a tensor is named {METADATA}, a word of safetensors' own; rename it");
            refusals.push(Refusal { runtime: target.name().into(), why });
        }
        let cpu = Cpu::detect();
        let fidelities: Vec<Result<Result<Fidelity, String>>> =
            jobs.par_iter().map(|job| observer.check().and_then(|()| job.fidelity(cpu, packed))).collect();
        let mut tensors = Vec::with_capacity(jobs.len());
        for ((job, stored), fidelity) in jobs.iter().zip(&stored).zip(fidelities) {
            let fidelity = fidelity?.unwrap_or_else(|why| {
                let why = format!("tensor {} {why}", job.tensor.name);
                refusals.push(Refusal { runtime: target.name().into(), why: why.clone() });
                Fidelity::Rounded { why }
            });
            tensors.push(ExportedTensor {
                name: job.tensor.name.clone(),
                names: stored.iter().map(|tensor| tensor.name.clone()).collect(),
                shape: job.tensor.shape.clone(),
                encoding: job.tensor.encoding,
                target: job.description(),
                bytes: stored.iter().map(|tensor| tensor.bytes() as u64).sum(),
                fidelity,
            });
        }
        let format = if target == Target::Mlx { "mlx" } else { "pt" };
        let shards = Shards::plan(&stored, SHARD_BYTES, &[("format", format), (MARK, target.name())]);
        let mut files: Vec<(String, Cow<[u8]>)> =
            configs.into_iter().map(|(name, bytes)| (name.to_owned(), Cow::Owned(bytes))).collect();
        let taken = |name: &str| name == CONFIG || name == GPTQ_CONFIG || is_weights(name);
        for (name, _) in packed.files().filter(|(name, _)| !taken(name)) {
            if let Some(bytes) = packed.file(name)? {
                files.push((name.to_owned(), bytes));
            }
        }
        let file_bytes = shards.file_bytes() + files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        let mut notices = Vec::new();
        if !packed.activations().is_empty() {
            notices.push("scales of quantized activations are left out: only bkpack runs them".into());
        }
        if !files.iter().any(|(name, _)| name == CONFIG) {
            notices.push("no config.json is inside, so the folder will hold weights alone".into());
        }
        let plan = Plan { tensors, file_bytes, refusals, warnings: Vec::new(), notices };
        Ok(Self { plan, packed, jobs, shards, files })
    }

    /// Writes it; all of it appears, or nothing.
    pub fn write(&self, output: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
        let replaceable = |folder: &Path| replaceable(folder, self.packed);
        let partial = PartialFolder::create(output, force, self.plan.file_bytes, &replaceable)?;
        observer.begin("Writing", self.shards.file_bytes(), Unit::Bytes);
        for shard in &self.shards.files {
            let mut file = partial.file(&shard.name)?;
            self.write_shard(shard, &mut file, &partial.path(&shard.name), observer)?;
        }
        observer.end();
        let mut names: Vec<&str> = Vec::new();
        for (name, bytes) in &self.files {
            partial.write(name, bytes)?;
            names.push(name);
        }
        names.extend(self.shards.files.iter().map(|shard| shard.name.as_str()));
        if let Some(index) = &self.shards.index {
            partial.write(INDEX, index)?;
            names.push(INDEX);
        }
        // An older model's tokenizer does not belong to this one.
        let others: Vec<&str> = TRAVELLING_FILES.into_iter().chain([GPTQ_CONFIG]).collect();
        partial.finish(&names, &others)
    }

    fn write_shard(&self, shard: &Shard, file: &mut File, path: &Path, observer: &dyn Observer) -> Result<()> {
        let cpu = Cpu::detect();
        file.write_all(&shard.header).map_err(Error::io(path))?;
        for (job, offsets) in self.jobs[shard.groups.clone()].iter().zip(&shard.offsets) {
            observer.check()?;
            for (bytes, &offset) in job.bytes(cpu, self.packed)?.iter().zip(offsets) {
                let written = file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes));
                written.map_err(Error::io(path))?;
                observer.advance(bytes.len() as u64);
            }
        }
        file.sync_data().map_err(Error::io(path))
    }
}

/// The tensors of a packed model that an export holds: all but the scales of quantized activations, and of a complex
/// tensor only its real half, for both.
pub(super) fn exported_tensors(packed: &PackedFile) -> impl Iterator<Item = &PackedTensor> {
    let left_out = |tensor: &&PackedTensor| {
        tensor.complex == Some(ComplexPart::Imaginary) || is_activation_scale(packed, &tensor.name)
    };
    packed.tensors().iter().filter(move |tensor| !left_out(tensor))
}

/// The model's config.json with the type of the export's plain values, without what it may say of another quantization.
pub(super) fn config(packed: &PackedFile, dtype: FloatType) -> Option<Map<String, Value>> {
    let mut config = packed.config()?.as_object()?.clone();
    config.shift_remove("quantization_config");
    config.shift_remove("quantization");
    let name = FloatName::from(dtype).torch();
    let keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
    for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
        config.insert(key.into(), name.into());
    }
    Some(config)
}

/// A config as the bytes of its file.
pub(super) fn config_file(config: Map<String, Value>) -> (&'static str, Vec<u8>) {
    (CONFIG, to_json(&Value::Object(config)))
}

fn is_weights(name: &str) -> bool {
    name == INDEX || (name.starts_with("model") && name.ends_with(".safetensors"))
}

/// Refuses a folder that an export must not be written to.
///
/// # Errors
/// As [`PartialFolder::create`].
pub(super) fn check_folder(packed: &PackedFile, output: &Path, force: bool) -> Result<()> {
    check_target(output, force, &|folder| replaceable(folder, packed)).map(drop)
}

/// Whether a folder may be replaced: one whose weights an export wrote, or without any file that could be of a model.
fn replaceable(folder: &Path, packed: &PackedFile) -> Result<(), String> {
    let files = weight_files(folder).map_err(|error| error.to_string())?;
    let weights: Vec<&String> = files.iter().filter(|name| *name != INDEX).collect();
    for &name in &weights {
        let path = folder.join(name);
        let marked = FileMap::open(&path).and_then(|map| Header::read(&path, &map));
        if !marked.is_ok_and(|header| header.metadata.contains_key(MARK)) {
            return Err(format!("holds {name}, which is not of an export"));
        }
    }
    let travelling = packed.files().map(|(name, _)| name);
    let mut others = [INDEX, GPTQ_CONFIG].into_iter().chain(TRAVELLING_FILES).chain(travelling);
    match others.find(|name| weights.is_empty() && folder.join(name).exists()) {
        Some(name) => Err(format!("holds {name}, but no weights of an export")),
        None => Ok(()),
    }
}
