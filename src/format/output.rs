//! What an output must not take the place of.

use std::path::Path;

use crate::error::{Error, Result};

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
    let canonical = |path: &Path| path.canonicalize().ok();
    if canonical(output).is_some_and(|output| canonical(input) == Some(output)) {
        let why = format!("{} is the input itself", output.display());
        return Err(Error::Option { option: "--output", why });
    }
    Ok(())
}
