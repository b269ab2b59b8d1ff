//! Perplexity over windows of a text, and the distance to a baseline that sees the same windows.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use bkpack_kernels::{Cpu, cpu::Comparison};
use serde::Serialize;

pub use super::core_error::CoreError;
use super::{
    causality::looks_ahead,
    core_error::CoreErrors,
    text::{Tokenizer, window_bos},
};
use crate::{
    error::{Error, Result},
    model::{Model, State, check_tokens, config::check_not_synthetic, reduce::Reduction, weight_bytes},
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
        cuda::CudaOps,
        device::{Device, DeviceRecord},
    },
    progress::{Observer, Unit},
    tensor::TensorSource,
};

/// Tokens that run through the layers together: enough to amortize reading the weights, little enough to stay in cache.
pub(super) const BATCH: usize = 512;

/// Memory for logits: they are computed in slices of as many positions as fit.
pub(super) const LOGITS_BYTES: usize = 32 << 20;

/// Which positions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Tokens of a window. Windows do not overlap; the last partial one is dropped.
    pub ctx: usize,
    /// Positions at the start of each window that are not scored; at least 1.
    pub skip: usize,
}

impl Protocol {
    /// Windows of `ctx` tokens, or of 512 if not given (less where the model's context is shorter).
    ///
    /// # Errors
    /// [`Error::Option`] if a window exceeds the model's context, or no position of it would be scored.
    pub fn new(ctx: Option<usize>, skip: usize, max_positions: usize) -> Result<Self> {
        let ctx = ctx.unwrap_or(max_positions.min(512));
        if ctx > max_positions {
            let why = format!("{ctx} tokens exceed the model's context of {max_positions}");
            return Err(Error::Option { option: "--ctx", why });
        }
        if ctx < 2 {
            let why = format!("{ctx} is too few: a window needs a token to see and one to predict");
            return Err(Error::Option { option: "--ctx", why });
        }
        if skip == 0 || skip >= ctx {
            let why = format!("{skip} is not from 1 to {}, one less than the window", ctx - 1);
            return Err(Error::Option { option: "--skip", why });
        }
        Ok(Self { ctx, skip })
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// `exp(nll)`.
    pub ppl: f64,
    /// Mean negative log-likelihood of a scored token, in nats.
    pub nll: f64,
    /// Scored positions.
    pub scored: u64,
    /// Whether the model, or the baseline, sees later tokens: then no figure here is that of a language model.
    pub looks_ahead: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<BaselineComparison>,
    /// Bits on disk for each weight, every byte of the file counted.
    pub bits_per_weight: f64,
    /// How many times smaller than the weights alone in FP32.
    pub ratio_fp32: f64,
    pub file_bytes: u64,
    pub parameters: u64,
    /// Of the model alone: the baseline's time is not counted.
    pub tokens_per_second: f64,
    pub activations: Activations,
    /// Where the model quantizes the activations of its Birman-Schwinger core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core_error: Option<CoreError>,
    pub ctx: usize,
    pub skip: usize,
    pub windows: usize,
    #[serde(flatten)]
    pub device: DeviceRecord,
    /// The instruction set of the CPU, which scores whatever the device.
    pub isa: &'static str,
    pub threads: usize,
}

/// What was measured against the baseline, over the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BaselineComparison {
    pub baseline_ppl: f64,
    pub baseline_nll: f64,
    pub ppl_increase_percent: f64,
    /// Mean Kullback-Leibler divergence of the model from the baseline, in nats.
    pub kld_mean: f64,
    pub kld_median: f64,
    /// The divergence that 99.9 % of positions stay below.
    pub kld_p999: f64,
    /// The fraction of positions where both find the same token the most likely.
    pub top1_agreement: f64,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// See [`Protocol::new`].
    pub ctx: Option<usize>,
    /// See [`Protocol::skip`].
    pub skip: usize,
    /// Of the model; a baseline always runs with exact ones.
    pub activations: Activations,
    /// Measure a model that sees later tokens all the same.
    pub allow_lookahead: bool,
}

