//! Importance: its figures against their definitions, interrupted runs, what is refused, and the command.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicUsize, Ordering},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    Error, Result,
    checkpoint::{self, Checkpoint},
    model::Model,
    ops::{
        Ops,
        autograd::{AutogradOps, Precision},
        cpu::{Activations, CpuOps},
    },
    policy::{
        ComponentRules,
        importance::{Importance, TensorImportance},
    },
    progress::{Observer, Silent, Unit},
    tensor::{CalibrationText, TensorSource},
    train::{
        gradients::Differentiator,
        importance::{Options, measure, write},
    },
};
use bkpack_kernels::Cpu;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

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

fn text() -> CalibrationText {
    CalibrationText { name: "text.txt".into(), blake3: "0".repeat(64) }
}

fn options(partial: &Path, batches: usize, resume: bool) -> Options {
    Options { batches, ctx: Some(CTX), partial: Some(partial.to_owned()), rules: ComponentRules::builtin(), resume }
}

fn run(source: &Checkpoint, tokens: &[u32], options: &Options, observer: &dyn Observer) -> Result<Importance> {
    measure(Cpu::detect(), source, text(), tokens, options, observer)
}

#[track_caller]
fn assert_near(found: f64, expected: f64, what: &str) {
    assert!(expected != 0.0 && (found / expected - 1.0).abs() < 1e-5, "{what}: {found} instead of {expected}");
}

#[test]
fn figures_are_those_of_the_definitions() {
    for name in ["mamba_bias", "mixtral_stacked", "mixtral", "qwen3"] {
        let (source, tokens) = (open(name), tokens(3 * CTX + 7));
        let found = run(&source, &tokens, &options(Path::new("unused"), 3, false), &Silent).unwrap();
        assert_eq!((found.batches, found.ctx, found.model.name.as_str()), (3, CTX as u64, name));
        let windows: Vec<&[u32]> = tokens.chunks_exact(CTX).collect();

        let ops = AutogradOps::new(Cpu::detect(), Precision::Double);
        let differentiator = Differentiator::new(&source, &ops, Some(CTX), 1).unwrap();
        let gradients: Vec<_> = windows.iter().map(|window| differentiator.gradients(window).unwrap()).collect();
        let mean_absolute = |values: &[f64]| values.iter().map(|value| value.abs()).sum::<f64>() / values.len() as f64;
        for tensor in &found.tensors {
            let of_window = |loss: &bkpack::train::gradients::WindowLoss| {
                loss.gradients.get(&tensor.name).unwrap().map_or(0.0, |values| mean_absolute(&values))
            };
            let gradient = gradients.iter().map(of_window).sum::<f64>() / 3.0;
            assert_near(tensor.gradient, gradient, &format!("{name}: gradient of {}", tensor.name));
            let mut weights: Vec<f64> = Vec::new();
            let stored = source.tensor(&tensor.name).unwrap();
            let mut values = vec![0.0; stored.elements()];
            Cpu::detect().dequantize(&stored.matrix(), 0, &mut values);
            weights.extend(values.into_iter().map(f64::from));
            assert_near(tensor.weight, mean_absolute(&weights), &format!("{name}: weight of {}", tensor.name));
            assert!(tensor.output_variance > 0.0, "{name}: {}", tensor.name);
        }

        // The head's output is the logits of the scored positions, which the CPU back end computes as well.
        let cpu = CpuOps::new(Cpu::detect(), Activations::Exact);
        let model = Model::load(&source, &cpu).unwrap();
        let mut logits = Vec::new();
        for window in &windows {
            let mut values = Vec::new();
            let hidden = model.forward(window, &mut model.state(CTX).unwrap()).unwrap();
            cpu.read(&model.logits(&hidden, 0, CTX - 1).unwrap(), &mut values).unwrap();
            logits.extend(values.into_iter().map(f64::from));
        }
        let mean = logits.iter().sum::<f64>() / logits.len() as f64;
        let variance = logits.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / logits.len() as f64;
        let head = found.tensors.iter().find(|tensor| tensor.name == "lm_head.weight").unwrap();
        assert_near(head.output_variance, variance, name);

        let components: Vec<&str> = found.tensors.iter().map(|tensor| tensor.component.as_str()).collect();
        assert!(!components.contains(&"plain") && components.contains(&"output") && components.contains(&"embedding"));
        assert_eq!(components.contains(&"expert"), name.starts_with("mixtral"));
        assert!(found.tensors.is_sorted_by(|a, b| a.score >= b.score));
        // Standardized figures have a mean of zero, and a variance of one that the shares scale.
        let score_sum: f64 = found.tensors.iter().map(|tensor| tensor.score).sum();
        assert!(score_sum.abs() < 1e-9, "{name}: {score_sum}");
        let figure = |of: fn(&TensorImportance) -> f64| -> Vec<f64> {
            let values: Vec<f64> = found.tensors.iter().map(of).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let deviation = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
            values.iter().map(|value| (value - mean) / deviation.sqrt()).collect()
        };
        let figures = [figure(|t| t.gradient), figure(|t| t.output_variance), figure(|t| t.weight)];
        for (index, tensor) in found.tensors.iter().enumerate() {
            let expected = 0.5 * figures[0][index] + 0.3 * figures[1][index] + 0.2 * figures[2][index];
            assert!((tensor.score - expected).abs() < 1e-9, "{name}: score of {}", tensor.name);
        }
    }
}

