//! Continuing a prompt, token by token.

use std::time::{Duration, Instant};

use super::{
    perplexity::BATCH,
    text::{Detokenizer, Tokenizer},
};
use crate::{
    error::{Error, Result},
    model::{Model, sample::Sampler},
    ops::Ops,
    progress::Observer,
};

/// How many tokens a generation took, and how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generated {
    pub prompt_tokens: usize,
    /// Tokens drawn, one that ended the text included.
    pub tokens: usize,
    /// From the start to the first token's logits.
    pub prefill: Duration,
    /// From the first token's logits to the end.
    pub decode: Duration,
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Tokens to draw at most; the model's context is a limit too.
    pub max_tokens: usize,
    /// Tokens that end the text.
    pub eos: &'a [u32],
}

/// Continues `prompt` until a limit, an end token or the observer stops it, handing each piece of text to `emit` as soon
/// as its characters are complete.
///
/// # Errors
/// [`Error::Tokens`] for an empty prompt, one that fills the model's context, or ids outside of the vocabulary; what
/// `emit` returns; [`Error::NotSequential`].
pub fn generate<O: Ops>(
    (model, ops): (&Model<O>, &O),
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: Limits,
    observer: &dyn Observer,
    mut emit: impl FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    model.check_sequential()?;
    let refused = |why| Err(Error::Tokens { source_name: "the prompt".into(), why });
    let room = model.max_positions().saturating_sub(prompt.len());
    if prompt.is_empty() {
        return refused("it holds no tokens".into());
    }
    if room == 0 {
        let why =
            format!("its {} tokens leave no room in the model's context of {}", prompt.len(), model.max_positions());
        return refused(why);
    }

    let max_tokens = limits.max_tokens.min(room);
    let mut detokenizer = Detokenizer::new(tokenizer, prompt);
    let mut state = model.state(prompt.len() + max_tokens)?;
    let mut logits = Vec::new();
    let start = Instant::now();
    for batch in prompt.chunks(BATCH) {
        let hidden = model.forward(batch, &mut state)?;
        if state.positions() == prompt.len() {
            ops.read(&model.logits(&hidden, batch.len() - 1, 1)?, &mut logits)?;
        }
    }
    let prefill = start.elapsed();
    let mut tokens = 0;
    while tokens < max_tokens && !observer.cancelled() {
        let token = sampler.draw(&mut logits);
        tokens += 1;
        if limits.eos.contains(&token) {
            break;
        }
        emit(&detokenizer.push(token)?)?;
        if tokens < max_tokens {
            model.step(token, &mut state, &mut logits)?;
        }
    }
    Ok(Generated { prompt_tokens: prompt.len(), tokens, prefill, decode: start.elapsed() - prefill })
}
