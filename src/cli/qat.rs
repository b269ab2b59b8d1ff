//! `bkpack qat`: training through what the packed file will hold.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use bkpack::{
    Error, Result,
    checkpoint::Checkpoint,
    encoding::Request,
    eval::{
        calibrate::parse_core_width,
        text::{Tokenizer, read_either, read_text, read_tokens},
    },
    format::{self, Opened, write_file},
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions},
    policy::{Choice, ComponentRules, Exceptions, Policy, PolicyFile, Recipe},
    report::{
        table::{count, facts},
        training::{Curve, draw},
    },
    tensor::{CalibrationText, TensorSource},
    train::{
        conversion::check_source,
        qat::{self, Data, Distillation, History, Options, Trained, Training},
    },
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    Common,
    figure::{DPI, FigureFiles},
    print, refuse_file_of_checkpoint, refuse_same_file,
    source::SourceArgs,
};

const EXAMPLES: &str = "\
Examples:
  bkpack qat ./model --encoding int4 --text train.txt --steps 500 -o ./model-int4
      Train every matrix through INT4; writes the trained weights and ./model-int4/model.bkpack
  bkpack qat ./model --encoding ternary --text train.txt --steps 2000 -o ./model-ternary
      The same at 1.6 bits, with the model itself as teacher
  bkpack qat ./model --encoding binary --text train.txt --steps 2000 --teacher ./larger --alpha 0.5 -o ./model-binary
      A larger model of the same vocabulary as teacher
  bkpack convert ./model --policy component --plan-only -o plan.toml
  bkpack qat ./model --recipe plan.toml --text train.txt --steps 500 -o ./model-mixed
      Another encoding for each tensor
  bkpack qat ./resnet_bk --encoding int8 --activations bk_core=int8 --text train.txt --steps 300 -o ./resnet_bk-int8
      With the activations of the Birman-Schwinger core rounded, too
  bkpack qat ./model --encoding int4 --text train.txt --steps 500 -o ./model-int4 --val valid.txt \\
      --save-metrics metrics.json --plot loss.svg
      Measure the perplexity of the packed model along the way, and draw the loss
  bkpack qat ./model --encoding int4 --text train.txt --steps 500 -o ./model-int4 --resume
      Go on where an interrupted training was left

Every --checkpoint-every steps, and at Ctrl-C, the state is saved beside the output in a file whose name ends in .partial; it is
removed at the end. A training that was resumed writes the same bytes as one in one go.";

