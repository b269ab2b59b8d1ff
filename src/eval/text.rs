//! Text to token ids and back, with the model's own tokenizer.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    error::{Error, Result},
    json,
    model::{self, config::check_not_synthetic},
    tensor::TensorSource,
};

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// For errors.
    source_name: String,
}

impl Tokenizer {
    /// Loads tokenizer.json of a model.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none or it does not load.
    pub fn load(source: &dyn TensorSource) -> Result<Self> {
        let failed = |why| Error::Tokenizer { path: source.path().to_owned(), why };
        let Some(bytes) = source.file("tokenizer.json")? else {
            let why = "no tokenizer.json, so text cannot be tokenized; pass token ids instead (--tokens, --calib-tokens or \
                       --val-tokens)";
            return Err(failed(why.into()));
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| failed(format!("tokenizer.json does not load: {error}")))?;
        // Some are saved as they were used in training, which would cut or pad the text here.
        inner.with_truncation(None).map_err(|error| failed(format!("tokenizer.json: {error}")))?;
        inner.with_padding(None);
        Ok(Self { inner, source_name: source.path().display().to_string() })
    }

    /// Token ids of a text, without any special tokens added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenize(text, false)
    }

    /// Token ids of a prompt, with the special tokens that begin a text for this model.
    ///
    /// tokenizer_config.json decides (`add_bos_token`); where it is silent, tokenizer.json does.
    pub fn encode_prompt(&self, source: &dyn TensorSource, prompt: &str) -> Result<Vec<u32>> {
        let Some(wanted) = add_bos_token(source)? else { return self.tokenize(prompt, true) };
        let mut tokens = self.tokenize(prompt, false)?;
        if wanted {
            tokens.insert(0, required_bos(source)?);
        }
        Ok(tokens)
    }

    fn tokenize(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| self.error(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether both know the same tokens under the same ids.
    pub fn same_vocabulary(&self, other: &Self) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    fn error(&self, error: &dyn std::fmt::Display) -> Error {
        Error::Tokenizer { path: self.source_name.clone().into(), why: format!("tokenizer.json: {error}") }
    }
}

/// Turns tokens into text one by one: what it returns is always whole characters.
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Tokens before this are not needed to decode what follows.
    context: usize,
    /// Tokens before this have been returned as text.
    returned: usize,
}

impl<'a> Detokenizer<'a> {
    /// Continues after the tokens of a prompt, whose text is not returned.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let context = prompt.len().saturating_sub(8);
        Self { tokenizer, tokens: prompt[context..].to_vec(), context: 0, returned: prompt.len() - context }
    }

    /// The text that `token` completes; empty while a character is still incomplete.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        // A decoder may treat the first token of all in a special way, so both decode with context before them.
        let before = self.decode(&self.tokens[self.context..self.returned])?;
        let after = self.decode(&self.tokens[self.context..])?;
        if after.ends_with(char::REPLACEMENT_CHARACTER) || after.len() <= before.len() {
            return Ok(String::new());
        }
        self.context = self.returned;
        self.returned = self.tokens.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.inner.decode(tokens, true).map_err(|error| self.tokenizer.error(&error))
    }
}

/// Reads a text file; every line end (CR LF, CR) becomes LF, as Python reads text.
///
/// Line ends are tokens too: without this the same text would have another perplexity than PyTorch scripts find.
///
/// # Errors
/// [`Error::Io`], also where the file is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    Ok(if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text })
}

/// Reads token ids from a file that holds a JSON array of them.
///
/// # Errors
/// [`Error::Io`]; [`Error::Json`] if it holds something else.
pub fn read_tokens(path: &Path) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::Json { path: path.to_owned(), why: format!("not a JSON array of token ids: {error}") })
}

/// Reads whichever of the two was given: its path and token ids.
///
/// # Errors
/// As [`read_text`] and [`Tokenizer::encode`], or as [`read_tokens`]; [`Error::Synthetic`] where random weights are to
/// read a text.
///
/// # Panics
/// If neither was given, which a caller rules out.
pub fn read_either<'a>(
    source: &dyn TensorSource,
    text: &'a Option<PathBuf>,
    tokens: &'a Option<PathBuf>,
) -> Result<(&'a Path, Vec<u32>)> {
    match (text, tokens) {
        (Some(path), _) => Ok((path, tokenize(source, path)?)),
        (None, Some(path)) => Ok((path, read_tokens(path)?)),
        (None, None) => unreachable!("the caller gives one of the two"),
    }
}

/// Token ids of a text file, by the model's own tokenizer; a synthetic model, which has none, is refused as such.
fn tokenize(source: &dyn TensorSource, path: &Path) -> Result<Vec<u32>> {
    check_not_synthetic(source)?;
    Tokenizer::load(source)?.encode(&read_text(path)?)
}

/// The token that each window of an evaluation begins with; `None` unless tokenizer_config.json asks for one.
///
/// # Errors
/// [`Error::Config`] if it is asked for but config.json names none.
pub fn window_bos(source: &dyn TensorSource) -> Result<Option<u32>> {
    match add_bos_token(source)? {
        Some(true) => required_bos(source).map(Some),
        _ => Ok(None),
    }
}

fn required_bos(source: &dyn TensorSource) -> Result<u32> {
    model::config::bos_token(source)?.ok_or_else(|| Error::Config {
        path: source.path().to_owned(),
        field: "bos_token_id",
        why: "absent, but tokenizer_config.json sets add_bos_token".into(),
    })
}

/// `add_bos_token` of tokenizer_config.json.
fn add_bos_token(source: &dyn TensorSource) -> Result<Option<bool>> {
    let Some(bytes) = source.file("tokenizer_config.json")? else { return Ok(None) };
    let config: Value = json::parse(&source.path().join("tokenizer_config.json"), &bytes)?;
    Ok(config.get("add_bos_token").and_then(Value::as_bool))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_are_read_as_python_reads_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a\r\nb\rc\n\r\r\n").unwrap();
        assert_eq!(read_text(file.path()).unwrap(), "a\nb\nc\n\n\n");
        std::fs::write(file.path(), [0xff]).unwrap();
        assert!(matches!(read_text(file.path()), Err(Error::Io { .. })));
    }

    #[test]
    fn token_files_hold_an_array_of_ids() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[3, 0, 4294967295]").unwrap();
        assert_eq!(read_tokens(file.path()).unwrap(), [3, 0, u32::MAX]);
        for text in ["", "{}", "[-1]", "[1.5]", "[4294967296]", "[1] 2", "[\"1\"]"] {
            std::fs::write(file.path(), text).unwrap();
            assert!(matches!(read_tokens(file.path()), Err(Error::Json { .. })), "{text}");
        }
    }
}
