//! The vector operations of the products of a few tokens, on every instruction set, against plain arithmetic.

use bkpack_kernels::Cpu;
use bkpack_kernels::bits::{TERNARY_PER_BYTE, unpack_stream, unpack_ternary};
use bkpack_kernels::cpu::Kernel;
use bkpack_kernels::cpu::simd::{Aligned, Simd};

/// A xorshift generator: these tests need many values, not good ones.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % end
    }
}

/// 64 codes of a dense stream, or ternary ones from a phase on, and what the operations make of them.
struct Codes<'a> {
    stream: &'a [u8; 64],
    bits: Option<u32>,
    phase: usize,
    a: &'a [i8; 64],
    start: &'a [i32; 16],
}

struct Found {
    dots: [f32; 16],
    narrow: [[f32; 16]; 4],
    wide: [[f32; 16]; 4],
}

const ZERO: f32 = 3.0;

impl Kernel for Codes<'_> {
    type Output = Found;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Found {
        let u = match self.bits {
            Some(bits) => simd.codes(&simd.unpack(bits), self.stream),
            None => simd.ternary_codes(self.stream, self.phase),
        };
        let mut found = Found { dots: [0.0; 16], narrow: [[0.0; 16]; 4], wide: [[0.0; 16]; 4] };
        let dots = simd.dot_codes(u, self.a, simd.load_i32(self.start), self.bits == Some(8));
        simd.store(simd.i32_to_f32(dots), &mut found.dots);
        let narrow = simd.levels::<true>(u, simd.splat(ZERO));
        let wide = simd.levels::<false>(u, simd.splat(ZERO));
        for k in 0..4 {
            simd.store(narrow[k], &mut found.narrow[k]);
            simd.store(wide[k], &mut found.wide[k]);
        }
        found
    }
}

