//! What a user can say about a checkpoint that its files do not: its config, and other names for its tensors.

use std::{path::PathBuf, str::FromStr};

use regex::Regex;

use crate::error::{Error, Result};

/// How to open a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The config.json of a bare file; the tokenizer and other files of the model are taken from its folder.
    pub config: Option<PathBuf>,
    /// Applied to every tensor's name, one after the other.
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
        let pattern = Regex::new(pattern)
            .map_err(|_| Error::Pattern { pattern: pattern.into(), why: "is not a regular expression".into() })?;
        Ok(Self { pattern, replacement: replacement.into() })
    }
}

impl Rename {
    /// Applies it to every name.
    ///
    /// # Errors
    /// It matches none of them: most likely a typing error.
    pub(super) fn apply<'a>(&self, names: impl Iterator<Item = &'a mut String>) -> Result<()> {
        let mut matches = false;
        for name in names.filter(|name| self.pattern.is_match(name)) {
            matches = true;
            *name = self.pattern.replace_all(name, &self.replacement).into_owned();
        }
        match matches {
            true => Ok(()),
            false => Err(Error::Pattern {
                pattern: self.pattern.to_string(),
                why: "matches no tensor of the checkpoint".into(),
            }),
        }
    }
}
