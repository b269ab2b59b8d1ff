//! What each component of a packed model costs: its bytes, and the divergence of a model in which it alone is packed.

use std::collections::{HashMap, HashSet};

use bkpack_kernels::{Cpu, cpu::Comparison};
use serde::Serialize;

use super::{
    causality::looks_ahead,
    perplexity::{BATCH, Options, Protocol, check_comparable, slice_rows, slices},
    text::window_bos,
};
use crate::{
    error::{Error, Result},
    format::PackedFile,
    model::{Model, State, check_tokens, config::check_not_synthetic},
    ops::{
        Ops,
        cpu::{Activations, CpuOps, Values},
    },
    progress::{Observer, Unit},
    tensor::{Tensor, TensorSource, mixed::Mixed},
};

/// Windows that are looked at unless told otherwise.
pub const DEFAULT_WINDOWS: usize = 8;

/// The cost of a packed model, component by component.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComponentCosts {
    /// A line for each component and encoding, in the order of the file.
    pub components: Vec<ComponentCost>,
    /// Bytes of the file that belong to no tensor: header, tokenizer.
    pub rest_bytes: u64,
    pub file_bytes: u64,
    /// Mean Kullback-Leibler divergence of the packed model from the baseline on the same positions, in nats.
    pub kld: f64,
    /// Whether the model, or the baseline, sees later tokens.
    pub looks_ahead: bool,
    /// Windows, spread evenly over the text.
    pub windows: usize,
    pub ctx: usize,
    pub skip: usize,
}

/// The cost of the tensors of one component that share an encoding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComponentCost {
    pub component: String,
    pub encoding: String,
    pub tensors: usize,
    pub parameters: u64,
    pub bytes: u64,
    /// The bytes over those of the file.
    pub share: f64,
    /// The bytes that the same tensors have in the baseline.
    pub baseline_bytes: u64,
    /// Mean Kullback-Leibler divergence from the baseline of the baseline with these tensors alone packed, in nats.
    pub kld: f64,
    /// The divergence for each megabyte (10^6 bytes) that these tensors are smaller; absent where they are not.
    pub kld_per_mb_saved: Option<f64>,
}

/// Tensors that are packed together while the others are not.
struct Group {
    component: String,
    encoding: String,
    names: HashSet<String>,
    parameters: u64,
    bytes: u64,
    /// Whether these are the scales of quantized activations.
    activations: bool,
}

