//! `bkpack diff`: how far the weights of two models are apart.

use std::path::PathBuf;

use bkpack::{
    Result,
    eval::difference::{Differences, compare},
    report::table::table,
};
use bkpack_kernels::Cpu;
use clap::Args;

use super::{Common, print, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack diff ./model model.bkpack
      Relative error and signal-to-noise ratio of each tensor, the worst first
  bkpack diff ./model model.bkpack --top 0 --json
      All tensors, for machines";

/// Compare the weights of two models, worst tensors first
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct DiffArgs {
    /// Packed file or checkpoint that counts as the truth
    first: PathBuf,

    /// Packed file or checkpoint to compare with it
    second: PathBuf,

    /// Show only the N worst tensors; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 20)]
    top: usize,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &DiffArgs) -> Result<()> {
    let observer = args.common.observer();
    let models = args.checkpoint.open(&[&args.first, &args.second], None, &args.common)?;
    let mut differences = compare(Cpu::from_environment()?, &*models[0], &*models[1], &observer)?;
    let compared = differences.tensors.len();
    if args.top > 0 {
        differences.tensors.truncate(args.top);
    }
    if args.json {
        return print(&serde_json::to_string_pretty(&differences).expect("plain numbers and strings"));
    }
    print(&render(&differences, compared))
}

fn render(differences: &Differences, compared: usize) -> String {
    let mut lines = table(&["tensor", "shape", "relative error", "SNR dB", "largest error"], 2);
    for tensor in &differences.tensors {
        lines.add_row([
            tensor.name.clone(),
            format!("{:?}", tensor.shape),
            tensor.relative_error.map_or("-".into(), |error| format!("{error:.6}")),
            match tensor.snr_db {
                Some(snr) => format!("{snr:.2}"),
                None if tensor.max_error == 0.0 => "equal".into(),
                None => "-".into(),
            },
            format!("{:.6}", tensor.max_error),
        ]);
    }
    let mut text = lines.trim_fmt();
    text += &format!("\n\n{} of {compared} common tensors shown", differences.tensors.len());
    if let Some(error) = differences.relative_error {
        text += &format!("; all weights together: relative error {error:.6}");
    }
    for (names, which) in [(&differences.only_first, "first"), (&differences.only_second, "second")] {
        if !names.is_empty() {
            text += &format!("\nonly in the {which} model: {}", names.join(", "));
        }
    }
    text
}
