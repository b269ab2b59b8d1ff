//! Gradients of every architecture: the loss against the CPU back end's, the derivatives against differences of the
//! loss in f64 and against PyTorch's.

#[path = "common/logits.rs"]
mod shared;

use std::path::{Path, PathBuf};

use bkpack::{
    checkpoint::{self, Checkpoint},
    eval::perplexity::{Options, evaluate},
    model::Model,
    ops::{
        Ops,
        autograd::{
            AutogradOps, Precision,
            tape::{TapeOps, Variables},
        },
        cpu::{Activations, CpuOps},
    },
    progress::Silent,
    tensor::{TensorSource, matrix_shape},
    train::{gradients::Differentiator, qat::loss::loss_and_gradient},
};
use bkpack_kernels::Cpu;
use candle_core::Tensor;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::Value;

const ARCHITECTURES: [&str; 11] = [
    "mamba",
    "mamba_bias",
    "mistral",
    "mistral_full",
    "mixtral",
    "mixtral_stacked",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "resnet_bk",
    "resnet_bk_lookahead",
];

fn folder(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    if name == "llama" { fixtures.join(name) } else { fixtures.join("architectures").join(name) }
}

/// Numbers below `limit`, the same in every run.
fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut random = StdRng::seed_from_u64(seed);
    move |limit| random.random_range(..limit)
}

fn open(name: &str) -> Checkpoint {
    checkpoint::open(&folder(name)).unwrap()
}

fn tokens(count: usize, vocab_size: usize) -> Vec<u32> {
    let mut below = numbers(3);
    (0..count).map(|_| below(vocab_size) as u32).collect()
}

#[test]
fn the_loss_is_that_of_the_evaluation() {
    for (name, vocab_size) in ARCHITECTURES.map(|name| (name, 96)).into_iter().chain([("llama", 4096)]) {
        let source = open(name);
        let tokens = tokens(130, vocab_size);
        for (ctx, skip) in [(40, 1), (32, 16)] {
            let options = Options { ctx: Some(ctx), skip, activations: Activations::Exact, allow_lookahead: true };
            let expected = evaluate(Cpu::detect(), &source, None, &tokens, &options, &Silent).unwrap();
            let ops = AutogradOps::new(Cpu::detect(), Precision::Single);
            let differentiator = Differentiator::new(&source, &ops, Some(ctx), skip).unwrap();
            let windows = differentiator.windows(&tokens, expected.windows).unwrap();
            let sum: f64 = windows.iter().map(|window| differentiator.loss(window).unwrap()).sum();
            let nll = sum / windows.len() as f64;
            println!("{name}: {nll} {}: {:e}", expected.nll, nll / expected.nll - 1.0);
            assert!((nll / expected.nll - 1.0).abs() < 2e-6, "{name}: {nll} instead of {}", expected.nll);
        }
    }
}

#[test]
fn a_text_goes_on_from_call_to_call_as_on_the_cpu_back_end() {
    for name in ARCHITECTURES {
        let (source, tokens) = (open(name), tokens(24, 96));
        let expected = shared::logits(&source, &CpuOps::new(Cpu::detect(), Activations::Exact), &tokens, 24);
        let largest = expected.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
        let ops = AutogradOps::new(Cpu::detect(), Precision::Double);
        let batches: &[usize] = if name == "resnet_bk_lookahead" { &[24] } else { &[24, 7, 1] };
        for &batch in batches {
            let found = shared::logits(&source, &ops, &tokens, batch);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let close = (found - expected).abs() <= 2e-5 * largest;
                assert!(close, "{name}, batches of {batch}: {found} instead of {expected}");
            }
        }
    }
}

/// The loss with element `index` of a tensor moved by `step`.
fn moved_loss(source: &Checkpoint, ops: &AutogradOps, window: &[u32], (name, index, step): (&str, usize, f64)) -> f64 {
    let variable = ops.variable(name).unwrap();
    let kept = variable.as_tensor().copy().unwrap();
    let mut values: Vec<f64> = kept.flatten_all().unwrap().to_vec1().unwrap();
    values[index] += step;
    variable.set(&Tensor::from_vec(values, kept.dims(), kept.device()).unwrap()).unwrap();
    // Loaded again on the same variables: what a model computes from them when it is loaded changes, too.
    let loss = Differentiator::new(source, ops, Some(window.len()), 1).unwrap().loss(window).unwrap();
    variable.set(&kept).unwrap();
    loss
}

