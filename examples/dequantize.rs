//! Writes every tensor of a packed file as plain F32 safetensors: what a program needs that wants the weights as they
//! are after packing.
//!
//!     cargo run --release --example dequantize -- model.bkpack values.safetensors

use std::{error::Error, path::Path};

use bkpack::{format::PackedFile, tensor::TensorSource};
use bkpack_kernels::Cpu;
use safetensors::{Dtype, tensor::TensorView};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, packed, output] = arguments.as_slice() else { return Err("usage: dequantize PACKED OUTPUT".into()) };
    let packed = PackedFile::open(Path::new(packed))?;
    let cpu = Cpu::from_environment()?;
    let mut values = Vec::new();
    for name in packed.names() {
        let tensor = packed.tensor(name)?;
        let mut floats = vec![0f32; tensor.elements()];
        cpu.dequantize(&tensor.matrix(), 0, &mut floats);
        let bytes: Vec<u8> = floats.iter().flat_map(|value| value.to_le_bytes()).collect();
        values.push((name, tensor.shape().to_vec(), bytes));
    }
    let views =
        values.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, Path::new(output))?;
    Ok(())
}
