//! A model of either kind: packed, or a checkpoint.

use std::{ops::Deref, path::Path};

use super::{PackedFile, is_packed};
use crate::{
    checkpoint::{self, Checkpoint},
    error::Result,
    tensor::TensorSource,
};

/// A model that was opened as what it is.
pub enum Opened {
    Packed(Box<PackedFile>),
    Checkpoint(Box<Checkpoint>),
}

impl Opened {
    /// Opens a packed file, or a checkpoint with no options.
    ///
    /// # Errors
    /// As [`PackedFile::open`] and [`checkpoint::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(match is_packed(path)? {
            true => Self::Packed(Box::new(PackedFile::open(path)?)),
            false => Self::Checkpoint(Box::new(checkpoint::open(path)?)),
        })
    }

    /// The packed file; `None` for a checkpoint.
    pub fn packed(&self) -> Option<&PackedFile> {
        match self {
            Self::Packed(packed) => Some(packed),
            Self::Checkpoint(_) => None,
        }
    }
}

impl Deref for Opened {
    type Target = dyn TensorSource;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Packed(packed) => &**packed,
            Self::Checkpoint(checkpoint) => &**checkpoint,
        }
    }
}
