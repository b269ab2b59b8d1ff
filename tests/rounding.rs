//! Calibrated rounding: on every architecture it costs less than rounding without a text, gives the same bytes whatever the
//! number of threads, and leaves nothing behind where it cannot go on.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name).to_str().unwrap().to_owned()
}

fn bkpack(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("bkpack")).env_remove("BKPACK_ISA").args(arguments).output().unwrap()
}

#[track_caller]
fn json_of(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Mixed token ids, which the tiny vocabularies hold.
fn tokens(folder: &Path, name: &str, first: usize, count: usize) -> String {
    let tokens: Vec<usize> = (first..first + count).map(|i| (i * i * 31 + i * 7 + i / 5) % 96).collect();
    let path = folder.join(name);
    std::fs::write(&path, json!(tokens).to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn names(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_architecture_loses_less_than_without_calibration() {
    for name in ["mamba", "mistral", "mixtral", "qwen2_tied", "qwen3", "resnet_bk"] {
        let temporary = tempfile::tempdir().unwrap();
        let source = fixture(&format!("architectures/{name}"));
        let calibration = tokens(temporary.path(), "calibration.json", 0, 16 * 64);
        let test = tokens(temporary.path(), "test.json", 5000, 640);
        let divergence = |rounding: &[&str]| {
            let packed = temporary.path().join("model.bkpack");
            let packed = packed.to_str().unwrap();
            let convert = ["convert", &source, "-o", packed, "--bits", "4", "--group-size", "32", "--force", "-q"];
            let converted = bkpack(&[&convert[..], rounding].concat());
            assert_eq!(converted.status.code(), Some(0), "{name}: {converted:?}");
            assert_eq!(bkpack(&["verify", packed, "-q"]).status.code(), Some(0));
            let eval = ["eval", packed, "--baseline", &source, "--tokens", &test, "--ctx", "64", "--json"];
            json_of(&bkpack(&eval))["kld_mean"].as_f64().unwrap()
        };
        let without = divergence(&[]);
        let with = divergence(&["--rounding", "gptq", "--calib-tokens", &calibration, "--ctx", "64"]);
        assert!(with < without, "{name}: {with} instead of {without}");
    }
}

#[test]
fn stacked_experts_are_packed_as_without_calibration() {
    let temporary = tempfile::tempdir().unwrap();
    let calibration = tokens(temporary.path(), "calibration.json", 0, 256);
    let packed = temporary.path().join("model.bkpack").to_str().unwrap().to_owned();
    let source = fixture("architectures/mixtral_stacked");
    let gptq = ["--rounding", "gptq", "--calib-tokens", &calibration, "--ctx", "64"];
    let converted = bkpack(&[&["convert", &source, "-o", &packed, "--group-size", "32"][..], &gptq].concat());
    assert_eq!(converted.status.code(), Some(0), "{converted:?}");
    assert_eq!(bkpack(&["verify", &packed]).status.code(), Some(0));
}

#[test]
fn the_real_model_loses_less_than_half_of_what_the_search_alone_does() {
    let temporary = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture("wikitext2.test.txt")).unwrap();
    // The end calibrates, the beginning is measured: this is a test of the method, not a figure.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let [calibration, test] = ["calibration.txt", "test.txt"].map(|name| temporary.path().join(name));
    std::fs::write(&calibration, &text[middle..]).unwrap();
    std::fs::write(&test, &text[..middle]).unwrap();
    let [calibration, test] = [&calibration, &test].map(|path| path.to_str().unwrap());
    let divergence = |rounding: &[&str], threads: &str| {
        let packed = temporary.path().join("model.bkpack");
        let path = packed.to_str().unwrap();
        let source = fixture("llama");
        let convert = ["convert", &source, "-o", path, "--keep", "embed", "--force", "--threads", threads, "--json"];
        let size = json_of(&bkpack(&[&convert[..], rounding].concat()))["file_bytes"].as_u64().unwrap();
        assert_eq!(std::fs::metadata(&packed).unwrap().len(), size);
        let eval =
            ["eval", path, "--baseline", &source, "--text", test, "--ctx", "256", "--limit-tokens", "8192", "--json"];
        let divergence = json_of(&bkpack(&eval))["kld_mean"].as_f64().unwrap();
        (divergence, std::fs::read(packed).unwrap())
    };
    let gptq = ["--rounding", "gptq", "--calib", calibration, "--samples", "16", "--ctx", "256"];
    let (search, _) = divergence(&[], "2");
    let (calibrated, bytes) = divergence(&gptq, "2");
    assert!(calibrated < 0.5 * search, "{calibrated} instead of {search}");
    assert!(divergence(&gptq, "1").1 == bytes, "the bytes depend on the number of threads");

    let inspected = json_of(&bkpack(&["inspect", temporary.path().join("model.bkpack").to_str().unwrap(), "--json"]));
    let policy = &inspected["policy"];
    assert_eq!(policy["rounding"], "gptq");
    assert_eq!((&policy["calibration"]["windows"], &policy["calibration"]["ctx"]), (&json!(16), &json!(256)));
    assert_eq!(policy["calibration"]["text"]["name"], "calibration.txt");
}

#[test]
fn what_cannot_be_calibrated_is_refused_and_leaves_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let calibration = tokens(temporary.path(), "calibration.json", 0, 256);
    let foreign = temporary.path().join("foreign.json");
    std::fs::write(&foreign, json!([0, 1, 96, 3]).to_string()).unwrap();
    let packed = temporary.path().join("out/model.bkpack");
    std::fs::create_dir(temporary.path().join("out")).unwrap();
    let source = fixture("architectures/qwen3");
    for (arguments, words) in [
        (&["--rounding", "gptq"][..], "--calib"),
        (&["--calib-tokens", &calibration], "--rounding gptq"),
        (&["--samples", "3"], "--samples: belongs to --calib"),
        (&["--ctx", "64"], "--ctx: belongs to --calib"),
        (&["--rounding", "gptq", "--calib-tokens", &calibration, "--ctx", "257"], "do not fill one window of 257"),
        (&["--rounding", "gptq", "--calib-tokens", &calibration, "--ctx", "100000"], "context of 512"),
        (&["--rounding", "gptq", "--calib-tokens", foreign.to_str().unwrap(), "--ctx", "4"], "vocabulary"),
        (&["--rounding", "gptq", "--calib", &calibration], "tokenizer"),
    ] {
        let refused = bkpack(&[&["convert", &source, "-o", packed.to_str().unwrap()][..], arguments].concat());
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{words:?} is not in {message}");
        assert!(names(&temporary.path().join("out")).is_empty());
    }
}
