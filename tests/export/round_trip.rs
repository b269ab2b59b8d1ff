//! Exports are read back by each layout's rule, restated here, and give the packed values.

use std::{collections::HashMap, path::Path};

use bkpack::{
    checkpoint,
    encoding::{Encoding, FloatName},
    export::{Fidelity, Options, Target},
    format::{self, PackedFile, PackedWriter, PlannedTensor, Source},
    model,
    tensor::{ComplexPart, TensorSource},
};
use bkpack_kernels::{Cpu, FloatType};
use half::f16;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use super::{architecture, exported, files, fixture, packed};

const PACKINGS: [&[&str]; 5] = [
    &["--bits", "4"],
    &["--bits", "4", "--asymmetric", "--group-size", "32"],
    &["--bits", "8", "--asymmetric", "--group-size", "row"],
    &["--bits", "1", "--group-size", "256"],
    &[
        "--bits",
        "3",
        "--tensor",
        "o_proj=ternary:g32",
        "--tensor",
        "v_proj=int5:g32:asym",
        "--tensor",
        "down_proj=int7:row",
    ],
];

const F32: Options = Options { dtype: Some(FloatType::F32), requantize: false, dequantize: false };

/// The tensors of an exported folder of one file of weights.
struct Export {
    weights: Vec<u8>,
    config: Value,
}

impl Export {
    fn read(folder: &Path) -> Self {
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        Self { weights: std::fs::read(folder.join("model.safetensors")).unwrap(), config }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.weights).unwrap()
    }

    fn words(&self, name: &str) -> Vec<u32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        tensor.data().chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        match tensor.dtype() {
            safetensors::Dtype::F32 => {
                tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
            }
            safetensors::Dtype::F16 => {
                let halves = tensor.data().chunks_exact(2);
                halves.map(|bytes| f16::from_le_bytes(bytes.try_into().unwrap()).to_f32()).collect()
            }
            other => panic!("{name} is {other}"),
        }
    }
}

/// Code `index` of a dense stream whose words lie `stride` apart.
fn code(words: &[u32], stride: usize, bits: usize, index: usize) -> u32 {
    (0..bits)
        .map(|bit| index * bits + bit)
        .enumerate()
        .fold(0, |code, (bit, place)| code | (words[place / 32 * stride] >> (place % 32) & 1) << bit)
}

fn values(packed: &PackedFile, name: &str) -> Vec<f32> {
    let tensor = packed.tensor(name).unwrap();
    let mut values = vec![0.0; tensor.elements()];
    Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
    values
}

/// Decodes every tensor with `decode`, which gets its name, rows and columns; `None` for one that is plain there.
#[track_caller]
fn compare(
    packed: &PackedFile,
    export: &Export,
    quantized: usize,
    decode: impl Fn(&str, usize, usize) -> Option<Vec<f32>>,
) {
    let mut found = 0;
    for tensor in packed.tensors() {
        let decoded = match tensor.shape[..] {
            [rows, cols] => decode(&tensor.name, rows, cols),
            _ => None,
        };
        found += usize::from(decoded.is_some());
        let decoded = decoded.unwrap_or_else(|| export.floats(&tensor.name));
        // Not bit for bit: the sums of MLX lose the sign of a zero.
        assert!(decoded == values(packed, &tensor.name), "{}", tensor.name);
    }
    assert_eq!(found, quantized);
}

