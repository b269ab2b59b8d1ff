//! Checkpoints of the real shapes of known models with random weights, for work on size, memory and speed.

mod presets;
mod tensors;
mod values;

use std::{
    fs::File,
    io::{ErrorKind, Write},
    path::Path,
};

use bkpack_kernels::FloatType;
use rayon::prelude::*;
use serde_json::{Value, json};

pub use self::presets::Preset;
use self::{
    tensors::{LAYER_COUNTS, SynthTensor, tensors},
    values::{BLOCK, fill},
};
use crate::{
    encoding::FloatName,
    error::{Error, Result},
    folder::{CONFIG, INDEX, PartialFolder, Shard, Shards, StoredTensor, to_json, weight_files},
    model::config::{SYNTHETIC_KEY, is_synthetic},
    progress::{Observer, Unit},
    quant::write_floats,
};

/// Blocks that are drawn while those before them are written: 4 MiB of FP32.
const BATCH: usize = 16;

/// Bytes after which the disk is waited for, so that the rate shown is the disk's and stopping does not wait for
/// gigabytes that the system has yet to write.
const SYNC_BYTES: usize = 256 << 20;

/// What to make of a preset.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Type of every tensor.
    pub dtype: FloatType,
    /// Other seeds give other values; the same seed the same bytes.
    pub seed: u64,
    /// Fewer layers than the preset has.
    pub layers: Option<usize>,
    /// The most tensor data of one file (more where one tensor alone is larger).
    pub shard_bytes: u64,
}

/// A synthetic checkpoint, planned to the byte.
pub struct Synthesis {
    options: Options,
    tensors: Vec<SynthTensor>,
    shards: Shards,
    config: Vec<u8>,
}

/// At most [`BLOCK`] values of a tensor.
struct Block<'a> {
    tensor: &'a SynthTensor,
    start: usize,
    len: usize,
}

impl Synthesis {
    /// Plans the files of a checkpoint with the shapes of `preset`.
    ///
    /// # Errors
    /// [`Error::Option`] if the preset has fewer layers than asked for, or none are.
    pub fn plan(preset: &Preset, options: &Options) -> Result<Self> {
        let config = config(preset, options)?;
        let tensors = tensors(&config);
        let dtype = FloatName::from(options.dtype).safetensors();
        let stored =
            |tensor: &SynthTensor| vec![StoredTensor { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() }];
        let shards =
            Shards::plan(&tensors.iter().map(stored).collect::<Vec<_>>(), options.shard_bytes, &[("format", "pt")]);
        Ok(Self { options: *options, tensors, shards, config: to_json(&config) })
    }

