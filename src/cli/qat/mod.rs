//! `bkpack qat`: training through what the packed file will hold.

mod outputs;
mod tell;

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
    format::{Opened, write_file},
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions},
    policy::{Choice, ComponentRules, Exceptions, Policy, PolicyFile, Recipe},
    progress::Observer,
    tensor::{CalibrationText, TensorSource},
    train::{
        conversion::{check_source, check_ternary_threshold},
        qat::{self, Data, Distillation, History, Options, Training},
    },
};
use bkpack_kernels::Cpu;
use clap::Args;

use self::tell::pretty;
use super::{Common, partial_name, rounding::RoundingName, source::SourceArgs};

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

Every --checkpoint-every steps, after the last one and at Ctrl-C, the state is saved beside the output in a file whose name ends in
.partial; it is removed once the output is written. A training that was resumed writes the same bytes as one in one go.";

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

    /// Windows whose gradients make one update; as many as there are threads run side by side, each in memory of its own
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

    /// How much the teacher counts against the text, from 0 to 1 [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    alpha: Option<f64>,

    /// What both models' logits are divided by where they are compared [default: 1]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,

    /// Text to measure the perplexity of the packed model on along the way (UTF-8), never trained on
    #[arg(long, value_name = "FILE", conflicts_with = "val_tokens")]
    val: Option<PathBuf>,

    /// Token ids instead of that text: a JSON array
    #[arg(long, value_name = "FILE")]
    val_tokens: Option<PathBuf>,

    /// Windows of that text to look at, from its start
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    val_windows: u32,

    /// Steps between two such measurements
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    val_every: u64,

    /// Folder to write
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,

    /// Steps between two savings of the state
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: u64,

    /// Go on where an interrupted training with the same model, text and options was left; the metrics it saved are replaced
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

/// Bits from which on a model needs no teacher, and the usual learning rate.
const PLENTY: f64 = 4.0;

/// Runs the subcommand.
pub fn run(args: &QatArgs) -> Result<()> {
    let start = Instant::now();
    let observer = args.common.observer();
    let notice = |sentence: &str| observer.suspended(|| args.common.notice(sentence));
    check_source(&args.source)?;
    let partial = partial_name(&args.output);
    let figure = args.check_outputs(&partial)?;
    let paths: Vec<&Path> = std::iter::once(&args.source).chain(&args.teacher).map(PathBuf::as_path).collect();
    let mut opened = args.checkpoint.open(&paths, None, &args.common)?;
    let teacher = opened.split_off(1).pop();
    let Some(Opened::Checkpoint(checkpoint)) = opened.pop() else {
        let why = "is packed already; train the checkpoint that it came from".into();
        return Err(Error::NotAModel { path: args.source.clone(), why });
    };
    let cpu = Cpu::from_environment()?;
    let pack = args.pack_options()?;
    let bits = qat::least_bits(&checkpoint, &pack)?;
    let options = args.options(bits);
    options.check()?;
    let own = !args.no_teacher && bits < PLENTY;
    let teacher: Option<&dyn TensorSource> = match &teacher {
        Some(teacher) => Some(&**teacher),
        None if own => Some(&*checkpoint),
        None => None,
    };
    let mut for_teacher = [("--alpha", args.alpha), ("--temperature", args.temperature)].into_iter();
    if let (None, Some((option, _))) = (teacher, for_teacher.find(|(_, value)| value.is_some())) {
        let why = "there is no teacher that it could be about; name one with --teacher".into();
        return Err(Error::Option { option, why });
    }
    let data = args.data(&checkpoint, &options, &observer)?;
    let mut training = Training::new(cpu, &checkpoint, teacher, &pack, &options, &data, &observer)?;
    if args.dry_run {
        return args.tell_plan(cpu, &checkpoint, &pack, &training, &data, &observer);
    }
    // From here on a state that stands there is this training's.
    match (args.resume, partial.exists()) {
        (true, true) => training.resume(&partial)?,
        (true, false) => notice(&format!("{} does not exist: starting anew", partial.display())),
        (false, _) => remove(&partial)?,
    }
    qat::check_room((&args.output, &partial), &checkpoint, &pack, training.state_bytes())?;
    let weights = training.weights();
    let keep_metrics = |history: &History| match &args.save_metrics {
        Some(path) => write_file(&pretty(&args.metrics(history, &options, weights)), path, true),
        None => Ok(()),
    };
    let trained = training.run(&partial, args.checkpoint_every, &keep_metrics, &observer);
    let written = trained.and_then(|trained| {
        let packed_bytes = trained.write(cpu, &checkpoint, pack, (&args.output, args.force), &observer)?;
        Ok((trained, packed_bytes))
    });
    let (trained, packed_bytes) = written.inspect_err(|error| match error {
        _ if !partial.exists() => {}
        Error::Diverged { .. } => notice(&format!("the state of an earlier step is in {}", partial.display())),
        _ => notice(&format!(
            "the state is saved in {}; the same command with --resume goes on there",
            partial.display()
        )),
    })?;
    remove(&partial)?;
    if let Some(figure) = figure {
        figure.write(&args.figure(&trained.history), &[])?;
    }
    args.tell(&trained, (weights, packed_bytes), start.elapsed().as_secs_f64())
}

/// Removes a file, if there is one.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

impl QatArgs {
    fn pack_options(&self) -> Result<PackOptions> {
        check_ternary_threshold(self.ternary_threshold)?;
        let exceptions = Exceptions::new(&self.keep, &self.tensor)?;
        let choice = match (&self.recipe, self.encoding) {
            (Some(path), _) => Choice::Recipe(Recipe::parse(PolicyFile::read(path)?)?),
            (None, Some(request)) => Choice::Uniform(request),
            (None, None) => unreachable!("the options require one of the two"),
        };
        let policy = Policy { components: ComponentRules::builtin(), choice, exceptions };
        let (rounding, ternary_threshold) = (self.rounding.into(), self.ternary_threshold);
        Ok(PackOptions { rounding, ternary_threshold, ..PackOptions::new(policy) })
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
            distillation: Distillation {
                alpha: self.alpha.unwrap_or(0.9),
                temperature: self.temperature.unwrap_or(1.0),
            },
            core_bits: self.activations,
        }
    }

    /// The tokens of both texts; asks `observer` after each whether to go on.
    fn data(&self, checkpoint: &Checkpoint, options: &Options, observer: &dyn Observer) -> Result<Data> {
        let (path, tokens) = read_either(checkpoint, &self.text, &self.tokens)?;
        observer.check()?;
        let mut validation = match (&self.val, &self.val_tokens) {
            (Some(path), _) => Some(Tokenizer::load(checkpoint)?.encode(&read_text(path)?)?),
            (_, Some(path)) => Some(read_tokens(path)?),
            _ => None,
        };
        if let Some(tokens) = &mut validation {
            let ctx = options.ctx.unwrap_or(bkpack::model::max_positions(checkpoint)?.min(512));
            tokens.truncate(ctx.saturating_mul(self.val_windows as usize));
        }
        observer.check()?;
        Ok(Data { text: CalibrationText::of(path)?, tokens, validation, validate_every: self.val_every })
    }
}
