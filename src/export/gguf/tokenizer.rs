//! The tokenizer in GGUF's metadata: read from tokenizer.json and what lies beside it, all of it untrusted.
//!
//! llama.cpp has two of those that models of these architectures use: byte-level BPE (`gpt2`), and BPE over characters as
//! SentencePiece has it (`llama`).

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use serde_json::Value as Json;

use super::{
    container::{Metadata, Value},
    pretokenizer,
};
use crate::{
    error::{Error, Result},
    format::PackedFile,
    json,
    model::config::{bos_token, eos_tokens},
    tensor::TensorSource,
};

/// Token types of llama.cpp (`enum llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Bytes of the longest token that is looked at at every cut, which takes their square.
const LONGEST: usize = 1024;

/// The sign that stands for a space in SentencePiece's tokens.
const SPACE_SIGN: &str = "\u{2581}";

/// The tokenizer's part of an export.
#[derive(Debug, Default)]
pub(super) struct TokenizerPart {
    pub metadata: Metadata,
    pub refusals: Vec<String>,
    pub warnings: Vec<String>,
    pub notices: Vec<String>,
}

/// Why a tokenizer.json cannot be told to llama.cpp.
enum Fault {
    /// It breaks its own format.
    Broken(String),
    /// It is valid, but GGUF has no way to say it.
    Inexpressible(String),
}

impl<T: Into<String>> From<T> for Fault {
    fn from(why: T) -> Self {
        Fault::Broken(why.into())
    }
}

/// A token list whose length is the model's number of ids.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
    ids: HashMap<String, u32>,
}

/// Reads the tokenizer of a model with `vocab_size` token ids.
///
/// # Errors
/// [`Error::Tokenizer`] or [`Error::Json`] for files that break their format; [`Error::Config`] for special tokens that
/// are no ids.
pub(super) fn describe(packed: &PackedFile, vocab_size: usize) -> Result<TokenizerPart> {
    let mut part = TokenizerPart::default();
    let path = packed.path().join("tokenizer.json");
    let Some(bytes) = packed.file("tokenizer.json")? else {
        part.metadata.push(("tokenizer.ggml.model".into(), Value::String("none".into())));
        part.notices.push("the model carries no tokenizer.json: llama.cpp can be given token ids, but no text".into());
        return Ok(part);
    };
    let tokenizer: Json = json::parse(&path, &bytes)?;
    let config = parse_file(packed, "tokenizer_config.json")?.unwrap_or(Json::Null);
    let model = &tokenizer["model"];
    let broken =
        |why: String| Error::Tokenizer { path: packed.path().to_owned(), why: format!("tokenizer.json: {why}") };
    match model["type"].as_str() {
        Some("BPE") => {}
        // Written so before the field was there.
        None if model["type"].is_null() && model["merges"].is_array() => {}
        Some(kind) => {
            part.refusals.push(format!("a tokenizer of type {kind} is none that llama.cpp has for this architecture"));
            return Ok(part);
        }
        None => return Err(broken("model.type is absent or no string".into())),
    }
    let read = Tokens::read(&tokenizer, vocab_size).and_then(|tokens| Ok((tokens, read_merges(model)?)));
    let (tokens, merges) = match read {
        Ok(read) => read,
        Err(Fault::Broken(why)) => return Err(broken(why)),
        Err(Fault::Inexpressible(why)) => {
            part.refusals.push(format!("tokenizer.json: {why}"));
            return Ok(part);
        }
    };
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|text| !text.is_empty()) {
            part.refusals.push(format!("a tokenizer with {key} is none that llama.cpp has"));
            return Ok(part);
        }
    }
    let pre_tokenizer = &tokenizer["pre_tokenizer"];
    match pretokenizer::byte_level(pre_tokenizer) {
        Some(spaced) => part.byte_level(&tokenizer, spaced, tokens.texts, &tokens.types, &merges),
        None if model["byte_fallback"] == true => part.sentence_piece(&tokenizer, &tokens, &merges),
        None => {
            let why = "its tokenizer is neither byte-level BPE nor one of SentencePiece with bytes to fall back on, \
                       which llama.cpp has";
            part.refusals.push(why.into());
            return Ok(part);
        }
    }
    part.special_tokens(packed, &tokenizer, &config, &tokens.ids, vocab_size)?;
    part.chat_template(packed, &config)?;
    Ok(part)
}

