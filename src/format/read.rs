//! Opening a packed file: maps it, checks the header, every shape and every rule that needs no look at the weights.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
};

use bkpack_kernels::FloatType;
use safetensors::Dtype;
use serde_json::Value;

use super::{
    ARCHIVE_KEY, FILE_PREFIX, MANIFEST_KEY, PAGE, SEAL_KEY, VERSION, ZERO_HASH,
    entry::{PackedPart, PackedTensor, read_tensor},
    index_path,
    layout::{Role, render_index, seal_position},
    manifest::{Manifest, Part},
};
use crate::{
    checkpoint::header::{Header, HeaderTensor},
    encoding::Encoding,
    error::{Error, Result},
    json,
    mmap::FileMap,
    tensor::{ActivationQuantization, ComplexPart, Tensor, TensorData, TensorSource, natural_order},
};

/// A packed model, mapped. Weights are handed out without copying.
///
/// ```
/// use bkpack::{format::PackedFile, tensor::TensorSource};
/// use bkpack_kernels::Cpu;
///
/// let packed = PackedFile::open("spec/vectors/valid/int4-symmetric.bkpack".as_ref())?;
/// let entry = packed.entry("w.33_by_32").unwrap(); // 33 columns, a scale for each 32
/// assert_eq!((entry.shape.as_slice(), entry.encoding.to_string()), (&[3, 33][..], "INT4 g32 f32 scales".to_owned()));
///
/// let [codes, scales] = entry.parts.as_slice() else { panic!("no zero points where it is symmetric") };
/// assert_eq!(codes.name, "w.33_by_32_packed");
/// assert_eq!(packed.part_bytes(codes).len(), 3 * 5 * 4); // each row fills whole 32-bit words
/// assert_eq!(packed.part_bytes(scales).len(), 3 * 2 * 4);
///
/// let tensor = packed.tensor("w.33_by_32")?; // borrowed from the memory map
/// let mut row = [0.0; 33];
/// Cpu::detect().dequantize(&tensor.matrix(), 1, &mut row);
/// # assert!(row.iter().any(|value| *value != 0.0));
/// # Ok::<_, bkpack::Error>(())
/// ```
#[derive(Debug)]
pub struct PackedFile {
    path: PathBuf,
    shards: Vec<Shard>,
    manifest: Manifest,
    tensors: Vec<PackedTensor>,
    names: Vec<String>,
    by_name: HashMap<String, usize>,
    files: Vec<(String, PackedPart)>,
    index_bytes: u64,
}

/// One file of a packed model.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: FileMap,
    data_start: usize,
    seal: String,
}

/// One file of a packed model, as it was when it was opened.
#[derive(Clone, Copy, Debug)]
pub struct ShardView<'a> {
    pub path: &'a Path,
    /// The length field, the JSON and its padding; the data follows.
    pub header: &'a [u8],
    /// Bytes of the whole file.
    pub bytes: usize,
    /// BLAKE3 of the header, in which the hashes of all parts stand, in lowercase hex: it tells any two models apart.
    pub seal: &'a str,
}

impl PackedFile {
    /// Opens a packed file, or a sharded model by its index or by the name that it was written under.
    ///
    /// Reads the headers only; [`PackedFile::check_contents`] reads the rest.
    ///
    /// # Errors
    /// Any rule of the format that the headers break.
    pub fn open(path: &Path) -> Result<Self> {
        let index = if path.to_string_lossy().ends_with(".index.json") {
            Some(path.to_owned())
        } else {
            Some(index_path(path)).filter(|index| !path.exists() && index.exists())
        };
        let Some(index) = index else {
            let mut packed = Self::empty(path);
            packed.add_shard(path)?;
            if let Some(shard) = &packed.manifest.shard {
                let why = format!("is shard {} of {}; open the index beside it", shard.index, shard.count);
                return Err(Error::ShardSet { path: path.to_owned(), why });
            }
            return packed.checked();
        };
        Self::open_sharded(path, &index)?.checked()
    }

    /// The rules between tensors, which may lie in different shards.
    fn checked(self) -> Result<Self> {
        self.check_complex()?;
        self.check_activations()?;
        Ok(self)
    }

