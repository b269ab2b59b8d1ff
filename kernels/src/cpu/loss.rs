//! What is measured on logits: cross-entropy, divergence from a baseline, agreement; and softmax.
//!
//! Exponentials are vectorised in f32; their sums are f32 within a block of [`BLOCK`] and f64 beyond, so that
//! rounding does not grow with the vocabulary.

use super::elementwise::Lanewise;
use super::pool::for_each_piece;
use super::simd::Simd;
use super::{Cpu, Kernel};

/// Values summed in f32: four steps of four vectors, so that a value passes at most ten roundings before f64.
const BLOCK: usize = 256;

/// How one row of logits differs from a baseline.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// `KL(softmax(baseline) || softmax(other))` in nats; never negative.
    pub kl_divergence: f64,
    /// Whether both have their largest logit at the same index; of equal logits the first counts.
    pub same_top: bool,
}

impl Cpu {
    /// The negative log-likelihood of each row's target, in nats: `ln(sum(exp(row))) - row[target]`.
    ///
    /// `logits` is `[rows, vocab]`, `targets` and `out` are `[rows]`. The relative error of the sum is about 1e-6, and
    /// so is the absolute error of its logarithm. A NaN in a row makes its result NaN.
    ///
    /// # Panics
    /// If the lengths do not fit together or a target is not below `vocab`.
    pub fn cross_entropy(self, logits: &[f32], targets: &[u32], out: &mut [f64]) {
        assert_eq!(targets.len(), out.len(), "one target for each row");
        let Some(vocab) = logits.len().checked_div(out.len()) else {
            assert!(logits.is_empty(), "logits without targets");
            return;
        };
        assert!(logits.len() == vocab * out.len() && vocab > 0, "logits are not {} equal rows", out.len());
        for_each_piece(out, 1, |index, out| {
            let row = &logits[index * vocab..][..vocab];
            let target = row[targets[index] as usize];
            let (max, sum) = self.dispatch(SumExp { row });
            out[0] = sum.ln() - (f64::from(target) - f64::from(max));
        });
    }

    /// Compares each row of `other` with the same row of `baseline`; both are `[rows, vocab]`, `out` is `[rows]`.
    ///
    /// The divergence is a sum of terms none of which is negative, so that even a divergence far below the rounding
    /// of a log-probability keeps its leading digits. A NaN in a row makes its divergence NaN and is never the top.
    ///
    /// # Panics
    /// If the lengths do not fit together or `vocab` is 0.
    pub fn compare_logits(self, baseline: &[f32], other: &[f32], vocab: usize, out: &mut [Comparison]) {
        assert!(vocab > 0, "rows of no logits");
        assert_eq!((baseline.len(), other.len()), (vocab * out.len(), vocab * out.len()), "rows do not fit");
        for_each_piece(out, 1, |index, out| {
            let [baseline, other] = [baseline, other].map(|logits| &logits[index * vocab..][..vocab]);
            out[0] = Comparison {
                kl_divergence: self.dispatch(Divergence { baseline, other }),
                same_top: self.arg_max(baseline) == self.arg_max(other),
            };
        });
    }

    /// Replaces one row by its softmax.
    pub fn softmax(self, row: &mut [f32]) {
        self.dispatch(Softmax { row });
    }

    /// The index of the largest value, the lowest one of several; NaN is never the largest, and a row of nothing else
    /// gives 0.
    ///
    /// # Panics
    /// If the row is empty.
    pub fn arg_max(self, row: &[f32]) -> usize {
        assert!(!row.is_empty(), "the largest of no values");
        self.dispatch(ArgMax { row })
    }
}

/// The last values of a row as a whole vector, filled with the logit of an impossible token.
#[inline(always)]
fn padded<S: Simd>(simd: S, tail: &[f32]) -> S::F32 {
    let mut whole = [f32::NEG_INFINITY; 16];
    whole[..tail.len()].copy_from_slice(tail);
    simd.load(&whole)
}

/// The largest value; NaN is passed over.
#[inline(always)]
fn max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, tail) = row.as_chunks::<16>();
    // `max` returns its second operand where the first is NaN.
    let mut max = simd.max(padded(simd, tail), simd.splat(f32::NEG_INFINITY));
    for v in vectors {
        max = simd.max(simd.load(v), max);
    }
    simd.max_lane(max)
}

/// The sum of `term` over two rows of one length. A pair of impossible tokens must have the term 0.
#[inline(always)]
fn sum<S: Simd>(simd: S, a: &[f32], b: &[f32], term: impl Lanewise) -> f64 {
    let mut total = 0.0;
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut sums = [simd.splat(0.0); 4];
        let (a_vectors, a_tail) = a.as_chunks::<16>();
        let (b_vectors, b_tail) = b.as_chunks::<16>();
        let (a_fours, a_rest) = a_vectors.as_chunks::<4>();
        let (b_fours, b_rest) = b_vectors.as_chunks::<4>();
        for (a, b) in a_fours.iter().zip(b_fours) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum = simd.add(*sum, term.apply(simd, simd.load(a), simd.load(b)));
            }
        }
        for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
            *sum = simd.add(*sum, term.apply(simd, simd.load(a), simd.load(b)));
        }
        if !a_tail.is_empty() {
            let last = term.apply(simd, padded(simd, a_tail), padded(simd, b_tail));
            sums[3] = simd.add(sums[3], last);
        }
        let sum = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
        total += f64::from(simd.sum(sum));
    }
    total
}

