//! `bkpack convert`: from a checkpoint to a packed file.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use bkpack::{
    Error, Result,
    checkpoint::Checkpoint,
    error::short,
    eval::{
        components::{ComponentCosts, DEFAULT_WINDOWS, component_costs},
        perplexity::Options,
    },
    format::{self, PackedFile},
    model::{self, config::check_not_synthetic},
    ops::cpu::Activations,
    pack::{Calibration, DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::{ComponentRules, PolicyFile},
    progress::Observer,
    report::{
        convert::Summary,
        table::{count, table},
    },
    tensor::{CalibrationText, TensorSource},
    train::{
        contest::{self, Entry},
        importance,
        rounding::{Samples, write_calibrated},
        sensitivity,
    },
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    Common, components,
    policy::{PolicyArgs, Statistics},
    print, refuse_file_of_checkpoint, refuse_same_file,
    source::SourceArgs,
    text::read_either,
};

/// Windows of a calibration text that importance is measured on, at most.
const IMPORTANCE_WINDOWS: usize = 50;

/// The first window of a calibration text that sensitivity was not measured on.
const UNSEEN_WINDOW: usize = sensitivity::DEFAULT_WINDOWS + sensitivity::MOST_PROBE_WINDOWS;

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
    policy: PolicyArgs,

    /// Write the policy's recipe, which says what becomes of each tensor and how large it is, and pack nothing;
    /// without --output, print it
    #[arg(long, conflicts_with_all = ["dry_run", "shard_size"])]
    plan_only: bool,

    /// How weights are rounded: rtn is round-to-nearest from the largest magnitude, search looks for the scales of least
    /// squared error, gptq also makes up for errors by what the layers' inputs look like on a calibration text
    #[arg(long, value_enum, default_value_t = RoundingName::Search)]
    rounding: RoundingName,

    /// Calibration text (UTF-8) for --rounding gptq, --policy budget, --policy dynamic and --report-kld; never the text that
    /// the model is tested on
    #[arg(long, value_name = "FILE", group = "calibration")]
    calib: Option<PathBuf>,

    /// Token ids instead of a calibration text: a JSON array
    #[arg(long, value_name = "FILE", group = "calibration")]
    calib_tokens: Option<PathBuf>,

    /// Windows of the calibration text to look at; fewer if the text is shorter
    #[arg(long, value_name = "N", default_value_t = 128, requires = "calibration", value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,

    /// Tokens in a window of the calibration text [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N", requires = "calibration", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,

    /// Measure on a few windows of the calibration text what each component of the packed file costs: its bytes, and the
    /// divergence of the model with it alone packed
    #[arg(long, requires = "calibration", conflicts_with_all = ["plan_only", "dry_run"])]
    report_kld: bool,

    /// Ternary weights below this share of their scale are zero
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT_TERNARY_THRESHOLD)]
    ternary_threshold: f32,

    /// Keep tensors with NaN or infinite values as FP32 instead of refusing them
    #[arg(long)]
    allow_nonfinite: bool,

    /// Split the model into files with at most this much data each (more where one tensor alone is larger), e.g. 2GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    shard_size: Option<u64>,

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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoundingName {
    Rtn,
    Search,
    Gptq,
}

/// Reads a size with its unit, e.g. `2GB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" => 1_000,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        unit => return Err(format!("unknown unit {unit:?}; use B, KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    number.checked_mul(unit).filter(|&size| size > 0).ok_or_else(|| "a size is at least one byte".into())
}

