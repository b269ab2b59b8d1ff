//! GGUF exports: every value as an independent decoder reads it, sizes to the byte, what is refused.

#[path = "common/gguf.rs"]
mod gguf_reader;

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    Error,
    export::{self, Fidelity, Options, Plan, Target},
    format::PackedFile,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use common::{Random, Stored, fixture, safetensors};
use gguf_reader::{Gguf, Value};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const HIDDEN: usize = HEADS * HEAD_DIM;
const VOCAB: usize = 24;

/// A Llama of one layer whose up projection is these weights.
fn model(folder: &Path, intermediate: usize, up: &[f32]) {
    let mut random = Random(7);
    let mut tensor = |name: &str, shape: &[usize]| Stored::random(name, "F32", shape, 0.1, &mut random);
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors = vec![
        tensor("model.embed_tokens.weight", &[VOCAB, HIDDEN]),
        tensor("model.norm.weight", &[HIDDEN]),
        tensor(&layer("input_layernorm"), &[HIDDEN]),
        tensor(&layer("post_attention_layernorm"), &[HIDDEN]),
        tensor(&layer("mlp.gate_proj"), &[intermediate, HIDDEN]),
        tensor(&layer("mlp.down_proj"), &[HIDDEN, intermediate]),
    ];
    for (name, rows) in [("q_proj", HIDDEN), ("k_proj", HIDDEN / 2), ("v_proj", HIDDEN / 2), ("o_proj", HIDDEN)] {
        tensors.push(tensor(&layer(&format!("self_attn.{name}")), &[rows, HIDDEN]));
    }
    tensors.push(Stored::of(&layer("mlp.up_proj"), "F32", &[intermediate, HIDDEN], up));
    std::fs::write(folder.join("model.safetensors"), safetensors(&tensors)).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "intermediate_size": intermediate, "num_attention_heads": HEADS, "num_key_value_heads": HEADS / 2,
        "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3]
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn weights(count: usize) -> Vec<f32> {
    let mut random = Random(11);
    (0..count).map(|_| random.weight() * 0.1).collect()
}

fn pack(source: &Path, output: &Path, options: &str) -> PackedFile {
    let mut command = Command::new(cargo_bin("bkpack"));
    command.arg("convert").arg(source).arg("-o").arg(output).args(["--quiet", "--force"]);
    let done = command.args(options.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "{options}: {done:?}");
    PackedFile::open(output).unwrap()
}

/// Exports, checks the predicted size, and reads the file back.
fn export(packed: &PackedFile, options: &Options, output: &Path) -> (Plan, Gguf) {
    let plan = export::export(packed, Target::Gguf, options, output, true, &Silent).unwrap();
    let bytes = std::fs::read(output).unwrap();
    assert_eq!(bytes.len() as u64, plan.file_bytes);
    (plan, gguf_reader::read(&bytes))
}

fn plan(packed: &PackedFile) -> Result<Plan, Error> {
    export::plan(packed, Target::Gguf, &Options::default(), &Silent)
}

fn write(packed: &PackedFile, output: &Path, force: bool) -> Result<Plan, Error> {
    export::export(packed, Target::Gguf, &Options::default(), output, force, &Silent)
}

fn values(packed: &PackedFile, name: &str) -> Vec<f32> {
    let tensor = packed.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
    values
}

/// Rows in llama.cpp's order: of each head, row i of the first half, then row i of the second.
fn turned(rows: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = rows.chunks(width).collect();
    rows.chunks(head_dim)
        .flat_map(|head| (0..head_dim / 2).flat_map(|i| [head[i], head[i + head_dim / 2]]))
        .flatten()
        .copied()
        .collect()
}

/// Compares every tensor of a Llama's export with the packed values, as the plan says that they compare.
fn compare(packed: &PackedFile, plan: &Plan, file: &Gguf, head_dim: usize, largest_error: f32) {
    assert_eq!(plan.tensors.len(), packed.names().len());
    for tensor in &plan.tensors {
        let [name] = tensor.names.as_slice() else { panic!("{:?}", tensor.names) };
        let found = &file.tensors[name];
        assert_eq!(gguf_reader::name(found.kind), tensor.target, "{name}");
        let mut wanted = values(packed, &tensor.name);
        if name.contains("attn_q") || name.contains("attn_k") {
            wanted = turned(&wanted, head_dim, *tensor.shape.last().unwrap());
        }
        assert_eq!(found.shape, tensor.shape);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        if tensor.fidelity == Fidelity::Lossless {
            assert!(bits(&found.values) == bits(&wanted), "{name} as {} is not lossless", tensor.target);
        } else {
            let energy: f32 = wanted.iter().map(|value| value * value).sum();
            let error: f32 = found.values.iter().zip(&wanted).map(|(a, b)| (a - b) * (a - b)).sum();
            let relative = (error / energy).sqrt();
            assert!(relative <= largest_error, "{name} as {}: {relative}", tensor.target);
            assert!(relative > 0.0, "{name} as {} is called rounded", tensor.target);
        }
    }
}

fn target<'a>(plan: &'a Plan, part: &str) -> (&'a str, bool) {
    let tensor = plan.tensors.iter().find(|tensor| tensor.name.contains(part)).unwrap();
    (&tensor.target, tensor.fidelity == Fidelity::Lossless)
}

