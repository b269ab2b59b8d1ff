//! RMSNorm and LayerNorm: rows brought to one scale, then multiplied by a gain.

use super::elementwise::{Lanewise, by_rows, combine};
use super::simd::Simd;
use super::{Cpu, Kernel};

impl Cpu {
    /// Llama's RMSNorm: every row of `x` divided by the root of its mean square (plus `epsilon`), times `gain`.
    ///
    /// `x` and `out` are `[tokens, width]`, `gain` is `[width]`.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn rms_norm(self, x: &[f32], gain: &[f32], epsilon: f32, out: &mut [f32]) {
        assert!(x.len().is_multiple_of(gain.len()), "x is not whole rows of {}", gain.len());
        assert_eq!(x.len(), out.len(), "x and out differ in length");
        by_rows(out, gain.len(), |first, out| {
            let x = &x[first * gain.len()..][..out.len()];
            self.dispatch(RmsNorm { x, gain, epsilon, out });
        });
    }

    /// LayerNorm (Ba, Kiros and Hinton, 2016): every row of `x` less its mean, divided by the root of its variance (plus
    /// `epsilon`), times `gain`, plus `bias`.
    ///
    /// `x` and `out` are `[tokens, width]`, `gain` and `bias` are `[width]`. Mean and variance come from the corrected
    /// two-pass algorithm (Chan, Golub and LeVeque, 1983), so that a mean far from zero costs no accuracy.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn layer_norm(self, x: &[f32], gain: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        assert!(x.len().is_multiple_of(gain.len()), "x is not whole rows of {}", gain.len());
        assert_eq!(gain.len(), bias.len(), "gain and bias differ in length");
        assert_eq!(x.len(), out.len(), "x and out differ in length");
        by_rows(out, gain.len(), |first, out| {
            let x = &x[first * gain.len()..][..out.len()];
            self.dispatch(LayerNorm { x, gain, bias, epsilon, out });
        });
    }
}

/// `x * factor * y`.
struct ScaledTimes {
    factor: f32,
}

impl Lanewise for ScaledTimes {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.mul(simd.mul(x, simd.splat(self.factor)), y)
    }
}

struct RmsNorm<'a> {
    x: &'a [f32],    // [tokens, width]
    gain: &'a [f32], // [width]
    epsilon: f32,
    out: &'a mut [f32], // [tokens, width]
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.gain.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mean = sum_of_squares(simd, x) / width as f32;
            let factor = 1.0 / (mean + self.epsilon).sqrt();
            out.copy_from_slice(x);
            combine(simd, out, self.gain, ScaledTimes { factor });
        }
    }
}

#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (vectors, tail) = x.as_chunks::<16>();
    let (fours, rest) = vectors.as_chunks::<4>();
    // Four chains hide the latency of the multiply-add.
    let mut sums = [simd.splat(0.0); 4];
    for four in fours {
        for (sum, v) in sums.iter_mut().zip(four) {
            *sum = simd.mul_add(simd.load(v), simd.load(v), *sum);
        }
    }
    for (sum, v) in sums.iter_mut().zip(rest) {
        *sum = simd.mul_add(simd.load(v), simd.load(v), *sum);
    }
    let tail = simd.load_partial(tail);
    sums[3] = simd.mul_add(tail, tail, sums[3]);
    simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}

/// `x - mean - rest`: the mean in two parts, so that its own rounding does not show.
struct Center {
    mean: f32,
    rest: f32,
}

impl Center {
    #[inline(always)]
    fn of<S: Simd>(&self, simd: S, x: S::F32) -> S::F32 {
        simd.sub(simd.sub(x, simd.splat(self.mean)), simd.splat(self.rest))
    }
}

/// `(x - mean) * factor * y`.
struct CenteredTimes {
    center: Center,
    factor: f32,
}

impl Lanewise for CenteredTimes {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.mul(simd.mul(self.center.of(simd, x), simd.splat(self.factor)), y)
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],    // [tokens, width]
    gain: &'a [f32], // [width]
    bias: &'a [f32], // [width]
    epsilon: f32,
    out: &'a mut [f32], // [tokens, width]
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.gain.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mean = moments(simd, x, Center { mean: 0.0, rest: 0.0 }).0 / width as f32;
            let rest = moments(simd, x, Center { mean, rest: 0.0 }).0 / width as f32;
            let variance = moments(simd, x, Center { mean, rest }).1 / width as f32;
            let factor = 1.0 / (variance + self.epsilon).sqrt();
            out.copy_from_slice(x);
            combine(simd, out, self.gain, CenteredTimes { center: Center { mean, rest }, factor });
            combine(simd, out, self.bias, super::elementwise::Plus);
        }
    }
}

/// The sums of the centered values and of their squares.
#[inline(always)]
fn moments<S: Simd>(simd: S, x: &[f32], center: Center) -> (f32, f32) {
    let (vectors, tail) = x.as_chunks::<16>();
    let (pairs, rest) = vectors.as_chunks::<2>();
    // Two chains each: what AVX2 has registers for.
    let (mut sums, mut squares) = ([simd.splat(0.0); 2], [simd.splat(0.0); 2]);
    for pair in pairs {
        for (i, v) in pair.iter().enumerate() {
            let d = center.of(simd, simd.load(v));
            sums[i] = simd.add(sums[i], d);
            squares[i] = simd.mul_add(d, d, squares[i]);
        }
    }
    for v in rest {
        let d = center.of(simd, simd.load(v));
        sums[0] = simd.add(sums[0], d);
        squares[0] = simd.mul_add(d, d, squares[0]);
    }
    // Lanes beyond the row must add nothing, which a zero less the mean does not.
    let mut last = [0.0; 16];
    simd.store(center.of(simd, simd.load_partial(tail)), &mut last);
    let d = simd.load_partial(&last[..tail.len()]);
    sums[1] = simd.add(sums[1], d);
    squares[1] = simd.mul_add(d, d, squares[1]);
    (simd.sum(simd.add(sums[0], sums[1])), simd.sum(simd.add(squares[0], squares[1])))
}
