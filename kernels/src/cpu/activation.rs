//! Activation functions, clamping and rounding to a grid: one value at a time, in place.

use super::elementwise::{Combine, Lanewise, by_rows};
use super::simd::Simd;
use super::{Cpu, Kernel};

impl Cpu {
    /// `x = max(x, 0)`; NaN stays NaN.
    pub fn relu(self, x: &mut [f32]) {
        self.map(x, Clamp { low: 0.0, high: f32::INFINITY });
    }

    /// `x = x / (1 + exp(-x))`.
    pub fn silu(self, x: &mut [f32]) {
        self.map(x, Silu);
    }

    /// `x = ln(1 + exp(x))`, within 8 units in the last place also where the result is far below 1.
    ///
    /// This is PyTorch's `softplus`, which returns `x` itself above 20: there the difference is less than a rounding.
    pub fn softplus(self, x: &mut [f32]) {
        self.map(x, Softplus);
    }

    /// Every value below `low` becomes `low`, every one above `high` becomes `high`; NaN stays NaN.
    ///
    /// # Panics
    /// If `low` is above `high` or one of them is NaN.
    pub fn clamp(self, x: &mut [f32], low: f32, high: f32) {
        assert!(low <= high, "nothing is between {low} and {high}");
        self.map(x, Clamp { low, high });
    }

    /// Rounds every value to a multiple of its own scale: `x = clamp(round(x / scale), -largest, largest) * scale`,
    /// halves to even. A zero scale gives zero.
    ///
    /// # Panics
    /// If `x` and `scales` differ in length.
    pub fn round_to_grid(self, x: &mut [f32], scales: &[f32], largest: f32) {
        assert_eq!(x.len(), scales.len(), "x and scales differ in length");
        by_rows(x, 1, |first, x| {
            let y = &scales[first..][..x.len()];
            self.dispatch(Combine { x, y, f: RoundToGrid { largest } });
        });
    }

    fn map(self, x: &mut [f32], f: impl Function) {
        by_rows(x, 1, |_, x| self.dispatch(Map { x, f }));
    }
}

/// A function of one vector, lane by lane; not a closure, as [`Lanewise`].
trait Function: Copy + Sync {
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32;
}

/// `x = f(x)`, element by element.
struct Map<'a, F> {
    x: &'a mut [f32],
    f: F,
}

impl<F: Function> Kernel for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (vectors, tail) = self.x.as_chunks_mut::<16>();
        for v in vectors {
            simd.store(self.f.apply(simd, simd.load(v)), v);
        }
        simd.store_partial(self.f.apply(simd, simd.load_partial(tail)), tail);
    }
}

#[derive(Clone, Copy)]
struct Clamp {
    low: f32,
    high: f32,
}

impl Function for Clamp {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        // With the constant first, NaN passes through.
        simd.min(simd.splat(self.high), simd.max(simd.splat(self.low), x))
    }
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        silu(simd, x)
    }
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    simd.div(x, simd.add(simd.splat(1.0), simd.exp(simd.neg(x))))
}

#[derive(Clone, Copy)]
struct Softplus;

impl Function for Softplus {
    /// `max(x, 0) + ln(1 + t)` with `t = exp(-|x|)`, and `ln(1 + t) = 2 artanh(s)` with `s = t / (2 + t)`: all terms of
    /// its series are positive.
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        let t = simd.exp(simd.neg(simd.abs(x)));
        // 2 s, which keeps all digits of a subnormal t.
        let twice = simd.div(simd.add(t, t), simd.add(simd.splat(2.0), t));
        let half = simd.mul(twice, simd.splat(0.5));
        let square = simd.mul(half, half);
        // s^2 is at most 1/9; the first term left out is s^16 / 17.
        let mut series = simd.splat(0.0);
        for odd in [15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0] {
            series = simd.mul_add(series, square, simd.splat(1.0 / odd));
        }
        let log = simd.mul_add(simd.mul(twice, square), series, twice);
        simd.add(simd.max(x, simd.splat(0.0)), log)
    }
}

struct RoundToGrid {
    largest: f32,
}

impl Lanewise for RoundToGrid {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        let zero = simd.splat(0.0);
        let clamp = Clamp { low: -self.largest, high: self.largest };
        let rounded = clamp.apply(simd, simd.round_even(simd.div(x, y)));
        simd.select_ge(zero, simd.abs(y), zero, simd.mul(rounded, y))
    }
}
