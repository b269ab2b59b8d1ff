//! Synthetic checkpoints: their shapes are the real ones, their bytes are reproducible and marked, and no failure
//! leaves anything behind.

#[path = "common/command.rs"]
mod output;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    Error, checkpoint,
    eval::perplexity::{self, evaluate},
    format::PackedFile,
    model::{self, config::is_synthetic},
    ops::cpu::Activations,
    progress::Silent,
    synth::{Options, Preset, Synthesis},
    tensor::TensorSource,
};
use bkpack_kernels::{Cpu, FloatType};
use output::{refused, succeeded};
use serde_json::Value;
use tempfile::TempDir;

const OPTIONS: Options = Options { dtype: FloatType::BF16, seed: 0, layers: None, shard_bytes: 5_000_000_000 };

/// The folder of the real checkpoint.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")
}

fn plan(name: &str, options: &Options) -> Synthesis {
    Synthesis::plan(Preset::named(name).unwrap(), options).unwrap()
}

/// Writes a model of few layers into a folder of its own.
fn written(name: &str, options: Options) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model");
    plan(name, &options).write(&output, false, &Silent).unwrap();
    (folder, output)
}

/// Every file of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

fn synth(output: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin("bkpack"));
    command.args(["synth", "--preset", "resnet-bk", "-o"]).arg(output).args(arguments);
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

#[test]
fn parameters_are_those_of_the_real_models() {
    // The counts that Hugging Face states, tied heads counted once; for ResNet-BK, of the published checkpoint.
    let known = [
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.2-1b", 1_235_814_400),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("mamba-130m", 129_135_360),
        ("mamba-2.8b", 2_768_345_600),
        ("resnet-bk", 15_005_244),
    ];
    for (name, parameters) in known {
        assert_eq!(plan(name, &OPTIONS).parameters(), parameters, "{name}");
    }
    for preset in Preset::all() {
        let whole = plan(&preset.name, &OPTIONS).parameters();
        let of = |layers| plan(&preset.name, &Options { layers: Some(layers), ..OPTIONS }).parameters();
        assert_eq!(of(preset.layers()), whole);
        // Every layer has as many as the next.
        assert_eq!(of(2) - of(1), (whole - of(1)) / (preset.layers() as u64 - 1), "{}", preset.name);
        for layers in [0, preset.layers() + 1] {
            let refused = Synthesis::plan(preset, &Options { layers: Some(layers), ..OPTIONS });
            assert!(matches!(refused, Err(Error::Option { option: "--layers", .. })));
        }
    }
}

#[test]
fn a_written_folder_is_the_checkpoint_that_was_planned() {
    for (name, dtype, shard_bytes) in [
        ("smollm2-135m", FloatType::BF16, 5_000_000_000),
        ("resnet-bk", FloatType::F32, 5_000_000_000),
        ("resnet-bk", FloatType::F16, 3_000_000),
        ("mamba-130m", FloatType::BF16, 80_000_000),
    ] {
        let options = Options { dtype, shard_bytes, layers: Some(1), ..OPTIONS };
        let (planned, (_folder, output)) = (plan(name, &options), written(name, options));
        let on_disk: usize = files(&output).values().map(Vec::len).sum();
        assert_eq!(planned.file_bytes(), on_disk as u64, "{name}");
        let checkpoint = checkpoint::open(&output).unwrap();
        assert_eq!(checkpoint.weight_files().len(), planned.shard_count());
        assert_eq!(planned.shard_count() > 1, shard_bytes < 100_000_000, "{name}");
        assert_eq!(checkpoint.names().len(), planned.tensor_count());
        let parameters: u64 =
            checkpoint.names().iter().map(|name| checkpoint.tensor(name).unwrap().elements() as u64).sum();
        assert_eq!(parameters, planned.parameters());
        for file in checkpoint.weight_files() {
            let tensors = safetensors::SafeTensors::deserialize(file.bytes()).unwrap();
            let bytes: usize = tensors.tensors().iter().map(|(_, tensor)| tensor.data().len()).sum();
            assert!(bytes as u64 <= shard_bytes || tensors.len() == 1, "{name}: {}", file.name());
        }
        let config = checkpoint.config().unwrap();
        assert!(is_synthetic(config));
        assert_eq!(config["bkpack_synthetic"], serde_json::json!({ "preset": name, "seed": 0 }));
        let layers = config.get("num_hidden_layers").or(config.get("n_layers")).unwrap();
        assert_eq!(layers, 1);
        if model::Architecture::from_config(config).is_some() {
            model::check_shapes(&checkpoint).unwrap();
        }
        let mut values = Vec::new();
        for tensor in checkpoint.names() {
            let tensor = checkpoint.tensor(tensor).unwrap();
            values.resize(tensor.elements(), 0.0);
            Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
            assert!(values.iter().all(|value| value.is_finite() && value.abs() < 10.0));
        }
    }
}

