//! A conversion from its options to the packed file, with all that is measured along the way.

use std::path::{Path, PathBuf};

use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use clap::{Args, ValueEnum};

use super::{
    contest::{self, Entry},
    importance,
    rounding::{Samples, write_calibrated},
    sensitivity,
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result, short},
    eval::text::read_either,
    format, model,
    pack::{Calibration, DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::{
        ComponentRules, PolicyFile,
        options::{PolicyOptions, Statistics, parse_size},
    },
    progress::Observer,
    tensor::{CalibrationText, TensorSource},
};

/// Windows of a calibration text that are looked at unless told otherwise.
pub const DEFAULT_SAMPLES: u32 = 128;

/// Windows of a calibration text that importance is measured on, at most.
const IMPORTANCE_WINDOWS: usize = 50;

/// The first window of a calibration text that sensitivity was not measured on.
const UNSEEN_WINDOW: usize = sensitivity::DEFAULT_WINDOWS + sensitivity::MOST_PROBE_WINDOWS;

/// How a checkpoint is packed.
#[derive(Args, Debug)]
pub struct ConvertOptions {
    #[command(flatten)]
    pub policy: PolicyOptions,

    /// How weights are rounded: rtn is round-to-nearest from the largest magnitude, search looks for the scales of least
    /// squared error, gptq also makes up for errors by what the layers' inputs look like on a calibration text
    #[arg(long, value_enum, default_value_t = RoundingName::Search)]
    pub rounding: RoundingName,

    /// Calibration text (UTF-8) for --rounding gptq, --policy budget, --policy dynamic and --report-kld; never the text that
    /// the model is tested on
    #[arg(long, value_name = "FILE")]
    pub calib: Option<PathBuf>,

    /// Token ids instead of a calibration text: a JSON array
    #[arg(long, value_name = "FILE")]
    pub calib_tokens: Option<PathBuf>,

    /// Windows of the calibration text to look at; fewer if the text is shorter [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub samples: Option<u32>,

    /// Tokens in a window of the calibration text [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,

    /// Ternary weights below this share of their scale are zero
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT_TERNARY_THRESHOLD)]
    pub ternary_threshold: f32,

    /// Keep tensors with NaN or infinite values as FP32 instead of refusing them
    #[arg(long)]
    pub allow_nonfinite: bool,

    /// Split the model into files with at most this much data each (more where one tensor alone is larger), e.g. 2GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub shard_size: Option<u64>,
}

/// The ways to round by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoundingName {
    Rtn,
    Search,
    Gptq,
}

impl ConvertOptions {
    fn has_text(&self) -> bool {
        self.calib.is_some() || self.calib_tokens.is_some()
    }

    /// Checks what can be told before anything is read; `measures_cost` says that the calibration text is looked at for
    /// the cost of the packed file, too.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self, measures_cost: bool) -> Result<()> {
        check_ternary_threshold(self.ternary_threshold)?;
        self.check_calibration(measures_cost)
    }

    /// A calibration text is there where something needs it, and only there.
    fn check_calibration(&self, measures_cost: bool) -> Result<()> {
        let calibrated = self.rounding == RoundingName::Gptq;
        let has_text = self.has_text();
        if self.calib.is_some() && self.calib_tokens.is_some() {
            return Err(Error::Option { option: "--calib", why: "give either it or --calib-tokens".into() });
        }
        let missing = match self.policy.missing() {
            _ if has_text => None,
            Some(Statistics::Importance) => {
                Some(("--importance", "--policy dynamic needs it, or --calib to measure it on"))
            }
            Some(Statistics::Sensitivity) => {
                Some(("--sensitivity", "--policy budget needs it, or --calib to measure it on"))
            }
            None if calibrated => Some(("--rounding", "--rounding gptq needs --calib or --calib-tokens")),
            None if measures_cost => Some(("--report-kld", "needs --calib or --calib-tokens")),
            None if self.samples.is_some() => Some(("--samples", "belongs to --calib and --calib-tokens")),
            None if self.ctx.is_some() => Some(("--ctx", "belongs to --calib and --calib-tokens")),
            None => None,
        };
        if let Some((option, why)) = missing {
            return Err(Error::Option { option, why: why.into() });
        }
        let used = calibrated || measures_cost || self.policy.is_budget() || self.policy.missing().is_some();
        if has_text && !used {
            let why = "only --rounding gptq, --policy budget, --policy dynamic without --importance and --report-kld look at it";
            return Err(Error::Option { option: "--calib", why: why.into() });
        }
        Ok(())
    }
}

