//! NPZ and PyTorch files made to break things: each is refused in one clear sentence, soon, and nothing in it runs.

mod common;
mod containers;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use assert_cmd::Command;
use bkpack::{checkpoint, tensor::TensorSource};
use common::{Random, Stored, fixture, safetensors};
use containers::{View, integer, npy, npy_with_header, pickle, state_dict, text, torch_legacy, torch_zip};
use tempfile::TempDir;

/// A folder for one file of weights and what comes out of it.
struct Case(TempDir);

impl Case {
    fn new(bytes: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("weights"), bytes).unwrap();
        Self(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("weights")
    }

    /// Asserts that the conversion is refused in one short sentence with these words, soon, and leaves nothing.
    #[track_caller]
    fn assert_refused(&self, words: &[&str]) {
        let start = Instant::now();
        let output = self.0.path().join("out.bkpack");
        let outcome = bounded().arg("convert").arg(self.path()).args(["--threads", "1", "-qo"]).arg(&output).output();
        let outcome = outcome.unwrap();
        let message = String::from_utf8(outcome.stderr).unwrap();
        assert_eq!(outcome.status.code(), Some(2), "{message}");
        assert!(message.starts_with("error: ") && message.contains("weights: "), "{message}");
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        assert!(message.len() < 600 && !message.trim_end().contains(char::is_control), "{message:?}");
        words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert_eq!(std::fs::read_dir(self.0.path()).unwrap().count(), 1);
    }
}

/// The command; on Linux with no more than two gigabytes of address space.
fn bounded() -> Command {
    let binary = assert_cmd::cargo::cargo_bin("bkpack");
    if !cfg!(target_os = "linux") {
        return Command::new(binary);
    }
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 2000000 && exec \"$0\" \"$@\""]).arg(binary);
    command
}

#[track_caller]
fn assert_refused(bytes: &[u8], words: &[&str]) {
    Case::new(bytes).assert_refused(words);
}

/// 24 bytes under the key 0, and a tensor that is all of them.
fn storages() -> Vec<(String, Vec<u8>)> {
    vec![("0".to_owned(), vec![0; 24])]
}

fn view() -> View {
    View::whole("a", "FloatStorage", "0", &[2, 3])
}

fn torch(object: Vec<u8>) -> Vec<u8> {
    torch_zip(object, &storages(), "little", false)
}

fn legacy(object: Vec<u8>) -> Vec<u8> {
    torch_legacy(object, &[("0".to_owned(), 4, vec![0; 24])])
}

fn npz(array: Vec<u8>, deflate: bool) -> Vec<u8> {
    containers::zip(&[("a.npy".to_owned(), array)], deflate)
}

/// Overwrites the number of `width` bytes at an offset of every entry of a zip's directory.
fn patch_directory(zip: &mut [u8], offset: usize, number: &[u8]) {
    let entries: Vec<usize> =
        zip.windows(4).enumerate().filter(|(_, four)| *four == b"PK\x01\x02").map(|(at, _)| at).collect();
    assert!(!entries.is_empty());
    for at in entries {
        zip[at + offset..at + offset + number.len()].copy_from_slice(number);
    }
}

const FLAGS: usize = 8;
const METHOD: usize = 10;
const CRC: usize = 16;
const COMPRESSED: usize = 20;
const SIZE: usize = 24;
const NAME: usize = 46;
const LOCAL_HEADER: usize = 42;

#[test]
fn the_unbroken_files_open() {
    let array = || npy("<f4", false, &[2, 3], &[0; 24]);
    for bytes in [torch(state_dict(&[view()])), legacy(state_dict(&[view()])), npz(array(), false), npz(array(), true)]
    {
        let source = checkpoint::open(&Case::new(&bytes).path()).unwrap();
        assert_eq!(source.names(), ["a"]);
    }
}

