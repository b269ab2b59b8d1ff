//! Codes of any width out of a stream, and transpositions, in 256-bit registers.

use std::arch::x86_64::*;

/// How 64 codes of a width are unpacked, 16 to a half of a register: a window of 16 bits around every code, shifted left by a
/// multiplication so that the code starts at bit 8.
#[derive(Clone, Copy)]
struct Windows {
    /// Where each quarter of the codes is loaded from; moved back where 16 bytes would pass the end of the stream.
    offset: [usize; 4],
    /// For each half of the codes, the bytes of the windows of the first and of the last eight of each of its quarters.
    bytes: [[[u8; 32]; 2]; 2],
    /// For each of eight codes, the power of two that moves it to bit 8 of its window, or to bit 9 where there is one bit.
    factors: [u16; 8],
    /// The bits of a code.
    mask: u8,
}

const WINDOWS: [Windows; 9] = {
    let mut table = [Windows { offset: [0; 4], bytes: [[[0; 32]; 2]; 2], factors: [0; 8], mask: 0 }; 9];
    let mut bits = 1;
    while bits <= 8 {
        let last = if bits == 1 { 0 } else { 8 * bits - 16 };
        let doubled = (bits == 1) as usize;
        let mut i = 0;
        while i < 64 {
            let quarter = i / 16;
            let wanted = 2 * bits * quarter;
            let offset = if wanted < last { wanted } else { last };
            table[bits].offset[quarter] = offset;
            let byte = i * bits / 8 - offset;
            // A code that ends within its first byte needs no second one; a set high bit makes the shuffle write zero.
            let second = if i * bits % 8 + bits > 8 { byte + 1 } else { 0x80 };
            let window = &mut table[bits].bytes[quarter / 2][i % 16 / 8];
            let at = quarter % 2 * 16 + i % 8 * 2;
            window[at] = byte as u8;
            window[at + 1] = second as u8;
            table[bits].factors[i % 8] = 1 << (8 + doubled - i * bits % 8);
            i += 1;
        }
        table[bits].mask = (((1 << bits) - 1) << doubled) as u8;
        bits += 1;
    }
    table
};

/// [`WINDOWS`] of a width in registers.
#[derive(Clone, Copy)]
pub struct Unpack {
    bits: u32,
    offset: [usize; 4],
    windows: [[__m256i; 2]; 2],
    factors: __m256i,
    mask: __m256i,
}

impl Unpack {
    /// For `bits` from 1 to 8.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[inline(always)]
    pub(super) unsafe fn new(bits: u32) -> Self {
        let table = &WINDOWS[bits as usize];
        // SAFETY: the arrays of windows are 32 bytes, the factors 16, and loads may be unaligned; AVX2 is the caller's promise.
        unsafe {
            let mut windows = [[_mm256_setzero_si256(); 2]; 2];
            for (windows, bytes) in windows.iter_mut().zip(&table.bytes) {
                for (window, bytes) in windows.iter_mut().zip(bytes) {
                    *window = _mm256_loadu_si256(bytes.as_ptr().cast());
                }
            }
            let factors = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.factors.as_ptr().cast()));
            let mask = _mm256_set1_epi8(table.mask as i8);
            Self { bits, offset: table.offset, windows, factors, mask }
        }
    }

    /// The width.
    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    /// Unpacks 64 codes; those of one bit are doubled.
    ///
    /// # Safety
    /// The CPU has AVX2, and as many bytes as the codes have are readable at `stream`; 16 where these have one bit.
    #[inline(always)]
    pub(super) unsafe fn codes(&self, stream: *const u8) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                4 => [nibbles(stream), nibbles(stream.add(16))],
                8 => load(stream),
                _ => self.windows(stream),
            }
        }
    }

    /// [`codes`](Self::codes) by their windows.
    ///
    /// # Safety
    /// As for [`codes`](Self::codes).
    #[inline(always)]
    unsafe fn windows(&self, stream: *const u8) -> [__m256i; 2] {
        let mut codes = [self.mask; 2];
        for (half, codes) in codes.iter_mut().enumerate() {
            let [first, last] = self.windows[half];
            // SAFETY: 16 bytes are loaded at an offset that is at most 16 below the length of the stream, or at 0 where codes
            // have one bit; the rest is the caller's promise. Loads may be unaligned.
            unsafe {
                let [low, high] = [self.offset[2 * half], self.offset[2 * half + 1]];
                let bytes =
                    _mm256_set_m128i(_mm_loadu_si128(stream.add(high).cast()), _mm_loadu_si128(stream.add(low).cast()));
                let first = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, first), self.factors);
                let last = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, last), self.factors);
                let packed = _mm256_packus_epi16(_mm256_srli_epi16::<8>(first), _mm256_srli_epi16::<8>(last));
                *codes = _mm256_and_si256(packed, self.mask);
            }
        }
        codes
    }

    /// Unpacks 128 codes: columns 0 to 31 and 64 to 95, then the rest; those of one bit are doubled.
    ///
    /// # Safety
    /// The CPU has AVX2, and as many bytes as the codes have are readable at `stream`; 24 where these have one bit.
    #[inline(always)]
    pub(super) unsafe fn halves(&self, stream: *const u8) -> [[__m256i; 2]; 2] {
        // SAFETY: the caller's promise.
        let [first, second] = unsafe { [self.codes(stream), self.codes(stream.add(8 * self.bits as usize))] };
        [[first[0], second[0]], [first[1], second[1]]]
    }
}

/// Unpacks 64 codes of `bits` bits, 1 to 8, to bytes.
///
/// # Safety
/// The CPU has AVX2, and the stream is as long as its codes.
#[inline(always)]
pub(super) unsafe fn unpack64(stream: &[u8], bits: u32) -> [u8; 64] {
    let (mut codes, mut padded) = ([0; 64], [0; 16]);
    // SAFETY: the caller's promise; where codes have one bit, the stream is padded to 16 bytes. `codes` is 64 bytes, and stores
    // may be unaligned.
    unsafe {
        let mut from = stream.as_ptr();
        if bits == 1 {
            padded[..stream.len()].copy_from_slice(stream);
            from = padded.as_ptr();
        }
        for (i, mut vector) in Unpack::new(bits).codes(from).into_iter().enumerate() {
            if bits == 1 {
                // They come doubled.
                vector = _mm256_srli_epi16::<1>(vector);
            }
            _mm256_storeu_si256(codes.as_mut_ptr().add(32 * i).cast(), vector);
        }
    }
    codes
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
unsafe fn nibbles(from: *const u8) -> __m256i {
    // SAFETY: the caller's promise; loads may be unaligned.
    unsafe {
        // Each byte goes to the low half of a word, and shifted to its high half.
        let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
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
