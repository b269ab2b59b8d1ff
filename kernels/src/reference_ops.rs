//! The scalar oracle of the operations of a forward pass, in f64: the textbook formula, one loop after the other.

/// Llama's RMSNorm of every row: `x / sqrt(mean(x^2) + epsilon) * gain`.
pub fn rms_norm(x: &[f32], gain: &[f32], epsilon: f32) -> Vec<f64> {
    let normalize = |row: &[f32]| {
        let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
        row.iter().zip(gain).map(|(&v, &g)| f64::from(v) * factor * f64::from(g)).collect::<Vec<_>>()
    };
    x.chunks(gain.len()).flat_map(normalize).collect()
}

/// LayerNorm of every row: `(x - mean(x)) / sqrt(variance(x) + epsilon) * gain + bias`.
pub fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], epsilon: f32) -> Vec<f64> {
    let normalize = |row: &[f32]| {
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (variance + f64::from(epsilon)).sqrt();
        let affine = gain.iter().zip(bias).map(|(&g, &b)| (f64::from(g), f64::from(b)));
        row.iter().zip(affine).map(|(&v, (g, b))| (f64::from(v) - mean) * factor * g + b).collect::<Vec<_>>()
    };
    x.chunks(gain.len()).flat_map(normalize).collect()
}

/// `x / (1 + exp(-x))`.
pub fn silu(x: f32) -> f64 {
    let x = f64::from(x);
    x / (1.0 + (-x).exp())
}

/// PyTorch's softplus: `ln(1 + exp(x))`, and `x` itself above 20.
pub fn softplus(x: f32) -> f64 {
    let x = f64::from(x);
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// The nearest multiple of `scale` that is at most `largest` times it, halves to even; zero for a zero scale.
///
/// The quotient is rounded to f32, because that decides what is a half.
pub fn round_to_grid(x: f32, scale: f32, largest: f32) -> f64 {
    let steps = f64::from((x / scale).round_ties_even().clamp(-largest, largest));
    if scale == 0.0 { 0.0 } else { steps * f64::from(scale) }
}

/// `silu(gate) * up`, element by element.
pub fn silu_multiply(gate: &[f32], up: &[f32]) -> Vec<f64> {
    gate.iter().zip(up).map(|(&g, &u)| silu(g) * f64::from(u)).collect()
}

/// `x + y`, with `y` repeated along `x`: a sum when the lengths agree, a bias when `y` is one row.
pub fn add(x: &[f32], y: &[f32]) -> Vec<f64> {
    x.iter().zip(y.iter().cycle()).map(|(&a, &b)| f64::from(a) + f64::from(b)).collect()
}

/// Rotary position embedding as Hugging Face's Llama has it: element `i` of a head turns with element
/// `i + head_dim / 2`.
///
/// `x` is `[tokens, heads * head_dim]`, `cos` and `sin` are `[tokens, head_dim / 2]`.
pub fn rope(x: &[f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) -> Vec<f64> {
    let half = head_dim / 2;
    let mut out = vec![0.0; x.len()];
    for token in 0..x.len() / (heads * head_dim) {
        for head in 0..heads {
            let start = (token * heads + head) * head_dim;
            for i in 0..half {
                let (first, second) = (f64::from(x[start + i]), f64::from(x[start + half + i]));
                let (c, s) = (f64::from(cos[token * half + i]), f64::from(sin[token * half + i]));
                out[start + i] = first * c - second * s;
                out[start + half + i] = second * c + first * s;
            }
        }
    }
    out
}

/// The shape of grouped-query attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

/// Causal grouped-query attention, in which a query sees the last `window` positions up to its own.
///
/// `q` is `[tokens, heads * head_dim]`; `k` and `v` are `[positions, kv_heads * head_dim]`; the queries are the last
/// `tokens` positions. Returns `[tokens, heads * head_dim]`.
pub fn attention(q: &[f32], k: &[f32], v: &[f32], shape: Heads, scale: f32, window: usize) -> Vec<f64> {
    let Heads { heads, kv_heads, head_dim } = shape;
    let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let (tokens, positions) = (q.len() / q_width, k.len() / kv_width);
    let mut out = vec![0.0; q.len()];
    for token in 0..tokens {
        let end = positions - tokens + token + 1;
        let visible = end.saturating_sub(window)..end;
        for head in 0..heads {
            let query = &q[token * q_width + head * head_dim..][..head_dim];
            let kv_start = head / (heads / kv_heads) * head_dim;
            let score = |position: usize| {
                let key = &k[position * kv_width + kv_start..][..head_dim];
                let dot: f64 = query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                dot * f64::from(scale)
            };
            let mut weights: Vec<f64> = visible.clone().map(score).collect();
            softmax_in_place(&mut weights);
            for (position, weight) in visible.clone().zip(&weights) {
                let value = &v[position * kv_width + kv_start..][..head_dim];
                for (o, &x) in out[token * q_width + head * head_dim..][..head_dim].iter_mut().zip(value) {
                    *o += weight * f64::from(x);
                }
            }
        }
    }
    out
}

/// `exp(x) / sum(exp(x))` of one row.
pub fn softmax(row: &[f32]) -> Vec<f64> {
    let mut out: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
    softmax_in_place(&mut out);
    out
}

fn softmax_in_place(row: &mut [f64]) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// `ln(sum(exp(x)))` of one row.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
    f64::from(max) + sum.ln()
}

/// The negative log-likelihood of `target` under the softmax of one row, in nats.
pub fn cross_entropy(row: &[f32], target: u32) -> f64 {
    log_sum_exp(row) - f64::from(row[target as usize])
}

/// `KL(softmax(baseline) || softmax(other))` of one row, in nats.
pub fn kl_divergence(baseline: &[f32], other: &[f32]) -> f64 {
    let shift = log_sum_exp(baseline) - log_sum_exp(other);
    let log_ratios = baseline.iter().zip(other).map(|(&b, &o)| f64::from(b) - f64::from(o) - shift);
    softmax(baseline).iter().zip(log_ratios).filter(|(p, _)| **p > 0.0).map(|(p, ratio)| p * ratio).sum()
}

/// The lowest index of the largest value; NaN is never the largest, and a row of NaN gives 0.
pub fn arg_max(row: &[f32]) -> usize {
    let mut best = 0;
    for (index, &x) in row.iter().enumerate() {
        if x > row[best] || row[best].is_nan() && !x.is_nan() {
            best = index;
        }
    }
    best
}
