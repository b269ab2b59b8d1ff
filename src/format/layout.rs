//! Where every byte of a packed file goes, decided before the first is written: sizes are exact beforehand.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    FILE_PREFIX, MANIFEST_KEY, PAGE, SEAL_KEY, VERSION, ZERO_HASH, index_path,
    manifest::{FileEntry, Manifest, Part, Parts, ShardInfo, Source, TensorEntry},
};
use crate::{
    encoding::{Encoding, FloatName},
    tensor::{ComplexPart, matrix_shape},
};

/// A tensor whose encoding is decided.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub component: String,
    /// Which half of a complex tensor it is.
    pub complex: Option<ComplexPart>,
    pub encoding: Encoding,
    /// Why it has this encoding, for the manifest.
    pub reason: Option<Value>,
}

impl PlannedTensor {
    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of all its parts.
    pub fn stored_bytes(&self) -> usize {
        stored_parts(self).iter().map(Stored::bytes).sum()
    }
}

/// A file that will travel inside.
#[derive(Clone, Debug)]
pub struct PlannedFile {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// One stored tensor and its place in the data section.
#[derive(Clone, Debug)]
pub struct PlacedPart {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub offset: usize,
    pub bytes: usize,
}

/// One file to be written: its manifest with all hashes zero, and the place of each part.
#[derive(Clone, Debug)]
pub struct FilePlan {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub parts: Vec<PlacedPart>,
    /// Bytes of the header with its length field, a multiple of 4096.
    pub header_bytes: usize,
}

impl FilePlan {
    /// Gives every stored part of a manifest its place.
    pub(super) fn new(path: PathBuf, manifest: Manifest, stored: Vec<Stored>) -> Self {
        let mut order: Vec<Stored> = stored;
        // Multiples of 64 first keeps them aligned to 64 bytes; then by falling element size, so that every part is
        // naturally aligned. The sort is stable: within a class the manifest's order holds.
        order.sort_by_key(|part| match part.bytes() % 64 {
            0 => 0,
            _ => 5 - element_bytes(part.dtype),
        });
        let mut offset = 0;
        let parts = order
            .into_iter()
            .map(|part| {
                let bytes = part.bytes();
                let placed = PlacedPart { name: part.name, dtype: part.dtype, shape: part.shape, offset, bytes };
                offset += bytes;
                placed
            })
            .collect();
        let mut plan = Self { path, manifest, parts, header_bytes: 0 };
        plan.header_bytes = plan.render_header().len();
        plan
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        (self.header_bytes + self.data_bytes()) as u64
    }

    /// Bytes of the data section.
    pub fn data_bytes(&self) -> usize {
        self.parts.last().map_or(0, |part| part.offset + part.bytes)
    }

    /// The header as it stands on disk: length, JSON, spaces up to a page; sealed.
    pub fn render_header(&self) -> Vec<u8> {
        let manifest = serde_json::to_string(&self.manifest).expect("a manifest is JSON");
        let mut header = vec![0; 8];
        header.extend_from_slice(b"{\"__metadata__\":");
        let metadata = json!({ "format": "pt", MANIFEST_KEY: manifest, SEAL_KEY: ZERO_HASH });
        serde_json::to_writer(&mut header, &metadata).expect("writing to memory");
        for part in &self.parts {
            header.push(b',');
            serde_json::to_writer(&mut header, &part.name).expect("writing to memory");
            header.push(b':');
            let info = json!({
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": [part.offset, part.offset + part.bytes],
            });
            serde_json::to_writer(&mut header, &info).expect("writing to memory");
        }
        header.push(b'}');
        header.resize(header.len().next_multiple_of(PAGE), b' ');
        let length = (header.len() - 8) as u64;
        header[..8].copy_from_slice(&length.to_le_bytes());
        let seal = blake3::hash(&header).to_hex();
        let place = seal_position(&header).expect("the seal was just written");
        header[place..place + ZERO_HASH.len()].copy_from_slice(seal.as_bytes());
        header
    }
}

/// Where the seal's digits stand in a header; `None` unless they stand in exactly one place.
///
/// Inside JSON strings quotes are escaped, so these bytes can only be the metadata's own key.
pub(super) fn seal_position(header: &[u8]) -> Option<usize> {
    let key = format!("\"{SEAL_KEY}\":\"");
    let mut found = header.windows(key.len()).enumerate().filter(|(_, window)| *window == key.as_bytes());
    let position = found.next()?.0 + key.len();
    let ends = header.get(position + ZERO_HASH.len()) == Some(&b'"');
    (found.next().is_none() && ends).then_some(position)
}

/// Plans the file, or the shards of at most `shard_bytes` of data each, of a model to be written to `output`.
pub fn plan(
    output: &Path,
    source: Source,
    policy: Value,
    config: Option<Value>,
    tensors: &[PlannedTensor],
    files: &[PlannedFile],
    shard_bytes: Option<u64>,
) -> Vec<FilePlan> {
    let travelling = files.iter().map(|file| file.bytes.len() as u64).sum::<u64>();
    let mut groups: Vec<&[PlannedTensor]> = Vec::new();
    let (mut start, mut held) = (0, travelling);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = stored_parts(tensor).iter().map(|part| part.bytes() as u64).sum::<u64>();
        if index > start && shard_bytes.is_some_and(|limit| held + bytes > limit) {
            groups.push(&tensors[start..index]);
            (start, held) = (index, 0);
        }
        held += bytes;
    }
    groups.push(&tensors[start..]);

