//! Decoding allocates nothing: once buffers have grown, tokens come out of the memory of those before them.

use std::{alloc::System, path::Path};

use bkpack::{
    checkpoint,
    format::PackedFile,
    model::{Model, sample::Sampler},
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    pack::{PackOptions, Packing},
    policy::Policy,
    progress::Silent,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

/// Counts the allocations of all threads.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Tokens of one round.
const ROUND: usize = 8;

/// Rounds in which buffers may grow. Which thread takes a task is chance, so that one may need its buffers late.
const ROUNDS: usize = 200;

/// Decodes rounds of tokens, each drawn from the logits of the one before, and gives the fewest allocations of a round.
fn fewest_allocations(source: &dyn TensorSource, activations: Activations, temperature: f32) -> usize {
    let cpu = Cpu::detect();
    let ops = CpuOps::new(cpu, activations);
    let model = Model::load(source, &ops).unwrap();
    let capacity = model.max_positions().min(256);
    let mut state = model.state(capacity).unwrap();
    let mut sampler = Sampler::new(cpu, temperature, 0.9, 7).unwrap();
    let (mut logits, mut token) = (Vec::new(), 1);
    let mut fewest = usize::MAX;
    for _ in 0..ROUNDS {
        if state.positions() + ROUND > capacity {
            state.clear(&ops).unwrap();
        }
        let region = Region::new(ALLOCATOR);
        for _ in 0..ROUND {
            let hidden = model.forward(&[token], &mut state).unwrap();
            ops.read(&model.logits(&hidden, 0, 1).unwrap(), &mut logits).unwrap();
            token = sampler.draw(&mut logits);
        }
        let change = region.change();
        fewest = fewest.min(change.allocations + change.reallocations);
        if fewest == 0 {
            break;
        }
    }
    fewest
}

// One test, because the counter is the whole process's.
#[test]
fn decoding_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Cpu::detect();
    for fixture in
        ["llama", "mistral", "mixtral", "mixtral_stacked", "qwen2", "qwen3", "mamba", "mamba_bias", "resnet_bk"]
    {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let path =
            if fixture == "llama" { fixtures.join(fixture) } else { fixtures.join("architectures").join(fixture) };
        let plain = checkpoint::open(&path).unwrap();
        assert_eq!(fewest_allocations(&plain, Activations::Exact, 0.0), 0, "{fixture}");

        let packed = folder.path().join(format!("{fixture}.bkpack"));
        let options = PackOptions::new(Policy::uniform("int4:g32".parse().unwrap(), &[], &[]).unwrap());
        Packing::plan(&plain, &options, &packed, cpu, &Silent).unwrap().write(cpu, false, &Silent).unwrap();
        let packed = PackedFile::open(&packed).unwrap();
        for (activations, temperature) in [(Activations::Exact, 0.0), (Activations::Int8, 0.8)] {
            let fewest = fewest_allocations(&packed, activations, temperature);
            assert_eq!(fewest, 0, "{fixture} packed, {} activations", activations.name());
        }
    }
}
