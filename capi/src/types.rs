//! The types of the interface: the model behind its pointer, and the plain ones that callers see.

use std::{
    borrow::Cow,
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    sync::OnceLock,
};

use bkpack::{
    encoding::{self, FloatName},
    format::{PackedFile, PackedTensor},
    tensor::{Tensor, TensorSource, natural_order},
};
use bkpack_kernels::{Cpu, Grid};

use crate::failure::Failure;

/// What became of a call.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    /// An argument is NULL, out of range, too short, misaligned, or not UTF-8.
    Argument = 1,
    /// The model has no tensor or file of this name, or no config.json.
    NotFound = 2,
    /// The operating system refused: no such file, no permission, no more threads.
    System = 3,
    /// The file is not a packed model, or one whose bytes break a rule of the format.
    Model = 4,
    /// A mistake in bkpack. The model may still be used and must still be closed.
    Internal = 5,
}

/// How the weights of a tensor are stored.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Plain values.
    Float = 0,
    /// 2 to 8 bits on an even grid.
    Int = 1,
    /// {-1, 0, +1} times a scale, five to a byte.
    Ternary = 2,
    /// {-1, +1} times a scale.
    Binary = 3,
}

/// The type of stored numbers, little-endian.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
    U8 = 3,
    U32 = 4,
}

/// What a part is to its tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The values themselves; the only part of a tensor that is not quantized.
    Values = 0,
    /// The codes, row by row; each row fills whole 32-bit words (ternary: bytes), first column in the lowest bits.
    Packed = 1,
    /// A scale for each group of each row.
    Scale = 2,
    /// A zero point for each group of each row, as wide as a code; each row fills whole 32-bit words.
    ZeroPoint = 3,
}

/// The encoding of a tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    pub kind: Kind,
    /// Bits of a code: 2 to 8 for integers, 1 for binary; 0 for ternary (five codes to a byte) and plain values.
    pub bits: u32,
    /// 0 where each group has a zero point of its own, 1 elsewhere.
    pub symmetric: u32,
    /// The type of the scales, or of plain values.
    pub dtype: Dtype,
    /// Columns that share a scale, at least 1; the last group of a row may be shorter. 0 for plain values.
    pub group_size: u64,
}

/// One stored part of a tensor, in the file's memory map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub role: Role,
    pub dtype: Dtype,
    /// Its name in the file, which any safetensors reader lists.
    pub name: *const c_char,
    /// Its bytes, read-only, aligned to their dtype.
    pub data: *const c_void,
    /// The number of bytes.
    pub length: usize,
}

/// An open packed model.
pub struct Model {
    pub(crate) packed: PackedFile,
    pub(crate) cpu: Cpu,
    /// In natural order of their names.
    pub(crate) tensors: Vec<Names>,
    pub(crate) files: Vec<CString>,
    pub(crate) manifest: OnceLock<CString>,
    pub(crate) config: OnceLock<CString>,
}

/// The strings of one tensor, as C wants them.
pub(crate) struct Names {
    pub name: CString,
    pub encoding: CString,
    pub parts: Vec<CString>,
}