    let base = Manifest {
        version: VERSION,
        producer: concat!("bkpack ", env!("CARGO_PKG_VERSION")).into(),
        source,
        policy,
        config,
        shard: None,
        tensors: Vec::new(),
        activations: Vec::new(),
        files: Vec::new(),
    };
    let count = groups.len();
    // Where the model was cut is part of a set's identity: shards cut elsewhere do not fit these.
    let cuts: Vec<&str> =
        groups.iter().filter_map(|tensors| tensors.first()).map(|tensor| tensor.name.as_str()).collect();
    let cuts = blake3::hash(&serde_json::to_vec(&cuts).expect("names are JSON")).to_hex().to_string();
    groups
        .into_iter()
        .enumerate()
        .map(|(index, tensors)| {
            let mut manifest = base.clone();
            let mut stored: Vec<Stored> = Vec::new();
            for tensor in tensors {
                let parts = stored_parts(tensor);
                manifest.tensors.push(tensor_entry(tensor, &parts));
                stored.extend(parts);
            }
            if index == 0 {
                for file in files {
                    let part = Part { name: format!("{FILE_PREFIX}{}", file.name), blake3: ZERO_HASH.into() };
                    stored.push(stored_file(&part.name, file.bytes.len()));
                    manifest.files.push(FileEntry { name: file.name.clone(), part });
                }
            }
            if count > 1 {
                manifest.shard = Some(ShardInfo { index: index as u64 + 1, count: count as u64, set: cuts.clone() });
            }
            let path = if count > 1 { shard_path(output, index + 1, count) } else { output.to_owned() };
            FilePlan::new(path, manifest, stored)
        })
        .collect()
}

/// The index of a sharded model: its path and canonical bytes; `None` for a single file.
pub(super) fn render_index<'a>(
    output: &Path,
    shards: impl ExactSizeIterator<Item = (String, usize, Vec<&'a str>)>,
) -> Option<(PathBuf, Vec<u8>)> {
    if shards.len() < 2 {
        return None;
    }
    let mut total = 0;
    let mut weight_map = serde_json::Map::new();
    for (file, data_bytes, parts) in shards {
        total += data_bytes;
        for part in parts {
            weight_map.insert(part.to_owned(), Value::String(file.clone()));
        }
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let mut bytes = serde_json::to_vec_pretty(&index).expect("plain data is JSON");
    bytes.push(b'\n');
    Some((index_path(output), bytes))
}

/// `model.bkpack` becomes `model-00001-of-00003.bkpack`.
fn shard_path(output: &Path, index: usize, count: usize) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = output.extension().map(|extension| format!(".{}", extension.to_string_lossy())).unwrap_or_default();
    output.with_file_name(format!("{stem}-{index:05}-of-{count:05}{extension}"))
}

/// What a part is to its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Values,
    Packed,
    Scale,
    ZeroPoint,
}

impl Role {
    /// Its key in the manifest.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Values => "values",
            Role::Packed => "packed",
            Role::Scale => "scale",
            Role::ZeroPoint => "zero_point",
        }
    }

    /// What the part's name adds to the tensor's.
    pub const fn suffix(self) -> &'static str {
        match self {
            Role::Values => "",
            Role::Packed => "_packed",
            Role::Scale => "_scale",
            Role::ZeroPoint => "_zero_point",
        }
    }
}

/// A part before it has a place.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub role: Role,
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
}

impl Stored {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * element_bytes(self.dtype)
    }
}

fn element_bytes(dtype: &str) -> usize {
    match dtype {
        "U8" => 1,
        "F16" | "BF16" => 2,
        _ => 4,
    }
}

/// The part of a travelling file.
pub(super) fn stored_file(part: &str, bytes: usize) -> Stored {
    Stored { role: Role::Values, name: part.to_owned(), dtype: "U8", shape: vec![bytes] }
}

/// The parts that a tensor of this encoding has: the format's one rule for names, types and shapes.
pub(super) fn stored_parts(tensor: &PlannedTensor) -> Vec<Stored> {
    let part =
        |role: Role, dtype, shape| Stored { role, name: format!("{}{}", tensor.name, role.suffix()), dtype, shape };
    let (rows, cols) = matrix_shape(&tensor.shape);
    match (tensor.encoding, tensor.encoding.layout()) {
        (Encoding::Float { dtype }, _) => vec![part(Role::Values, dtype.name(), tensor.shape.clone())],
        (_, Some((layout, scale))) => {
            let scale = FloatName::from(scale).name();
            let packed = match layout.grid.stream_bits() {
                Some(_) => part(Role::Packed, "U32", vec![rows, layout.code_bytes(cols) / 4]),
                None => part(Role::Packed, "U8", vec![rows, layout.code_bytes(cols)]),
            };
            let mut parts = vec![packed, part(Role::Scale, scale, vec![rows, layout.groups(cols)])];
            if layout.grid.has_zero_points() {
                parts.push(part(Role::ZeroPoint, "U32", vec![rows, layout.zero_bytes(cols) / 4]));
            }
            parts
        }
        (_, None) => unreachable!("every encoding but plain values has a layout"),
    }
}

pub(super) fn tensor_entry(tensor: &PlannedTensor, stored: &[Stored]) -> TensorEntry {
    let mut parts = Parts::default();
    for part in stored {
        let slot = match part.role {
            Role::Values => &mut parts.values,
            Role::Packed => &mut parts.packed,
            Role::Scale => &mut parts.scale,
            Role::ZeroPoint => &mut parts.zero_point,
        };
        *slot = Some(Part { name: part.name.clone(), blake3: ZERO_HASH.into() });
    }
    TensorEntry {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&dimension| dimension as u64).collect(),
        component: tensor.component.clone(),
        complex: tensor.complex.map(|half| serde_json::to_value(half).expect("a half is JSON")),
        encoding: serde_json::to_value(tensor.encoding).expect("an encoding is JSON"),
        reason: tensor.reason.clone(),
        parts: serde_json::to_value(parts).expect("parts are JSON"),
    }
}
