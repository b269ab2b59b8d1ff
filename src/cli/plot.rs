//! `bkpack plot`: figures of results and of packed files.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result,
    error::short,
    format::{PackedFile, PackedTensor, check_output},
    report::{
        efficiency::{Efficiency, TARGET_PPL},
        efficiency_figure,
        figure::{Figure, Format},
        results,
        robustness::{self, DEPLOYABLE_PPL},
        robustness_figure, simulate,
        tensors::{self, Stored},
    },
    tensor::TensorSource,
};
use clap::{Args, Subcommand};
use serde_json::Value;

use super::{
    figure::{DPI, FigureFiles},
    print,
};

const EXAMPLES: &str = "\
Examples:
  bkpack plot robustness results/quantization -o robustness.pdf
      Perplexity against precision, from what `bkpack sweep` wrote; robustness.png is the preview
  bkpack plot efficiency results/efficiency -o efficiency --format pdf,svg,eps --summary efficiency.json
      Perplexity against FLOPs, three vector formats, statistics and requirements as JSON
  bkpack plot tensors model.bkpack -o tensors.svg
      The encoding and the bytes of each tensor, by layer and kind
  bkpack plot robustness --simulate --seed 42 -o layout.svg
      Simulated data for work on the layout, marked as such";

/// Draw figures of sweeps and of packed files
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct PlotArgs {
    #[command(subcommand)]
    figure: FigureKind,
}

#[derive(Subcommand, Debug)]
enum FigureKind {
    Robustness(RobustnessArgs),
    Efficiency(EfficiencyArgs),
    Tensors(TensorsArgs),
}

/// Perplexity against precision, a line for each model
#[derive(Args, Debug)]
struct RobustnessArgs {
    #[command(flatten)]
    data: DataArgs,

    /// Draw only these precisions: 32 16 8 4, with blanks or commas
    #[arg(long, value_name = "BITS", value_delimiter = ',', num_args = 1..)]
    bit_widths: Vec<f64>,

    /// A model is deployable below this perplexity
    #[arg(long, value_name = "PPL", default_value_t = DEPLOYABLE_PPL, value_parser = positive)]
    threshold: f64,

    #[command(flatten)]
    output: OutputArgs,
}

/// Perplexity against compute, with the Pareto frontier
#[derive(Args, Debug)]
struct EfficiencyArgs {
    #[command(flatten)]
    data: DataArgs,

    /// Compare FLOPs at this perplexity too
    #[arg(long, value_name = "PPL", default_value_t = TARGET_PPL, value_parser = positive)]
    target_ppl: f64,

    /// Simulated configurations of each model
    #[arg(long, value_name = "N", default_value_t = 10, requires = "simulate", value_parser = clap::value_parser!(u16).range(1..=1000))]
    num_configs: u16,

    #[command(flatten)]
    output: OutputArgs,
}

/// The encoding and the bytes of each tensor, by layer and kind
#[derive(Args, Debug)]
struct TensorsArgs {
    /// Packed file
    packed: PathBuf,

    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args, Debug)]
struct DataArgs {
    /// Folders and files of results
    #[arg(value_name = "RESULTS", required_unless_present = "simulate", conflicts_with = "simulate")]
    results: Vec<PathBuf>,

    /// Draw these models alone, in this order: the names in the results, with commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    models: Vec<String>,

    /// Write statistics and requirements as JSON
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,

    /// Print the summary as JSON
    #[arg(long)]
    json: bool,

    /// Draw simulated data, for work on the layout; the figure and the JSON say so
    #[arg(long)]
    simulate: bool,

    /// Seed of simulated data
    #[arg(long, value_name = "N", default_value_t = 42, requires = "simulate")]
    seed: u64,
}

#[derive(Args, Debug)]
struct OutputArgs {
    /// Figure to write; its extension is the format unless --format names others
    #[arg(short, long, value_name = "FIG")]
    output: PathBuf,

    /// Formats with commas: pdf, svg, png, eps; a PNG is written in any case [default: the extension, or pdf]
    #[arg(long, value_name = "FORMATS", value_delimiter = ',')]
    format: Vec<Format>,

    /// Pixels an inch of the PNG
    #[arg(long, value_name = "N", default_value_t = DPI, value_parser = clap::value_parser!(u16).range(36..=1200))]
    dpi: u16,

    /// Title of the figure
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,

    /// Replace output files that exist
    #[arg(long)]
    force: bool,

