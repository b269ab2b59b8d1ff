//! The training itself: step by step, from windows of a text to changed weights.

use std::{
    collections::{HashMap, HashSet},
    panic::resume_unwind,
    path::Path,
    time::Instant,
};

use bkpack_kernels::{Cpu, Grid};
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

use super::{
    adamw::{Update, learning_rate, squares},
    loss::{Losses, Teaching, loss_and_gradient},
    options::Options,
    parameter::{Packer, Parameter, Stored},
    record::{History, StepRecord, ValidationRecord},
    saved::{key, restore, save},
    windows::{Data, Window},
};
use crate::{
    checkpoint::Checkpoint,
    encoding::Request,
    error::{Error, Result},
    eval::{
        calibrate::{self, Calibration},
        perplexity::{self, Protocol, evaluate},
        text::window_bos,
    },
    model::{Model, check_tokens, config::check_not_synthetic, visit_tensors},
    ops::{
        Ops,
        autograd::tape::{TapeOps, Variables},
        cpu::{Activations, CpuOps},
    },
    pack::{PackOptions, outline},
    policy::PLAIN,
    progress::{Observer, Unit, Unshown},
    tensor::{Tensor, TensorSource, matrix_shape, mixed::Mixed, natural_order},
};

/// Windows that the scales of activations are calibrated on.
const CALIBRATION_WINDOWS: usize = 100;

/// What was trained.
pub struct Trained {
    pub(super) parameters: Vec<Parameter>,
    pub(super) calibration: Option<Calibration>,
    pub history: History,
}

/// A training that is about to begin, or to go on.
pub struct Training<'a> {
    cpu: Cpu,
    checkpoint: &'a Checkpoint,
    teacher: Option<&'a dyn TensorSource>,
    pack: &'a PackOptions,
    options: &'a Options,
    data: &'a Data,
    protocol: Protocol,
    bos: Option<u32>,
    calibration: Option<Calibration>,
    parameters: Vec<Parameter>,
    history: History,
    key: String,
}

impl<'a> Training<'a> {
    /// Reads the weights and checks that everything fits together.
    ///
    /// # Errors
    /// As [`Model::load`], [`Options::check`] and [`calibrate::calibrate_core`]; a text too short for one window or outside of
    /// the vocabulary; a teacher of another vocabulary; a model or teacher whose positions see later ones;
    /// [`Error::Synthetic`]; [`Error::Cancelled`].
    pub fn new(
        cpu: Cpu,
        checkpoint: &'a Checkpoint,
        teacher: Option<&'a dyn TensorSource>,
        pack: &'a PackOptions,
        options: &'a Options,
        data: &'a Data,
        observer: &dyn Observer,
    ) -> Result<Self> {
        options.check()?;
        check_not_synthetic(checkpoint)?;
        let exact = CpuOps::new(cpu, Activations::Exact);
        let model = Model::load(checkpoint, &exact)?;
        let refuse = |source: &dyn TensorSource, why: &str| {
            Err(Error::Training { path: source.path().to_owned(), why: why.into() })
        };
        if model.runs_whole() {
            let why = "its positions see those after them, so it cannot learn to predict a text; set \"causal\": true";
            return refuse(checkpoint, why);
        }
        let protocol = Protocol::new(options.ctx, 1, model.max_positions())?;
        let texts = [
            (format!("{} (the training text)", data.text.name), Some(&data.tokens)),
            ("the validation text (--val or --val-tokens)".to_owned(), data.validation.as_ref()),
        ];
        for (source_name, tokens) in texts {
            let Some(tokens) = tokens else { continue };
            check_tokens(&source_name, tokens, model.vocab_size())?;
            if tokens.len() < protocol.ctx {
                let why =
                    format!("{} tokens do not fill one window of {}; pass a smaller --ctx", tokens.len(), protocol.ctx);
                return Err(Error::Tokens { source_name, why });
            }
        }
        if let Some(teacher) = teacher {
            check_not_synthetic(teacher)?;
            let followed = Model::load(teacher, &exact)?;
            if followed.runs_whole() {
                return refuse(teacher, "its positions see those after them, so it cannot teach to predict a text");
            }
            perplexity::check_comparable((checkpoint, &model), (teacher, &followed), protocol.ctx)?;
        }
        observer.check()?;
        let calibration = match options.core_bits {
            Some(bits) => {
                let how = (data.text.clone(), bits, CALIBRATION_WINDOWS);
                Some(calibrate::calibrate_core(cpu, checkpoint, &data.tokens, how, observer)?)
            }
            None => None,
        };
        let parameters = read_parameters(cpu, checkpoint, pack, options.learn_scales)?;
        let bos = window_bos(checkpoint)?;
        let key = key(checkpoint, teacher, pack, options, (data, bos), &parameters, observer)?;
        let history = History::default();
        Ok(Self { cpu, checkpoint, teacher, pack, options, data, protocol, bos, calibration, parameters, history, key })
    }

