//! ResNet-BK.

use std::path::Path;

use serde_json::Value;

use super::{Experts, Fields, MAX_DIMENSION, MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS};
use crate::error::Result;

/// What defines a ResNet-BK model.
#[derive(Clone, Debug, PartialEq)]
pub struct ResNetBkConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub layers: usize,
    /// Rows of the position embedding: the longest context, in tokens.
    pub max_positions: usize,
    pub experts: Experts,
    /// Whether a position sees only those before it.
    pub causal: bool,
    /// Real and imaginary part of the point at which the resolvent is taken.
    pub z: [f32; 2],
    /// The largest magnitude of a potential.
    pub v_max: f32,
    /// The largest magnitude of the real and imaginary part of the resolvent.
    pub feature_clamp: f32,
    pub norm_eps: f32,
}

impl ResNetBkConfig {
    /// Reads and checks the configuration; `path` is the model's, for errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) names the first field that is absent, of the wrong type or out of
    /// range.
    pub fn parse(path: &Path, config: &Value) -> Result<Self> {
        let fields = Fields::new(path, config)?;
        let count = fields.required("num_experts", 1..=MAX_EXPERTS)?;
        let number = |key, default| -> Result<f32> { Ok(fields.number(key, 0.0..=1e6)?.unwrap_or(default) as f32) };
        Ok(Self {
            vocab_size: fields.required("vocab_size", 1..=MAX_DIMENSION)?,
            // An expert is twice as wide.
            hidden_size: fields.required("d_model", 1..=MAX_DIMENSION / 2)?,
            layers: fields.required("n_layers", 1..=MAX_LAYERS)?,
            max_positions: fields.required("n_seq", 1..=MAX_POSITIONS)?,
            experts: Experts { count, chosen: fields.integer("top_k", 1..=count)?.unwrap_or(1) },
            // The published model looks ahead: a file that does not say otherwise is taken for one of those.
            causal: fields.flag("causal")?,
            z: parse_z(&fields)?,
            v_max: number("v_max", 3.0)?,
            feature_clamp: number("feature_clamp", 10.0)?,
            norm_eps: fields.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
        })
    }
}

/// `[re, im]`. The imaginary part bounds every denominator of the resolvent from below.
fn parse_z(fields: &Fields) -> Result<[f32; 2]> {
    const LEAST_IMAGINARY: f64 = 1e-3;
    const LARGEST: f64 = 1e6;
    let Some(z) = fields.array("z")? else { return Ok([0.0, 1.0]) };
    match z.iter().map(Value::as_f64).collect::<Vec<_>>()[..] {
        [Some(re), Some(im)] if re.abs() <= LARGEST && (LEAST_IMAGINARY..=LARGEST).contains(&im.abs()) => {
            Ok([re as f32, im as f32])
        }
        _ => {
            let why = format!("not two numbers [re, im] with |im| of at least {LEAST_IMAGINARY}, at most {LARGEST}");
            Err(fields.error("z", why))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Error;

    fn parse(changes: Value) -> Result<ResNetBkConfig> {
        let mut config = json!({"vocab_size": 4096, "d_model": 256, "n_layers": 6, "n_seq": 1024, "num_experts": 8,
            "top_k": 2, "causal": true, "z": [0.0, 1.0]});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ResNetBkConfig::parse(Path::new("model"), &config)
    }

    #[test]
    fn what_may_be_absent_has_a_default() {
        let config = parse(json!({"z": null, "causal": null})).unwrap();
        assert_eq!((config.z, config.v_max, config.feature_clamp), ([0.0, 1.0], 3.0, 10.0));
        assert!(!config.causal && parse(json!({})).unwrap().causal);
    }

    #[test]
    fn malformed_fields_are_errors_that_name_them() {
        for (field, changes) in [
            ("vocab_size", json!({"vocab_size": 0})),
            ("d_model", json!({"d_model": u64::MAX})),
            ("n_seq", json!({"n_seq": 0})),
            ("num_experts", json!({"num_experts": 1 << 20})),
            ("top_k", json!({"top_k": 9})),
            ("causal", json!({"causal": "yes"})),
            ("z", json!({"z": [1.0, 0.0]})),
            ("z", json!({"z": [0.0]})),
            ("z", json!({"z": ["0", "1"]})),
            ("z", json!({"z": 1.0})),
            ("v_max", json!({"v_max": -1.0})),
        ] {
            match parse(changes.clone()) {
                Err(Error::Config { field: found, .. }) => assert_eq!(found, field, "{changes}"),
                other => panic!("{changes}: {other:?}"),
            }
        }
    }
}
