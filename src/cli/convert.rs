//! `bkpack convert`: from a checkpoint to a packed file.

use std::{path::PathBuf, time::Instant};

use bkpack::{
    Error, Result, checkpoint,
    encoding::{GroupSize, Request},
    error::short,
    format, model,
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::Uniform,
    report::convert::Summary,
    tensor::TensorSource,
};
use bkpack_kernels::{Cpu, FloatType, Grid, cpu::quantize::Rounding};
use clap::{Args, ValueEnum};

use super::{Common, print, refuse_file_of_checkpoint, refuse_same_file, source::SourceArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack convert ./model -o model.bkpack
      Every matrix at 4 bits, a scale for each 128 columns
  bkpack convert ./model -o model.bkpack --bits 3 --group-size 64 --keep 'embed|lm_head'
      3 bits, embeddings and head as they are
  bkpack convert ./model -o model.bkpack --tensor 'embed=int8' --tensor 'v_proj=int6:g64:asym'
      Exceptions by name; the last pattern that matches decides
  bkpack convert weights.pt --config config.json --rename '^net=model' -o model.bkpack
      One file of weights with its config beside it, its tensors renamed
  bkpack convert ./model -o model.bkpack --bits 4 --dry-run
      The exact size, without writing anything";

/// Pack a checkpoint into one file
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// Hugging Face folder, or file of weights: safetensors, NPZ or PyTorch
    source: PathBuf,

    /// Packed file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// How encodings are chosen
    #[arg(long, value_enum, default_value_t = Policy::Uniform)]
    policy: Policy,

    /// Bits of a weight: 2 to 8, 16 (FP16) or 32; 1 is binary, 1.58 ternary
    #[arg(long, value_name = "BITS", default_value = "4", value_parser = parse_bits)]
    bits: Bits,

    /// Columns that share a scale: 32, 64, 128, 256, or row for one scale a row
    #[arg(long, value_name = "N", default_value = "128", value_parser = |text: &str| text.parse::<GroupSize>().map_err(|_| "use 32, 64, 128, 256 or row"))]
    group_size: GroupSize,

    /// Give each group a zero point of its own
    #[arg(long)]
    asymmetric: bool,

    /// Leave tensors whose name matches at their source precision (may be repeated)
    #[arg(long, value_name = "REGEX")]
    keep: Vec<String>,

    /// Encode tensors whose name matches as told, e.g. 'embed=int8:g64' (may be repeated; the last match decides)
    #[arg(long, value_name = "REGEX=ENCODING")]
    tensor: Vec<String>,

    /// How scales are chosen: rtn is round-to-nearest from the largest magnitude, search looks for the least squared error
    #[arg(long, value_enum, default_value_t = RoundingName::Search)]
    rounding: RoundingName,

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
enum Policy {
    /// The same encoding for every matrix
    Uniform,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoundingName {
    Rtn,
    Search,
}

/// A uniform width before group and symmetry are known.
#[derive(Clone, Copy, Debug)]
enum Bits {
    Int(u32),
    Ternary,
    Binary,
    Float(FloatType),
}

fn parse_bits(text: &str) -> Result<Bits, &'static str> {
    Ok(match text {
        "1" | "binary" => Bits::Binary,
        "1.58" | "ternary" => Bits::Ternary,
        "16" => Bits::Float(FloatType::F16),
        "32" => Bits::Float(FloatType::F32),
        _ => match text.parse() {
            Ok(bits @ 2..=8) => Bits::Int(bits),
            _ => return Err("use 1, 1.58, 2 to 8, 16 or 32"),
        },
    })
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
    let Policy::Uniform = args.policy;
    if !(args.ternary_threshold > 0.0 && args.ternary_threshold < 1.0) {
        let why = format!("{} is not between 0 and 1", args.ternary_threshold);
        return Err(Error::Option { option: "--ternary-threshold", why });
    }
    let options = PackOptions {
        policy: Uniform::new(default_request(args)?, &args.keep, &args.tensor)?,
        rounding: match args.rounding {
            RoundingName::Rtn => Rounding::Nearest,
            RoundingName::Search => Rounding::Search,
        },
        ternary_threshold: args.ternary_threshold,
        allow_nonfinite: args.allow_nonfinite,
        shard_bytes: args.shard_size,
    };
    if args.source.is_file() && format::is_packed(&args.source)? {
        let why = "is packed already; convert the checkpoint that it came from".into();
        return Err(Error::NotAModel { path: args.source.clone(), why });
    }
    let checkpoint = args.checkpoint.open_checkpoint(&args.source, &args.common)?;
    refuse_same_file(&args.source, &args.output)?;
    refuse_file_of_checkpoint(&args.source, &args.output)?;
    format::check_output(&args.output, args.force || args.dry_run)?;
    note_architecture(args, &checkpoint)?;
    let cpu = Cpu::from_environment()?;
    let packing = Packing::plan(&checkpoint, &options, &args.output, cpu, &observer)?;
    packing.notices.iter().for_each(|notice| args.common.notice(notice));
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
    if !args.dry_run {
        packing.write(cpu, args.force, &observer)?;
    }
    let source_bytes = checkpoint.file_bytes();
    let summary =
        Summary::new(tensors.into_iter(), file_bytes, source_bytes, start.elapsed().as_secs_f64(), args.dry_run);
    match (args.json, args.common.quiet) {
        (true, _) => print(&serde_json::to_string_pretty(&summary).expect("plain numbers and strings")),
        (false, true) => Ok(()),
        (false, false) => print(&summary.render()),
    }
}

fn default_request(args: &ConvertArgs) -> Result<Request> {
    let symmetric = !args.asymmetric;
    let grid = match args.bits {
        Bits::Float(dtype) => return Ok(Request::Float(dtype)),
        Bits::Int(bits) => Grid::Int { bits, symmetric },
        _ if args.asymmetric => {
            return Err(Error::Option {
                option: "--asymmetric",
                why: "only integers of 2 to 8 bits have zero points".into(),
            });
        }
        Bits::Ternary => Grid::Ternary,
        Bits::Binary => Grid::Binary,
    };
    Ok(Request::Quantize { grid, group: args.group_size })
}

/// A known architecture must have its tensors; an unknown one is packed all the same.
fn note_architecture(args: &ConvertArgs, checkpoint: &checkpoint::Checkpoint) -> Result<()> {
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
