//! The GGUF container, version 3: what stands before the tensors' data.
//!
//! Page: `docs/gguf.md` of ggml. All numbers are little-endian; a string is a u64 length and its bytes; the data of each
//! tensor starts on a multiple of [`ALIGNMENT`].

use super::blocks::BlockType;

/// The version of the container.
const VERSION: u32 = 3;

/// Tensors start on a multiple of this, counted from the start of the file; it is the default, so no key states it.
pub(super) const ALIGNMENT: usize = 32;

/// A value of a metadata key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i32>),
}

/// Numbers by which the container tells types of values.
const TYPE_U32: u32 = 4;
const TYPE_I32: u32 = 5;
const TYPE_F32: u32 = 6;
const TYPE_BOOL: u32 = 7;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

impl Value {
    /// Any count or size; what does not fit in 32 bits is none that a model has.
    pub(super) fn count(value: usize) -> Self {
        Value::U32(u32::try_from(value).unwrap_or(u32::MAX))
    }

    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, length: usize| {
            out.extend(TYPE_ARRAY.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((length as u64).to_le_bytes());
        };
        let scalar = |out: &mut Vec<u8>, kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Value::U32(value) => scalar(out, TYPE_U32, &value.to_le_bytes()),
            Value::F32(value) => scalar(out, TYPE_F32, &value.to_le_bytes()),
            Value::Bool(value) => scalar(out, TYPE_BOOL, &[u8::from(*value)]),
            Value::String(text) => {
                out.extend(TYPE_STRING.to_le_bytes());
                write_string(text, out);
            }
            Value::Strings(texts) => {
                array(out, TYPE_STRING, texts.len());
                texts.iter().for_each(|text| write_string(text, out));
            }
            Value::Floats(values) => {
                array(out, TYPE_F32, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Value::Integers(values) => {
                array(out, TYPE_I32, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
}

/// The metadata of a file, in the order in which it is written.
pub(super) type Metadata = Vec<(String, Value)>;

/// One tensor as the container lists it.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo<'a> {
    pub name: &'a str,
    /// Outermost dimension first, as everywhere here; the container lists them the other way round.
    pub shape: &'a [usize],
    pub kind: BlockType,
    pub bytes: u64,
}

/// The bytes before the first tensor's data, padded to where it starts.
pub(super) fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_string(key, &mut out);
        value.write(&mut out);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        write_string(tensor.name, &mut out);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&dimension| out.extend((dimension as u64).to_le_bytes()));
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += padded(tensor.bytes);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

/// The bytes that a tensor takes in the file.
pub(super) fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT as u64)
}

fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