#[test]
fn compressed_tensors_folders_hold_the_packed_values() {
    for options in PACKINGS {
        let (folder, packed) = packed(&fixture(), options);
        let (output, plan) = exported(&packed, &folder, Target::CompressedTensors, &F32);
        assert!(plan.tensors.iter().all(|tensor| tensor.fidelity == Fidelity::Lossless));
        let export = Export::read(&output);
        let config = &export.config["quantization_config"];
        let groups: Vec<&Value> = config["config_groups"].as_object().unwrap().values().collect();
        let names = |list: &Value| {
            list.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&config["ignore"]), ["lm_head"]);
        compare(&packed, &export, 42, |name, rows, cols| {
            let module = name.strip_suffix(".weight")?;
            let chosen = |group: &&&Value| {
                let targets = names(&group["targets"]);
                targets == ["Linear"] || targets.iter().any(|target| target == module)
            };
            let group = groups.iter().find(chosen).filter(|_| !module.contains("embed"))?;
            let weights = &group["weights"];
            let bits = weights["num_bits"].as_u64().unwrap() as usize;
            let size = weights["group_size"].as_u64().map_or(cols, |size| size as usize);
            assert_eq!(weights["strategy"] == "channel", weights["group_size"].is_null());
            let (words, scales) = (export.words(&format!("{name}_packed")), export.floats(&format!("{name}_scale")));
            let zeros = (weights["symmetric"] == false).then(|| export.words(&format!("{name}_zero_point")));
            assert_eq!(export.words(&format!("{name}_shape")), [rows as u32, 0, cols as u32, 0]);
            let (row_words, row_groups) = (words.len() / rows, cols / size);
            let weight = |index: usize| {
                let (row, col) = (index / cols, index % cols);
                let group = col / size;
                // Zero points are streams down the rows.
                let zero = zeros.as_ref().map_or(1 << (bits - 1), |zeros| code(&zeros[group..], row_groups, bits, row));
                let level = code(&words[row * row_words..], 1, bits, col) as i32 - zero as i32;
                level as f32 * scales[row * row_groups + group]
            };
            Some((0..rows * cols).map(weight).collect())
        });
    }
}

#[test]
fn mlx_folders_hold_the_packed_values() {
    for options in PACKINGS {
        let (folder, packed) = packed(&fixture(), options);
        let (output, plan) = exported(&packed, &folder, Target::Mlx, &F32);
        assert!(plan.tensors.iter().all(|tensor| tensor.fidelity == Fidelity::Lossless));
        let export = Export::read(&output);
        let config = &export.config["quantization"];
        compare(&packed, &export, 43, |name, rows, cols| {
            let module = name.strip_suffix(".weight")?;
            let scheme = config.get(module).unwrap_or(config);
            let (bits, size) =
                (scheme["bits"].as_u64().unwrap() as usize, scheme["group_size"].as_u64().unwrap() as usize);
            assert!([32, 64, 128].contains(&size) && scheme["mode"] == "affine");
            let part = |part: &str| export.floats(&format!("{module}.{part}"));
            let (words, scales, biases) = (export.words(name), part("scales"), part("biases"));
            let weight = |index: usize| {
                let (row, col) = (index / cols, index % cols);
                let group = row * (cols / size) + col / size;
                code(&words[row * (cols * bits / 32)..], 1, bits, col) as f32 * scales[group] + biases[group]
            };
            Some((0..rows * cols).map(weight).collect())
        });
    }
}

