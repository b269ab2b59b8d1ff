//! A folder that appears when all its files are written, or not at all.

use std::{fs::File, io::ErrorKind, path::Path};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    error::{Error, Result},
    format::without_temporary_name,
    model::config::is_synthetic,
};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// Files under temporary names. Dropped before [`PartialFolder::finish`], it removes them.
pub(super) struct PartialFolder<'a> {
    target: &'a Path,
    /// Whether the target stands already, so that files go into it one by one.
    exists: bool,
    temporary: TempDir,
}

impl<'a> PartialFolder<'a> {
    /// Makes a temporary folder beside `target`, or in it if it exists.
    pub(super) fn create(target: &'a Path, force: bool, needed: u64) -> Result<Self> {
        let exists = check_target(target, force)?;
        let home = match target.parent() {
            _ if exists => target,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Where the system cannot say, writing finds out.
        if let Ok(free) = fs4::available_space(home) {
            check_space(target, needed, free)?;
        }
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
    pub(super) fn file(&self, name: &str) -> Result<File> {
        File::create_new(self.temporary.path().join(name)).map_err(Error::io(self.target.join(name)))
    }

    /// Gives the files `names`, which are all there are, their final place, in this order.
    pub(super) fn finish(self, names: &[&str]) -> Result<()> {
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
        for name in names {
            let path = self.target.join(name);
            std::fs::rename(self.temporary.path().join(name), &path).map_err(Error::io(&path))?;
        }
        Ok(())
    }
}

/// Whether the target exists; refuses one that must not be written to.
fn check_target(target: &Path, force: bool) -> Result<bool> {
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
            if holds_real_model(target)? {
                return refuse("holds a model that is not synthetic, which --force does not replace".into());
            }
            Ok(true)
        }
    }
}

/// Whether there are weights or a config that are not marked as synthetic; what cannot be read is taken for real.
fn holds_real_model(folder: &Path) -> Result<bool> {
    match std::fs::read(folder.join(CONFIG)) {
        Ok(bytes) => Ok(!serde_json::from_slice::<Value>(&bytes).is_ok_and(|config| is_synthetic(&config))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(!weight_files(folder)?.is_empty()),
        Err(error) => Err(Error::io(folder.join(CONFIG))(error)),
    }
}

/// The names of a checkpoint's weights in a folder: one file, or an index, which comes first, and shards.
fn weight_files(folder: &Path) -> Result<Vec<String>> {
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

/// Refuses to begin what cannot end: a full disk would stop everyone's work on it.
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
        let refused = PartialFolder::create(&target, false, u64::MAX);
        assert!(matches!(refused, Err(Error::BadOutput { .. })));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }
}