    fn open_sharded(path: &Path, index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = std::fs::read(index).map_err(Error::io(index))?;
        let invalid = |why: String| Error::ShardIndex { path: index.to_owned(), why };
        let mismatch = |why: String| Error::ShardSet { path: index.to_owned(), why };
        let parsed: Index = json::parse(index, &bytes).map_err(|error| match error {
            Error::Json { why, .. } => invalid(why),
            other => other,
        })?;
        let mut names: Vec<&String> = parsed.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut packed = Self::empty(path);
        for (position, name) in names.iter().enumerate() {
            if Path::new(name).file_name().is_none_or(|plain| plain != name.as_str()) {
                return Err(invalid(format!("shard {name:?} is not a plain file name")));
            }
            let shard_path = index.with_file_name(name);
            if !shard_path.exists() {
                return Err(Error::MissingShard { path: index.to_owned(), shard: name.to_string() });
            }
            let found = packed.add_shard(&shard_path)?.shard;
            let first = packed.manifest.shard.as_ref();
            let fits = found.as_ref().zip(first).is_some_and(|(found, first)| {
                found.index == position as u64 + 1 && found.count == names.len() as u64 && found.set == first.set
            });
            if !fits {
                return Err(mismatch(format!(
                    "{name} is not shard {} of {} of one conversion",
                    position + 1,
                    names.len()
                )));
            }
        }
        let shards = packed.shards.iter().enumerate().map(|(position, shard)| {
            let name = shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, shard.map.len() - shard.data_start, packed.part_names(position))
        });
        let output = PathBuf::from(index.to_string_lossy().trim_end_matches(".index.json"));
        let canonical = render_index(&output, shards.collect::<Vec<_>>().into_iter());
        if canonical.is_none_or(|(_, canonical)| canonical != bytes) {
            return Err(invalid("the index is not the one that follows from the shards".into()));
        }
        packed.index_bytes = bytes.len() as u64;
        Ok(packed)
    }

    fn empty(path: &Path) -> Self {
        let source = super::Source { kind: String::new(), files: Vec::new() };
        let manifest = Manifest {
            version: VERSION,
            producer: String::new(),
            source,
            policy: Value::Null,
            config: None,
            shard: None,
            tensors: Vec::new(),
            activations: Vec::new(),
            files: Vec::new(),
        };
        Self {
            path: path.to_owned(),
            shards: Vec::new(),
            manifest,
            tensors: Vec::new(),
            names: Vec::new(),
            by_name: HashMap::new(),
            files: Vec::new(),
            index_bytes: 0,
        }
    }

    /// Opens and checks one file, takes over its tensors, and returns its manifest without them.
    fn add_shard(&mut self, path: &Path) -> Result<Manifest> {
        let map = FileMap::open(path)?;
        let header = Header::read(path, &map)?;
        let mut manifest = read_manifest(path, &map, &header)?;
        let shard = self.shards.len();
        let mut parts: HashMap<&str, &HeaderTensor> =
            header.tensors.iter().map(|part| (part.name.as_str(), part)).collect();
        let mut claimed: HashSet<String> = HashSet::new();
        let mut take = |tensor: &str, part: &Part, role: Role| -> Result<PackedPart> {
            let (path, name) = (path.to_owned(), part.name.clone());
            let Some(found) = parts.remove(part.name.as_str()) else {
                return Err(if claimed.contains(&name) {
                    Error::SharedPart { path, part: name }
                } else {
                    Error::MissingPart { path, tensor: tensor.to_owned(), part: name }
                });
            };
            claimed.insert(name.clone());
            let element = found.dtype.bitsize() / 8;
            if element > 1 && !found.range.start.is_multiple_of(element) {
                return Err(Error::Misaligned {
                    path,
                    part: name,
                    offset: found.range.start,
                    dtype: found.dtype.to_string(),
                });
            }
            let hash = match blake3::Hash::from_hex(&part.blake3) {
                Ok(hash) if hash.to_hex().as_str() == part.blake3 => hash,
                _ => return Err(Error::HashText { path, part: name }),
            };
            let (dtype, shape, range) = (found.dtype, found.shape.clone(), found.range.clone());
            Ok(PackedPart { name, hash, role, dtype, shape, shard, range })
        };
        for entry in std::mem::take(&mut manifest.tensors) {
            if self.by_name.insert(entry.name.clone(), self.tensors.len()).is_some() {
                return Err(Error::DuplicateTensor { path: path.to_owned(), name: entry.name });
            }
            let tensor = read_tensor(path, &entry, &mut take)?;
            self.names.push(tensor.name.clone());
            self.tensors.push(tensor);
        }
        for entry in std::mem::take(&mut manifest.files) {
            check_file_name(path, &entry.name)?;
            let expected = format!("{FILE_PREFIX}{}", entry.name);
            if entry.part.name != expected {
                let (path, tensor, found) = (path.to_owned(), entry.name, entry.part.name);
                return Err(Error::PartName { path, tensor, found, expected });
            }
            let part = take(&entry.name, &entry.part, Role::Values)?;
            if part.shape.len() != 1 {
                let (path, tensor, expected) = (path.to_owned(), entry.name, vec![part.range.len()]);
                return Err(Error::PartShape { path, tensor, part: part.name, found: part.shape, expected });
            }
            if part.dtype != Dtype::U8 {
                let (part, found) = (part.name, part.dtype.to_string());
                return Err(Error::PartDtype {
                    path: path.to_owned(),
                    tensor: entry.name,
                    part,
                    found,
                    expected: "U8",
                });
            }
            self.files.push((entry.name, part));
        }
        if let Some(orphan) = parts.keys().min() {
            return Err(Error::OrphanPart { path: path.to_owned(), part: orphan.to_string() });
        }
        drop(parts);
        let data_start = header.data_start;
        if shard == 0 {
            self.manifest = manifest.clone();
        } else if !manifest.activations.is_empty() {
            return Err(Error::ActivationShard { path: path.to_owned() });
        }
        let seal = header.metadata[SEAL_KEY].clone();
        self.shards.push(Shard { path: path.to_owned(), map, data_start, seal });
        self.names.sort_by(|a, b| natural_order(a, b));
        Ok(manifest)
    }

    /// What the file says of itself; tensors and files are left out (see [`PackedFile::tensors`]).
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every logical tensor, in the file's order.
    pub fn tensors(&self) -> &[PackedTensor] {
        &self.tensors
    }

    /// One logical tensor's entry.
    pub fn entry(&self, name: &str) -> Option<&PackedTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// Names and sizes of the files that travel inside.
    pub fn files(&self) -> impl Iterator<Item = (&str, usize)> {
        self.files.iter().map(|(name, part)| (name.as_str(), part.range.len()))
    }

    /// Every part with the name of the tensor or file that it belongs to.
    pub(super) fn all_parts(&self) -> impl Iterator<Item = (&str, &PackedPart)> {
        let tensors =
            self.tensors.iter().flat_map(|tensor| tensor.parts.iter().map(|part| (tensor.name.as_str(), part)));
        tensors.chain(self.file_parts())
    }

    /// The parts of the travelling files with their names.
    pub fn file_parts(&self) -> impl Iterator<Item = (&str, &PackedPart)> {
        self.files.iter().map(|(name, part)| (name.as_str(), part))
    }

    /// The files that it consists of: one, or the shards in order.
    pub fn shards(&self) -> impl Iterator<Item = ShardView<'_>> {
        self.shards.iter().map(|Shard { path, map, data_start, seal }| ShardView {
            path,
            header: &map[..*data_start],
            bytes: map.len(),
            seal,
        })
    }

    /// The bytes of a part of this file, in its memory map, aligned to the part's element size.
    ///
    /// # Panics
    /// It may, if the part is another file's.
    pub fn part_bytes(&self, part: &PackedPart) -> &[u8] {
        &self.shards[part.shard].map[part.range.clone()]
    }

    /// The file that a part lies in.
    pub(super) fn part_path(&self, part: &PackedPart) -> &Path {
        &self.shards[part.shard].path
    }

    /// The bytes of the one file of a model without shards, and where its data starts.
    pub(super) fn single(&self) -> Option<(&[u8], usize)> {
        match self.shards.as_slice() {
            [shard] => Some((&shard.map, shard.data_start)),
            _ => None,
        }
    }

    /// The names of a shard's parts, in the order of their bytes.
    fn part_names(&self, shard: usize) -> Vec<&str> {
        let mut parts: Vec<&PackedPart> =
            self.all_parts().map(|(_, part)| part).filter(|part| part.shard == shard).collect();
        parts.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
        parts.into_iter().map(|part| part.name.as_str()).collect()
    }
}

