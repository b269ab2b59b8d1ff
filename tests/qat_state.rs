//! The state of a training that is saved: going on from it ends in the same bytes, and it fits that training alone.

#[path = "common/qat.rs"]
mod common;

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use bkpack::{
    Error,
    checkpoint::{self, Checkpoint},
    pack::PackOptions,
    progress::{Observer, Silent, Unit},
    tensor::TensorSource,
    train::qat::{Data, Options, Trained, Training},
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use common::{copy, data, open, options, pack_options, tokens, train};
use serde_json::json;

/// Stops once so many tokens have been seen.
struct StopAfter(AtomicU64);

impl Observer for StopAfter {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, amount: u64) {
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(amount)));
    }
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

fn written(trained: &Trained, source: &Checkpoint, pack: PackOptions) -> (Vec<u8>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    trained.write(Cpu::detect(), source, pack, (&output, false), &Silent).unwrap();
    let read = |name: &str| std::fs::read(output.join(name)).unwrap();
    (read("model.safetensors"), read("model.bkpack"))
}

#[test]
fn a_training_that_was_stopped_ends_in_the_same_bytes() {
    for (name, encoding, learn_scales) in [("mamba", "ternary:g32", false), ("qwen3", "int4:g32", true)] {
        let (source, pack, data) = (open(name), pack_options(encoding, Rounding::Search), data(true));
        let options = Options { learn_scales, ..options(6) };
        let whole = train(&source, &pack, &options, &data, true);
        let folder = tempfile::tempdir().unwrap();
        let saved = folder.path().join("saved");
        let new = || Training::new(Cpu::detect(), &source, Some(&source), &pack, &options, &data, &Silent).unwrap();
        // Three steps of two windows of 24 tokens.
        let stop = StopAfter(AtomicU64::new(6 * 24));
        assert!(matches!(new().run(&saved, 100, &|_| Ok(()), &stop), Err(Error::Cancelled)));
        let mut training = new();
        training.resume(&saved).unwrap();
        assert_eq!(training.done(), 3);
        let resumed = training.run(&saved, 100, &|_| Ok(()), &Silent).unwrap();
        let packs = || pack_options(encoding, Rounding::Search);
        assert!(written(&resumed, &source, packs()) == written(&whole, &source, packs()), "{name}");
        // The record is kept in decimals.
        let figures = |trained: &Trained| -> Vec<f64> {
            let losses = trained.history.steps.iter().map(|step| step.loss);
            losses.chain(trained.history.validation.iter().map(|record| record.nll)).collect()
        };
        let (found, expected) = (figures(&resumed), figures(&whole));
        assert_eq!((found.len(), expected.len()), (9, 9));
        assert!(found.iter().zip(&expected).all(|(found, expected)| (found / expected - 1.0).abs() < 1e-14));

        // Of another training, damaged, or of something else.
        let other = Options { seed: 6, ..options.clone() };
        let mut other = Training::new(Cpu::detect(), &source, Some(&source), &pack, &other, &data, &Silent).unwrap();
        let refused = other.resume(&saved).unwrap_err().to_string();
        assert!(refused.contains("belongs to a training of another model"), "{refused}");
        let bytes = std::fs::read(&saved).unwrap();
        let flipped = |place: usize| {
            let mut bytes = bytes.clone();
            bytes[place] ^= 1;
            bytes
        };
        // The lowest bit of a weight, and a digit of the record.
        let digit = bytes.windows(13).position(|found| found == b"\\\"step\\\":3,\\\"").unwrap() + 9;
        assert_eq!(bytes[digit], b'3');
        let (weight, digit) = (flipped(bytes.len() - 4), flipped(digit));
        let foreign = [&b""[..], b"{}", &bytes[..bytes.len() / 2], &bytes[..bytes.len() - 4], &weight, &digit];
        let weights = std::fs::read(source.path().join("model.safetensors")).unwrap();
        for bytes in foreign.into_iter().chain([&weights[..]]) {
            std::fs::write(&saved, bytes).unwrap();
            let refused = new().resume(&saved).unwrap_err();
            assert!(matches!(refused, Error::Training { .. }), "{refused}");
        }
    }
}

/// Stops a training of so many steps in its middle.
fn stop(training: Training, saved: &Path, steps: u64) {
    let stop = StopAfter(AtomicU64::new(steps * 2 * 24));
    assert!(matches!(training.run(saved, 100, &|_| Ok(()), &stop), Err(Error::Cancelled)));
}

