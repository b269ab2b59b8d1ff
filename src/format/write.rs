//! Writing a packed file: parts go to their planned places as they come, the header last, the final name at the end.

use std::{
    collections::HashMap,
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::{
    index_path,
    layout::{FilePlan, render_index},
    manifest::Manifest,
};
use crate::error::{Error, Result};

/// Writes a model's files under temporary names and renames them when all is written.
///
/// Dropped before [`PackedWriter::finish`], it removes what it wrote.
pub struct PackedWriter {
    output: PathBuf,
    force: bool,
    files: Vec<(FilePlan, NamedTempFile)>,
    places: HashMap<String, Place>,
}

struct Place {
    file: usize,
    offset: u64,
    bytes: usize,
    hash: Option<blake3::Hash>,
}

impl PackedWriter {
    /// Makes the temporary files in the target's folder.
    ///
    /// # Errors
    /// A target that exists (unless `force`), or a folder that cannot be written.
    pub fn create(output: &Path, plans: Vec<FilePlan>, force: bool) -> Result<Self> {
        let mut writer = Self { output: output.to_owned(), force, files: Vec::new(), places: HashMap::new() };
        for target in targets(output, &plans) {
            check_output(&target, force)?;
        }
        for (file, plan) in plans.into_iter().enumerate() {
            for part in &plan.parts {
                let offset = (plan.header_bytes + part.offset) as u64;
                writer.places.insert(part.name.clone(), Place { file, offset, bytes: part.bytes, hash: None });
            }
            let temporary = temporary_beside(&plan.path)?;
            writer.files.push((plan, temporary));
        }
        Ok(writer)
    }

    /// Writes one part, and remembers and returns its hash.
    ///
    /// # Panics
    /// If the part was not planned with this length: the caller's mistake.
    pub fn write_part(&mut self, name: &str, bytes: &[u8]) -> Result<blake3::Hash> {
        let place = self.places.get_mut(name).expect("a planned part");
        assert_eq!(place.bytes, bytes.len(), "part {name} has its planned length");
        let hash = hash(bytes);
        place.hash = Some(hash);
        let (plan, temporary) = &mut self.files[place.file];
        write_at(temporary.as_file_mut(), place.offset, bytes).map_err(Error::io(&plan.path))?;
        Ok(hash)
    }

    /// Writes the headers and gives the files their final names, the index of a sharded model last. `source` are the
    /// hashes of the checkpoint's files, in the manifest's order.
    ///
    /// # Panics
    /// If a planned part was not written, or a hash is missing: the caller's mistake.
    pub fn finish(mut self, source: &[blake3::Hash]) -> Result<Vec<PathBuf>> {
        for (plan, _) in &mut self.files {
            fill_source(&mut plan.manifest, source);
        }
        self.finish_as_planned()
    }

    /// [`PackedWriter::finish`] for plans that name their source as it shall stand.
    pub(super) fn finish_as_planned(mut self) -> Result<Vec<PathBuf>> {
        for (plan, temporary) in &mut self.files {
            fill_parts(&mut plan.manifest, &self.places);
            let header = plan.render_header();
            assert_eq!(header.len(), plan.header_bytes, "the header has its planned length");
            let written = write_at(temporary.as_file_mut(), 0, &header).and_then(|()| temporary.as_file().sync_data());
            written.map_err(Error::io(&plan.path))?;
        }
        // The index is written before any shard gets its name, so that a full disk leaves no shards behind.
        let index = match index_of(&self.output, self.files.iter().map(|(plan, _)| plan)) {
            None => None,
            Some((path, bytes)) => {
                let mut temporary = temporary_beside(&path)?;
                let file = temporary.as_file_mut();
                file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
                Some((path, temporary))
            }
        };
        // An older model of the same name must not be found in place of this one.
        let stale = if index.is_some() { self.output.clone() } else { index_path(&self.output) };
        let mut finished = Vec::new();
        for (plan, temporary) in self.files {
            persist(temporary, &plan.path, self.force)?;
            finished.push(plan.path);
        }
        if let Some((path, temporary)) = index {
            persist(temporary, &path, self.force)?;
            finished.push(path);
        }
        if stale.is_file() {
            std::fs::remove_file(&stale).map_err(Error::io(&stale))?;
        }
        Ok(finished)
    }
}

/// Bytes of everything that a plan will write, the index of a sharded model included.
pub fn planned_bytes(output: &Path, plans: &[FilePlan]) -> u64 {
    let index = index_of(output, plans.iter()).map_or(0, |(_, bytes)| bytes.len() as u64);
    plans.iter().map(FilePlan::file_bytes).sum::<u64>() + index
}

fn index_of<'a>(output: &Path, plans: impl Iterator<Item = &'a FilePlan>) -> Option<(PathBuf, Vec<u8>)> {
    let shards: Vec<_> = plans
        .map(|plan| {
            let file = plan.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mut parts: Vec<_> =
                plan.parts.iter().map(|part| (part.offset, part.bytes, part.name.as_str())).collect();
            parts.sort_unstable();
            (file, plan.data_bytes(), parts.into_iter().map(|(_, _, name)| name).collect())
        })
        .collect();
    render_index(output, shards.into_iter())
}

