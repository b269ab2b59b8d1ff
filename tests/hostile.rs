//! Checkpoints and packed files made to break things: each is refused in one clear sentence, nothing is left behind,
//! nothing panics.

mod common;

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Output,
};

use assert_cmd::Command;
use bkpack::{
    checkpoint,
    format::{
        PackedFile,
        archive::{archive, unpack},
    },
    model,
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use common::{Random, Stored, fixture, safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a small Llama in it, to be broken, and an empty one for what comes out.
struct Case {
    source: TempDir,
    target: TempDir,
    tensors: Vec<Stored>,
    config: Value,
}

const HIDDEN: usize = 32;
const VOCAB: usize = 48;

impl Case {
    fn new() -> Self {
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

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.source.path().join(name), bytes).unwrap();
    }

    /// Writes config and tensors as they now are.
    fn save(&self) {
        self.write("config.json", self.config.to_string().as_bytes());
        self.write("model.safetensors", &safetensors(&self.tensors));
    }

    fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Overwrites one value of an F32 tensor.
    fn set(&mut self, name: &str, index: usize, value: f32) {
        self.tensor(name).bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn output(&self) -> PathBuf {
        self.target.path().join("model.bkpack")
    }

    fn left(&self) -> Vec<PathBuf> {
        std::fs::read_dir(&self.target).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn convert(&self, arguments: &[&str]) -> Output {
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
    fn assert_refused(&self, arguments: &[&str], words: &[&str]) {
        let outcome = self.convert(arguments);
        assert_one_sentence(&outcome, words);
        assert!(self.left().is_empty(), "{:?}", self.left());
    }

    /// Converts and returns what was said on standard error.
    #[track_caller]
    fn assert_converts(&self, arguments: &[&str]) -> String {
        let outcome = self.convert(arguments);
        let notices = String::from_utf8(outcome.stderr).unwrap();
        assert_eq!(outcome.status.code(), Some(0), "{notices}");
        assert_eq!(self.left(), [self.output()]);
        PackedFile::open(&self.output()).unwrap().check_contents(&Silent).unwrap();
        notices
    }

    /// Asserts that evaluating the packed file, or the checkpoint where there is none, is refused in one sentence.
    #[track_caller]
    fn assert_not_evaluated(&self, words: &[&str]) {
        let text = fixture().join("../wikitext2.test.txt");
        let model = if self.output().exists() { self.output() } else { self.source.path().to_owned() };
        let outcome = bkpack().arg("eval").arg(model).arg("--text").arg(text).output().unwrap();
        assert_one_sentence(&outcome, words);
    }
}

fn bkpack() -> Command {
    Command::cargo_bin("bkpack").unwrap()
}

#[track_caller]
fn assert_one_sentence(outcome: &Output, words: &[&str]) {
    let message = String::from_utf8(outcome.stderr.clone()).unwrap();
    assert_eq!(outcome.status.code(), Some(2), "{message}");
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    assert!(message.starts_with("error: "), "{message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const UP: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn the_unbroken_case_converts() {
    let case = Case::new();
    case.save();
    assert_eq!(case.assert_converts(&[]), "");
}

/// Splits the tensors over two shards and writes an index that `change` may falsify.
fn shard(case: &Case, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    case.save();
    std::fs::remove_file(case.source.path().join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (part, name) in case.tensors.chunks(6).zip(["one.safetensors", "two.safetensors"]) {
        case.write(name, &safetensors(part));
        map.extend(part.iter().map(|tensor| (tensor.name.clone(), json!(name))));
    }
    change(&mut map);
    case.write("model.safetensors.index.json", json!({ "weight_map": map }).to_string().as_bytes());
}

#[test]
fn shards_and_index_must_agree() {
    let case = Case::new();
    shard(&case, |_| {});
    case.assert_converts(&[]);

    let case = Case::new();
    shard(&case, |_| {});
    std::fs::remove_file(case.source.path().join("two.safetensors")).unwrap();
    case.assert_refused(&[], &["model.safetensors.index.json", "two.safetensors", "missing"]);

    shard(&case, |map| drop(map.insert("model.extra.weight".into(), json!("one.safetensors"))));
    case.assert_refused(&[], &["index.json", "model.extra.weight", "one.safetensors"]);

    shard(&case, |map| drop(map.insert(EMBEDDING.into(), json!("two.safetensors"))));
    case.assert_refused(&[], &["index.json", EMBEDDING]);

    shard(&case, |map| drop(map.remove(UP)));
    case.assert_refused(&[], &["index.json", UP, "one.safetensors"]);

    // The second shard holds a tensor of the first one too.
    shard(&case, |_| {});
    let both: Vec<Stored> = case.tensors[5..]
        .iter()
        .map(|tensor| Stored {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: tensor.bytes.clone(),
        })
        .collect();
    case.write("two.safetensors", &safetensors(&both));
    case.assert_refused(&[], &["index.json", "model.layers.0.post_attention_layernorm.weight", "two.safetensors"]);

    for name in ["../one.safetensors", "/etc/passwd", "a/b", "..", ".", ""] {
        shard(&case, |map| drop(map.insert(EMBEDDING.into(), json!(name))));
        case.assert_refused(&[], &["index.json", "not a plain file name"]);
    }
    for text in ["", "[]", "{}", "{\"weight_map\": 3}", "{\"weight_map\": {\"a\": 3}}", "{\"weight_map\": {}}"] {
        case.write("model.safetensors.index.json", text.as_bytes());
        case.assert_refused(&[], &[case.source.path().to_str().unwrap()]);
    }
    case.write("model.safetensors.index.json", format!(r#"{{"weight_map": {{"{UP}": "a", "{UP}": "b"}}}}"#).as_bytes());
    case.assert_refused(&[], &["index.json", UP, "twice"]);
}

#[test]
fn weights_that_are_not_finite_are_counted_and_placed() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (name, width) in [(UP, HIDDEN), ("model.norm.weight", HIDDEN)] {
            let mut case = Case::new();
            for index in [17, width - 1] {
                case.set(name, index, value);
            }
            case.save();
            let words = [case.source.path().to_str().unwrap(), name, "holds 2 NaN or infinite", "at element 17;"];
            case.assert_refused(&[], &words);
            case.assert_refused(&["--dry-run"], &words);
            let notices = case.assert_converts(&["--allow-nonfinite"]);
            assert!(
                notices.contains(name) && notices.contains("2 NaN or infinite") && notices.lines().count() == 1,
                "{notices}"
            );
            let packed = PackedFile::open(&case.output()).unwrap();
            assert_eq!(packed.entry(name).unwrap().encoding.to_string(), "FP32");
            let mut found = vec![0.0; packed.entry(name).unwrap().elements()];
            Cpu::detect().dequantize(&packed.tensor(name).unwrap().matrix(), 0, &mut found);
            let stored = &case.tensor(name).bytes;
            let expected = stored.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes).to_bits());
            assert!(found.iter().map(|value| value.to_bits()).eq(expected), "the values are kept as they were");
        }
    }
}

#[test]
fn values_that_a_float_type_cannot_hold_are_refused() {
    let mut case = Case::new();
    case.set(UP, 5, -1e6);
    case.save();
    case.assert_refused(&["--bits", "16"], &[case.source.path().to_str().unwrap(), UP, "1000000", "F16"]);
    case.assert_refused(&["--tensor", "up_proj=fp16"], &[UP, "F16"]);
    case.assert_converts(&["--tensor", "up_proj=bf16"]);

    let mut case = Case::new();
    case.set(UP, 5, f32::MAX);
    case.save();
    case.assert_refused(&["--tensor", "up_proj=bf16"], &[UP, "BF16"]);
    case.assert_converts(&["--bits", "32"]);
}

#[test]
fn tensors_must_fit_the_configuration() {
    let mut case = Case::new();
    case.tensor(UP).shape = vec![HIDDEN, 64];
    case.save();
    case.assert_refused(&[], &[case.source.path().to_str().unwrap(), UP, "[32, 64]", "[64, 32]"]);

    let mut case = Case::new();
    case.tensors.retain(|tensor| tensor.name != UP);
    case.save();
    case.assert_refused(&[], &[case.source.path().to_str().unwrap(), UP, "missing"]);

    let mut case = Case::new();
    case.tensor(UP).name = "model.layers.0.mlp.up_proj.weights".into();
    case.save();
    case.assert_refused(&[], &[UP, "missing"]);
}

#[test]
fn tensors_that_cannot_be_packed_are_named() {
    let mut case = Case::new();
    case.tensors.push(Stored { name: "model.empty".into(), dtype: "F32", shape: vec![3, 0, 5], bytes: Vec::new() });
    case.save();
    case.assert_refused(&[], &["model.safetensors", "model.empty", "[3, 0, 5]"]);

    for dtype in ["I64", "U64"] {
        let mut case = Case::new();
        case.tensors.push(Stored { name: "model.positions".into(), dtype, shape: vec![4], bytes: vec![0; 32] });
        case.save();
        case.assert_refused(&[], &["model.safetensors", "model.positions", dtype]);
    }
}

/// A safetensors file with this header and some data.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn headers_that_lie_are_refused() {
    let case = Case::new();
    case.save();
    let whole = safetensors(&case.tensors);
    for claimed in [0, 1, 7, whole.len() as u64, 100_000_001, 1 << 32, 1 << 63, u64::MAX - 7, u64::MAX] {
        let mut changed = whole.clone();
        changed[..8].copy_from_slice(&claimed.to_le_bytes());
        case.write("model.safetensors", &changed);
        case.assert_refused(&[], &["model.safetensors"]);
    }
    for length in (0..=16).chain([100, whole.len() / 2, whole.len() - 1]) {
        case.write("model.safetensors", &whole[..length]);
        case.assert_refused(&[], &["model.safetensors"]);
    }
    case.write("model.safetensors", &[&whole[..], b"\0"].concat());
    case.assert_refused(&[], &["model.safetensors", "trailing bytes"]);

    let tensor = |info: &str| format!(r#"{{"the.tensor": {info}}}"#);
    let named = [
        tensor(r#"{"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [18446744073709551615], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [17], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [15], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}"#),
        tensor(r#"{"dtype": "F32", "shape": [12], "data_offsets": [16, 64]}"#),
    ];
    for header in &named {
        case.write("model.safetensors", &with_header(header, 64));
        case.assert_refused(&[], &["model.safetensors", "the.tensor"]);
    }
    let unnamed = [
        tensor(r#"{"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [16.0], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F128", "shape": [4], "data_offsets": [0, 64]}"#),
        tensor(r#"{"dtype": "F32", "shape": [16]}"#),
        tensor(r#"{"dtype": "F32", "shape": [16], "data_offsets": [0]}"#),
        tensor("null"),
        "[]".into(),
        "\u{0}".into(),
        "{".into(),
        format!("{{\"a\": {}{}}}", "[".repeat(5000), "]".repeat(5000)),
        r#"{"__metadata__": {"a": 1}}"#.into(),
    ];
    for header in &unnamed {
        case.write("model.safetensors", &with_header(header, 64));
        case.assert_refused(&[], &["model.safetensors"]);
    }
    let info = r#"{"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}"#;
    case.write("model.safetensors", &with_header(&format!(r#"{{"twin": {info}, "twin": {info}}}"#), 64));
    case.assert_refused(&[], &["model.safetensors", "\"twin\" twice"]);
    case.write("model.safetensors", &with_header("{}", 0));
    case.assert_refused(&[], &["holds no tensors"]);
}

#[test]
fn names_that_would_collide_in_the_packed_file_are_refused() {
    for (name, shape) in [
        (format!("{UP}_packed"), vec![4]),
        (format!("{UP}_scale"), vec![4]),
        ("bkpack.file/config.json".into(), vec![4]),
    ] {
        let mut case = Case::new();
        let bytes = vec![0; 16];
        case.tensors.push(Stored { name: name.clone(), dtype: "F32", shape, bytes });
        case.save();
        case.assert_refused(&[], &[&name]);
    }
}

#[test]
fn strange_names_survive() {
    let mut case = Case::new();
    let mut random = Random(9);
    let names = ["", " ", "a\"b\\c", "line\nbreak\u{0}", "\"bkpack_seal\":\"", "ünï/../ço∂é", "bkpack", "format"];
    for name in names {
        case.tensors.push(Stored::random(name, "F32", &[32, 40], 1.0, &mut random));
    }
    case.save();
    case.assert_converts(&["--tensor", ".*=int4:g32"]);
    let packed = PackedFile::open(&case.output()).unwrap();
    assert!(names.iter().all(|name| packed.shape(name) == Some(&[32, 40])));
}

#[test]
fn a_config_that_is_none_is_refused() {
    let case = Case::new();
    case.save();
    let deep = "[".repeat(100_000);
    let deep_object = r#"{"a":"#.repeat(100_000);
    for text in ["", "not JSON", "{", "[1, 2", "\u{feff}{}", "{\"a\": 1, \"a\": 2}", "{} {}", &deep, &deep_object] {
        case.write("config.json", text.as_bytes());
        case.assert_refused(&[], &["config.json"]);
    }
    case.write("config.json", b"{\"a\": \"\xff\xfe\"}");
    case.assert_refused(&[], &["config.json"]);
    std::fs::remove_file(case.source.path().join("config.json")).unwrap();
    std::fs::create_dir(case.source.path().join("config.json")).unwrap();
    case.assert_refused(&[], &["config.json"]);
}

#[test]
fn fields_of_the_wrong_kind_are_named() {
    for (field, value) in [
        ("hidden_size", json!("big")),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(1e300)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_hidden_layers", json!([1])),
        ("num_attention_heads", json!(null)),
        ("vocab_size", json!({})),
        ("tie_word_embeddings", json!("yes")),
        ("max_position_embeddings", json!(true)),
        ("rms_norm_eps", json!("1e-5")),
    ] {
        let mut case = Case::new();
        case.config[field] = value;
        case.save();
        case.assert_refused(&[], &[case.source.path().to_str().unwrap(), field]);
    }
}

#[test]
fn an_unknown_architecture_is_packed_but_not_run() {
    for (config, name) in [
        (json!({"architectures": ["BertModel"]}), "BertModel"),
        (json!({"architectures": []}), "(none)"),
        (json!({"architectures": "LlamaForCausalLM"}), "(none)"),
        (json!([1, 2]), "(none)"),
        (json!(null), "(none)"),
        (json!("x"), "(none)"),
    ] {
        let mut case = Case::new();
        case.config = config;
        case.save();
        let notices = case.assert_converts(&[]);
        assert!(notices.starts_with("note: ") && notices.contains(name) && notices.lines().count() == 1, "{notices}");
        case.assert_not_evaluated(&["model.bkpack"]);
    }
    let case = Case::new();
    case.save();
    std::fs::remove_file(case.source.path().join("config.json")).unwrap();
    assert!(case.assert_converts(&[]).contains("no config.json"));
    case.assert_not_evaluated(&["model.bkpack", "no config.json"]);
}

#[test]
fn a_tokenizer_that_does_not_load_is_named() {
    let case = Case::new();
    case.save();
    for garbage in [&b"garbage"[..], b"", b"{}", b"\xff\xff", b"{\"model\": {\"type\": \"BPE\", \"vocab\": 3}}"] {
        case.write("tokenizer.json", garbage);
        case.assert_not_evaluated(&[case.source.path().to_str().unwrap(), "tokenizer.json"]);
        case.assert_converts(&[]);
        case.assert_not_evaluated(&["model.bkpack", "tokenizer.json"]);
        std::fs::remove_file(case.output()).unwrap();
    }
    std::fs::remove_file(case.source.path().join("tokenizer.json")).unwrap();
    case.assert_not_evaluated(&[case.source.path().to_str().unwrap(), "no tokenizer.json"]);
}

#[test]
fn a_tied_head_is_stored_once_and_another_is_kept() {
    let mut case = Case::new();
    let copy = case.tensor(EMBEDDING).bytes.clone();
    let shape = vec![VOCAB, HIDDEN];
    case.tensors.push(Stored { name: "lm_head.weight".into(), dtype: "F32", shape, bytes: copy });
    case.save();
    let notices = case.assert_converts(&[]);
    assert!(notices.contains("lm_head.weight is tied"), "{notices}");
    assert_eq!(PackedFile::open(&case.output()).unwrap().shape("lm_head.weight"), None);
    std::fs::remove_file(case.output()).unwrap();

    // Not tied: the copy is a tensor of its own, whatever it holds.
    case.config["tie_word_embeddings"] = json!(false);
    case.save();
    assert_eq!(case.assert_converts(&[]), "");
    assert!(PackedFile::open(&case.output()).unwrap().shape("lm_head.weight").is_some());
    std::fs::remove_file(case.output()).unwrap();

    // Said to be tied, but different: nothing is thrown away.
    case.config["tie_word_embeddings"] = json!(true);
    case.set("lm_head.weight", 0, 0.5);
    case.save();
    case.assert_converts(&[]);
    assert!(PackedFile::open(&case.output()).unwrap().shape("lm_head.weight").is_some());
}

/// A hostile value in place of the one at a random place of a JSON document.
fn spoil(value: &mut Value, random: &mut Random) {
    let children = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if children > 0 && random.below(5) > 0 {
        let child = random.below(children);
        return match value {
            Value::Array(items) => spoil(&mut items[child], random),
            Value::Object(fields) => spoil(fields.values_mut().nth(child).unwrap(), random),
            _ => unreachable!("it has children"),
        };
    }
    let numbers = [0, 1, 2, 3, 31, 32, 63, 64, 4095, 4096, 1 << 31, 1 << 32, 1 << 62, u64::MAX];
    match random.below(8) {
        0 => *value = Value::Null,
        1 => *value = json!(numbers[random.below(numbers.len())]),
        2 => *value = json!([-1, i64::MIN][random.below(2)]),
        3 => *value = json!([1e308, 0.5][random.below(2)]),
        4 => *value = json!(["", "int", "float", "F32", "F16", "U32", "ternary", "../x"][random.below(8)]),
        5 => {
            let texts = ["[]", "{}", "[[[]]]", "[0, 0]", "[1, 1099511627776]"];
            *value = serde_json::from_str(texts[random.below(texts.len())]).unwrap();
        }
        6 => match value {
            Value::Array(items) if children > 0 => drop(items.remove(random.below(children))),
            Value::Object(fields) if children > 0 => {
                let key = fields.keys().nth(random.below(children)).unwrap().clone();
                fields.remove(&key);
            }
            other => *other = json!(true),
        },
        _ => match value {
            Value::Array(items) if children > 0 => items.push(items[random.below(children)].clone()),
            Value::Number(number) => {
                let near = number.as_u64().unwrap_or(0).wrapping_add([1, u64::MAX, 4, 64][random.below(4)]);
                *value = json!(near);
            }
            other => *other = json!({ "kind": "int", "bits": 9 }),
        },
    }
}

/// Flips bits and moves bytes of a text.
fn scramble(text: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let place = random.below(text.len().max(1));
        if place >= text.len() {
            return;
        }
        match random.below(4) {
            0 => text[place] ^= 1 << random.below(8),
            1 => text[place] = b"0123456789{}[]\",: \\"[random.below(19)],
            2 => drop(text.remove(place)),
            _ => text.insert(place, b"0123456789{}[]\",: \\"[random.below(19)]),
        }
    }
}

/// A file of this header and data, with the length set, padded to `align`, and sealed if there is a seal.
fn assemble(text: &[u8], data: &[u8], align: usize) -> Vec<u8> {
    let mut file = vec![0; 8];
    file.extend(text);
    file.resize(file.len().next_multiple_of(align), b' ');
    let length = file.len() as u64 - 8;
    file[..8].copy_from_slice(&length.to_le_bytes());
    let key = b"\"bkpack_seal\":\"";
    let place = file.windows(key.len()).position(|window| window == key).map(|place| place + key.len());
    if let Some(digits) = place.and_then(|place| file.get_mut(place..place + 64)) {
        digits.fill(b'0');
        let seal = blake3::hash(&file).to_hex();
        let place = place.unwrap();
        file[place..place + 64].copy_from_slice(seal.as_bytes());
    }
    file.extend(data);
    file
}

/// Reads everything that a source offers.
fn read_all(source: &dyn TensorSource) {
    for name in source.names() {
        let Ok(tensor) = source.tensor(name) else { continue };
        let matrix = tensor.matrix();
        assert!(matrix.bytes() < 1 << 20, "a tensor cannot be larger than its file");
        if tensor.elements() < 1 << 20 {
            let mut values = vec![0.0; tensor.elements()];
            Cpu::detect().dequantize(&matrix, 0, &mut values);
        }
    }
    let _ = source.file("tokenizer.json");
    let _ = model::check_shapes(source);
}

fn options() -> PackOptions {
    let overrides = ["embed=int3:g32:asym", "down=ternary:g64", "gate=binary:g32", "up=int5:row"].map(String::from);
    PackOptions {
        policy: Policy::uniform("int4:g32".parse().unwrap(), &[], &overrides).unwrap(),
        rounding: Rounding::Nearest,
        calibration: None,
        ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
        allow_nonfinite: false,
        shard_bytes: None,
    }
}

/// Writes `bytes` over a file.
fn replace(path: &Path, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

fn header_and_data(file: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (&file[8..8 + length], &file[8 + length..])
}

#[test]
fn spoiled_and_resealed_packed_files_never_panic() {
    let mut case = Case::new();
    case.write("tokenizer.json", b"{}");
    case.tensors.truncate(8);
    case.save();
    let checkpoint = checkpoint::open(case.source.path()).unwrap();
    let options = options();
    Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent)
        .unwrap()
        .write(Cpu::detect(), false, &Silent)
        .unwrap();
    let packed = std::fs::read(case.output()).unwrap();
    let (text, data) = header_and_data(&packed);
    let header: Value = serde_json::from_slice(text).unwrap();
    let manifest: Value = serde_json::from_str(header["__metadata__"]["bkpack"].as_str().unwrap()).unwrap();
    assert!(assemble(text, data, 1) == packed, "resealing what was not changed changes nothing");

    let path = case.target.path().join("spoiled.bkpack");
    let mut random = Random(21);
    let (mut opened, mut refused) = (0, 0);
    for turn in 0..6000 {
        let (mut header, mut manifest, mut data) = (header.clone(), manifest.clone(), data.to_vec());
        let mut bytes = match turn % 4 {
            0 => {
                spoil(&mut header, &mut random);
                header.to_string().into_bytes()
            }
            1 | 2 => {
                for _ in 0..=random.below(2) {
                    spoil(&mut manifest, &mut random);
                }
                header["__metadata__"]["bkpack"] = json!(manifest.to_string());
                header.to_string().into_bytes()
            }
            _ => {
                let mut text = text.trim_ascii_end().to_vec();
                scramble(&mut text, &mut random);
                text
            }
        };
        // Now and then the data is changed too, so that what opens is not what was packed.
        if random.below(3) == 0 {
            let place = random.below(data.len());
            data[place] = random.next() as u8;
        }
        bytes = assemble(&bytes, &data, 4096);
        replace(&path, &bytes);
        match PackedFile::open(&path) {
            Ok(packed) => {
                opened += 1;
                read_all(&packed);
                let _ = packed.check_contents(&Silent);
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("spoiled.bkpack"), "{error}");
            }
        }
    }
    // Producer, source, policy and hashes may be anything well-formed; everything else is refused.
    assert!(opened > 100 && refused > 3000, "{opened} opened, {refused} refused");
}

#[test]
fn spoiled_checkpoints_never_panic() {
    let case = Case::new();
    case.save();
    let whole = safetensors(&case.tensors);
    let (text, data) = header_and_data(&whole);
    let header: Value = serde_json::from_slice(text).unwrap();
    let path = case.source.path().join("model.safetensors");
    let mut random = Random(22);
    let (mut opened, mut refused) = (0, 0);
    for turn in 0..4000 {
        let (mut header, mut config) = (header.clone(), case.config.clone());
        let bytes = match turn % 3 {
            0 => {
                spoil(&mut header, &mut random);
                header.to_string().into_bytes()
            }
            1 => {
                let mut text = text.to_vec();
                scramble(&mut text, &mut random);
                text
            }
            _ => {
                spoil(&mut config, &mut random);
                text.to_vec()
            }
        };
        replace(&path, &assemble(&bytes, data, 1));
        let mut config = config.to_string().into_bytes();
        if turn % 6 == 5 {
            scramble(&mut config, &mut random);
        }
        replace(&case.source.path().join("config.json"), &config);
        match checkpoint::open(case.source.path()) {
            Ok(checkpoint) => {
                opened += 1;
                read_all(&checkpoint);
                let options =
                    PackOptions { policy: Policy::uniform("int4".parse().unwrap(), &[], &[]).unwrap(), ..options() };
                let _ = Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 1000 && refused > 1000, "{opened} opened, {refused} refused");
}

#[test]
fn spoiled_archives_never_panic_and_leave_nothing() {
    let case = Case::new();
    case.write("tokenizer.json", b"{}");
    case.save();
    let checkpoint = checkpoint::open(case.source.path()).unwrap();
    let options = options();
    let packing = Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent).unwrap();
    packing.write(Cpu::detect(), false, &Silent).unwrap();
    let path = case.source.path().join("spoiled");
    archive(&case.output(), &path, false, &Silent).unwrap();
    std::fs::remove_file(case.output()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let (text, data) = header_and_data(&whole);
    let header: Value = serde_json::from_slice(text).unwrap();
    let mut random = Random(23);
    let mut refused = 0;
    for _ in 0..1000 {
        let mut header = header.clone();
        spoil(&mut header, &mut random);
        replace(&path, &assemble(header.to_string().as_bytes(), data, 1));
        match unpack(&path, &case.output(), false, &Silent) {
            Ok(()) => std::fs::remove_file(case.output()).unwrap(),
            Err(_) => refused += 1,
        }
        assert!(case.left().is_empty(), "{:?}", case.left());
    }
    assert!(refused > 500, "{refused}");
}
