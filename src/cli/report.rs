//! `bkpack report`: a page about a packed file and about results of sweeps.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result,
    format::{self, PackedFile, PackedTensor, SourceFile, check_output, write_file},
    model::config::is_synthetic,
    policy::explain::{Explainer, Subject},
    report::{
        efficiency::{Efficiency, TARGET_PPL},
        evaluation::Evaluation,
        page::{Activations, HashedFile, Measurements, Model, Page, Tensor},
        results,
        robustness::{DEPLOYABLE_PPL, Robustness},
    },
    tensor::{ActivationQuantization, ComplexPart, TensorSource},
};
use clap::Args;

use super::{Common, plot::stored, print, refuse_same_file};

const EXAMPLES: &str = "\
Examples:
  bkpack report model.bkpack -o report.html
      What the model is, its size, why, every tensor, and the hashes of everything
  bkpack eval model.bkpack --baseline ./model --text test.txt --json > eval.json
  bkpack report model.bkpack --eval eval.json -o report.html
      And what packing cost
  bkpack report results/quantization results/efficiency -o sweep.html
      Figures, requirements and all results of `bkpack sweep`
  bkpack report model.bkpack results/ -o report.html --title 'Llama at 4 bits'

The page is one file and loads nothing from the network.";

/// Write a page about a packed file, or about results of sweeps, as one HTML file
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ReportArgs {
    /// Packed file (one at most), and folders and files of results
    #[arg(value_name = "PACKED|RESULTS", required = true)]
    inputs: Vec<PathBuf>,

    /// Page to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// What `bkpack eval --json` printed about the packed file (may be repeated; the first is shown on top)
    #[arg(long, value_name = "FILE")]
    eval: Vec<PathBuf>,

    /// Title of the page [default: the name of the packed file]
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,

    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    common: Common,
}

/// Runs the subcommand.
pub fn run(args: &ReportArgs) -> Result<()> {
    check_output(&args.output, args.force)?;
    let (packed, results) = split(&args.inputs)?;
    let read = packed.into_iter().chain(&args.eval).map(PathBuf::as_path);
    read.chain(results::files(&results)?.iter().map(PathBuf::as_path))
        .try_for_each(|input| refuse_same_file(input, &args.output))?;
    let packed = packed.map(|path| PackedFile::open(path)).transpose()?;
    let evaluations: Vec<Evaluation> = match &packed {
        Some(packed) => args.eval.iter().map(|path| evaluation(path, packed)).collect::<Result<_>>()?,
        None if args.eval.is_empty() => Vec::new(),
        None => {
            let why = "says something about a packed file, and none is given".into();
            return Err(Error::Option { option: "--eval", why });
        }
    };
    let measurements = if results.is_empty() { None } else { Some(measurements(&results)?) };
    let model = match &packed {
        Some(packed) => {
            packed.check_contents(&args.common.observer())?;
            Some(model(packed))
        }
        None => None,
    };
    let default = model.as_ref().map_or("Results of sweeps", |model| &model.file);
    let title = args.title.as_deref().unwrap_or(default).to_owned();
    let notes: &[String] = measurements.as_ref().map_or(&[], |measurements| &measurements.notes);
    notes.iter().for_each(|note| args.common.notice(note));
    let page = Page { title: &title, model, evaluations: &evaluations, measurements };
    write_file(page.render().as_bytes(), &args.output, args.force)?;
    if args.common.quiet { Ok(()) } else { print(&format!("written: {}", args.output.display())) }
}

/// The packed file among the inputs, and the others.
fn split(inputs: &[PathBuf]) -> Result<(Option<&PathBuf>, Vec<PathBuf>)> {
    let (mut packed, mut results) = (None, Vec::new());
    for input in inputs {
        // A result is told by its name: a file of weights would be read in vain.
        let result = input.is_dir() || input.extension().is_some_and(|extension| extension == "json");
        if result && !input.to_string_lossy().ends_with(".index.json") {
            results.push(input.clone());
        } else if !format::is_packed(input)? {
            let why = "is no packed file, no folder and no JSON file of results".into();
            return Err(Error::NotAModel { path: input.clone(), why });
        } else if let Some(first) = packed.replace(input) {
            let why = format!("a page is about one packed file, and {} is another", Path::display(first));
            return Err(Error::NotAModel { path: input.clone(), why });
        }
    }
    Ok((packed, results))
}

