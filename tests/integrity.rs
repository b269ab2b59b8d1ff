//! A packed file is what was packed, to the bit: no byte can change unnoticed, no thread count or instruction set
//! matters, sizes are known beforehand, an archive restores what it was made from.

mod common;

use std::{
    fs::{File, OpenOptions},
    io::Cursor,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bkpack::{
    Error, Result,
    checkpoint::{self, header::Header},
    encoding::{Encoding, FloatName, Request},
    format::{
        PackedFile,
        amend::with_activations,
        archive::{archive, unpack},
    },
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::{TensorData, TensorSource},
};
use bkpack_kernels::{Cpu, Isa, cpu::quantize::Rounding};
use common::{Random, Stored, fixture, safetensors};
use tempfile::TempDir;
use zeekstd::DecodeOptions;

fn options(default: &str, overrides: &[&str]) -> PackOptions {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    PackOptions {
        policy: Policy::uniform(default.parse::<Request>().unwrap(), &[], &overrides).unwrap(),
        rounding: Rounding::Search,
        feedback: false,
        calibration: None,
        ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
        scales: Default::default(),
        allow_nonfinite: false,
        shard_bytes: None,
    }
}

/// Packs a checkpoint; returns the bytes that were predicted.
fn pack(cpu: Cpu, source: &Path, options: &PackOptions, output: &Path) -> u64 {
    let checkpoint = checkpoint::open(source).unwrap();
    let packing = Packing::plan(&checkpoint, options, output, cpu, &Silent).unwrap();
    let predicted = packing.file_bytes();
    packing.write(cpu, false, &Silent).unwrap();
    predicted
}

/// A checkpoint of ragged shapes and all float types, small enough to be changed thousands of times.
fn ragged() -> TempDir {
    let mut random = Random(7);
    let mut tensor =
        |name: &str, dtype, shape: &[usize], factor| Stored::random(name, dtype, shape, factor, &mut random);
    let tensors = [
        tensor("embed_tokens.weight", "BF16", &[37, 129], 0.02),
        tensor("layers.0.a.weight", "F16", &[33, 64], 0.02),
        tensor("layers.0.b.weight", "F32", &[11, 300], 0.02),
        tensor("layers.0.c.weight", "BF16", &[2, 17, 95], 1.0),
        tensor("layers.0.tiny.weight", "F32", &[32, 96], 1e-9),
        tensor("layers.0.norm.weight", "F32", &[7], 1.0),
        tensor("layers.0.gain", "F16", &[], 1.0),
        tensor("layers.1.kept.weight", "BF16", &[40, 41], 1.0),
        tensor("layers.1.narrow.weight", "F16", &[3, 5], 1.0),
        tensor("layers.10.d.weight", "F32", &[32, 33], 0.02),
        tensor("norm.weight", "BF16", &[1], 1.0),
    ];
    let folder = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("model.safetensors", &safetensors(&tensors));
    write("config.json", br#"{"architectures": ["RaggedForTests"]}"#);
    write("tokenizer.json", &(0..999u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    write("merges.txt", b"");
    folder
}

/// Every kind of encoding at once.
const MIXED: [&str; 7] = [
    "embed=int3:g32:asym",
    r"\.a\.=ternary:g64",
    r"\.b\.=int5:row",
    r"\.c\.=binary:g32",
    "tiny=int4:g32",
    "kept=keep",
    r"\.d\.=int7:g64:asym",
];

fn mixed() -> PackOptions {
    options("int8", &MIXED)
}

fn contents_of(path: &Path) -> Result<()> {
    PackedFile::open(path)?.check_contents(&Silent)
}

/// What lies where in a file: the header's text, its padding, then each part.
struct Region {
    name: String,
    start: usize,
    end: usize,
}

fn regions(path: &Path, bytes: &[u8]) -> Vec<Region> {
    let header = Header::read(path, bytes).unwrap();
    let text_end = bytes[..header.data_start].iter().rposition(|&byte| byte != b' ').unwrap() + 1;
    let mut regions = vec![
        Region { name: "length".into(), start: 0, end: 8 },
        Region { name: "text".into(), start: 8, end: text_end },
        Region { name: "padding".into(), start: text_end, end: header.data_start },
    ];
    let parts = header.tensors.into_iter().filter(|part| !part.range.is_empty());
    regions.extend(parts.map(|part| Region { name: part.name, start: part.range.start, end: part.range.end }));
    regions.retain(|region| region.start < region.end);
    regions
}

/// Changes `count` single bytes of `changed`, one after the other, and asserts that opening `model` refuses each: by
/// the name of the part that was changed, or, in the header, before any part is read.
fn assert_every_change_is_refused(model: &Path, changed: &Path, count: usize, random: &mut Random) {
    let original = std::fs::read(changed).unwrap();
    let regions = regions(changed, &original);
    let file = OpenOptions::new().write(true).open(changed).unwrap();
    for turn in 0..count {
        // Every region gets its turn; in between, places anywhere in the file.
        let region = match turn % 2 {
            0 => &regions[turn / 2 % regions.len()],
            _ => {
                let place = random.below(original.len());
                regions.iter().find(|region| (region.start..region.end).contains(&place)).unwrap()
            }
        };
        let place = region.start + random.below(region.end - region.start);
        let value = match turn % 3 {
            0 => original[place] ^ (1 << random.below(8)),
            _ => original[place].wrapping_add(1 + random.below(255) as u8),
        };
        file.write_all_at(&[value], place as u64).unwrap();
        let whole = contents_of(model);
        let Err(error) = whole else { panic!("byte {place} ({}) became {value} unnoticed", region.name) };
        let in_header = ["length", "text", "padding"].contains(&region.name.as_str());
        match &error {
            Error::PartHash { part, tensor, .. } if !in_header => {
                assert_eq!(part, &region.name);
                assert!(error.to_string().contains(tensor.as_str()));
            }
            Error::PartHash { .. } | Error::Codes { .. } => panic!("byte {place} of the header: {error}"),
            _ if in_header => assert!(PackedFile::open(model).is_err()),
            other => panic!("byte {place} of {}: {other}", region.name),
        }
        assert!(error.to_string().contains(".bkpack"), "{error}");
        file.write_all_at(&original[place..place + 1], place as u64).unwrap();
    }
    contents_of(model).unwrap();
}

#[test]
fn no_byte_of_the_fixture_can_change_unnoticed() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    pack(Cpu::detect(), &fixture(), &options("int4", &[]), &output);
    assert_every_change_is_refused(&output, &output, 2000, &mut Random(11));
}

#[test]
fn no_byte_of_any_encoding_can_change_unnoticed() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let output = folder.path().join("model.bkpack");
    pack(Cpu::detect(), source.path(), &mixed(), &output);
    assert_every_change_is_refused(&output, &output, 3000, &mut Random(12));
}

#[test]
fn no_byte_of_complex_halves_and_activation_scales_can_change_unnoticed() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors/valid");
    let packed = PackedFile::open(&vectors.join("complex.bkpack")).unwrap();
    let record = PackedFile::open(&vectors.join("activations.bkpack")).unwrap().activations()[0].clone();
    let scales = record.scales.iter().map(|name| (name.clone(), vec![3, 4], vec![0.5; 12])).collect();
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    with_activations(&packed, vec![record], scales, &output, false, &Silent).unwrap();
    assert_eq!(packed.complex_names().count(), 5);
    assert_every_change_is_refused(&output, &output, 2000, &mut Random(17));
}

/// Lengths around every border of a file, the shortest ones, and some at random; the longest first.
fn cuts(path: &Path, bytes: &[u8], random: &mut Random) -> Vec<u64> {
    let mut lengths: Vec<usize> = (0..=16).collect();
    for region in regions(path, bytes) {
        lengths.extend([region.start.saturating_sub(1), region.start, region.start + 1, region.end - 1, region.end]);
    }
    lengths.extend((0..50).map(|_| random.below(bytes.len())));
    lengths.retain(|&length| length < bytes.len());
    lengths.sort_unstable();
    lengths.dedup();
    lengths.into_iter().rev().map(|length| length as u64).collect()
}

#[test]
fn a_file_cut_anywhere_or_longer_by_anything_is_refused() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    for (name, source, options) in [("small", source.path(), mixed()), ("real", &fixture(), options("int4", &[]))] {
        let output = folder.path().join(format!("{name}.bkpack"));
        pack(Cpu::detect(), source, &options, &output);
        let original = std::fs::read(&output).unwrap();
        for extra in [1, 64, 4096] {
            let longer = [&original[..], &vec![b' '; extra]].concat();
            std::fs::write(&output, longer).unwrap();
            let error = PackedFile::open(&output).unwrap_err();
            assert!(matches!(error, Error::Safetensors { .. }), "{extra} bytes more: {error}");
        }
        let cuts = cuts(&output, &original, &mut Random(13));
        assert!(cuts.len() > 80);
        let file = OpenOptions::new().write(true).open(&output).unwrap();
        for length in cuts {
            file.set_len(length).unwrap();
            let error = PackedFile::open(&output).unwrap_err();
            assert!(matches!(error, Error::Safetensors { .. }), "{length} bytes: {error}");
        }
    }
}

