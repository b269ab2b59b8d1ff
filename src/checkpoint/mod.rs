//! Reading checkpoints: a Hugging Face folder or a bare safetensors file, row by row from the memory map.

pub mod header;
mod huggingface;
mod safetensors;

use std::{
    borrow::Cow,
    collections::HashMap,
    path::{Path, PathBuf},
};

use bkpack_kernels::FloatType;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    mmap::FileMap,
    tensor::{Tensor, TensorData, TensorSource, natural_order},
};

/// A full-precision model on disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: CheckpointKind,
    config: Option<Value>,
    files: Vec<WeightFile>,
    names: Vec<String>,
    tensors: HashMap<String, Location>,
}

/// Which file format a checkpoint came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    HuggingFace,
    Safetensors,
}

impl CheckpointKind {
    /// The name that the manifest records.
    pub fn name(self) -> &'static str {
        match self {
            CheckpointKind::HuggingFace => "huggingface",
            CheckpointKind::Safetensors => "safetensors",
        }
    }
}

/// One file of weights.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: FileMap,
}

impl WeightFile {
    /// The file's name without its folder.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Where a tensor's bytes lie.
#[derive(Debug)]
struct Location {
    file: usize,
    dtype: FloatType,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// Opens a Hugging Face folder or a safetensors file. Headers are read and checked; weights stay on disk.
///
/// # Errors
/// A path that is neither, a missing shard, a header that breaks a rule, a tensor that is no float or is empty.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    let checkpoint = if metadata.is_dir() { huggingface::open(path)? } else { safetensors::open(path)? };
    if checkpoint.names.is_empty() {
        return Err(Error::NotAModel { path: path.to_owned(), why: "holds no tensors".into() });
    }
    Ok(checkpoint)
}

impl Checkpoint {
    /// Gathers the tensors of all files under their names.
    fn new(
        path: &Path,
        kind: CheckpointKind,
        config: Option<Value>,
        files: Vec<(WeightFile, header::Header)>,
    ) -> Result<Self> {
        let mut checkpoint =
            Self { path: path.to_owned(), kind, config, files: Vec::new(), names: Vec::new(), tensors: HashMap::new() };
        for (index, (file, header)) in files.into_iter().enumerate() {
            for tensor in header.tensors {
                let dtype = match tensor.dtype {
                    ::safetensors::Dtype::F32 => FloatType::F32,
                    ::safetensors::Dtype::F16 => FloatType::F16,
                    ::safetensors::Dtype::BF16 => FloatType::BF16,
                    other => {
                        return Err(Error::UnsupportedDtype {
                            path: file.path,
                            tensor: tensor.name,
                            dtype: other.to_string(),
                        });
                    }
                };
                if tensor.shape.contains(&0) {
                    return Err(Error::EmptyTensor { path: file.path, tensor: tensor.name, shape: tensor.shape });
                }
                let location = Location { file: index, dtype, shape: tensor.shape, range: tensor.range };
                if checkpoint.tensors.insert(tensor.name.clone(), location).is_some() {
                    return Err(Error::StrayTensor { path: path.to_owned(), tensor: tensor.name, shard: file.name() });
                }
                checkpoint.names.push(tensor.name);
            }
            checkpoint.files.push(file);
        }
        checkpoint.names.sort_by(|a, b| natural_order(a, b));
        Ok(checkpoint)
    }

    /// The format it came in.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// Its files of weights, in the order of their names.
    pub fn weight_files(&self) -> &[WeightFile] {
        &self.files
    }

    /// Bytes of all tensors as the checkpoint stores them, without headers.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|location| location.range.len() as u64).sum()
    }
}

impl TensorSource for Checkpoint {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    fn names(&self) -> &[String] {
        &self.names
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|location| location.shape.as_slice())
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        let location = self.tensors.get(name).ok_or_else(missing)?;
        let values = Cow::Borrowed(&self.files[location.file].map[location.range.clone()]);
        Tensor::new(location.shape.clone(), TensorData::Float { dtype: location.dtype, values }).map_err(|error| {
            Error::Safetensors { path: self.files[location.file].path.clone(), why: format!("tensor {name}: {error}") }
        })
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        if self.kind != CheckpointKind::HuggingFace {
            return Ok(None);
        }
        let path = self.path.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path)(error)),
        }
    }

    fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }
}
