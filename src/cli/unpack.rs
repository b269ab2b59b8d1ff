//! `bkpack unpack`: restores the packed file of an archive.

use std::path::PathBuf;

use bkpack::{Result, format::archive::unpack};
use clap::Args;

use super::{Common, print, refuse_same_file};

const EXAMPLES: &str = "\
Examples:
  bkpack unpack model.bkpack.archive -o model.bkpack
      Restores the packed file bit for bit and checks every hash";

/// Restore the packed file of an archive, bit for bit
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct UnpackArgs {
    /// Archive
    archive: PathBuf,

    /// Packed file to write
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
pub fn run(args: &UnpackArgs) -> Result<()> {
    refuse_same_file(&args.archive, &args.output)?;
    unpack(&args.archive, &args.output, args.force, &args.common.observer())?;
    match (args.json, args.common.quiet) {
        (true, _) => print("{\"verified\": true}"),
        (false, true) => Ok(()),
        (false, false) => print("unpacked; every hash matches"),
    }
}