/// Measures a model's perplexity on `tokens`, and its distance to `baseline`, which runs side by side.
///
/// ```
/// use bkpack::{
///     checkpoint,
///     eval::{perplexity::{Options, evaluate}, text::{Tokenizer, read_text}},
///     ops::cpu::Activations,
///     progress::Silent,
/// };
/// use bkpack_kernels::Cpu;
///
/// let model = checkpoint::open("fixtures/llama".as_ref())?;
/// let mut tokens = Tokenizer::load(&model)?.encode(&read_text("fixtures/wikitext2.test.txt".as_ref())?)?;
/// tokens.truncate(512);
/// let options = Options { ctx: Some(256), skip: 1, activations: Activations::Exact, allow_lookahead: false };
/// let measured = evaluate(Cpu::detect(), &model, None, &tokens, &options, &Silent)?;
/// assert_eq!((measured.windows, measured.scored), (2, 510));
/// assert!(measured.ppl > 1.0 && measured.ppl < 100.0);
/// # Ok::<_, bkpack::Error>(())
/// ```
///
/// # Errors
/// As [`Model::load`] and [`Protocol::new`]; [`Error::Synthetic`] for random weights; [`Error::Tokens`] for ids outside
/// of the vocabulary or too few for one window; [`Error::Incomparable`] for a baseline of another vocabulary;
/// [`Error::Output`] where a model computes what is not finite; [`Error::LooksAhead`] for a model or baseline that sees later tokens, unless allowed; [`Error::Cancelled`].
pub fn evaluate(
    cpu: Cpu,
    source: &dyn TensorSource,
    baseline: Option<&dyn TensorSource>,
    tokens: &[u32],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Evaluation> {
    evaluate_reduced(cpu, (source, &Reduction::default()), baseline, tokens, options, observer)
}

/// The same on any device.
///
/// # Errors
/// As [`evaluate`]; [`Error::Cuda`], before anything is computed if the weights do not fit the card.
pub fn evaluate_on(
    device: &Device,
    cpu: Cpu,
    source: &dyn TensorSource,
    baseline: Option<&dyn TensorSource>,
    tokens: &[u32],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Evaluation> {
    let Device::Cuda(cuda) = device else { return evaluate(cpu, source, baseline, tokens, options, observer) };
    let weights: Vec<u64> = std::iter::once(source).chain(baseline).map(weight_bytes).collect::<Result<_>>()?;
    device.check_room(weights.iter().sum())?;
    let ops = CudaOps::new(cuda.clone(), options.activations)?;
    let exact = CudaOps::new(cuda.clone(), Activations::Exact)?;
    let whole = Reduction::default();
    let measured = measure(cpu, (&ops, &exact), (source, &whole), baseline, tokens, options, observer)?;
    Ok(Evaluation { device: device.record(), ..measured })
}

/// The same as [`evaluate`] of a model from which something is left out; the baseline is run whole.
///
/// # Errors
/// As [`evaluate`]; [`Error::Reduction`].
pub fn evaluate_reduced(
    cpu: Cpu,
    (source, reduction): (&dyn TensorSource, &Reduction),
    baseline: Option<&dyn TensorSource>,
    tokens: &[u32],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Evaluation> {
    options.activations.check_cpu()?;
    let (ops, exact) = (CpuOps::new(cpu, options.activations), CpuOps::new(cpu, Activations::Exact));
    measure(cpu, (&ops, &exact), (source, reduction), baseline, tokens, options, observer)
}

/// Measures with the model on `ops`, the baseline on `exact`, and the scores on the CPU.
fn measure<O: Ops>(
    cpu: Cpu,
    (ops, exact): (&O, &O),
    (source, reduction): (&dyn TensorSource, &Reduction),
    baseline: Option<&dyn TensorSource>,
    tokens: &[u32],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Evaluation> {
    std::iter::once(source).chain(baseline).try_for_each(check_not_synthetic)?;
    let mut model = Model::load(source, ops)?;
    model.reduce(reduction)?;
    let baseline = match baseline {
        Some(baseline) => Some((baseline, Model::load(baseline, exact)?)),
        None => None,
    };
    let vocab_size = model.vocab_size();
    let protocol = Protocol::new(options.ctx, options.skip, model.max_positions())?;
    if let Some((baseline, baseline_model)) = &baseline {
        check_comparable((source, &model), (*baseline, baseline_model), protocol.ctx)?;
    }
    check_tokens("the text", tokens, vocab_size)?;
    let windows = tokens.len() / protocol.ctx;
    if windows == 0 {
        let why = format!("{} tokens do not fill one window of {}; pass a smaller --ctx", tokens.len(), protocol.ctx);
        return Err(Error::Tokens { source_name: "the text".into(), why });
    }

    let probe = |path: &Path, looks_ahead: bool| match looks_ahead && !options.allow_lookahead {
        true => Err(Error::LooksAhead { path: path.to_owned() }),
        false => Ok(looks_ahead),
    };
    let probed = &tokens[..protocol.ctx];
    let mut sees_later = probe(source.path(), looks_ahead(&model, ops, probed)?)?;
    if let Some((baseline, model)) = &baseline {
        sees_later |= probe(baseline.path(), looks_ahead(model, exact, probed)?)?;
    }

    let bos = window_bos(source)?;
    let rows = slice_rows(vocab_size, 1 + usize::from(baseline.is_some()));
    let mut model = Runner::new(source, ops, cpu, model, protocol.ctx)?;
    let mut baseline = match baseline {
        Some((source, model)) => Some(Runner::new(source, exact, cpu, model, protocol.ctx)?),
        None => None,
    };
    // Errors of the core's activations are seen where a text begins, so that one is run in one call, too.
    let whole = model.model.runs_whole()
        || model.model.quantizes_core()
        || baseline.as_ref().is_some_and(|baseline| baseline.model.runs_whole());
    let batch_tokens = if whole { protocol.ctx } else { BATCH };
    let mut compared = Vec::new();
    observer.begin("Evaluating", (windows * protocol.ctx) as u64, Unit::Tokens);
    for window in tokens.chunks_exact(protocol.ctx) {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        model.restart()?;
        baseline.iter_mut().try_for_each(Runner::restart)?;
        for (index, batch) in window.chunks(batch_tokens).enumerate() {
            observer.check()?;
            let hidden = model.forward(batch)?;
            let mut baseline = match &mut baseline {
                Some(baseline) => Some((baseline.forward(batch)?, baseline)),
                None => None,
            };
            for (row, targets) in slices(&window, index * batch_tokens, batch.len(), protocol.skip, rows) {
                model.score(&hidden, row, targets)?;
                if let Some((hidden, baseline)) = &mut baseline {
                    baseline.score(hidden, row, targets)?;
                    let start = compared.len();
                    compared.resize(start + targets.len(), Comparison::default());
                    cpu.compare_logits(baseline.values()?, model.values()?, vocab_size, &mut compared[start..]);
                }
            }
            observer.advance(batch.len() as u64);
        }
    }
    observer.end();

    let scored = (windows * (protocol.ctx - protocol.skip)) as u64;
    let nll = model.nll / scored as f64;
    let (parameters, file_bytes) = (source.parameters(), source.file_bytes());
    Ok(Evaluation {
        ppl: nll.exp(),
        nll,
        scored,
        looks_ahead: sees_later,
        baseline: baseline.map(|baseline| BaselineComparison::new(nll, baseline.nll / scored as f64, &compared)),
        bits_per_weight: 8.0 * file_bytes as f64 / parameters as f64,
        ratio_fp32: 4.0 * parameters as f64 / file_bytes as f64,
        file_bytes,
        parameters,
        core_error: model.core_errors.relative(source),
        tokens_per_second: (windows * protocol.ctx) as f64 / model.time.as_secs_f64(),
        activations: options.activations,
        ctx: protocol.ctx,
        skip: protocol.skip,
        windows,
        device: Device::Cpu.record(),
        isa: cpu.isa().name(),
        threads: rayon::current_num_threads(),
    })
}

/// The scored positions of a batch of `len` tokens from `first` of a window: the row of the batch that each slice of at
/// most `rows` starts at, and the tokens that its rows are to predict.
pub(super) fn slices(
    window: &[u32],
    first: usize,
    len: usize,
    skip: usize,
    rows: usize,
) -> impl Iterator<Item = (usize, &[u32])> {
    // The row of a position predicts the token after it.
    let start = (first + 1).max(skip);
    let end = (first + len + 1).min(window.len());
    (start..end).step_by(rows).map(move |target| (target - 1 - first, &window[target..end.min(target + rows)]))
}

/// Positions whose logits fit the memory set aside for them, shared by so many models.
pub(super) fn slice_rows(vocab_size: usize, models: usize) -> usize {
    (LOGITS_BYTES / (models * vocab_size * size_of::<f32>())).max(1)
}

/// Refuses a baseline, or a teacher, whose logits are about other tokens.
pub(crate) fn check_comparable<O: Ops>(
    (source, model): (&dyn TensorSource, &Model<O>),
    (baseline, baseline_model): (&dyn TensorSource, &Model<O>),
    ctx: usize,
) -> Result<()> {
    let (path, baseline_path) = (source.path().display(), baseline.path().display());
    let (ours, theirs) = (model.vocab_size(), baseline_model.vocab_size());
    if ours != theirs {
        let why = format!("{path} has a vocabulary of {ours} tokens, {baseline_path} one of {theirs}");
        return Err(Error::Incomparable { why });
    }
    if baseline_model.max_positions() < ctx {
        let longest = baseline_model.max_positions();
        let why = format!("{baseline_path} has a context of {longest} tokens, less than the window of {ctx}");
        return Err(Error::Incomparable { why });
    }
    if let (Some(ours), Some(theirs)) = (source.file("tokenizer.json")?, baseline.file("tokenizer.json")?)
        && ours != theirs
        && !Tokenizer::load(source)?.same_vocabulary(&Tokenizer::load(baseline)?)
    {
        let why = format!("the tokenizers of {path} and {baseline_path} give the same ids to different tokens");
        return Err(Error::Incomparable { why });
    }
    Ok(())
}

/// One of the models of an evaluation, and what it scored so far.
struct Runner<'a, O: Ops> {
    path: &'a Path,
    ops: &'a O,
    cpu: Cpu,
    model: Model<'a, O>,
    state: State<O>,
    /// Of the slice that was scored last.
    logits: Option<O::Tensor>, // [rows, vocab_size]
    /// For their values, where the back end needs one.
    buffer: Vec<f32>,
    nll: f64,
    core_errors: CoreErrors,
    time: Duration,
}

impl<'a, O: Ops> Runner<'a, O> {
    fn new(source: &'a dyn TensorSource, ops: &'a O, cpu: Cpu, model: Model<'a, O>, ctx: usize) -> Result<Self> {
        let mut state = model.state(ctx)?;
        if model.quantizes_core() {
            state.record_core();
        }
        Ok(Self {
            path: source.path(),
            ops,
            cpu,
            model,
            state,
            logits: None,
            buffer: Vec::new(),
            nll: 0.0,
            core_errors: CoreErrors::default(),
            time: Duration::ZERO,
        })
    }

    fn restart(&mut self) -> Result<()> {
        self.state.clear(self.ops)
    }

    fn forward(&mut self, batch: &[u32]) -> Result<O::Tensor> {
        let start = Instant::now();
        let hidden = self.model.forward(batch, &mut self.state)?;
        self.time += start.elapsed();
        self.state.core().iter().for_each(|trace| self.core_errors.add(trace));
        Ok(hidden)
    }

    /// The logits of the slice that was scored last, `[rows, vocab_size]`.
    fn values(&mut self) -> Result<&[f32]> {
        let logits = self.logits.as_ref().expect("a slice was scored");
        self.ops.values(logits, &mut self.buffer)
    }

    /// Computes the logits of the rows from `row` and adds up how unlikely they find the targets.
    fn score(&mut self, hidden: &O::Tensor, row: usize, targets: &[u32]) -> Result<()> {
        let start = Instant::now();
        // The buffer of the last slice serves this one.
        self.logits = None;
        let logits = self.logits.insert(self.model.logits(hidden, row, targets.len())?);
        let logits = self.ops.values(logits, &mut self.buffer)?;
        self.time += start.elapsed();
        let mut losses = vec![0.0; targets.len()];
        self.cpu.cross_entropy(logits, targets, &mut losses);
        let sum: f64 = losses.iter().sum();
        if !sum.is_finite() {
            let why = "the model computes logits that are NaN or infinite, so it has no perplexity".into();
            return Err(Error::Output { path: self.path.to_owned(), why });
        }
        self.nll += sum;
        Ok(())
    }
}

impl BaselineComparison {
    fn new(nll: f64, baseline_nll: f64, compared: &[Comparison]) -> Self {
        let mut divergences: Vec<f64> = compared.iter().map(|position| position.kl_divergence).collect();
        divergences.sort_by(f64::total_cmp);
        let same_top = compared.iter().filter(|position| position.same_top).count();
        Self {
            baseline_ppl: baseline_nll.exp(),
            baseline_nll,
            ppl_increase_percent: 100.0 * (nll - baseline_nll).exp_m1(),
            kld_mean: divergences.iter().sum::<f64>() / divergences.len() as f64,
            kld_median: quantile(&divergences, 0.5),
            kld_p999: quantile(&divergences, 0.999),
            top1_agreement: same_top as f64 / compared.len() as f64,
        }
    }
}

/// The value that the fraction `q` of sorted values stays below, interpolated linearly between neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    low + (high - low) * position.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_but_the_skipped_is_scored_once() {
        let window: Vec<u32> = (100..110).collect();
        for (batch, skip, rows) in [(4, 1, 3), (4, 6, 2), (10, 1, 100), (3, 9, 1), (1, 1, 1)] {
            let mut scored = Vec::new();
            for (index, tokens) in window.chunks(batch).enumerate() {
                for (row, targets) in slices(&window, index * batch, tokens.len(), skip, rows) {
                    assert!(targets.len() <= rows && row + targets.len() <= tokens.len());
                    // Each row predicts the token after its own.
                    assert_eq!(targets[0], tokens[row] + 1);
                    scored.extend_from_slice(targets);
                }
            }
            assert_eq!(scored, window[skip..], "batches of {batch}, slices of {rows}");
        }
    }

    #[test]
    fn protocols_out_of_range_are_refused() {
        assert_eq!(Protocol::new(None, 1, 2048).unwrap(), Protocol { ctx: 512, skip: 1 });
        assert_eq!(Protocol::new(None, 1, 128).unwrap(), Protocol { ctx: 128, skip: 1 });
        assert_eq!(Protocol::new(Some(256), 128, 256).unwrap(), Protocol { ctx: 256, skip: 128 });
        for (ctx, skip, option) in
            [(257, 1, "--ctx"), (16, 0, "--skip"), (16, 16, "--skip"), (0, 1, "--ctx"), (1, 1, "--ctx")]
        {
            let error = Protocol::new(Some(ctx), skip, 256).unwrap_err();
            assert!(matches!(error, Error::Option { option: found, .. } if found == option), "{ctx} {skip}");
        }
    }

    #[test]
    fn quantiles_interpolate() {
        let values = [0.0, 1.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 1.0].map(|q| quantile(&values, q)), [0.0, 1.5, 4.0]);
        assert!((quantile(&values, 0.9) - 3.4).abs() < 1e-12);
        assert_eq!(quantile(&[7.0], 0.999), 7.0);
    }
}
