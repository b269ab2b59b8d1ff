//! A Hugging Face folder: config.json beside one safetensors file, or beside shards and their index.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;

use super::{Checkpoint, CheckpointKind, safetensors::open_weights};
use crate::{
    error::{Error, Result},
    json,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The part of the index that says where each tensor is.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Opens a folder. The index, where there is one, must agree with the shards tensor by tensor.
pub(super) fn open(folder: &Path) -> Result<Checkpoint> {
    let config_path = folder.join("config.json");
    let config = match std::fs::read(&config_path) {
        Ok(bytes) => Some(json::parse(&config_path, &bytes)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io(config_path)(error)),
    };
    let index_path = folder.join(INDEX);
    let files = match std::fs::read(&index_path) {
        Ok(bytes) => open_shards(folder, &index_path, &bytes)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let single = folder.join(SINGLE);
            if !single.exists() {
                return Err(Error::NotAModel {
                    path: folder.to_owned(),
                    why: format!("the folder has neither {SINGLE} nor {INDEX}"),
                });
            }
            vec![open_weights(&single)?]
        }
        Err(error) => return Err(Error::io(index_path)(error)),
    };
    Checkpoint::new(folder, CheckpointKind::HuggingFace, config, files)
}

fn open_shards(
    folder: &Path,
    index_path: &Path,
    bytes: &[u8],
) -> Result<Vec<(super::WeightFile, super::header::Header)>> {
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
        let file = open_weights(&path)?;
        let held: BTreeSet<&str> = file.1.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
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
