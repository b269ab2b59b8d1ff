//! A few tokens of INT8 activations times packed weights whose groups have lanes of their own, and the walk over the steps of
//! such rows, which [`gemv_eights`](super::gemv_eights) and [`gemv_short`](super::gemv_short) share.
//!
//! The order of the sums, on every instruction set: in a step of 64 to 256 columns (see
//! [`Order`](super::gemv_prepare::Order)), a lane's dot product over its columns is an exact integer. It is multiplied by the
//! activations' scale, and the product with the weight's scale is added to the lane's sum over the row. The 16 lanes are
//! added last, in the order of [`Simd::sum`].

use std::marker::PhantomData;
use std::ops::Range;

use super::Kernel;
use super::gemv_codes::{Hold, Wide};
use super::gemv_prepare::{Prepared, STEP};
use super::gemv_row::{Codes, Groups, Packed, Rows, RowsAtHand, Scratch, Task};
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
        let Self { task, scratch: Scratch { rows, tail }, .. } = self;
        let Some(w) = &Packed::new::<W>(simd, task.w, task.rows.end, tail) else { return };
        let Prepared { steps, tokens, ref codes, ref starts, ref sums, ref scales, .. } = *task.x;
        let slots = steps * tokens;
        assert!(steps == w.steps && codes.len() == W::VECTORS * slots && scales.len() == slots);
        assert!(if CONSTANT { starts.len() } else { sums.len() } == slots);
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 1>(w, token, rows),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 3>(w, token, rows),
                4.. if S::REGISTERS >= 32 => task.wide_rows::<S, W, CONSTANT, UNIFORM, 4>(w, token, rows),
                _ => task.wide_rows::<S, W, CONSTANT, UNIFORM, 2>(w, token, rows),
            };
        }
    }
}

/// The activations that a product reads. [tokens, steps], [`Wide::VECTORS`] vectors of codes a slot
#[derive(Clone, Copy)]
struct Slots<'a, W, const CONSTANT: bool> {
    steps: usize,
    codes: &'a [Aligned<[i8; STEP]>],
    starts: &'a [Aligned<[i32; LANES]>],
    sums: &'a [Aligned<[f32; LANES]>],
    scales: &'a [Aligned<[f32; LANES]>],
    hold: PhantomData<W>,
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn wide_rows<S: Simd, W: Wide, const CONSTANT: bool, const UNIFORM: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        rows_at_hand: &mut RowsAtHand,
    ) -> usize {
        let Prepared { steps, tokens, .. } = *self.x;
        assert!(token + T <= tokens);
        let from = token * steps;
        let x = Slots::<W, CONSTANT> {
            steps,
            codes: &self.x.codes[W::VECTORS * from..],
            starts: if CONSTANT { &self.x.starts[from..] } else { &[] },
            sums: if CONSTANT { &[] } else { &self.x.sums[from..] },
            scales: &self.x.scales[from..],
            hold: PhantomData,
        };
        let rows = WideRows::<_, UNIFORM>::new(w, x);
        // SAFETY: there are `token + T` tokens or more, and the lengths were checked by the kernel.
        unsafe { self.each_row::<S, _, T>(w, token, rows, rows_at_hand) }
    }
}

/// Activations that rows meet in wide steps.
pub(super) trait Steps: Copy {
    /// How the rows hold their codes.
    type Hold: Hold;
    /// Whether every group has the zero point of its grid.
    const CONSTANT: bool;
    /// Whether one token meets two rows at a time where there are registers for both.
    const PAIRS: bool;

    /// Adds the products of one step; scales come with minus their zero points.
    ///
    /// # Safety
    /// `step` is below the steps of `w` and of the activations, of which there are `T` tokens or more, and `rows` come from
    /// `w`, which was made for [`Hold`](Self::Hold).
    unsafe fn add<S: Simd, const T: usize, const R: usize>(
        self,
        w: &Packed<S>,
        rows: [Codes; R],
        step: usize,
        weight_scales: [(S::F32, S::F32); R],
        out: &mut [[S::F32; T]; R],
    );
}

/// Rows times the tokens of `x`. With `UNIFORM`, no step meets two groups.
#[derive(Clone, Copy)]
pub(super) struct WideRows<X, const UNIFORM: bool> {
    x: X,
    steps: usize,
    spread: Spread,
}

