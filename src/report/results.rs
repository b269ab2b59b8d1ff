//! The files of a sweep: one JSON object each, by this program or another one.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result, long, short},
    json,
};

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
    pub details: Details,
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
    pub details: Details,
}

/// What a result says beside what figures draw, as far as it says it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// The path of its file.
    pub file: String,
    /// As on the command line: `int4:g128`.
    pub encoding: Option<String>,
    /// Over the baseline.
    pub increase_percent: Option<f64>,
    /// In nats.
    pub kld_mean: Option<f64>,
    /// A share of the scored positions.
    pub top1_agreement: Option<f64>,
    pub file_bytes: Option<u64>,
    pub bits_per_weight: Option<f64>,
    pub ratio_fp32: Option<f64>,
    /// Bytes of weights that decoding one token reads.
    pub weight_bytes_per_token: Option<u64>,
    /// Layers that run, and of how many.
    pub layers: Option<(u64, u64)>,
    pub experts_per_token: Option<u64>,
    pub attention_window: Option<u64>,
    pub conditions: Conditions,
    /// BLAKE3 of the checkpoint.
    pub source_hash: Option<String>,
    /// BLAKE3 of the packed file.
    pub packed_hash: Option<String>,
    /// Why there is no perplexity.
    pub failure: Option<String>,
}

/// What quality was measured on, and how, as far as a file says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// The name of the text, and the BLAKE3 of its bytes.
    pub text: Option<(String, String)>,
    pub ctx: Option<u64>,
    pub skip: Option<u64>,
    pub windows: Option<u64>,
    pub scored: Option<u64>,
    pub activations: Option<String>,
    /// The card, where the model ran on one and not on the CPU.
    pub card: Option<String>,
}

impl Conditions {
    /// Those that a JSON object holds.
    pub(super) fn of(object: &Map<String, Value>) -> Self {
        let whole = |name: &str| object.get(name).and_then(Value::as_u64);
        let text = object.get("text").and_then(|text| Some((text_of(text.get("name"))?, text_of(text.get("blake3"))?)));
        Self {
            text,
            ctx: whole("ctx"),
            skip: whole("skip"),
            windows: whole("windows"),
            scored: whole("scored"),
            activations: text_of(object.get("activations")),
            card: text_of(object.get("card")),
        }
    }
}

impl Details {
    fn of(path: &Path, object: &Map<String, Value>) -> Self {
        let real = |name: &str| object.get(name).and_then(Value::as_f64);
        let whole = |name: &str| object.get(name).and_then(Value::as_u64);
        let hash = |name: &str| text_of(object.get("hashes").and_then(|hashes| hashes.get(name)));
        let conditions = object.get("protocol").and_then(Value::as_object).map(Conditions::of);
        Self {
            file: path.display().to_string(),
            encoding: text_of(object.get("encoding")),
            increase_percent: real("ppl_increase_percent"),
            kld_mean: real("kld_mean"),
            top1_agreement: real("top1_agreement"),
            file_bytes: whole("file_bytes"),
            bits_per_weight: real("bits_per_weight"),
            ratio_fp32: real("ratio_fp32"),
            weight_bytes_per_token: whole("weight_bytes_per_token"),
            layers: whole("layers").zip(whole("layers_total")),
            experts_per_token: whole("experts_per_token"),
            attention_window: whole("attention_window"),
            conditions: conditions.unwrap_or_default(),
            source_hash: hash("source"),
            packed_hash: hash("packed"),
            failure: text_of(object.get("failure")),
        }
    }
}

fn text_of(value: Option<&Value>) -> Option<String> {
    Some(value?.as_str()?.to_owned())
}

/// Results that can be drawn, and a sentence about each that cannot.
#[derive(Clone, Debug)]
pub struct Results<T> {
    pub records: T,
    pub notes: Vec<String>,
}

/// The results with a `bit_width` in folders (every `.json` file in them) and files.
///
/// # Errors
/// [`Error::Io`] where a folder or a named file cannot be read; [`Error::Results`] where no result is left.
pub fn quantized(paths: &[PathBuf]) -> Result<Results<Vec<Quantized>>> {
    let mut objects = Objects::read(paths)?;
    objects.note_strangers("no bit_width, so no result of this kind");
    let records = objects.quantized();
    if records.is_empty() { Err(objects.none(paths, "bit_width")) } else { Ok(objects.results(records)) }
}

/// The results with a `config_id`; as [`quantized`].
pub fn configurations(paths: &[PathBuf]) -> Result<Results<Vec<Configuration>>> {
    let mut objects = Objects::read(paths)?;
    objects.note_strangers("no config_id, so no result of this kind");
    let records = objects.configurations();
    if records.is_empty() { Err(objects.none(paths, "config_id")) } else { Ok(objects.results(records)) }
}

