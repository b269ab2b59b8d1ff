//! What tests of training share: small checkpoints, a text that can be learned, a training from start to end.

use std::{fs, path::Path};

use bkpack::{
    checkpoint::{self, Checkpoint},
    pack::PackOptions,
    policy::Policy,
    progress::Silent,
    tensor::{CalibrationText, TensorSource},
    train::qat::{Data, Distillation, Options, Trained, Training},
};
use bkpack_kernels::{Cpu, cpu::quantize::Rounding};
use serde_json::Value;

pub fn open(name: &str) -> Checkpoint {
    checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)).unwrap()
}

/// Tokens that can be learned: most follow from the one before.
pub fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| if i % 7 == 0 { i * i % 96 } else { (i % 7) * 13 % 96 }).collect()
}

pub fn data(validation: bool) -> Data {
    Data {
        text: CalibrationText { name: "text".into(), blake3: "0".repeat(64) },
        tokens: tokens(24 * 64),
        validation: validation.then(|| tokens(400)),
        validate_every: 3,
    }
}

pub fn options(steps: u64) -> Options {
    Options {
        steps,
        batch: 2,
        ctx: Some(24),
        learning_rate: 3e-3,
        warmup: 1,
        weight_decay: 0.01,
        clip: 1.0,
        seed: 5,
        learn_scales: false,
        distillation: Distillation { alpha: 0.5, temperature: 2.0 },
        core_bits: None,
    }
}

pub fn pack_options(encoding: &str, rounding: Rounding) -> PackOptions {
    PackOptions { rounding, ..PackOptions::new(Policy::uniform(encoding.parse().unwrap(), &[], &[]).unwrap()) }
}

/// Trains from the start to the end.
pub fn train(source: &Checkpoint, pack: &PackOptions, options: &Options, data: &Data, teacher: bool) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let teacher: Option<&dyn TensorSource> = if teacher { Some(source) } else { None };
    let training = Training::new(Cpu::detect(), source, teacher, pack, options, data, &Silent).unwrap();
    training.run(&folder.path().join("saved"), 100, &|_| Ok(()), &Silent).unwrap()
}

/// A copy of a checkpoint whose config.json is another.
pub fn copy(name: &str, folder: &Path, change: impl Fn(&mut Value)) {
    let source = open(name).path().to_owned();
    fs::copy(source.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}
