//! The same weights in every file format are the same weights.

mod common;
mod containers;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Output,
};

use assert_cmd::Command;
use bkpack::{
    Error,
    checkpoint::{self, Checkpoint, CheckpointKind, OpenOptions},
    format::PackedFile,
    progress::Silent,
    tensor::{ComplexPart, TensorData, TensorSource},
};
use bkpack_kernels::{Cpu, FloatType};
use common::{Random, Stored, fixture, safetensors};
use containers::View;
use tempfile::TempDir;

fn formats() -> PathBuf {
    fixture().with_file_name("formats")
}

/// A tensor's type and bytes as the checkpoint gives them.
fn bytes(source: &Checkpoint, name: &str) -> (FloatType, Vec<u8>) {
    match source.tensor(name).unwrap().data() {
        TensorData::Float { dtype, values } => (*dtype, values.to_vec()),
        TensorData::Quantized { .. } => panic!("{name} is quantized"),
    }
}

fn values(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    let tensor = source.tensor(name).unwrap();
    let matrix = tensor.matrix();
    let mut values = vec![0.0; tensor.elements()];
    for (index, row) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        Cpu::detect().dequantize(&matrix, index, row);
    }
    values
}

/// Files written by PyTorch and NumPy themselves.
#[test]
fn every_container_holds_what_pytorch_and_numpy_put_there() {
    let expected = checkpoint::open(&formats().join("expected.safetensors")).unwrap();
    let plain = expected.names().len() - 2;
    for (file, kind, tensors) in [
        ("zip.pt", CheckpointKind::Torch, plain),
        ("legacy.pt", CheckpointKind::Torch, plain),
        ("nested.pt", CheckpointKind::Torch, plain),
        ("legacy_nested.pt", CheckpointKind::Torch, plain),
        ("parameter.pt", CheckpointKind::Torch, 1),
        ("ordered.pt", CheckpointKind::Torch, 1),
        ("training.pt", CheckpointKind::Torch, 1),
        ("complex64.pt", CheckpointKind::Torch, 2),
        ("legacy_complex64.pt", CheckpointKind::Torch, 2),
        ("sharded", CheckpointKind::HuggingFace, plain),
        ("stored.npz", CheckpointKind::Npz, plain - 1),
        ("deflated.npz", CheckpointKind::Npz, plain - 1),
        ("big_endian.npz", CheckpointKind::Npz, plain - 1),
        ("fortran.npz", CheckpointKind::Npz, plain - 1),
        ("complex64.npz", CheckpointKind::Npz, 2),
    ] {
        let found = checkpoint::open(&formats().join(file)).unwrap();
        assert_eq!((found.kind(), found.names().len()), (kind, tensors), "{file}: {:?}", found.names());
        for name in found.names() {
            assert_eq!(found.shape(name), expected.shape(name), "{file}: {name}");
            assert_eq!(bytes(&found, name), bytes(&expected, name), "{file}: {name}");
        }
        let complex = found.complex_part("complex.imag") == Some(ComplexPart::Imaginary);
        assert_eq!(complex, file.contains("complex"), "{file}");
    }
}

/// The real checkpoint in FP32: name, shape and values.
fn llama() -> Vec<Stored> {
    let source = checkpoint::open(&fixture()).unwrap();
    let tensor = |name: &String| Stored::of(name, "F32", source.shape(name).unwrap(), &values(&source, name));
    source.names().iter().map(tensor).collect()
}

/// The values in column-major order.
fn transposed(tensor: &Stored) -> Vec<u8> {
    let [rows, cols] = tensor.shape[..] else { return tensor.bytes.clone() };
    let value = |index: usize| tensor.bytes[4 * index..4 * index + 4].iter().copied();
    (0..cols).flat_map(|col| (0..rows).flat_map(move |row| value(row * cols + col))).collect()
}

fn big_endian(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks_exact(4).flat_map(|value| value.iter().rev().copied()).collect()
}

fn views(tensors: &[Stored]) -> Vec<View> {
    let view = |(index, tensor): (usize, &Stored)| {
        View::whole(&tensor.name, "FloatStorage", &index.to_string(), &tensor.shape)
    };
    tensors.iter().enumerate().map(view).collect()
}

