//! Parity with PyTorch on real weights: the logits and the perplexity of the reference checkpoint.

#[path = "common/logits.rs"]
mod shared;

use std::path::{Path, PathBuf};

use bkpack::{
    Error,
    checkpoint::{self, Checkpoint},
    eval::{
        generate::{Limits, generate},
        logits::write_logits,
        perplexity::{Evaluation, Options, evaluate},
        text::{Detokenizer, Tokenizer, read_text},
    },
    model::{Model, sample::Sampler},
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    progress::Silent,
};
use bkpack_kernels::Cpu;
use safetensors::{Dtype, SafeTensors};

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
    assert_eq!(values("input_ids").dtype(), Dtype::I32);
    let ids = values("input_ids").data().as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)).collect();
    let logits = values("logits").data().as_chunks().0.iter().map(|&logit| f32::from_le_bytes(logit)).collect();
    (ids, logits)
}

/// The logits of all positions on the CPU, computed in batches of so many tokens.
fn logits(cpu: Cpu, source: &Checkpoint, tokens: &[u32], batch: usize) -> Vec<f32> {
    shared::logits(source, &CpuOps::new(cpu, Activations::Exact), tokens, batch)
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
        state.clear(&ops).unwrap();
        let mut hidden = Vec::new();
        ops.read(&model.forward(tokens, &mut state).unwrap(), &mut hidden).unwrap();
        hidden
    };
    let first = run(&tokens[32..]);
    run(&tokens[..48]);
    assert_eq!(first, run(&tokens[32..]));
}

fn evaluate_wikitext(source: &Checkpoint, baseline: Option<&Checkpoint>, limit: usize) -> Evaluation {
    let text = read_text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/wikitext2.test.txt")).unwrap();
    let mut tokens = Tokenizer::load(source).unwrap().encode(&text).unwrap();
    tokens.truncate(limit);
    let options = Options { ctx: Some(256), skip: 1, activations: Activations::Exact, allow_lookahead: false };
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

#[test]
fn logits_are_written_once() {
    let (tokens, expected) = reference();
    let source = checkpoint();
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let model = Model::load(&source, &ops).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("logits.safetensors");
    write_logits(&model, &ops, &tokens, &output, false, &Silent).unwrap();
    let bytes = std::fs::read(&output).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!((logits.dtype(), logits.shape()), (Dtype::F32, &[64, 4096][..]));
    let values: Vec<f32> = logits.data().as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
    assert!(relative_difference(&values, &expected) < 2e-4);

    let again = |force| write_logits(&model, &ops, &tokens[..2], &output, force, &Silent);
    assert!(matches!(again(false), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&output).unwrap(), bytes);
    again(true).unwrap();
    assert!(std::fs::read(&output).unwrap().len() < bytes.len());
}

#[test]
fn text_comes_back_in_whole_characters() {
    let tokenizer = Tokenizer::load(&checkpoint()).unwrap();
    let text = "naïve café — 東京 😀, the end";
    let tokens = tokenizer.encode(text).unwrap();
    for start in [0, 1] {
        let mut detokenizer = Detokenizer::new(&tokenizer, &tokens[..start]);
        let pieces: Vec<String> = tokens[start..].iter().map(|&token| detokenizer.push(token).unwrap()).collect();
        assert!(pieces.iter().any(String::is_empty) && !pieces.concat().contains(char::REPLACEMENT_CHARACTER));
        assert!(text.ends_with(&pieces.concat()) && pieces.concat().ends_with("😀, the end"), "{pieces:?}");
    }
}

#[test]
fn generation_takes_the_most_likely_token_until_it_must_stop() {
    let source = checkpoint();
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let model = Model::load(&source, &ops).unwrap();
    let tokenizer = Tokenizer::load(&source).unwrap();
    let prompt = tokenizer.encode("The city of London is").unwrap();
    let run = |prompt: &[u32], max_tokens, eos: &[u32]| {
        let mut sampler = Sampler::new(Cpu::detect(), 0.0, 1.0, 0).unwrap();
        let mut text = String::new();
        let limits = Limits { max_tokens, eos };
        let emit = |piece: &str| {
            text.push_str(piece);
            Ok(())
        };
        generate((&model, &ops), &tokenizer, prompt, &mut sampler, limits, &Silent, emit)
            .map(|generated| (generated.tokens, text))
    };

    // What decoding with a cache draws, prefilling the whole text again each time must find the most likely.
    let mut expected = prompt.clone();
    for _ in 0..8 {
        let logits = logits(Cpu::detect(), &source, &expected, expected.len());
        expected.push(Cpu::detect().arg_max(&logits[logits.len() - 4096..]) as u32);
    }
    let mut detokenizer = Detokenizer::new(&tokenizer, &prompt);
    let text: String = expected[prompt.len()..].iter().map(|&token| detokenizer.push(token).unwrap()).collect();
    assert_eq!(run(&prompt, 8, &[]).unwrap(), (8, text));

    assert_eq!(run(&prompt, 8, &expected[prompt.len()..][..1]).unwrap(), (1, String::new()));
    assert_eq!(run(&[5; 1022], 8, &[]).unwrap().0, 2);
    for prompt in [&[][..], &[5; 1024], &[4096]] {
        assert!(matches!(run(prompt, 8, &[]), Err(Error::Tokens { .. })));
    }
}
