//! The uniform policy: one encoding for every matrix, with exceptions by name.

use regex::Regex;
use serde_json::{Value, json};

use super::components::{PLAIN, pattern};
use crate::{
    encoding::Request,
    error::{Error, Result},
};

/// One encoding for every matrix, embeddings and head included, unless a pattern says otherwise.
#[derive(Debug)]
pub struct Uniform {
    default: Request,
    keep: Vec<Regex>,
    overrides: Vec<(Regex, Request)>,
}

impl Uniform {
    /// `keep` are patterns of names to leave at their source precision; `overrides` are `PATTERN=ENCODING`, of which
    /// the last that matches decides, before `keep`.
    ///
    /// # Errors
    /// A pattern or an encoding that does not parse.
    pub fn new(default: Request, keep: &[String], overrides: &[String]) -> Result<Self> {
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
        Ok(Self { default, keep, overrides })
    }

    /// What a tensor is to become. Quantizing applies to matrices alone: a plain tensor is kept unless an override
    /// asks for another float type.
    pub fn request(&self, name: &str, component: &str) -> Request {
        let named =
            self.overrides.iter().rev().find(|(pattern, _)| pattern.is_match(name)).map(|(_, request)| *request);
        match (named, component) {
            (Some(request @ (Request::Keep | Request::Float(_))), _) => request,
            (_, PLAIN) => Request::Keep,
            (Some(request), _) => request,
            (None, _) if self.keep.iter().any(|pattern| pattern.is_match(name)) => Request::Keep,
            (None, _) => self.default,
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

    /// The record for the manifest.
    pub fn record(&self) -> Value {
        let keep: Vec<String> = self.keep.iter().map(Regex::to_string).collect();
        let overrides: Vec<String> =
            self.overrides.iter().map(|(pattern, request)| format!("{pattern}={request}")).collect();
        json!({ "name": "uniform", "encoding": self.default.to_string(), "keep": keep, "tensor": overrides })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_come_before_keep_and_plain_tensors_are_not_quantized() {
        let text = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let policy = Uniform::new(
            "int4".parse().unwrap(),
            &text(&["embed"]),
            &text(&["layers=int8:g64", r"layers\.0=int3", "norm=fp32"]),
        )
        .unwrap();
        let request = |name, component| policy.request(name, component).to_string();
        assert_eq!(request("lm_head.weight", "output"), "int4:g128");
        assert_eq!(request("embed.weight", "embedding"), "keep");
        assert_eq!(request("layers.0.q.weight", "other"), "int3:g128");
        assert_eq!(request("layers.1.q.weight", "other"), "int8:g64");
        assert_eq!(request("layers.1.bias", PLAIN), "keep");
        assert_eq!(request("norm.weight", PLAIN), "fp32");
        assert!(policy.check_patterns(&text(&["embed", "norm", "layers.1"])).is_err());
    }

    #[test]
    fn broken_patterns_are_named() {
        assert!(Uniform::new(Request::Keep, &["(".into()], &[]).unwrap_err().to_string().contains("\"(\""));
        assert!(Uniform::new(Request::Keep, &[], &["abc".into()]).is_err());
    }
}
