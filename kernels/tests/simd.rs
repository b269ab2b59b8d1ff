//! Every operation of the logical vector, on every instruction set, against plain arithmetic and bit for bit against
//! the scalar implementation.

use bkpack_kernels::bits::unpack_stream;
use bkpack_kernels::cpu::Kernel;
use bkpack_kernels::cpu::simd::Simd;
use bkpack_kernels::{Cpu, Isa};
use half::f16;

/// A xorshift generator: these tests need many values, not good ones.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Any bit pattern but NaN, with zeros, infinities, halves and equal pairs made likely.
    fn float(&mut self) -> f32 {
        const SPECIAL: [f32; 10] = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 0.5, 1.5, -2.5, 1.0, -1.0, 1e-40];
        let bits = self.next();
        let value = match bits >> 60 {
            0..4 => SPECIAL[(bits % 10) as usize],
            4..10 => (bits as u32 as f32 / 2f32.powi(31) - 1.0) * 200.0,
            _ => f32::from_bits(bits as u32),
        };
        if value.is_nan() { 0.25 } else { value }
    }

    fn lanes(&mut self) -> [f32; 16] {
        std::array::from_fn(|_| self.float())
    }
}

#[test]
fn x86_with_avx2_is_tested_on_avx2() {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        assert!(Cpu::available().iter().any(|cpu| cpu.isa() == Isa::Avx2));
    }
    assert!(Cpu::available().iter().any(|cpu| cpu.isa() == Isa::Scalar));
}

/// The bits of the results of every f32 operation; NaNs made alike.
struct Arithmetic<'a> {
    inputs: &'a [[f32; 16]; 4],
    bytes: &'a [u8; 64],
}

impl Kernel for Arithmetic<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<u32> {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| simd.load(&self.inputs[i]));
        let whole = simd.round_even(simd.min(simd.max(a, simd.splat(-300.0)), simd.splat(300.0)));
        let exponent = simd.min(simd.max(whole, simd.splat(-252.0)), simd.splat(254.0));
        let near_one = simd.add(simd.splat(1.0), simd.mul(exponent, simd.splat(1e-3)));
        let vectors = [
            simd.splat(self.inputs[0][3]),
            simd.add(a, b),
            simd.sub(a, b),
            simd.mul(a, b),
            simd.div(a, b),
            simd.mul_add(a, b, c),
            simd.min(a, b),
            simd.max(a, b),
            simd.abs(a),
            simd.neg(a),
            simd.round_even(a),
            simd.select_ge(a, b, c, d),
            simd.select_ge(a, a, c, d),
            simd.scale_pow2(near_one, exponent),
            simd.exp(a),
            simd.load_f32(self.bytes),
            simd.load_f16(self.bytes.first_chunk().unwrap()),
            simd.load_bf16(self.bytes.first_chunk().unwrap()),
            simd.load_u8(self.bytes.first_chunk().unwrap()),
            simd.exp2(a),
        ];
        let mut out = Vec::new();
        for v in vectors {
            let mut lanes = [0.0; 16];
            simd.store(v, &mut lanes);
            out.extend(lanes);
            out.extend([simd.sum(v), simd.max_lane(v), simd.min_lane(v)]);
        }
        for count in 0..=16 {
            let mut partial = [7.0; 16];
            simd.store_partial(a, &mut partial[..count]);
            out.extend(partial);
            simd.store(simd.load_partial(&self.inputs[1][..count]), &mut partial);
            out.extend(partial);
        }
        let mut out: Vec<u32> = out.iter().map(|v| if v.is_nan() { f32::NAN } else { *v }.to_bits()).collect();
        out.extend(simd.to_u8(whole).map(u32::from));
        out
    }
}

#[test]
fn arithmetic_is_identical_on_every_instruction_set() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let scalar = Cpu::with_isa(Isa::Scalar).unwrap();
    for round in 0..4000 {
        let inputs = std::array::from_fn(|_| random.lanes());
        let bytes = std::array::from_fn(|_| random.next() as u8);
        let expected = scalar.dispatch(Arithmetic { inputs: &inputs, bytes: &bytes });
        for cpu in Cpu::available() {
            let found = cpu.dispatch(Arithmetic { inputs: &inputs, bytes: &bytes });
            assert_eq!(found.len(), expected.len());
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(f, e, "value {i} of round {round} on {}: inputs {inputs:?}", cpu.isa());
            }
        }
    }
}

