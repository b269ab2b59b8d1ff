//! Every operation on every instruction set of this machine, against the f64 oracle and against one another.
//!
//! Inputs are fresh random numbers; a failure names the seed, and `BKPACK_TEST_SEED` replays it.

mod common;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::{Comparison, KeyValueCache};
use bkpack_kernels::reference_ops::{self as oracle, Heads};
use common::{EXP, Random, UNIT, assert_close, run_everywhere};

const TOKENS: [usize; 5] = [0, 1, 5, 17, 300];
const HEAD_DIMS: [usize; 5] = [20, 32, 64, 80, 128];

#[test]
fn rms_norm() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for width in [1, 15, 16, 33, 576, 2048 + 7] {
            let context = format!("seed {} tokens {tokens} width {width}", random.seed);
            let (x, gain) = (random.values(tokens * width, 3.0), random.values(width, 2.0));
            let actual = run_everywhere(&context, |cpu| {
                let mut out = vec![f32::NAN; x.len()];
                cpu.rms_norm(&x, &gain, 1e-5, &mut out);
                out
            });
            let expected = oracle::rms_norm(&x, &gain, 1e-5);
            // Squares are positive, so each step of the longest chain of sums adds at most one rounding, and the square
            // root halves it; mean, epsilon, root, reciprocal and two products add at most eight.
            let steps = (width / 16 + 6) as f64 / 2.0 + 8.0;
            assert_close(&context, &actual, &expected, |i| steps * UNIT * expected[i].abs() + 1e-37);
        }
    }
}

#[test]
fn element_wise() {
    let mut random = Random::new();
    for length in [0, 1, 5, 15, 16, 17, 300, 70_001, 1 << 18] {
        let context = format!("seed {} length {length}", random.seed);
        let (x, y) = (random.values(length, 30.0), random.values(length, 5.0));

        let actual = run_everywhere(&context, |cpu| {
            let mut out = x.clone();
            cpu.silu_multiply(&mut out, &y);
            out
        });
        let expected = oracle::silu_multiply(&x, &y);
        // exp, 1 + exp, quotient, product.
        assert_close(&context, &actual, &expected, |i| (EXP + 4.0 * UNIT) * expected[i].abs() + 1e-37);

        let actual = run_everywhere(&context, |cpu| {
            let mut out = x.clone();
            cpu.add(&mut out, &y);
            out
        });
        let expected = oracle::add(&x, &y);
        assert_close(&context, &actual, &expected, |i| UNIT * expected[i].abs());
    }
}

#[test]
fn silu_of_extreme_gates() {
    let gate = [f32::MAX, 200.0, 0.0, -0.0, -80.0, -100.0, -1e4, f32::MIN];
    let expected = oracle::silu_multiply(&gate, &[1.0; 8]);
    let actual = run_everywhere("extreme gates", |cpu| {
        let mut out = gate.to_vec();
        cpu.silu_multiply(&mut out, &[1.0; 8]);
        out
    });
    // Where exp(-gate) leaves f32 the result is below 1e-33 and may be zero.
    assert_close("extreme gates", &actual, &expected, |i| (EXP + 3.0 * UNIT) * expected[i].abs() + 1e-33);
}

#[test]
fn add_bias() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for width in [1, 20, 64, 577] {
            let context = format!("seed {} tokens {tokens} width {width}", random.seed);
            let (x, bias) = (random.values(tokens * width, 3.0), random.values(width, 3.0));
            let actual = run_everywhere(&context, |cpu| {
                let mut out = x.clone();
                cpu.add_bias(&mut out, &bias);
                out
            });
            let expected = oracle::add(&x, &bias);
            assert_close(&context, &actual, &expected, |i| UNIT * expected[i].abs());
        }
    }
}

#[test]
fn rope() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for head_dim in HEAD_DIMS {
            for heads in [1, 3, 9] {
                let context = format!("seed {} tokens {tokens} heads {heads} head_dim {head_dim}", random.seed);
                let x = random.values(tokens * heads * head_dim, 4.0);
                let angles = random.values(tokens * head_dim / 2, 3.2);
                let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| a.sin_cos()).unzip();
                let actual = run_everywhere(&context, |cpu| {
                    let mut out = x.clone();
                    cpu.rope(&mut out, heads, head_dim, &cos, &sin);
                    out
                });
                let expected = oracle::rope(&x, heads, head_dim, &cos, &sin);
                // Two products of at most 4 and their sum of at most 8, each rounded once.
                assert_close(&context, &actual, &expected, |_| 16.0 * UNIT);
            }
        }
    }
}

