//! A few tokens of INT8 activations times codes of four bits, 128 columns at a time.
//!
//! The order of the sums, on every instruction set: in a step of 128 columns, a lane's dot product over its eight columns is
//! an exact integer. It is multiplied by the activations' scale, and the product with the weight's scale is added to the
//! lane's sum over the row. The 16 lanes are added last, in the order of [`Simd::sum`].

use super::Kernel;
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{Codes, GROUPS, Groups, Nibbles, Packed, Scratch, Task};
use super::simd::{LANES, Simd};

/// A task with activations rounded to INT8, and groups of whole steps.
pub(super) struct NibbleProduct<'a, const CONSTANT: bool> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl<const CONSTANT: bool> Kernel for NibbleProduct<'_, CONSTANT> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch: Scratch { groups, tail } } = self;
        let Some(w) = &Packed::new::<Nibbles>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, tokens, ref codes, ref starts, ref sums, ref lane_scales, .. } = *task.x;
        let slots = steps * tokens;
        assert!(steps == w.steps && codes.len() == 2 * slots && lane_scales.len() == slots);
        assert!(if CONSTANT { starts.len() } else { sums.len() } == slots);
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.nibble_rows::<S, CONSTANT, 1>(w, token, groups),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.nibble_rows::<S, CONSTANT, 3>(w, token, groups),
                4.. if S::REGISTERS >= 32 => task.nibble_rows::<S, CONSTANT, 4>(w, token, groups),
                _ => task.nibble_rows::<S, CONSTANT, 2>(w, token, groups),
            };
        }
    }
}

/// The activations that a product reads. [tokens, steps], two vectors of codes a slot
#[derive(Clone, Copy)]
struct Slots<'a> {
    steps: usize,
    codes: &'a [[i8; STEP]],
    starts: &'a [[i32; LANES]],
    sums: &'a [[f32; LANES]],
    scales: &'a [[f32; LANES]],
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn nibble_rows<S: Simd, const CONSTANT: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        groups: &mut Groups,
    ) -> usize {
        let simd = w.simd;
        let Prepared { steps, tokens, .. } = *self.x;
        assert!(token + T <= tokens);
        let from = token * steps;
        let x = Slots {
            steps,
            codes: &self.x.codes[2 * from..],
            starts: if CONSTANT { &self.x.starts[from..] } else { &[] },
            sums: if CONSTANT { &[] } else { &self.x.sums[from..] },
            scales: &self.x.lane_scales[from..],
        };
        let steps_a_group = w.layout.group.div_ceil(2 * STEP).min(steps);
        for row in self.rows.clone() {
            let row_codes = w.row(row);
            let mut out = [simd.splat(0.0); T];
            let mut first = 0;
            for first_group in (0..w.groups).step_by(GROUPS) {
                let count = GROUPS.min(w.groups - first_group);
                groups.load(w, row, first_group, count);
                let (scales, zeros) = groups.loaded(first_group, count);
                for (scale, zero) in scales.iter().zip(zeros) {
                    let (scale, minus_zero) = (simd.splat(*scale), simd.splat(-zero));
                    let end = steps.min(first + steps_a_group);
                    for step in first..end {
                        // SAFETY: the steps are below `steps`; the activations have `token + T` tokens or more, and their
                        // lengths were checked by the kernel.
                        unsafe { x.add::<S, CONSTANT, T>(w, row_codes, step, scale, minus_zero, &mut out) };
                    }
                    first = end;
                }
            }
            self.store(simd, token, row, &out);
        }
        T
    }
}

impl Slots<'_> {
    /// Adds the products of one step.
    ///
    /// # Safety
    /// `step` is below the steps of `w` and of the activations, of which there are `T` tokens or more, and `row` comes from
    /// `w`.
    #[inline(always)]
    unsafe fn add<S: Simd, const CONSTANT: bool, const T: usize>(
        self,
        w: &Packed<S>,
        row: Codes,
        step: usize,
        weight_scale: S::F32,
        minus_zero: S::F32,
        out: &mut [S::F32; T],
    ) {
        let simd = w.simd;
        // SAFETY: the caller's promise.
        let [even, odd] = simd.nibbles(unsafe { w.bytes::<Nibbles>(row, step) });
        for (t, out) in out.iter_mut().enumerate() {
            let slot = t * self.steps + step;
            // SAFETY: steps and tokens are below those of the activations, which have all slots.
            let [a, b] = unsafe { [self.codes.get_unchecked(2 * slot), self.codes.get_unchecked(2 * slot + 1)] };
            let mut dot = simd.splat_i32(0);
            if CONSTANT {
                // SAFETY: as above.
                dot = simd.load_i32(unsafe { self.starts.get_unchecked(slot) });
            }
            dot = simd.dot_codes(odd, b, simd.dot_codes(even, a, dot, false), false);
            let mut dot = simd.i32_to_f32(dot);
            if !CONSTANT {
                // SAFETY: as above.
                let sum = simd.load(unsafe { self.sums.get_unchecked(slot) });
                // Both terms and their sum are integers below 2^24, so this is exact.
                dot = simd.mul_add(minus_zero, sum, dot);
            }
            // SAFETY: as above.
            let scale = simd.load(unsafe { self.scales.get_unchecked(slot) });
            *out = simd.mul_add(simd.mul(dot, scale), weight_scale, *out);
        }
    }
}
