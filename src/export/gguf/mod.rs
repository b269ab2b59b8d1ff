//! GGUF, the file of llama.cpp: the Llama family and Mamba.
//!
//! Codes and scales move as they are where one of ggml's block types holds them, so nothing is rounded a second time;
//! what none holds becomes F16, or on request one of ggml's own quantized types. See `docs/gguf.md` of ggml for the
//! container.

mod blocks;
mod container;
mod entry;
mod fit;
mod kquants;
mod llama;
mod mamba;
mod pretokenizer;
mod tokenizer;

use std::{
    collections::{HashMap, HashSet},
    io::{BufWriter, Write},
    path::Path,
};

use bkpack_kernels::{Cpu, Matrix};
use half::f16;
use rayon::prelude::*;

use self::{
    blocks::BlockType,
    container::{Metadata, TensorInfo, Value, padded},
    entry::{Content, Description, Entry, Order, Piece},
    fit::{CodedRow, Fit},
};
use super::{ExportedTensor, Fidelity, Options, Plan, Refusal, plain::float_bytes};
use crate::{
    error::{Error, Result},
    format::{PackedFile, persist, temporary_beside, without_temporary_name},
    model::{self, Architecture},
    progress::{Observer, Unit},
    quant::write_floats,
    tensor::TensorSource,
};

/// How refusals and warnings name the runtime.
const RUNTIME: &str = "llama.cpp";

/// About so many bytes are encoded at a time.
const CHUNK_BYTES: usize = 8 << 20;

/// An export whose every byte but the tensors' data is known.
pub(super) struct Prepared<'a> {
    packed: &'a PackedFile,
    /// What the export will be.
    pub(super) plan: Plan,
    header: Vec<u8>,
    tensors: Vec<(Entry, Fit)>,
}

/// Says what an export would be. Values are read where the encodings alone do not decide what is lossless; nothing is
/// written.
///
/// A model that llama.cpp has no architecture for, or whose config.json or tokenizer GGUF cannot express, gives a plan
/// with a refusal.
///
/// # Errors
/// A tokenizer.json that is broken, a tensor that is missing or has another shape than config.json says.
pub(super) fn prepare<'a>(packed: &'a PackedFile, options: &Options, observer: &dyn Observer) -> Result<Prepared<'a>> {
    let Some(config) = packed.config() else {
        let why = "no config.json is inside, which says what the tensors are; see convert --config".into();
        return Ok(Prepared::impossible(packed, why));
    };
    let architecture = match Architecture::from_config(config) {
        Some(Architecture::ResNetBk) => {
            return Ok(Prepared::impossible(packed, "llama.cpp has no architecture for ResNet-BK".into()));
        }
        None => {
            let why = "the architecture that config.json names is none that bkpack knows to be llama.cpp's".into();
            return Ok(Prepared::impossible(packed, why));
        }
        Some(architecture) => architecture,
    };
    // Shapes are checked before anything is made of what config.json claims.
    let described = model::check_shapes(packed).and_then(|()| match architecture {
        Architecture::Mamba => mamba::describe(packed, config),
        family => llama::describe(packed, family, config),
    });
    let description = match described {
        // The other layouts hand config.json on; this one has to know what it means.
        Err(Error::Config { field, why, .. }) => {
            return Ok(Prepared::impossible(packed, format!("config.json: {field}: {why}")));
        }
        described => described?,
    };
    let tokenizer = tokenizer::describe(packed, description.vocab_size)?;
    let Description { mut metadata, entries, refusals, warnings, .. } = description;
    let refusal = |why: String| Refusal { runtime: RUNTIME.into(), why };
    let refusals: Vec<Refusal> = refusals.into_iter().chain(tokenizer.refusals).map(refusal).collect();
    let warnings: Vec<Refusal> = warnings.into_iter().chain(tokenizer.warnings).map(refusal).collect();

    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        observer.check()?;
        let fit = match &entry.content {
            Content::Rows(pieces) if !entry.wide => fit::fit(packed, pieces, entry.cols(), options)?,
            _ => Fit::wide(),
        };
        tensors.push((entry, fit));
    }
    let mut notices = left_out(packed, &tensors);
    notices.extend(tokenizer.notices);
    metadata.push(("general.quantization_version".into(), Value::U32(2)));
    metadata.push(("general.file_type".into(), Value::U32(most_common(&tensors).file_type())));
    metadata.extend(tokenizer.metadata);
    Ok(Prepared::possible(packed, &metadata, tensors, Plan { refusals, warnings, notices, ..Plan::empty() }))
}

