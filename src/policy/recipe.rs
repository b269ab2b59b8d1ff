//! Recipes: which tensor gets which encoding, in a file to read and to edit.

use std::{collections::BTreeMap, fmt::Write as _, ops::Range};

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};
use toml::Spanned;

use super::{PLAIN, PolicyFile, TensorInfo, check_version, components::pattern, reason::RecipeLine};
use crate::{
    encoding::Request,
    error::{Error, Result},
};

/// Encodings by name, and by pattern for what has none by name.
#[derive(Clone, Debug)]
pub struct Recipe {
    file: PolicyFile,
    names: BTreeMap<String, Entry>,
    /// In the order of the file; the last that matches decides.
    patterns: Vec<(Regex, Entry)>,
}

#[derive(Clone, Debug)]
struct Entry {
    request: Request,
    /// Where it stands in the file.
    span: Range<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    version: u64,
    #[serde(default)]
    tensors: BTreeMap<Spanned<String>, Spanned<String>>,
    #[serde(default)]
    patterns: BTreeMap<Spanned<String>, Spanned<String>>,
}

impl Recipe {
    /// Parses a recipe.
    ///
    /// # Errors
    /// What does not parse, a pattern or an encoding that does not, a version that is not 1; with its line.
    pub fn parse(file: PolicyFile) -> Result<Self> {
        let Table { version, tensors, patterns } = file.toml()?;
        check_version(&file, version)?;
        let entry = |key: &Spanned<String>, text: Spanned<String>| {
            let request = text.get_ref().parse();
            let request = request.map_err(|error| file.error_at(text.span(), format!("{}: {error}", key.get_ref())))?;
            Ok::<_, Error>(Entry { request, span: key.span() })
        };
        let names = tensors.into_iter().map(|(name, text)| {
            let entry = entry(&name, text)?;
            Ok((name.into_inner(), entry))
        });
        let names = names.collect::<Result<_>>()?;
        let patterns = patterns.into_iter().map(|(text, encoding)| {
            let found = pattern(text.get_ref()).map_err(|error| file.error_at(text.span(), error.to_string()))?;
            Ok((found, entry(&text, encoding)?))
        });
        let mut patterns = patterns.collect::<Result<Vec<_>>>()?;
        patterns.sort_by_key(|(_, entry)| entry.span.start);
        Ok(Self { file, names, patterns })
    }

    /// What every tensor is to become, and the line that says so; a plain tensor that a pattern would quantize has none.
    ///
    /// # Errors
    /// A name or a pattern without a tensor, a tensor without an encoding, a plain tensor that is to be quantized.
    pub(super) fn requests(&self, tensors: &[TensorInfo]) -> Result<Vec<(Request, Option<RecipeLine>)>> {
        for (name, entry) in &self.names {
            let at = |why: String| self.file.error_at(entry.span.clone(), why);
            match tensors.iter().find(|tensor| tensor.name == *name) {
                None => return Err(at(format!("tensor {name:?} is none that the packed file will hold"))),
                Some(tensor) if tensor.component == PLAIN && matches!(entry.request, Request::Quantize { .. }) => {
                    let why = "is a vector or a tiny matrix, which is not quantized; use keep or a float type";
                    return Err(at(format!("tensor {name:?} {why}")));
                }
                Some(_) => {}
            }
        }
        for (pattern, entry) in &self.patterns {
            if !tensors.iter().any(|tensor| pattern.is_match(&tensor.name)) {
                let why = format!("pattern {:?} matches no tensor of the checkpoint", pattern.as_str());
                return Err(self.file.error_at(entry.span.clone(), why));
            }
        }
        let decided = |entry: &Entry, pattern: Option<&Regex>| {
            let line = self.file.line(entry.span.start);
            (entry.request, Some(RecipeLine { line, pattern: pattern.map(Regex::to_string) }))
        };
        let request = |tensor: &TensorInfo| {
            if let Some(entry) = self.names.get(&tensor.name) {
                return Ok(decided(entry, None));
            }
            let matching = self.patterns.iter().rev().find(|(pattern, _)| pattern.is_match(&tensor.name));
            match matching {
                Some((_, Entry { request: Request::Quantize { .. }, .. })) if tensor.component == PLAIN => {
                    Ok((Request::Keep, None))
                }
                Some((pattern, entry)) => Ok(decided(entry, Some(pattern))),
                None => Err(self.file.error(format!(
                    "tensor {:?} of the checkpoint has no encoding; name it under [tensors] or match it under [patterns]",
                    tensor.name
                ))),
            }
        };
        tensors.iter().map(request).collect()
    }

    /// The record for the manifest.
    pub(super) fn record(&self) -> Value {
        json!({ "name": "recipe", "recipe": self.file.record() })
    }

