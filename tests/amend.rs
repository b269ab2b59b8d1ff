//! Scales of activations are added to a packed file, replaced and removed; every other byte of the weights stays.

use std::{
    collections::BTreeMap,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bkpack::{
    Error, Result,
    checkpoint::{self, header::Header},
    encoding::Request,
    format::{
        PackedFile,
        amend::with_activations,
        archive::{archive, unpack},
    },
    pack::{PackOptions, Packing},
    policy::Policy,
    progress::{Observer, Silent, Unit},
    tensor::{ActivationQuantization, CalibrationText, TensorSource},
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use tempfile::TempDir;

type Scales = Vec<(String, Vec<usize>, Vec<f32>)>;

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors/valid")
}

/// A record over 10 positions in groups of 3, and its scales, for these layers.
fn record(bits: u32, layers: &[&str]) -> (ActivationQuantization, Scales) {
    let names: Vec<String> = layers.iter().map(|layer| format!("{layer}.activation_scale")).collect();
    let values = (0..12u8).map(|index| f32::from(index) / 8.0).collect::<Vec<_>>();
    let scales = names.iter().map(|name| (name.clone(), vec![3, 4], values.clone())).collect();
    let text = CalibrationText { name: "text.txt".into(), blake3: blake3::hash(b"text").to_hex().to_string() };
    let component = "bk_core".into();
    (ActivationQuantization { component, bits, group_size: 3, positions: 10, samples: 7, text, scales: names }, scales)
}

fn amend(path: &Path, layers: &[&str], output: &Path, force: bool) -> Result<PathBuf> {
    let (record, scales) = record(8, layers);
    with_activations(&PackedFile::open(path)?, vec![record], scales, output, force, &Silent)
}

/// The bytes, type and shape of every part by name.
fn parts(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = std::fs::read(path).unwrap();
    let header = Header::read(path, &file).unwrap();
    let part = |part: bkpack::checkpoint::header::HeaderTensor| {
        (part.name, (part.dtype.to_string(), part.shape, file[part.range].to_vec()))
    };
    header.tensors.into_iter().map(part).collect()
}

fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

#[test]
fn every_other_part_of_every_vector_stays_as_it_is() {
    let folder = TempDir::new().unwrap();
    let mut files = 0;
    for path in names(&vectors()).into_iter().filter(|path| path.extension().is_some_and(|end| end == "bkpack")) {
        let output = folder.path().join(path.file_name().unwrap());
        assert_eq!(amend(&path, &["layer.2", "layer.10"], &output, false).unwrap(), output);
        let (before, after) = (PackedFile::open(&path).unwrap(), PackedFile::open(&output).unwrap());
        after.check_contents(&Silent).unwrap();

        let mut expected = parts(&path);
        before.activations().iter().flat_map(|record| &record.scales).for_each(|name| drop(expected.remove(name)));
        let (record, scales) = record(8, &["layer.2", "layer.10"]);
        for (name, shape, values) in scales {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert!(expected.insert(name, ("F32".into(), shape, bytes)).is_none());
        }
        assert!(parts(&output) == expected, "{}", path.display());
        assert_eq!(after.activations(), [record]);
        let (old, new) = (before.manifest(), after.manifest());
        assert_eq!((&old.producer, &old.source), (&new.producer, &new.source));
        assert_eq!((&old.policy, &old.config), (&new.policy, &new.config));
        assert_eq!(before.files().collect::<Vec<_>>(), after.files().collect::<Vec<_>>());
        for tensor in before.tensors().iter().filter(|tensor| !tensor.name.ends_with(".activation_scale")) {
            let copy = after.entry(&tensor.name).unwrap();
            assert_eq!((&tensor.shape, &tensor.component), (&copy.shape, &copy.component));
            assert_eq!((tensor.encoding, tensor.complex), (copy.encoding, copy.complex));
        }
        assert_eq!(before.parameters(), after.parameters());
        files += 1;
    }
    assert!(files >= 25, "{files}");
}

fn packed_fixture(output: &Path) {
    let policy = Policy::uniform("int4".parse::<Request>().unwrap(), &[], &[]).unwrap();
    let options = PackOptions { rounding: Rounding::Nearest, ..PackOptions::new(policy) };
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama");
    let checkpoint = checkpoint::open(&fixture).unwrap();
    let packing = Packing::plan(&checkpoint, &options, output, Cpu::detect(), &Silent).unwrap();
    packing.write(Cpu::detect(), false, &Silent).unwrap();
}

#[test]
fn scales_are_replaced_and_removed_in_place() {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model.bkpack");
    packed_fixture(&model);
    let original = std::fs::read(&model).unwrap();

    assert!(matches!(amend(&model, &["a"], &model, false), Err(Error::Exists { .. })));
    assert!(std::fs::read(&model).unwrap() == original);

    amend(&model, &["a", "b"], &model, true).unwrap();
    let open = PackedFile::open(&model).unwrap();
    assert!(open.shape("a.activation_scale").is_some() && open.shape("b.activation_scale").is_some());
    amend(&model, &["b", "c"], &model, true).unwrap();
    // What was opened before is whole still.
    open.check_contents(&Silent).unwrap();
    let open = PackedFile::open(&model).unwrap();
    open.check_contents(&Silent).unwrap();
    assert!(open.shape("a.activation_scale").is_none() && open.shape("c.activation_scale").is_some());

    with_activations(&open, Vec::new(), Vec::new(), &model, true, &Silent).unwrap();
    assert!(std::fs::read(&model).unwrap() == original);
    assert_eq!(names(folder.path()), [model]);
}

#[test]
fn an_amended_file_is_archived_and_restored() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    amend(&vectors().join("complex.bkpack"), &["a"], &path("model.bkpack"), false).unwrap();
    archive(&path("model.bkpack"), &path("archive"), false, &Silent).unwrap();
    unpack(&path("archive"), &path("restored.bkpack"), false, &Silent).unwrap();
    assert!(std::fs::read(path("restored.bkpack")).unwrap() == std::fs::read(path("model.bkpack")).unwrap());
    let error = amend(&path("archive"), &["a"], &path("out"), false).unwrap_err();
    assert!(error.to_string().contains("bkpack unpack"), "{error}");
    assert!(!path("out").exists());
}