fn npz(tensors: &[Stored], deflate: bool, array: impl Fn(&Stored) -> Vec<u8>) -> Vec<u8> {
    let members: Vec<_> = tensors.iter().map(|tensor| (format!("{}.npy", tensor.name), array(tensor))).collect();
    containers::zip(&members, deflate)
}

fn bkpack(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::cargo_bin("bkpack").unwrap();
    command.args(arguments).output().unwrap()
}

/// Asserts wrong use or bad input, said in one sentence with these words.
#[track_caller]
fn assert_refused(outcome: &Output, words: &[&str]) {
    let message = String::from_utf8(outcome.stderr.clone()).unwrap();
    assert_eq!(outcome.status.code(), Some(2), "{message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
}

/// Every part of a packed file: its name and the hash of its bytes, which are checked.
fn parts(path: &Path) -> BTreeMap<String, String> {
    let packed = PackedFile::open(path).unwrap();
    packed.check_contents(&Silent).unwrap();
    let parts = packed.tensors().iter().flat_map(|tensor| &tensor.parts);
    parts.map(|part| (part.name.clone(), part.hash.to_hex().to_string())).collect()
}

#[test]
fn every_container_packs_to_the_same_bytes() {
    let tensors = llama();
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let plain = |order: char| {
        move |tensor: &Stored| match order {
            '<' => containers::npy("<f4", false, &tensor.shape, &tensor.bytes),
            _ => containers::npy(">f4", false, &tensor.shape, &big_endian(&tensor.bytes)),
        }
    };
    let storages: Vec<_> =
        tensors.iter().enumerate().map(|(index, tensor)| (index.to_string(), tensor.bytes.clone())).collect();
    let swapped: Vec<_> = storages.iter().map(|(key, bytes)| (key.clone(), big_endian(bytes))).collect();
    let sized: Vec<_> = storages.iter().map(|(key, bytes)| (key.clone(), 4, bytes.clone())).collect();
    let pickle = containers::state_dict(&views(&tensors));

    std::fs::create_dir(at("hf")).unwrap();
    std::fs::write(at("hf/model.safetensors"), safetensors(&tensors)).unwrap();
    for file in ["config.json", "tokenizer.json", "generation_config.json"] {
        std::fs::copy(fixture().join(file), at("hf").join(file)).unwrap();
    }
    std::fs::create_dir(at("bin")).unwrap();
    std::fs::write(at("bin/pytorch_model.bin"), containers::torch_zip(pickle.clone(), &storages, "little", false))
        .unwrap();
    for file in ["config.json", "tokenizer.json", "generation_config.json"] {
        std::fs::copy(fixture().join(file), at("bin").join(file)).unwrap();
    }
    // Names that say nothing, or something else: the content decides.
    for (name, bytes) in [
        ("bare", safetensors(&tensors)),
        ("stored.npz", npz(&tensors, false, plain('<'))),
        ("deflated.zip", npz(&tensors, true, plain('<'))),
        ("big_endian.bin", npz(&tensors, false, plain('>'))),
        ("fortran.npz", npz(&tensors, true, |tensor| containers::npy("<f4", true, &tensor.shape, &transposed(tensor)))),
        ("zip.safetensors", containers::torch_zip(pickle.clone(), &storages, "little", false)),
        ("deflated.pt", containers::torch_zip(pickle.clone(), &storages, "little", true)),
        ("swapped.pt", containers::torch_zip(pickle.clone(), &swapped, "big", false)),
        ("legacy.pt", containers::torch_legacy(pickle.clone(), &sized)),
    ] {
        std::fs::write(at(name), bytes).unwrap();
    }

    let config = fixture().join("config.json");
    let mut first = None;
    for name in [
        "hf",
        "bin",
        "bare",
        "stored.npz",
        "deflated.zip",
        "big_endian.bin",
        "fortran.npz",
        "zip.safetensors",
        "deflated.pt",
        "swapped.pt",
        "legacy.pt",
    ] {
        let (source, output) = (at(name), at("model.bkpack"));
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"convert", &source, &"-o", &output, &"--rounding", &"rtn", &"--force", &"-q"];
        if source.is_file() {
            arguments.extend([&"--config" as &dyn AsRef<_>, &config]);
        }
        let outcome = bkpack(&arguments);
        assert!(outcome.status.success(), "{name}: {}", String::from_utf8_lossy(&outcome.stderr));
        let parts = parts(&output);
        let packed = PackedFile::open(&output).unwrap();
        assert!(packed.file("tokenizer.json").unwrap().is_some() && packed.config().is_some(), "{name}");
        assert_eq!(first.get_or_insert(parts.clone()), &parts, "{name}");
    }

    // A bare file with a config is a model like any other.
    let (source, text) = (at("deflated.pt"), fixture().with_file_name("wikitext2.test.txt"));
    let outcome = bkpack(&[
        &"eval",
        &source,
        &"--config",
        &config,
        &"--text",
        &text,
        &"--limit-tokens",
        &"256",
        &"--ctx",
        &"128",
        &"--baseline",
        &at("hf"),
        &"--json",
    ]);
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    let figures: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
    assert_eq!(figures["baseline_ppl"], figures["ppl"]);
}

