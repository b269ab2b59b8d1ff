//! A few tokens of f32 activations times packed weights whose groups are shorter than a step: 4, 8, 16 or 32 columns.
//!
//! The order of the sums is that of [`gemv_exact`](super::gemv_exact) where lanes have scales of their own.

use std::marker::PhantomData;

use super::Kernel;
use super::gemv_codes::Decode;
use super::gemv_prepare::Prepared;
use super::gemv_row::{Codes, Packed, RowsAtHand, Scratch, Task};
use super::gemv_wide::{Steps, WideRows};
use super::simd::{Aligned, LANES, Simd};

/// A task with activations as they are. With `CONSTANT`, every group has the zero point of its grid; with `NARROW`, codes are
/// below 16.
pub(super) struct ShortProduct<'a, D, const NARROW: bool, const CONSTANT: bool> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    decode: PhantomData<D>,
}

impl<'a, D, const NARROW: bool, const CONSTANT: bool> ShortProduct<'a, D, NARROW, CONSTANT> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        Self { task, scratch, decode: PhantomData }
    }
}

impl<D: Decode, const NARROW: bool, const CONSTANT: bool> Kernel for ShortProduct<'_, D, NARROW, CONSTANT> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch: Scratch { rows, tail }, .. } = self;
        let Some(w) = &Packed::new::<D>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, tokens, ref floats, .. } = *task.x;
        assert!(steps == w.steps && floats.len() == steps * tokens);
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.short_rows::<S, D, NARROW, CONSTANT, 1>(w, token, rows),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.short_rows::<S, D, NARROW, CONSTANT, 3>(w, token, rows),
                4.. if S::REGISTERS >= 32 => task.short_rows::<S, D, NARROW, CONSTANT, 4>(w, token, rows),
                _ => task.short_rows::<S, D, NARROW, CONSTANT, 2>(w, token, rows),
            };
        }
    }
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn short_rows<S: Simd, D: Decode, const NARROW: bool, const CONSTANT: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        rows_at_hand: &mut RowsAtHand,
    ) -> usize {
        let Prepared { steps, tokens, ref floats, .. } = *self.x;
        assert!(token + T <= tokens);
        let zero = w.constant_zero().unwrap_or(0.0);
        let x = ShortSteps::<D, NARROW, CONSTANT> { steps, x: &floats[token * steps..], zero, decode: PhantomData };
        // SAFETY: the tokens were checked above, the lengths by the kernel, which made `w` for this.
        unsafe { self.each_row::<S, _, T>(w, token, WideRows::<_, false>::new(w, x), rows_at_hand) }
    }
}

/// The activations that a product reads. [tokens, steps]
#[derive(Clone, Copy)]
struct ShortSteps<'a, D, const NARROW: bool, const CONSTANT: bool> {
    steps: usize,
    x: &'a [Aligned<[[f32; LANES]; 4]>],
    /// With `CONSTANT`, the zero point of every group.
    zero: f32,
    decode: PhantomData<D>,
}

impl<D: Decode, const NARROW: bool, const CONSTANT: bool> Steps for ShortSteps<'_, D, NARROW, CONSTANT> {
    type Hold = D;
    const CONSTANT: bool = CONSTANT;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn add<S: Simd, const T: usize, const R: usize>(
        self,
        w: &Packed<S>,
        rows: [Codes; R],
        step: usize,
        weight_scales: [(S::F32, S::F32); R],
        out: &mut [[S::F32; T]; R],
    ) {
        let simd = w.simd;
        for r in 0..R {
            let (scale, minus_zero) = weight_scales[r];
            // SAFETY: the caller's promise.
            let codes = unsafe { w.codes::<D>(rows[r], step) };
            let levels = if CONSTANT {
                simd.levels::<NARROW>(codes, simd.splat(self.zero))
            } else {
                simd.levels::<false>(codes, simd.neg(minus_zero))
            };
            for (t, out) in out[r].iter_mut().enumerate() {
                // SAFETY: steps and tokens are below those of the activations, which have all slots.
                let x = unsafe { self.x.get_unchecked(t * self.steps + step) };
                let even = simd.mul(levels[0], simd.load(&x[0]));
                let odd = simd.mul(levels[1], simd.load(&x[1]));
                let even = simd.mul_add(levels[2], simd.load(&x[2]), even);
                let odd = simd.mul_add(levels[3], simd.load(&x[3]), odd);
                *out = simd.mul_add(simd.add(even, odd), scale, *out);
            }
        }
    }
}
