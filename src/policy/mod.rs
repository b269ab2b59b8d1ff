//! Which tensor gets which encoding.

pub mod budget;
mod components;
mod dynamic;
mod exceptions;
pub mod explain;
mod file;
mod fit;
pub mod importance;
pub mod options;
mod preset;
pub mod reason;
mod recipe;
mod sensitivity;

use std::collections::HashMap;

use serde_json::{Value, json};

pub use components::{ComponentRules, MatchedRule, PLAIN};
pub use dynamic::{Dynamic, Levels};
pub use exceptions::{Exception, Exceptions};
pub use file::PolicyFile;
pub use fit::{Budget, SizedAlternative, Target};
pub use preset::Preset;
pub use recipe::{Line, Recipe};
pub use sensitivity::{Cost, Sensitivity, SensitivityTable, TensorSensitivity};

use self::reason::By;
use crate::{
    encoding::Request,
    error::{Error, Result},
};

/// What a policy sees of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub shape: Vec<usize>,
    pub component: String,
    /// The rule that gave it its component; `None` where its shape did.
    pub rule: Option<MatchedRule>,
}

/// What a tensor may become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    pub request: Request,
    /// Whether the user asked for it by name: what cannot be done is then refused, and never replaced by its like.
    pub named: bool,
    /// What it costs, where that is known.
    pub cost: Option<f64>,
}

impl Alternative {
    fn named(request: Request) -> Self {
        Self { request, named: true, cost: None }
    }

    fn chosen(request: Request) -> Self {
        Self { request, named: false, cost: None }
    }
}

/// What a policy says of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What it may become: several only where a budget is to choose among them.
    pub alternatives: Vec<Alternative>,
    /// What the policy went by, where its record alone does not tell.
    pub by: Option<By>,
}

impl Decision {
    fn named(request: Request, by: Option<By>) -> Self {
        Self { alternatives: vec![Alternative::named(request)], by }
    }

    fn chosen(request: Request, by: Option<By>) -> Self {
        Self { alternatives: vec![Alternative::chosen(request)], by }
    }
}

/// How encodings are chosen, and the exceptions to it.
///
/// ```
/// use bkpack::policy::{Policy, TensorInfo};
///
/// let policy = Policy::uniform("int4:g64".parse()?, &["lm_head".into()], &["down_proj=int6:asym".into()])?;
/// let tensor = |name: &str, shape: &[usize]| {
///     let (component, rule) = policy.components.classify(Some("LlamaForCausalLM"), name, shape);
///     TensorInfo { name: name.into(), shape: shape.to_vec(), component: component.into(), rule }
/// };
/// let decisions = policy.resolve(&[
///     tensor("model.layers.0.mlp.up_proj.weight", &[704, 256]),
///     tensor("model.layers.0.mlp.down_proj.weight", &[256, 704]),
///     tensor("model.norm.weight", &[256]),
///     tensor("lm_head.weight", &[4096, 256]),
/// ])?;
/// let requests: Vec<String> =
///     decisions.iter().map(|decision| decision.alternatives[0].request.to_string()).collect();
/// assert_eq!(requests, ["int4:g64", "int6:g128:asym", "keep", "keep"]);
/// # Ok::<_, bkpack::Error>(())
/// ```
#[derive(Debug)]
pub struct Policy {
    pub components: ComponentRules,
    pub choice: Choice,
    pub exceptions: Exceptions,
}

/// How encodings are chosen.
#[derive(Debug)]
pub enum Choice {
    /// The same for every matrix, embeddings and head included.
    Uniform(Request),
    /// By component.
    Component,
    /// By rank in a list of importances.
    Dynamic(Dynamic),
    /// As a recipe says.
    Recipe(Recipe),
    /// Those that cost least, in a file of at most a given size.
    Budget(Budget),
}

impl Policy {
    /// The same encoding for every matrix, with exceptions as [`Exceptions::new`] has them.
    ///
    /// # Errors
    /// A pattern or an encoding that does not parse.
    pub fn uniform(request: Request, keep: &[String], overrides: &[String]) -> Result<Self> {
        let exceptions = Exceptions::new(keep, overrides)?;
        Ok(Self { components: ComponentRules::builtin(), choice: Choice::Uniform(request), exceptions })
    }

