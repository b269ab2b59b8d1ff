//! The packed format, version 1; `spec/bkpack-v1.md` is its description.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{self, header::Header},
    error::Result,
    mmap::FileMap,
};

mod activations;
pub mod amend;
pub mod archive;
mod check;
mod complex;
mod entry;
mod layout;
mod manifest;
mod opened;
mod output;
mod read;
mod write;

pub use entry::{PackedPart, PackedTensor};
pub use layout::{FilePlan, PlannedFile, PlannedTensor, Role, plan};
pub use manifest::{Manifest, Part, ShardInfo, Source, SourceFile};
pub use opened::Opened;
pub use output::{refuse_file_of_checkpoint, refuse_file_of_packed, refuse_same_file};
pub use read::{PackedFile, ShardView};
pub(crate) use write::without_temporary_name;
pub use write::{PackedWriter, check_output, persist, planned_bytes, temporary_beside, write_file};

/// The format version that this code writes and reads.
pub const VERSION: u64 = 1;

/// The data section starts on a multiple of this, so that a memory map of it is page-aligned.
const PAGE: usize = 4096;

/// Travelling files are tensors whose names start with this.
pub(crate) const FILE_PREFIX: &str = "bkpack.file/";

/// The metadata key of the manifest.
const MANIFEST_KEY: &str = "bkpack";

/// The metadata key of the seal: the BLAKE3 of the whole header with the seal itself set to zeros.
const SEAL_KEY: &str = "bkpack_seal";

/// The metadata key of an archive.
const ARCHIVE_KEY: &str = "bkpack_archive";

/// The seal and every hash before it is known: as long as the real one, so sizes are exact beforehand.
const ZERO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Whether a path is a packed model, told by its header's metadata, not by its name.
pub fn is_packed(path: &Path) -> Result<bool> {
    if path.to_string_lossy().ends_with(".index.json") || (!path.exists() && index_path(path).exists()) {
        return Ok(true);
    }
    if path.is_dir() {
        return Ok(false);
    }
    let file = FileMap::open(path)?;
    if !checkpoint::may_be_safetensors(&file) {
        return Ok(false);
    }
    let metadata = Header::read(path, &file)?.metadata;
    Ok(metadata.contains_key(MANIFEST_KEY) || metadata.contains_key(ARCHIVE_KEY))
}

/// The name of the index beside the shards of a sharded model.
fn index_path(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".index.json");
    name.into()
}
