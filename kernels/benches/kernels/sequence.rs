//! Operations along a sequence.

use crate::measure::{Bench, Figure, Work};
use bkpack_kernels::cpu::{KeyValueCache, SelectiveScan};

const LENGTHS: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];

pub fn run(bench: &mut Bench) {
    // Mamba-130M's layer, then few channels for lengths that fill memory.
    for (tokens, channels) in [(1, 1536), (512, 1536)] {
        scan(bench, tokens, channels);
    }
    for tokens in LENGTHS {
        scan(bench, tokens, 128);
    }
    resolvent(bench);
    convolution(bench);
    // SmolLM2's and TinyLlama's layers.
    for (heads, kv_heads) in [(9, 3), (32, 4)] {
        for (tokens, positions) in [(512, 512), (2048, 2048), (1, 2048)] {
            attention(bench, (heads, kv_heads), tokens, positions);
        }
    }
}

fn scan(bench: &mut Bench, tokens: usize, channels: usize) {
    let size = 16;
    let label = format!("scan  [{tokens}, {channels}], state {size}");
    if !bench.wants(&label) {
        return;
    }
    let (x, delta) = (vec![0.5; tokens * channels], vec![0.1; tokens * channels]);
    let (a, d) = (vec![-1.0; channels * size], vec![1.0; channels]);
    let (b, c) = (vec![0.3; tokens * size], vec![0.3; tokens * size]);
    let operands = SelectiveScan { x: &x, delta: &delta, a: &a, b: &b, c: &c, d: &d };
    let (mut state, mut out) = (vec![0.0; channels * size], vec![0.0; tokens * channels]);
    let updates = tokens * channels * size;
    let bytes = 4 * (3 * tokens * channels + 2 * tokens * size + 3 * channels * size);
    let work = Work { bytes, exponentials: updates, ..Work::default() };
    let cpu = bench.cpu;
    bench.line(&label, Figure::Positions(tokens), work, || cpu.selective_scan(&operands, &mut state, &mut out));
}

fn resolvent(bench: &mut Bench) {
    for positions in LENGTHS {
        let v: Vec<f32> = (0..positions).map(|i| (i % 7) as f32 - 3.0).collect();
        let mut out = vec![0.0; 2 * positions];
        // The potential is read and the diagonal written.
        let work = Work { bytes: 12 * positions, ..Work::default() };
        let cpu = bench.cpu;
        let figure = Figure::Positions(positions);
        let both = format!("resolvent  [{positions}]");
        bench.line(&both, figure, work, || cpu.resolvent(&v, [0.0, 1.0], &mut out));
        let causal = format!("resolvent causal  [{positions}]");
        bench.line(&causal, figure, work, || cpu.resolvent_causal(&v, [0.0, 1.0], &mut [0.0; 2], &mut out));
    }
}

fn convolution(bench: &mut Bench) {
    for (tokens, channels) in [(1, 1536), (512, 1536), (512, 5120)] {
        let (x, weight) = (vec![0.5; tokens * channels], vec![0.1; channels * 4]);
        let (mut history, mut out) = (vec![0.0; 3 * channels], vec![0.0; tokens * channels]);
        let work = Work { bytes: 8 * tokens * channels + 4 * weight.len(), ..Work::default() };
        let cpu = bench.cpu;
        bench.line(&format!("convolution  [{tokens}, {channels}], kernel 4"), Figure::Bytes, work, || {
            cpu.depthwise_conv(&x, &weight, None, &mut history, &mut out);
        });
    }
}

fn attention(bench: &mut Bench, (heads, kv_heads): (usize, usize), tokens: usize, positions: usize) {
    let head_dim = 64;
    let q = vec![0.1; tokens * heads * head_dim];
    let kv = vec![0.1; positions * kv_heads * head_dim];
    let mut cache = KeyValueCache::new(kv_heads, head_dim, positions);
    cache.append(&kv, &kv);
    let mut out = vec![0.0; q.len()];
    let seen: usize = (positions - tokens..positions).map(|position| position + 1).sum();
    let pairs = seen * heads;
    let work = Work {
        bytes: 4 * (2 * kv.len() + 2 * q.len()),
        flops: 4 * pairs * head_dim,
        exponentials: pairs,
        ..Work::default()
    };
    let cpu = bench.cpu;
    let label = format!("attention  {heads} heads of {head_dim} over {kv_heads}, {tokens} of {positions}");
    bench.line(&label, Figure::Operations, work, || cpu.attention(&q, heads, &cache, 0.125, usize::MAX, &mut out));
}
