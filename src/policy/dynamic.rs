//! The dynamic policy: tensors ranked by importance, the first at high precision, the last at low.

use std::cmp::Ordering;

use serde_json::{Value, json};

use super::{
    PolicyFile, TensorInfo,
    importance::{Importance, TensorImportance},
    match_names,
    reason::{Level, Rank},
};
use crate::{
    encoding::Request,
    error::{Error, Result},
    tensor::natural_order,
};

/// What becomes of the first, the last and the other tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    /// The share of tensors that are `high`, and that are `low`; by count, rounded to the nearest whole number.
    pub high_ratio: f64,
    pub low_ratio: f64,
    pub high: Request,
    pub middle: Request,
    pub low: Request,
}

/// Encodings by rank in a list of importances.
#[derive(Clone, Debug)]
pub struct Dynamic {
    importance: Importance,
    file: PolicyFile,
    levels: Levels,
}

impl Dynamic {
    /// Ranks by the scores of `importance.json`.
    ///
    /// # Errors
    /// As [`Importance::read`]; ratios that are no shares, or that are more than one together.
    pub fn parse(file: PolicyFile, levels: Levels) -> Result<Self> {
        let importance = Importance::parse(&file)?;
        for (option, ratio) in [("--high-ratio", levels.high_ratio), ("--low-ratio", levels.low_ratio)] {
            if !(0.0..=1.0).contains(&ratio) {
                return Err(Error::Option { option, why: format!("{ratio} is not between 0 and 1") });
            }
        }
        if levels.high_ratio + levels.low_ratio > 1.0 {
            let why = format!("{} and --high-ratio {} are more than 1 together", levels.low_ratio, levels.high_ratio);
            return Err(Error::Option { option: "--low-ratio", why });
        }
        Ok(Self { importance, file, levels })
    }

    /// What every tensor is to become, and its rank, which plain tensors have none of.
    ///
    /// # Errors
    /// A list that lacks a matrix or names one that is not there.
    pub(super) fn ranked(&self, tensors: &[TensorInfo]) -> Result<Vec<(Request, Option<Rank>)>> {
        let entries = &self.importance.tensors;
        let matched = match_names(&self.file, entries.iter().map(|entry| entry.name.as_str()), tensors)?;
        let mut ranking: Vec<&TensorImportance> = entries.iter().collect();
        ranking.sort_by(|a, b| match b.score.total_cmp(&a.score) {
            Ordering::Equal => natural_order(&a.name, &b.name),
            order => order,
        });
        let (high, low) = counts(ranking.len(), &self.levels);
        let ranked = |name: &str| {
            let place = ranking.iter().position(|entry| entry.name == name).expect("every entry is ranked");
            let (level, request) = match place {
                _ if place < high => (Level::High, self.levels.high),
                _ if place >= ranking.len() - low => (Level::Low, self.levels.low),
                _ => (Level::Middle, self.levels.middle),
            };
            let rank = Rank { rank: place + 1, of: ranking.len(), score: ranking[place].score, level };
            (request, Some(rank))
        };
        let ranked = tensors.iter().zip(matched).map(|(tensor, matched)| match matched {
            None => (Request::Keep, None),
            Some(_) => ranked(&tensor.name),
        });
        Ok(ranked.collect())
    }

    /// The record for the manifest.
    pub(super) fn record(&self) -> Value {
        let (levels, importance) = (&self.levels, &self.importance);
        json!({
            "name": "dynamic",
            "high_ratio": levels.high_ratio,
            "low_ratio": levels.low_ratio,
            "high": levels.high.to_string(),
            "middle": levels.middle.to_string(),
            "low": levels.low.to_string(),
            "importance": self.file.record(),
            "text": importance.text,
            "batches": importance.batches,
            "ctx": importance.ctx,
        })
    }
}