    /// Weights that are trained.
    pub fn weights(&self) -> u64 {
        self.parameters.iter().map(|parameter| parameter.weights.values.len() as u64).sum()
    }

    /// Tokens of a window.
    pub fn ctx(&self) -> usize {
        self.protocol.ctx
    }

    /// Bytes of memory that the training needs at least: weights, their gradients, what the optimizer remembers, what the
    /// forward pass sees, and the teacher's file. What the windows that run side by side compute comes on top.
    pub fn memory_bytes(&self) -> u64 {
        // Weights, two moments, stored values, variables and their transposes, gradients of a step, and of each window that
        // runs beside others.
        let windows = rayon::current_num_threads().min(self.options.batch) as u64;
        (7 + windows) * 4 * self.weights() + self.teacher.map_or(0, TensorSource::file_bytes)
    }

    /// Bytes of the state that is saved.
    pub fn state_bytes(&self) -> u64 {
        let scales = self.parameters.iter().filter_map(|parameter| parameter.scales.as_ref());
        3 * 4 * (self.weights() + scales.map(|scales| scales.initial.len() as u64).sum::<u64>())
    }

    /// Steps that are done.
    pub fn done(&self) -> u64 {
        self.history.steps.last().map_or(0, |record| record.step)
    }

    /// Goes on where the file was left. Perplexities that were measured on another text than this training's are forgotten.
    ///
    /// # Errors
    /// [`Error::Training`] where it is not this training's.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        self.history = restore(path, &self.key, &mut self.parameters, self.data)?;
        let steps = self.history.steps.iter().zip(1..).all(|(record, step)| record.step == step);
        if !steps || self.done() > self.options.steps {
            let why = "does not hold what it must; pass --force instead of --resume to start anew";
            return Err(Error::Training { path: path.to_owned(), why: why.into() });
        }
        Ok(())
    }

    /// Trains to the last step. The state is saved in `saved` every so many steps, after the last one, and when the caller
    /// stops after at least one; it stays there until the caller has written what was trained. `note` sees the record
    /// whenever the state is saved.
    ///
    /// # Errors
    /// [`Error::Diverged`] where the loss, a gradient, a weight or a perplexity is NaN or infinite, which is never saved;
    /// [`Error::Cancelled`] after the state was saved; [`Error::Io`].
    pub fn run(
        mut self,
        saved: &Path,
        checkpoint_every: u64,
        note: &dyn Fn(&History) -> Result<()>,
        observer: &dyn Observer,
    ) -> Result<Trained> {
        let tokens_per_step = (self.options.batch * self.protocol.ctx) as u64;
        if self.data.validation.is_some() && self.history.baseline_ppl.is_none() {
            self.history.baseline_ppl = Some(self.measure(None, observer)?.ppl);
        }
        observer.begin("Training", self.options.steps * tokens_per_step, Unit::Tokens);
        observer.advance(self.done() * tokens_per_step);
        let pools = single_threads(self.options.batch)?;
        let exact = CpuOps::new(self.cpu, Activations::Exact);
        let teacher = self.teacher;
        let teacher = teacher.map(|teacher| Model::load(teacher, &exact)).transpose()?;
        let teacher = teacher.as_ref().map(|model| Teacher { ops: &exact, model });
        while self.done() < self.options.steps {
            let step = self.done() + 1;
            let outcome = self.step((&pools, teacher), step, observer);
            let stopped = matches!(outcome, Err(Error::Cancelled)) && self.done() > 0;
            let due = outcome.is_ok() && (step.is_multiple_of(checkpoint_every) || step == self.options.steps);
            if stopped || due {
                save(saved, &self.key, &self.parameters, (&self.history, self.data))?;
                note(&self.history)?;
            }
            outcome?;
        }
        if self.data.validation.is_some() && self.history.validation.last().is_none_or(|last| last.step < self.done()) {
            let stored = self.stored()?;
            self.validate(&stored, observer)?;
            note(&self.history)?;
        }
        observer.end();
        Ok(Trained { parameters: self.parameters, calibration: self.calibration, history: self.history })
    }

    /// What would be packed now, of every parameter.
    fn stored(&self) -> Result<Vec<Stored>> {
        let packer = Packer { cpu: self.cpu, checkpoint: self.checkpoint, options: self.pack };
        self.parameters.par_iter().map(|parameter| parameter.stored(packer)).collect()
    }

    /// One update. Nothing has changed where it is cancelled.
    fn step(
        &mut self,
        (pools, teacher): (&[ThreadPool], Option<Teacher>),
        step: u64,
        observer: &dyn Observer,
    ) -> Result<()> {
        let mut start = Instant::now();
        let stored = self.stored()?;
        let due = (step - 1).is_multiple_of(self.data.validate_every);
        if self.data.validation.is_some()
            && due
            && self.history.validation.last().is_none_or(|last| last.step < step - 1)
        {
            let before = Instant::now();
            self.validate(&stored, observer)?;
            start += before.elapsed();
        }
        let mut variables = Variables::default();
        for (parameter, stored) in self.parameters.iter().zip(&stored) {
            variables.set(&parameter.name, matrix_shape(&parameter.shape), stored.values.clone());
        }
        let mut gradients: Vec<Vec<f32>> =
            self.parameters.iter().map(|parameter| vec![0.0; parameter.weights.values.len()]).collect();
        let losses = self.gradients((pools, teacher), (step, &variables), &mut gradients, observer)?;
        let scored = (self.options.batch * (self.protocol.ctx - 1)) as f64;
        let mean = |sum: f64| sum / scored;
        let of_scales: Vec<Vec<f32>> = self
            .parameters
            .iter()
            .zip(&stored)
            .zip(&mut gradients)
            .map(|((parameter, stored), gradient)| parameter.through_rounding(stored, gradient))
            .collect();
        let norm = gradients.iter().chain(&of_scales).map(|gradient| squares(gradient)).sum::<f64>().sqrt();
        let distillation = self.teacher.map(|_| self.options.distillation);
        let loss = mean(losses.objective(distillation));
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(self.diverged(step));
        }
        let &Options { steps, warmup, learning_rate: highest, weight_decay, clip, .. } = self.options;
        let learning_rate = learning_rate(step, steps, warmup, highest);
        let update = Update { step, learning_rate, weight_decay, shrink: (clip / norm).min(1.0) };
        for ((parameter, gradient), of_scales) in self.parameters.iter_mut().zip(&gradients).zip(&of_scales) {
            parameter.update(gradient, of_scales, update);
        }
        if !self.parameters.iter().all(Parameter::is_finite) {
            return Err(self.diverged(step));
        }
        let tokens = (self.options.batch * self.protocol.ctx) as f64;
        self.history.steps.push(StepRecord {
            step,
            loss,
            cross_entropy: mean(losses.cross_entropy),
            divergence: self.teacher.map(|_| mean(losses.divergence)),
            learning_rate,
            gradient_norm: norm,
            tokens_per_second: tokens / start.elapsed().as_secs_f64(),
        });
        observer.status(&format!("loss {loss:.4}"));
        Ok(())
    }

    /// Adds the gradients of all windows of a step, a window on each thread; returns their losses.
    fn gradients(
        &self,
        (pools, teacher): (&[ThreadPool], Option<Teacher>),
        (step, variables): (u64, &Variables),
        sums: &mut [Vec<f32>],
        observer: &dyn Observer,
    ) -> Result<Losses> {
        let source = self.with_activations(HashMap::new());
        let mut losses = Losses::default();
        let mut windows = self.data.windows(step, self.options, (self.protocol.ctx, self.bos));
        loop {
            let windows: Vec<Window> = windows.by_ref().take(pools.len()).collect();
            if windows.is_empty() {
                return Ok(losses);
            }
            observer.check()?;
            let found: Vec<Result<WindowGradients>> = std::thread::scope(|scope| {
                let run = |(pool, window)| {
                    let (pool, window): (&ThreadPool, &Window) = (pool, window);
                    let source = &source;
                    scope.spawn(move || pool.install(|| self.window(source, variables, teacher, window)))
                };
                let running: Vec<_> = pools.iter().zip(&windows).map(run).collect();
                running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
            });
            // One after the other, whatever the number of threads.
            for found in found {
                let (found, gradients) = found?;
                losses.add(found);
                self.parameters.par_iter().zip(sums.par_iter_mut()).for_each(|(parameter, sum)| {
                    if let Some(gradient) = gradients.get(&parameter.name) {
                        sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
                    }
                });
            }
            observer.advance((windows.len() * self.protocol.ctx) as u64);
        }
    }

    /// The losses of one window and their gradients.
    fn window(
        &self,
        source: &dyn TensorSource,
        variables: &Variables,
        teacher: Option<Teacher>,
        window: &Window,
    ) -> Result<WindowGradients> {
        let ops = TapeOps::new(self.cpu, variables);
        let weight = 1.0 / (self.options.batch * (self.protocol.ctx - 1)) as f64;
        let mut losses = Losses::default();
        {
            let model = Model::load(source, &ops)?;
            let hidden = model.forward(&window.inputs, &mut model.state(window.inputs.len())?)?;
            let taught = match teacher {
                Some(Teacher { model, .. }) => {
                    Some(model.forward(&window.inputs, &mut model.state(window.inputs.len())?)?)
                }
                None => None,
            };
            // What a slice of logits takes is forgotten before the next.
            let position = ops.position();
            for rows in window.slices(model.vocab_size()) {
                let logits = model.logits(&hidden, rows.start, rows.len())?;
                let mut teaching = Vec::new();
                if let (Some(teacher), Some(hidden)) = (teacher, &taught) {
                    teacher.ops.read(&teacher.model.logits(hidden, rows.start, rows.len())?, &mut teaching)?;
                }
                let distillation = self.options.distillation;
                let teaching = teacher.map(|_| Teaching { logits: &teaching, distillation });
                let targets = &window.targets[rows];
                let (found, gradient) = loss_and_gradient(self.cpu, logits.values(), targets, teaching, weight);
                losses.add(found);
                ops.seed(&logits, gradient);
                ops.backward(position);
            }
            ops.backward(0);
        }
        Ok((losses, ops.into_gradients()))
    }

    /// The checkpoint with these tensors in place of its own, and with the scales of its activations.
    fn with_activations<'s>(&'s self, mut tensors: HashMap<String, Tensor<'s>>) -> Mixed<'s> {
        let Some(Calibration { record, scales }) = &self.calibration else {
            return Mixed::new(self.checkpoint, tensors);
        };
        for (name, shape, values) in scales {
            tensors.insert(name.clone(), Tensor::floats(shape.clone(), values));
        }
        Mixed::new(self.checkpoint, tensors).with_activations(std::slice::from_ref(record))
    }

    /// Measures what would be packed, and remembers it.
    fn validate(&mut self, stored: &[Stored], observer: &dyn Observer) -> Result<()> {
        let measured = match self.measure(Some(stored), observer) {
            Err(Error::Output { .. }) => return Err(self.diverged(self.done())),
            measured => measured?,
        };
        self.history.validation.push(ValidationRecord { step: self.done(), ppl: measured.ppl, nll: measured.nll });
        Ok(())
    }

    fn diverged(&self, step: u64) -> Error {
        Error::Diverged { path: self.checkpoint.path().to_owned(), step }
    }

    /// The perplexity on the validation text of what would be packed, or of the checkpoint itself.
    fn measure(&self, stored: Option<&[Stored]>, observer: &dyn Observer) -> Result<perplexity::Evaluation> {
        let source = match stored {
            None => Mixed::new(self.checkpoint, HashMap::new()),
            Some(stored) => {
                let pairs = self.parameters.iter().zip(stored);
                let pairs = pairs.map(|(parameter, stored)| (parameter.name.clone(), stored.tensor.borrowed()));
                self.with_activations(pairs.collect())
            }
        };
        let options = perplexity::Options {
            ctx: Some(self.protocol.ctx),
            skip: 1,
            activations: Activations::Exact,
            allow_lookahead: false,
        };
        let tokens = self.data.validation.as_ref().expect("measured only where there is a text");
        let measured = evaluate(self.cpu, &source, None, tokens, &options, &Unshown(observer))?;
        if !measured.ppl.is_finite() {
            let why = format!("its mean loss of {} has a perplexity beyond all numbers", measured.nll);
            return Err(Error::Output { path: self.checkpoint.path().to_owned(), why });
        }
        Ok(measured)
    }
}

