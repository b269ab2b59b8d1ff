//! Components: what a tensor is to its model, decided by the rules in `components.toml`.

use regex::Regex;
use serde::Deserialize;

use crate::{
    error::{Error, Result},
    tensor::matrix_shape,
};

/// The component of vectors, scalars and tiny matrices, which policies leave as they are.
pub const PLAIN: &str = "plain";

/// The component of what no rule names.
const OTHER: &str = "other";

/// A matrix with shorter rows or fewer weights is kept: its scales would cost about what its codes save.
const LEAST_COLUMNS: usize = 32;
const LEAST_WEIGHTS: usize = 1024;

/// Rules from names to components.
#[derive(Debug)]
pub struct ComponentRules {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    component: String,
    pattern: Regex,
    tiny: bool,
}

#[derive(Deserialize)]
struct File {
    rule: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    component: String,
    pattern: String,
    /// Only for these architectures; for all where absent.
    architectures: Option<Vec<String>>,
    /// Also for tiny matrices, which are plain otherwise.
    #[serde(default)]
    tiny: bool,
}

impl ComponentRules {
    /// The built-in rules that hold for an architecture (`architectures[0]` of config.json).
    pub fn builtin(architecture: Option<&str>) -> Self {
        Self::parse(include_str!("components.toml"), architecture).expect("the built-in rules are valid")
    }

    fn parse(text: &str, architecture: Option<&str>) -> Result<Self> {
        let file: File = toml::from_str(text)
            .map_err(|error| Error::Option { option: "component rules", why: error.to_string() })?;
        let applies = |rule: &FileRule| {
            let only = rule.architectures.as_deref();
            only.is_none_or(|only| {
                architecture.is_some_and(|architecture| only.iter().any(|name| name == architecture))
            })
        };
        let rules = file.rule.into_iter().filter(applies);
        let rules =
            rules.map(|rule| Ok(Rule { component: rule.component, pattern: pattern(&rule.pattern)?, tiny: rule.tiny }));
        Ok(Self { rules: rules.collect::<Result<_>>()? })
    }

    /// The component of a tensor.
    pub fn component(&self, name: &str, shape: &[usize]) -> &str {
        let (rows, cols) = matrix_shape(shape);
        let tiny = cols < LEAST_COLUMNS || rows.saturating_mul(cols) < LEAST_WEIGHTS;
        match self.rules.iter().find(|rule| rule.pattern.is_match(name)) {
            _ if shape.len() < 2 => PLAIN,
            Some(rule) if rule.tiny || !tiny => &rule.component,
            None if !tiny => OTHER,
            _ => PLAIN,
        }
    }
}

/// Compiles a pattern; the error names it.
pub(super) fn pattern(text: &str) -> Result<Regex> {
    Regex::new(text).map_err(|error| Error::pattern(text, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_shapes_decide() {
        let rules = ComponentRules::builtin(Some("LlamaForCausalLM"));
        for (name, shape, component) in [
            ("model.embed_tokens.weight", &[4096, 256][..], "embedding"),
            ("lm_head.weight", &[4096, 256], "output"),
            ("model.layers.0.self_attn.v_proj.weight", &[128, 256], "other"),
            ("model.layers.0.mlp.experts.3.w1.weight", &[256, 256], "expert"),
            ("model.layers.0.input_layernorm.weight", &[256], "plain"),
            ("backbone.layers.0.mixer.conv1d.weight", &[512, 1, 4], "plain"),
            ("tiny.weight", &[4, 64], "plain"),
        ] {
            assert_eq!(rules.component(name, shape), component, "{name}");
        }
        let bk = ComponentRules::builtin(Some("ResNetBKForCausalLM"));
        for (name, shape, component) in [
            ("blocks.0.bk_layer.v_proj.weight", &[1, 256][..], "bk_core"),
            ("blocks.0.bk_layer.output_proj.weight", &[256, 2], "bk_core"),
            ("blocks.0.bk_layer.v_proj.bias", &[1], "plain"),
            ("blocks.0.bk_layer.moe_ffn.gating_network.weight", &[8, 256], "other"),
            ("blocks.0.bk_layer.moe_ffn.experts.7.3.weight", &[256, 512], "expert"),
            ("position_embedding.weight", &[1024, 256], "embedding"),
        ] {
            assert_eq!(bk.component(name, shape), component, "{name}");
        }
        let mixtral = ComponentRules::builtin(Some("MixtralForCausalLM"));
        for (name, shape, component) in [
            ("model.layers.0.mlp.experts.gate_up_proj", &[8, 28672, 4096][..], "expert"),
            ("model.layers.0.block_sparse_moe.experts.0.w1.weight", &[14336, 4096], "expert"),
            ("model.layers.0.block_sparse_moe.gate.weight", &[8, 4096], "other"),
            ("model.layers.0.mlp.gate.weight", &[8, 4096], "other"),
            ("model.layers.0.mlp.gate_proj.weight", &[14336, 4096], "other"),
        ] {
            assert_eq!(mixtral.component(name, shape), component, "{name}");
        }
        let mamba = ComponentRules::builtin(Some("MambaForCausalLM"));
        for (name, shape, component) in [
            ("backbone.layers.0.mixer.A_log", &[5120, 16][..], "plain"),
            ("backbone.layers.0.mixer.conv1d.weight", &[5120, 1, 64], "plain"),
            ("backbone.layers.0.mixer.dt_proj.weight", &[5120, 160], "other"),
            ("backbone.layers.0.mixer.dt_proj.weight", &[512, 16], "other"),
            ("backbone.embeddings.weight", &[50280, 2560], "embedding"),
        ] {
            assert_eq!(mamba.component(name, shape), component, "{name}");
        }
    }
}
