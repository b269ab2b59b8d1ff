//! What a packed tensor can be: encodings, their parts, and their text form.

use std::{fmt, str::FromStr};

use bkpack_kernels::{FloatType, Grid, Layout};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How one tensor of a packed file is stored. The JSON form is part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Encoding {
    /// Plain values.
    Float { dtype: FloatName },
    /// 2 to 8 bits on an even grid, a scale (and, if not symmetric, a zero point) a group.
    Int { bits: u32, symmetric: bool, group_size: u64, scale: FloatName },
    /// {-1, 0, +1} times the group's scale.
    Ternary { group_size: u64, scale: FloatName },
    /// {-1, +1} times the group's scale.
    Binary { group_size: u64, scale: FloatName },
}

/// The safetensors name of a floating-point type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FloatName {
    F32,
    F16,
    BF16,
}

impl From<FloatName> for FloatType {
    fn from(name: FloatName) -> Self {
        match name {
            FloatName::F32 => FloatType::F32,
            FloatName::F16 => FloatType::F16,
            FloatName::BF16 => FloatType::BF16,
        }
    }
}

impl From<FloatType> for FloatName {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F32 => FloatName::F32,
            FloatType::F16 => FloatName::F16,
            FloatType::BF16 => FloatName::BF16,
        }
    }
}

impl FloatName {
    /// The name as safetensors writes it.
    pub const fn name(self) -> &'static str {
        match self {
            FloatName::F32 => "F32",
            FloatName::F16 => "F16",
            FloatName::BF16 => "BF16",
        }
    }

    /// The type of a safetensors file.
    pub(crate) const fn safetensors(self) -> safetensors::Dtype {
        match self {
            FloatName::F32 => safetensors::Dtype::F32,
            FloatName::F16 => safetensors::Dtype::F16,
            FloatName::BF16 => safetensors::Dtype::BF16,
        }
    }

    /// The name as config.json writes it (`torch_dtype`).
    pub const fn torch(self) -> &'static str {
        match self {
            FloatName::F32 => "float32",
            FloatName::F16 => "float16",
            FloatName::BF16 => "bfloat16",
        }
    }
}

impl Encoding {
    /// The layout of a quantized tensor's rows and the type of its scales; `None` for plain values.
    pub fn layout(&self) -> Option<(Layout, FloatType)> {
        let (grid, group_size, scale) = match *self {
            Encoding::Float { .. } => return None,
            Encoding::Int { bits, symmetric, group_size, scale } => (Grid::Int { bits, symmetric }, group_size, scale),
            Encoding::Ternary { group_size, scale } => (Grid::Ternary, group_size, scale),
            Encoding::Binary { group_size, scale } => (Grid::Binary, group_size, scale),
        };
        Some((Layout { grid, group: usize::try_from(group_size).unwrap_or(usize::MAX) }, scale.into()))
    }

    /// The encoding of a matrix with rows of this layout.
    pub fn quantized(layout: Layout, scale: FloatType) -> Self {
        let (group_size, scale) = (layout.group as u64, scale.into());
        match layout.grid {
            Grid::Int { bits, symmetric } => Encoding::Int { bits, symmetric, group_size, scale },
            Grid::Ternary => Encoding::Ternary { group_size, scale },
            Grid::Binary => Encoding::Binary { group_size, scale },
        }
    }

    /// Checks parameters against their ranges; the sentence names the rule.
    pub fn check(&self) -> Result<(), String> {
        if let Encoding::Int { bits, .. } = self
            && !(2..=8).contains(bits)
        {
            return Err(format!("{bits} bits; integers have 2 to 8"));
        }
        match *self {
            Encoding::Float { .. } => Ok(()),
            Encoding::Int { group_size, scale, .. }
            | Encoding::Ternary { group_size, scale }
            | Encoding::Binary { group_size, scale } => {
                if group_size == 0 || group_size > u32::MAX.into() {
                    Err(format!("group size {group_size} is not between 1 and 2^32 - 1"))
                } else if scale == FloatName::BF16 {
                    Err("scales are F16 or F32, not BF16".into())
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The bits of one value or code, 1.6 for ternary: without scales and zero points.
    pub fn code_bits(&self) -> f64 {
        match *self {
            Encoding::Float { dtype } => 8.0 * FloatType::from(dtype).bytes() as f64,
            Encoding::Int { bits, .. } => f64::from(bits),
            Encoding::Ternary { .. } => 1.6,
            Encoding::Binary { .. } => 1.0,
        }
    }

    /// The name without group and scale: `INT4`, `INT4 asym`, `ternary`, `FP16`.
    pub fn grid_name(&self) -> String {
        match self {
            Encoding::Float { dtype: FloatName::F32 } => "FP32".into(),
            Encoding::Float { dtype: FloatName::F16 } => "FP16".into(),
            Encoding::Float { dtype: FloatName::BF16 } => "BF16".into(),
            Encoding::Int { bits, symmetric, .. } => format!("INT{bits}{}", if *symmetric { "" } else { " asym" }),
            Encoding::Ternary { .. } => "ternary".into(),
            Encoding::Binary { .. } => "binary".into(),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(&match self.layout() {
            None => self.grid_name(),
            Some((layout, scale)) => {
                let wide = if scale == FloatType::F32 { " f32 scales" } else { "" };
                format!("{} g{}{wide}", self.grid_name(), layout.group)
            }
        })
    }
}

/// What a user asks for: an encoding before the tensor's shape and values are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Leave the tensor at its source precision.
    Keep,
    /// Convert to plain values of this type.
    Float(FloatType),
    /// Quantize.
    Quantize { grid: Grid, group: GroupSize },
}

/// How many columns share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupSize {
    Columns(u32),
    /// One scale a row ("per-row quantization").
    WholeRow,
}

impl GroupSize {
    /// Columns of a group in a row of `cols`.
    pub fn columns(self, cols: usize) -> usize {
        match self {
            GroupSize::Columns(columns) => columns as usize,
            GroupSize::WholeRow => cols.max(1),
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            GroupSize::Columns(columns) => write!(f, "{columns}"),
            GroupSize::WholeRow => f.write_str("row"),
        }
    }
}

impl FromStr for GroupSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "row" => Ok(GroupSize::WholeRow),
            "32" | "64" | "128" | "256" => Ok(GroupSize::Columns(text.parse().expect("a number"))),
            _ => Err(Error::EncodingText { text: text.into(), why: "a group is 32, 64, 128, 256 or row".into() }),
        }
    }
}

