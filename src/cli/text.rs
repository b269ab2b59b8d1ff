//! The text that a subcommand looks at, or token ids in place of it.

use std::path::{Path, PathBuf};

use bkpack::{
    Result,
    eval::text::{Tokenizer, read_text, read_tokens},
    model::config::check_not_synthetic,
    tensor::TensorSource,
};

/// Reads whichever of the two was given: its path and token ids.
///
/// # Panics
/// If neither was given, which the options rule out.
pub fn read_either<'a>(
    source: &dyn TensorSource,
    text: &'a Option<PathBuf>,
    tokens: &'a Option<PathBuf>,
) -> Result<(&'a Path, Vec<u32>)> {
    match (text, tokens) {
        (Some(path), _) => Ok((path, tokenize(source, path)?)),
        (None, Some(path)) => Ok((path, read_tokens(path)?)),
        (None, None) => unreachable!("the options require one of the two"),
    }
}

/// Token ids of a text file, by the model's own tokenizer; a synthetic model, which has none, is refused as such.
fn tokenize(source: &dyn TensorSource, path: &Path) -> Result<Vec<u32>> {
    check_not_synthetic(source)?;
    Tokenizer::load(source)?.encode(&read_text(path)?)
}
