//! `bkpack generate`: text from a prompt.

use std::{
    io::{ErrorKind, Write, stdout},
    path::{Path, PathBuf},
    time::Duration,
};

use bkpack::{
    Error, Result,
    eval::{
        generate::{Generated, Limits, generate},
        text::Tokenizer,
    },
    model::{Model, config::eos_tokens, sample::Sampler},
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

use super::{Common, device::DeviceArgs, progress::ProgressObserver, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack generate model.bkpack --prompt \"The capital of France is\"
      The most likely continuation
  bkpack generate model.bkpack --prompt \"Once upon a time\" --temperature 0.8 --top-p 0.95 --seed 1
      A random one, the same each time
  bkpack generate model.bkpack --prompt \"Hello\" --max-tokens 32 --activations int8 -q
      Nothing but the text";

/// Continue a prompt
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct GenerateArgs {
    /// Packed file or checkpoint
    model: PathBuf,

    /// Text to continue
    #[arg(long)]
    prompt: String,

    /// Tokens to generate at most; fewer if the text or the model's context ends
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,

    /// Randomness: 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,

    /// Draw only from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,

    /// Seed of the random numbers [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t)]
    activations: Activations,

    #[command(flatten)]
    device: DeviceArgs,

    /// Check every hash of the packed file before it is used
    #[arg(long)]
    verify_hashes: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let observer = args.common.observer();
    let cpu = Cpu::from_environment()?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let mut sampler = Sampler::new(cpu, args.temperature, args.top_p, seed)?;
    let verify = args.verify_hashes.then_some(&observer);
    let source = args.checkpoint.open(&[&args.model], verify, &args.common)?.remove(0);
    let written = match args.device.open([&*source as &dyn TensorSource], args.activations, &args.common)? {
        Device::Cpu => {
            args.activations.check_cpu()?;
            write(args, &*source, &CpuOps::new(cpu, args.activations), &mut sampler, &observer)
        }
        Device::Cuda(cuda) => write(args, &*source, &CudaOps::new(cuda, args.activations)?, &mut sampler, &observer),
    };
    let generated = match written {
        // The reader of the text has gone away: it has enough.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => return Ok(()),
        written => written?,
    };
    if !args.common.quiet {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        eprintln!(
            "prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s",
            generated.prompt_tokens,
            rate(generated.prompt_tokens, generated.prefill),
            generated.tokens,
            rate(generated.tokens, generated.decode),
        );
    }
    Ok(())
}

/// Writes the prompt and what follows it, as it is drawn.
fn write<O: Ops>(
    args: &GenerateArgs,
    source: &dyn TensorSource,
    ops: &O,
    sampler: &mut Sampler,
    observer: &ProgressObserver,
) -> Result<Generated> {
    let tokenizer = Tokenizer::load(source)?;
    let model = Model::load(source, ops)?;
    model.check_sequential()?;
    let prompt = tokenizer.encode_prompt(source, &args.prompt)?;
    let eos = eos_tokens(source)?;
    let limits = Limits { max_tokens: args.max_tokens, eos: &eos };
    let write = |text: &str| {
        let mut stdout = stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::io(Path::new("standard output")))
    };
    write(&args.prompt)?;
    let generated = generate((&model, ops), &tokenizer, &prompt, sampler, limits, observer, write)?;
    write("\n")?;
    Observer::check(observer)?;
    Ok(generated)
}
