//! Files that a policy is read from: their hash for the manifest, and errors that name the line.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Where a policy was read from.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    path: PathBuf,
    blake3: blake3::Hash,
    text: String,
}

impl PolicyFile {
    /// Reads a text file.
    ///
    /// # Errors
    /// A file that cannot be read or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Self::new(path, bytes)
    }

    /// A text that is, or would be, a file of this name.
    ///
    /// # Errors
    /// Bytes that are not UTF-8.
    pub fn new(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        let blake3 = blake3::hash(&bytes);
        let text = String::from_utf8(bytes).map_err(|_| Error::PolicyFile {
            path: path.to_owned(),
            line: None,
            why: "is not text in UTF-8".into(),
        })?;
        Ok(Self { path: path.to_owned(), blake3, text })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Parses it as TOML.
    pub(super) fn toml<T: DeserializeOwned>(&self) -> Result<T> {
        toml::from_str(&self.text).map_err(|error| {
            let why = error.message().trim_end().replace('\n', ", ");
            match error.span() {
                Some(span) => self.error_at(span, why),
                None => self.error(why),
            }
        })
    }

    /// Parses it as JSON.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        crate::json::parse(&self.path, self.text.as_bytes())
    }

    /// An error about the whole file.
    pub(super) fn error(&self, why: impl Into<String>) -> Error {
        Error::PolicyFile { path: self.path.clone(), line: None, why: why.into() }
    }

    /// An error about the line in which these bytes begin.
    pub(super) fn error_at(&self, span: Range<usize>, why: impl Into<String>) -> Error {
        Error::PolicyFile { path: self.path.clone(), line: Some(self.line(span.start)), why: why.into() }
    }

    /// The line, counted from 1, that the byte at this offset stands in.
    pub(super) fn line(&self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        before.iter().filter(|&&byte| byte == b'\n').count() + 1
    }

    /// Its name and hash, for the manifest.
    pub(super) fn record(&self) -> Value {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        json!({ "name": name, "blake3": self.blake3.to_hex().as_str() })
    }
}
