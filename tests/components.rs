//! What each component of a packed model costs: bytes that add up to the file, divergences that are zero for what is not
//! changed and together of the size of the whole.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    Error, Result,
    checkpoint::{self, Checkpoint},
    eval::{
        components::{ComponentCost, ComponentCosts, component_costs},
        perplexity::{Options, evaluate},
        text::{Tokenizer, read_text},
    },
    format::PackedFile,
    ops::cpu::Activations,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use serde_json::Value;
use tempfile::TempDir;

const OPTIONS: Options = Options { ctx: Some(64), skip: 1, activations: Activations::Exact, allow_lookahead: false };

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// A Llama of 5.5 million parameters in BF16.
fn llama() -> PathBuf {
    fixtures().join("llama")
}

fn text() -> PathBuf {
    fixtures().join("wikitext2.test.txt")
}

fn architecture(name: &str) -> PathBuf {
    fixtures().join("architectures").join(name)
}

fn bkpack(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("bkpack")).args(arguments).output().unwrap()
}

#[track_caller]
fn succeeded(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A checkpoint packed to a file of this name.
fn convert(folder: &TempDir, source: &Path, arguments: &[&str]) -> PathBuf {
    let output = folder.path().join("model.bkpack");
    let paths = ["convert", source.to_str().unwrap(), "-o", output.to_str().unwrap(), "--force", "-q"];
    succeeded(bkpack(&[&paths, arguments].concat()));
    output
}

fn measure(packed: &PackedFile, source: &Checkpoint, tokens: &[u32], windows: usize) -> Result<ComponentCosts> {
    component_costs(Cpu::detect(), packed, source, tokens, windows, &OPTIONS, &Silent)
}

/// Tokens of the vocabulary of the random models.
fn ids(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i * 31 + i * 7 + i / 5) % 96).collect()
}

fn line<'a>(costs: &'a ComponentCosts, component: &str, encoding: &str) -> &'a ComponentCost {
    let found = costs.components.iter().find(|line| line.component == component && line.encoding == encoding);
    found.unwrap_or_else(|| panic!("no {component} at {encoding} in {costs:?}"))
}

#[test]
fn components_add_up_to_the_model() {
    let folder = TempDir::new().unwrap();
    let source = checkpoint::open(&llama()).unwrap();
    let mut tokens = Tokenizer::load(&source).unwrap().encode(&read_text(&text()).unwrap()).unwrap();
    tokens.truncate(64 * 12);
    let path = convert(&folder, &llama(), &["--bits", "4", "--tensor", "mlp=int3", "--tensor", "layers.0=fp32"]);
    let packed = PackedFile::open(&path).unwrap();
    let costs = measure(&packed, &source, &tokens, 12).unwrap();
    println!("{costs:#?}");

    let names: Vec<(&str, &str)> =
        costs.components.iter().map(|line| (line.component.as_str(), line.encoding.as_str())).collect();
    assert_eq!(names.len(), 6, "{names:?}");
    let bytes: u64 = costs.components.iter().map(|line| line.bytes).sum();
    assert_eq!(bytes + costs.rest_bytes, path.metadata().unwrap().len());
    assert_eq!(costs.file_bytes, path.metadata().unwrap().len());
    assert_eq!(costs.components.iter().map(|line| line.parameters).sum::<u64>(), packed.parameters());
    assert_eq!(costs.components.iter().map(|line| line.tensors).sum::<usize>(), packed.names().len());
    let baseline: u64 = costs.components.iter().map(|line| line.baseline_bytes).sum();
    assert_eq!(baseline, 2 * packed.parameters());

    // What is stored with the values that it had costs nothing, to the last bit.
    for line in costs.components.iter().filter(|line| ["FP32", "BF16"].contains(&line.encoding.as_str())) {
        assert_eq!((line.kld, line.kld_per_mb_saved), (0.0, None), "{line:?}");
    }
    let changed = [
        line(&costs, "other", "INT3 g128"),
        line(&costs, "other", "INT4 g128"),
        line(&costs, "embedding", "INT4 g128"),
    ];
    for line in changed {
        assert!(line.kld > 0.0 && line.kld < costs.kld, "{line:?} of {}", costs.kld);
        let saved = (line.baseline_bytes - line.bytes) as f64 / 1e6;
        assert!((line.kld_per_mb_saved.unwrap() * saved / line.kld - 1.0).abs() < 1e-12);
        assert_eq!(line.share, line.bytes as f64 / costs.file_bytes as f64);
    }
    assert!(changed[0].kld > changed[1].kld, "three bits of the larger matrices cost more: {costs:?}");
    let sum: f64 = changed.iter().map(|line| line.kld).sum();
    assert!(sum > 0.5 * costs.kld && sum < 2.0 * costs.kld, "{sum} of {}", costs.kld);

    // All together, over all windows, is what eval measures.
    let evaluation = evaluate(Cpu::detect(), &packed, Some(&source), &tokens, &OPTIONS, &Silent).unwrap();
    let expected = evaluation.baseline.unwrap().kld_mean;
    assert!((costs.kld / expected - 1.0).abs() < 1e-9, "{} instead of {expected}", costs.kld);
    assert_eq!((costs.windows, costs.ctx), (12, 64));
}

