//! A bare safetensors file.

use std::path::Path;

use super::{Checkpoint, CheckpointKind, WeightFile, header::Header};
use crate::{error::Result, mmap::FileMap};

/// Opens one safetensors file without a config.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let file = open_weights(path)?;
    Checkpoint::new(path, CheckpointKind::Safetensors, None, vec![file])
}

/// Maps a safetensors file and checks its header.
pub(super) fn open_weights(path: &Path) -> Result<(WeightFile, Header)> {
    let map = FileMap::open(path)?;
    let header = Header::read(path, &map)?;
    Ok((WeightFile { path: path.to_owned(), map }, header))
}
