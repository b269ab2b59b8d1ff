//! `bkpack inspect`: the manifest and every tensor of a packed file; the CPU.

use std::path::PathBuf;

use bkpack::{
    Result,
    format::{Manifest, PackedFile, PackedTensor},
    report::table::{count, facts, table},
    tensor::{ActivationQuantization, ComplexPart, TensorSource},
};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::{cpu, print};

const EXAMPLES: &str = "\
Examples:
  bkpack inspect model.bkpack
      What it is and what each tensor takes
  bkpack inspect model.bkpack --sort bytes
      The largest tensors first
  bkpack inspect model.bkpack --json
      Manifest, tensors and files for machines
  BKPACK_ISA=avx2 bkpack inspect --cpu
      What models run on here; BKPACK_ISA forces an instruction set";

/// Show the manifest and the tensors of a packed file, or what models run on here
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// Packed file
    #[arg(required_unless_present = "cpu")]
    packed: Option<PathBuf>,

    /// Show the CPU, its instruction sets, and what the kernels run on
    #[arg(long, conflicts_with_all = ["packed", "sort"])]
    cpu: bool,

    /// The order of the tensors; numbers fall, names rise
    #[arg(long, value_enum, default_value_t = Sort::Name)]
    sort: Sort,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sort {
    Name,
    Component,
    Encoding,
    Parameters,
    Bytes,
    Bits,
}

/// Runs the subcommand.
pub fn run(args: &InspectArgs) -> Result<()> {
    let Some(path) = &args.packed else { return print(&cpu::describe(args.json)?) };
    let packed = PackedFile::open(path)?;
    let mut tensors: Vec<&PackedTensor> = packed.tensors().iter().collect();
    let bits = |tensor: &PackedTensor| tensor.bytes() as f64 / tensor.elements() as f64;
    match args.sort {
        Sort::Name => {}
        Sort::Component => tensors.sort_by(|a, b| a.component.cmp(&b.component)),
        Sort::Encoding => tensors.sort_by_key(|tensor| tensor.encoding.to_string()),
        Sort::Parameters => tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.elements())),
        Sort::Bytes => tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.bytes())),
        Sort::Bits => tensors.sort_by(|a, b| bits(b).total_cmp(&bits(a))),
    }
    let parameters = packed.parameters();
    let text = if args.json { machine(&packed, &tensors, parameters) } else { human(&packed, &tensors, parameters) };
    print(&text)
}

fn machine(packed: &PackedFile, tensors: &[&PackedTensor], parameters: u64) -> String {
    let manifest = packed.manifest();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            let parts: Vec<_> = tensor
                .parts
                .iter()
                .map(|part| json!({ "name": part.name, "blake3": part.hash.to_hex().as_str() }))
                .collect();
            json!({
                "name": tensor.name,
                "shape": tensor.shape,
                "component": tensor.component,
                "complex": tensor.complex,
                "encoding": tensor.encoding,
                "bytes": tensor.bytes(),
                "parts": parts,
            })
        })
        .collect();
    let files: Vec<_> = packed.files().map(|(name, bytes)| json!({ "name": name, "bytes": bytes })).collect();
    let Manifest { version, producer, source, policy, config, activations, .. } = manifest;
    let object = json!({
        "version": version,
        "producer": producer,
        "source": source,
        "policy": policy,
        "config": config,
        "file_bytes": packed.file_bytes(),
        "parameters": parameters,
        "bits_per_weight": 8.0 * packed.file_bytes() as f64 / parameters as f64,
        "tensors": tensors,
        "activations": activations,
        "files": files,
    });
    serde_json::to_string_pretty(&object).expect("plain data is JSON")
}

fn human(packed: &PackedFile, tensors: &[&PackedTensor], parameters: u64) -> String {
    let manifest = packed.manifest();
    let size = packed.file_bytes();
    let architecture = manifest.config.as_ref().and_then(|config| config["architectures"][0].as_str());
    let sources: Vec<&str> = manifest.source.files.iter().map(|file| file.name.as_str()).collect();
    let files: Vec<&str> = packed.files().map(|(name, _)| name).collect();
    let activations = manifest.activations.iter().map(|record| ("activations", describe(record)));
    let rows = [
        ("architecture", architecture.unwrap_or("unknown").to_owned()),
        ("format", format!("version {}, written by {}", manifest.version, manifest.producer)),
        ("source", format!("{} ({})", sources.join(", "), manifest.source.kind)),
        ("policy", manifest.policy.to_string()),
        ("files inside", if files.is_empty() { "none".into() } else { files.join(", ") }),
        ("parameters", count(parameters)),
        ("file bytes", count(size)),
        ("bits per weight", format!("{:.3}", 8.0 * size as f64 / parameters as f64)),
        ("ratio to FP32", format!("{:.3}", 4.0 * parameters as f64 / size as f64)),
    ];
    let mut lines = table(&["tensor", "shape", "component", "encoding", "parameters", "bytes", "bits/weight"], 4);
    for tensor in tensors {
        lines.add_row([
            tensor.name.clone(),
            format!("{:?}", tensor.shape),
            match tensor.complex {
                None => tensor.component.clone(),
                Some(ComplexPart::Real) => format!("{} (real part)", tensor.component),
                Some(ComplexPart::Imaginary) => format!("{} (imaginary part)", tensor.component),
            },
            tensor.encoding.to_string(),
            count(tensor.elements() as u64),
            count(tensor.bytes() as u64),
            format!("{:.3}", 8.0 * tensor.bytes() as f64 / tensor.elements() as f64),
        ]);
    }
    format!("{}\n\n{}", facts(rows.into_iter().chain(activations)).trim_fmt(), lines.trim_fmt())
}

fn describe(record: &ActivationQuantization) -> String {
    let ActivationQuantization { component, bits, group_size, positions, samples, text, .. } = record;
    format!(
        "{component} INT{bits} g{group_size}, {positions} positions, calibrated on {samples} windows of {}",
        text.name
    )
}
