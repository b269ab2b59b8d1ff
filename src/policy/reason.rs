//! Why a tensor got its encoding: what a manifest records of it beside the policy.

use serde::{Deserialize, Serialize};

use super::{MatchedRule, SizedAlternative};
use crate::encoding::Request;

/// What decided about one tensor, where the record of the policy does not say it. The JSON form is the field `reason` of a
/// tensor in the manifest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// What the policy went by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
    /// Why the encoding is not the one that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<Instead>,
}

/// What a policy went by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum By {
    /// The rule for the tensor's component.
    Rule(MatchedRule),
    /// Its rank.
    Importance(Rank),
    /// A line of the recipe.
    Recipe(RecipeLine),
    /// What it costs, and what else it could have been.
    Cost(Cost),
}

/// A tensor's place in a list of importances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rank {
    /// From 1, the most important.
    pub rank: usize,
    /// Tensors in the list.
    pub of: usize,
    pub score: f64,
    pub level: Level,
}

/// Which of the dynamic policy's encodings a rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    High,
    Middle,
    Low,
}

/// Where a recipe says what becomes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecipeLine {
    /// From 1.
    pub line: usize,
    /// The pattern that the name matches; absent where the line names the tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
}

/// The predicted cost of an encoding, and those that stand beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    pub cost: f64,
    /// Of the encodings that take fewer bytes, the one that adds the least cost for each byte it saves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smaller: Option<Neighbour>,
    /// Of the encodings that cost less, the one that saves the most cost for each byte it adds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub larger: Option<Neighbour>,
    /// Whether tensors that compute on the same input share the encoding, so that it was chosen for all of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub coupled: bool,
}

/// An encoding that a tensor could have had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Neighbour {
    /// As on the command line: `int4:g64`.
    pub encoding: String,
    pub bytes: u64,
    pub cost: f64,
}

impl Cost {
    /// What stands beside a choice; `None` where costs did not decide.
    pub fn of(alternatives: &[SizedAlternative], chosen: usize, coupled: bool) -> Option<Self> {
        let option = alternatives[chosen];
        let cost = option.alternative.cost?;
        let others = || alternatives.iter().filter_map(|other| Some((other, other.alternative.cost?)));
        // The cost of a byte on the way between two encodings.
        let price = |bytes: u64, costs: f64| (costs - cost).abs() / bytes.abs_diff(option.bytes) as f64;
        let neighbour = |(other, cost): (&SizedAlternative, f64)| Neighbour {
            encoding: other.alternative.request.to_string(),
            bytes: other.bytes,
            cost,
        };
        let smaller = others()
            .filter(|(other, costs)| other.bytes < option.bytes && *costs > cost)
            .min_by(|a, b| price(a.0.bytes, a.1).total_cmp(&price(b.0.bytes, b.1)));
        let larger = others()
            .filter(|(other, costs)| other.bytes > option.bytes && *costs < cost)
            .max_by(|a, b| price(a.0.bytes, a.1).total_cmp(&price(b.0.bytes, b.1)));
        Some(Self { cost, smaller: smaller.map(neighbour), larger: larger.map(neighbour), coupled })
    }
}

/// A tensor that is stored otherwise than asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instead {
    /// As on the command line: `int4:g64`.
    pub asked: String,
    #[serde(flatten)]
    pub why: Why,
}

impl Instead {
    /// The record of a request that was not met.
    pub fn of(asked: Request, why: Why) -> Self {
        Self { asked: asked.to_string(), why }
    }
}

/// What stood against the encoding that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Why {
    /// Codes and scales would take more bytes than the tensor has.
    Grows { columns: usize },
    /// The source is BF16, as large as FP16 and without a loss.
    LeftAsBf16,
    /// A value that FP16 cannot hold.
    Fp16Range { largest: f32 },
    /// NaN or infinite values, which only FP32 keeps as they are.
    NonFinite { count: usize },
}

impl Why {
    /// What stood against it, in a few words.
    pub const fn phrase(&self) -> &'static str {
        match self {
            Why::Grows { .. } => "would grow",
            Why::LeftAsBf16 => "BF16 already",
            Why::Fp16Range { .. } => "beyond FP16",
            Why::NonFinite { .. } => "NaN or infinity",
        }
    }

    /// What became of the tensor, as the end of a sentence that begins with its name.
    pub fn sentence(&self) -> String {
        match self {
            Why::Grows { columns } => {
                format!("would grow and is kept: its rows of {columns} are too short for scales")
            }
            Why::LeftAsBf16 => "is kept as BF16 where the policy says FP16: the same size, without a loss".into(),
            Why::Fp16Range { largest } => {
                format!("holds {largest}, which FP16 cannot hold, and is stored as BF16, in as many bytes")
            }
            Why::NonFinite { count } => format!("holds {count} NaN or infinite values and is kept as FP32"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::policy::Alternative;

    fn sized(options: &[(&str, u64, f64)]) -> Vec<SizedAlternative> {
        let option = |&(text, bytes, cost): &(&str, u64, f64)| SizedAlternative {
            alternative: Alternative { request: text.parse().unwrap(), named: false, cost: Some(cost) },
            bytes,
        };
        options.iter().map(option).collect()
    }

    #[test]
    fn neighbours_are_the_cheapest_steps() {
        // From int2 to int3:g64 each byte saves 0.608, which is more than int3 saves on the way.
        let options = sized(&[
            ("int2", 20, 10.),
            ("int3", 30, 4.0),
            ("int3:g64", 32, 2.7),
            ("int4", 40, 1.0),
            ("fp16", 160, 0.0),
        ]);
        let names = |chosen: usize| {
            let cost = Cost::of(&options, chosen, false).unwrap();
            (cost.smaller.map(|other| other.encoding), cost.larger.map(|other| other.encoding))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(names(0), (None, some("int3:g64")));
        assert_eq!(names(1), (some("int2:g128"), some("int3:g64")));
        assert_eq!(names(2), (some("int2:g128"), some("int4:g128")));
        assert_eq!(names(3), (some("int3:g64"), some("fp16")));
        assert_eq!(names(4), (some("int4:g128"), None));
        let unpriced = [SizedAlternative { alternative: Alternative::chosen(Request::Keep), bytes: 1 }];
        assert_eq!(Cost::of(&unpriced, 0, false), None);
    }

    #[test]
    fn the_json_form_is_small_and_reads_back() {
        let rank = Rank { rank: 3, of: 43, score: 1.5, level: Level::High };
        let instead = Instead::of("fp16".parse().unwrap(), Why::LeftAsBf16);
        let reason = Reason { by: Some(By::Importance(rank)), instead: Some(instead) };
        let value = serde_json::to_value(&reason).unwrap();
        let expected = json!({
            "by": { "kind": "importance", "rank": 3, "of": 43, "score": 1.5, "level": "high" },
            "instead": { "asked": "fp16", "why": "left_as_bf16" },
        });
        assert_eq!(value, expected);
        for by in [
            By::Rule(MatchedRule { pattern: "experts".into(), own: true }),
            By::Recipe(RecipeLine { line: 4, pattern: None }),
            By::Cost(Cost::of(&sized(&[("int4", 5, 0.25)]), 0, true).unwrap()),
        ] {
            let reason =
                Reason { by: Some(by), instead: Some(Instead::of(Request::Keep, Why::Fp16Range { largest: 7e4 })) };
            let text = serde_json::to_string(&reason).unwrap();
            assert_eq!(serde_json::from_str::<Reason>(&text).unwrap(), reason, "{text}");
        }
    }
}
