//! The two subcommands as users and machines see them.

use std::path::Path;

use serde_json::Value;

use super::{architecture, fixture, packed, run};

#[test]
fn check_export_says_what_would_be_and_its_status_decides() {
    let (folder, _) = packed(&fixture(), &["--bits", "3", "--tensor", "v_proj=int5:g32:asym"]);
    let model = folder.path().join("model.bkpack");
    let done = run(&["check-export", "--to", "mlx"], &[&model]);
    let text = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(0), "{text}");
    for words in [
        "affine 3-bit g128",
        "affine 5-bit g32",
        "rounded: biases to F16",
        "the same",
        "can be exported to mlx; 6 tensors are rounded",
    ] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }
    let (folder, _) = packed(&architecture("resnet_bk"), &["--bits", "8", "--group-size", "32"]);
    let model = folder.path().join("model.bkpack");
    let done = run(&["check-export", "--to", "gptq"], &[&model]);
    let text = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(1), "{text}");
    assert!(text.contains("impossible: gptq: no runtime") && text.contains("cannot be exported to gptq"), "{text}");
    assert_eq!(run(&["check-export", "--to", "npz"], &[&model]).status.code(), Some(0));
    assert_eq!(run(&["check-export", "--to", "npz"], &[Path::new("absent.bkpack")]).status.code(), Some(2));
}

#[test]
fn machines_get_every_tensor() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let (model, output) = (folder.path().join("model.bkpack"), folder.path().join("out"));
    let object = |arguments: &[&str], paths: &[&Path]| -> Value {
        let done = run(arguments, paths);
        assert!(done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    };
    let checked = object(&["check-export", "--to", "compressed-tensors", "--json"], &[&model]);
    let dry =
        object(&["export", "--to", "compressed-tensors", "--json", "--dry-run"], &[&model, Path::new("-o"), &output]);
    assert!(!output.exists());
    let written = object(&["export", "--to", "compressed-tensors", "--json"], &[&model, Path::new("-o"), &output]);
    assert_eq!((&dry["dry_run"], &written["dry_run"]), (&true.into(), &false.into()));
    for key in ["target", "possible", "lossless_tensors", "tensors", "file_bytes", "refusals", "warnings", "notices"] {
        assert!(!checked[key].is_null(), "{key}");
        assert_eq!((&checked[key], &checked[key]), (&dry[key], &written[key]), "{key}");
    }
    assert_eq!((&checked["target"], &checked["possible"]), (&"compressed-tensors".into(), &true.into()));
    assert_eq!(checked["tensors"].as_array().unwrap().len(), packed.tensors().len());
    assert_eq!(checked["lossless_tensors"], 55);
    let first = &checked["tensors"][0];
    assert_eq!(first["name"], "model.embed_tokens.weight");
    assert_eq!(first["fidelity"], serde_json::json!({ "kind": "rounded", "why": "dequantized to F16" }));
    assert_eq!(first["encoding"]["bits"], 4);
    assert_eq!(first["bytes"], 4096 * 256 * 2);
}

#[test]
fn quiet_is_quiet() {
    let (folder, _) = packed(&fixture(), &["--bits", "4"]);
    let (model, output) = (folder.path().join("model.bkpack"), folder.path().join("out"));
    let done = run(&["export", "--to", "gptq", "-q"], &[&model, Path::new("-o"), &output]);
    assert!(done.status.success() && done.stdout.is_empty() && done.stderr.is_empty(), "{done:?}");
    assert!(output.join("quantize_config.json").exists());
}