/// The largest logit and the sum of `exp(logit - largest)`.
struct SumExp<'a> {
    row: &'a [f32],
}

impl Kernel for SumExp<'_> {
    type Output = (f32, f64);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, f64) {
        sum_exp(simd, self.row)
    }
}

#[inline(always)]
fn sum_exp<S: Simd>(simd: S, row: &[f32]) -> (f32, f64) {
    let max = max(simd, row);
    (max, sum(simd, row, row, ExpBelow { max }))
}

/// `exp(x - max)`.
struct ExpBelow {
    max: f32,
}

impl Lanewise for ExpBelow {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, _: S::F32) -> S::F32 {
        simd.exp(simd.sub(x, simd.splat(self.max)))
    }
}

struct Softmax<'a> {
    row: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (max, sum) = sum_exp(simd, self.row);
        let (numerator, factor) = (ExpBelow { max }, simd.splat((1.0 / sum) as f32));
        let (vectors, tail) = self.row.as_chunks_mut::<16>();
        for v in vectors {
            let x = simd.load(v);
            simd.store(simd.mul(numerator.apply(simd, x, x), factor), v);
        }
        let x = simd.load_partial(tail);
        simd.store_partial(simd.mul(numerator.apply(simd, x, x), factor), tail);
    }
}

/// The Kullback-Leibler divergence of two rows.
///
/// With `p` and `q` the probabilities and `d = ln(p / q)`, it is the sum of `p * (exp(-d) - 1 + d)`: the usual `p * d`
/// plus `q - p`, which sums to nothing, but makes each term non-negative and an error of the two log-sum-exps matter
/// only in second order.
struct Divergence<'a> {
    baseline: &'a [f32],
    other: &'a [f32],
}

impl Kernel for Divergence<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let (baseline_max, baseline_sum) = sum_exp(simd, self.baseline);
        let (other_max, other_sum) = sum_exp(simd, self.other);
        let baseline_log_sum = f64::from(baseline_max) + baseline_sum.ln();
        let other_log_sum = f64::from(other_max) + other_sum.ln();
        let term = DivergenceTerm {
            baseline_log_sum: baseline_log_sum as f32,
            other_log_sum: other_log_sum as f32,
            difference: (baseline_log_sum - other_log_sum) as f32,
        };
        sum(simd, self.baseline, self.other, term)
    }
}

/// `p * (exp(-d) - 1 + d)` of two logits.
struct DivergenceTerm {
    baseline_log_sum: f32,
    other_log_sum: f32,
    /// `baseline_log_sum - other_log_sum`, rounded once.
    difference: f32,
}

impl Lanewise for DivergenceTerm {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
        let p = simd.exp(simd.sub(x, simd.splat(self.baseline_log_sum)));
        let q = simd.exp(simd.sub(y, simd.splat(self.other_log_sum)));
        let d = simd.sub(simd.sub(x, y), simd.splat(self.difference));
        let near = simd.mul(p, simd.mul(simd.mul(d, d), exp_remainder(simd, d)));
        let far = simd.mul_add(p, simd.sub(d, one), q);
        let term = simd.select_ge(one, simd.abs(d), near, far);
        // The limit for p = 0, where d may be infinite or not a number.
        simd.select_ge(zero, p, q, term)
    }
}

/// `(exp(-d) - 1 + d) / d^2` for `|d| <= 1`, by its Taylor series; the first term left out is `d^9 / 11!`.
#[inline(always)]
fn exp_remainder<S: Simd>(simd: S, d: S::F32) -> S::F32 {
    const FACTORIALS: [f32; 9] = [2.0, 6.0, 24.0, 120.0, 720.0, 5040.0, 40320.0, 362_880.0, 3_628_800.0];
    let minus_d = simd.neg(d);
    let mut value = simd.splat(0.0);
    for factorial in FACTORIALS.into_iter().rev() {
        value = simd.mul_add(value, minus_d, simd.splat(1.0 / factorial));
    }
    value
}

struct ArgMax<'a> {
    row: &'a [f32],
}

impl Kernel for ArgMax<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        for (index, block) in self.row.chunks(BLOCK).enumerate() {
            let max = max(simd, block);
            if max > best.0 {
                best = (max, index * BLOCK);
            }
        }
        let (max, start) = best;
        self.row[start..].iter().position(|&x| x == max).map_or(0, |index| start + index)
    }
}
