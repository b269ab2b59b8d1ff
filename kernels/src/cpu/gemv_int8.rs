//! A few tokens of INT8 activations times packed weights.
//!
//! The order of the sums, on every instruction set: a lane's dot product over its four columns of a step is an exact
//! integer. It is multiplied by the activation's scale and added to the lane's sum over the group, which is multiplied by
//! the weight's scale and added to the lane's sum over the row; where lanes have scales of their own, every step is such a
//! group. The 16 lanes are added last, in the order of [`Simd::sum`].

use super::Kernel;
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{Decode, GROUPS, Groups, Packed, ROWS, Scratch, Stream, Task, Ternary};
use super::simd::Simd;
use crate::matrix::{Data, Grid};

/// A task with activations rounded to INT8.
pub(super) struct RoundedProduct<'a> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for RoundedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch } = self;
        let Data::Quantized { layout, .. } = task.w.data() else { return };
        match layout.grid {
            Grid::Ternary => task.rounded::<S, Ternary, true>(simd, scratch),
            grid if grid.has_zero_points() => task.rounded::<S, Stream, false>(simd, scratch),
            _ => task.rounded::<S, Stream, true>(simd, scratch),
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn rounded<S: Simd, D: Decode, const CONSTANT: bool>(&self, simd: S, scratch: &mut Scratch) {
        let Scratch { groups, tail } = scratch;
        let Some(w) = &Packed::new::<D>(simd, self.w, self.rows.end, tail) else { return };
        let Prepared { steps, planes, tokens, ref codes, ref starts, ref sums, .. } = *self.x;
        let slots = steps * planes * tokens;
        assert!(steps == w.steps && codes.len() == slots);
        assert!(if CONSTANT { starts.len() } else { sums.len() } == slots);
        if self.x.lane_scales.is_empty() {
            assert!(planes == 1 && self.x.scales.len() == slots);
            self.rounded_tokens::<S, D, CONSTANT, true>(w, groups);
        } else {
            assert!(self.x.groups.len() == steps * planes && self.x.lane_scales.len() == slots);
            self.rounded_tokens::<S, D, CONSTANT, false>(w, groups);
        }
    }

    #[inline(always)]
    fn rounded_tokens<S: Simd, D: Decode, const CONSTANT: bool, const STEPS: bool>(
        &self,
        w: &Packed<S>,
        groups: &mut [Groups; ROWS],
    ) {
        let mut token = 0;
        while token < self.x.tokens {
            let left = self.x.tokens - token;
            if S::REGISTERS >= 32 {
                token += match left {
                    1 => self.rounded_rows::<S, D, CONSTANT, STEPS, 1, 4>(w, token, groups),
                    2 => self.rounded_rows::<S, D, CONSTANT, STEPS, 2, 2>(w, token, groups),
                    3 | 5 | 6 => self.rounded_rows::<S, D, CONSTANT, STEPS, 3, 1>(w, token, groups),
                    _ => self.rounded_rows::<S, D, CONSTANT, STEPS, 4, 1>(w, token, groups),
                };
            } else {
                token += match left {
                    1 => self.rounded_rows::<S, D, CONSTANT, STEPS, 1, 2>(w, token, groups),
                    _ => self.rounded_rows::<S, D, CONSTANT, STEPS, 2, 1>(w, token, groups),
                };
            }
        }
    }

    /// `T` tokens from `token` on, `R` rows at a time. Gives `T`.
    #[inline(always)]
    fn rounded_rows<S: Simd, D: Decode, const CONSTANT: bool, const STEPS: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        assert!(token + T <= self.x.tokens);
        let mut row = self.rows.start;
        while row < self.rows.end {
            row += match (STEPS, self.rows.end - row >= R) {
                // SAFETY: the tokens were checked above, and the lengths by `rounded`.
                (true, true) => unsafe { self.rounded_steps::<S, D, CONSTANT, T, R>(w, token, row, groups) },
                // SAFETY: as above.
                (true, false) => unsafe { self.rounded_steps::<S, D, CONSTANT, T, 1>(w, token, row, groups) },
                // SAFETY: as above.
                (false, true) => unsafe { self.rounded_lanes::<S, D, CONSTANT, T, R>(w, token, row, groups) },
                // SAFETY: as above.
                (false, false) => unsafe { self.rounded_lanes::<S, D, CONSTANT, T, 1>(w, token, row, groups) },
            };
        }
        T
    }

    /// `T` tokens times `R` rows where scales are of whole steps. Gives `R`.
    ///
    /// # Safety
    /// The activations have `token + T` tokens or more, a value for each slot in every part that is read, and the steps
    /// of `w`.
    #[inline(always)]
    unsafe fn rounded_steps<S: Simd, D: Decode, const CONSTANT: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        let simd = w.simd;
        let Prepared { steps, tokens, ref codes, ref starts, ref sums, ref scales, .. } = *self.x;
        let eight_bits = w.layout.grid.max_code() > 127;
        let steps_a_group = w.layout.group.div_ceil(STEP).min(steps);
        let mut rows = [w.row(row); R];
        for r in 1..R {
            rows[r] = w.row(row + r);
        }
        let mut out = [[simd.splat(0.0); T]; R];
        let mut first = 0;
        for first_group in (0..w.groups).step_by(GROUPS) {
            let some_groups = first_group..w.groups.min(first_group + GROUPS);
            for r in 0..R {
                groups[r].load(w, row + r, first_group, some_groups.len());
            }
            for group in some_groups {
                let end = steps.min(first + steps_a_group);
                let mut of_group = [[simd.splat(0.0); T]; R];
                let mut minus_zeros = [simd.splat(0.0); R];
                if !CONSTANT {
                    for r in 0..R {
                        minus_zeros[r] = simd.splat(-groups[r].zero(group));
                    }
                }
                for step in first..end {
                    for r in 0..R {
                        // SAFETY: the step is below that of the activations, which `w` has too.
                        let u = unsafe { w.codes::<D>(rows[r], step) };
                        for t in 0..T {
                            let slot = step * tokens + token + t;
                            // SAFETY: steps and tokens are below those of the activations, which have all slots.
                            let (a, scale) = unsafe { (codes.get_unchecked(slot), *scales.get_unchecked(slot)) };
                            let dot = if CONSTANT {
                                // SAFETY: as above.
                                let start = simd.load_i32(unsafe { starts.get_unchecked(slot) });
                                simd.i32_to_f32(simd.dot_codes(u, a, start, eight_bits))
                            } else {
                                let dot = simd.i32_to_f32(simd.dot_codes(u, a, simd.splat_i32(0), eight_bits));
                                // SAFETY: as above.
                                let sum = simd.load(unsafe { sums.get_unchecked(slot) });
                                // Both terms and their sum are integers below 2^24, so this is exact.
                                simd.mul_add(minus_zeros[r], sum, dot)
                            };
                            of_group[r][t] = simd.mul_add(dot, simd.splat(scale), of_group[r][t]);
                        }
                    }
                }
                for r in 0..R {
                    let scale = simd.splat(groups[r].scale(group));
                    for t in 0..T {
                        out[r][t] = simd.mul_add(of_group[r][t], scale, out[r][t]);
                    }
                }
                first = end;
            }
        }
        self.store(simd, token, row, &out);
        R
    }

    /// `T` tokens times `R` rows where lanes have scales of their own. Gives `R`.
    ///
    /// # Safety
    /// The activations have `token + T` tokens or more, a value for each slot in every part that is read, and the steps
    /// of `w`.
    #[inline(always)]
    unsafe fn rounded_lanes<S: Simd, D: Decode, const CONSTANT: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        const STEPS_A_LOAD: usize = GROUPS / STEP;
        let simd = w.simd;
        let Prepared { steps, planes, tokens, ref codes, ref starts, ref sums, ref lane_scales, .. } = *self.x;
        let group = w.layout.group;
        let near = group >= 4;
        let eight_bits = w.layout.grid.max_code() > 127;
        let mut rows = [w.row(row); R];
        for r in 1..R {
            rows[r] = w.row(row + r);
        }
        let mut out = [[simd.splat(0.0); T]; R];
        for first in (0..steps).step_by(STEPS_A_LOAD) {
            let end = steps.min(first + STEPS_A_LOAD);
            let some_groups = first * STEP / group..(end * STEP).div_ceil(group).min(w.groups);
            for r in 0..R {
                groups[r].load(w, row + r, some_groups.start, some_groups.len());
            }
            for step in first..end {
                let base = step * STEP / group;
                for r in 0..R {
                    // SAFETY: the step is below that of the activations, which `w` has too.
                    let u = unsafe { w.codes::<D>(rows[r], step) };
                    for plane in 0..planes {
                        // SAFETY: steps and planes are below those of the activations.
                        let of_lanes = unsafe { self.x.groups.get_unchecked(step * planes + plane) };
                        let weight_scale = groups[r].lane_scales(simd, base, of_lanes, near);
                        let mut minus_zero = simd.splat(0.0);
                        if !CONSTANT {
                            minus_zero = simd.neg(groups[r].lane_zeros(simd, base, of_lanes, near));
                        }
                        for t in 0..T {
                            let slot = (step * planes + plane) * tokens + token + t;
                            // SAFETY: steps, planes and tokens are below those of the activations, which have all slots.
                            let (a, scale) = unsafe { (codes.get_unchecked(slot), lane_scales.get_unchecked(slot)) };
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
                            out[r][t] = simd.mul_add(dot, weight_scale, out[r][t]);
                        }
                    }
                }
            }
        }
        self.store(simd, token, row, &out);
        R
    }
}
