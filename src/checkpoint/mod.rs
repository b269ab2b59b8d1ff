//! Reading checkpoints: Hugging Face folders, safetensors, NPZ and PyTorch files, tensor by tensor from the memory map.

mod archive;
mod content;
mod dtype;
pub mod header;
mod huggingface;
mod npy;
mod npz;
mod options;
mod pickle;
mod safetensors;
mod stored;
mod torch;
mod torch_legacy;

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde_json::Value;

pub(crate) use content::may_be_safetensors;
pub use options::{OpenOptions, Rename};

use self::{dtype::Element, stored::StoredTensor};
use crate::{
    error::{Error, Result},
    json,
    mmap::FileMap,
    tensor::{ComplexPart, Tensor, TensorData, TensorSource, natural_order},
};

/// A full-precision model on disk.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: CheckpointKind,
    config: Option<Value>,
    /// The config file and the folder of the other files that belong to the model.
    companions: Option<(PathBuf, PathBuf)>,
    files: Vec<WeightFile>,
    names: Vec<String>,
    tensors: HashMap<String, Location>,
    notices: Vec<String>,
}

/// Which file format a checkpoint came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    HuggingFace,
    Safetensors,
    Npz,
    Torch,
}

impl CheckpointKind {
    /// The name that the manifest records.
    pub fn name(self) -> &'static str {
        match self {
            CheckpointKind::HuggingFace => "huggingface",
            CheckpointKind::Safetensors => "safetensors",
            CheckpointKind::Npz => "npz",
            CheckpointKind::Torch => "torch",
        }
    }
}

/// One file of weights.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: FileMap,
    kind: CheckpointKind,
    contents: Contents,
}

/// What a file of weights holds.
#[derive(Debug)]
struct Contents {
    tensors: Vec<StoredTensor>,
    /// What the user should know of how it was read.
    notices: Vec<String>,
}

impl WeightFile {
    /// Maps a file and reads what it holds, whatever its format.
    fn open(path: &Path) -> Result<Self> {
        let map = FileMap::open(path)?;
        let (kind, contents) = content::read(path, &map)?;
        Ok(Self { path: path.to_owned(), map, kind, contents })
    }

