//! Quantization-aware training as a library: gradients through rounding, what is packed, and what cannot be trained.

#[path = "common/qat.rs"]
mod common;

use std::path::Path;

use bkpack::{
    Error,
    checkpoint::{self, Checkpoint},
    eval::perplexity::{self, evaluate},
    format::PackedFile,
    ops::cpu::Activations,
    progress::Silent,
    quant::{self, Quantized},
    tensor::{Tensor, TensorData, TensorSource},
    train::qat::{
        Data, Distillation, Options, Training,
        grid::straight_through,
        loss::{Teaching, loss_and_gradient},
    },
};
use bkpack_kernels::{
    Cpu, FloatType, Grid, Layout,
    cpu::quantize::{QuantizeOptions, Rounding},
};
use common::{copy, data, open, options, pack_options, tokens, train};

fn quantized(grid: Grid, group: usize, weights: &[f32], cols: usize, scales: Option<&[f32]>) -> Tensor<'static> {
    let options = QuantizeOptions {
        layout: Layout { grid, group },
        scale_type: FloatType::F32,
        rounding: Rounding::Nearest,
        ternary_threshold: 0.5,
    };
    let shape = vec![weights.len() / cols, cols];
    let tensor = Tensor::floats(shape.clone(), weights);
    let mut output = Quantized::default();
    match scales {
        Some(scales) => quant::round_to_scales(Cpu::detect(), &tensor.matrix(), &options, scales, &mut output),
        None => quant::quantize(Cpu::detect(), &tensor.matrix(), &options, &mut output),
    }
    Tensor::new(shape, output.into_data(&options)).unwrap()
}

fn dequantized(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.elements()];
    Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
    values
}

/// Weights around a scale of one, some of them far out.
fn weights() -> Vec<f32> {
    (0..96).map(|i| ((i * 37 % 96) as f32 - 47.5) / 10.0).collect() // -4.75 to 4.75
}

#[test]
fn what_is_clipped_gets_no_gradient_and_all_else_gets_its_value_s() {
    let (weights, upstream): (Vec<f32>, Vec<f32>) = (weights(), (0..96).map(|i| (i as f32 - 50.0) / 7.0).collect());
    let int = |bits| Grid::Int { bits, symmetric: true };
    // The widest weight that is rounded rather than clipped, on a grid of scale one.
    for (grid, low, high) in [
        (int(2), -2.5, 1.5),
        (int(3), -4.5, 3.5),
        (int(4), -8.5, 7.5),
        (Grid::Ternary, -1.5, 1.5),
        (Grid::Binary, -2.0, 2.0),
    ] {
        let tensor = quantized(grid, 32, &weights, 48, Some(&[1.0; 4]));
        let mut gradient = upstream.clone();
        straight_through(&tensor, &dequantized(&tensor), &weights, &mut gradient);
        let mut passed = 0;
        for ((gradient, upstream), &weight) in gradient.iter().zip(&upstream).zip(&weights) {
            let inside = (low..=high).contains(&weight);
            assert_eq!(*gradient, if inside { *upstream } else { 0.0 }, "{grid:?}: {weight}");
            passed += usize::from(inside);
        }
        assert!(passed > 20 && (passed < 96 || grid == int(4)), "{grid:?}: {passed}");
    }
    // Scales from the largest magnitude clip nothing, with zero points or without.
    for symmetric in [true, false] {
        let tensor = quantized(Grid::Int { bits: 4, symmetric }, 32, &weights, 48, None);
        let mut gradient = upstream.clone();
        straight_through(&tensor, &dequantized(&tensor), &weights, &mut gradient);
        assert_eq!(gradient, upstream);
    }
    let plain = Tensor::floats(vec![2, 48], &weights);
    let mut gradient = upstream.clone();
    assert!(straight_through(&plain, &weights, &weights, &mut gradient).is_empty());
    assert_eq!(gradient, upstream);
}

#[test]
fn on_the_grid_straight_through_is_exact() {
    // Where weights lie on the grid already, values are weights, and so are their gradients.
    let weights: Vec<f32> = (0..64).map(|i| 0.25 * ((i % 8) as f32 - 4.0)).collect();
    let tensor = quantized(Grid::Int { bits: 3, symmetric: true }, 32, &weights, 64, Some(&[0.25; 2]));
    let values = dequantized(&tensor);
    assert_eq!(values, weights);
    let upstream: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
    let mut gradient = upstream.clone();
    let of_scales = straight_through(&tensor, &values, &weights, &mut gradient);
    assert_eq!((gradient, of_scales), (upstream, vec![0.0; 2]));
}

