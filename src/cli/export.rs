//! `bkpack export` and `bkpack check-export`: packed models in the layouts of other runtimes.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use bkpack::{
    Result,
    encoding::FloatName,
    error::{long, short},
    export::{self, ExportedTensor, Fidelity, Options, Plan, Refusal, Target},
    format::PackedFile,
    report::export::{Line, lines, render},
};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{CHECK_FAILED, Common, print};

const EXPORT_EXAMPLES: &str = "\
Examples:
  bkpack export model.bkpack --to gguf -o model.gguf
      One file for llama.cpp
  bkpack export model.bkpack --to compressed-tensors -o ./model-int4
      A folder that transformers and vLLM load
  bkpack export model.bkpack --to safetensors -o ./model-bf16 --dtype bf16
      A Hugging Face folder of dequantized weights
  bkpack export model.bkpack --to npz -o model.npz --dry-run
      What would be written, to the byte, without writing it

Codes move as they are where the target can hold them: nothing is quantized a second time unless
--requantize asks for it. What is rounded is said, tensor by tensor with --json.";

const CHECK_EXAMPLES: &str = "\
Examples:
  bkpack check-export model.bkpack --to compressed-tensors
      What would be rounded, and which runtime would refuse the result
  bkpack check-export model.bkpack --to mlx --json
      The same for machines, tensor by tensor

The exit status is 1 if the export is impossible, and 0 if it can be made, with warnings or without.";

/// What is asked for, shared by both subcommands.
#[derive(Args, Debug)]
struct Request {
    /// Packed file
    packed: PathBuf,

    /// The layout to write
    #[arg(long, value_enum, value_name = "LAYOUT")]
    to: Layout,

    /// Type of plain values, and of the scales of compressed-tensors and mlx [default: fp32 for safetensors and
    /// --dequantize; for npz as packed, with BF16 as fp32; for gguf fp16, with BF16 as it is and vectors always fp32; else
    /// fp16]
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,

    /// Round what GGUF cannot hold as it is to its Q4_K, Q5_0, Q6_K or Q8_0
    #[arg(long)]
    requantize: bool,

    /// Weights in place of codes and scales (npz)
    #[arg(long)]
    dequantize: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    common: Common,
}

/// Write a packed model in the layout of another runtime
#[derive(Args, Debug)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    #[command(flatten)]
    request: Request,

    /// What to write: a file for gguf and npz, else a folder
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,

    /// Say what would be written, to the byte, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Replace the output if it exists: a file of the same kind, or a folder of an earlier export
    #[arg(long)]
    force: bool,
}

/// Say what an export would lose and which runtime would refuse it
#[derive(Args, Debug)]
#[command(after_help = CHECK_EXAMPLES)]
pub struct CheckExportArgs {
    #[command(flatten)]
    request: Request,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Layout {
    /// One file for llama.cpp
    Gguf,
    /// A folder for vLLM and transformers
    CompressedTensors,
    /// A folder for MLX
    Mlx,
    /// A folder for GPTQModel and vLLM
    Gptq,
    /// A Hugging Face folder of dequantized weights
    Safetensors,
    /// One file of NumPy arrays
    Npz,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Fp32,
    Fp16,
    Bf16,
}

impl From<Layout> for Target {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Gguf => Target::Gguf,
            Layout::CompressedTensors => Target::CompressedTensors,
            Layout::Mlx => Target::Mlx,
            Layout::Gptq => Target::Gptq,
            Layout::Safetensors => Target::Safetensors,
            Layout::Npz => Target::Npz,
        }
    }
}

impl From<Dtype> for FloatName {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => FloatName::F32,
            Dtype::Fp16 => FloatName::F16,
            Dtype::Bf16 => FloatName::BF16,
        }
    }
}

impl Request {
    fn options(&self) -> Options {
        let dtype = self.dtype.map(|dtype| FloatName::from(dtype).into());
        Options { dtype, requantize: self.requantize, dequantize: self.dequantize }
    }
}

