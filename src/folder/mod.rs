//! Folders in the layout of Hugging Face, as they are written: all files of one appear, or none.

mod shards;

use std::{
    fs::File,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) use self::shards::{Shard, Shards, StoredTensor};
use crate::{
    error::{Error, Result},
    format::without_temporary_name,
};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Files of a model's folder that travel inside the packed file.
pub(crate) const TRAVELLING_FILES: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Whether the model in a folder may be replaced; `Err` of a sentence says why not.
pub(crate) type Replaceable<'a> = &'a dyn Fn(&Path) -> Result<(), String>;

/// Files under temporary names. Dropped before [`PartialFolder::finish`], it removes them.
pub(crate) struct PartialFolder<'a> {
    target: &'a Path,
    /// Whether the target stands already, so that files go into it one by one.
    exists: bool,
    temporary: TempDir,
}

impl<'a> PartialFolder<'a> {
    /// Makes a temporary folder beside `target`, or in it if it exists; `needed` bytes will be written.
    ///
    /// # Errors
    /// [`Error::Exists`] if the target holds files (unless `force`), [`Error::BadOutput`] if it is no folder, holds a
    /// model that is not `replaceable`, or its disk has too little room; [`Error::Io`].
    pub(crate) fn create(target: &'a Path, force: bool, needed: u64, replaceable: Replaceable) -> Result<Self> {
        let exists = check_target(target, force, replaceable)?;
        let home = match target.parent() {
            _ if exists => target,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        check_disk(target, home, needed)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".bkpack-").suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let temporary = builder.tempdir_in(home).map_err(|error| Error::io(target)(without_temporary_name(error)))?;
        Ok(Self { target, exists, temporary })
    }

    /// A new file in it.
    pub(crate) fn file(&self, name: &str) -> Result<File> {
        File::create_new(self.temporary.path().join(name)).map_err(Error::io(self.target.join(name)))
    }

    /// A small file as a whole.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.file(name)?;
        file.write_all(bytes).and_then(|()| file.sync_data()).map_err(Error::io(self.target.join(name)))
    }

    /// The folder as it is now named.
    pub(crate) fn temporary(&self) -> &Path {
        self.temporary.path()
    }

    /// The name that a file of it will have.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// Gives the files `names`, which are all there are, their final place, in this order. Of an older model in the
    /// folder the weights go, and the files `others` that are not among `names`.
    pub(crate) fn finish(self, names: &[&str], others: &[&str]) -> Result<()> {
        if !self.exists {
            std::fs::rename(self.temporary.path(), self.target).map_err(Error::io(self.target))?;
            // It has moved away: there is nothing to remove.
            let _ = self.temporary.keep();
            return Ok(());
        }
        // Without the old index the old shards are no model, so none is ever mixed from old and new ones.
        for old in weight_files(self.target)? {
            let path = self.target.join(old);
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        for other in others.iter().filter(|other| !names.contains(other)) {
            let path = self.target.join(other);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&path)(error)),
                _ => {}
            }
        }
        for name in names {
            let path = self.target.join(name);
            std::fs::rename(self.temporary.path().join(name), &path).map_err(Error::io(&path))?;
        }
        Ok(())
    }
}

/// Whether the target exists; refuses one that must not be written to.
///
/// # Errors
/// As [`PartialFolder::create`].
pub(crate) fn check_target(target: &Path, force: bool, replaceable: Replaceable) -> Result<bool> {
    let refuse = |why: String| Err(Error::BadOutput { path: target.to_owned(), why });
    match std::fs::metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            match target.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
                Some(parent) => refuse(format!("the folder {} does not exist; create it first", parent.display())),
                None => Ok(false),
            }
        }
        Err(error) => Err(Error::io(target)(error)),
        Ok(found) if !found.is_dir() => refuse("is not a folder".into()),
        Ok(_) => {
            let empty = std::fs::read_dir(target).map_err(Error::io(target))?.next().is_none();
            if !empty && !force {
                return Err(Error::Exists { path: target.to_owned() });
            }
            if let Err(why) = replaceable(target) {
                return refuse(format!("{why}, which --force does not replace"));
            }
            Ok(true)
        }
    }
}

/// The names of a checkpoint's weights in a folder: one file, or an index, which comes first, and shards.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if shard || [SINGLE, INDEX].contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.sort_by_key(|name| name != INDEX);
    Ok(names)
}

/// A JSON file as people read it.
pub(crate) fn to_json(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("a value is JSON");
    bytes.push(b'\n');
    bytes
}

/// Refuses to begin what cannot end: a full disk would stop everyone's work on it. `home` is the folder that `target` is to
/// lie in.
pub(crate) fn check_disk(target: &Path, home: &Path, needed: u64) -> Result<()> {
    match fs4::available_space(home) {
        Ok(free) => check_space(target, needed, free),
        // Where the system cannot say, writing finds out.
        Err(_) => Ok(()),
    }
}

fn check_space(target: &Path, needed: u64, free: u64) -> Result<()> {
    if needed <= free {
        return Ok(());
    }
    let why = format!("needs {:.3} GB, but only {:.3} GB are free on its disk", needed as f64 / 1e9, free as f64 / 1e9);
    Err(Error::BadOutput { path: target.to_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_before_it_is_full() {
        assert!(check_space(Path::new("out"), 1_000_000_000, 1_000_000_000).is_ok());
        let error = check_space(Path::new("out"), 1_001_000_000, 1_000_000_000).unwrap_err().to_string();
        assert_eq!(error, "out: needs 1.001 GB, but only 1.000 GB are free on its disk");
        let folder = TempDir::new().unwrap();
        let target = folder.path().join("out");
        let refused = PartialFolder::create(&target, false, u64::MAX, &|_| Ok(()));
        assert!(matches!(refused, Err(Error::BadOutput { .. })));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }
}
