//! `bkpack sweep`: models at several widths, or with several amounts of compute, each measured into a file of its own.

use std::{
    collections::HashSet,
    path::PathBuf,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
};

use bkpack::{
    Error, Result,
    encoding::GroupSize,
    eval::{
        perplexity::Options,
        sweep::{Configuration, LayerRanking, Precision, Subject, Sweep},
        text::read_either,
    },
    format,
    progress::{Observer, Unit},
    report::table::count,
    tensor::CalibrationText,
};
use bkpack_kernels::Cpu;
use clap::Args;
use serde_json::Value;

use super::{Common, print, progress::ProgressObserver, rounding::RoundingName, source::SourceArgs, text::MeasureArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack sweep ./llama ./mamba --bits fp32,int8,int4 --text test.txt -o results/quantization
      Packs and measures each model at each width; run again, it goes on where it stopped
  bkpack sweep resnetbk=./model --bit-widths 32 16 8 4 --text test.txt -o results/quantization --keep embed
      Widths as numbers, a name for the results, embeddings at source precision
  bkpack sweep ./llama ./mamba --compute --text test.txt --calib valid.txt -o results/efficiency
      Fewer layers, experts and positions of attention: perplexity and FLOPs per token of each
  bkpack sweep ./llama --compute --bits int4 --text test.txt --calib valid.txt -o results/efficiency-int4
      The same on the model at 4 bits: as many FLOPs, fewer bytes";

/// Measure models at several widths, or with several amounts of compute
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct SweepArgs {
    /// Checkpoints; results are named after the folder, or as NAME=FOLDER says
    #[arg(value_name = "[NAME=]MODEL", required = true)]
    models: Vec<NamedModel>,

    /// Widths: fp32, fp16, bf16, int8 to int2, ternary, binary, or the number of bits [default: fp32,fp16,int8,int4,int2;
    /// with --compute fp32]
    #[arg(long, alias = "bit-widths", alias = "bit_widths", value_name = "WIDTHS", num_args = 1.., value_delimiter = ',')]
    bits: Vec<Precision>,

    /// Vary layers, experts for a token and the window of attention instead, at one width
    #[arg(long, requires = "calibration")]
    compute: bool,

    #[command(flatten)]
    measure: MeasureArgs,

    /// Folder for the results
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,

    /// Text on which the layers to skip are chosen (UTF-8); never the text that is measured on
    #[arg(long, value_name = "FILE", group = "calibration", requires = "compute")]
    calib: Option<PathBuf>,

    /// Token ids instead of a calibration text: a JSON array
    #[arg(long, value_name = "FILE", group = "calibration", requires = "compute")]
    calib_tokens: Option<PathBuf>,

    /// Windows of the calibration text to look at; fewer if the text is shorter
    #[arg(long, value_name = "N", default_value_t = 16, requires = "calibration", value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,

    /// Columns that share a scale: 32, 64, 128, 256, or row for one scale a row
    #[arg(long, value_name = "N", default_value = "128", value_parser = |text: &str| text.parse::<GroupSize>().map_err(|_| "use 32, 64, 128, 256 or row"))]
    group_size: GroupSize,

    /// Give each group of 2 to 8 bits a zero point of its own
    #[arg(long)]
    asymmetric: bool,

    /// How weights are rounded: rtn is round-to-nearest from the largest magnitude, search looks for the scales of least
    /// squared error
    #[arg(long, value_enum, default_value_t = RoundingName::Search)]
    rounding: RoundingName,

    /// Leave tensors whose name matches at their source precision (may be repeated)
    #[arg(long, value_name = "REGEX")]
    keep: Vec<String>,

    /// Leave the packed files beside the results
    #[arg(long)]
    keep_packed: bool,

    /// Measure again what is there, and replace it
    #[arg(long)]
    force: bool,

    /// Print one JSON array of all results for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

/// A checkpoint and what its results are named after.
#[derive(Clone, Debug)]
struct NamedModel {
    name: String,
    path: PathBuf,
}

impl FromStr for NamedModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let valid = |name: &str| !name.starts_with('.') && (1..=100).contains(&name.len()) && name.chars().all(allowed);
        if let Some((name, path)) = text.split_once('=')
            && valid(name)
        {
            return Ok(Self { name: name.into(), path: path.into() });
        }
        let path = PathBuf::from(text);
        // `.` and `..` have no name of their own.
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        match whole.file_name().and_then(|name| name.to_str()).filter(|name| valid(name)) {
            Some(name) => Ok(Self { name: name.into(), path }),
            None => Err("its results need a name of letters, digits and _-.: give it as NAME=MODEL".into()),
        }
    }
}