/// Queries, keys and values of one attention call.
struct Scene {
    shape: Heads,
    q: Vec<f32>, // [tokens, heads * head_dim]
    k: Vec<f32>, // [positions, kv_heads * head_dim]
    v: Vec<f32>, // [positions, kv_heads * head_dim]
    positions: usize,
    /// Positions that a query sees.
    window: usize,
}

impl Scene {
    fn new(random: &mut Random, shape: Heads, tokens: usize, positions: usize) -> Self {
        let width = shape.kv_heads * shape.head_dim;
        Self {
            shape,
            q: random.values(tokens * shape.heads * shape.head_dim, 1.0),
            k: random.values(positions * width, 1.0),
            v: random.values(positions * width, 1.0),
            positions,
            window: usize::MAX,
        }
    }

    fn scale(&self) -> f32 {
        // Sharper than 1 / sqrt(head_dim), so that a few positions dominate.
        4.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// A cache filled by appends of `step` positions.
    fn cache(&self, step: usize) -> KeyValueCache {
        let mut cache = KeyValueCache::new(self.shape.kv_heads, self.shape.head_dim, self.positions);
        let chunk = step * self.shape.kv_heads * self.shape.head_dim;
        for (k, v) in self.k.chunks(chunk).zip(self.v.chunks(chunk)) {
            cache.append(k, v);
        }
        assert_eq!((cache.len(), cache.capacity()), (self.positions, self.positions));
        cache
    }

    fn attention(&self, cpu: Cpu, cache: &KeyValueCache) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.q.len()];
        cpu.attention(&self.q, self.shape.heads, cache, self.scale(), self.window, &mut out);
        out
    }

    /// Demands the oracle's result of every instruction set, and the same bits of all.
    fn check(&self, context: &str, cache: &KeyValueCache) {
        let actual = run_everywhere(context, |cpu| self.attention(cpu, cache));
        let expected = oracle::attention(&self.q, &self.k, &self.v, self.shape, self.scale(), self.window);
        // Values are at most 1. A score is a chain of head_dim fused products, each of at most 1, after a product with
        // the scale: its error shifts the exponent and so counts twice, in the weight and in the sum of weights. The
        // weights' own chain of sums then adds one rounding for each position.
        let dim = self.shape.head_dim as f64;
        let score = f64::from(self.scale()) * dim * (dim / 2.0 + 2.0) * UNIT;
        let limit = 2.0 * (score + EXP) + (self.positions as f64 + 16.0) * UNIT;
        assert_close(context, &actual, &expected, |_| limit);
    }
}

#[test]
fn attention() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for head_dim in HEAD_DIMS {
            for (heads, kv_heads) in [(1, 1), (3, 3), (9, 3), (8, 1)] {
                let shape = Heads { heads, kv_heads, head_dim };
                for earlier in [0, 1 + random.below(40)] {
                    let positions = tokens + earlier;
                    let context = format!("seed {} tokens {tokens} positions {positions} {shape:?}", random.seed);
                    let scene = Scene::new(&mut random, shape, tokens, positions);
                    scene.check(&context, &scene.cache(1 + random.below(40)));
                }
            }
        }
    }
}

#[test]
fn attention_over_a_long_cache() {
    let mut random = Random::new();
    for tokens in [1, 2, 7] {
        let shape = Heads { heads: 6, kv_heads: 2, head_dim: 64 };
        let positions = 2000 + random.below(100);
        let context = format!("seed {} tokens {tokens} positions {positions}", random.seed);
        let scene = Scene::new(&mut random, shape, tokens, positions);
        scene.check(&context, &scene.cache(333));
    }
}

#[test]
fn attention_over_a_window() {
    let mut random = Random::new();
    for window in [1, 2, 5, 6, 15, 16, 40, 255, 256, 257, 600, 1000] {
        for (heads, kv_heads) in [(3, 3), (9, 3), (8, 1)] {
            let shape = Heads { heads, kv_heads, head_dim: 20 };
            for (tokens, earlier) in [(1, random.below(700)), (7, 250 + random.below(10)), (300, random.below(300))] {
                let positions = tokens + earlier;
                let context =
                    format!("seed {} window {window} tokens {tokens} positions {positions} {shape:?}", random.seed);
                let mut scene = Scene::new(&mut random, shape, tokens, positions);
                scene.window = window;
                scene.check(&context, &scene.cache(positions));
            }
        }
    }
}

