//! Weight rows of the products of a few tokens: codes in registers, scales and zero points as f32.
//!
//! Loads of 64 bytes run past the end of a row into the next, where activations are zero; rows from which they would run
//! past the last one are copied first.

use std::ops::Range;

use super::dequantize::zero_point;
use super::gemv_codes::{Decode, Hold};
use super::gemv_prepare::{Prepared, STEP};
use super::matmul::Output;
use super::simd::{Aligned, LANES, Simd};
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

/// Groups that are widened at a time.
pub(super) const GROUPS: usize = 512;

/// Room for groups: a load starts up to seven groups early and ends at a whole step, and a vector starts at any group.
const ROOM: usize = GROUPS + 2 * STEP;

/// The most tokens that meet a row at a time.
const MOST_TOKENS: usize = 4;

/// Steps whose groups are widened at a time where lanes have scales of their own.
pub(super) const STEPS_A_LOAD: usize = 4;

/// How far ahead of its load a byte is asked for. The hardware follows a row only to the end of its page, and requests for
/// the first-level cache would take the few places in which loads wait: two thirds of the speed were measured with them.
pub(super) const AHEAD: usize = 1 << 13;

/// Some rows of a weight times all tokens, row after row: memory answers one rising stream faster than several.
pub(super) struct Task<'a> {
    pub(super) x: &'a Prepared,
    pub(super) w: &'a Matrix<'a>,
    pub(super) rows: Range<usize>,
    pub(super) out: &'a Output<'a>,
}

/// `T` tokens times rows whose groups are widened together.
pub(super) trait Rows<S: Simd, const T: usize>: Copy {
    /// Whether one token meets two rows at a time where there are registers for both: they share the loads of its
    /// activations, but are two streams for memory.
    const PAIRS: bool;

    /// Adds the lanes of a range of the groups of each of `R` rows, which starts with a step. They were widened to `at`.
    ///
    /// # Safety
    /// The activations have `T` tokens or more and the steps of `w`, and `rows` come from `w`, which has those groups and was
    /// made for the codes that this reads.
    unsafe fn add_groups<const R: usize>(
        self,
        w: &Packed<S>,
        rows: [Codes; R],
        range: Range<usize>,
        groups: &Groups,
        at: [usize; R],
        out: &mut [[S::F32; T]; R],
    );
}

impl Task<'_> {
    /// The products of `T` tokens from `token` on. Gives `T`.
    ///
    /// # Safety
    /// The activations of `x` have `T` tokens or more and the steps of `w`, which was made for the codes that `x` reads.
    #[inline(always)]
    pub(super) unsafe fn each_row<S: Simd, X: Rows<S, T>, const T: usize>(
        &self,
        w: &Packed<S>,
        token: usize,
        x: X,
        rows_at_hand: &mut RowsAtHand,
    ) -> usize {
        let simd = w.simd;
        let rows_at_once = (GROUPS / w.groups).clamp(1, LANES);
        let RowsAtHand { groups, lanes } = rows_at_hand;
        let Some(lanes) = lanes.first_chunk_mut::<T>() else {
            unreachable!("there is room for the lanes of all tokens")
        };
        for start in self.rows.clone().step_by(rows_at_once) {
            let rows = start..self.rows.end.min(start + rows_at_once);
            if w.groups <= GROUPS {
                groups.load_rows(w, rows.clone());
            }
            let mut i = 0;
            while i < rows.len() {
                // SAFETY: the caller's promise.
                i += unsafe {
                    if X::PAIRS && S::REGISTERS >= 32 && T == 1 && i + 2 <= rows.len() {
                        add_rows::<S, X, T, 2>(w, start, i, x, groups, lanes)
                    } else {
                        add_rows::<S, X, T, 1>(w, start, i, x, groups, lanes)
                    }
                };
            }
            for (t, lanes) in lanes.iter().enumerate() {
                let sums = simd.sums(lanes);
                // SAFETY: every task has rows of its own, and this one makes one reference at a time.
                simd.store_partial(sums, unsafe { self.out.segment(token + t, rows.clone()) });
            }
        }
        T
    }

    /// Adds the lanes and writes the outputs of `T` tokens from `token` on.
    #[inline(always)]
    pub(super) fn store<S: Simd, const T: usize>(&self, simd: S, token: usize, row: usize, out: &[S::F32; T]) {
        for (t, &out) in out.iter().enumerate() {
            // SAFETY: every task has rows of its own, and this one makes one reference at a time.
            unsafe { self.out.segment(token + t, row..row + 1) }.copy_from_slice(&[simd.sum(out)]);
        }
    }
}

