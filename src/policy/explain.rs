//! Why a tensor of a packed file has its encoding, in words: from the record of the policy, and from what is recorded of
//! the tensor itself.

use serde_json::Value;

use super::{
    Exception, Exceptions, PLAIN,
    reason::{By, Cost, Level, Neighbour, Rank, Reason, RecipeLine},
};
use crate::{
    encoding::{Encoding, FloatName, Request},
    error::{long, short},
    tensor::ActivationQuantization,
};

/// Explains the tensors of one file.
#[derive(Debug)]
pub struct Explainer<'a> {
    policy: &'a Value,
    activations: &'a [ActivationQuantization],
    exceptions: Exceptions,
}

/// What a packed file says of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub name: &'a str,
    pub component: &'a str,
    pub encoding: Encoding,
    pub bytes: u64,
    /// The field `reason` of the manifest.
    pub reason: Option<&'a Value>,
}

/// Why a tensor has its encoding.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// In a few words, for a table.
    pub phrase: String,
    /// In full sentences.
    pub sentence: String,
    /// What was asked for, where the file says it: `int4:g64`.
    pub asked: Option<String>,
    /// What the file records of the tensor.
    pub recorded: Option<Reason>,
}

/// What decided, in words.
struct Cause {
    phrase: String,
    sentence: String,
    asked: Option<Request>,
}

impl<'a> Explainer<'a> {
    /// For a file whose manifest holds this record of its policy and these of its activations.
    pub fn new(policy: &'a Value, activations: &'a [ActivationQuantization]) -> Self {
        // Patterns that do not parse are none of this program's: what they did is not known then.
        let exceptions = Exceptions::of_record(policy).unwrap_or_default();
        Self { policy, activations, exceptions }
    }

