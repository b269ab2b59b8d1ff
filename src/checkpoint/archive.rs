//! Zip archives: what NPZ and PyTorch files are made of. Stored members are read from the memory map, deflated ones
//! are inflated one at a time into exactly as many bytes as the directory declares.

use std::{
    io::{Cursor, ErrorKind, Read},
    ops::Range,
    path::Path,
    sync::{Arc, OnceLock},
};

use flate2::{Crc, read::DeflateDecoder};
use zip::{CompressionMethod, ZipArchive, result::ZipError};

use super::stored::Place;
use crate::error::{Error, Result, short};

/// Deflate cannot shrink by more than this: a match of 258 bytes takes at least two bits.
const MAX_RATIO: u64 = 1032;

/// One file of an archive.
#[derive(Debug)]
pub(super) struct Member {
    pub name: String,
    pub place: Place,
}

/// A member that is stored as it is.
#[derive(Debug)]
pub(super) struct Stored {
    name: String,
    /// Its bytes in the file.
    pub range: Range<usize>,
    crc: u32,
    /// Whether the bytes match the CRC, once that is known.
    intact: OnceLock<bool>,
}

impl Stored {
    /// Its bytes. The first call checks them against the CRC, so that opening reads no weights and many tensors in one
    /// member cost one check.
    ///
    /// # Errors
    /// A sentence that says that they do not match.
    pub fn read<'a>(&self, file: &'a [u8]) -> Result<&'a [u8], String> {
        let bytes = &file[self.range.clone()];
        match self.intact.get_or_init(|| crc(bytes) == self.crc) {
            true => Ok(bytes),
            false => Err(mismatch(&self.name)),
        }
    }
}

/// A compressed member.
#[derive(Clone, Debug)]
pub(super) struct Deflated {
    name: Arc<str>,
    /// Its compressed bytes in the file.
    pub range: Range<usize>,
    /// Bytes that it must inflate to.
    pub size: usize,
    crc: u32,
}

impl Deflated {
    /// All its bytes, checked against the declared size and the CRC.
    ///
    /// # Errors
    /// A sentence that says which of them it does not match.
    pub fn inflate(&self, file: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = DeflateDecoder::new(&file[self.range.clone()]);
        let mut bytes = vec![0; self.size];
        decoder.read_exact(&mut bytes).map_err(|error| self.broken(&error))?;
        match decoder.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(format!("its compressed data inflates past the declared {} bytes", self.size)),
            Err(error) => return Err(self.broken(&error)),
        }
        if crc(&bytes) != self.crc {
            return Err(mismatch(&self.name));
        }
        Ok(bytes)
    }

    /// Its first bytes, at most `limit` of them.
    pub fn inflate_head(&self, file: &[u8], limit: usize) -> Result<Vec<u8>, String> {
        let limit = limit.min(self.size);
        let mut bytes = vec![0; limit];
        let mut decoder = DeflateDecoder::new(&file[self.range.clone()]);
        decoder.read_exact(&mut bytes).map_err(|error| self.broken(&error))?;
        Ok(bytes)
    }

    fn broken(&self, error: &std::io::Error) -> String {
        match error.kind() {
            ErrorKind::UnexpectedEof => format!("its compressed data ends before the declared {} bytes", self.size),
            _ => format!("its compressed data is broken: {error}"),
        }
    }
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn mismatch(member: &str) -> String {
    let member = short(member);
    format!("member {member}: its bytes do not match their CRC: the archive was changed or damaged")
}

/// Every member of an archive, in the order of its directory; folders are left out.
///
/// # Errors
/// A broken directory, members that share bytes or a name, an encrypted member, a compression other than deflate, a
/// declared size that deflate cannot reach.
pub(super) fn members(path: &Path, file: &[u8]) -> Result<Vec<Member>> {
    let refuse = |why: String| Error::Zip { path: path.to_owned(), why };
    let broken = |error: ZipError| refuse(format!("not valid, perhaps truncated: {error}"));
    let mut archive = ZipArchive::new(Cursor::new(file)).map_err(broken)?;
    if archive.has_duplicate_names() {
        return Err(refuse("two members have the same name".into()));
    }
    if archive.has_overlapping_entries().map_err(broken)? {
        return Err(refuse("two members overlap".into()));
    }
    let mut members = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if entry.is_dir() {
            continue;
        }
        let refuse = |why: &str| refuse(format!("member {}: {why}", short(&name)));
        if entry.encrypted() {
            return Err(refuse("is encrypted"));
        }
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let range = start.zip(usize::try_from(entry.compressed_size()).ok()).and_then(|(start, size)| {
            let range = start..start.checked_add(size)?;
            file.get(range.clone()).map(|_| range)
        });
        let range = range.ok_or_else(|| refuse("lies beyond the end of the file"))?;
        let place = match entry.compression() {
            CompressionMethod::Stored if entry.size() == entry.compressed_size() => {
                let (name, crc) = (name.clone(), entry.crc32());
                Place::Stored(Arc::new(Stored { name, range, crc, intact: OnceLock::new() }))
            }
            CompressionMethod::Stored => return Err(refuse("is stored, but its two sizes differ")),
            CompressionMethod::Deflated => {
                let size = usize::try_from(entry.size()).ok();
                let reachable = entry.compressed_size().saturating_mul(MAX_RATIO);
                match size.filter(|_| entry.size() <= reachable) {
                    Some(size) => {
                        Place::Deflated(Deflated { name: name.as_str().into(), range, size, crc: entry.crc32() })
                    }
                    None => {
                        return Err(refuse(&format!(
                            "declares {} bytes, which {} compressed bytes cannot inflate to",
                            entry.size(),
                            entry.compressed_size()
                        )));
                    }
                }
            }
            other => return Err(refuse(&format!("is compressed by {other}; only stored and deflated are read"))),
        };
        drop(entry);
        members.push(Member { name, place });
    }
    Ok(members)
}
