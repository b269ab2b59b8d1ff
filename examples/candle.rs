//! Loads a packed model into candle tensors, and computes every matrix product twice: by candle on the dequantized
//! weights, and by bkpack's kernels on the packed ones.
//!
//!     cargo run --release --example candle -- model.bkpack

use std::{collections::HashMap, error::Error, path::Path};

use bkpack::{format::PackedFile, tensor::TensorSource};
use bkpack_kernels::Cpu;
use candle_core::{Device, Tensor};

/// Tokens that go through each layer at once.
const TOKENS: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, packed] = arguments.as_slice() else { return Err("usage: candle PACKED".into()) };
    let packed = PackedFile::open(Path::new(packed))?;
    let (cpu, device) = (Cpu::from_environment()?, Device::Cpu);
    let weights = load(&packed, cpu, &device)?;
    println!("{} tensors loaded", weights.len());

    let (mut products, mut worst) = (0, 0.0);
    for name in packed.names() {
        let [out, cols] = *weights[name].dims() else { continue };
        let x: Vec<f32> = (0..TOKENS * cols).map(|i| (0.1 * i as f32).sin()).collect(); // [TOKENS, cols]

        let input = Tensor::from_slice(&x, (TOKENS, cols), &device)?;
        let by_candle = input.matmul(&weights[name].t()?)?.flatten_all()?.to_vec1::<f32>()?;

        let mut by_bkpack = vec![0.0; TOKENS * out];
        cpu.matmul(&x, &packed.tensor(name)?.matrix(), &mut by_bkpack);

        let largest = by_candle.iter().fold(0f32, |largest, y| largest.max(y.abs()));
        let differences = by_candle.iter().zip(&by_bkpack).map(|(a, b)| (a - b).abs());
        let difference = differences.fold(0.0, f32::max) / largest;
        let encoding = packed.entry(name).expect("a name of the file").encoding;
        println!("{name:48} {encoding:16} differs by {difference:.1e} of the largest output");
        (products, worst) = (products + 1, difference.max(worst));
    }
    println!("{products} products, which differ by at most {worst:.1e}");
    // NaN is above every limit.
    if worst <= 1e-5 { Ok(()) } else { Err(format!("products differ by up to {worst:e}").into()) }
}

/// Every tensor, dequantized, by its name.
fn load(packed: &PackedFile, cpu: Cpu, device: &Device) -> Result<HashMap<String, Tensor>, Box<dyn Error>> {
    let load = |name: &String| {
        let stored = packed.tensor(name)?; // borrowed from the memory map
        let mut values = vec![0f32; stored.elements()];
        cpu.dequantize(&stored.matrix(), 0, &mut values);
        Ok((name.clone(), Tensor::from_vec(values, stored.shape(), device)?))
    };
    packed.names().iter().map(load).collect()
}
