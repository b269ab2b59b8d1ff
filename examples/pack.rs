//! Packs a checkpoint with the library: matrices at 4 bits, the embedding at 8, and every byte read back.
//!
//!     cargo run --release --example pack -- fixtures/llama model.bkpack

use std::{error::Error, path::Path};

use bkpack::{
    checkpoint,
    format::PackedFile,
    pack::{PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, source, output] = arguments.as_slice() else { return Err("usage: pack CHECKPOINT OUTPUT".into()) };
    let (source, output) = (Path::new(source), Path::new(output));
    let cpu = Cpu::from_environment()?;

    let checkpoint = checkpoint::open(source)?;
    let policy = Policy::uniform("int4:g64".parse()?, &[], &["embed=int8:g64".into()])?;
    let options = PackOptions::new(policy);
    let packing = Packing::plan(&checkpoint, &options, output, cpu, &Silent)?;
    // Everything is known before a byte is written: what each tensor becomes, and the size of the file.
    for tensor in packing.tensors() {
        println!("{:48} {:16} {:>9} bytes", tensor.name, tensor.encoding, tensor.stored_bytes());
    }
    packing.notices().iter().for_each(|notice| println!("note: {notice}"));
    let planned = packing.file_bytes();
    packing.write(cpu, false, &Silent)?;

    let packed = PackedFile::open(output)?;
    packed.check_contents(&Silent)?;
    assert_eq!(packed.file_bytes(), planned, "the size was known beforehand");
    let bits = 8.0 * planned as f64 / packed.parameters() as f64;
    println!("{} parameters in {planned} bytes, {bits:.3} bits a weight; every hash matches", packed.parameters());
    Ok(())
}
