//! Codes of any width out of a stream, and transpositions, in 256-bit registers.

use std::arch::x86_64::*;

/// How 128-bit lanes unpack 16 codes each: a window of 16 bits around every code, shifted left by a multiplication so
/// that the code starts at bit 8.
#[derive(Clone, Copy)]
struct Unpack {
    /// Where each quarter of the codes is loaded from; moved back where 16 bytes would pass the end of the stream.
    offset: [usize; 4],
    /// For each quarter, the bytes of the windows of its first and of its last eight codes.
    windows: [[[u8; 16]; 2]; 4],
    /// For each of eight codes, the power of two that moves it to bit 8 of its window.
    factors: [u16; 8],
}

const UNPACK: [Unpack; 9] = {
    let mut table = [Unpack { offset: [0; 4], windows: [[[0; 16]; 2]; 4], factors: [0; 8] }; 9];
    let mut bits = 1;
    while bits <= 8 {
        let last = if bits == 1 { 0 } else { 8 * bits - 16 };
        let mut i = 0;
        while i < 64 {
            let quarter = i / 16;
            let wanted = 2 * bits * quarter;
            let offset = if wanted < last { wanted } else { last };
            table[bits].offset[quarter] = offset;
            let byte = i * bits / 8 - offset;
            // A code that ends within its first byte needs no second one; a set high bit makes the shuffle write zero.
            let second = if i * bits % 8 + bits > 8 { byte + 1 } else { 0x80 };
            let window = &mut table[bits].windows[quarter][i % 16 / 8];
            window[i % 8 * 2] = byte as u8;
            window[i % 8 * 2 + 1] = second as u8;
            table[bits].factors[i % 8] = 1 << (8 - i * bits % 8);
            i += 1;
        }
        bits += 1;
    }
    table
};

/// Loads the bytes that hold 16 codes: 8 at a width of one bit, 16 otherwise.
///
/// # Safety
/// The CPU has AVX2, and that many bytes are readable at `from`.
#[inline(always)]
unsafe fn quarter(from: *const u8, bits: u32) -> __m128i {
    // SAFETY: the caller's promise; loads may be unaligned.
    unsafe { if bits == 1 { _mm_loadl_epi64(from.cast()) } else { _mm_loadu_si128(from.cast()) } }
}

/// Unpacks 64 codes of `bits` bits.
///
/// # Safety
/// The CPU has AVX2, `bits` is from 1 to 8, and `8 * bits` bytes are readable at `stream`.
#[inline(always)]
pub(super) unsafe fn unpack(stream: *const u8, bits: u32) -> [__m256i; 2] {
    let table = &UNPACK[bits as usize];
    // SAFETY: the caller's promise; `quarter` reads 8 bytes at a width of one bit, where the stream is that long, and
    // otherwise 16 at an offset that is at most 16 below the length of the stream. The tables are 16 bytes each, and loads
    // may be unaligned.
    unsafe {
        let factors = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.factors.as_ptr().cast()));
        let mask = _mm256_set1_epi8(((1u32 << bits) - 1) as u8 as i8);
        let mut codes = [mask; 2];
        for (half, codes) in codes.iter_mut().enumerate() {
            let [low, high] = [2 * half, 2 * half + 1];
            let bytes = _mm256_set_m128i(
                quarter(stream.add(table.offset[high]), bits),
                quarter(stream.add(table.offset[low]), bits),
            );
            let first = both(&table.windows[low][0], &table.windows[high][0]);
            let last = both(&table.windows[low][1], &table.windows[high][1]);
            let first = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, first), factors);
            let last = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, last), factors);
            let packed = _mm256_packus_epi16(_mm256_srli_epi16::<8>(first), _mm256_srli_epi16::<8>(last));
            *codes = _mm256_and_si256(packed, mask);
        }
        codes
    }
}

/// Unpacks 64 codes of `bits` bits; those of one bit are doubled.
///
/// # Safety
/// As for [`unpack`].
#[inline(always)]
pub(super) unsafe fn codes(stream: *const u8, bits: u32) -> [__m256i; 2] {
    let from: *const __m128i = stream.cast();
    // SAFETY: the caller's promise; loads may be unaligned.
    unsafe {
        match bits {
            1 => {
                let [low, high] = unpack(stream, bits);
                [_mm256_add_epi8(low, low), _mm256_add_epi8(high, high)]
            }
            4 => [nibbles(from), nibbles(from.add(1))],
            8 => load(stream),
            _ => unpack(stream, bits),
        }
    }
}

/// A vector of 64 bytes.
///
/// # Safety
/// The CPU has AVX2, and 64 bytes are readable at `from`.
#[inline(always)]
pub(super) unsafe fn load(from: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's promise; loads may be unaligned.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
}

