//! An evaluation together with what it is of.

use serde::Serialize;

use super::{components::ComponentCosts, perplexity::Evaluation};
use crate::{format::PackedFile, tensor::CalibrationText};

/// What `bkpack eval --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluationRecord {
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// What was measured on: the text or the file of token ids; absent for ids that come from no file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<CalibrationText>,
    /// Of the packed file, so that nobody takes the figures for those of another one; none for a checkpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub seals: Vec<String>,
    /// What each component of the packed file costs, where that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by_component: Option<ComponentCosts>,
}

impl EvaluationRecord {
    /// The record of an evaluation of `packed`, which is `None` for a checkpoint.
    pub fn new(evaluation: Evaluation, text: Option<CalibrationText>, packed: Option<&PackedFile>) -> Self {
        let seals = packed.into_iter().flat_map(PackedFile::shards).map(|shard| shard.seal.to_owned()).collect();
        Self { evaluation, text, seals, by_component: None }
    }
}
