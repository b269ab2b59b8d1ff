//! `bkpack sensitivity`: what each encoding of each matrix would cost, for the budget policy.

use std::path::PathBuf;

use bkpack::{
    Result,
    eval::text::read_either,
    format::{check_output, write_file},
    policy::ComponentRules,
    train::sensitivity::{DEFAULT_WINDOWS, Options, measure},
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use clap::Args;

use super::{Common, refuse_file_of_checkpoint, refuse_same_file, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack sensitivity ./model --text calibration.txt -o costs.json
  bkpack convert ./model -o small.bkpack --policy budget --sensitivity costs.json --target-ratio 8
  bkpack convert ./model -o large.bkpack --policy budget --sensitivity costs.json --target-ratio 4
      Measure once, then pack to as many sizes as you like";

/// Predict what each encoding of each matrix would cost
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct SensitivityArgs {
    /// Checkpoint
    model: PathBuf,

    /// Calibration text (UTF-8); never the text that the model is tested on
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Windows to look at, from the start of the text
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WINDOWS)]
    batches: usize,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,

    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &SensitivityArgs) -> Result<()> {
    let observer = args.common.observer();
    let source = args.checkpoint.open_checkpoint(&args.model, &args.common)?;
    refuse_file_of_checkpoint(&args.model, &args.output)?;
    check_output(&args.output, args.force)?;
    let (path, tokens) = read_either(&source, &args.text, &args.tokens)?;
    refuse_same_file(path, &args.output)?;
    let cpu = Cpu::from_environment()?;
    let options = Options { windows: args.batches, ctx: args.ctx, rounding: Rounding::Search };
    let sensitivity = measure(cpu, &source, &tokens, &options, &ComponentRules::builtin(), &observer)?;
    let mut text = serde_json::to_string_pretty(&sensitivity).expect("plain numbers and strings");
    text.push('\n');
    write_file(text.as_bytes(), &args.output, args.force)
}