#[test]
fn the_gradient_of_a_scale_is_the_slope_of_its_surrogate() {
    let (weights, upstream): (Vec<f32>, Vec<f32>) = (weights(), (0..96).map(|i| (i as f32 * 0.7).cos()).collect());
    let scales = [0.9f32, 1.3, -0.8, 0.5];
    for grid in [
        Grid::Int { bits: 2, symmetric: true },
        Grid::Int { bits: 3, symmetric: true },
        Grid::Int { bits: 4, symmetric: true },
        Grid::Ternary,
        Grid::Binary,
    ] {
        let scales = if matches!(grid, Grid::Int { .. }) { scales } else { scales.map(f32::abs) };
        let tensor = quantized(grid, 32, &weights, 48, Some(&scales));
        let values = dequantized(&tensor);
        let found = straight_through(&tensor, &values, &weights, &mut upstream.clone());
        let layout = Layout { grid, group: 32 };
        for (index, &scale) in scales.iter().enumerate() {
            let (row, group) = (index / 2, index % 2);
            let places = || layout.group_range(group, 48).map(|column| row * 48 + column);
            // The value as LSQ differentiates it: what rounding adds to w / s stays, and so does a code that was clipped.
            let surrogate = |place: usize, moved: f64| {
                let (weight, scale) = (f64::from(weights[place]), f64::from(scale));
                let code = (f64::from(values[place]) / scale).round();
                let half = match grid {
                    Grid::Binary => 0.0,
                    _ => 0.5 * scale.abs() * (1.0 + 1e-4),
                };
                let rounded = (weight - code * scale).abs() <= half;
                if rounded { weight + moved * (code - weight / scale) } else { moved * code }
            };
            let sum =
                |moved: f64| places().map(|place| f64::from(upstream[place]) * surrogate(place, moved)).sum::<f64>();
            let step = 1e-4;
            let slope = (sum(f64::from(scale) + step) - sum(f64::from(scale) - step)) / (2.0 * step);
            let error = (f64::from(found[index]) - slope).abs();
            assert!(error < 1e-4 * (1.0 + slope.abs()), "{grid:?}, scale {index}: {} instead of {slope}", found[index]);
        }
    }
}