#[test]
fn packed_weights_move_into_the_smallest_type_that_holds_them() {
    let folder = TempDir::new().unwrap();
    model(folder.path(), 512, &weights(512 * HIDDEN));
    for (options, wanted) in [
        ("--bits 2 --group-size 32", "Q4_0"),
        ("--bits 3 --group-size 64", "Q4_0"),
        ("--bits 4 --group-size 32", "Q4_0"),
        ("--bits 4 --group-size row", "Q4_0"),
        ("--bits 5 --group-size 128", "Q5_0"),
        ("--bits 6 --group-size 32", "Q8_0"),
        ("--bits 7 --group-size 256", "Q8_0"),
        ("--bits 8 --group-size row", "Q8_0"),
        ("--bits 2 --asymmetric --group-size 32", "Q4_0"),
        ("--bits 3 --asymmetric --group-size 64", "Q4_0"),
        ("--bits 4 --asymmetric --group-size 64", "Q5_0"),
        ("--bits 5 --asymmetric --group-size 32", "Q8_0"),
        ("--bits 6 --asymmetric --group-size 128", "Q8_0"),
        ("--bits 1.58 --group-size 256", "TQ2_0"),
        ("--bits 1.58 --group-size 64", "Q4_0"),
        ("--bits 1 --group-size 32", "Q4_0"),
        ("--bits 1 --group-size row", "TQ2_0"),
    ] {
        let packed = pack(folder.path(), &folder.path().join("m.bkpack"), options);
        let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
        assert_eq!(target(&plan, "up_proj"), (wanted, true), "{options}");
        compare(&packed, &plan, &file, HEAD_DIM, 0.0);
    }
}

#[test]
fn minima_are_used_where_they_are_exact() {
    let folder = TempDir::new().unwrap();
    // None is negative, so zero points are 0, and so is the minimum of every group.
    let up: Vec<f32> = weights(512 * HIDDEN).iter().map(|weight| weight.abs()).collect();
    model(folder.path(), 512, &up);
    for (bits, wanted) in [(4, "Q4_1"), (5, "Q5_1")] {
        let options = format!("--bits {bits} --asymmetric --group-size 32");
        let packed = pack(folder.path(), &folder.path().join("m.bkpack"), &options);
        let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
        assert_eq!(target(&plan, "up_proj"), (wanted, true));
        compare(&packed, &plan, &file, HEAD_DIM, 0.0);
    }
}

