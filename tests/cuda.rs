//! Models on a GPU: what is said where there is none, and on the emulator the same numbers as on the CPU.

#[path = "common/command.rs"]
mod command;
#[path = "../kernels/tests/emulator/mod.rs"]
mod emulator;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use bkpack::report::{evaluation::Evaluation, results::Conditions};
use command::{refused, succeeded};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Writes the logits of a few tokens of a small model; with the emulator where it is given.
fn logits(folder: &Path, options: &[&str], emulated: Option<&Path>, variables: &[(&str, &str)]) -> Output {
    let tokens = folder.join("tokens.json");
    std::fs::write(&tokens, "[1, 5, 2]").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bkpack"));
    command.arg("logits").arg(fixtures().join("architectures/qwen3")).arg("--tokens").arg(tokens);
    command.arg("-o").arg(folder.join("logits.safetensors")).args(options);
    // A machine with a card hides it.
    command.env("CUDA_VISIBLE_DEVICES", "").envs(variables.iter().copied());
    if let Some(emulated) = emulated {
        command.env("LD_LIBRARY_PATH", emulated);
    }
    command.output().unwrap()
}

#[test]
fn without_a_gpu_cuda_is_refused_and_auto_says_that_it_runs_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let output = logits(folder.path(), &["--device", "cuda"], None, &[]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let no_driver = message.contains("no NVIDIA driver library (libcuda.so.1) was found: install the NVIDIA driver");
    assert!(no_driver || message.contains("the NVIDIA driver finds no GPU"), "{message}");
    refused(&output, &[]);
    assert!(!folder.path().join("logits.safetensors").exists());

    let output = logits(folder.path(), &["--device", "auto"], None, &[]);
    succeeded(&output);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.starts_with("note: running on the CPU: "), "{message}");
    let output = logits(folder.path(), &["--device", "cpu", "--force"], None, &[]);
    assert_eq!((succeeded(&output), output.stderr), (String::new(), Vec::new()));
}

#[test]
fn each_device_has_its_own_activations() {
    let folder = tempfile::tempdir().unwrap();
    let output = logits(folder.path(), &["--activations", "bf16"], None, &[]);
    refused(&output, &["--activations: bf16 is computed on the GPU alone", "--device cuda"]);
    let Some(emulator) = emulator::folder() else { return };
    let output = logits(folder.path(), &["--activations", "int8", "--device", "cuda", "-q"], Some(emulator), &[]);
    refused(&output, &["--activations: int8 is computed on the CPU alone", "pass exact or bf16"]);
    let output = logits(folder.path(), &["--activations", "int8", "--device", "auto"], Some(emulator), &[]);
    succeeded(&output);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.starts_with("note: running on the CPU: int8 activations are computed on it alone"), "{message}");
}

#[test]
fn a_driver_or_a_card_that_cannot_be_used_is_named() {
    let Some(emulator) = emulator::folder() else { return };
    let folder = tempfile::tempdir().unwrap();
    let refuse = |variable, value, words: &[&str]| {
        let output = logits(folder.path(), &["--device", "cuda", "-q"], Some(emulator), &[(variable, value)]);
        refused(&output, words);
    };
    refuse(
        "BKPACK_EMULATOR_DRIVER",
        "11040",
        &["knows CUDA up to 11.4, but 12.1 is needed", "update the driver to 530"],
    );
    refuse("BKPACK_EMULATOR_CAPABILITY", "75", &["has compute capability 7.5, but 8.0 or newer (Ampere) is needed"]);
    refuse("BKPACK_EMULATOR_DEVICES", "0", &["the NVIDIA driver finds no GPU", "CUDA_VISIBLE_DEVICES"]);
    // Less than the weights: refused before anything is copied.
    refuse(
        "BKPACK_EMULATOR_MEMORY",
        "60000",
        &[" bytes of GPU memory are needed where 5", " are free: close other programs"],
    );
    // The user who leaves it open gets the CPU.
    let little = [("BKPACK_EMULATOR_MEMORY", "60000")];
    let output = logits(folder.path(), &["--device", "auto"], Some(emulator), &little);
    succeeded(&output);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.starts_with("note: running on the CPU: ") && message.contains(" of GPU memory are"), "{message}");
    std::fs::remove_file(folder.path().join("logits.safetensors")).unwrap();
    // Room for the weights, but not for what comes on top.
    refuse(
        "BKPACK_EMULATOR_MEMORY",
        "200000",
        &[" bytes of GPU memory are needed where ", " are free: close other programs"],
    );
    assert!(!folder.path().join("logits.safetensors").exists());
}

