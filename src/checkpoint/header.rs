//! The header of a safetensors file, read by the format's own parser and checked for duplicate keys, which that
//! parser lets pass.

use std::{collections::HashMap, ops::Range, path::Path};

use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result, short},
    json,
};

/// A header whose rules have been checked: offsets without holes or overlaps, shapes that fit, no key twice.
#[derive(Debug)]
pub struct Header {
    /// Where the data section starts.
    pub data_start: usize,
    /// The free-form metadata.
    pub metadata: HashMap<String, String>,
    /// Every tensor, in the order of its bytes.
    pub tensors: Vec<HeaderTensor>,
}

/// One tensor of a header.
#[derive(Debug)]
pub struct HeaderTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

impl Header {
    /// Reads and checks the header of `file`, all of whose bytes are given.
    pub fn read(path: &Path, file: &[u8]) -> Result<Self> {
        check_unique_keys(path, file)?;
        let (length, metadata) = SafeTensors::read_metadata(file).map_err(|error| broken(path, file, error))?;
        let data_start = length + 8;
        let mut tensors: Vec<HeaderTensor> = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| HeaderTensor {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
            })
            .collect();
        // Empty tensors share an offset with their neighbour; the name makes their order certain.
        tensors.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
        Ok(Self { data_start, metadata: metadata.metadata().clone().unwrap_or_default(), tensors })
    }
}

/// Refuses a key named twice; every other fault is left to the format's own parser.
fn check_unique_keys(path: &Path, file: &[u8]) -> Result<()> {
    let Some((length, rest)) = file.split_first_chunk() else { return Ok(()) };
    let header = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| rest.get(..length));
    match header.map(|header| json::check_unique_keys(path, header)) {
        Some(Err(error @ Error::DuplicateKey { .. })) => Err(error),
        _ => Ok(()),
    }
}

/// The broken rule in a sentence of our own: the parser's messages name neither sizes nor what to do.
fn broken(path: &Path, file: &[u8], error: SafeTensorError) -> Error {
    let claimed = file.get(..8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
    let why = match error {
        SafeTensorError::HeaderTooSmall => format!("{} bytes, too short for a header", file.len()),
        SafeTensorError::HeaderTooLarge if file.get(8) != Some(&b'{') => {
            "it starts neither with a length nor with a header".into()
        }
        SafeTensorError::HeaderTooLarge => {
            format!("the header claims {} bytes, above the limit of 100,000,000", claimed.unwrap_or_default())
        }
        SafeTensorError::InvalidHeaderLength => format!(
            "the header claims {} bytes, but the file has {}: truncated, or not safetensors",
            claimed.unwrap_or_default(),
            file.len()
        ),
        SafeTensorError::InvalidHeader(_) => "the header is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(why) => format!("the header is not valid: {why}"),
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("the tensors do not end where the file ends ({} bytes): truncated, or trailing bytes", file.len())
        }
        SafeTensorError::InvalidOffset(tensor) => {
            format!("tensor {} overlaps another or leaves a hole before it", short(&tensor))
        }
        SafeTensorError::TensorInvalidInfo => format!("the shape and type of {} do not fit its bytes", misfit(file)),
        SafeTensorError::ValidationOverflow => format!("the shape or offsets of {} overflow", misfit(file)),
        other => other.to_string(),
    };
    Error::Safetensors { path: path.to_owned(), why }
}

/// The first tensor whose bytes are not as many as its shape and type ask for: the parser does not name it.
fn misfit(file: &[u8]) -> String {
    let length = file.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    let header = file.get(8..).and_then(|rest| rest.get(..length)).unwrap_or_default();
    let entries: Map<String, Value> = serde_json::from_slice(header).unwrap_or_default();
    let mut tensors = entries.iter().filter(|(name, _)| *name != "__metadata__");
    tensors
        .find(|(_, info)| fits(info) != Some(true))
        .map_or("a tensor".into(), |(name, _)| format!("tensor {}", short(name)))
}

/// Whether a tensor's bytes are as many as its shape and type ask for; `None` where a number overflows.
fn fits(info: &Value) -> Option<bool> {
    let dtype: Dtype = serde_json::from_value(info["dtype"].clone()).ok()?;
    let mut shape = info["shape"].as_array()?.iter();
    let elements = shape.try_fold(1u64, |product, dimension| product.checked_mul(dimension.as_u64()?))?;
    let offsets = &info["data_offsets"];
    let bytes = offsets[1].as_u64()?.checked_sub(offsets[0].as_u64()?)?;
    Some(elements.checked_mul(dtype.bitsize() as u64)? == bytes.checked_mul(8)?)
}