/// One bar for the whole sweep, in tokens that are run.
struct WholeSweep<'a> {
    inner: &'a ProgressObserver,
    /// Whether the stage under way runs tokens.
    runs: AtomicBool,
}

impl Observer for WholeSweep<'_> {
    fn begin(&self, _: &str, _: u64, unit: Unit) {
        self.runs.store(unit == Unit::Tokens, Ordering::Relaxed);
    }

    fn advance(&self, amount: u64) {
        if self.runs.load(Ordering::Relaxed) {
            self.inner.advance(amount);
        }
    }

    fn end(&self) {}

    fn cancelled(&self) -> bool {
        self.inner.cancelled()
    }
}

/// Runs the subcommand.
pub fn run(args: &SweepArgs) -> Result<()> {
    let observer = args.common.observer();
    let precisions = precisions(args)?;
    let mut names = HashSet::new();
    if let Some(model) = args.models.iter().find(|model| !names.insert(&model.name)) {
        let why = format!("two models are named {}; name one of them as NAME=MODEL", model.name);
        return Err(Error::Option { option: "MODEL", why });
    }
    let text = CalibrationText::of(args.measure.path())?;
    let calibration = args.calib.as_ref().or(args.calib_tokens.as_ref()).map(|path| CalibrationText::of(path));
    let calibration = calibration.transpose()?;
    if calibration.as_ref().is_some_and(|calibration| calibration.blake3 == text.blake3) {
        let why = "is the text that is measured on; layers must be chosen on another".into();
        return Err(Error::Option { option: "--calib", why });
    }
    let sweep = Sweep {
        cpu: Cpu::from_environment()?,
        folder: args.output.clone(),
        text,
        options: args.measure.options(),
        group: args.group_size,
        asymmetric: args.asymmetric,
        rounding: args.rounding.into(),
        keep: args.keep.clone(),
        keep_packed: args.keep_packed,
        force: args.force,
    };
    let subjects: Vec<Subject> =
        args.models.iter().map(|model| subject(args, model, &sweep.options)).collect::<Result<_>>()?;
    sweep.prepare_folder()?;
    let results = match &calibration {
        Some(calibration) => sweep_compute(args, &sweep, &subjects, precisions[0], calibration, &observer)?,
        None => sweep_widths(args, &sweep, &subjects, &precisions, &observer)?,
    };
    if args.json { print(&serde_json::to_string_pretty(&results).expect("plain numbers and strings")) } else { Ok(()) }
}

fn precisions(args: &SweepArgs) -> Result<Vec<Precision>> {
    let mut precisions = args.bits.clone();
    if precisions.is_empty() {
        let default: &[&str] = if args.compute { &["fp32"] } else { &["fp32", "fp16", "int8", "int4", "int2"] };
        precisions = default.iter().map(|name| name.parse().expect("a known name")).collect();
    }
    let wrong = |why: &str| Err(Error::Option { option: "--bits", why: why.into() });
    if args.compute && precisions.len() > 1 {
        return wrong("with --compute all configurations run at one width; use another folder for each");
    }
    if (1..precisions.len()).any(|index| precisions[..index].contains(&precisions[index])) {
        return wrong("a width is named twice");
    }
    if args.asymmetric && !precisions.iter().any(|precision| matches!(precision, Precision::Int(_))) {
        let why = "only integers of 2 to 8 bits have zero points".into();
        return Err(Error::Option { option: "--asymmetric", why });
    }
    Ok(precisions)
}

fn subject(args: &SweepArgs, model: &NamedModel, options: &Options) -> Result<Subject> {
    if model.path.is_file() && format::is_packed(&model.path)? {
        let why = "is packed already; a sweep packs the checkpoint that it came from".into();
        return Err(Error::NotAModel { path: model.path.clone(), why });
    }
    let checkpoint = SourceArgs::default().open_checkpoint(&model.path, &args.common)?;
    let tokens = args.measure.tokens(&checkpoint)?;
    Subject::new(model.name.clone(), checkpoint, tokens, options)
}

