//! Parity with PyTorch on real weights: the logits and the perplexity of the reference checkpoint.

use std::path::{Path, PathBuf};

use bkpack::{
    checkpoint::{self, Checkpoint},
    eval::{
        perplexity::{Evaluation, Options, evaluate},
        text::Tokenizer,
    },
    model::Model,
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    progress::Silent,
};
use bkpack_kernels::Cpu;
use safetensors::SafeTensors;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama").join(name)
}

fn checkpoint() -> Checkpoint {
    checkpoint::open(&fixture("")).unwrap()
}

/// PyTorch's input and logits: `[64]` and `[64, 4096]`.
fn reference() -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(fixture("reference_logits.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |name| tensors.tensor(name).unwrap();
    let ids = values("input_ids").data().as_chunks().0.iter().map(|&id| i64::from_le_bytes(id) as u32).collect();
    let logits = values("logits").data().as_chunks().0.iter().map(|&logit| f32::from_le_bytes(logit)).collect();
    (ids, logits)
}

/// The logits of all positions, computed in batches of so many tokens.
fn logits(cpu: Cpu, source: &Checkpoint, tokens: &[u32], batch: usize) -> Vec<f32> {
    let ops = CpuOps::new(cpu, Activations::Exact);
    let model = Model::load(source, &ops).unwrap();
    let mut state = model.state(tokens.len()).unwrap();
    let mut all = Vec::new();
    for batch in tokens.chunks(batch) {
        let hidden = model.forward(batch, &mut state).unwrap();
        let mut logits = Vec::new();
        ops.read(&model.logits(&hidden, 0, batch.len()).unwrap(), &mut logits).unwrap();
        all.extend(logits);
    }
    all
}

/// The largest difference, as a fraction of the largest absolute value expected.
fn relative_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let difference = found.iter().zip(expected).fold(0f32, |difference, (f, e)| {
        assert!(f.is_finite());
        difference.max((f - e).abs())
    });
    difference / largest
}

#[test]
fn logits_are_those_of_pytorch_on_every_instruction_set() {
    let (tokens, expected) = reference();
    let source = checkpoint();
    for cpu in Cpu::available() {
        let difference = relative_difference(&logits(cpu, &source, &tokens, 64), &expected);
        println!("{}: {difference:e}", cpu.isa());
        assert!(difference < 2e-4, "{}: {difference}", cpu.isa());
    }
}

#[test]
fn decoding_token_by_token_computes_what_prefill_does() {
    let (tokens, _) = reference();
    let source = checkpoint();
    for cpu in Cpu::available() {
        let prefill = logits(cpu, &source, &tokens, 64);
        for batch in [1, 7, 33] {
            let difference = relative_difference(&logits(cpu, &source, &tokens, batch), &prefill);
            assert!(difference < 1e-5, "{}, batches of {batch}: {difference}", cpu.isa());
        }
    }
}

#[test]
fn a_state_that_was_cleared_forgets_the_text() {
    let (tokens, _) = reference();
    let source = checkpoint();
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let model = Model::load(&source, &ops).unwrap();
    let mut state = model.state(64).unwrap();
    let mut run = |tokens: &[u32]| {
        state.clear(&ops);
        let mut hidden = Vec::new();
        ops.read(&model.forward(tokens, &mut state).unwrap(), &mut hidden).unwrap();
        hidden
    };
    let first = run(&tokens[32..]);
    run(&tokens[..48]);
    assert_eq!(first, run(&tokens[32..]));
}

fn evaluate_wikitext(source: &Checkpoint, baseline: Option<&Checkpoint>, limit: usize) -> Evaluation {
    let text = std::fs::read_to_string(fixture("wikitext2.test.txt")).unwrap();
    let mut tokens = Tokenizer::load(source).unwrap().encode(&text).unwrap();
    tokens.truncate(limit);
    let options = Options { ctx: Some(256), skip: 1, activations: Activations::Exact };
    evaluate(Cpu::detect(), source, baseline.map(|baseline| baseline as _), &tokens, &options, &Silent).unwrap()
}

#[test]
fn perplexity_of_the_whole_wikitext2_test_is_that_of_pytorch() {
    let evaluation = evaluate_wikitext(&checkpoint(), None, usize::MAX);
    assert_eq!(evaluation.scored, 382_245);
    let expected = 48.795483895647635;
    assert!((evaluation.ppl / expected - 1.0).abs() < 1e-4, "{}", evaluation.ppl);
}

#[test]
fn a_model_is_no_distance_from_itself() {
    let source = checkpoint();
    let evaluation = evaluate_wikitext(&source, Some(&source), 4096);
    let baseline = evaluation.baseline.unwrap();
    assert_eq!(baseline.baseline_nll, evaluation.nll);
    assert_eq!((baseline.ppl_increase_percent, baseline.kld_mean, baseline.kld_p999), (0.0, 0.0, 0.0));
    assert_eq!(baseline.top1_agreement, 1.0);
}
