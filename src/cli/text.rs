//! The text that a subcommand looks at, or token ids in place of it.

use std::path::{Path, PathBuf};

use bkpack::{
    Result,
    eval::{perplexity::Options, text::read_either},
    ops::cpu::Activations,
    tensor::TensorSource,
};
use clap::Args;

/// What quality is measured on, and how: the same options with the same defaults wherever perplexity is printed.
#[derive(Args, Debug)]
pub struct MeasureArgs {
    /// Text (UTF-8, every line end read as LF), tokenized with the model's own tokenizer
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,

    /// Positions at the start of each window that are not scored
    #[arg(long, value_name = "N", default_value_t = 1)]
    skip: usize,

    /// Use only the first N tokens
    #[arg(long, value_name = "N")]
    limit_tokens: Option<usize>,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t)]
    activations: Activations,

    /// Measure a model whose positions see later tokens, and mark every figure
    #[arg(long)]
    allow_lookahead: bool,
}

impl MeasureArgs {
    /// The file of the text or of the token ids.
    pub fn path(&self) -> &Path {
        self.text.as_ref().or(self.tokens.as_ref()).expect("the options require one of the two")
    }

    /// The token ids that a model is measured on.
    pub fn tokens(&self, source: &dyn TensorSource) -> Result<Vec<u32>> {
        let (_, mut tokens) = read_either(source, &self.text, &self.tokens)?;
        tokens.truncate(self.limit_tokens.unwrap_or(usize::MAX));
        Ok(tokens)
    }

    /// How it is measured on them.
    pub fn options(&self) -> Options {
        let &Self { ctx, skip, activations, allow_lookahead, .. } = self;
        Options { ctx, skip, activations, allow_lookahead }
    }
}
