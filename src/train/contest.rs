//! A budget's choice measured against presets of about its size, so that what is packed is never worse than they are.

use bkpack_kernels::Cpu;
use serde::Serialize;

use crate::{
    error::{Error, Result},
    eval::probe::Probe,
    model::Model,
    ops::cpu::{Activations, CpuOps},
    pack::Packing,
    progress::{Observer, Unit},
    tensor::TensorSource,
};

/// Tokens that each mix is measured on.
pub const TOKENS: usize = 4096;

/// A mix that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    pub name: String,
    /// Bytes of the whole file.
    pub bytes: u64,
    /// Whether the file meets the target.
    pub fits: bool,
    /// Mean divergence from the checkpoint, in nats a token, with weights rounded without feedback.
    pub kld: f64,
    /// Whether it is what will be packed.
    pub chosen: bool,
}

/// Measures a budget's choice and its [rivals](Packing::rivals) on windows of `tokens` from window `first` on, or on the
/// last ones, and has the packing adopt the best that meets the target. The packing's own comes first.
///
/// Holds one packed model in memory at a time.
///
/// # Errors
/// As [`Probe::divergence`]; [`Error::Tokens`] where the text does not fill a window; [`Error::Cancelled`].
pub fn contest(
    cpu: Cpu,
    checkpoint: &dyn TensorSource,
    packing: &mut Packing,
    tokens: &[u32],
    (ctx, first): (usize, usize),
    observer: &dyn Observer,
) -> Result<Vec<Entry>> {
    let ops = CpuOps::new(cpu, Activations::Exact);
    let ctx = ctx.min(Model::load(checkpoint, &ops)?.max_positions());
    let windows: Vec<&[u32]> = tokens.chunks_exact(ctx).collect();
    let count = TOKENS.div_ceil(ctx).min(windows.len());
    if count == 0 {
        let why = format!("{} tokens do not fill one window of {ctx}; pass a smaller --ctx", tokens.len());
        return Err(Error::Tokens { source_name: "the calibration text".into(), why });
    }
    let first = first.min(windows.len() - count);
    let rivals = packing.rivals();
    observer.begin("Comparing", ((1 + rivals.len()) * count * ctx) as u64, Unit::Tokens);
    let probe = Probe::new(cpu, &ops, checkpoint, &windows[first..first + count], Vec::new())?;
    let mut entries = Vec::new();
    for rival in std::iter::once(None).chain(rivals.iter().map(Some)) {
        observer.check()?;
        let kld = probe.divergence(packing.quantized(cpu, rival)?, None)?;
        let (name, bytes, fits) = match rival {
            None => ("budget".to_owned(), packing.file_bytes(), true),
            Some(rival) => (rival.name.clone(), rival.bytes, rival.fits),
        };
        entries.push(Entry { name, bytes, fits, kld, chosen: false });
        observer.advance((count * ctx) as u64);
    }
    observer.end();
    let fitting = (0..entries.len()).filter(|&index| entries[index].fits);
    let best = fitting.min_by(|&a, &b| entries[a].kld.total_cmp(&entries[b].kld)).expect("the budget's own fits");
    entries[best].chosen = true;
    if best > 0 {
        packing.adopt(&rivals[best - 1])?;
    }
    Ok(entries)
}
