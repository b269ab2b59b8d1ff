//! The format's test vectors: every valid file decodes to its expected values, every malformed one is refused for
//! the reason that its index names.

use std::path::{Path, PathBuf};

use bkpack::{
    Error, Result, checkpoint,
    format::PackedFile,
    progress::Silent,
    tensor::{ActivationQuantization, TensorSource},
};
use bkpack_kernels::Cpu;
use serde::Deserialize;

#[derive(Deserialize)]
struct Valid {
    file: String,
    expected: String,
    files: std::collections::BTreeMap<String, String>,
    complex: Vec<String>,
    activations: Vec<ActivationQuantization>,
}

#[derive(Deserialize)]
struct Malformed {
    file: String,
    rule: String,
    stage: String,
}

fn vectors(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors").join(kind)
}

fn index<T: serde::de::DeserializeOwned>(kind: &str) -> Vec<T> {
    let text = std::fs::read(vectors(kind).join("index.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn values(cpu: Cpu, source: &dyn TensorSource, name: &str) -> Vec<u32> {
    let tensor = source.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    cpu.dequantize(&tensor.matrix(), 0, &mut values);
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn valid_files_decode_to_their_values_on_every_instruction_set() {
    let cases: Vec<Valid> = index("valid");
    assert!(cases.len() >= 20);
    for case in cases {
        let packed = PackedFile::open(&vectors("valid").join(&case.file)).unwrap_or_else(|error| panic!("{error}"));
        packed.check_contents(&Silent).unwrap_or_else(|error| panic!("{error}"));
        let expected = checkpoint::open(&vectors("valid").join(&case.expected)).unwrap();
        assert_eq!(packed.names(), expected.names(), "{}", case.file);
        for name in packed.names() {
            assert_eq!(packed.shape(name), expected.shape(name), "{}: {name}", case.file);
            for cpu in Cpu::available() {
                let (found, wanted) = (values(cpu, &packed, name), values(cpu, &expected, name));
                assert!(found == wanted, "{}: {name} differs on {}", case.file, cpu.isa());
            }
        }
        assert_eq!(packed.complex_names().collect::<Vec<_>>(), case.complex, "{}", case.file);
        for name in &case.complex {
            let [real, imaginary] =
                [".real", ".imag"].map(|half| values(Cpu::detect(), &expected, &format!("{name}{half}")));
            let wanted: Vec<[u32; 2]> = real.into_iter().zip(imaginary).map(|(real, imag)| [real, imag]).collect();
            for cpu in Cpu::available() {
                let found = packed.complex_values(cpu, name).unwrap();
                let found: Vec<[u32; 2]> = found.into_iter().map(|value| value.map(f32::to_bits)).collect();
                assert!(found == wanted, "{}: {name} differs on {}", case.file, cpu.isa());
            }
        }
        assert_eq!(packed.activations(), case.activations, "{}", case.file);
        for (name, content) in &case.files {
            assert_eq!(packed.file(name).unwrap().as_deref(), Some(content.as_bytes()), "{}: {name}", case.file);
        }
    }
}

/// The rule that an error says was broken, in the words of the index.
fn rule(error: &Error) -> &'static str {
    match error {
        Error::Safetensors { why, .. } if why.contains("header claims") || why.contains("too short") => "header-length",
        Error::Safetensors { why, .. } if why.contains("overlaps") || why.contains("end where the file ends") => {
            "offsets"
        }
        Error::Safetensors { why, .. } if why.contains("do not fit its bytes") => "part-size",
        Error::Safetensors { why, .. } if why.contains("overflow") => "part-size or offsets",
        Error::Safetensors { .. } => "header-json or header-entry",
        Error::DuplicateKey { .. } => "duplicate-key",
        Error::MissingMetadata { .. } => "metadata",
        Error::DataStart { .. } => "data-start",
        Error::Misaligned { .. } => "alignment",
        Error::Seal { .. } => "seal",
        Error::Manifest { .. } => "manifest",
        Error::FormatVersion { .. } => "version",
        Error::DuplicateTensor { .. } => "duplicate-tensor",
        Error::Shape { .. } => "shape",
        Error::UnknownEncoding { .. } => "encoding-kind",
        Error::UnknownField { .. } => "unknown-field",
        Error::EncodingRange { .. } => "encoding-range",
        Error::Parts { .. } => "parts",
        Error::HashText { .. } => "hash-text",
        Error::FileName { .. } => "file-name",
        Error::PartName { .. } => "part-name",
        Error::MissingPart { .. } => "part-missing",
        Error::SharedPart { .. } => "part-shared",
        Error::OrphanPart { .. } => "part-orphan",
        Error::PartDtype { .. } => "part-dtype",
        Error::PartShape { .. } => "part-shape",
        Error::MissingShard { .. } => "shard-missing",
        Error::ShardSet { .. } => "shard-set",
        Error::ShardIndex { .. } => "shard-index",
        Error::ComplexField { .. } => "complex-field",
        Error::ComplexName { .. } => "complex-name",
        Error::ComplexPair { .. } => "complex-pair",
        Error::ComplexClash { .. } => "complex-clash",
        Error::ActivationShard { .. } => "activation-shard",
        Error::ActivationComponent { .. } => "activation-component",
        Error::ActivationRange { .. } => "activation-range",
        Error::ActivationScale { .. } => "activation-scale",
        Error::ActivationScaleValue { .. } => "activation-scale-value",
        Error::PartHash { .. } => "part-hash",
        Error::Codes { why, .. } if why.contains("scale") => "scale-value",
        Error::Codes { why, .. } if why.contains("242") => "ternary-byte",
        Error::Codes { .. } => "padding",
        _ => "none of the format's",
    }
}

#[test]
fn malformed_files_are_refused_for_their_own_reason() {
    let cases: Vec<Malformed> = index("malformed");
    assert!(cases.len() >= 100);
    let mut wrong = Vec::new();
    for case in cases {
        let path = vectors("malformed").join(&case.file);
        let outcome: Result<()> = match (PackedFile::open(&path), case.stage.as_str()) {
            (Ok(packed), "contents") => packed.check_contents(&Silent),
            (Ok(_), _) => Ok(()),
            (Err(error), "open") => Err(error),
            (Err(error), stage) => panic!("{}: refused before the stage {stage}: {error}", case.file),
        };
        match outcome {
            Ok(()) => wrong.push(format!("{}: accepted, though it breaks {}", case.file, case.rule)),
            Err(error) if !rule(&error).split(" or ").any(|rule| rule == case.rule) => {
                wrong.push(format!("{}: {} expected, {}: {error}", case.file, case.rule, rule(&error)));
            }
            Err(error) => {
                let message = error.to_string();
                assert!(
                    message.contains(path.file_name().unwrap().to_str().unwrap()) || message.contains(".bkpack"),
                    "{message}"
                );
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
