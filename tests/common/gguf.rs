//! A small reader of GGUF files, and a plain decoder of the block types: written from the documented layouts alone.

use std::collections::HashMap;

use half::{bf16, f16};

/// A metadata value, as far as tests ask.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Number(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

/// A tensor of the file with its data decoded.
#[derive(Debug)]
pub struct Tensor {
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub kind: u32,
    pub values: Vec<f32>,
}

pub struct Gguf {
    pub metadata: HashMap<String, Value>,
    pub tensors: HashMap<String, Tensor>,
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.take(8).try_into().unwrap()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.u64();
        String::from_utf8(self.take(length).to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            4 => Value::Number(self.u32().into()),
            5 => Value::Number((self.u32() as i32).into()),
            6 => Value::Number(f32::from_bits(self.u32()).into()),
            7 => Value::Bool(self.take(1) == [1]),
            8 => Value::Text(self.text()),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                Value::List((0..count).map(|_| self.value(kind)).collect())
            }
            other => panic!("value type {other}"),
        }
    }
}

/// Reads a whole file; every rule that llama.cpp's reader has about its structure is asserted.
pub fn read(bytes: &[u8]) -> Gguf {
    let mut cursor = Cursor(bytes);
    assert_eq!(cursor.take(4), b"GGUF");
    assert_eq!(cursor.u32(), 3);
    let (tensors, keys) = (cursor.u64(), cursor.u64());
    let mut metadata = HashMap::new();
    for _ in 0..keys {
        let (key, kind) = (cursor.text(), cursor.u32());
        let value = cursor.value(kind);
        assert!(metadata.insert(key.clone(), value).is_none(), "{key} occurs twice");
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        let name = cursor.text();
        assert!(name.len() < 64);
        let dimensions = cursor.u32();
        let mut shape: Vec<usize> = (0..dimensions).map(|_| cursor.u64()).collect();
        shape.reverse();
        infos.push((name, shape, cursor.u32(), cursor.u64()));
    }
    let start = (bytes.len() - cursor.0.len()).next_multiple_of(32);
    let mut expected = 0;
    let mut decoded = HashMap::new();
    for (name, shape, kind, offset) in infos {
        assert_eq!(offset, expected, "{name} does not follow the tensor before it");
        let elements: usize = shape.iter().product();
        let (columns, width) = block(kind);
        assert!(shape.last().unwrap().is_multiple_of(columns), "{name}: rows are no whole blocks");
        let length = elements / columns * width;
        let data = &bytes[start + offset..][..length];
        let values: Vec<f32> = data.chunks(width).flat_map(|block| decode(kind, block)).collect();
        assert_eq!(values.len(), elements);
        assert!(decoded.insert(name.clone(), Tensor { shape, kind, values }).is_none(), "{name} occurs twice");
        expected = (offset + length).next_multiple_of(32);
    }
    assert_eq!(bytes.len(), start + expected, "the file ends where the last tensor's padding ends");
    Gguf { metadata, tensors: decoded }
}

/// ggml's name of a type.
pub fn name(kind: u32) -> &'static str {
    let names = [
        (0, "F32"),
        (1, "F16"),
        (2, "Q4_0"),
        (3, "Q4_1"),
        (6, "Q5_0"),
        (7, "Q5_1"),
        (8, "Q8_0"),
        (12, "Q4_K"),
        (14, "Q6_K"),
        (30, "BF16"),
        (35, "TQ2_0"),
    ];
    names.iter().find(|(id, _)| *id == kind).unwrap_or_else(|| panic!("type {kind}")).1
}

/// Columns and bytes of a block.
fn block(kind: u32) -> (usize, usize) {
    match name(kind) {
        "F32" => (1, 4),
        "F16" | "BF16" => (1, 2),
        "Q4_0" => (32, 18),
        "Q4_1" => (32, 20),
        "Q5_0" => (32, 22),
        "Q5_1" => (32, 24),
        "Q8_0" => (32, 34),
        "Q4_K" => (256, 144),
        "Q6_K" => (256, 210),
        _ => (256, 66),
    }
}

fn half_at(block: &[u8], place: usize) -> f32 {
    f16::from_le_bytes([block[place], block[place + 1]]).to_f32()
}

fn decode(kind: u32, block: &[u8]) -> Vec<f32> {
    let nibble = |bytes: &[u8], i: usize| i32::from(if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 });
    let fifth = |bytes: &[u8], i: usize| i32::from(bytes[i / 8] >> (i % 8) & 1) << 4;
    match name(kind) {
        "F32" => vec![f32::from_le_bytes(block.try_into().unwrap())],
        "F16" => vec![half_at(block, 0)],
        "BF16" => vec![bf16::from_le_bytes([block[0], block[1]]).to_f32()],
        "Q4_0" => (0..32).map(|i| half_at(block, 0) * (nibble(&block[2..], i) - 8) as f32).collect(),
        "Q4_1" => (0..32).map(|i| half_at(block, 0) * nibble(&block[4..], i) as f32 + half_at(block, 2)).collect(),
        "Q5_0" => {
            let q = |i| nibble(&block[6..], i) | fifth(&block[2..6], i);
            (0..32).map(|i| half_at(block, 0) * (q(i) - 16) as f32).collect()
        }
        "Q5_1" => {
            let q = |i| nibble(&block[8..], i) | fifth(&block[4..8], i);
            (0..32).map(|i| half_at(block, 0) * q(i) as f32 + half_at(block, 2)).collect()
        }
        "Q8_0" => block[2..].iter().map(|&q| half_at(block, 0) * f32::from(q as i8)).collect(),
        "TQ2_0" => {
            let digit = |i: usize| block[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
            (0..256).map(|i| half_at(block, 64) * f32::from(digit(i) as i8 - 1)).collect()
        }
        "Q4_K" => (0..256).map(|i| q4_k(block, i)).collect(),
        _ => (0..256).map(|i| q6_k(block, i)).collect(),
    }
}

fn q4_k(block: &[u8], i: usize) -> f32 {
    let (scales, quants, sub) = (&block[4..16], &block[16..], i / 32);
    let (scale, minimum) = if sub < 4 {
        (scales[sub] & 63, scales[sub + 4] & 63)
    } else {
        let low = scales[sub + 4];
        (low & 15 | scales[sub - 4] >> 6 << 4, low >> 4 | scales[sub] >> 6 << 4)
    };
    let byte = quants[i / 64 * 32 + i % 32];
    let q = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
    half_at(block, 0) * f32::from(scale) * f32::from(q) - half_at(block, 2) * f32::from(minimum)
}

fn q6_k(block: &[u8], i: usize) -> f32 {
    let (half, place) = (i / 128, i % 128);
    let (quarter, l) = (place / 32, place % 32);
    let low = block[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 15;
    let high = block[128 + 32 * half + l] >> (2 * quarter) & 3;
    let scale = block[192 + i / 16] as i8;
    half_at(block, 208) * f32::from(scale) * (i32::from(low | high << 4) - 32) as f32
}
