//! The vector that every kernel is written over: 16 lanes on every instruction set.
//!
//! The width is logical. AVX-512 holds it in one register, AVX2 in two, scalar code in an array; lane order, reduction
//! trees and the use of fused multiply-add are the same everywhere, so a kernel gives bit-identical results on every
//! instruction set (which NaN comes out of arithmetic on NaNs is the one thing left open).
//!
//! A type that implements [`Simd`] is a token: it can only be made on a CPU that has its instructions, which is what
//! makes the methods safe to call.

use std::ops::{Deref, DerefMut};

/// Lanes of the logical vector.
pub const LANES: usize = 16;

/// Values that start a cache line: vectors that lie across two lines load at about half the speed.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// For each of the five digits of a ternary byte, a factor that leaves, modulo 2^16, the fraction of the byte over
/// 3^(digit + 1): the high half of three times that is the digit.
pub(super) const TERNARY_FACTORS: [u16; 5] = [21846, 7282, 2428, 810, 270];

/// For each phase, where each of 64 ternary codes lies: its byte, and the factor of its digit. Both in the order of two
/// vectors of 16-bit words that a saturating pack within 128-bit lanes makes one: eight codes of the first, eight of the
/// second.
pub(super) const TERNARY_PLACES: [[([u8; 64], [u16; 32]); 2]; 5] = {
    let mut table = [[([0x80; 64], [0; 32]); 2]; 5];
    let mut phase = 0;
    while phase < 5 {
        let mut i = 0;
        while i < 64 {
            let (half, word) = (i / 8 % 2, i / 16 * 8 + i % 8);
            table[phase][half].0[2 * word] = ((phase + i) / 5) as u8;
            table[phase][half].1[word] = TERNARY_FACTORS[(phase + i) % 5];
            i += 1;
        }
        phase += 1;
    }
    table
};

/// For each phase of 256 ternary codes, the byte in which each of its four blocks of 64 starts; 16 bytes have them all.
pub(super) const TERNARY_BYTES: [[usize; 4]; 5] = {
    let mut table = [[0; 4]; 5];
    let mut phase = 0;
    while phase < 5 {
        let mut block = 0;
        while block < 4 {
            table[phase][block] = (phase + 64 * block) / 5;
            block += 1;
        }
        phase += 1;
    }
    table
};

