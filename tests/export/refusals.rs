//! What a layout cannot hold is told before anything is written; what one runtime would refuse is a warning.

use std::{io::Write, path::Path};

use bkpack::{
    Error,
    export::{self, Fidelity, Options, Plan, Target},
    format::PackedFile,
    progress::Silent,
};
use bkpack_kernels::FloatType;
use half::bf16;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;

use super::{architecture, exported, files, fixture, output::refused, packed, run};

fn plan_of(packed: &PackedFile, target: Target) -> Plan {
    export::plan(packed, target, &Options::default(), &Silent).unwrap()
}

/// Asserts that an export is refused with these words, and that nothing is written.
#[track_caller]
fn impossible(packed: &PackedFile, folder: &TempDir, target: Target, options: &Options, words: &[&str]) {
    let output = folder.path().join("refused");
    let error = export::export(packed, target, options, &output, false, &Silent).unwrap_err();
    assert!(matches!(error, Error::Export { .. }), "{error}");
    let message = error.to_string();
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
    assert!(!output.exists());
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["model.bkpack"]);
}

#[test]
fn an_architecture_that_no_runtime_has_goes_only_where_bkpack_reads_it() {
    let (folder, packed) = packed(&architecture("resnet_bk"), &["--bits", "4", "--group-size", "32"]);
    for target in [Target::CompressedTensors, Target::Mlx, Target::Gptq] {
        impossible(&packed, &folder, target, &Options::default(), &["ResNetBKForCausalLM", target.name()]);
    }
    for target in [Target::Safetensors, Target::Npz] {
        assert!(plan_of(&packed, target).refusals.is_empty());
    }
}

#[test]
fn a_model_without_config_or_without_quantized_layers_is_no_quantized_folder() {
    let (folder, packed_fp16) = packed(&fixture(), &["--bits", "16"]);
    impossible(
        &packed_fp16,
        &folder,
        Target::CompressedTensors,
        &Options::default(),
        &["no linear layer is quantized"],
    );
    let weights = fixture().join("model.safetensors");
    let (folder, bare) = packed(&weights, &["--bits", "4"]);
    for target in [Target::CompressedTensors, Target::Mlx, Target::Gptq] {
        impossible(&bare, &folder, target, &Options::default(), &["no config.json", "--config"]);
    }
    let bare = plan_of(&bare, Target::Safetensors);
    assert!(bare.refusals.is_empty() && bare.notices.iter().any(|notice| notice.contains("weights alone")));
}

#[test]
fn a_value_beyond_f16_is_refused_by_its_name() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("model.safetensors");
    let values: Vec<u8> = [1f32, 70_000.0, -3.5, 1e-9].iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = TensorView::new(safetensors::Dtype::F32, vec![4], &values).unwrap();
    std::fs::write(&path, safetensors::serialize([("norm.weight", tensor)], None).unwrap()).unwrap();
    let (folder, packed) = packed(&path, &["--bits", "4"]);
    let half = Options { dtype: Some(FloatType::F16), ..Options::default() };
    impossible(&packed, &folder, Target::Safetensors, &half, &["norm.weight", "70000", "F16", "--dtype"]);
    let wide = export::plan(&packed, Target::Safetensors, &Options::default(), &Silent).unwrap();
    assert_eq!(wide.tensors[0].fidelity, Fidelity::Lossless);
    let brain = Options { dtype: Some(FloatType::BF16), ..Options::default() };
    let brain = export::plan(&packed, Target::Safetensors, &brain, &Silent).unwrap();
    assert_eq!(brain.tensors[0].fidelity, Fidelity::Rounded { why: "converted to BF16".into() });
}

/// The fixture with the weights named so multiplied by a power of two.
fn scaled(part: &str, factor: f32) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, bytes) in files(&fixture()) {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let scaled: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), safetensors::Dtype::BF16);
            let factor = if name.contains(part) { factor } else { 1.0 };
            let scale = |bytes: &[u8]| bf16::from_f32(factor * bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
            let values = tensor.data().chunks(2).flat_map(|bytes| scale(bytes).to_le_bytes()).collect();
            (name.to_owned(), tensor.shape().to_vec(), values)
        })
        .collect();
    let views = scaled
        .iter()
        .map(|(name, shape, values)| (name, TensorView::new(safetensors::Dtype::BF16, shape.clone(), values).unwrap()));
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