/// What one window comes to: its losses, and the gradient of each parameter by name.
type WindowGradients = (Losses, HashMap<String, Vec<f32>>);

/// A model that is followed, on its back end.
#[derive(Clone, Copy)]
struct Teacher<'a> {
    ops: &'a CpuOps,
    model: &'a Model<'a, CpuOps>,
}

/// A pool of one thread for each window that is run beside others.
fn single_threads(batch: usize) -> Result<Vec<ThreadPool>> {
    let count = rayon::current_num_threads().min(batch);
    let pool = |_| {
        let pool = ThreadPoolBuilder::new().num_threads(1).build();
        pool.map_err(|error| Error::io("a thread")(std::io::Error::other(error)))
    };
    (0..count).map(pool).collect()
}

/// The fewest bits that a quantized tensor of the policy has, scales not counted; 16 where none is quantized.
///
/// # Errors
/// As the policy's.
pub fn least_bits(checkpoint: &Checkpoint, pack: &PackOptions) -> Result<f64> {
    pack.policy.exceptions.check_patterns(checkpoint.names())?;
    let outline = outline(checkpoint, &pack.policy, &mut Vec::new())?;
    let bits = pack.policy.resolve(&outline)?.into_iter().map(|decision| match decision.alternatives[0].request {
        Request::Quantize { grid, .. } => match grid {
            Grid::Int { bits, .. } => f64::from(bits),
            Grid::Ternary => 1.6,
            Grid::Binary => 1.0,
        },
        _ => 16.0,
    });
    Ok(bits.fold(16.0, f64::min))
}

