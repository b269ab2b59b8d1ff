//! Reading every byte of a packed file: hashes, and the rules that only the contents can break.

use bkpack_kernels::{FloatType, Grid, bits};

use super::{
    entry::{PackedPart, PackedTensor},
    read::PackedFile,
    write::hash,
};
use crate::{
    error::{Error, Result},
    progress::{Observer, Unit},
};

impl PackedFile {
    /// Checks the hash of every part, then that codes stay on their grid, padding is zero and scales are finite
    /// (and, those of activations, not negative).
    ///
    /// # Errors
    /// The first broken rule, in the file's order; the sentence names the tensor and the part.
    pub fn check_contents(&self, observer: &dyn Observer) -> Result<()> {
        let total = self.all_parts().map(|(_, part)| self.part_bytes(part).len() as u64).sum();
        observer.begin("Verifying", total, Unit::Bytes);
        for (tensor, part) in self.all_parts() {
            observer.check()?;
            let bytes = self.part_bytes(part);
            if hash(bytes) != part.hash {
                let path = self.part_path(part).to_owned();
                return Err(Error::PartHash { path, tensor: tensor.to_owned(), part: part.name.clone() });
            }
            observer.advance(bytes.len() as u64);
        }
        for tensor in self.tensors() {
            observer.check()?;
            self.check_codes(tensor)?;
        }
        self.check_activation_values()?;
        observer.end();
        Ok(())
    }

    fn check_codes(&self, tensor: &PackedTensor) -> Result<()> {
        let (Some((layout, scale_type)), [packed, scale, rest @ ..]) =
            (tensor.encoding.layout(), tensor.parts.as_slice())
        else {
            return Ok(());
        };
        let refuse = |part: &PackedPart, why| Error::Codes {
            path: self.part_path(part).to_owned(),
            tensor: tensor.name.clone(),
            part: part.name.clone(),
            why,
        };
        let cols = *tensor.shape.last().unwrap_or(&1);
        let codes = self.part_bytes(packed);
        if bits::invalid_code_row(&layout, cols, codes).is_some() {
            let above = layout.grid == Grid::Ternary && codes.iter().any(|&byte| byte > 242);
            return Err(refuse(
                packed,
                match layout.grid {
                    Grid::Ternary if above => "a byte is above 242",
                    Grid::Ternary => "the unused digits after a row's last code are not zero",
                    _ => "the unused bits after a row's last code are not zero",
                },
            ));
        }
        if let [zero_point] = rest
            && bits::invalid_zero_row(&layout, cols, self.part_bytes(zero_point)).is_some()
        {
            return Err(refuse(zero_point, "the unused bits after a row's last zero point are not zero"));
        }
        let scales = self.part_bytes(scale);
        let finite = match scale_type {
            FloatType::F32 => scales.as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite()),
            _ => scales.as_chunks().0.iter().all(|bytes| half::f16::from_le_bytes(*bytes).is_finite()),
        };
        if finite { Ok(()) } else { Err(refuse(scale, "a scale is NaN or infinite")) }
    }
}