impl<'a> Prepared<'a> {
    fn impossible(packed: &'a PackedFile, why: String) -> Self {
        let refusals = vec![Refusal { runtime: RUNTIME.into(), why }];
        Self { packed, plan: Plan { refusals, ..Plan::empty() }, header: Vec::new(), tensors: Vec::new() }
    }

    fn possible(packed: &'a PackedFile, metadata: &Metadata, tensors: Vec<(Entry, Fit)>, plan: Plan) -> Self {
        let infos = tensors.iter().map(|(entry, fit)| {
            let bytes = tensor_bytes(entry, fit);
            TensorInfo { name: &entry.name, shape: &entry.shape, kind: fit.kind, bytes }
        });
        let infos: Vec<TensorInfo> = infos.collect();
        let header = container::header(metadata, &infos);
        let data: u64 = infos.iter().map(|info| padded(info.bytes)).sum();
        let file_bytes = header.len() as u64 + data;
        let exported = exported(packed, &tensors);
        Self { packed, plan: Plan { tensors: exported, file_bytes, ..plan }, header, tensors }
    }

    /// Writes the file: all of it appears under its name, or nothing. Memory is bounded by a few megabytes of rows.
    ///
    /// # Errors
    /// [`Error::Exists`] unless `force`; [`Error::Io`], [`Error::Cancelled`].
    pub(super) fn write(&self, output: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
        let failed = |error| Error::io(output)(without_temporary_name(error));
        let temporary = temporary_beside(output)?;
        let mut file = BufWriter::with_capacity(1 << 20, temporary);
        observer.begin("Exporting", self.plan.file_bytes - self.header.len() as u64, Unit::Bytes);
        file.write_all(&self.header).map_err(failed)?;
        for (entry, fit) in &self.tensors {
            self.write_tensor(entry, fit, &mut |bytes| {
                observer.check()?;
                file.write_all(bytes).map_err(failed)?;
                observer.advance(bytes.len() as u64);
                Ok(())
            })?;
        }
        observer.end();
        let temporary = file.into_inner().map_err(|error| failed(error.into_error()))?;
        temporary.as_file().sync_data().map_err(Error::io(output))?;
        persist(temporary, output, force)
    }

    /// Hands out a tensor's data in pieces, its padding last.
    fn write_tensor(&self, entry: &Entry, fit: &Fit, emit: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match &entry.content {
            Content::Values(values) => emit(&encode_floats(fit.kind, values))?,
            Content::NegativeExp(name) => {
                let tensor = self.packed.tensor(name)?;
                let mut values = vec![0.0; tensor.elements()];
                Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
                values.iter_mut().for_each(|value| *value = -value.exp());
                emit(&encode_floats(fit.kind, &values))?;
            }
            Content::Rows(pieces) => {
                for piece in pieces {
                    let tensor = self.packed.tensor(&piece.tensor)?;
                    let shaped =
                        if entry.shape.len() == 1 { encode_vector(&tensor.matrix(), piece, fit.kind) } else { None };
                    match shaped {
                        Some(bytes) => emit(&bytes)?,
                        None => write_rows(&tensor.matrix(), piece, entry.cols(), fit, emit)?,
                    }
                }
            }
        }
        let bytes = tensor_bytes(entry, fit);
        emit(&vec![0; (padded(bytes) - bytes) as usize])
    }
}

fn encode_floats(kind: BlockType, values: &[f32]) -> Vec<u8> {
    float_bytes(values, kind.float().expect("only floats are encoded without blocks"))
}

/// A vector whose elements move as the rows of its matrix do.
fn encode_vector(w: &Matrix, piece: &Piece, kind: BlockType) -> Option<Vec<u8>> {
    let Order::Interleaved { .. } = piece.order else { return None };
    let mut values = vec![0.0; w.rows() * w.cols()];
    Cpu::detect().dequantize(w, 0, &mut values);
    let moved: Vec<f32> = (0..values.len()).map(|place| values[piece.order.source(place)]).collect();
    Some(encode_floats(kind, &moved))
}

/// Encodes the rows of a piece in their order, some at a time.
fn write_rows(
    w: &Matrix,
    piece: &Piece,
    cols: usize,
    fit: &Fit,
    emit: &mut impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let width = fit.kind.row_bytes(cols);
    let rows: Vec<usize> = (0..piece.rows.len()).map(|row| piece.rows.start + piece.order.source(row)).collect();
    let cpu = Cpu::detect();
    for rows in rows.chunks((CHUNK_BYTES / (4 * cols).max(width)).max(1)) {
        let mut out = vec![0; rows.len() * width];
        let pairs = out.par_chunks_exact_mut(width).zip(rows);
        if fit.moved {
            pairs.for_each_init(CodedRow::default, |coded, (out, &row)| move_row(w, row, coded, fit.kind, out));
        } else {
            pairs.for_each_init(
                || vec![0.0; cols],
                |values, (out, &row)| {
                    cpu.dequantize(w, row, values);
                    match fit.kind.float() {
                        Some(dtype) => write_floats(values, dtype, out),
                        None => kquants::write_row(fit.kind, values, out),
                    }
                },
            );
        }
        emit(&out)?;
    }
    Ok(())
}