/// Runs `export`.
pub fn run(args: &ExportArgs) -> Result<()> {
    let ExportArgs { request, output, .. } = args;
    let start = Instant::now();
    let observer = request.common.observer();
    let (target, options) = (Target::from(request.to), request.options());
    let packed = PackedFile::open(&request.packed)?;
    let plan = if args.dry_run {
        export::check_output(&packed, target, output, true)?;
        let plan = export::plan(&packed, target, &options, &observer)?;
        plan.check(&request.packed, target)?;
        plan
    } else {
        export::export(&packed, target, &options, output, args.force, &observer)?
    };
    let seconds = start.elapsed().as_secs_f64();
    if request.json {
        let mut object = machine(&plan, target);
        object["seconds"] = seconds.into();
        object["dry_run"] = args.dry_run.into();
        return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
    }
    plan.notices.iter().for_each(|notice| request.common.notice(notice));
    plan.warnings.iter().for_each(|warning| request.common.notice(&format!("{}: {}", warning.runtime, warning.why)));
    if request.common.quiet {
        return Ok(());
    }
    print(&table_of(&plan))
}

/// Runs `check-export`; the exit status says whether the export is possible.
pub fn check(args: &CheckExportArgs) -> Result<ExitCode> {
    let request = &args.request;
    let target = Target::from(request.to);
    let observer = request.common.observer();
    let packed = PackedFile::open(&request.packed)?;
    let plan = export::plan(&packed, target, &request.options(), &observer)?;
    if request.json {
        print(&serde_json::to_string_pretty(&machine(&plan, target)).expect("plain data is JSON"))?;
    } else {
        print(&human(&plan, target))?;
    }
    Ok(if plan.refusals.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(CHECK_FAILED) })
}

fn machine(plan: &Plan, target: Target) -> Value {
    let lossless = plan.tensors.iter().filter(|tensor| tensor.fidelity == Fidelity::Lossless).count();
    let mut object = json!({ "target": target, "possible": plan.refusals.is_empty(), "lossless_tensors": lossless });
    let Value::Object(fields) = serde_json::to_value(plan).expect("plain data is JSON") else { unreachable!() };
    object.as_object_mut().expect("made as one").extend(fields);
    object
}

fn human(plan: &Plan, target: Target) -> String {
    let sentences = |kind: &str, found: &[Refusal]| -> Vec<String> {
        found.iter().map(|refusal| format!("{kind}: {}: {}", short(&refusal.runtime), long(&refusal.why))).collect()
    };
    let mut text = vec![table_of(plan), String::new()];
    text.extend(plan.notices.iter().map(|notice| format!("note: {}", long(notice))));
    text.extend(sentences("warning", &plan.warnings));
    text.extend(sentences("impossible", &plan.refusals));
    let rounded = plan.tensors.iter().filter(|tensor| tensor.fidelity != Fidelity::Lossless).count();
    text.push(match (plan.refusals.len(), rounded) {
        (0, 0) => format!("can be exported to {}; every value stays the same", target.name()),
        (0, 1) => format!("can be exported to {}; 1 tensor is rounded", target.name()),
        (0, rounded) => format!("can be exported to {}; {rounded} tensors are rounded", target.name()),
        _ => format!("cannot be exported to {}", target.name()),
    });
    text.join("\n")
}

fn table_of(plan: &Plan) -> String {
    let line = |tensor: &ExportedTensor| Line {
        encoding: tensor.encoding.to_string(),
        target: tensor.target.clone(),
        tensors: 1,
        bytes: tensor.bytes,
        rounded: match &tensor.fidelity {
            Fidelity::Lossless => None,
            Fidelity::Rounded { why } => Some(why.clone()),
        },
    };
    render(&lines(plan.tensors.iter().map(line)), plan.file_bytes)
}