/// A sharded model, and its shards.
fn sharded(folder: &Path, source: &Path, mut options: PackOptions, shard_bytes: u64) -> (PathBuf, Vec<PathBuf>) {
    let output = folder.join("model.bkpack");
    options.shard_bytes = Some(shard_bytes);
    let predicted = pack(Cpu::detect(), source, &options, &output);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let on_disk: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
    assert_eq!(predicted, on_disk);
    files.retain(|file| file.extension().unwrap() == "bkpack");
    (output, files)
}

#[test]
fn no_byte_of_a_shard_can_change_unnoticed() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let (output, shards) = sharded(folder.path(), source.path(), mixed(), 8000);
    assert!(shards.len() >= 3, "{shards:?}");
    for (index, shard) in shards.iter().enumerate() {
        assert_every_change_is_refused(&output, shard, 300, &mut Random(20 + index as u64));
        // Alone it is no model.
        assert!(matches!(PackedFile::open(shard), Err(Error::ShardSet { .. })));
        let original = std::fs::read(shard).unwrap();
        let file = OpenOptions::new().write(true).open(shard).unwrap();
        for length in cuts(shard, &original, &mut Random(40)) {
            file.set_len(length).unwrap();
            assert!(matches!(PackedFile::open(&output), Err(Error::Safetensors { .. })), "{length} bytes");
        }
        std::fs::write(shard, original).unwrap();
    }
    contents_of(&output).unwrap();
}