#[test]
fn gradients_are_the_slopes_of_the_loss_in_f64() {
    /// f64 rounds a loss of 8 to 1e-15, so that slopes over these are exact to 1e-10 and to 1e-8; the smaller ones pass
    /// by a kink (of ReLU, of a clamp) where the larger one crosses it.
    const STEPS: [f64; 3] = [1e-5, 1e-6, 1e-7];
    for name in ARCHITECTURES {
        let source = open(name);
        let window = tokens(20, 96);
        let ops = AutogradOps::new(Cpu::detect(), Precision::Double);
        let differentiator = Differentiator::new(&source, &ops, Some(window.len()), 1).unwrap();
        let gradients = differentiator.gradients(&window).unwrap().gradients;
        assert_eq!(ops.names().len(), source.names().len(), "{name}");
        let (mut below, mut worst, mut looked_at) = (numbers(5), 0f64, 0);
        for tensor in source.names() {
            let (rows, cols) = matrix_shape(source.shape(tensor).unwrap());
            // An expert that no token chose has none, and a small change does not make a token choose it.
            let values = gradients.get(tensor).unwrap().unwrap_or_else(|| vec![0.0; rows * cols]);
            assert_eq!(values.len(), rows * cols, "{name}: {tensor}");
            let largest = (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())).unwrap();
            let magnitude = values[largest].abs();
            for index in [largest, below(values.len()), below(values.len())] {
                let errors = STEPS.map(|step| {
                    let loss = |step: f64| moved_loss(&source, &ops, &window, (tensor, index, step));
                    (values[index] - (loss(step) - loss(-step)) / (2.0 * step)).abs()
                });
                let error = errors.into_iter().fold(f64::INFINITY, f64::min);
                worst = worst.max(error / (magnitude + 1e-2));
                let what = format!("{name}: {tensor}[{index}]: {} is off the slope by {errors:?}", values[index]);
                assert!(error <= 1e-6 * magnitude + 1e-8, "{what}");
                looked_at += usize::from(magnitude > 0.0);
            }
        }
        println!("{name}: {looked_at} entries, worst error {worst:e}");
        assert!(looked_at > 2 * source.names().len(), "{name}: most gradients are zero");
    }
}

