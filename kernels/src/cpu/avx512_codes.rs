//! Codes of any width out of a stream, and ternary digits, in 512-bit registers.

use std::arch::x86_64::*;

use super::simd::TERNARY_BYTES;

/// For each width, the byte of the stream that lands in each byte of the register: eight codes are `bits` bytes, and
/// go to one 64-bit element.
pub(super) const SPREAD: [[u8; 64]; 9] = {
    let mut table = [[0; 64]; 9];
    let mut bits = 1;
    while bits <= 8 {
        let mut i = 0;
        while i < 64 {
            let within = if i % 8 < bits { i % 8 } else { 0 };
            table[bits][i] = (i / 8 * bits + within) as u8;
            i += 1;
        }
        bits += 1;
    }
    table
};

/// For each width, the bit of its 64-bit element at which each code starts.
pub(super) const SHIFT: [[u8; 64]; 9] = {
    let mut table = [[0; 64]; 9];
    let mut bits = 1;
    while bits <= 8 {
        let mut i = 0;
        while i < 64 {
            table[bits][i] = (i % 8 * bits) as u8;
            i += 1;
        }
        bits += 1;
    }
    table
};

/// For each width up to four bits, the byte of 128 codes that lands in each byte of the register: a 64-bit element has eight
/// codes of the first half, then eight of the second.
const SPREAD_HALVES: [[u8; 64]; 9] = {
    let mut table = [[0; 64]; 9];
    let mut bits = 1;
    while bits <= 4 {
        let mut i = 0;
        while i < 64 {
            let (element, half, within) = (i / 8, i % 8 / bits, i % 8 % bits);
            if half < 2 {
                // Four elements of the first half, four of the second, and the same of the next 64 codes.
                table[bits][i] = ((element / 4 * 8 + half * 4 + element % 4) * bits + within) as u8;
            }
            i += 1;
        }
        bits += 1;
    }
    table
};

/// For each width, [`SPREAD`] where the last 32 codes come from the upper half of a register.
const SPREAD_QUARTERS: [[u8; 64]; 9] = {
    let mut table = SPREAD;
    let mut bits = 1;
    while bits <= 8 {
        let mut i = 32;
        while i < 64 {
            table[bits][i] = table[bits][i - 32] + 32;
            i += 1;
        }
        bits += 1;
    }
    table
};

/// Registers that unpack codes of one width.
#[derive(Clone, Copy)]
pub struct Unpack {
    bits: usize,
    spread: __m512i,
    halves: __m512i,
    quarters: __m512i,
    shift: __m512i,
    /// The shift for the second half of 128 codes.
    second: __m512i,
    mask: __m512i,
}

impl Unpack {
    /// # Safety
    /// The CPU has AVX-512 BW, and `bits` is from 1 to 8.
    #[inline(always)]
    pub(super) unsafe fn new(bits: u32) -> Self {
        // The window of a one-bit code starts a bit earlier, so that the code is doubled; windows wrap around.
        let (back, mask) = if bits == 1 { (63, 2) } else { (0, (1u32 << bits) - 1) };
        let width = bits as usize;
        // SAFETY: the caller's promise; the tables are 64 bytes, and loads may be unaligned.
        unsafe {
            let shift = _mm512_add_epi8(_mm512_loadu_si512(SHIFT[width].as_ptr().cast()), _mm512_set1_epi8(back));
            Self {
                bits: width,
                spread: _mm512_loadu_si512(SPREAD[width].as_ptr().cast()),
                halves: _mm512_loadu_si512(SPREAD_HALVES[width].as_ptr().cast()),
                quarters: _mm512_loadu_si512(SPREAD_QUARTERS[width].as_ptr().cast()),
                shift,
                second: _mm512_add_epi8(shift, _mm512_set1_epi8(8 * bits as i8)),
                mask: _mm512_set1_epi8(mask as u8 as i8),
            }
        }
    }

    /// Eight codes of each 64-bit element.
    ///
    /// # Safety
    /// The CPU has AVX-512 VBMI.
    #[inline(always)]
    unsafe fn shift(&self, shift: __m512i, elements: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, elements), self.mask) }
    }

    /// The first 64 codes.
    ///
    /// # Safety
    /// The CPU has AVX-512 VBMI.
    #[inline(always)]
    pub(super) unsafe fn spread(&self, bytes: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { self.shift(self.shift, _mm512_permutexvar_epi8(self.spread, bytes)) }
    }

    /// 128 codes of up to four bits: columns 0 to 31 and 64 to 95, then the rest.
    ///
    /// # Safety
    /// The CPU has AVX-512 VBMI.
    #[inline(always)]
    pub(super) unsafe fn halves(&self, bytes: __m512i) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let elements = _mm512_permutexvar_epi8(self.halves, bytes);
            [self.shift(self.shift, elements), self.shift(self.second, elements)]
        }
    }

    /// As [`halves`](Self::halves), of up to eight bits.
    ///
    /// # Safety
    /// The CPU has AVX-512 VBMI.
    #[inline(always)]
    pub(super) unsafe fn halves_of_two(&self, bytes: &[u8; 128]) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let [first, second] = quarters(bytes, 4 * self.bits);
            [
                self.shift(self.shift, _mm512_permutexvar_epi8(self.quarters, first)),
                self.shift(self.shift, _mm512_permutexvar_epi8(self.quarters, second)),
            ]
        }
    }
}