#[test]
fn gptq_folders_hold_the_packed_values() {
    for options in PACKINGS {
        let (folder, packed) = packed(&fixture(), options);
        let (output, plan) = exported(&packed, &folder, Target::Gptq, &F32);
        assert!(plan.tensors.iter().all(|tensor| tensor.fidelity == Fidelity::Lossless));
        let export = Export::read(&output);
        let config: Value = serde_json::from_slice(&files(&output)["quantize_config.json"]).unwrap();
        assert_eq!(config, export.config["quantization_config"]);
        assert_eq!((&config["checkpoint_format"], &config["desc_act"]), (&"gptq_v2".into(), &false.into()));
        let rules: Vec<(regex::Regex, &Value)> = config["dynamic"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(rule, value)| (regex::Regex::new(rule.strip_prefix("+:").unwrap()).unwrap(), value))
            .collect();
        compare(&packed, &export, 42, |name, rows, cols| {
            let module = name.strip_suffix(".weight").filter(|module| !module.contains("embed"))?;
            let scheme = rules.iter().find(|(rule, _)| rule.is_match(module)).map_or(&config, |(_, value)| value);
            let bits = scheme["bits"].as_u64().unwrap() as usize;
            let size = scheme["group_size"].as_i64().unwrap();
            let size = if size == -1 { cols } else { size as usize };
            let words = |part: &str| export.words(&format!("{module}.{part}"));
            let (qweight, qzeros, groups) = (words("qweight"), words("qzeros"), words("g_idx"));
            let scales = export.floats(&format!("{module}.scales"));
            assert!(groups.iter().enumerate().all(|(col, &group)| group as usize == col / size));
            let zero_words = qzeros.len() / (cols / size);
            let weight = |index: usize| {
                let (row, col) = (index / cols, index % cols);
                let zero = code(&qzeros[col / size * zero_words..], 1, bits, row);
                let level = code(&qweight[row..], rows, bits, col) as i32 - zero as i32;
                level as f32 * scales[col / size * rows + row]
            };
            Some((0..rows * cols).map(weight).collect())
        });
    }
}

#[test]
fn dequantized_folders_and_files_are_checkpoints_with_the_packed_values() {
    let checkpoints = [fixture(), architecture("mamba"), architecture("mixtral_stacked"), architecture("resnet_bk")];
    for (index, source) in checkpoints.iter().enumerate() {
        let (folder, packed) = packed(source, PACKINGS[index]);
        let (output, _) = exported(&packed, &folder, Target::Safetensors, &Options::default());
        let checkpoint = checkpoint::open(&output).unwrap();
        model::check_shapes(&checkpoint).unwrap();
        let arrays = folder.path().join("out.npz");
        let dequantize = Options { dequantize: true, ..Options::default() };
        bkpack::export::export(&packed, Target::Npz, &dequantize, &arrays, false, &bkpack::progress::Silent).unwrap();
        let arrays = checkpoint::open(&arrays).unwrap();
        for tensor in packed.tensors() {
            let expected: Vec<u32> = values(&packed, &tensor.name).into_iter().map(f32::to_bits).collect();
            for source in [&checkpoint, &arrays] {
                let found = source.tensor(&tensor.name).unwrap();
                assert_eq!(found.shape(), tensor.shape);
                let mut floats = vec![0.0; found.elements()];
                Cpu::detect().dequantize(&found.matrix(), 0, &mut floats);
                assert!(floats.into_iter().map(f32::to_bits).eq(expected.iter().copied()), "{}", tensor.name);
            }
        }
        assert_eq!((checkpoint.names().len(), arrays.names().len()), (packed.names().len(), packed.names().len()));
    }
}

#[test]
fn a_narrower_type_is_said_to_round() {
    let (folder, packed) = packed(&fixture(), &["--bits", "8"]);
    let narrow = Options { dtype: Some(FloatType::BF16), ..Options::default() };
    let (output, plan) = exported(&packed, &folder, Target::Safetensors, &narrow);
    for tensor in &plan.tensors {
        let plain = tensor.encoding == Encoding::Float { dtype: FloatName::BF16 };
        assert_eq!(tensor.fidelity == Fidelity::Lossless, plain, "{}", tensor.name);
    }
    let config: Value = serde_json::from_slice(&files(&output)["config.json"]).unwrap();
    assert_eq!(config["dtype"], "bfloat16");
    let checkpoint = checkpoint::open(&output).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let found = checkpoint.tensor(name).unwrap();
    let mut floats = vec![0.0; found.elements()];
    Cpu::detect().dequantize(&found.matrix(), 0, &mut floats);
    let expected = values(&packed, name).into_iter().map(|value| half::bf16::from_f32(value).to_f32());
    assert!(floats.into_iter().eq(expected));
}