#[test]
fn what_no_type_holds_is_rounded_and_said_so() {
    let folder = TempDir::new().unwrap();
    // One group so small that the scales are F32.
    let mut up = weights(288 * HIDDEN);
    let group = Random(5).below(up.len() / 32);
    up[32 * group..][..32].iter_mut().for_each(|weight| *weight *= 1e-9);
    model(folder.path(), 288, &up);
    let requantize = Options { requantize: true, ..Options::default() };
    let f32 = Options { dtype: Some(bkpack_kernels::FloatType::F32), ..Options::default() };
    for (bits, kind, largest) in [(4, "Q4_K", 0.05), (6, "Q6_K", 0.015), (8, "Q8_0", 0.01)] {
        let options = format!("--bits {bits} --group-size 32 --keep embed");
        let packed = pack(folder.path(), &folder.path().join("m.bkpack"), &options);
        let output = folder.path().join("m.gguf");
        let (plan, file) = export(&packed, &Options::default(), &output);
        assert_eq!(target(&plan, "up_proj"), ("F16", false));
        // What is kept as F32 is a matrix like any other.
        assert_eq!(target(&plan, "embed_tokens"), ("F16", false));
        assert!(target(&plan, "down_proj").1);
        compare(&packed, &plan, &file, HEAD_DIM, 1e-3);

        let (plan, file) = export(&packed, &requantize, &output);
        assert_eq!(target(&plan, "up_proj"), (kind, false));
        assert_eq!(target(&plan, "embed_tokens"), ("F16", false));
        compare(&packed, &plan, &file, HEAD_DIM, largest);

        let (plan, file) = export(&packed, &f32, &output);
        assert_eq!(target(&plan, "up_proj"), ("F32", true));
        compare(&packed, &plan, &file, HEAD_DIM, 0.0);
    }
}

#[test]
fn rows_and_values_that_no_block_fits_become_floats() {
    let folder = TempDir::new().unwrap();
    // Too small for F16 throughout.
    let up: Vec<f32> = weights(40 * HIDDEN).iter().map(|weight| weight * 1e-6).collect();
    model(folder.path(), 40, &up);
    let packed = pack(folder.path(), &folder.path().join("m.bkpack"), "--bits 4 --group-size 32");
    for requantize in [false, true] {
        let options = Options { requantize, ..Options::default() };
        let (plan, file) = export(&packed, &options, &folder.path().join("m.gguf"));
        assert_eq!(target(&plan, "down_proj"), ("F16", false)); // [256, 40]
        compare(&packed, &plan, &file, HEAD_DIM, 1e-3);
    }
    let packed = pack(folder.path(), &folder.path().join("m.bkpack"), "--bits 32");
    let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
    assert_eq!(target(&plan, "up_proj"), ("F32", true));
    compare(&packed, &plan, &file, HEAD_DIM, 1e-3);
}

#[test]
fn the_real_model_has_its_metadata_and_its_tokenizer() {
    let folder = TempDir::new().unwrap();
    let packed = pack(&fixture(), &folder.path().join("m.bkpack"), "--bits 4 --group-size 64");
    let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
    assert!(plan.warnings.is_empty() && plan.refusals.is_empty() && plan.notices.is_empty(), "{plan:?}");
    compare(&packed, &plan, &file, 32, 0.0);
    let text = |text: &str| Value::Text(text.into());
    for (key, wanted) in [
        ("general.architecture", text("llama")),
        ("general.file_type", Value::Number(2.0)),
        ("general.quantization_version", Value::Number(2.0)),
        ("llama.block_count", Value::Number(6.0)),
        ("llama.vocab_size", Value::Number(4096.0)),
        ("llama.attention.head_count_kv", Value::Number(4.0)),
        ("llama.rope.dimension_count", Value::Number(32.0)),
        ("llama.rope.freq_base", Value::Number(10000.0)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.bos_token_id", Value::Number(0.0)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ] {
        assert_eq!(file.metadata[key], wanted, "{key}");
    }
    let list = |key: &str| match &file.metadata[key] {
        Value::List(values) => values,
        other => panic!("{other:?}"),
    };
    let tokenizer: Json = serde_json::from_slice(&std::fs::read(fixture().join("tokenizer.json")).unwrap()).unwrap();
    let tokens = list("tokenizer.ggml.tokens");
    assert_eq!(tokens.len(), 4096);
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        assert_eq!(tokens[id.as_u64().unwrap() as usize], text(token));
    }
    assert_eq!(list("tokenizer.ggml.merges").len(), tokenizer["model"]["merges"].as_array().unwrap().len());
    assert_eq!(list("tokenizer.ggml.token_type")[..2], [Value::Number(3.0), Value::Number(1.0)]);
}