#[test]
fn scalar_operations_mean_what_they_say() {
    let mut random = Random(77);
    for _ in 0..1000 {
        let inputs: [[f32; 16]; 4] = std::array::from_fn(|_| random.lanes());
        let bytes: [u8; 64] = std::array::from_fn(|_| random.next() as u8);
        let found = Cpu::with_isa(Isa::Scalar).unwrap().dispatch(Arithmetic { inputs: &inputs, bytes: &bytes });
        let same = |vector: usize, lane: usize, expected: f32| {
            let value = f32::from_bits(found[vector * 19 + lane]);
            assert!(value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan(), "{vector} {lane}");
        };
        for lane in 0..16 {
            let [a, b, c, d] = inputs.map(|input| input[lane]);
            same(1, lane, a + b);
            same(2, lane, a - b);
            same(3, lane, a * b);
            same(4, lane, a / b);
            same(5, lane, a.mul_add(b, c));
            same(6, lane, if a < b { a } else { b });
            same(7, lane, if a > b { a } else { b });
            same(8, lane, a.abs());
            same(9, lane, -a);
            same(10, lane, a.round_ties_even());
            same(11, lane, if a >= b { c } else { d });
            same(12, lane, c);
            same(15, lane, f32::from_le_bytes(bytes[4 * lane..][..4].try_into().unwrap()));
            same(16, lane, f16::from_le_bytes(bytes[2 * lane..][..2].try_into().unwrap()).to_f32());
            same(17, lane, f32::from_bits(u32::from_le_bytes([0, 0, bytes[2 * lane], bytes[2 * lane + 1]])));
            same(18, lane, f32::from(bytes[lane]));
            let whole = a.clamp(-300.0, 300.0).round_ties_even();
            let power = f64::from(whole).clamp(-252.0, 254.0);
            same(13, lane, (f64::from(1.0 + power as f32 * 1e-3) * power.exp2()) as f32);
            let byte = found[found.len() - 16 + lane];
            assert_eq!(byte, whole.clamp(0.0, 255.0) as u32);
        }
    }
}

struct Transpose<'a>(&'a [[u8; 16]; 16]);

impl Kernel for Transpose<'_> {
    type Output = [[f32; 16]; 4];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[f32; 16]; 4] {
        let mut out = [[0.0; 16]; 4];
        let rows = std::array::from_fn(|i| &self.0[i]);
        for (v, out) in simd.transpose_words(rows).into_iter().zip(&mut out) {
            simd.store(v, out);
        }
        out
    }
}

#[test]
fn words_are_transposed() {
    let mut random = Random(5);
    let rows: [[u8; 16]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| random.next() as u8));
    for cpu in Cpu::available() {
        let found = cpu.dispatch(Transpose(&rows));
        for (lane, row) in rows.iter().enumerate() {
            let words: [[u8; 4]; 4] = std::array::from_fn(|k| found[k][lane].to_bits().to_ne_bytes());
            assert_eq!(words.as_flattened(), row, "row {lane} on {}", cpu.isa());
        }
    }
}

/// `exp` and `exp2`.
struct Exponentials<'a>(&'a [f32; 16]);

impl Kernel for Exponentials<'_> {
    type Output = [[f32; 16]; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [[f32; 16]; 2] {
        let mut out = [[0.0; 16]; 2];
        simd.store(simd.exp(simd.load(self.0)), &mut out[0]);
        simd.store(simd.exp2(simd.load(self.0)), &mut out[1]);
        out
    }
}

