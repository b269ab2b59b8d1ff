//! A Hugging Face folder: config.json beside one file of weights, or beside shards and their index.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;

use super::WeightFile;
use crate::{
    error::{Error, Result},
    json,
};

/// The index or the one file of weights, in the order in which they are looked for.
const WEIGHTS: [(&str, &str); 2] =
    [("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")];

/// The part of the index that says where each tensor is.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Opens the files of weights. The index, where there is one, must agree with the shards tensor by tensor.
pub(super) fn open(folder: &Path) -> Result<Vec<WeightFile>> {
    for (index, single) in WEIGHTS {
        let index = folder.join(index);
        match std::fs::read(&index) {
            Ok(bytes) => return open_shards(folder, &index, &bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(index)(error)),
        }
        let single = folder.join(single);
        if single.exists() {
            return Ok(vec![WeightFile::open(&single)?]);
        }
    }
    let why = "the folder has none of model.safetensors, model.safetensors.index.json, pytorch_model.bin and \
               pytorch_model.bin.index.json";
    Err(Error::NotAModel { path: folder.to_owned(), why: why.into() })
}

fn open_shards(folder: &Path, index_path: &Path, bytes: &[u8]) -> Result<Vec<WeightFile>> {
    let index: Index = json::parse(index_path, bytes)?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    let mut files = Vec::with_capacity(shards.len());
    for shard in shards {
        // A name with a folder in it could reach outside the checkpoint.
        if Path::new(shard).file_name().is_none_or(|name| name != shard.as_str()) {
            return Err(Error::Json {
                path: index_path.to_owned(),
                why: format!("shard {shard:?} is not a plain file name"),
            });
        }
        let path = folder.join(shard);
        if !path.exists() {
            return Err(Error::MissingShard { path: index_path.to_owned(), shard: shard.clone() });
        }
        let file = WeightFile::open(&path)?;
        let held: BTreeSet<&str> = file.contents.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        for (tensor, owner) in &index.weight_map {
            let (path, tensor, shard) = (index_path.to_owned(), tensor.clone(), shard.clone());
            match (*owner == shard, held.contains(tensor.as_str())) {
                (true, false) => return Err(Error::IndexMismatch { path, tensor, shard }),
                (false, true) => return Err(Error::StrayTensor { path, tensor, shard }),
                _ => {}
            }
        }
        if let Some(stray) = held.iter().find(|tensor| !index.weight_map.contains_key(**tensor)) {
            let (path, tensor, shard) = (index_path.to_owned(), stray.to_string(), shard.clone());
            return Err(Error::StrayTensor { path, tensor, shard });
        }
        files.push(file);
    }
    Ok(files)
}
