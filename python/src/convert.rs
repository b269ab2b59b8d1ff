//! Packing a checkpoint.

use std::{path::PathBuf, sync::Mutex, time::Instant};

use bkpack::{
    Result,
    checkpoint::{self, OpenOptions},
    encoding::GroupSize,
    policy::options::{Bits, High, PolicyOptions, parse_bits, parse_size},
    report::convert::Summary,
    tensor::TensorSource,
    train::{
        contest::Entry,
        conversion::{Conversion, ConvertOptions, RoundingName, Surroundings, check_output, check_source},
    },
};
use bkpack_kernels::Cpu;
use clap::ValueEnum;
use pyo3::prelude::*;
use serde::Serialize;

use crate::{
    errors::{exception, option, whole},
    work,
};

/// What to pack and how; the fields are those of the Python function, widths and sizes as the command line has them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Request {
    source: PathBuf,
    output: PathBuf,
    bits: Option<String>,
    group_size: Option<String>,
    asymmetric: bool,
    keep: Vec<String>,
    tensor: Vec<String>,
    rules: Option<PathBuf>,
    policy: Option<String>,
    recipe: Option<PathBuf>,
    importance: Option<PathBuf>,
    high_ratio: Option<f64>,
    low_ratio: Option<f64>,
    high: Option<String>,
    sensitivity: Option<PathBuf>,
    target_ratio: Option<f64>,
    target_bpw: Option<f64>,
    target_size: Option<String>,
    coupled: bool,
    rounding: String,
    calib: Option<PathBuf>,
    calib_tokens: Option<PathBuf>,
    samples: Option<i64>,
    ctx: Option<i64>,
    ternary_threshold: f32,
    allow_nonfinite: bool,
    shard_size: Option<String>,
    config: Option<PathBuf>,
    rename: Vec<String>,
    dry_run: bool,
    force: bool,
    threads: Option<i64>,
}

impl Request {
    fn options(&self) -> Result<ConvertOptions> {
        let size = |name, text: &Option<String>| {
            text.as_ref().map(|text| parse_size(text).map_err(|why| option(name, why))).transpose()
        };
        let bits = |text: &String| parse_bits(text).map_err(|why| option("--bits", why));
        let group = |text: &String| text.parse().map_err(|_| option("--group-size", "use 32, 64, 128, 256 or row"));
        let policy = PolicyOptions {
            policy: self.policy.as_ref().map(|text| named("--policy", text)).transpose()?,
            recipe: self.recipe.clone(),
            bits: self.bits.as_ref().map(bits).transpose()? as Option<Bits>,
            group_size: self.group_size.as_ref().map(group).transpose()? as Option<GroupSize>,
            asymmetric: self.asymmetric,
            importance: self.importance.clone(),
            high_ratio: self.high_ratio,
            low_ratio: self.low_ratio,
            high: self.high.as_ref().map(|text| named::<High>("--high", text)).transpose()?,
            sensitivity: self.sensitivity.clone(),
            target_ratio: self.target_ratio,
            target_bpw: self.target_bpw,
            target_size: size("--target-size", &self.target_size)?,
            coupled: self.coupled,
            rules: self.rules.clone(),
            keep: self.keep.clone(),
            tensor: self.tensor.clone(),
        };
        Ok(ConvertOptions {
            policy,
            rounding: named::<RoundingName>("--rounding", &self.rounding)?,
            calib: self.calib.clone(),
            calib_tokens: self.calib_tokens.clone(),
            samples: self.samples.map(|samples| whole("--samples", samples, 1)).transpose()?,
            ctx: self.ctx.map(|ctx| whole("--ctx", ctx, 1)).transpose()?,
            ternary_threshold: self.ternary_threshold,
            allow_nonfinite: self.allow_nonfinite,
            shard_size: size("--shard-size", &self.shard_size)?,
        })
    }
}

/// A choice by its name on the command line.
fn named<T: ValueEnum>(name: &'static str, text: &str) -> Result<T> {
    T::from_str(text, false).map_err(|_| {
        let values = T::value_variants().iter().filter_map(T::to_possible_value);
        let names: Vec<_> = values.map(|value| value.get_name().to_owned()).collect();
        option(name, format!("{text:?} is not one of {}", names.join(", ")))
    })
}

/// What is returned.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    summary: Summary,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    compared: Vec<Entry>,
    notices: Vec<String>,
}

/// Packs a checkpoint; returns JSON.
#[pyfunction]
#[pyo3(signature = (request, progress=None))]
pub fn convert(py: Python<'_>, request: Request, progress: Option<&Bound<'_, PyAny>>) -> PyResult<String> {
    let options = request.options().map_err(|error| exception(py, &error))?;
    work::run(py, progress, request.threads, |observer| {
        let start = Instant::now();
        let Request { source, output, config, rename, dry_run, force, .. } = &request;
        options.check(false)?;
        check_source(source)?;
        if config.is_some() && checkpoint::has_config(source) {
            let why = format!("{} has a config.json of its own", source.display());
            return Err(option("--config", why));
        }
        let rename = rename.iter().map(|text| text.parse()).collect::<Result<_>>()?;
        let checkpoint = checkpoint::open_with(source, &OpenOptions { config: config.clone(), rename })?;
        check_output(source, output, *force || *dry_run)?;
        let notices = Mutex::new(checkpoint.notices().to_vec());
        let notice = |sentence: &str| notices.lock().expect("no panic while pushing").push(sentence.to_owned());
        let around = Surroundings { cpu: Cpu::from_environment()?, observer, notice: &notice };
        let conversion = Conversion::prepare(&checkpoint, &options, around)?;
        let (packing, compared) = conversion.plan(output)?;
        let (lines, file_bytes) = (packing.lines(), packing.file_bytes());
        if !dry_run {
            conversion.write(packing, *force)?;
        }
        let (source_bytes, seconds) = (checkpoint.file_bytes(), start.elapsed().as_secs_f64());
        let summary = Summary::new(lines.into_iter(), file_bytes, source_bytes, seconds, *dry_run);
        let notices = notices.lock().expect("no panic while pushing").clone();
        Ok(serde_json::to_string(&Report { summary, compared, notices }).expect("plain numbers and strings"))
    })
}