    /// The file's name without its folder.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Which stored tensor a name stands for.
#[derive(Clone, Copy, Debug)]
struct Location {
    file: usize,
    tensor: usize,
    part: Option<ComplexPart>,
}

/// Opens a checkpoint as it is; see [`open_with`].
///
/// ```
/// use bkpack::{checkpoint, tensor::TensorSource};
///
/// let checkpoint = checkpoint::open("fixtures/llama".as_ref())?;
/// assert_eq!(checkpoint.kind().name(), "huggingface");
/// assert_eq!(checkpoint.names().len(), 56);
/// assert_eq!(checkpoint.shape("model.embed_tokens.weight"), Some(&[4096, 256][..]));
/// assert_eq!(checkpoint.parameters(), 5_475_584);
/// # Ok::<_, bkpack::Error>(())
/// ```
///
/// # Errors
/// As [`open_with`].
pub fn open(path: &Path) -> Result<Checkpoint> {
    open_with(path, &OpenOptions::default())
}

/// Opens a Hugging Face folder, or a file of weights: safetensors, NPZ or PyTorch, told by its content. Headers are read
/// and checked; weights stay on disk.
///
/// A complex tensor `X` appears as `X.real` and `X.imag`. F64 is read as F32, 8-bit floats as F16 or BF16.
///
/// # Errors
/// A path that is neither, a missing shard, a file that breaks a rule of its format, a tensor that is no float or is
/// empty, an 8-bit tensor with a scale beside it, a rename that matches nothing or makes two names one.
pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Checkpoint> {
    let (checkpoint, matched) = open_sharing(path, options)?;
    match options.rename.iter().zip(matched).find(|(_, matched)| !matched) {
        Some((rename, _)) => Err(rename.matches_nothing(&[path])),
        None => Ok(checkpoint),
    }
}

/// Opens one of several checkpoints that share `options.rename`: also says of each pattern whether it matches here.
///
/// # Errors
/// As [`open_with`], except for a pattern that matches nothing.
pub fn open_sharing(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, Vec<bool>)> {
    let folder = std::fs::metadata(path).map_err(Error::io(path))?.is_dir();
    let companions = match (&options.config, folder) {
        (Some(_), true) if has_config(path) => {
            let why = format!("{} has a config.json of its own, which counts; leave it out", path.display());
            return Err(Error::Option { option: "--config", why });
        }
        (Some(config), true) => Some((config.clone(), path.to_owned())),
        (Some(config), false) => Some((config.clone(), config.parent().unwrap_or(Path::new("")).to_owned())),
        (None, true) => Some((path.join("config.json"), path.to_owned())),
        (None, false) => None,
    };
    let config = match companions.as_ref().map(|(config, _)| (config, std::fs::read(config))) {
        None => None,
        Some((path, Ok(bytes))) => Some(json::parse(path, &bytes)?),
        Some((_, Err(error))) if options.config.is_none() && error.kind() == ErrorKind::NotFound => None,
        Some((path, Err(error))) => return Err(Error::io(path)(error)),
    };
    let files = if folder { huggingface::open(path)? } else { vec![WeightFile::open(path)?] };
    let kind = if folder { CheckpointKind::HuggingFace } else { files[0].kind };
    let mut checkpoint = Checkpoint {
        path: path.to_owned(),
        kind,
        config,
        companions,
        files,
        names: Vec::new(),
        tensors: HashMap::new(),
        notices: Vec::new(),
    };
    let matched = checkpoint.rename(&options.rename);
    checkpoint.check_tensors()?;
    checkpoint.collect_names()?;
    checkpoint.collect_notices();
    Ok((checkpoint, matched))
}

/// Whether a checkpoint is a folder with a config.json, so that it takes no other.
pub fn has_config(path: &Path) -> bool {
    path.is_dir() && path.join("config.json").exists()
}

/// What wrapped models (DataParallel and its like) put before every name.
const WRAPPER: &str = "module.";

impl Checkpoint {
    /// Gives every tensor its final name; which of the rules match one.
    fn rename(&mut self, rules: &[Rename]) -> Vec<bool> {
        let torch = self.files.iter().all(|file| file.kind == CheckpointKind::Torch);
        if torch && self.stored().all(|(_, tensor)| tensor.name.starts_with(WRAPPER)) {
            let tensors = self.files.iter_mut().flat_map(|file| &mut file.contents.tensors);
            tensors.for_each(|tensor| drop(tensor.name.drain(..WRAPPER.len())));
            let notice = "every name starts with module. (a wrapper's): it is left out, and --rename sees what remains";
            self.notices.push(notice.into());
        }
        let apply = |rule: &Rename| {
            let tensors = self.files.iter_mut().flat_map(|file| &mut file.contents.tensors);
            rule.apply(tensors.map(|tensor| &mut tensor.name))
        };
        rules.iter().map(apply).collect()
    }

    /// Every tensor with the file that it is in.
    fn stored(&self) -> impl Iterator<Item = (&WeightFile, &StoredTensor)> {
        self.files.iter().flat_map(|file| file.contents.tensors.iter().map(move |tensor| (file, tensor)))
    }

    fn check_tensors(&self) -> Result<()> {
        let names: HashSet<&str> = self.stored().map(|(_, tensor)| tensor.name.as_str()).collect();
        for (file, tensor) in self.stored() {
            let path = || file.path.clone();
            if tensor.shape.contains(&0) {
                return Err(Error::EmptyTensor {
                    path: path(),
                    tensor: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                });
            }
            tensor.check_extent().map_err(|why| Error::Extent { path: path(), tensor: tensor.name.clone(), why })?;
            if matches!(tensor.element, Element::Small(_)) {
                let siblings = ["_scale", "_scale_inv", "_scales"].map(|suffix| format!("{}{suffix}", tensor.name));
                if let Some(scale) = siblings.into_iter().find(|name| names.contains(name.as_str())) {
                    return Err(Error::ScaledFloat8 { path: path(), tensor: tensor.name.clone(), scale });
                }
            }
        }
        for file in &self.files {
            stored::check_sharing(&file.path, &file.contents.tensors)?;
        }
        if names.is_empty() {
            return Err(Error::NotAModel { path: self.path.clone(), why: "holds no tensors".into() });
        }
        Ok(())
    }

