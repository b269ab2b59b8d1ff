//! The doing of a planned packing: tensors quantized and written, some of them on calibrated inputs first.

use std::{collections::HashSet, path::PathBuf};

use bkpack_kernels::Cpu;

use super::Packing;
use crate::{
    checkpoint::Checkpoint,
    encoding::Encoding,
    error::Result,
    format::{self, PackedWriter, PlannedTensor},
    progress::{Observer, Unit},
    quant::{
        self, Quantized,
        gptq::{self, Factor},
    },
    tensor::{Tensor, TensorSource},
};

impl<'a> Packing<'a> {
    /// Quantizes and writes. Nothing stands under the final names until all is written.
    ///
    /// # Errors
    /// A target that exists (unless `force`), a full disk, cancellation.
    pub fn write(self, cpu: Cpu, force: bool, observer: &dyn Observer) -> Result<Vec<PathBuf>> {
        self.begin(cpu, force)?.finish(observer)
    }

    /// Begins to write; the caller may have some tensors written before the others.
    ///
    /// # Errors
    /// A target that exists (unless `force`), a full disk.
    pub fn begin(mut self, cpu: Cpu, force: bool) -> Result<Writing<'a>> {
        let writer = PackedWriter::create(&self.output, std::mem::take(&mut self.files), force)?;
        Ok(Writing { packing: self, writer, cpu, written: HashSet::new() })
    }
}

/// A packing under way.
pub struct Writing<'a> {
    packing: Packing<'a>,
    writer: PackedWriter,
    cpu: Cpu,
    /// Names of the tensors whose parts are written.
    written: HashSet<String>,
}

impl<'a> Writing<'a> {
    /// The checkpoint that is packed.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.packing.checkpoint
    }

    /// Whether a tensor will be quantized and is not written yet.
    pub fn is_pending(&self, name: &str) -> bool {
        let quantized = |tensor: &&PlannedTensor| tensor.name == name && tensor.encoding.layout().is_some();
        !self.written.contains(name) && self.packing.tensors.iter().any(|tensor| quantized(&tensor))
    }

    /// Quantizes one tensor with error feedback, given what its inputs look like, and writes it; returns it.
    ///
    /// # Panics
    /// If the tensor [is not pending](Self::is_pending), or its inputs have another width.
    pub fn write_calibrated(&mut self, name: &str, factor: &Factor) -> Result<Tensor<'static>> {
        let found = self.packing.tensors.iter().position(|tensor| tensor.name == name);
        let planned = self.packing.tensors[found.expect("a pending tensor")].clone();
        let options = self.packing.quantize_options(planned.encoding).expect("a pending tensor is quantized");
        let tensor = self.packing.checkpoint.tensor(name)?;
        let mut quantized = Quantized::default();
        gptq::quantize(self.cpu, &tensor.matrix(), factor, &options, &mut quantized);
        self.write_quantized(&planned, &quantized)?;
        let data = quantized.into_data(&options);
        Ok(Tensor::new(planned.shape, data).expect("quantized to the planned layout"))
    }

    /// Writes what is left and gives the files their names.
    ///
    /// # Errors
    /// A full disk, cancellation.
    pub fn finish(mut self, observer: &dyn Observer) -> Result<Vec<PathBuf>> {
        let checkpoint = self.packing.checkpoint;
        observer.begin("Packing", checkpoint.tensor_bytes(), Unit::Bytes);
        // Hashing the source keeps the pool busy while this thread writes.
        let files = checkpoint.weight_files();
        let hash_source =
            || files.iter().map(|file| hash_in_pieces(file.bytes(), observer)).collect::<Result<Vec<_>>>();
        let (written, source) = rayon::join(|| self.write_rest(observer), hash_source);
        written?;
        let written = self.writer.finish(&source?)?;
        observer.end();
        Ok(written)
    }

    fn write_rest(&mut self, observer: &dyn Observer) -> Result<()> {
        let mut quantized = Quantized::default();
        for planned in self.packing.tensors.clone() {
            observer.check()?;
            let tensor = self.packing.checkpoint.tensor(&planned.name)?;
            let matrix = tensor.matrix();
            match (planned.encoding, self.packing.quantize_options(planned.encoding)) {
                _ if self.written.contains(&planned.name) => {}
                (encoding, Some(_)) => {
                    self.packing.options.quantize(self.cpu, &planned.name, &matrix, encoding, &mut quantized);
                    self.write_quantized(&planned, &quantized)?;
                }
                (Encoding::Float { dtype }, _) => {
                    let values = quant::convert_float(self.cpu, &matrix, dtype.into());
                    self.writer.write_part(&planned.name, &values)?;
                }
                (_, None) => unreachable!("every encoding but plain values has a layout"),
            }
            observer.advance(matrix.bytes() as u64);
        }
        for file in &self.packing.travelling {
            self.writer.write_part(&format!("{}{}", format::FILE_PREFIX, file.name), &file.bytes)?;
        }
        Ok(())
    }

    fn write_quantized(&mut self, planned: &PlannedTensor, quantized: &Quantized) -> Result<()> {
        self.writer.write_part(&format!("{}_packed", planned.name), &quantized.codes)?;
        self.writer.write_part(&format!("{}_scale", planned.name), &quantized.scales)?;
        if planned.encoding.layout().is_some_and(|(layout, _)| layout.grid.has_zero_points()) {
            self.writer.write_part(&format!("{}_zero_point", planned.name), &quantized.zeros)?;
        }
        self.written.insert(planned.name.clone());
        Ok(())
    }
}

/// BLAKE3 of a source file, asking between pieces whether to go on.
fn hash_in_pieces(bytes: &[u8], observer: &dyn Observer) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    for piece in bytes.chunks(64 << 20) {
        observer.check()?;
        hasher.update_rayon(piece);
    }
    Ok(hasher.finalize())
}
