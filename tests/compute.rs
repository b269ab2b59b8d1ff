//! The operations of a token against counts by hand, for every architecture, and models of which a part is left out.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use bkpack::{
    Error, Result,
    checkpoint::{self, Checkpoint},
    eval::{
        flops::token_cost,
        perplexity::{Options, evaluate, evaluate_reduced},
    },
    model::{Model, reduce::Reduction},
    ops::cpu::{Activations, CpuOps},
    progress::Silent,
    tensor::{Tensor, TensorSource},
};
use bkpack_kernels::Cpu;
use serde_json::Value;

/// Tokens of the window that is counted.
const T: u64 = 16;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn open(name: &str) -> Checkpoint {
    checkpoint::open(&fixture(name)).unwrap()
}

fn flops(name: &str, reduction: &Reduction) -> u64 {
    token_cost(&open(name), reduction, T as usize).unwrap().flops_per_token
}

fn whole(name: &str) -> u64 {
    flops(name, &Reduction::default())
}

/// Operations of an RMS norm of one row: square, sum and two factors each, and four for the mean.
const fn rms(width: u64) -> u64 {
    4 * width + 4
}

/// Of a window's attention in one layer, for `visible` pairs of a position and one that it sees.
const fn attention(visible: u64, heads: u64, head_dim: u64) -> u64 {
    visible * heads * (4 * head_dim + 6)
}

/// The mean over a window of what its tokens cost each, and what they cost together.
const fn mean(each: u64, together: u64) -> u64 {
    (T * each + together + T / 2) / T
}

/// Every position sees itself and those before it.
const CAUSAL: u64 = T * (T + 1) / 2;

#[test]
fn llama() {
    // 256 wide, 8 heads of 32, 4 of them for keys and values, 704 in the MLP, 6 layers, a tied head of 4096.
    let matrices = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 704);
    let layer = matrices + 2 * rms(256) + 3 * (256 + 128) + 4 * 704 + 2 * 256;
    let expected = mean(6 * layer + rms(256) + 2 * 256 * 4096, 6 * attention(CAUSAL, 8, 32));
    assert_eq!(whole("llama"), expected);
    // By and large two operations for each weight.
    assert!((expected as f64 / (2.0 * 5_475_584.0) - 1.0).abs() < 0.02, "{expected}");
}

#[test]
fn mistral_sees_a_window() {
    // 32 wide, 4 heads of 8, 2 for keys and values, 64 in the MLP, 3 layers, a head of 96, a window of 8.
    let matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64);
    let layer = matrices + 2 * rms(32) + 3 * (32 + 16) + 4 * 64 + 2 * 32;
    let visible = 8 * 9 / 2 + 8 * 8;
    assert_eq!(whole("architectures/mistral"), mean(3 * layer + rms(32) + 2 * 32 * 96, 3 * attention(visible, 4, 8)));
}

#[test]
fn mixtral_counts_the_chosen_experts_alone() {
    // 32 wide, 4 heads of 8, 2 for keys and values, 2 of 4 experts of 48, 2 layers, a head of 96.
    let count = |chosen: u64| {
        let matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 4 + chosen * 3 * 32 * 48);
        let mixture = chosen * (4 + 4) + chosen * (4 * 48 + 2 * 32);
        let layer = matrices + mixture + 2 * rms(32) + 3 * (32 + 16) + 2 * 32;
        mean(2 * layer + rms(32) + 2 * 32 * 96, 2 * attention(CAUSAL, 4, 8))
    };
    for name in ["architectures/mixtral", "architectures/mixtral_stacked"] {
        assert_eq!(whole(name), count(2), "{name}");
        assert_eq!(flops(name, &Reduction { experts_per_token: Some(1), ..Reduction::default() }), count(1), "{name}");
    }
}

#[test]
fn qwen3_normalizes_each_head() {
    // 32 wide, 4 heads of 16, 2 for keys and values, 64 in the MLP, 3 layers, a head of 96.
    let matrices = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64);
    let head_norms = (4 + 2) * rms(16);
    let layer = matrices + head_norms + 2 * rms(32) + 3 * (64 + 32) + 4 * 64 + 2 * 32;
    assert_eq!(whole("architectures/qwen3"), mean(3 * layer + rms(32) + 2 * 32 * 96, 3 * attention(CAUSAL, 4, 16)));
}