fn check(random: &mut Random, stream: &[u8; 64], bits: Option<u32>, phase: usize, codes: &[u8]) {
    // Once with the extremes, whose products saturate where they are added in 16 bits.
    for extreme in [false, true] {
        let a: [i8; 64] = std::array::from_fn(|_| if extreme { -127 } else { (random.below(255) as i32 - 127) as i8 });
        let start: [i32; 16] = std::array::from_fn(|_| random.below(20_000) as i32 - 10_000);
        for cpu in Cpu::available() {
            let found = cpu.dispatch(Codes { stream, bits, phase, a: &a, start: &start });
            for lane in 0..16 {
                let context = format!("{bits:?} bits, phase {phase}, lane {lane} on {}", cpu.isa());
                let four = 4 * lane..4 * lane + 4;
                let products = four.map(|i| i32::from(codes[i]) * i32::from(a[i]));
                let dot = start[lane] + products.sum::<i32>();
                assert_eq!(found.dots[lane], dot as f32, "{context}");
                for k in 0..4 {
                    let level = f32::from(codes[4 * lane + k]) - ZERO;
                    assert_eq!(found.wide[k][lane], level, "{context}");
                    if codes.iter().all(|&code| code < 16) {
                        assert_eq!(found.narrow[k][lane], level, "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn codes_of_a_stream() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for bits in 1..=8 {
        for round in 0..20 {
            let stream = std::array::from_fn(|_| if round == 0 { 0xff } else { random.below(256) as u8 });
            let mut codes = [0; 64];
            unpack_stream(&stream, bits, &mut codes);
            if bits == 1 {
                codes = codes.map(|code| 2 * code);
            }
            check(&mut random, &stream, Some(bits), 0, &codes);
        }
    }
}

#[test]
fn ternary_codes() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for phase in 0..TERNARY_PER_BYTE {
        // Every byte comes to stand in every place.
        for first in 0..243 {
            let stream = std::array::from_fn(|i| ((first + i * 17) % 243) as u8);
            let mut codes = [0; 70];
            unpack_ternary(&stream, &mut codes);
            check(&mut random, &stream, None, phase, &codes[phase..][..64]);
        }
    }
}

/// Dot products with the low and with the high four bits of each byte.
struct Halves<'a>(&'a [u8; 64], &'a [i8; 64]);

impl Kernel for Halves<'_> {
    type Output = [[f32; 16]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[f32; 16]; 2] {
        let mut out = [[0.0; 16]; 2];
        for (u, out) in simd.nibbles(self.0).into_iter().zip(&mut out) {
            simd.store(simd.i32_to_f32(simd.dot_codes(u, self.1, simd.splat_i32(0), false)), out);
        }
        out
    }
}

#[test]
fn nibbles() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20 {
        let bytes: [u8; 64] = std::array::from_fn(|_| random.below(256) as u8);
        let a: [i8; 64] = std::array::from_fn(|_| (random.below(255) as i32 - 127) as i8);
        let dots = |shift: u32| -> [f32; 16] {
            std::array::from_fn(|lane| {
                let products = (4 * lane..4 * lane + 4).map(|i| i32::from(bytes[i] >> shift & 15) * i32::from(a[i]));
                products.sum::<i32>() as f32
            })
        };
        for cpu in Cpu::available() {
            assert_eq!(cpu.dispatch(Halves(&bytes, &a)), [dots(0), dots(4)], "{}", cpu.isa());
        }
    }
}

/// Dot products of 128 codes of a stream, by the halves of a wide step.
struct WideStep<'a> {
    bytes: &'a [u8; 128],
    bits: u32,
    /// Columns 0 to 31 and 64 to 95, then the rest.
    a: [&'a [i8; 64]; 2],
}

impl Kernel for WideStep<'_> {
    type Output = Vec<[f32; 16]>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<[f32; 16]> {
        let Some(first) = self.bytes.first_chunk() else { unreachable!("64 of 128 bytes") };
        let unpack = simd.unpack(self.bits);
        let mut ways = vec![simd.halves_of_two(&unpack, self.bytes)];
        if self.bits <= 4 {
            ways.push(simd.halves(&unpack, first));
        }
        if self.bits == 8 {
            ways.push(simd.halves_of_bytes(self.bytes));
        }
        let mut dots = Vec::new();
        for [u, v] in ways {
            let dot = simd.dot_codes(u, self.a[0], simd.splat_i32(0), self.bits == 8);
            let dot = simd.dot_codes(v, self.a[1], dot, self.bits == 8);
            dots.push([0.0; 16]);
            simd.store(simd.i32_to_f32(dot), dots.last_mut().unwrap());
        }
        dots
    }
}

#[test]
fn halves_of_a_stream() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for bits in 1..=8 {
        for _ in 0..20 {
            let bytes: [u8; 128] = std::array::from_fn(|_| random.below(256) as u8);
            let mut codes = [0; 128];
            unpack_stream(&bytes, bits, &mut codes);
            let times = if bits == 1 { 2 } else { 1 };
            let [a, b]: [[i8; 64]; 2] =
                std::array::from_fn(|_| std::array::from_fn(|_| (random.below(255) as i32 - 127) as i8));
            let dots: [f32; 16] = std::array::from_fn(|lane| {
                // The lanes of the upper half have columns from 64 on.
                let first = if lane < 8 { 4 * lane } else { 64 + 4 * (lane - 8) };
                let dot = |column: usize, a: &[i8; 64]| -> i32 {
                    (0..4).map(|i| i32::from(codes[column + i]) * times * i32::from(a[4 * lane + i])).sum()
                };
                (dot(first, &a) + dot(first + 32, &b)) as f32
            });
            for cpu in Cpu::available() {
                for way in cpu.dispatch(WideStep { bytes: &bytes, bits, a: [&a, &b] }) {
                    assert_eq!(way, dots, "{bits} bits on {}", cpu.isa());
                }
            }
        }
    }
}

/// Dot products of 256 ternary codes.
struct TernaryStep<'a> {
    bytes: &'a [u8; 64],
    phase: usize,
    a: &'a [[i8; 64]; 5],
    start: &'a [i32; 16],
}

impl Kernel for TernaryStep<'_> {
    type Output = [f32; 16];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; 16] {
        let digits = simd.digits(self.bytes, self.phase);
        let dot = simd.dot_digits(&digits, self.a.each_ref(), simd.load_i32(self.start));
        let mut out = [0.0; 16];
        simd.store(simd.i32_to_f32(dot), &mut out);
        out
    }
}

