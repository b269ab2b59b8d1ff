//! What a training leaves: an ordinary folder of the trained weights, and in it the packed file.

use std::{collections::HashMap, io::Write, path::Path};

use bkpack_kernels::Cpu;
use safetensors::Dtype;
use serde_json::Value;

use super::trainer::Trained;
use crate::{
    checkpoint::{self, Checkpoint, header::Header},
    error::{Error, Result},
    folder::{
        CONFIG, INDEX, PartialFolder, SINGLE, Shards, StoredTensor, TRAVELLING_FILES, check_disk,
        check_target as check_folder, to_json, weight_files,
    },
    format::{PackedFile, amend::with_activations},
    mmap::FileMap,
    pack::{PackOptions, Packing, outline},
    progress::Observer,
    tensor::TensorSource,
};

/// The most data of one file of weights, as Hugging Face cuts them.
const SHARD_BYTES: u64 = 5_000_000_000;

/// The metadata key of the weights that a training wrote.
const MARK: &str = "bkpack_qat";

/// The name of the packed file in the folder.
const PACKED: &str = "model.bkpack";

/// Refuses a folder that must not be written to: one that is not empty (unless `force`), and one with weights that no
/// training wrote.
///
/// # Errors
/// [`Error::Exists`], [`Error::BadOutput`].
pub fn check_target(output: &Path, force: bool) -> Result<()> {
    check_folder(output, force, &replaceable).map(drop)
}

/// Bytes of the folder of weights and of the packed file, as they would be without training.
///
/// # Errors
/// As [`Packing::plan`].
pub fn file_bytes(
    cpu: Cpu,
    checkpoint: &Checkpoint,
    pack: &PackOptions,
    observer: &dyn Observer,
) -> Result<(u64, u64)> {
    let packing = Packing::plan(checkpoint, pack, Path::new(PACKED), cpu, observer)?;
    Ok((folder_bytes(checkpoint, &shards(&groups(checkpoint, pack)?))?, packing.file_bytes()))
}

/// Refuses a disk without room for the output and, beside it, for a state of `state` bytes in `saved`, which is replaced by
/// writing another.
///
/// # Errors
/// [`Error::BadOutput`].
pub fn check_room(
    (output, saved): (&Path, &Path),
    checkpoint: &Checkpoint,
    pack: &PackOptions,
    state: u64,
) -> Result<()> {
    let folder = 2 * folder_bytes(checkpoint, &shards(&groups(checkpoint, pack)?))?;
    let home = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let held = std::fs::metadata(saved).map_or(0, |found| found.len());
    check_disk(output, home, (state + state.max(folder)).saturating_sub(held))
}

fn shards(groups: &[Vec<StoredTensor>]) -> Shards {
    Shards::plan(groups, SHARD_BYTES, &[("format", "pt"), (MARK, "1")])
}

/// Bytes of the weights and of the files that belong to the model. The packed file is no larger, but for its copies of the
/// small files.
fn folder_bytes(checkpoint: &Checkpoint, shards: &Shards) -> Result<u64> {
    let files: u64 = travelling(checkpoint)?.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    Ok(shards.file_bytes() + files)
}

/// Whether a folder may be replaced: one whose weights a training wrote, or without any file that could be of a model.
fn replaceable(folder: &Path) -> Result<(), String> {
    let files = weight_files(folder).map_err(|error| error.to_string())?;
    let weights: Vec<&String> = files.iter().filter(|name| *name != INDEX).collect();
    for &name in &weights {
        let path = folder.join(name);
        let marked = FileMap::open(&path).and_then(|map| Header::read(&path, &map));
        if !marked.is_ok_and(|header| header.metadata.contains_key(MARK)) {
            return Err(format!("holds {name}, which no training wrote"));
        }
    }
    let mut others = [INDEX, SINGLE, PACKED].into_iter().chain(TRAVELLING_FILES);
    match others.find(|name| weights.is_empty() && folder.join(name).exists()) {
        Some(name) => Err(format!("holds {name}, but no weights that a training wrote")),
        None => Ok(()),
    }
}

/// The tensors of the folder: those that packing stores, in F32.
fn groups(checkpoint: &Checkpoint, pack: &PackOptions) -> Result<Vec<Vec<StoredTensor>>> {
    let outline = outline(checkpoint, &pack.policy, &mut Vec::new())?;
    let stored = |name: String, shape| vec![StoredTensor { name, dtype: Dtype::F32, shape }];
    Ok(outline.into_iter().map(|info| stored(info.name, info.shape)).collect())
}

