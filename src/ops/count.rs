//! A back end that computes nothing: it follows the shapes of a forward pass and counts what the pass would compute.
//!
//! Additions, subtractions, multiplications, divisions, comparisons and each exp, log and square root count one
//! floating-point operation. Moving values (embedding, gathering, cutting) counts none, nor does unpacking weights: a
//! packed model has the operations of its source.

use std::{cell::Cell, convert::Infallible};

use super::{Ops, Place, Routing, Scan};
use crate::{
    error::Result,
    tensor::{TensorSource, matrix_shape},
};

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Floating-point operations.
    pub flops: u128,
    /// Bytes of matrices, as they are stored, that the tokens would read if they ran one by one.
    pub matrix_bytes: u128,
}

/// The back end.
#[derive(Debug, Default)]
pub struct CountOps {
    counts: Cell<Counts>,
}

/// The shape of a tensor that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub rows: usize,
    pub cols: usize,
}

impl Shape {
    fn elements(self) -> u128 {
        self.rows as u128 * self.cols as u128
    }
}

/// The shape of a matrix and the bytes that it takes in its file.
#[derive(Clone, Copy, Debug)]
pub struct CountWeight {
    shape: Shape,
    bytes: usize,
}

/// How many positions one attention layer has seen.
#[derive(Clone, Copy, Debug)]
pub struct CountCache {
    positions: usize,
    head_dim: usize,
}

impl CountOps {
    /// What was counted since the last time, or since the beginning.
    pub fn take(&self) -> Counts {
        self.counts.take()
    }

    fn flops(&self, flops: u128) {
        let mut counts = self.counts.get();
        counts.flops += flops;
        self.counts.set(counts);
    }

    /// So many operations on every element.
    fn each(&self, x: Shape, flops: u128) -> Result<Shape> {
        self.flops(x.elements() * flops);
        Ok(x)
    }

    fn read_bytes(&self, bytes: u128) {
        let mut counts = self.counts.get();
        counts.matrix_bytes += bytes;
        self.counts.set(counts);
    }
}

impl Ops for CountOps {
    type Tensor = Shape;
    type Weight<'a> = CountWeight;
    type Cache = CountCache;
    type Carry = [f64; 2];
    type StepGraph = ();
    type Experts = Infallible;
    type Chosen = Infallible;

