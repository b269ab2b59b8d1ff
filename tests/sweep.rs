//! `bkpack sweep`: what it writes, what it leaves alone when run again, and what it refuses.

#[path = "common/command.rs"]
mod output;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use assert_cmd::cargo::cargo_bin;
use output::{refused, succeeded};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn bkpack() -> Command {
    Command::new(cargo_bin("bkpack"))
}

fn names(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder for results, and token ids to measure and to choose layers on.
struct Setup {
    folder: TempDir,
}

impl Setup {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        for (name, factor) in [("test.json", 37), ("valid.json", 41)] {
            let ids: Vec<u32> = (0..256).map(|index| index * factor % 96).collect();
            std::fs::write(folder.path().join(name), json!(ids).to_string()).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn results(&self) -> PathBuf {
        self.path("results/deep")
    }

    fn sweep(&self, arguments: &[&str]) -> Output {
        let mut command = bkpack();
        command.arg("sweep").args(arguments).arg("--tokens").arg(self.path("test.json"));
        command.args(["--ctx", "32", "-o"]).arg(self.results()).output().unwrap()
    }
}

#[test]
fn each_width_gets_a_file_with_what_eval_measures() {
    let setup = Setup::new();
    let model = format!("small={}", fixture("llama").display());
    let arguments = [model.as_str(), "--bit-widths", "32", "8", "4", "ternary", "--keep", "embed"];
    let table = succeeded(&setup.sweep(&arguments));
    assert!(table.contains("perplexity") && table.lines().count() == 5, "{table}");
    let expected = ["fp32", "int8", "int4", "ternary"].map(|width| format!("small_quant_{width}.json"));
    assert_eq!(names(&setup.results()), BTreeSet::from(expected), "nothing else is left");

    let packed = setup.path("int4.bkpack");
    let mut convert = bkpack();
    succeeded(
        &convert
            .arg("convert")
            .arg(fixture("llama"))
            .arg("-o")
            .arg(&packed)
            .args(["-q", "--keep", "embed"])
            .output()
            .unwrap(),
    );
    let mut eval = bkpack();
    eval.arg("eval").arg(&packed).arg("--baseline").arg(fixture("llama")).arg("--tokens").arg(setup.path("test.json"));
    let eval: Value =
        serde_json::from_str(&succeeded(&eval.args(["--ctx", "32", "--json"]).output().unwrap())).unwrap();
    let result = read(&setup.results().join("small_quant_int4.json"));
    assert_eq!((&result["bit_width"], &result["model"]), (&json!(4), &json!("small")));
    assert_eq!(result["perplexity"], eval["ppl"]);
    for key in [
        "baseline_ppl",
        "ppl_increase_percent",
        "kld_mean",
        "top1_agreement",
        "file_bytes",
        "ratio_fp32",
        "looks_ahead",
    ] {
        assert_eq!(result[key], eval[key], "{key}");
    }
    assert_eq!((&result["precision"], &result["encoding"]), (&json!("int4"), &json!("int4:g128")));
    assert_eq!(result["protocol"]["scored"], eval["scored"]);
    assert_eq!(result["protocol"]["text"]["name"], "test.json");
    let packed_hash = blake3::hash(&std::fs::read(&packed).unwrap()).to_hex();
    assert_eq!(result["hashes"]["packed"], packed_hash.as_str());
    let ternary = read(&setup.results().join("small_quant_ternary.json"));
    assert_eq!(ternary["bit_width"], json!(1.58));
    let whole = read(&setup.results().join("small_quant_fp32.json"));
    assert_eq!((&whole["bit_width"], &whole["kld_mean"]), (&json!(32), &json!(0.0)));
}

#[test]
fn a_second_run_measures_only_what_is_missing() {
    let setup = Setup::new();
    let model = fixture("architectures/mamba");
    let arguments = [model.to_str().unwrap(), "--bits", "fp32,int8,int4", "--json"];
    let first: Value = serde_json::from_str(&succeeded(&setup.sweep(&arguments))).unwrap();
    let paths = ["fp32", "int8", "int4"].map(|width| setup.results().join(format!("mamba_quant_{width}.json")));
    let bytes = |path: &PathBuf| std::fs::read(path).unwrap();
    let before = paths.each_ref().map(bytes);
    // The seconds in the file tell a second measurement from the first.
    std::fs::remove_file(&paths[1]).unwrap();
    let second: Value = serde_json::from_str(&succeeded(&setup.sweep(&arguments))).unwrap();
    assert_eq!(second.as_array().unwrap().len(), 3);
    let keys = |results: &Value| -> Vec<Value> {
        results.as_array().unwrap().iter().map(|result| result["key"].clone()).collect()
    };
    assert_eq!(keys(&first), keys(&second));
    assert_eq!(first[1]["perplexity"], second[1]["perplexity"]);
    assert_eq!((bytes(&paths[0]), bytes(&paths[2])), (before[0].clone(), before[2].clone()));
    assert_eq!(read(&paths[1])["key"], first[1]["key"]);

    // A result of other options, or none at all, is not taken for one of these, nor replaced unasked.
    let other = [&arguments[..], &["--group-size", "32"]].concat();
    refused(&setup.sweep(&other), &["mamba_quant_int8.json", "--force"]);
    std::fs::write(&paths[2], "{").unwrap();
    refused(&setup.sweep(&arguments), &["mamba_quant_int4.json", "--force"]);
    assert_eq!(bytes(&paths[2]), b"{");
    succeeded(&setup.sweep(&[&other[..], &["--force"]].concat()));
    assert_eq!(read(&paths[2])["encoding"], "int4:g32");
}

#[test]
fn packed_files_are_kept_if_asked_for() {
    let setup = Setup::new();
    let model = fixture("architectures/mamba");
    succeeded(&setup.sweep(&[model.to_str().unwrap(), "--bits", "int8", "--keep-packed"]));
    assert_eq!(names(&setup.results()), ["mamba_int8.bkpack", "mamba_quant_int8.json"].map(String::from).into());
    let mut verify = bkpack();
    succeeded(&verify.arg("verify").arg(setup.results().join("mamba_int8.bkpack")).output().unwrap());

    // Stopped between the packed file and its result, it goes on; another file of that name stays.
    let arguments = [model.to_str().unwrap(), "--bits", "int8", "--keep-packed"];
    std::fs::remove_file(setup.results().join("mamba_quant_int8.json")).unwrap();
    refused(&setup.sweep(&[&arguments[..], &["--group-size", "32"]].concat()), &["mamba_int8.bkpack"]);
    succeeded(&setup.sweep(&arguments));
    assert!(setup.results().join("mamba_quant_int8.json").exists());
    std::fs::remove_file(setup.results().join("mamba_quant_int8.json")).unwrap();
    std::fs::write(setup.results().join("mamba_int8.bkpack"), "other").unwrap();
    refused(&setup.sweep(&arguments), &["mamba_int8.bkpack"]);
}

#[test]
fn configurations_vary_what_the_architecture_has() {
    let setup = Setup::new();
    let valid = setup.path("valid.json");
    let valid = valid.to_str().unwrap();
    let models = ["resnet_bk", "mamba", "mistral"].map(|name| fixture(&format!("architectures/{name}")));
    let [bk, mamba, mistral] = models.each_ref().map(|path| path.to_str().unwrap());
    let arguments = [bk, mamba, mistral, "--compute", "--calib-tokens", valid, "--json"];
    let results: Value = serde_json::from_str(&succeeded(&setup.sweep(&arguments))).unwrap();
    let of = |model: &str| -> Vec<&Value> {
        results.as_array().unwrap().iter().filter(|result| result["model"] == model).collect()
    };
    // Of 3 layers all or 2; of 2 experts both or one; of a window of 8 within windows of 32 all, or 2.
    let counts = ["resnet_bk", "mamba", "mistral"].map(|model| of(model).len());
    assert_eq!(counts, [4, 2, 4]);
    for model in ["resnet_bk", "mamba", "mistral"] {
        let configurations = of(model);
        assert_eq!(configurations[0]["compute_factor"], json!(1.0));
        assert_eq!(configurations[0]["layers_skipped"], json!([]));
        for (index, result) in configurations.iter().enumerate() {
            assert_eq!(result["config_id"], format!("{model}_config_{index}"));
            assert_eq!(**result, read(&setup.results().join(format!("{model}_config_{index}.json"))));
            let factor =
                result["flops_per_token"].as_f64().unwrap() / configurations[0]["flops_per_token"].as_f64().unwrap();
            assert!((result["compute_factor"].as_f64().unwrap() - factor).abs() < 1e-12);
            assert!(result["perplexity"].as_f64().unwrap() > 1.0);
        }
        let flops: Vec<u64> = configurations.iter().map(|result| result["flops_per_token"].as_u64().unwrap()).collect();
        assert!(flops.is_sorted_by(|a, b| a >= b), "{flops:?}");
        // The layer that is missed least on the calibration text is the one that goes.
        let ranking = read(&setup.results().join(format!("{model}_layer_ranking.json")));
        let without: Vec<f64> =
            ranking["nll_without"].as_array().unwrap().iter().map(|nll| nll.as_f64().unwrap()).collect();
        let least = (0..without.len()).min_by(|&a, &b| without[a].total_cmp(&without[b])).unwrap();
        let shorter = configurations.iter().find(|result| result["layers"] != result["layers_total"]).unwrap();
        assert_eq!(shorter["layers_skipped"], json!([least]));
        assert_eq!(shorter["calibration"]["name"], "valid.json");
    }
    assert_eq!(of("mistral").iter().filter(|result| result["attention_window"] == 2).count(), 2);
    assert_eq!(of("resnet_bk").iter().filter(|result| result["experts_per_token"] == 1).count(), 2);
    let mut eval = bkpack();
    eval.arg("eval").arg(bk).arg("--tokens").arg(setup.path("test.json")).args(["--ctx", "32", "--json"]);
    let eval: Value = serde_json::from_str(&succeeded(&eval.output().unwrap())).unwrap();
    assert_eq!(of("resnet_bk")[0]["perplexity"], eval["ppl"]);

    // Again: nothing is measured. At 4 bits: as many operations, fewer bytes.
    let again: Value = serde_json::from_str(&succeeded(&setup.sweep(&arguments))).unwrap();
    let seconds = |results: &Value| -> Vec<f64> {
        results.as_array().unwrap().iter().map(|result| result["eval_seconds"].as_f64().unwrap()).collect()
    };
    for (again, first) in seconds(&again).into_iter().zip(seconds(&results)) {
        assert!((again / first - 1.0).abs() < 1e-12, "{again} {first}");
    }
    let int4 = [&arguments[..], &["--bits", "int4"]].concat();
    refused(&setup.sweep(&int4), &["--force"]);
    let int4: Value = serde_json::from_str(&succeeded(&setup.sweep(&[&int4[..], &["--force"]].concat()))).unwrap();
    for (packed, whole) in int4.as_array().unwrap().iter().zip(results.as_array().unwrap()) {
        assert_eq!(packed["flops_per_token"], whole["flops_per_token"]);
        let bytes = |result: &Value| result["weight_bytes_per_token"].as_u64().unwrap();
        assert!(4 * bytes(packed) < bytes(whole), "{packed} {whole}");
    }
}

#[test]
fn a_model_that_computes_no_number_is_a_result_without_a_perplexity() {
    let setup = Setup::new();
    let model = setup.path("loud");
    std::fs::create_dir(&model).unwrap();
    let source = fixture("architectures/mistral");
    std::fs::copy(source.join("config.json"), model.join("config.json")).unwrap();
    let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let norm = &entries["model.norm.weight"];
    assert_eq!(norm["dtype"], "BF16");
    let [start, end] = [0, 1].map(|side| 8 + header + norm["data_offsets"][side].as_u64().unwrap() as usize);
    bytes[start..end].chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&0x7f7f_u16.to_le_bytes()));
    std::fs::write(model.join("model.safetensors"), bytes).unwrap();

    let table = succeeded(&setup.sweep(&[model.to_str().unwrap(), "--bits", "fp32,int8"]));
    assert!(table.lines().skip(1).all(|line| line.contains(" - ")), "{table}");
    let result = read(&setup.results().join("loud_quant_int8.json"));
    assert_eq!(result["perplexity"], Value::Null);
    assert!(result["failure"].as_str().unwrap().contains("NaN or infinite"), "{result}");
}

