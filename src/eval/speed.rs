//! How fast a model runs: the time to its first token, prefill, decode, and what decode reads beside what memory gives.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use bkpack_kernels::Cpu;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::Serialize;

use super::{flops::token_cost, perplexity::BATCH};
use crate::{
    error::{Error, Result},
    mmap::LargePages,
    model::{Model, State, reduce::Reduction},
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    progress::{Observer, Unit},
    tensor::TensorSource,
};

/// The most memory that the probe of memory reads: a larger buffer is not read faster.
const PROBE_BYTES: u64 = 1 << 30;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Tokens of an empty context that are run together; 0 for no prefill.
    pub prefill: usize,
    /// Tokens of an empty context that are run one by one; 0 for no decode. The first token is measured in any case.
    pub decode: usize,
    /// How many times each is measured, after one run that is not counted; at least 1.
    pub repetitions: usize,
    pub activations: Activations,
    /// Whether to measure how fast memory is read, too.
    pub memory: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// From before the model was opened to the logits of one token.
    pub first_token_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Timing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<Timing>,
    /// Bytes of the matrices, as they are stored, that decoding one token reads. The cache of keys and values is not
    /// counted.
    pub weight_bytes_per_token: u64,
    /// Those times the tokens of a second, median, in 10^9 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_gb_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    pub activations: Activations,
    /// The instruction set that the kernels ran on.
    pub isa: &'static str,
    pub threads: usize,
    pub repetitions: usize,
    pub file_bytes: u64,
    pub parameters: u64,
}

/// The repetitions of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timing {
    /// Tokens of one repetition.
    pub tokens: usize,
    /// Tokens a second: the median of the repetitions.
    pub tokens_per_second: f64,
    /// Tokens a second of the fastest repetition.
    pub best_tokens_per_second: f64,
    /// Of each repetition, in order.
    pub seconds: Vec<f64>,
}

/// How fast the threads read memory, as the best that any of several ways of reading reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Bytes read over and over: as many as decoding one token reads, at most 2^30.
    pub bytes: u64,
    pub gb_per_second: f64,
    /// What decode reads a second over this: above 1 where one of the two was disturbed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_share: Option<f64>,
}

impl Timing {
    fn new(tokens: usize, times: &[Duration]) -> Self {
        let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        let mut sorted = seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] };
        let rate = |seconds: f64| tokens as f64 / seconds.max(f64::MIN_POSITIVE);
        Self { tokens, tokens_per_second: rate(median), best_tokens_per_second: rate(sorted[0]), seconds }
    }
}

