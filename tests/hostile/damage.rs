//! Files damaged at random: nothing panics, whatever is damaged.

use std::{os::unix::fs::FileExt, path::Path};

use bkpack::{
    checkpoint,
    format::{
        PackedFile,
        archive::{archive, unpack},
    },
    model,
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use serde_json::{Value, json};

use crate::{
    case::Case,
    common::{Random, safetensors},
};

/// A hostile value in place of the one at a random place of a JSON document.
fn spoil(value: &mut Value, random: &mut Random) {
    let children = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if children > 0 && random.below(5) > 0 {
        let child = random.below(children);
        return match value {
            Value::Array(items) => spoil(&mut items[child], random),
            Value::Object(fields) => spoil(fields.values_mut().nth(child).unwrap(), random),
            _ => unreachable!("it has children"),
        };
    }
    let numbers = [0, 1, 2, 3, 31, 32, 63, 64, 4095, 4096, 1 << 31, 1 << 32, 1 << 62, u64::MAX];
    match random.below(8) {
        0 => *value = Value::Null,
        1 => *value = json!(numbers[random.below(numbers.len())]),
        2 => *value = json!([-1, i64::MIN][random.below(2)]),
        3 => *value = json!([1e308, 0.5][random.below(2)]),
        4 => *value = json!(["", "int", "float", "F32", "F16", "U32", "ternary", "../x"][random.below(8)]),
        5 => {
            let texts = ["[]", "{}", "[[[]]]", "[0, 0]", "[1, 1099511627776]"];
            *value = serde_json::from_str(texts[random.below(texts.len())]).unwrap();
        }
        6 => match value {
            Value::Array(items) if children > 0 => drop(items.remove(random.below(children))),
            Value::Object(fields) if children > 0 => {
                let key = fields.keys().nth(random.below(children)).unwrap().clone();
                fields.remove(&key);
            }
            other => *other = json!(true),
        },
        _ => match value {
            Value::Array(items) if children > 0 => items.push(items[random.below(children)].clone()),
            Value::Number(number) => {
                let near = number.as_u64().unwrap_or(0).wrapping_add([1, u64::MAX, 4, 64][random.below(4)]);
                *value = json!(near);
            }
            other => *other = json!({ "kind": "int", "bits": 9 }),
        },
    }
}

/// Flips bits and moves bytes of a text.
fn scramble(text: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let place = random.below(text.len().max(1));
        if place >= text.len() {
            return;
        }
        match random.below(4) {
            0 => text[place] ^= 1 << random.below(8),
            1 => text[place] = b"0123456789{}[]\",: \\"[random.below(19)],
            2 => drop(text.remove(place)),
            _ => text.insert(place, b"0123456789{}[]\",: \\"[random.below(19)]),
        }
    }
}

/// A file of this header and data, with the length set, padded to `align`, and sealed if there is a seal.
fn assemble(text: &[u8], data: &[u8], align: usize) -> Vec<u8> {
    let mut file = vec![0; 8];
    file.extend(text);
    file.resize(file.len().next_multiple_of(align), b' ');
    let length = file.len() as u64 - 8;
    file[..8].copy_from_slice(&length.to_le_bytes());
    let key = b"\"bkpack_seal\":\"";
    let place = file.windows(key.len()).position(|window| window == key).map(|place| place + key.len());
    if let Some(digits) = place.and_then(|place| file.get_mut(place..place + 64)) {
        digits.fill(b'0');
        let seal = blake3::hash(&file).to_hex();
        let place = place.unwrap();
        file[place..place + 64].copy_from_slice(seal.as_bytes());
    }
    file.extend(data);
    file
}

/// Reads everything that a source offers.
fn read_all(source: &dyn TensorSource) {
    for name in source.names() {
        let Ok(tensor) = source.tensor(name) else { continue };
        let matrix = tensor.matrix();
        assert!(matrix.bytes() < 1 << 20, "a tensor cannot be larger than its file");
        if tensor.elements() < 1 << 20 {
            let mut values = vec![0.0; tensor.elements()];
            Cpu::detect().dequantize(&matrix, 0, &mut values);
        }
    }
    let _ = source.file("tokenizer.json");
    let _ = model::check_shapes(source);
}

fn options() -> PackOptions {
    let overrides = ["embed=int3:g32:asym", "down=ternary:g64", "gate=binary:g32", "up=int5:row"].map(String::from);
    PackOptions {
        policy: Policy::uniform("int4:g32".parse().unwrap(), &[], &overrides).unwrap(),
        rounding: Rounding::Nearest,
        feedback: false,
        calibration: None,
        ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
        scales: Default::default(),
        allow_nonfinite: false,
        shard_bytes: None,
    }
}

