//! The operations that carry a state from token to token, and the resolvent, on every instruction set of this machine,
//! against the f64 oracle and against one another.
//!
//! Inputs are fresh random numbers; a failure names the seed, and `BKPACK_TEST_SEED` replays it.

mod common;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::SelectiveScan;
use bkpack_kernels::reference_sequence as oracle;
use common::{EXP, Random, UNIT, assert_close, run_everywhere};

const TOKENS: [usize; 6] = [0, 1, 2, 5, 17, 300];

/// Splits a sequence into chunks of 1, 3 and 7 tokens, over and over.
fn chunks(tokens: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut start = 0;
    [1, 3, 7].into_iter().cycle().map_while(move |length| {
        let range = start..(start + length).min(tokens);
        start = range.end;
        (!range.is_empty()).then_some(range)
    })
}

#[test]
fn depthwise_conv() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for channels in [1, 15, 16, 70, 1536 + 3] {
            for kernel in [1, 2, 4, 7] {
                let context = format!("seed {} tokens {tokens} channels {channels} kernel {kernel}", random.seed);
                let x = random.values(tokens * channels, 3.0);
                let (weight, bias) = (random.values(channels * kernel, 1.0), random.values(channels, 1.0));
                let whole = run_everywhere(&context, |cpu| {
                    let (mut out, mut history) = (vec![f32::NAN; x.len()], vec![0.0; (kernel - 1) * channels]);
                    cpu.depthwise_conv(&x, &weight, Some(&bias), &mut history, &mut out);
                    let (mut pieces, mut piece_history) = (vec![f32::NAN; x.len()], vec![0.0; history.len()]);
                    for chunk in chunks(tokens) {
                        let range = chunk.start * channels..chunk.end * channels;
                        let (x, out) = (&x[range.clone()], &mut pieces[range]);
                        cpu.depthwise_conv(x, &weight, Some(&bias), &mut piece_history, out);
                    }
                    assert_eq!(out, pieces, "{context}");
                    assert_eq!(history, piece_history, "{context}");
                    out
                });
                let expected = oracle::depthwise_conv(&x, &weight, &bias);
                // A chain of fused products of at most 3, after a bias of at most 1.
                let limit = (1.0 + 3.0 * kernel as f64) * kernel as f64 * UNIT;
                assert_close(&context, &whole, &expected, |_| limit);

                let plain = run_everywhere(&context, |cpu| {
                    let (mut out, mut history) = (vec![f32::NAN; x.len()], vec![0.0; (kernel - 1) * channels]);
                    cpu.depthwise_conv(&x, &weight, None, &mut history, &mut out);
                    out
                });
                let expected = oracle::depthwise_conv(&x, &weight, &vec![0.0; channels]);
                assert_close(&context, &plain, &expected, |_| limit);
            }
        }
    }
}

#[test]
#[should_panic(expected = "not equal rows")]
fn depthwise_conv_refuses_part_of_a_row() {
    Cpu::detect().depthwise_conv(&[0.0; 5], &[0.0; 8], None, &mut [0.0; 6], &mut [0.0; 5]);
}

/// The operands of a scan.
struct Operands {
    x: Vec<f32>,
    delta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f32>,
    state_size: usize,
}

impl Operands {
    fn new(random: &mut Random, tokens: usize, channels: usize, state_size: usize, rate: f32) -> Self {
        let mut positive = |count, range| random.values(count, range).iter().map(|x| x.abs()).collect::<Vec<f32>>();
        let (delta, rates) = (positive(tokens * channels, 1.0), positive(channels * state_size, rate));
        Self {
            x: random.values(tokens * channels, 1.0),
            delta,
            a: rates.iter().map(|rate| -rate).collect(),
            b: random.values(tokens * state_size, 1.0),
            c: random.values(tokens * state_size, 1.0),
            d: random.values(channels, 1.0),
            state_size,
        }
    }

    fn tokens(&self, range: std::ops::Range<usize>) -> SelectiveScan<'_> {
        let (channels, size) = (self.d.len(), self.state_size);
        let (rows, states) = (range.start * channels..range.end * channels, range.start * size..range.end * size);
        SelectiveScan {
            x: &self.x[rows.clone()],
            delta: &self.delta[rows],
            a: &self.a,
            b: &self.b[states.clone()],
            c: &self.c[states],
            d: &self.d,
        }
    }

    fn magnitudes(&self) -> Self {
        let abs = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<f32>>();
        Self {
            x: abs(&self.x),
            delta: self.delta.clone(),
            a: self.a.clone(),
            b: abs(&self.b),
            c: abs(&self.c),
            d: abs(&self.d),
            state_size: self.state_size,
        }
    }
}