/// Reads an evaluation, which must be one of this file.
fn evaluation(path: &Path, packed: &PackedFile) -> Result<Evaluation> {
    let found = Evaluation::read(path)?;
    let seals = || packed.shards().map(|shard| shard.seal);
    let same = found.seals.is_empty() || found.seals.iter().map(String::as_str).eq(seals());
    let sizes = (found.file_bytes, found.parameters) == (packed.file_bytes(), packed.parameters());
    if same && sizes {
        return Ok(found);
    }
    let why = format!("measured on another model than {}; evaluate this one again", packed.path().display());
    Err(Error::Results { path: path.to_owned(), why })
}

fn measurements(paths: &[PathBuf]) -> Result<Measurements> {
    let results::Results { records: (quantized, configurations), notes } = results::all(paths)?;
    // Either may have nothing to draw; its results stand in the table all the same.
    let robustness = Robustness::new(quantized.clone(), &[], &[], DEPLOYABLE_PPL).ok();
    let efficiency = Efficiency::new(&configurations, &[], TARGET_PPL).ok();
    Ok(Measurements { quantized, configurations, robustness, efficiency, notes })
}

fn model(packed: &PackedFile) -> Model {
    let manifest = packed.manifest();
    let explainer = Explainer::new(&manifest.policy, packed.activations());
    let config = manifest.config.clone();
    let tensors = packed.names().iter().filter_map(|name| packed.entry(name));
    let source =
        |file: &SourceFile| HashedFile { name: file.name.clone(), bytes: file.bytes, blake3: file.blake3.clone() };
    let sealed = packed.shards().map(|format::ShardView { path, bytes, seal, .. }| HashedFile {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: bytes as u64,
        blake3: seal.to_owned(),
    });
    let inside = packed.file_parts().map(|(name, part)| HashedFile {
        name: name.to_owned(),
        bytes: part.bytes() as u64,
        blake3: part.hash.to_hex().to_string(),
    });
    Model {
        file: packed.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
        architecture: config.as_ref().and_then(|config| config["architectures"][0].as_str()).map(str::to_owned),
        random_weights: config.as_ref().is_some_and(is_synthetic),
        config,
        format_version: manifest.version,
        producer: manifest.producer.clone(),
        file_bytes: packed.file_bytes(),
        parameters: packed.parameters(),
        source_kind: manifest.source.kind.clone(),
        source_files: manifest.source.files.iter().map(source).collect(),
        sealed_files: sealed.collect(),
        files: inside.collect(),
        policy: manifest.policy.clone(),
        policy_sentence: explainer.policy(),
        activations: manifest.activations.iter().map(activations).collect(),
        tensors: tensors.map(|tensor| described(&explainer, tensor)).collect(),
    }
}

fn described(explainer: &Explainer, tensor: &PackedTensor) -> Tensor {
    let PackedTensor { name, shape, component, complex, encoding, reason, parts } = tensor;
    let stored = stored(tensor);
    let subject = Subject { name, component, encoding: *encoding, bytes: stored.bytes, reason: reason.as_ref() };
    let half = match complex {
        None => "",
        Some(ComplexPart::Real) => " (real part)",
        Some(ComplexPart::Imaginary) => " (imaginary part)",
    };
    Tensor {
        stored,
        shape: shape.clone(),
        component: format!("{component}{half}"),
        parameters: tensor.elements() as u64,
        reason: explainer.explain(&subject).phrase,
        parts: parts.iter().map(|part| (part.name.clone(), part.hash.to_hex().to_string())).collect(),
    }
}

fn activations(record: &ActivationQuantization) -> Activations {
    let ActivationQuantization { component, bits, group_size, positions, samples, text, .. } = record;
    Activations {
        component: component.clone(),
        bits: *bits,
        group_size: *group_size,
        positions: *positions,
        samples: *samples,
        text: (text.name.clone(), text.blake3.clone()),
    }
}