/// The results of both kinds; as [`quantized`], where none of either is left.
pub fn all(paths: &[PathBuf]) -> Result<Results<(Vec<Quantized>, Vec<Configuration>)>> {
    let mut objects = Objects::read(paths)?;
    objects.note_strangers("no bit_width and no config_id, so no result of a sweep");
    let records = (objects.quantized(), objects.configurations());
    match records.0.is_empty() && records.1.is_empty() {
        true => Err(objects.none(paths, "bit_width or config_id")),
        false => Ok(objects.results(records)),
    }
}

/// A result has one of these fields.
const KINDS: [&str; 2] = ["bit_width", "config_id"];

/// The JSON objects of files, and a sentence about each file that is left out.
struct Objects {
    found: Vec<(PathBuf, Map<String, Value>)>,
    notes: Vec<String>,
}

impl Objects {
    fn read(paths: &[PathBuf]) -> Result<Self> {
        let (mut found, mut notes) = (Vec::new(), Vec::new());
        for path in files(paths)? {
            match read(&path) {
                // The ranking of layers that a sweep leaves beside its results is none.
                Ok(object) if object.contains_key("nll_without") => {}
                Ok(object) => found.push((path, object)),
                Err(error) => notes.push(format!("{error}; it is left out")),
            }
        }
        Ok(Self { found, notes })
    }

    fn note_strangers(&mut self, why: &str) {
        let kind = |object: &Map<String, Value>| KINDS.iter().any(|field| object.contains_key(*field));
        let strangers = self.found.iter().filter(|(_, object)| !kind(object));
        self.notes.extend(strangers.map(|(path, _)| format!("{}: {why}; it is left out", path.display())));
    }

    fn quantized(&mut self) -> Vec<Quantized> {
        let parse = |path: &Path, object: &Map<String, Value>| {
            let bits = number(object, "bit_width")?;
            let bits = bits.filter(|bits| *bits > 0.0 && *bits <= 64.0).ok_or("bit_width is not between 0 and 64")?;
            Ok(Quantized {
                model: model(object)?,
                width: Width { bits, bf16: bits == 16.0 && object.get("precision").is_some_and(|name| name == "bf16") },
                perplexity: perplexity(object)?,
                looks_ahead: flag(object, "looks_ahead"),
                simulated: flag(object, "simulated"),
                protocol: protocol(object),
                details: Details::of(path, object),
            })
        };
        self.collect("bit_width", parse, |found| (found.model.clone(), found.width))
    }

    fn configurations(&mut self) -> Vec<Configuration> {
        let parse = |path: &Path, object: &Map<String, Value>| {
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
                details: Details::of(path, object),
            })
        };
        self.collect("config_id", parse, |found| (found.model.clone(), found.id.clone()))
    }

    /// The records of the objects with a field, the first where several have the same key.
    fn collect<T, K: PartialEq>(
        &mut self,
        required: &str,
        parse: impl Fn(&Path, &Map<String, Value>) -> Result<T, String>,
        key: impl Fn(&T) -> K,
    ) -> Vec<T> {
        let mut records: Vec<(K, &Path, T)> = Vec::new();
        for (path, object) in self.found.iter().filter(|(_, object)| object.contains_key(required)) {
            let record = match parse(path, object) {
                Ok(record) => record,
                Err(why) => {
                    self.notes.push(format!("{}: {}; it is left out", path.display(), long(&why)));
                    continue;
                }
            };
            let same = key(&record);
            match records.iter().find(|(other, _, _)| *other == same) {
                Some((_, first, _)) => self.notes.push(format!(
                    "{}: the same model and {required} as {}; it is left out",
                    path.display(),
                    first.display()
                )),
                None => records.push((same, path, record)),
            }
        }
        records.into_iter().map(|(_, _, record)| record).collect()
    }

    fn results<T>(self, records: T) -> Results<T> {
        Results { records, notes: self.notes }
    }

    fn none(self, paths: &[PathBuf], kind: &str) -> Error {
        let path = paths.first().cloned().unwrap_or_default();
        let first = self.notes.first().map(|note| format!(": {note}")).unwrap_or_default();
        Error::Results { path, why: format!("holds no result with {kind}, model and perplexity{first}") }
    }
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

/// The JSON object of a file, in which numbers that are not finite may stand as Python writes them.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>> {
    let bytes = without_bare_numbers(&json::read_small(path)?);
    match json::parse::<Value>(path, &bytes)? {
        Value::Object(object) => Ok(object),
        _ => Err(Error::Json { path: path.to_owned(), why: "not a JSON object".to_owned() }),
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
