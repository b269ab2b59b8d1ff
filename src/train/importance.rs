//! Importance: what each quantizable tensor means to the loss on a calibration text.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bkpack_kernels::Cpu;
use serde::{Deserialize, Serialize};

use super::gradients::Differentiator;
use crate::{
    error::{Error, Result},
    format::write_file,
    json,
    model::config::check_not_synthetic,
    ops::autograd::{AutogradOps, Moments, Precision},
    pack::tied_head,
    policy::{
        ComponentRules, PLAIN,
        importance::{Importance, MeasuredModel, TensorImportance},
    },
    progress::{Observer, Unit},
    tensor::{CalibrationText, TensorSource, natural_order},
};

/// Windows between two savings of the sums.
const SAVE_EVERY: u64 = 5;

/// What to measure on, and where an interrupted run is kept.
#[derive(Debug)]
pub struct Options {
    /// Windows to look at.
    pub batches: usize,
    /// Tokens of a window; see [`Protocol::new`](crate::eval::perplexity::Protocol::new).
    pub ctx: Option<usize>,
    /// A file for the sums so far, removed at the end; what is there is replaced unless the run resumes it. Without one, an
    /// interrupted run is lost.
    pub partial: Option<PathBuf>,
    /// Which tensors are plain, and so not measured.
    pub rules: ComponentRules,
    /// Go on where the partial file, if there is one, was left.
    pub resume: bool,
}

/// Sums over the windows so far, kept as bit patterns where they are f64: a resumed run gives the same bits as one in
/// one go.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Partial {
    /// Of the model's weights, the tokens and the options.
    key: String,
    /// Windows so far.
    done: u64,
    sums: BTreeMap<String, Sums>,
}

/// Sums of one tensor.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sums {
    /// Over windows, of the mean absolute gradient.
    gradient: u64,
    outputs: u64,
    output_sum: u64,
    output_squares: u64,
}

impl Sums {
    fn add(&mut self, gradient: f64, outputs: Moments) {
        let mut all = self.outputs();
        all.add(outputs);
        *self = Self {
            gradient: (f64::from_bits(self.gradient) + gradient).to_bits(),
            outputs: all.count,
            output_sum: all.sum.to_bits(),
            output_squares: all.squares.to_bits(),
        };
    }

    fn outputs(&self) -> Moments {
        let [sum, squares] = [self.output_sum, self.output_squares].map(f64::from_bits);
        Moments { count: self.outputs, sum, squares }
    }
}

/// A tensor that a policy could quantize.
struct Quantizable {
    name: String,
    component: String,
    /// Its mean absolute value.
    weight: f64,
}