#[test]
fn the_gradient_of_the_loss_is_its_slope() {
    let (rows, vocabulary) = (3, 11);
    let value = |i: usize, seed: f64| (3.0 * (i as f64 * seed).sin()) as f32;
    let student: Vec<f32> = (0..rows * vocabulary).map(|i| value(i, 1.7)).collect();
    let teacher: Vec<f32> = (0..rows * vocabulary).map(|i| value(i, 0.9)).collect();
    let targets = [4, 0, 10];
    for distillation in [None, Some((0.0, 1.0)), Some((1.0, 1.0)), Some((0.7, 2.5))] {
        let distillation = distillation.map(|(alpha, temperature)| Distillation { alpha, temperature });
        let teaching = distillation.map(|distillation| Teaching { logits: &teacher, distillation });
        // The same in f64, straight from the definition.
        let loss = |logits: &[f64]| -> f64 {
            let softmax = |row: &[f64], by: f64| -> Vec<f64> {
                let powers: Vec<f64> = row.iter().map(|x| (x / by).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.iter().map(|power| power / sum).collect()
            };
            let rows = logits.chunks(vocabulary).zip(teacher.chunks(vocabulary)).zip(targets);
            rows.map(|((row, teacher), target)| {
                let cross_entropy = -softmax(row, 1.0)[target as usize].ln();
                let Some(Distillation { alpha, temperature }) = distillation else { return cross_entropy };
                let teacher: Vec<f64> = teacher.iter().map(|&x| x.into()).collect();
                let (p, q) = (softmax(&teacher, temperature), softmax(row, temperature));
                let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
                alpha * temperature.powi(2) * divergence + (1.0 - alpha) * cross_entropy
            })
            .sum()
        };
        let exact: Vec<f64> = student.iter().map(|&x| x.into()).collect();
        let (losses, gradient) = loss_and_gradient(Cpu::detect(), &student, &targets, teaching, 0.25);
        assert!((losses.objective(distillation) - loss(&exact)).abs() < 1e-5);
        for index in 0..student.len() {
            let moved = |step: f64| {
                let mut logits = exact.clone();
                logits[index] += step;
                0.25 * loss(&logits)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let found = f64::from(gradient[index]);
            assert!((found - slope).abs() < 2e-6, "{distillation:?}[{index}]: {found} instead of {slope}");
        }
    }
}

/// The values that the packed file holds of each tensor, as bytes.
fn contents(packed: &PackedFile) -> Vec<(String, Vec<u8>)> {
    let bytes = |name: &String| match packed.tensor(name).unwrap().data() {
        TensorData::Float { values, .. } => values.to_vec(),
        TensorData::Quantized { codes, scales, zeros, .. } => [&**codes, &**scales, &**zeros].concat(),
    };
    packed.names().iter().map(|name| (name.clone(), bytes(name))).collect()
}

#[test]
fn what_is_packed_is_what_was_trained_and_what_convert_writes() {
    let cases = [
        ("mamba", "int4:g32", Rounding::Search, false),
        ("mamba_bias", "int3:g32:asym", Rounding::Nearest, false),
        ("qwen2_tied", "ternary:g32", Rounding::Search, true),
        ("qwen3", "binary:row", Rounding::Nearest, true),
        ("mixtral", "int8:g32", Rounding::Search, false),
        ("mixtral_stacked", "int2:g32", Rounding::Search, false),
        ("resnet_bk", "int4:g32", Rounding::Search, true),
        ("resnet_bk", "fp16", Rounding::Search, false),
    ];
    for (name, encoding, rounding, teacher) in cases {
        let (source, pack) = (open(name), pack_options(encoding, rounding));
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let trained = train(&source, &pack, &options(3), &data(true), teacher);
        let last = trained.history.validation.last().unwrap().clone();
        assert_eq!(last.step, 3);
        let again = pack_options(encoding, rounding);
        trained.write(Cpu::detect(), &source, again, (&output, false), &Silent).unwrap();
        let packed = PackedFile::open(&output.join("model.bkpack")).unwrap();
        packed.check_contents(&Silent).unwrap();

        // The perplexity that was measured on the weights in training is that of the file, to the last bit.
        let options =
            perplexity::Options { ctx: Some(24), skip: 1, activations: Activations::Exact, allow_lookahead: false };
        let measured = evaluate(Cpu::detect(), &packed, None, &tokens(400), &options, &Silent).unwrap();
        assert_eq!(measured.nll, last.nll, "{name} {encoding}");

        // Converting the folder gives the same tensors.
        let folder_again = checkpoint::open(&output).unwrap();
        let again = folder.path().join("again.bkpack");
        let planned = bkpack::pack::Packing::plan(&folder_again, &pack, &again, Cpu::detect(), &Silent).unwrap();
        planned.write(Cpu::detect(), false, &Silent).unwrap();
        assert!(contents(&PackedFile::open(&again).unwrap()) == contents(&packed), "{name} {encoding}");
        // And the weights have been trained.
        let moved =
            source.names().iter().filter(|name| folder_again.shape(name).is_some()).any(|name| {
                dequantized(&source.tensor(name).unwrap()) != dequantized(&folder_again.tensor(name).unwrap())
            });
        assert!(moved, "{name}");
    }
}

#[test]
fn learned_scales_are_packed_as_they_were_trained() {
    for (name, encoding) in [("qwen3", "int4:g32"), ("mamba", "ternary:g32"), ("resnet_bk", "binary:row")] {
        let (source, pack) = (open(name), pack_options(encoding, Rounding::Search));
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let options = Options { learn_scales: true, ..options(4) };
        let trained = train(&source, &pack, &options, &data(true), false);
        let last = trained.history.validation.last().unwrap().clone();
        let again = pack_options(encoding, Rounding::Search);
        trained.write(Cpu::detect(), &source, again, (&output, false), &Silent).unwrap();
        let packed = PackedFile::open(&output.join("model.bkpack")).unwrap();
        packed.check_contents(&Silent).unwrap();
        assert_eq!(packed.manifest().policy["rounding"], "learned");
        let how =
            perplexity::Options { ctx: Some(24), skip: 1, activations: Activations::Exact, allow_lookahead: false };
        assert_eq!(evaluate(Cpu::detect(), &packed, None, &tokens(400), &how, &Silent).unwrap().nll, last.nll);
        let folder_again = checkpoint::open(&output).unwrap();
        let path = folder.path().join("again.bkpack");
        let planned = bkpack::pack::Packing::plan(&folder_again, &pack, &path, Cpu::detect(), &Silent).unwrap();
        planned.write(Cpu::detect(), false, &Silent).unwrap();
        assert!(
            contents(&PackedFile::open(&path).unwrap()) != contents(&packed),
            "{name}: the scales were chosen anew"
        );
    }
}

#[test]
fn activations_of_the_core_are_rounded_as_the_packed_file_rounds_them() {
    let (source, pack) = (open("resnet_bk"), pack_options("int8:g32", Rounding::Search));
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let options = Options { core_bits: Some(8), ctx: None, ..options(2) };
    let mut data = data(true);
    data.tokens = tokens(2048);
    data.validation = Some(tokens(1024));
    let trained = train(&source, &pack, &options, &data, false);
    let last = trained.history.validation.last().unwrap().clone();
    let again = pack_options("int8:g32", Rounding::Search);
    trained.write(Cpu::detect(), &source, again, (&output, false), &Silent).unwrap();
    let packed = PackedFile::open(&output.join("model.bkpack")).unwrap();
    assert_eq!(packed.activations().len(), 1);
    let how = perplexity::Options { ctx: None, skip: 1, activations: Activations::Exact, allow_lookahead: false };
    let measured = evaluate(Cpu::detect(), &packed, None, &tokens(1024), &how, &Silent).unwrap();
    assert!(measured.core_error.is_some());
    assert_eq!(measured.nll, last.nll);
}

#[test]
fn the_loss_falls() {
    for (name, encoding) in [("mamba", "int4:g32"), ("qwen3", "ternary:g32"), ("resnet_bk", "binary:g32")] {
        let (source, pack) = (open(name), pack_options(encoding, Rounding::Search));
        let trained = train(&source, &pack, &options(40), &data(true), false);
        let steps = &trained.history.steps;
        let mean = |steps: &[bkpack::train::qat::StepRecord]| {
            steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64
        };
        let (first, last) = (mean(&steps[..4]), mean(&steps[36..]));
        println!("{name} {encoding}: {first} to {last}");
        assert!(last < 0.9 * first, "{name}: {first} to {last}");
        let validation = &trained.history.validation;
        assert!(validation.last().unwrap().ppl < 0.9 * validation[0].ppl, "{name}: {validation:?}");
    }
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (pack, data) = (pack_options("int4:g32", Rounding::Search), data(false));
    let refused = |name: &str, options: &Options, data: &Data| {
        let source = open(name);
        Training::new(Cpu::detect(), &source, None, &pack, options, data, &Silent).err().unwrap().to_string()
    };
    let ahead = refused("resnet_bk_lookahead", &options(2), &data);
    assert!(ahead.contains("its positions see those after them"), "{ahead}");
    let short = refused("mamba", &options(2), &Data { tokens: vec![1; 20], ..data.clone() });
    assert!(short.contains("20 tokens do not fill one window of 24"), "{short}");
    let foreign = refused("mamba", &options(2), &Data { tokens: vec![96; 200], ..data.clone() });
    assert!(foreign.contains("vocabulary"), "{foreign}");
    let core = refused("mamba", &Options { core_bits: Some(8), ..options(2) }, &data);
    assert!(core.contains("Birman-Schwinger"), "{core}");
    for (options, word) in [
        (Options { learning_rate: -1.0, ..options(2) }, "--learning-rate"),
        (Options { batch: 0, ..options(2) }, "--batch"),
        (Options { warmup: 3, ..options(2) }, "--warmup"),
        (options(0), "--steps"),
    ] {
        let why = refused("mamba", &options, &data);
        assert!(why.contains(word), "{why}");
    }
    let teach = |student: &str, teacher: &Checkpoint| {
        Training::new(Cpu::detect(), &open(student), Some(teacher), &pack, &options(2), &data, &Silent).err().unwrap()
    };
    let ahead = teach("resnet_bk", &open("resnet_bk_lookahead")).to_string();
    assert!(ahead.contains("resnet_bk_lookahead") && ahead.contains("so it cannot teach"), "{ahead}");
    let synthetic = tempfile::tempdir().unwrap();
    copy("mamba", synthetic.path(), |config| config["bkpack_synthetic"] = true.into());
    let synthetic = checkpoint::open(synthetic.path()).unwrap();
    assert!(matches!(teach("mamba", &synthetic), Error::Synthetic { .. }));
    let (source, other) =
        (open("mamba"), checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")));
    let (options, other) = (options(2), other.unwrap());
    let teacher = Training::new(Cpu::detect(), &source, Some(&other), &pack, &options, &data, &Silent);
    assert!(matches!(teacher, Err(Error::Incomparable { .. })));
}