#[test]
fn ternary_digits() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for phase in 0..TERNARY_PER_BYTE {
        // Every byte comes to stand in every place, those that no writer makes among them.
        for first in 0..256 {
            let bytes: [u8; 64] = std::array::from_fn(|i| (first + i * 17) as u8);
            let mut codes = [0; 64 * TERNARY_PER_BYTE];
            unpack_ternary(&bytes, &mut codes);
            let a: [[i8; 64]; 5] = std::array::from_fn(|_| {
                std::array::from_fn(|_| if first % 8 == 0 { -127 } else { (random.below(255) as i32 - 127) as i8 })
            });
            let start: [i32; 16] = std::array::from_fn(|_| random.below(20_000) as i32 - 10_000);
            let dots: [f32; 16] = std::array::from_fn(|lane| {
                let block = (phase + lane / 4 * 64) / 5;
                let dots = (4 * lane..4 * lane + 4).flat_map(|i| {
                    let codes = &codes[5 * (block + i % 16)..][..5];
                    codes.iter().rev().zip(&a).map(move |(&code, a)| i32::from(code) * i32::from(a[i]))
                });
                (start[lane] + dots.sum::<i32>()) as f32
            });
            for cpu in Cpu::available() {
                let found = cpu.dispatch(TernaryStep { bytes: &bytes, phase, a: &a, start: &start });
                assert_eq!(found, dots, "phase {phase}, first byte {first} on {}", cpu.isa());
            }
        }
    }
}

/// The sums of 16 vectors, together and one by one.
struct Sums<'a>(&'a [Aligned<[f32; 16]>; 16]);

impl Kernel for Sums<'_> {
    type Output = [[f32; 16]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[f32; 16]; 2] {
        let mut out = [[0.0; 16]; 2];
        simd.store(simd.sums(self.0), &mut out[0]);
        for (out, from) in out[1].iter_mut().zip(self.0) {
            *out = simd.sum(simd.load(from));
        }
        out
    }
}

#[test]
fn sums_of_vectors() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..100 {
        let mut value = || random.below(1 << 24) as f32 * 1e-5 - 80.0;
        let from = std::array::from_fn(|_| Aligned(std::array::from_fn(|_| value())));
        for cpu in Cpu::available() {
            let [together, each] = cpu.dispatch(Sums(&from));
            assert_eq!(together.map(f32::to_bits), each.map(f32::to_bits), "{}", cpu.isa());
        }
    }
}

/// One vector by an index for each lane.
struct Permute<'a>(&'a [f32; 16], &'a [i32; 16]);

impl Kernel for Permute<'_> {
    type Output = [f32; 16];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; 16] {
        let mut out = [0.0; 16];
        simd.store(simd.permute(self.0, self.1), &mut out);
        out
    }
}

#[test]
fn permutations() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..100 {
        let from: [f32; 16] = std::array::from_fn(|i| i as f32);
        let index = std::array::from_fn(|_| random.below(16) as i32);
        for cpu in Cpu::available() {
            assert_eq!(cpu.dispatch(Permute(&from, &index)), index.map(|index| index as f32), "{}", cpu.isa());
        }
    }
}

/// The levels of 128 codes of four bits, with a zero point for each lane and with one for all.
struct NibbleLevels<'a> {
    bytes: &'a [u8; 64],
    zeros: &'a [f32; 16],
}

impl Kernel for NibbleLevels<'_> {
    type Output = [[[f32; 16]; 8]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let each = simd.nibble_levels::<false>(self.bytes, simd.load(self.zeros));
        let same = simd.nibble_levels::<true>(self.bytes, simd.splat(ZERO));
        let mut found = [[[0.0; 16]; 8]; 2];
        for k in 0..8 {
            simd.store(each[k], &mut found[0][k]);
            simd.store(same[k], &mut found[1][k]);
        }
        found
    }
}

#[test]
fn levels_of_four_bits_are_exact_with_any_zero_point() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for cpu in Cpu::available() {
        for _ in 0..100 {
            let bytes: [u8; 64] = std::array::from_fn(|_| random.below(256) as u8);
            let zeros: [f32; 16] = std::array::from_fn(|_| random.below(16) as f32);
            let [each, same] = cpu.dispatch(NibbleLevels { bytes: &bytes, zeros: &zeros });
            for column in 0..128 {
                let code = f32::from(bytes[column / 2] >> (4 * (column % 2)) & 15);
                let (lane, k) = (column / 8, column % 8);
                assert_eq!(each[k][lane], code - zeros[lane], "{}, column {column}", cpu.isa());
                assert_eq!(same[k][lane], code - ZERO, "{}, column {column}", cpu.isa());
            }
        }
    }
}
