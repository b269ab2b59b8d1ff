//! Checkpoints of the real shapes of known models with random weights, for work on size, memory and speed.

mod folder;
mod presets;
mod tensors;
mod values;

use std::{fs::File, io::Write, path::Path};

use bkpack_kernels::FloatType;
use rayon::prelude::*;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::{Map, Value, json};

pub use self::presets::Preset;
use self::{
    folder::PartialFolder,
    tensors::{LAYER_COUNTS, SynthTensor, tensors},
    values::{BLOCK, fill},
};
use crate::{
    error::{Error, Result},
    model::config::SYNTHETIC_KEY,
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
    shards: Vec<Shard>,
    config: Vec<u8>,
    /// The index of a checkpoint of several shards.
    index: Option<Vec<u8>>,
}

/// One file of weights.
struct Shard {
    name: String,
    header: Vec<u8>,
    tensors: Vec<SynthTensor>,
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
        let shards = split(tensors(&config), options);
        let index = (shards.len() > 1).then(|| render_index(&shards, options.dtype));
        Ok(Self { options: *options, shards, config: to_json(&config), index })
    }

    /// The number of weights; a tied output head is none.
    pub fn parameters(&self) -> u64 {
        self.tensors().map(|tensor| tensor.elements() as u64).sum()
    }

    /// The number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors().count()
    }

    /// The number of files of weights.
    pub fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// Bytes on disk of all files together.
    pub fn file_bytes(&self) -> u64 {
        let headers: usize = self.shards.iter().map(|shard| shard.header.len()).sum();
        let others = self.config.len() + self.index.as_ref().map_or(0, Vec::len);
        self.data_bytes() + (headers + others) as u64
    }

    /// Writes the checkpoint: all of it appears under its name, or nothing.
    ///
    /// With `force` an earlier synthetic checkpoint in `folder` is replaced; a real model never is.
    ///
    /// # Errors
    /// [`Error::Exists`] if the folder holds files (unless `force`), [`Error::BadOutput`] if it holds a real model, is no
    /// folder or its disk has too little room; [`Error::Io`], [`Error::Cancelled`].
    pub fn write(&self, folder: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
        let partial = PartialFolder::create(folder, force, self.file_bytes())?;
        observer.begin("Writing", self.data_bytes(), Unit::Bytes);
        for shard in &self.shards {
            let mut file = partial.file(&shard.name)?;
            file.write_all(&shard.header).map_err(Error::io(folder.join(&shard.name)))?;
            self.write_tensors(shard, &mut file, &folder.join(&shard.name), observer)?;
        }
        observer.end();
        // The mark comes first, so that no random weights ever stand without it; the index, which opens them, last.
        let mut names = vec!["config.json"];
        write_whole(&partial, folder, "config.json", &self.config)?;
        names.extend(self.shards.iter().map(|shard| shard.name.as_str()));
        if let Some(index) = &self.index {
            write_whole(&partial, folder, folder::INDEX, index)?;
            names.push(folder::INDEX);
        }
        partial.finish(&names)
    }

    /// Draws blocks and writes those before them at the same time.
    fn write_tensors(&self, shard: &Shard, file: &mut File, path: &Path, observer: &dyn Observer) -> Result<()> {
        let mut blocks = shard.tensors.iter().flat_map(blocks);
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

    fn tensors(&self) -> impl Iterator<Item = &SynthTensor> {
        self.shards.iter().flat_map(|shard| &shard.tensors)
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
    config["torch_dtype"] = match options.dtype {
        FloatType::F32 => "float32".into(),
        FloatType::F16 => "float16".into(),
        FloatType::BF16 => "bfloat16".into(),
    };
    config[SYNTHETIC_KEY] = json!({ "preset": preset.name, "seed": options.seed });
    Ok(config)
}

/// Fills file after file, each up to `shard_bytes`.
fn split(tensors: Vec<SynthTensor>, options: &Options) -> Vec<Shard> {
    let mut groups: Vec<Vec<SynthTensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = (tensor.elements() * options.dtype.bytes()) as u64;
        if filled > 0 && filled + bytes > options.shard_bytes {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        groups.last_mut().expect("there is a first").push(tensor);
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => folder::SINGLE.into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    let shard = |(index, tensors): (usize, Vec<SynthTensor>)| Shard {
        name: name(index),
        header: render_header(&tensors, options.dtype),
        tensors,
    };
    groups.into_iter().enumerate().map(shard).collect()
}

/// A safetensors header: its length, then JSON up to a multiple of 8 bytes.
fn render_header(tensors: &[SynthTensor], dtype: FloatType) -> Vec<u8> {
    let dtype_name = match dtype {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    };
    let mut end = 0;
    let entries = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.elements() * dtype.bytes();
        let info = TensorInfo { dtype: dtype_name, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.clone(), info)
    });
    let format = [("format".to_owned(), "pt".to_owned())];
    let metadata = Metadata::new(Some(format.into()), entries.collect()).expect("offsets without holes");
    let mut header = vec![0; 8];
    serde_json::to_writer(&mut header, &metadata).expect("writing to memory");
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() - 8) as u64;
    header[..8].copy_from_slice(&length.to_le_bytes());
    header
}

fn render_index(shards: &[Shard], dtype: FloatType) -> Vec<u8> {
    let (mut weight_map, mut total_size) = (Map::new(), 0);
    for shard in shards {
        for tensor in &shard.tensors {
            total_size += tensor.elements() * dtype.bytes();
            weight_map.insert(tensor.name.clone(), shard.name.as_str().into());
        }
    }
    to_json(&json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map }))
}

fn to_json(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("a value is JSON");
    bytes.push(b'\n');
    bytes
}

fn write_whole(partial: &PartialFolder, folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let mut file = partial.file(name)?;
    file.write_all(bytes).and_then(|()| file.sync_data()).map_err(Error::io(folder.join(name)))
}
