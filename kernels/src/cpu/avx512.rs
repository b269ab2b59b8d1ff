//! The logical vector in one 512-bit register: Ice Lake and Zen 4 upward.

use std::arch::x86_64::*;

use super::Kernel;
use super::avx512_codes::{SHIFT, SPREAD, Unpack, digits, dot_digits, level, quarters};
use super::avx512_transpose::{sums, transpose};
use super::simd::{Aligned, Simd, TERNARY_PLACES};

/// Token for AVX-512 with the byte-permute (VBMI) and integer-dot (VNNI) extensions.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    /// The token, if this CPU and its operating system support every feature that the methods use.
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2");
        found.then_some(Self(()))
    }

    /// Runs a kernel compiled for these features.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi1,bmi2")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only on CPUs with all of these features.
        unsafe { inner(self, kernel) }
    }
}

/// The codes below 16, as f32.
const NIBBLES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// The low `count` lanes, of at most 16.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    assert!(count <= 16);
    ((1u32 << count) - 1) as __mmask16
}

impl Simd for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type U8 = __m512i;
    type Unpack = Unpack;
    type Digits = [__m512i; 5];

    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the load may be unaligned.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the mask covers no more lanes than the slice has.
        unsafe { _mm512_maskz_loadu_ps(first(from.len()), from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; 16]) {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the store may be unaligned.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn store_partial(self, v: __m512, to: &mut [f32]) {
        // SAFETY: the token exists only on CPUs with AVX-512; the mask covers no more lanes than the slice has.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), first(to.len()), v) }
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the load may be unaligned.
        unsafe { _mm512_loadu_ps(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 32 bytes, and the load may be unaligned.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 32 bytes, and the load may be unaligned.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 16]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 16 bytes, and the load may be unaligned.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn to_u8(self, v: __m512) -> [u8; 16] {
        let mut out = [0; 16];
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 16 bytes, and the store may be unaligned.
        unsafe {
            let whole = _mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_setzero_si512());
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtusepi32_epi8(whole));
        }
        out
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, v: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_abs_ps(v) }
    }

    #[inline(always)]
    fn neg(self, v: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512 (the float xor is of its DQ part).
        unsafe { _mm512_xor_ps(v, _mm512_set1_ps(-0.0)) }
    }

    #[inline(always)]
    fn round_even(self, v: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }

    #[inline(always)]
    fn select_ge(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    fn scale_pow2(self, v: __m512, n: __m512) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_scalef_ps(v, n) }
    }

    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; 16]) -> [__m512; 4] {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { transpose(rows, None) }
    }

    #[inline(always)]
    fn transpose_ordered(self, rows: [&[u8; 16]; 16], order: &[u8; 16]) -> [__m512; 4] {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 16 bytes, and the load may be unaligned.
        unsafe { transpose(rows, Some(_mm512_broadcast_i32x4(_mm_loadu_si128(order.as_ptr().cast())))) }
    }

    #[inline(always)]
    fn unpack_lanes(self, words: __m512, bits: u32, shift: u32) -> __m512 {
        debug_assert!((1..=8).contains(&bits) && shift + 4 * bits <= 32);
        const EACH: u64 = 0x0101_0101_0101_0101;
        // Two lanes in each 64-bit element: four codes from bit 0 on, four from bit 32 on.
        let control = 0x2020_2020_0000_0000 + u64::from(bits) * 0x0302_0100_0302_0100 + u64::from(shift) * EACH;
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI.
        unsafe {
            let shifted = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(control as i64), _mm512_castps_si512(words));
            let mask = _mm512_set1_epi8(((1u32 << bits) - 1) as u8 as i8);
            _mm512_castsi512_ps(_mm512_and_si512(shifted, mask))
        }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX-512 (256-bit extraction is of its DQ part) and AVX.
        unsafe {
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn sums(self, from: &[Aligned<[f32; 16]>; 16]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { sums(from) }
    }

    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX-512 (256-bit extraction is of its DQ part) and AVX.
        unsafe {
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn min_lane(self, v: __m512) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX-512 (256-bit extraction is of its DQ part) and AVX.
        unsafe {
            let v = _mm256_min_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_min_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_min_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: every x86-64 CPU has the instruction, and it touches no memory that a program could notice.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the load may be unaligned.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_i32(self, v: __m512i, to: &mut [i32; 16]) {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the store may be unaligned.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn mul_i32(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    #[inline(always)]
    fn dot_u8i8(self, u: __m512i, a: __m512i, acc: __m512i) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(acc, u, a) }
    }

    #[inline(always)]
    fn i32_to_f32(self, v: __m512i) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    fn sum_i32(self, v: __m512i) -> i32 {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { _mm512_reduce_add_epi32(v) }
    }

    #[inline(always)]
    fn unpack64(self, stream: &[u8], bits: u32) -> [u8; 64] {
        assert!((1..=8).contains(&bits));
        let width = bits as usize;
        let stream = &stream[..8 * width];
        let mut codes = [0; 64];
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI; the mask covers exactly the bytes of `stream`; the
        // tables and `codes` are 64 bytes, and loads and stores may be unaligned.
        unsafe {
            let bytes = _mm512_maskz_loadu_epi8(u64::MAX >> (64 - 8 * bits), stream.as_ptr().cast());
            let spread = _mm512_loadu_si512(SPREAD[width].as_ptr().cast());
            let shift = _mm512_loadu_si512(SHIFT[width].as_ptr().cast());
            let shifted = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, bytes));
            let mask = _mm512_set1_epi8(((1u32 << bits) - 1) as u8 as i8);
            _mm512_storeu_si512(codes.as_mut_ptr().cast(), _mm512_and_si512(shifted, mask));
        }
        codes
    }

    #[inline(always)]
    fn pack64(self, codes: &[u8; 64], bits: u32, out: &mut [u8]) {
        assert!((1..=8).contains(&bits));
        let width = bits as usize;
        let out = &mut out[..8 * width];
        let fields = u64::MAX / 255 * ((1 << bits) - 1);
        let mut packed = [0; 64];
        for (i, eight) in codes.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: the token exists only on CPUs with BMI2.
            let word = unsafe { _pext_u64(u64::from_le_bytes(*eight), fields) };
            // What is written past the word's `width` bytes is zero, and is overwritten by the next.
            packed[i * width..i * width + 8].copy_from_slice(&word.to_le_bytes());
        }
        // SAFETY: the token exists only on CPUs with AVX-512 BW; the mask covers exactly the bytes of `out`; `packed` is
        // 64 bytes, and loads and stores may be unaligned.
        unsafe {
            let packed = _mm512_loadu_si512(packed.as_ptr().cast());
            _mm512_mask_storeu_epi8(out.as_mut_ptr().cast(), u64::MAX >> (64 - 8 * bits), packed);
        }
    }

    #[inline(always)]
    fn unpack(self, bits: u32) -> Unpack {
        assert!((1..=8).contains(&bits));
        // SAFETY: the token exists only on CPUs with AVX-512 BW.
        unsafe { Unpack::new(bits) }
    }

    #[inline(always)]
    fn codes(self, unpack: &Unpack, stream: &[u8; 64]) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI; the array is 64 bytes, and the load may be unaligned.
        unsafe { unpack.spread(_mm512_loadu_si512(stream.as_ptr().cast())) }
    }

    #[inline(always)]
    fn halves(self, unpack: &Unpack, bytes: &[u8; 64]) -> [__m512i; 2] {
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI; the array is 64 bytes, and the load may be unaligned.
        unsafe { unpack.halves(_mm512_loadu_si512(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn halves_of_two(self, unpack: &Unpack, bytes: &[u8; 128]) -> [__m512i; 2] {
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI.
        unsafe { unpack.halves_of_two(bytes) }
    }

    #[inline(always)]
    fn halves_of_bytes(self, bytes: &[u8; 128]) -> [__m512i; 2] {
        // SAFETY: the token exists only on CPUs with AVX-512.
        unsafe { quarters(bytes, 32) }
    }

    #[inline(always)]
    fn digits(self, bytes: &[u8; 64], phase: usize) -> [__m512i; 5] {
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI.
        unsafe { digits(bytes, phase) }
    }

    #[inline(always)]
    fn dot_digits(self, digits: &[__m512i; 5], a: [&[i8; 64]; 5], acc: __m512i) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512 VNNI.
        unsafe { dot_digits(digits, a, acc) }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512; the array is 64 bytes, and the load may be unaligned.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 64]) -> [__m512i; 2] {
        // SAFETY: the token exists only on CPUs with AVX-512 BW; the array is 64 bytes, and the load may be unaligned.
        unsafe {
            let (bytes, mask) = (_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_set1_epi8(15));
            [_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask)]
        }
    }

    #[inline(always)]
    fn ternary_codes(self, bytes: &[u8; 64], phase: usize) -> __m512i {
        let places = &TERNARY_PLACES[phase];
        // SAFETY: the token exists only on CPUs with AVX-512 VBMI and BW; the arrays are 64 bytes, and loads may be unaligned.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            let mut digits = [_mm512_setzero_si512(); 2];
            for (digits, (places, factors)) in digits.iter_mut().zip(places) {
                let places = _mm512_loadu_si512(places.as_ptr().cast());
                let words = _mm512_maskz_permutexvar_epi8(u64::MAX / 3, places, bytes);
                let fractions = _mm512_mullo_epi16(words, _mm512_loadu_si512(factors.as_ptr().cast()));
                *digits = _mm512_mulhi_epu16(fractions, _mm512_set1_epi16(3));
            }
            _mm512_packus_epi16(digits[0], digits[1])
        }
    }

    #[inline(always)]
    fn dot_codes(self, u: __m512i, a: &[i8; 64], acc: __m512i, _: bool) -> __m512i {
        // SAFETY: the token exists only on CPUs with AVX-512 VNNI; the array is 64 bytes, and the load may be unaligned.
        unsafe { _mm512_dpbusd_epi32(acc, u, _mm512_loadu_si512(a.as_ptr().cast())) }
    }

    #[inline(always)]
    fn levels<const NARROW: bool>(self, u: __m512i, zero: __m512) -> [__m512; 4] {
        // SAFETY: the token exists only on CPUs with AVX-512; the table is 64 bytes, and the load may be unaligned.
        unsafe {
            // Columns 2 and 3 are where 0 and 1 were.
            let later = _mm512_srli_epi32::<16>(u);
            if NARROW {
                // The permutation looks at the low four bits of each lane.
                let table = _mm512_sub_ps(_mm512_loadu_ps(NIBBLES.as_ptr()), zero);
                let [first, third] = [_mm512_permutexvar_ps(u, table), _mm512_permutexvar_ps(later, table)];
                return [first, level::<4, 8>(u, zero), third, level::<4, 8>(later, zero)];
            }
            [level::<8, 0>(u, zero), level::<8, 8>(u, zero), level::<8, 0>(later, zero), level::<8, 8>(later, zero)]
        }
    }

    #[inline(always)]
    fn nibble_levels<const SAME: bool>(self, bytes: &[u8; 64], zero: __m512) -> [__m512; 8] {
        // SAFETY: the token exists only on CPUs with AVX-512; both arrays are 64 bytes, and loads may be unaligned.
        unsafe {
            let words = _mm512_loadu_si512(bytes.as_ptr().cast());
            // Codes 3 and 5 to 7 are where 0 and 2 to 4 were.
            let later = _mm512_srli_epi32::<12>(words);
            let first = if SAME {
                // The permutation looks at the low four bits of each lane.
                let table = _mm512_sub_ps(_mm512_loadu_ps(NIBBLES.as_ptr()), zero);
                [_mm512_permutexvar_ps(words, table), _mm512_permutexvar_ps(later, table)]
            } else {
                [level::<4, 0>(words, zero), level::<4, 0>(later, zero)]
            };
            [
                first[0],
                level::<4, 4>(words, zero),
                level::<4, 8>(words, zero),
                first[1],
                level::<4, 16>(words, zero),
                level::<4, 8>(later, zero),
                level::<4, 12>(later, zero),
                level::<4, 16>(later, zero),
            ]
        }
    }

    #[inline(always)]
    fn permute(self, from: &[f32; 16], index: &[i32; 16]) -> __m512 {
        // SAFETY: the token exists only on CPUs with AVX-512; the arrays are 64 bytes, and loads may be unaligned.
        unsafe { _mm512_permutexvar_ps(_mm512_loadu_si512(index.as_ptr().cast()), _mm512_loadu_ps(from.as_ptr())) }
    }
}
