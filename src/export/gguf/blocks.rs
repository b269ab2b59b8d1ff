//! The block types of ggml that hold packed weights as they are: a scale and the integers that it multiplies.
//!
//! Page: `ggml-common.h` and `ggml-quants.c` of ggml. A row is cut into blocks; no block runs over the end of a row.

use bkpack_kernels::FloatType;
use half::f16;

/// How ggml stores a tensor's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum BlockType {
    F32,
    F16,
    Bf16,
    /// -8 to 7 times a scale.
    Q4_0,
    /// 0 to 15 times a scale, plus a minimum.
    Q4_1,
    /// -16 to 15 times a scale.
    Q5_0,
    /// 0 to 31 times a scale, plus a minimum.
    Q5_1,
    /// -128 to 127 times a scale.
    Q8_0,
    /// -1 to 1 times a scale.
    Tq2_0,
    /// 4 bits with a scale and a minimum of 6 bits each for every 32 weights.
    Q4K,
    /// 6 bits with a scale of 8 bits for every 16 weights.
    Q6K,
}

impl From<FloatType> for BlockType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F32 => BlockType::F32,
            FloatType::F16 => BlockType::F16,
            FloatType::BF16 => BlockType::Bf16,
        }
    }
}

impl BlockType {
    /// ggml's number for it (`enum ggml_type`).
    pub(super) const fn id(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q5_1 => 7,
            BlockType::Q8_0 => 8,
            BlockType::Q4K => 12,
            BlockType::Q6K => 14,
            BlockType::Bf16 => 30,
            BlockType::Tq2_0 => 35,
        }
    }

    /// ggml's name for it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            BlockType::F32 => "F32",
            BlockType::F16 => "F16",
            BlockType::Bf16 => "BF16",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Tq2_0 => "TQ2_0",
            BlockType::Q4K => "Q4_K",
            BlockType::Q6K => "Q6_K",
        }
    }

    /// llama.cpp's number for a file most of whose weights are of this type (`enum llama_ftype`).
    pub(super) const fn file_type(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q8_0 => 7,
            BlockType::Q5_0 => 8,
            BlockType::Q5_1 => 9,
            BlockType::Q4K => 14,
            BlockType::Q6K => 18,
            BlockType::Bf16 => 32,
            BlockType::Tq2_0 => 37,
        }
    }

    /// Columns of one block.
    pub(super) const fn columns(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => 1,
            BlockType::Tq2_0 | BlockType::Q4K | BlockType::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of one block.
    pub(super) const fn bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::Bf16 => 2,
            BlockType::Q4_0 => 2 + 16,
            BlockType::Q4_1 => 4 + 16,
            BlockType::Q5_0 => 2 + 4 + 16,
            BlockType::Q5_1 => 4 + 4 + 16,
            BlockType::Q8_0 => 2 + 32,
            BlockType::Tq2_0 => 64 + 2,
            BlockType::Q4K => 4 + 12 + 128,
            BlockType::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of a row of `cols` columns, which must be whole blocks.
    pub(super) const fn row_bytes(self, cols: usize) -> usize {
        cols / self.columns() * self.bytes()
    }

    /// The float type that it is, if it is one.
    pub(super) const fn float(self) -> Option<FloatType> {
        match self {
            BlockType::F32 => Some(FloatType::F32),
            BlockType::F16 => Some(FloatType::F16),
            BlockType::Bf16 => Some(FloatType::BF16),
            _ => None,
        }
    }

    /// The integers that a scale alone can multiply, if the type is one of scales without minima.
    pub(super) const fn levels(self) -> Option<(i32, i32)> {
        match self {
            BlockType::Tq2_0 => Some((-1, 1)),
            BlockType::Q4_0 => Some((-8, 7)),
            BlockType::Q5_0 => Some((-16, 15)),
            BlockType::Q8_0 => Some((-128, 127)),
            _ => None,
        }
    }

    /// The largest code, if the type is one of scales and minima that hold packed weights as they are.
    pub(super) const fn codes(self) -> Option<u8> {
        match self {
            BlockType::Q4_1 => Some(15),
            BlockType::Q5_1 => Some(31),
            _ => None,
        }
    }
}

/// Writes one block of weights `(codes[i] - zero) * scale`. The type, the codes and the scale must be such that it holds
/// them; see [`BlockType::levels`] and [`BlockType::codes`].
///
/// # Panics
/// If `codes` and `out` are not one block of a type that holds integers.
pub(super) fn write_block(kind: BlockType, codes: &[u8], zero: i32, scale: f16, out: &mut [u8]) {
    assert_eq!((codes.len(), out.len()), (kind.columns(), kind.bytes()));
    let level = |code: u8| i32::from(code) - zero;
    match kind {
        BlockType::Q8_0 => {
            out[..2].copy_from_slice(&scale.to_le_bytes());
            out[2..].iter_mut().zip(codes).for_each(|(out, &code)| *out = level(code) as i8 as u8);
        }
        BlockType::Tq2_0 => {
            // Byte m of each half holds columns m, m + 32, m + 64 and m + 96 of that half, the first lowest.
            for (half, codes) in codes.chunks(128).enumerate() {
                for m in 0..32 {
                    let digit = |n: usize| ((level(codes[32 * n + m]) + 1) as u8 & 3) << (2 * n);
                    out[32 * half + m] = digit(0) | digit(1) | digit(2) | digit(3);
                }
            }
            out[64..].copy_from_slice(&scale.to_le_bytes());
        }
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q4_1 | BlockType::Q5_1 => {
            // Offset so that all are positive: by the zero point where there is a minimum, else by half of the range.
            let offset = kind.levels().map_or(zero, |(lowest, _)| -lowest);
            let q = |index: usize| (level(codes[index]) + offset) as u8;
            let (head, nibbles) = out.split_at_mut(kind.bytes() - 16);
            head[..2].copy_from_slice(&scale.to_le_bytes());
            if kind.codes().is_some() {
                head[2..4].copy_from_slice(&minimum(zero, scale).to_le_bytes());
            }
            if matches!(kind, BlockType::Q5_0 | BlockType::Q5_1) {
                let fifth = (0..32).fold(0u32, |bits, index| bits | u32::from(q(index) >> 4) << index);
                let place = head.len() - 4;
                head[place..].copy_from_slice(&fifth.to_le_bytes());
            }
            nibbles.iter_mut().enumerate().for_each(|(j, byte)| *byte = q(j) & 15 | (q(j + 16) & 15) << 4);
        }
        _ => unreachable!("{kind:?} holds no integers as they are"),
    }
}

/// The weight that code 0 stands for.
pub(super) fn minimum(zero: i32, scale: f16) -> f16 {
    // A zero point of 0 would give -0.
    if zero == 0 { f16::ZERO } else { f16::from_f32(-(zero as f32) * scale.to_f32()) }
}

/// Whether [`minimum`] is exact, and a weight at the zero point the positive zero that it is here.
pub(super) fn minimum_is_exact(zero: i32, scale: f16) -> bool {
    let exact = -(zero as f32) * scale.to_f32();
    scale.is_sign_positive() && minimum(zero, scale).to_f32() == exact
}
