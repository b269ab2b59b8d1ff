//! The models whose shapes are known: `presets.json` holds the config.json of each.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

use super::tensors::{LAYER_COUNTS, size};

/// A known model.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// What the user calls it.
    pub name: String,
    /// Where the shapes come from.
    pub source: String,
    /// Its config.json, but for the type of the weights.
    pub config: Value,
}

static PRESETS: LazyLock<Vec<Preset>> =
    LazyLock::new(|| serde_json::from_str(include_str!("presets.json")).expect("the built-in presets are valid"));

impl Preset {
    /// Every known model.
    pub fn all() -> &'static [Preset] {
        &PRESETS
    }

    /// The model of this name.
    pub fn named(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|preset| preset.name == name)
    }

    /// Its number of layers.
    pub fn layers(&self) -> usize {
        let key = LAYER_COUNTS.iter().find(|key| self.config.get(*key).is_some());
        size(&self.config, key.expect("every preset has layers"))
    }
}
