//! Mixtures of experts, whose choices stay on the card.

use bkpack_kernels::{
    FloatType,
    cpu::top_k,
    cuda::{Cuda, CudaError, DeviceExperts, DeviceMatrix, DeviceValues, StepGraph},
    reference,
};

use super::{
    common::{Random, UNIT, assert_close},
    cuda,
    operations::{Bytes, matrices},
    read,
};

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn routing() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (experts, chosen) in [(1, 1), (4, 2), (3, 3), (70, 8)] {
        let tokens = 13;
        let mut logits = random.values(tokens * experts, 4.0);
        logits[0] = f32::NAN;
        if experts > 1 {
            logits[experts] = logits[experts + 1];
        }
        // A token for which nothing can be said.
        logits[2 * experts..3 * experts].fill(f32::NAN);
        let (mut experts_of, mut weights) = (vec![0; tokens * chosen], vec![0.0; tokens * chosen]);
        top_k(&logits, experts, chosen, &mut experts_of, &mut weights);
        let (choices, found_weights) = cuda.route(&cuda.values(&logits, experts).unwrap(), chosen).unwrap();
        let experts_of: Vec<f32> = experts_of.into_iter().map(|expert| expert as f32).collect();
        assert_eq!(read(&cuda, &choices), experts_of, "seed {}", random.seed);
        for (found, expected) in read(&cuda, &found_weights).iter().zip(&weights) {
            let same = found.is_nan() && expected.is_nan() || (found - expected).abs() < 1e-6;
            assert!(same, "seed {}: {found} for {expected}", random.seed);
        }
    }
}

/// The layers of experts on the card, and their weights and biases in f32.
struct Layers {
    device: DeviceExperts,
    bytes: Vec<Bytes>,
    biases: Vec<Option<Vec<f32>>>,
}

impl Layers {
    fn new(cuda: &Cuda, random: &mut Random, bytes: Vec<Bytes>) -> Self {
        let rows = bytes[0].rows;
        let biases: Vec<_> = bytes.iter().map(|_| (random.below(2) == 1).then(|| random.values(rows, 1.0))).collect();
        let on_card: Vec<_> = bytes.iter().map(|bytes| cuda.matrix(&bytes.matrix()).unwrap()).collect();
        let biases_on_card: Vec<_> =
            biases.iter().map(|bias| bias.as_ref().map(|bias| cuda.values(bias, rows).unwrap())).collect();
        let all: Vec<_> = on_card.iter().zip(biases_on_card.iter().map(Option::as_ref)).collect();
        // What they are made of is dropped: the table keeps what it points to.
        Self { device: cuda.experts(&all).unwrap(), bytes, biases }
    }

    /// Checks what one expert computed of a row.
    fn check(&self, context: &str, expert: usize, x: &[f32], found: &[f32]) {
        let weights = reference::dequantize(&self.bytes[expert].matrix());
        assert_product(&format!("{context}, expert {expert}"), &weights, self.biases[expert].as_deref(), x, found);
    }
}

/// Checks the product of a row with weights `[out, in]`, to which a bias is added.
fn assert_product(context: &str, weights: &[f32], bias: Option<&[f32]>, x: &[f32], found: &[f32]) {
    let terms = |row: usize| weights[row * x.len()..].iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
    let rows = weights.len() / x.len();
    let bias = |row: usize| bias.map_or(0.0, |bias| f64::from(bias[row]));
    let expected: Vec<f64> = (0..rows).map(|row| terms(row).sum::<f64>() + bias(row)).collect();
    let magnitude = |row: usize| 1.0 + terms(row).map(f64::abs).sum::<f64>();
    assert_close(context, found, &expected, |row| (x.len() + 16) as f64 * UNIT * magnitude(row));
}

