//! Calibrated rounding, block by block: the inputs that a block's weights see come from blocks that are packed already.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use bkpack_kernels::Cpu;

use crate::{
    error::{Error, Result},
    model::{Model, check_tokens},
    ops::{cpu::CpuOps, recorder::InputRecorder},
    pack::{Packing, Writing},
    progress::{Observer, Unit},
    quant::gptq::Factor,
    tensor::{Tensor, TensorSource, mixed::Mixed},
};

/// Windows of a calibration text, and their length in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    pub windows: usize,
    pub ctx: usize,
}

/// Writes a packing whose matrices are rounded with error feedback (GPTQ: Frantar et al., arXiv 2210.17323).
///
/// Holds the hidden states of all samples, `[windows, ctx, hidden]` in f32, and the second moments of one block's inputs,
/// 8 bytes times the square of each width. Weights that no sample reaches (an expert that is never chosen) are rounded
/// like any other without calibration.
///
/// # Errors
/// As [`Model::load`] and [`Packing::begin`]; [`Error::Tokens`] where the text does not fill one window; [`Error::Output`]
/// where the model computes NaN or infinity; [`Error::Cancelled`].
pub fn write_calibrated(
    packing: Packing,
    cpu: Cpu,
    tokens: &[u32],
    samples: Samples,
    force: bool,
    observer: &dyn Observer,
) -> Result<Vec<PathBuf>> {
    let recorder = Arc::new(InputRecorder::default());
    let ops = CpuOps::recording(cpu, recorder.clone());
    let mut writing = packing.begin(cpu, force)?;
    let checkpoint = writing.checkpoint();
    let model = Model::load(checkpoint, &ops)?;
    check_tokens("the calibration text", tokens, model.vocab_size())?;
    let ctx = samples.ctx.min(model.max_positions());
    let windows: Vec<&[u32]> = tokens.chunks_exact(ctx).take(samples.windows).collect();
    if windows.is_empty() {
        let why = format!("{} tokens do not fill one window of {ctx}", tokens.len());
        return Err(Error::Tokens { source_name: "the calibration text".into(), why });
    }

    let layers = model.layers();
    observer.begin("Calibrating", (layers * windows.len() * ctx) as u64, Unit::Tokens);
    let embedded = windows.iter().map(|window| model.embed(window, 0)).collect::<Result<Vec<_>>>()?;
    let (mut hidden, passes): (Vec<_>, Vec<_>) = embedded.into_iter().unzip(); // each [ctx, hidden]
    let mut state = model.state(ctx)?;
    let prefixes = model.block_prefixes();
    for (layer, prefix) in prefixes.iter().enumerate() {
        let inside = checkpoint.names().iter().filter(|name| name.starts_with(prefix) && writing.is_pending(name));
        recorder.start(inside.cloned().collect());
        for (x, pass) in hidden.iter().zip(&passes) {
            observer.check()?;
            state.clear(&ops)?;
            model.block(layer, ops.copy(x), pass, &mut state)?;
        }
        let packed = round(&mut writing, cpu, &recorder)?;
        let mixed = Mixed::new(checkpoint, packed);
        let model = Model::load(&mixed, &ops)?;
        for (x, pass) in hidden.iter_mut().zip(&passes) {
            observer.check()?;
            state.clear(&ops)?;
            *x = model.block(layer, ops.copy(x), pass, &mut state)?;
            observer.advance(ctx as u64);
        }
    }
    let head = model.head_name();
    if writing.is_pending(head) {
        recorder.start([head.to_owned()].into());
        for x in &hidden {
            observer.check()?;
            ops.record(head, &model.finish(x)?);
        }
        round(&mut writing, cpu, &recorder)?;
    }
    observer.end();
    drop((hidden, passes));
    writing.finish(observer)
}

/// Rounds every weight whose inputs were recorded.
fn round(writing: &mut Writing, cpu: Cpu, recorder: &InputRecorder) -> Result<HashMap<String, Tensor<'static>>> {
    let mut packed = HashMap::new();
    for (names, hessian) in recorder.finish() {
        let factor = Factor::new(cpu, &hessian).map_err(|error| Error::Output {
            path: writing.checkpoint().path().to_owned(),
            why: format!("tensor {}: {error}", names.join(", ")),
        })?;
        for name in names {
            let tensor = writing.write_calibrated(&name, &factor)?;
            packed.insert(name, tensor);
        }
    }
    Ok(packed)
}
