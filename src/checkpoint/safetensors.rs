//! Safetensors files: every tensor in place, row-major and little-endian.

use std::path::Path;

use ::safetensors::Dtype;

use super::{
    Contents,
    dtype::{Element, Float8},
    header::Header,
    stored::{Place, StoredTensor},
};
use crate::error::{Error, Result};

/// Reads and checks the header.
///
/// # Errors
/// A header that breaks a rule of the format, a tensor that is no float.
pub(super) fn contents(path: &Path, file: &[u8]) -> Result<Contents> {
    let header = Header::read(path, file)?;
    let tensors = header.tensors.into_iter().map(|tensor| {
        let (element, complex) = match tensor.dtype {
            Dtype::F64 => (Element::F64, false),
            Dtype::F32 => (Element::F32, false),
            Dtype::F16 => (Element::F16, false),
            Dtype::BF16 => (Element::BF16, false),
            Dtype::F8_E4M3 => (Element::Small(Float8::E4M3), false),
            Dtype::F8_E5M2 => (Element::Small(Float8::E5M2), false),
            Dtype::F8_E4M3FNUZ => (Element::Small(Float8::E4M3Fnuz), false),
            Dtype::F8_E5M2FNUZ => (Element::Small(Float8::E5M2Fnuz), false),
            Dtype::F8_E8M0 => (Element::Small(Float8::E8M0), false),
            Dtype::C64 => (Element::F32, true),
            other => {
                let (path, dtype) = (path.to_owned(), other.to_string());
                return Err(Error::UnsupportedDtype { path, tensor: tensor.name, dtype });
            }
        };
        let place = Place::Mapped(tensor.range);
        let (name, shape) = (tensor.name, tensor.shape);
        Ok(StoredTensor { name, shape, element, complex, big_endian: false, place, start: 0, strides: None })
    });
    Ok(Contents { tensors: tensors.collect::<Result<_>>()?, notices: Vec::new() })
}