fn architecture(name: &str) -> PathBuf {
    fixture().join("../architectures").join(name)
}

#[test]
fn experts_are_stacked_however_they_are_stored() {
    let folder = TempDir::new().unwrap();
    let exports = ["mixtral", "mixtral_stacked"].map(|name| {
        let packed = pack(&architecture(name), &folder.path().join(format!("{name}.bkpack")), "--bits 32");
        export(&packed, &Options::default(), &folder.path().join(format!("{name}.gguf"))).1
    });
    let [single, stacked] = &exports;
    assert_eq!(single.metadata["llama.expert_count"], stacked.metadata["llama.expert_count"]);
    assert!(single.tensors.keys().any(|name| name.ends_with("ffn_gate_exps.weight")));
    assert_eq!(single.tensors.len(), stacked.tensors.len());
    for (name, tensor) in &single.tensors {
        assert_eq!(tensor.shape, stacked.tensors[name].shape);
        assert_eq!(tensor.values, stacked.tensors[name].values, "{name}");
    }
}

#[test]
fn mamba_has_llama_cpps_tensors() {
    let folder = TempDir::new().unwrap();
    let packed = pack(&architecture("mamba"), &folder.path().join("m.bkpack"), "--bits 32");
    let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
    assert_eq!(file.metadata["general.architecture"], Value::Text("mamba".into()));
    assert_eq!(file.metadata["mamba.feed_forward_length"], Value::Number(0.0));
    let a: Vec<f32> = values(&packed, "backbone.layers.0.mixer.A_log").iter().map(|value| -value.exp()).collect();
    assert_eq!(file.tensors["blk.0.ssm_a"].values, a);
    assert_eq!(target(&plan, "layers.0.mixer.A_log"), ("F32", false));
    let convolution = &file.tensors["blk.0.ssm_conv1d.weight"];
    let shape = packed.shape("backbone.layers.0.mixer.conv1d.weight").unwrap();
    assert_eq!(convolution.shape, [shape[0], shape[2]]);
    assert_eq!(convolution.values, values(&packed, "backbone.layers.0.mixer.conv1d.weight"));
}

#[test]
fn what_llama_cpp_cannot_run_is_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("m.gguf");
    for (name, word) in [("resnet_bk", "ResNet-BK"), ("mamba_bias", "use_bias")] {
        let packed = pack(&architecture(name), &folder.path().join("m.bkpack"), "--bits 32");
        let plan = plan(&packed).unwrap();
        assert!(plan.refusals.iter().any(|refusal| refusal.why.contains(word)), "{plan:?}");
        assert!(matches!(write(&packed, &output, true), Err(Error::Export { why, .. }) if why.contains(word)));
        assert!(!output.exists());
    }
    let packed = pack(&architecture("mistral"), &folder.path().join("m.bkpack"), "--bits 32");
    assert!(plan(&packed).unwrap().warnings.iter().any(|warning| warning.why.contains("sliding window")));
    write(&packed, &output, false).unwrap();
    assert!(matches!(write(&packed, &output, false), Err(Error::Exists { .. })));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn what_gguf_cannot_say_is_a_failed_check_and_no_bad_input() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("m.bkpack");
    model(folder.path(), 32, &weights(32 * HIDDEN));
    pack(&folder.path().join("model.safetensors"), &output, "--bits 8");
    let done = Command::new(cargo_bin("bkpack")).args(["check-export", "--to", "gguf"]).arg(&output).output().unwrap();
    let (code, text) = (done.status.code(), String::from_utf8(done.stdout).unwrap());
    assert!(code == Some(1) && text.contains("no config.json") && text.contains("--config"), "{text}");
}