/// Nothing before the window is read: not even what is not a number shows.
#[test]
fn attention_forgets_what_the_window_has_passed() {
    let mut random = Random::new();
    for (heads, kv_heads) in [(4, 4), (9, 3)] {
        for window in [1, 3, 16, 100, 270] {
            let shape = Heads { heads, kv_heads, head_dim: 24 };
            let mut scene = Scene::new(&mut random, shape, 60, 600);
            scene.window = window;
            let context = format!("seed {} {shape:?} window {window}", random.seed);
            let clean = run_everywhere(&context, |cpu| scene.attention(cpu, &scene.cache(600)));
            for first in [0, 1, 5, 31, 59] {
                // Seen by the tokens before `first`, and by no other.
                let passed = (600 - 60 + first + 1 - window) * kv_heads * 24;
                scene.k[..passed].fill(f32::NAN);
                scene.v[..passed].fill(f32::INFINITY);
                let poisoned = run_everywhere(&context, |cpu| scene.attention(cpu, &scene.cache(600)));
                let (earlier, later) = poisoned.split_at(first * heads * 24);
                assert_eq!(later, &clean[earlier.len()..], "{context} first {first}");
                assert!(earlier.iter().all(|x| x.is_nan()), "{context} first {first}");
            }
        }
    }
}

/// A token's result does not depend on what it was computed together with, on the threads, or on later positions.
#[test]
fn decode_repeats_prefill_bit_for_bit() {
    for window in [usize::MAX, 300, 4] {
        decode_repeats_prefill(window);
    }
}

fn decode_repeats_prefill(window: usize) {
    let mut random = Random::new();
    let shape = Heads { heads: 6, kv_heads: 2, head_dim: 80 };
    let positions = 700;
    let context = format!("seed {} window {window}", random.seed);
    let mut scene = Scene::new(&mut random, shape, positions, positions);
    scene.window = window;
    let (q_width, kv_width) = (6 * 80, 2 * 80);
    for cpu in Cpu::available() {
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let many_threads = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
        let prefill = many_threads.install(|| scene.attention(cpu, &scene.cache(positions)));
        let single = one_thread.install(|| scene.attention(cpu, &scene.cache(positions)));
        assert_eq!(prefill, single, "{context} {:?}", cpu.isa());

        let mut cache = KeyValueCache::new(2, 80, positions);
        for token in 0..positions {
            let row = token * kv_width..(token + 1) * kv_width;
            cache.append(&scene.k[row.clone()], &scene.v[row]);
            let row = token * q_width..(token + 1) * q_width;
            let mut out = vec![f32::NAN; q_width];
            many_threads
                .install(|| cpu.attention(&scene.q[row.clone()], 6, &cache, scene.scale(), scene.window, &mut out));
            assert_eq!(out, prefill[row], "{context} {:?} token {token}", cpu.isa());
        }
    }
}

#[test]
fn a_cleared_cache_forgets() {
    let mut random = Random::new();
    let shape = Heads { heads: 2, kv_heads: 2, head_dim: 20 };
    let context = format!("seed {}", random.seed);
    let scene = Scene::new(&mut random, shape, 5, 37);
    let mut cache = KeyValueCache::new(2, 20, 37);
    let poison = vec![f32::NAN; 37 * 40];
    cache.append(&poison, &poison);
    cache.clear();
    assert!(cache.is_empty());
    cache.append(&scene.k, &scene.v);
    scene.check(&context, &cache);
}

