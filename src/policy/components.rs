//! Components: what a tensor is to its model, decided by the rules in `components.toml`.

use std::{collections::BTreeMap, path::Path};

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use toml::Spanned;

use super::file::PolicyFile;
use crate::{
    encoding::Request,
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

/// Rules from names to components, and from components to encodings.
#[derive(Clone, Debug)]
pub struct ComponentRules {
    rules: Vec<Rule>,
    encodings: BTreeMap<String, Request>,
    coupled: Vec<Regex>,
    /// The user's own rules, where there are any.
    file: Option<PolicyFile>,
}

/// The same for all names that share an encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Coupling {
    pattern: usize,
    shared: String,
}

#[derive(Clone, Debug)]
struct Rule {
    component: String,
    pattern: Regex,
    architectures: Option<Vec<String>>,
    tiny: bool,
    /// Whether it stands in the user's own file.
    own: bool,
}

/// The rule that gave a tensor its component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatchedRule {
    pub pattern: String,
    /// Whether it stands in the user's file of rules, and not among the built-in ones.
    pub own: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default)]
    rule: Vec<Spanned<TableRule>>,
    #[serde(default)]
    encodings: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    coupled: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableRule {
    component: String,
    pattern: Spanned<String>,
    /// Only for these architectures; for all where absent.
    architectures: Option<Vec<String>>,
    /// Also for tiny matrices, which are plain otherwise.
    #[serde(default)]
    tiny: bool,
}

impl ComponentRules {
    /// The built-in rules.
    pub fn builtin() -> Self {
        let path = Path::new("components.toml");
        let file =
            PolicyFile::new(path, include_bytes!("components.toml").to_vec()).expect("the built-in rules are text");
        let mut rules = Self { rules: Vec::new(), encodings: BTreeMap::new(), coupled: Vec::new(), file: None };
        rules.put_before(&file, false).expect("the built-in rules are valid");
        rules
    }

    /// The built-in rules under those of a file of the same form: its rules are tried first, its encodings replace the
    /// built-in ones of the same components, and so does its list of couplings, if it has one.
    ///
    /// # Errors
    /// A file that does not parse, a pattern or an encoding that does not, a component without an encoding.
    pub fn with_file(file: PolicyFile) -> Result<Self> {
        let mut rules = Self::builtin();
        rules.put_before(&file, true)?;
        rules.file = Some(file);
        Ok(rules)
    }

    fn put_before(&mut self, file: &PolicyFile, own: bool) -> Result<()> {
        let table: Table = file.toml()?;
        for (component, text) in table.encodings {
            let field = |why: String| file.error_at(text.span(), format!("encodings: {component}: {why}"));
            let request = text.get_ref().parse().map_err(|error: Error| field(error.to_string()))?;
            if component == PLAIN && matches!(request, Request::Quantize { .. }) {
                return Err(field("vectors and tiny matrices are not quantized; use keep or a float type".into()));
            }
            self.encodings.insert(component, request);
        }
        let mut rules = Vec::new();
        for (index, rule) in table.rule.into_iter().enumerate() {
            let (span, rule) = (rule.span(), rule.into_inner());
            let TableRule { component, pattern: text, architectures, tiny } = rule;
            let field = |span, field: &str, why: String| {
                file.error_at(span, format!("rule {} ({component:?}): {field}: {why}", index + 1))
            };
            if !self.encodings.contains_key(&component) {
                return Err(field(span, "component", "has no encoding; name one under [encodings]".into()));
            }
            let pattern = pattern(text.get_ref()).map_err(|error| field(text.span(), "pattern", error.to_string()))?;
            rules.push(Rule { component, pattern, architectures, tiny, own });
        }
        rules.append(&mut self.rules);
        self.rules = rules;
        if !table.coupled.is_empty() {
            let couplings = table.coupled.iter().map(|text| {
                let field = |why: String| file.error_at(text.span(), format!("coupled: {why}"));
                let pattern = pattern(text.get_ref()).map_err(|error| field(error.to_string()))?;
                match pattern.captures_len() {
                    1 => Err(field("a pattern needs a group (...) that is the same in coupled names".into())),
                    _ => Ok(pattern),
                }
            });
            self.coupled = couplings.collect::<Result<_>>()?;
        }
        Ok(())
    }