/// Cancels once so many bytes are copied.
struct CancelAfter {
    bytes: u64,
    copied: AtomicU64,
}

impl Observer for CancelAfter {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, amount: u64) {
        self.copied.fetch_add(amount, Ordering::Relaxed);
    }
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.copied.load(Ordering::Relaxed) >= self.bytes
    }
}

#[test]
fn cancelling_leaves_the_original_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model.bkpack");
    packed_fixture(&model);
    let original = std::fs::read(&model).unwrap();
    let packed = PackedFile::open(&model).unwrap();
    for output in [&model, &folder.path().join("copy.bkpack")] {
        for bytes in [0, 1, original.len() as u64 / 2] {
            let observer = CancelAfter { bytes, copied: AtomicU64::new(0) };
            let (record, scales) = record(4, &["a"]);
            let error = with_activations(&packed, vec![record], scales, output, true, &observer).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
            assert!(std::fs::read(&model).unwrap() == original);
            assert_eq!(names(folder.path()), std::slice::from_ref(&model));
        }
    }
}

#[test]
fn a_part_that_does_not_match_its_hash_is_not_copied() {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model.bkpack");
    for part in ["w_packed", "norm", "bkpack.file/config.json"] {
        std::fs::copy(vectors().join("files.bkpack"), &model).unwrap();
        let bytes = std::fs::read(&model).unwrap();
        let header = Header::read(&model, &bytes).unwrap();
        let place = header.tensors.iter().find(|tensor| tensor.name == part).unwrap().range.start;
        let file = std::fs::OpenOptions::new().write(true).open(&model).unwrap();
        file.write_all_at(&[bytes[place] ^ 1], place as u64).unwrap();
        let changed = std::fs::read(&model).unwrap();
        match amend(&model, &["a"], &model, true).unwrap_err() {
            Error::PartHash { part: found, .. } => assert_eq!(found, part),
            other => panic!("{other}"),
        }
        assert!(std::fs::read(&model).unwrap() == changed);
        assert_eq!(names(folder.path()), std::slice::from_ref(&model));
    }
}

#[test]
fn a_sharded_model_is_refused() {
    let folder = TempDir::new().unwrap();
    let model = vectors().join("sharded/model.bkpack.index.json");
    let error = amend(&model, &["a"], &folder.path().join("out.bkpack"), false).unwrap_err();
    assert!(matches!(error, Error::ShardSet { .. }), "{error}");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn records_and_scales_that_break_a_rule_are_refused_before_anything_is_written() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("out.bkpack");
    let packed = PackedFile::open(&vectors().join("files.bkpack")).unwrap();
    type Change = fn(&mut Vec<ActivationQuantization>, &mut Scales);
    let cases: [(&str, Change); 19] = [
        ("recorded twice", |records, _| records.push(records[0].clone())),
        ("bk_core only", |records, _| records[0].component = "expert".into()),
        ("bits is 5", |records, _| records[0].bits = 5),
        ("group_size is 0", |records, _| records[0].group_size = 0),
        ("positions is 0", |records, _| records[0].positions = 0),
        ("number of scales is 0", |records, scales| {
            records[0].scales.clear();
            scales.clear();
        }),
        ("named twice", |records, _| records[0].scales.push("a.activation_scale".into())),
        ("no tensor has this name", |records, _| records[0].scales.push("b.activation_scale".into())),
        ("no tensor has this name", |_, scales| scales.clear()),
        ("no record names this tensor", |records, _| records.clear()),
        ("already has a tensor", |_, scales| scales.push(scales[0].clone())),
        ("already has a tensor", |records, scales| {
            records[0].scales[0] = "norm".into();
            scales[0].0 = "norm".into();
        }),
        ("already has a tensor", |records, scales| {
            records[0].scales[0] = "w_packed".into();
            scales[0].0 = "w_packed".into();
        }),
        ("already has a tensor", |records, scales| {
            records[0].scales[0] = "bkpack.file/config.json".into();
            scales[0].0 = "bkpack.file/config.json".into();
        }),
        ("the name must be", |records, scales| {
            records[0].scales[0] = "a.scales".into();
            scales[0].0 = "a.scales".into();
        }),
        ("do not fill the shape", |_, scales| scales[0].1 = vec![3, 5]),
        ("where [3, 4] is needed", |_, scales| scales[0].1 = vec![4, 3]),
        ("element 3 is NaN", |_, scales| scales[0].2[3] = f32::NAN),
        ("element 11 is -0.5", |_, scales| scales[0].2[11] = -0.5),
    ];
    for (why, change) in cases {
        let (record, mut scales) = record(8, &["a"]);
        let mut records = vec![record];
        change(&mut records, &mut scales);
        let error = with_activations(&packed, records, scales, &output, false, &Silent).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("files.bkpack"), "{why}: {error}");
        assert!(names(folder.path()).is_empty());
    }
}
