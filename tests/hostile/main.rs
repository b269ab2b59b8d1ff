//! Checkpoints and packed files made to break things: each is refused in one clear sentence, nothing is left behind,
//! nothing panics.

mod case;
#[path = "../common/mod.rs"]
mod common;
mod damage;

use bkpack::{format::PackedFile, tensor::TensorSource};
use bkpack_kernels::Cpu;
use case::{Case, HIDDEN, VOCAB};
use common::{Random, Stored, safetensors};
use serde_json::{Value, json};

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