#[test]
fn names_and_shapes_are_those_of_a_real_checkpoint() {
    // The fixture's own config and weights: what it describes must be what it holds.
    let real = checkpoint::open(&fixture()).unwrap();
    let mut config = Preset::named("smollm2-135m").unwrap().config.clone();
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    ] {
        config[key] = real.config().unwrap()[key].clone();
    }
    let preset = Preset { name: "fixture".into(), source: "fixture".into(), config };
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model");
    Synthesis::plan(&preset, &OPTIONS).unwrap().write(&output, false, &Silent).unwrap();
    let ours = checkpoint::open(&output).unwrap();
    let shapes = |source: &dyn TensorSource| {
        let named = source.names().iter().map(|name| (name.clone(), source.shape(name).unwrap().to_vec()));
        named.collect::<Vec<_>>()
    };
    assert_eq!(shapes(&ours), shapes(&real));
}

#[test]
fn bytes_depend_on_the_seed_alone() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, arguments: &[&str]| {
        let output = folder.path().join(name);
        let outcome = run(&mut synth(&output, &[&["-q", "--layers", "2"], arguments].concat()));
        assert_eq!((outcome.status.code(), outcome.stdout, outcome.stderr), (Some(0), vec![], vec![]));
        files(&output)
    };
    let first = write("a", &["--threads", "1"]);
    assert!(first == write("b", &["--threads", "3"]));
    assert!(first["model.safetensors"] != write("c", &["--seed", "1"])["model.safetensors"]);
    // BF16 is FP32, rounded; shards hold the same values as one file.
    write("d", &["--dtype", "fp32", "--shard-size", "2MB"]);
    let (bf16, fp32) = (folder.path().join("a"), folder.path().join("d"));
    let (bf16, fp32) = (checkpoint::open(&bf16).unwrap(), checkpoint::open(&fp32).unwrap());
    assert!(fp32.weight_files().len() > 3);
    for name in bf16.names() {
        let values = |checkpoint: &checkpoint::Checkpoint| {
            let tensor = checkpoint.tensor(name).unwrap();
            let mut values = vec![0.0; tensor.elements()];
            Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
            values
        };
        let (rounded, exact) = (values(&bf16), values(&fp32));
        assert!(rounded.iter().zip(&exact).all(|(a, &b)| *a == half::bf16::from_f32(b).to_f32()), "{name}");
    }
}

#[test]
fn quality_of_random_weights_is_refused_and_nothing_else() {
    let (folder, output) = written("smollm2-135m", Options { layers: Some(1), ..OPTIONS });
    let (source, real) = (checkpoint::open(&output).unwrap(), checkpoint::open(&fixture()).unwrap());
    let options =
        perplexity::Options { ctx: Some(8), skip: 1, activations: Activations::Exact, allow_lookahead: false };
    let measure = |source: &dyn TensorSource, baseline: Option<&dyn TensorSource>| {
        evaluate(Cpu::detect(), source, baseline, &[1; 16], &options, &Silent)
    };
    assert!(measure(&real, None).is_ok());
    assert!(matches!(measure(&source, None), Err(Error::Synthetic { path }) if path == output));
    assert!(matches!(measure(&real, Some(&source)), Err(Error::Synthetic { path }) if path == output));

    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (packed, tokens, model) = (path("model.bkpack"), path("tokens.json"), output.to_str().unwrap());
    let text = fixture().join("../wikitext2.test.txt");
    let text = text.to_str().unwrap();
    std::fs::write(&tokens, "[1, 2, 3, 4, 5, 6, 7, 8]").unwrap();
    let bkpack = |arguments: &[&str]| run(Command::new(cargo_bin("bkpack")).args(arguments));
    let logits = path("logits.safetensors");
    for arguments in [
        &["convert", model, "-o", &packed, "--rounding", "rtn"][..],
        &["inspect", &packed],
        &["diff", model, &packed],
        &["verify", &packed, "--min-ratio", "6"],
        &["logits", &packed, "--tokens", &tokens, "-o", &logits],
    ] {
        succeeded(&bkpack(arguments));
    }
    // The mark travels with the packed file, and so does the refusal.
    assert!(is_synthetic(PackedFile::open(packed.as_ref()).unwrap().config().unwrap()));
    let quality = ["--max-kld", "1", "--baseline", model];
    for arguments in [
        &["eval", model, "--text", text][..],
        &["eval", &packed, "--tokens", &tokens, "--ctx", "8"],
        &["eval", fixture().to_str().unwrap(), "--tokens", &tokens, "--ctx", "8", "--baseline", &packed],
        &[&["verify", &packed, "--text", text], &quality[..]].concat(),
        &[&["verify", &packed, "--tokens", &tokens, "--ctx", "8"], &quality[..]].concat(),
    ] {
        refused(&bkpack(arguments), &["weights are random", "perplexity would mean nothing"]);
    }
    let values = std::fs::read(&logits).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&values).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    let values = logits.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    assert!(values.clone().count() == 8 * 49152 && values.clone().all(f32::is_finite));
}