    fn weight<'a>(&self, source: &'a dyn TensorSource, name: &str) -> Result<Self::Weight<'a>> {
        let tensor = source.tensor(name)?;
        let (rows, cols) = matrix_shape(tensor.shape());
        Ok(CountWeight { shape: Shape { rows, cols }, bytes: tensor.matrix().bytes() })
    }

    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>> {
        let shape = Shape { rows: weight.shape.rows / parts, ..weight.shape };
        Ok(vec![CountWeight { shape, bytes: weight.bytes / parts }; parts])
    }

    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<Shape> {
        let tensor = source.tensor(name)?;
        let (rows, cols) = matrix_shape(tensor.shape());
        Ok(Shape { rows, cols })
    }

    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Shape> {
        Ok(Shape { rows: values.len() / cols, cols })
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Shape> {
        Ok(Shape { rows, cols })
    }

    fn read(&self, x: &Shape, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.resize(x.rows * x.cols, 0.0);
        Ok(())
    }

    fn rows(&self, x: &Shape, _: usize, count: usize) -> Result<Shape> {
        Ok(Shape { rows: count, ..*x })
    }

    fn columns(&self, x: &Shape, _: usize, count: usize) -> Result<Shape> {
        Ok(Shape { cols: count, ..*x })
    }

    fn gather(&self, x: &Shape, rows: &[u32]) -> Result<Shape> {
        Ok(Shape { rows: rows.len(), ..*x })
    }

    fn embed(&self, table: &CountWeight, tokens: &[u32]) -> Result<Shape> {
        self.read_bytes(tokens.len() as u128 * table.bytes as u128 / table.shape.rows.max(1) as u128);
        Ok(Shape { rows: tokens.len(), cols: table.shape.cols })
    }

    fn linear(&self, x: &Shape, weight: &CountWeight, _: Option<&Shape>) -> Result<Shape> {
        let y = Shape { rows: x.rows, cols: weight.shape.rows };
        self.read_bytes(x.rows as u128 * weight.bytes as u128);
        // A multiplication and an addition for each weight; the sum starts from the bias or from zero.
        self.each(y, 2 * x.cols as u128)
    }

    fn rms_norm(&self, x: &Shape, gain: &Shape, _: f32) -> Result<Shape> {
        // Square, sum, two factors; a division, an epsilon, a root and a reciprocal for each mean.
        self.flops(4 * x.elements() / gain.cols as u128);
        self.each(*x, 4)
    }

    fn layer_norm(&self, x: &Shape, _: &Shape, _: &Shape, _: f32) -> Result<Shape> {
        // Sum, difference, square, sum, two factors, bias; as above for the variance, and a division for the mean.
        self.flops(5 * x.rows as u128);
        self.each(*x, 7)
    }

    fn rope(&self, x: Shape, _: usize, _: &Shape, _: &Shape) -> Result<Shape> {
        // Four products and two sums for each pair.
        self.each(x, 3)
    }

    fn cache(&self, _: usize, head_dim: usize, _: usize) -> Result<CountCache> {
        Ok(CountCache { positions: 0, head_dim })
    }

    fn clear(&self, cache: &mut CountCache) {
        cache.positions = 0;
    }

    fn zero(&self, _: &mut Shape) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        query: Shape,
        _: Shape,
        _: Shape,
        cache: &mut CountCache,
        heads: usize,
        _: f32,
        window: usize,
    ) -> Result<Shape> {
        let visible: u128 = (1..=query.rows).map(|token| (cache.positions + token).min(window) as u128).sum();
        cache.positions += query.rows;
        // Two products of a head's width; scale, maximum, difference, exp, sum and division of the softmax.
        self.flops(heads as u128 * visible * (4 * cache.head_dim as u128 + 6));
        Ok(query)
    }

    fn silu_multiply(&self, gate: Shape, _: Shape) -> Result<Shape> {
        self.each(gate, 4)
    }

    fn add(&self, x: Shape, _: Shape) -> Result<Shape> {
        self.each(x, 1)
    }

    fn add_scaled(&self, x: Shape, _: &Shape, _: &Shape) -> Result<Shape> {
        self.each(x, 2)
    }

    fn relu(&self, x: Shape) -> Result<Shape> {
        self.each(x, 1)
    }

    fn silu(&self, x: Shape) -> Result<Shape> {
        self.each(x, 3)
    }

    fn softplus(&self, x: Shape) -> Result<Shape> {
        self.each(x, 3)
    }

    fn negative_exp(&self, x: Shape) -> Result<Shape> {
        self.each(x, 1)
    }

    fn clamp(&self, x: Shape, _: f32) -> Result<Shape> {
        self.each(x, 2)
    }

    fn round_to_grid(&self, x: Shape, _: &Shape, _: f32) -> Result<Shape> {
        self.each(x, 5)
    }

    fn depthwise_conv(&self, x: &Shape, weight: &Shape, _: Option<&Shape>, _: &mut Shape) -> Result<Shape> {
        self.each(*x, 2 * weight.cols as u128)
    }

    fn selective_scan(&self, scan: Scan<'_, Shape>, _: &mut Shape) -> Result<Shape> {
        // delta * a, exp, * h, + (delta * x) * b, c * h and its sum; delta * x and d * x once a channel.
        self.flops(scan.x.elements() * scan.a.cols as u128 * 7);
        self.each(*scan.x, 2)
    }

    fn resolvent(&self, v: &Shape, _: [f32; 2]) -> Result<Shape> {
        // The recursion below from both ends, and one more inversion that joins them.
        self.flops(v.rows as u128 * 30);
        Ok(Shape { rows: v.rows, cols: 2 })
    }

    fn carry(&self) -> Result<[f64; 2]> {
        Ok([0.0; 2])
    }

    fn causal_resolvent(&self, v: &Shape, _: [f32; 2], _: &mut [f64; 2]) -> Result<Shape> {
        // v - 2 - z - l: three real and two imaginary subtractions; five for the inverse of a complex number.
        self.flops(v.rows as u128 * 10);
        Ok(Shape { rows: v.rows, cols: 2 })
    }

    /// As many operations whichever experts are chosen: here each token takes the next ones in turn.
    fn route(&self, logits: &Shape, chosen: usize) -> Result<Routing<Shape>> {
        // A comparison with each logit for each choice; difference, exp, sum and division of the softmax.
        self.flops(logits.rows as u128 * chosen as u128 * (logits.cols as u128 + 4));
        let choices: Vec<u32> = (0..logits.rows * chosen).map(|choice| (choice % logits.cols) as u32).collect();
        let places = Place::by_expert(&choices, chosen, logits.cols);
        Ok(Routing { places, weights: Shape { rows: logits.rows, cols: chosen } })
    }

    fn scatter_add(&self, sum: Shape, y: &Shape, _: &[Place], _: &Shape) -> Result<Shape> {
        self.each(*y, 2)?;
        Ok(sum)
    }
}
