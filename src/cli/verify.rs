//! `bkpack verify`: every hash of a packed file, then each target with what was measured.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use bkpack::{
    Error, Result,
    eval::{
        perplexity::{Evaluation, Options, evaluate},
        targets::{Figures, Needs, THIS, Targets, Verdict, Wanted, size_figures},
        text::read_either,
    },
    format::PackedFile,
    ops::cpu::Activations,
    report::table::table,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::{CHECK_FAILED, Common, print, progress::ProgressObserver, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack verify model.bkpack
      Every hash and every rule of the format
  bkpack verify model.bkpack --min-ratio 6
      ... and at most a sixth of the size in FP32
  bkpack verify model.bkpack --max-ppl-increase 8% --max-kld 0.1 --text test.txt --baseline ./model
      ... and what packing may cost on a text
  bkpack verify model.bkpack --spec targets.toml --text test.txt --baseline ./model
      ... and the targets of a file, each by its id
  bkpack verify --spec docs/targets.toml --only req_8_6_resnetbk_int4_lt_50
      One target on stored results

The exit status is 0 if all checks pass, 1 if one fails (a file that is no packed file fails the first), 2 if they could
not be made.";

/// Check every hash of a packed file, and targets of size and quality
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Packed file; may be left out where the targets of --spec look at stored results only
    #[arg(required_unless_present = "spec")]
    packed: Option<PathBuf>,

    /// The least ratio of the size in FP32 to the file's bytes
    #[arg(long, value_name = "X", value_parser = parse_finite, requires = "packed")]
    min_ratio: Option<f64>,

    /// The most that perplexity may increase over the baseline, in percent
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, allow_hyphen_values = true, requires = "baseline")]
    max_ppl_increase: Option<f64>,

    /// The largest mean KL divergence from the baseline, in nats
    #[arg(long, value_name = "X", value_parser = parse_finite, requires = "baseline")]
    max_kld: Option<f64>,

    /// Check the targets of this TOML file, on the packed file and on what the file names (see docs/targets.toml)
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,

    /// Of the targets in --spec only this one (may be repeated)
    #[arg(long, value_name = "ID", requires = "spec")]
    only: Vec<String>,

    /// Packed file or checkpoint to compare with
    #[arg(long, value_name = "MODEL", requires = "packed")]
    baseline: Option<PathBuf>,

    /// Text to measure on
    #[arg(long, value_name = "FILE", group = "measured")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE", group = "measured")]
    tokens: Option<PathBuf>,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N", requires = "measured")]
    ctx: Option<usize>,

    /// Positions at the start of each window that are not scored
    #[arg(long, value_name = "N", default_value_t = 1, requires = "measured")]
    skip: usize,

    /// Use only the first N tokens
    #[arg(long, value_name = "N", requires = "measured")]
    limit_tokens: Option<usize>,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t, requires = "measured")]
    activations: Activations,

    /// Measure a model whose positions see later tokens, and mark every figure
    #[arg(long, requires = "measured")]
    allow_lookahead: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// One check: what was asked, what was found.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    target: String,
    measured: String,
    passed: bool,
    /// Where it is a target of a file: its parts, for machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<Verdict>,
}

impl Check {
    fn new(name: impl Into<String>, target: String, measured: String, passed: bool) -> Self {
        Self { name: name.into(), target, measured, passed, verdict: None }
    }
}

impl From<Verdict> for Check {
    fn from(verdict: Verdict) -> Self {
        let number = verdict.measured.map(number);
        let measured: Vec<String> = number.into_iter().chain(verdict.remark.clone()).collect();
        Self {
            name: verdict.id.clone(),
            target: format!("{} {} {}", verdict.quantity, verdict.comparison, verdict.threshold),
            measured: measured.join(", "),
            passed: verdict.passed,
            verdict: Some(verdict),
        }
    }
}