/// Runs the subcommand.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let start = Instant::now();
    let observer = args.common.observer();
    if !(args.ternary_threshold > 0.0 && args.ternary_threshold < 1.0) {
        let why = format!("{} is not between 0 and 1", args.ternary_threshold);
        return Err(Error::Option { option: "--ternary-threshold", why });
    }
    let calibrated = matches!(args.rounding, RoundingName::Gptq);
    check_calibration(args, calibrated)?;
    if args.json && args.output.is_none() {
        let why = "is for the figures; with --plan-only name a file for the recipe with --output".into();
        return Err(Error::Option { option: "--json", why });
    }
    if args.source.is_file() && format::is_packed(&args.source)? {
        let why = "is packed already; convert the checkpoint that it came from".into();
        return Err(Error::NotAModel { path: args.source.clone(), why });
    }
    let checkpoint = args.checkpoint.open_checkpoint(&args.source, &args.common)?;
    if let Some(output) = &args.output {
        refuse_same_file(&args.source, output)?;
        refuse_file_of_checkpoint(&args.source, output)?;
        format::check_output(output, args.force || args.dry_run)?;
    }
    note_architecture(args, &checkpoint)?;
    if args.report_kld {
        check_not_synthetic(&checkpoint)?;
    }
    let cpu = Cpu::from_environment()?;
    let has_text = args.calib.is_some() || args.calib_tokens.is_some();
    let calibration = if has_text { Some(read_calibration(args, &checkpoint)?) } else { None };
    let rounding = match args.rounding {
        RoundingName::Rtn => Rounding::Nearest,
        RoundingName::Search | RoundingName::Gptq => Rounding::Search,
    };
    let options = PackOptions {
        policy: args.policy.policy(|statistics, rules| {
            let (tokens, calibration) = calibration.as_ref().expect("a text was asked for");
            let measurement = Measurement { statistics, cpu, rules, rounding };
            measurement.run(&checkpoint, tokens, calibration, &observer)
        })?,
        rounding,
        feedback: calibrated,
        calibration: match &calibration {
            Some((_, calibration)) if calibrated || args.policy.goes_by_text() => Some(calibration.clone()),
            _ => None,
        },
        ternary_threshold: args.ternary_threshold,
        allow_nonfinite: args.allow_nonfinite,
        shard_bytes: args.shard_size,
    };
    let output = args.output.as_deref().unwrap_or(Path::new("model.bkpack"));
    let mut packing = Packing::plan(&checkpoint, &options, output, cpu, &observer)?;
    let compared = match &calibration {
        Some((tokens, Calibration { ctx, .. })) if args.policy.is_budget() => {
            if tokens.len() < UNSEEN_WINDOW * ctx + contest::TOKENS {
                args.common.notice("the text is short: mixes are compared on windows that costs were measured on, too");
            }
            contest::contest(cpu, &checkpoint, &mut packing, tokens, (*ctx, UNSEEN_WINDOW), &observer)?
        }
        _ => Vec::new(),
    };
    packing.notices().iter().for_each(|notice| args.common.notice(notice));
    let file_bytes = packing.file_bytes();
    let tensors: Vec<_> = packing
        .tensors()
        .iter()
        .map(|tensor| {
            (
                tensor.component.clone(),
                tensor.encoding.to_string(),
                tensor.elements() as u64,
                tensor.stored_bytes() as u64,
            )
        })
        .collect();
    match (args.plan_only, &args.output) {
        (true, None) => return print(packing.recipe().trim_end()),
        (true, Some(path)) => format::write_file(packing.recipe().as_bytes(), path, args.force)?,
        (false, _) if args.dry_run => {}
        (false, _) => {
            match &calibration {
                Some((tokens, Calibration { windows, ctx, .. })) if calibrated => {
                    let samples = Samples { windows: *windows, ctx: *ctx };
                    write_calibrated(packing, cpu, tokens, samples, args.force, &observer)?
                }
                _ => packing.write(cpu, args.force, &observer)?,
            };
        }
    }
    let source_bytes = checkpoint.file_bytes();
    let planned = args.dry_run || args.plan_only;
    let summary = Summary::new(tensors.into_iter(), file_bytes, source_bytes, start.elapsed().as_secs_f64(), planned);
    let costs = match &calibration {
        Some((tokens, Calibration { ctx, .. })) if args.report_kld => {
            let packed = PackedFile::open(output)?;
            // Weights are what is compared: a model that looks ahead is marked as such.
            let options = Options { ctx: Some(*ctx), skip: 1, activations: Activations::Exact, allow_lookahead: true };
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

/// A calibration text is there where something needs it, and only there.
fn check_calibration(args: &ConvertArgs, calibrated: bool) -> Result<()> {
    let has_text = args.calib.is_some() || args.calib_tokens.is_some();
    let missing = match args.policy.missing() {
        _ if has_text => None,
        Some(Statistics::Importance) => {
            Some(("--importance", "--policy dynamic needs it, or --calib to measure it on"))
        }
        Some(Statistics::Sensitivity) => {
            Some(("--sensitivity", "--policy budget needs it, or --calib to measure it on"))
        }
        None if calibrated => Some(("--rounding", "--rounding gptq needs --calib or --calib-tokens")),
        None => None,
    };
    if let Some((option, why)) = missing {
        return Err(Error::Option { option, why: why.into() });
    }
    let used = calibrated || args.report_kld || args.policy.is_budget() || args.policy.missing().is_some();
    if has_text && !used {
        let why =
            "only --rounding gptq, --policy budget, --policy dynamic without --importance and --report-kld look at it";
        return Err(Error::Option { option: "--calib", why: why.into() });
    }
    Ok(())
}

/// What a policy goes by, and how it is measured.
struct Measurement<'a> {
    statistics: Statistics,
    cpu: Cpu,
    rules: &'a ComponentRules,
    rounding: Rounding,
}

impl Measurement<'_> {
    fn run(
        &self,
        checkpoint: &Checkpoint,
        tokens: &[u32],
        calibration: &Calibration,
        observer: &dyn Observer,
    ) -> Result<PolicyFile> {
        let Self { statistics, cpu, rules, rounding } = *self;
        let (text, ctx) = (calibration.text.clone(), Some(calibration.ctx));
        let name = match statistics {
            Statistics::Importance => format!("importance measured on {}", text.name),
            Statistics::Sensitivity => format!("sensitivity measured on {}", text.name),
        };
        let json = match statistics {
            Statistics::Importance => {
                let batches = calibration.windows.min(IMPORTANCE_WINDOWS);
                let options = importance::Options { batches, ctx, partial: None, rules: rules.clone(), resume: false };
                serde_json::to_vec(&importance::measure(cpu, checkpoint, text, tokens, &options, observer)?)
            }
            Statistics::Sensitivity => {
                let windows = calibration.windows.min(sensitivity::DEFAULT_WINDOWS);
                let options = sensitivity::Options { windows, ctx, rounding };
                serde_json::to_vec(&sensitivity::measure(cpu, checkpoint, tokens, &options, rules, observer)?)
            }
        };
        PolicyFile::new(Path::new(&name), json.expect("plain numbers and strings"))
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

/// The tokens of the calibration text, and its record.
fn read_calibration(args: &ConvertArgs, checkpoint: &Checkpoint) -> Result<(Vec<u32>, Calibration)> {
    let (path, tokens) = read_either(checkpoint, &args.calib, &args.calib_tokens)?;
    let longest = model::max_positions(checkpoint)?;
    let ctx = args.ctx.map_or(longest.min(512), |ctx| ctx as usize);
    if ctx > longest {
        let why = format!("{ctx} tokens exceed the model's context of {longest}");
        return Err(Error::Option { option: "--ctx", why });
    }
    let windows = (tokens.len() / ctx).min(args.samples as usize);
    if windows < args.samples as usize {
        args.common.notice(&format!("the text fills {windows} windows of {ctx} tokens, not {}", args.samples));
    }
    if windows == 0 {
        let why = format!("{} tokens do not fill one window of {ctx}; pass a smaller --ctx", tokens.len());
        return Err(Error::Tokens { source_name: "the calibration text".into(), why });
    }
    Ok((tokens, Calibration { text: CalibrationText::of(path)?, windows, ctx }))
}

/// A known architecture must have its tensors; an unknown one is packed all the same.
fn note_architecture(args: &ConvertArgs, checkpoint: &Checkpoint) -> Result<()> {
    match checkpoint.config() {
        None => args.common.notice(
            "no config.json: packed by generic rules; eval will not be able to run it (--config FILE names one)",
        ),
        Some(config) if model::Architecture::from_config(config).is_none() => {
            let name = short(config["architectures"][0].as_str().unwrap_or("(none)"));
            args.common
                .notice(&format!("architecture {name} is not known: packed by generic rules; eval cannot run it"));
        }
        Some(_) => model::check_shapes(checkpoint)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_size("2GB"), Ok(2_000_000_000));
        assert_eq!(parse_size("3MiB"), Ok(3 << 20));
        assert_eq!(parse_size("17"), Ok(17));
        for text in ["", "GB", "1.5GB", "-1", "0", "9XB", "99999999999GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