impl Tokens {
    fn read(tokenizer: &Json, vocab_size: usize) -> Result<Self, Fault> {
        let vocab = tokenizer["model"]["vocab"].as_object().ok_or("model.vocab is absent or no object")?;
        let mut texts: Vec<Option<String>> = vec![None; vocab_size];
        let mut types = vec![UNUSED; vocab_size];
        let mut ids = HashMap::new();
        let unknown = tokenizer["model"]["unk_token"].as_str();
        let mut put = |text: &str, id: &Json, kind: i32| {
            let id = id.as_u64().ok_or_else(|| format!("the id of token {text:?} is no number"))?;
            let slot = usize::try_from(id).ok().and_then(|id| texts.get_mut(id));
            let Some(slot) = slot else {
                let why = format!("token {text:?} has the id {id}, but the model has {vocab_size} ids");
                return Err(Fault::Inexpressible(why));
            };
            if slot.as_deref().is_some_and(|other| other != text) {
                return Err(format!("the id {id} belongs to two tokens, one of them {text:?}").into());
            }
            if ids.insert(text.to_owned(), id as u32).is_some_and(|other| u64::from(other) != id) {
                return Err(format!("token {text:?} has two ids").into());
            }
            *slot = Some(text.to_owned());
            types[id as usize] = kind;
            Ok(())
        };
        for (text, id) in vocab {
            let kind = if Some(text.as_str()) == unknown { UNKNOWN } else { NORMAL };
            put(text, id, kind)?;
        }
        for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().ok_or("an added token has no content")?;
            let special = added["special"].as_bool().unwrap_or(false);
            let kind = match special {
                true if Some(text) == unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            put(text, &added["id"], kind)?;
        }
        // llama.cpp insists on a text of its own for every id.
        let taken: HashSet<String> = texts.iter().flatten().cloned().collect();
        let fill = |(id, text): (usize, Option<String>)| {
            text.unwrap_or_else(|| {
                let mut text = format!("[PAD{id}]");
                while taken.contains(&text) {
                    text.push('_');
                }
                text
            })
        };
        Ok(Self { texts: texts.into_iter().enumerate().map(fill).collect(), types, ids })
    }
}

/// The pairs that are merged, the first the earliest.
fn read_merges(model: &Json) -> Result<Vec<(&str, &str)>, Fault> {
    let merges = model["merges"].as_array().ok_or("model.merges is absent or no list")?;
    merges.iter().enumerate().map(|(rank, merge)| read_merge(merge, rank)).collect()
}

fn read_merge(merge: &Json, rank: usize) -> Result<(&str, &str), Fault> {
    let pair = match merge {
        // Written so by older versions, which had no spaces in tokens.
        Json::String(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' ')),
        Json::Array(pair) => pair.first().zip(pair.get(1)).filter(|_| pair.len() == 2).and_then(both_texts),
        _ => None,
    };
    match pair.filter(|(left, right)| !left.is_empty() && !right.is_empty()) {
        None => Err(format!("merge {rank} is no pair of texts").into()),
        Some((left, right)) if left.contains(' ') || right.contains(' ') => {
            Err(Fault::Inexpressible(format!("merge {rank} is of texts with spaces, which part them in GGUF")))
        }
        Some(pair) => Ok(pair),
    }
}

fn both_texts<'a>((left, right): (&'a Json, &'a Json)) -> Option<(&'a str, &'a str)> {
    left.as_str().zip(right.as_str())
}

impl TokenizerPart {
    fn add(&mut self, key: &str, value: Value) {
        self.metadata.push((format!("tokenizer.ggml.{key}"), value));
    }

