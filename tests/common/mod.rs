//! What several tests need: random numbers that are the same in every run, checkpoints made of them, the real fixture.

use std::path::{Path, PathBuf};

/// The folder of the real checkpoint: a Llama of 5.5 million parameters in BF16.
pub fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")
}

/// SplitMix64: every seed gives its own sequence, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A weight: close to normal, with a standard deviation of one.
    pub fn weight(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
        (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
    }
}

/// One tensor of a safetensors file.
pub struct Stored {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    /// Random weights of F32, F16 or BF16, multiplied by `factor`.
    pub fn random(name: &str, dtype: &'static str, shape: &[usize], factor: f32, random: &mut Random) -> Self {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.weight() * factor).collect();
        Self::of(name, dtype, shape, &values)
    }

    /// These values, rounded to F32, F16 or BF16.
    pub fn of(name: &str, dtype: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = match dtype {
            "F32" => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            "F16" => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
            "BF16" => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
            other => panic!("{other} is no float type"),
        };
        Self { name: name.into(), dtype, shape: shape.to_vec(), bytes }
    }
}

/// A safetensors file that holds these tensors in this order.
pub fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.bytes.len();
        let entry = serde_json::json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
        assert!(entries.insert(tensor.name.clone(), entry).is_none(), "{} occurs twice", tensor.name);
    }
    let header = serde_json::to_vec(&entries).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    tensors.iter().for_each(|tensor| file.extend(&tensor.bytes));
    file
}
