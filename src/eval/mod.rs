//! Running models on text: tokens, windows, perplexity, the distance to a baseline, logits, generation.

pub mod causality;
pub mod difference;
pub mod generate;
pub mod logits;
pub mod perplexity;
pub mod text;
