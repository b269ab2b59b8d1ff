//! Costs of encodings: against their definitions, against what is measured, and the conversions that go by them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    checkpoint::{self, Checkpoint},
    error::Error,
    eval::probe::Probe,
    format::PackedFile,
    model::{Model, sample::Sampler},
    ops::{
        autograd::{AutogradOps, Precision},
        cpu::{Activations, CpuOps},
    },
    policy::{ComponentRules, PLAIN, Sensitivity},
    progress::Silent,
    quant::{Quantized, quantize},
    tensor::{Tensor, TensorSource, matrix_shape},
    train::{
        fisher,
        gradients::Differentiator,
        sensitivity::{Options, measure},
    },
};
use bkpack_kernels::{
    Cpu, FloatType, Grid, Layout,
    cpu::quantize::{QuantizeOptions, Rounding},
};
use serde_json::{Value, json};
use tempfile::TempDir;

const CTX: usize = 20;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

fn open(name: &str) -> Checkpoint {
    checkpoint::open(&folder(name)).unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + i / 5) % 96).collect()
}

fn quantized(source: &Checkpoint, name: &str, bits: u32) -> Tensor<'static> {
    let tensor = source.tensor(name).unwrap();
    let options = QuantizeOptions {
        layout: Layout { grid: Grid::Int { bits, symmetric: true }, group: 32 },
        scale_type: FloatType::F32,
        rounding: Rounding::Nearest,
        ternary_threshold: 0.5,
    };
    let mut output = Quantized::default();
    quantize(Cpu::detect(), &tensor.matrix(), &options, &mut output);
    Tensor::new(tensor.shape().to_vec(), output.into_data(&options)).unwrap()
}

#[test]
fn marginals_are_sums_of_squared_gradients() {
    let (source, cpu) = (open("qwen3"), Cpu::detect());
    let ops = AutogradOps::new(cpu, Precision::Double);
    let differentiator = Differentiator::new(&source, &ops, Some(CTX), 1).unwrap();
    let gradients = differentiator.gradients(&tokens(CTX)).unwrap().gradients;
    for name in ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"] {
        let (rows, cols) = matrix_shape(source.shape(name).unwrap());
        let values = gradients.get(name).unwrap().unwrap();
        let [by_row, by_col] = gradients.marginal_squares(name).unwrap().unwrap();
        assert_eq!((by_row.len(), by_col.len()), (rows, cols));
        let square = |row: usize, col: usize| values[row * cols + col].powi(2);
        for (row, found) in by_row.iter().enumerate() {
            let expected: f64 = (0..cols).map(|col| square(row, col)).sum();
            assert!((found - expected).abs() <= 1e-12 * expected, "{name} row {row}: {found}, {expected}");
        }
        for (col, found) in by_col.iter().enumerate() {
            let expected: f64 = (0..rows).map(|row| square(row, col)).sum();
            assert!((found - expected).abs() <= 1e-12 * expected, "{name} column {col}: {found}, {expected}");
        }
    }
    assert!(gradients.marginal_squares("no such tensor").unwrap().is_none());
}

/// The gradient towards tokens that the model itself draws vanishes on average: that is what makes its squares the Fisher
/// information, and sets it apart from the gradient towards a text.
#[test]
fn drawn_gradients_vanish_on_average() {
    let (source, cpu) = (open("qwen2"), Cpu::detect());
    let ops = AutogradOps::new(cpu, Precision::Single);
    let differentiator = Differentiator::new(&source, &ops, Some(CTX), 1).unwrap();
    let window = tokens(CTX);
    let name = "lm_head.weight";
    let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    const DRAWS: usize = 64;
    let mut sampler = Sampler::new(cpu, 1.0, 1.0, 7).unwrap();
    let (mut mean, mut squares) = (vec![0.0; source.tensor(name).unwrap().elements()], 0.0);
    for _ in 0..DRAWS {
        let drawn = differentiator.fisher_gradients(&window, &mut sampler).unwrap().gradients;
        let drawn = drawn.get(name).unwrap().unwrap();
        squares += norm(&drawn) / DRAWS as f64;
        mean.iter_mut().zip(&drawn).for_each(|(mean, drawn)| *mean += drawn / DRAWS as f64);
    }
    // A mean of independent draws with mean zero has a DRAWS-th of their square, give or take its own scatter.
    let left = norm(&mean) / squares;
    assert!(left < 2.0 / DRAWS as f64, "{left} of the square is left");
}

