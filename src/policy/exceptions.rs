//! Exceptions by name, which hold whatever the policy.

use regex::Regex;
use serde_json::{Value, json};

use super::components::{PLAIN, pattern};
use crate::{
    encoding::Request,
    error::{Error, Result},
};

/// Tensors that the user names one by one or by pattern.
#[derive(Debug, Default)]
pub struct Exceptions {
    keep: Vec<Regex>,
    overrides: Vec<(Regex, Request)>,
}

/// What an option says of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception<'a> {
    /// `--keep` or `--tensor`.
    pub option: &'static str,
    pub pattern: &'a str,
    pub request: Request,
}

impl Exceptions {
    /// `keep` are patterns of names to leave at their source precision; `overrides` are `PATTERN=ENCODING`, of which
    /// the last that matches decides, before `keep`.
    ///
    /// # Errors
    /// A pattern or an encoding that does not parse.
    pub fn new(keep: &[String], overrides: &[String]) -> Result<Self> {
        let keep = keep.iter().map(|text| pattern(text)).collect::<Result<_>>()?;
        let overrides = overrides
            .iter()
            .map(|text| {
                let (name, encoding) = text.rsplit_once('=').ok_or_else(|| Error::Option {
                    option: "--tensor",
                    why: format!("{text:?} is not of the form 'PATTERN=ENCODING'"),
                })?;
                Ok((pattern(name)?, encoding.parse()?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { keep, overrides })
    }

    /// What the user wants of a tensor; `None` where that is up to the policy. Quantizing
    /// applies to matrices alone: a plain tensor is left alone unless an override asks for another float type.
    pub fn find(&self, name: &str, component: &str) -> Option<Exception<'_>> {
        let named = self.overrides.iter().rev().find(|(pattern, _)| pattern.is_match(name));
        match named {
            Some((_, Request::Quantize { .. })) if component == PLAIN => None,
            Some((pattern, request)) => {
                Some(Exception { option: "--tensor", pattern: pattern.as_str(), request: *request })
            }
            None => {
                let kept = self.keep.iter().find(|pattern| pattern.is_match(name));
                kept.map(|pattern| Exception { option: "--keep", pattern: pattern.as_str(), request: Request::Keep })
            }
        }
    }

    /// The exceptions that a policy's record in a manifest holds, which may be none of this program's making.
    ///
    /// # Errors
    /// A pattern or an encoding that does not parse.
    pub(super) fn of_record(policy: &Value) -> Result<Self> {
        let texts = |key: &str| -> Vec<String> {
            let texts = policy.get(key).and_then(Value::as_array).into_iter().flatten();
            texts.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let (keep, overrides) = (texts("keep"), texts("tensor"));
        // What compiling patterns may take is bounded: a file must not decide how much memory a look at it needs.
        const MOST_BYTES: usize = 1 << 14;
        match keep.iter().chain(&overrides).map(String::len).sum::<usize>() {
            bytes if bytes > MOST_BYTES => Err(Error::Pattern {
                pattern: format!("{bytes} bytes of patterns"),
                why: format!("more than {MOST_BYTES} are not looked at"),
            }),
            _ => Self::new(&keep, &overrides),
        }
    }

    /// A pattern that matches none of the names: most likely a typing error.
    ///
    /// # Errors
    /// The first such pattern.
    pub fn check_patterns(&self, names: &[String]) -> Result<()> {
        let patterns = self.keep.iter().chain(self.overrides.iter().map(|(pattern, _)| pattern));
        for pattern in patterns {
            if !names.iter().any(|name| pattern.is_match(name)) {
                return Err(Error::Pattern {
                    pattern: pattern.to_string(),
                    why: "matches no tensor of the checkpoint".into(),
                });
            }
        }
        Ok(())
    }

    /// Adds the patterns to a policy's record.
    pub(super) fn record(&self, policy: &mut Value) {
        policy["keep"] = self.keep.iter().map(Regex::as_str).collect();
        let texts = self.overrides.iter().map(|(pattern, request)| json!(format!("{pattern}={request}")));
        policy["tensor"] = texts.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_come_before_keep_and_plain_tensors_are_not_quantized() {
        let text = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let exceptions =
            Exceptions::new(&text(&["embed"]), &text(&["layers=int8:g64", r"layers\.0=int3", "norm=fp32"])).unwrap();
        let request = |name, component| {
            exceptions.find(name, component).map_or_else(|| "policy".into(), |found| found.request.to_string())
        };
        assert_eq!(request("lm_head.weight", "output"), "policy");
        assert_eq!(request("embed.weight", "embedding"), "keep");
        assert_eq!(request("layers.0.q.weight", "other"), "int3:g128");
        assert_eq!(request("layers.1.q.weight", "other"), "int8:g64");
        assert_eq!(request("layers.1.bias", PLAIN), "policy");
        assert_eq!(request("norm.weight", PLAIN), "fp32");
        assert!(exceptions.check_patterns(&text(&["embed", "norm", "layers.1"])).is_err());
    }

    #[test]
    fn broken_patterns_are_named() {
        assert!(Exceptions::new(&["(".into()], &[]).unwrap_err().to_string().contains("\"(\""));
        assert!(Exceptions::new(&[], &["abc".into()]).is_err());
    }
}