/// Refuses a threshold of ternary weights that is not between 0 and 1.
///
/// # Errors
/// [`Error::Option`].
pub fn check_ternary_threshold(threshold: f32) -> Result<()> {
    if threshold > 0.0 && threshold < 1.0 {
        return Ok(());
    }
    Err(Error::Option { option: "--ternary-threshold", why: format!("{threshold} is not between 0 and 1") })
}

/// Refuses a source that is packed already.
///
/// # Errors
/// [`Error::NotAModel`].
pub fn check_source(source: &Path) -> Result<()> {
    if source.is_file() && format::is_packed(source)? {
        let why = "is packed already; convert the checkpoint that it came from".into();
        return Err(Error::NotAModel { path: source.to_owned(), why });
    }
    Ok(())
}

/// Refuses an output that must not be written to.
///
/// # Errors
/// [`Error::Option`] where it is the source or could be a file of it; [`Error::Exists`] unless `force`;
/// [`Error::BadOutput`].
pub fn check_output(source: &Path, output: &Path, force: bool) -> Result<()> {
    format::refuse_same_file(source, output)?;
    format::refuse_file_of_checkpoint(source, output)?;
    format::check_output(output, force)
}

/// What a conversion works with.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    pub cpu: Cpu,
    pub observer: &'a dyn Observer,
    /// Takes what the user should know, a sentence each.
    pub notice: &'a dyn Fn(&str),
}

/// A conversion whose policy and calibration text are read.
pub struct Conversion<'a> {
    checkpoint: &'a Checkpoint,
    around: Surroundings<'a>,
    options: PackOptions,
    text: Option<(Vec<u32>, Calibration)>,
    is_budget: bool,
}

impl<'a> Conversion<'a> {
    /// Reads the files that the options name, and measures what the policy goes by where no file holds it.
    ///
    /// # Errors
    /// As the files; tensors that do not fit config.json; a text too short for one window; as [`importance::measure`] and
    /// [`sensitivity::measure`]; [`Error::Cancelled`].
    pub fn prepare(checkpoint: &'a Checkpoint, options: &ConvertOptions, around: Surroundings<'a>) -> Result<Self> {
        let Surroundings { cpu, observer, notice } = around;
        note_architecture(checkpoint, notice)?;
        let text = if options.has_text() { Some(read_calibration(options, checkpoint, notice)?) } else { None };
        let feedback = options.rounding == RoundingName::Gptq;
        let rounding = match options.rounding {
            RoundingName::Rtn => Rounding::Nearest,
            RoundingName::Search | RoundingName::Gptq => Rounding::Search,
        };
        let policy = options.policy.policy(|statistics, rules| {
            let (tokens, calibration) = text.as_ref().expect("a text was asked for");
            let measurement = Measurement { statistics, cpu, rules, rounding };
            measurement.run(checkpoint, tokens, calibration, observer)
        })?;
        let calibration = match &text {
            Some((_, calibration)) if feedback || options.policy.goes_by_text() => Some(calibration.clone()),
            _ => None,
        };
        let is_budget = options.policy.is_budget();
        let ConvertOptions { ternary_threshold, allow_nonfinite, shard_size: shard_bytes, .. } = *options;
        let options = PackOptions {
            rounding,
            feedback,
            calibration,
            ternary_threshold,
            allow_nonfinite,
            shard_bytes,
            ..PackOptions::new(policy)
        };
        Ok(Self { checkpoint, around, options, text, is_budget })
    }

