//! `bkpack convert`: from a checkpoint to a packed file.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use bkpack::{
    Error, Result,
    eval::{
        components::{ComponentCosts, DEFAULT_WINDOWS, component_costs},
        perplexity::Options,
    },
    format::{self, PackedFile},
    model::config::check_not_synthetic,
    ops::cpu::Activations,
    pack::Calibration,
    report::{
        convert::Summary,
        table::{count, table},
    },
    tensor::TensorSource,
    train::{
        contest::Entry,
        conversion::{Conversion, ConvertOptions, Surroundings, check_output, check_source},
    },
};
use bkpack_kernels::Cpu;
use clap::Args;
use serde::Serialize;

use super::{Common, components, print, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack convert ./model -o model.bkpack
      Every matrix at 4 bits, a scale for each 128 columns
  bkpack convert ./model -o model.bkpack --bits 3 --group-size 64 --keep 'embed|lm_head'
      3 bits, embeddings and head as they are
  bkpack convert ./model -o model.bkpack --tensor 'embed=int8' --tensor 'v_proj=int6:g64:asym'
      Exceptions by name; the last pattern that matches decides
  bkpack convert ./model -o model.bkpack --policy component
      Experts INT4, embeddings and head FP16, the rest INT8; --rules FILE changes that
  bkpack convert ./model -o model.bkpack --policy dynamic --importance importance.json
      The most important fifth of the tensors FP16, the least important two fifths INT4
  bkpack convert ./model -o model.bkpack --policy budget --sensitivity costs.json --target-ratio 8
      The encodings that cost least in a file an eighth as large as FP32
  bkpack convert ./model -o model.bkpack --policy budget --target-size 80MB --calib text.txt --rounding gptq
      The same with costs measured on a text, and weights rounded to make up for their errors on it
  bkpack convert ./model --policy component --plan-only -o plan.toml
  bkpack convert ./model -o model.bkpack --recipe plan.toml
      What would become of each tensor, to read and to edit; then pack by it
  bkpack convert weights.pt --config config.json --rename '^net=model' -o model.bkpack
      One file of weights with its config beside it, its tensors renamed
  bkpack convert ./model -o model.bkpack --policy component --calib text.txt --report-kld
      And measure on a text what each component of the packed file costs
  bkpack convert ./model -o model.bkpack --bits 4 --dry-run
      The exact size, without writing anything";

/// Pack a checkpoint into one file
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// Hugging Face folder, or file of weights: safetensors, NPZ or PyTorch
    source: PathBuf,

    /// Packed file to write; with --plan-only the recipe
    #[arg(short, long, value_name = "FILE", required_unless_present = "plan_only")]
    output: Option<PathBuf>,

    #[command(flatten)]
    options: ConvertOptions,

    /// Write the policy's recipe, which says what becomes of each tensor and how large it is, and pack nothing;
    /// without --output, print it
    #[arg(long, conflicts_with_all = ["dry_run", "shard_size"])]
    plan_only: bool,

    /// Measure on a few windows of the calibration text what each component of the packed file costs: its bytes, and the
    /// divergence of the model with it alone packed
    #[arg(long, conflicts_with_all = ["plan_only", "dry_run"])]
    report_kld: bool,

    /// Say what would be written, to the byte, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Replace files that exist
    #[arg(long)]
    force: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let start = Instant::now();
    let observer = args.common.observer();
    args.options.check(args.report_kld)?;
    if args.json && args.output.is_none() {
        let why = "is for the figures; with --plan-only name a file for the recipe with --output".into();
        return Err(Error::Option { option: "--json", why });
    }
    check_source(&args.source)?;
    let checkpoint = args.checkpoint.open_checkpoint(&args.source, &args.common)?;
    if let Some(output) = &args.output {
        check_output(&args.source, output, args.force || args.dry_run)?;
    }
    if args.report_kld {
        check_not_synthetic(&checkpoint)?;
    }
    let cpu = Cpu::from_environment()?;
    let around = Surroundings { cpu, observer: &observer, notice: &|sentence| args.common.notice(sentence) };
    let conversion = Conversion::prepare(&checkpoint, &args.options, around)?;
    let output = args.output.as_deref().unwrap_or(Path::new("model.bkpack"));
    let (packing, compared) = conversion.plan(output)?;
    let file_bytes = packing.file_bytes();
    let lines = packing.lines();
    match (args.plan_only, &args.output) {
        (true, None) => return print(packing.recipe().trim_end()),
        (true, Some(path)) => format::write_file(packing.recipe().as_bytes(), path, args.force)?,
        (false, _) if args.dry_run => {}
        (false, _) => {
            conversion.write(packing, args.force)?;
        }
    }
    let source_bytes = checkpoint.file_bytes();
    let planned = args.dry_run || args.plan_only;
    let summary = Summary::new(lines.into_iter(), file_bytes, source_bytes, start.elapsed().as_secs_f64(), planned);
    let costs = match conversion.text() {
        Some((tokens, &Calibration { ctx, .. })) if args.report_kld => {
            let packed = PackedFile::open(output)?;
            // Weights are what is compared: a model that looks ahead is marked as such.
            let options = Options { ctx: Some(ctx), skip: 1, activations: Activations::Exact, allow_lookahead: true };
            Some(component_costs(cpu, &packed, &checkpoint, tokens, DEFAULT_WINDOWS, &options, &observer)?)
        }
        _ => None,
    };
    match (args.json, args.common.quiet) {
        (true, _) => {
            let report = Report { summary: &summary, compared: &compared, by_component: costs.as_ref() };
            print(&serde_json::to_string_pretty(&report).expect("plain numbers and strings"))
        }
        (false, true) => Ok(()),
        (false, false) => {
            let costs = costs.map_or_else(String::new, |costs| format!("\n\n{}", components::render(&costs)));
            print(&format!("{}{}{costs}", summary.render(), render_compared(&compared)))
        }
    }
}

fn render_compared(compared: &[Entry]) -> String {
    if compared.is_empty() {
        return String::new();
    }
    let mut lines = table(&["on the calibration text, rounded without it", "bytes", "KL divergence", ""], 1);
    for entry in compared {
        let mark = match entry {
            Entry { chosen: true, .. } => "packed",
            Entry { fits: false, .. } => "too large",
            _ => "",
        };
        lines.add_row([entry.name.clone(), count(entry.bytes), format!("{:.6}", entry.kld), mark.into()]);
    }
    format!("\n\n{}", lines.trim_fmt())
}

/// What is printed for machines.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    /// The mixes that a budget's was measured against.
    #[serde(skip_serializing_if = "<[Entry]>::is_empty")]
    compared: &'a [Entry],
    #[serde(skip_serializing_if = "Option::is_none")]
    by_component: Option<&'a ComponentCosts>,
}
