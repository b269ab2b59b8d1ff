//! The logical vector in two 256-bit registers: Haswell and Zen upward.

use std::arch::x86_64::*;

use super::Kernel;
use super::avx2_codes::{Unpack, both, digits, load, nibble_levels, transpose, unpack64};
use super::simd::{Simd, TERNARY_BYTES, TERNARY_PLACES};

/// Token for AVX2 with fused multiply-add and half-precision conversion.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, if this CPU and its operating system support every feature that the methods use.
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2");
        found.then_some(Self(()))
    }

    /// Runs a kernel compiled for these features.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only on CPUs with all of these features.
        unsafe { inner(self, kernel) }
    }
}

impl Simd for Avx2 {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type U8 = [__m256i; 2];
    type Unpack = Unpack;
    type Digits = [[__m256i; 2]; 5];

    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the array is two registers long, and loads may be unaligned.
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> [__m256; 2] {
        let mut whole = [0.0; 16];
        whole[..from.len()].copy_from_slice(from);
        self.load(&whole)
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2], to: &mut [f32; 16]) {
        // SAFETY: the token exists only on CPUs with AVX2; the array is two registers long, and stores may be unaligned.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn store_partial(self, v: [__m256; 2], to: &mut [f32]) {
        let mut whole = [0.0; 16];
        self.store(v, &mut whole);
        to.copy_from_slice(&whole[..to.len()]);
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> [__m256; 2] {
        let from: *const f32 = from.as_ptr().cast();
        // SAFETY: the token exists only on CPUs with AVX2; the array is two registers long, and loads may be unaligned.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 32]) -> [__m256; 2] {
        let from: *const __m128i = from.as_ptr().cast();
        // SAFETY: the token exists only on CPUs with AVX2 and F16C; the array is 32 bytes, and loads may be unaligned.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))] }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> [__m256; 2] {
        let from: *const __m128i = from.as_ptr().cast();
        // SAFETY: the token exists only on CPUs with AVX2; the array is 32 bytes, and loads may be unaligned.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(1)));
            let [low, high] = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 16]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the array is 16 bytes, and loads may be unaligned.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let low = _mm256_cvtepu8_epi32(bytes);
            let high = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn to_u8(self, v: [__m256; 2]) -> [u8; 16] {
        let mut out = [0; 16];
        // SAFETY: the token exists only on CPUs with AVX2; the array is 16 bytes, and the store may be unaligned.
        unsafe {
            // Packing works within 128-bit lanes; the permutation puts its four quarters back in order.
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
        out
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2 and FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn abs(self, v: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1])]
        }
    }

    #[inline(always)]
    fn neg(self, v: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_xor_ps(sign, v[0]), _mm256_xor_ps(sign, v[1])]
        }
    }

    #[inline(always)]
    fn round_even(self, v: [__m256; 2]) -> [__m256; 2] {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_round_ps::<MODE>(v[0]), _mm256_round_ps::<MODE>(v[1])] }
    }

    #[inline(always)]
    fn select_ge(self, a: [__m256; 2], b: [__m256; 2], x: [__m256; 2], y: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_GE_OQ>(a[0], b[0]);
            let high = _mm256_cmp_ps::<_CMP_GE_OQ>(a[1], b[1]);
            [_mm256_blendv_ps(y[0], x[0], low), _mm256_blendv_ps(y[1], x[1], high)]
        }
    }

    #[inline(always)]
    fn scale_pow2(self, mut v: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        for (v, n) in v.iter_mut().zip(n) {
            // SAFETY: the token exists only on CPUs with AVX2.
            unsafe {
                let bias = _mm256_set1_epi32(127);
                let n = _mm256_cvtps_epi32(n);
                let half = _mm256_srai_epi32::<1>(n);
                let rest = _mm256_sub_epi32(n, half);
                let half = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
                let rest = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
                *v = _mm256_mul_ps(_mm256_mul_ps(*v, half), rest);
            }
        }
        v
    }

    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; 16]) -> [[__m256; 2]; 4] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { transpose(rows, None) }
    }

    #[inline(always)]
    fn transpose_ordered(self, rows: [&[u8; 16]; 16], order: &[u8; 16]) -> [[__m256; 2]; 4] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { transpose(rows, Some(both(order, order))) }
    }

    #[inline(always)]
    fn unpack_lanes(self, words: [__m256; 2], bits: u32, shift: u32) -> [__m256; 2] {
        debug_assert!((1..=8).contains(&bits) && shift + 4 * bits <= 32);
        let mut out = words;
        for (out, words) in out.iter_mut().zip(words) {
            // SAFETY: the token exists only on CPUs with AVX2.
            unsafe {
                let mask = _mm256_set1_epi32((1 << bits) - 1);
                let mut codes = [_mm256_castps_si256(words); 4];
                for (i, codes) in codes.iter_mut().enumerate() {
                    let places = _mm_cvtsi32_si128((shift + i as u32 * bits) as i32);
                    *codes = _mm256_and_si256(_mm256_srl_epi32(*codes, places), mask);
                }
                let low = _mm256_or_si256(codes[0], _mm256_slli_epi32::<8>(codes[1]));
                let high = _mm256_or_si256(codes[2], _mm256_slli_epi32::<8>(codes[3]));
                *out = _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32::<16>(high)));
            }
        }
        out
    }

    #[inline(always)]
    fn sum(self, v: [__m256; 2]) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let v = _mm256_add_ps(v[0], v[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn max_lane(self, v: [__m256; 2]) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }

    #[inline(always)]
    fn min_lane(self, v: [__m256; 2]) -> f32 {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let v = _mm256_min_ps(v[0], v[1]);
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
    fn splat_i32(self, value: i32) -> [__m256i; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> [__m256i; 2] {
        let from: *const __m256i = from.as_ptr().cast();
        // SAFETY: the token exists only on CPUs with AVX2; the array is two registers long, and loads may be unaligned.
        unsafe { [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))] }
    }

    #[inline(always)]
    fn store_i32(self, v: [__m256i; 2], to: &mut [i32; 16]) {
        let to: *mut __m256i = to.as_mut_ptr().cast();
        // SAFETY: the token exists only on CPUs with AVX2; the array is two registers long, and stores may be unaligned.
        unsafe {
            _mm256_storeu_si256(to, v[0]);
            _mm256_storeu_si256(to.add(1), v[1]);
        }
    }

    #[inline(always)]
    fn mul_i32(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    fn dot_u8i8(self, u: [__m256i; 2], a: [__m256i; 2], mut acc: [__m256i; 2]) -> [__m256i; 2] {
        for half in 0..2 {
            // SAFETY: the token exists only on CPUs with AVX2.
            unsafe {
                // The 16-bit sums of two products saturate; one product at a time always fits.
                let even = _mm256_maddubs_epi16(_mm256_and_si256(u[half], _mm256_set1_epi16(0x00ff)), a[half]);
                let odd = _mm256_maddubs_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x00ff), u[half]), a[half]);
                let ones = _mm256_set1_epi16(1);
                let products = _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones));
                acc[half] = _mm256_add_epi32(acc[half], products);
            }
        }
        acc
    }

    #[inline(always)]
    fn dot_u7i8(self, u: [__m256i; 2], a: [__m256i; 2], mut acc: [__m256i; 2]) -> [__m256i; 2] {
        for half in 0..2 {
            // SAFETY: the token exists only on CPUs with AVX2.
            unsafe {
                // Two products of at most 127 * 128 fit in 16 bits.
                let pairs = _mm256_maddubs_epi16(u[half], a[half]);
                acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        acc
    }

    #[inline(always)]
    fn i32_to_f32(self, v: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }

    #[inline(always)]
    fn sum_i32(self, v: [__m256i; 2]) -> i32 {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe {
            let v = _mm256_add_epi32(v[0], v[1]);
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_11_10>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b00_00_00_01>(v));
            _mm_cvtsi128_si32(v)
        }
    }

    #[inline(always)]
    fn unpack64(self, stream: &[u8], bits: u32) -> [u8; 64] {
        assert!((1..=8).contains(&bits));
        let stream = &stream[..8 * bits as usize];
        // SAFETY: the token exists only on CPUs with AVX2; the stream is as long as its codes.
        unsafe { unpack64(stream, bits) }
    }

    #[inline(always)]
    fn unpack(self, bits: u32) -> Unpack {
        assert!((1..=8).contains(&bits));
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { Unpack::new(bits) }
    }

    #[inline(always)]
    fn codes(self, unpack: &Unpack, stream: &[u8; 64]) -> [__m256i; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the array is 64 bytes, as long as any 64 codes.
        unsafe { unpack.codes(stream.as_ptr()) }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> [__m256i; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the halves are 32 bytes each, and loads may be unaligned.
        unsafe { load(from.as_ptr()) }
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 64]) -> [[__m256i; 2]; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the array is 64 bytes, and loads may be unaligned.
        unsafe {
            let (bytes, mask) = (load(bytes.as_ptr()), _mm256_set1_epi8(15));
            let mut codes = [bytes; 2];
            for (half, bytes) in bytes.into_iter().enumerate() {
                codes[0][half] = _mm256_and_si256(bytes, mask);
                codes[1][half] = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
            }
            codes
        }
    }

    #[inline(always)]
    fn halves(self, unpack: &Unpack, bytes: &[u8; 64]) -> [[__m256i; 2]; 2] {
        assert!(unpack.bits() <= 4);
        // SAFETY: the token exists only on CPUs with AVX2; 128 codes of up to four bits are at most 64 bytes.
        unsafe { unpack.halves(bytes.as_ptr()) }
    }

    #[inline(always)]
    fn halves_of_two(self, unpack: &Unpack, bytes: &[u8; 128]) -> [[__m256i; 2]; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; 128 codes of up to eight bits are at most 128 bytes.
        unsafe { unpack.halves(bytes.as_ptr()) }
    }

    #[inline(always)]
    fn halves_of_bytes(self, bytes: &[u8; 128]) -> [[__m256i; 2]; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the array is twice 64 bytes.
        let [first, second] = unsafe { [load(bytes.as_ptr()), load(bytes.as_ptr().add(64))] };
        [[first[0], second[0]], [first[1], second[1]]]
    }

    #[inline(always)]
    fn digits(self, bytes: &[u8; 64], phase: usize) -> [[__m256i; 2]; 5] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { digits(bytes, &TERNARY_BYTES[phase]) }
    }

    #[inline(always)]
    fn dot_digits(self, digits: &[[__m256i; 2]; 5], a: [&[i8; 64]; 5], mut acc: [__m256i; 2]) -> [__m256i; 2] {
        for (&u, a) in digits.iter().zip(a) {
            acc = self.dot_codes(u, a, acc, false);
        }
        acc
    }

    #[inline(always)]
    fn ternary_codes(self, bytes: &[u8; 64], phase: usize) -> [__m256i; 2] {
        let places = &TERNARY_PLACES[phase];
        let mut codes = [self.splat_i32(0)[0]; 2];
        for (i, codes) in codes.iter_mut().enumerate() {
            // SAFETY: the token exists only on CPUs with AVX2; 64 codes lie in the first 14 bytes, of which 16 are loaded;
            // the halves of the tables are 32 bytes, and loads may be unaligned.
            unsafe {
                let bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
                let mut digits = [_mm256_setzero_si256(); 2];
                for (digits, (places, factors)) in digits.iter_mut().zip(places) {
                    let places = _mm256_loadu_si256(places.as_ptr().add(32 * i).cast());
                    let words = _mm256_shuffle_epi8(bytes, places);
                    let factors = _mm256_loadu_si256(factors.as_ptr().add(16 * i).cast());
                    *digits = _mm256_mulhi_epu16(_mm256_mullo_epi16(words, factors), _mm256_set1_epi16(3));
                }
                *codes = _mm256_packus_epi16(digits[0], digits[1]);
            }
        }
        codes
    }

    #[inline(always)]
    fn dot_codes(self, u: [__m256i; 2], a: &[i8; 64], acc: [__m256i; 2], eight_bits: bool) -> [__m256i; 2] {
        // SAFETY: the token exists only on CPUs with AVX2; the halves are 32 bytes, and loads may be unaligned.
        let a = unsafe { load(a.as_ptr().cast()) };
        if eight_bits { self.dot_u8i8(u, a, acc) } else { self.dot_u7i8(u, a, acc) }
    }

    #[inline(always)]
    fn levels<const NARROW: bool>(self, u: [__m256i; 2], zero: [__m256; 2]) -> [[__m256; 2]; 4] {
        let mut levels = [zero; 4];
        for half in 0..2 {
            // SAFETY: the token exists only on CPUs with AVX2.
            unsafe {
                let mask = _mm256_set1_epi32(0xff);
                let columns = [
                    _mm256_and_si256(u[half], mask),
                    _mm256_and_si256(_mm256_srli_epi32::<8>(u[half]), mask),
                    _mm256_and_si256(_mm256_srli_epi32::<16>(u[half]), mask),
                    _mm256_srli_epi32::<24>(u[half]),
                ];
                for (levels, codes) in levels.iter_mut().zip(columns) {
                    levels[half] = _mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero[half]);
                }
            }
        }
        levels
    }

    #[inline(always)]
    fn nibble_levels<const SAME: bool>(self, bytes: &[u8; 64], zero: [__m256; 2]) -> [[__m256; 2]; 8] {
        // SAFETY: the token exists only on CPUs with AVX2.
        unsafe { nibble_levels(bytes, zero) }
    }

    #[inline(always)]
    fn permute(self, from: &[f32; 16], index: &[i32; 16]) -> [__m256; 2] {
        let [low, high] = self.load(from);
        let mut out = [low; 2];
        for (out, index) in out.iter_mut().zip(index.as_chunks::<8>().0) {
            // SAFETY: the token exists only on CPUs with AVX2; the array is 32 bytes, and the load may be unaligned.
            unsafe {
                let index = _mm256_loadu_si256(index.as_ptr().cast());
                // The permutations look at the low three bits, the choice between them at the sign.
                let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let [low, high] = [_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index)];
                *out = _mm256_blendv_ps(low, high, is_high);
            }
        }
        out
    }
}
