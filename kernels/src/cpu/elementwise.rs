//! Sums and products of tensors, and rotary embedding. Large inputs are split over threads; the split never
//! changes a result.

use super::activation::silu;
use super::pool::for_each_piece;
use super::simd::Simd;
use super::{Cpu, Kernel};

/// Elements of one parallel task: about the work that pays for handing it to another thread.
const TASK: usize = 1 << 14;

impl Cpu {
    /// `gate = silu(gate) * up`, with `silu(g) = g / (1 + exp(-g))`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_multiply(self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up differ in length");
        by_rows(gate, 1, |first, gate| {
            let up = &up[first..][..gate.len()];
            self.dispatch(Combine { x: gate, y: up, f: SiluTimes });
        });
    }

    /// `x += y`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        by_rows(x, 1, |first, x| {
            let y = &y[first..][..x.len()];
            self.dispatch(Combine { x, y, f: Plus });
        });
    }

    /// `x += scale * y`, rounded once.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_scaled(self, x: &mut [f32], y: &[f32], scale: f32) {
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        by_rows(x, 1, |first, x| {
            let y = &y[first..][..x.len()];
            self.dispatch(Combine { x, y, f: PlusScaled { scale } });
        });
    }

    /// Adds `bias`, `[width]`, to every row of `x`, `[tokens, width]`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn add_bias(self, x: &mut [f32], bias: &[f32]) {
        assert!(x.len().is_multiple_of(bias.len()), "x is not whole rows of {}", bias.len());
        by_rows(x, bias.len(), |_, rows| {
            for x in rows.chunks_exact_mut(bias.len()) {
                self.dispatch(Combine { x, y: bias, f: Plus });
            }
        });
    }

    /// Rotary position embedding, in place, as Hugging Face's Llama has it (`rotate_half`): element `i` of a head
    /// turns with element `i + head_dim / 2`.
    ///
    /// `x` is `[tokens, heads * head_dim]`; `cos` and `sin` are `[tokens, head_dim / 2]`, the angles of each token's
    /// own position.
    ///
    /// # Panics
    /// If `head_dim` is odd or the lengths do not fit together.
    pub fn rope(self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        let (width, half) = (heads * head_dim, head_dim / 2);
        assert!(head_dim.is_multiple_of(2), "head_dim {head_dim} is odd");
        assert!(x.len().is_multiple_of(width), "x is not whole rows of {width}");
        let tokens = x.len().checked_div(width).unwrap_or(0);
        assert_eq!((cos.len(), sin.len()), (tokens * half, tokens * half), "cos and sin need {tokens} x {half}");
        by_rows(x, width, |first, x| {
            let angles = first * half..(first + x.len() / width) * half;
            self.dispatch(Rope { x, heads, head_dim, cos: &cos[angles.clone()], sin: &sin[angles] });
        });
    }
}

/// Runs `work` on runs of whole rows of `x`, with the index of the first row of each run.
pub(super) fn by_rows(x: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if x.is_empty() {
        return;
    }
    let rows = (TASK / width).max(1);
    if x.len() <= rows * width {
        work(0, x);
    } else {
        for_each_piece(x, rows * width, |index, run| work(index * rows, run));
    }
}

/// A function of two vectors, lane by lane. Not a closure, because a closure cannot be marked `#[inline(always)]` and
/// would then miss the instruction set's features.
pub(super) trait Lanewise {
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32;
}

/// `x = f(x, y)`, element by element, on slices of one length.
#[inline(always)]
pub(super) fn combine<S: Simd>(simd: S, x: &mut [f32], y: &[f32], f: impl Lanewise) {
    let (x_vectors, x_tail) = x.as_chunks_mut::<16>();
    let (y_vectors, y_tail) = y.as_chunks::<16>();
    for (x, y) in x_vectors.iter_mut().zip(y_vectors) {
        simd.store(f.apply(simd, simd.load(x), simd.load(y)), x);
    }
    let last = f.apply(simd, simd.load_partial(x_tail), simd.load_partial(y_tail));
    simd.store_partial(last, x_tail);
}

/// `combine` of whole slices.
pub(super) struct Combine<'a, F> {
    pub x: &'a mut [f32],
    pub y: &'a [f32],
    pub f: F,
}

impl<F: Lanewise> Kernel for Combine<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        combine(simd, self.x, self.y, self.f);
    }
}

/// `x + y`.
pub(super) struct Plus;

impl Lanewise for Plus {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.add(x, y)
    }
}

/// `x + scale * y`.
struct PlusScaled {
    scale: f32,
}

impl Lanewise for PlusScaled {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.mul_add(simd.splat(self.scale), y, x)
    }
}

/// `silu(x) * y`.
struct SiluTimes;

impl Lanewise for SiluTimes {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.mul(silu(simd, x), y)
    }
}

struct Rope<'a> {
    x: &'a mut [f32], // [tokens, heads * head_dim]
    heads: usize,
    head_dim: usize,
    cos: &'a [f32], // [tokens, head_dim / 2]
    sin: &'a [f32], // [tokens, head_dim / 2]
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.head_dim / 2;
        let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (row, (cos, sin)) in self.x.chunks_exact_mut(self.heads * self.head_dim).zip(angles) {
            let (cos, cos_tail) = cos.as_chunks::<16>();
            let (sin, sin_tail) = sin.as_chunks::<16>();
            for head in row.chunks_exact_mut(self.head_dim) {
                let (first, second) = head.split_at_mut(half);
                let (first, first_tail) = first.as_chunks_mut::<16>();
                let (second, second_tail) = second.as_chunks_mut::<16>();
                for ((a, b), (c, s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                    let (x, y) = rotate(simd, simd.load(a), simd.load(b), simd.load(c), simd.load(s));
                    simd.store(x, a);
                    simd.store(y, b);
                }
                let (a, b) = (simd.load_partial(first_tail), simd.load_partial(second_tail));
                let (x, y) = rotate(simd, a, b, simd.load_partial(cos_tail), simd.load_partial(sin_tail));
                simd.store_partial(x, first_tail);
                simd.store_partial(y, second_tail);
            }
        }
    }
}

/// The vector `(first, second)` turned by an angle.
#[inline(always)]
fn rotate<S: Simd>(simd: S, first: S::F32, second: S::F32, cos: S::F32, sin: S::F32) -> (S::F32, S::F32) {
    let turned = simd.mul_add(second, simd.neg(sin), simd.mul(first, cos));
    (turned, simd.mul_add(first, sin, simd.mul(second, cos)))
}