impl<X: Steps, const UNIFORM: bool> WideRows<X, UNIFORM> {
    pub(super) fn new(w: &Packed<impl Simd>, x: X) -> Self {
        Self { x, steps: w.steps, spread: Spread::new::<X::Hold, UNIFORM>(w) }
    }
}

/// How groups lie over steps.
#[derive(Clone, Copy)]
struct Spread {
    steps_a_group: usize,
    groups_a_step: usize,
    /// The group of each lane in a step of several, and in the last step.
    of_lanes: [[i32; LANES]; 2],
}

impl Spread {
    fn new<W: Hold, const UNIFORM: bool>(w: &Packed<impl Simd>) -> Self {
        let group = w.layout.group;
        // Otherwise the steps of groups would not be those of the row.
        assert!(if UNIFORM {
            w.groups == 1 || group.is_multiple_of(W::COLUMNS)
        } else {
            W::COLUMNS.is_multiple_of(group) && W::COLUMNS / group <= LANES
        });
        let groups_a_step = if UNIFORM { 1 } else { W::COLUMNS / group };
        // Lanes after the last column take the last group's scale: another row's might not be finite.
        let of_lanes = |groups: usize| -> [i32; LANES] {
            std::array::from_fn(|lane| (lane * groups_a_step / LANES).min(groups - 1) as i32)
        };
        Self {
            steps_a_group: if UNIFORM { group.div_ceil(W::COLUMNS).min(w.steps) } else { 1 },
            groups_a_step,
            of_lanes: [groups_a_step, (w.groups - 1) % groups_a_step + 1].map(of_lanes),
        }
    }
}

impl<S: Simd, X: Steps, const UNIFORM: bool, const T: usize> Rows<S, T> for WideRows<X, UNIFORM> {
    const PAIRS: bool = X::PAIRS;

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
        let Self { x, steps, spread } = self;
        let simd = w.simd;
        let no_scales = [(simd.splat(0.0), simd.splat(0.0)); R];
        if UNIFORM {
            let mut step = range.start * spread.steps_a_group;
            let loaded = groups.each_loaded(at, range.len());
            for group in 0..range.len() {
                let mut scales = no_scales;
                for (to, (scales, zeros)) in scales.iter_mut().zip(loaded) {
                    *to = (simd.splat(scales[group]), simd.splat(-zeros[group]));
                }
                // SAFETY: groups are whole steps, as `Spread` has checked, so the step is below `steps`; the rest is the
                // caller's promise.
                unsafe { x.add::<S, T, R>(w, rows, step, scales, out) };
                step += 1;
                if spread.steps_a_group > 1 {
                    let end = steps.min(step + spread.steps_a_group - 1);
                    while step < end {
                        // SAFETY: as above.
                        unsafe { x.add::<S, T, R>(w, rows, step, scales, out) };
                        step += 1;
                    }
                }
            }
        } else {
            let first = range.start / spread.groups_a_step;
            for (step, group) in (first..).zip((0..range.len()).step_by(spread.groups_a_step)) {
                let mut scales = no_scales;
                let of_lanes = &spread.of_lanes[usize::from(step + 1 == steps)];
                for (to, at) in scales.iter_mut().zip(at) {
                    to.0 = groups.lane_scales(simd, at + group, of_lanes, true);
                    if !X::CONSTANT {
                        to.1 = simd.neg(groups.lane_zeros(simd, at + group, of_lanes, true));
                    }
                }
                // SAFETY: as above.
                unsafe { x.add::<S, T, R>(w, rows, step, scales, out) };
            }
        }
    }
}

impl<W: Wide, const CONSTANT: bool> Steps for Slots<'_, W, CONSTANT> {
    type Hold = W;
    const CONSTANT: bool = CONSTANT;
    const PAIRS: bool = W::PAIRS;

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
            // SAFETY: the caller's promise.
            let codes = W::codes(simd, &w.unpack, unsafe { w.bytes::<W>(rows[r], step) }, step);
            let (weight_scale, minus_zero) = weight_scales[r];
            for (t, out) in out[r].iter_mut().enumerate() {
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
}