#[test]
fn evaluation_records_the_card() {
    let Some(emulator) = emulator::folder() else { return };
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.json");
    let ids: Vec<u32> = (0..24).map(|token| token * 7 % 96).collect();
    std::fs::write(&tokens, serde_json::to_string(&ids).unwrap()).unwrap();
    let evaluate = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bkpack"));
        command.arg("eval").arg(fixtures().join("architectures/mixtral")).arg("--tokens").arg(&tokens);
        command.args(["--ctx", "12", "--json"]).args(options).env("LD_LIBRARY_PATH", emulator);
        command.output().unwrap()
    };
    let on_card = evaluate(&["--device", "auto"]);
    let message = String::from_utf8_lossy(&on_card.stderr);
    assert!(message.contains("note: running on the GPU: bkpack CUDA emulator"), "{message}");
    assert!(message.contains(" bytes of ") && message.contains("are free on the GPU"), "{message}");
    let on_card: Value = serde_json::from_str(&succeeded(&on_card)).unwrap();
    let on_cpu: Value = serde_json::from_str(&succeeded(&evaluate(&[]))).unwrap();
    assert_eq!((&on_card["device"], &on_card["card"]), (&"cuda".into(), &"bkpack CUDA emulator (no GPU)".into()));
    assert_eq!((&on_cpu["device"], &on_cpu["card"]), (&"cpu".into(), &Value::Null));
    let nll = |record: &Value| record["nll"].as_f64().unwrap();
    let difference = (nll(&on_card) - nll(&on_cpu)).abs();
    println!("nll {} on the CPU, {difference:e} from it on the card", nll(&on_cpu));
    assert!(difference < 1e-5 * nll(&on_cpu));

    // Whoever compares the two records sees that they differ in the card, and in that alone.
    let conditions = |record: &Value| {
        let path = folder.path().join("record.json");
        std::fs::write(&path, record.to_string()).unwrap();
        Evaluation::read(&path).unwrap().conditions
    };
    let (card, cpu) = (conditions(&on_card), conditions(&on_cpu));
    assert_eq!(card.card.as_deref(), Some("bkpack CUDA emulator (no GPU)"));
    assert_eq!(cpu, Conditions { card: None, ..card });
}

#[test]
fn greedy_text_is_that_of_the_cpu() {
    let Some(emulator) = emulator::folder() else { return };
    let generate = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bkpack"));
        command.arg("generate").arg(fixtures().join("llama")).args(["--prompt", "The city of London is"]);
        command.args(["--max-tokens", "6", "-q"]).args(options).env("LD_LIBRARY_PATH", emulator);
        succeeded(&command.output().unwrap())
    };
    let text = generate(&["--device", "cpu"]);
    assert!(text.len() > "The city of London is".len() + 6, "{text}");
    assert_eq!(generate(&["--device", "cuda"]), text);
}

#[test]
fn decoding_goes_on_where_the_driver_records_nothing() {
    emulator::run("card::decoding_repeats_a_recorded_step", &[("BKPACK_EMULATOR_CAPTURE", "0")]);
}

emulator::on_the_emulator!(
    card::logits_of_every_architecture,
    card::logits_of_every_encoding,
    card::decoding_repeats_a_recorded_step,
    card::experts_of_several_encodings,
    card::quantized_activations_of_the_core,
    card::a_text_that_runs_whole_is_not_recorded,
    card::a_step_on_the_state_of_another_model,
);

/// The tests themselves, for a card or the emulator.
mod card {
    use std::{
        collections::BTreeSet,
        path::{Path, PathBuf},
        rc::Rc,
    };

    use bkpack::{
        checkpoint::{self, Checkpoint},
        eval::calibrate::calibrate_core,
        format::{PackedFile, amend::with_activations},
        model::Model,
        ops::{
            Ops,
            cpu::{Activations, CpuOps},
            cuda::CudaOps,
        },
        pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
        policy::Policy,
        progress::Silent,
        tensor::{CalibrationText, TensorSource},
    };
    use bkpack_kernels::{Cpu, Isa, cpu::quantize::Rounding, cuda::Cuda};

    use super::fixtures;

    /// The largest difference allowed, as a share of the largest logit. Two BF16 terms miss 2^-18 of an activation; about
    /// ten products follow one another in these models, in each of which terms of both signs may cancel to a tenth.
    const TOLERANCE: f32 = 10.0 * 10.0 / (1 << 18) as f32;

    fn architectures() -> PathBuf {
        fixtures().join("architectures")
    }

    fn scalar() -> CpuOps {
        CpuOps::new(Cpu::with_isa(Isa::Scalar).unwrap(), Activations::Exact)
    }

    fn card() -> CudaOps {
        let cuda = Cuda::open().unwrap();
        println!("on {}", cuda.card().name);
        CudaOps::new(Rc::new(cuda), Activations::Exact).unwrap()
    }

