//! A small checkpoint to be broken, and what must hold of a refusal.

use std::{path::PathBuf, process::Output};

use assert_cmd::Command;
use bkpack::{format::PackedFile, progress::Silent};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Random, Stored, fixture, safetensors};

/// A folder with a small Llama in it, to be broken, and an empty one for what comes out.
pub struct Case {
    pub source: TempDir,
    pub target: TempDir,
    pub tensors: Vec<Stored>,
    pub config: Value,
}

pub const HIDDEN: usize = 32;
pub const VOCAB: usize = 48;

impl Case {
    pub fn new() -> Self {
        let mut random = Random(1);
        let mut tensor = |name: &str, shape: &[usize]| Stored::random(name, "F32", shape, 0.1, &mut random);
        let layer = |name: &str| format!("model.layers.0.{name}.weight");
        let square = [HIDDEN, HIDDEN];
        let tensors = vec![
            tensor("model.embed_tokens.weight", &[VOCAB, HIDDEN]),
            tensor(&layer("input_layernorm"), &[HIDDEN]),
            tensor(&layer("mlp.down_proj"), &[HIDDEN, 64]),
            tensor(&layer("mlp.gate_proj"), &[64, HIDDEN]),
            tensor(&layer("mlp.up_proj"), &[64, HIDDEN]),
            tensor(&layer("post_attention_layernorm"), &[HIDDEN]),
            tensor(&layer("self_attn.k_proj"), &square),
            tensor(&layer("self_attn.o_proj"), &square),
            tensor(&layer("self_attn.q_proj"), &square),
            tensor(&layer("self_attn.v_proj"), &square),
            tensor("model.norm.weight", &[HIDDEN]),
        ];
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "tie_word_embeddings": true
        });
        let case = Self { source: TempDir::new().unwrap(), target: TempDir::new().unwrap(), tensors, config };
        case.write("tokenizer.json", &std::fs::read(fixture().join("tokenizer.json")).unwrap());
        case
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.source.path().join(name), bytes).unwrap();
    }

    /// Writes config and tensors as they now are.
    pub fn save(&self) {
        self.write("config.json", self.config.to_string().as_bytes());
        self.write("model.safetensors", &safetensors(&self.tensors));
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Overwrites one value of an F32 tensor.
    pub fn set(&mut self, name: &str, index: usize, value: f32) {
        self.tensor(name).bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn output(&self) -> PathBuf {
        self.target.path().join("model.bkpack")
    }

    pub fn left(&self) -> Vec<PathBuf> {
        std::fs::read_dir(&self.target).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    pub fn convert(&self, arguments: &[&str]) -> Output {
        let command = |command: &mut Command| {
            command
                .arg("convert")
                .arg(self.source.path())
                .arg("-o")
                .arg(self.output())
                .args(arguments)
                .output()
                .unwrap()
        };
        command(&mut bkpack())
    }

    /// Asserts that the conversion is refused in one sentence with these words, and leaves nothing.
    #[track_caller]
    pub fn assert_refused(&self, arguments: &[&str], words: &[&str]) {
        let outcome = self.convert(arguments);
        assert_one_sentence(&outcome, words);
        assert!(self.left().is_empty(), "{:?}", self.left());
    }

    /// Converts and returns what was said on standard error.
    #[track_caller]
    pub fn assert_converts(&self, arguments: &[&str]) -> String {
        let outcome = self.convert(arguments);
        let notices = String::from_utf8(outcome.stderr).unwrap();
        assert_eq!(outcome.status.code(), Some(0), "{notices}");
        assert_eq!(self.left(), [self.output()]);
        PackedFile::open(&self.output()).unwrap().check_contents(&Silent).unwrap();
        notices
    }

    /// Asserts that evaluating the packed file, or the checkpoint where there is none, is refused in one sentence.
    #[track_caller]
    pub fn assert_not_evaluated(&self, words: &[&str]) {
        let text = fixture().join("../wikitext2.test.txt");
        let model = if self.output().exists() { self.output() } else { self.source.path().to_owned() };
        let outcome = bkpack().arg("eval").arg(model).arg("--text").arg(text).output().unwrap();
        assert_one_sentence(&outcome, words);
    }
}

pub fn bkpack() -> Command {
    Command::cargo_bin("bkpack").unwrap()
}

#[track_caller]
pub fn assert_one_sentence(outcome: &Output, words: &[&str]) {
    let message = String::from_utf8(outcome.stderr.clone()).unwrap();
    assert_eq!(outcome.status.code(), Some(2), "{message}");
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    assert!(message.starts_with("error: "), "{message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}
