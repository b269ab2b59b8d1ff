//! Transpositions in 512-bit registers.

use std::arch::x86_64::*;

use super::simd::Aligned;

/// Loads four words.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn words(row: &[u8; 16]) -> __m128 {
    // SAFETY: the array is 16 bytes, and the load may be unaligned; the instructions are the caller's promise.
    unsafe { _mm_loadu_ps(row.as_ptr().cast()) }
}

/// Transposes 16 rows of four words, after a permutation of the bytes of each row where there is an `order`.
///
/// # Safety
/// The CPU has AVX-512 with BW and DQ.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [&[u8; 16]; 16], order: Option<__m512i>) -> [__m512; 4] {
    // SAFETY: the caller's promise (128-bit insertion of pairs is of the DQ part, the byte shuffle of the BW part).
    unsafe {
        // Quarter `q` of vector `i` is row `i + 4q`; what remains is four 4x4 transpositions, one in each quarter.
        let mut v = [_mm512_setzero_ps(); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = _mm512_castps128_ps512(words(rows[i]));
            *v = _mm512_insertf32x4::<1>(*v, words(rows[i + 4]));
            *v = _mm512_insertf32x4::<2>(*v, words(rows[i + 8]));
            *v = _mm512_insertf32x4::<3>(*v, words(rows[i + 12]));
            if let Some(order) = order {
                *v = _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_castps_si512(*v), order));
            }
        }
        let [a, b] = [_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])];
        let [c, d] = [_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3])];
        [
            _mm512_shuffle_ps::<0b01_00_01_00>(a, c),
            _mm512_shuffle_ps::<0b11_10_11_10>(a, c),
            _mm512_shuffle_ps::<0b01_00_01_00>(b, d),
            _mm512_shuffle_ps::<0b11_10_11_10>(b, d),
        ]
    }
}

/// The sum of each of 16 vectors: lanes `i` and `i + 8` first, then `i + 4`, `i + 2`, `i + 1`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
pub(super) unsafe fn sums(from: &[Aligned<[f32; 16]>; 16]) -> __m512 {
    // SAFETY: the caller's promise; the arrays are 64 bytes.
    unsafe {
        let mut fours = [_mm512_setzero_ps(); 4];
        for (q, four) in fours.iter_mut().enumerate() {
            // Eight lanes of each of two vectors, then four of each of four, so that each has 128 bits.
            let mut pairs = [_mm512_setzero_ps(); 2];
            for (p, pair) in pairs.iter_mut().enumerate() {
                let a = _mm512_load_ps(from[q + 8 * p].as_ptr());
                let b = _mm512_load_ps(from[q + 8 * p + 4].as_ptr());
                *pair = _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                    _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
                );
            }
            let [a, b] = pairs;
            *four =
                _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
        }
        let [a, b, c, d] = fours;
        let low = _mm512_add_ps(pairs_low(a, b), pairs_high(a, b));
        let high = _mm512_add_ps(pairs_low(c, d), pairs_high(c, d));
        // Quarter `k` has vectors `4k` to `4k + 3`.
        _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(low, high), _mm512_shuffle_ps::<0b11_01_11_01>(low, high))
    }
}

/// The first two lanes of each quarter of `a`, then of `b`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn pairs_low(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_shuffle_ps::<0b01_00_01_00>(a, b) }
}

/// The last two lanes of each quarter of `a`, then of `b`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn pairs_high(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_shuffle_ps::<0b11_10_11_10>(a, b) }
}
