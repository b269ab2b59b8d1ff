//! `bkpack archive`: compresses a packed file for storage or download.

use std::path::PathBuf;

use bkpack::{
    Result,
    format::archive::archive,
    report::table::{count, facts},
};
use clap::Args;
use serde_json::json;

use super::{Common, print, refuse_same_file};

const EXAMPLES: &str = "\
Examples:
  bkpack archive model.bkpack -o model.bkpack.archive
  bkpack unpack model.bkpack.archive -o model.bkpack
      The same file, bit for bit";

/// Compress a packed file for storage or download
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ArchiveArgs {
    /// Packed file
    packed: PathBuf,

    /// Archive to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &ArchiveArgs) -> Result<()> {
    refuse_same_file(&args.packed, &args.output)?;
    let archived = archive(&args.packed, &args.output, args.force, &args.common.observer())?;
    let packed = std::fs::metadata(&args.packed).map_err(bkpack::Error::io(&args.packed))?.len();
    let ratio = packed as f64 / archived as f64;
    match (args.json, args.common.quiet) {
        (true, _) => print(&json!({ "file_bytes": archived, "packed_bytes": packed, "ratio": ratio }).to_string()),
        (false, true) => Ok(()),
        (false, false) => {
            let rows =
                [("archive bytes", count(archived)), ("packed bytes", count(packed)), ("ratio", format!("{ratio:.3}"))];
            print(&facts(rows).trim_fmt())
        }
    }
}
