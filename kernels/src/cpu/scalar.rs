//! The logical vector without vector instructions: the fallback on every CPU and the meaning of every operation.

use half::f16;

use super::simd::{Simd, TERNARY_BYTES, TERNARY_FACTORS};

/// Token for plain scalar code, which every CPU runs.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

#[inline(always)]
fn map(v: [f32; 16], f: impl Fn(f32) -> f32) -> [f32; 16] {
    v.map(f)
}

#[inline(always)]
fn zip(mut a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    for (a, b) in a.iter_mut().zip(b) {
        *a = f(*a, b);
    }
    a
}

/// Folds lane `i` with `i + 8`, then `i + 4`, `i + 2` and `i + 1`.
#[inline(always)]
fn fold<T: Copy>(mut v: [T; 16], f: impl Fn(T, T) -> T) -> T {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
    }
    v[0]
}

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// `2^n` for `n` from -126 to 127.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

impl Simd for Scalar {
    type F32 = [f32; 16];
    type I32 = [i32; 16];
    type U8 = [u8; 64];
    type Unpack = u32;
    type Digits = [[u8; 64]; 5];

    const REGISTERS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }

    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> [f32; 16] {
        let mut v = [0.0; 16];
        v[..from.len()].copy_from_slice(from);
        v
    }

    #[inline(always)]
    fn store(self, v: [f32; 16], to: &mut [f32; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn store_partial(self, v: [f32; 16], to: &mut [f32]) {
        to.copy_from_slice(&v[..to.len()]);
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 64]) -> [f32; 16] {
        let mut v = [0.0; 16];
        for (v, &bytes) in v.iter_mut().zip(from.as_chunks::<4>().0) {
            *v = f32::from_le_bytes(bytes);
        }
        v
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 32]) -> [f32; 16] {
        let mut v = [0.0; 16];
        for (v, &bytes) in v.iter_mut().zip(from.as_chunks::<2>().0) {
            *v = f16::from_le_bytes(bytes).to_f32_const();
        }
        v
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 32]) -> [f32; 16] {
        let mut v = [0.0; 16];
        for (v, &bytes) in v.iter_mut().zip(from.as_chunks::<2>().0) {
            *v = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
        }
        v
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 16]) -> [f32; 16] {
        from.map(f32::from)
    }

    #[inline(always)]
    fn to_u8(self, v: [f32; 16]) -> [u8; 16] {
        v.map(|v| v as u8)
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], mut c: [f32; 16]) -> [f32; 16] {
        for (c, (a, b)) in c.iter_mut().zip(a.into_iter().zip(b)) {
            *c = a.mul_add(b, *c);
        }
        c
    }

    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, min)
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, max)
    }

    #[inline(always)]
    fn abs(self, v: [f32; 16]) -> [f32; 16] {
        map(v, f32::abs)
    }

    #[inline(always)]
    fn neg(self, v: [f32; 16]) -> [f32; 16] {
        map(v, |v| -v)
    }

    #[inline(always)]
    fn round_even(self, v: [f32; 16]) -> [f32; 16] {
        map(v, f32::round_ties_even)
    }

    #[inline(always)]
    fn select_ge(self, a: [f32; 16], b: [f32; 16], x: [f32; 16], mut y: [f32; 16]) -> [f32; 16] {
        for i in 0..16 {
            if a[i] >= b[i] {
                y[i] = x[i];
            }
        }
        y
    }

    #[inline(always)]
    fn scale_pow2(self, v: [f32; 16], n: [f32; 16]) -> [f32; 16] {
        zip(v, n, |v, n| {
            let n = n as i32;
            v * pow2(n >> 1) * pow2(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 16]; 16]) -> [[f32; 16]; 4] {
        let mut out = [[0.0; 16]; 4];
        for (lane, row) in rows.into_iter().enumerate() {
            for (out, &word) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                out[lane] = f32::from_bits(u32::from_ne_bytes(word));
            }
        }
        out
    }

    #[inline(always)]
    fn transpose_ordered(self, rows: [&[u8; 16]; 16], order: &[u8; 16]) -> [[f32; 16]; 4] {
        let ordered = rows.map(|row| order.map(|from| row[usize::from(from)]));
        self.transpose_words(std::array::from_fn(|row| &ordered[row]))
    }

    #[inline(always)]
    fn unpack_lanes(self, words: [f32; 16], bits: u32, shift: u32) -> [f32; 16] {
        let mask = (1u32 << bits) - 1;
        words.map(|word| {
            let code = |i: u32| (word.to_bits() >> (shift + i * bits) & mask) as u8;
            f32::from_ne_bytes([code(0), code(1), code(2), code(3)])
        })
    }

    #[inline(always)]
    fn sum(self, v: [f32; 16]) -> f32 {
        fold(v, |a, b| a + b)
    }

    #[inline(always)]
    fn max_lane(self, v: [f32; 16]) -> f32 {
        fold(v, max)
    }

    #[inline(always)]
    fn min_lane(self, v: [f32; 16]) -> f32 {
        fold(v, min)
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [i32; 16] {
        [value; 16]
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> [i32; 16] {
        *from
    }

    #[inline(always)]
    fn store_i32(self, v: [i32; 16], to: &mut [i32; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn mul_i32(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(always)]
    fn dot_u8i8(self, u: [i32; 16], a: [i32; 16], mut acc: [i32; 16]) -> [i32; 16] {
        for ((acc, u), a) in acc.iter_mut().zip(u).zip(a) {
            for (u, a) in u.to_ne_bytes().into_iter().zip(a.to_ne_bytes()) {
                *acc = acc.wrapping_add(i32::from(u) * i32::from(a as i8));
            }
        }
        acc
    }

    #[inline(always)]
    fn i32_to_f32(self, v: [i32; 16]) -> [f32; 16] {
        v.map(|v| v as f32)
    }

    #[inline(always)]
    fn sum_i32(self, v: [i32; 16]) -> i32 {
        fold(v, i32::wrapping_add)
    }

    #[inline(always)]
    fn unpack64(self, stream: &[u8], bits: u32) -> [u8; 64] {
        assert!((1..=8).contains(&bits));
        let width = bits as usize;
        let mask = (1u64 << bits) - 1;
        let mut codes = [0; 64];
        for (eight, from) in codes.as_chunks_mut::<8>().0.iter_mut().zip(stream[..8 * width].chunks_exact(width)) {
            let mut word = [0; 8];
            word[..width].copy_from_slice(from);
            let word = u64::from_le_bytes(word);
            for (i, code) in eight.iter_mut().enumerate() {
                *code = (word >> (i as u32 * bits) & mask) as u8;
            }
        }
        codes
    }

    #[inline(always)]
    fn unpack(self, bits: u32) -> u32 {
        assert!((1..=8).contains(&bits));
        bits
    }

    #[inline(always)]
    fn codes(self, &bits: &u32, stream: &[u8; 64]) -> [u8; 64] {
        let codes = self.unpack64(stream, bits);
        if bits == 1 { codes.map(|code| 2 * code) } else { codes }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> [u8; 64] {
        *from
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 64]) -> [[u8; 64]; 2] {
        [bytes.map(|byte| byte & 15), bytes.map(|byte| byte >> 4)]
    }

    #[inline(always)]
    fn halves(self, unpack: &u32, bytes: &[u8; 64]) -> [[u8; 64]; 2] {
        let mut both = [0; 128];
        both[..64].copy_from_slice(bytes);
        self.halves_of_two(unpack, &both)
    }

    #[inline(always)]
    fn halves_of_two(self, unpack: &u32, bytes: &[u8; 128]) -> [[u8; 64]; 2] {
        let [mut low, mut high] = [[0; 64]; 2];
        for half in 0..2 {
            let mut stream = [0; 64];
            let width = 8 * *unpack as usize;
            stream[..width].copy_from_slice(&bytes[half * width..][..width]);
            let codes = self.codes(unpack, &stream);
            low[half * 32..][..32].copy_from_slice(&codes[..32]);
            high[half * 32..][..32].copy_from_slice(&codes[32..]);
        }
        [low, high]
    }

    #[inline(always)]
    fn halves_of_bytes(self, bytes: &[u8; 128]) -> [[u8; 64]; 2] {
        self.halves_of_two(&8, bytes)
    }

    #[inline(always)]
    fn digits(self, bytes: &[u8; 64], phase: usize) -> [[u8; 64]; 5] {
        let mut digits = [[0; 64]; 5];
        for i in 0..64 {
            let mut rest = bytes[TERNARY_BYTES[phase][i / 16] + i % 16];
            for digits in digits.iter_mut().rev() {
                digits[i] = rest % 3;
                rest /= 3;
            }
        }
        digits
    }

    #[inline(always)]
    fn dot_digits(self, digits: &[[u8; 64]; 5], a: [&[i8; 64]; 5], acc: [i32; 16]) -> [i32; 16] {
        digits.iter().zip(a).fold(acc, |acc, (&u, a)| self.dot_codes(u, a, acc, false))
    }

    #[inline(always)]
    fn ternary_codes(self, bytes: &[u8; 64], phase: usize) -> [u8; 64] {
        std::array::from_fn(|i| {
            let fraction = u16::from(bytes[(phase + i) / 5]).wrapping_mul(TERNARY_FACTORS[(phase + i) % 5]);
            ((u32::from(fraction) * 3) >> 16) as u8
        })
    }

    #[inline(always)]
    fn dot_codes(self, u: [u8; 64], a: &[i8; 64], mut acc: [i32; 16], _: bool) -> [i32; 16] {
        for (acc, (u, a)) in acc.iter_mut().zip(u.as_chunks::<4>().0.iter().zip(a.as_chunks::<4>().0)) {
            for (&u, &a) in u.iter().zip(a) {
                *acc = acc.wrapping_add(i32::from(u) * i32::from(a));
            }
        }
        acc
    }

    #[inline(always)]
    fn levels<const NARROW: bool>(self, u: [u8; 64], zero: [f32; 16]) -> [[f32; 16]; 4] {
        let mut levels = [[0.0; 16]; 4];
        for (i, u) in u.into_iter().enumerate() {
            levels[i % 4][i / 4] = f32::from(u) - zero[i / 4];
        }
        levels
    }

    #[inline(always)]
    fn nibble_levels<const SAME: bool>(self, bytes: &[u8; 64], zero: [f32; 16]) -> [[f32; 16]; 8] {
        let mut levels = [[0.0; 16]; 8];
        for (i, byte) in bytes.iter().enumerate() {
            let (k, lane) = (2 * i % 8, 2 * i / 8);
            levels[k][lane] = f32::from(byte & 15) - zero[lane];
            levels[k + 1][lane] = f32::from(byte >> 4) - zero[lane];
        }
        levels
    }

    #[inline(always)]
    fn permute(self, from: &[f32; 16], index: &[i32; 16]) -> [f32; 16] {
        index.map(|index| from[index as usize])
    }
}
