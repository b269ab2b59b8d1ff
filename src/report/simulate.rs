//! Simulated results, for work on the layout of figures. Every record is marked.

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::StandardNormal;

use super::results::{Configuration, Quantized};

/// ResNet-BK and Mamba at FP32, FP16, INT8, INT4 and INT2, as the documents imagine them: ResNet-BK loses under 1, 5, 15
/// and about 50 percent, Mamba 3 and 15 percent, and exceeds 200 at INT4 and 400 at INT2.
pub fn quantized(seed: u64) -> Vec<Quantized> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let series =
        [("resnetbk", 30.0, [1.0, 1.005, 1.04, 1.14, 1.5], 0.004), ("mamba", 32.0, [1.0, 1.03, 1.15, 6.8, 15.0], 0.01)];
    let widths = [32.0, 16.0, 8.0, 4.0, 2.0];
    let mut points = Vec::new();
    for (model, base, factors, spread) in series {
        for (bits, factor) in widths.into_iter().zip(factors) {
            let noise: f64 = random.sample(StandardNormal);
            let perplexity = Some(base * factor * (1.0 + spread * noise.clamp(-2.0, 2.0)));
            points.push(Quantized {
                model: model.into(),
                width: bits.into(),
                perplexity,
                looks_ahead: false,
                simulated: true,
                protocol: None,
                details: Default::default(),
            });
        }
    }
    points
}

/// `count` configurations of each model, as the documents imagine them: ResNet-BK from 5 GFLOPs at perplexity 28 down by 60
/// percent, where it loses 15 percent; Mamba from 10 GFLOPs at 32 down by 50 percent, where it loses 35 percent.
pub fn configurations(seed: u64, count: usize) -> Vec<Configuration> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut points = Vec::new();
    for (model, flops, base, reduction, loss) in [("resnetbk", 5e9, 28.0, 0.6, 0.15), ("mamba", 1e10, 32.0, 0.5, 0.35)]
    {
        for index in 0..count {
            let share = if count > 1 { index as f64 / (count - 1) as f64 } else { 0.0 };
            let mut noise = || 1.0 + 0.004 * random.sample::<f64, _>(StandardNormal).clamp(-2.0, 2.0);
            let compute_factor = 1.0 - reduction * share;
            points.push(Configuration {
                model: model.into(),
                id: format!("{model}_config_{index}"),
                flops: flops * compute_factor * noise(),
                perplexity: Some(base * (1.0 + loss * share * share) * noise()),
                compute_factor: Some(compute_factor),
                looks_ahead: false,
                simulated: true,
                protocol: None,
                details: Default::default(),
            });
        }
    }
    points
}