#[test]
fn exponentials_are_within_two_units_in_the_last_place() {
    let cpu = Cpu::detect();
    // With the argument from which on the result is not finite.
    for (index, (name, overflow)) in [("exp", 88.722_84), ("exp2", 128.0)].into_iter().enumerate() {
        let function = [f64::exp, f64::exp2][index];
        let mut worst = 0f64;
        // Every 200th float from -160 to 140, both signs.
        let positive = (0..140f32.to_bits()).step_by(200 * 16);
        let negative = ((-0f32).to_bits()..(-160f32).to_bits()).step_by(200 * 16);
        for first in positive.chain(negative) {
            let x: [f32; 16] = std::array::from_fn(|i| f32::from_bits(first + 200 * i as u32));
            for (x, found) in x.into_iter().zip(cpu.dispatch(Exponentials(&x))[index]) {
                let exact = function(f64::from(x));
                if exact >= 2f64.powi(128) * (1.0 - 2f64.powi(-26)) {
                    assert!(found == f32::INFINITY || x < overflow, "{name}({x}) = {found}");
                    continue;
                }
                let unit = (exact.log2().floor() as i32 - 23).max(-149);
                let error = (f64::from(found) - exact).abs() / 2f64.powi(unit);
                worst = worst.max(error);
                assert!(error <= 2.0, "{name}({x}) = {found}, off by {error} units");
            }
        }
        assert!(worst > 0.0);
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -1e30, 1e30, f32::MIN];
        let mut x = [0.0; 16];
        x[..8].copy_from_slice(&special);
        let found = cpu.dispatch(Exponentials(&x))[index];
        assert_eq!(found[..4], [1.0, 1.0, f32::INFINITY, 0.0], "{name}");
        assert!(found[4].is_nan(), "{name}");
        assert_eq!(found[5..8], [0.0, f32::INFINITY, 0.0], "{name}");
    }
}

struct Streams<'a> {
    stream: &'a [u8],
    bits: u32,
    activations: [i8; 4],
}

struct StreamResults {
    codes: [u8; 64],
    packed: Vec<u8>,
    /// Lanes of a dot product with the codes, by the general operation and by that for seven bits.
    lanes: [f32; 16],
    narrow_lanes: [f32; 16],
    sum: i32,
}

impl Kernel for Streams<'_> {
    type Output = StreamResults;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> StreamResults {
        let codes = simd.unpack64(self.stream, self.bits);
        let mut packed = vec![0; 8 * self.bits as usize];
        simd.pack64(&codes, self.bits, &mut packed);
        let units = simd.load_i32(&bytemuck::cast(codes));
        let activations = simd.splat_i32(i32::from_ne_bytes(self.activations.map(|a| a as u8)));
        let dot = simd.dot_u8i8(units, activations, simd.splat_i32(-3));
        let mut lanes = [0.0; 16];
        simd.store(simd.i32_to_f32(dot), &mut lanes);
        let mut narrow_lanes = lanes;
        if self.bits < 8 {
            let dot = simd.dot_u7i8(units, activations, simd.splat_i32(-3));
            simd.store(simd.i32_to_f32(dot), &mut narrow_lanes);
        }
        StreamResults { codes, packed, lanes, narrow_lanes, sum: simd.sum_i32(dot) }
    }
}

#[test]
fn streams_and_integer_dots_are_exact() {
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    for cpu in Cpu::available() {
        for bits in 1..=8 {
            for round in 0..300 {
                let mut stream: Vec<u8> = (0..8 * bits).map(|_| random.next() as u8).collect();
                let mut activations: [i8; 4] = std::array::from_fn(|_| random.next() as i8);
                match round {
                    0 => stream.fill(0xff),
                    1 => (stream.fill(0xff), activations.fill(-128)).1,
                    2 => (stream.fill(0xff), activations.fill(127)).1,
                    _ => {}
                }
                let found = cpu.dispatch(Streams { stream: &stream, bits, activations });
                let codes = found.codes;
                let mut expected = [0; 64];
                unpack_stream(&stream, bits, &mut expected);
                assert_eq!(codes, expected, "{bits} bits on {}", cpu.isa());
                assert_eq!(found.packed, stream, "{bits} bits on {}", cpu.isa());
                let products: [i32; 64] = std::array::from_fn(|i| i32::from(codes[i]) * i32::from(activations[i % 4]));
                let dots: [i32; 16] = std::array::from_fn(|i| products[4 * i..4 * i + 4].iter().sum::<i32>() - 3);
                assert_eq!(found.lanes, dots.map(|dot| dot as f32), "{bits} bits on {}", cpu.isa());
                assert_eq!(found.narrow_lanes, found.lanes, "{bits} bits on {}", cpu.isa());
                assert_eq!(found.sum, dots.iter().sum());
            }
        }
    }
}
