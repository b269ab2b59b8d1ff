//! `bkpack logits`: the logits of a sequence, for comparison with another program.

use std::path::PathBuf;

use bkpack::{
    Result,
    eval::{logits::write_logits, text::read_tokens},
    model::Model,
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
        cuda::CudaOps,
        device::Device,
    },
    progress::Observer,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use clap::Args;

use super::{Common, device::DeviceArgs, refuse_same_file, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack logits model.bkpack --tokens ids.json -o logits.safetensors
      Tensor `logits`, F32 [tokens, vocabulary], of the token ids in a JSON array
  bkpack logits ./model --tokens ids.json -o reference.safetensors --force
      The same from a checkpoint, replacing an earlier file";

/// Write the logits of a sequence to a safetensors file
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct LogitsArgs {
    /// Packed file or checkpoint
    model: PathBuf,

    /// Token ids: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,

    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t)]
    activations: Activations,

    #[command(flatten)]
    device: DeviceArgs,

    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,

    /// Check every hash of the packed file before it is used
    #[arg(long)]
    verify_hashes: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let observer = args.common.observer();
    refuse_same_file(&args.model, &args.output)?;
    refuse_same_file(&args.tokens, &args.output)?;
    let verify = args.verify_hashes.then_some(&observer);
    let source = args.checkpoint.open(&[&args.model], verify, &args.common)?.remove(0);
    let tokens = read_tokens(&args.tokens)?;
    let cpu = Cpu::from_environment()?;
    match args.device.open([&*source as &dyn TensorSource], args.activations, &args.common)? {
        Device::Cpu => {
            args.activations.check_cpu()?;
            write(args, &*source, &CpuOps::new(cpu, args.activations), &tokens, &observer)
        }
        Device::Cuda(cuda) => write(args, &*source, &CudaOps::new(cuda, args.activations)?, &tokens, &observer),
    }
}

fn write<O: Ops>(
    args: &LogitsArgs,
    source: &dyn TensorSource,
    ops: &O,
    tokens: &[u32],
    observer: &dyn Observer,
) -> Result<()> {
    let model = Model::load(source, ops)?;
    write_logits(&model, ops, tokens, &args.output, args.force, observer)
}