/// Columns that share a scale unless told otherwise.
pub const DEFAULT_GROUP: GroupSize = GroupSize::Columns(128);

impl FromStr for Request {
    type Err = Error;

    /// Parses `int4`, `int4:g64`, `int3:g128:asym`, `int8:row`, `ternary`, `binary:g64`, `fp16`, `bf16`, `fp32`, `keep`.
    fn from_str(text: &str) -> Result<Self> {
        let error = |why: &str| Error::EncodingText { text: text.into(), why: why.into() };
        let lower = text.to_ascii_lowercase();
        let mut fields = lower.split(':');
        let name = fields.next().unwrap_or_default();
        let mut group = DEFAULT_GROUP;
        let mut symmetric = true;
        let mut plain = true;
        for field in fields {
            plain = false;
            match field {
                "sym" => symmetric = true,
                "asym" => symmetric = false,
                "row" => group = GroupSize::WholeRow,
                _ => {
                    let size = field.strip_prefix('g').ok_or_else(|| error("unknown field after ':'"))?;
                    group = size.parse().map_err(|_| error("a group is g32, g64, g128, g256 or row"))?;
                }
            }
        }
        let float = match name {
            "fp32" | "f32" => Some(Request::Float(FloatType::F32)),
            "fp16" | "f16" => Some(Request::Float(FloatType::F16)),
            "bf16" => Some(Request::Float(FloatType::BF16)),
            "keep" => Some(Request::Keep),
            _ => None,
        };
        if let Some(request) = float {
            return if plain { Ok(request) } else { Err(error("plain values have no group")) };
        }
        let grid = match name {
            "ternary" => Grid::Ternary,
            "binary" => Grid::Binary,
            _ => {
                let bits =
                    name.strip_prefix("int").and_then(|bits| bits.parse().ok()).ok_or_else(|| error("unknown name"))?;
                if !(2..=8).contains(&bits) {
                    return Err(error("integers have 2 to 8 bits"));
                }
                Grid::Int { bits, symmetric }
            }
        };
        if !symmetric && !grid.has_zero_points() {
            return Err(error("only integers can be asymmetric"));
        }
        Ok(Request::Quantize { grid, group })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Request::Quantize { grid, group } = self else {
            return f.write_str(match self {
                Request::Float(FloatType::F32) => "fp32",
                Request::Float(FloatType::F16) => "fp16",
                Request::Float(FloatType::BF16) => "bf16",
                _ => "keep",
            });
        };
        match grid {
            Grid::Int { bits, .. } => write!(f, "int{bits}")?,
            Grid::Ternary => f.write_str("ternary")?,
            Grid::Binary => f.write_str("binary")?,
        }
        match group {
            GroupSize::Columns(columns) => write!(f, ":g{columns}")?,
            GroupSize::WholeRow => f.write_str(":row")?,
        }
        if grid.has_zero_points() { f.write_str(":asym") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        for text in
            ["int4:g128", "int3:g64:asym", "int8:row", "ternary:g32", "binary:row", "fp16", "bf16", "fp32", "keep"]
        {
            assert_eq!(text.parse::<Request>().unwrap().to_string(), text);
        }
        assert_eq!("INT5".parse::<Request>().unwrap().to_string(), "int5:g128");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "int",
            "int1",
            "int9",
            "int4:g0",
            "int4:g100",
            "fp16:g32",
            "ternary:asym",
            "int4:",
            "int-4",
            "keep:row",
        ] {
            assert!(text.parse::<Request>().is_err(), "{text}");
        }
    }

    #[test]
    fn json_form_is_tagged() {
        let encoding = Encoding::Int { bits: 4, symmetric: true, group_size: 128, scale: FloatName::F16 };
        let text = r#"{"kind":"int","bits":4,"symmetric":true,"group_size":128,"scale":"F16"}"#;
        assert_eq!(serde_json::to_string(&encoding).unwrap(), text);
        assert_eq!(serde_json::from_str::<Encoding>(text).unwrap(), encoding);
    }
}
