//! The options of every subcommand that reads a checkpoint, and the opening of models.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result,
    checkpoint::{OpenOptions, Rename},
    format::{self, PackedFile},
    tensor::TensorSource,
};
use clap::Args;

use super::{Common, progress::ProgressObserver};

/// What the files of a checkpoint do not say.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// config.json of a checkpoint that is one file; the tokenizer is taken from its folder
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Give tensors of a checkpoint other names, e.g. '^net\.(.*)=model.$1' (may be repeated, applied in order)
    #[arg(long, value_name = "REGEX=REPLACEMENT")]
    rename: Vec<Rename>,
}

impl SourceArgs {
    /// What applies to each of the models that a subcommand reads: both options to checkpoints that are one file; where
    /// there is none, `--rename` to folders.
    ///
    /// # Errors
    /// An option that would apply to none of them.
    pub fn options(&self, paths: &[&Path]) -> Result<Vec<OpenOptions>> {
        let mut options = vec![OpenOptions::default(); paths.len()];
        if self.config.is_none() && self.rename.is_empty() {
            return Ok(options);
        }
        let mut checkpoints = Vec::new();
        for (index, path) in paths.iter().enumerate() {
            if !format::is_packed(path)? {
                checkpoints.push((index, path.is_dir()));
            }
        }
        let wrong = |option, what: &str| {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            Error::Option { option, why: format!("applies to {what}, which {} is not", paths.join(" or ")) }
        };
        let bare: Vec<usize> = checkpoints.iter().filter(|(_, folder)| !folder).map(|(index, _)| *index).collect();
        if self.config.is_some() && bare.is_empty() {
            return Err(wrong("--config", "a checkpoint that is one file"));
        }
        let renamed =
            if bare.is_empty() { checkpoints.into_iter().map(|(index, _)| index).collect() } else { bare.clone() };
        if !self.rename.is_empty() && renamed.is_empty() {
            return Err(wrong("--rename", "a checkpoint"));
        }
        bare.iter().for_each(|&index| options[index].config = self.config.clone());
        renamed.iter().for_each(|&index| options[index].rename = self.rename.clone());
        Ok(options)
    }
}

/// Opens a packed file or a checkpoint, and says what is to be known of it.
pub fn open_source(path: &Path, options: &OpenOptions, common: &Common) -> Result<Box<dyn TensorSource>> {
    let source = format::open_any(path, options)?;
    source.notices().iter().for_each(|notice| common.notice(notice));
    Ok(source)
}

/// Opens a packed file or a checkpoint to run it; with `verify_hashes` every byte of a packed file is checked first.
pub fn open_model(
    path: &Path,
    options: &OpenOptions,
    verify_hashes: bool,
    common: &Common,
    observer: &ProgressObserver,
) -> Result<Box<dyn TensorSource>> {
    if verify_hashes && format::is_packed(path)? {
        let packed = PackedFile::open(path)?;
        packed.check_contents(observer)?;
        return Ok(Box::new(packed));
    }
    open_source(path, options, common)
}