    /// Byte-level BPE.
    fn byte_level(
        &mut self,
        tokenizer: &Json,
        spaced: bool,
        texts: Vec<String>,
        types: &[i32],
        merges: &[(&str, &str)],
    ) {
        let ignore_merges = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
        let name = match pretokenizer::recognise(&tokenizer["pre_tokenizer"], ignore_merges) {
            Some((name, true)) => name,
            Some((name, false)) => {
                let why = format!("{name}, which cuts text as this tokenizer does, treats whole words in another way");
                self.warnings.push(format!("{why}: rare words may become other tokens"));
                name
            }
            None => {
                let why = "knows no pre-tokenizer that cuts text as tokenizer.json says (it is told \"default\"): text may \
                           become other tokens; give it token ids where that matters";
                self.warnings.push(why.into());
                "default"
            }
        };
        if spaced {
            let why =
                "puts no space before a text, as this tokenizer does (add_prefix_space): begin texts with a space";
            self.warnings.push(why.into());
        }
        let normalizers = pretokenizer::parts(&tokenizer["normalizer"]);
        if let Some(normalizer) = normalizers.first() {
            let kind = normalizer["type"].as_str().unwrap_or("of an unknown kind");
            let why = format!("does not normalize text ({kind}), so text that is not normalized becomes other tokens");
            self.warnings.push(why);
        }
        self.add("model", Value::String("gpt2".into()));
        self.add("pre", Value::String(name.into()));
        self.add("tokens", Value::Strings(texts));
        self.add("token_type", Value::Integers(types.to_vec()));
        self.add("merges", Value::Strings(merges.iter().map(|(left, right)| format!("{left} {right}")).collect()));
    }

    /// BPE over characters, with bytes for characters that are no tokens. llama.cpp merges whatever gives the token of
    /// highest score; tokenizer.json lists pairs, so a token's score is the place of the first pair that gives it.
    fn sentence_piece(&mut self, tokenizer: &Json, tokens: &Tokens, merges: &[(&str, &str)]) {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let last = merges.len();
        let scores = tokens.texts.iter().map(|text| -(*ranks.get(text).unwrap_or(&last) as f32)).collect();
        let is_byte = |text: &str| {
            let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
        };
        let byte_or = |(text, &kind): (&String, &i32)| if kind == NORMAL && is_byte(text) { BYTE } else { kind };
        let types: Vec<i32> = tokens.texts.iter().zip(&tokens.types).map(byte_or).collect();
        if types.iter().filter(|&&kind| kind == BYTE).count() != 256 {
            self.warnings
                .push("finds no token for some bytes in this tokenizer: text with them becomes other tokens".into());
        }
        if !merges_are_complete(merges, &ranks, tokens) {
            let why = "merges whatever makes a token, where tokenizer.json lists only some such pairs: text may become \
                       other tokens";
            self.warnings.push(why.into());
        }
        self.add("model", Value::String("llama".into()));
        self.add("pre", Value::String("default".into()));
        self.add("tokens", Value::Strings(tokens.texts.clone()));
        self.add("scores", Value::Floats(scores));
        self.add("token_type", Value::Integers(types));
        self.add("add_space_prefix", Value::Bool(begins_with_space(tokenizer)));
    }

    /// Ids of special tokens, and whether a text begins and ends with them.
    fn special_tokens(
        &mut self,
        packed: &PackedFile,
        tokenizer: &Json,
        config: &Json,
        ids: &HashMap<String, u32>,
        vocab_size: usize,
    ) -> Result<()> {
        let named = |key: &str| {
            let text = config[key].as_str().or_else(|| config[key]["content"].as_str())?;
            ids.get(text).copied()
        };
        let known = |id: &u32| (*id as usize) < vocab_size;
        let in_config = |key: &str| {
            let id = packed.config().and_then(|config| config.get(key)).and_then(Json::as_u64);
            id.and_then(|id| u32::try_from(id).ok()).filter(known)
        };
        let bos = named("bos_token").or(bos_token(packed)?.filter(known));
        let ends: Vec<u32> = eos_tokens(packed)?.into_iter().filter(known).collect();
        let eos = named("eos_token").or(ends.first().copied());
        let turn = ends.iter().rev().copied().find(|&end| Some(end) != eos);
        let unknown = tokenizer["model"]["unk_token"].as_str().and_then(|text| ids.get(text).copied());
        let padding = named("pad_token").or_else(|| in_config("pad_token_id"));
        for (key, id) in [
            ("bos_token_id", bos),
            ("eos_token_id", eos),
            ("eot_token_id", turn),
            ("unknown_token_id", unknown),
            ("padding_token_id", padding),
        ] {
            if let Some(id) = id {
                self.add(key, Value::U32(id));
            }
        }
        let (first, last) = template_ends(&tokenizer["post_processor"], ids);
        for (key, option, id, in_template) in
            [("add_bos_token", "add_bos_token", bos, first), ("add_eos_token", "add_eos_token", eos, last)]
        {
            let wanted = config[option].as_bool().unwrap_or(id.is_some() && in_template == id);
            if wanted && id.is_none() {
                self.warnings.push(format!("cannot add the token that {option} asks for, since none is named"));
            }
            self.add(key, Value::Bool(wanted && id.is_some()));
        }
        Ok(())
    }

