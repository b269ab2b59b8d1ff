//! What `bkpack eval --json` prints, read back.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::results::{Conditions, read};
use crate::error::{Error, Result};

/// The quality of a model on a text. NLL and KL divergence are in nats.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Evaluation {
    /// `None` where it is NaN or infinite, as in the distance to a baseline.
    // Named, so that it must be there, if only as null.
    #[serde(rename = "ppl", deserialize_with = "Option::deserialize")]
    pub perplexity: Option<f64>,
    /// No figure here is that of a language model.
    pub looks_ahead: bool,
    #[serde(skip)]
    pub baseline: Option<Baseline>,
    pub file_bytes: u64,
    pub parameters: u64,
    /// Of the packed file; none where an older version measured it, or a checkpoint was measured.
    #[serde(default)]
    pub seals: Vec<String>,
    pub tokens_per_second: f64,
    pub core_error: Option<CoreError>,
    #[serde(skip)]
    pub conditions: Conditions,
    /// The instruction set that the kernels ran on.
    pub isa: String,
    pub threads: u64,
    pub by_component: Option<ComponentCosts>,
}

/// The distance to a baseline on the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Baseline {
    #[serde(deserialize_with = "Option::deserialize")]
    pub baseline_ppl: Option<f64>,
    #[serde(deserialize_with = "Option::deserialize")]
    pub ppl_increase_percent: Option<f64>,
    pub kld_mean: f64,
    pub kld_median: f64,
    /// What 99.9 % of positions stay below.
    pub kld_p999: f64,
    /// The share of positions where both find the same token the most likely.
    pub top1_agreement: f64,
}

/// The relative error of quantized activations of the Birman-Schwinger core.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct CoreError {
    pub bits: u32,
    pub v: f64,
    pub re_g: f64,
    pub im_g: f64,
}

/// What each component costs when it alone is packed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ComponentCosts {
    pub components: Vec<ComponentCost>,
    /// Bytes that belong to no tensor.
    pub rest_bytes: u64,
    pub file_bytes: u64,
    /// With all of them packed, on the same positions.
    pub kld: f64,
    pub windows: u64,
    pub ctx: u64,
}

/// The cost of the tensors of one component that share an encoding.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ComponentCost {
    pub component: String,
    pub encoding: String,
    pub tensors: u64,
    pub bytes: u64,
    /// Mean divergence from the baseline.
    pub kld: f64,
    /// For each megabyte (10^6 bytes) saved; absent where none is.
    pub kld_per_mb_saved: Option<f64>,
}

impl Evaluation {
    /// Reads the output of `bkpack eval --json` from a file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Results`] where it is something else.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |error: serde_json::Error| Error::Results {
            path: path.to_owned(),
            why: format!("is not what `bkpack eval --json` prints: {error}"),
        };
        let object = read(path)?;
        let conditions = Conditions::of(&object);
        let compared = object.contains_key("baseline_ppl");
        let value = Value::Object(object);
        let baseline = compared.then(|| Baseline::deserialize(&value)).transpose().map_err(refuse)?;
        let evaluation = Self::deserialize(&value).map_err(refuse)?;
        Ok(Self { baseline, conditions, ..evaluation })
    }
}