/// The first and the third, then the second and the fourth of quarters that start `apart` bytes apart, of 32 bytes each.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
pub(super) unsafe fn quarters(bytes: &[u8; 128], apart: usize) -> [__m512i; 2] {
    assert!(apart <= 32);
    // SAFETY: the last quarter ends within the array; loads may be unaligned; the instructions are the caller's promise.
    unsafe {
        let from = bytes.as_ptr();
        let mut first = _mm512_castsi256_si512(_mm256_loadu_si256(from.cast()));
        let mut second = _mm512_castsi256_si512(_mm256_loadu_si256(from.add(apart).cast()));
        first = _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(from.add(2 * apart).cast()));
        second = _mm512_inserti64x4::<1>(second, _mm256_loadu_si256(from.add(3 * apart).cast()));
        [first, second]
    }
}

/// For each phase, the byte that lands in each byte of the register.
const BLOCKS: [[u8; 64]; 5] = {
    let mut table = [[0; 64]; 5];
    let mut phase = 0;
    while phase < 5 {
        let mut i = 0;
        while i < 64 {
            table[phase][i] = (TERNARY_BYTES[phase][i / 16] + i % 16) as u8;
            i += 1;
        }
        phase += 1;
    }
    table
};

/// The four lower digits of every byte, two bits each, and the highest one.
const DIGITS: [[u8; 256]; 2] = {
    let mut table = [[0; 256]; 2];
    let mut byte = 0;
    while byte < 256 {
        table[0][byte] = (byte % 3 + 4 * (byte / 3 % 3) + 16 * (byte / 9 % 3) + 64 * (byte / 27 % 3)) as u8;
        table[1][byte] = (byte / 81 % 3) as u8;
        byte += 1;
    }
    table
};

/// The digits of four times 16 bytes, highest first; the others are multiplied by 64, 16, 4 and 1.
///
/// # Safety
/// The CPU has AVX-512 VBMI.
#[inline(always)]
pub(super) unsafe fn digits(bytes: &[u8; 64], phase: usize) -> [__m512i; 5] {
    // SAFETY: the caller's promise; the arrays are 64 bytes, and loads may be unaligned.
    unsafe {
        let places = _mm512_loadu_si512(BLOCKS[phase].as_ptr().cast());
        let bytes = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(bytes.as_ptr().cast()));
        let (lower, highest) = (lookup(&DIGITS[0], bytes), lookup(&DIGITS[1], bytes));
        let mut digits = [highest; 5];
        for (i, digits) in digits[1..].iter_mut().rev().enumerate() {
            *digits = _mm512_and_si512(lower, _mm512_set1_epi8((3u8 << (2 * i)) as i8));
        }
        digits
    }
}

/// The entry of `table` for each byte.
///
/// # Safety
/// The CPU has AVX-512 VBMI.
#[inline(always)]
unsafe fn lookup(table: &[u8; 256], bytes: __m512i) -> __m512i {
    let table: *const __m512i = table.as_ptr().cast();
    // SAFETY: the caller's promise; the table is four registers long, and loads may be unaligned.
    unsafe {
        // A permutation of two registers looks at seven bits.
        let lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table.add(1)));
        let upper = _mm512_permutex2var_epi8(_mm512_loadu_si512(table.add(2)), bytes, _mm512_loadu_si512(table.add(3)));
        _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(bytes), upper)
    }
}

/// Adds the products of digits and activations.
///
/// # Safety
/// The CPU has AVX-512 VNNI.
#[inline(always)]
pub(super) unsafe fn dot_digits(digits: &[__m512i; 5], a: [&[i8; 64]; 5], acc: __m512i) -> __m512i {
    // SAFETY: the caller's promise; the arrays are 64 bytes, and loads may be unaligned.
    unsafe {
        let highest = _mm512_dpbusd_epi32(acc, digits[0], _mm512_loadu_si512(a[0].as_ptr().cast()));
        let mut lower = _mm512_setzero_si512();
        for i in 1..5 {
            // Exact: what was added so far is a multiple of four.
            lower = _mm512_srai_epi32::<2>(lower);
            lower = _mm512_dpbusd_epi32(lower, digits[i], _mm512_loadu_si512(a[i].as_ptr().cast()));
        }
        _mm512_add_epi32(lower, highest)
    }
}

/// The codes of `BITS` bits from bit `AT` of each lane on, at most to bit 22, less `zero`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
pub(super) unsafe fn level<const BITS: u32, const AT: u32>(words: __m512i, zero: __m512) -> __m512 {
    const { assert!(AT + BITS <= 23, "the mantissa has 23 bits") };
    // SAFETY: the caller's promise.
    unsafe {
        // In a number from 2^(23 - AT) on, bit `AT` of the mantissa counts 1.
        let start = _mm512_set1_epi32(((150 - AT) << 23) as i32);
        let mask = _mm512_set1_epi32(((1 << BITS) - 1) << AT);
        let codes = _mm512_ternarylogic_epi32::<0b1110_1010>(words, mask, start);
        _mm512_sub_ps(_mm512_castsi512_ps(codes), _mm512_add_ps(_mm512_castsi512_ps(start), zero))
    }
}