/// Views of one storage, at any offset, with their dimensions in any order and steps.
#[test]
fn any_view_of_a_storage_is_gathered() {
    let mut random = Random(8);
    let storage = Stored::random("", "F32", &[4000], 1.0, &mut random);
    let stored = |index: usize| f32::from_le_bytes(storage.bytes[4 * index..4 * index + 4].try_into().unwrap());
    let (mut views, mut expected) = (Vec::new(), Vec::new());
    for index in 0..50 {
        let shape = [1 + random.below(5), 1 + random.below(4), 1 + random.below(6)];
        let mut strides = [0; 3];
        let mut next = 1 + random.below(3);
        let first = random.below(3);
        for axis in [first, (first + 1) % 3, (first + 2) % 3] {
            strides[axis] = next;
            next *= shape[axis] + random.below(2);
        }
        let offset = random.below(100);
        let at = |i: usize, j: usize, k: usize| stored(offset + i * strides[0] + j * strides[1] + k * strides[2]);
        let (rows, cols) = (shape[1], shape[2]);
        let logical = (0..shape[0] * rows * cols).map(|n| at(n / (rows * cols), n / cols % rows, n % cols));
        expected.push(logical.collect::<Vec<_>>());
        let signed = |sizes: [usize; 3]| sizes.map(|size| size as i64).to_vec();
        views.push(View {
            offset: offset as i64,
            shape: signed(shape),
            strides: signed(strides),
            ..View::whole(&format!("view.{index}"), "FloatStorage", "0", &[4000])
        });
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("views.pt");
    let storages = [("0".to_owned(), storage.bytes.clone())];
    std::fs::write(&path, containers::torch_zip(containers::state_dict(&views), &storages, "little", false)).unwrap();
    let source = checkpoint::open(&path).unwrap();
    for (view, expected) in views.iter().zip(&expected) {
        assert_eq!(values(&source, &view.name), *expected, "{:?} {:?}", view.shape, view.strides);
    }
}

/// A folder with one safetensors file of these tensors.
struct Bare(TempDir);

impl Bare {
    fn new(tensors: &[Stored]) -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("model"), safetensors(tensors)).unwrap();
        Self(folder)
    }

    fn open(&self) -> Result<Checkpoint, Error> {
        self.open_with(&[])
    }

    fn open_with(&self, rename: &[&str]) -> Result<Checkpoint, Error> {
        let rename = rename.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?;
        checkpoint::open_with(&self.0.path().join("model"), &OpenOptions { config: None, rename })
    }
}

fn stored(name: &str, dtype: &'static str, shape: &[usize], bytes: &[u8]) -> Stored {
    Stored { name: name.into(), dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }
}

