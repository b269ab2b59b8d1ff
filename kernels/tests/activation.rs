//! Activation functions, LayerNorm, rounding to a grid and expert routing on every instruction set of this machine,
//! against the f64 oracle and against one another.
//!
//! Inputs are fresh random numbers; a failure names the seed, and `BKPACK_TEST_SEED` replays it.

mod common;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::top_k;
use bkpack_kernels::reference_ops as oracle;
use common::{EXP, Random, UNIT, assert_close, run_everywhere};

const LENGTHS: [usize; 8] = [0, 1, 5, 15, 16, 17, 300, 70_001];

/// Half of the smallest subnormal: the rounding of a result that has no leading digits left.
const TINY: f64 = 1e-45;

fn in_place(context: &str, x: &[f32], operation: impl Fn(Cpu, &mut [f32])) -> Vec<f32> {
    run_everywhere(context, |cpu| {
        let mut out = x.to_vec();
        operation(cpu, &mut out);
        out
    })
}

fn as_f64(x: impl IntoIterator<Item = f32>) -> Vec<f64> {
    x.into_iter().map(f64::from).collect()
}

#[test]
fn layer_norm() {
    let mut random = Random::new();
    for rows in [0, 1, 5, 300] {
        for width in [1, 2, 15, 16, 33, 576, 2048 + 7] {
            for offset in [0.0, 0.3, 1e4] {
                let context = format!("seed {} rows {rows} width {width} offset {offset}", random.seed);
                let x: Vec<f32> = random.values(rows * width, 3.0).iter().map(|x| x + offset).collect();
                let (gain, bias) = (random.values(width, 2.0), random.values(width, 2.0));
                let actual = run_everywhere(&context, |cpu| {
                    let mut out = vec![f32::NAN; x.len()];
                    cpu.layer_norm(&x, &gain, &bias, 1e-5, &mut out);
                    out
                });
                let expected = oracle::layer_norm(&x, &gain, &bias, 1e-5);
                // A sum is a chain of width / 32 roundings, then five for its lanes and two for its quotient.
                let chain = (width / 32 + 9) as f64;
                // Of each row: the factor, and by how much the center can be off. The mean's own rounding is at most
                // `chain` units of the values; its rest has that error in units of what is left after subtraction.
                let scales = x.chunks(width).map(|row| {
                    let mean_of = |f: &dyn Fn(f64) -> f64| row.iter().map(|&v| f(v.into())).sum::<f64>() / width as f64;
                    let (mean, absolute) = (mean_of(&|v| v), mean_of(&f64::abs));
                    let spread = mean_of(&|v| (v - mean).abs());
                    let factor = 1.0 / (mean_of(&|v| (v - mean).powi(2)) + 1e-5).sqrt();
                    (factor, chain * UNIT * (2.0 * spread + 2.0 * chain * UNIT * absolute))
                });
                let scales: Vec<(f64, f64)> = scales.collect();
                assert_close(&context, &actual, &expected, |i| {
                    let (factor, center) = scales[i / width];
                    let value = (expected[i] - f64::from(bias[i % width])).abs();
                    let shifted = f64::from(gain[i % width]).abs() * factor * center;
                    (chain + 10.0) * UNIT * value + shifted * (1.0 + value) + 2.0 * UNIT * expected[i].abs()
                });
            }
        }
    }
}

#[test]
fn silu() {
    let mut random = Random::new();
    for length in LENGTHS {
        let context = format!("seed {} length {length}", random.seed);
        let x = random.values(length, 30.0);
        let actual = in_place(&context, &x, |cpu, x| cpu.silu(x));
        let expected: Vec<f64> = x.iter().map(|&x| oracle::silu(x)).collect();
        // exp, 1 + exp, quotient.
        assert_close(&context, &actual, &expected, |i| (EXP + 3.0 * UNIT) * expected[i].abs());
    }
}

#[test]
fn softplus() {
    let mut random = Random::new();
    let extremes = [0.0, -0.0, 1e-30, 19.999, 20.0, 20.001, 88.8, 1e30, -20.0, -87.0, -90.0, -103.0, -110.0, -1e30];
    for (length, range) in LENGTHS.into_iter().map(|length| (length, 30.0)).chain([(5000, 0.1), (5000, 104.0)]) {
        let context = format!("seed {} length {length} range {range}", random.seed);
        let mut x = random.values(length, range);
        x.extend(extremes);
        let actual = in_place(&context, &x, |cpu, x| cpu.softplus(x));
        let expected: Vec<f64> = x.iter().map(|&x| oracle::softplus(x)).collect();
        // exp; the quotient and its sum, three products, the series (which is at most a tenth of the whole) and the sum
        // with the positive part. The oracle stops at 20, where exp(-20) is left.
        assert_close(&context, &actual, &expected, |i| (EXP + 8.0 * UNIT) * expected[i] + TINY);
    }
    let special = in_place("special", &[f32::INFINITY, f32::NEG_INFINITY, f32::NAN], |cpu, x| cpu.softplus(x));
    assert_eq!(special[..2], [f32::INFINITY, 0.0]);
    assert!(special[2].is_nan());
}