#[test]
fn scales_that_f16_loses_are_refused_like_those_beyond_it() {
    let wide = Options { dtype: Some(FloatType::F32), ..Options::default() };
    let brain = Options { dtype: Some(FloatType::BF16), ..Options::default() };
    for (factor, word) in [(2f32.powi(-27), "too small for F16"), (2f32.powi(30), "too large for F16")] {
        let source = scaled("layers.1.mlp.up_proj", factor);
        let (folder, packed) = packed(source.path(), &["--bits", "8", "--group-size", "32"]);
        for target in [Target::CompressedTensors, Target::Mlx] {
            let words = ["layers.1.mlp.up_proj", "holds a ", word, "--dtype fp32"];
            impossible(&packed, &folder, target, &Options::default(), &words);
            assert!(export::plan(&packed, target, &wide, &Silent).unwrap().refusals.is_empty());
        }
        // Plain values of this size are lost in F16 as well.
        impossible(
            &packed,
            &folder,
            Target::Gptq,
            &Options::default(),
            &["up_proj.weight holds", word, "--dtype fp32"],
        );
        let plan = export::plan(&packed, Target::Gptq, &brain, &Silent).unwrap();
        assert!(plan.refusals.is_empty(), "{:?}", plan.refusals);
        let layer = plan.tensors.iter().find(|tensor| tensor.name.contains("layers.1.mlp.up_proj")).unwrap();
        assert_eq!((layer.names.len(), layer.target.as_str()), (1, "BF16"));
        assert!(
            plan.notices.iter().any(|notice| notice.contains("up_proj") && notice.contains("too small or too large"))
        );
        let gguf = plan_of(&packed, Target::Gguf);
        let layer = gguf.tensors.iter().find(|tensor| tensor.name.contains("layers.1.mlp.up_proj")).unwrap();
        assert_eq!((layer.target.as_str(), &layer.fidelity), ("F32", &Fidelity::Lossless));
    }
}

#[test]
fn biases_are_looked_at_where_scales_are_merely_rounded() {
    // Scales stay below 65504; a bias is up to 255 times its scale.
    let source = scaled("layers.1.mlp.up_proj", 2f32.powi(23));
    let (folder, packed) = packed(source.path(), &["--bits", "8", "--group-size", "32", "--asymmetric"]);
    let plan = plan_of(&packed, Target::CompressedTensors);
    let layer = plan.tensors.iter().find(|tensor| tensor.name.contains("layers.1.mlp.up_proj")).unwrap();
    assert_eq!(layer.fidelity, Fidelity::Rounded { why: "scales to F16".into() });
    impossible(&packed, &folder, Target::Mlx, &Options::default(), &["up_proj", "a bias of", "too large for F16"]);
}

#[test]
fn groups_are_not_split_into_crumbs() {
    // Groups of 32 on the 48 columns of w2 would become ones of 16.
    let (_folder, packed) = packed(&architecture("mixtral"), &["--bits", "4", "--group-size", "32"]);
    for target in [Target::CompressedTensors, Target::Gptq, Target::Mlx] {
        let plan = plan_of(&packed, target);
        let of = |part: &str| plan.tensors.iter().find(|tensor| tensor.name.contains(part)).unwrap().names.len();
        assert_eq!((of("experts.0.w2") > 1, of("q_proj") > 1), (false, true), "{}", target.name());
        let said = |notice: &String| notice.contains("w2.weight: its columns do not split");
        assert!(plan.notices.iter().any(said), "{:?}", plan.notices);
    }
}

#[test]
fn layers_that_vllm_fuses_must_be_alike() {
    let (_folder, mixed) = packed(&fixture(), &["--bits", "4", "--tensor", r"layers\.1\..*v_proj=int8"]);
    for target in [Target::CompressedTensors, Target::Gptq] {
        let found = plan_of(&mixed, target);
        assert!(found.refusals.is_empty());
        let warning = found.warnings.iter().find(|warning| warning.why.contains("quantized alike")).unwrap();
        assert_eq!(warning.runtime, "vLLM");
        for word in ["layers.1.self_attn.v_proj is 8-bit g128", "is 4-bit g128", "1 of 12"] {
            assert!(warning.why.contains(word), "{}", warning.why);
        }
    }
    // In an asymmetric or a plain part the difference counts as well.
    for options in ["up_proj=int4:asym", "k_proj=fp16"] {
        let (_folder, mixed) = packed(&fixture(), &["--bits", "4", "--tensor", options]);
        let found = plan_of(&mixed, Target::CompressedTensors);
        assert!(found.warnings.iter().any(|warning| warning.why.contains("quantized alike")), "{options}");
    }
    let (_folder, alike) =
        packed(&fixture(), &["--bits", "4", "--tensor", "[qkv]_proj=int3", "--tensor", "o_proj=int8"]);
    let found = plan_of(&alike, Target::CompressedTensors);
    assert!(!found.warnings.iter().any(|warning| warning.why.contains("quantized alike")), "{:?}", found.warnings);
}