/// Measures what each component of a packed model costs on `windows` windows of the text; fewer if it is shorter. Runs
/// the model once for each component and encoding.
///
/// # Errors
/// As [`evaluate`](super::perplexity::evaluate); [`Error::Incomparable`] for a baseline that lacks a tensor.
pub fn component_costs(
    cpu: Cpu,
    packed: &PackedFile,
    baseline: &dyn TensorSource,
    tokens: &[u32],
    windows: usize,
    options: &Options,
    observer: &dyn Observer,
) -> Result<ComponentCosts> {
    options.activations.check_cpu()?;
    check_not_synthetic(packed)?;
    check_not_synthetic(baseline)?;
    let (ops, exact) = (CpuOps::new(cpu, options.activations), CpuOps::new(cpu, Activations::Exact));
    let (whole, original) = (Model::load(packed, &ops)?, Model::load(baseline, &exact)?);
    let protocol = Protocol::new(options.ctx, options.skip, whole.max_positions())?;
    check_comparable((packed, &whole), (baseline, &original), protocol.ctx)?;
    check_tokens("the text", tokens, whole.vocab_size())?;
    let picked = pick(tokens, protocol.ctx, windows)?;
    let mut sees_later = false;
    for (source, model, ops) in [(packed as &dyn TensorSource, &whole, &ops), (baseline, &original, &exact)] {
        if looks_ahead(model, ops, picked[0])? {
            sees_later = true;
            if !options.allow_lookahead {
                return Err(Error::LooksAhead { path: source.path().to_owned() });
            }
        }
    }

    let originals = originals(packed, baseline)?;
    let groups = groups(packed);
    let sources: Vec<Mixed> = groups.iter().map(|group| alone(packed, &originals, group)).collect();
    let mut models = sources.iter().map(|source| Model::load(source, &ops)).collect::<Result<Vec<_>>>()?;
    models.push(whole);
    let scored = (picked.len() * (protocol.ctx - protocol.skip)) as f64;
    let sums =
        divergences(cpu, (&original, &exact), (&models, &ops), &picked, window_bos(packed)?, protocol, observer)?;
    let mut klds = sums.into_iter().map(|sum| sum / scored);
    if let Some(sum) = klds.clone().find(|kld| !kld.is_finite()) {
        let why = format!("the mean divergence of a component is {sum}: the model computes what is not finite");
        return Err(Error::Output { path: packed.path().to_owned(), why });
    }

    let file_bytes = packed.file_bytes();
    let components: Vec<ComponentCost> = groups
        .into_iter()
        .zip(&mut klds)
        .map(|(group, kld)| {
            let stored = |name: &String| originals.get(name).map_or(0, |tensor| tensor.matrix().bytes() as u64);
            let baseline_bytes: u64 = group.names.iter().map(stored).sum();
            let saved = baseline_bytes as f64 - group.bytes as f64;
            ComponentCost {
                component: group.component,
                encoding: group.encoding,
                tensors: group.names.len(),
                parameters: group.parameters,
                bytes: group.bytes,
                share: group.bytes as f64 / file_bytes as f64,
                baseline_bytes,
                kld,
                kld_per_mb_saved: (saved > 0.0).then(|| kld / (saved / 1e6)),
            }
        })
        .collect();
    let held: u64 = components.iter().map(|line| line.bytes).sum();
    Ok(ComponentCosts {
        components,
        rest_bytes: file_bytes.saturating_sub(held),
        file_bytes,
        kld: klds.next().expect("the whole model comes last"),
        looks_ahead: sees_later,
        windows: picked.len(),
        ctx: protocol.ctx,
        skip: protocol.skip,
    })
}

/// Windows of `ctx` tokens, spread evenly over the text.
fn pick(tokens: &[u32], ctx: usize, windows: usize) -> Result<Vec<&[u32]>> {
    let all: Vec<&[u32]> = tokens.chunks_exact(ctx).collect();
    if all.is_empty() {
        let why = format!("{} tokens do not fill one window of {ctx}; pass a smaller --ctx", tokens.len());
        return Err(Error::Tokens { source_name: "the text".into(), why });
    }
    let count = windows.clamp(1, all.len());
    Ok((0..count).map(|index| all[index * all.len() / count]).collect())
}

/// The baseline's tensors that the packed file has, too.
fn originals<'a>(packed: &PackedFile, baseline: &'a dyn TensorSource) -> Result<HashMap<String, Tensor<'a>>> {
    let scales: HashSet<&String> = packed.activations().iter().flat_map(|record| &record.scales).collect();
    let weights = packed.names().iter().filter(|name| !scales.contains(name));
    let one = |name: &String| {
        let (path, other) = (packed.path().display(), baseline.path().display());
        match (packed.shape(name), baseline.shape(name)) {
            (_, None) => {
                let why = format!("{other} has no tensor {name}, which {path} has: it is not what was packed");
                Err(Error::Incomparable { why })
            }
            (ours, theirs) if ours != theirs => {
                let why = format!("tensor {name} has another shape in {other} than in {path}");
                Err(Error::Incomparable { why })
            }
            _ => Ok((name.clone(), baseline.tensor(name)?)),
        }
    };
    weights.map(one).collect()
}

/// The lines of the table.
fn groups(packed: &PackedFile) -> Vec<Group> {
    let activations: HashMap<&String, u32> =
        packed.activations().iter().flat_map(|record| record.scales.iter().map(|name| (name, record.bits))).collect();
    let mut groups: Vec<Group> = Vec::new();
    for tensor in packed.tensors() {
        let bits = activations.get(&tensor.name);
        let encoding = bits.map_or_else(|| tensor.encoding.to_string(), |bits| format!("activations INT{bits}"));
        let known = groups.iter().position(|group| group.component == tensor.component && group.encoding == encoding);
        let index = known.unwrap_or_else(|| {
            let component = tensor.component.clone();
            let (names, activations) = (HashSet::new(), bits.is_some());
            groups.push(Group { component, encoding, names, parameters: 0, bytes: 0, activations });
            groups.len() - 1
        });
        let group = &mut groups[index];
        group.names.insert(tensor.name.clone());
        // As everywhere, the scales of activations are no weights.
        group.parameters += if bits.is_some() { 0 } else { tensor.elements() as u64 };
        group.bytes += tensor.bytes() as u64;
    }
    groups
}