/// Measures a model that was about to be opened at `before`.
///
/// Tokens are random: time does not depend on them, but for which experts they choose. Decode computes the logits of
/// every token, prefill those of the last.
///
/// # Errors
/// As [`Model::load`] and [`Activations::check_cpu`]; [`Error::Option`] for more tokens than the model's context has room for, or no repetition;
/// [`Error::NotSequential`] where a model that runs texts whole is to decode; [`Error::Cancelled`].
pub fn measure(
    cpu: Cpu,
    source: &dyn TensorSource,
    before: Instant,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Speed> {
    let &Options { prefill, decode, repetitions, activations, memory } = options;
    activations.check_cpu()?;
    let ops = CpuOps::new(cpu, activations);
    let model = Model::load(source, &ops)?;
    check(options, &model)?;
    let mut random = StdRng::seed_from_u64(0);
    let vocabulary = model.vocab_size() as u32;
    let tokens: Vec<u32> = (0..prefill.max(decode).max(1)).map(|_| random.random_range(0..vocabulary)).collect();
    let mut run = Run { state: model.state(tokens.len())?, model: &model, ops: &ops, logits: Vec::new(), observer };
    run.together(&tokens[..1])?;
    let first_token = before.elapsed();

    let weight_bytes_per_token = token_cost(source, &Reduction::default(), 1)?.weight_bytes_per_token;
    let buffer = match memory {
        true => Some(LargePages::new(weight_bytes_per_token.min(PROBE_BYTES) as usize)?),
        false => None,
    };
    // The limit is the memory's, not that of the instruction set that was chosen.
    let read_rate = || buffer.as_ref().map_or(0.0, |buffer| Cpu::detect().read_rate(buffer));
    let mut most = read_rate();
    observer.begin("Measuring", ((repetitions + 1) * (prefill + decode)) as u64, Unit::Tokens);
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..=repetitions {
        if prefill > 0 {
            prefills.push(run.together(&tokens[..prefill])?);
        }
        if decode > 0 {
            decodes.push(run.one_by_one(&tokens[..decode])?);
        }
    }
    observer.end();
    most = most.max(read_rate());

    // The first run of each is not counted.
    let timing = |tokens: usize, times: &[Duration]| times.get(1..).map(|counted| Timing::new(tokens, counted));
    let (prefill, decode) = (timing(prefill, &prefills), timing(decode, &decodes));
    let decode_rate = decode.as_ref().map(|decode| decode.tokens_per_second * weight_bytes_per_token as f64);
    let memory = buffer.as_ref().map(|buffer| Memory {
        bytes: buffer.len() as u64,
        gb_per_second: most / 1e9,
        decode_share: decode_rate.map(|rate| rate / most),
    });
    Ok(Speed {
        first_token_seconds: first_token.as_secs_f64(),
        prefill,
        decode,
        weight_bytes_per_token,
        decode_gb_per_second: decode_rate.map(|rate| rate / 1e9),
        memory,
        activations,
        isa: cpu.isa().name(),
        threads: rayon::current_num_threads(),
        repetitions,
        file_bytes: source.file_bytes(),
        parameters: source.parameters(),
    })
}

fn check(options: &Options, model: &Model<CpuOps>) -> Result<()> {
    let refused = |option, why| Err(Error::Option { option, why });
    for (option, tokens) in [("--prefill", options.prefill), ("--decode", options.decode)] {
        if tokens > model.max_positions() {
            let why = format!("{tokens} tokens exceed the model's context of {}", model.max_positions());
            return refused(option, why);
        }
    }
    if options.repetitions == 0 {
        return refused("--repetitions", "there must be at least one".into());
    }
    if options.decode > 0 { model.check_sequential() } else { Ok(()) }
}

/// A model with all that a run needs, so that runs find their memory as the run before left it.
struct Run<'m, 'a> {
    model: &'m Model<'a, CpuOps>,
    ops: &'m CpuOps,
    state: State<CpuOps>,
    logits: Vec<f32>,
    observer: &'m dyn Observer,
}

impl Run<'_, '_> {
    /// Runs the tokens of a text together, and computes the logits of the last.
    fn together(&mut self, tokens: &[u32]) -> Result<Duration> {
        self.observer.check()?;
        self.state.clear(self.ops)?;
        let start = Instant::now();
        // A model whose positions see later ones takes them in one call.
        let batch = if self.model.runs_whole() { tokens.len() } else { BATCH };
        for batch in tokens.chunks(batch) {
            let hidden = self.model.forward(batch, &mut self.state)?;
            if self.state.positions() == tokens.len() {
                let logits = self.model.logits(&hidden, batch.len() - 1, 1)?;
                black_box(self.ops.values(&logits, &mut self.logits)?);
            }
        }
        self.observer.advance(tokens.len() as u64);
        Ok(start.elapsed())
    }

    /// Runs the tokens of a text one after the other, and computes the logits of each.
    fn one_by_one(&mut self, tokens: &[u32]) -> Result<Duration> {
        self.state.clear(self.ops)?;
        let start = Instant::now();
        for &token in tokens {
            self.observer.check()?;
            let hidden = self.model.forward(&[token], &mut self.state)?;
            let logits = self.model.logits(&hidden, 0, 1)?;
            black_box(self.ops.values(&logits, &mut self.logits)?);
        }
        let time = start.elapsed();
        self.observer.advance(tokens.len() as u64);
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_that_of_the_repetitions() {
        let timing = |seconds: &[u64]| {
            let times: Vec<Duration> = seconds.iter().map(|&seconds| Duration::from_secs(seconds)).collect();
            let Timing { tokens_per_second, best_tokens_per_second, .. } = Timing::new(12, &times);
            (tokens_per_second, best_tokens_per_second)
        };
        assert_eq!(timing(&[3]), (4.0, 4.0));
        assert_eq!(timing(&[6, 2, 4]), (3.0, 6.0));
        assert_eq!(timing(&[8, 1, 2, 4]), (4.0, 12.0));
    }
}
