//! A few tokens of f32 activations times packed weights: weights are decoded in registers and read once. Most weights of
//! four bits go [another way](super::gemv_eights), and so do [short groups](super::gemv_short).
//!
//! The order of the sums, on every instruction set: in a step of 64 columns, lane `l` meets its columns `4l` to `4l + 3`
//! one after the other, the even and the odd ones in a sum each. The two are added at the end of the group, multiplied by
//! its scale and added to the lane's sum over the row; where lanes have scales of their own, every step is such a group.
//! The 16 lanes are added last, in the order of [`Simd::sum`]. No weight is rounded.
//!
//! In a float matrix, lane `l` meets columns `l`, `l + 16` and so on, those of even and of odd vectors in a sum each.

#![expect(
    clippy::needless_range_loop,
    reason = "loops over constant counts are unrolled, iterators over them not always"
)]

use std::marker::PhantomData;
use std::ops::Range;

use super::Kernel;
use super::gemv_codes::Decode;
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{AHEAD, Codes, Groups, Packed, Rows, RowsAtHand, STEPS_A_LOAD, Scratch, Task};
use super::simd::{Aligned, LANES, Simd};
use crate::matrix::Data;

/// A task with activations as they are.
pub(super) struct ExactProduct<'a, D, const NARROW: bool, const STEPS: bool> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    decode: PhantomData<D>,
}

impl<'a, D, const NARROW: bool, const STEPS: bool> ExactProduct<'a, D, NARROW, STEPS> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        Self { task, scratch, decode: PhantomData }
    }
}

impl<D: Decode, const NARROW: bool, const STEPS: bool> Kernel for ExactProduct<'_, D, NARROW, STEPS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch: Scratch { rows, tail }, .. } = self;
        let Some(w) = &Packed::new::<D>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, planes, tokens, ref floats, .. } = *task.x;
        assert!(steps == w.steps && floats.len() == steps * planes * tokens);
        if STEPS {
            assert!(planes == 1);
        } else {
            assert!(task.x.groups.len() == steps * planes);
            assert!(task.x.first_groups.len() == steps);
        }
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.exact_rows::<S, D, NARROW, STEPS, 1>(w, token, rows),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.exact_rows::<S, D, NARROW, STEPS, 3>(w, token, rows),
                4.. if S::REGISTERS >= 32 => task.exact_rows::<S, D, NARROW, STEPS, 4>(w, token, rows),
                _ => task.exact_rows::<S, D, NARROW, STEPS, 2>(w, token, rows),
            };
        }
    }
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn exact_rows<S: Simd, D: Decode, const NARROW: bool, const STEPS: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        rows_at_hand: &mut RowsAtHand,
    ) -> usize {
        assert!(token + T <= self.x.tokens);
        if STEPS {
            let x = &self.x.floats[token * self.x.steps..];
            let steps_a_group = w.layout.group.div_ceil(STEP).min(w.steps);
            let rows = StepRows::<D, NARROW> { x, steps_a_group, decode: PhantomData };
            // SAFETY: the tokens were checked above, and the lengths by the kernel.
            return unsafe { self.each_row::<S, _, T>(w, token, rows, rows_at_hand) };
        }
        for row in self.rows.clone() {
            // SAFETY: as above.
            let sums = unsafe { self.exact_lanes::<S, D, NARROW, T>(w, token, row, &mut rows_at_hand.groups) };
            self.store(w.simd, token, row, &sums);
        }
        T
    }

    /// `T` tokens times a row where lanes have scales of their own.
    ///
    /// # Safety
    /// The activations have `token + T` tokens or more, all slots, and the steps of `w`.
    #[inline(always)]
    unsafe fn exact_lanes<S: Simd, D: Decode, const NARROW: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        row: usize,
        groups: &mut Groups,
    ) -> [S::F32; T] {
        let simd = w.simd;
        let Prepared { steps, planes, ref floats, .. } = *self.x;
        let group = w.layout.group;
        let near = group >= 4;
        let constant = w.constant_zero();
        let zero = simd.splat(constant.unwrap_or(0.0));
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
                let levels = simd.levels::<NARROW>(unsafe { w.codes::<D>(row_codes, step) }, zero);
                for plane in 0..planes {
                    // SAFETY: steps and planes are below those of the activations.
                    let of_lanes = unsafe { self.x.groups.get_unchecked(step * planes + plane) };
                    let scale = groups.lane_scales(simd, base, of_lanes, near);
                    let mut levels = levels;
                    if constant.is_none() {
                        let zero = groups.lane_zeros(simd, base, of_lanes, near);
                        for level in &mut levels {
                            *level = simd.sub(*level, zero);
                        }
                    }
                    for t in 0..T {
                        // SAFETY: steps, planes and tokens are below those of the activations, which have all slots.
                        let x = unsafe { floats.get_unchecked(((token + t) * steps + step) * planes + plane) };
                        let even = simd.mul(levels[0], simd.load(&x[0]));
                        let odd = simd.mul(levels[1], simd.load(&x[1]));
                        let even = simd.mul_add(levels[2], simd.load(&x[2]), even);
                        let odd = simd.mul_add(levels[3], simd.load(&x[3]), odd);
                        out[t] = simd.mul_add(simd.add(even, odd), scale, out[t]);
                    }
                }
            }
        }
        out
    }
}