#[test]
fn every_architecture_is_measured() {
    for name in ["mixtral", "mixtral_stacked", "mamba", "resnet_bk", "qwen2_tied", "mistral"] {
        let folder = TempDir::new().unwrap();
        let source = checkpoint::open(&architecture(name)).unwrap();
        let path = convert(&folder, &architecture(name), &["--policy", "component", "--tensor", "embed=int4:g32"]);
        let packed = PackedFile::open(&path).unwrap();
        let options = Options { ctx: Some(24), ..OPTIONS };
        let costs = component_costs(Cpu::detect(), &packed, &source, &ids(24 * 5), 3, &options, &Silent).unwrap();
        let bytes: u64 = costs.components.iter().map(|line| line.bytes).sum();
        assert_eq!(bytes + costs.rest_bytes, path.metadata().unwrap().len(), "{name}");
        for line in &costs.components {
            let quantized = line.encoding.starts_with("INT");
            // A tied embedding is the head, too: both are packed then.
            assert_eq!(line.kld > 0.0, quantized, "{name}: {line:?}");
        }
        assert!(costs.kld > 0.0 && costs.windows == 3, "{name}: {costs:?}");
    }
}

#[test]
fn scales_of_activations_are_a_line_of_their_own() {
    let folder = TempDir::new().unwrap();
    let source = architecture("resnet_bk");
    let path = convert(&folder, &source, &["--bits", "8"]);
    let ids_path = folder.path().join("ids.json");
    std::fs::write(&ids_path, serde_json::to_vec(&ids(400)).unwrap()).unwrap();
    let (model, tokens) = (path.to_str().unwrap(), ids_path.to_str().unwrap());
    succeeded(bkpack(&["calibrate", model, "--tokens", tokens, "--activations", "bk_core=int4", "-q"]));
    let packed = PackedFile::open(&path).unwrap();
    let source = checkpoint::open(&source).unwrap();
    let options = Options { ctx: Some(24), ..OPTIONS };
    let costs = component_costs(Cpu::detect(), &packed, &source, &ids(24 * 5), 3, &options, &Silent).unwrap();
    let scales = line(&costs, "bk_core", "activations INT4");
    assert!(scales.kld > 0.0 && scales.parameters == 0 && scales.bytes > 0, "{scales:?}");
    assert!(scales.tensors == packed.activations()[0].scales.len() && scales.kld_per_mb_saved.is_none());
    assert_eq!(costs.components.iter().map(|line| line.parameters).sum::<u64>(), packed.parameters());
    let kept: Vec<_> = costs.components.iter().filter(|line| line.encoding == "BF16").collect();
    assert!(!kept.is_empty() && kept.iter().all(|line| line.kld == 0.0), "{costs:?}");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = convert(&folder, &architecture("mixtral"), &[]);
    let packed = PackedFile::open(&path).unwrap();
    let source = checkpoint::open(&architecture("mixtral")).unwrap();
    let short = measure(&packed, &source, &ids(63), 1).unwrap_err();
    assert!(matches!(short, Error::Tokens { .. }), "{short}");
    let other = checkpoint::open(&architecture("mixtral_stacked")).unwrap();
    let error = measure(&packed, &other, &ids(64), 1).unwrap_err();
    assert!(matches!(&error, Error::Incomparable { why } if why.contains("has no tensor")), "{error}");

    let path = convert(&folder, &architecture("resnet_bk_lookahead"), &[]);
    let packed = PackedFile::open(&path).unwrap();
    let source = checkpoint::open(&architecture("resnet_bk_lookahead")).unwrap();
    assert!(matches!(measure(&packed, &source, &ids(64), 1), Err(Error::LooksAhead { .. })));
    let options = Options { allow_lookahead: true, ..OPTIONS };
    let costs = component_costs(Cpu::detect(), &packed, &source, &ids(64), 1, &options, &Silent).unwrap();
    assert!(costs.looks_ahead && costs.kld > 0.0);
}