/// The weights that the model uses, in F32, with what the policy says of them.
fn read_parameters(
    cpu: Cpu,
    checkpoint: &Checkpoint,
    pack: &PackOptions,
    learn_scales: bool,
) -> Result<Vec<Parameter>> {
    pack.policy.exceptions.check_patterns(checkpoint.names())?;
    let outline = outline(checkpoint, &pack.policy, &mut Vec::new())?;
    let decisions = pack.policy.resolve(&outline)?;
    let mut used = HashSet::new();
    visit_tensors(checkpoint, &mut |name, _| {
        used.insert(name);
        Ok(())
    })?;
    let mut parameters = Vec::new();
    for (info, decision) in outline.iter().zip(decisions).filter(|(info, _)| used.contains(&info.name)) {
        let tensor = checkpoint.tensor(&info.name)?;
        let mut values = vec![0.0; tensor.elements()];
        cpu.dequantize(&tensor.matrix(), 0, &mut values);
        let mut parameter = Parameter {
            name: info.name.clone(),
            shape: info.shape.clone(),
            alternative: decision.alternatives[0],
            decays: info.component != PLAIN,
            weights: super::adamw::Slot::new(values),
            scales: None,
        };
        if learn_scales {
            parameter.learn_scales(Packer { cpu, checkpoint, options: pack })?;
        }
        parameters.push(parameter);
    }
    parameters.sort_by(|a, b| natural_order(&a.name, &b.name));
    Ok(parameters)
}