#[test]
fn selective_scan() {
    let mut random = Random::new();
    for tokens in TOKENS {
        for channels in [1, 16, 17, 64, 150] {
            for state_size in [1, 3, 16, 21, 64] {
                let rate = [0.01, 1.0, 16.0][random.below(3)];
                let context =
                    format!("seed {} tokens {tokens} channels {channels} states {state_size} rate {rate}", random.seed);
                let operands = Operands::new(&mut random, tokens, channels, state_size, rate);
                let actual = run_everywhere(&context, |cpu| {
                    let (mut out, mut state) = (vec![f32::NAN; tokens * channels], vec![0.0; channels * state_size]);
                    cpu.selective_scan(&operands.tokens(0..tokens), &mut state, &mut out);
                    let (mut pieces, mut piece_state) = (vec![f32::NAN; out.len()], vec![0.0; state.len()]);
                    for chunk in chunks(tokens) {
                        let out = &mut pieces[chunk.start * channels..chunk.end * channels];
                        cpu.selective_scan(&operands.tokens(chunk), &mut piece_state, out);
                    }
                    assert_eq!(out, pieces, "{context}");
                    assert_eq!(state, piece_state, "{context}");
                    out.extend(state);
                    out
                });
                let (mut expected, state) = oracle::selective_scan(&operands.tokens(0..tokens));
                expected.extend(state);
                // A value is a sum of products, and the same sum of magnitudes scales the error. An input has two
                // roundings before it is added. A step multiplies by the decay and adds: a rounding, and the decay's own
                // error, which is that of the exponential and three roundings (rate, factor, product) of an exponent
                // of at most `rate`. Then come the chain of sums over the state and the product with d.
                let (mut magnitudes, state) = oracle::selective_scan(&operands.magnitudes().tokens(0..tokens));
                magnitudes.extend(state);
                let step = EXP + UNIT + 3.0 * UNIT * f64::from(rate);
                let limit = tokens as f64 * step + (state_size as f64 + 5.0) * UNIT;
                assert_close(&context, &actual, &expected, |i| limit * magnitudes[i] + 1e-37);
            }
        }
    }
}

/// The result does not depend on the number of threads.
#[test]
fn threads_do_not_change_the_scan() {
    let mut random = Random::new();
    let operands = Operands::new(&mut random, 100, 300, 16, 4.0);
    let run = |threads| {
        let (mut out, mut state) = (vec![f32::NAN; 100 * 300], vec![0.0; 300 * 16]);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Cpu::detect().selective_scan(&operands.tokens(0..100), &mut state, &mut out));
        (out, state)
    };
    assert_eq!(run(1), run(5), "seed {}", random.seed);
}

/// Potentials that fill the range of a model's, among them those where the operator is extreme.
fn potentials(random: &mut Random, positions: usize) -> [Vec<f32>; 4] {
    let alternating = (0..positions).map(|i| if i % 2 == 0 { 3.0 } else { -3.0 }).collect();
    [random.values(positions, 3.0), vec![-3.0; positions], vec![3.0; positions], alternating]
}

#[test]
fn resolvent() {
    let mut random = Random::new();
    for positions in [0, 1, 2, 3, 17, 100, 512] {
        for z in [[0.0, 1.0], [random.values(1, 2.0)[0], 0.5], [-2.0, -1.0]] {
            for (kind, v) in potentials(&mut random, positions).iter().enumerate() {
                // The dense inverse takes cubic time.
                if positions == 512 && (kind > 0 || z != [0.0, 1.0]) {
                    continue;
                }
                let context = format!("seed {} positions {positions} z {z:?} kind {kind}", random.seed);
                let actual = run_everywhere(&context, |cpu| {
                    let mut out = vec![f32::NAN; 2 * positions];
                    cpu.resolvent(v, z, &mut out);
                    out
                });
                let expected = oracle::resolvent(v, z);
                // The rounding of the result; what f64 leaves is the second term.
                assert_close(&context, &actual, expected.as_flattened(), |i| {
                    UNIT * expected.as_flattened()[i].abs() + 1e-11
                });
            }
        }
    }
}

#[test]
fn resolvent_causal() {
    let mut random = Random::new();
    for positions in [0, 1, 2, 17, 60] {
        for z in [[0.0, 1.0], [random.values(1, 2.0)[0], 0.5]] {
            for v in potentials(&mut random, positions) {
                let context = format!("seed {} positions {positions} z {z:?}", random.seed);
                let actual = run_everywhere(&context, |cpu| {
                    let (mut out, mut last) = (vec![f32::NAN; 2 * positions], [0.0; 2]);
                    cpu.resolvent_causal(&v, z, &mut last, &mut out);
                    let (mut pieces, mut piece_last) = (vec![f32::NAN; out.len()], [0.0; 2]);
                    for chunk in chunks(positions) {
                        let out = &mut pieces[2 * chunk.start..2 * chunk.end];
                        cpu.resolvent_causal(&v[chunk], z, &mut piece_last, out);
                    }
                    assert_eq!((&out, last), (&pieces, piece_last), "{context}");
                    out
                });
                let expected: Vec<f64> = (1..=positions)
                    .flat_map(|end| oracle::resolvent(&v[..end], z).pop().expect("there is a position"))
                    .collect();
                assert_close(&context, &actual, &expected, |i| UNIT * expected[i].abs() + 1e-11);
            }
        }
    }
}

#[test]
fn a_million_positions_stay_finite() {
    let mut random = Random::new();
    for v in potentials(&mut random, 1_000_000) {
        let mut out = vec![f32::NAN; 2_000_000];
        Cpu::detect().resolvent(&v, [0.0, 1.0], &mut out);
        // The inverse's norm is at most 1 / Im z.
        assert!(out.as_chunks::<2>().0.iter().all(|[re, im]| re.hypot(*im) <= 1.000_001), "seed {}", random.seed);
        Cpu::detect().resolvent_causal(&v, [0.0, 1.0], &mut [0.0; 2], &mut out);
        assert!(out.as_chunks::<2>().0.iter().all(|[re, im]| re.hypot(*im) <= 1.000_001), "seed {}", random.seed);
    }
}