#[test]
fn a_text_too_short_and_experts_never_chosen() {
    let (source, cpu) = (open("mixtral"), Cpu::detect());
    let refused = fisher::measure(cpu, &source, &tokens(CTX - 1), (1, Some(CTX)), &ComponentRules::builtin(), &Silent);
    assert!(matches!(refused, Err(Error::Tokens { .. })), "{:?}", refused.err());
    // Four tokens choose few experts; those that none chose count as their component does.
    let found = fisher::measure(cpu, &source, &tokens(4), (1, Some(4)), &ComponentRules::builtin(), &Silent).unwrap();
    for matrix in &found {
        let total: f64 = matrix.rows.iter().sum();
        assert!(total > 0.0 && total.is_finite(), "{} has {total}", matrix.name);
        let mean = matrix.cols.iter().map(|&col| f64::from(col)).sum::<f64>() / matrix.cols.len() as f64;
        assert!((mean - 1.0).abs() < 1e-4, "{}: columns have a mean of {mean}", matrix.name);
    }
}

#[test]
fn probes_run_only_what_changes() {
    for name in ["qwen2", "mixtral", "mamba", "resnet_bk"] {
        let (source, cpu) = (open(name), Cpu::detect());
        let ops = CpuOps::new(cpu, Activations::Exact);
        let model = Model::load(&source, &ops).unwrap();
        let last = model.layers() - 1;
        let prefix = model.block_prefixes()[last].clone();
        let text = tokens(2 * CTX);
        let windows: Vec<&[u32]> = text.chunks_exact(CTX).collect();
        let probe = Probe::new(cpu, &ops, &source, &windows, vec![0, last]).unwrap();
        let changed = || {
            let matrix = |name: &&String| name.starts_with(&prefix) && source.shape(name).unwrap().len() == 2;
            let names = source.names().iter().filter(matrix);
            names.map(|name| (name.clone(), quantized(&source, name, 3))).collect::<HashMap<_, _>>()
        };
        let found = [Some(last), Some(0), None].map(|start| probe.divergence(changed(), start).unwrap());
        assert!(found[0] > 0.0, "{name}: {found:?}");
        assert!(found.iter().all(|&kld| kld == found[0]), "{name}: {found:?}");
        // Nothing changed, nothing diverges.
        assert_eq!(probe.divergence(HashMap::new(), Some(last)).unwrap(), 0.0, "{name}");
    }
}

fn sensitivity(source: &Checkpoint) -> Sensitivity {
    let options = Options { windows: 4, ctx: Some(CTX), rounding: Rounding::Search };
    measure(Cpu::detect(), source, &tokens(40 * CTX), &options, &ComponentRules::builtin(), &Silent).unwrap()
}

#[test]
fn every_matrix_has_a_cost_for_every_encoding() {
    for name in ["qwen2_tied", "mamba", "resnet_bk"] {
        let source = open(name);
        let found = sensitivity(&source);
        assert_eq!(found, sensitivity(&source), "{name}: the same figures twice");
        let packed = {
            let rules = ComponentRules::builtin();
            let architecture = source.config().unwrap()["architectures"][0].as_str();
            let matrices = source.names().iter().filter(|name| {
                rules.component(architecture, name, source.shape(name).unwrap()) != PLAIN && **name != "lm_head.weight"
                    || **name == "lm_head.weight"
                        && !source.config().unwrap()["tie_word_embeddings"].as_bool().unwrap_or(false)
            });
            matrices.cloned().collect::<Vec<_>>()
        };
        let names: Vec<_> = found.tensors.iter().map(|tensor| tensor.name.clone()).collect();
        assert_eq!(names, packed, "{name}");
        for tensor in &found.tensors {
            let cost =
                |text: &str| tensor.options.iter().find(|option| option.encoding == text).map(|option| option.cost);
            assert!(tensor.options.iter().all(|option| option.cost >= 0.0 && option.cost.is_finite()));
            let by_width = [2, 3, 4, 5, 6, 8].map(|bits| cost(&format!("int{bits}:row")).unwrap());
            assert!(by_width.is_sorted_by(|a, b| a > b), "{name} {}: {by_width:?}", tensor.name);
        }
    }
}

struct Case {
    home: TempDir,
    source: PathBuf,
}