/// The baseline with one group packed.
fn alone<'a>(packed: &'a PackedFile, originals: &'a HashMap<String, Tensor<'a>>, group: &Group) -> Mixed<'a> {
    let others = originals.iter().filter(|(name, _)| !group.names.contains(*name));
    let mixed = Mixed::new(packed, others.map(|(name, tensor)| (name.clone(), tensor.borrowed())).collect());
    if group.activations { mixed } else { mixed.without_activations() }
}

fn needs_whole_windows(model: &Model<CpuOps>) -> bool {
    model.runs_whole() || model.quantizes_core()
}

/// Each model's divergence from the original, summed over all scored positions. The models are of one config, so that
/// they take turns with one state.
fn divergences(
    cpu: Cpu,
    (original, exact): (&Model<CpuOps>, &CpuOps),
    (models, ops): (&[Model<CpuOps>], &CpuOps),
    windows: &[&[u32]],
    bos: Option<u32>,
    Protocol { ctx, skip }: Protocol,
    observer: &dyn Observer,
) -> Result<Vec<f64>> {
    let vocab_size = original.vocab_size();
    let rows = slice_rows(vocab_size, 2);
    let (mut original_state, mut state) = (original.state(ctx)?, models[0].state(ctx)?);
    let whole = needs_whole_windows(original) || models.iter().any(needs_whole_windows);
    let batch_tokens = if whole { ctx } else { BATCH };
    let mut sums = vec![0.0; models.len()];
    let (mut expected, mut found, mut compared) = (Vec::new(), Vec::new(), Vec::new());
    observer.begin("Comparing components", (windows.len() * (models.len() + 1) * ctx) as u64, Unit::Tokens);
    for window in windows {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        // Every model's hidden states of the window are far smaller than its logits.
        let run = |model: &Model<CpuOps>, ops: &CpuOps, state: &mut State<CpuOps>| -> Result<Vec<Values>> {
            state.clear(ops)?;
            let forward = |batch: &[u32]| {
                observer.check()?;
                let hidden = model.forward(batch, state)?;
                observer.advance(batch.len() as u64);
                Ok(hidden)
            };
            window.chunks(batch_tokens).map(forward).collect()
        };
        let hidden = run(original, exact, &mut original_state)?; // [batches], each [tokens, hidden_size]
        let others = models.iter().map(|model| run(model, ops, &mut state)).collect::<Result<Vec<_>>>()?;
        for (index, batch) in window.chunks(batch_tokens).enumerate() {
            for (row, targets) in slices(&window, index * batch_tokens, batch.len(), skip, rows) {
                exact.read(&original.logits(&hidden[index], row, targets.len())?, &mut expected)?;
                for ((model, hidden), sum) in models.iter().zip(&others).zip(&mut sums) {
                    observer.check()?;
                    ops.read(&model.logits(&hidden[index], row, targets.len())?, &mut found)?;
                    compared.clear();
                    compared.resize(targets.len(), Comparison::default());
                    cpu.compare_logits(&expected, &found, vocab_size, &mut compared);
                    *sum += compared.iter().map(|position| position.kl_divergence).sum::<f64>();
                }
            }
        }
    }
    observer.end();
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::pick;

    #[test]
    fn windows_are_spread_over_the_text() {
        let tokens: Vec<u32> = (0..103).collect();
        let firsts = |windows| pick(&tokens, 10, windows).unwrap().iter().map(|window| window[0]).collect::<Vec<_>>();
        assert_eq!(firsts(1), [0]);
        assert_eq!(firsts(4), [0, 20, 50, 70]);
        assert_eq!(firsts(99).len(), 10);
        assert!(pick(&tokens, 104, 1).is_err());
    }
}