/// Writes `bytes` over a file.
fn replace(path: &Path, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

fn header_and_data(file: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (&file[8..8 + length], &file[8 + length..])
}

#[test]
fn spoiled_and_resealed_packed_files_never_panic() {
    let mut case = Case::new();
    case.write("tokenizer.json", b"{}");
    case.tensors.truncate(8);
    case.save();
    let checkpoint = checkpoint::open(case.source.path()).unwrap();
    let options = options();
    Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent)
        .unwrap()
        .write(Cpu::detect(), false, &Silent)
        .unwrap();
    let packed = std::fs::read(case.output()).unwrap();
    let (text, data) = header_and_data(&packed);
    let header: Value = serde_json::from_slice(text).unwrap();
    let manifest: Value = serde_json::from_str(header["__metadata__"]["bkpack"].as_str().unwrap()).unwrap();
    assert!(assemble(text, data, 1) == packed, "resealing what was not changed changes nothing");

    let path = case.target.path().join("spoiled.bkpack");
    let mut random = Random(21);
    let (mut opened, mut refused) = (0, 0);
    for turn in 0..6000 {
        let (mut header, mut manifest, mut data) = (header.clone(), manifest.clone(), data.to_vec());
        let mut bytes = match turn % 4 {
            0 => {
                spoil(&mut header, &mut random);
                header.to_string().into_bytes()
            }
            1 | 2 => {
                for _ in 0..=random.below(2) {
                    spoil(&mut manifest, &mut random);
                }
                header["__metadata__"]["bkpack"] = json!(manifest.to_string());
                header.to_string().into_bytes()
            }
            _ => {
                let mut text = text.trim_ascii_end().to_vec();
                scramble(&mut text, &mut random);
                text
            }
        };
        // Now and then the data is changed too, so that what opens is not what was packed.
        if random.below(3) == 0 {
            let place = random.below(data.len());
            data[place] = random.next() as u8;
        }
        bytes = assemble(&bytes, &data, 4096);
        replace(&path, &bytes);
        match PackedFile::open(&path) {
            Ok(packed) => {
                opened += 1;
                read_all(&packed);
                let _ = packed.check_contents(&Silent);
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("spoiled.bkpack"), "{error}");
            }
        }
    }
    // Producer, source, policy and hashes may be anything well-formed; everything else is refused.
    assert!(opened > 100 && refused > 3000, "{opened} opened, {refused} refused");
}

#[test]
fn spoiled_checkpoints_never_panic() {
    let case = Case::new();
    case.save();
    let whole = safetensors(&case.tensors);
    let (text, data) = header_and_data(&whole);
    let header: Value = serde_json::from_slice(text).unwrap();
    let path = case.source.path().join("model.safetensors");
    let mut random = Random(22);
    let (mut opened, mut refused) = (0, 0);
    for turn in 0..4000 {
        let (mut header, mut config) = (header.clone(), case.config.clone());
        let bytes = match turn % 3 {
            0 => {
                spoil(&mut header, &mut random);
                header.to_string().into_bytes()
            }
            1 => {
                let mut text = text.to_vec();
                scramble(&mut text, &mut random);
                text
            }
            _ => {
                spoil(&mut config, &mut random);
                text.to_vec()
            }
        };
        replace(&path, &assemble(&bytes, data, 1));
        let mut config = config.to_string().into_bytes();
        if turn % 6 == 5 {
            scramble(&mut config, &mut random);
        }
        replace(&case.source.path().join("config.json"), &config);
        match checkpoint::open(case.source.path()) {
            Ok(checkpoint) => {
                opened += 1;
                read_all(&checkpoint);
                let options =
                    PackOptions { policy: Policy::uniform("int4".parse().unwrap(), &[], &[]).unwrap(), ..options() };
                let _ = Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 1000 && refused > 1000, "{opened} opened, {refused} refused");
}

#[test]
fn spoiled_archives_never_panic_and_leave_nothing() {
    let case = Case::new();
    case.write("tokenizer.json", b"{}");
    case.save();
    let checkpoint = checkpoint::open(case.source.path()).unwrap();
    let options = options();
    let packing = Packing::plan(&checkpoint, &options, &case.output(), Cpu::detect(), &Silent).unwrap();
    packing.write(Cpu::detect(), false, &Silent).unwrap();
    let path = case.source.path().join("spoiled");
    archive(&case.output(), &path, false, &Silent).unwrap();
    std::fs::remove_file(case.output()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let (text, data) = header_and_data(&whole);
    let header: Value = serde_json::from_slice(text).unwrap();
    let mut random = Random(23);
    let mut refused = 0;
    for _ in 0..1000 {
        let mut header = header.clone();
        spoil(&mut header, &mut random);
        replace(&path, &assemble(header.to_string().as_bytes(), data, 1));
        match unpack(&path, &case.output(), false, &Silent) {
            Ok(()) => std::fs::remove_file(case.output()).unwrap(),
            Err(_) => refused += 1,
        }
        assert!(case.left().is_empty(), "{:?}", case.left());
    }
    assert!(refused > 500, "{refused}");
}
