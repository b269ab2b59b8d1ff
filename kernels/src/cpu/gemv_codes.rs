//! How rows hold their codes, known when a loop is compiled.
//!
//! [`Decode`] gives steps of 64 columns in their order. [`Wide`] gives steps of 64 to 256, in which a lane has columns of
//! one block, in whatever order is unpacked fastest: activations are laid out the same way.

use super::gemv_prepare::STEP;
use super::simd::{Aligned, Simd, TERNARY_BYTES};
use crate::bits::TERNARY_PER_BYTE;

/// Columns of a wide step of a dense stream whose groups are not shorter than 64 columns, or that has four bits.
pub(super) const WIDE: usize = 2 * STEP;

/// Columns of a wide step of ternary codes.
pub(super) const TERNARY_WIDE: usize = 4 * STEP;

/// Where the codes of a step lie.
pub(super) trait Hold: Copy {
    /// Columns of a step.
    const COLUMNS: usize;
    /// Bytes that are loaded for a step, whole cache lines.
    const BYTES: usize;

    /// The byte in which the codes of step `step` start.
    fn offset(bits: usize, step: usize) -> usize;
}

/// Codes of 64 columns in one vector.
pub(super) trait Decode: Hold {
    /// The codes of a step, so that `(code - zero) * scale` is the weight: binary codes are doubled.
    fn codes<S: Simd>(simd: S, unpack: &S::Unpack, bytes: &[u8], step: usize) -> S::U8;
}

/// Codes in one or more vectors, each lane of which has columns of one block.
pub(super) trait Wide: Hold {
    /// Vectors of activation codes to a step.
    const VECTORS: usize;
    /// Whether one token meets two rows at a time where there are registers for both.
    const PAIRS: bool = true;
    /// The codes of a step.
    type Codes<S: Simd>: Copy;

    /// The codes of a step, so that `(code - zero) * scale` is the weight: binary codes are doubled.
    fn codes<S: Simd>(simd: S, unpack: &S::Unpack, bytes: &[u8], step: usize) -> Self::Codes<S>;

    /// Adds to each lane its dot product with [`VECTORS`](Self::VECTORS) vectors of activation codes.
    fn dot<S: Simd>(simd: S, codes: Self::Codes<S>, a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32;
}

/// The first `N` of the bytes of a step.
#[inline(always)]
fn first<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    match bytes.first_chunk() {
        Some(bytes) => bytes,
        None => unreachable!("a step has as many bytes as its codes take"),
    }
}

/// A dense stream.
#[derive(Clone, Copy)]
pub(super) struct Stream;

impl Hold for Stream {
    const COLUMNS: usize = STEP;
    const BYTES: usize = 64;

    #[inline(always)]
    fn offset(bits: usize, step: usize) -> usize {
        step * (STEP / 8 * bits)
    }
}

impl Decode for Stream {
    #[inline(always)]
    fn codes<S: Simd>(simd: S, unpack: &S::Unpack, bytes: &[u8], _: usize) -> S::U8 {
        simd.codes(unpack, first(bytes))
    }
}

/// Five ternary codes to a byte.
#[derive(Clone, Copy)]
pub(super) struct Ternary;

impl Hold for Ternary {
    const COLUMNS: usize = STEP;
    const BYTES: usize = 64;

    #[inline(always)]
    fn offset(_: usize, step: usize) -> usize {
        step * STEP / TERNARY_PER_BYTE
    }
}

impl Decode for Ternary {
    #[inline(always)]
    fn codes<S: Simd>(simd: S, _: &S::Unpack, bytes: &[u8], step: usize) -> S::U8 {
        simd.ternary_codes(first(bytes), step * STEP % TERNARY_PER_BYTE)
    }
}

/// Adds the dot products of two vectors.
#[inline(always)]
fn dot_both<S: Simd>(
    simd: S,
    [u, v]: [S::U8; 2],
    a: &[Aligned<[i8; STEP]>],
    start: S::I32,
    eight_bits: bool,
) -> S::I32 {
    let [a, b] = a else { unreachable!("a step has two vectors") };
    simd.dot_codes(v, b, simd.dot_codes(u, a, start, eight_bits), eight_bits)
}

/// A dense stream whose groups are shorter than 64 columns, which are taken as they come.
#[derive(Clone, Copy)]
pub(super) struct Single<const EIGHT_BITS: bool>;

impl<const EIGHT_BITS: bool> Hold for Single<EIGHT_BITS> {
    const COLUMNS: usize = STEP;
    const BYTES: usize = 64;

    #[inline(always)]
    fn offset(bits: usize, step: usize) -> usize {
        Stream::offset(bits, step)
    }
}

impl<const EIGHT_BITS: bool> Wide for Single<EIGHT_BITS> {
    const VECTORS: usize = 1;
    type Codes<S: Simd> = S::U8;

