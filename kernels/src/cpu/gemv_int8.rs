//! A few tokens of INT8 activations times packed weights of any group; see [`gemv_wide`](super::gemv_wide) for the usual
//! ones.
//!
//! The order of the sums, on every instruction set: a lane's dot product over its four columns of a step is an exact
//! integer. It is multiplied by the activations' scale, and the product with the weight's scale is added to the lane's sum
//! over the row. The 16 lanes are added last, in the order of [`Simd::sum`].

#![expect(
    clippy::needless_range_loop,
    reason = "loops over constant counts are unrolled, iterators over them not always"
)]

use std::marker::PhantomData;

use super::Kernel;
use super::gemv_codes::Decode;
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{Groups, Packed, RowsAtHand, STEPS_A_LOAD, Scratch, Task};
use super::simd::Simd;

/// A task with activations rounded to INT8.
pub(super) struct RoundedProduct<'a, D, const CONSTANT: bool> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    decode: PhantomData<D>,
}

impl<'a, D, const CONSTANT: bool> RoundedProduct<'a, D, CONSTANT> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        Self { task, scratch, decode: PhantomData }
    }
}

impl<D: Decode, const CONSTANT: bool> Kernel for RoundedProduct<'_, D, CONSTANT> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch: Scratch { rows: RowsAtHand { groups, .. }, tail }, .. } = self;
        let Some(w) = &Packed::new::<D>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, planes, tokens, ref codes, ref starts, ref sums, .. } = *task.x;
        let slots = steps * planes * tokens;
        assert!(steps == w.steps && codes.len() == slots);
        assert!(if CONSTANT { starts.len() } else { sums.len() } == slots);
        assert!(task.x.scales.len() == slots && task.x.groups.len() == steps * planes);
        assert!(task.x.first_groups.len() == steps);
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.rounded_rows::<S, D, CONSTANT, 1>(w, token, groups),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.rounded_rows::<S, D, CONSTANT, 3>(w, token, groups),
                4.. if S::REGISTERS >= 32 => task.rounded_rows::<S, D, CONSTANT, 4>(w, token, groups),
                _ => task.rounded_rows::<S, D, CONSTANT, 2>(w, token, groups),
            };
        }
    }
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn rounded_rows<S: Simd, D: Decode, const CONSTANT: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        groups: &mut Groups,
    ) -> usize {
        assert!(token + T <= self.x.tokens);
        for row in self.rows.clone() {
            // SAFETY: the tokens were checked above, and the lengths by the kernel.
            let sums = unsafe { self.rounded_row::<S, D, CONSTANT, T>(w, token, row, groups) };
            self.store(w.simd, token, row, &sums);
        }
        T
    }

    /// `T` tokens times a row.
    ///
    /// # Safety
    /// The activations have `token + T` tokens or more, a value for each slot in every part that is read, and the steps
    /// of `w`.
    #[inline(always)]
    unsafe fn rounded_row<S: Simd, D: Decode, const CONSTANT: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut Groups,
    ) -> [S::F32; T] {
        let simd = w.simd;
        let Prepared { steps, planes, ref codes, ref starts, ref sums, ref scales, .. } = *self.x;
        let group = w.layout.group;
        let near = group >= 4;
        let eight_bits = w.layout.grid.max_code() > 127;
        let row_codes = w.row(row);
        let mut out = [simd.splat(0.0); T];
        for first in (0..steps).step_by(STEPS_A_LOAD) {
            let end = steps.min(first + STEPS_A_LOAD);
            let some_groups = first * STEP / group..(end * STEP).div_ceil(group).min(w.groups);
            groups.load(w, row, some_groups.start, some_groups.len());
            for step in first..end {
                // SAFETY: the step is below that of the activations.
                let base = *unsafe { self.x.first_groups.get_unchecked(step) };
                // SAFETY: the step is below that of the activations, which `w` has too.
                let u = unsafe { w.codes::<D>(row_codes, step) };
                for plane in 0..planes {
                    // SAFETY: steps and planes are below those of the activations.
                    let of_lanes = unsafe { self.x.groups.get_unchecked(step * planes + plane) };
                    let weight_scale = groups.lane_scales(simd, base, of_lanes, near);
                    let mut minus_zero = simd.splat(0.0);
                    if !CONSTANT {
                        minus_zero = simd.neg(groups.lane_zeros(simd, base, of_lanes, near));
                    }
                    for t in 0..T {
                        let slot = ((token + t) * steps + step) * planes + plane;
                        // SAFETY: steps, planes and tokens are below those of the activations, which have all slots.
                        let (a, scale) = unsafe { (codes.get_unchecked(slot), scales.get_unchecked(slot)) };
                        let dot = if CONSTANT {
                            // SAFETY: as above.
                            let start = simd.load_i32(unsafe { starts.get_unchecked(slot) });
                            simd.i32_to_f32(simd.dot_codes(u, a, start, eight_bits))
                        } else {
                            let dot = simd.i32_to_f32(simd.dot_codes(u, a, simd.splat_i32(0), eight_bits));
                            // SAFETY: as above.
                            let sum = simd.load(unsafe { sums.get_unchecked(slot) });
                            // Both terms and their sum are integers below 2^24, so this is exact.
                            simd.mul_add(minus_zero, sum, dot)
                        };
                        let dot = simd.mul(dot, simd.load(scale));
                        out[t] = simd.mul_add(dot, weight_scale, out[t]);
                    }
                }
            }
        }
        out
    }
}
