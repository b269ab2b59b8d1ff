//! `bkpack verify`: every hash of a packed file, then each target with what was measured.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use bkpack::{
    Error, Result,
    eval::perplexity::{Evaluation, Options, evaluate},
    format::PackedFile,
    ops::cpu::Activations,
    report::table::table,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::{CHECK_FAILED, Common, print, source::SourceArgs, text::read_either};

const EXAMPLES: &str = "\
Examples:
  bkpack verify model.bkpack
      Every hash and every rule of the format
  bkpack verify model.bkpack --min-ratio 6
      ... and at most a sixth of the size in FP32
  bkpack verify model.bkpack --max-ppl-increase 8% --max-kld 0.1 --text test.txt --baseline ./model
      ... and what packing may cost on a text

The exit status is 0 if all checks pass, 1 if one fails (a file that is no packed file fails the first), 2 if they could
not be made.";

/// Check every hash of a packed file, and targets of size and quality
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Packed file
    packed: PathBuf,

    /// The least ratio of the size in FP32 to the file's bytes
    #[arg(long, value_name = "X", value_parser = parse_finite)]
    min_ratio: Option<f64>,

    /// The most that perplexity may increase over the baseline, in percent
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, allow_hyphen_values = true, requires = "baseline")]
    max_ppl_increase: Option<f64>,

    /// The largest mean KL divergence from the baseline, in nats
    #[arg(long, value_name = "X", value_parser = parse_finite, requires = "baseline")]
    max_kld: Option<f64>,

    /// Packed file or checkpoint to compare with
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,

    /// Text to measure on
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N", requires = "baseline")]
    ctx: Option<usize>,

    /// Positions at the start of each window that are not scored
    #[arg(long, value_name = "N", default_value_t = 1, requires = "baseline")]
    skip: usize,

    /// Use only the first N tokens
    #[arg(long, value_name = "N", requires = "baseline")]
    limit_tokens: Option<usize>,

    /// How activations enter the product with quantized weights
    #[arg(long, value_enum, default_value_t, requires = "baseline")]
    activations: Activations,

    /// Measure a model whose positions see later tokens, and mark every figure
    #[arg(long, requires = "baseline")]
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
    let measures_quality = args.max_ppl_increase.is_some() || args.max_kld.is_some();
    let (has_text, wrong) = (args.text.is_some() || args.tokens.is_some(), |why: &str| Error::Option {
        option: "--max-ppl-increase, --max-kld",
        why: why.into(),
    });
    if measures_quality && !has_text {
        return Err(wrong("need --text or --tokens to measure on"));
    }
    if !measures_quality && (has_text || args.baseline.is_some()) {
        return Err(wrong("one of them must say what the measurement on the text is checked against"));
    }
    if let (None, Some(option)) = (&args.baseline, args.checkpoint.given()) {
        return Err(Error::Option { option, why: "applies to the --baseline, and none is given".into() });
    }
    let checked = PackedFile::open(&args.packed).and_then(|packed| {
        packed.check_contents(&observer)?;
        Ok(packed)
    });
    let packed = match checked {
        Ok(packed) => packed,
        Err(error @ (Error::Io { .. } | Error::NotAModel { .. } | Error::Cancelled)) => return Err(error),
        Err(error) => {
            let check =
                Check { name: "hashes".into(), target: "all match".into(), measured: error.to_string(), passed: false };
            return report(args, &[check]);
        }
    };
    let parts: usize = packed.tensors().iter().map(|tensor| tensor.parts.len()).sum::<usize>() + packed.files().count();
    let mut checks = vec![Check {
        name: "hashes".into(),
        target: "all match".into(),
        measured: format!("{parts} parts and the header match"),
        passed: true,
    }];
    if let Some(target) = args.min_ratio {
        let ratio = 4.0 * packed.parameters() as f64 / packed.file_bytes() as f64;
        checks.push(Check {
            name: "ratio to FP32".into(),
            target: format!(">= {target}"),
            measured: format!("{ratio:.3}"),
            passed: ratio >= target,
        });
    }
    if measures_quality {
        quality(args, &packed, &observer, &mut checks)?;
    }
    report(args, &checks)
}

fn quality(
    args: &VerifyArgs,
    packed: &PackedFile,
    observer: &super::ProgressObserver,
    checks: &mut Vec<Check>,
) -> Result<()> {
    let baseline: Vec<&Path> = args.baseline.iter().map(PathBuf::as_path).collect();
    let baseline = args.checkpoint.open(&baseline, None, &args.common)?;
    let (_, mut tokens) = read_either(packed, &args.text, &args.tokens)?;
    tokens.truncate(args.limit_tokens.unwrap_or(usize::MAX));
    let options = Options {
        ctx: args.ctx,
        skip: args.skip,
        activations: args.activations,
        allow_lookahead: args.allow_lookahead,
    };
    let evaluation: Evaluation = evaluate(
        Cpu::from_environment()?,
        packed,
        baseline.first().map(|model| &**model),
        &tokens,
        &options,
        observer,
    )?;
    let Some(measured) = &evaluation.baseline else { return Ok(()) };
    let mark = |name: &str| if evaluation.looks_ahead { format!("{name} (LOOKS AHEAD)") } else { name.to_owned() };
    if let Some(target) = args.max_ppl_increase {
        let increase = measured.ppl_increase_percent;
        checks.push(Check {
            name: mark("perplexity increase"),
            target: format!("<= {target} %"),
            measured: format!("{increase:+.3} % ({:.3} to {:.3})", measured.baseline_ppl, evaluation.ppl),
            // Written so that NaN fails.
            passed: increase <= target,
        });
    }
    if let Some(target) = args.max_kld {
        checks.push(Check {
            name: mark("mean KL divergence"),
            target: format!("<= {target}"),
            measured: format!("{:.6}", measured.kld_mean),
            passed: measured.kld_mean <= target,
        });
    }
    Ok(())
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
