//! `bkpack bench` and `bkpack inspect --cpu`: figures that agree with each other and with the model, and clear refusals.

#[path = "common/command.rs"]
mod output;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack_kernels::{Cpu, Isa};
use output::{refused, succeeded};
use serde_json::Value;
use tempfile::TempDir;

/// A Llama of 5.5 million parameters in BF16.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")
}

fn bkpack(isa: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = Command::new(cargo_bin("bkpack"));
    command.env_remove("BKPACK_ISA").env("NO_COLOR", "1");
    if let Some(isa) = isa {
        command.env("BKPACK_ISA", isa);
    }
    command.args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&succeeded(output)).unwrap()
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The fixture at 4 bits, embedding and head included.
fn packed() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    succeeded(&bkpack(None, &["convert", fixture().to_str().unwrap(), "-o", output.to_str().unwrap(), "-q"]));
    (folder, output)
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-9 * expected.abs()
}

#[test]
fn figures_agree_with_each_other_and_with_the_file() {
    let (_folder, model) = packed();
    let arguments = ["--prefill", "9", "--decode", "5", "--repetitions", "3", "--threads", "2", "--json"];
    let arguments = [&["bench", model.to_str().unwrap(), "--activations", "int8"], &arguments[..]].concat();
    let output = bkpack(None, &arguments);
    assert!(output.stderr.is_empty(), "{output:?}");
    let speed = json(&output);

    for (part, tokens) in [("prefill", 9.0), ("decode", 5.0)] {
        let part = &speed[part];
        let mut seconds: Vec<f64> = part["seconds"].as_array().unwrap().iter().map(float).collect();
        assert_eq!(seconds.len(), 3);
        seconds.sort_by(f64::total_cmp);
        assert!(seconds[0] > 0.0);
        assert_eq!(float(&part["tokens"]), tokens);
        assert!(close(float(&part["tokens_per_second"]), tokens / seconds[1]));
        assert!(close(float(&part["best_tokens_per_second"]), tokens / seconds[0]));
    }

    // What decode reads: every matrix of the file once, the embedding as the head and a row of it for the token; neither
    // norms nor files inside.
    let inspected = json(&bkpack(None, &["inspect", model.to_str().unwrap(), "--json"]));
    let tensors = inspected["tensors"].as_array().unwrap();
    let row = 256.0 / 2.0 + 2.0 * 2.0;
    let matrices = tensors.iter().filter(|tensor| tensor["shape"].as_array().unwrap().len() == 2);
    let bytes: f64 = matrices.map(|tensor| float(&tensor["bytes"])).sum::<f64>() + row;
    assert_eq!(float(&speed["weight_bytes_per_token"]), bytes);
    let rate = float(&speed["decode_gb_per_second"]);
    assert!(close(rate, bytes * float(&speed["decode"]["tokens_per_second"]) / 1e9));
    let memory = &speed["memory"];
    assert_eq!(float(&memory["bytes"]), bytes);
    assert!(float(&memory["gb_per_second"]) > 0.0);
    assert!(close(float(&memory["decode_share"]), rate / float(&memory["gb_per_second"])));

    assert_eq!((&speed["activations"], &speed["threads"]), (&"int8".into(), &2.into()));
    assert_eq!(speed["isa"], Cpu::detect().isa().name());
    assert_eq!((&speed["file_bytes"], &speed["parameters"]), (&inspected["file_bytes"], &inspected["parameters"]));
    assert!(float(&speed["first_token_seconds"]) > 0.0);
}

