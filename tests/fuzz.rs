//! Every parser of untrusted bytes against random changes of valid files and against noise: none may panic, and none may
//! give more than the file can hold. Each runs for a fixed time from a seed that it prints.

mod common;
mod containers;

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
    path::Path,
    time::{Duration, Instant},
};

use assert_cmd::Command;
use bkpack::{
    Error, checkpoint,
    format::PackedFile,
    policy::{ComponentRules, PolicyFile, Recipe, SensitivityTable, importance::Importance},
    progress::Silent,
    tensor::TensorSource,
};
use common::{Random, Stored, fixture, safetensors};
use tempfile::TempDir;
use zip::ZipArchive;

/// How long each parser is fed.
const TIME: Duration = Duration::from_secs(10);

/// No input takes longer: they are a few kilobytes.
const LONGEST: Duration = Duration::from_secs(2);

/// Deflate shrinks 1032 times at most, and reading widens 8 bits to 16.
const MOST_GROWTH: usize = 2 * 1032;

/// Feeds changed copies of `seeds` and noise to `parse` until the time is up.
fn fuzz(name: &str, seeds: &[Vec<u8>], mut parse: impl FnMut(&Path) -> Result<usize, Error>) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    let seed = 0x5eed;
    println!("{name}: seed {seed:#x}");
    for (index, bytes) in seeds.iter().enumerate() {
        std::fs::write(&path, bytes).unwrap();
        parse(&path).unwrap_or_else(|error| panic!("unchanged file {index} of {name} is refused: {error}"));
    }
    let mut random = Random(seed);
    let (start, mut turns, mut opened) = (Instant::now(), 0u64, 0u64);
    while start.elapsed() < TIME {
        turns += 1;
        let bytes = change(seeds, &mut random);
        std::fs::write(&path, &bytes).unwrap();
        let began = Instant::now();
        match parse(&path) {
            Ok(read) => {
                opened += 1;
                assert!(read <= bytes.len() * MOST_GROWTH, "turn {turns}: {read} bytes from {}", bytes.len());
            }
            Err(error) => {
                let sentence = error.to_string();
                assert!(sentence.len() < 2000, "turn {turns}: a sentence of {} bytes", sentence.len());
                assert!(!sentence.contains(char::is_control), "turn {turns}: {sentence:?}");
            }
        }
        assert!(began.elapsed() < LONGEST, "turn {turns} of {name} took {:?}", began.elapsed());
    }
    println!("{name}: {turns} inputs, {opened} opened");
    assert!(turns > 100, "only {turns} inputs in {TIME:?}");
}

/// A file with a few bytes, numbers or stretches changed; now and then nothing but noise.
fn change(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    if random.below(50) == 0 {
        // The start stays, so that noise reaches the parser that the start chooses.
        let kept = random.below(24).min(bytes.len());
        bytes.truncate(kept);
        bytes.extend((0..random.below(500)).map(|_| random.next() as u8));
        return bytes;
    }
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at] = bytes[at].wrapping_add(1),
            3 => bytes.truncate(at),
            4 => {
                let end = (at + random.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let end = (at + random.below(64)).min(bytes.len());
                let stretch = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, stretch);
            }
            6 => {
                let extremes = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, u64::MAX >> 1, u64::MAX];
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&extremes[random.below(8)].to_le_bytes()[..width]);
            }
            _ => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let stretch = other[from..(from + random.below(64)).min(other.len())].to_vec();
                let end = (at + stretch.len()).min(bytes.len());
                bytes.splice(at..end, stretch);
            }
        }
    }
    bytes
}

/// Opens a checkpoint and reads every tensor; the bytes of all of them.
fn read_checkpoint(path: &Path) -> Result<usize, Error> {
    let source = checkpoint::open(path)?;
    let mut read = 0;
    for name in source.names() {
        // A member of an archive may prove broken only now.
        if let Ok(tensor) = source.tensor(name) {
            read += tensor.matrix().bytes();
        }
    }
    Ok(read)
}

fn fixtures(names: &[&str]) -> Vec<Vec<u8>> {
    let read = |name: &&str| std::fs::read(fixture().with_file_name("formats").join(name)).unwrap();
    names.iter().map(read).collect()
}

#[test]
fn safetensors_headers() {
    let mut random = Random(3);
    let tensors = [
        Stored::random("a", "F32", &[3, 5], 1.0, &mut random),
        Stored::random("b", "BF16", &[7], 1.0, &mut random),
        Stored { name: "c".into(), dtype: "C64", shape: vec![2], bytes: vec![0; 16] },
        Stored { name: "d".into(), dtype: "F8_E4M3", shape: vec![4], bytes: vec![1; 4] },
    ];
    let seeds = [vec![safetensors(&tensors)], fixtures(&["expected.safetensors"])].concat();
    fuzz("model.safetensors", &seeds, read_checkpoint);
}

#[test]
fn numpy_arrays() {
    let mut seeds = fixtures(&["stored.npz", "deflated.npz", "big_endian.npz", "fortran.npz", "complex64.npz"]);
    // Small, so that changes fall on the directory and the array's header.
    let array = containers::npy("<f4", false, &[2, 3], &[0; 24]);
    seeds.extend([false, true].map(|deflate| containers::zip(&[("a.npy".into(), array.clone())], deflate)));
    fuzz("model.npz", &seeds, read_checkpoint);
}

