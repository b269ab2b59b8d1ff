//! Folders that a sweep packs into: hidden beside the results, and gone with the process, or with the next sweep.

use std::{
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

const PREFIX: &str = ".bkpack-sweep-";

/// Held by the process that uses the folder; the system releases it however the process ends.
const LOCK: &str = "lock";

/// A folder for packed files that are not kept; it goes when this is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    _lock: File,
    folder: TempDir,
}

impl Scratch {
    /// A new one in the folder of the results.
    pub(super) fn create(results: &Path) -> std::io::Result<Self> {
        loop {
            let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(results)?;
            let path = folder.path().join(LOCK);
            let lock = match File::create(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                created => created?,
            };
            match lock.lock() {
                // Without locks no sweep takes a folder for abandoned.
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                locked => locked?,
            }
            // Until it was locked, another sweep may have taken the folder for an abandoned one, and removed it.
            if path.exists() {
                return Ok(Self { _lock: lock, folder });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Removes the folders of sweeps that were killed. Those of sweeps that still run stay, and so does what cannot be removed.
pub(super) fn remove_abandoned(results: &Path) -> std::io::Result<()> {
    let entries: Vec<PathBuf> = std::fs::read_dir(results)?
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    for folder in entries {
        // Another sweep may be at it, too, so failures to remove are none.
        match File::options().write(true).open(folder.join(LOCK)) {
            Ok(lock) if lock.try_lock().is_ok() => drop(std::fs::remove_dir_all(&folder)),
            Ok(_) => {}
            // Killed before it had a lock, it is empty; with anything in it, it is no sweep's, and stays.
            Err(_) => drop(std::fs::remove_dir(&folder)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_that_nobody_holds_are_removed() {
        let results = TempDir::new().unwrap();
        let path = |name: &str| results.path().join(name);
        let live = Scratch::create(results.path()).unwrap();
        std::fs::write(live.path().join("model.bkpack"), "weights").unwrap();
        for name in [".bkpack-sweep-killed", ".bkpack-sweep-early", ".bkpack-sweep-mine", "kept"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        std::fs::write(path(".bkpack-sweep-killed/lock"), "").unwrap();
        std::fs::write(path(".bkpack-sweep-killed/model.bkpack"), "weights").unwrap();
        std::fs::write(path(".bkpack-sweep-file"), "").unwrap();
        std::fs::write(path(".bkpack-sweep-mine/notes.txt"), "").unwrap();
        std::fs::write(path("kept/file"), "").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(path("kept"), path(".bkpack-sweep-link")).unwrap();

        remove_abandoned(results.path()).unwrap();
        assert!(live.path().join("model.bkpack").exists(), "it is in use");
        assert!(!path(".bkpack-sweep-killed").exists() && !path(".bkpack-sweep-early").exists());
        assert!(path(".bkpack-sweep-mine/notes.txt").exists(), "no sweep made it");
        assert!(path(".bkpack-sweep-file").exists() && path("kept/file").exists());

        let folder = live.path().to_owned();
        drop(live);
        assert!(!folder.exists());
    }
}
