//! `bkpack bench`: how fast a model runs here.

use std::{path::PathBuf, time::Instant};

use bkpack::{
    Result,
    eval::speed::{Options, Speed, measure},
    ops::cpu::Activations,
    report::table::{count, facts},
};
use bkpack_kernels::Cpu;
use clap::Args;

use super::{Common, print, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack bench model.bkpack
      First token, prefill of 512 tokens, decode of 128
  bkpack bench model.bkpack --activations int8 --threads 2 --repetitions 9 --json
      The same with 8-bit activations, every repetition as JSON
  bkpack bench model.bkpack --prefill 0 --decode 512
      Decode alone, over a longer context
  BKPACK_ISA=avx2 bkpack bench model.bkpack
      On another instruction set

The first token counts from the opening of the file, with the file in memory or not, as the system
has it. Prefill and decode each begin with an empty context, run once before they are measured, and
are given as the median of the repetitions. Memory is what the same threads reach when they only
read, over as many bytes as a token of decode reads.";

/// Measure the speed of a model: first token, prefill, decode, and the share of memory bandwidth that decode reaches
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// Packed file or checkpoint
    model: PathBuf,

    /// Tokens that are run together; 0 for no prefill
    #[arg(long, value_name = "N", default_value_t = 512)]
    prefill: usize,

    /// Tokens that are run one by one; 0 for no decode
    #[arg(long, value_name = "N", default_value_t = 128)]
    decode: usize,

    /// How many times each is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: u32,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t)]
    activations: Activations,

    /// Leave out how fast memory is read
    #[arg(long)]
    no_memory: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &BenchArgs) -> Result<()> {
    let observer = args.common.observer();
    let cpu = Cpu::from_environment()?;
    let before = Instant::now();
    let source = args.checkpoint.open(&[&args.model], None, &args.common)?.remove(0);
    let &BenchArgs { prefill, decode, activations, no_memory, .. } = args;
    let options = Options { prefill, decode, repetitions: args.repetitions as usize, activations, memory: !no_memory };
    let speed = measure(cpu, &*source, before, &options, &observer)?;
    print(&if args.json { serde_json::to_string_pretty(&speed).expect("plain numbers") } else { render(&speed) })
}

fn render(speed: &Speed) -> String {
    let mut rows = vec![("first token", format!("{:.1} ms", 1e3 * speed.first_token_seconds))];
    for (name, timing) in [("prefill", &speed.prefill), ("decode", &speed.decode)] {
        if let Some(timing) = timing {
            let (median, best) = (timing.tokens_per_second, timing.best_tokens_per_second);
            rows.push((name, format!("{median:.1} tokens/s  ({} tokens, best {best:.1})", timing.tokens)));
        }
    }
    rows.push(("weights a token", format!("{} bytes", count(speed.weight_bytes_per_token))));
    if let Some(rate) = speed.decode_gb_per_second {
        rows.push(("decode reads", format!("{rate:.2} GB/s")));
    }
    if let Some(memory) = &speed.memory {
        let share = memory.decode_share.map(|share| format!("; decode reaches {:.0} %", 100.0 * share));
        let text =
            format!("{:.2} GB/s over {} bytes{}", memory.gb_per_second, count(memory.bytes), share.unwrap_or_default());
        rows.push(("memory", text));
    }
    rows.extend([
        ("file bytes", count(speed.file_bytes)),
        ("activations", speed.activations.name().to_owned()),
        ("runs", format!("{}, {} threads, {} repetitions", speed.isa, speed.threads, speed.repetitions)),
    ]);
    facts(rows).trim_fmt()
}
