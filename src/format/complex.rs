//! Complex tensors: `X` is stored as the tensors `X.real` and `X.imag`, each with an encoding of its own.

use std::path::Path;

use bkpack_kernels::Cpu;

use super::{manifest::TensorEntry, read::PackedFile};
use crate::{
    error::{Error, Result},
    tensor::{ComplexPart, TensorSource},
};

impl PackedFile {
    /// The complex tensors, in natural order: the name of each pair without `.real` and `.imag`.
    pub fn complex_names(&self) -> impl Iterator<Item = &str> {
        self.names().iter().filter_map(|name| match self.complex_part(name)? {
            ComplexPart::Real => name.strip_suffix(ComplexPart::Real.suffix()),
            ComplexPart::Imaginary => None,
        })
    }

    /// The values of a complex tensor, row-major, each as its real and its imaginary part.
    ///
    /// # Errors
    /// No complex tensor of this name.
    pub fn complex_values(&self, cpu: Cpu, name: &str) -> Result<Vec<[f32; 2]>> {
        let half = |half: ComplexPart| {
            let name = format!("{name}{}", half.suffix());
            if self.complex_part(&name) != Some(half) {
                return Err(Error::MissingTensor { path: self.path().to_owned(), tensor: name });
            }
            let tensor = self.tensor(&name)?;
            let mut values = vec![0.0; tensor.elements()];
            cpu.dequantize(&tensor.matrix(), 0, &mut values);
            Ok(values)
        };
        let (real, imaginary) = (half(ComplexPart::Real)?, half(ComplexPart::Imaginary)?);
        Ok(real.into_iter().zip(imaginary).map(|(real, imaginary)| [real, imaginary]).collect())
    }

    /// Each half has its other half, in whichever shard, and no tensor has the name of a pair.
    pub(super) fn check_complex(&self) -> Result<()> {
        for tensor in self.tensors() {
            let Some(half) = tensor.complex else { continue };
            let path = || self.part_path(&tensor.parts[0]).to_owned();
            let base = tensor.name.strip_suffix(half.suffix()).expect("checked when the entry was read");
            let other = format!("{base}{}", half.other().suffix());
            let why = match self.entry(&other) {
                None => Some("is missing".to_owned()),
                Some(found) if found.complex != Some(half.other()) => {
                    Some("is not marked as the other half".to_owned())
                }
                Some(found) if found.shape != tensor.shape => {
                    Some(format!("has shape {:?} where this one has {:?}", found.shape, tensor.shape))
                }
                Some(_) => None,
            };
            if let Some(why) = why {
                return Err(Error::ComplexPair { path: path(), tensor: tensor.name.clone(), other, why });
            }
            if self.entry(base).is_some() {
                let half = tensor.name.clone();
                return Err(Error::ComplexClash { path: path(), tensor: base.to_owned(), half });
            }
        }
        Ok(())
    }
}

/// Which half a manifest's entry says it is, and whether its name agrees.
pub(super) fn read_half(path: &Path, entry: &TensorEntry) -> Result<Option<ComplexPart>> {
    let Some(found) = &entry.complex else { return Ok(None) };
    let (path, tensor) = (path.to_owned(), entry.name.clone());
    let Ok(half) = serde_json::from_value::<ComplexPart>(found.clone()) else {
        return Err(Error::ComplexField { path, tensor, found: found.to_string() });
    };
    if entry.name.ends_with(half.suffix()) {
        Ok(Some(half))
    } else {
        Err(Error::ComplexName { path, tensor, suffix: half.suffix() })
    }
}
