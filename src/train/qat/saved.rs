//! An interrupted training, kept so that it goes on as if it had not been: a safetensors file with the weights, what the
//! optimizer remembers, and the record so far.

use std::{collections::BTreeMap, path::Path};

use bkpack_kernels::Data as Values;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{adamw::Slot, options::Options, parameter::Parameter, record::History, windows::Data};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    format::write_file,
    mmap::FileMap,
    pack::PackOptions,
    progress::Observer,
    tensor::TensorSource,
};

/// The metadata key of the record.
const RECORD: &str = "bkpack_training";

/// The metadata key of the hash over the record and the tensors.
const SEAL: &str = "bkpack_training_blake3";

/// What is no tensor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Of everything that the trained weights depend on.
    key: String,
    /// A hash of the text that the perplexities were measured on, where there was one.
    validation: Option<String>,
    history: History,
}

/// The slots of a parameter under the names of their tensors.
fn slots(parameter: &Parameter) -> impl Iterator<Item = (String, &Slot)> {
    let scales = parameter.scales.as_ref().map(|scales| (format!("{}_scale", parameter.name), &scales.multiples));
    [(parameter.name.clone(), &parameter.weights)].into_iter().chain(scales)
}

fn parts<'a>(name: &str, slot: &'a Slot) -> [(String, &'a Vec<f32>); 3] {
    [
        (format!("weights/{name}"), &slot.values),
        (format!("first/{name}"), &slot.first),
        (format!("second/{name}"), &slot.second),
    ]
}

/// A hash over a record and the slots that it is saved with.
fn seal(record: &str, parameters: &[Parameter]) -> String {
    let mut hasher = blake3::Hasher::new();
    add(&mut hasher, record.as_bytes());
    for (name, slot) in parameters.iter().flat_map(slots) {
        add(&mut hasher, name.as_bytes());
        parts(&name, slot).iter().for_each(|(_, values)| add(&mut hasher, bytemuck::cast_slice(values)));
    }
    hasher.finalize().to_hex().to_string()
}

/// Hashes a piece so that no two rows of pieces hash alike.
fn add(hasher: &mut blake3::Hasher, piece: &[u8]) {
    hasher.update(&(piece.len() as u64).to_le_bytes()).update_rayon(piece);
}

fn validation_hash(data: &Data) -> Option<String> {
    let tokens = data.validation.as_ref()?;
    Some(blake3::hash(bytemuck::cast_slice(tokens)).to_hex().to_string())
}

/// Refuses a path under which something stands that is no state of a training, so that none is ever replaced.
///
/// # Errors
/// [`Error::Training`].
pub fn check_saved(path: &Path) -> Result<()> {
    let record = || {
        let map = FileMap::open(path).ok()?;
        let (_, metadata) = SafeTensors::read_metadata(&map).ok()?;
        metadata.metadata().as_ref()?.contains_key(RECORD).then_some(())
    };
    if std::fs::symlink_metadata(path).is_err() || record().is_some() {
        return Ok(());
    }
    let why =
        "stands where the state of the training is saved, but is not one; move it away or choose another --output";
    Err(Error::Training { path: path.to_owned(), why: why.into() })
}

/// Replaces the file in one step.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn save(path: &Path, key: &str, parameters: &[Parameter], (history, data): (&History, &Data)) -> Result<()> {
    let record = Record { key: key.to_owned(), validation: validation_hash(data), history: history.clone() };
    let record = serde_json::to_string(&record).expect("plain numbers and strings");
    let seal = seal(&record, parameters);
    let mut tensors = Vec::new();
    for (name, slot) in parameters.iter().flat_map(slots) {
        for (name, values) in parts(&name, slot) {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, vec![values.len()], bytes).expect("the values fill the shape");
            tensors.push((name, view));
        }
    }
    let metadata = [(RECORD.to_owned(), record), (SEAL.to_owned(), seal)].into();
    let bytes = safetensors::serialize(tensors, Some(metadata)).expect("names are different");
    write_file(&bytes, path, true)
}