impl Model {
    /// Opens a packed file; headers are checked, weights are not read.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let packed = PackedFile::open(path)?;
        let cpu = Cpu::from_environment().map_err(bkpack::Error::from)?;
        let text = |name: &str| {
            CString::new(name).map_err(|_| Failure::NulInName { path: path.to_owned(), name: name.to_owned() })
        };
        let names = |name: &String| {
            let entry = packed.entry(name).expect("a name of the file");
            let parts = entry.parts.iter().map(|part| text(&part.name)).collect::<Result<_, _>>()?;
            Ok(Names { name: text(name)?, encoding: text(&entry.encoding.to_string())?, parts })
        };
        let tensors = packed.names().iter().map(names).collect::<Result<_, Failure>>()?;
        let files = packed.files().map(|(name, _)| text(name)).collect::<Result<_, _>>()?;
        Ok(Self { packed, cpu, tensors, files, manifest: OnceLock::new(), config: OnceLock::new() })
    }

    /// The index of the tensor of this name.
    pub(crate) fn find(&self, name: &str) -> Result<usize, Failure> {
        let missing = || Failure::NoSuchTensor { path: self.packed.path().to_owned(), name: name.to_owned() };
        let names = self.packed.names();
        names.binary_search_by(|found| natural_order(found, name)).map_err(|_| missing())
    }

    /// The name of a tensor.
    pub(crate) fn tensor_name(&self, tensor: usize) -> Result<&str, Failure> {
        let names = self.packed.names();
        let count = names.len();
        names.get(tensor).map(String::as_str).ok_or(Failure::Index { what: "tensor", index: tensor, count })
    }

    /// The strings of a tensor.
    pub(crate) fn names(&self, tensor: usize) -> Result<&Names, Failure> {
        self.tensor_name(tensor)?;
        Ok(&self.tensors[tensor])
    }

    /// A tensor, borrowed from the memory map.
    pub(crate) fn tensor(&self, tensor: usize) -> Result<Tensor<'_>, Failure> {
        Ok(self.packed.tensor(self.tensor_name(tensor)?)?)
    }

    /// What the manifest says of a tensor.
    pub(crate) fn entry(&self, tensor: usize) -> Result<&PackedTensor, Failure> {
        Ok(self.packed.entry(self.tensor_name(tensor)?).expect("a name of the file"))
    }

    /// One part of a tensor.
    pub(crate) fn part(&self, tensor: usize, part: usize) -> Result<Part, Failure> {
        let entry = self.entry(tensor)?;
        let stored = entry.parts.get(part);
        let stored = stored.ok_or(Failure::Index { what: "part", index: part, count: entry.parts.len() })?;
        let (role, dtype) = match (entry.encoding.layout(), part) {
            (None, _) => (Role::Values, Dtype::of_values(entry.encoding)),
            (Some((layout, _)), 0) => match layout.grid {
                Grid::Ternary => (Role::Packed, Dtype::U8),
                Grid::Int { .. } | Grid::Binary => (Role::Packed, Dtype::U32),
            },
            (Some(_), 1) => (Role::Scale, Dtype::of_values(entry.encoding)),
            (Some(_), _) => (Role::ZeroPoint, Dtype::U32),
        };
        let bytes = self.packed.part_bytes(stored);
        let name = self.tensors[tensor].parts[part].as_ptr();
        Ok(Part { role, dtype, name, data: bytes.as_ptr().cast(), length: bytes.len() })
    }

    /// The name and bytes of a travelling file.
    pub(crate) fn file(&self, file: usize) -> Result<(&CString, &[u8]), Failure> {
        let count = self.files.len();
        let name = self.files.get(file).ok_or(Failure::Index { what: "file", index: file, count })?;
        match self.packed.file(&name.to_string_lossy())? {
            Some(Cow::Borrowed(bytes)) => Ok((name, bytes)),
            _ => unreachable!("a packed file lends the files that it names"),
        }
    }

    /// What the file says of itself, as JSON.
    pub(crate) fn manifest(&self) -> &CStr {
        self.manifest.get_or_init(|| {
            let mut manifest = serde_json::to_value(self.packed.manifest()).expect("a manifest is JSON");
            // An open file keeps these two elsewhere.
            let fields = manifest.as_object_mut().expect("a manifest is an object");
            fields.remove("tensors");
            fields.remove("files");
            json(&manifest)
        })
    }

    /// config.json.
    pub(crate) fn config(&self) -> Result<&CStr, Failure> {
        let config = self.packed.config().ok_or_else(|| Failure::NoConfig(self.packed.path().to_owned()))?;
        Ok(self.config.get_or_init(|| json(config)))
    }
}

fn json(value: &serde_json::Value) -> CString {
    CString::new(value.to_string()).expect("JSON escapes NUL")
}

impl Dtype {
    /// The type of a tensor's plain values, or of its scales.
    fn of_values(encoding: encoding::Encoding) -> Self {
        let (encoding::Encoding::Float { dtype: name }
        | encoding::Encoding::Int { scale: name, .. }
        | encoding::Encoding::Ternary { scale: name, .. }
        | encoding::Encoding::Binary { scale: name, .. }) = encoding;
        match name {
            FloatName::F32 => Dtype::F32,
            FloatName::F16 => Dtype::F16,
            FloatName::BF16 => Dtype::BF16,
        }
    }
}

impl From<encoding::Encoding> for Encoding {
    fn from(encoding: encoding::Encoding) -> Self {
        let dtype = Dtype::of_values(encoding);
        let (kind, bits, symmetric, group_size) = match encoding {
            encoding::Encoding::Float { .. } => (Kind::Float, 0, true, 0),
            encoding::Encoding::Int { bits, symmetric, group_size, .. } => (Kind::Int, bits, symmetric, group_size),
            encoding::Encoding::Ternary { group_size, .. } => (Kind::Ternary, 0, true, group_size),
            encoding::Encoding::Binary { group_size, .. } => (Kind::Binary, 1, true, group_size),
        };
        Self { kind, bits, symmetric: symmetric.into(), dtype, group_size }
    }
}
