//! The files of a sweep: one JSON object each, by this program or another one.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result, long, short},
    json,
};

/// Files that are larger are no results.
const MOST_BYTES: u64 = 16 << 20;

/// How weights are stored, as far as results tell it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Width {
    /// 32, 16, 8 ..., 1.58 (ternary), 1.
    pub bits: f64,
    /// BF16, not FP16: both have 16 bits.
    pub bf16: bool,
}

impl From<f64> for Width {
    /// The usual precision of this many bits.
    fn from(bits: f64) -> Self {
        Self { bits, bf16: false }
    }
}

/// A model at one width.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    pub model: String,
    pub width: Width,
    /// `None` where it is NaN or infinite.
    pub perplexity: Option<f64>,
    /// The perplexity is not that of a language model.
    pub looks_ahead: bool,
    pub simulated: bool,
    /// How it was measured, where the file says so: results with the same text can be compared.
    pub protocol: Option<String>,
}

/// A model with a part of its compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    pub model: String,
    pub id: String,
    /// `None` where it is NaN or infinite.
    pub perplexity: Option<f64>,
    /// Floating-point operations a token.
    pub flops: f64,
    /// `flops` over that of the whole model, where the file says so.
    pub compute_factor: Option<f64>,
    /// The perplexity is not that of a language model.
    pub looks_ahead: bool,
    pub simulated: bool,
    /// How it was measured, where the file says so: results with the same text can be compared.
    pub protocol: Option<String>,
}

/// Results that can be drawn, and a sentence about each that cannot.
#[derive(Clone, Debug)]
pub struct Results<T> {
    pub records: Vec<T>,
    pub notes: Vec<String>,
}

/// The results with a `bit_width` in folders (every `.json` file in them) and files.
///
/// # Errors
/// [`Error::Io`] where a folder or a named file cannot be read; [`Error::Results`] where no result is left.
pub fn quantized(paths: &[PathBuf]) -> Result<Results<Quantized>> {
    let parse = |object: &Map<String, Value>| {
        let bits = number(object, "bit_width")?;
        let bits = bits.filter(|bits| *bits > 0.0 && *bits <= 64.0).ok_or("bit_width is not between 0 and 64")?;
        Ok(Quantized {
            model: model(object)?,
            width: Width { bits, bf16: bits == 16.0 && object.get("precision").is_some_and(|name| name == "bf16") },
            perplexity: perplexity(object)?,
            looks_ahead: flag(object, "looks_ahead"),
            simulated: flag(object, "simulated"),
            protocol: protocol(object),
        })
    };
    let key = |found: &Quantized| (found.model.clone(), found.width);
    collect(paths, "bit_width", "config_id", parse, key)
}

/// The results with a `config_id`; as [`quantized`].
pub fn configurations(paths: &[PathBuf]) -> Result<Results<Configuration>> {
    let parse = |object: &Map<String, Value>| {
        let flops = number(object, "flops_per_token")?;
        let id = object.get("config_id").and_then(Value::as_str).ok_or("config_id is not a text")?;
        Ok(Configuration {
            model: model(object)?,
            id: id.to_owned(),
            perplexity: perplexity(object)?,
            flops: flops.filter(|flops| *flops > 0.0).ok_or("flops_per_token is not above 0")?,
            compute_factor: number(object, "compute_factor").ok().flatten(),
            looks_ahead: flag(object, "looks_ahead"),
            simulated: flag(object, "simulated"),
            protocol: protocol(object),
        })
    };
    let key = |found: &Configuration| (found.model.clone(), found.id.clone());
    collect(paths, "config_id", "bit_width", parse, key)
}

fn collect<T, K: PartialEq>(
    paths: &[PathBuf],
    required: &str,
    of_the_other_kind: &str,
    parse: impl Fn(&Map<String, Value>) -> Result<T, String>,
    key: impl Fn(&T) -> K,
) -> Result<Results<T>> {
    let mut found: Vec<(K, PathBuf, T)> = Vec::new();
    let mut notes = Vec::new();
    for path in files(paths)? {
        let object = match read(&path) {
            Ok(object) => object,
            Err(error) => {
                notes.push(format!("{error}; it is left out"));
                continue;
            }
        };
        if !object.contains_key(required) {
            if !object.contains_key(of_the_other_kind) {
                notes.push(format!("{}: no {required}, so no result of this kind; it is left out", path.display()));
            }
            continue;
        }
        match parse(&object) {
            Err(why) => notes.push(format!("{}: {}; it is left out", path.display(), long(&why))),
            Ok(record) => {
                let same = key(&record);
                match found.iter().find(|(other, _, _)| *other == same) {
                    Some((_, first, _)) => notes.push(format!(
                        "{}: the same model and {required} as {}; it is left out",
                        path.display(),
                        first.display()
                    )),
                    None => found.push((same, path, record)),
                }
            }
        }
    }
    let records: Vec<T> = found.into_iter().map(|(_, _, record)| record).collect();
    if records.is_empty() {
        let path = paths.first().cloned().unwrap_or_default();
        let first = notes.first().map(|note| format!(": {note}")).unwrap_or_default();
        return Err(Error::Results {
            path,
            why: format!("holds no result with {required}, model and perplexity{first}"),
        });
    }
    Ok(Results { records, notes })
}

