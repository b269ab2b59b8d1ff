//! Writes every tensor of a packed file as plain safetensors, F32 and (complex tensors, put together from their halves)
//! C64: what a program needs that wants the weights as they are after packing.
//!
//!     cargo run --release --example dequantize -- model.bkpack values.safetensors

use std::{error::Error, path::Path};

use bkpack::{
    format::PackedFile,
    tensor::{ComplexPart, TensorSource},
};
use bkpack_kernels::Cpu;
use safetensors::{Dtype, tensor::TensorView};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, packed, output] = arguments.as_slice() else { return Err("usage: dequantize PACKED OUTPUT".into()) };
    let packed = PackedFile::open(Path::new(packed))?;
    let cpu = Cpu::from_environment()?;
    let mut values = Vec::new();
    for name in packed.names().iter().filter(|name| packed.complex_part(name).is_none()) {
        let tensor = packed.tensor(name)?;
        let mut floats = vec![0f32; tensor.elements()];
        cpu.dequantize(&tensor.matrix(), 0, &mut floats);
        values.push((name.clone(), Dtype::F32, tensor.shape().to_vec(), bytes(floats.into_iter())));
    }
    for name in packed.complex_names() {
        let floats = packed.complex_values(cpu, name)?;
        let real = format!("{name}{}", ComplexPart::Real.suffix());
        let shape = packed.shape(&real).unwrap_or_default().to_vec();
        values.push((name.to_owned(), Dtype::C64, shape, bytes(floats.into_iter().flatten())));
    }
    let views =
        values.iter().map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, Path::new(output))?;
    Ok(())
}

fn bytes(floats: impl Iterator<Item = f32>) -> Vec<u8> {
    floats.flat_map(f32::to_le_bytes).collect()
}