    /// The component of a tensor of a model (`architectures[0]` of its config.json).
    pub fn component(&self, architecture: Option<&str>, name: &str, shape: &[usize]) -> &str {
        self.classify(architecture, name, shape).0
    }

    /// The component of a tensor, and the rule that says so, where it is one and not the shape.
    pub fn classify(&self, architecture: Option<&str>, name: &str, shape: &[usize]) -> (&str, Option<MatchedRule>) {
        let (rows, cols) = matrix_shape(shape);
        let tiny = cols < LEAST_COLUMNS || rows.saturating_mul(cols) < LEAST_WEIGHTS;
        let applies = |rule: &&Rule| {
            let only = rule.architectures.as_deref();
            only.is_none_or(|only| architecture.is_some_and(|name| only.iter().any(|known| known == name)))
                && rule.pattern.is_match(name)
        };
        match self.rules.iter().find(applies) {
            _ if shape.len() < 2 => (PLAIN, None),
            Some(rule) if rule.tiny || !tiny => {
                let matched = MatchedRule { pattern: rule.pattern.to_string(), own: rule.own };
                (&rule.component, Some(matched))
            }
            None if !tiny => (OTHER, None),
            _ => (PLAIN, None),
        }
    }

    /// What the static policy makes of a component.
    ///
    /// # Panics
    /// If it is none that these rules give: the caller's mistake.
    pub fn encoding(&self, component: &str) -> Request {
        self.encodings[component]
    }

    /// What a name is coupled by; `None` if it is coupled to none.
    pub(super) fn coupling(&self, name: &str) -> Option<Coupling> {
        self.coupled.iter().enumerate().find_map(|(index, pattern)| {
            let shared = pattern.captures(name)?.get(1).map_or("", |group| group.as_str());
            Some(Coupling { pattern: index, shared: shared.to_owned() })
        })
    }

    /// The encoding of every component, for the manifest.
    pub(super) fn encodings_record(&self) -> Value {
        self.encodings.iter().map(|(component, request)| (component.clone(), json!(request.to_string()))).collect()
    }

    /// The user's rules, for the manifest.
    pub(super) fn file_record(&self) -> Option<Value> {
        self.file.as_ref().map(PolicyFile::record)
    }
}

