//! Every architecture against PyTorch's logits on tiny random checkpoints, and through the command: convert, eval, verify.

#[path = "common/logits.rs"]
mod shared;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    Error, checkpoint,
    eval::causality::looks_ahead,
    model::Model,
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Architectures whose positions see only those before them.
const CAUSAL: [&str; 10] = [
    "mamba",
    "mamba_bias",
    "mistral",
    "mistral_full",
    "mixtral",
    "mixtral_stacked",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "resnet_bk",
];
const LOOKAHEAD: &str = "resnet_bk_lookahead";

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

/// PyTorch's input, the positions whose logits are stored, and these logits, `[positions, vocab_size]`.
struct Expected {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<f32>,
}

impl Expected {
    /// The rows that are stored, out of the logits of all positions.
    fn rows(&self, all: &[f32]) -> Vec<f32> {
        let vocab_size = all.len() / self.tokens.len();
        self.positions.iter().flat_map(|&position| &all[position * vocab_size..][..vocab_size]).copied().collect()
    }
}

fn expected(name: &str) -> Expected {
    read_expected(&folder(name).join("logits.safetensors"))
}

fn read_expected(path: &Path) -> Expected {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Option<Vec<[u8; 4]>> { Some(tensors.tensor(name).ok()?.data().as_chunks().0.to_vec()) };
    let integers = |words: Vec<[u8; 4]>| words.into_iter().map(u32::from_le_bytes).collect::<Vec<_>>();
    let tokens = integers(words("input_ids").unwrap());
    let positions: Vec<usize> = match words("positions") {
        Some(positions) => integers(positions).into_iter().map(|position| position as usize).collect(),
        None => (0..tokens.len()).collect(),
    };
    let logits: Vec<f32> = words("logits").unwrap().into_iter().map(f32::from_le_bytes).collect();
    assert!(tokens.len() >= 16 && !positions.is_empty() && logits.iter().any(|&logit| logit != 0.0));
    Expected { tokens, positions, logits }
}

/// The logits of all positions on the CPU, computed in batches of so many tokens.
fn logits(cpu: Cpu, source: &dyn TensorSource, tokens: &[u32], batch: usize) -> Vec<f32> {
    shared::logits(source, &CpuOps::new(cpu, Activations::Exact), tokens, batch)
}

/// The largest difference, as a fraction of the largest absolute value expected.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * largest, "{what}: {found} instead of {expected}");
    }
}

#[test]
fn logits_are_those_of_pytorch_on_every_instruction_set() {
    for name in CAUSAL.into_iter().chain([LOOKAHEAD]) {
        let (source, expected) = (checkpoint::open(&folder(name)).unwrap(), expected(name));
        for cpu in Cpu::available() {
            let all = logits(cpu, &source, &expected.tokens, expected.tokens.len());
            assert_close(&expected.rows(&all), &expected.logits, 2e-5, &format!("{name}, {}", cpu.isa()));
        }
    }
}

#[test]
fn a_text_of_many_windows_is_attended_to_as_pytorch_does() {
    let source = checkpoint::open(&folder("mistral")).unwrap();
    let expected = read_expected(&folder("mistral").join("logits_long.safetensors"));
    for cpu in Cpu::available() {
        for batch in [320, 100, 1] {
            let all = logits(cpu, &source, &expected.tokens, batch);
            assert_close(&expected.rows(&all), &expected.logits, 2e-5, &format!("{}, batches of {batch}", cpu.isa()));
        }
    }
}

#[test]
fn decoding_token_by_token_computes_what_prefill_does() {
    for name in CAUSAL {
        let (source, tokens) = (checkpoint::open(&folder(name)).unwrap(), expected(name).tokens);
        for cpu in Cpu::available() {
            let prefill = logits(cpu, &source, &tokens, tokens.len());
            for batch in [1, 7] {
                let what = format!("{name}, {}, batches of {batch}", cpu.isa());
                assert_close(&logits(cpu, &source, &tokens, batch), &prefill, 5e-5, &what);
            }
        }
    }
}

#[test]
fn a_state_that_was_cleared_forgets_the_text() {
    for name in CAUSAL {
        let (source, tokens) = (checkpoint::open(&folder(name)).unwrap(), expected(name).tokens);
        let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
        let model = Model::load(&source, &ops).unwrap();
        let mut state = model.state(tokens.len()).unwrap();
        let mut run = |tokens: &[u32]| {
            state.clear(&ops).unwrap();
            let mut hidden = Vec::new();
            ops.read(&model.forward(tokens, &mut state).unwrap(), &mut hidden).unwrap();
            hidden
        };
        let first = run(&tokens[8..]);
        assert_ne!(run(&tokens[..12]), first[..12 * first.len() / (tokens.len() - 8)], "{name}");
        assert_eq!(first, run(&tokens[8..]), "{name}");
    }
}

#[test]
fn the_probe_finds_the_one_that_looks_ahead() {
    for (name, ahead) in CAUSAL.map(|name| (name, false)).into_iter().chain([(LOOKAHEAD, true)]) {
        let (source, tokens) = (checkpoint::open(&folder(name)).unwrap(), expected(name).tokens);
        let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
        let model = Model::load(&source, &ops).unwrap();
        assert_eq!(looks_ahead(&model, &ops, &tokens).unwrap(), ahead, "{name}");
        assert_eq!(looks_ahead(&model, &ops, &tokens[..2]).unwrap(), ahead, "{name}, two tokens");
        assert_eq!(model.runs_whole(), ahead, "{name}");
    }
}