/// The named files, and the `.json` files of named folders in the order of their names.
///
/// # Errors
/// [`Error::Io`] where one cannot be read.
pub fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            std::fs::metadata(path).map_err(Error::io(path))?;
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
        let mut inside: Vec<PathBuf> =
            entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(path))).collect::<Result<_>>()?;
        inside.retain(|file| file.extension().is_some_and(|extension| extension == "json") && file.is_file());
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

fn read(path: &Path) -> Result<Map<String, Value>> {
    let refuse = |why: &str| Error::Json { path: path.to_owned(), why: why.to_owned() };
    // A pipe or a device could block, or never end.
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(refuse("no regular file, so no result"));
    }
    let mut bytes = Vec::new();
    let mut limited = File::open(path).map_err(Error::io(path))?.take(MOST_BYTES + 1);
    limited.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(refuse("larger than 16 MiB, so no result"));
    }
    let bytes = without_bare_numbers(&bytes);
    match json::parse::<Value>(path, &bytes)? {
        Value::Object(object) => Ok(object),
        _ => Err(refuse("not a JSON object")),
    }
}

/// Python writes NaN and infinities as words that are no JSON: they become `null`.
fn without_bare_numbers(bytes: &[u8]) -> Vec<u8> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut replaced = Vec::with_capacity(bytes.len());
    let (mut rest, mut in_text) = (bytes, false);
    while let Some(&byte) = rest.first() {
        let mut taken = 1;
        match byte {
            b'\\' if in_text => taken = rest.len().min(2),
            b'"' => in_text = !in_text,
            _ if in_text => {}
            _ => {
                if let Some(word) = WORDS.into_iter().find(|word| rest.starts_with(word)) {
                    replaced.extend_from_slice(b"null");
                    rest = &rest[word.len()..];
                    continue;
                }
            }
        }
        replaced.extend_from_slice(&rest[..taken]);
        rest = &rest[taken..];
    }
    replaced
}

/// A number; `None` for `null`.
fn number(object: &Map<String, Value>, name: &str) -> Result<Option<f64>, String> {
    match object.get(name) {
        Some(Value::Number(number)) => Ok(number.as_f64()),
        Some(Value::Null) => Ok(None),
        Some(_) => Err(format!("{name} is not a number")),
        None => Err(format!("{name} is missing")),
    }
}

fn perplexity(object: &Map<String, Value>) -> Result<Option<f64>, String> {
    match number(object, "perplexity")? {
        Some(value) if value <= 0.0 => Err(format!("perplexity is {value}; it is above 0")),
        found => Ok(found),
    }
}

fn model(object: &Map<String, Value>) -> Result<String, String> {
    match object.get("model") {
        Some(Value::String(model)) if !model.trim().is_empty() => Ok(model.clone()),
        Some(other) => Err(format!("model is {}, not a name", short(&other.to_string()))),
        None => Err("model is missing".into()),
    }
}

fn flag(object: &Map<String, Value>, name: &str) -> bool {
    object.get(name) == Some(&Value::Bool(true))
}

/// What must be equal for two perplexities to be comparable, in words.
fn protocol(object: &Map<String, Value>) -> Option<String> {
    let protocol = object.get("protocol")?.as_object()?;
    let field = |name: &str| protocol.get(name).map_or("?".into(), Value::to_string);
    let text = protocol.get("text").and_then(|text| text.get("blake3")).and_then(Value::as_str).unwrap_or("?");
    let text = text.chars().take(8).collect::<String>();
    let (ctx, skip, scored) = (field("ctx"), field("skip"), field("scored"));
    Some(format!("{scored} tokens of text {text}, windows of {ctx}, {skip} skipped"))
}

/// Sentences about results that were not measured in the same way: of one model, and across models.
pub(super) fn protocol_notes<'a>(found: impl Iterator<Item = (&'a str, Option<&'a str>)> + Clone) -> Vec<String> {
    let mut notes = Vec::new();
    let mut all: Vec<(&str, &str)> = found.filter_map(|(model, protocol)| Some((model, protocol?))).collect();
    all.sort_unstable();
    all.dedup();
    for pair in all.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        let ((model, one), (_, other)) = (pair[0], pair[1]);
        notes.push(format!("the results of {model} do not compare: {one}; {other}"));
    }
    let mut protocols: Vec<&str> = all.iter().map(|(_, protocol)| *protocol).collect();
    protocols.sort_unstable();
    protocols.dedup();
    if notes.is_empty() && protocols.len() > 1 {
        notes.push(format!("the models were measured in {} ways: {}", protocols.len(), protocols.join("; ")));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::without_bare_numbers;

    #[test]
    fn bare_numbers_become_null_and_texts_stay() {
        let text = |text: &str| String::from_utf8(without_bare_numbers(text.as_bytes())).unwrap();
        assert_eq!(text(r#"{"a": NaN, "b": [-Infinity,Infinity]}"#), r#"{"a": null, "b": [null,null]}"#);
        assert_eq!(text(r#"{"NaN": "Infinity \" NaN"}"#), r#"{"NaN": "Infinity \" NaN"}"#);
        assert_eq!(text(r#"{"a": "\\", "b": NaN"#), r#"{"a": "\\", "b": null"#);
    }
}
