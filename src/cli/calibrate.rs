//! `bkpack calibrate`: scales for quantized activations, added to a packed file.

use std::path::PathBuf;

use bkpack::{
    Error, Result,
    eval::{
        calibrate::{Calibration, calibrate_core, parse_core_width},
        text::read_either,
    },
    format::{PackedFile, amend::with_activations},
    model::core_activations::COMPONENT,
    report::table::facts,
    tensor::{CalibrationText, TensorSource},
};
use bkpack_kernels::Cpu;
use clap::Args;
use serde_json::json;

use super::{Common, print, refuse_file_of_checkpoint};

const EXAMPLES: &str = "\
Examples:
  bkpack calibrate model.bkpack --text calibration.txt --activations bk_core=int8
      A scale for each position of v, Re G and Im G; eval then runs with them and prints their error
  bkpack calibrate model.bkpack --text calibration.txt --activations bk_core=int4 -o model-a4.bkpack
      A scale for each group of 128 positions, in a file of its own

Weights are not touched. Without --output the scales are added to the packed file itself, which is replaced once the new
one is whole; scales that it has already are replaced only with --force.";

/// Add scales for quantized activations of the Birman-Schwinger core to a packed file
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct CalibrateArgs {
    /// Packed file of a ResNet-BK model
    packed: PathBuf,

    /// Calibration text (UTF-8); never the text that the model is tested on
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Component and width: bk_core=int8 or bk_core=int4
    #[arg(long, value_name = "COMPONENT=WIDTH", value_parser = parse_core_width)]
    activations: u32,

    /// Windows of the model's whole context to look at; fewer if the text is shorter
    #[arg(long, value_name = "N", default_value_t = 100)]
    samples: usize,

    /// Packed file to write [default: the packed file itself]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Replace files, or scales, that exist
    #[arg(long)]
    force: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &CalibrateArgs) -> Result<()> {
    let observer = args.common.observer();
    let packed = PackedFile::open(&args.packed)?;
    if packed.manifest().shard.is_some() {
        let why = "is sharded; activation scales can only be added to a model of one file".into();
        return Err(Error::ShardSet { path: args.packed.clone(), why });
    }
    if args.output.is_none() && !packed.activations().is_empty() && !args.force {
        let why = "the packed file has activation scales already; pass --force to replace them, or --output".into();
        return Err(Error::Option { option: "--activations", why });
    }
    if let Some(output) = &args.output {
        refuse_file_of_checkpoint(&args.packed, output)?;
        bkpack::format::check_output(output, args.force)?;
    }
    let (path, tokens) = read_either(&packed, &args.text, &args.tokens)?;
    let text = CalibrationText::of(path)?;
    let cpu = Cpu::from_environment()?;
    let Calibration { record, scales } =
        calibrate_core(cpu, &packed, &tokens, (text, args.activations, args.samples), &observer)?;
    let (layers, samples, positions) = (scales.len(), record.samples, record.positions);
    let scale_bytes: usize = scales.iter().map(|(_, _, values)| 4 * values.len()).sum();
    if samples < args.samples as u64 {
        args.common.notice(&format!("the text fills {samples} windows of {positions} tokens, not {}", args.samples));
    }
    let group = record.group_size;
    let output = args.output.as_ref().unwrap_or(&args.packed);
    let force = args.force || args.output.is_none();
    let written = with_activations(&packed, vec![record], scales, output, force, &observer)?;
    if args.json {
        let object = json!({
            "output": written,
            "component": COMPONENT,
            "bits": args.activations,
            "group_size": group,
            "positions": positions,
            "samples": samples,
            "layers": layers,
            "scale_bytes": scale_bytes,
        });
        return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
    }
    if args.common.quiet {
        return Ok(());
    }
    let rows = [
        ("activations", format!("{COMPONENT} at INT{}, v, Re G and Im G apart", args.activations)),
        ("scales", format!("{layers} layers, one for each {group} of {positions} positions ({scale_bytes} bytes)")),
        ("samples", format!("{samples} windows of {positions} tokens")),
        ("written", written.display().to_string()),
    ];
    print(&facts(rows).trim_fmt())
}
