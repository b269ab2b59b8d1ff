//! The trained Mamba and ResNet-BK against PyTorch: logits, perplexities of FP32 and of plain rounding over the whole
//! WikiText-2 test. Their checkpoints are too large for the repository, so these tests run only when asked for:
//!
//!     BKPACK_REFERENCE=FOLDER cargo test --release --test reference -- --ignored
//!
//! FOLDER holds `mamba/` and `resnet_bk/`, each with config.json, model.safetensors, tokenizer.json, reference.json and
//! reference_logits.safetensors.

use std::path::{Path, PathBuf};

use bkpack::{
    checkpoint,
    eval::{
        perplexity::{Options, evaluate},
        text::{Tokenizer, read_text},
    },
    format::PackedFile,
    model::Model,
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    pack::{DEFAULT_TERNARY_THRESHOLD, PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use safetensors::SafeTensors;
use serde_json::Value;

const MODELS: [&str; 2] = ["mamba", "resnet_bk"];

fn folder(name: &str) -> PathBuf {
    let root = std::env::var_os("BKPACK_REFERENCE").expect("BKPACK_REFERENCE names the folder of the checkpoints");
    Path::new(&root).join(name)
}

fn perplexity(name: &str, source: &dyn TensorSource) -> f64 {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/wikitext2.test.txt");
    let tokens = Tokenizer::load(source).unwrap().encode(&read_text(&text).unwrap()).unwrap();
    let options = Options { ctx: Some(256), skip: 1, activations: Activations::Exact, allow_lookahead: false };
    let evaluation = evaluate(Cpu::detect(), source, None, &tokens, &options, &Silent).unwrap();
    assert_eq!(evaluation.scored, 382_245, "{name}");
    evaluation.ppl
}

fn expected(name: &str, encoding: &str) -> f64 {
    let reference: Value =
        serde_json::from_slice(&std::fs::read(folder(name).join("reference.json")).unwrap()).unwrap();
    reference["perplexity"][encoding]["ppl"].as_f64().unwrap()
}

#[test]
#[ignore = "needs the trained checkpoints in BKPACK_REFERENCE"]
fn logits_are_those_of_pytorch() {
    for name in MODELS {
        let bytes = std::fs::read(folder(name).join("reference_logits.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| tensors.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
        let tokens: Vec<u32> = words("input_ids").into_iter().map(u32::from_le_bytes).collect();
        let expected: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
        let source = checkpoint::open(&folder(name)).unwrap();
        for cpu in Cpu::available() {
            let ops = CpuOps::new(cpu, Activations::Exact);
            let model = Model::load(&source, &ops).unwrap();
            let hidden = model.forward(&tokens, &mut model.state(tokens.len()).unwrap()).unwrap();
            let mut found = Vec::new();
            ops.read(&model.logits(&hidden, 0, tokens.len()).unwrap(), &mut found).unwrap();
            assert_eq!(found.len(), expected.len());
            let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let pairs = found.iter().zip(&expected);
            let difference = pairs.fold(0f32, |difference, (f, e)| difference.max((f - e).abs())) / largest;
            println!("{name}, {}: {difference:e}", cpu.isa());
            assert!(difference < 2e-4, "{name}, {}: {difference}", cpu.isa());
        }
    }
}

#[test]
#[ignore = "needs the trained checkpoints in BKPACK_REFERENCE"]
fn perplexities_are_those_of_pytorch() {
    for name in MODELS {
        let source = checkpoint::open(&folder(name)).unwrap();
        let (found, pytorch) = (perplexity(name, &source), expected(name, "fp32"));
        println!("{name}, FP32: {found} (PyTorch {pytorch})");
        assert!((found / pytorch - 1.0).abs() < 1e-4, "{name}: {found} instead of {pytorch}");
        for bits in [8, 6, 5, 4, 3, 2] {
            let temporary = tempfile::tempdir().unwrap();
            let output = temporary.path().join("model.bkpack");
            // PyTorch's figures leave embeddings and head as they are.
            let keep = ["embed", "lm_head"].map(String::from);
            let options = PackOptions {
                policy: Policy::uniform(
                    format!("int{bits}").parse().unwrap(),
                    &keep[..if name == "mamba" { 1 } else { 2 }],
                    &[],
                )
                .unwrap(),
                rounding: Rounding::Nearest,
                feedback: false,
                calibration: None,
                ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
                scales: Default::default(),
                allow_nonfinite: false,
                shard_bytes: None,
            };
            let packing = Packing::plan(&source, &options, &output, Cpu::detect(), &Silent).unwrap();
            packing.write(Cpu::detect(), false, &Silent).unwrap();
            let packed = PackedFile::open(&output).unwrap();
            let (found, pytorch) = (perplexity(name, &packed), expected(name, &format!("rtn_int{bits}_g128")));
            println!("{name}, INT{bits}: {found} (PyTorch {pytorch})");
            assert!((found / pytorch - 1.0).abs() < 3e-3, "{name}, INT{bits}: {found} instead of {pytorch}");
        }
    }
}