/// Six significant digits, and no fewer than there are before the point.
fn number(value: f64) -> String {
    let digits = value.abs().log10().floor();
    if value != 0.0 && digits < -4.0 {
        return format!("{value:.3e}");
    }
    format!("{value:.*}", (5.0 - digits.max(0.0)).max(0.0) as usize)
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    parse_finite(number)
}

fn parse_finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| format!("{text:?} is not a number"))
}

/// Runs the subcommand; the exit status says whether all checks passed.
pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let observer = args.common.observer();
    let targets = args.spec.as_ref().map(|path| Targets::read(path, &args.only)).transpose()?;
    let wanted = targets.as_ref().map(Targets::wanted).unwrap_or_default();
    let needs = needs(args, targets.as_ref(), &wanted)?;

    let mut checks = Vec::new();
    let mut figures = BTreeMap::new();
    if let Some(path) = &args.packed {
        let checked = PackedFile::open(path).and_then(|packed| {
            packed.check_contents(&observer)?;
            Ok(packed)
        });
        let packed = match checked {
            Ok(packed) => packed,
            Err(error @ (Error::Io { .. } | Error::NotAModel { .. } | Error::Cancelled)) => return Err(error),
            Err(error) => {
                let check = Check::new("hashes", "all match".into(), error.to_string(), false);
                return report(args, &[check]);
            }
        };
        let parts = packed.tensors().iter().map(|tensor| tensor.parts.len()).sum::<usize>() + packed.files().count();
        checks.push(Check::new("hashes", "all match".into(), format!("{parts} parts and the header match"), true));
        if let Some(target) = args.min_ratio {
            let ratio = 4.0 * packed.parameters() as f64 / packed.file_bytes() as f64;
            checks.push(Check::new("ratio to FP32", format!(">= {target}"), format!("{ratio:.3}"), ratio >= target));
        }
        figures.insert(THIS.to_owned(), size_figures(&packed));
        if needs >= Some(Needs::Text) {
            let baseline: Vec<&Path> = args.baseline.iter().map(PathBuf::as_path).collect();
            let baseline = args.checkpoint.open(&baseline, None, &args.common)?;
            let evaluation = measure(args, &packed, baseline.first().map(|model| &**model), &observer)?;
            quality(args, &evaluation, &mut checks);
            figures.insert(THIS.to_owned(), all_figures(&evaluation));
        }
    }
    if let Some(targets) = &targets {
        for wanted in wanted {
            let measured = measure_wanted(args, &wanted, &observer)?;
            figures.insert(wanted.name, measured);
        }
        checks.extend(targets.check(&figures)?.into_iter().map(Check::from));
    }
    report(args, &checks)
}

/// What the packed file must be measured on; refuses options that nothing looks at, and targets that lack an option.
fn needs(args: &VerifyArgs, targets: Option<&Targets>, wanted: &[Wanted]) -> Result<Option<Needs>> {
    let by_options = (args.max_ppl_increase.is_some() || args.max_kld.is_some()).then_some(Needs::Baseline);
    let by_targets = targets.and_then(Targets::needs_of_this);
    let has_text = args.text.is_some() || args.tokens.is_some();
    if by_options.is_some() && !has_text {
        let why = "need --text or --tokens to measure on".into();
        return Err(Error::Option { option: "--max-ppl-increase, --max-kld", why });
    }
    if let (Some(targets), Some(needs)) = (targets, by_targets) {
        let lacks = match needs {
            _ if args.packed.is_none() => "name the packed file",
            Needs::Text if !has_text => "pass --text or --tokens",
            Needs::Baseline if !has_text || args.baseline.is_none() => "pass --baseline and --text or --tokens",
            _ => "",
        };
        if !lacks.is_empty() {
            return Err(targets.unmeasurable(THIS, lacks));
        }
    }
    if let (Some(targets), false) = (targets, has_text)
        && let Some(wanted) = wanted.iter().find(|wanted| wanted.needs >= Needs::Text)
    {
        return Err(targets.unmeasurable(&wanted.name, "pass --text or --tokens"));
    }
    if let (Some(targets), Some(wanted)) =
        (targets, wanted.iter().find(|wanted| wanted.needs == Needs::Baseline && wanted.baseline.is_none()))
    {
        return Err(targets.unmeasurable(&wanted.name, "the measurement needs a baseline"));
    }
    let needs = by_options.max(by_targets);
    let text_is_used = needs >= Some(Needs::Text) || wanted.iter().any(|wanted| wanted.needs >= Needs::Text);
    if has_text && !text_is_used || args.baseline.is_some() && needs < Some(Needs::Text) {
        let why = "one of them must say what the measurement on the text is checked against".into();
        return Err(Error::Option { option: "--max-ppl-increase, --max-kld, --spec", why });
    }
    if let (None, Some(option)) = (&args.baseline, args.checkpoint.given()) {
        return Err(Error::Option { option, why: "applies to the --baseline, and none is given".into() });
    }
    Ok(needs)
}

