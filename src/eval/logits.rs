//! Logits of a sequence, written to a safetensors file slice by slice.

use std::{
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::json;

use super::perplexity::{BATCH, slice_rows};
use crate::{
    error::{Error, Result},
    format::{check_output, persist, temporary_beside},
    model::{Model, check_tokens},
    ops::Ops,
    progress::{Observer, Unit},
};

/// Runs `tokens` as one sequence and writes `logits`, F32 `[tokens, vocab_size]`, to a safetensors file.
///
/// # Errors
/// [`Error::Exists`] unless `force`; [`Error::Tokens`] for no tokens, more than the model's context, or ids outside of
/// the vocabulary; [`Error::Cancelled`]; [`Error::Io`]. Nothing is left under the file's name then.
pub fn write_logits<O: Ops>(
    model: &Model<O>,
    ops: &O,
    tokens: &[u32],
    output: &Path,
    force: bool,
    observer: &dyn Observer,
) -> Result<()> {
    check_output(output, force)?;
    let (vocab_size, longest) = (model.vocab_size(), model.max_positions());
    if tokens.is_empty() || tokens.len() > longest {
        let why = format!("{} tokens are not from 1 to {longest}, the model's context", tokens.len());
        return Err(Error::Tokens { source_name: "the sequence".into(), why });
    }
    check_tokens("the sequence", tokens, vocab_size)?;

    let mut temporary = temporary_beside(output)?;
    let mut file = BufWriter::new(temporary.as_file_mut());
    file.write_all(&header(tokens.len(), vocab_size)).map_err(Error::io(output))?;
    let mut state = model.state(tokens.len())?;
    let mut values = Vec::new();
    let rows = slice_rows(vocab_size, 1);
    observer.begin("Computing", tokens.len() as u64, Unit::Tokens);
    for batch in tokens.chunks(if model.runs_whole() { tokens.len() } else { BATCH }) {
        let hidden = model.forward(batch, &mut state)?;
        for first in (0..batch.len()).step_by(rows) {
            observer.check()?;
            let count = rows.min(batch.len() - first);
            ops.read(&model.logits(&hidden, first, count)?, &mut values)?;
            values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes())).map_err(Error::io(output))?;
            observer.advance(count as u64);
        }
    }
    observer.end();
    file.flush().map_err(Error::io(output))?;
    drop(file);
    persist(temporary, output, force)
}

/// The length-prefixed header of a safetensors file with the one tensor, padded so that values are aligned.
fn header(tokens: usize, vocab_size: usize) -> Vec<u8> {
    let bytes = tokens as u64 * vocab_size as u64 * size_of::<f32>() as u64;
    let tensor = json!({"dtype": "F32", "shape": [tokens, vocab_size], "data_offsets": [0, bytes]});
    let mut text = json!({"logits": tensor}).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