#[test]
fn what_is_not_asked_for_is_left_out() {
    let (_folder, model) = packed();
    let model = model.to_str().unwrap();
    let first = ["bench", model, "--prefill", "0", "--decode", "0", "--no-memory", "--json"];
    let speed = json(&bkpack(None, &first));
    let absent = ["prefill", "decode", "decode_gb_per_second", "memory"];
    assert!(absent.iter().all(|key| speed.get(key).is_none()), "{speed}");
    assert!(float(&speed["first_token_seconds"]) > 0.0 && float(&speed["weight_bytes_per_token"]) > 0.0);

    let text = succeeded(&bkpack(None, &["bench", model, "--prefill", "0", "--decode", "2", "--repetitions", "1"]));
    let names: Vec<&str> = text.lines().map(|line| line.trim_start().split("  ").next().unwrap()).collect();
    let expected =
        ["first token", "decode", "weights a token", "decode reads", "memory", "file bytes", "activations", "runs"];
    assert_eq!(names, expected);
}

#[test]
fn every_architecture_is_measured_on_every_instruction_set() {
    for folder in ["mamba", "mixtral", "resnet_bk"] {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(folder);
        for isa in Cpu::available().into_iter().map(Cpu::isa) {
            let arguments = ["--prefill", "3", "--decode", "2", "--repetitions", "1", "--no-memory", "--json", "-q"];
            let arguments = [&["bench", model.to_str().unwrap()], &arguments[..]].concat();
            let speed = json(&bkpack(Some(isa.name()), &arguments));
            assert_eq!(speed["isa"], isa.name());
            assert!(float(&speed["decode"]["tokens_per_second"]) > 0.0, "{folder}");
        }
    }
}

#[test]
fn wrong_use_is_refused() {
    let model = fixture();
    let bench = |arguments: &[&str]| bkpack(None, &[&["bench", model.to_str().unwrap()], arguments].concat());
    refused(&bench(&["--prefill", "100000"]), &["--prefill", "100000 tokens exceed the model's context of"]);
    refused(&bench(&["--decode", "100000"]), &["--decode", "100000 tokens exceed the model's context of"]);
    assert_eq!(bench(&["--repetitions", "0"]).status.code(), Some(2));
    refused(&bkpack(None, &["bench", "no-such-model"]), &["no-such-model"]);
    refused(&bench(&["--activations", "bf16"]), &["--activations: bf16 is computed on the GPU alone"]);
}

#[test]
fn the_cpu_is_described_as_it_is_found() {
    let described = json(&bkpack(None, &["inspect", "--cpu", "--json"]));
    assert_eq!(described["isa"], Cpu::detect().isa().name());
    let available: Vec<Isa> = Cpu::available().into_iter().map(Cpu::isa).collect();
    let sets = described["instruction_sets"].as_array().unwrap();
    assert_eq!(sets.len(), Isa::ALL.len());
    for (set, isa) in sets.iter().zip(Isa::ALL) {
        assert_eq!((set["name"].as_str(), set["found"].as_bool()), (Some(isa.name()), Some(available.contains(&isa))));
    }
    for isa in available {
        let described = json(&bkpack(Some(isa.name()), &["inspect", "--cpu", "--json"]));
        assert_eq!(described["isa"], isa.name());
        assert_eq!(described["int8_products"], isa.describe().int8_products);
        let text = succeeded(&bkpack(Some(isa.name()), &["inspect", "--cpu"]));
        assert!(text.contains(&format!("{isa} (as BKPACK_ISA says)")), "{text}");
    }
    assert!(!described["cpu"].as_str().unwrap().is_empty() && described["threads"].as_u64() > Some(0));
}

#[test]
fn an_instruction_set_that_is_not_there_is_refused() {
    refused(&bkpack(Some("sse9"), &["inspect", "--cpu"]), &["`sse9` is not an instruction set"]);
    refused(&bkpack(Some("sse9"), &["bench", fixture().to_str().unwrap()]), &["`sse9` is not an instruction set"]);
    for isa in Isa::ALL.into_iter().filter(|&isa| Cpu::with_isa(isa).is_none()) {
        refused(&bkpack(Some(isa.name()), &["inspect", "--cpu"]), &["this CPU does not support", isa.name()]);
    }
    let both = bkpack(None, &["inspect", "--cpu", "model.bkpack"]);
    assert_eq!(both.status.code(), Some(2));
    assert_eq!(bkpack(None, &["inspect"]).status.code(), Some(2));
}
