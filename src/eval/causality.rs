//! The causality probe: perplexity means nothing if a position sees the token that it is to predict.

use crate::{error::Result, model::Model, ops::Ops};

/// Tokens of the probe.
const LENGTH: usize = 48;

/// A change below this share of the largest logit is rounding, and too little to predict a token from.
const ROUNDING: f32 = 1e-4;

/// Whether the logits of a position depend on a later token: changes one token of the text, and compares the logits of
/// all positions before it.
///
/// A text of fewer than two tokens, or a vocabulary of one, shows nothing.
///
/// # Errors
/// As [`Model::forward`].
pub fn looks_ahead<O: Ops>(model: &Model<O>, ops: &O, tokens: &[u32]) -> Result<bool> {
    let tokens = &tokens[..tokens.len().min(LENGTH).min(model.max_positions())];
    let vocab_size = model.vocab_size();
    let last = tokens.len().saturating_sub(1);
    if last == 0 || vocab_size < 2 {
        return Ok(false);
    }
    let before = logits(model, ops, tokens)?;
    let largest = before.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
    for changed in [last, last.div_ceil(2), 1] {
        let mut other = tokens.to_vec();
        other[changed] = (other[changed] + vocab_size as u32 / 2) % vocab_size as u32;
        let after = logits(model, ops, &other)?;
        let mut earlier = before.iter().zip(&after).take(changed * vocab_size);
        if earlier.any(|(before, after)| (before - after).abs() > ROUNDING * largest) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The logits of all positions, `[tokens, vocab_size]`.
fn logits<O: Ops>(model: &Model<O>, ops: &O, tokens: &[u32]) -> Result<Vec<f32>> {
    let hidden = model.forward(tokens, &mut model.state(tokens.len())?)?;
    let mut values = Vec::new();
    ops.read(&model.logits(&hidden, 0, tokens.len())?, &mut values)?;
    Ok(values)
}