    #[inline(always)]
    fn codes<S: Simd>(simd: S, unpack: &S::Unpack, bytes: &[u8], _: usize) -> S::U8 {
        simd.codes(unpack, first(bytes))
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, codes: S::U8, a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32 {
        let [a] = a else { unreachable!("a step has one vector") };
        simd.dot_codes(codes, a, start, EIGHT_BITS)
    }
}

/// A stream of codes of four bits: the even columns, then the odd ones.
#[derive(Clone, Copy)]
pub(super) struct Nibbles;

impl Hold for Nibbles {
    const COLUMNS: usize = WIDE;
    const BYTES: usize = 64;

    #[inline(always)]
    fn offset(_: usize, step: usize) -> usize {
        step * STEP
    }
}

impl Wide for Nibbles {
    const VECTORS: usize = 2;
    type Codes<S: Simd> = [S::U8; 2];

    #[inline(always)]
    fn codes<S: Simd>(simd: S, _: &S::Unpack, bytes: &[u8], _: usize) -> [S::U8; 2] {
        simd.nibbles(first(bytes))
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, codes: [S::U8; 2], a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32 {
        dot_both(simd, codes, a, start, false)
    }
}

/// A stream of codes of any width: columns 0 to 31 and 64 to 95, then the rest. `LINES` is 1 up to four bits, otherwise 2.
#[derive(Clone, Copy)]
pub(super) struct Halves<const LINES: usize>;

impl<const LINES: usize> Hold for Halves<LINES> {
    const COLUMNS: usize = WIDE;
    const BYTES: usize = 64 * LINES;

    #[inline(always)]
    fn offset(bits: usize, step: usize) -> usize {
        step * (WIDE / 8 * bits)
    }
}

impl<const LINES: usize> Wide for Halves<LINES> {
    const VECTORS: usize = 2;
    type Codes<S: Simd> = [S::U8; 2];

    #[inline(always)]
    fn codes<S: Simd>(simd: S, unpack: &S::Unpack, bytes: &[u8], _: usize) -> [S::U8; 2] {
        if LINES == 1 { simd.halves(unpack, first(bytes)) } else { simd.halves_of_two(unpack, first(bytes)) }
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, codes: [S::U8; 2], a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32 {
        dot_both(simd, codes, a, start, false)
    }
}

/// A stream of codes of eight bits, in the order of [`Halves`].
#[derive(Clone, Copy)]
pub(super) struct Bytes;

impl Hold for Bytes {
    const COLUMNS: usize = WIDE;
    const BYTES: usize = WIDE;

    #[inline(always)]
    fn offset(_: usize, step: usize) -> usize {
        step * WIDE
    }
}

impl Wide for Bytes {
    const VECTORS: usize = 2;
    const PAIRS: bool = false;
    type Codes<S: Simd> = [S::U8; 2];

    #[inline(always)]
    fn codes<S: Simd>(simd: S, _: &S::Unpack, bytes: &[u8], _: usize) -> [S::U8; 2] {
        simd.halves_of_bytes(first(bytes))
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, codes: [S::U8; 2], a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32 {
        dot_both(simd, codes, a, start, true)
    }
}

/// Five ternary codes to a byte, one vector for each of the five, in which four lanes have the bytes that meet a block of
/// 64 columns.
#[derive(Clone, Copy)]
pub(super) struct TernaryBlocks;

/// Where each column of a step of [`TernaryBlocks`] stands among all bytes of its vectors, for each phase: the digit with
/// which the step starts.
pub(super) const TERNARY_COLUMNS: [[u16; TERNARY_WIDE]; TERNARY_PER_BYTE] = {
    let mut table = [[0; TERNARY_WIDE]; TERNARY_PER_BYTE];
    let mut phase = 0;
    while phase < TERNARY_PER_BYTE {
        let mut column = 0;
        while column < TERNARY_WIDE {
            let (at, block) = (phase + column, column / STEP);
            // Vectors start with the last of the five codes, the highest digit.
            let vector = TERNARY_PER_BYTE - 1 - at % TERNARY_PER_BYTE;
            let byte = block * 16 + at / TERNARY_PER_BYTE - TERNARY_BYTES[phase][block];
            table[phase][column] = (vector * STEP + byte) as u16;
            column += 1;
        }
        phase += 1;
    }
    table
};

/// The digit with which a step of [`TernaryBlocks`] starts.
pub(super) fn ternary_phase(step: usize) -> usize {
    step * TERNARY_WIDE % TERNARY_PER_BYTE
}

impl Hold for TernaryBlocks {
    const COLUMNS: usize = TERNARY_WIDE;
    const BYTES: usize = 64;

    #[inline(always)]
    fn offset(_: usize, step: usize) -> usize {
        step * TERNARY_WIDE / TERNARY_PER_BYTE
    }
}

impl Wide for TernaryBlocks {
    const VECTORS: usize = TERNARY_PER_BYTE;
    type Codes<S: Simd> = S::Digits;

    #[inline(always)]
    fn codes<S: Simd>(simd: S, _: &S::Unpack, bytes: &[u8], step: usize) -> S::Digits {
        simd.digits(first(bytes), ternary_phase(step))
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, codes: S::Digits, a: &[Aligned<[i8; STEP]>], start: S::I32) -> S::I32 {
        let [a, b, c, d, e] = a else { unreachable!("a step has a vector for each digit") };
        simd.dot_digits(&codes, [a, b, c, d, e], start)
    }
}