#[test]
fn relu_and_clamp() {
    let mut random = Random::new();
    for length in LENGTHS {
        let context = format!("seed {} length {length}", random.seed);
        let mut x = random.values(length, 5.0);
        x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, -3.0, 4.0]);
        let expected = as_f64(x.iter().map(|&x| if x > 0.0 { x } else { 0.0 }));
        let actual = in_place(&context, &x, |cpu, x| cpu.relu(x));
        assert_eq!(as_f64(actual), expected, "{context}");

        for (low, high) in [(-3.0, 4.0), (0.5, 0.5), (f32::NEG_INFINITY, 1.0)] {
            let expected = as_f64(x.iter().map(|x| x.clamp(low, high)));
            let actual = in_place(&context, &x, |cpu, x| cpu.clamp(x, low, high));
            assert_eq!(as_f64(actual), expected, "{context} {low} {high}");
        }
    }
    assert!(in_place("NaN", &[f32::NAN; 17], |cpu, x| cpu.relu(x)).iter().all(|x| x.is_nan()));
    assert!(in_place("NaN", &[f32::NAN; 17], |cpu, x| cpu.clamp(x, -1.0, 1.0)).iter().all(|x| x.is_nan()));
}

#[test]
#[should_panic(expected = "nothing is between")]
fn clamp_refuses_crossed_bounds() {
    Cpu::detect().clamp(&mut [0.0], 1.0, -1.0);
}

#[test]
fn add_scaled() {
    let mut random = Random::new();
    for length in LENGTHS {
        for scale in [0.0, 1.0, -0.37, 3e5] {
            let context = format!("seed {} length {length} scale {scale}", random.seed);
            let (x, y) = (random.values(length, 30.0), random.values(length, 5.0));
            let actual = in_place(&context, &x, |cpu, x| cpu.add_scaled(x, &y, scale));
            let terms = x.iter().zip(&y);
            let expected: Vec<f64> = terms.map(|(&x, &y)| f64::from(x) + f64::from(scale) * f64::from(y)).collect();
            // One rounding.
            assert_close(&context, &actual, &expected, |i| 1.000_001 * UNIT * expected[i].abs());
        }
    }
}

#[test]
fn round_to_grid() {
    let mut random = Random::new();
    for length in LENGTHS {
        for largest in [1.0, 7.0, 127.0] {
            let context = format!("seed {} length {length} largest {largest}", random.seed);
            let x = random.values(length, 5.0);
            let mut scales: Vec<f32> = random.values(length, 0.1).iter().map(|s| s.abs()).collect();
            // Zero scales, and scales of which values are exact halves.
            scales.iter_mut().step_by(5).for_each(|scale| *scale = 0.0);
            scales.iter_mut().zip(&x).step_by(7).for_each(|(scale, x)| *scale = x.abs() * 0.4);
            let actual = in_place(&context, &x, |cpu, x| cpu.round_to_grid(x, &scales, largest));
            let pairs = x.iter().zip(&scales);
            let expected: Vec<f64> = pairs.map(|(&x, &scale)| oracle::round_to_grid(x, scale, largest)).collect();
            // The product with the scale.
            assert_close(&context, &actual, &expected, |i| UNIT * expected[i].abs() + TINY);
        }
    }
    let halves = in_place("halves", &[0.5, 1.5, 2.5, -0.5, -1.5, 1e9], |cpu, x| cpu.round_to_grid(x, &[1.0; 6], 2.0));
    assert_eq!(halves, [0.0, 2.0, 2.0, 0.0, -2.0, 2.0]);
}

#[test]
fn top_k_and_weights() {
    let mut random = Random::new();
    for tokens in [0, 1, 7] {
        for experts in [1, 2, 8, 60, 129] {
            for k in [1, 2, experts.min(8), experts].into_iter().filter(|&k| k <= experts) {
                let context = format!("seed {} tokens {tokens} experts {experts} k {k}", random.seed);
                // Few distinct values, so that there are ties.
                let logits: Vec<f32> = random.values(tokens * experts, 20.0).iter().map(|x| x.round() / 4.0).collect();
                let (mut chosen, mut weights) = (vec![u32::MAX; tokens * k], vec![f32::NAN; tokens * k]);
                top_k(&logits, experts, k, &mut chosen, &mut weights);
                let rows = logits.chunks(experts).zip(chosen.chunks(k).zip(weights.chunks(k)));
                for (row, (chosen, weights)) in rows {
                    let mut left = row.to_vec();
                    let expected: Vec<u32> = (0..k)
                        .map(|_| {
                            let best = oracle::arg_max(&left);
                            left[best] = f32::NAN;
                            best as u32
                        })
                        .collect();
                    assert_eq!(chosen, expected, "{context}");
                    let picked: Vec<f32> = chosen.iter().map(|&index| row[index as usize]).collect();
                    let softmax = oracle::softmax(&picked);
                    // exp, a chain of k sums and the quotient; the differences of quarters are exact.
                    let limit = EXP + (k as f64 + 2.0) * UNIT;
                    assert_close(&context, weights, &softmax, |i| limit * softmax[i]);
                }
            }
        }
    }
}

#[test]
fn top_k_of_what_is_not_a_number() {
    let (mut chosen, mut weights) = ([9; 3], [0.0; 3]);
    top_k(&[f32::NAN, 1.0, f32::NEG_INFINITY, 1.0, 0.0], 5, 3, &mut chosen, &mut weights);
    assert_eq!(chosen, [1, 3, 4]);
    assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    top_k(&[f32::NAN, f32::NEG_INFINITY, f32::NAN], 3, 3, &mut chosen, &mut weights);
    assert_eq!(chosen, [1, 0, 2]);
    assert!(weights.iter().all(|weight| weight.is_nan()));
    // A sort may panic where its order is not total.
    let mut random = Random::new();
    for _ in 0..200 {
        let mut logits: Vec<f32> = random.values(64, 4.0).iter().map(|x| x.round()).collect();
        (0..40).for_each(|_| logits[random.below(64)] = f32::NAN);
        top_k(&logits, 64, 3, &mut chosen, &mut weights);
        assert_eq!(chosen[0], oracle::arg_max(&logits) as u32, "seed {}", random.seed);
    }
}
