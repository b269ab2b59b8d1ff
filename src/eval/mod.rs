//! Running models on text: tokens, windows, calibration, perplexity, the distance to a baseline, logits, generation;
//! sweeps over widths and compute, FLOP counts, targets, speed.

pub mod calibrate;
pub mod causality;
pub mod components;
mod core_error;
pub mod difference;
pub mod flops;
pub mod generate;
pub mod logits;
pub mod perplexity;
pub mod probe;
pub mod record;
pub mod speed;
pub mod sweep;
pub mod targets;
pub mod text;