/// Rows times tokens where scales are of whole steps. `x` is [tokens, steps].
#[derive(Clone, Copy)]
struct StepRows<'a, D, const NARROW: bool> {
    x: &'a [Aligned<[[f32; LANES]; 4]>],
    steps_a_group: usize,
    decode: PhantomData<D>,
}

impl<S: Simd, D: Decode, const NARROW: bool, const T: usize> Rows<S, T> for StepRows<'_, D, NARROW> {
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn add_groups<const R: usize>(
        self,
        w: &Packed<S>,
        rows: [Codes; R],
        range: Range<usize>,
        groups: &Groups,
        at: [usize; R],
        out: &mut [[S::F32; T]; R],
    ) {
        let Self { x, steps_a_group, .. } = self;
        let simd = w.simd;
        let constant = w.constant_zero();
        let loaded = groups.each_loaded(at, range.len());
        let mut step = range.start * steps_a_group;
        for group in 0..range.len() {
            let mut zeros = [simd.splat(0.0); R];
            for (zero, (_, zeros)) in zeros.iter_mut().zip(loaded) {
                *zero = simd.splat(constant.unwrap_or(zeros[group]));
            }
            let end = w.steps.min(step + steps_a_group);
            let mut of_group = [[[simd.splat(0.0); 2]; T]; R];
            // The usual group is two steps.
            while step + 2 <= end {
                // SAFETY: the steps are below `steps`; the rest is the caller's promise.
                unsafe {
                    add_step::<S, D, NARROW, T, R>(w, x, rows, step, zeros, &mut of_group);
                    add_step::<S, D, NARROW, T, R>(w, x, rows, step + 1, zeros, &mut of_group);
                }
                step += 2;
            }
            if step < end {
                // SAFETY: as above.
                unsafe { add_step::<S, D, NARROW, T, R>(w, x, rows, step, zeros, &mut of_group) };
                step += 1;
            }
            for r in 0..R {
                let scale = simd.splat(loaded[r].0[group]);
                for t in 0..T {
                    let sum = simd.add(of_group[r][t][0], of_group[r][t][1]);
                    out[r][t] = simd.mul_add(sum, scale, out[r][t]);
                }
            }
        }
    }
}