/// The lanes of `R` rows from `start + i` on, of which there is one where a row has more than [`GROUPS`]. Gives `R`.
///
/// # Safety
/// The activations of `x` have `T` tokens or more and the steps of `w`.
#[inline(always)]
unsafe fn add_rows<S: Simd, X: Rows<S, T>, const T: usize, const R: usize>(
    w: &Packed<S>,
    start: usize,
    i: usize,
    x: X,
    groups: &mut Groups,
    lanes: &mut [[Aligned<[f32; LANES]>; LANES]; T],
) -> usize {
    let simd = w.simd;
    let mut rows = [w.row(start + i); R];
    let mut at = [i * w.groups; R];
    for r in 1..R {
        rows[r] = w.row(start + i + r);
        at[r] += r * w.groups;
    }
    let mut out = [[simd.splat(0.0); T]; R];
    for first in (0..w.groups).step_by(GROUPS) {
        let count = GROUPS.min(w.groups - first);
        if R == 1 && w.groups > GROUPS {
            groups.load(w, start + i, first, count);
            at[0] = first;
        }
        // SAFETY: the caller's promise; steps meet whole numbers of groups that GROUPS is a multiple of.
        unsafe { x.add_groups(w, rows, first..first + count, groups, at, &mut out) };
    }
    for (r, out) in out.into_iter().enumerate() {
        for (lanes, out) in lanes.iter_mut().zip(out) {
            simd.store(out, &mut lanes[i + r]);
        }
    }
    R
}

/// What a thread keeps from task to task, for its memory.
pub(super) struct Scratch {
    pub(super) rows: RowsAtHand,
    /// The codes of the last rows, with room for loads past them.
    pub(super) tail: Vec<u8>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        let lanes = [[Aligned([0.0; LANES]); LANES]; MOST_TOKENS];
        Self { rows: RowsAtHand { groups: Groups::new(), lanes }, tail: Vec::new() }
    }
}

/// The rows whose groups are widened together.
pub(super) struct RowsAtHand {
    pub(super) groups: Groups,
    /// The lanes of their products, yet to be added. [tokens, rows, lanes]
    lanes: [[Aligned<[f32; LANES]>; LANES]; MOST_TOKENS],
}

/// The quantized matrix that rows are taken from.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a, S: Simd> {
    pub(super) simd: S,
    pub(super) layout: Layout,
    pub(super) steps: usize,
    /// Groups of a row.
    pub(super) groups: usize,
    pub(super) unpack: S::Unpack,
    bits: usize,
    codes: &'a [u8],
    code_bytes: usize,
    /// Bytes that the loads of a row may touch.
    loaded_bytes: usize,
    /// The first row that is taken from `tail`.
    tail_row: usize,
    tail: &'a [u8],
    scale_type: FloatType,
    scales: &'a [u8],
    zeros: &'a [u8],
    zero_bytes: usize,
}

/// The codes of one row: at least as many bytes as its loads touch.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a>(&'a [u8]);

