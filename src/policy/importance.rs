//! How much each tensor matters to the loss, measured on a calibration text: what a policy is given to choose by.

use std::{collections::HashSet, path::Path};

use serde::{Deserialize, Serialize};

use super::PolicyFile;
use crate::{
    error::{Error, Result},
    tensor::CalibrationText,
};

/// The version of the file that is written and read.
const VERSION: u32 = 1;

/// What the standardized figures weigh in the score: gradient, output variance, weight.
const SHARES: [f64; 3] = [0.5, 0.3, 0.2];

/// The importance of every quantizable tensor of a model. The JSON form is that of `bkpack importance`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Importance {
    pub version: u32,
    pub model: MeasuredModel,
    /// The calibration text.
    pub text: CalibrationText,
    /// Windows that were looked at.
    pub batches: u64,
    /// Tokens of a window.
    pub ctx: u64,
    /// The most important first.
    pub tensors: Vec<TensorImportance>,
}

/// The model that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredModel {
    /// The name of its folder or file.
    pub name: String,
    /// Over the names, shapes and values (as F32) of all tensors, in lowercase hex.
    pub blake3: String,
}

/// What was measured of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorImportance {
    pub name: String,
    pub component: String,
    /// The mean absolute gradient of a window's loss, over all elements and windows.
    pub gradient: f64,
    /// The variance of all values that products with the tensor (and, of an embedding, look-ups in it) gave.
    pub output_variance: f64,
    /// The mean absolute value.
    pub weight: f64,
    /// `0.5 gradient + 0.3 output_variance + 0.2 weight`, each standardized over all tensors.
    pub score: f64,
}

impl Importance {
    /// Sets the scores and sorts by them; tensors of equal scores stay in order.
    pub fn new(
        model: MeasuredModel,
        text: CalibrationText,
        (batches, ctx): (u64, u64),
        mut tensors: Vec<TensorImportance>,
    ) -> Self {
        let figures: [fn(&TensorImportance) -> f64; 3] =
            [|tensor| tensor.gradient, |tensor| tensor.output_variance, |tensor| tensor.weight];
        let figures = figures.map(|figure| standardized(tensors.iter().map(figure).collect()));
        for (index, tensor) in tensors.iter_mut().enumerate() {
            tensor.score = figures.iter().zip(SHARES).map(|(values, share)| share * values[index]).sum();
        }
        tensors.sort_by(|a, b| b.score.total_cmp(&a.score));
        Self { version: VERSION, model, text, batches, ctx, tensors }
    }

    /// Reads a file that `bkpack importance` wrote.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Importance`] for another version, or a tensor that is named twice.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&PolicyFile::read(path)?)
    }

    pub(super) fn parse(file: &PolicyFile) -> Result<Self> {
        let read: Self = file.json()?;
        let refuse = |why: String| Err(Error::Importance { path: file.path().to_owned(), why });
        if read.version != VERSION {
            return refuse(format!("version {} is not supported (this program knows version {VERSION})", read.version));
        }
        let mut names = HashSet::new();
        match read.tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            Some(twice) => refuse(format!("tensor {} is named twice", twice.name)),
            None => Ok(read),
        }
    }
}

/// Values less their mean, over their standard deviation; zeros where all are equal.
fn standardized(mut values: Vec<f64>) -> Vec<f64> {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let deviation = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
    // Equal values can differ from their mean by rounding, which must not be blown up.
    let rounding = mean.abs() * 1e-12;
    for value in &mut values {
        *value = if deviation > rounding { (*value - mean) / deviation } else { 0.0 };
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, figures: [f64; 3]) -> TensorImportance {
        let [gradient, output_variance, weight] = figures;
        let component = "other".into();
        TensorImportance { name: name.into(), component, gradient, output_variance, weight, score: 0.0 }
    }

    fn importance(tensors: Vec<TensorImportance>) -> Importance {
        let model = MeasuredModel { name: "model".into(), blake3: "0".repeat(64) };
        let text = CalibrationText { name: "text".into(), blake3: "1".repeat(64) };
        Importance::new(model, text, (2, 8), tensors)
    }

    #[test]
    fn scores_weigh_standardized_figures() {
        // Gradients 1, 3: standardized -1, 1; variances 4, 2: 1, -1; weights are equal.
        let found = importance(vec![tensor("a", [1.0, 4.0, 0.1]), tensor("b", [3.0, 2.0, 0.1])]);
        let [first, second] = found.tensors.as_slice() else { panic!("two tensors") };
        assert_eq!((first.name.as_str(), second.name.as_str()), ("b", "a"));
        assert!((first.score - 0.2).abs() < 1e-12 && (second.score + 0.2).abs() < 1e-12, "{first:?} {second:?}");
        assert_eq!(importance(vec![tensor("a", [1.0, 4.0, 0.1])]).tensors[0].score, 0.0);
    }

    #[test]
    fn what_was_written_is_read_and_what_was_not_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |importance: &Importance| {
            std::fs::write(file.path(), serde_json::to_vec(importance).unwrap()).unwrap();
            Importance::read(file.path())
        };
        let mut written = importance(vec![tensor("a", [1.0, 4.0, 0.125]), tensor("b", [3.0, 2.0, 0.25])]);
        assert_eq!(read(&written).unwrap(), written);
        written.tensors[1].name = "b".into();
        assert!(matches!(read(&written), Err(Error::Importance { why, .. }) if why.contains("b is named twice")));
        written.version = 2;
        assert!(matches!(read(&written), Err(Error::Importance { why, .. }) if why.contains("version 2")));
        std::fs::write(file.path(), "{}").unwrap();
        assert!(matches!(Importance::read(file.path()), Err(Error::Json { .. })));
    }
}