/// The files that belong to the model, its config with the type of the new weights.
fn travelling(checkpoint: &Checkpoint) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut files = Vec::new();
    if let Some(Value::Object(config)) = checkpoint.config() {
        let mut config = config.clone();
        let keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
        for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
            config.insert(key.into(), "float32".into());
        }
        files.push((CONFIG, to_json(&Value::Object(config))));
    }
    for name in TRAVELLING_FILES.into_iter().filter(|name| *name != CONFIG) {
        if let Some(bytes) = checkpoint.file(name)? {
            files.push((name, bytes.into_owned()));
        }
    }
    Ok(files)
}

impl Trained {
    /// Writes the folder: the trained weights in F32, the files that belong to the model, and `model.bkpack`, which holds bit
    /// for bit what the weights were trained through. All of it appears, or nothing. Returns the bytes of the packed file.
    ///
    /// # Errors
    /// As [`check_target`] and [`Packing::write`]; [`Error::Cancelled`].
    pub fn write(
        &self,
        cpu: Cpu,
        checkpoint: &Checkpoint,
        pack: PackOptions,
        (output, force): (&Path, bool),
        observer: &dyn Observer,
    ) -> Result<u64> {
        let groups = groups(checkpoint, &pack)?;
        let shards = shards(&groups);
        let files = travelling(checkpoint)?;
        let needed = 2 * folder_bytes(checkpoint, &shards)?;
        let partial = PartialFolder::create(output, force, needed, &replaceable)?;
        let weights: HashMap<&str, &Vec<f32>> =
            self.parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.weights.values)).collect();
        for shard in &shards.files {
            let path = partial.path(&shard.name);
            let mut bytes = shard.header.clone();
            bytes.resize(shard.bytes as usize, 0);
            for (group, offsets) in groups[shard.groups.clone()].iter().zip(&shard.offsets) {
                observer.check()?;
                let name = &group[0].name;
                let place = &mut bytes[offsets[0] as usize..][..group[0].bytes()];
                let untrained;
                let values = match weights.get(name.as_str()) {
                    Some(values) => *values,
                    None => {
                        let tensor = checkpoint.tensor(name)?;
                        let mut values = vec![0.0; tensor.elements()];
                        cpu.dequantize(&tensor.matrix(), 0, &mut values);
                        untrained = values;
                        &untrained
                    }
                };
                for (bytes, value) in place.as_chunks_mut().0.iter_mut().zip(values) {
                    *bytes = value.to_le_bytes();
                }
            }
            let mut file = partial.file(&shard.name)?;
            file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
        }
        for (name, bytes) in &files {
            partial.write(name, bytes)?;
        }
        if let Some(index) = &shards.index {
            partial.write(INDEX, index)?;
        }
        let packed_bytes = self.pack(cpu, pack, partial.temporary(), observer)?;
        let mut names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        names.extend(shards.files.iter().map(|shard| shard.name.as_str()));
        names.extend(shards.index.is_some().then_some(INDEX));
        names.push(PACKED);
        let others: Vec<&str> = TRAVELLING_FILES.into_iter().chain([PACKED]).collect();
        partial.finish(&names, &others)?;
        Ok(packed_bytes)
    }

    /// Packs the weights of a folder into it.
    fn pack(&self, cpu: Cpu, mut pack: PackOptions, folder: &Path, observer: &dyn Observer) -> Result<u64> {
        let learned = self.parameters.iter().filter_map(|parameter| {
            let scales = parameter.scales.as_ref()?;
            Some((parameter.name.clone(), scales.values()))
        });
        pack.scales = learned.collect();
        let trained = checkpoint::open(folder)?;
        let path = folder.join(PACKED);
        Packing::plan(&trained, &pack, &path, cpu, observer)?.write(cpu, false, observer)?;
        if let Some(calibration) = &self.calibration {
            let packed = PackedFile::open(&path)?;
            with_activations(
                &packed,
                vec![calibration.record.clone()],
                calibration.scales.clone(),
                &path,
                true,
                observer,
            )?;
        }
        Ok(std::fs::metadata(&path).map_err(Error::io(&path))?.len())
    }
}