/// Stops when asked for the so-manieth time.
struct StopAfter(AtomicUsize);

impl Observer for StopAfter {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bits() {
    let (source, tokens) = (open("resnet_bk"), tokens(9 * CTX));
    let home = tempfile::tempdir().unwrap();
    let (output, partial) = (home.path().join("importance.json"), home.path().join("importance.json.partial"));
    let expected = run(&source, &tokens, &options(&partial, 8, false), &Silent).unwrap();
    assert!(partial.exists(), "sums are saved every few windows");

    // What another run left is replaced unless it is to be resumed.
    std::fs::write(&partial, "what another run left").unwrap();
    let stopped = run(&source, &tokens, &options(&partial, 8, false), &StopAfter(AtomicUsize::new(3)));
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let stopped = run(&source, &tokens, &options(&partial, 8, true), &StopAfter(AtomicUsize::new(4)));
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let saved: Value = serde_json::from_slice(&std::fs::read(&partial).unwrap()).unwrap();
    assert_eq!(saved["done"], 7);

    let mut other = tokens.clone();
    other[0] += 1;
    for (source, tokens, batches) in [(&source, &other, 8), (&source, &tokens, 9), (&open("mistral"), &tokens, 8)] {
        let refused = run(source, tokens, &options(&partial, batches, true), &Silent);
        assert!(matches!(refused, Err(Error::Importance { why, .. }) if why.contains("--resume")));
    }
    let resumed = run(&source, &tokens, &options(&partial, 8, true), &Silent).unwrap();
    assert_eq!(resumed, expected);

    write(&resumed, &output, &partial, false).unwrap();
    assert!(!partial.exists());
    let bytes = std::fs::read(&output).unwrap();
    assert_eq!(bytes, [serde_json::to_vec_pretty(&expected).unwrap().as_slice(), b"\n"].concat());
    assert!(matches!(write(&resumed, &output, &partial, false), Err(Error::Exists { .. })));
}

/// A copy of a checkpoint with the values of some tensors multiplied.
fn multiplied(home: &Path, name: &str, factors: &[(&str, f32)]) -> Checkpoint {
    let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let times = |bytes: [u8; 2], factor: f32| half::bf16::from_f32(half::bf16::from_le_bytes(bytes).to_f32() * factor);
    let tensors: Vec<(String, TensorView, Vec<u8>)> = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let factor = factors.iter().find(|(tensor, _)| *tensor == name).map_or(1.0, |(_, factor)| *factor);
            let pairs = view.data().as_chunks().0.iter();
            let values = pairs.flat_map(|&bytes| times(bytes, factor).to_le_bytes()).collect();
            (name, view, values)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, view, values)| (name, TensorView::new(view.dtype(), view.shape().to_vec(), values).unwrap()));
    std::fs::write(home.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::copy(folder(name).join("config.json"), home.join("config.json")).unwrap();
    checkpoint::open(home).unwrap()
}