    /// The template of conversations.
    fn chat_template(&mut self, packed: &PackedFile, config: &Json) -> Result<()> {
        let default_of = |templates: &Json| -> Option<String> {
            if let Some(text) = templates.as_str() {
                return Some(text.to_owned());
            }
            let list = templates.as_array()?;
            let found = list.iter().find(|one| one["name"] == "default")?;
            found["template"].as_str().map(str::to_owned)
        };
        let mut found = default_of(&config["chat_template"]);
        if found.is_none() {
            found = packed.file("chat_template.jinja")?.and_then(|bytes| String::from_utf8(bytes.into_owned()).ok());
        }
        if found.is_none() {
            found = parse_file(packed, "chat_template.json")?.and_then(|file| default_of(&file["chat_template"]));
        }
        if let Some(template) = found {
            self.metadata.push(("tokenizer.chat_template".into(), Value::String(template)));
        }
        Ok(())
    }
}

/// Whether tokenizer.json lists every pair of tokens that makes a token, those that make the same one in a row.
fn merges_are_complete(merges: &[(&str, &str)], ranks: &HashMap<String, usize>, tokens: &Tokens) -> bool {
    let listed: HashSet<(&str, &str)> = merges.iter().copied().collect();
    let complete = tokens.texts.iter().zip(&tokens.types).filter(|(_, kind)| **kind == NORMAL).all(|(text, _)| {
        if text.len() > LONGEST {
            return false;
        }
        let mut cuts = text.char_indices().skip(1).map(|(place, _)| text.split_at(place));
        cuts.all(|(left, right)| {
            !tokens.ids.contains_key(left) || !tokens.ids.contains_key(right) || listed.contains(&(left, right))
        })
    });
    let mut made: Vec<usize> = merges.iter().map(|(left, right)| ranks[&format!("{left}{right}")]).collect();
    let in_a_row = made.is_sorted();
    made.dedup();
    complete && in_a_row
}

/// Whether a space is put before a text: by the normalizer in older files, by the pre-tokenizer in newer ones.
fn begins_with_space(tokenizer: &Json) -> bool {
    let prepends = |step: &&Json| step["type"] == "Prepend" && step["prepend"] == SPACE_SIGN;
    let scheme = |step: &&Json| {
        let scheme = step["prepend_scheme"].as_str();
        let old = step["add_prefix_space"].as_bool();
        step["type"] == "Metaspace" && scheme.map_or(old.unwrap_or(true), |scheme| scheme != "never")
    };
    pretokenizer::parts(&tokenizer["normalizer"]).iter().any(prepends)
        || pretokenizer::parts(&tokenizer["pre_tokenizer"]).iter().any(scheme)
}

/// The special tokens that the template of a single text begins and ends with.
fn template_ends(post_processor: &Json, ids: &HashMap<String, u32>) -> (Option<u32>, Option<u32>) {
    let steps = match post_processor["processors"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![post_processor],
    };
    let template = steps.into_iter().find(|step| step["type"] == "TemplateProcessing");
    let single = template.and_then(|step| step["single"].as_array()).map(Vec::as_slice).unwrap_or_default();
    let id = |piece: Option<&Json>| ids.get(piece?["SpecialToken"]["id"].as_str()?).copied();
    (id(single.first()), id(single.last()))
}

fn parse_file(packed: &PackedFile, name: &str) -> Result<Option<Json>> {
    let path = packed.path().join(Path::new(name));
    packed.file(name)?.map(|bytes| json::parse(&path, &bytes)).transpose()
}
