//! Short measurements of what changing some of a model's matrices costs: only the blocks from the first changed one on run
//! again.

use std::collections::HashMap;

use bkpack_kernels::{Cpu, cpu::Comparison};

use super::{perplexity::slice_rows, text::window_bos};
use crate::{
    error::{Error, Result},
    model::{Model, Pass, check_tokens},
    ops::{
        Ops,
        cpu::{CpuOps, Values},
    },
    tensor::{Tensor, TensorSource, mixed::Mixed},
};

/// A model on some windows of a text, with what reaches some of its blocks kept.
///
/// Holds `[windows, ctx, hidden_size]` values for each block that changes may begin at, and one more.
pub struct Probe<'a> {
    source: &'a dyn TensorSource,
    cpu: Cpu,
    ops: &'a CpuOps,
    model: Model<'a, CpuOps>,
    windows: Vec<Window>,
    /// Blocks that changes may begin at.
    starts: Vec<usize>,
}

struct Window {
    tokens: Vec<u32>,
    pass: Pass<CpuOps>,
    /// What reaches each of the blocks that changes may begin at.
    inputs: Vec<Values>, // each [ctx, hidden_size]
    last: Values, // [ctx, hidden_size]
}

impl<'a> Probe<'a> {
    /// Runs the model on windows of as many tokens each; `starts` are the blocks that changes may begin at.
    ///
    /// # Errors
    /// As [`Model::load`] and [`Model::forward`].
    pub fn new(
        cpu: Cpu,
        ops: &'a CpuOps,
        source: &'a dyn TensorSource,
        windows: &[&[u32]],
        starts: Vec<usize>,
    ) -> Result<Self> {
        let model = Model::load(source, ops)?;
        let bos = window_bos(source)?;
        let ctx = windows.first().map_or(1, |window| window.len());
        let mut state = model.state(ctx)?;
        let run = |window: &&[u32]| {
            check_tokens("the calibration text", window, model.vocab_size())?;
            let mut tokens = window.to_vec();
            if let Some(bos) = bos {
                tokens[0] = bos;
            }
            state.clear(ops)?;
            let (mut x, pass) = model.embed(&tokens, 0)?;
            let mut inputs = Vec::new();
            for layer in 0..model.layers() {
                if starts.contains(&layer) {
                    inputs.push(ops.copy(&x));
                }
                x = model.block(layer, x, &pass, &mut state)?;
            }
            Ok(Window { tokens, pass, inputs, last: model.finish(&x)? })
        };
        let windows = windows.iter().map(run).collect::<Result<_>>()?;
        Ok(Self { source, cpu, ops, model, windows, starts })
    }

    /// The mean Kullback-Leibler divergence, over all positions but the last of each window, of the model with these
    /// matrices in place of its own. They all belong to blocks from `start` on, one of the blocks that changes may begin
    /// at; or to any place, if there is none.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Error::Output`] where the changed model computes NaN or infinity.
    ///
    /// # Panics
    /// If changes may not begin at `start`.
    pub fn divergence(&self, changed: HashMap<String, Tensor<'_>>, start: Option<usize>) -> Result<f64> {
        let mixed = Mixed::new(self.source, changed);
        let model = Model::load(&mixed, self.ops)?;
        let vocab_size = model.vocab_size();
        let rows = slice_rows(vocab_size, 2);
        let (mut sum, mut count) = (0.0, 0);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for window in &self.windows {
            let mut state = model.state(window.tokens.len())?;
            let mut x = match start {
                Some(start) => {
                    let index = self.starts.iter().position(|&known| known == start);
                    self.ops.copy(&window.inputs[index.expect("changes may begin here")])
                }
                None => model.embed(&window.tokens, 0)?.0,
            };
            for layer in start.unwrap_or(0)..model.layers() {
                x = model.block(layer, x, &window.pass, &mut state)?;
            }
            let last = model.finish(&x)?;
            let scored = window.tokens.len() - 1;
            for first in (0..scored).step_by(rows) {
                let rows = rows.min(scored - first);
                self.ops.read(&self.model.logits(&window.last, first, rows)?, &mut theirs)?;
                self.ops.read(&model.logits(&last, first, rows)?, &mut ours)?;
                let mut compared = vec![Comparison::default(); rows];
                self.cpu.compare_logits(&theirs, &ours, vocab_size, &mut compared);
                sum += compared.iter().map(|comparison| comparison.kl_divergence).sum::<f64>();
                count += rows;
            }
        }
        if !sum.is_finite() {
            let why = "the model computes NaN or infinity once some of its matrices are quantized".into();
            return Err(Error::Output { path: self.source.path().to_owned(), why });
        }
        Ok(sum / count.max(1) as f64)
    }
}
