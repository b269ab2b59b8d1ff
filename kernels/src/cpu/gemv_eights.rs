//! A few tokens of f32 activations times packed weights of four bits, eight columns of a lane at a time.
//!
//! The order of the sums, on every instruction set: in a step of 128 columns, lane `l` meets its columns `8l` to `8l + 7` one
//! after the other, the even and the odd ones in a sum each. The two are added, multiplied by the weight's scale and added to
//! the lane's sum over the row. The 16 lanes are added last, in the order of [`Simd::sum`]. No weight is rounded.

use super::Kernel;
use super::gemv_codes::{Hold, Nibbles};
use super::gemv_prepare::{EIGHT, Eights, Prepared};
use super::gemv_row::{Codes, Packed, RowsAtHand, Scratch, Task};
use super::gemv_wide::{Steps, WideRows};
use super::simd::{Aligned, Simd};

/// A task with activations as they are. With `CONSTANT`, every group has the zero point of its grid; with `UNIFORM`, no step
/// meets two groups.
pub(super) struct EightsProduct<'a, const CONSTANT: bool, const UNIFORM: bool> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
}

impl<'a, const CONSTANT: bool, const UNIFORM: bool> EightsProduct<'a, CONSTANT, UNIFORM> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        Self { task, scratch }
    }
}

impl<const CONSTANT: bool, const UNIFORM: bool> Kernel for EightsProduct<'_, CONSTANT, UNIFORM> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, scratch } = self;
        let Some(w) = &Packed::new::<Nibbles>(simd, task.w, task.rows.end, &mut scratch.tail) else { return };
        let Prepared { steps, tokens, ref eights, .. } = *task.x;
        assert!(steps == w.steps && eights.len() == steps * tokens);
        let rows = &mut scratch.rows;
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => task.eights_rows::<S, CONSTANT, UNIFORM, 1>(w, token, rows),
                3 | 5 | 6 if S::REGISTERS >= 32 => task.eights_rows::<S, CONSTANT, UNIFORM, 3>(w, token, rows),
                4.. if S::REGISTERS >= 32 => task.eights_rows::<S, CONSTANT, UNIFORM, 4>(w, token, rows),
                _ => task.eights_rows::<S, CONSTANT, UNIFORM, 2>(w, token, rows),
            };
        }
    }
}

impl Task<'_> {
    /// `T` tokens from `token` on. Gives `T`.
    #[inline(always)]
    fn eights_rows<S: Simd, const CONSTANT: bool, const UNIFORM: bool, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        rows_at_hand: &mut RowsAtHand,
    ) -> usize {
        let Prepared { steps, tokens, ref eights, .. } = *self.x;
        assert!(token + T <= tokens);
        let zero = w.constant_zero().unwrap_or(0.0);
        let x = FloatSteps::<CONSTANT, UNIFORM> { steps, x: &eights[token * steps..], zero };
        // SAFETY: the tokens were checked above, the lengths by the kernel, which made `w` for this.
        unsafe { self.each_row::<S, _, T>(w, token, WideRows::<_, UNIFORM>::new(w, x), rows_at_hand) }
    }
}

/// The activations that a product reads. [tokens, steps]
#[derive(Clone, Copy)]
struct FloatSteps<'a, const CONSTANT: bool, const UNIFORM: bool> {
    steps: usize,
    x: &'a [Aligned<Eights>],
    /// With `CONSTANT`, the zero point of every group.
    zero: f32,
}

impl<const CONSTANT: bool, const UNIFORM: bool> Steps for FloatSteps<'_, CONSTANT, UNIFORM> {
    type Hold = Nibbles;
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
            let zero = if CONSTANT { simd.splat(self.zero) } else { simd.neg(minus_zero) };
            // SAFETY: the caller's promise.
            let bytes = unsafe { w.bytes::<Nibbles>(rows[r], step) };
            let Some(bytes) = bytes.first_chunk() else { unreachable!("a step is {} bytes", Nibbles::BYTES) };
            let levels = if CONSTANT || UNIFORM {
                simd.nibble_levels::<true>(bytes, zero)
            } else {
                simd.nibble_levels::<false>(bytes, zero)
            };
            for (t, out) in out[r].iter_mut().enumerate() {
                // SAFETY: steps and tokens are below those of the activations, which have all slots.
                let x = unsafe { self.x.get_unchecked(t * self.steps + step) };
                let mut sums = [simd.mul(levels[0], simd.load(&x[0])), simd.mul(levels[1], simd.load(&x[1]))];
                for k in 2..EIGHT {
                    sums[k % 2] = simd.mul_add(levels[k], simd.load(&x[k]), sums[k % 2]);
                }
                *out = simd.mul_add(simd.add(sums[0], sums[1]), scale, *out);
            }
        }
    }
}