/// Every name that stands for the model once this plan is written: the plain name opens shards too, and the index of an
/// older model must not outlive it.
fn targets(output: &Path, plans: &[FilePlan]) -> Vec<PathBuf> {
    let shards = plans.iter().map(|plan| plan.path.clone());
    shards.chain([index_path(output), output.to_owned()]).collect()
}

/// BLAKE3, on all threads of the pool where the bytes are many.
pub(crate) fn hash(bytes: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    // Below about 128 KiB handing work to other threads costs more than it saves.
    if bytes.len() < 128 << 10 {
        hasher.update(bytes)
    } else {
        hasher.update_rayon(bytes)
    };
    hasher.finalize()
}

/// A temporary file in the folder of `path`, with the permissions that an ordinary new file gets.
pub fn temporary_beside(path: &Path) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bkpack-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let why = format!("the folder {} does not exist; create it first", folder.display());
            Error::BadOutput { path: path.to_owned(), why }
        }
        _ => Error::io(path)(without_temporary_name(error)),
    })
}

/// An error without the temporary file's name, which tells the user nothing.
pub(crate) fn without_temporary_name(error: std::io::Error) -> std::io::Error {
    match error.get_ref().and_then(|inner| inner.source()).and_then(|inner| inner.downcast_ref::<std::io::Error>()) {
        Some(inner) => inner.raw_os_error().map_or_else(|| inner.kind().into(), std::io::Error::from_raw_os_error),
        None => error,
    }
}

/// Refuses an output that exists (unless `force`), or that is no regular file, or whose folder is missing.
pub fn check_output(path: &Path, force: bool) -> Result<()> {
    let refuse = |why: String| Err(Error::BadOutput { path: path.to_owned(), why });
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => refuse("is a folder; name a file in it".into()),
        Ok(found) if !found.is_file() => refuse("is not a regular file".into()),
        Ok(_) if !force => Err(Error::Exists { path: path.to_owned() }),
        Ok(_) => Ok(()),
        Err(_) => match path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            Some(folder) => refuse(format!("the folder {} does not exist; create it first", folder.display())),
            None => Ok(()),
        },
    }
}

/// Writes a whole file in one step: nothing stands under its name until all is written.
///
/// # Errors
/// [`Error::Exists`] unless `force`; [`Error::Io`].
pub fn write_file(bytes: &[u8], path: &Path, force: bool) -> Result<()> {
    let mut temporary = temporary_beside(path)?;
    temporary.write_all(bytes).map_err(Error::io(path))?;
    persist(temporary, path, force)
}

/// Gives a temporary file its final name in one step.
pub fn persist(temporary: NamedTempFile, path: &Path, force: bool) -> Result<()> {
    let named = if force { temporary.persist(path) } else { temporary.persist_noclobber(path) };
    named.map(drop).map_err(|error| match error.error.kind() {
        std::io::ErrorKind::AlreadyExists => Error::Exists { path: path.to_owned() },
        _ => Error::io(path)(error.error),
    })
}

fn write_at(file: &mut File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

fn fill_source(manifest: &mut Manifest, source: &[blake3::Hash]) {
    assert_eq!(manifest.source.files.len(), source.len(), "every source file has its hash");
    for (file, hash) in manifest.source.files.iter_mut().zip(source) {
        file.blake3 = hash.to_hex().to_string();
    }
    if let Some(shard) = &mut manifest.shard {
        let identity = (&manifest.producer, &manifest.source, &manifest.policy, &shard.set);
        let identity = serde_json::to_vec(&identity).expect("plain data is JSON");
        shard.set = blake3::hash(&identity).to_hex().to_string();
    }
}

fn fill_parts(manifest: &mut Manifest, places: &HashMap<String, Place>) {
    let digits = |name: &str| places[name].hash.expect("every planned part was written").to_hex().to_string();
    for tensor in &mut manifest.tensors {
        for part in tensor.parts.as_object_mut().expect("planned as an object").values_mut() {
            let name = part["name"].as_str().expect("planned with a name");
            part["blake3"] = digits(name).into();
        }
    }
    for file in &mut manifest.files {
        file.part.blake3 = digits(&file.part.name);
    }
}