/// Compiles a pattern; the error names it.
pub(super) fn pattern(text: &str) -> Result<Regex> {
    RegexBuilder::new(text).size_limit(1 << 18).build().map_err(|error| Error::pattern(text, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_shapes_decide() {
        let rules = ComponentRules::builtin();
        let of = |architecture, name, shape: &[usize]| rules.component(Some(architecture), name, shape).to_owned();
        for (name, shape, component) in [
            ("model.embed_tokens.weight", &[4096, 256][..], "embedding"),
            ("lm_head.weight", &[4096, 256], "output"),
            ("model.layers.0.self_attn.v_proj.weight", &[128, 256], "other"),
            ("model.layers.0.mlp.experts.3.w1.weight", &[256, 256], "expert"),
            ("model.layers.0.input_layernorm.weight", &[256], "plain"),
            ("backbone.layers.0.mixer.conv1d.weight", &[512, 1, 4], "plain"),
            ("tiny.weight", &[4, 64], "plain"),
        ] {
            assert_eq!(of("LlamaForCausalLM", name, shape), component, "{name}");
        }
        for (name, shape, component) in [
            ("blocks.0.bk_layer.v_proj.weight", &[1, 256][..], "bk_core"),
            ("blocks.0.bk_layer.output_proj.weight", &[256, 2], "bk_core"),
            ("blocks.0.bk_layer.v_proj.bias", &[1], "plain"),
            ("blocks.0.bk_layer.moe_ffn.gating_network.weight", &[8, 256], "other"),
            ("blocks.0.bk_layer.moe_ffn.experts.7.3.weight", &[256, 512], "expert"),
            ("position_embedding.weight", &[1024, 256], "embedding"),
        ] {
            assert_eq!(of("ResNetBKForCausalLM", name, shape), component, "{name}");
        }
        for (name, shape, component) in [
            ("model.layers.0.mlp.experts.gate_up_proj", &[8, 28672, 4096][..], "expert"),
            ("model.layers.0.block_sparse_moe.experts.0.w1.weight", &[14336, 4096], "expert"),
            ("model.layers.0.block_sparse_moe.gate.weight", &[8, 4096], "other"),
            ("model.layers.0.mlp.gate.weight", &[8, 4096], "other"),
            ("model.layers.0.mlp.gate_proj.weight", &[14336, 4096], "other"),
        ] {
            assert_eq!(of("MixtralForCausalLM", name, shape), component, "{name}");
        }
        for (name, shape, component) in [
            ("backbone.layers.0.mixer.A_log", &[5120, 16][..], "plain"),
            ("backbone.layers.0.mixer.conv1d.weight", &[5120, 1, 64], "plain"),
            ("backbone.layers.0.mixer.dt_proj.weight", &[5120, 160], "other"),
            ("backbone.layers.0.mixer.dt_proj.weight", &[512, 16], "other"),
            ("backbone.embeddings.weight", &[50280, 2560], "embedding"),
        ] {
            assert_eq!(of("MambaForCausalLM", name, shape), component, "{name}");
        }
    }

    fn with(text: &str) -> Result<ComponentRules> {
        ComponentRules::with_file(PolicyFile::new(Path::new("mine.toml"), text.into()).unwrap())
    }

    #[test]
    fn the_static_policy_is_the_documented_one() {
        let rules = ComponentRules::builtin();
        let text = |component| rules.encoding(component).to_string();
        assert_eq!(text("expert"), "int4:g128");
        assert_eq!(text("bk_core"), "int8:g128");
        assert_eq!(text("output"), "fp16");
        assert_eq!(text("embedding"), "fp16");
        assert_eq!(text("other"), "int8:g128");
        assert_eq!(text(PLAIN), "keep");
    }

    #[test]
    fn a_users_rules_come_first() {
        let rules = with(
            "[encodings]\nexpert = \"int3:g64\"\nvalue = \"int6\"\n[[rule]]\ncomponent = \"value\"\npattern = 'v_proj'\n",
        )
        .unwrap();
        assert_eq!(rules.encoding("expert").to_string(), "int3:g64");
        assert_eq!(rules.encoding("other").to_string(), "int8:g128");
        let value = rules.component(None, "layers.0.v_proj.weight", &[128, 256]);
        assert_eq!((value, rules.encoding(value).to_string().as_str()), ("value", "int6:g128"));
        assert_eq!(rules.component(None, "lm_head.weight", &[4096, 256]), "output");
    }

    #[test]
    fn broken_rules_name_file_line_rule_and_field() {
        for (text, words) in [
            ("[encodings]\n\nexpert = \"int9\"", &["mine.toml: line 3", "expert", "int9"][..]),
            ("[encodings]\nplain = \"int4\"", &["line 2", "plain", "keep"]),
            ("[[rule]]\ncomponent = \"other\"\npattern = '('", &["line 3", "rule 1", "pattern"]),
            ("[[rule]]\ncomponent = \"new\"\npattern = 'a'", &["line 1", "rule 1", "\"new\"", "[encodings]"]),
            ("[[rule]]\ncomponent = \"other\"\npatern = 'a'", &["line 3", "patern"]),
            ("[[rule]]\npattern = 'a'", &["line 1", "component"]),
            ("coupled = ['q|k']", &["line 1", "coupled", "group"]),
            ("x = ", &["mine.toml: line 1"]),
        ] {
            let message = with(text).unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
    }

    #[test]
    fn couplings_share_what_stands_before_them() {
        let rules = ComponentRules::builtin();
        let coupled = |a: &str, b: &str| rules.coupling(a).is_some() && rules.coupling(a) == rules.coupling(b);
        assert!(coupled("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.v_proj.weight"));
        assert!(coupled("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"));
        assert!(coupled("moe.experts.1.w1.weight", "moe.experts.1.w3.weight"));
        assert!(!coupled("layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"));
        assert!(!coupled("moe.experts.1.w1.weight", "moe.experts.1.w2.weight"));
        assert_eq!(rules.coupling("layers.0.mlp.down_proj.weight"), None);
    }
}