fn sweep_widths(
    args: &SweepArgs,
    sweep: &Sweep,
    subjects: &[Subject],
    precisions: &[Precision],
    observer: &ProgressObserver,
) -> Result<Vec<Value>> {
    // All of it first: a file that must not be replaced is told before hours of work.
    let mut pairs = Vec::new();
    for subject in subjects {
        for &precision in precisions {
            pairs.push((subject, precision, sweep.done(subject, precision)?));
        }
    }
    let left = pairs.iter().filter(|(_, _, done)| done.is_none()).map(|(subject, ..)| subject.measured_tokens()).sum();
    note_done(args, pairs.iter().filter(|(_, _, done)| done.is_some()).count());
    let whole = begin(observer, left);
    let table = Rows::new(args, observer, subjects.iter().map(|subject| subject.name.len()).max());
    table.show("model", &WIDTH_COLUMNS, WIDTH_COLUMNS.map(|(name, _)| name.to_owned()))?;
    let mut results = Vec::new();
    for (subject, precision, done) in pairs {
        let result = match done {
            Some(done) => done,
            None => to_value(&sweep.quantization(subject, precision, &whole)?),
        };
        table.show(&subject.name, &WIDTH_COLUMNS, width_row(&result))?;
        results.push(result);
    }
    observer.end();
    Ok(results)
}

fn sweep_compute(
    args: &SweepArgs,
    sweep: &Sweep,
    subjects: &[Subject],
    precision: Precision,
    calibration: &CalibrationText,
    observer: &ProgressObserver,
) -> Result<Vec<Value>> {
    let mut calibrated = Vec::new();
    let mut left = 0;
    for subject in subjects {
        let (_, mut tokens) = read_either(&subject.checkpoint, &args.calib, &args.calib_tokens)?;
        tokens.truncate(args.samples as usize * subject.ctx());
        left += tokens.len() as u64 * (1 + subject.compute()?.layers as u64);
        left += subject.measured_tokens() * subject.configurations_count()? as u64;
        calibrated.push((subject, tokens));
    }
    let whole = begin(observer, left);
    let table = Rows::new(args, observer, subjects.iter().map(|subject| subject.name.len() + 10).max());
    table.show("configuration", &COMPUTE_COLUMNS, COMPUTE_COLUMNS.map(|(name, _)| name.to_owned()))?;
    let mut results = Vec::new();
    for (subject, tokens) in calibrated {
        let ranking = match sweep.ranking_done(subject, (calibration, &tokens))? {
            Some(ranking) => {
                observer.advance(tokens.len() as u64 * (1 + ranking.nll_without.len() as u64));
                ranking
            }
            None => sweep.rank_layers(subject, (calibration, &tokens), &whole)?,
        };
        results.extend(compute_of(sweep, subject, precision, &ranking, &whole, &table)?);
    }
    observer.end();
    Ok(results)
}

fn compute_of(
    sweep: &Sweep,
    subject: &Subject,
    precision: Precision,
    ranking: &LayerRanking,
    whole: &WholeSweep,
    table: &Rows,
) -> Result<Vec<Value>> {
    let configurations = subject.configurations(ranking)?;
    let done = |configuration: &Configuration| sweep.compute_done(subject, precision, configuration);
    let done: Vec<Option<Value>> = configurations.iter().map(done).collect::<Result<_>>()?;
    note_done(table.args, done.iter().flatten().count());
    let packed = match done.contains(&None) {
        true => Some(sweep.pack(subject, precision, whole)?),
        false => None,
    };
    let mut results = Vec::new();
    for (configuration, done) in configurations.iter().zip(done) {
        let result = match (done, &packed) {
            (None, Some(packed)) => to_value(&sweep.configuration(subject, packed, configuration, ranking, whole)?),
            (done, _) => {
                whole.inner.advance(subject.measured_tokens());
                done.unwrap_or_default()
            }
        };
        table.show(result["config_id"].as_str().unwrap_or_default(), &COMPUTE_COLUMNS, compute_row(&result))?;
        results.push(result);
    }
    if sweep.force {
        sweep.remove_beyond(subject, results.len())?;
    }
    Ok(results)
}