/// Train a model through the encoding that it will be packed in
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct QatArgs {
    /// Hugging Face folder, or file of weights: safetensors, NPZ or PyTorch
    source: PathBuf,

    /// What every matrix becomes: int8 to int2, ternary or binary, with a group as in 'int4:g64' or 'int4:row' [default group:
    /// 128]
    #[arg(long, value_name = "ENCODING", required_unless_present = "recipe", conflicts_with = "recipe")]
    encoding: Option<Request>,

    /// Encode every tensor as this recipe says, see `bkpack convert --plan-only`
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// Leave tensors whose name matches unquantized (may be repeated); they are trained all the same
    #[arg(long, value_name = "REGEX")]
    keep: Vec<String>,

    /// Encode tensors whose name matches as told, e.g. 'embed=int8:g64' (may be repeated; the last match decides)
    #[arg(long, value_name = "REGEX=ENCODING")]
    tensor: Vec<String>,

    /// How weights are rounded: rtn is round-to-nearest from the largest magnitude, search looks for the scales of least
    /// squared error
    #[arg(long, value_enum, default_value_t = RoundingName::Search)]
    rounding: RoundingName,

    /// Train the scales, too, instead of choosing them anew for the weights of each step
    #[arg(long)]
    learn_scales: bool,

    /// Ternary weights below this share of their scale are zero
    #[arg(long, value_name = "SHARE", default_value_t = DEFAULT_TERNARY_THRESHOLD)]
    ternary_threshold: f32,

    /// Round the activations of a component, too: bk_core=int8 or bk_core=int4, of a ResNet-BK model
    #[arg(long, value_name = "COMPONENT=WIDTH", value_parser = parse_core_width)]
    activations: Option<u32>,

    /// Text to train on (UTF-8); never the text that the model is tested on
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,

    /// Token ids instead of a text: a JSON array
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,

    /// Updates of the weights
    #[arg(long, value_name = "N")]
    steps: u64,

    /// Windows whose gradients make one update; they are taken one after the other, so that memory does not grow with them
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,

    /// Tokens in a window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,

    /// The highest learning rate [default: 2e-4, 5e-4 where a matrix has 3 bits, 1e-3 where one has less]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,

    /// Steps over which the learning rate rises; it then falls along a cosine [default: a twentieth of the steps]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,

    /// How much of a matrix a step takes away, times the learning rate (AdamW)
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    weight_decay: f64,

    /// The largest norm of a gradient; a larger one is made shorter
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    clip: f64,

    /// What the order of the windows depends on
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Model to follow: checkpoint or packed file of the same vocabulary [default: the checkpoint itself where a matrix has 3
    /// bits or less]
    #[arg(long, value_name = "MODEL", conflicts_with = "no_teacher")]
    teacher: Option<PathBuf>,

    /// Follow the text alone
    #[arg(long)]
    no_teacher: bool,

    /// How much the teacher counts against the text, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    alpha: f64,

    /// What both models' logits are divided by where they are compared
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,

    /// Text to measure the perplexity of the packed model on along the way (UTF-8), never trained on
    #[arg(long, value_name = "FILE", conflicts_with = "val_tokens")]
    val: Option<PathBuf>,

    /// Token ids instead of that text: a JSON array
    #[arg(long, value_name = "FILE")]
    val_tokens: Option<PathBuf>,

    /// Windows of that text to look at, from its start
    #[arg(long, value_name = "N", default_value_t = 64)]
    val_windows: usize,

    /// Steps between two such measurements
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    val_every: u64,

    /// Folder to write
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,

    /// Steps between two savings of the state
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,

    /// Go on where an interrupted training with the same model, text and options was left
    #[arg(long)]
    resume: bool,

    /// Write loss, learning rate and tokens a second of each step, and every perplexity, as JSON
    #[arg(long, value_name = "FILE")]
    save_metrics: Option<PathBuf>,

    /// Draw the loss; the extension is the format (svg, pdf, png, eps), and a PNG is written in any case
    #[arg(long, value_name = "FIG")]
    plot: Option<PathBuf>,

    /// Say what would be trained and written, and do neither
    #[arg(long)]
    dry_run: bool,

    /// Replace output files that exist, and an interrupted training that is not resumed
    #[arg(long)]
    force: bool,

    /// Print one JSON object for machines
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    checkpoint: SourceArgs,

    #[command(flatten)]
    common: Common,
}

/// The ways to round by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoundingName {
    Rtn,
    Search,
}

/// Bits from which on a model needs no teacher, and the usual learning rate.
const PLENTY: f64 = 4.0;

/// Runs the subcommand.
pub fn run(args: &QatArgs) -> Result<()> {
    let start = Instant::now();
    let observer = args.common.observer();
    let notice = |sentence: &str| args.common.notice(sentence);
    check_source(&args.source)?;
    let checkpoint = args.checkpoint.open_checkpoint(&args.source, &args.common)?;
    let partial = beside(&args.output, ".partial");
    let figure = args.check_outputs(&partial)?;
    let cpu = Cpu::from_environment()?;
    let pack = args.pack_options()?;
    let bits = qat::least_bits(&checkpoint, &pack)?;
    let options = args.options(bits);
    options.check()?;
    let teacher: Option<Opened> = match &args.teacher {
        Some(path) => {
            refuse_same_file(path, &args.output)?;
            Some(args.open_teacher(path)?)
        }
        None => None,
    };
    let own = !args.no_teacher && bits < PLENTY;
    let teacher: Option<&dyn TensorSource> = match &teacher {
        Some(teacher) => Some(&**teacher),
        None if own => Some(&checkpoint),
        None => None,
    };
    let data = args.data(&checkpoint, &options)?;
    let mut training = Training::new(cpu, &checkpoint, teacher, &pack, &options, &data, &observer)?;
    if args.dry_run {
        return args.tell_plan(cpu, &checkpoint, &pack, &training, &data, &observer);
    }
    if args.resume {
        match partial.exists() {
            true => training.resume(&partial)?,
            false => notice(&format!("{} does not exist: starting anew", partial.display())),
        }
    }
    let weights = training.weights();
    let keep_metrics = |history: &History| match &args.save_metrics {
        Some(path) => write_file(&pretty(&args.metrics(history, &options, weights)), path, true),
        None => Ok(()),
    };
    let trained = training.run(&partial, args.checkpoint_every, &keep_metrics, &observer);
    let trained = trained.inspect_err(|error| match error {
        Error::Cancelled if partial.exists() => notice(&format!(
            "the state is saved in {}; the same command with --resume goes on there",
            partial.display()
        )),
        Error::Diverged { .. } if partial.exists() => {
            notice(&format!("the state of an earlier step is in {}", partial.display()));
        }
        _ => {}
    })?;
    let packed_bytes = trained.write(cpu, &checkpoint, pack, (&args.output, args.force), &observer)?;
    match std::fs::remove_file(&partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&partial)(error)),
        _ => {}
    }
    if let Some(figure) = figure {
        figure.write(&args.figure(&trained.history), &[])?;
    }
    args.tell(&trained, (weights, packed_bytes), start.elapsed().as_secs_f64())
}

