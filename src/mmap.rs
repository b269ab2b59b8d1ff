//! Read-only memory maps: the only place outside the kernels that needs `unsafe`.

use std::{fs::File, ops::Deref, path::Path};

use crate::error::{Error, Result};

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

impl FileMap {
    /// Maps a file. An empty file gives an empty map.
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before opening: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(Error::io(path))?;
        if !kind.is_file() {
            let why = if kind.is_dir() { "is a folder where a file is needed" } else { "is not a regular file" };
            return Err(Error::NotAModel { path: path.to_owned(), why: why.into() });
        }
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only. The file must not be changed in place while it is mapped; nothing here does so
        // (packed files are replaced by rename, which leaves the mapped file whole), and every use of the bytes stays in
        // bounds whatever they are. If another process truncates the file, reading stops the program with SIGBUS.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        // A file that is not cached is then read and mapped in large pages where the file system has them: its first use
        // comes sooner, and reading it from memory costs fewer translations of addresses. Who wants but a few bytes has
        // 2 MiB around them read. Refused advice loses nothing.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(map))
    }
}

impl Deref for FileMap {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Memory of the process's own, written throughout, in large pages where the system has them: reading it is slowed down
/// neither by page faults nor by more translations of addresses than there must be.
#[derive(Debug)]
pub struct LargePages(memmap2::MmapMut);

impl LargePages {
    /// So many bytes, at least one page.
    ///
    /// # Errors
    /// [`Error::Io`] where there is not enough memory.
    pub fn new(bytes: usize) -> Result<Self> {
        let refused = Error::io(Path::new("memory for the probe"));
        let mut memory = memmap2::MmapMut::map_anon(bytes.max(4096)).map_err(refused)?;
        // Advice that is not taken makes the memory slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        memory.fill(1);
        Ok(Self(memory))
    }
}

impl Deref for LargePages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