/// Experts of all encodings in one layer; each chosen once, one alone, one several times, and none.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn layers_of_chosen_experts() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (rows, cols) in [(9, 96), (37, 61), (5, 4133), (1, 1)] {
        let bytes = matrices(&mut random, rows, cols, &[7, 32, 64, 1 << 40]).into_iter().map(|(_, bytes)| bytes);
        let layers = Layers::new(&cuda, &mut random, bytes.collect());
        let experts = layers.bytes.len();
        let mut every: Vec<usize> = (0..experts).collect();
        (1..experts).rev().for_each(|last| every.swap(last, random.below(last + 1)));
        let again = random.below(experts);
        for choices in [every, vec![random.below(experts)], vec![again, random.below(experts), again]] {
            let numbers: Vec<f32> = choices.iter().map(|&choice| choice as f32).collect();
            for shared in [true, false] {
                let context = format!("seed {} [{rows}, {cols}], {choices:?} of one row: {shared}", random.seed);
                let x = random.values(if shared { 1 } else { choices.len() } * cols, 2.0);
                let (x_device, choices_device) = (cuda.values(&x, cols).unwrap(), cuda.values(&numbers, numbers.len()));
                let out = cuda.linear_chosen(&x_device, &layers.device, &choices_device.unwrap()).unwrap();
                assert_eq!((out.rows(), out.cols()), (choices.len(), rows));
                let found = read(&cuda, &out);
                for (slot, &choice) in choices.iter().enumerate() {
                    let x = if shared { &x[..] } else { &x[slot * cols..][..cols] };
                    layers.check(&context, choice, x, &found[slot * rows..][..rows]);
                }
            }
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn one_expert_and_parts_of_a_stack() {
    let (cuda, mut random) = (cuda(), Random::new());
    let layers = Layers::new(&cuda, &mut random, vec![Bytes::float(&mut Random::new(), FloatType::F16, 20, 33)]);
    let x = random.values(33, 2.0);
    let choice = cuda.values(&[0.0], 1).unwrap();
    let out = cuda.linear_chosen(&cuda.values(&x, 33).unwrap(), &layers.device, &choice).unwrap();
    layers.check(&format!("seed {}", random.seed), 0, &x, &read(&cuda, &out));

    for (name, stack) in matrices(&mut random, 3 * 5, 45, &[7, 32, 1 << 40]) {
        let w = stack.matrix();
        let parts = cuda.matrix(&w).unwrap().split(3);
        let layers = cuda.experts(&parts.iter().map(|part| (part, None)).collect::<Vec<_>>()).unwrap();
        let x = random.values(45, 2.0);
        let choices = cuda.values(&[2.0, 0.0], 2).unwrap();
        let found = read(&cuda, &cuda.linear_chosen(&cuda.values(&x, 45).unwrap(), &layers, &choices).unwrap());
        let weights = reference::dequantize(&w);
        for (found, part) in found.chunks(5).zip([2, 0]) {
            let context = format!("seed {} {name}, part {part}", random.seed);
            assert_product(&context, &weights[part * 5 * 45..][..5 * 45], None, &x, found);
        }
    }
}

/// A number that names no expert is not looked up.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn choices_beyond_the_experts() {
    let (cuda, mut random) = (cuda(), Random::new());
    let bytes = matrices(&mut random, 21, 40, &[32]).into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>();
    let count = bytes.len() as f32;
    let layers = Layers::new(&cuda, &mut random, bytes);
    let x = random.values(40, 2.0);
    let choices = [f32::NAN, 1.0, count, -1.0, f32::INFINITY, 4e9, count - 1.0];
    let device = cuda.values(&choices, choices.len()).unwrap();
    let found = read(&cuda, &cuda.linear_chosen(&cuda.values(&x, 40).unwrap(), &layers.device, &device).unwrap());
    for (found, choice) in found.chunks(21).zip(choices) {
        match choice == 1.0 || choice == count - 1.0 {
            true => layers.check(&format!("seed {}", random.seed), choice as usize, &x, found),
            false => assert!(found.iter().all(|value| value.is_nan()), "{choice}: {found:?}"),
        }
    }
}

#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn weighted_sums() {
    let (cuda, mut random) = (cuda(), Random::new());
    for (rows, cols) in [(1, 1), (2, 300), (9, 37)] {
        let (weights, y) = (random.values(rows, 1.0), random.values(rows * cols, 3.0));
        let sum = cuda.weighted_sum(&cuda.values(&y, cols).unwrap(), &cuda.values(&weights, rows).unwrap()).unwrap();
        assert_eq!((sum.rows(), sum.cols()), (1, cols));
        let term = |row: usize, col: usize| f64::from(weights[row]) * f64::from(y[row * cols + col]);
        let expected: Vec<f64> = (0..cols).map(|col| (0..rows).map(|row| term(row, col)).sum()).collect();
        assert_close(&format!("seed {}", random.seed), &read(&cuda, &sum), &expected, |_| {
            3.0 * (rows * rows) as f64 * UNIT
        });
    }
}

/// What a step computes of the row of its token.
fn run(
    cuda: &Cuda,
    table: &DeviceMatrix,
    router: &DeviceMatrix,
    layers: &DeviceExperts,
) -> Result<DeviceValues, CudaError> {
    let x = cuda.embed_step(table)?;
    let logits = cuda.linear(&x, router, None, bkpack_kernels::cuda::Precision::Exact)?;
    let (choices, weights) = cuda.route(&logits, 2)?;
    cuda.weighted_sum(&cuda.linear_chosen(&x, layers, &choices)?, &weights)
}

/// A recorded step goes through other experts for another token, whatever was dropped since it was recorded.
#[test]
#[ignore = "run on the emulator by the test of the same name"]
fn a_recorded_step_chooses_anew() {
    let (cuda, mut random) = (cuda(), Random::new());
    let (vocabulary, cols, rows) = (12, 24, 7);
    let [table, router] = [vocabulary, 19].map(|rows| Bytes::float(&mut random, FloatType::F32, rows, cols));
    let bytes = matrices(&mut random, rows, cols, &[8, 32]).into_iter().map(|(_, bytes)| bytes).collect();
    let layers = Layers::new(&cuda, &mut random, bytes);
    let [table, router] = [&table, &router].map(|bytes| cuda.matrix(&bytes.matrix()).unwrap());
    // Each by itself, before.
    let expected: Vec<Vec<f32>> = (0..vocabulary as u32)
        .map(|token| {
            let mut out = Vec::new();
            let run = || run(&cuda, &table, &router, &layers.device);
            cuda.step::<CudaError>(&mut StepGraph::default(), (token, 0), run, &mut out).unwrap();
            out
        })
        .collect();
    let mut graph = StepGraph::default();
    let mut out = Vec::new();
    for token in [3, 5] {
        let run = || run(&cuda, &table, &router, &layers.device);
        cuda.step::<CudaError>(&mut graph, (token, 0), run, &mut out).unwrap();
        assert_eq!(out, expected[token as usize], "seed {}", random.seed);
    }
    assert!(graph.is_recorded());
    drop((table, router, layers));
    // These would lie where the operands did.
    let _others: Vec<DeviceValues> = (0..40).map(|_| cuda.values(&vec![1e9; rows * cols], cols).unwrap()).collect();
    for token in 0..vocabulary as u32 {
        let gone = || -> Result<DeviceValues, CudaError> { unreachable!("a replay runs nothing anew") };
        cuda.step(&mut graph, (token, 0), gone, &mut out).unwrap();
        assert_eq!(out, expected[token as usize], "seed {} token {token}", random.seed);
    }
}