#[test]
fn qwen2_adds_biases_in_its_products() {
    let matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64);
    let layer = matrices + 2 * rms(32) + 3 * (32 + 16) + 4 * 64 + 2 * 32;
    assert_eq!(whole("architectures/qwen2"), mean(3 * layer + rms(32) + 2 * 32 * 96, 3 * attention(CAUSAL, 4, 8)));
}

#[test]
fn mamba() {
    // 32 wide, 64 channels of 16 states, steps of rank 4, a convolution over 4, 3 layers, a head of 96.
    let matrices = 2 * (32 * 128 + 64 * (4 + 32) + 4 * 64 + 64 * 32);
    let convolution = 2 * 4 * 64 + 3 * 64;
    // softplus; delta * x, d * x; for each state delta * a, exp, * h, * b, +, * c, +.
    let scan = 3 * 64 + 2 * 64 + 7 * 64 * 16;
    let layer = rms(32) + matrices + convolution + scan + 4 * 64 + 32;
    let expected = mean(3 * layer + rms(32) + 2 * 32 * 96, 0);
    for name in ["architectures/mamba", "architectures/mamba_bias"] {
        assert_eq!(whole(name), expected, "{name}");
    }
    let shorter = Reduction { skipped_layers: vec![1], ..Reduction::default() };
    assert_eq!(flops("architectures/mamba", &shorter), expected - layer);
}

#[test]
fn resnet_bk() {
    // 32 wide, 2 of 4 experts twice as wide, 3 layers, a head of 96.
    let layer_norm = 7 * 32 + 5;
    let count = |chosen: u64, resolvent: u64| {
        let experts = 2 * 32 * 4 + chosen * (4 + 4) + chosen * (2 * 2 * 32 * 64 + 64 + 2 * 32);
        // v and its clamp, the resolvent and its clamp, the projection of its two parts, two sums.
        let core = 2 * 32 + 2 + resolvent + 2 * 2 + 2 * 2 * 32 + 2 * 32 + 32;
        let layer = layer_norm + experts + core;
        // The position's embedding is added to the token's.
        32 + 3 * layer + layer_norm + 2 * 32 * 96
    };
    assert_eq!(whole("architectures/resnet_bk"), count(2, 10));
    assert_eq!(whole("architectures/resnet_bk_lookahead"), count(2, 30));
    let one = Reduction { experts_per_token: Some(1), ..Reduction::default() };
    assert_eq!(flops("architectures/resnet_bk", &one), count(1, 10));
}

#[test]
fn decoding_reads_each_matrix_once_and_one_row_of_the_embedding() {
    // In BF16: 2 bytes a weight; experts that are not chosen are not read.
    let cost = token_cost(&open("architectures/resnet_bk"), &Reduction::default(), T as usize).unwrap();
    let layer = 32 * 4 + 2 * 2 * 32 * 64 + 32 + 2 * 32;
    assert_eq!(cost.weight_bytes_per_token, 2 * (2 * 32 + 3 * layer + 32 * 96));
}

/// A checkpoint whose config is edited and whose layers are numbered anew.
struct Edited {
    inner: Checkpoint,
    config: Value,
    prefix: &'static str,
    kept: Vec<usize>,
    names: Vec<String>,
}

impl Edited {
    fn new(name: &str, prefix: &'static str, kept: &[usize], fields: &[(&str, Value)]) -> Self {
        let inner = open(name);
        let mut config = inner.config().unwrap().clone();
        fields.iter().for_each(|(key, value)| config[*key] = value.clone());
        let mut edited = Self { inner, config, prefix, kept: kept.to_vec(), names: Vec::new() };
        let all = edited.inner.names().to_vec();
        let layer = |name: &str| name.strip_prefix(prefix).and_then(|rest| rest.split('.').next()?.parse().ok());
        edited.names =
            all.into_iter().filter(|name| layer(name).is_none_or(|layer: usize| layer < kept.len())).collect();
        edited
    }