/// Adds the products of one step to those of its group. `x` is [tokens, steps] from the first token on.
///
/// # Safety
/// `step` is below the steps of `w` and of the activations, of which there are `T` tokens or more, and `rows` come from
/// `w`.
#[inline(always)]
unsafe fn add_step<S: Simd, D: Decode, const NARROW: bool, const T: usize, const R: usize>(
    w: &Packed<S>,
    x: &[Aligned<[[f32; LANES]; 4]>],
    rows: [Codes; R],
    step: usize,
    zeros: [S::F32; R],
    of_group: &mut [[[S::F32; 2]; T]; R],
) {
    let simd = w.simd;
    for r in 0..R {
        // SAFETY: the caller's promise.
        let levels = simd.levels::<NARROW>(unsafe { w.codes::<D>(rows[r], step) }, zeros[r]);
        for (t, sums) in of_group[r].iter_mut().enumerate() {
            // SAFETY: steps and tokens are below those of the activations, which have all slots.
            let x = unsafe { x.get_unchecked(t * w.steps + step) };
            for (k, (level, x)) in levels.iter().zip(&x.0).enumerate() {
                sums[k % 2] = simd.mul_add(*level, simd.load(x), sums[k % 2]);
            }
        }
    }
}

/// A task with a float matrix.
pub(super) struct FloatProduct<'a, L> {
    task: Task<'a>,
    values: PhantomData<L>,
}

impl<'a, L> FloatProduct<'a, L> {
    pub(super) fn new(task: Task<'a>) -> Self {
        Self { task, values: PhantomData }
    }
}

impl<L: Load> Kernel for FloatProduct<'_, L> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, .. } = self;
        let tokens = task.x.tokens;
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.float_rows::<S, L, 1>(simd, token),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.float_rows::<S, L, 3>(simd, token),
                4.. if S::REGISTERS >= 32 => task.float_rows::<S, L, 4>(simd, token),
                _ => task.float_rows::<S, L, 2>(simd, token),
            };
        }
    }
}

/// How a float matrix holds its values, known when the loop is compiled.
pub(super) trait Load {
    const BYTES: usize;
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl Load for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32 {
        simd.load_f32(bytes.first_chunk().expect("16 values"))
    }
}

impl Load for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32 {
        simd.load_f16(bytes.first_chunk().expect("16 values"))
    }
}

impl Load for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::F32 {
        simd.load_bf16(bytes.first_chunk().expect("16 values"))
    }
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn float_rows<S: Simd, L: Load, const T: usize>(&self, simd: S, token: usize) -> usize {
        let Data::Float { values, .. } = self.w.data() else { return T };
        let cols = self.w.cols();
        let Prepared { steps, tokens, ref floats, .. } = *self.x;
        assert!(cols <= steps * STEP && floats.len() == steps * tokens && token + T <= tokens);
        let width = LANES * L::BYTES;
        let whole = cols / STEP;
        for row in self.rows.clone() {
            let values = &values[row * cols * L::BYTES..][..cols * L::BYTES];
            let mut sums = [[simd.splat(0.0); 2]; T];
            for step in 0..whole {
                // SAFETY: the row has `cols` values, and whole steps of them end within.
                let bytes = unsafe { values.get_unchecked(step * 4 * width..(step + 1) * 4 * width) };
                for line in (0..4 * width).step_by(STEP) {
                    simd.prefetch(bytes.as_ptr().wrapping_add(AHEAD + line));
                }
                for k in 0..4 {
                    let w = L::load(simd, &bytes[k * width..]);
                    for t in 0..T {
                        // SAFETY: steps and tokens are below those of the activations, which have all slots.
                        let x = unsafe { floats.get_unchecked((token + t) * steps + step) };
                        sums[t][k % 2] = simd.mul_add(w, simd.load(&x[k]), sums[t][k % 2]);
                    }
                }
            }
            if whole < steps {
                let rest = &values[whole * 4 * width..];
                let mut padded = [0; STEP * 4];
                padded[..rest.len()].copy_from_slice(rest);
                for k in 0..4 {
                    let w = L::load(simd, &padded[k * width..]);
                    for t in 0..T {
                        let x = &floats[(token + t) * steps + whole];
                        sums[t][k % 2] = simd.mul_add(w, simd.load(&x[k]), sums[t][k % 2]);
                    }
                }
            }
            self.store(simd, token, row, &sums.map(|[even, odd]| simd.add(even, odd)));
        }
        T
    }
}
