//! `bkpack eval`: perplexity, and the distance to a baseline.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result,
    eval::{
        components::{DEFAULT_WINDOWS, component_costs},
        perplexity::{Evaluation, evaluate_on},
        record::EvaluationRecord,
    },
    ops::device::{Device, DeviceChoice},
    report::table::{count, facts},
    tensor::{CalibrationText, TensorSource},
};
use bkpack_kernels::Cpu;
use clap::Args;

use super::{Common, components, device::DeviceArgs, print, source::SourceArgs, text::MeasureArgs};

const EXAMPLES: &str = "\
Examples:
  bkpack eval model.bkpack --text test.txt
      Perplexity over windows of 512 tokens
  bkpack eval model.bkpack --baseline ./model --text test.txt
      What packing cost: perplexity of both, KL divergence, agreement
  bkpack eval model.bkpack --baseline ./model --text test.txt --by-component
      And what each component costs, in bytes and KL divergence
  bkpack eval model.bkpack --text test.txt --ctx 512 --skip 257
      The protocol of llama.cpp: 255 tokens of each window are scored
  bkpack eval model.bkpack --tokens ids.json --activations int8 --json
      Token ids of your own, 8-bit activations, figures as JSON
  bkpack eval model.bkpack --text test.txt --device auto
      On the GPU if there is one; the figures say on which device they were measured";

/// Measure perplexity, and the cost of packing against a baseline
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// Packed file or checkpoint
    model: PathBuf,

    #[command(flatten)]
    measure: MeasureArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Packed file or checkpoint to compare with, on the same windows
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,

    /// Also measure what each component of the packed file costs: the divergence of the baseline with it alone packed
    #[arg(long, requires = "baseline")]
    by_component: bool,

    /// Windows to measure each component on, spread evenly over the text
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WINDOWS as u32, requires = "by_component", value_parser = clap::value_parser!(u32).range(1..))]
    component_windows: u32,

    /// Check every hash of the packed file before it is used
    #[arg(long)]
    verify_hashes: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &EvalArgs) -> Result<()> {
    let observer = args.common.observer();
    let paths: Vec<&Path> = std::iter::once(&args.model).chain(&args.baseline).map(PathBuf::as_path).collect();
    let models = args.checkpoint.open(&paths, args.verify_hashes.then_some(&observer), &args.common)?;
    let (source, baseline) = (&models[0], models.get(1).map(|model| &**model));
    if args.by_component && source.packed().is_none() {
        let why = format!("{} is not packed, so its components cost nothing", args.model.display());
        return Err(Error::Option { option: "--by-component", why });
    }
    let (tokens, options) = (args.measure.tokens(&**source)?, args.measure.options());
    let text = CalibrationText::of(args.measure.path())?;
    let cpu = Cpu::from_environment()?;
    let device = match (args.by_component, args.device.choice()) {
        (true, DeviceChoice::Cuda) => {
            let why = "the components are measured on the CPU alone; pass --device cpu".into();
            return Err(Error::Option { option: "--by-component", why });
        }
        // One device for all figures of a record.
        (true, choice) => {
            if choice == DeviceChoice::Auto {
                args.common.notice("running on the CPU: the components are measured on it alone");
            }
            Device::Cpu
        }
        (false, _) => {
            let sources = std::iter::once(&**source as &dyn TensorSource).chain(baseline);
            args.device.open(sources, options.activations, &args.common)?
        }
    };
    let evaluation = evaluate_on(&device, cpu, &**source, baseline, &tokens, &options, &observer)?;
    let mut record = EvaluationRecord::new(evaluation, Some(text), source.packed());
    if let (true, Some(packed), Some(baseline)) = (args.by_component, source.packed(), baseline) {
        let windows = args.component_windows as usize;
        record.by_component = Some(component_costs(cpu, packed, baseline, &tokens, windows, &options, &observer)?);
    }
    if args.json {
        return print(&serde_json::to_string_pretty(&record).expect("plain numbers and strings"));
    }
    print(&render(&record.evaluation))?;
    record.by_component.map_or(Ok(()), |costs| print(&format!("\n{}", components::render(&costs))))
}

fn render(evaluation: &Evaluation) -> String {
    // A figure that is quoted alone must carry the mark with it.
    let mark = |name: &str| if evaluation.looks_ahead { format!("{name} (LOOKS AHEAD)") } else { name.to_owned() };
    let mut rows = vec![(mark("perplexity"), format!("{:.4}", evaluation.ppl))];
    if let Some(baseline) = &evaluation.baseline {
        rows.extend([
            (mark("baseline perplexity"), format!("{:.4}", baseline.baseline_ppl)),
            (mark("increase"), format!("{:+.3} %", baseline.ppl_increase_percent)),
            (mark("KL divergence, mean"), format!("{:.6}", baseline.kld_mean)),
            (mark("KL divergence, median"), format!("{:.6}", baseline.kld_median)),
            (mark("KL divergence, 99.9 %"), format!("{:.6}", baseline.kld_p999)),
            (mark("same top token"), format!("{:.2} %", 100.0 * baseline.top1_agreement)),
        ]);
    }
    let scored = count(evaluation.scored);
    rows.extend([
        ("bits per weight".into(), format!("{:.3}", evaluation.bits_per_weight)),
        ("ratio to FP32".into(), format!("{:.3}", evaluation.ratio_fp32)),
        ("file bytes".into(), count(evaluation.file_bytes)),
        ("tokens/s".into(), format!("{:.1}", evaluation.tokens_per_second)),
        ("scored tokens".into(), format!("{scored} ({} windows of {})", evaluation.windows, evaluation.ctx)),
        ("activations".into(), activations(evaluation)),
    ]);
    if evaluation.device.card.is_some() {
        rows.push(("device".into(), evaluation.device.to_string()));
    }
    if let Some(error) = &evaluation.core_error {
        let percent = |error: f64| format!("{:.3} %", 100.0 * error);
        rows.extend([
            (format!("error of v at INT{}", error.bits), percent(error.v)),
            (format!("error of Re G at INT{}", error.bits), percent(error.re_g)),
            (format!("error of Im G at INT{}", error.bits), percent(error.im_g)),
        ]);
    }
    facts(rows.iter().map(|(name, value)| (name.as_str(), value.clone()))).trim_fmt()
}

fn activations(evaluation: &Evaluation) -> String {
    let name = evaluation.activations.name();
    match &evaluation.core_error {
        Some(error) => format!("{name}; bk_core at INT{}", error.bits),
        None => name.to_owned(),
    }
}