#[test]
fn layers_whose_experts_are_stored_in_another_way_than_the_first_are_no_panic() {
    let folder = TempDir::new().unwrap();
    let source = architecture("mixtral");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let zeros = [0; 8 * 4];
    let view = |shape: &[usize]| {
        ::safetensors::tensor::TensorView::new(::safetensors::Dtype::F32, shape.to_vec(), &zeros).unwrap()
    };
    let mut all: Vec<_> = tensors.iter().map(|(name, view)| (name.to_owned(), view)).collect();
    for (name, shape) in
        [("experts.gate_up_proj", &[1, 1, 8][..]), ("experts.down_proj", &[1, 1, 8]), ("gate.weight", &[1, 8])]
    {
        all.push((format!("model.layers.1.mlp.{name}"), view(shape)));
    }
    std::fs::write(folder.path().join("model.safetensors"), ::safetensors::serialize(all, None).unwrap()).unwrap();
    let packed = pack(folder.path(), &folder.path().join("m.bkpack"), "--bits 32");
    let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
    assert!(plan.notices.iter().any(|notice| notice.contains("left out")), "{:?}", plan.notices);
    let whole = pack(&source, &folder.path().join("w.bkpack"), "--bits 32");
    let (_, wanted) = export(&whole, &Options::default(), &folder.path().join("w.gguf"));
    assert_eq!(file.tensors.len(), wanted.tensors.len());
    assert!(wanted.tensors.keys().all(|name| file.tensors.contains_key(name)));
}

/// The plan, or the error, of the small model with a tokenizer.json.
fn with_tokenizer(tokenizer: &str) -> Result<(Plan, Option<Gguf>), Error> {
    let folder = TempDir::new().unwrap();
    model(folder.path(), 32, &weights(32 * HIDDEN));
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    let packed = pack(folder.path(), &folder.path().join("m.bkpack"), "--bits 8");
    let planned = plan(&packed)?;
    if !planned.refusals.is_empty() {
        return Ok((planned, None));
    }
    let (plan, file) = export(&packed, &Options::default(), &folder.path().join("m.gguf"));
    Ok((plan, Some(file)))
}

