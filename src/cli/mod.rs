//! The command line: one file a subcommand.

mod archive;
mod bench;
mod calibrate;
mod components;
mod convert;
mod cpu;
mod device;
mod diff;
mod eval;
mod explain;
mod export;
mod figure;
mod generate;
mod importance;
mod inspect;
mod logits;
mod plot;
mod progress;
mod qat;
mod report;
mod rounding;
mod sensitivity;
mod source;
mod sweep;
mod synth;
mod text;
mod unpack;
mod verify;

use std::{
    io::{ErrorKind, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use bkpack::{
    Error, Result,
    format::{refuse_file_of_checkpoint, refuse_same_file},
};
use clap::{Args, CommandFactory, Parser, Subcommand};
use progress::ProgressObserver;

/// Exit status of a check that failed.
const CHECK_FAILED: u8 = 1;
/// Exit status of wrong use and of bad input.
const BAD_INPUT: u8 = 2;
/// Exit status after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

const COMPLETION_EXAMPLES: &str = "\
Examples:
  bkpack completions bash > ~/.local/share/bash-completion/completions/bkpack
  bkpack completions zsh > ~/.zfunc/_bkpack";

/// Pack language-model checkpoints into one verified file, run them, and measure what the packing cost.
#[derive(Parser)]
#[command(version, about, long_about = None, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Convert(convert::ConvertArgs),
    Eval(eval::EvalArgs),
    Verify(verify::VerifyArgs),
    Inspect(inspect::InspectArgs),
    Explain(explain::ExplainArgs),
    Diff(diff::DiffArgs),
    Export(export::ExportArgs),
    CheckExport(export::CheckExportArgs),
    Calibrate(calibrate::CalibrateArgs),
    Importance(importance::ImportanceArgs),
    Sensitivity(sensitivity::SensitivityArgs),
    Qat(qat::QatArgs),
    Generate(generate::GenerateArgs),
    Bench(bench::BenchArgs),
    Logits(logits::LogitsArgs),
    Archive(archive::ArchiveArgs),
    Unpack(unpack::UnpackArgs),
    Sweep(sweep::SweepArgs),
    Plot(plot::PlotArgs),
    Report(report::ReportArgs),
    Synth(synth::SynthArgs),
    /// Print a completion script for a shell
    #[command(after_help = COMPLETION_EXAMPLES)]
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// Options of every subcommand that works for a while.
#[derive(Args, Debug)]
pub struct Common {
    /// Threads to use [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print no progress and no notices, and no summary of what was written
    #[arg(short, long)]
    quiet: bool,
}

impl Common {
    /// Sets up the pool of threads and Ctrl-C; returns where progress goes.
    fn observer(&self) -> ProgressObserver {
        // The pool of the process can be set up once, and a subcommand asks for its observer once or more.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(self.threads.unwrap_or(0).into()).build_global();
        ProgressObserver::new(!self.quiet && std::io::stderr().is_terminal())
    }

    /// Tells the user something on standard error.
    fn notice(&self, text: &str) {
        if !self.quiet {
            eprintln!("note: {}", bkpack::error::long(text));
        }
    }
}

/// Runs the command line and gives the process its exit status.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    progress::stop_on_interrupt();
    let outcome = match &cli.command {
        Command::Convert(args) => convert::run(args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(args),
        Command::Inspect(args) => inspect::run(args).map(|()| ExitCode::SUCCESS),
        Command::Explain(args) => explain::run(args).map(|()| ExitCode::SUCCESS),
        Command::Diff(args) => diff::run(args).map(|()| ExitCode::SUCCESS),
        Command::Export(args) => export::run(args).map(|()| ExitCode::SUCCESS),
        Command::CheckExport(args) => export::check(args),
        Command::Calibrate(args) => calibrate::run(args).map(|()| ExitCode::SUCCESS),
        Command::Importance(args) => importance::run(args).map(|()| ExitCode::SUCCESS),
        Command::Sensitivity(args) => sensitivity::run(args).map(|()| ExitCode::SUCCESS),
        Command::Qat(args) => qat::run(args).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(args).map(|()| ExitCode::SUCCESS),
        Command::Logits(args) => logits::run(args).map(|()| ExitCode::SUCCESS),
        Command::Archive(args) => archive::run(args).map(|()| ExitCode::SUCCESS),
        Command::Unpack(args) => unpack::run(args).map(|()| ExitCode::SUCCESS),
        Command::Sweep(args) => sweep::run(args).map(|()| ExitCode::SUCCESS),
        Command::Plot(args) => plot::run(args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => report::run(args).map(|()| ExitCode::SUCCESS),
        Command::Synth(args) => synth::run(args).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            // Into memory first: the generator panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "bkpack", &mut script);
            print(String::from_utf8_lossy(&script).trim_end()).map(|()| ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(if matches!(error, Error::Cancelled) { INTERRUPTED } else { BAD_INPUT })
    })
}

/// The file beside an output in which interrupted work is kept.
fn partial_name(output: &Path) -> PathBuf {
    // A name that ends in a slash is that of the folder, and `.` has none of its own.
    let mut output: PathBuf = output.components().collect();
    if output.file_name().is_none() {
        output = output.canonicalize().unwrap_or(output);
    }
    let mut name = output.into_os_string();
    name.push(".partial");
    name.into()
}

/// The error of an output with the option that named it.
fn under_option(option: &'static str, error: Error) -> Error {
    match error {
        Error::Option { why, .. } => Error::Option { option, why },
        error => error,
    }
}

/// Writes a line to standard output; a reader that has gone away is no error.
pub fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match writeln!(output, "{text}").and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::io("standard output")(error)),
        _ => Ok(()),
    }
}