#[test]
fn no_byte_of_the_index_can_change_unnoticed() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let (output, _) = sharded(folder.path(), source.path(), mixed(), 8000);
    let index = folder.path().join("model.bkpack.index.json");
    let original = std::fs::read(&index).unwrap();
    let mut random = Random(14);
    for place in 0..original.len() {
        let mut changed = original.clone();
        changed[place] = changed[place].wrapping_add(1 + random.below(255) as u8);
        std::fs::write(&index, &changed).unwrap();
        for path in [&output, &index] {
            assert!(PackedFile::open(path).is_err(), "byte {place} became {}", changed[place]);
        }
    }
    for changed in [&original[..original.len() - 1], &[&original[..], b"\n"].concat(), b""] {
        std::fs::write(&index, changed).unwrap();
        assert!(PackedFile::open(&output).is_err());
    }
    std::fs::write(&index, original).unwrap();
    contents_of(&index).unwrap();
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let (source, ours, theirs) = (ragged(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let (output, shards) = sharded(ours.path(), source.path(), mixed(), 8000);
    let mut other = mixed();
    other.rounding = Rounding::Nearest;
    let (_, other_shards) = sharded(theirs.path(), source.path(), other, 8000);
    let original = std::fs::read(&shards[1]).unwrap();
    std::fs::copy(&other_shards[1], &shards[1]).unwrap();
    assert!(matches!(PackedFile::open(&output), Err(Error::ShardSet { .. })), "a shard of another conversion");
    std::fs::copy(&shards[0], &shards[1]).unwrap();
    assert!(PackedFile::open(&output).is_err(), "the same shard twice");
    std::fs::remove_file(&shards[1]).unwrap();
    assert!(matches!(PackedFile::open(&output), Err(Error::MissingShard { .. })));
    std::fs::write(&shards[1], original).unwrap();
    contents_of(&output).unwrap();
}

#[test]
fn threads_instruction_sets_and_runs_give_the_same_bytes() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    for (name, source, options) in [("small", source.path(), mixed()), ("real", &fixture(), options("int4", &[]))] {
        let mut expected: Option<Vec<u8>> = None;
        for cpu in Cpu::available() {
            // The scalar code takes seconds for the real model: two threads are enough there.
            let threads: &[usize] = if cpu.isa() == Isa::Scalar { &[2] } else { &[1, 2, 2, 5] };
            for (run, &threads) in threads.iter().enumerate() {
                let output = folder.path().join(format!("{name}-{}-{threads}-{run}.bkpack", cpu.isa()));
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| pack(cpu, source, &options, &output));
                let bytes = std::fs::read(&output).unwrap();
                std::fs::remove_file(&output).unwrap();
                let expected = expected.get_or_insert_with(|| bytes.clone());
                assert!(*expected == bytes, "{name} differs with {threads} threads on {}", cpu.isa());
            }
        }
    }
}

