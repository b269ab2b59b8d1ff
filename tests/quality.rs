//! What packing costs on the real checkpoint: plain rounding as PyTorch measured it, the default search better than
//! that, and packed kernels that compute what their dequantized weights would.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use bkpack::{
    Result,
    checkpoint::{self, Checkpoint},
    eval::{
        perplexity::{Evaluation, Options, evaluate},
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
    tensor::{Tensor, TensorData, TensorSource},
};
use bkpack_kernels::{Cpu, FloatType, cpu::quantize::Rounding};
use serde_json::Value;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn source() -> Checkpoint {
    checkpoint::open(&fixtures().join("llama")).unwrap()
}

/// The fixture packed; the folder must outlive the file.
fn pack(encoding: &str, keep: &[&str], rounding: Rounding) -> (TempDir, PackedFile) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model.bkpack");
    let keep: Vec<String> = keep.iter().map(ToString::to_string).collect();
    let options = PackOptions {
        policy: Policy::uniform(encoding.parse().unwrap(), &keep, &[]).unwrap(),
        rounding,
        feedback: false,
        calibration: None,
        ternary_threshold: DEFAULT_TERNARY_THRESHOLD,
        scales: Default::default(),
        allow_nonfinite: false,
        shard_bytes: None,
    };
    let checkpoint = source();
    let packing = Packing::plan(&checkpoint, &options, &output, Cpu::detect(), &Silent).unwrap();
    packing.write(Cpu::detect(), false, &Silent).unwrap();
    let packed = PackedFile::open(&output).unwrap();
    (folder, packed)
}

fn tokens(limit: usize) -> Vec<u32> {
    let text = read_text(&fixtures().join("wikitext2.test.txt")).unwrap();
    let mut tokens = Tokenizer::load(&source()).unwrap().encode(&text).unwrap();
    tokens.truncate(limit);
    tokens
}

fn measure(packed: &PackedFile, baseline: Option<&Checkpoint>, limit: usize, activations: Activations) -> Evaluation {
    let options = Options { ctx: Some(256), skip: 1, activations, allow_lookahead: false };
    evaluate(Cpu::detect(), packed, baseline.map(|baseline| baseline as _), &tokens(limit), &options, &Silent).unwrap()
}

#[test]
fn perplexities_of_plain_rounding_are_those_of_pytorch() {
    let reference: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("llama/reference.json")).unwrap()).unwrap();
    for bits in [4, 3, 2] {
        // PyTorch's figures leave the embedding, which is also the head, as it is.
        let (_folder, packed) = pack(&format!("int{bits}:g128"), &["embed_tokens"], Rounding::Nearest);
        let evaluation = measure(&packed, None, usize::MAX, Activations::Exact);
        let expected = reference["perplexity"][format!("rtn_int{bits}_g128")]["ppl"].as_f64().unwrap();
        println!("INT{bits}: {} (PyTorch {expected})", evaluation.ppl);
        assert!((evaluation.ppl / expected - 1.0).abs() < 3e-3, "INT{bits}: {} instead of {expected}", evaluation.ppl);
    }
}

#[test]
fn the_default_search_costs_less_than_plain_rounding() {
    let baseline = source();
    for bits in [4, 3, 2] {
        let cost = |rounding| {
            let (_folder, packed) = pack(&format!("int{bits}:g128"), &[], rounding);
            measure(&packed, Some(&baseline), 32 * 256, Activations::Exact).baseline.unwrap().kld_mean
        };
        let (search, nearest) = (cost(Rounding::Search), cost(Rounding::Nearest));
        println!("INT{bits}: mean KLD {search} with search, {nearest} with plain rounding");
        assert!(search < 0.95 * nearest, "INT{bits}: {search} against {nearest}");
    }
}

#[test]
fn activations_of_eight_bits_are_close_to_exact_ones_and_not_the_same() {
    for encoding in ["int8:g128", "int4:g64:asym", "int3:row", "ternary:g32", "binary:g128"] {
        let (_folder, packed) = pack(encoding, &["embed_tokens"], Rounding::Search);
        let exact = measure(&packed, None, 16 * 256, Activations::Exact);
        let int8 = measure(&packed, None, 16 * 256, Activations::Int8);
        let difference = (int8.nll - exact.nll).abs();
        println!("{encoding}: nll {} exact, {} with 8-bit activations", exact.nll, int8.nll);
        assert!(difference > 0.0 && difference < 0.01, "{encoding}: {} and {}", exact.nll, int8.nll);
    }
}

/// A packed file whose every tensor is seen as plain F32.
struct Dequantized<'a>(&'a PackedFile);

impl TensorSource for Dequantized<'_> {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn config(&self) -> Option<&Value> {
        self.0.config()
    }

    fn names(&self) -> &[String] {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.0.shape(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let tensor = self.0.tensor(name)?;
        let mut values = vec![0f32; tensor.elements()];
        Cpu::detect().dequantize(&tensor.matrix(), 0, &mut values);
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let data = TensorData::Float { dtype: FloatType::F32, values: Cow::Owned(bytes) };
        Ok(Tensor::new(tensor.shape().to_vec(), data).unwrap())
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        self.0.file(name)
    }

    fn file_bytes(&self) -> u64 {
        self.0.file_bytes()
    }
}

fn logits(cpu: Cpu, source: &dyn TensorSource, tokens: &[u32]) -> Vec<f32> {
    let ops = CpuOps::new(cpu, Activations::Exact);
    let model = Model::load(source, &ops).unwrap();
    let hidden = model.forward(tokens, &mut model.state(tokens.len()).unwrap()).unwrap();
    let mut logits = Vec::new();
    ops.read(&model.logits(&hidden, 0, tokens.len()).unwrap(), &mut logits).unwrap();
    logits
}

#[test]
fn packed_weights_compute_what_their_dequantized_values_would() {
    let tokens = tokens(48);
    for encoding in [
        "int2:g32",
        "int3:g64",
        "int4:g128",
        "int5:g256",
        "int6:row",
        "int7",
        "int8",
        "int4:g32:asym",
        "ternary",
        "binary",
        "fp16",
    ] {
        let (_folder, packed) = pack(encoding, &[], Rounding::Search);
        let expected = logits(Cpu::detect(), &Dequantized(&packed), &tokens);
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for cpu in Cpu::available() {
            // One token at a time and all at once take different kernels.
            for count in [1, tokens.len()] {
                let found = logits(cpu, &packed, &tokens[..count]);
                let difference = found.iter().zip(&expected).fold(0f32, |worst, (f, e)| worst.max((f - e).abs()));
                assert!(difference <= 2e-5 * largest, "{encoding}, {count} tokens on {}: {difference}", cpu.isa());
            }
        }
    }
}