impl<'a, S: Simd> Packed<'a, S> {
    /// The rows of `w` before `end`; `None` for a float matrix.
    #[inline(always)]
    pub(super) fn new<H: Hold>(simd: S, w: &Matrix<'a>, end: usize, tail: &'a mut Vec<u8>) -> Option<Self> {
        let Data::Quantized { layout, codes, scale_type, scales, zeros } = w.data() else { return None };
        let bits = layout.grid.stream_bits().unwrap_or(8);
        let (steps, code_bytes) = (w.cols().div_ceil(H::COLUMNS), layout.code_bytes(w.cols()));
        let loaded_bytes = H::offset(bits as usize, steps.saturating_sub(1)) + H::BYTES;
        let tail_row = (codes.len() + code_bytes).saturating_sub(loaded_bytes) / code_bytes.max(1);
        tail.clear();
        if tail_row < end {
            tail.extend_from_slice(&codes[tail_row * code_bytes..]);
            tail.resize(tail.len() + loaded_bytes, 0);
        }
        Some(Self {
            simd,
            layout,
            steps,
            groups: layout.groups(w.cols()),
            unpack: simd.unpack(bits),
            bits: bits as usize,
            codes,
            code_bytes,
            loaded_bytes,
            tail_row,
            tail,
            scale_type,
            scales,
            zeros,
            zero_bytes: layout.zero_bytes(w.cols()),
        })
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> Codes<'a> {
        let (bytes, row) = if row < self.tail_row { (self.codes, row) } else { (self.tail, row - self.tail_row) };
        Codes(&bytes[row * self.code_bytes..][..self.loaded_bytes])
    }

    /// The bytes from the codes of step `step` of `row` on.
    ///
    /// # Safety
    /// `step` is below [`steps`](Self::steps), `row` comes from [`row`](Self::row), and `H` is that of [`new`](Self::new).
    #[inline(always)]
    pub(super) unsafe fn bytes<'r, H: Hold>(&self, row: Codes<'r>, step: usize) -> &'r [u8] {
        let offset = H::offset(self.bits, step);
        debug_assert!(step < self.steps && offset + H::BYTES <= row.0.len());
        // SAFETY: the row has as many bytes as the load of the last step touches, which is the caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(row.0.as_ptr().add(offset), H::BYTES) };
        for line in (0..H::BYTES).step_by(64) {
            self.simd.prefetch(bytes.as_ptr().wrapping_add(AHEAD + line));
        }
        bytes
    }

    /// The codes of step `step` of `row`.
    ///
    /// # Safety
    /// As for [`bytes`](Self::bytes).
    #[inline(always)]
    pub(super) unsafe fn codes<D: Decode>(&self, row: Codes, step: usize) -> S::U8 {
        // SAFETY: the caller's promise.
        D::codes(self.simd, &self.unpack, unsafe { self.bytes::<D>(row, step) }, step)
    }

    /// The zero point of every group, unless each has its own.
    pub(super) fn constant_zero(&self) -> Option<f32> {
        constant_zero(self.layout.grid)
    }
}

/// The zero point of every group, unless each has its own.
pub(super) fn constant_zero(grid: Grid) -> Option<f32> {
    (!grid.has_zero_points()).then(|| zero_point(grid, &[], 0))
}

/// The first `N` bytes at `at`, followed by zeros where `bytes` ends before.
#[inline(always)]
fn window<'a, const N: usize>(bytes: &'a [u8], at: usize, padded: &'a mut [u8; N]) -> &'a [u8; N] {
    let rest = &bytes[at..];
    match rest.first_chunk() {
        Some(window) => window,
        None => {
            padded[..rest.len()].copy_from_slice(rest);
            padded
        }
    }
}

/// Scales and zero points of consecutive groups of a row.
pub(super) struct Groups {
    /// A multiple of eight, so that its zero points start at a whole byte.
    first: usize,
    scales: Aligned<[f32; ROOM]>,
    zeros: Aligned<[f32; ROOM]>,
}

impl Groups {
    const fn new() -> Self {
        Self { first: 0, scales: Aligned([0.0; ROOM]), zeros: Aligned([0.0; ROOM]) }
    }

    /// Widens `count` groups of a row, at most [`GROUPS`], from `first` on. Zero points only where each group has its own.
    #[inline(always)]
    pub(super) fn load<S: Simd>(&mut self, w: &Packed<S>, row: usize, first: usize, count: usize) {
        self.first = first / 8 * 8;
        let count = first - self.first + count;
        self.widen(w, row, self.first, count);
        self.widen_zeros(w, row, self.first, count, 0);
    }

    /// Widens all groups of some rows, at most [`GROUPS`], in the order of the rows.
    #[inline(always)]
    pub(super) fn load_rows<S: Simd>(&mut self, w: &Packed<S>, rows: Range<usize>) {
        self.first = 0;
        self.widen(w, rows.start, 0, rows.len() * w.groups);
        for (i, row) in rows.enumerate() {
            self.widen_zeros(w, row, 0, w.groups, i * w.groups);
        }
    }