fn begin(observer: &ProgressObserver, tokens: u64) -> WholeSweep<'_> {
    observer.begin("Sweeping", tokens, Unit::Tokens);
    WholeSweep { inner: observer, runs: AtomicBool::new(false) }
}

fn note_done(args: &SweepArgs, done: usize) {
    if done > 0 {
        args.common.notice(&format!("{done} results are in {} already", args.output.display()));
    }
}

fn to_value(result: &impl serde::Serialize) -> Value {
    serde_json::to_value(result).expect("plain numbers and strings")
}

/// Prints a line of the table as soon as it is measured.
struct Rows<'a> {
    args: &'a SweepArgs,
    observer: &'a ProgressObserver,
    name_width: usize,
}

/// Names of columns after the first, and their widths.
type Columns<const N: usize> = [(&'static str, usize); N];

const WIDTH_COLUMNS: Columns<8> = [
    ("width", 8),
    ("perplexity", 12),
    ("increase %", 12),
    ("mean KLD", 11),
    ("same top %", 12),
    ("file bytes", 15),
    ("bits/weight", 12),
    ("ratio to FP32", 14),
];

const COMPUTE_COLUMNS: Columns<7> = [
    ("perplexity", 12),
    ("FLOPs/token", 16),
    ("factor", 8),
    ("layers", 8),
    ("experts", 8),
    ("window", 8),
    ("bytes/token", 14),
];

impl<'a> Rows<'a> {
    fn new(args: &'a SweepArgs, observer: &'a ProgressObserver, longest: Option<usize>) -> Self {
        Self { args, observer, name_width: longest.unwrap_or(0).max("configuration".len()) }
    }

    fn show<const N: usize>(&self, name: &str, columns: &Columns<N>, values: [String; N]) -> Result<()> {
        if self.args.json || self.args.common.quiet {
            return Ok(());
        }
        let cells: String =
            columns.iter().zip(values).map(|((_, width), value)| format!(" {value:>0$}", width - 1)).collect();
        self.observer.suspended(|| print(&format!("{name:<width$}{cells}", width = self.name_width)))
    }
}

fn decimals(value: &Value, digits: usize) -> String {
    value.as_f64().map_or("-".into(), |value| format!("{value:.digits$}"))
}

fn whole_number(value: &Value) -> String {
    value.as_u64().map_or("-".into(), count)
}

/// A perplexity, with its mark.
fn perplexity(result: &Value) -> String {
    let mark = if result["looks_ahead"] == true { " AHEAD" } else { "" };
    decimals(&result["perplexity"], 4) + mark
}

fn width_row(result: &Value) -> [String; 8] {
    [
        result["precision"].as_str().unwrap_or("-").to_owned(),
        perplexity(result),
        decimals(&result["ppl_increase_percent"], 3),
        decimals(&result["kld_mean"], 6),
        result["top1_agreement"].as_f64().map_or("-".into(), |share| format!("{:.2}", 100.0 * share)),
        whole_number(&result["file_bytes"]),
        decimals(&result["bits_per_weight"], 3),
        decimals(&result["ratio_fp32"], 3),
    ]
}

fn compute_row(result: &Value) -> [String; 7] {
    [
        perplexity(result),
        whole_number(&result["flops_per_token"]),
        decimals(&result["compute_factor"], 3),
        whole_number(&result["layers"]),
        whole_number(&result["experts_per_token"]),
        whole_number(&result["attention_window"]),
        whole_number(&result["weight_bytes_per_token"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_after_their_folder_or_as_told() {
        let named = |text: &str| text.parse::<NamedModel>().map(|model| (model.name, model.path));
        assert_eq!(named("resnetbk=/m/x"), Ok(("resnetbk".into(), "/m/x".into())));
        assert_eq!(named("/m/llama/"), Ok(("llama".into(), "/m/llama/".into())));
        assert_eq!(named("a=b=c"), Ok(("a".into(), "b=c".into())));
        for text in ["", "/", "../..=x/", "/m/no name", ".hidden=x/"] {
            assert!(named(text).is_err(), "{text}");
        }
    }
}