#[test]
fn f64_is_rounded_to_f32_and_said_once() {
    let wide = |values: &[f64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let bare = Bare::new(&[
        stored("a", "F64", &[3], &wide(&[0.1, -2.5, 1e-300])),
        stored("b", "F64", &[], &wide(&[f64::NAN])),
        stored("c", "F64", &[1, 2], &wide(&[1.0, -1e39])),
    ]);
    let source = bare.open().unwrap();
    assert_eq!(values(&source, "a"), [0.1, -2.5, 0.0]);
    assert!(values(&source, "b")[0].is_nan());
    assert_eq!(source.notices(), ["3 tensors are F64 and are rounded to F32"]);
    let error = source.tensor("c").unwrap_err();
    assert!(matches!(&error, Error::NarrowingRange { tensor, value: -1e39, .. } if tensor == "c"), "{error}");
}

#[test]
fn eight_bit_floats_are_widened_unless_a_scale_belongs_to_them() {
    for (dtype, code, value, float_type) in [
        ("F8_E4M3", 0x7e, 448.0, FloatType::F16),
        ("F8_E5M2", 0x7b, 57344.0, FloatType::F16),
        ("F8_E4M3FNUZ", 0x7f, 240.0, FloatType::F16),
        ("F8_E5M2FNUZ", 0xff, -57344.0, FloatType::F16),
        ("F8_E8M0", 0xfe, 2f32.powi(127), FloatType::BF16),
    ] {
        let source = Bare::new(&[stored("w", dtype, &[1, 2], &[code, code])]).open().unwrap();
        assert_eq!(values(&source, "w"), [value, value], "{dtype}");
        assert_eq!(bytes(&source, "w").0, float_type, "{dtype}");
        assert_eq!(source.notices(), ["1 tensor is an 8-bit float and is widened exactly to 16 bits"]);
    }
    for scale in ["w_scale", "w_scale_inv"] {
        let tensors = [stored("w", "F8_E4M3", &[1, 2], &[1, 2]), Stored::of(scale, "F32", &[1], &[0.5])];
        let error = Bare::new(&tensors).open().unwrap_err();
        assert!(matches!(&error, Error::ScaledFloat8 { scale: found, .. } if found == scale), "{error}");
    }
    for dtype in ["F6_E2M3", "F6_E3M2", "F4", "I64", "BOOL"] {
        let bytes = match dtype {
            "I64" => 32,
            "BOOL" => 4,
            "F4" => 2,
            _ => 3,
        };
        let error = Bare::new(&[stored("w", dtype, &[4], &vec![0; bytes])]).open().unwrap_err();
        assert!(matches!(&error, Error::UnsupportedDtype { dtype: found, .. } if found == dtype), "{error}");
    }
}

#[test]
fn a_complex_tensor_is_two() {
    let pairs: Vec<u8> = [1.0f32, -2.0, 3.0, -4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let source = Bare::new(&[stored("k", "C64", &[2], &pairs)]).open().unwrap();
    assert_eq!(source.names(), ["k.imag", "k.real"]);
    assert_eq!((values(&source, "k.real"), values(&source, "k.imag")), (vec![1.0, 3.0], vec![-2.0, -4.0]));
    assert_eq!(source.complex_part("k.real"), Some(ComplexPart::Real));
    assert_eq!(source.complex_part("k.imag"), Some(ComplexPart::Imaginary));
    assert_eq!(source.complex_part("k"), None);
    assert_eq!(source.tensor_bytes(), 16);
    let clash = [stored("k", "C64", &[2], &pairs), Stored::of("k.real", "F32", &[1], &[0.0])];
    let error = Bare::new(&clash).open().unwrap_err();
    assert!(matches!(&error, Error::SharedName { tensor, .. } if tensor == "k.real"), "{error}");
}

#[test]
fn complex128_and_half_precision_arrays_are_read() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.npz");
    let wide: Vec<u8> = [0.5f64, 0.25, -1.5, 3.0].iter().flat_map(|value| value.to_be_bytes()).collect();
    let half: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|&value| half::f16::from_f32(value).to_be_bytes()).collect();
    let members = [
        ("z.npy".to_owned(), containers::npy(">c16", true, &[1, 2], &wide)),
        ("h.npy".to_owned(), containers::npy(">f2", false, &[2], &half)),
    ];
    std::fs::write(&path, containers::zip(&members, true)).unwrap();
    let source = checkpoint::open(&path).unwrap();
    assert_eq!(values(&source, "z.real"), [0.5, -1.5]);
    assert_eq!(values(&source, "z.imag"), [0.25, 3.0]);
    assert_eq!((bytes(&source, "h").0, values(&source, "h")), (FloatType::F16, vec![1.0, 2.0]));
}