/// Writes a quantized row, codes and scales as they are.
fn move_row(w: &Matrix, row: usize, coded: &mut CodedRow, kind: BlockType, out: &mut [u8]) {
    let layout = coded.read(w, row).expect("only quantized rows are moved");
    let blocks = coded.codes.chunks_exact(kind.columns()).zip(out.chunks_exact_mut(kind.bytes()));
    for (index, (codes, out)) in blocks.enumerate() {
        let group = index * kind.columns() / layout.group;
        blocks::write_block(kind, codes, coded.zeros[group], f16::from_f32(coded.scales[group]), out);
    }
}

/// Bytes of a tensor's data without padding.
fn tensor_bytes(entry: &Entry, fit: &Fit) -> u64 {
    (entry.elements() / entry.cols()) as u64 * fit.kind.row_bytes(entry.cols()) as u64
}

/// The type of most weights.
fn most_common(tensors: &[(Entry, Fit)]) -> BlockType {
    let mut counts: HashMap<BlockType, usize> = HashMap::new();
    tensors.iter().for_each(|(entry, fit)| *counts.entry(fit.kind).or_default() += entry.elements());
    let largest = counts.into_iter().max_by_key(|&(kind, count)| (count, kind.id()));
    largest.map_or(BlockType::F32, |(kind, _)| kind)
}

/// What becomes of each packed tensor that the export takes from, in the packed file's order.
fn exported(packed: &PackedFile, tensors: &[(Entry, Fit)]) -> Vec<ExportedTensor> {
    let mut uses: HashMap<&str, Vec<(&Entry, &Fit)>> = HashMap::new();
    for (entry, fit) in tensors {
        let mut sources = entry.sources();
        sources.dedup();
        sources.into_iter().for_each(|source| uses.entry(source).or_default().push((entry, fit)));
    }
    let one = |name: &String| {
        let (uses, source) = (uses.get(name.as_str())?, packed.entry(name)?);
        let mut targets: Vec<&str> = uses.iter().map(|(_, fit)| fit.kind.name()).collect();
        targets.dedup();
        let is_negative_exp = |entry: &Entry| matches!(entry.content, Content::NegativeExp(_));
        let fidelity = if uses.iter().any(|(entry, _)| is_negative_exp(entry)) {
            Fidelity::Rounded { why: "llama.cpp holds -exp(A_log)".into() }
        } else {
            let rounded = uses.iter().map(|(_, fit)| &fit.fidelity).find(|fidelity| **fidelity != Fidelity::Lossless);
            rounded.cloned().unwrap_or(Fidelity::Lossless)
        };
        Some(ExportedTensor {
            name: name.clone(),
            names: uses.iter().map(|(entry, _)| entry.name.clone()).collect(),
            shape: source.shape.clone(),
            encoding: source.encoding,
            target: targets.join(", "),
            bytes: uses.iter().map(|(entry, fit)| share(entry, fit, name)).sum(),
            fidelity,
        })
    };
    packed.names().iter().filter_map(one).collect()
}

/// Bytes that a packed tensor contributes to a tensor of the export.
fn share(entry: &Entry, fit: &Fit, source: &str) -> u64 {
    let Content::Rows(pieces) = &entry.content else { return tensor_bytes(entry, fit) };
    let taken: usize = pieces.iter().filter(|piece| piece.tensor == source).map(|piece| piece.rows.len()).sum();
    taken as u64 * fit.kind.row_bytes(entry.cols()) as u64
}

/// Names the packed tensors that no tensor of the export comes from.
fn left_out(packed: &PackedFile, tensors: &[(Entry, Fit)]) -> Vec<String> {
    let used: HashSet<&str> = tensors.iter().flat_map(|(entry, _)| entry.sources()).collect();
    let unused: Vec<&str> = packed.names().iter().map(String::as_str).filter(|name| !used.contains(name)).collect();
    match unused.as_slice() {
        [] => Vec::new(),
        [name] => vec![format!("tensor {name} is none that the architecture has, and is left out")],
        [first, rest @ ..] => {
            vec![format!(
                "{first} and {} more tensors are none that the architecture has, and are left out",
                rest.len()
            )]
        }
    }
}