impl QatArgs {
    /// Refuses outputs that must not be written to; returns the figure's files.
    fn check_outputs(&self, partial: &Path) -> Result<Option<FigureFiles>> {
        refuse_same_file(&self.source, &self.output)?;
        let force = self.force || self.dry_run;
        qat::check_target(&self.output, force)?;
        if partial.exists() && !self.resume && !force {
            let why = "is left from an interrupted training; pass --resume to go on there, or --force to start anew";
            return Err(Error::Training { path: partial.to_owned(), why: why.into() });
        }
        if let Some(path) = &self.save_metrics {
            refuse_file_of_checkpoint(&self.source, path)?;
            format::check_output(path, force || self.resume)?;
        }
        let plot = self.plot.as_deref();
        let figure = plot.map(|path| FigureFiles::new("--plot", path, &[], DPI, force)).transpose()?;
        if let Some(figure) = &figure {
            figure.refuse_files_of(&self.source)?;
            figure.refuse_other_output(partial)?;
            self.save_metrics.iter().try_for_each(|path| figure.refuse_other_output(path))?;
        }
        for input in [&self.text, &self.tokens, &self.val, &self.val_tokens].into_iter().flatten() {
            for output in self.save_metrics.iter().map(PathBuf::as_path).chain([partial]) {
                refuse_same_file(input, output)?;
            }
            figure.iter().try_for_each(|figure| figure.refuse_input(input))?;
        }
        Ok(figure)
    }

    fn pack_options(&self) -> Result<PackOptions> {
        if !(self.ternary_threshold > 0.0 && self.ternary_threshold < 1.0) {
            let why = format!("{} is not between 0 and 1", self.ternary_threshold);
            return Err(Error::Option { option: "--ternary-threshold", why });
        }
        let exceptions = Exceptions::new(&self.keep, &self.tensor)?;
        let choice = match (&self.recipe, self.encoding) {
            (Some(path), _) => Choice::Recipe(Recipe::parse(PolicyFile::read(path)?)?),
            (None, Some(request)) => Choice::Uniform(request),
            (None, None) => unreachable!("the options require one of the two"),
        };
        let policy = Policy { components: ComponentRules::builtin(), choice, exceptions };
        let rounding = match self.rounding {
            RoundingName::Rtn => Rounding::Nearest,
            RoundingName::Search => Rounding::Search,
        };
        Ok(PackOptions { rounding, ternary_threshold: self.ternary_threshold, ..PackOptions::new(policy) })
    }

    fn options(&self, bits: f64) -> Options {
        let usual = match bits {
            bits if bits >= PLENTY => 2e-4,
            bits if bits >= 3.0 => 5e-4,
            _ => 1e-3,
        };
        Options {
            steps: self.steps,
            batch: self.batch,
            ctx: self.ctx,
            learning_rate: self.learning_rate.unwrap_or(usual),
            warmup: self.warmup.unwrap_or(self.steps.div_ceil(20)),
            weight_decay: self.weight_decay,
            clip: self.clip,
            seed: self.seed,
            learn_scales: self.learn_scales,
            distillation: Distillation { alpha: self.alpha, temperature: self.temperature },
            core_bits: self.activations,
        }
    }

    fn open_teacher(&self, path: &Path) -> Result<Opened> {
        Ok(SourceArgs::default().open(&[path], None, &self.common)?.remove(0))
    }

    fn data(&self, checkpoint: &Checkpoint, options: &Options) -> Result<Data> {
        let (path, tokens) = read_either(checkpoint, &self.text, &self.tokens)?;
        let mut validation = match (&self.val, &self.val_tokens) {
            (Some(path), _) => Some(Tokenizer::load(checkpoint)?.encode(&read_text(path)?)?),
            (_, Some(path)) => Some(read_tokens(path)?),
            _ => None,
        };
        if let Some(tokens) = &mut validation {
            let ctx = options.ctx.unwrap_or(bkpack::model::max_positions(checkpoint)?.min(512));
            tokens.truncate(self.val_windows.saturating_mul(ctx));
        }
        Ok(Data { text: CalibrationText::of(path)?, tokens, validation, validate_every: self.val_every })
    }

