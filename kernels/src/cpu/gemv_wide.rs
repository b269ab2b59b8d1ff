//! A few tokens of INT8 activations times packed weights whose groups are whole blocks of 64 columns.
//!
//! The order of the sums, on every instruction set: in a step of 128 columns (ternary codes: 256), a lane's dot product over
//! its columns is an exact integer. It is multiplied by the activations' scale, and the product with the weight's scale is
//! added to the lane's sum over the row. The 16 lanes are added last, in the order of [`Simd::sum`].

use std::marker::PhantomData;

use super::Kernel;
use super::gemv_codes::Wide;
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{Codes, GROUPS, Groups, Packed, Scratch, Task};
use super::simd::{Aligned, LANES, Simd};

/// A task with activations rounded to INT8. With `UNIFORM`, no step meets two groups.
pub(super) struct WideProduct<'a, W, const CONSTANT: bool, const UNIFORM: bool> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    hold: PhantomData<W>,
}

impl<'a, W, const CONSTANT: bool, const UNIFORM: bool> WideProduct<'a, W, CONSTANT, UNIFORM> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        Self { task, scratch, hold: PhantomData }
    }
}

impl<W: Wide, const CONSTANT: bool, const UNIFORM: bool> Kernel for WideProduct<'_, W, CONSTANT, UNIFORM> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch: Scratch { groups, tail }, .. } = self;
        let Some(w) = &Packed::new::<W>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, tokens, ref codes, ref starts, ref sums, ref scales, .. } = *task.x;
        let slots = steps * tokens;
        assert!(steps == w.steps && codes.len() == W::VECTORS * slots && scales.len() == slots);
        assert!(if CONSTANT { starts.len() } else { sums.len() } == slots);
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 1>(w, token, groups),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 3>(w, token, groups),
                4.. if S::REGISTERS >= 32 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 4>(w, token, groups),
                _ => task.wide_rows::<S, W, CONSTANT, UNIFORM, 2>(w, token, groups),
            };
        }
    }
}

/// The activations that a product reads. [tokens, steps], [`Wide::VECTORS`] vectors of codes a slot
#[derive(Clone, Copy)]
struct Slots<'a> {
    steps: usize,
    codes: &'a [Aligned<[i8; STEP]>],
    starts: &'a [Aligned<[i32; LANES]>],
    sums: &'a [Aligned<[f32; LANES]>],
    scales: &'a [Aligned<[f32; LANES]>],
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn wide_rows<S: Simd, W: Wide, const CONSTANT: bool, const UNIFORM: bool, const T: usize>(
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
            codes: &self.x.codes[W::VECTORS * from..],
            starts: if CONSTANT { &self.x.starts[from..] } else { &[] },
            sums: if CONSTANT { &[] } else { &self.x.sums[from..] },
            scales: &self.x.scales[from..],
        };
        let group = w.layout.group;
        let steps_a_group = if UNIFORM { group.div_ceil(W::COLUMNS).min(steps) } else { 1 };
        let groups_a_step = if UNIFORM { 1 } else { W::COLUMNS / group };
        // Lanes after the last column take the last group's scale: another row's might not be finite.
        let of_lanes = |groups: usize| -> [i32; LANES] {
            std::array::from_fn(|lane| (lane * groups_a_step / LANES).min(groups - 1) as i32)
        };
        let (whole, part) = (of_lanes(groups_a_step), of_lanes((w.groups - 1) % groups_a_step + 1));
        let rows_at_once = (GROUPS / w.groups).clamp(1, LANES);
        let mut lanes = [[Aligned([0.0; LANES]); LANES]; T];
        for start in self.rows.clone().step_by(rows_at_once) {
            let rows = start..self.rows.end.min(start + rows_at_once);
            if w.groups <= GROUPS {
                groups.load_rows(w, rows.clone());
            }
            for (i, row) in rows.clone().enumerate() {
                let row_codes = w.row(row);
                let mut out = [simd.splat(0.0); T];
                let mut step = 0;
                for first_group in (0..w.groups).step_by(GROUPS) {
                    let count = GROUPS.min(w.groups - first_group);
                    let mut at = i * w.groups;
                    if w.groups > GROUPS {
                        groups.load(w, row, first_group, count);
                        at = first_group;
                    }
                    if UNIFORM {
                        let (scales, zeros) = groups.loaded(at, count);
                        for (scale, zero) in scales.iter().zip(zeros) {
                            let (scale, minus_zero) = (simd.splat(*scale), simd.splat(-zero));
                            // SAFETY: the step is below `steps`; the activations have `token + T` tokens or more, and their
                            // lengths were checked by the kernel.
                            unsafe { x.add::<S, W, CONSTANT, T>(w, row_codes, step, scale, minus_zero, &mut out) };
                            step += 1;
                            if steps_a_group > 1 {
                                let end = steps.min(step + steps_a_group - 1);
                                while step < end {
                                    // SAFETY: as above.
                                    unsafe {
                                        x.add::<S, W, CONSTANT, T>(w, row_codes, step, scale, minus_zero, &mut out)
                                    };
                                    step += 1;
                                }
                            }
                        }
                    } else {
                        for base in (at..at + count).step_by(groups_a_step) {
                            let of_lanes = if step + 1 < steps { &whole } else { &part };
                            let scale = groups.lane_scales(simd, base, of_lanes, true);
                            let mut minus_zero = scale;
                            if !CONSTANT {
                                minus_zero = simd.neg(groups.lane_zeros(simd, base, of_lanes, true));
                            }
                            // SAFETY: as above.
                            unsafe { x.add::<S, W, CONSTANT, T>(w, row_codes, step, scale, minus_zero, &mut out) };
                            step += 1;
                        }
                    }
                }
                for (lanes, out) in lanes.iter_mut().zip(out) {
                    simd.store(out, &mut lanes[i]);
                }
            }
            for (t, lanes) in lanes.iter().enumerate() {
                let sums = simd.sums(lanes);
                // SAFETY: every task has rows of its own, and this one makes one reference at a time.
                simd.store_partial(sums, unsafe { self.out.segment(token + t, rows.clone()) });
            }
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
    unsafe fn add<S: Simd, W: Wide, const CONSTANT: bool, const T: usize>(
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
        let codes = W::codes(simd, &w.unpack, unsafe { w.bytes::<W>(row, step) }, step);
        for (t, out) in out.iter_mut().enumerate() {
            let slot = t * self.steps + step;
            // SAFETY: steps and tokens are below those of the activations, which have all slots.
            let a = unsafe { self.codes.get_unchecked(W::VECTORS * slot..W::VECTORS * (slot + 1)) };
            let mut start = simd.splat_i32(0);
            if CONSTANT {
                // SAFETY: as above.
                start = simd.load_i32(unsafe { self.starts.get_unchecked(slot) });
            }
            let mut dot = simd.i32_to_f32(W::dot(simd, codes, a, start));
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
