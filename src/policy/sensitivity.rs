//! What each encoding of each tensor costs, measured or estimated elsewhere.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Alternative, PolicyFile, TensorInfo, check_version, match_names};
use crate::{encoding::Request, error::Result};

/// The cost of encodings, tensor by tensor. The JSON form is `sensitivity.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// 1.
    pub version: u64,
    pub tensors: Vec<TensorSensitivity>,
}

/// The encodings to choose from for one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSensitivity {
    pub name: String,
    pub options: Vec<Cost>,
}

/// What one encoding costs: the lower, the better. Costs of tensors add up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// As on the command line: `int4:g64`.
    pub encoding: String,
    pub cost: f64,
}

/// A table of costs that was checked.
#[derive(Clone, Debug)]
pub struct SensitivityTable {
    file: PolicyFile,
    names: Vec<String>,
    options: Vec<Vec<Alternative>>,
}

impl SensitivityTable {
    /// Parses `sensitivity.json`.
    ///
    /// # Errors
    /// What does not parse, a version that is not 1, an encoding that is not understood or listed twice, a tensor
    /// without any.
    pub fn parse(file: PolicyFile) -> Result<Self> {
        let Sensitivity { version, tensors } = file.json()?;
        check_version(&file, version)?;
        let (mut names, mut options) = (Vec::new(), Vec::new());
        for TensorSensitivity { name, options: costs } in tensors {
            let wrong = |why: String| file.error(format!("tensor {name:?}: {why}"));
            let mut alternatives: Vec<Alternative> = Vec::new();
            for Cost { encoding, cost } in costs {
                let request: Request = encoding.parse().map_err(|error| wrong(format!("{error}")))?;
                if alternatives.iter().any(|known| known.request == request) {
                    return Err(wrong(format!("{encoding} is listed twice")));
                }
                alternatives.push(Alternative { request, named: false, cost: Some(cost) });
            }
            if alternatives.is_empty() {
                return Err(wrong("has no options".into()));
            }
            names.push(name);
            options.push(alternatives);
        }
        Ok(Self { file, names, options })
    }

    /// The options of every tensor; plain ones are kept.
    ///
    /// # Errors
    /// A table that lacks a matrix or names one that is not there.
    pub(super) fn alternatives(&self, tensors: &[TensorInfo]) -> Result<Vec<Vec<Alternative>>> {
        let matched = match_names(&self.file, self.names.iter().map(String::as_str), tensors)?;
        let options = matched.into_iter().map(|matched| match matched {
            None => vec![Alternative::chosen(Request::Keep)],
            Some(index) => self.options[index].clone(),
        });
        Ok(options.collect())
    }

    /// Its name and hash, for the manifest.
    pub(super) fn record(&self) -> Value {
        self.file.record()
    }

    /// An error about it.
    pub(super) fn error(&self, why: String) -> crate::Error {
        self.file.error(why)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::{PLAIN, tests::tensor};

    fn parse(text: &str) -> Result<SensitivityTable> {
        SensitivityTable::parse(PolicyFile::new(Path::new("costs.json"), text.into())?)
    }

    #[test]
    fn options_are_found_by_name() {
        let table = parse(
            r#"{"version": 1, "tensors": [{"name": "a", "options": [{"encoding": "int4:g64", "cost": 0.5},
                {"encoding": "fp16", "cost": 0}]}]}"#,
        )
        .unwrap();
        let tensors = [tensor("norm", &[64], PLAIN), tensor("a", &[64, 64], "other")];
        let found = table.alternatives(&tensors).unwrap();
        assert_eq!(found[0], [Alternative::chosen(Request::Keep)]);
        let text: Vec<_> = found[1].iter().map(|option| (option.request.to_string(), option.cost)).collect();
        assert_eq!(text, [("int4:g64".to_owned(), Some(0.5)), ("fp16".to_owned(), Some(0.0))]);
        assert!(table.alternatives(&tensors[..1]).unwrap_err().to_string().contains("\"a\""));
        let more = [tensors[1].clone(), tensor("b", &[64, 64], "other")];
        assert!(table.alternatives(&more).unwrap_err().to_string().contains("\"b\""));
    }

    #[test]
    fn broken_tables_are_refused() {
        for (tensors, word) in [
            (r#"{"name": "a", "options": [{"encoding": "int9", "cost": 1}]}"#, "int9"),
            (
                r#"{"name": "a", "options": [{"encoding": "int4", "cost": 1}, {"encoding": "int4:g128", "cost": 2}]}"#,
                "twice",
            ),
            (r#"{"name": "a", "options": []}"#, "no options"),
            (r#"{"name": "a", "options": [{"encoding": "int4", "cost": 1e999}]}"#, "out of range"),
        ] {
            let message = parse(&format!(r#"{{"version": 1, "tensors": [{tensors}]}}"#)).unwrap_err().to_string();
            assert!(message.starts_with("costs.json: ") && message.contains(word), "{message}");
        }
        assert!(parse(r#"{"version": 3, "tensors": []}"#).unwrap_err().to_string().contains("version 3"));
    }
}
