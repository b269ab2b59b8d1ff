//! A Hugging Face folder of dequantized weights.

use bkpack_kernels::FloatType;

use super::{
    Options, Target,
    folder::{Conversion, FolderExport, Job, config, config_file, exported_tensors},
};
use crate::{error::Result, format::PackedFile, progress::Observer};

/// Plans the folder. A complex tensor is whole again, as C64: there is no narrower type for it.
pub(super) fn prepare<'a>(
    packed: &'a PackedFile,
    options: &Options,
    observer: &dyn Observer,
) -> Result<FolderExport<'a>> {
    let dtype = options.dtype.unwrap_or(FloatType::F32);
    let conversion = |complex: bool| if complex { Conversion::Complex } else { Conversion::Plain(dtype) };
    let jobs = exported_tensors(packed).map(|tensor| Job { tensor, conversion: conversion(tensor.complex.is_some()) });
    let configs = config(packed, dtype).map(config_file);
    FolderExport::new(packed, Target::Safetensors, jobs.collect(), configs.into_iter().collect(), Vec::new(), observer)
}