#[test]
fn predicted_sizes_are_the_sizes_on_disk() {
    let source = ragged();
    let mut shard_counts = Vec::new();
    for default in
        ["int2", "int4:g32:asym", "int3:row:asym", "int6:g64", "ternary:g32", "binary:row", "fp16", "fp32", "keep"]
    {
        for overrides in [&[][..], &MIXED, &["norm=fp32", "tiny=fp32"]] {
            for shard_bytes in [None, Some(1), Some(5000), Some(20_000), Some(1_000_000)] {
                let folder = TempDir::new().unwrap();
                let output = folder.path().join("model.bkpack");
                let options = PackOptions { shard_bytes, rounding: Rounding::Nearest, ..options(default, overrides) };
                let predicted = pack(Cpu::detect(), source.path(), &options, &output);
                let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap()).collect();
                let on_disk: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
                let packed = PackedFile::open(&output).unwrap();
                assert_eq!(
                    (predicted, predicted),
                    (on_disk, packed.file_bytes()),
                    "{default} {overrides:?} {shard_bytes:?}"
                );
                packed.check_contents(&Silent).unwrap();
                assert_eq!(packed.names(), checkpoint::open(source.path()).unwrap().names());
                shard_counts.push(files.len());
            }
        }
    }
    // One file; or an index and some shards, up to one for each of the eleven tensors.
    assert_eq!((shard_counts.iter().min(), shard_counts.iter().max()), (Some(&1), Some(&12)));
}

#[test]
fn scales_that_f16_cannot_hold_are_f32() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let output = folder.path().join("model.bkpack");
    pack(Cpu::detect(), source.path(), &mixed(), &output);
    let packed = PackedFile::open(&output).unwrap();
    let encoding = |name| packed.entry(name).unwrap().encoding;
    assert!(matches!(encoding("layers.0.tiny.weight"), Encoding::Int { scale: FloatName::F32, .. }));
    assert!(matches!(encoding("layers.0.b.weight"), Encoding::Int { scale: FloatName::F16, .. }));
    let checkpoint = checkpoint::open(source.path()).unwrap();
    let norm_of_difference = |source: &dyn TensorSource| {
        let tensor = source.tensor("layers.0.tiny.weight").unwrap();
        let mut values = vec![0.0; tensor.elements()];
        Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
        values
    };
    let (found, expected) = (norm_of_difference(&packed), norm_of_difference(&checkpoint));
    let error: f64 = found.iter().zip(&expected).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|&value| f64::from(value).powi(2)).sum();
    assert!((error / norm).sqrt() < 0.12, "{}", (error / norm).sqrt());
}

#[test]
fn kept_tensors_and_travelling_files_are_the_sources_own_bytes() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let output = folder.path().join("model.bkpack");
    pack(Cpu::detect(), source.path(), &options("keep", &[]), &output);
    let (packed, checkpoint) = (PackedFile::open(&output).unwrap(), checkpoint::open(source.path()).unwrap());
    let mut kinds = std::collections::BTreeSet::new();
    for name in checkpoint.names() {
        let (found, expected) = (packed.tensor(name).unwrap(), checkpoint.tensor(name).unwrap());
        assert_eq!(found.shape(), expected.shape());
        let (TensorData::Float { dtype, values }, TensorData::Float { dtype: wanted, values: bytes }) =
            (found.data(), expected.data())
        else {
            panic!("{name} is not plain");
        };
        assert!(dtype == wanted && values == bytes, "{name}");
        kinds.insert(format!("{dtype:?}"));
    }
    assert_eq!(kinds.len(), 3);
    for name in ["config.json", "tokenizer.json", "merges.txt"] {
        let expected = std::fs::read(source.path().join(name)).unwrap();
        assert_eq!(packed.file(name).unwrap().as_deref(), Some(&expected[..]), "{name}");
    }
    assert_eq!(packed.files().count(), 3);
}