/// Checks seal, version and page, and parses the manifest.
pub(super) fn read_manifest(path: &Path, file: &[u8], header: &Header) -> Result<Manifest> {
    let missing = |key| Error::MissingMetadata { path: path.to_owned(), key };
    if header.metadata.contains_key(ARCHIVE_KEY) {
        let why = "is an archive; restore the packed file with `bkpack unpack`".into();
        return Err(Error::NotAModel { path: path.to_owned(), why });
    }
    let text = header.metadata.get(MANIFEST_KEY).ok_or_else(|| missing(MANIFEST_KEY))?;
    header.metadata.get("format").filter(|format| *format == "pt").ok_or_else(|| missing("format"))?;
    let claimed = header.metadata.get(SEAL_KEY).ok_or_else(|| missing(SEAL_KEY))?;
    check_seal(path, &file[..header.data_start], claimed)?;
    if !header.data_start.is_multiple_of(PAGE) {
        return Err(Error::DataStart { path: path.to_owned(), start: header.data_start });
    }
    let invalid = |why: String| Error::Manifest { path: path.to_owned(), why };
    json::check_unique_keys(path, text.as_bytes()).map_err(|error| match error {
        Error::Json { why, .. } => invalid(why),
        other => other,
    })?;
    // The version comes first: a newer manifest may have another structure.
    #[derive(serde::Deserialize)]
    struct Version {
        version: u64,
    }
    let Version { version } = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if version != VERSION {
        return Err(Error::FormatVersion { path: path.to_owned(), found: version });
    }
    serde_json::from_str(text).map_err(|error| match error.to_string() {
        // Of what is parsed here, only the part of a travelling file and a record of activations refuse unknown fields.
        why if why.starts_with("unknown field") => Error::UnknownField {
            path: path.to_owned(),
            tensor: "(a travelling file or an activation record)".into(),
            why,
        },
        why => invalid(why),
    })
}