/// Unpacks 128 codes of `bits` bits: columns 0 to 31 and 64 to 95, then the rest; those of one bit are doubled.
///
/// # Safety
/// The CPU has AVX2, `bits` is from 1 to 8, and `16 * bits` bytes are readable at `stream`.
#[inline(always)]
pub(super) unsafe fn halves(stream: *const u8, bits: u32) -> [[__m256i; 2]; 2] {
    // SAFETY: the caller's promise.
    let [first, second] = unsafe { [codes(stream, bits), codes(stream.add(8 * bits as usize), bits)] };
    [[first[0], second[0]], [first[1], second[1]]]
}

/// The digits, highest first, of four times 16 bytes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn digits(bytes: &[u8; 64], at: &[usize; 4]) -> [[__m256i; 2]; 5] {
    // SAFETY: loads may be unaligned; AVX2 is the caller's promise.
    unsafe {
        let mut digits = [[_mm256_setzero_si256(); 2]; 5];
        for half in 0..2 {
            let [low, high] = [at[2 * half], at[2 * half + 1]];
            let (Some(low), Some(high)) = (bytes[low..].first_chunk(), bytes[high..].first_chunk()) else {
                unreachable!("a block starts 16 bytes or more before the end")
            };
            let mut fraction = fraction(both(low, high));
            for digits in &mut digits {
                // Three times the fraction is one or two wholes from these on.
                let one = _mm256_cmpeq_epi8(_mm256_max_epu8(fraction, _mm256_set1_epi8(86)), fraction);
                let two = _mm256_cmpeq_epi8(_mm256_max_epu8(fraction, _mm256_set1_epi8(171u8 as i8)), fraction);
                digits[half] = _mm256_abs_epi8(_mm256_add_epi8(one, two));
                fraction = _mm256_add_epi8(_mm256_add_epi8(fraction, fraction), fraction);
            }
        }
        digits
    }
}

/// Each byte over 243, in units of 1/256, rounded up; what is above 242 starts again at zero.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn fraction(bytes: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let even = more(_mm256_and_si256(bytes, _mm256_set1_epi16(0xff)));
        let odd = more(_mm256_srli_epi16::<8>(bytes));
        _mm256_add_epi8(bytes, _mm256_or_si256(even, _mm256_slli_epi16::<8>(odd)))
    }
}

/// `ceil(word * 13 / 243)` for words that are bytes; the division is exact for all of them.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn more(words: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let scaled = _mm256_add_epi16(_mm256_mullo_epi16(words, _mm256_set1_epi16(13)), _mm256_set1_epi16(239));
        _mm256_mulhi_epu16(scaled, _mm256_set1_epi16(270))
    }
}

/// Unpacks 32 codes of four bits.
///
/// # Safety
/// The CPU has AVX2, and 16 bytes are readable at `from`.
#[inline(always)]
unsafe fn nibbles(from: *const __m128i) -> __m256i {
    // SAFETY: the caller's promise; loads may be unaligned.
    unsafe {
        // Each byte goes to the low half of a word, and shifted to its high half.
        let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
        let both = _mm256_or_si256(words, _mm256_slli_epi16::<4>(words));
        _mm256_and_si256(both, _mm256_set1_epi8(0x0f))
    }
}

/// A register of two halves.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn both(low: &[u8; 16], high: &[u8; 16]) -> __m256i {
    // SAFETY: the arrays are 16 bytes, and loads may be unaligned; AVX2 is the caller's promise.
    unsafe { _mm256_set_m128i(_mm_loadu_si128(high.as_ptr().cast()), _mm_loadu_si128(low.as_ptr().cast())) }
}

/// Transposes 16 rows of four words, after a permutation of the bytes of each row where there is an `order`.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [&[u8; 16]; 16], order: Option<__m256i>) -> [[__m256; 2]; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = [[_mm256_setzero_ps(); 2]; 4];
        for half in 0..2 {
            // The halves of vector `i` are rows `i` and `i + 4`; what remains is two 4x4 transpositions.
            let mut v = [_mm256_setzero_ps(); 4];
            for (i, v) in v.iter_mut().enumerate() {
                let mut words = both(rows[8 * half + i], rows[8 * half + i + 4]);
                if let Some(order) = order {
                    words = _mm256_shuffle_epi8(words, order);
                }
                *v = _mm256_castsi256_ps(words);
            }
            let [a, b] = [_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1])];
            let [c, d] = [_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3])];
            out[0][half] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
            out[1][half] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
            out[2][half] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
            out[3][half] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
        }
        out
    }
}

/// 128 codes of four bits less `zero`; vector `k` has code `8l + k` in lane `l`.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn nibble_levels(bytes: &[u8; 64], zero: [__m256; 2]) -> [[__m256; 2]; 8] {
    let mut levels = [zero; 8];
    for half in 0..2 {
        // SAFETY: the caller's promise; the array is twice 32 bytes, and loads may be unaligned.
        unsafe {
            let mut words = _mm256_loadu_si256(bytes.as_ptr().cast::<__m256i>().add(half));
            for level in &mut levels {
                let codes = _mm256_and_si256(words, _mm256_set1_epi32(15));
                level[half] = _mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero[half]);
                words = _mm256_srli_epi32::<4>(words);
            }
        }
    }
    levels
}