#[test]
fn an_archive_restores_the_packed_file_bit_for_bit() {
    let source = ragged();
    for (source, options) in
        [(source.path(), mixed()), (&fixture(), options("fp16", &[])), (&fixture(), options("int4", &[]))]
    {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        pack(Cpu::detect(), source, &options, &path("model.bkpack"));
        let size = archive(&path("model.bkpack"), &path("archive"), false, &Silent).unwrap();
        let packed = std::fs::read(path("model.bkpack")).unwrap();
        let archived = std::fs::read(path("archive")).unwrap();
        assert_eq!(size, archived.len() as u64);
        unpack(&path("archive"), &path("restored.bkpack"), false, &Silent).unwrap();
        assert!(std::fs::read(path("restored.bkpack")).unwrap() == packed);

        // What the specification says of an archive, read with nothing but a zstd reader.
        let header = Header::read(&path("archive"), &archived).unwrap();
        assert_eq!(header.metadata["bkpack_archive"], "1");
        let inner = Header::read(&path("model.bkpack"), &packed).unwrap();
        let mut frames = 0;
        for part in &header.tensors {
            assert_eq!(part.dtype, ::safetensors::Dtype::U8);
            let stored = &archived[part.range.clone()];
            let mut decoder = DecodeOptions::new(Cursor::new(stored)).into_decoder().unwrap();
            frames += decoder.seek_table().num_frames();
            let mut content = Vec::new();
            std::io::copy(&mut decoder, &mut content).unwrap();
            let expected = match part.name.as_str() {
                "bkpack.header" => &packed[..inner.data_start],
                name => &packed[inner.tensors.iter().find(|part| part.name == name).unwrap().range.clone()],
            };
            assert!(content == expected, "{}", part.name);
            let table = DecodeOptions::new(Cursor::new(stored)).into_decoder().unwrap().seek_table().clone();
            assert!(table.max_frame_size_decomp() <= 1 << 20, "{}: a frame is too long", part.name);
        }
        assert_eq!(header.tensors.len(), inner.tensors.len() + 1);
        assert!(frames as usize >= header.tensors.iter().filter(|part| !part.range.is_empty()).count() - 1);
    }
}

#[test]
fn a_changed_archive_is_refused_or_restores_the_same_bytes() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let path = |name: &str| folder.path().join(name);
    pack(Cpu::detect(), source.path(), &mixed(), &path("model.bkpack"));
    archive(&path("model.bkpack"), &path("archive"), false, &Silent).unwrap();
    let (packed, original) = (std::fs::read(path("model.bkpack")).unwrap(), std::fs::read(path("archive")).unwrap());
    let before = names(folder.path());
    let mut refused = 0;
    let mut check = |why: String| match unpack(&path("archive"), &path("restored.bkpack"), false, &Silent) {
        Ok(()) => {
            assert!(std::fs::read(path("restored.bkpack")).unwrap() == packed, "{why}: other bytes were restored");
            std::fs::remove_file(path("restored.bkpack")).unwrap();
            assert_eq!(names(folder.path()), before, "{why}");
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{error}");
            assert!(error.to_string().contains("archive"), "{error}");
            assert_eq!(names(folder.path()), before, "{why} left something behind");
            refused += 1;
        }
    };
    let regions = regions(&path("archive"), &original);
    let file = OpenOptions::new().write(true).open(path("archive")).unwrap();
    let mut random = Random(15);
    for turn in 0..1000 {
        let region = &regions[turn % regions.len()];
        let place = region.start + random.below(region.end - region.start);
        let value = original[place].wrapping_add(1 + random.below(255) as u8);
        file.write_all_at(&[value], place as u64).unwrap();
        check(format!("byte {place} ({}) became {value}", region.name));
        file.write_all_at(&original[place..=place], place as u64).unwrap();
    }
    for length in cuts(&path("archive"), &original, &mut Random(16)) {
        file.set_len(length).unwrap();
        check(format!("{length} bytes"));
    }
    std::fs::write(path("archive"), [&original[..], b"x"].concat()).unwrap();
    check("a byte more".into());
    // A byte of the padding, or one that zstd does not use, may change without harm.
    assert!(refused > 900, "{refused}");
}

fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

#[test]
fn what_is_no_archive_is_not_unpacked_and_shards_are_not_archived() {
    let (source, folder) = (ragged(), TempDir::new().unwrap());
    let path = |name: &str| folder.path().join(name);
    pack(Cpu::detect(), source.path(), &mixed(), &path("whole.bkpack"));
    let error = unpack(&path("whole.bkpack"), &path("out"), false, &Silent).unwrap_err();
    assert!(error.to_string().contains("packed file already"), "{error}");
    let error = unpack(&source.path().join("model.safetensors"), &path("out"), false, &Silent).unwrap_err();
    assert!(matches!(error, Error::Archive { .. }), "{error}");
    File::create(path("empty")).unwrap();
    assert!(matches!(unpack(&path("empty"), &path("out"), false, &Silent), Err(Error::Safetensors { .. })));
    let shards = TempDir::new().unwrap();
    let (output, _) = sharded(shards.path(), source.path(), mixed(), 8000);
    assert!(matches!(archive(&output, &path("out"), false, &Silent), Err(Error::ShardSet { .. })));
    assert!(!path("out").exists());
    assert!(matches!(archive(&path("whole.bkpack"), &path("empty"), false, &Silent), Err(Error::Exists { .. })));
}