#[test]
fn renaming_follows_the_rules_in_order() {
    let tensors = [Stored::of("net.0.w", "F32", &[1], &[1.0]), Stored::of("net.1.w", "F32", &[1], &[2.0])];
    let bare = Bare::new(&tensors);
    let source = bare.open_with(&[r"^net\.(\d)=layers.$1", "w$=weight"]).unwrap();
    assert_eq!(source.names(), ["layers.0.weight", "layers.1.weight"]);
    assert_eq!(values(&source, "layers.1.weight"), [2.0]);
    let error = bare.open_with(&[r"\.\d=."]).unwrap_err();
    assert!(matches!(&error, Error::SharedName { tensor, .. } if tensor == "net..w"), "{error}");
    let error = bare.open_with(&["nothing=x"]).unwrap_err();
    assert!(matches!(&error, Error::Option { option: "--rename", .. }), "{error}");
    assert!(error.to_string().contains("pattern \"nothing\" matches no tensor of"), "{error}");
    assert!(bare.open_with(&["("]).unwrap_err().to_string().contains("REGEX=REPLACEMENT"));
    assert_eq!(bare.open_with(&["(=x"]).unwrap_err().to_string(), "pattern \"(\": unclosed group");
}

#[test]
fn options_that_apply_to_nothing_are_wrong_use() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (source, packed, config) = (formats().join("zip.pt"), at("m.bkpack"), fixture().join("config.json"));
    let outcome = bkpack(&[&"convert", &source, &"-o", &packed, &"--rename", &r"^plane\.=first."]);
    assert_refused(&outcome, &["--rename: pattern \"^plane\\.\" matches no tensor of", "zip.pt"]);
    let outcome = bkpack(&[&"convert", &source, &"-o", &packed, &"--rename", &"(=x"]);
    assert_refused(&outcome, &["--rename", "unclosed group"]);
    let outcome = bkpack(&[&"convert", &source, &"-o", &packed, &"--rename", &r"^plain\.=first."]);
    let notices = String::from_utf8(outcome.stderr).unwrap();
    assert!(outcome.status.success(), "{notices}");
    assert!(notices.contains("1 tensor is F64") && notices.contains("--config"), "{notices}");
    assert!(PackedFile::open(&packed).unwrap().names().contains(&"first.weight".to_owned()));

    for option in [&["--config", config.to_str().unwrap()], &["--rename", "a=b"]] {
        let tokens = at("ids.json");
        std::fs::write(&tokens, "[1, 2]").unwrap();
        for arguments in [
            vec!["logits", packed.to_str().unwrap(), "--tokens", tokens.to_str().unwrap(), "-o", "unused"],
            vec!["generate", packed.to_str().unwrap(), "--prompt", "a"],
            vec!["eval", packed.to_str().unwrap(), "--tokens", tokens.to_str().unwrap()],
            vec!["diff", packed.to_str().unwrap(), packed.to_str().unwrap()],
        ] {
            let outcome = Command::cargo_bin("bkpack").unwrap().args(arguments).args(option).output().unwrap();
            assert_refused(&outcome, &[option[0], "m.bkpack"]);
        }
    }
    assert_refused(
        &bkpack(&[&"convert", &fixture(), &"-o", &packed, &"--force", &"--config", &config]),
        &["--config", "config.json of its own"],
    );

    // A packed model beside a checkpoint is none of their business.
    let outcome = bkpack(&[&"diff", &source, &packed, &"--rename", &r"^plain\.=first.", &"--json"]);
    assert_eq!(only_first(&outcome), Vec::<String>::new());
}

/// The names that `diff --json` finds in the first model only.
#[track_caller]
fn only_first(outcome: &Output) -> Vec<String> {
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    let differences: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
    serde_json::from_value(differences["only_first"].clone()).unwrap()
}

