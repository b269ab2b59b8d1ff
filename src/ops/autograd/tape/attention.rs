//! Causal grouped-query attention over one text.

use bkpack_kernels::Cpu;

use super::product::{multiply, transpose};

/// What attention is defined by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub cpu: Cpu,
    pub tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    /// Each token sees so many positions up to its own.
    pub window: usize,
}

impl Attention {
    /// From a row a token to a matrix `[heads, tokens, head_dim]`.
    fn by_head(&self, x: &[f32], heads: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(x.len());
        for head in 0..heads {
            for row in x.chunks_exact(heads * self.head_dim) {
                out.extend_from_slice(&row[head * self.head_dim..][..self.head_dim]);
            }
        }
        out
    }

    /// The way back.
    fn by_token(&self, x: &[f32], heads: usize) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        for (head, values) in x.chunks_exact(self.tokens * self.head_dim).enumerate() {
            let rows = out.chunks_exact_mut(heads * self.head_dim).zip(values.chunks_exact(self.head_dim));
            rows.for_each(|(row, values)| row[head * self.head_dim..][..self.head_dim].copy_from_slice(values));
        }
        out
    }

    /// The positions that a row of scores sees.
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = row % self.tokens + 1;
        end.saturating_sub(self.window)..end
    }

    /// The result, `[tokens, heads * head_dim]`, and the softmax of the scores, `[heads * tokens, tokens]`, zero where a token
    /// does not look.
    pub fn forward(&self, query: &[f32], key: &[f32], value: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (query, key) = (self.by_head(query, self.heads), self.by_head(key, self.kv_heads));
        let value = self.by_head(value, self.kv_heads);
        let (mut out, mut weights) = (Vec::with_capacity(query.len()), Vec::new());
        // Heads that share keys are one matrix.
        let shared = self.heads / self.kv_heads * self.tokens * self.head_dim;
        let own = self.tokens * self.head_dim;
        for (query, (key, value)) in query.chunks_exact(shared).zip(key.chunks_exact(own).zip(value.chunks_exact(own)))
        {
            let mut scores = multiply(self.cpu, query, key, self.head_dim); // [shared rows, tokens]
            for (row, scores) in scores.chunks_exact_mut(self.tokens).enumerate() {
                let visible = self.visible(row);
                scores[..visible.start].fill(0.0);
                scores[visible.end..].fill(0.0);
                let scores = &mut scores[visible];
                scores.iter_mut().for_each(|score| *score *= self.scale);
                self.cpu.softmax(scores);
            }
            out.extend(multiply(self.cpu, &scores, &transpose(value, self.head_dim), self.tokens));
            weights.extend(scores);
        }
        (self.by_token(&out, self.heads), weights)
    }

    /// The gradients of query, key and value.
    pub fn backward(&self, [query, key, value]: [&[f32]; 3], weights: &[f32], gradient: &[f32]) -> [Vec<f32>; 3] {
        let (query, key) = (self.by_head(query, self.heads), self.by_head(key, self.kv_heads));
        let (value, gradient) = (self.by_head(value, self.kv_heads), self.by_head(gradient, self.heads));
        let [mut of_query, mut of_key, mut of_value] = [Vec::new(), Vec::new(), Vec::new()];
        let rows = self.heads / self.kv_heads * self.tokens;
        let (shared, own) = (rows * self.head_dim, self.tokens * self.head_dim);
        let per_head = query.chunks_exact(shared).zip(key.chunks_exact(own)).zip(value.chunks_exact(own));
        let per_head = per_head.zip(weights.chunks_exact(rows * self.tokens)).zip(gradient.chunks_exact(shared));
        for ((((query, key), value), weights), gradient) in per_head {
            let (cpu, tokens) = (self.cpu, self.tokens);
            of_value.extend(multiply(cpu, &transpose(weights, tokens), &transpose(gradient, self.head_dim), rows));
            let mut of_scores = multiply(cpu, gradient, value, self.head_dim); // of the weights at first
            for (row, (scores, weights)) in
                of_scores.chunks_exact_mut(tokens).zip(weights.chunks_exact(tokens)).enumerate()
            {
                let visible = self.visible(row);
                scores[..visible.start].fill(0.0);
                scores[visible.end..].fill(0.0);
                let (scores, weights) = (&mut scores[visible.clone()], &weights[visible]);
                let mean: f32 = scores.iter().zip(weights).map(|(gradient, weight)| gradient * weight).sum();
                for (score, weight) in scores.iter_mut().zip(weights) {
                    *score = self.scale * weight * (*score - mean);
                }
            }
            of_query.extend(multiply(cpu, &of_scores, &transpose(key, self.head_dim), tokens));
            of_key.extend(multiply(cpu, &transpose(&of_scores, tokens), &transpose(query, self.head_dim), rows));
        }
        let [query, key, value] = [(of_query, self.heads), (of_key, self.kv_heads), (of_value, self.kv_heads)]
            .map(|(gradient, heads)| self.by_token(&gradient, heads));
        [query, key, value]
    }
}