    /// A recipe's text, with what is known of each tensor beside it.
    pub fn render(lines: &[Line], file_bytes: u64, policy: &Value) -> String {
        let header = "\
# Which tensor becomes what. Edit it, then pack by it: bkpack convert CHECKPOINT --recipe FILE -o model.bkpack
# An encoding is int2 to int8, ternary or binary, with :g32 to :g256 or :row and :asym; or fp16, bf16, fp32, keep.
# Instead of naming tensors one by one, [patterns] takes regular expressions, of which the last that matches decides.
# What stands behind a # is not read.
#
";
        let mut text = header.to_owned();
        let _ = writeln!(text, "# policy: {}", escaped(policy));
        let _ = writeln!(text, "# the packed file: {file_bytes} bytes");
        if lines.iter().any(|line| line.cost.is_some()) {
            let cost: f64 = lines.iter().filter_map(|line| line.cost).sum();
            let _ = writeln!(text, "# predicted cost: {cost}");
        }
        text.push_str("version = 1\n\n[tensors]\n");
        let entries: Vec<String> =
            lines.iter().map(|line| format!("{} = \"{}\"", quoted(&line.name), line.request)).collect();
        let width = entries.iter().map(|entry| entry.chars().count()).max().unwrap_or_default();
        for (line, entry) in lines.iter().zip(entries) {
            let _ = write!(text, "{entry:width$}  # {} bytes", line.bytes);
            if let Some(cost) = line.cost {
                let _ = write!(text, ", cost {cost}");
            }
            text.push('\n');
        }
        text
    }
}

/// One tensor of a recipe, and what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub name: String,
    pub request: Request,
    pub bytes: u64,
    /// What the encoding was predicted to cost.
    pub cost: Option<f64>,
}

/// A name as a key of TOML: a literal string where it can be one, else a basic string.
fn quoted(name: &str) -> String {
    let literal = !name.chars().any(|c| c == '\'' || c.is_control());
    if literal { format!("'{name}'") } else { escaped(&json!(name)) }
}

/// JSON that TOML accepts in a comment and, of a string, as a string: it must not hold a bare DEL.
fn escaped(value: &Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007F")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::tests::tensor;

    fn parse(text: &str) -> Result<Recipe> {
        Recipe::parse(PolicyFile::new(Path::new("plan.toml"), text.into())?)
    }

    fn model() -> Vec<TensorInfo> {
        ["a.q", "a.k", "b.q", "it's\u{7f}\n\"odd\""]
            .map(|name| tensor(name, &[64, 64], "other"))
            .into_iter()
            .chain([tensor("norm", &[64], PLAIN)])
            .collect()
    }

    #[test]
    fn what_is_rendered_reads_back() {
        let lines: Vec<Line> = model()
            .iter()
            .zip(["int4:g128", "int3:g64:asym", "ternary:row", "bf16", "keep"])
            .enumerate()
            .map(|(index, (tensor, text))| Line {
                name: tensor.name.clone(),
                request: text.parse().unwrap(),
                bytes: 100 * index as u64,
                cost: (index < 2).then_some(0.25),
            })
            .collect();
        let text = Recipe::render(&lines, 12345, &json!({ "name": "x" }));
        assert!(text.contains("12345 bytes") && text.contains("predicted cost: 0.5"), "{text}");
        let requests = parse(&text).unwrap().requests(&model()).unwrap();
        let requests: Vec<_> = requests.into_iter().map(|(request, _)| request).collect();
        assert_eq!(requests, lines.iter().map(|line| line.request).collect::<Vec<_>>());
    }

    #[test]
    fn names_come_before_patterns_and_the_last_pattern_decides() {
        let recipe =
            parse("version = 1\n[patterns]\n'.' = 'int4'\n'q' = 'int8'\n'^b' = 'int2'\n[tensors]\n'a.q' = 'fp16'\n");
        let requests = recipe.unwrap().requests(&model()).unwrap();
        let text: Vec<_> = requests.iter().map(|(request, _)| request.to_string()).collect();
        assert_eq!(text, ["fp16", "int4:g128", "int2:g128", "int4:g128", "keep"]);
        let line = |line, pattern: Option<&str>| Some(RecipeLine { line, pattern: pattern.map(str::to_owned) });
        let lines: Vec<_> = requests.into_iter().map(|(_, line)| line).collect();
        assert_eq!(lines, [line(7, None), line(3, Some(".")), line(5, Some("^b")), line(3, Some(".")), None]);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let rest = "\n[patterns]\n'.' = 'keep'";
        for (text, words) in [
            (format!("version = 1\n[tensors]\n'a.q' = 'int4'\nzz = 'int4'{rest}"), &["line 4", "\"zz\""][..]),
            (format!("version = 1\n[tensors]\n\n'a.q' = 'int12'{rest}"), &["line 4", "a.q", "int12"]),
            (format!("version = 1\n[tensors]\nnorm = 'int4'{rest}"), &["line 3", "norm", "keep"]),
            (format!("version = 1\n[tensors]\n'a.q' = 'int4'\n'a.q' = 'int8'{rest}"), &["line 4", "duplicate"]),
            ("version = 1\n[patterns]\n'a' = 'int4'".into(), &["plan.toml: ", "\"b.q\"", "[patterns]"]),
            (format!("version = 1{rest}\n'zz' = 'int4'"), &["line 4", "\"zz\"", "matches no tensor"]),
            (format!("version = 1{rest}\n'(' = 'int4'"), &["line 4", "\"(\""]),
            (format!("version = 2{rest}"), &["version 2"]),
            ("version = 1\n[tensor]".into(), &["line 2", "tensor"]),
            ("x".into(), &["line 1"]),
        ] {
            let message = parse(&text).and_then(|recipe| recipe.requests(&model())).unwrap_err().to_string();
            let lines = message.lines().count();
            assert!(lines == 1 && words.iter().all(|word| message.contains(word)), "{text}: {message}");
        }
    }
}