#[test]
fn what_has_no_importance_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let partial = home.path().join("partial");
    let (source, text) = (open("mistral"), tokens(3 * CTX - 1));
    let refused = run(&source, &text, &options(&partial, 3, false), &Silent);
    assert!(matches!(refused, Err(Error::Tokens { why, .. }) if why.contains("59 tokens fill 2 windows of 20")));
    let refused = run(&source, &text, &options(&partial, 0, false), &Silent);
    assert!(matches!(refused, Err(Error::Option { option: "--batches", .. })));
    let refused = run(&source, &[96; 40], &options(&partial, 1, false), &Silent);
    assert!(matches!(refused, Err(Error::Tokens { .. })));

    // Logits of 1e37 are finite, and so is their loss; what flows back to a tiny embedding overflows.
    let huge = [("lm_head.weight", 1e37), ("model.embed_tokens.weight", 1e-4)];
    let huge = multiplied(home.path(), "mistral", &huge);
    let refused = run(&huge, &text, &options(&partial, 2, false), &Silent).unwrap_err();
    assert!(refused.to_string().contains("is NaN or infinite"), "{refused}");
    let Error::Gradient { tensor, window: 0, .. } = refused else { panic!("{refused}") };
    assert_eq!(tensor, "model.embed_tokens.weight");
    let infinite = multiplied(home.path(), "mistral", &[("lm_head.weight", f32::INFINITY)]);
    assert!(matches!(run(&infinite, &text, &options(&partial, 2, false), &Silent), Err(Error::Output { .. })));

    let config = home.path().join("config.json");
    let mut synthetic: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    synthetic["bkpack_synthetic"] = json!({});
    std::fs::write(&config, synthetic.to_string()).unwrap();
    let synthetic = checkpoint::open(home.path()).unwrap();
    assert!(matches!(run(&synthetic, &text, &options(&partial, 2, false), &Silent), Err(Error::Synthetic { .. })));
    assert!(!partial.exists());
}

fn bkpack(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("bkpack")).env_remove("BKPACK_ISA").args(arguments).output().unwrap()
}

#[test]
fn the_command_writes_what_it_prints() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    let (ids, output) = (path("ids.json"), path("importance.json"));
    std::fs::write(&ids, json!(tokens(200)).to_string()).unwrap();
    let source = folder("resnet_bk_lookahead");
    let source = source.to_str().unwrap();
    let arguments =
        ["importance", source, "--tokens", &ids, "-o", &output, "--ctx", "20", "--batches", "6", "--resume"];
    let with = |more: &[&str]| bkpack(&[&arguments, more].concat());

    let written = with(&["--json"]);
    assert_eq!(written.status.code(), Some(0), "{written:?}");
    let notices = String::from_utf8_lossy(&written.stderr).into_owned();
    assert!(notices.contains("looks ahead") && notices.contains("starting anew"), "{notices}");
    assert_eq!(std::fs::read(&output).unwrap(), written.stdout);
    assert!(!Path::new(&path("importance.json.partial")).exists());
    let read = Importance::read(Path::new(&output)).unwrap();
    assert_eq!((read.batches, read.ctx, read.text.name.as_str()), (6, 20, "ids.json"));
    assert!(read.tensors.iter().any(|tensor| tensor.component == "bk_core"));

    let again = with(&[]);
    assert_eq!(again.status.code(), Some(2), "{again:?}");
    let printed = with(&["--force"]);
    assert_eq!(printed.status.code(), Some(0), "{printed:?}");
    let table = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert_eq!(table.lines().count(), 1 + read.tensors.len(), "{table}");
    assert!(table.lines().nth(1).unwrap().contains(&read.tensors[0].name), "{table}");
    assert_eq!(std::fs::read(&output).unwrap(), written.stdout);
    let over_the_text = bkpack(&["importance", source, "--tokens", &ids, "-o", &ids, "--force"]);
    assert_eq!(over_the_text.status.code(), Some(2), "{over_the_text:?}");
}