#[test]
fn nothing_real_is_replaced() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model");
    let write = |arguments: &[&str]| run(&mut synth(&output, &[&["-q", "--layers", "1"], arguments].concat()));
    let succeeds = |arguments: &[&str]| drop(succeeded(&write(arguments)));

    // An empty folder is filled; one with files asks for --force, and keeps what is not the model's.
    std::fs::create_dir(&output).unwrap();
    succeeds(&["--shard-size", "1MB"]);
    let sharded = files(&output);
    assert!(sharded.contains_key("model.safetensors.index.json") && sharded.len() > 4);
    refused(&write(&[]), &["--force"]);
    assert!(files(&output) == sharded);
    std::fs::write(output.join("tokenizer.json"), "{}").unwrap();
    succeeds(&["--force"]);
    let names: Vec<String> = files(&output).into_keys().collect();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    checkpoint::open(&output).unwrap();
    succeeds(&["--force", "--shard-size", "1MB"]);
    assert!(checkpoint::open(&output).unwrap().weight_files().len() > 2);
    assert!(!output.join("model.safetensors").exists());

    // A real model stays even with --force, whether it has a config or not.
    for name in ["config.json", "model.safetensors"] {
        std::fs::remove_dir_all(&output).unwrap();
        std::fs::create_dir(&output).unwrap();
        std::fs::copy(fixture().join(name), output.join(name)).unwrap();
        let before = files(&output);
        refused(&write(&["--force"]), &["not synthetic"]);
        assert!(files(&output) == before);
    }
    let file = output.join("model.safetensors");
    refused(&run(&mut synth(&file, &["--force"])), &["model.safetensors", "is not a folder"]);
    refused(&run(&mut synth(&output.join("no/such"), &[])), &["does not exist"]);
}

#[test]
fn failure_and_interruption_leave_nothing() {
    let folder = TempDir::new().unwrap();
    let (fresh, empty) = (folder.path().join("fresh"), folder.path().join("empty"));
    std::fs::create_dir(&empty).unwrap();
    let untouched = || {
        let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names == ["empty"] && files(&empty).is_empty()
    };
    for output in [&fresh, &empty] {
        // A limit on the size of files stands in for a full disk.
        let mut limited = Command::new("sh");
        let script = "trap '' XFSZ; ulimit -f 4000; exec \"$0\" \"$@\"";
        limited.arg("-c").arg(script).arg(cargo_bin("bkpack")).args(["synth", "--preset", "resnet-bk", "-o"]);
        refused(&run(limited.arg(output)), &[output.to_str().unwrap(), "model.safetensors", "File too large"]);
        assert!(untouched());

        for signal in ["INT", "TERM"] {
            let mut command = Command::new(cargo_bin("bkpack"));
            command.args(["synth", "--preset", "resnet-bk-0.9b", "--threads", "1", "-q", "-o"]).arg(output);
            let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
            let home = if output == &fresh { folder.path() } else { empty.as_path() };
            let partial = || {
                let mut entries = std::fs::read_dir(home).unwrap().map(|entry| entry.unwrap());
                entries.find(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
            };
            let start = Instant::now();
            let written = || partial().is_some_and(|folder| folder.path().join("model.safetensors").exists());
            while !written() {
                assert_eq!(child.try_wait().unwrap(), None, "it ended before it was interrupted");
                assert!(start.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(1));
            }
            let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
            assert!(kill.unwrap().success());
            let outcome = child.wait_with_output().unwrap();
            assert_eq!((outcome.status.code(), outcome.stderr.as_slice()), (Some(130), &b"error: cancelled\n"[..]));
            assert!(untouched(), "{signal}");
        }
    }
}

#[test]
fn figures_are_printed_and_dry_run_predicts_them() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model");
    let figures = |arguments: &[&str]| -> Value {
        let outcome = run(&mut synth(&output, &[&["--json", "--layers", "2", "--dtype", "fp16"], arguments].concat()));
        assert!(outcome.status.success() && outcome.stderr.is_empty(), "{outcome:?}");
        serde_json::from_slice(&outcome.stdout).unwrap()
    };
    let predicted = figures(&["--dry-run"]);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "a dry run writes nothing");
    let found = figures(&[]);
    let on_disk: usize = files(&output).values().map(Vec::len).sum();
    assert_eq!((&found["file_bytes"], &found["layers"], &found["dtype"]), (&on_disk.into(), &2.into(), &"F16".into()));
    for key in ["file_bytes", "parameters", "tensors", "weight_files", "preset", "seed"] {
        assert!(!found[key].is_null() && found[key] == predicted[key], "{key}");
    }
    let listed = run(Command::new(cargo_bin("bkpack")).args(["synth", "--list", "--json"]));
    let listed: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed.len(), Preset::all().len());
    let tiny = listed.iter().find(|preset| preset["preset"] == "tinyllama-1.1b").unwrap();
    assert_eq!(tiny["parameters"], 1_100_048_384u64);
    let unknown = run(Command::new(cargo_bin("bkpack")).args(["synth", "--preset", "gpt-5", "-o"]).arg(&output));
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("tinyllama-1.1b"));
}
