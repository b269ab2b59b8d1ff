//! A few tokens of f32 activations times packed weights: weights are decoded in registers and read once.
//!
//! The order of the sums, on every instruction set: in a step of 64 columns, lane `l` meets its columns `4l` to `4l + 3`
//! one after the other, the even and the odd ones in a sum each. The two are added at the end of the group, multiplied by
//! its scale and added to the lane's sum over the row; where lanes have scales of their own, every step is such a group.
//! The 16 lanes are added last, in the order of [`Simd::sum`]. No weight is rounded.
//!
//! In a float matrix, lane `l` meets columns `l`, `l + 16` and so on, those of even and of odd vectors in a sum each.

use super::Kernel;
use super::gemv_prepare::{Form, Prepared, STEP, Scaling};
use super::gemv_row::{Decode, GROUPS, Groups, Packed, ROWS, Scratch, Stream, Task, Ternary};
use super::simd::{LANES, Simd};
use crate::matrix::{Data, FloatType, Grid};

/// A task with activations as they are.
pub(super) struct ExactProduct<'a> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for ExactProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch } = self;
        match task.w.data() {
            Data::Float { dtype: FloatType::F32, .. } => task.floats::<S, Floats<4, false>>(simd),
            Data::Float { dtype: FloatType::F16, .. } => task.floats::<S, Floats<2, false>>(simd),
            Data::Float { dtype: FloatType::BF16, .. } => task.floats::<S, Floats<2, true>>(simd),
            Data::Quantized { layout, .. } => match layout.grid {
                Grid::Ternary => task.exact::<S, Ternary, true>(simd, scratch),
                grid if grid.max_code() < 16 => task.exact::<S, Stream, true>(simd, scratch),
                _ => task.exact::<S, Stream, false>(simd, scratch),
            },
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn exact<S: Simd, D: Decode, const NARROW: bool>(&self, simd: S, scratch: &mut Scratch) {
        let Scratch { groups, tail } = scratch;
        let Some(w) = &Packed::new::<D>(simd, self.w, self.rows.end, tail) else { return };
        let Prepared { steps, planes, tokens, ref floats, .. } = *self.x;
        assert!(steps == w.steps && floats.len() == steps * planes * tokens);
        if self.x.form == Some(Form::Interleaved(Scaling::Steps)) {
            assert!(planes == 1);
            self.exact_tokens::<S, D, NARROW, true>(w, groups);
        } else {
            assert!(self.x.groups.len() == steps * planes);
            self.exact_tokens::<S, D, NARROW, false>(w, groups);
        }
    }

    #[inline(always)]
    fn exact_tokens<S: Simd, D: Decode, const NARROW: bool, const STEPS: bool>(
        &self,
        w: &Packed<S>,
        groups: &mut [Groups; ROWS],
    ) {
        let mut token = 0;
        while token < self.x.tokens {
            let left = self.x.tokens - token;
            if S::REGISTERS >= 32 {
                token += match left {
                    1 => self.exact_rows::<S, D, NARROW, STEPS, 1, 2>(w, token, groups),
                    2 => self.exact_rows::<S, D, NARROW, STEPS, 2, 1>(w, token, groups),
                    3 | 5 | 6 => self.exact_rows::<S, D, NARROW, STEPS, 3, 1>(w, token, groups),
                    _ => self.exact_rows::<S, D, NARROW, STEPS, 4, 1>(w, token, groups),
                };
            } else {
                token += match left {
                    1 => self.exact_rows::<S, D, NARROW, STEPS, 1, 1>(w, token, groups),
                    _ => self.exact_rows::<S, D, NARROW, STEPS, 2, 1>(w, token, groups),
                };
            }
        }
    }

    /// `T` tokens from `token` on, `R` rows at a time. Gives `T`.
    #[inline(always)]
    fn exact_rows<S: Simd, D: Decode, const NARROW: bool, const STEPS: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        assert!(token + T <= self.x.tokens);
        let mut row = self.rows.start;
        while row < self.rows.end {
            row += match (STEPS, self.rows.end - row >= R) {
                // SAFETY: the tokens were checked above, and the lengths by `exact`.
                (true, true) => unsafe { self.exact_steps::<S, D, NARROW, T, R>(w, token, row, groups) },
                // SAFETY: as above.
                (true, false) => unsafe { self.exact_steps::<S, D, NARROW, T, 1>(w, token, row, groups) },
                // SAFETY: as above.
                (false, true) => unsafe { self.exact_lanes::<S, D, NARROW, T, R>(w, token, row, groups) },
                // SAFETY: as above.
                (false, false) => unsafe { self.exact_lanes::<S, D, NARROW, T, 1>(w, token, row, groups) },
            };
        }
        T
    }

    /// `T` tokens times `R` rows where scales are of whole steps. Gives `R`.
    ///
    /// # Safety
    /// The activations have `token + T` tokens or more, all slots, and the steps of `w`.
    #[inline(always)]
    unsafe fn exact_steps<S: Simd, D: Decode, const NARROW: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        let simd = w.simd;
        let Prepared { steps, tokens, ref floats, .. } = *self.x;
        let steps_a_group = w.layout.group.div_ceil(STEP).min(steps);
        let constant = w.constant_zero();
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
                let mut zeros = [simd.splat(0.0); R];
                for r in 0..R {
                    zeros[r] = simd.splat(constant.unwrap_or(groups[r].zero(group)));
                }
                let mut of_group = [[[simd.splat(0.0); 2]; T]; R];
                for step in first..end {
                    for r in 0..R {
                        // SAFETY: the step is below that of the activations, which `w` has too.
                        let codes = unsafe { w.codes::<D>(rows[r], step) };
                        let w = simd.levels::<NARROW>(codes, zeros[r]);
                        for t in 0..T {
                            // SAFETY: steps and tokens are below those of the activations, which have all slots.
                            let x = unsafe { floats.get_unchecked(step * tokens + token + t) };
                            for k in 0..4 {
                                let sum = &mut of_group[r][t][k % 2];
                                *sum = simd.mul_add(w[k], simd.load(&x[k]), *sum);
                            }
                        }
                    }
                }
                for r in 0..R {
                    let scale = simd.splat(groups[r].scale(group));
                    for t in 0..T {
                        let sum = simd.add(of_group[r][t][0], of_group[r][t][1]);
                        out[r][t] = simd.mul_add(sum, scale, out[r][t]);
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
    /// The activations have `token + T` tokens or more, all slots, and the steps of `w`.
    #[inline(always)]
    unsafe fn exact_lanes<S: Simd, D: Decode, const NARROW: bool, const T: usize, const R: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut [Groups; ROWS],
    ) -> usize {
        const STEPS_A_LOAD: usize = GROUPS / STEP;
        let simd = w.simd;
        let Prepared { steps, planes, tokens, ref floats, .. } = *self.x;
        let group = w.layout.group;
        let near = group >= 4;
        let constant = w.constant_zero();
        let zero = simd.splat(constant.unwrap_or(0.0));
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
                    let levels = simd.levels::<NARROW>(unsafe { w.codes::<D>(rows[r], step) }, zero);
                    for plane in 0..planes {
                        // SAFETY: steps and planes are below those of the activations.
                        let of_lanes = unsafe { self.x.groups.get_unchecked(step * planes + plane) };
                        let scale = groups[r].lane_scales(simd, base, of_lanes, near);
                        let mut w = levels;
                        if constant.is_none() {
                            let zero = groups[r].lane_zeros(simd, base, of_lanes, near);
                            for w in &mut w {
                                *w = simd.sub(*w, zero);
                            }
                        }
                        for t in 0..T {
                            // SAFETY: steps, planes and tokens are below those of the activations, which have all slots.
                            let x = unsafe { floats.get_unchecked((step * planes + plane) * tokens + token + t) };
                            let even = simd.mul(w[0], simd.load(&x[0]));
                            let odd = simd.mul(w[1], simd.load(&x[1]));
                            let even = simd.mul_add(w[2], simd.load(&x[2]), even);
                            let odd = simd.mul_add(w[3], simd.load(&x[3]), odd);
                            out[r][t] = simd.mul_add(simd.add(even, odd), scale, out[r][t]);
                        }
                    }
                }
            }
        }
        self.store(simd, token, row, &out);
        R
    }
}

