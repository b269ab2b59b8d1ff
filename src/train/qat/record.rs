//! The course of a training, step by step.

use serde::{Deserialize, Serialize};

/// One step of a training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// From 1.
    pub step: u64,
    /// What the step made smaller.
    pub loss: f64,
    /// Mean negative log-likelihood of a token, in nats.
    pub cross_entropy: f64,
    /// Mean divergence from the teacher, in nats, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    pub learning_rate: f64,
    /// Of all gradients together, before it was made shorter.
    pub gradient_norm: f64,
    pub tokens_per_second: f64,
}

/// The perplexity of what would be packed after a step; of step 0, without training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationRecord {
    pub step: u64,
    pub ppl: f64,
    pub nll: f64,
}

/// The record of a training so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    pub steps: Vec<StepRecord>,
    pub validation: Vec<ValidationRecord>,
    /// The perplexity of the checkpoint itself on the same text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline_ppl: Option<f64>,
}