#[test]
fn eval_and_convert_print_the_table() {
    let folder = TempDir::new().unwrap();
    let (llama, text) = (llama(), text());
    let source = llama.to_str().unwrap();
    let text = text.to_str().unwrap();
    let path = convert(&folder, &llama, &["--keep", "embed"]);
    let model = path.to_str().unwrap();
    let eval = ["eval", model, "--baseline", source, "--text", text, "--ctx", "64", "--limit-tokens", "512"];
    let table = succeeded(bkpack(&[&eval[..], &["--by-component", "--component-windows", "3"]].concat()));
    for words in ["KLD alone", "all together", "header, tokenizer", "3 windows of 64", "perplexity"] {
        assert!(table.contains(words), "{words}: {table}");
    }
    let figures = succeeded(bkpack(&[&eval[..], &["--by-component", "--json"]].concat()));
    let figures: Value = serde_json::from_str(&figures).unwrap();
    let costs = &figures["by_component"];
    assert_eq!((&costs["windows"], &costs["file_bytes"]), (&8.into(), &figures["file_bytes"]));
    // The text has just as many windows, so both measured the same.
    assert!((costs["kld"].as_f64().unwrap() / figures["kld_mean"].as_f64().unwrap() - 1.0).abs() < 1e-9);
    let plain: Value = serde_json::from_str(&succeeded(bkpack(&[&eval[..], &["--json"]].concat()))).unwrap();
    assert!(plain.get("by_component").is_none());

    for (arguments, words) in [
        (&["eval", model, "--text", text, "--by-component"][..], "--baseline"),
        (&["eval", source, "--text", text, "--baseline", source, "--by-component"], "not packed"),
        (&["convert", source, "-o", "x.bkpack", "--report-kld"], "--calib"),
        (&["convert", source, "-o", "x.bkpack", "--calib", text], "--report-kld"),
    ] {
        let output = bkpack(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{message}");
    }

    let again = folder.path().join("again.bkpack");
    let convert = ["convert", source, "-o", again.to_str().unwrap(), "--keep", "embed", "--calib", text, "--ctx", "64"];
    let report = succeeded(bkpack(&[&convert[..], &["--report-kld", "--json"]].concat()));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(
        (&report["by_component"]["ctx"], &report["file_bytes"]),
        (&64.into(), &report["by_component"]["file_bytes"])
    );
    assert!(report["by_component"]["kld"].as_f64().unwrap() > 0.0);
    // The text was looked at, but nothing was rounded by it: the same bytes as without.
    assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(&path).unwrap());
    let table = succeeded(bkpack(&[&convert[..], &["--report-kld", "--force"]].concat()));
    assert!(table.contains("bits per weight") && table.contains("KLD alone"), "{table}");
}
