//! `bkpack importance`: how much each tensor matters to the loss, for policies.

use std::path::PathBuf;

use bkpack::{
    Result,
    eval::text::read_either,
    format::check_output,
    model::Model,
    ops::cpu::{Activations, CpuOps},
    policy::{ComponentRules, importance::Importance},
    report::{
        figure::Figure,
        importance::{Bar, draw},
        table::table,
    },
    tensor::CalibrationText,
    train::importance::{Options, measure, write},
};
use bkpack_kernels::Cpu;
use clap::Args;

use super::{
    Common,
    figure::{DPI, FigureFiles},
    partial_name, print, refuse_file_of_checkpoint, refuse_same_file,
    source::SourceArgs,
};

const EXAMPLES: &str = "\
Examples:
  bkpack importance ./model --text calibration.txt -o importance.json
      50 windows of 512 tokens: gradient, output variance, weight and score of every tensor
  bkpack importance ./model --tokens ids.json --batches 20 --ctx 256 -o importance.json
      Token ids of your own, fewer and shorter windows
  bkpack importance ./model --text calibration.txt -o importance.json --plot importance.svg
      A bar chart of the scores too (svg, pdf, png or eps; always with a PNG beside it)
  bkpack importance ./model --text calibration.txt -o importance.json --resume
      Go on where an interrupted run was left

Sums are saved every few windows in a file beside the output, whose name ends in .partial; it is removed at the end.";

/// Measure how much each tensor matters to the loss
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ImportanceArgs {
    /// Checkpoint or packed file
    model: PathBuf,

    /// Calibration text (UTF-8); never the text that the model is tested on
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Windows to look at, from the start of the text
    #[arg(long, value_name = "N", default_value_t = 50)]
    batches: usize,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,

    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Draw the scores as a bar chart; the extension is the format (svg, pdf, png, eps), and a PNG is written in any case
    #[arg(long, value_name = "FIG")]
    plot: Option<PathBuf>,

    /// Go on where an interrupted run with the same model, text and options was left
    #[arg(long)]
    resume: bool,

    /// Replace output files that exist
    #[arg(long)]
    force: bool,

    /// Print what was written as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &ImportanceArgs) -> Result<()> {
    let observer = args.common.observer();
    let source = args.checkpoint.open(&[&args.model], None, &args.common)?.remove(0);
    refuse_file_of_checkpoint(&args.model, &args.output)?;
    check_output(&args.output, args.force)?;
    let figure = args.plot.as_deref().map(|path| FigureFiles::new("--plot", path, &[], DPI, args.force)).transpose()?;
    let (path, tokens) = read_either(&*source, &args.text, &args.tokens)?;
    refuse_same_file(path, &args.output)?;
    let partial = partial_name(&args.output);
    if let Some(figure) = &figure {
        figure.refuse_files_of(&args.model)?;
        figure.refuse_input(path)?;
        figure.refuse_other_output(&args.output)?;
        figure.refuse_other_output(&partial)?;
    }
    let cpu = Cpu::from_environment()?;
    if Model::load(&*source, &CpuOps::new(cpu, Activations::Exact))?.runs_whole() {
        args.common.notice("the model looks ahead: its loss, and so these figures, are not those of a language model");
    }
    let text = CalibrationText::of(path)?;
    let options = Options {
        batches: args.batches,
        ctx: args.ctx,
        partial: Some(partial.clone()),
        rules: ComponentRules::builtin(),
        resume: args.resume,
    };
    if args.resume && !partial.exists() {
        args.common.notice(&format!("{} does not exist: starting anew", partial.display()));
    }
    let importance = measure(cpu, &*source, text, &tokens, &options, &observer)?;
    write(&importance, &args.output, &partial, args.force)?;
    if let Some(figure) = figure {
        figure.write(&bar_chart(&importance), &[])?;
    }
    match (args.json, args.common.quiet) {
        (true, _) => print(&serde_json::to_string_pretty(&importance).expect("plain numbers and strings")),
        (false, true) => Ok(()),
        (false, false) => print(&render(&importance)),
    }
}

fn bar_chart(importance: &Importance) -> Figure {
    let bars: Vec<Bar> = importance
        .tensors
        .iter()
        .map(|tensor| Bar { name: tensor.name.clone(), component: tensor.component.clone(), score: tensor.score })
        .collect();
    let title = format!("Importance of the tensors of {}", importance.model.name);
    let Importance { batches, ctx, text, .. } = importance;
    let text = &text.name;
    let subtitle = format!(
        "0.5 gradient + 0.3 output variance + 0.2 weight, standardized; {batches} windows of {ctx} tokens of {text}"
    );
    draw(&title, &subtitle, &bars)
}

fn render(importance: &Importance) -> String {
    let mut table = table(&["rank", "tensor", "component", "gradient", "output variance", "weight", "score"], 3);
    for (index, tensor) in importance.tensors.iter().enumerate() {
        table.add_row([
            (index + 1).to_string(),
            tensor.name.clone(),
            tensor.component.clone(),
            format!("{:.3e}", tensor.gradient),
            format!("{:.3e}", tensor.output_variance),
            format!("{:.3e}", tensor.weight),
            format!("{:+.3}", tensor.score),
        ]);
    }
    table.trim_fmt()
}