/// How many of `total` tensors are high and low: rounded to the nearest, halves up, the high ones first.
fn counts(total: usize, levels: &Levels) -> (usize, usize) {
    let share = |ratio: f64| (ratio * total as f64).round() as usize;
    let high = share(levels.high_ratio).min(total);
    (high, share(levels.low_ratio).min(total - high))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        policy::{PLAIN, importance::MeasuredModel, tests::tensor},
        tensor::CalibrationText,
    };

    fn list(scores: &[(&str, f64)]) -> PolicyFile {
        let entry = |&(name, score): &(&str, f64)| TensorImportance {
            name: name.into(),
            component: "other".into(),
            gradient: 1.0,
            output_variance: 1.0,
            weight: 1.0,
            score,
        };
        let importance = Importance {
            version: 1,
            model: MeasuredModel { name: "model".into(), blake3: String::new() },
            text: CalibrationText { name: "text".into(), blake3: String::new() },
            batches: 4,
            ctx: 128,
            tensors: scores.iter().map(entry).collect(),
        };
        PolicyFile::new(Path::new("importance.json"), serde_json::to_vec(&importance).unwrap()).unwrap()
    }

    fn levels(high_ratio: f64, low_ratio: f64) -> Levels {
        let request = |text: &str| text.parse().unwrap();
        Levels { high_ratio, low_ratio, high: request("fp16"), middle: request("int8"), low: request("int4") }
    }

    fn requests(scores: &[(&str, f64)], levels: Levels, names: &[&str]) -> Result<Vec<String>> {
        let tensors: Vec<_> = names
            .iter()
            .map(|name| match name.starts_with("norm") {
                true => tensor(name, &[64], PLAIN),
                false => tensor(name, &[64, 64], "other"),
            })
            .collect();
        let ranked = Dynamic::parse(list(scores), levels)?.ranked(&tensors)?;
        Ok(ranked.iter().map(|(request, _)| request.to_string()).collect())
    }

    #[test]
    fn the_first_fifth_is_high_and_the_last_two_fifths_are_low() {
        let scores = [
            ("t0", 0.3),
            ("t1", -1.0),
            ("t2", 2.0),
            ("t3", 0.1),
            ("t4", -0.2),
            ("t5", 1.5),
            ("t6", 0.0),
            ("t7", -3.0),
            ("t8", 0.2),
            ("t9", -0.1),
        ];
        let names = ["norm", "t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8", "t9"];
        // In falling order: t2 t5 | t0 t8 t3 t6 | t9 t4 t1 t7.
        let expected = ["keep", "int8", "int4", "fp16", "int8", "int4", "fp16", "int8", "int4", "int8", "int4"];
        let expected: Vec<_> = expected.map(|text| text.parse::<Request>().unwrap().to_string()).into();
        assert_eq!(requests(&scores, levels(0.2, 0.4), &names).unwrap(), expected);
    }

    #[test]
    fn ties_go_by_name_and_counts_to_the_nearest() {
        let names = ["t1", "t2", "t3", "t10"];
        let tied = names.map(|name| (name, 0.5));
        // 0.375 of four tensors is one and a half: two.
        let found = requests(&tied, levels(0.375, 0.25), &names).unwrap();
        assert_eq!(found, ["fp16", "fp16", "int8:g128", "int4:g128"]);
        assert_eq!(counts(43, &levels(0.2, 0.4)), (9, 17));
        assert_eq!(counts(1, &levels(0.5, 0.5)), (1, 0));
        assert_eq!(counts(0, &levels(0.5, 0.5)), (0, 0));
    }

    #[test]
    fn a_list_that_does_not_fit_is_refused_by_name() {
        let fit = |scores: &[(&str, f64)]| requests(scores, levels(0.2, 0.4), &["norm", "t1", "t2"]);
        assert!(fit(&[("t2", 1.0), ("t1", 2.0)]).is_ok());
        for (scores, words) in [
            (&[("t1", 1.0)][..], "\"t2\" of the checkpoint is missing"),
            (&[("t1", 1.0), ("t2", 1.0), ("t3", 1.0)], "\"t3\" is none"),
            (&[("t1", 1.0), ("t2", 1.0), ("norm", 1.0)], "\"norm\" is a vector"),
            (&[("t1", 1.0), ("t2", 1.0), ("t1", 1.0)], "t1 is named twice"),
        ] {
            let message = fit(scores).unwrap_err().to_string();
            assert!(message.contains("importance.json") && message.contains(words), "{message}");
        }
    }

    #[test]
    fn ratios_are_shares() {
        for (high, low) in [(-0.1, 0.4), (0.2, 1.1), (0.6, 0.5), (f64::NAN, 0.1)] {
            assert!(Dynamic::parse(list(&[]), levels(high, low)).is_err(), "{high} {low}");
        }
    }
}
