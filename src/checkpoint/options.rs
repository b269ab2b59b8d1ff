//! What a user can say about a checkpoint that its files do not: its config, and other names for its tensors.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use regex::Regex;

use crate::error::{Error, Result, short};

/// How to open a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The config.json of a checkpoint that has none. The tokenizer and other files of the model are taken from its
    /// folder, or from the checkpoint's own where that is a folder.
    pub config: Option<PathBuf>,
    /// Applied to every tensor's name, one after the other. Names come without the `module.` of PyTorch's wrappers.
    pub rename: Vec<Rename>,
}

/// Another name for the tensors whose name matches: written `REGEX=REPLACEMENT`, with `$1` or `${name}` for a group.
#[derive(Clone, Debug)]
pub struct Rename {
    pattern: Regex,
    replacement: String,
}

impl FromStr for Rename {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pattern, replacement) = text.rsplit_once('=').ok_or_else(|| Error::Option {
            option: "--rename",
            why: format!("{text:?} is not of the form 'REGEX=REPLACEMENT'"),
        })?;
        let regex = Regex::new(pattern).map_err(|error| Error::pattern(pattern, &error))?;
        Ok(Self { pattern: regex, replacement: replacement.into() })
    }
}

impl Rename {
    /// Applies it to every name; whether it matches one.
    pub(super) fn apply<'a>(&self, names: impl Iterator<Item = &'a mut String>) -> bool {
        let mut matches = false;
        for name in names.filter(|name| self.pattern.is_match(name)) {
            matches = true;
            *name = self.pattern.replace_all(name, &self.replacement).into_owned();
        }
        matches
    }

    /// The refusal of a pattern that matches nothing in any of the checkpoints: most likely a typing error.
    pub fn matches_nothing(&self, checkpoints: &[&Path]) -> Error {
        let checkpoints: Vec<_> = checkpoints.iter().map(|path| path.display().to_string()).collect();
        let pattern = short(self.pattern.as_str());
        let why = format!("pattern {pattern:?} matches no tensor of {}", checkpoints.join(" or "));
        Error::Option { option: "--rename", why }
    }
}