/// Brings parameters to where they were saved; returns the record so far, without perplexities of another text than that
/// of `data`.
///
/// # Errors
/// [`Error::Training`] where the file is no such file, another run's, or was changed; [`Error::Io`].
pub(super) fn restore(path: &Path, key: &str, parameters: &mut [Parameter], data: &Data) -> Result<History> {
    let refuse = |why: &str| Error::Training {
        path: path.to_owned(),
        why: format!("{why}; pass --force instead of --resume to start anew"),
    };
    let map = FileMap::open(path)?;
    let wrong = || refuse("is not as a training left it, so it was damaged");
    let file = SafeTensors::deserialize(&map).map_err(|_| wrong())?;
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|_| wrong())?;
    let text = |key| metadata.metadata().as_ref().and_then(|metadata| metadata.get(key)).ok_or_else(wrong);
    let (written, sealed) = (text(RECORD)?, text(SEAL)?);
    let mut record: Record = serde_json::from_str(written).map_err(|_| wrong())?;
    if record.key != key {
        return Err(refuse("belongs to a training of another model, on another text or with other options"));
    }
    let read = |name: String, values: &mut Vec<f32>| -> Result<()> {
        let tensor = file.tensor(&name).map_err(|_| wrong())?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [values.len()] {
            return Err(wrong());
        }
        for (value, bytes) in values.iter_mut().zip(tensor.data().as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(())
    };
    for parameter in &mut *parameters {
        let name = parameter.name.clone();
        let scales = parameter.scales.as_mut().map(|scales| (format!("{name}_scale"), &mut scales.multiples));
        for (name, slot) in [(name, &mut parameter.weights)].into_iter().chain(scales) {
            read(format!("weights/{name}"), &mut slot.values)?;
            read(format!("first/{name}"), &mut slot.first)?;
            read(format!("second/{name}"), &mut slot.second)?;
        }
    }
    if seal(written, parameters) != *sealed {
        return Err(wrong());
    }
    if record.validation != validation_hash(data) {
        (record.history.baseline_ppl, record.history.validation) = (None, Vec::new());
    }
    Ok(record.history)
}

/// A hash of everything that the trained weights depend on.
pub(super) fn key(
    checkpoint: &Checkpoint,
    teacher: Option<&dyn TensorSource>,
    pack: &PackOptions,
    options: &Options,
    (data, bos): (&Data, Option<u32>),
    parameters: &[Parameter],
    observer: &dyn Observer,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let requests: BTreeMap<&str, String> = parameters
        .iter()
        .map(|parameter| (parameter.name.as_str(), parameter.alternative.request.to_string()))
        .collect();
    let packing = (pack.ternary_threshold, format!("{:?}", pack.rounding), pack.allow_nonfinite);
    let teacher_says = teacher.map(|teacher| (teacher.config(), teacher.activations()));
    let how = ("qat 2", options, requests, packing, bos, checkpoint.config(), teacher_says);
    add(&mut hasher, serde_json::to_string(&how).expect("plain numbers and strings").as_bytes());
    add(&mut hasher, bytemuck::cast_slice(&data.tokens));
    for parameter in parameters {
        observer.check()?;
        add(&mut hasher, bytemuck::cast_slice(&parameter.weights.values));
        if let Some(scales) = &parameter.scales {
            add(&mut hasher, bytemuck::cast_slice(&scales.initial));
        }
    }
    if let Some(teacher) = teacher {
        for name in teacher.names() {
            observer.check()?;
            let tensor = teacher.tensor(name)?;
            let matrix = tensor.matrix();
            let (kind, parts) = match matrix.data() {
                Values::Float { dtype, values } => (format!("{dtype:?}"), [values, &[], &[]]),
                Values::Quantized { layout, codes, scale_type, scales, zeros } => {
                    (format!("{layout:?} {scale_type:?}"), [codes, scales, zeros])
                }
            };
            add(&mut hasher, format!("{name:?} {:?} {kind}", tensor.shape()).as_bytes());
            parts.into_iter().for_each(|part| add(&mut hasher, part));
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