    /// What every tensor may become, and why.
    ///
    /// # Errors
    /// A list or a recipe that lacks a tensor or names one that is not there.
    pub fn resolve(&self, tensors: &[TensorInfo]) -> Result<Vec<Decision>> {
        let mut resolved: Vec<Decision> = match &self.choice {
            Choice::Recipe(recipe) => {
                let requests = recipe.requests(tensors)?.into_iter();
                requests.map(|(request, line)| Decision::named(request, line.map(By::Recipe))).collect()
            }
            // What a choice goes by is known once it is made.
            Choice::Budget(budget) => {
                let alternatives = budget.alternatives(tensors)?.into_iter();
                alternatives.map(|alternatives| Decision { alternatives, by: None }).collect()
            }
            Choice::Dynamic(dynamic) => {
                let ranked = dynamic.ranked(tensors)?.into_iter();
                ranked.map(|(request, rank)| Decision::chosen(request, rank.map(By::Importance))).collect()
            }
            Choice::Uniform(request) => {
                let one = |tensor: &TensorInfo| if tensor.component == PLAIN { Request::Keep } else { *request };
                tensors.iter().map(|tensor| Decision::named(one(tensor), None)).collect()
            }
            Choice::Component => {
                let one = |tensor: &TensorInfo| {
                    let request = self.components.encoding(&tensor.component);
                    Decision::chosen(request, tensor.rule.clone().map(By::Rule))
                };
                tensors.iter().map(one).collect()
            }
        };
        for (tensor, decision) in tensors.iter().zip(&mut resolved) {
            if let Some(exception) = self.exceptions.find(&tensor.name, &tensor.component) {
                *decision = Decision::named(exception.request, None);
            }
        }
        Ok(resolved)
    }

    /// What the policy went by when one of a tensor's alternatives was chosen, where its record alone does not tell.
    pub fn by(
        &self,
        tensor: &TensorInfo,
        decision: &Decision,
        sized: &[SizedAlternative],
        chosen: usize,
    ) -> Option<By> {
        match &self.choice {
            Choice::Budget(budget) => {
                let coupled = budget.couples(&self.components, &tensor.name);
                reason::Cost::of(sized, chosen, coupled).map(By::Cost)
            }
            _ => decision.by.clone(),
        }
    }

    /// The record for the manifest.
    pub fn record(&self) -> Value {
        let mut record = match &self.choice {
            Choice::Uniform(request) => json!({ "name": "uniform", "encoding": request.to_string() }),
            Choice::Component => json!({ "name": "component", "encodings": self.components.encodings_record() }),
            Choice::Dynamic(dynamic) => dynamic.record(),
            Choice::Recipe(recipe) => recipe.record(),
            Choice::Budget(budget) => budget.record(),
        };
        if let Some(rules) = self.components.file_record() {
            record["rules"] = rules;
        }
        self.exceptions.record(&mut record);
        record
    }
}

/// Finds what a list says of every matrix that can be quantized: the index of its entry; `None` for plain tensors.
///
/// # Errors
/// A list that names a tensor twice, or one that is no such matrix, or that lacks one.
fn match_names<'a>(
    file: &PolicyFile,
    names: impl Iterator<Item = &'a str>,
    tensors: &[TensorInfo],
) -> Result<Vec<Option<usize>>> {
    let mut entries = HashMap::new();
    for (index, name) in names.enumerate() {
        match tensors.iter().find(|tensor| tensor.name == name) {
            Some(tensor) if tensor.component == PLAIN => {
                let why = format!("tensor {name:?} is a vector or a tiny matrix, which is not quantized");
                return Err(file.error(why));
            }
            Some(_) if entries.insert(name, index).is_some() => {
                return Err(file.error(format!("tensor {name:?} is listed twice")));
            }
            Some(_) => {}
            None => return Err(file.error(format!("tensor {name:?} is none that the packed file will hold"))),
        }
    }
    tensors
        .iter()
        .map(|tensor| match entries.get(tensor.name.as_str()) {
            None if tensor.component != PLAIN => {
                Err(file.error(format!("tensor {:?} of the checkpoint is missing from the list", tensor.name)))
            }
            found => Ok(found.copied()),
        })
        .collect()
}

/// Refuses a file of another version.
fn check_version(file: &PolicyFile, version: u64) -> Result<(), Error> {
    match version {
        1 => Ok(()),
        other => Err(file.error(format!("version {other} is not known; this program reads version 1"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn tensor(name: &str, shape: &[usize], component: &str) -> TensorInfo {
        TensorInfo { name: name.into(), shape: shape.to_vec(), component: component.into(), rule: None }
    }

    #[test]
    fn exceptions_stand_above_every_choice() {
        let tensors = [
            tensor("expert", &[64, 64], "expert"),
            tensor("head", &[64, 64], "output"),
            tensor("gate", &[64, 64], "other"),
            tensor("norm", &[64], PLAIN),
        ];
        let exceptions = Exceptions::new(&["gate".into()], &["exp=int3:g64".into()]).unwrap();
        let policy = Policy { components: ComponentRules::builtin(), choice: Choice::Component, exceptions };
        let resolved = policy.resolve(&tensors).unwrap();
        let text: Vec<_> = resolved.iter().map(|decision| decision.alternatives[0].request.to_string()).collect();
        assert_eq!(text, ["int3:g64", "fp16", "keep", "keep"]);
        let named: Vec<_> = resolved.iter().map(|decision| decision.alternatives[0].named).collect();
        assert_eq!(named, [true, false, true, false]);
        let record = policy.record();
        assert_eq!((&record["name"], &record["encodings"]["expert"]), (&json!("component"), &json!("int4:g128")));
        assert_eq!((&record["keep"][0], &record["tensor"][0]), (&json!("gate"), &json!("exp=int3:g64")));
    }
}
