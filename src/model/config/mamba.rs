//! Mamba.

use std::path::Path;

use serde_json::Value;

use super::{Fields, MAX_DIMENSION, MAX_LAYERS};
use crate::error::Result;

/// What defines a Mamba model (Gu and Dao, 2023, <https://arxiv.org/abs/2312.00752>).
#[derive(Clone, Debug, PartialEq)]
pub struct MambaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Channels of the convolution and the scan.
    pub intermediate_size: usize,
    pub layers: usize,
    /// States of one channel.
    pub state_size: usize,
    /// Positions that the convolution sees, its own included.
    pub conv_kernel: usize,
    /// The width through which the step size of each channel is computed.
    pub time_step_rank: usize,
    pub norm_eps: f32,
    /// Whether the input and output projections have a bias.
    pub use_bias: bool,
    /// Whether the convolution has a bias.
    pub use_conv_bias: bool,
    /// Whether the embedding serves as output head.
    pub tie_word_embeddings: bool,
}

impl MambaConfig {
    /// Reads and checks the configuration; `path` is the model's, for errors.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) names the first field that is absent, of the wrong type, out of
    /// range or not supported.
    pub fn parse(path: &Path, config: &Value) -> Result<Self> {
        const MAX_STATE: usize = 1 << 12;
        const MAX_KERNEL: usize = 1 << 8;
        let fields = Fields::new(path, config)?;
        let hidden_size = fields.required("hidden_size", 1..=MAX_DIMENSION)?;
        let expand = fields.integer("expand", 1..=MAX_DIMENSION / hidden_size)?.unwrap_or(2);
        let activation = fields.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(fields.error("hidden_act", format!("{activation:?} is not supported, only \"silu\"")));
        }
        let intermediate_size = fields.integer("intermediate_size", 1..=MAX_DIMENSION)?;
        let intermediate_size = intermediate_size.unwrap_or(expand * hidden_size);
        let time_step_rank = match fields.get("time_step_rank") {
            Some(Value::String(text)) if text == "auto" => None,
            _ => fields.integer("time_step_rank", 1..=MAX_DIMENSION)?,
        };
        Ok(Self {
            vocab_size: fields.required("vocab_size", 1..=MAX_DIMENSION)?,
            hidden_size,
            intermediate_size,
            layers: fields.required("num_hidden_layers", 1..=MAX_LAYERS)?,
            state_size: fields.integer("state_size", 1..=MAX_STATE)?.unwrap_or(16),
            conv_kernel: fields.integer("conv_kernel", 1..=MAX_KERNEL)?.unwrap_or(4),
            time_step_rank: time_step_rank.unwrap_or(hidden_size.div_ceil(16)),
            norm_eps: fields.number("layer_norm_epsilon", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
            use_bias: fields.flag("use_bias")?,
            use_conv_bias: fields.flag_or("use_conv_bias", true)?,
            tie_word_embeddings: fields.flag_or("tie_word_embeddings", true)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Error;

    fn parse(changes: Value) -> Result<MambaConfig> {
        let mut config = json!({"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        MambaConfig::parse(Path::new("model"), &config)
    }

    #[test]
    fn what_may_be_absent_has_a_default() {
        let config = parse(json!({})).unwrap();
        let sizes = (config.intermediate_size, config.state_size, config.conv_kernel, config.time_step_rank);
        assert_eq!(sizes, (512, 16, 4, 16));
        assert!(config.use_conv_bias && config.tie_word_embeddings && !config.use_bias);
        assert_eq!(parse(json!({"time_step_rank": "auto", "hidden_size": 250})).unwrap().time_step_rank, 16);
    }

    #[test]
    fn malformed_fields_are_errors_that_name_them() {
        for (field, changes) in [
            ("vocab_size", json!({"vocab_size": 0})),
            ("hidden_size", json!({"hidden_size": u64::MAX})),
            ("expand", json!({"expand": 1 << 20})),
            ("state_size", json!({"state_size": 0})),
            ("conv_kernel", json!({"conv_kernel": 1000})),
            ("time_step_rank", json!({"time_step_rank": "many"})),
            ("use_conv_bias", json!({"use_conv_bias": 1})),
            ("hidden_act", json!({"hidden_act": "gelu"})),
        ] {
            match parse(changes.clone()) {
                Err(Error::Config { field: found, .. }) => assert_eq!(found, field, "{changes}"),
                other => panic!("{changes}: {other:?}"),
            }
        }
    }
}