#[test]
fn code_in_a_pickle_is_named_and_not_run() {
    let marker = TempDir::new().unwrap();
    let marker = marker.path().join("ran");
    let command = text(&format!("touch {}", marker.display()));
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("__main__", "Model"),
        ("collections", "namedtuple"),
        ("numpy.testing", "runstring"),
    ] {
        let global = format!("global {module}.{name} is not allowed");
        let words = [global.as_str(), "nothing from a checkpoint is executed", "save the state dict alone"];
        let call = [format!("c{module}\n{name}\n").as_bytes(), &command, b"\x85R"].concat();
        let stacked = [text(module), text(name), b"\x93".to_vec(), command.clone(), b"\x85R".to_vec()].concat();
        for attack in [call, stacked] {
            // Before the tensors, beside them, and as the name of one.
            let beside =
                pickle(&[b"}(", &text("x")[..], &attack, &text("a"), &containers::tensor(&view()), b"u"].concat());
            for object in [pickle(&attack), beside] {
                assert_refused(&torch(object.clone()), &words);
                assert_refused(&legacy(object), &words);
            }
        }
    }
    assert!(!marker.exists());
}

#[test]
fn what_training_saves_beside_the_weights_is_passed_over() {
    let model = state_dict(&[view()]);
    let model = &model[2..model.len() - 1];
    let step =
        [b"}(", &text("lr")[..], b"G\x3f\xf0\0\0\0\0\0\0", &text("betas"), b"G\0\0\0\0\0\0\0\0G\0\0\0\0\0\0\0\0\x86u"]
            .concat();
    let object = pickle(
        &[
            b"}(",
            &text("model")[..],
            model,
            &text("optimizer"),
            b"}(K\x00",
            &step,
            b"u",
            &text("args"),
            b"cargparse\nNamespace\n)\x81}(",
            &text("path"),
            b"cpathlib\nPosixPath\n(",
            &text("tmp"),
            b"tRub",
            &text("best"),
            b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n(",
            &text("f8"),
            b"\x89\x88tRC\x08\0\0\0\0\0\0\0\0\x86R",
            &text("seen"),
            &integer(1 << 40),
            b"u",
        ]
        .concat(),
    );
    for bytes in [torch(object.clone()), legacy(object)] {
        let source = checkpoint::open(&Case::new(&bytes).path()).unwrap();
        assert_eq!(source.names(), ["a"]);
        assert_eq!(source.notices().len(), 1, "{:?}", source.notices());
    }
}

#[test]
fn formats_that_are_not_read_are_named() {
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    let member = |name: &str| containers::zip(&[(name.to_owned(), vec![1; 8])], false);
    let script = [("archive/data.pkl", pickle(b"}")), ("archive/constants.pkl", pickle(b")"))];
    let script = script.map(|(name, bytes)| (name.to_owned(), bytes));
    for (bytes, words) in [
        (npy("<f4", false, &[2], &[0; 8]), "a single NumPy array"),
        (tar, "a tar archive"),
        (b"GGUF\x03\0\0\0 and so on".to_vec(), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n and so on".to_vec(), "an HDF5 file"),
        (b"\x1f\x8b\x08 and so on".to_vec(), "a gzip file"),
        (state_dict(&[view()]), "a pickle that torch.save did not write"),
        (member("readme.txt"), "without .npy arrays (NPZ) and without data.pkl"),
        (containers::zip(&[], false), "without .npy arrays (NPZ) and without data.pkl"),
        (containers::zip(&script, false), "TorchScript"),
        (b"a text".to_vec(), "too short"),
        (b"a longer text that is no model at all".to_vec(), "none of safetensors, NPZ and PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec(), "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>".to_vec(), "a web page"),
        (b"{\"architectures\": []}".to_vec(), "a JSON file"),
    ] {
        assert_refused(&bytes, &[words]);
    }
    let mixed = [("a.npy", npy("<f4", false, &[1], &[0; 4])), ("b.txt", vec![1])];
    assert_refused(
        &containers::zip(&mixed.map(|(name, bytes)| (name.to_owned(), bytes)), false),
        &["b.txt", "no .npy"],
    );
}

#[test]
fn absurd_arrays_are_refused() {
    let header = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    for deflate in [false, true] {
        let npz = |array| npz(array, deflate);
        for shape in ["(4294967296, 4294967296, 4)", "(18446744073709551615,)", "(1000000000000,)", "(7,)", "(5,)"] {
            assert_refused(&npz(npy_with_header(&header(shape), &[0; 24])), &["a.npy", "does not fit its"]);
        }
        for shape in ["(-6,)", "(6)", "(99999999999999999999,)", "[6]", "(6,", "None"] {
            assert_refused(&npz(npy_with_header(&header(shape), &[0; 24])), &["a.npy", "not a dictionary"]);
        }
        assert_refused(&npz(npy("<f4", false, &[0, 3], &[])), &["tensor a", "holds no element"]);
        assert_refused(&npz(npy("|O", false, &[1], &pickle(b"cos\nsystem\n"))), &["a.npy", "Python objects"]);
        assert_refused(&npz(npy("<i8", false, &[3], &[0; 24])), &["tensor a", "<i8", "only floats"]);
        assert_refused(&npz(npy("|V2", false, &[3], &[0; 6])), &["tensor a", "|V2"]);
        assert_refused(&npz(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{".to_vec()), &["a.npy", "truncated"]);
        assert_refused(&npz(b"not an array".to_vec()), &["a.npy", "no .npy array"]);
        assert_refused(&npz(Vec::new()), &["a.npy", "truncated"]);
    }
}

#[test]
fn zip_archives_that_lie_are_refused() {
    let array = |claimed: usize, held: usize| npy("<f4", false, &[claimed], &vec![0; 4 * held]);
    let broken = |mut zip: Vec<u8>, patches: &[(usize, &[u8])]| {
        patches.iter().for_each(|(offset, number)| patch_directory(&mut zip, *offset, number));
        zip
    };
    let size = |array: &[u8], more: i64| ((array.len() as i64 + more) as u32).to_le_bytes();
    let (honest, long, short) = (array(1000, 1000), array(1000, 1100), array(1000, 900));

    // A bomb: four gigabytes declared from a few bytes, before anything is allocated for them.
    let bomb = broken(npz(honest.clone(), true), &[(SIZE, &0xf000_0000u32.to_le_bytes())]);
    assert_refused(&bomb, &["member a.npy", "4026531840", "cannot inflate to"]);
    let past = broken(npz(long.clone(), true), &[(SIZE, &size(&long, -400))]);
    assert_refused(&past, &["tensor a", "inflates past the declared"]);
    let ends = broken(npz(short.clone(), true), &[(SIZE, &size(&short, 400))]);
    assert_refused(&ends, &["a.npy", "ends before the declared"]);
    assert_refused(&broken(npz(honest.clone(), true), &[(CRC, &[1, 2, 3, 4])]), &["tensor a", "CRC"]);
    let sizes = broken(npz(honest.clone(), false), &[(SIZE, &[9, 0, 0, 0])]);
    assert_refused(&sizes, &["member a.npy", "its two sizes differ"]);
    assert_refused(&broken(npz(honest.clone(), true), &[(FLAGS, &[1, 0])]), &["member a.npy", "encrypted"]);
    assert_refused(
        &broken(npz(honest.clone(), true), &[(METHOD, &[12, 0])]),
        &["member a.npy", "only stored and deflated"],
    );
    let beyond = broken(npz(honest.clone(), false), &[(SIZE, &[0xff; 3]), (COMPRESSED, &[0xff; 3])]);
    assert_refused(&beyond, &["zip archive"]);

    let two = [("a.npy".to_owned(), honest.clone()), ("b.npy".to_owned(), honest)];
    for deflate in [false, true] {
        let two = containers::zip(&two, deflate);
        assert_refused(&broken(two.clone(), &[(NAME, b"a")]), &["same name"]);
        assert_refused(&broken(two, &[(LOCAL_HEADER, &[0; 4])]), &["overlap"]);
    }
    // Deflated data that is no deflate stream.
    let mut noise = npz(array(1000, 1000), true);
    noise[40..44].copy_from_slice(&[0xff; 4]);
    assert_refused(&noise, &["weights"]);
}

#[test]
fn tensors_beyond_their_storage_are_refused() {
    let with = |change: &dyn Fn(&mut View)| {
        let mut view = view();
        change(&mut view);
        state_dict(&[view])
    };
    let beyond = "beyond the 24 bytes";
    for (object, words) in [
        (with(&|view| view.offset = 1), beyond),
        (with(&|view| view.offset = -1), "not understood"),
        (with(&|view| view.offset = i64::MAX), "not understood"),
        (with(&|view| view.shape = vec![-2, 3]), "not understood"),
        (with(&|view| view.strides = vec![-3, 1]), "not understood"),
        (with(&|view| view.strides = vec![4, 1]), beyond),
        (with(&|view| view.strides = vec![i64::MAX, 1]), "not understood"),
        (with(&|view| view.strides = vec![1 << 61, 1]), beyond),
        (with(&|view| view.strides = vec![1]), "not understood"),
        // An expanded view: a million million values made of one.
        (with(&|view| (view.shape, view.strides) = (vec![1 << 20, 1 << 20], vec![0, 0])), beyond),
        (with(&|view| (view.shape, view.strides) = (vec![1 << 62, 1 << 62], vec![0, 0])), "overflows"),
        (with(&|view| view.shape = vec![1; 100_000]), "not understood"),
        (with(&|view| view.values = 7), "truncated"),
        (with(&|view| view.values = usize::MAX >> 1), "truncated"),
        (with(&|view| view.key = "1".into()), "1"),
        (with(&|view| view.class = "LongStorage"), "only floats"),
        (with(&|view| view.class = "UntypedStorage"), "no type"),
        (with(&|view| (view.shape, view.strides) = (vec![0, 3], vec![3, 1])), "holds no element"),
    ] {
        assert_refused(&torch(object), &[words]);
    }
    let twice = state_dict(&[view(), view()]);
    assert_refused(&torch(twice), &["two tensors are named a"]);
    let shared = state_dict(&[view(), View { name: "b".into(), ..view() }]);
    assert_refused(
        &torch_zip(shared, &storages(), "little", true),
        &["tensor b", "shares a compressed storage with a"],
    );
    assert_refused(&torch_zip(state_dict(&[view()]), &storages(), "middle", false), &["byteorder"]);
}

#[test]
fn files_without_one_state_dict_are_refused() {
    let dict = state_dict(&[view()]);
    let dict = &dict[2..dict.len() - 1];
    let entries = |keys: &[&str], value: &[u8]| {
        let entries: Vec<u8> = keys.iter().flat_map(|key| [text(key), value.to_vec()].concat()).collect();
        pickle(&[b"}(", &entries[..], b"u"].concat())
    };
    for (object, words) in [
        (pickle(b"K\x01"), &["no dict of tensors"][..]),
        (pickle(&containers::tensor(&view())), &["no dict of tensors"]),
        (pickle(b"}"), &["no dict of tensors"]),
        (entries(&["optimizer", "step"], b"K\x01"), &["no dict of tensors", "optimizer"]),
        (entries(&["encoder", "decoder"], dict), &["no dict of tensors", "encoder"]),
        (entries(&["model", "state_dict"], dict), &["a state dict under each of", "model"]),
    ] {
        assert_refused(&torch(object), words);
    }
}

#[test]
fn recursive_deep_and_huge_pickles_are_bounded() {
    let tensor = containers::tensor(&view());
    // A dict that is its own state dict, and a list that holds itself beside the tensor: legal, and harmless.
    for object in [
        pickle(&[b"}q\x00(", &text("a")[..], &tensor, &text("state_dict"), b"h\x00u"].concat()),
        pickle(&[b"}(", &text("a")[..], &tensor, &text("list"), b"]q\x01h\x01au"].concat()),
    ] {
        let source = checkpoint::open(&Case::new(&torch(object)).path()).unwrap();
        assert_eq!(source.names(), ["a"]);
    }
    let deep = [vec![b']'; 2_000_000], vec![b'a'; 1_999_999]].concat();
    assert_refused(&torch(pickle(&deep)), &["no dict of tensors"]);
    let parameter = |inner: Vec<u8>, _| [b"ctorch._utils\n_rebuild_parameter\n", &inner[..], b"\x85R"].concat();
    let nested = (0..1000).fold(tensor, parameter);
    assert_refused(&torch(pickle(&[b"}(", &text("a")[..], &nested, b"u"].concat())), &["no dict of tensors"]);
    assert_refused(&torch(pickle(&vec![b'N'; 9 << 20])), &["more than 8 million values"]);
    assert_refused(
        &torch_zip(pickle(&vec![b'N'; 9 << 20]), &storages(), "little", true),
        &["more than 8 million values"],
    );
    assert_refused(&torch_zip(vec![b'0'; 33 << 20], &storages(), "little", true), &["longer than 32 MiB"]);
    assert_refused(&torch(pickle(b"X\xff\xff\xff\xff")), &["truncated"]);
    assert_refused(&torch(pickle(b"\x8b\xff\xff\xff\x7f")), &["truncated"]);
    assert_refused(&torch(pickle(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff")), &["truncated"]);
}

/// Small files that ask for a thousand times their size: in what a pickle makes, in time, in what its tensors view.
#[test]
fn small_files_do_not_grow() {
    let deflated = |object: Vec<u8>| torch_zip(object, &storages(), "little", true);
    // One list, given to OrderedDict again and again.
    let list = [b"](", &b"NN\x86"[..].repeat(20_000)[..], b"eq\x00ccollections\nOrderedDict\nq\x01"].concat();
    let calls = pickle(&[&list[..], &b"h\x01h\x00\x85R"[..].repeat(20_000)[..]].concat());
    assert_refused(&deflated(calls), &["more than 8 million"]);
    // Memo entries, then marks.
    let memo = [&b"N"[..], &vec![0x94; 31 << 20]].concat();
    assert_refused(&deflated(pickle(&memo)), &["more than 8 million"]);
    assert_refused(&deflated(pickle(&vec![b'('; 31 << 20])), &["more than 8 million"]);

    // A dict of a million flags, looked through for every tensor.
    let tensor = containers::tensor(&view());
    let head = tensor.strip_suffix(b"\x89ccollections\nOrderedDict\n)RtR").unwrap();
    let flags = [b"}(", &b"NN"[..].repeat(300_000)[..], b"uq\x01"].concat();
    let flagged = [head, b"\x89Nh\x01tRq\x02"].concat();
    let entries: Vec<u8> =
        (0..100_000).flat_map(|index| [text(&index.to_string()), b"h\x02".to_vec()].concat()).collect();
    let object = [&flags[..], b"0}(", &text("a"), &flagged, &entries, b"u"].concat();
    assert_refused(&deflated(pickle(&object)), &["tensor a", "not understood"]);
    // One tensor under one name, and under too many names.
    let once = [b"}(", &text("a")[..], &tensor, b"q\x01u0}("].concat();
    let named = |name: &dyn Fn(usize) -> Vec<u8>, count| {
        let entries: Vec<u8> = (0..count).flat_map(|index| [name(index), b"h\x01".to_vec()].concat()).collect();
        pickle(&[&once[..], &entries, b"u"].concat())
    };
    assert_refused(&deflated(named(&|_| text("b"), 1000)), &["two tensors are named b"]);
    assert_refused(&deflated(named(&|index| text(&index.to_string()), 200_001)), &["200001 entries"]);
    // A name of a megabyte, remembered and used for each of many tensors.
    let long = [&text(&"n".repeat(1 << 20))[..], b"q\x020"].concat();
    let object = [&long[..], &once, &b"h\x02h\x01"[..].repeat(100_000), b"u"].concat();
    assert_refused(&deflated(pickle(&object)), &["no text, or too long"]);

    // Many views of one storage of a megabyte.
    let view = |index: usize| View::whole(&format!("t{index}"), "FloatStorage", "0", &[512, 512]);
    let sharing = |count: usize| {
        let views: Vec<_> = (0..count).map(view).collect();
        torch_zip(state_dict(&views), &[("0".to_owned(), vec![0; 1 << 20])], "little", false)
    };
    assert_refused(&sharing(1000), &["its tensors ask for 1048576000 bytes of the 1048576"]);
    assert_eq!(checkpoint::open(&Case::new(&sharing(16)).path()).unwrap().names().len(), 16);
}

/// Python's zipfile (and so NumPy) and PyTorch check the CRC of members that are stored as they are.
#[test]
fn one_flipped_bit_in_a_stored_member_is_refused() {
    let values = [0x3f; 24];
    let array = npz(npy("<f4", false, &[2, 3], &values), false);
    let model = torch_zip(state_dict(&[view()]), &[("0".to_owned(), values.into())], "little", false);
    for (bytes, member) in [(array, "member a.npy"), (model.clone(), "member archive/data/0")] {
        let at = bytes.windows(24).position(|window| window == values).unwrap();
        for (byte, bit) in [(0, 0), (11, 7), (23, 3)] {
            let mut flipped = bytes.clone();
            flipped[at + byte] ^= 1 << bit;
            assert_refused(&flipped, &["tensor a", member, "CRC"]);
        }
    }
    let mut renamed = model;
    let at = renamed.windows(6).position(|window| window == b"X\x01\0\0\0a").unwrap();
    renamed[at + 5] = b'b';
    assert_refused(&renamed, &["member archive/data.pkl", "CRC"]);
}

#[test]
fn names_from_files_stay_on_one_short_line() {
    let evil = format!("a\n\u{1b}[31merror: {}", "x".repeat(900));
    let shown = r"a\n\u{1b}[31merror: xxx";
    let named = |change: &dyn Fn(&mut View)| {
        let mut view = View { name: evil.clone(), ..view() };
        change(&mut view);
        torch(state_dict(&[view]))
    };
    for bytes in [
        named(&|view| view.offset = 1),
        named(&|view| view.class = "LongStorage"),
        named(&|view| view.key = evil.clone()),
        torch(pickle(&[b"}(", &text(&evil)[..], b"K\x01u"].concat())),
        torch(pickle(&[text(&evil), text("f"), b"\x93".to_vec()].concat())),
        containers::zip(&[("a.npy".into(), npy("<f4", false, &[1], &[0; 4])), (evil.clone(), vec![1])], false),
        npz(npy("<i8\n\u{1b}", false, &[1], &[0; 8]), false),
        safetensors(&[Stored { name: evil.clone(), dtype: "I64", shape: vec![1], bytes: vec![0; 8] }]),
        safetensors(&[Stored { name: evil.clone(), dtype: "F32", shape: vec![0], bytes: vec![] }]),
    ] {
        let case = Case::new(&bytes);
        case.assert_refused(&[]);
        let message = checkpoint::open(&case.path()).unwrap_err().to_string();
        assert!(message.contains(shown) || message.contains(r"<i8\n\u{1b}"), "{message}");
    }
}

#[test]
fn broken_legacy_files_are_refused() {
    let object = || state_dict(&[view()]);
    let storage = |key: &str, bytes: usize| (key.to_owned(), 4, vec![0; bytes]);
    assert_refused(&torch_legacy(object(), &[]), &["storage 0 is missing"]);
    assert_refused(&torch_legacy(object(), &[storage("0", 20)]), &["storage 0", "truncated"]);
    assert_refused(&torch_legacy(object(), &[storage("0", 24), storage("1", 4)]), &["storage 1 belongs to no tensor"]);
    assert_refused(&torch_legacy(object(), &[storage("0", 24), storage("0", 24)]), &["storage 0 occurs twice"]);
    assert_refused(&[legacy(object()), vec![0; 3]].concat(), &["3 bytes follow the last storage"]);
    let mut length = legacy(object());
    let at = length.len() - 32;
    length[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_refused(&length, &["storage 0 ends beyond the file"]);
    let mut protocol = legacy(object());
    let at = protocol.windows(3).position(|three| three == b"M\xe9\x03").unwrap();
    protocol[at + 1] = 0;
    assert_refused(&protocol, &["protocol version is not 1001"]);
}

/// Cut anywhere, a file is refused at the latest when its tensors are read.
#[test]
fn truncated_files_are_refused_at_every_length() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("cut");
    let mut random = Random(1);
    let tensors = [Stored::random("a", "F32", &[2, 3], 1.0, &mut random)];
    let random_bytes: Vec<u8> = (0..24).map(|_| random.below(256) as u8).collect();
    let array = npy("<f4", false, &[2, 3], &random_bytes);
    let read = |name: &str| std::fs::read(fixture().with_file_name("formats").join(name)).unwrap();
    for (format, bytes) in [
        ("safetensors", safetensors(&tensors)),
        ("stored", npz(array.clone(), false)),
        ("deflated", npz(array, true)),
        ("zip", torch(state_dict(&[view()]))),
        ("legacy", legacy(state_dict(&[view()]))),
        ("zip.pt", read("zip.pt")),
        ("legacy.pt", read("legacy.pt")),
        ("deflated.npz", read("deflated.npz")),
    ] {
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let Ok(source) = checkpoint::open(&path) else { continue };
            let broken = source.names().iter().any(|name| source.tensor(name).is_err());
            assert!(broken, "{format} cut to {length} of {} bytes opens", bytes.len());
        }
    }
}
