//! `bkpack synth`: a checkpoint of a known model's shapes with random weights.

use std::{path::PathBuf, time::Instant};

use bkpack::{
    Result,
    encoding::FloatName,
    policy::options::parse_size,
    report::table::{count, facts, table},
    synth::{Options, Preset, Synthesis},
};
use bkpack_kernels::FloatType;
use clap::{Args, ValueEnum, builder::PossibleValuesParser};
use serde_json::json;

use super::{Common, print};

const EXAMPLES: &str = "\
Examples:
  bkpack synth --list
      The models whose shapes are known, with their sizes
  bkpack synth --preset mistral-7b -o ./mistral --layers 4
      The first layers of Mistral 7B in BF16, to try a conversion at its real width
  bkpack synth --preset tinyllama-1.1b -o ./tiny --dtype fp32 --dry-run
      The exact size, without writing anything

The folder holds config.json and weights, no tokenizer. The weights are random and config.json
says so: such a model can be converted, inspected, compared and run on token ids; eval and verify
refuse to measure its quality. The same preset, options and seed give the same bytes.";

/// Write a checkpoint of a known model's shapes with random weights, for work on size, memory and speed
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct SynthArgs {
    /// The model whose shapes to use
    #[arg(long, value_name = "NAME", required_unless_present = "list", value_parser = preset_names(), hide_possible_values = true)]
    preset: Option<String>,

    /// Folder to write, in Hugging Face layout
    #[arg(short, long, value_name = "DIR", required_unless_present = "list")]
    output: Option<PathBuf>,

    /// Print the known models and write nothing
    #[arg(long, conflicts_with_all = ["preset", "output"])]
    list: bool,

    /// Type of the weights
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,

    /// Other seeds give other weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Fewer layers than the model has
    #[arg(long, value_name = "N")]
    layers: Option<usize>,

    /// Split the weights into files with at most this much data each (more where one tensor alone is larger), e.g. 2GB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,

    /// Say what would be written, to the byte, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Replace an earlier synthetic checkpoint; a real model is never replaced
    #[arg(long)]
    force: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Fp32,
    Bf16,
    Fp16,
}

impl From<Dtype> for FloatType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => FloatType::F32,
            Dtype::Bf16 => FloatType::BF16,
            Dtype::Fp16 => FloatType::F16,
        }
    }
}

fn preset_names() -> PossibleValuesParser {
    Preset::all().iter().map(|preset| preset.name.as_str()).collect::<Vec<_>>().into()
}

/// Runs the subcommand.
pub fn run(args: &SynthArgs) -> Result<()> {
    let (Some(name), Some(output)) = (&args.preset, &args.output) else { return list(args) };
    let start = Instant::now();
    let observer = args.common.observer();
    let preset = Preset::named(name).expect("clap lets only known names pass");
    let options =
        Options { dtype: args.dtype.into(), seed: args.seed, layers: args.layers, shard_bytes: args.shard_size };
    let synthesis = Synthesis::plan(preset, &options)?;
    if !args.dry_run {
        synthesis.write(output, args.force, &observer)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let (file_bytes, layers) = (synthesis.file_bytes(), args.layers.unwrap_or(preset.layers()));
    let rate = file_bytes as f64 / seconds / 1e9;
    let dtype = FloatName::from(options.dtype).name();
    if args.json {
        let object = json!({
            "preset": preset.name,
            "seed": args.seed,
            "dtype": dtype,
            "layers": layers,
            "tensors": synthesis.tensor_count(),
            "parameters": synthesis.parameters(),
            "weight_files": synthesis.shard_count(),
            "file_bytes": file_bytes,
            "seconds": seconds,
            "gb_per_second": if args.dry_run { None } else { Some(rate) },
            "dry_run": args.dry_run,
        });
        return print(&serde_json::to_string_pretty(&object).expect("plain numbers and strings"));
    }
    if args.common.quiet {
        return Ok(());
    }
    let mut rows = vec![
        ("model", format!("{}, random weights of seed {}", preset.name, args.seed)),
        ("layers", layers.to_string()),
        ("parameters", format!("{} in {} tensors, {dtype}", count(synthesis.parameters()), synthesis.tensor_count())),
        ("weight files", synthesis.shard_count().to_string()),
        (if args.dry_run { "bytes, predicted" } else { "bytes" }, count(file_bytes)),
    ];
    if !args.dry_run {
        rows.push(("time", format!("{seconds:.2} s  ({rate:.2} GB/s)")));
    }
    print(&facts(rows).trim_fmt())
}

/// The known models, with the bytes that they would take.
fn list(args: &SynthArgs) -> Result<()> {
    let mut lines = table(&["preset", "shapes of", "layers", "parameters", "bytes in BF16", "bytes in FP32"], 2);
    let mut objects = Vec::new();
    for preset in Preset::all() {
        let plan = |dtype| {
            let options = Options { dtype, seed: args.seed, layers: None, shard_bytes: args.shard_size };
            Synthesis::plan(preset, &options)
        };
        let (bf16, fp32) = (plan(FloatType::BF16)?, plan(FloatType::F32)?);
        let (layers, parameters) = (preset.layers(), bf16.parameters());
        let bytes = [bf16.file_bytes(), fp32.file_bytes()];
        lines.add_row([
            preset.name.clone(),
            preset.source.clone(),
            layers.to_string(),
            count(parameters),
            count(bytes[0]),
            count(bytes[1]),
        ]);
        objects.push(json!({
            "preset": preset.name, "source": preset.source, "layers": layers, "parameters": parameters,
            "bf16_bytes": bytes[0], "fp32_bytes": bytes[1],
        }));
    }
    if args.json {
        return print(&serde_json::to_string_pretty(&objects).expect("plain numbers and strings"));
    }
    print(&lines.trim_fmt())
}