    /// Of the first `batch` tokens at once, and then of one after the other: `[tokens, vocab_size]`.
    fn logits<O: Ops>(source: &dyn TensorSource, ops: &O, tokens: &[u32], batch: usize) -> Vec<f32> {
        let model = Model::load(source, ops).unwrap();
        let batch = if model.runs_whole() { tokens.len() } else { batch };
        let mut state = model.state(tokens.len()).unwrap();
        let (mut all, mut some) = (Vec::new(), Vec::new());
        let hidden = model.forward(&tokens[..batch], &mut state).unwrap();
        ops.read(&model.logits(&hidden, 0, batch).unwrap(), &mut all).unwrap();
        for &token in &tokens[batch..] {
            model.step(token, &mut state, &mut some).unwrap();
            all.extend(&some);
        }
        assert_eq!(state.positions(), tokens.len());
        all
    }

    /// The largest difference as a share of the largest logit, and the largest logit's token at each position.
    #[track_caller]
    fn compare(name: &str, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let difference = found.iter().zip(expected).fold(0f32, |difference, (found, expected)| {
            assert!(found.is_finite(), "{name}");
            difference.max((found - expected).abs())
        });
        println!("{name}: {:.2e} of the largest logit", difference / largest);
        assert!(difference <= TOLERANCE * largest, "{name}: {difference} beside {largest}");
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).map(|token| token * 29 % 96).collect()
    }

    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn logits_of_every_architecture() {
        let (scalar, card) = (scalar(), card());
        let mut names: Vec<_> =
            std::fs::read_dir(architectures()).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        assert!(names.len() >= 11);
        for path in names {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let source = checkpoint::open(&path).unwrap();
            let tokens = tokens(14);
            // Ten tokens through the tensor cores, then four one by one: run, recorded, replayed, replayed.
            compare(&name, &logits(&source, &card, &tokens, 10), &logits(&source, &scalar, &tokens, 10));
        }
    }

    /// Packs in one encoding, but for these tensors (`PATTERN=ENCODING`).
    fn pack(source: &Checkpoint, encoding: &str, overrides: &[&str], output: &Path) -> PackedFile {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let options = PackOptions {
            policy: Policy::uniform(encoding.parse().unwrap(), &[], &overrides).unwrap(),
            rounding: Rounding::Nearest,
            feedback: false,
            calibration: None,
            ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
            scales: Default::default(),
            allow_nonfinite: false,
            shard_bytes: None,
        };
        let packing = Packing::plan(source, &options, output, Cpu::detect(), &Silent).unwrap();
        packing.write(Cpu::detect(), true, &Silent).unwrap();
        PackedFile::open(output).unwrap()
    }

    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn logits_of_every_encoding() {
        let (scalar, card) = (scalar(), card());
        let source = checkpoint::open(&architectures().join("mixtral_stacked")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for encoding in [
            "int2:g32",
            "int3:g32",
            "int4:g32:asym",
            "int5:row",
            "int6:g64:asym",
            "int8:g32",
            "ternary:g32",
            "binary:g64",
            "fp16",
            "fp32",
        ] {
            let packed = pack(&source, encoding, &[], &folder.path().join("model.bkpack"));
            let tokens = tokens(11);
            compare(encoding, &logits(&packed, &card, &tokens, 9), &logits(&packed, &scalar, &tokens, 9));
        }
    }

    /// Decodes texts one after the other with one state, which replays what it recorded for the first.
    fn assert_repeats(name: &str, source: &dyn TensorSource) {
        let (scalar, card) = (scalar(), card());
        let model = Model::load(source, &card).unwrap();
        let mut state = model.state(9).unwrap();
        let (mut found, mut steps) = (Vec::new(), 0);
        let refused = std::env::var("BKPACK_EMULATOR_CAPTURE").is_ok_and(|value| value == "0");
        // Some begin with several tokens at once, one with a step.
        for (first, tokens) in [(2, [3, 1, 4, 1, 5, 9]), (0, [2, 7, 1, 8, 2, 8]), (1, [90, 45, 2, 35, 36, 0])] {
            state.clear(&card).unwrap();
            if first > 0 {
                model.forward(&tokens[..first], &mut state).unwrap();
            }
            let mut all = Vec::new();
            for &token in &tokens[first..] {
                model.step(token, &mut state, &mut found).unwrap();
                all.extend(&found);
                steps += 1;
                assert_eq!(state.step_graph().is_recorded(), steps >= 2 && !refused, "{name}, step {steps}");
            }
            let expected = logits(source, &scalar, &tokens, 1);
            compare(name, &all, &expected[first * model.vocab_size()..]);
        }
    }

    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn decoding_repeats_a_recorded_step() {
        for architecture in ["mistral", "qwen3", "mixtral", "mixtral_stacked", "mamba", "resnet_bk"] {
            assert_repeats(architecture, &checkpoint::open(&architectures().join(architecture)).unwrap());
        }
    }

    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn experts_of_several_encodings() {
        let folder = tempfile::tempdir().unwrap();
        for (architecture, overrides) in [
            ("mixtral", ["experts[.]1[.]=ternary:g32", "experts[.]2[.]w2=int3:g32:asym", "experts[.]3[.]=fp16"]),
            ("resnet_bk", ["experts[.]1[.]=int8:row", "experts[.]2[.]0=binary:g32", "experts[.]3[.]3=fp32"]),
        ] {
            let source = checkpoint::open(&architectures().join(architecture)).unwrap();
            let packed = pack(&source, "int4:g32", &overrides, &folder.path().join("model.bkpack"));
            let encodings: BTreeSet<String> = packed
                .tensors()
                .iter()
                .filter(|tensor| tensor.name.contains(".experts."))
                .map(|tensor| format!("{:?}", tensor.encoding))
                .collect();
            assert!(encodings.len() >= 4, "{encodings:?}");
            assert_repeats(architecture, &packed);
        }
    }

    /// Each position has scales of its own. The steps are compared with those of the same card, bit for bit: a value near half
    /// a code may round otherwise on the CPU.
    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn quantized_activations_of_the_core() {
        let folder = tempfile::tempdir().unwrap();
        let source = checkpoint::open(&architectures().join("resnet_bk")).unwrap();
        let packed = pack(&source, "int8:g32", &[], &folder.path().join("model.bkpack"));
        let text = CalibrationText { name: "tokens".into(), blake3: blake3::hash(b"").to_string() };
        let found = calibrate_core(Cpu::detect(), &packed, &tokens(128), (text, 8, 2), &Silent).unwrap();
        let output = folder.path().join("quantized.bkpack");
        with_activations(&packed, vec![found.record], found.scales, &output, false, &Silent).unwrap();
        let quantized = PackedFile::open(&output).unwrap();

        let card = card();
        let model = Model::load(&quantized, &card).unwrap();
        assert!(model.quantizes_core());
        // Records its step on another text than those that it is replayed for.
        let mut recorded = model.state(9).unwrap();
        let mut found = Vec::new();
        [90, 45].iter().for_each(|&token| model.step(token, &mut recorded, &mut found).unwrap());
        assert!(recorded.step_graph().is_recorded());
        let tokens = [3, 1, 4, 1, 5, 9];
        for position in 0..tokens.len() {
            recorded.clear(&card).unwrap();
            // The first step of a state is run as it is.
            let mut fresh = model.state(9).unwrap();
            let [replayed, run] = [&mut recorded, &mut fresh].map(|state| {
                for &token in &tokens[..position] {
                    model.forward(&[token], state).unwrap();
                }
                model.step(tokens[position], state, &mut found).unwrap();
                found.clone()
            });
            assert!(!fresh.step_graph().is_recorded());
            assert_eq!(replayed, run, "position {position}");
        }
        // One step after the other.
        recorded.clear(&card).unwrap();
        let mut fresh = model.state(9).unwrap();
        for token in tokens {
            let [replayed, run] = [&mut recorded, &mut fresh].map(|state| {
                model.step(token, state, &mut found).unwrap();
                found.clone()
            });
            assert_eq!(replayed, run, "position {}", fresh.positions() - 1);
        }
    }

    /// It has no second step, nor is what its core computes read from a recording.
    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    fn a_text_that_runs_whole_is_not_recorded() {
        let card = card();
        let mut found = Vec::new();
        for (architecture, record_core) in [("resnet_bk_lookahead", false), ("resnet_bk", true)] {
            let source = checkpoint::open(&architectures().join(architecture)).unwrap();
            let model = Model::load(&source, &card).unwrap();
            let mut state = model.state(9).unwrap();
            if record_core {
                state.record_core();
            }
            for _ in 0..3 {
                state.clear(&card).unwrap();
                model.step(7, &mut state, &mut found).unwrap();
                assert!(!state.step_graph().is_recorded());
                assert_eq!(state.core().len(), if record_core { model.layers() } else { 0 });
                compare(architecture, &found, &logits(&source, &scalar(), &[7], 1));
            }
            assert_eq!(model.step(7, &mut state, &mut found).is_err(), model.runs_whole());
        }
    }

    /// It would replay the steps of the other.
    #[test]
    #[ignore = "run on the emulator by the test of the same name"]
    #[should_panic(expected = "a state is stepped by the model that made it")]
    fn a_step_on_the_state_of_another_model() {
        let source = checkpoint::open(&architectures().join("qwen3")).unwrap();
        let card = card();
        let models = [(); 2].map(|()| Model::load(&source, &card).unwrap());
        let mut state = models[0].state(4).unwrap();
        let mut found = Vec::new();
        models[0].step(1, &mut state, &mut found).unwrap();
        models[1].step(1, &mut state, &mut found).unwrap();
    }
}
