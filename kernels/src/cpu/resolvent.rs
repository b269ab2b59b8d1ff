//! The diagonal of a resolvent `(H - z I)^-1` of a discrete Schrödinger operator, `H = tridiag(1, v_i - 2, 1)`.
//!
//! A tridiagonal matrix is inverted by two recurrences of ratios, one from either end: every step is one complex
//! reciprocal. They run in f64, because each position feeds the next. Where `z` has an imaginary part, the denominators'
//! modulus is at least that, so that nothing overflows for any number of positions.

use super::Cpu;

/// A complex number: real and imaginary part.
type Complex = [f64; 2];

/// `1 / x`.
#[inline]
fn reciprocal([re, im]: Complex) -> Complex {
    let factor = 1.0 / (re * re + im * im);
    [re * factor, -im * factor]
}

/// `v - 2 - z - x`.
#[inline]
fn denominator(v: f32, z: [f32; 2], x: Complex) -> Complex {
    [f64::from(v) - 2.0 - f64::from(z[0]) - x[0], -f64::from(z[1]) - x[1]]
}

fn store(value: Complex, out: &mut [f32; 2]) {
    *out = value.map(|part| part as f32);
}

impl Cpu {
    /// The diagonal of `(H - z I)^-1` with `H = tridiag(1, v_i - 2, 1)`, in time linear in the number of positions.
    ///
    /// `v` is `[positions]`; `z` and each row of `out`, `[positions, 2]`, are a real and an imaginary part. The result
    /// is finite where `v` is finite and the imaginary part of `z` is not zero.
    ///
    /// # Panics
    /// If `out` is not two values for each of `v`.
    pub fn resolvent(self, v: &[f32], z: [f32; 2], out: &mut [f32]) {
        assert_eq!(out.len(), 2 * v.len(), "out needs two values for each of {} positions", v.len());
        let mut right = vec![[0.0; 2]; v.len()]; // of the position that follows
        let mut ratio = [0.0; 2];
        for (slot, &v) in right.iter_mut().zip(v).rev() {
            *slot = ratio;
            ratio = reciprocal(denominator(v, z, ratio));
        }
        let mut left = [0.0; 2]; // of the position before
        for ((out, &v), right) in out.as_chunks_mut::<2>().0.iter_mut().zip(v).zip(right) {
            let rest = denominator(v, z, left);
            store(reciprocal([rest[0] - right[0], rest[1] - right[1]]), out);
            left = reciprocal(rest);
        }
    }

    /// For each position the last diagonal element of `(H - z I)^-1` of the positions up to it: what [`resolvent`]
    /// would give there if no position followed.
    ///
    /// `last` is that of the position before `v`, zero before the first one, and becomes that of the last of `v`; it is
    /// f64 so that a sequence in pieces gives the same bits as in one call. Shapes as for [`resolvent`].
    ///
    /// # Panics
    /// If `out` is not two values for each of `v`.
    ///
    /// [`resolvent`]: Self::resolvent
    pub fn resolvent_causal(self, v: &[f32], z: [f32; 2], last: &mut [f64; 2], out: &mut [f32]) {
        assert_eq!(out.len(), 2 * v.len(), "out needs two values for each of {} positions", v.len());
        for (out, &v) in out.as_chunks_mut::<2>().0.iter_mut().zip(v) {
            *last = reciprocal(denominator(v, z, *last));
            store(*last, out);
        }
    }
}
