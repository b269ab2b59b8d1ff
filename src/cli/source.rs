//! The options of every subcommand that reads a checkpoint, and the opening of models.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result,
    checkpoint::{self, Checkpoint, OpenOptions, Rename},
    format::{self, Opened, PackedFile},
    tensor::TensorSource,
};
use clap::Args;

use super::{Common, progress::ProgressObserver};

/// What the files of a checkpoint do not say.
#[derive(Args, Debug, Default)]
pub struct SourceArgs {
    /// config.json for every checkpoint of the command that has none of its own; with a file of weights, the tokenizer
    /// is taken from the folder of FILE
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Give tensors of every checkpoint of the command other names, e.g. '^net\.(.*)=model.$1' (may be repeated, applied
    /// in order, each must match somewhere; where every name of a PyTorch file starts with 'module.', that is left out
    /// first)
    #[arg(long, value_name = "REGEX=REPLACEMENT")]
    rename: Vec<Rename>,
}

impl SourceArgs {
    /// The first option that is given.
    pub fn given(&self) -> Option<&'static str> {
        let config = self.config.is_some().then_some("--config");
        config.or((!self.rename.is_empty()).then_some("--rename"))
    }

    /// The config.json that is given.
    pub fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Opens the models of a command, packed files or checkpoints, and says what is to be known of them. With `verify`,
    /// every byte of the first is checked before it is used, if it is packed.
    ///
    /// # Errors
    /// As the formats; an option that applies to none of the models, a pattern that matches in none.
    pub fn open(&self, paths: &[&Path], verify: Option<&ProgressObserver>, common: &Common) -> Result<Vec<Opened>> {
        let checkpoints = self.checkpoints(paths)?;
        let mut matched = vec![false; self.rename.len()];
        let mut sources = Vec::with_capacity(paths.len());
        for (index, &path) in paths.iter().enumerate() {
            if !checkpoints.contains(&path) {
                let packed = PackedFile::open(path)?;
                if let (0, Some(observer)) = (index, verify) {
                    packed.check_contents(observer)?;
                }
                sources.push(Opened::Packed(Box::new(packed)));
                continue;
            }
            let (checkpoint, here) = checkpoint::open_sharing(path, &self.options(path))?;
            matched.iter_mut().zip(here).for_each(|(matched, here)| *matched |= here);
            sources.push(Opened::Checkpoint(Box::new(checkpoint)));
        }
        if let Some((rename, _)) = self.rename.iter().zip(matched).find(|(_, matched)| !matched) {
            return Err(rename.matches_nothing(&checkpoints));
        }
        sources.iter().flat_map(|source| source.notices()).for_each(|notice| common.notice(notice));
        Ok(sources)
    }

    /// Opens a checkpoint.
    ///
    /// # Errors
    /// As [`checkpoint::open_with`].
    pub fn open_checkpoint(&self, path: &Path, common: &Common) -> Result<Checkpoint> {
        self.checkpoints(&[path])?;
        let checkpoint = checkpoint::open_with(path, &self.options(path))?;
        checkpoint.notices().iter().for_each(|notice| common.notice(notice));
        Ok(checkpoint)
    }

    /// What applies to a checkpoint.
    fn options(&self, path: &Path) -> OpenOptions {
        let config = self.config.clone().filter(|_| !checkpoint::has_config(path));
        OpenOptions { config, rename: self.rename.clone() }
    }

    /// Those of the models that are checkpoints; each option must apply to one.
    fn checkpoints<'a>(&self, paths: &[&'a Path]) -> Result<Vec<&'a Path>> {
        let mut checkpoints = Vec::new();
        for &path in paths {
            if !format::is_packed(path)? {
                checkpoints.push(path);
            }
        }
        let wrong = |option, what: &str| {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            Error::Option { option, why: format!("applies to {what}, which {} is not", paths.join(" or ")) }
        };
        if self.config.is_some() && checkpoints.iter().all(|path| checkpoint::has_config(path)) {
            return Err(wrong("--config", "a checkpoint without a config.json of its own"));
        }
        if !self.rename.is_empty() && checkpoints.is_empty() {
            return Err(wrong("--rename", "a checkpoint"));
        }
        Ok(checkpoints)
    }
}