    /// The number of weights; a tied output head is none.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.elements() as u64).sum()
    }

    /// The number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// The number of files of weights.
    pub fn shard_count(&self) -> usize {
        self.shards.files.len()
    }

    /// Bytes on disk of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.shards.file_bytes() + self.config.len() as u64
    }

    /// Writes the checkpoint: all of it appears under its name, or nothing.
    ///
    /// With `force` an earlier synthetic checkpoint in `folder` is replaced; a real model never is.
    ///
    /// # Errors
    /// [`Error::Exists`] if the folder holds files (unless `force`), [`Error::BadOutput`] if it holds a real model, is no
    /// folder or its disk has too little room; [`Error::Io`], [`Error::Cancelled`].
    pub fn write(&self, folder: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
        let partial = PartialFolder::create(folder, force, self.file_bytes(), &replaceable)?;
        observer.begin("Writing", self.data_bytes(), Unit::Bytes);
        for shard in &self.shards.files {
            let mut file = partial.file(&shard.name)?;
            file.write_all(&shard.header).map_err(Error::io(folder.join(&shard.name)))?;
            self.write_tensors(shard, &mut file, &folder.join(&shard.name), observer)?;
        }
        observer.end();
        // The mark comes first, so that no random weights ever stand without it; the index, which opens them, last.
        let mut names = vec![CONFIG];
        partial.write(CONFIG, &self.config)?;
        names.extend(self.shards.files.iter().map(|shard| shard.name.as_str()));
        if let Some(index) = &self.shards.index {
            partial.write(INDEX, index)?;
            names.push(INDEX);
        }
        partial.finish(&names, &[])
    }

    /// Draws blocks and writes those before them at the same time.
    fn write_tensors(&self, shard: &Shard, file: &mut File, path: &Path, observer: &dyn Observer) -> Result<()> {
        // All of one type, so the file holds them in this order.
        let mut blocks = self.tensors[shard.groups.clone()].iter().flat_map(blocks);
        let (mut ready, mut drawn, mut unsynced) = (Vec::new(), Vec::new(), 0);
        loop {
            observer.check()?;
            let batch: Vec<Block> = blocks.by_ref().take(BATCH).collect();
            if batch.is_empty() && ready.is_empty() {
                return file.sync_data().map_err(Error::io(path));
            }
            unsynced += ready.len();
            let sync = unsynced >= SYNC_BYTES;
            let write = || file.write_all(&ready).and_then(|()| if sync { file.sync_data() } else { Ok(()) });
            let (written, ()) = rayon::join(write, || self.draw(&batch, &mut drawn));
            written.map_err(Error::io(path))?;
            observer.advance(ready.len() as u64);
            unsynced = if sync { 0 } else { unsynced };
            std::mem::swap(&mut ready, &mut drawn);
        }
    }

    /// Fills `bytes` with the values of the blocks.
    fn draw(&self, blocks: &[Block], bytes: &mut Vec<u8>) {
        let Options { dtype, seed, .. } = self.options;
        bytes.resize(blocks.iter().map(|block| block.len * dtype.bytes()).sum(), 0);
        let mut rest = bytes.as_mut_slice();
        let tasks: Vec<(&Block, &mut [u8])> = blocks
            .iter()
            .map(|block| {
                let (bytes, after) = std::mem::take(&mut rest).split_at_mut(block.len * dtype.bytes());
                rest = after;
                (block, bytes)
            })
            .collect();
        tasks.into_par_iter().for_each_init(
            || vec![0.0; BLOCK],
            |values, (block, bytes)| {
                let values = &mut values[..block.len];
                fill(block.tensor, seed, block.start, values);
                write_floats(values, dtype, bytes);
            },
        );
    }

    fn data_bytes(&self) -> u64 {
        self.parameters() * self.options.dtype.bytes() as u64
    }
}

fn blocks(tensor: &SynthTensor) -> impl Iterator<Item = Block<'_>> {
    let elements = tensor.elements();
    (0..elements).step_by(BLOCK).map(move |start| Block { tensor, start, len: BLOCK.min(elements - start) })
}

/// The preset's config.json with the mark, the type, and the number of layers asked for.
fn config(preset: &Preset, options: &Options) -> Result<Value> {
    let mut config = preset.config.clone();
    if let Some(layers) = options.layers {
        if !(1..=preset.layers()).contains(&layers) {
            let why = format!("{layers} is not from 1 to the {} layers of {}", preset.layers(), preset.name);
            return Err(Error::Option { option: "--layers", why });
        }
        for key in LAYER_COUNTS {
            if let Some(count) = config.get_mut(key) {
                *count = layers.into();
            }
        }
    }
    config["torch_dtype"] = FloatName::from(options.dtype).torch().into();
    config[SYNTHETIC_KEY] = json!({ "preset": preset.name, "seed": options.seed });
    Ok(config)
}

/// Whether a folder may be replaced: not one with weights or a config that are not marked as synthetic; what cannot be
/// read is taken for real.
fn replaceable(folder: &Path) -> Result<(), String> {
    let real = "holds a model that is not synthetic";
    match std::fs::read(folder.join(CONFIG)) {
        Ok(bytes) if serde_json::from_slice(&bytes).is_ok_and(|config: Value| is_synthetic(&config)) => Ok(()),
        Ok(_) => Err(real.into()),
        Err(error) if error.kind() == ErrorKind::NotFound => match weight_files(folder) {
            Ok(files) if files.is_empty() => Ok(()),
            Ok(_) => Err(real.into()),
            Err(error) => Err(format!("cannot be read ({error})")),
        },
        Err(error) => Err(format!("holds a config.json that cannot be read ({error})")),
    }
}