    /// Names every tensor, and both parts of a complex one.
    fn collect_names(&mut self) -> Result<()> {
        for (file_index, file) in self.files.iter().enumerate() {
            for (tensor_index, tensor) in file.contents.tensors.iter().enumerate() {
                let location = |part| Location { file: file_index, tensor: tensor_index, part };
                let names = match tensor.complex {
                    false => vec![(tensor.name.clone(), location(None))],
                    true => [ComplexPart::Real, ComplexPart::Imaginary]
                        .map(|part| (format!("{}{}", tensor.name, part.suffix()), location(Some(part))))
                        .into(),
                };
                for (name, location) in names {
                    if self.tensors.insert(name.clone(), location).is_some() {
                        return Err(Error::SharedName { path: file.path.clone(), tensor: name });
                    }
                    self.names.push(name);
                }
            }
        }
        self.names.sort_by(|a, b| natural_order(a, b));
        Ok(())
    }

    fn collect_notices(&mut self) {
        let mut notices = std::mem::take(&mut self.notices);
        for notice in self.files.iter().flat_map(|file| &file.contents.notices) {
            if !notices.contains(notice) {
                notices.push(notice.clone());
            }
        }
        let mut count = |what: &dyn Fn(&StoredTensor) -> bool, singular: &str, plural: &str| match self
            .stored()
            .filter(|(_, tensor)| what(tensor))
            .count()
        {
            0 => {}
            1 => notices.push(format!("1 tensor {singular}")),
            count => notices.push(format!("{count} tensors {plural}")),
        };
        count(
            &|tensor| tensor.element == Element::F64,
            "is F64 and is rounded to F32",
            "are F64 and are rounded to F32",
        );
        count(
            &|tensor| matches!(tensor.element, Element::Small(_)),
            "is an 8-bit float and is widened exactly to 16 bits",
            "are 8-bit floats and are widened exactly to 16 bits",
        );
        count(
            &|tensor| tensor.complex,
            "is complex and appears as two, .real and .imag",
            "are complex and appear as two each, .real and .imag",
        );
        self.notices = notices;
    }

    fn locate(&self, name: &str) -> Option<(&WeightFile, &StoredTensor, Option<ComplexPart>)> {
        let location = self.tensors.get(name)?;
        let file = &self.files[location.file];
        Some((file, &file.contents.tensors[location.tensor], location.part))
    }

    /// The format it came in.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// Its files of weights, in the order of their names.
    pub fn weight_files(&self) -> &[WeightFile] {
        &self.files
    }

    /// Bytes of all tensors as they are read, without headers.
    pub fn tensor_bytes(&self) -> u64 {
        let parts = |tensor: &StoredTensor| if tensor.complex { 2 } else { 1 };
        self.stored().map(|(_, tensor)| (tensor.read_bytes() * parts(tensor)) as u64).sum()
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
        self.locate(name).map(|(_, tensor, _)| tensor.shape.as_slice())
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        let (file, tensor, part) = self.locate(name).ok_or_else(missing)?;
        let values = tensor.read(&file.path, &file.map, part)?;
        let data = TensorData::Float { dtype: tensor.element.float_type(), values };
        Tensor::new(tensor.shape.clone(), data).map_err(|error| Error::Extent {
            path: file.path.clone(),
            tensor: name.to_owned(),
            why: error.to_string(),
        })
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        let Some((config, folder)) = &self.companions else { return Ok(None) };
        let path = if name == "config.json" { config.clone() } else { folder.join(name) };
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path)(error)),
        }
    }

    fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    fn notices(&self) -> &[String] {
        &self.notices
    }

    fn complex_part(&self, name: &str) -> Option<ComplexPart> {
        self.tensors.get(name)?.part
    }
}