    /// The calibration text's tokens and its record.
    pub fn text(&self) -> Option<(&[u32], &Calibration)> {
        self.text.as_ref().map(|(tokens, calibration)| (tokens.as_slice(), calibration))
    }

    /// Decides every tensor's encoding; a budget's choice is measured against others where there is a text, which are
    /// returned with it.
    ///
    /// # Errors
    /// As [`Packing::plan`] and [`contest::contest`].
    pub fn plan(&self, output: &Path) -> Result<(Packing<'_>, Vec<Entry>)> {
        let Surroundings { cpu, observer, notice } = self.around;
        let mut packing = Packing::plan(self.checkpoint, &self.options, output, cpu, observer)?;
        let compared = match self.text() {
            Some((tokens, &Calibration { ctx, .. })) if self.is_budget => {
                if tokens.len() < UNSEEN_WINDOW * ctx + contest::TOKENS {
                    notice("the text is short: mixes are compared on windows that costs were measured on, too");
                }
                contest::contest(cpu, self.checkpoint, &mut packing, tokens, (ctx, UNSEEN_WINDOW), observer)?
            }
            _ => Vec::new(),
        };
        packing.notices().iter().for_each(|sentence| notice(sentence));
        Ok((packing, compared))
    }

    /// Writes what was planned; returns the files.
    ///
    /// # Errors
    /// As [`Packing::write`] and [`write_calibrated`].
    pub fn write(&self, packing: Packing, force: bool) -> Result<Vec<PathBuf>> {
        let Surroundings { cpu, observer, .. } = self.around;
        match self.text() {
            Some((tokens, &Calibration { windows, ctx, .. })) if self.options.feedback => {
                write_calibrated(packing, cpu, tokens, Samples { windows, ctx }, force, observer)
            }
            _ => packing.write(cpu, force, observer),
        }
    }
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

/// The tokens of the calibration text, and its record.
fn read_calibration(
    args: &ConvertOptions,
    checkpoint: &Checkpoint,
    notice: &dyn Fn(&str),
) -> Result<(Vec<u32>, Calibration)> {
    let (path, tokens) = read_either(checkpoint, &args.calib, &args.calib_tokens)?;
    let longest = model::max_positions(checkpoint)?;
    let ctx = args.ctx.map_or(longest.min(512), |ctx| ctx as usize);
    if ctx > longest {
        let why = format!("{ctx} tokens exceed the model's context of {longest}");
        return Err(Error::Option { option: "--ctx", why });
    }
    let samples = args.samples.unwrap_or(DEFAULT_SAMPLES) as usize;
    let windows = (tokens.len() / ctx).min(samples);
    if windows < samples {
        notice(&format!("the text fills {windows} windows of {ctx} tokens, not {samples}"));
    }
    if windows == 0 {
        let why = format!("{} tokens do not fill one window of {ctx}; pass a smaller --ctx", tokens.len());
        return Err(Error::Tokens { source_name: "the calibration text".into(), why });
    }
    Ok((tokens, Calibration { text: CalibrationText::of(path)?, windows, ctx }))
}

/// A known architecture must have its tensors; an unknown one is packed all the same.
fn note_architecture(checkpoint: &Checkpoint, notice: &dyn Fn(&str)) -> Result<()> {
    match checkpoint.config() {
        None => {
            notice("no config.json: packed by generic rules; eval will not be able to run it (--config FILE names one)")
        }
        Some(config) if model::Architecture::from_config(config).is_none() => {
            let name = short(config["architectures"][0].as_str().unwrap_or("(none)"));
            notice(&format!("architecture {name} is not known: packed by generic rules; eval cannot run it"));
        }
        Some(_) => model::check_shapes(checkpoint)?,
    }
    Ok(())
}
