//! Read-only memory maps: the only place outside the kernels that needs `unsafe`.

use std::{fs::File, ops::Deref, path::Path};

use crate::error::{Error, Result};

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

impl FileMap {
    /// Maps a file. An empty file gives an empty map.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        if !file.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::NotAModel { path: path.to_owned(), why: "not a regular file".into() });
        }
        // SAFETY: the map is read-only and private to this value. If another process truncates the file while it is
        // mapped, reading stops the program with SIGBUS; packed files are replaced by rename, which leaves the mapped
        // file whole.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Self(map))
    }
}

impl Deref for FileMap {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