/// Operations on the logical vector. Kernels reach an implementation through [`Cpu::dispatch`](super::Cpu::dispatch).
pub trait Simd: Copy + Send + Sync + 'static {
    /// 16 lanes of f32.
    type F32: Copy + Send + Sync;
    /// 16 lanes of i32.
    type I32: Copy + Send + Sync;

    /// 64 bytes.
    type U8: Copy + Send + Sync;
    /// How [`codes`](Self::codes) unpacks codes of one width.
    type Unpack: Copy + Send + Sync;
    /// What [`digits`](Self::digits) makes of ternary codes.
    type Digits: Copy + Send + Sync;

    /// How many logical vectors fit in registers: the size of a matrix tile follows from it.
    const REGISTERS: usize;

    /// Every lane `value`.
    fn splat(self, value: f32) -> Self::F32;
    fn load(self, from: &[f32; 16]) -> Self::F32;
    /// Loads at most 16 values; the remaining lanes are zero.
    fn load_partial(self, from: &[f32]) -> Self::F32;
    fn store(self, v: Self::F32, to: &mut [f32; 16]);
    /// Stores the first `to.len()` lanes, at most 16.
    fn store_partial(self, v: Self::F32, to: &mut [f32]);

    /// Loads little-endian f32 from bytes of any alignment.
    fn load_f32(self, from: &[u8; 64]) -> Self::F32;
    /// Loads little-endian IEEE half-precision values and widens them.
    fn load_f16(self, from: &[u8; 32]) -> Self::F32;
    /// Loads little-endian bfloat16 values and widens them.
    fn load_bf16(self, from: &[u8; 32]) -> Self::F32;
    /// Converts unsigned bytes.
    fn load_u8(self, from: &[u8; 16]) -> Self::F32;
    /// Converts lanes that hold integers to bytes, saturating at 0 and 255; beyond the range of i32 the result is
    /// not specified.
    fn to_u8(self, v: Self::F32) -> [u8; 16];

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c` with one rounding.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a < b ? a : b`, so `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a > b ? a : b`, so `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn abs(self, v: Self::F32) -> Self::F32;
    fn neg(self, v: Self::F32) -> Self::F32;
    /// Rounds to the nearest integer, halves to even.
    fn round_even(self, v: Self::F32) -> Self::F32;
    /// `a >= b ? x : y`, so `y` where either is NaN.
    fn select_ge(self, a: Self::F32, b: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32;
    /// `v * 2^n` for lanes of `n` that hold integers from -252 to 254; `v * 2^(n/2)` must not overflow or be subnormal.
    fn scale_pow2(self, v: Self::F32, n: Self::F32) -> Self::F32;

    /// Transposes 16 rows of four 32-bit words of any kind: lane `r` of vector `k` is word `k` of row `r`.
    fn transpose_words(self, rows: [&[u8; 16]; 16]) -> [Self::F32; 4];
    /// [`transpose_words`](Self::transpose_words) of rows whose byte `i` is what lies at `order[i]`, 0 to 15.
    fn transpose_ordered(self, rows: [&[u8; 16]; 16], order: &[u8; 16]) -> [Self::F32; 4];
    /// Four codes of `bits` bits, 1 to 8, from bit `shift` of each 32-bit lane on, to the four bytes of the lane, first
    /// code in the lowest bits. All of them lie within the lane.
    fn unpack_lanes(self, words: Self::F32, bits: u32, shift: u32) -> Self::F32;

    /// Sum of the lanes: `i` and `i + 8` first, then `i + 4`, `i + 2`, `i + 1`.
    fn sum(self, v: Self::F32) -> f32;
    /// [`sum`](Self::sum) of each of 16 vectors.
    #[inline(always)]
    fn sums(self, from: &[Aligned<[f32; 16]>; 16]) -> Self::F32 {
        let mut sums = [0.0; 16];
        for (sum, from) in sums.iter_mut().zip(from) {
            *sum = self.sum(self.load(from));
        }
        self.load(&sums)
    }
    /// Largest lane, folded with [`max`](Self::max) in the order of [`sum`](Self::sum).
    fn max_lane(self, v: Self::F32) -> f32;
    /// Smallest lane, folded with [`min`](Self::min) in the order of [`sum`](Self::sum).
    fn min_lane(self, v: Self::F32) -> f32;

    /// Asks for the cache line at `at`, which may be any address, in the second-level cache.
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}

    /// Every lane `value`.
    fn splat_i32(self, value: i32) -> Self::I32;
    fn load_i32(self, from: &[i32; 16]) -> Self::I32;
    fn store_i32(self, v: Self::I32, to: &mut [i32; 16]);
    /// `a * b`; wraps.
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Adds the products of the four unsigned bytes of each lane of `u` and the four signed bytes of that lane of `a`,
    /// exactly; the sum wraps.
    fn dot_u8i8(self, u: Self::I32, a: Self::I32, acc: Self::I32) -> Self::I32;
    /// [`dot_u8i8`](Self::dot_u8i8) where every byte of `u` is below 128.
    #[inline(always)]
    fn dot_u7i8(self, u: Self::I32, a: Self::I32, acc: Self::I32) -> Self::I32 {
        self.dot_u8i8(u, a, acc)
    }
    /// Converts with one rounding.
    fn i32_to_f32(self, v: Self::I32) -> Self::F32;
    /// Sum of the lanes; wraps.
    fn sum_i32(self, v: Self::I32) -> i32;

    /// Unpacks 64 codes of `bits` bits, 1 to 8, first code in the lowest bits. Reads exactly the first `8 * bits`
    /// bytes of `stream`.
    ///
    /// # Panics
    /// If `stream` is shorter than that, or `bits` is out of range.
    fn unpack64(self, stream: &[u8], bits: u32) -> [u8; 64];

    /// What [`codes`](Self::codes) needs for codes of `bits` bits, 1 to 8.
    ///
    /// # Panics
    /// If `bits` is out of range.
    fn unpack(self, bits: u32) -> Self::Unpack;

    /// Unpacks 64 codes, first code in the lowest bits, into registers; those of one bit are doubled. Bytes after the codes
    /// are ignored.
    fn codes(self, unpack: &Self::Unpack, stream: &[u8; 64]) -> Self::U8;

    /// Loads 64 bytes.
    fn load_bytes(self, from: &[u8; 64]) -> Self::U8;

    /// The low and the high four bits of every byte: 128 codes of four bits, the even and the odd ones.
    fn nibbles(self, bytes: &[u8; 64]) -> [Self::U8; 2];

    /// Unpacks 128 codes of 1 to 4 bits: columns 0 to 31 and 64 to 95, then 32 to 63 and 96 to 127; those of one bit are
    /// doubled. Bytes after the codes are ignored.
    fn halves(self, unpack: &Self::Unpack, bytes: &[u8; 64]) -> [Self::U8; 2];

    /// [`halves`](Self::halves) of codes of 5 to 8 bits.
    fn halves_of_two(self, unpack: &Self::Unpack, bytes: &[u8; 128]) -> [Self::U8; 2];

    /// [`halves`](Self::halves) of bytes.
    fn halves_of_bytes(self, bytes: &[u8; 128]) -> [Self::U8; 2];

    /// The digits of bytes that hold five ternary codes each: of four times 16 bytes from where the four blocks of 64 codes
    /// start, where the first of all 256 codes is digit `phase`, below 5, of the first byte.
    fn digits(self, bytes: &[u8; 64], phase: usize) -> Self::Digits;

    /// Adds to lane `i` the products of the digits of bytes `4i` to `4i + 3` and the bytes there of `a`, whose first vector
    /// meets the highest digit; exactly.
    fn dot_digits(self, digits: &Self::Digits, a: [&[i8; 64]; 5], acc: Self::I32) -> Self::I32;

    /// Unpacks 64 ternary codes of five to a byte, from digit `phase` of the first byte on; `phase` is below 5. Bytes
    /// after the codes are ignored.
    fn ternary_codes(self, bytes: &[u8; 64], phase: usize) -> Self::U8;

    /// Adds `u[4i] * a[4i] + ... + u[4i+3] * a[4i+3]` to lane `i`, exactly; the sum wraps. With `eight_bits`, `u` may be
    /// above 127.
    fn dot_codes(self, u: Self::U8, a: &[i8; 64], acc: Self::I32, eight_bits: bool) -> Self::I32;

    /// Lane `i` of vector `k` is `u[4i + k]`, converted, minus lane `i` of `zero`, a whole number below 256. With `NARROW`,
    /// every `u` is below 16 and all lanes of `zero` are the same.
    fn levels<const NARROW: bool>(self, u: Self::U8, zero: Self::F32) -> [Self::F32; 4];

    /// Codes of four bits less `zero`, a whole number below 16: lane `l` of vector `k` has code `8l + k`. With `SAME`, all
    /// lanes of `zero` are.
    fn nibble_levels<const SAME: bool>(self, bytes: &[u8; 64], zero: Self::F32) -> [Self::F32; 8];

    /// Lane `i` is `from[index[i]]`; an index is from 0 to 15.
    fn permute(self, from: &[f32; 16], index: &[i32; 16]) -> Self::F32;

    /// Packs 64 codes of `bits` bits into the first `8 * bits` bytes of `out`: the inverse of
    /// [`unpack64`](Self::unpack64). Higher bits of a code are dropped.
    ///
    /// # Panics
    /// If `out` is shorter than that, or `bits` is out of range.
    #[inline(always)]
    fn pack64(self, codes: &[u8; 64], bits: u32, out: &mut [u8]) {
        assert!((1..=8).contains(&bits));
        let width = bits as usize;
        let mask = (1u64 << bits) - 1;
        let out = &mut out[..8 * width];
        for (eight, to) in codes.as_chunks::<8>().0.iter().zip(out.chunks_exact_mut(width)) {
            let mut word = 0;
            for (i, &code) in eight.iter().enumerate() {
                word |= (u64::from(code) & mask) << (i as u32 * bits);
            }
            to.copy_from_slice(&word.to_le_bytes()[..width]);
        }
    }

    /// `e^v`, within 2 units in the last place; 0 below the smallest subnormal, infinity on overflow, NaN for NaN.
    #[inline(always)]
    fn exp(self, v: Self::F32) -> Self::F32 {
        // The clamps keep `n` in the range of `scale_pow2`; with the constant first, NaN passes through.
        let v = self.min(self.splat(89.0), self.max(self.splat(-104.5), v));
        let n = self.round_even(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts; the first has trailing zeros, so `n * LN2_HIGH` is exact.
        let r = self.mul_add(n, self.splat(-0.693_359_4), v);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        // The minimax polynomial of the Cephes library for |r| <= ln(2) / 2.
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let p = self.add(self.mul_add(self.mul(r, r), p, r), self.splat(1.0));
        self.scale_pow2(p, n)
    }

    /// `2^v`, within 2 units in the last place; 0 below the smallest subnormal, infinity on overflow, NaN for NaN.
    #[inline(always)]
    fn exp2(self, v: Self::F32) -> Self::F32 {
        // The clamps keep `n` in the range of `scale_pow2`; with the constant first, NaN passes through.
        let v = self.min(self.splat(129.0), self.max(self.splat(-151.0), v));
        let n = self.round_even(v);
        let r = self.sub(v, n);
        // The polynomial of the Cephes library for |r| <= 1/2.
        let mut p = self.splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
            p = self.mul_add(p, r, self.splat(c));
        }
        self.scale_pow2(p, n)
    }
}