/// Measures the importance of every tensor that is not [plain](PLAIN), over the first windows of `tokens`.
///
/// Memory is that of the model in F32, its gradients and what one window computes. The gradient of an expert that no
/// token of a window chose counts as zero.
///
/// # Errors
/// As [`Differentiator`]'s; [`Error::Synthetic`] for random weights; [`Error::Option`] for no batches;
/// [`Error::Gradient`] where a gradient is NaN or infinite; [`Error::Importance`] where the partial file is another
/// run's; [`Error::Io`] where it cannot be written; [`Error::Cancelled`], after the sums so far were saved.
pub fn measure(
    cpu: Cpu,
    source: &dyn TensorSource,
    text: CalibrationText,
    tokens: &[u32],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Importance> {
    check_not_synthetic(source)?;
    if options.batches == 0 {
        return Err(Error::Option { option: "--batches", why: "at least one window must be looked at".into() });
    }
    let ops = AutogradOps::new(cpu, Precision::Single);
    let differentiator = Differentiator::new(source, &ops, options.ctx, 1)?;
    let ctx = differentiator.protocol().ctx;
    let windows = differentiator.windows(tokens, options.batches)?;
    let (quantizable, blake3) = look_at_weights(cpu, source, &options.rules)?;
    let name = source.path().canonicalize().unwrap_or_else(|_| source.path().to_owned());
    let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let model = MeasuredModel { name, blake3 };

    let mut partial = Partial::begin(options, key(&model, tokens, options.batches, ctx))?;
    observer.begin("Measuring", (windows.len() * ctx) as u64, Unit::Tokens);
    observer.advance(partial.done * ctx as u64);
    for (index, window) in windows.iter().enumerate().skip(partial.done as usize) {
        if let Err(cancelled) = observer.check() {
            if let Some(path) = &options.partial {
                partial.save(path)?;
            }
            return Err(cancelled);
        }
        let gradients = differentiator.gradients(window)?.gradients;
        let mut outputs = ops.take_outputs();
        for tensor in &quantizable {
            let gradient = gradients.mean_absolute(&tensor.name)?;
            if !gradient.is_finite() {
                let (path, tensor) = (source.path().to_owned(), tensor.name.clone());
                return Err(Error::Gradient { path, tensor, window: index });
            }
            let outputs = outputs.remove(&tensor.name).unwrap_or_default();
            partial.sums.entry(tensor.name.clone()).or_default().add(gradient, outputs);
        }
        partial.done += 1;
        observer.advance(ctx as u64);
        if let Some(path) = &options.partial
            && partial.done.is_multiple_of(SAVE_EVERY)
            && (partial.done as usize) < windows.len()
        {
            partial.save(path)?;
        }
    }
    observer.end();

    let batches = windows.len() as u64;
    let tensors = quantizable.into_iter().map(|Quantizable { name, component, weight }| {
        let sums = partial.sums.get(&name).copied().unwrap_or_default();
        let gradient = f64::from_bits(sums.gradient) / batches as f64;
        TensorImportance { name, component, gradient, output_variance: sums.outputs().variance(), weight, score: 0.0 }
    });
    Ok(Importance::new(model, text, (batches, ctx as u64), tensors.collect()))
}

/// Every tensor that is not plain and not a tied head, and a hash over all tensors: their names, shapes and values as F32.
fn look_at_weights(cpu: Cpu, source: &dyn TensorSource, rules: &ComponentRules) -> Result<(Vec<Quantizable>, String)> {
    let architecture = source.config().and_then(|config| config["architectures"][0].as_str());
    // It is packed as the embedding, so no policy asks for it.
    let tied = tied_head(source)?;
    let mut names = source.names().to_vec();
    names.sort_by(|a, b| natural_order(a, b));
    let (mut quantizable, mut hasher) = (Vec::new(), blake3::Hasher::new());
    for name in names {
        let tensor = source.tensor(&name)?;
        let mut values = vec![0.0f32; tensor.elements()];
        cpu.dequantize(&tensor.matrix(), 0, &mut values);
        hasher.update(format!("{name:?} {:?}\n", tensor.shape()).as_bytes());
        hasher.update_rayon(bytemuck::cast_slice(&values));
        let component = rules.component(architecture, &name, tensor.shape()).to_owned();
        if component != PLAIN && tied != Some(name.as_str()) {
            let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
            quantizable.push(Quantizable { name, component, weight: sum / values.len() as f64 });
        }
    }
    Ok((quantizable, hasher.finalize().to_hex().to_string()))
}

/// A hash of everything that the sums depend on.
fn key(model: &MeasuredModel, tokens: &[u32], batches: usize, ctx: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("importance 1 {} {batches} {ctx}\n", model.blake3).as_bytes());
    hasher.update(bytemuck::cast_slice(tokens));
    hasher.finalize().to_hex().to_string()
}

impl Partial {
    fn begin(options: &Options, key: String) -> Result<Self> {
        let anew = Self { key: key.clone(), done: 0, sums: BTreeMap::new() };
        let Some(path) = options.partial.as_ref().filter(|path| options.resume && path.exists()) else {
            return Ok(anew);
        };
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let found: Self = json::parse(path, &bytes)?;
        if found.key != key || found.done > options.batches as u64 {
            let why = "belongs to a run on another model, another text or with other options; run without --resume to \
                       start anew";
            return Err(Error::Importance { path: path.clone(), why: why.into() });
        }
        Ok(found)
    }

    fn save(&self, path: &Path) -> Result<()> {
        write_file(&serde_json::to_vec(self).expect("plain numbers and strings"), path, true)
    }
}

/// Writes the result in one step, and then removes the partial file.
///
/// # Errors
/// [`Error::Exists`] unless `force`; [`Error::Io`].
pub fn write(importance: &Importance, path: &Path, partial: &Path, force: bool) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(importance).expect("plain numbers and strings");
    bytes.push(b'\n');
    write_file(&bytes, path, force)?;
    match std::fs::remove_file(partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(partial)(error)),
        _ => Ok(()),
    }
}