#[test]
fn gradients_are_those_of_pytorch() {
    for name in [
        "llama",
        "mamba",
        "mistral",
        "mixtral",
        "mixtral_stacked",
        "qwen2_tied",
        "qwen3",
        "resnet_bk",
        "resnet_bk_lookahead",
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/gradients/{name}.json"));
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let window: Vec<u32> =
            expected["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect();
        let source = open(name);
        let ops = AutogradOps::new(Cpu::detect(), Precision::Single);
        let differentiator = Differentiator::new(&source, &ops, Some(window.len()), 1).unwrap();
        let loss = differentiator.gradients(&window).unwrap();
        let nll = expected["nll"].as_f64().unwrap();
        assert!((loss.nll / nll - 1.0).abs() < 2e-6, "{name}: {} instead of {nll}", loss.nll);

        let tensors = expected["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), source.names().len(), "{name}");
        let (mut worst_norm, mut worst_entry) = (0f64, 0f64);
        for (tensor, expected) in tensors {
            let values = loss.gradients.get(tensor).unwrap().unwrap();
            let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
            let mean_abs = values.iter().map(|value| value.abs()).sum::<f64>() / values.len() as f64;
            let figure = |key: &str| expected[key].as_f64().unwrap();
            for (found, expected) in [(norm, figure("norm")), (mean_abs, figure("mean_abs"))] {
                worst_norm = worst_norm.max((found / expected - 1.0).abs());
                assert!((found / expected - 1.0).abs() < 2e-5, "{name}: {tensor}: {found} instead of {expected}");
            }
            let entries = expected["entries"].as_array().unwrap();
            let entries = entries.iter().map(|entry| (entry[0].as_u64().unwrap() as usize, entry[1].as_f64().unwrap()));
            let entries: Vec<(usize, f64)> = entries.collect();
            let largest = entries.iter().fold(0f64, |largest, (_, value)| largest.max(value.abs()));
            for (index, value) in entries {
                worst_entry = worst_entry.max((values[index] - value).abs() / largest);
                let close = (values[index] - value).abs() <= 2e-5 * largest;
                assert!(close, "{name}: {tensor}[{index}]: {} instead of {value}", values[index]);
            }
        }
        println!("{name}: norms within {worst_norm:e}, entries within {worst_entry:e}");
    }
}

#[test]
fn the_tape_finds_the_same_gradients() {
    for name in ARCHITECTURES {
        let (source, window) = (open(name), tokens(20, 96));
        let reference = AutogradOps::new(Cpu::detect(), Precision::Double);
        let differentiator = Differentiator::new(&source, &reference, Some(window.len()), 1).unwrap();
        let expected = differentiator.gradients(&window).unwrap();

        let mut variables = Variables::default();
        for tensor in source.names() {
            let stored = source.tensor(tensor).unwrap();
            let mut values = vec![0.0; stored.elements()];
            Cpu::detect().dequantize(&stored.matrix(), 0, &mut values);
            variables.set(tensor, matrix_shape(stored.shape()), values);
        }
        // Logits as a whole, and in slices.
        for rows in [19, 6] {
            let ops = TapeOps::new(Cpu::detect(), &variables);
            let mut nll = 0.0;
            {
                let model = Model::load(&source, &ops).unwrap();
                let hidden = model.forward(&window, &mut model.state(20).unwrap()).unwrap();
                let position = ops.position();
                for first in (0..19).step_by(rows) {
                    let count = rows.min(19 - first);
                    let logits = model.logits(&hidden, first, count).unwrap();
                    let targets = &window[first + 1..][..count];
                    let (losses, gradient) =
                        loss_and_gradient(Cpu::detect(), logits.values(), targets, None, 1.0 / 19.0);
                    nll += losses.cross_entropy / 19.0;
                    ops.seed(&logits, gradient);
                    ops.backward(position);
                }
                ops.backward(0);
            }
            assert!((nll / expected.nll - 1.0).abs() < 2e-6, "{name}: {nll} instead of {}", expected.nll);
            let found = ops.into_gradients();
            for tensor in source.names() {
                let Some(expected) = expected.gradients.get(tensor).unwrap() else {
                    assert!(found.get(tensor).is_none_or(|found| found.iter().all(|&value| value == 0.0)));
                    continue;
                };
                let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
                let found = found.get(tensor).unwrap_or_else(|| panic!("{name}: {tensor} has no gradient"));
                for (index, (&found, expected)) in found.iter().zip(&expected).enumerate() {
                    let error = (f64::from(found) - expected).abs();
                    assert!(error <= 5e-5 * largest + 1e-9, "{name}: {tensor}[{index}]: {found} instead of {expected}");
                }
            }
        }
    }
}

#[test]
fn rounding_to_a_grid_is_straight_through_and_stops_at_its_ends() {
    // Scales 0.5 and 0.1 with codes up to 7: values from -3.5 to 3.5, and from -0.7 to 0.7; zero where the scale is zero.
    let values = vec![0.3f32, -3.4, 3.6, -3.51, 0.04, 0.69, -0.71, 5.0, 0.2];
    let scales = vec![0.5f32, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.0];
    let rounded = [0.5f32, -3.5, 3.5, -3.5, 0.0, 0.7, -0.7, 0.7, 0.0];
    let expected = [1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 0.0];
    let upstream: Vec<f32> = (1..=9).map(|i| i as f32).collect();

    let ops = AutogradOps::new(Cpu::detect(), Precision::Single);
    let variable = candle_core::Var::new(&values[..], &candle_core::Device::Cpu).unwrap();
    let x = variable.as_tensor().reshape((9, 1)).unwrap();
    let steps = ops.constant(scales.clone(), 1).unwrap();
    let result = ops.round_to_grid(x, &steps, 7.0).unwrap();
    let close = |found: &[f32]| found.iter().zip(rounded).all(|(found, expected)| (found - expected).abs() < 1e-6);
    assert!(close(&result.flatten_all().unwrap().to_vec1::<f32>().unwrap()));
    let loss = (result * ops.constant(upstream.clone(), 1).unwrap()).unwrap().sum_all().unwrap();
    let gradient = loss.backward().unwrap().get(&variable).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(gradient, expected);

    let source = open("mamba");
    let (name, mut variables) = ("backbone.norm_f.weight", Variables::default());
    variables.set(name, (9, 1), values);
    let ops = TapeOps::new(Cpu::detect(), &variables);
    let x = ops.parameter(&source, name).unwrap();
    let result = ops.round_to_grid(x, &ops.constant(scales, 1).unwrap(), 7.0).unwrap();
    assert!(close(result.values()));
    ops.seed(&result, upstream);
    ops.backward(0);
    assert_eq!(ops.into_gradients()[name], expected);
}
