//! How a text is cut before byte-level BPE merges it: llama.cpp knows a list of ways by name (`tokenizer.ggml.pre`), which
//! are recognised here by the expressions that tokenizer.json states.
//!
//! Page: `llm_tokenizer_bpe` in `llama-vocab.cpp` of llama.cpp.

use serde_json::Value;

/// What ByteLevel cuts by unless told otherwise.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Contractions in any case, words with one sign before them, and what follows.
macro_rules! contractions {
    ($rest:literal) => {
        concat!("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", $rest)
    };
}

/// One way of cutting.
struct Known {
    /// llama.cpp's name.
    name: &'static str,
    /// Applied one after the other, each to what those before it have cut; matches and what lies between them stay.
    expressions: &'static [&'static str],
    /// Whether a piece that is a token is taken whole, without merging.
    ignore_merges: bool,
}

const KNOWN: [Known; 10] = [
    Known { name: "gpt-2", expressions: &[GPT2], ignore_merges: false },
    Known { name: "smollm", expressions: &[r"\p{N}", GPT2], ignore_merges: false },
    Known { name: "llama-bpe", expressions: &[LLAMA3], ignore_merges: true },
    Known { name: "smaug-bpe", expressions: &[LLAMA3], ignore_merges: false },
    Known {
        name: "qwen2",
        expressions: &[contractions!(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
    },
    Known {
        name: "qwen35",
        expressions: &[contractions!(
            r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
    },
    Known {
        name: "seed-coder",
        expressions: &[contractions!(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
    },
    Known {
        name: "tekken",
        expressions: &[concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: true,
    },
    Known {
        name: "gpt-4o",
        expressions: &[concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
    },
    Known {
        name: "deepseek-coder",
        expressions: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
        ignore_merges: false,
    },
];

const LLAMA3: &str =
    contractions!(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");

/// llama.cpp's name for the way in which a tokenizer cuts a text; `None` if it has none. The flag says whether the name
/// stands for the same use of merges, too.
pub(super) fn recognise(pre_tokenizer: &Value, ignore_merges: bool) -> Option<(&'static str, bool)> {
    let found = expressions(pre_tokenizer)?;
    let same = |known: &&Known| known.expressions.iter().eq(found.iter());
    let with_merges = KNOWN.iter().filter(same).find(|known| known.ignore_merges == ignore_merges);
    let known = with_merges.or_else(|| KNOWN.iter().find(same))?;
    Some((known.name, known.ignore_merges == ignore_merges))
}

/// Whether a pre-tokenizer is byte-level, and if so whether it puts a space before the text.
pub(super) fn byte_level(pre_tokenizer: &Value) -> Option<bool> {
    parts(pre_tokenizer)
        .into_iter()
        .find(|part| part["type"] == "ByteLevel")
        .map(|part| part["add_prefix_space"].as_bool().unwrap_or(true))
}

/// The steps of a pre-tokenizer, or of a normalizer: those of a sequence, or the one that it is.
pub(super) fn parts(steps: &Value) -> Vec<&Value> {
    let inner = ["pretokenizers", "normalizers"].into_iter().find_map(|key| steps[key].as_array());
    match inner {
        Some(inner) => inner.iter().collect(),
        None if steps.is_object() => vec![steps],
        None => Vec::new(),
    }
}

/// The expressions that a text is cut by; `None` if a step is no such expression.
fn expressions(pre_tokenizer: &Value) -> Option<Vec<&str>> {
    let mut found = Vec::new();
    for part in parts(pre_tokenizer) {
        match part["type"].as_str()? {
            "ByteLevel" if part["use_regex"].as_bool().unwrap_or(true) => found.push(GPT2),
            "ByteLevel" => {}
            "Digits" if part["individual_digits"].as_bool().unwrap_or(false) => found.push(r"\p{N}"),
            "Digits" => found.push(r"\p{N}+"),
            "Split" => {
                let inverted = part["invert"].as_bool().unwrap_or(false);
                // Removing what does not match from expressions that match everything is no different.
                let keeps = matches!((part["behavior"].as_str()?, inverted), ("Isolated", false) | ("Removed", true));
                found.push(part["pattern"]["Regex"].as_str().filter(|_| keeps)?);
            }
            _ => return None,
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn known_ways_are_told_by_their_structure() {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, bytes(false)]})
        };
        let digits = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, bytes(true)]});
        assert_eq!(recognise(&bytes(true), false), Some(("gpt-2", true)));
        assert_eq!(recognise(&bytes(true), true), Some(("gpt-2", false)));
        assert_eq!(recognise(&digits, false), Some(("smollm", true)));
        assert_eq!(recognise(&split(LLAMA3), true), Some(("llama-bpe", true)));
        assert_eq!(recognise(&split(LLAMA3), false), Some(("smaug-bpe", true)));
        let qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        assert_eq!(recognise(&split(qwen), false), Some(("qwen2", true)));
    }

    #[test]
    fn what_is_not_known_is_not_guessed() {
        let groups = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": false}, {"type": "ByteLevel"}]});
        let punctuation =
            json!({"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]});
        for other in [groups, punctuation, json!({"type": 1}), json!(null), json!([]), json!({"pretokenizers": [7]})] {
            assert_eq!(recognise(&other, false), None, "{other}");
        }
    }
}