/// The seal covers every byte of the header: names, types, shapes, offsets, manifest, and the padding.
fn check_seal(path: &Path, header: &[u8], claimed: &str) -> Result<()> {
    let broken = || Error::Seal { path: path.to_owned() };
    let place = seal_position(header).ok_or_else(broken)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..place]).update(ZERO_HASH.as_bytes()).update(&header[place + ZERO_HASH.len()..]);
    if hasher.finalize().to_hex().as_str() == claimed { Ok(()) } else { Err(broken()) }
}

/// A travelling file is written out under its own name, so the name must not leave the folder.
fn check_file_name(path: &Path, name: &str) -> Result<()> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if plain && !name.is_empty() && !name.starts_with('.') {
        Ok(())
    } else {
        Err(Error::FileName { path: path.to_owned(), name: name.to_owned() })
    }
}

impl TensorSource for PackedFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Option<&Value> {
        self.manifest.config.as_ref()
    }

    fn names(&self) -> &[String] {
        &self.names
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entry(name).map(|tensor| tensor.shape.as_slice())
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        let tensor = self.entry(name).ok_or_else(missing)?;
        let bytes = |index: usize| tensor.parts.get(index).map_or(&[][..], |part| self.part_bytes(part));
        let data = match (tensor.encoding, tensor.encoding.layout()) {
            (_, Some((layout, scale_type))) => TensorData::Quantized {
                layout,
                codes: Cow::Borrowed(bytes(0)),
                scale_type,
                scales: Cow::Borrowed(bytes(1)),
                zeros: Cow::Borrowed(bytes(2)),
            },
            (Encoding::Float { dtype }, _) => {
                TensorData::Float { dtype: FloatType::from(dtype), values: Cow::Borrowed(bytes(0)) }
            }
            (_, None) => unreachable!("every encoding but plain values has a layout"),
        };
        let unfit = |error: bkpack_kernels::MatrixError| Error::Parts {
            path: self.path.clone(),
            tensor: name.to_owned(),
            why: error.to_string(),
        };
        Tensor::new(tensor.shape.clone(), data).map_err(unfit)
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        let found = self.files.iter().find(|(file, _)| file == name);
        Ok(found.map(|(_, part)| Cow::Borrowed(self.part_bytes(part))))
    }

    fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.map.len() as u64).sum::<u64>() + self.index_bytes
    }

    fn complex_part(&self, name: &str) -> Option<ComplexPart> {
        self.entry(name)?.complex
    }

    fn activations(&self) -> &[ActivationQuantization] {
        &self.manifest.activations
    }
}