    /// Print no notices and no summary of what was written
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the subcommand.
pub fn run(args: &PlotArgs) -> Result<()> {
    match &args.figure {
        FigureKind::Robustness(args) => plot_robustness(args),
        FigureKind::Efficiency(args) => plot_efficiency(args),
        FigureKind::Tensors(args) => plot_tensors(args),
    }
}

fn plot_robustness(args: &RobustnessArgs) -> Result<()> {
    let files = Files::new(&args.output, &args.data)?;
    let (points, mut notes) = if args.data.simulate {
        (simulate::quantized(args.data.seed), Vec::new())
    } else {
        let results = results::quantized(&args.data.results)?;
        (results.records, results.notes)
    };
    let refuse = |why| Error::Figure { why };
    let data =
        robustness::Robustness::new(points, &args.data.models, &args.bit_widths, args.threshold).map_err(refuse)?;
    let figure = robustness_figure::draw(&data, args.output.title("Quantization robustness"));
    notes.extend(data.notes());
    files.write(&figure, &notes, &data.summary(&notes), &data.render())
}

fn plot_efficiency(args: &EfficiencyArgs) -> Result<()> {
    let files = Files::new(&args.output, &args.data)?;
    let (points, mut notes) = if args.data.simulate {
        (simulate::configurations(args.data.seed, args.num_configs.into()), Vec::new())
    } else {
        let results = results::configurations(&args.data.results)?;
        (results.records, results.notes)
    };
    let refuse = |why| Error::Figure { why };
    let data = Efficiency::new(&points, &args.data.models, args.target_ppl).map_err(refuse)?;
    let figure = efficiency_figure::draw(&data, args.output.title("Efficiency: perplexity against compute"));
    notes.extend_from_slice(data.notes());
    files.write(&figure, &notes, &data.summary(&notes), &data.render())
}

fn plot_tensors(args: &TensorsArgs) -> Result<()> {
    let OutputArgs { output, format, dpi, force, quiet, .. } = &args.output;
    let files = FigureFiles::new("--output", output, format, *dpi, *force)?;
    files.refuse_input(&args.packed)?;
    let packed = PackedFile::open(&args.packed)?;
    let tensors: Vec<Stored> = packed.tensors().iter().map(stored).collect();
    let name = args.packed.file_name().unwrap_or_default().to_string_lossy();
    let subtitle = tensors::subtitle(&name, packed.parameters(), packed.file_bytes());
    files.write(&tensors::draw(args.output.title("Encodings and bytes of the tensors"), &subtitle, &tensors), &[])?;
    if *quiet { Ok(()) } else { print(&written(files.paths())) }
}

/// What a figure shows of a tensor.
pub fn stored(tensor: &PackedTensor) -> Stored {
    let PackedTensor { name, encoding, .. } = tensor;
    let (bits, bytes) = (encoding.code_bits(), tensor.bytes() as u64);
    Stored { name: name.clone(), encoding: encoding.to_string(), bits, bytes }
}

/// Everything that a plot of results writes.
struct Files<'a> {
    figure: FigureFiles,
    output: &'a OutputArgs,
    data: &'a DataArgs,
}

impl<'a> Files<'a> {
    fn new(output: &'a OutputArgs, data: &'a DataArgs) -> Result<Self> {
        let figure = FigureFiles::new("--output", &output.output, &output.format, output.dpi, output.force)?;
        if let Some(summary) = &data.summary {
            check_output(summary, output.force)?;
            if figure.paths().any(|path| path == summary) {
                let why = format!("{} is a file of the figure", summary.display());
                return Err(Error::Option { option: "--summary", why });
            }
            for input in results::files(&data.results)? {
                let same = |path: &Path| path.canonicalize().ok();
                if same(summary).is_some_and(|summary| same(&input) == Some(summary)) {
                    let why = format!("{} is one of the results", summary.display());
                    return Err(Error::Option { option: "--summary", why });
                }
            }
        }
        Ok(Self { figure, output, data })
    }

    fn write(&self, figure: &Figure, notes: &[String], summary: &Value, text: &str) -> Result<()> {
        let mut json = serde_json::to_string_pretty(summary).expect("plain data is JSON");
        if !self.output.quiet {
            notes.iter().for_each(|note| eprintln!("note: {}", bkpack::error::long(note)));
        }
        let written_summary = self.data.summary.as_ref().map(|path| {
            json.push('\n');
            (path.clone(), json.clone().into_bytes())
        });
        self.figure.write(figure, written_summary.as_slice())?;
        match (self.data.json, self.output.quiet) {
            (true, _) => print(json.trim_end()),
            (false, true) => Ok(()),
            (false, false) => {
                let paths = self.figure.paths().chain(self.data.summary.as_deref());
                print(&format!("{text}\n\n{}", written(paths)))
            }
        }
    }
}

impl OutputArgs {
    fn title<'a>(&'a self, default: &'a str) -> &'a str {
        self.title.as_deref().unwrap_or(default)
    }
}

fn written<'a>(paths: impl Iterator<Item = &'a Path>) -> String {
    let names: Vec<String> = paths.map(|path| path.display().to_string()).collect();
    format!("written: {}", names.join(", "))
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| format!("{} is not a number above 0", short(text)))
}