fn measure(
    args: &VerifyArgs,
    packed: &dyn TensorSource,
    baseline: Option<&dyn TensorSource>,
    observer: &ProgressObserver,
) -> Result<Evaluation> {
    let (_, mut tokens) = read_either(packed, &args.text, &args.tokens)?;
    tokens.truncate(args.limit_tokens.unwrap_or(usize::MAX));
    let options = Options {
        ctx: args.ctx,
        skip: args.skip,
        activations: args.activations,
        allow_lookahead: args.allow_lookahead,
    };
    evaluate(Cpu::from_environment()?, packed, baseline, &tokens, &options, observer)
}

/// Measures a packed file that the targets name, once its hashes are checked.
fn measure_wanted(args: &VerifyArgs, wanted: &Wanted, observer: &ProgressObserver) -> Result<Figures> {
    let packed = PackedFile::open(&wanted.path)?;
    packed.check_contents(observer)?;
    if wanted.needs == Needs::Size {
        return Ok(size_figures(&packed));
    }
    let baseline: Vec<&Path> = wanted.baseline.iter().map(PathBuf::as_path).collect();
    let baseline = SourceArgs::default().open(&baseline, None, &args.common)?;
    Ok(all_figures(&measure(args, &packed, baseline.first().map(|model| &**model), observer)?))
}

fn all_figures(evaluation: &Evaluation) -> Figures {
    match serde_json::to_value(evaluation) {
        Ok(Value::Object(figures)) => figures,
        _ => unreachable!("an evaluation is plain numbers and strings"),
    }
}

/// The checks that the options ask for.
fn quality(args: &VerifyArgs, evaluation: &Evaluation, checks: &mut Vec<Check>) {
    let Some(measured) = &evaluation.baseline else { return };
    let mark = |name: &str| if evaluation.looks_ahead { format!("{name} (LOOKS AHEAD)") } else { name.to_owned() };
    if let Some(target) = args.max_ppl_increase {
        let increase = measured.ppl_increase_percent;
        let text = format!("{increase:+.3} % ({:.3} to {:.3})", measured.baseline_ppl, evaluation.ppl);
        // Written so that NaN fails.
        checks.push(Check::new(mark("perplexity increase"), format!("<= {target} %"), text, increase <= target));
    }
    if let Some(target) = args.max_kld {
        let passed = measured.kld_mean <= target;
        let text = format!("{:.6}", measured.kld_mean);
        checks.push(Check::new(mark("mean KL divergence"), format!("<= {target}"), text, passed));
    }
}

fn report(args: &VerifyArgs, checks: &[Check]) -> Result<ExitCode> {
    let passed = checks.iter().all(|check| check.passed);
    if args.json {
        let object = json!({ "passed": passed, "checks": checks });
        print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"))?;
    } else if !args.common.quiet || !passed {
        let mut lines = table(&["", "check", "target", "measured"], 4);
        for check in checks {
            let verdict = if check.passed { "PASS" } else { "FAIL" };
            lines.add_row([verdict, &check.name, &check.target, &check.measured]);
        }
        print(&lines.trim_fmt())?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(CHECK_FAILED) })
}