#[test]
fn torch_zip_files() {
    let mut seeds = fixtures(&["zip.pt", "nested.pt", "training.pt", "parameter.pt", "ordered.pt", "complex64.pt"]);
    let view = containers::View::whole("a", "FloatStorage", "0", &[2, 3]);
    let storages = [("0".to_owned(), vec![0; 24])];
    let pickle = containers::state_dict(&[view]);
    seeds.extend([false, true].map(|deflate| containers::torch_zip(pickle.clone(), &storages, "little", deflate)));
    fuzz("model.pt", &seeds, read_checkpoint);
}

/// The pickle alone is changed; the archive around it is sound, so that its CRC does not stop what is to be tried.
#[test]
fn torch_pickles() {
    let names = ["zip.pt", "nested.pt", "training.pt", "parameter.pt", "ordered.pt", "complex64.pt"];
    let archives = fixtures(&names).into_iter().map(|bytes| ZipArchive::new(Cursor::new(bytes)).unwrap());
    let mut storages = BTreeMap::new();
    let mut pickles = Vec::new();
    for mut archive in archives {
        for index in 0..archive.len() {
            let mut member = archive.by_index(index).unwrap();
            let name = member.name().unwrap().into_owned();
            let mut bytes = Vec::new();
            member.read_to_end(&mut bytes).unwrap();
            match name.split_once("/data/") {
                // Files of other tensors may need a longer storage of the same key.
                Some((_, key)) => {
                    let storage: &mut Vec<u8> = storages.entry(key.to_owned()).or_default();
                    storage.resize(storage.len().max(bytes.len()), 0);
                }
                None if name.ends_with("/data.pkl") => pickles.push(bytes),
                None => {}
            }
        }
    }
    assert_eq!(pickles.len(), names.len());
    let storages: Vec<_> = storages.into_iter().collect();
    fuzz("pickle.pt", &pickles, |path| {
        let pickle = std::fs::read(path).unwrap();
        std::fs::write(path, containers::torch_zip(pickle, &storages, "little", false)).unwrap();
        let read = read_checkpoint(path)?;
        let stored: usize = storages.iter().map(|(_, bytes)| bytes.len()).sum();
        // Sixteen times what is stored, and 8 bits widened to 16.
        assert!(read <= 32 * stored, "{read} bytes from {stored}");
        Ok(0)
    });
}

#[test]
fn torch_legacy_files() {
    let seeds = fixtures(&["legacy.pt", "legacy_nested.pt", "legacy_complex64.pt"]);
    fuzz("legacy.pt", &seeds, read_checkpoint);
}

#[test]
fn packed_manifests() {
    let folder = TempDir::new().unwrap();
    let packed = folder.path().join("seed.bkpack");
    let source = fixture().with_file_name("formats").join("expected.safetensors");
    let outcome = Command::cargo_bin("bkpack").unwrap().arg("convert").arg(source).arg("-o").arg(&packed).output();
    assert!(outcome.unwrap().status.success());
    let packed = std::fs::read(packed).unwrap();
    let length = u64::from_le_bytes(packed[..8].try_into().unwrap()) as usize;
    let (header, data) = packed[8..].split_at(length);
    let header = header.trim_ascii_end().to_vec();
    // The header alone is changed; length, padding and seal are made to fit it again, so that the manifest is reached.
    fuzz("model.bkpack", &[header], |path| {
        std::fs::write(path, sealed(&std::fs::read(path).unwrap(), data)).unwrap();
        let packed = PackedFile::open(path)?;
        let mut largest = 0;
        for name in packed.names() {
            if let Ok(tensor) = packed.tensor(name) {
                largest = largest.max(tensor.matrix().bytes());
            }
        }
        let _ = packed.check_contents(&Silent);
        assert!(largest <= data.len(), "{largest} bytes from {}", data.len());
        Ok(0)
    });
}

/// A packed file of this header, with its length, padding and seal.
fn sealed(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = [&[0; 8], header].concat();
    file.resize(file.len().next_multiple_of(4096), b' ');
    let length = file.len() as u64 - 8;
    file[..8].copy_from_slice(&length.to_le_bytes());
    let key = b"\"bkpack_seal\":\"";
    if let Some(at) = file.windows(key.len()).position(|window| window == key).map(|at| at + key.len())
        && file.len() >= at + 64
    {
        file[at..at + 64].fill(b'0');
        let seal = blake3::hash(&file).to_hex();
        file[at..at + 64].copy_from_slice(seal.as_bytes());
    }
    [&file, data].concat()
}

#[test]
fn policy_files() {
    let recipe = "version = 1\n[tensors]\n'a.weight' = \"int4:g64\"  # 640 bytes\n[patterns]\n'norm$' = \"keep\"\n";
    let rules =
        "coupled = ['(a)b']\n[encodings]\nexpert = \"int3:row\"\n[[rule]]\ncomponent = \"expert\"\npattern = 'x+'\n";
    let importance = r#"{"version": 1, "model": {"name": "m", "blake3": "1"}, "text": {"name": "t", "blake3": "0"}, "batches": 1, "ctx": 8,
        "tensors": [{"name": "a", "component": "other", "gradient": 1, "output_variance": 2, "weight": 3, "score": 0.5}]}"#;
    let sensitivity =
        r#"{"version": 1, "tensors": [{"name": "a", "options": [{"encoding": "int4:g64", "cost": 0.25}]}]}"#;
    let seeds = [recipe, rules, importance, sensitivity].map(|text| text.as_bytes().to_vec());
    fuzz("policy", &seeds, |path| {
        let file = PolicyFile::read(path)?;
        let recipe = Recipe::parse(file.clone()).map(drop);
        let rules = ComponentRules::with_file(file.clone()).map(drop);
        let importance = Importance::read(path).map(drop);
        let sensitivity = SensitivityTable::parse(file).map(drop);
        recipe.or(rules).or(importance).or(sensitivity).map(|()| 0)
    });
}