#[test]
fn wrong_use_is_refused_before_anything_is_measured() {
    let setup = Setup::new();
    let model = fixture("architectures/mamba");
    let model = model.to_str().unwrap();
    let test = setup.path("test.json");
    let named = format!("mamba={}", fixture("architectures/mistral").display());
    for (arguments, words) in [
        (vec![model, "--bits", "int9"], &["int9"][..]),
        (vec![model, "--bits", "int4", "4"], &["twice"]),
        (vec![model, &named], &["mamba", "NAME=MODEL"]),
        (vec![model, "--compute"], &["--calib"]),
        (vec![model, "--compute", "--calib-tokens", test.to_str().unwrap()], &["--calib", "another"]),
        (vec![model, "--compute", "--calib-tokens", "absent.json"], &["absent.json"]),
        (vec![model, "--bits", "fp32", "--asymmetric"], &["--asymmetric"]),
        (vec![model, "--limit-tokens", "20"], &["20 tokens"]),
        (vec!["absent"], &["absent"]),
    ] {
        let output = setup.sweep(&arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
        assert!(!setup.results().exists(), "{arguments:?}");
    }
    let ahead = fixture("architectures/resnet_bk_lookahead");
    refused(&setup.sweep(&[ahead.to_str().unwrap(), "--bits", "fp32"]), &["--allow-lookahead"]);
    let table = succeeded(&setup.sweep(&[ahead.to_str().unwrap(), "--bits", "fp32", "--allow-lookahead"]));
    assert!(table.contains("AHEAD"), "{table}");
    assert_eq!(read(&setup.results().join("resnet_bk_lookahead_quant_fp32.json"))["looks_ahead"], json!(true));
}

#[test]
fn what_a_killed_sweep_left_goes_with_the_next() {
    let setup = Setup::new();
    let results = setup.results();
    let mut child = bkpack();
    child.arg("sweep").arg(fixture("llama")).arg("--text").arg(fixture("wikitext2.test.txt"));
    let mut child = child.args(["--bits", "int8", "-q", "-o"]).arg(&results).spawn().unwrap();
    let packs = || results.exists() && names(&results).iter().any(|name| name.starts_with(".bkpack-sweep-"));
    let start = Instant::now();
    while !packs() {
        assert!(start.elapsed() < Duration::from_secs(300), "nothing was packed");
        std::thread::sleep(Duration::from_millis(2));
    }
    // A second sweep leaves the folder of one that runs.
    let model = fixture("architectures/mamba");
    let arguments = [model.to_str().unwrap(), "--bits", "int8"];
    succeeded(&setup.sweep(&arguments));
    assert!(child.try_wait().unwrap().is_none() && packs());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(packs(), "nothing could clean up");
    succeeded(&setup.sweep(&arguments));
    assert_eq!(names(&results), ["mamba_quant_int8.json".to_owned()].into());
}

#[test]
fn an_interrupted_sweep_keeps_what_is_done_and_goes_on() {
    let folder = TempDir::new().unwrap();
    let results = folder.path().join("results");
    let command = || {
        let mut command = bkpack();
        command.arg("sweep").arg(fixture("llama")).arg("--text").arg(fixture("wikitext2.test.txt"));
        command.args(["--bits", "fp32,int8,int4,int3,int2", "--limit-tokens", "4096", "-q", "-o"]).arg(&results);
        command
    };
    let mut child = command().spawn().unwrap();
    let done = results.join("llama_quant_fp32.json");
    let start = Instant::now();
    while !done.exists() {
        assert!(start.elapsed() < Duration::from_secs(300), "nothing was measured");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let left = names(&results);
    assert!(left.len() < 5 && left.iter().all(|name| name.ends_with(".json")), "{left:?}");
    let before = std::fs::read(&done).unwrap();
    succeeded(&command().output().unwrap());
    assert_eq!((names(&results).len(), std::fs::read(&done).unwrap()), (5, before));
}