#[test]
fn nothing_is_saved_before_the_first_step_and_all_after_the_last() {
    let (source, pack, data, options) =
        (open("qwen3"), pack_options("int4:g32", Rounding::Search), data(false), options(2));
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved");
    let new = || Training::new(Cpu::detect(), &source, None, &pack, &options, &data, &Silent).unwrap();
    stop(new(), &saved, 0);
    assert!(!saved.exists());
    let whole = new().run(&saved, 100, &|_| Ok(()), &Silent).unwrap();
    let mut training = new();
    training.resume(&saved).unwrap();
    assert_eq!(training.done(), 2);
    let resumed = training.run(&saved, 100, &|_| Ok(()), &Silent).unwrap();
    let packs = || pack_options("int4:g32", Rounding::Search);
    assert!(written(&resumed, &source, packs()) == written(&whole, &source, packs()));
}

#[test]
fn a_state_fits_one_config_one_teacher_and_one_begin_of_a_text() {
    let (pack, data, options) = (pack_options("int4:g32", Rounding::Search), data(false), options(4));
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str, change: &dyn Fn(&mut serde_json::Value)| -> Checkpoint {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        copy("qwen3", &folder, change);
        checkpoint::open(&folder).unwrap()
    };
    let same = place("same", &|_| ());
    let theta = place("theta", &|config| config["rope_parameters"]["rope_theta"] = json!(1e4));
    let epsilon = place("epsilon", &|config| config["rms_norm_eps"] = json!(1e-5));
    place("bos", &|_| ());
    fs::write(folder.path().join("bos/tokenizer_config.json"), r#"{"add_bos_token": true}"#).unwrap();
    let bos = checkpoint::open(&folder.path().join("bos")).unwrap();
    let saved = folder.path().join("saved");
    let new = |source, teacher: &'_ Checkpoint| {
        let mut training =
            Training::new(Cpu::detect(), source, Some(teacher), &pack, &options, &data, &Silent).unwrap();
        match saved.exists() {
            true => training.resume(&saved).map_err(|error| error.to_string()),
            false => {
                stop(training, &saved, 2);
                Ok(())
            }
        }
    };
    new(&same, &same).unwrap();
    new(&same, &same).unwrap();
    for (source, teacher) in [(&theta, &same), (&epsilon, &same), (&same, &theta), (&bos, &same)] {
        let refused = new(source, teacher).unwrap_err();
        assert!(refused.contains("belongs to a training of another model"), "{refused}");
    }
}

#[test]
fn perplexities_of_another_text_are_forgotten() {
    let (source, pack, options) = (open("qwen3"), pack_options("int4:g32", Rounding::Search), options(6));
    let of = |validation: Option<Vec<u32>>| Data { validation, ..data(false) };
    let (without, with, other) = (of(None), of(Some(tokens(400))), of(Some(tokens(400).into_iter().rev().collect())));
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved");
    let ends = |first: &Data, then: &Data| {
        stop(Training::new(Cpu::detect(), &source, None, &pack, &options, first, &Silent).unwrap(), &saved, 4);
        let mut training = Training::new(Cpu::detect(), &source, None, &pack, &options, then, &Silent).unwrap();
        training.resume(&saved).unwrap();
        let history = training.run(&saved, 100, &|_| Ok(()), &Silent).unwrap().history;
        let steps: Vec<u64> = history.validation.iter().map(|record| record.step).collect();
        (history.baseline_ppl, steps)
    };
    let (baseline, steps) = ends(&with, &with);
    assert_eq!(steps, [0, 3, 6]);
    let (replaced, steps) = ends(&with, &other);
    assert!(replaced.is_some() && replaced != baseline && steps == [6], "{replaced:?} {steps:?}");
    assert_eq!(ends(&without, &with), (baseline, vec![6]));
    assert_eq!(ends(&with, &without), (None, vec![]));
}

#[test]
fn a_perplexity_beyond_all_numbers_ends_the_training() {
    let folder = tempfile::tempdir().unwrap();
    copy("qwen3", folder.path(), |_| ());
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    // BF16, times 2^14.
    let larger = |bytes: &[u8]| -> Vec<u8> {
        let values = bytes.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        values.flat_map(|value| (value + (14 << 7)).to_le_bytes()).collect()
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            let head = name == "lm_head.weight";
            (name.into(), view.shape().to_vec(), if head { larger(view.data()) } else { view.data().to_vec() })
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let (source, pack, data, options) =
        (checkpoint::open(folder.path()).unwrap(), pack_options("int4:g32", Rounding::Search), data(true), options(2));
    let training = Training::new(Cpu::detect(), &source, None, &pack, &options, &data, &Silent).unwrap();
    let refused = training.run(&folder.path().join("saved"), 1, &|_| Ok(()), &Silent).err().unwrap().to_string();
    assert!(refused.contains("has a perplexity beyond all numbers"), "{refused}");
}