impl Case {
    fn new(name: &str) -> Self {
        let home = TempDir::new().unwrap();
        let case = Self { source: folder(name), home };
        std::fs::write(case.path("ids.json"), json!(tokens(60 * CTX)).to_string()).unwrap();
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn run(&self, subcommand: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.current_dir(self.home.path()).env_remove("BKPACK_ISA").arg(subcommand).arg(&self.source);
        command.args(arguments).output().unwrap()
    }

    #[track_caller]
    fn convert(&self, arguments: &[&str]) -> Value {
        let output = self.run("convert", &[&["-o", "model.bkpack", "--json", "--force"], arguments].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn policy(&self) -> Value {
        PackedFile::open(&self.path("model.bkpack")).unwrap().manifest().policy.clone()
    }
}

const CALIB: [&str; 4] = ["--calib-tokens", "ids.json", "--ctx", "20"];

#[test]
fn a_budget_is_measured_against_presets() {
    let case = Case::new("qwen2_tied");
    let largest = case.convert(&["--bits", "6"])["file_bytes"].as_u64().unwrap();
    let size = largest.to_string();
    let report = case.convert(&[&["--policy", "budget", "--target-size", &size], &CALIB[..]].concat());
    let bytes = std::fs::metadata(case.path("model.bkpack")).unwrap().len();
    assert!(bytes <= largest && report["file_bytes"] == json!(bytes), "{bytes} of {largest}");
    let compared = report["compared"].as_array().unwrap();
    assert_eq!(compared[0]["name"], json!("budget"));
    assert!(compared.len() > 2 && compared.iter().any(|entry| entry["fits"] == json!(false)), "{report}");
    let kld = |entry: &Value| entry["kld"].as_f64().unwrap();
    let chosen: Vec<_> = compared.iter().filter(|entry| entry["chosen"] == json!(true)).collect();
    assert_eq!((chosen.len(), &chosen[0]["bytes"]), (1, &json!(bytes)));
    for entry in compared.iter().filter(|entry| entry["fits"] == json!(true)) {
        assert!(kld(chosen[0]) <= kld(entry) && entry["bytes"].as_u64().unwrap() <= largest, "{report}");
    }
}

#[test]
fn a_better_preset_is_packed_instead() {
    let case = Case::new("qwen2_tied");
    let output = case.run("sensitivity", &["--tokens", "ids.json", "--ctx", "20", "-o", "costs.json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let size = case.convert(&["--bits", "6"])["file_bytes"].as_u64().unwrap().to_string();
    let options = ["--policy", "budget", "--target-size", &size, "--sensitivity", "costs.json"];
    assert!(case.convert(&options).get("compared").is_none(), "without a text nothing is measured");

    // Costs that are the wrong way round make the budget's own choice a bad one.
    let mut costs: Sensitivity = serde_json::from_slice(&std::fs::read(case.path("costs.json")).unwrap()).unwrap();
    for tensor in &mut costs.tensors {
        tensor.options.iter_mut().for_each(|option| option.cost = 1.0 / (option.cost + 1e-12));
    }
    std::fs::write(case.path("costs.json"), serde_json::to_vec(&costs).unwrap()).unwrap();
    let report = case.convert(&[&options, &CALIB[..]].concat());
    assert_eq!(report["compared"][0]["chosen"], json!(false), "{report}");
    let policy = case.policy();
    let adopted = policy["adopted"].as_str().unwrap();
    assert!(report["compared"].as_array().unwrap().iter().any(|entry| entry["name"] == json!(adopted)));
    let explained = Command::new(cargo_bin("bkpack"))
        .arg("explain")
        .arg(case.path("model.bkpack"))
        .arg("model.layers.0.mlp.up_proj.weight")
        .output()
        .unwrap();
    let text = String::from_utf8(explained.stdout).unwrap();
    assert!(text.split_whitespace().collect::<Vec<_>>().join(" ").contains(adopted), "{adopted}: {text}");
}

#[test]
fn importance_is_measured_where_no_file_has_it() {
    let case = Case::new("qwen2_tied");
    let output = case.run("importance", &["--tokens", "ids.json", "--ctx", "20", "-o", "importance.json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let plan = |arguments: &[&str]| {
        let output = case.run("convert", &[&["--policy", "dynamic", "--plan-only"], arguments].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(plan(&CALIB), plan(&["--importance", "importance.json"]));
}

#[test]
fn what_is_missing_or_of_no_use_is_named() {
    let case = Case::new("qwen2_tied");
    std::fs::write(case.path("short.json"), json!(tokens(CTX - 1)).to_string()).unwrap();
    for (arguments, words) in [
        (&["--policy", "budget", "--target-ratio", "6"][..], &["--sensitivity", "--calib"][..]),
        (&["--policy", "dynamic"], &["--importance", "--calib"]),
        (&["--bits", "4", "--calib-tokens", "ids.json"], &["--calib", "--rounding gptq"]),
        (&["--policy", "budget", "--target-ratio", "6", "--calib-tokens", "nowhere.json"], &["nowhere.json"]),
        (
            &["--policy", "budget", "--target-ratio", "6", "--calib-tokens", "short.json", "--ctx", "20"],
            &["20", "window"],
        ),
    ] {
        let output = case.run("convert", &[&["-o", "x.bkpack"], arguments].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
        assert!(!case.path("x.bkpack").exists());
    }
}
