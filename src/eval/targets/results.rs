//! Result files: what `bkpack eval --json` and `bkpack sweep` write, and the plainer files of other programs.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Figures, Metric, number};
use crate::json;

/// The most files of a folder that are looked at.
const MAX_FILES: usize = 10_000;

/// A model at one amount of compute.
#[derive(Debug)]
pub(super) struct Configuration {
    pub path: PathBuf,
    /// `None` where the model computes NaN or infinity.
    pub ppl: Option<f64>,
    pub flops_per_token: f64,
    pub marks: Vec<&'static str>,
    pub protocol: Option<Protocol>,
}

/// What must be equal for figures of two results to compare; null where the result does not say.
pub(super) type Protocol = [(&'static str, Value); 4];

/// Reads one result; the error is a sentence.
pub(super) fn read_result(path: &Path) -> Result<Figures, String> {
    match json::read_small(path).and_then(|bytes| json::parse(path, &bytes)) {
        Ok(Value::Object(figures)) => Ok(figures),
        Ok(_) => Err(format!("{} is no JSON object", path.display())),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads the configurations of a model among the JSON files of a folder; the error is a sentence.
pub(super) fn read_configurations(folder: &Path, model: &str) -> Result<Vec<Configuration>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err(format!("{} holds more than {MAX_FILES} results", folder.display()));
        }
    }
    paths.sort();
    let mut configurations = Vec::new();
    for path in paths {
        let figures = read_result(&path)?;
        if !figures.contains_key("config_id") || figures.get("model").and_then(Value::as_str) != Some(model) {
            continue;
        }
        let flops_per_token = number(&figures, Metric::FlopsPerToken)
            .filter(|flops| *flops > 0.0)
            .ok_or_else(|| format!("{} holds no number \"flops_per_token\"", path.display()))?;
        let ppl = number(&figures, Metric::Ppl);
        let (marks, protocol) = (marks(&figures), protocol(&figures));
        configurations.push(Configuration { path, ppl, flops_per_token, marks, protocol });
    }
    if configurations.is_empty() {
        return Err(format!("{} holds no configuration of model {model:?}", folder.display()));
    }
    Ok(configurations)
}

/// What a result must not be quoted without.
pub(super) fn marks(figures: &Figures) -> Vec<&'static str> {
    let marks = [("simulated", "SIMULATED"), ("looks_ahead", "LOOKS AHEAD")];
    let given = |key| figures.get(key).is_some_and(|value| *value != Value::Bool(false) && !value.is_null());
    marks.into_iter().filter(|(key, _)| given(*key)).map(|(_, mark)| mark).collect()
}

/// On what a result was measured, where it says so.
pub(super) fn protocol(figures: &Figures) -> Option<Protocol> {
    let protocol = figures.get("protocol")?.as_object()?;
    let field = |name: &str| protocol.get(name).cloned().unwrap_or_default();
    let text = protocol.get("text").and_then(|text| text.get("blake3")).cloned().unwrap_or_default();
    Some([("text", text), ("ctx", field("ctx")), ("skip", field("skip")), ("scored", field("scored"))])
}
