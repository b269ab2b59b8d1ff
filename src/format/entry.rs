//! Tensors of a packed file: what the manifest says of each, checked against its parts.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde_json::Value;

use super::{
    complex::read_half,
    layout::{PlannedTensor, Role, stored_parts},
    manifest::{Part, Parts, TensorEntry},
};
use crate::{
    encoding::Encoding,
    error::{Error, Result},
    tensor::{ComplexPart, checked_elements},
};

/// One logical tensor of a packed model.
#[derive(Clone, Debug)]
pub struct PackedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub component: String,
    /// Which half of a complex tensor it is.
    pub complex: Option<ComplexPart>,
    pub encoding: Encoding,
    /// Why it has this encoding, as the producer records it.
    pub reason: Option<Value>,
    /// The values, or codes, scales and (where there are any) zero points.
    pub parts: Vec<PackedPart>,
}

impl PackedTensor {
    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Stored bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(PackedPart::bytes).sum()
    }
}

/// A stored tensor and the hash that its bytes must have.
#[derive(Clone, Debug)]
pub struct PackedPart {
    pub name: String,
    pub hash: blake3::Hash,
    /// What it is to its tensor; a travelling file has values.
    pub role: Role,
    /// F32, F16, BF16, U32 or U8.
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Which of [`PackedFile::shards`](super::PackedFile::shards) it lies in.
    pub shard: usize,
    /// Its bytes, counted from the start of that file.
    pub range: Range<usize>,
}

impl PackedPart {
    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }
}

/// Checks one entry of the manifest against its parts.
pub(super) fn read_tensor(
    path: &Path,
    entry: &TensorEntry,
    take: &mut impl FnMut(&str, &Part, Role) -> Result<PackedPart>,
) -> Result<PackedTensor> {
    let (path, tensor) = (|| path.to_owned(), || entry.name.clone());
    let bad_shape = |why| Error::Shape { path: path(), tensor: tensor(), shape: entry.shape.clone(), why };
    let shape: Vec<usize> = entry
        .shape
        .iter()
        .map(|&dimension| usize::try_from(dimension).map_err(|_| bad_shape("too large for this machine")))
        .collect::<Result<_>>()?;
    // Eight bytes a weight is more than any encoding takes, so nothing below can overflow.
    let elements = checked_elements(&shape).filter(|elements| elements.checked_mul(8).is_some());
    match elements {
        None => return Err(bad_shape("too large for this machine")),
        Some(0) => return Err(bad_shape("holds no element")),
        Some(_) => {}
    }
    let encoding = read_encoding(&path, entry)?;
    let complex = read_half(&path(), entry)?;
    let (name, component, reason) = (entry.name.clone(), entry.component.clone(), entry.reason.clone());
    let planned = PlannedTensor { name, shape, component, complex, encoding, reason };
    let expected = stored_parts(&planned);
    let named = read_parts(&path, entry)?;
    let slots = [
        (Role::Values, named.values),
        (Role::Packed, named.packed),
        (Role::Scale, named.scale),
        (Role::ZeroPoint, named.zero_point),
    ];
    let mut parts = Vec::new();
    for (role, slot) in slots {
        let wanted = expected.iter().find(|part| part.role == role);
        let (wanted, named) = match (wanted, slot) {
            (None, None) => continue,
            (Some(wanted), Some(named)) => (wanted, named),
            (wanted, _) => {
                let verb = if wanted.is_some() { "lacks" } else { "has, against its encoding," };
                return Err(Error::Parts {
                    path: path(),
                    tensor: tensor(),
                    why: format!("{verb} a part of role {role:?}"),
                });
            }
        };
        if named.name != wanted.name {
            let (found, expected) = (named.name.clone(), wanted.name.clone());
            return Err(Error::PartName { path: path(), tensor: tensor(), found, expected });
        }
        let part = take(&entry.name, &named, role)?;
        if part.dtype.to_string() != wanted.dtype {
            let (part, found) = (part.name, part.dtype.to_string());
            return Err(Error::PartDtype { path: path(), tensor: tensor(), part, found, expected: wanted.dtype });
        }
        if part.shape != wanted.shape {
            let (part, found, expected) = (part.name, part.shape, wanted.shape.clone());
            return Err(Error::PartShape { path: path(), tensor: tensor(), part, found, expected });
        }
        parts.push(part);
    }
    let PlannedTensor { name, shape, component, reason, .. } = planned;
    Ok(PackedTensor { name, shape, component, complex, encoding, reason, parts })
}

fn read_encoding(path: &impl Fn() -> PathBuf, entry: &TensorEntry) -> Result<Encoding> {
    let tensor = || entry.name.clone();
    let manifest = |why| Error::Manifest { path: path(), why: format!("tensor {}: encoding: {why}", entry.name) };
    let kind = entry.encoding.get("kind").and_then(Value::as_str);
    let kind = kind.ok_or_else(|| manifest("has no kind".to_owned()))?;
    if !["float", "int", "ternary", "binary"].contains(&kind) {
        return Err(Error::UnknownEncoding { path: path(), tensor: tensor(), kind: kind.to_owned() });
    }
    let range = |why| Error::EncodingRange { path: path(), tensor: tensor(), why };
    let parsed = serde_json::from_value::<Encoding>(entry.encoding.clone());
    let encoding = parsed.map_err(|error| match error.to_string() {
        why if why.starts_with("unknown field") => unknown_field(path, entry, format!("encoding: {why}")),
        why if why.starts_with("unknown variant") || why.starts_with("invalid value") => range(why),
        why => manifest(why),
    })?;
    encoding.check().map_err(range)?;
    Ok(encoding)
}

fn read_parts(path: &impl Fn() -> PathBuf, entry: &TensorEntry) -> Result<Parts> {
    // Roles are the fields of `Parts`, so an unknown role and an unknown field of a part read alike: ask for roles first.
    const ROLES: [&str; 4] = ["values", "packed", "scale", "zero_point"];
    let roles = entry.parts.as_object().into_iter().flat_map(|roles| roles.keys());
    if let Some(role) = roles.clone().find(|role| entry.parts[role.as_str()].is_null()) {
        let why = format!("role {role:?} is null");
        return Err(Error::Parts { path: path(), tensor: entry.name.clone(), why });
    }
    if let Some(role) = roles.clone().find(|role| !ROLES.contains(&role.as_str())) {
        let why = format!("role {role:?} is not known to this version");
        return Err(Error::Parts { path: path(), tensor: entry.name.clone(), why });
    }
    serde_json::from_value(entry.parts.clone()).map_err(|error| match error.to_string() {
        why if why.starts_with("unknown field") => unknown_field(path, entry, format!("parts: {why}")),
        why => Error::Manifest { path: path(), why: format!("tensor {}: parts: {why}", entry.name) },
    })
}

fn unknown_field(path: &impl Fn() -> PathBuf, entry: &TensorEntry, why: String) -> Error {
    Error::UnknownField { path: path(), tensor: entry.name.clone(), why }
}
