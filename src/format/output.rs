//! What an output must not take the place of.

use std::path::{Path, PathBuf};

use super::{PackedFile, index_path};
use crate::{
    error::{Error, Result},
    tensor::TensorSource,
};

/// In the checkpoint's own folder only a packed file may be replaced: every other name could be a file of the model.
///
/// # Errors
/// [`Error::Option`], as of `--output`.
pub fn refuse_file_of_checkpoint(source: &Path, output: &Path) -> Result<()> {
    let parent = |path: &Path| match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.canonicalize().ok(),
        _ => Path::new(".").canonicalize().ok(),
    };
    let home = if source.is_dir() { source.canonicalize().ok() } else { parent(source) };
    let beside = home.is_some() && parent(output) == home;
    let weights = source.is_dir() && output.extension().is_some_and(|extension| extension == "safetensors");
    if beside && (weights || output.exists() && !super::is_packed(output).unwrap_or(false)) {
        let why =
            format!("{} could be a file of the checkpoint itself; choose another name or folder", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    Ok(())
}

/// Refuses to write a file over the one that is read.
///
/// # Errors
/// [`Error::Option`], as of `--output`.
pub fn refuse_same_file(input: &Path, output: &Path) -> Result<()> {
    // The name of a sharded model stands for several files.
    if index_path(&plain_name(input)).exists()
        && let Ok(packed) = PackedFile::open(input)
    {
        refuse_file_of_packed(&packed, output)?;
    }
    let canonical = |path: &Path| path.canonicalize().ok();
    if canonical(output).is_some_and(|output| canonical(input) == Some(output)) {
        let why = format!("{} is the input itself", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    Ok(())
}

/// Refuses to write over a file of an open model, or over the name that finds its shards.
///
/// # Errors
/// [`Error::Option`], as of `--output`.
pub fn refuse_file_of_packed(packed: &PackedFile, output: &Path) -> Result<()> {
    // What does not exist is known by its folder.
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        path.canonicalize().ok().or_else(|| Some(folder.canonicalize().ok()?.join(path.file_name()?)))
    };
    let name = plain_name(packed.path());
    let index = index_path(&name);
    let mut own = packed.shards().map(|shard| shard.path).chain([name.as_path(), index.as_path()]);
    let wanted = place(output);
    if wanted.is_some() && own.any(|path| place(path) == wanted) {
        let why = format!("{} is the input itself", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    Ok(())
}

/// The name that a sharded model was written under, whether its index or itself is named.
fn plain_name(path: &Path) -> PathBuf {
    PathBuf::from(path.to_string_lossy().trim_end_matches(".index.json"))
}