#[test]
fn options_apply_to_every_checkpoint_that_they_fit() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tensors = |prefix: &str| {
        let tensor = |index: usize| Stored::of(&format!("{prefix}.{index}.w"), "F32", &[2], &[1.0, 2.0]);
        safetensors(&[tensor(0), tensor(1)])
    };
    std::fs::write(at("one"), tensors("net")).unwrap();
    std::fs::write(at("two"), tensors("net")).unwrap();
    std::fs::write(at("other"), tensors("model")).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    std::fs::write(at("folder/model.safetensors"), tensors("net")).unwrap();

    // Files and folders alike, and a pattern must match in one of them only.
    for second in ["two", "other", "folder"] {
        let outcome = bkpack(&[&"diff", &at("one"), &at(second), &"--rename", &r"^net\.=model.", &"--json"]);
        assert_eq!(only_first(&outcome), Vec::<String>::new(), "{second}");
    }
    let outcome = bkpack(&[&"diff", &at("one"), &at("two"), &"--rename", &"^model=x", &"--json"]);
    assert_refused(&outcome, &["--rename", "^model", "one or ", "two"]);

    // A config goes to each that has none, folders too, and not to the one that has its own.
    let config = fixture().join("config.json");
    let ids = at("ids.json");
    std::fs::write(&ids, "[1, 2]").unwrap();
    let source =
        checkpoint::open_with(&at("folder"), &OpenOptions { config: Some(config.clone()), rename: Vec::new() });
    assert!(source.unwrap().config().is_some());
    let (bare, own) = (at("bare"), fixture());
    std::fs::copy(own.join("model.safetensors"), &bare).unwrap();
    let outcome = bkpack(&[&"logits", &bare, &"--tokens", &ids, &"-o", &at("logits")]);
    assert_refused(&outcome, &["no config.json", "--config FILE"]);
    assert!(!String::from_utf8_lossy(&outcome.stderr).contains("inspect"));
    for (model, baseline) in [(&bare, &own), (&own, &bare), (&bare, &bare)] {
        let options: [&dyn AsRef<std::ffi::OsStr>; 8] =
            [&"eval", model, &"--baseline", baseline, &"--config", &config, &"--tokens", &ids];
        let outcome = bkpack(&[&options[..], &[&"--ctx", &"2"]].concat());
        assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    }
}

#[test]
fn verify_refuses_options_of_a_measurement_that_it_does_not_make() {
    let folder = TempDir::new().unwrap();
    let packed = folder.path().join("m.bkpack");
    assert!(bkpack(&[&"convert", &formats().join("zip.pt"), &"-qo", &packed]).status.success());
    assert!(bkpack(&[&"verify", &packed]).status.success());
    for option in [
        &["--config", "c.json"][..],
        &["--rename", "a=b"],
        &["--ctx", "8"],
        &["--skip", "1"],
        &["--limit-tokens", "9"],
        &["--allow-lookahead"],
        &["--activations", "exact"],
    ] {
        let outcome = Command::cargo_bin("bkpack").unwrap().arg("verify").arg(&packed).args(option).output().unwrap();
        // A measurement needs a text, and the cost of packing a baseline, too.
        assert_refused(&outcome, &[]);
        let message = String::from_utf8(outcome.stderr).unwrap();
        assert!(message.contains("--text") || message.contains("--baseline"), "{option:?}: {message}");
    }
}

#[test]
fn the_prefix_of_a_wrapper_is_left_out_first_and_said() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("wrapped.pt");
    let view = |name: &str, key: &str| View::whole(name, "FloatStorage", key, &[2]);
    let write = |names: [&str; 2]| {
        let views = [view(names[0], "0"), view(names[1], "1")];
        let storages = ["0", "1"].map(|key| (key.to_owned(), vec![0; 8]));
        std::fs::write(&path, containers::torch_zip(containers::state_dict(&views), &storages, "little", false))
            .unwrap();
    };
    let open = |rename: &str| {
        let rename = vec![rename.parse().unwrap()];
        checkpoint::open_with(&path, &OpenOptions { config: None, rename })
    };
    write(["module.a", "module.module.b"]);
    let source = open("^a$=c").unwrap();
    assert_eq!(source.names(), ["c", "module.b"]);
    assert!(matches!(source.notices(), [notice] if notice.contains("module.") && notice.contains("--rename")));
    assert!(open(r"^module\.a=c").is_err());
    write(["module.a", "b"]);
    let source = open("^b$=c").unwrap();
    assert_eq!(source.names(), ["c", "module.a"]);
    assert!(source.notices().is_empty());
}
