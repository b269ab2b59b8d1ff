//! An interrupted training, kept so that it goes on as if it had not been: a safetensors file with the weights, what the
//! optimizer remembers, and the record so far.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use bkpack_kernels::Data as Values;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{
    adamw::Slot,
    options::Options,
    parameter::{LearnedScales, Parameter},
    record::History,
    windows::Data,
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    format::write_file,
    mmap::FileMap,
    pack::PackOptions,
    tensor::TensorSource,
};

/// The metadata key of the record.
const RECORD: &str = "bkpack_training";

/// What is no tensor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Of everything that the trained weights depend on.
    key: String,
    history: History,
    /// The unit of each tensor's learned scales, as bits of an f32.
    units: Vec<(String, u32)>,
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

/// Replaces the file in one step.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn save(path: &Path, key: &str, parameters: &[Parameter], history: &History) -> Result<()> {
    let unit = |parameter: &Parameter| Some((parameter.name.clone(), parameter.scales.as_ref()?.unit.to_bits()));
    let units = parameters.iter().filter_map(unit).collect();
    let record = Record { key: key.to_owned(), history: history.clone(), units };
    let record = serde_json::to_string(&record).expect("plain numbers and strings");
    let mut tensors = Vec::new();
    for (name, slot) in parameters.iter().flat_map(slots) {
        for (name, values) in parts(&name, slot) {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, vec![values.len()], bytes).expect("the values fill the shape");
            tensors.push((name, view));
        }
    }
    let metadata = [(RECORD.to_owned(), record)].into();
    let bytes = safetensors::serialize(tensors, Some(metadata)).expect("names are different");
    write_file(&bytes, path, true)
}

/// Brings parameters to where they were saved; returns the record so far.
///
/// # Errors
/// [`Error::Training`] where the file is no such file, another run's, or lacks something; [`Error::Io`].
pub(super) fn restore(path: &Path, key: &str, parameters: &mut [Parameter]) -> Result<History> {
    let refuse = |why: &str| Error::Training { path: path.to_owned(), why: why.into() };
    let map = FileMap::open(path)?;
    let foreign = || refuse("is not what an interrupted training leaves; run without --resume to start anew");
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|_| foreign())?;
    let record = metadata.metadata().as_ref().and_then(|metadata| metadata.get(RECORD)).ok_or_else(foreign)?;
    let record: Record = serde_json::from_str(record).map_err(|_| foreign())?;
    if record.key != key {
        let why = "belongs to a training of another model, on another text or with other options; run without --resume to \
                   start anew";
        return Err(refuse(why));
    }
    let file = SafeTensors::deserialize(&map).map_err(|_| foreign())?;
    let read = |name: String, values: &mut Vec<f32>| -> Result<()> {
        let wrong = || refuse("does not hold what it must, so it was damaged; run without --resume to start anew");
        let tensor = file.tensor(&name).map_err(|_| wrong())?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [values.len()] {
            return Err(wrong());
        }
        let bytes = Cow::from(tensor.data());
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        values.iter().all(|value| value.is_finite()).then_some(()).ok_or_else(wrong)
    };
    for parameter in parameters {
        let unit = record.units.iter().find(|(name, _)| *name == parameter.name);
        match (&mut parameter.scales, unit) {
            (Some(LearnedScales { unit, .. }), Some((_, bits))) => *unit = f32::from_bits(*bits),
            (None, None) => {}
            _ => return Err(refuse("does not hold what it must; run without --resume to start anew")),
        }
        let name = parameter.name.clone();
        let scales = parameter.scales.as_mut().map(|scales| (format!("{name}_scale"), &mut scales.multiples));
        for (name, slot) in [(name, &mut parameter.weights)].into_iter().chain(scales) {
            read(format!("weights/{name}"), &mut slot.values)?;
            read(format!("first/{name}"), &mut slot.first)?;
            read(format!("second/{name}"), &mut slot.second)?;
        }
    }
    Ok(record.history)
}

/// A hash of everything that the trained weights depend on.
pub(super) fn key(
    checkpoint: &Checkpoint,
    teacher: Option<&dyn TensorSource>,
    pack: &PackOptions,
    options: &Options,
    data: &Data,
    parameters: &[Parameter],
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let requests: BTreeMap<&str, String> = parameters
        .iter()
        .map(|parameter| (parameter.name.as_str(), parameter.alternative.request.to_string()))
        .collect();
    let how = (options, requests, pack.ternary_threshold);
    hasher.update(serde_json::to_string(&how).expect("plain numbers and strings").as_bytes());
    hasher.update(format!("qat 1 {:?} {}", pack.rounding, checkpoint.config().is_some()).as_bytes());
    hasher.update_rayon(bytemuck::cast_slice(&data.tokens));
    for parameter in parameters {
        hasher.update_rayon(bytemuck::cast_slice(&parameter.weights.values));
    }
    if let Some(teacher) = teacher {
        for name in teacher.names() {
            let tensor = teacher.tensor(name)?;
            let matrix = tensor.matrix();
            hasher.update(format!("{name:?} {:?}", tensor.shape()).as_bytes());
            let parts = match matrix.data() {
                Values::Float { values, .. } => [values, &[], &[]],
                Values::Quantized { codes, scales, zeros, .. } => [codes, scales, zeros],
            };
            for part in parts {
                hasher.update_rayon(part);
            }
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