    /// Widens `count` scales that follow each other.
    #[inline(always)]
    fn widen<S: Simd>(&mut self, w: &Packed<S>, row: usize, first: usize, count: usize) {
        let simd = w.simd;
        let start = (row * w.groups + first) * w.scale_type.bytes();
        for (i, to) in self.scales.as_chunks_mut::<LANES>().0[..count.div_ceil(LANES)].iter_mut().enumerate() {
            let v = match w.scale_type {
                FloatType::F32 => simd.load_f32(window(w.scales, start + i * 64, &mut [0; 64])),
                _ => simd.load_f16(window(w.scales, start + i * 32, &mut [0; 32])),
            };
            simd.store(v, to);
        }
    }

    /// Widens `count` zero points of a row to `at`.
    #[inline(always)]
    fn widen_zeros<S: Simd>(&mut self, w: &Packed<S>, row: usize, first: usize, count: usize, at: usize) {
        let simd = w.simd;
        let Grid::Int { bits, symmetric: false } = w.layout.grid else { return };
        let start = row * w.zero_bytes + first / 8 * bits as usize;
        for (i, to) in self.zeros[at..].as_chunks_mut::<STEP>().0[..count.div_ceil(STEP)].iter_mut().enumerate() {
            let codes = simd.unpack64(window(w.zeros, start + i * 8 * bits as usize, &mut [0; STEP]), bits);
            for (to, codes) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(codes.as_chunks::<LANES>().0) {
                simd.store(simd.load_u8(codes), to);
            }
        }
    }

    /// Where a group among those that were loaded lies, and `room` more after it.
    #[inline(always)]
    fn index(&self, group: usize, room: usize) -> usize {
        let index = group.wrapping_sub(self.first);
        assert!(index <= ROOM - room);
        index
    }

    /// The scales and zero points of `count` groups from `first` on, among those that were loaded.
    #[inline(always)]
    pub(super) fn loaded(&self, first: usize, count: usize) -> (&[f32], &[f32]) {
        let start = self.index(first, count);
        (&self.scales[start..start + count], &self.zeros[start..start + count])
    }

    /// [`loaded`](Self::loaded) from each of several on.
    #[inline(always)]
    pub(super) fn each_loaded<const R: usize>(&self, first: [usize; R], count: usize) -> [(&[f32], &[f32]); R] {
        let mut loaded = [self.loaded(first[0], count); R];
        for r in 1..R {
            loaded[r] = self.loaded(first[r], count);
        }
        loaded
    }

    /// The scale of each lane's group; `groups` counts from `base`.
    #[inline(always)]
    pub(super) fn lane_scales<S: Simd>(&self, simd: S, base: usize, groups: &[i32; LANES], near: bool) -> S::F32 {
        lanes(simd, &self.scales, self.index(base, STEP), groups, near)
    }

    /// The zero point of each lane's group; `groups` counts from `base`.
    #[inline(always)]
    pub(super) fn lane_zeros<S: Simd>(&self, simd: S, base: usize, groups: &[i32; LANES], near: bool) -> S::F32 {
        lanes(simd, &self.zeros, self.index(base, STEP), groups, near)
    }
}

/// `from[base + index]` for each lane; `base` is below `ROOM - STEP`. With `near`, every index is below 16.
#[inline(always)]
fn lanes<S: Simd>(simd: S, from: &[f32; ROOM], base: usize, index: &[i32; LANES], near: bool) -> S::F32 {
    // One step meets at most 64 groups.
    let Some(from) = from[base..].first_chunk::<STEP>() else { unreachable!("there is room after the last group") };
    if near {
        let [from, ..] = from.as_chunks::<LANES>().0 else { unreachable!("a step is more than one vector") };
        return simd.permute(from, index);
    }
    let mut v = [0.0; LANES];
    for (v, &index) in v.iter_mut().zip(index) {
        *v = from[index as usize % STEP];
    }
    simd.load(&v)
}