/// Not even what is not a number leaks from a later position to an earlier one.
#[test]
fn attention_is_causal() {
    let mut random = Random::new();
    for (heads, kv_heads) in [(4, 4), (9, 3)] {
        let shape = Heads { heads, kv_heads, head_dim: 24 };
        let mut scene = Scene::new(&mut random, shape, 60, 300);
        let context = format!("seed {} {shape:?}", random.seed);
        let clean = run_everywhere(&context, |cpu| scene.attention(cpu, &scene.cache(300)));
        for last in [1, 2, 7, 44, 45, 59] {
            let unseen = (300 - last) * kv_heads * 24;
            scene.k[unseen..].fill(f32::NAN);
            scene.v[unseen..].fill(f32::INFINITY);
            let poisoned = run_everywhere(&context, |cpu| scene.attention(cpu, &scene.cache(300)));
            let (earlier, later) = poisoned.split_at((60 - last) * heads * 24);
            assert_eq!(earlier, &clean[..earlier.len()], "{context} last {last}");
            assert!(later.iter().all(|x| x.is_nan()), "{context} last {last}");
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut random = Random::new();
    let shape = Heads { heads: 1, kv_heads: 1, head_dim: 16 };
    let mut scene = Scene::new(&mut random, shape, 20, 20);
    // Scores of thousands: the largest one takes all the weight, so the output is a value row.
    scene.q.iter_mut().for_each(|x| *x *= 1e4);
    let expected = oracle::attention(&scene.q, &scene.k, &scene.v, shape, scene.scale(), scene.window);
    let actual = run_everywhere("large scores", |cpu| scene.attention(cpu, &scene.cache(20)));
    for (index, (&a, &e)) in actual.iter().zip(&expected).enumerate() {
        assert!(a.is_finite() && (f64::from(a) - e).abs() < 0.05, "seed {}: {a} for {e} at {index}", random.seed);
    }
}

#[test]
#[should_panic(expected = "capacity")]
fn a_full_cache_refuses_more() {
    let mut cache = KeyValueCache::new(1, 4, 2);
    cache.append(&[0.0; 12], &[0.0; 12]);
}

const VOCABULARIES: [usize; 4] = [1, 5, 4096 + 3, 50_257];

#[test]
fn softmax() {
    let mut random = Random::new();
    for vocab in VOCABULARIES {
        let context = format!("seed {} vocab {vocab}", random.seed);
        let row = random.values(vocab, 12.0);
        let expected = oracle::softmax(&row);
        let actual = run_everywhere(&context, |cpu| {
            let mut out = row.clone();
            cpu.softmax(&mut out);
            out
        });
        // x - max is at most 24, rounded to half an ulp of 16; the same in the sum; then exp, reciprocal, product and
        // the sums of the blocks.
        assert_close(&context, &actual, &expected, |i| {
            (2.0 * 16.0 + 20.0) * UNIT * expected[i] + 2.0 * EXP * expected[i]
        });
    }
}

#[test]
fn cross_entropy() {
    let mut random = Random::new();
    for vocab in VOCABULARIES.into_iter().chain([200_000]) {
        for range in [0.01, 3.0, 30.0] {
            let rows = 1 + random.below(4);
            let context = format!("seed {} vocab {vocab} range {range} rows {rows}", random.seed);
            let logits = random.values(rows * vocab, range);
            let targets: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
            let mut first: Option<Vec<f64>> = None;
            for cpu in Cpu::available() {
                let mut out = vec![f64::NAN; rows];
                cpu.cross_entropy(&logits, &targets, &mut out);
                for (row, (&actual, &target)) in out.iter().zip(&targets).enumerate() {
                    let expected = oracle::cross_entropy(&logits[row * vocab..][..vocab], target);
                    let error = (actual - expected).abs();
                    assert!(error < 1e-6, "{context} {:?}: {actual} instead of {expected}", cpu.isa());
                }
                assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{context} {:?}", cpu.isa());
            }
        }
    }
}

/// Equal terms round the same way at every step, which is where a plain f32 sum drifts.
#[test]
fn cross_entropy_of_equal_logits() {
    let mut random = Random::new();
    for vocab in [1000, 50_257, 200_000] {
        let mut logits = vec![random.values(1, 5.0)[0] - 7.0; vocab];
        logits[random.below(vocab)] = 0.0;
        let expected = oracle::cross_entropy(&logits, 0);
        for cpu in Cpu::available() {
            let mut out = [f64::NAN];
            cpu.cross_entropy(&logits, &[0], &mut out);
            let error = (out[0] - expected).abs();
            // Ten roundings within a block, and those of exp; the largest logit is 0, so nothing else is rounded.
            assert!(error < EXP + 10.0 * UNIT, "seed {} vocab {vocab} {:?}: {error:e}", random.seed, cpu.isa());
        }
    }
}

#[test]
fn kl_divergence() {
    let mut random = Random::new();
    for vocab in VOCABULARIES {
        for (spread, range) in [(0.0, 1.0), (3.0, 1e-4), (3.0, 0.01), (10.0, 0.8), (10.0, 3.0), (20.0, 40.0)] {
            let rows = 1 + random.below(4);
            let context = format!("seed {} vocab {vocab} spread {spread} noise {range}", random.seed);
            let baseline = random.values(rows * vocab, spread);
            let noise = random.values(rows * vocab, range);
            // A shift of all logits is no difference.
            let other: Vec<f32> = baseline.iter().zip(noise).map(|(b, n)| b + n + 0.5).collect();
            let mut first: Option<Vec<Comparison>> = None;
            for cpu in Cpu::available() {
                let mut out = vec![Comparison::default(); rows];
                cpu.compare_logits(&baseline, &other, vocab, &mut out);
                for (row, actual) in out.iter().enumerate() {
                    let (b, o) = (&baseline[row * vocab..][..vocab], &other[row * vocab..][..vocab]);
                    let expected = oracle::kl_divergence(b, o);
                    // Relative, even where the divergence is far below the rounding of a log-probability. The
                    // log-ratio is at most 2 * range + 1; each of its three roundings shifts a term by at most
                    // |1 - q / p| of that, and by Cauchy-Schwarz the sum of those by sqrt(2 KL), or 2.
                    let ratio_error = 3.0 * (2.0 * f64::from(range) + 1.0) * UNIT;
                    let limit = 2e-5 * expected + ratio_error * (2.0 * expected).sqrt().min(2.0) + 1e-14;
                    let error = (actual.kl_divergence - expected).abs();
                    assert!(
                        error <= limit && actual.kl_divergence >= 0.0,
                        "{context} {:?}: {:e} instead of {expected:e}",
                        cpu.isa(),
                        actual.kl_divergence
                    );
                    assert_eq!(actual.same_top, oracle::arg_max(b) == oracle::arg_max(o), "{context}");
                }
                assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{context} {:?}", cpu.isa());
            }
        }
    }
}

#[test]
fn equal_logits_do_not_diverge() {
    let mut random = Random::new();
    let logits = random.values(5000, 20.0);
    for cpu in Cpu::available() {
        let mut out = [Comparison::default()];
        cpu.compare_logits(&logits, &logits, logits.len(), &mut out);
        assert_eq!(out, [Comparison { kl_divergence: 0.0, same_top: true }], "seed {}", random.seed);
    }
}

/// A masked token has the logit -inf; it is no difference where both mask it.
#[test]
fn impossible_tokens() {
    const NONE: f32 = f32::NEG_INFINITY;
    for cpu in Cpu::available() {
        let compare = |baseline: &[f32], other: &[f32]| {
            let mut out = [Comparison::default()];
            cpu.compare_logits(baseline, other, baseline.len(), &mut out);
            out[0].kl_divergence
        };
        assert!(compare(&[1.0, NONE, 1.0], &[2.0, NONE, 2.0]).abs() < 1e-12);
        assert!((compare(&[1.0, NONE, 1.0], &[2.0, 2.0, 2.0]) - 1.5f64.ln()).abs() < 1e-6);
        assert_eq!(compare(&[1.0, 1.0], &[1.0, NONE]), f64::INFINITY);

        let mut out = [0.0; 2];
        cpu.cross_entropy(&[1.0, NONE, 1.0, NONE], &[0, 1], &mut out);
        assert_eq!(out, [0.0, f64::INFINITY]);
    }
}

#[test]
fn nan_logits_give_nan_and_no_panic() {
    let mut logits = vec![0.5f32; 100];
    logits[41] = f32::NAN;
    for cpu in Cpu::available() {
        let mut nll = [0.0];
        cpu.cross_entropy(&logits, &[3], &mut nll);
        assert!(nll[0].is_nan(), "{:?}", cpu.isa());
        let mut out = [Comparison::default()];
        cpu.compare_logits(&[0.5; 100], &logits, 100, &mut out);
        assert!(out[0].kl_divergence.is_nan() && out[0].same_top, "{:?}", cpu.isa());
        cpu.compare_logits(&logits, &[0.5; 100], 100, &mut out);
        assert!(out[0].kl_divergence.is_nan(), "{:?}", cpu.isa());
        let mut row = logits.clone();
        cpu.softmax(&mut row);
        assert!(row.iter().all(|x| x.is_nan()), "{:?}", cpu.isa());
    }
}

#[test]
fn arg_max() {
    let mut random = Random::new();
    for length in [1, 2, 16, 17, 1024, 1025, 5000] {
        let row = random.values(length, 5.0);
        let mut tied = row.clone();
        let (a, b) = (random.below(length), random.below(length));
        (tied[a], tied[b]) = (9.0, 9.0);
        let mut holed = tied.clone();
        (0..length / 2).for_each(|_| holed[random.below(length)] = f32::NAN);
        let rows = [row, tied, holed, vec![f32::NAN; length], vec![f32::NEG_INFINITY; length]];
        for cpu in Cpu::available() {
            for (kind, row) in rows.iter().enumerate() {
                let expected = oracle::arg_max(row);
                assert_eq!(cpu.arg_max(row), expected, "seed {} length {length} kind {kind}", random.seed);
            }
        }
    }
    for cpu in Cpu::available() {
        assert_eq!(cpu.arg_max(&[f32::NAN, f32::NEG_INFINITY]), 1);
    }
}