/// How a float matrix holds its values, known when the loop is compiled.
trait Load {
    const BYTES: usize;
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32;
}

struct Floats<const BYTES: usize, const BRAIN: bool>;

impl<const BYTES: usize, const BRAIN: bool> Load for Floats<BYTES, BRAIN> {
    const BYTES: usize = BYTES;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32 {
        match (BYTES, BRAIN) {
            (4, _) => simd.load_f32(bytes.first_chunk().expect("16 values")),
            (_, false) => simd.load_f16(bytes.first_chunk().expect("16 values")),
            (_, true) => simd.load_bf16(bytes.first_chunk().expect("16 values")),
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn floats<S: Simd, L: Load>(&self, simd: S) {
        let mut token = 0;
        while token < self.x.tokens {
            let left = self.x.tokens - token;
            if S::REGISTERS >= 32 {
                token += match left {
                    1 => self.float_rows::<S, L, 1, 4>(simd, token),
                    2 => self.float_rows::<S, L, 2, 2>(simd, token),
                    3 | 5 | 6 => self.float_rows::<S, L, 3, 1>(simd, token),
                    _ => self.float_rows::<S, L, 4, 1>(simd, token),
                };
            } else {
                token += match left {
                    1 => self.float_rows::<S, L, 1, 2>(simd, token),
                    _ => self.float_rows::<S, L, 2, 1>(simd, token),
                };
            }
        }
    }

    /// `T` tokens from `token` on, `R` rows at a time. Gives `T`.
    #[inline(always)]
    fn float_rows<S: Simd, L: Load, const T: usize, const R: usize>(&self, simd: S, token: usize) -> usize {
        let mut row = self.rows.start;
        while row < self.rows.end {
            row += if self.rows.end - row >= R {
                self.some_floats::<S, L, T, R>(simd, token, row)
            } else {
                self.some_floats::<S, L, T, 1>(simd, token, row)
            };
        }
        T
    }

    /// `T` tokens times `R` rows. Gives `R`.
    #[inline(always)]
    fn some_floats<S: Simd, L: Load, const T: usize, const R: usize>(
        &self,
        simd: S,
        token: usize,
        row: usize,
    ) -> usize {
        let Data::Float { values, .. } = self.w.data() else { return R };
        let cols = self.w.cols();
        let Prepared { steps, tokens, ref floats, .. } = *self.x;
        assert!(cols <= steps * STEP && floats.len() == steps * tokens && token + T <= tokens);
        let width = LANES * L::BYTES;
        let mut rows = [values; R];
        for r in 0..R {
            rows[r] = &values[(row + r) * cols * L::BYTES..][..cols * L::BYTES];
        }
        let mut sums = [[[simd.splat(0.0); 2]; T]; R];
        let whole = cols / STEP;
        for step in 0..whole {
            for r in 0..R {
                // SAFETY: the row has `cols` values, and whole steps of them end within.
                let bytes = unsafe { rows[r].get_unchecked(step * 4 * width..(step + 1) * 4 * width) };
                for k in 0..4 {
                    let w = L::load(simd, &bytes[k * width..]);
                    for t in 0..T {
                        // SAFETY: steps and tokens are below those of the activations, which have all slots.
                        let x = unsafe { floats.get_unchecked(step * tokens + token + t) };
                        sums[r][t][k % 2] = simd.mul_add(w, simd.load(&x[k]), sums[r][t][k % 2]);
                    }
                }
            }
        }
        if whole < steps {
            for r in 0..R {
                let rest = &rows[r][whole * 4 * width..];
                let mut padded = [0; STEP * 4];
                padded[..rest.len()].copy_from_slice(rest);
                for k in 0..4 {
                    let w = L::load(simd, &padded[k * width..]);
                    for t in 0..T {
                        let x = &floats[whole * tokens + token + t];
                        sums[r][t][k % 2] = simd.mul_add(w, simd.load(&x[k]), sums[r][t][k % 2]);
                    }
                }
            }
        }
        let mut out = [[simd.splat(0.0); T]; R];
        for r in 0..R {
            for t in 0..T {
                out[r][t] = simd.add(sums[r][t][0], sums[r][t][1]);
            }
        }
        self.store(simd, token, row, &out);
        R
    }
}
