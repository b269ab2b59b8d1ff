//! Archives: a packed file with each part in seekable zstd frames, and the way back, bit for bit.

use std::{
    io::{BufWriter, Cursor, ErrorKind, Read, Seek, SeekFrom, Write},
    path::Path,
};

use serde_json::json;
use zeekstd::{DecodeOptions, EncodeOptions, FrameSizePolicy};

use super::{
    ARCHIVE_KEY, MANIFEST_KEY, PAGE, PackedFile,
    read::read_manifest,
    write::{check_output, persist, temporary_beside},
};
use crate::{
    checkpoint::header::{Header, HeaderTensor},
    error::{Error, Result},
    mmap::FileMap,
    progress::{Observer, Unit},
};

/// The value of the archive's metadata key.
const ARCHIVE_VERSION: &str = "1";

/// The archive's tensor that holds the packed file's header.
const HEADER_PART: &str = "bkpack.header";

/// Content of one frame: what a reader decompresses to reach any byte.
const FRAME_BYTES: u32 = 1 << 20;

/// Above this level zstd takes several times as long for codes that are close to random.
const LEVEL: i32 = 9;

/// No header may be longer: the limit of the safetensors format.
const MAX_HEADER: usize = 100_000_000 + 8;

/// Compresses a packed file of one shard into an archive. Returns its size in bytes.
///
/// # Errors
/// A sharded model, a target that exists (unless `force`), a full disk, cancellation.
pub fn archive(packed: &Path, output: &Path, force: bool, observer: &dyn Observer) -> Result<u64> {
    let model = PackedFile::open(packed)?;
    let Some((file, data_start)) = model.single() else {
        let why = "is sharded; an archive holds a model of one file".into();
        return Err(Error::ShardSet { path: packed.to_owned(), why });
    };
    check_output(output, force)?;
    let header = Header::read(packed, file)?;
    let mut parts: Vec<(&str, &[u8])> = vec![(HEADER_PART, &file[..data_start])];
    parts.extend(header.tensors.iter().map(|part| (part.name.as_str(), &file[part.range.clone()])));

    // The header comes first but is known last: its place is kept by the widest numbers it can hold.
    let reserved = render_header(parts.iter().map(|(name, _)| (*name, u64::MAX)), 0).len();
    let mut temporary = temporary_beside(output)?;
    let failed = || Error::io(output);
    temporary.as_file_mut().seek(SeekFrom::Start(reserved as u64)).map_err(failed())?;
    observer.begin("Archiving", file.len() as u64, Unit::Bytes);
    let mut sizes = Vec::with_capacity(parts.len());
    for (_, bytes) in &parts {
        sizes.push(compress(bytes, BufWriter::new(temporary.as_file_mut()), observer).map_err(
            |error| match error {
                Failure::Stopped(error) => error,
                Failure::Zstd(error) if error.is_io() => failed()(std::io::Error::other(error.to_string())),
                Failure::Zstd(error) => Error::Archive { path: output.to_owned(), why: error.to_string() },
            },
        )?);
    }
    observer.end();
    let mut end = 0;
    let ends = parts.iter().zip(&sizes).map(|((name, _), size)| {
        end += size;
        (*name, end)
    });
    let header = render_header(ends, reserved);
    let file = temporary.as_file_mut();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.write_all(&header))
        .and_then(|()| file.sync_data())
        .map_err(failed())?;
    persist(temporary, output, force)?;
    Ok(reserved as u64 + sizes.iter().sum::<u64>())
}

/// Restores the packed file of an archive, and checks its seal, its rules and every hash before it gets its name.
///
/// # Errors
/// A file that is no archive, content that does not fit, a broken rule of the packed format.
pub fn unpack(path: &Path, output: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
    let invalid = |why: String| Error::Archive { path: path.to_owned(), why };
    let map = FileMap::open(path)?;
    let archive = Header::read(path, &map)?;
    if archive.metadata.get(ARCHIVE_KEY).is_none_or(|version| version != ARCHIVE_VERSION) {
        return Err(invalid(if archive.metadata.contains_key(MANIFEST_KEY) {
            "this is a packed file already; nothing to unpack".into()
        } else {
            format!("the header's metadata has no \"{ARCHIVE_KEY}\" of version {ARCHIVE_VERSION}")
        }));
    }
    check_output(output, force)?;
    let stored = |name: &str| {
        let found = archive.tensors.iter().find(|part| part.name == name);
        found.map(|part| &map[part.range.clone()]).ok_or_else(|| invalid(format!("{name} is missing")))
    };
    let mut header_bytes = Vec::new();
    decompress(stored(HEADER_PART)?, MAX_HEADER, |bytes| {
        header_bytes.extend_from_slice(bytes);
        Ok(())
    })
    .map_err(|why| why.named(HEADER_PART, path))?;

    let mut temporary = temporary_beside(output)?;
    let failed = || Error::io(output);
    temporary.as_file_mut().write_all(&header_bytes).map_err(failed())?;
    let end = data_end(&header_bytes).ok_or_else(|| invalid("the packed file's header does not parse".into()))?;
    // A sparse file of the final size lets the same parser check the header that will check the result.
    temporary.as_file().set_len(end).map_err(failed())?;
    let parts: Vec<HeaderTensor> = {
        let sparse = FileMap::open(temporary.path())?;
        let header = Header::read(path, &sparse)?;
        read_manifest(path, &sparse, &header)?;
        header.tensors
    };
    if archive.tensors.len() != parts.len() + 1 {
        return Err(invalid("it holds parts that the packed file does not have".into()));
    }
    observer.begin("Unpacking", end, Unit::Bytes);
    for part in &parts {
        let mut left = part.range.len();
        temporary.as_file_mut().seek(SeekFrom::Start(part.range.start as u64)).map_err(failed())?;
        decompress(stored(&part.name)?, left, |bytes| {
            left -= bytes.len();
            observer.advance(bytes.len() as u64);
            observer.check()?;
            temporary.as_file_mut().write_all(bytes).map_err(failed())
        })
        .map_err(|why| why.named(&part.name, path))?;
        if left > 0 {
            return Err(invalid(format!("{} is {left} bytes shorter than its place", part.name)));
        }
    }
    observer.end();
    let in_archive = |error: Error| match error {
        Error::Cancelled => error,
        broken => {
            let inner = broken.to_string().replace(&temporary.path().display().to_string(), "the packed file");
            invalid(format!("what it holds breaks the packed format: {inner}"))
        }
    };
    let restored = PackedFile::open(temporary.path()).map_err(in_archive)?;
    restored.check_contents(observer).map_err(in_archive)?;
    drop(restored);
    temporary.as_file().sync_data().map_err(failed())?;
    persist(temporary, output, force)
}