#[test]
fn a_model_that_looks_ahead_cannot_continue_a_text() {
    let source = checkpoint::open(&folder(LOOKAHEAD)).unwrap();
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let model = Model::load(&source, &ops).unwrap();
    let mut state = model.state(8).unwrap();
    model.forward(&[1, 2, 3], &mut state).unwrap();
    assert!(matches!(model.forward(&[4], &mut state), Err(Error::NotSequential { .. })));
}

fn bkpack(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("bkpack")).env_remove("BKPACK_ISA").args(arguments).output().unwrap()
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A file of mixed token ids, which the tiny vocabularies hold.
fn write_tokens(path: &Path, count: usize) {
    let tokens: Vec<usize> = (0..count).map(|i| (i * i * 31 + i * 7 + i / 5) % 96).collect();
    std::fs::write(path, json!(tokens).to_string()).unwrap();
}

#[test]
fn every_architecture_is_packed_evaluated_and_verified() {
    for name in CAUSAL.into_iter().chain([LOOKAHEAD]) {
        let temporary = tempfile::tempdir().unwrap();
        let [packed, tokens] = ["model.bkpack", "tokens.json"].map(|file| temporary.path().join(file));
        write_tokens(&tokens, 200);
        let (source, packed, tokens) = (folder(name), packed.to_str().unwrap(), tokens.to_str().unwrap());
        let source = source.to_str().unwrap();
        let converted = bkpack(&["convert", source, "-o", packed, "--bits", "8", "--group-size", "32"]);
        assert_eq!(converted.status.code(), Some(0), "{name}: {converted:?}");

        let mut eval = vec!["eval", packed, "--baseline", source, "--tokens", tokens, "--ctx", "40", "--json"];
        let mut verify = vec!["verify", packed, "--max-ppl-increase", "50%", "--max-kld", "0.5", "--baseline", source];
        verify.extend(["--tokens", tokens, "--ctx", "40", "--json"]);
        if name == LOOKAHEAD {
            for arguments in [&eval, &verify] {
                let refused = bkpack(arguments);
                let message = String::from_utf8_lossy(&refused.stderr).into_owned();
                assert_eq!(refused.status.code(), Some(2), "{message}");
                assert!(message.contains("looks ahead") && message.contains("--allow-lookahead"), "{message}");
                assert!(refused.stdout.is_empty());
            }
            eval.push("--allow-lookahead");
            verify.push("--allow-lookahead");
        }
        let evaluation = json_of(&bkpack(&eval));
        assert_eq!(evaluation["looks_ahead"], name == LOOKAHEAD, "{name}");
        let divergence = evaluation["kld_mean"].as_f64().unwrap();
        assert!(divergence > 0.0 && divergence < 0.5, "{name}: {divergence}");
        let verified = bkpack(&verify);
        assert_eq!(verified.status.code(), Some(0), "{name}: {verified:?}");
        let marked = String::from_utf8_lossy(&verified.stdout).contains("LOOKS AHEAD");
        assert_eq!(marked, name == LOOKAHEAD, "{name}");
    }
}

#[test]
fn activations_of_the_core_are_calibrated_and_their_error_is_printed() {
    let temporary = tempfile::tempdir().unwrap();
    let [packed, other, tokens] = ["model.bkpack", "other.bkpack", "tokens.json"]
        .map(|file| temporary.path().join(file).to_str().unwrap().to_owned());
    write_tokens(Path::new(&tokens), 3000);
    assert!(bkpack(&["convert", folder("resnet_bk").to_str().unwrap(), "-o", &packed]).status.success());
    let before = std::fs::read(&packed).unwrap();

    let calibrate = |more: &[&str]| bkpack(&[&["calibrate", &packed, "--tokens", &tokens][..], more].concat());
    let written = calibrate(&["--activations", "bk_core=int4", "-o", &other, "--json"]);
    assert_eq!(json_of(&written)["samples"], 46, "{written:?}");
    assert_eq!(std::fs::read(&packed).unwrap(), before);
    assert!(calibrate(&["--activations", "bk_core=int8", "--samples", "20"]).status.success());
    let again = calibrate(&["--activations", "bk_core=int8"]);
    assert_eq!(again.status.code(), Some(2), "{again:?}");
    assert!(calibrate(&["--activations", "bk_core=int8", "--samples", "20", "--force"]).status.success());
    assert!(bkpack(&["verify", &packed]).status.success());

    // The errors are those of grids of 255 and 15 values over the range of what the core computes.
    for (file, bits, largest) in [(&packed, 8, 0.05), (&other, 4, 0.25)] {
        let evaluation = json_of(&bkpack(&["eval", file, "--tokens", &tokens, "--ctx", "60", "--json"]));
        let error = &evaluation["core_error"];
        assert_eq!(error["bits"], bits);
        for value in ["v", "re_g", "im_g"].map(|key| error[key].as_f64().unwrap()) {
            assert!(value > 0.0 && value < largest, "{bits} bits: {error}");
        }
    }
    for (arguments, words) in [
        (&["--activations", "bk_core=int4", "--samples", "0", "--output", "/nowhere/model.bkpack"][..], "nowhere"),
        (&["--activations", "bk_core=int4", "--samples", "0", "--force"], "sample"),
        (&["--activations", "bk_core=int4", "--output", &packed], "exists"),
    ] {
        let refused = calibrate(arguments);
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).contains(words), "{refused:?}");
    }
    let mamba = temporary.path().join("mamba.bkpack").to_str().unwrap().to_owned();
    assert!(bkpack(&["convert", folder("mamba").to_str().unwrap(), "-o", &mamba]).status.success());
    let refused = bkpack(&["calibrate", &mamba, "--tokens", &tokens, "--activations", "bk_core=int8"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("bk_core"), "{refused:?}");
}