#[test]
fn complex_tensors_are_whole_again() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.bkpack");
    let half = |part: ComplexPart| PlannedTensor {
        name: format!("kernel{}", part.suffix()),
        shape: vec![2, 3],
        component: "plain".into(),
        complex: Some(part),
        encoding: Encoding::Float { dtype: FloatName::F32 },
        reason: None,
    };
    let tensors = [half(ComplexPart::Real), half(ComplexPart::Imaginary)];
    let source = Source { kind: "npz".into(), files: Vec::new() };
    let plans = format::plan(&path, source, Value::Null, None, &tensors, &[], None);
    let mut writer = PackedWriter::create(&path, plans, false).unwrap();
    let bytes = |from: u8| (from..from + 6).flat_map(|value| f32::from(value).to_le_bytes()).collect::<Vec<u8>>();
    writer.write_part("kernel.real", &bytes(0)).unwrap();
    writer.write_part("kernel.imag", &bytes(10)).unwrap();
    writer.finish(&[]).unwrap();
    let packed = PackedFile::open(&path).unwrap();
    for (target, dequantize, name) in [(Target::Safetensors, false, "out"), (Target::Npz, true, "out.npz")] {
        let output = folder.path().join(name);
        let options = Options { dequantize, ..Options::default() };
        let plan =
            bkpack::export::export(&packed, target, &options, &output, false, &bkpack::progress::Silent).unwrap();
        assert_eq!(plan.tensors.len(), 1);
        assert_eq!(plan.tensors[0].names, ["kernel"]);
        let file = if output.is_dir() { output.join("model.safetensors") } else { output };
        let back = checkpoint::open(&file).unwrap();
        assert_eq!(back.complex_part("kernel.imag"), Some(ComplexPart::Imaginary));
        let found = back.tensor("kernel.imag").unwrap();
        let mut floats = vec![0.0; 6];
        Cpu::detect().dequantize(&found.matrix(), 0, &mut floats);
        assert_eq!(floats, [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
    }
    let refused =
        bkpack::export::plan(&packed, Target::Mlx, &Options::default(), &bkpack::progress::Silent).unwrap().refusals;
    assert!(refused.iter().any(|refusal| refusal.why.contains("complex")), "{refused:?}");
}

#[test]
fn shards_give_the_same_export_as_one_file() {
    let (whole_folder, whole) = packed(&fixture(), &["--bits", "4"]);
    let (shard_folder, shards) = packed(&fixture(), &["--bits", "4", "--shard-size", "1MB"]);
    let all = [Target::CompressedTensors, Target::Mlx, Target::Gptq, Target::Safetensors];
    let mut seen = HashMap::new();
    for target in all {
        let (a, _) = exported(&whole, &whole_folder, target, &Options::default());
        let (b, _) = exported(&shards, &shard_folder, target, &Options::default());
        let (a, b) = (files(&a), files(&b));
        assert!(a == b, "{}", target.name());
        seen.insert(target.name(), a.len());
    }
    assert_eq!(seen["gptq"], 1 + seen["mlx"]);
}

#[test]
fn sizes_are_exact_beforehand() {
    for (source, options) in
        [(fixture(), PACKINGS[4]), (architecture("mamba"), PACKINGS[0]), (architecture("mixtral"), PACKINGS[1])]
    {
        let (folder, packed) = packed(&source, options);
        for target in [Target::CompressedTensors, Target::Mlx, Target::Gptq, Target::Safetensors, Target::Npz] {
            let output = folder.path().join(target.name());
            let planned =
                bkpack::export::plan(&packed, target, &Options::default(), &bkpack::progress::Silent).unwrap();
            assert!(planned.refusals.is_empty(), "{:?}", planned.refusals);
            bkpack::export::export(&packed, target, &Options::default(), &output, false, &bkpack::progress::Silent)
                .unwrap();
            let written: usize = files(&output).values().map(Vec::len).sum();
            assert_eq!(written as u64, planned.file_bytes, "{}", target.name());
        }
    }
}