    fn encoding_name(&self) -> String {
        match (&self.encoding, &self.recipe) {
            (Some(request), _) => request.to_string(),
            (_, Some(path)) => path.display().to_string(),
            _ => unreachable!("the options require one of the two"),
        }
    }

    fn metrics(&self, history: &History, options: &Options, weights: u64) -> Value {
        json!({
            "model": self.source,
            "encoding": self.encoding_name(),
            "weights": weights,
            "options": options,
            "baseline_ppl": history.baseline_ppl,
            "validation": history.validation,
            "steps": history.steps,
        })
    }

    fn figure(&self, history: &History) -> bkpack::report::figure::Figure {
        let curve = Curve {
            losses: history.steps.iter().map(|record| (record.step, record.cross_entropy)).collect(),
            validation: history.validation.iter().map(|record| (record.step, record.nll)).collect(),
            baseline: history.baseline_ppl.map(f64::ln),
        };
        let name = self.source.canonicalize().unwrap_or_else(|_| self.source.clone());
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        draw(&format!("Training of {name} through {}", self.encoding_name()), &curve)
    }

    fn tell_plan(
        &self,
        cpu: Cpu,
        checkpoint: &Checkpoint,
        pack: &PackOptions,
        training: &Training,
        data: &Data,
        observer: &dyn bkpack::progress::Observer,
    ) -> Result<()> {
        let (folder, packed) = qat::file_bytes(cpu, checkpoint, pack, observer)?;
        let state = 3 * 4 * training.weights();
        let tokens = self.steps * (self.batch * training.ctx()) as u64;
        let rounds = tokens as f64 / data.tokens.len() as f64;
        if self.json {
            let object = json!({
                "steps": self.steps,
                "tokens": tokens,
                "text_tokens": data.tokens.len(),
                "weights": training.weights(),
                "memory_bytes": training.memory_bytes(),
                "state_bytes": state,
                "folder_bytes": folder,
                "packed_bytes": packed,
            });
            return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
        }
        let rows = [
            ("steps", format!("{} of {} windows of {} tokens", self.steps, self.batch, training.ctx())),
            ("tokens", format!("{tokens}, {rounds:.2} times the {} of the text", data.tokens.len())),
            ("weights", training.weights().to_string()),
            ("memory", format!("{} and what one window computes", bytes(training.memory_bytes()))),
            ("state", format!("{} beside the output until the end", bytes(state))),
            ("folder", format!("{}, trained weights in F32", bytes(folder))),
            ("model.bkpack", bytes(packed)),
        ];
        print(&facts(rows).trim_fmt())
    }

    fn tell(&self, trained: &Trained, (weights, packed_bytes): (u64, u64), seconds: f64) -> Result<()> {
        let History { steps, validation, baseline_ppl } = &trained.history;
        let (first, last) = (&steps[0], &steps[steps.len() - 1]);
        if self.json {
            let object = json!({
                "output": self.output,
                "packed": self.output.join("model.bkpack"),
                "packed_bytes": packed_bytes,
                "weights": weights,
                "steps": last.step,
                "first_loss": first.loss,
                "last_loss": last.loss,
                "baseline_ppl": baseline_ppl,
                "untrained_ppl": validation.first().filter(|record| record.step == 0).map(|record| record.ppl),
                "trained_ppl": validation.last().map(|record| record.ppl),
                "seconds": seconds,
            });
            return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
        }
        if self.common.quiet {
            return Ok(());
        }
        let mut rows = vec![
            ("steps", format!("{} in {seconds:.1} s", last.step)),
            ("loss", format!("{:.4} at first, {:.4} at last", first.loss, last.loss)),
        ];
        if let (Some(baseline), Some(untrained), Some(trained)) = (baseline_ppl, validation.first(), validation.last())
        {
            let (untrained, trained) = (untrained.ppl, trained.ppl);
            let text = format!("{baseline:.3} as it was, {untrained:.3} packed without training, {trained:.3} trained");
            rows.push(("perplexity", text));
        }
        rows.push(("written", self.output.display().to_string()));
        rows.push(("packed", format!("{} ({})", self.output.join("model.bkpack").display(), bytes(packed_bytes))));
        print(&facts(rows).trim_fmt())
    }
}

/// The output's name with an ending of its own.
fn beside(output: &Path, ending: &str) -> PathBuf {
    // A name that ends in a slash is that of the folder.
    let mut name = output.components().collect::<PathBuf>().into_os_string();
    name.push(ending);
    name.into()
}

fn bytes(value: u64) -> String {
    format!("{} bytes", count(value))
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("plain data is JSON");
    bytes.push(b'\n');
    bytes
}