    fn original(&self, name: &str) -> String {
        match name.strip_prefix(self.prefix).and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => {
                format!("{}{}.{rest}", self.prefix, self.kept[layer.parse::<usize>().unwrap()])
            }
            None => name.to_owned(),
        }
    }
}

impl TensorSource for Edited {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn config(&self) -> Option<&Value> {
        Some(&self.config)
    }

    fn names(&self) -> &[String] {
        &self.names
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.inner.shape(&self.original(name))
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.inner.tensor(&self.original(name))
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        self.inner.file(name)
    }

    fn file_bytes(&self) -> u64 {
        self.inner.file_bytes()
    }
}

#[test]
fn a_reduced_model_is_the_model_that_was_made_so() {
    let layers = |count: usize, key: &'static str| (key, Value::from(count));
    let skip = |skipped: &[usize]| Reduction { skipped_layers: skipped.to_vec(), ..Reduction::default() };
    let (llama, bk) = ("model.layers.", "blocks.");
    for (name, reduction, edited) in [
        (
            "architectures/mistral",
            Reduction { attention_window: Some(3), ..skip(&[1]) },
            (llama, &[0, 2][..], vec![layers(2, "num_hidden_layers"), ("sliding_window", Value::from(3))]),
        ),
        ("llama", skip(&[0, 4]), (llama, &[1, 2, 3, 5], vec![layers(4, "num_hidden_layers")])),
        (
            "architectures/mixtral",
            Reduction { experts_per_token: Some(1), ..skip(&[0]) },
            (llama, &[1], vec![layers(1, "num_hidden_layers"), ("num_experts_per_tok", Value::from(1))]),
        ),
        ("architectures/mamba", skip(&[2, 0]), ("backbone.layers.", &[1], vec![layers(1, "num_hidden_layers")])),
        (
            "architectures/resnet_bk",
            Reduction { experts_per_token: Some(1), ..skip(&[1]) },
            (bk, &[0, 2], vec![layers(2, "n_layers"), ("top_k", Value::from(1))]),
        ),
    ] {
        let (prefix, kept, fields) = edited;
        let (source, edited) = (open(name), Edited::new(name, prefix, kept, &fields));
        let tokens: Vec<u32> = (0..48).map(|index| index * 7 % 96).collect();
        let options = Options { ctx: Some(24), skip: 1, activations: Activations::Exact, allow_lookahead: false };
        let cpu = Cpu::detect();
        let reduced = evaluate_reduced(cpu, (&source, &reduction), None, &tokens, &options, &Silent).unwrap();
        let expected = evaluate(cpu, &edited, None, &tokens, &options, &Silent).unwrap();
        assert_eq!(reduced.nll.to_bits(), expected.nll.to_bits(), "{name}");
        let complete = evaluate(cpu, &source, None, &tokens, &options, &Silent).unwrap();
        assert_ne!(reduced.nll, complete.nll, "{name}");
        let count = |source: &dyn TensorSource, reduction: &Reduction| token_cost(source, reduction, 24).unwrap();
        assert_eq!(count(&source, &reduction), count(&edited, &Reduction::default()), "{name}");
    }
}

#[test]
fn what_a_model_does_not_have_cannot_be_reduced() {
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let refused = |name: &str, reduction: Reduction| {
        let source = open(name);
        let error = Model::load(&source, &ops).unwrap().reduce(&reduction).unwrap_err();
        assert!(matches!(error, Error::Reduction { .. }), "{error}");
    };
    let none = Reduction::default;
    refused("architectures/mamba", Reduction { skipped_layers: vec![3], ..none() });
    refused("architectures/mamba", Reduction { skipped_layers: vec![0, 1, 2], ..none() });
    refused("architectures/mamba", Reduction { attention_window: Some(4), ..none() });
    refused("architectures/mamba", Reduction { experts_per_token: Some(1), ..none() });
    refused("architectures/mistral", Reduction { attention_window: Some(9), ..none() });
    refused("architectures/mistral", Reduction { attention_window: Some(0), ..none() });
    refused("architectures/resnet_bk", Reduction { experts_per_token: Some(0), ..none() });
    refused("architectures/resnet_bk", Reduction { experts_per_token: Some(3), ..none() });
}