#[test]
fn hostile_tokenizers_are_refused() {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false});
    let with = |model: Json| json!({"model": model, "pre_tokenizer": bytes}).to_string();
    let bpe = |vocab: Json, merges: Json| with(json!({"type": "BPE", "vocab": vocab, "merges": merges}));
    for text in [
        String::new(),
        "[]".into(),
        "{".into(),
        "null".into(),
        r#"{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}"#.into(),
        with(json!(null)),
        with(json!({"type": 3, "vocab": {}, "merges": []})),
        with(json!({"type": "BPE", "merges": []})),
        with(json!({"type": "BPE", "vocab": {}})),
        bpe(json!(["a"]), json!([])),
        bpe(json!({"a": -1}), json!([])),
        bpe(json!({"a": "0"}), json!([])),
        bpe(json!({"a": 0, "b": 0}), json!([])),
        bpe(json!({"a": 0}), json!(["a"])),
        bpe(json!({"a": 0}), json!(["a b c"])),
        bpe(json!({"a": 0}), json!([["a"]])),
        bpe(json!({"a": 0}), json!([["a", 1]])),
        bpe(json!({"a": 0}), json!({"a": "b"})),
        json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": bytes,
            "added_tokens": [{"id": 0, "content": "x"}]})
        .to_string(),
        json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": bytes, "added_tokens": [7]})
            .to_string(),
    ] {
        match with_tokenizer(&text) {
            Err(Error::Tokenizer { .. } | Error::Json { .. } | Error::DuplicateKey { .. }) => {}
            other => panic!("{text}: {:?}", other.map(|(plan, _)| plan)),
        }
    }
    let added = json!([{"id": 1u64 << 40, "content": "x"}]);
    let bpe = |vocab: Json, merges: Json| json!({"type": "BPE", "vocab": vocab, "merges": merges});
    for (model, added, word) in [
        (bpe(json!({"a": VOCAB}), json!([])), json!([]), "24 ids"),
        (bpe(json!({"a": u64::MAX}), json!([])), json!([]), "24 ids"),
        (bpe(json!({"a": 0}), json!([])), added, "24 ids"),
        (bpe(json!({"a": 0}), json!([["a", "b c"]])), json!([]), "spaces"),
        (json!({"type": "Unigram", "vocab": [["a", -1.0]]}), json!([]), "Unigram"),
        (
            json!({"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}),
            json!([]),
            "end_of_word_suffix",
        ),
    ] {
        let tokenizer = json!({"model": model, "pre_tokenizer": bytes, "added_tokens": added});
        let (plan, _) = with_tokenizer(&tokenizer.to_string()).unwrap();
        assert!(plan.refusals.iter().any(|refusal| refusal.why.contains(word)), "{plan:?}");
    }
    let characters = json!({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": null}).to_string();
    assert_eq!(with_tokenizer(&characters).unwrap().0.refusals.len(), 1);
}

#[test]
fn tokenizers_become_what_llama_cpp_reads() {
    let tokenizer = json!({
        "model": {"type": "BPE", "vocab": {"a": 4, "b": 5, "ab": 6, "[PAD7]": 8}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]},
        "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 9, "content": "word", "special": false}],
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
    });
    let (plan, file) = with_tokenizer(&tokenizer.to_string()).unwrap();
    let metadata = file.unwrap().metadata;
    // An unknown way to cut, a normalizer, and a space before the text.
    assert_eq!(plan.warnings.len(), 3, "{:?}", plan.warnings);
    assert_eq!(metadata["tokenizer.ggml.pre"], Value::Text("default".into()));
    assert_eq!(metadata["tokenizer.ggml.merges"], Value::List(vec![Value::Text("a b".into())]));
    assert_eq!(metadata["tokenizer.ggml.add_bos_token"], Value::Bool(true));
    assert_eq!(metadata["tokenizer.ggml.eos_token_id"], Value::Number(2.0));
    assert_eq!(metadata["tokenizer.ggml.eot_token_id"], Value::Number(3.0));
    let Value::List(tokens) = &metadata["tokenizer.ggml.tokens"] else { panic!() };
    let Value::List(types) = &metadata["tokenizer.ggml.token_type"] else { panic!() };
    assert_eq!((tokens.len(), types.len()), (VOCAB, VOCAB));
    assert_eq!(tokens[7], Value::Text("[PAD7]_".into()));
    let kinds = [5, 3, 5, 5, 1, 1, 1, 5, 1, 4].map(|kind| Value::Number(kind.into()));
    assert_eq!(types[..10], kinds);
}

#[test]
fn characters_with_bytes_to_fall_back_on_are_sentencepiece() {
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "\u{2581}": 2, "a": 3, "\u{2581}a": 4, "<0x0A>": 5, "aa": 6});
    vocab["\u{2581}aa"] = json!(7);
    let merges = json!([["\u{2581}", "a"], ["a", "a"], ["\u{2581}a", "a"], ["\u{2581}", "aa"]]);
    let tokenizer = json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "unk_token": "<unk>"},
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "pre_tokenizer": null,
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true}],
    });
    let (plan, file) = with_tokenizer(&tokenizer.to_string()).unwrap();
    let metadata = file.unwrap().metadata;
    // One byte of 256 has a token; the merges are complete.
    assert_eq!(plan.warnings.len(), 1, "{:?}", plan.warnings);
    assert_eq!(metadata["tokenizer.ggml.model"], Value::Text("llama".into()));
    assert_eq!(metadata["tokenizer.ggml.add_space_prefix"], Value::Bool(true));
    assert_eq!(metadata["tokenizer.ggml.unknown_token_id"], Value::Number(0.0));
    let Value::List(types) = &metadata["tokenizer.ggml.token_type"] else { panic!() };
    assert_eq!(types[..8], [2, 3, 1, 1, 1, 6, 1, 1].map(|kind| Value::Number(kind.into())));
    let Value::List(scores) = &metadata["tokenizer.ggml.scores"] else { panic!() };
    assert_eq!(scores[..8], [-4, -4, -4, -4, 0, -4, -1, -2].map(|score| Value::Number(score.into())));

    // A long token is not cut everywhere, or this would take hours.
    let mut long = tokenizer.clone();
    long["model"]["vocab"]["x".repeat(1 << 22)] = json!(8);
    assert_eq!(with_tokenizer(&long.to_string()).unwrap().0.warnings.len(), 2);

    let mut some = tokenizer;
    some["model"]["merges"].as_array_mut().unwrap().pop();
    assert_eq!(with_tokenizer(&some.to_string()).unwrap().0.warnings.len(), 2);
}