#[test]
fn experts_are_told_apart_by_what_reads_them() {
    let group = ["--bits", "4", "--group-size", "32"];
    let (folder, stacked) = packed(&architecture("mixtral_stacked"), &group);
    impossible(&stacked, &folder, Target::Mlx, &Options::default(), &["mlp.experts", "one by one"]);
    let (folder, different) = packed(
        &architecture("mixtral"),
        &["--bits", "4", "--group-size", "32", "--tensor", r"experts\.2\.w1=int8:g32"],
    );
    impossible(&different, &folder, Target::Mlx, &Options::default(), &["experts.2.w1", "different ways"]);
    let warnings = plan_of(&different, Target::CompressedTensors).warnings;
    assert!(warnings.iter().any(|warning| warning.why.contains("experts of a block")), "{warnings:?}");

    let (folder, alike) =
        packed(&architecture("mixtral"), &["--bits", "4", "--group-size", "32", "--tensor", r"\.w2\.=int8:row"]);
    let (output, _) = exported(&alike, &folder, Target::Mlx, &Options::default());
    let config: Value = serde_json::from_slice(&files(&output)["config.json"]).unwrap();
    // 48 columns are no multiple of 32: those experts stay plain, and the rest has one scheme.
    assert_eq!(config["quantization"], serde_json::json!({ "group_size": 32, "bits": 4, "mode": "affine" }));
    // A router is no linear layer to transformers.
    let (output, _) = exported(&alike, &folder, Target::CompressedTensors, &Options::default());
    let config: Value = serde_json::from_slice(&files(&output)["config.json"]).unwrap();
    let ignored = config["quantization_config"]["ignore"].as_array().unwrap();
    assert!(ignored.contains(&"model.layers.0.block_sparse_moe.gate".into()), "{ignored:?}");
}

#[test]
fn layers_that_do_not_fit_stay_plain() {
    // Mamba's x_proj has 36 rows and dt_proj 4 columns.
    let (folder, mamba) = packed(&architecture("mamba"), &["--bits", "4", "--group-size", "32"]);
    let (output, plan) = exported(&mamba, &folder, Target::Gptq, &Options::default());
    let of = |name: &str| {
        let wanted = format!("backbone.layers.0.mixer.{name}.weight");
        plan.tensors.iter().find(|tensor| tensor.name == wanted).unwrap().target.clone()
    };
    assert_eq!(
        (of("in_proj").as_str(), of("x_proj").as_str(), of("dt_proj").as_str()),
        ("gptq_v2 4-bit per row", "F16", "F16")
    );
    let config: Value = serde_json::from_slice(&files(&output)["quantize_config.json"]).unwrap();
    assert_eq!(config["dynamic"][r"-:^backbone\.layers\.0\.mixer\.x_proj$"], serde_json::json!({}));
    assert!(plan.warnings.iter().any(|warning| warning.runtime == "GPTQModel" && warning.why.contains("Mamba")));

    // transformers multiplies with dt_proj past the layer that would unpack it.
    let (_folder, rows) = packed(&architecture("mamba"), &["--bits", "8", "--group-size", "row"]);
    let plan = plan_of(&rows, Target::CompressedTensors);
    let dt = plan.tensors.iter().find(|tensor| tensor.name.ends_with("0.mixer.dt_proj.weight")).unwrap();
    assert_eq!((dt.names.len(), dt.target.as_str()), (1, "F16"));
    let warning = plan.warnings.iter().find(|warning| warning.runtime == "transformers").unwrap();
    assert!(warning.why.ends_with("(dequantize=True)"), "{}", warning.why);
}

#[test]
fn names_that_a_container_would_misread_are_refused() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("model.npz");
    for (name, target, words) in [
        ("../../up", Target::Npz, "leads out of an archive"),
        ("/etc/up", Target::Npz, "leads out of an archive"),
        ("a\\..\\up", Target::Npz, "leads out of an archive"),
        ("__metadata__", Target::Safetensors, "safetensors' own"),
    ] {
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        zip.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
        let mut array =
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (64, 64), }".to_vec();
        array.resize(127, b' ');
        array.push(b'\n');
        array.resize(128 + 64 * 64 * 4, 0);
        zip.write_all(&array).unwrap();
        zip.finish().unwrap();
        let (folder, packed) = packed(&path, &["--bits", "4"]);
        impossible(&packed, &folder, target, &Options::default(), &[name, words]);
    }
}

#[test]
fn options_without_effect_are_refused() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let output = folder.path().join("out");
    let path = folder.path().join("model.bkpack");
    let export = |arguments: &[&str]| run(&[&["export", "-o", output.to_str().unwrap()], arguments].concat(), &[&path]);
    refused(&export(&["--to", "mlx", "--dequantize"]), &["--dequantize", "npz"]);
    refused(&export(&["--to", "npz", "--requantize"]), &["--requantize", "gguf"]);
    refused(&export(&["--to", "npz", "--dtype", "bf16"]), &["--dtype", "BF16"]);
    assert!(!output.exists());
    drop(packed);
}

#[test]
fn an_archive_is_to_be_unpacked_first() {
    let (folder, _) = packed(&fixture(), &["--bits", "4"]);
    let (model, archive) = (folder.path().join("model.bkpack"), folder.path().join("model.archive"));
    assert!(run(&["archive", "-q"], &[&model, Path::new("-o"), &archive]).status.success());
    let output = folder.path().join("out");
    refused(
        &run(&["export", "--to", "safetensors"], &[&archive, Path::new("-o"), &output]),
        &["archive", "bkpack unpack"],
    );
    assert!(!output.exists());
}