/// The archive's header for parts that end at these offsets, padded with spaces to `length` or, if that is 0, to a page.
fn render_header<'a>(ends: impl Iterator<Item = (&'a str, u64)>, length: usize) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    object.insert("__metadata__".into(), json!({ "format": "pt", ARCHIVE_KEY: ARCHIVE_VERSION }));
    let mut begin = 0;
    for (name, end) in ends {
        let size = if length == 0 { end } else { end - begin };
        object.insert(
            name.into(),
            json!({ "dtype": "U8", "shape": [size], "data_offsets": [if length == 0 { end } else { begin }, end] }),
        );
        begin = end;
    }
    let mut header = vec![0; 8];
    serde_json::to_writer(&mut header, &object).expect("writing to memory");
    let padded = if length == 0 { header.len().next_multiple_of(PAGE) } else { length };
    header.resize(padded, b' ');
    let size = (header.len() - 8) as u64;
    header[..8].copy_from_slice(&size.to_le_bytes());
    header
}

enum Failure {
    Stopped(Error),
    Zstd(zeekstd::Error),
}

fn compress(bytes: &[u8], writer: impl Write, observer: &dyn Observer) -> Result<u64, Failure> {
    let options = EncodeOptions::new()
        .frame_size_policy(FrameSizePolicy::Uncompressed(FRAME_BYTES))
        .compression_level(LEVEL)
        .checksum_flag(true);
    let mut encoder = options.into_encoder(writer).map_err(Failure::Zstd)?;
    for chunk in bytes.chunks(FRAME_BYTES as usize) {
        observer.check().map_err(Failure::Stopped)?;
        let mut rest = chunk;
        while !rest.is_empty() {
            let taken = encoder.compress(rest).map_err(Failure::Zstd)?;
            rest = &rest[taken..];
        }
        observer.advance(chunk.len() as u64);
    }
    encoder.finish().map_err(Failure::Zstd)
}

/// Why a part did not decompress.
enum Broken {
    TooLong,
    Zstd(zeekstd::Error),
    Sink(Error),
}

impl Broken {
    fn named(self, part: &str, path: &Path) -> Error {
        let why = match self {
            Broken::Sink(error) => return error,
            Broken::TooLong => format!("{part} is longer than its place"),
            Broken::Zstd(error) => format!("{part} does not decompress: {error}"),
        };
        Error::Archive { path: path.to_owned(), why }
    }
}

/// The stored bytes of a part. Reading past their end is an error: the decoder would ask for more forever where the seek
/// table promises more content than the frames hold.
struct StoredPart<'a>(Cursor<&'a [u8]>);

impl Read for StoredPart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buffer)? {
            0 if !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

impl Seek for StoredPart<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

/// Hands out the content piece by piece; stops as soon as it is longer than `limit`, whatever the frames claim.
fn decompress(stored: &[u8], limit: usize, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<(), Broken> {
    let mut decoder = DecodeOptions::new(StoredPart(Cursor::new(stored))).into_decoder().map_err(Broken::Zstd)?;
    let mut buffer = vec![0; FRAME_BYTES as usize];
    let mut total = 0;
    loop {
        let count = decoder.decompress(&mut buffer).map_err(Broken::Zstd)?;
        if count == 0 {
            return Ok(());
        }
        total += count;
        if total > limit {
            return Err(Broken::TooLong);
        }
        sink(&buffer[..count]).map_err(Broken::Sink)?;
    }
}

/// Where the file that a header describes ends; `None` if the header does not parse.
fn data_end(header: &[u8]) -> Option<u64> {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header.get(8..)?).ok()?;
    let ends =
        object.iter().filter(|(name, _)| *name != "__metadata__").map(|(_, part)| part["data_offsets"][1].as_u64());
    let end = ends.collect::<Option<Vec<u64>>>()?.into_iter().max().unwrap_or(0);
    end.checked_add(header.len() as u64)
}