    /// The name of the policy, as the file has it.
    pub fn policy_name(&self) -> Option<&'a str> {
        self.policy.get("name")?.as_str()
    }

    /// What the policy does, in a sentence.
    pub fn policy(&self) -> String {
        let request = |key: &str| match self.policy.get(key).and_then(Value::as_str) {
            Some(text) => short(text).to_string(),
            None => "an encoding that is not recorded".into(),
        };
        match self.policy_name() {
            Some("uniform") => format!("One encoding for every matrix, {}.", request("encoding")),
            Some("component") => {
                let encodings = self.policy.get("encodings").and_then(Value::as_object);
                let encodings = encodings.into_iter().flatten().filter_map(|(component, request)| {
                    Some(format!("{} {}", short(component), short(request.as_str()?)))
                });
                format!("The component of a tensor decides: {}.", encodings.collect::<Vec<_>>().join(", "))
            }
            Some("dynamic") => format!(
                "Importance decides, as measured in {}: {} become {}, {} become {}, the others {}.",
                self.file("importance"),
                self.share("high_ratio", "the most important"),
                request("high"),
                self.share("low_ratio", "the least important"),
                request("low"),
                request("middle")
            ),
            Some("recipe") => format!("The recipe {} says what becomes of each tensor.", self.file("recipe")),
            Some("budget") => {
                format!("The mix of least predicted cost ({}) in a file {}.", self.file("sensitivity"), self.target())
            }
            Some(name) => format!("The policy {:?}, which this version does not know.", short(name)),
            None => "The file does not say how its encodings were chosen.".into(),
        }
    }

    /// Why a tensor has its encoding. A file of an older version says less, and so does the explanation.
    pub fn explain(&self, subject: &Subject) -> Explanation {
        let recorded: Option<Reason> = subject.reason.and_then(|value| serde_json::from_value(value.clone()).ok());
        let by = recorded.as_ref().and_then(|reason| reason.by.as_ref());
        let Cause { mut phrase, mut sentence, asked } = self.cause(subject, by);
        let instead = recorded.as_ref().and_then(|reason| reason.instead.as_ref());
        match (instead, asked) {
            (Some(instead), _) => {
                phrase = format!("{phrase}; {}", instead.why.phrase());
                sentence = format!("{sentence} But the tensor {}.", instead.why.sentence());
            }
            (None, Some(asked)) if !serves(subject.encoding, asked) => {
                phrase = format!("{phrase}; stored otherwise");
                sentence =
                    format!("{sentence} It is stored as {} all the same: the file does not say why.", subject.encoding);
            }
            _ => {}
        }
        let asked = instead.map(|instead| instead.asked.clone()).or_else(|| asked.map(|asked| asked.to_string()));
        Explanation { phrase, sentence, asked, recorded }
    }

    fn cause(&self, subject: &Subject, by: Option<&By>) -> Cause {
        if let Some(record) = self.activations.iter().find(|record| record.scales.iter().any(|n| n == subject.name)) {
            let text = short(&record.text.name);
            let sentence = format!(
                "Holds the scales with which activations of {} are rounded to {} bits, calibrated on {text}.",
                short(&record.component),
                record.bits
            );
            return Cause { phrase: "scales of activations".into(), sentence, asked: None };
        }
        if let Some(exception) = self.exceptions.find(subject.name, subject.component) {
            return by_option(exception);
        }
        match (self.policy_name(), by) {
            (Some("component"), by) => self.component(subject, by),
            (_, None) if subject.component == PLAIN => Cause {
                phrase: "plain".into(),
                sentence: "A vector, a tiny matrix or one that no policy quantizes: it stays at its source precision."
                    .into(),
                asked: Some(Request::Keep),
            },
            (Some("dynamic"), Some(By::Importance(rank))) => self.importance(rank),
            (Some("recipe"), Some(By::Recipe(line))) => self.recipe_line(line),
            (Some("budget"), Some(By::Cost(cost))) => self.cost(subject, cost),
            (Some("uniform"), _) => {
                let asked = self.request(&["encoding"]);
                let encoding = asked.map_or_else(|| "the same encoding".into(), |request| request.to_string());
                let sentence = format!("--policy uniform gives every matrix {encoding}.");
                Cause { phrase: "uniform".into(), sentence, asked }
            }
            (Some(name @ ("dynamic" | "recipe" | "budget")), _) => {
                let went_by = match name {
                    "dynamic" => format!("its rank by importance in {}", self.file("importance")),
                    "recipe" => format!("the recipe {}", self.file("recipe")),
                    _ => format!("the costs of {}", self.file("sensitivity")),
                };
                let sentence = format!("--policy {name} chose it by {went_by}; the file does not record more.");
                Cause { phrase: name.into(), sentence, asked: None }
            }
            (Some(name), _) => {
                let name = short(name);
                let sentence = format!("The file was packed by policy {name:?}, which this version does not know.");
                Cause { phrase: format!("policy {name}"), sentence, asked: None }
            }
            (None, _) => Cause {
                phrase: "not recorded".into(),
                sentence: "The file does not say how its encodings were chosen.".into(),
                asked: None,
            },
        }
    }

    fn component(&self, subject: &Subject, by: Option<&By>) -> Cause {
        let component = short(subject.component);
        let asked = self.request(&["encodings", subject.component]);
        let becomes = asked.map_or_else(|| "an encoding of its own".into(), |request| request.to_string());
        let rules = self.policy.get("rules").map(|_| self.file("rules"));
        let why = match by {
            Some(By::Rule(rule)) => {
                let source =
                    if rule.own { rules.as_deref().unwrap_or("a file of rules") } else { "the built-in rules" };
                format!("the tensor's name matches {:?} in {source}", long(&rule.pattern))
            }
            _ if subject.component == PLAIN => "a vector or a tiny matrix".into(),
            _ => match &rules {
                Some(rules) => format!("by the built-in rules under those of {rules}"),
                None => "by the built-in rules".into(),
            },
        };
        Cause {
            phrase: format!("component {component}"),
            sentence: format!("--policy component makes component {component} {becomes}; {why}."),
            asked,
        }
    }

    fn importance(&self, rank: &Rank) -> Cause {
        let Rank { rank, of, score, level } = rank;
        let (name, place) = match level {
            Level::High => ("high", self.share("high_ratio", "among the most important")),
            Level::Low => ("low", self.share("low_ratio", "among the least important")),
            Level::Middle => ("middle", "between the most and the least important".into()),
        };
        let asked = self.request(&[name]);
        let becomes = asked.map_or_else(String::new, |request| format!(", which become {request}"));
        Cause {
            phrase: format!("rank {rank} of {of}, score {score:+.3}: {name}"),
            sentence: format!(
                "Rank {rank} of {of} by importance (score {score:+.3} in {}): {place}{becomes}.",
                self.file("importance")
            ),
            asked,
        }
    }

    fn share(&self, key: &str, words: &str) -> String {
        match self.policy.get(key).and_then(Value::as_f64) {
            Some(share) => format!("{words} {} %", 100.0 * share),
            None => words.to_owned(),
        }
    }

    fn recipe_line(&self, RecipeLine { line, pattern }: &RecipeLine) -> Cause {
        let file = self.file("recipe");
        match pattern {
            None => Cause {
                phrase: format!("line {line} of the recipe"),
                sentence: format!("Line {line} of {file} names it."),
                asked: None,
            },
            Some(pattern) => Cause {
                phrase: format!("line {line} of the recipe, pattern '{}'", short(pattern)),
                sentence: format!(
                    "Pattern '{}' in line {line} of {file} is the last that matches its name, which no line spells out.",
                    long(pattern)
                ),
                asked: None,
            },
        }
    }

    fn cost(&self, subject: &Subject, cost: &Cost) -> Cause {
        let within = self.target();
        let shared = if cost.coupled { ", together with the tensors that work on the same input" } else { "" };
        let adopted = self.policy.get("adopted").and_then(Value::as_str);
        let mix = match adopted {
            None => format!("the mix of least predicted cost in a file {within}{shared}"),
            Some(name) => format!(
                "a mix that needs no data ({}), which was measured to cost less than that of least predicted cost in a \
                 file {within}",
                short(name)
            ),
        };
        let mut sentence =
            format!("Part of {mix}: this tensor costs {} in {} bytes.", scientific(cost.cost), subject.bytes);
        let step = |other: &Neighbour| {
            let (bytes, costs) = (other.bytes.abs_diff(subject.bytes), (other.cost - cost.cost).abs());
            let price =
                if bytes > 0 { format!(", {} a byte", scientific(costs / bytes as f64)) } else { String::new() };
            (short(&other.encoding).to_string(), bytes, format!("{}{price}", scientific(costs)))
        };
        if let Some(smaller) = &cost.smaller {
            let (name, bytes, price) = step(smaller);
            sentence += &format!(" The next smaller, {name}, saves {bytes} bytes and costs {price} more.");
        }
        if let Some(larger) = &cost.larger {
            let (name, bytes, price) = step(larger);
            sentence += &format!(" The next larger, {name}, takes {bytes} bytes more and saves {price}.");
        }
        Cause { phrase: format!("predicted cost {}", scientific(cost.cost)), sentence, asked: None }
    }

    /// The size that a budget was asked to keep.
    fn target(&self) -> String {
        let target = self.policy.get("target");
        let figure = |key: &str| target.and_then(|target| target.get(key)?.as_f64());
        match (figure("ratio"), figure("bits_per_weight"), figure("bytes")) {
            (Some(ratio), _, _) => format!("at least {ratio} times smaller than FP32"),
            (_, Some(bits), _) => format!("of at most {bits} bits a weight"),
            (_, _, Some(bytes)) => format!("of at most {bytes} bytes"),
            _ => "of the size that was asked for".into(),
        }
    }

    /// A request in the policy's record.
    fn request(&self, path: &[&str]) -> Option<Request> {
        path.iter().try_fold(self.policy, |value, key| value.get(key))?.as_str()?.parse().ok()
    }

    /// The name of a file in the policy's record.
    fn file(&self, key: &str) -> String {
        let name = self.policy.get(key).and_then(|file| file.get("name")?.as_str());
        name.map_or_else(|| "a file".into(), |name| short(name).to_string())
    }
}

fn by_option(Exception { option, pattern, request }: Exception) -> Cause {
    let encoding = if option == "--tensor" { format!("={request}") } else { String::new() };
    let does = if request == Request::Keep { "leaves it at its source precision" } else { "asks for it" };
    Cause {
        phrase: format!("{option} '{}{encoding}'", short(pattern)),
        sentence: format!("{option} '{}{encoding}' {does}, whatever the policy.", long(pattern)),
        asked: Some(request),
    }
}

/// Whether an encoding is what a request asks for.
fn serves(encoding: Encoding, request: Request) -> bool {
    match (request, encoding) {
        (Request::Keep, encoding) => encoding.layout().is_none(),
        (Request::Float(dtype), Encoding::Float { dtype: found }) => FloatName::from(dtype) == found,
        (Request::Quantize { grid, .. }, encoding) => encoding.layout().is_some_and(|(layout, _)| layout.grid == grid),
        _ => false,
    }
}

fn scientific(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value:.3e}") }
}
