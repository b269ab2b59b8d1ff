//! The operations on the CPU, on weights exactly as they lie in the file.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use bkpack_kernels::{
    Arithmetic, Cpu, Matrix,
    cpu::{KeyValueCache, SelectiveScan, top_k},
};
use serde::Serialize;
use smallvec::{SmallVec, smallvec};

use super::{Ops, Place, Routing, Scan, angles, recorder::InputRecorder};
use crate::{
    error::{Error, Result},
    tensor::{Tensor, TensorSource},
};

/// How activations enter the product with a quantized weight. Plain weights always see them in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// In f32: what is measured is the cost of the packed weights alone.
    #[default]
    Exact,
    /// Rounded to 8-bit integers: faster, at a further small cost. On the CPU alone.
    Int8,
    /// Rounded to BF16 where more than eight tokens run together: faster, at a further small cost. On the GPU alone.
    Bf16,
}

impl Activations {
    /// The name on the command line and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Activations::Exact => "exact",
            Activations::Int8 => "int8",
            Activations::Bf16 => "bf16",
        }
    }

    /// Refuses what the CPU does not compute.
    ///
    /// # Errors
    /// [`Error::Option`] for BF16.
    pub fn check_cpu(self) -> Result<()> {
        let why = || "bf16 is computed on the GPU alone (--device cuda); here pass exact or int8".into();
        if self == Activations::Bf16 { Err(Error::Option { option: "--activations", why: why() }) } else { Ok(()) }
    }

    /// What the kernels compute.
    fn arithmetic(self) -> Arithmetic {
        match self {
            Activations::Exact => Arithmetic::Exact,
            Activations::Int8 => Arithmetic::Int8,
            Activations::Bf16 => unreachable!("no CPU back end is made for it"),
        }
    }
}

/// The CPU back end.
#[derive(Debug)]
pub struct CpuOps {
    cpu: Cpu,
    activations: Activations,
    free: Arc<FreeBuffers>,
    recorder: Option<Arc<InputRecorder>>,
}

/// A matrix as it is stored, under its name where it is a whole tensor.
#[derive(Debug)]
pub struct CpuWeight<'a> {
    /// That of `tensor` where it borrows, made once: lengths are checked whenever it is made.
    matrix: Option<Matrix<'a>>,
    tensor: Tensor<'a>,
    name: Option<String>,
}

impl<'a> CpuWeight<'a> {
    fn new(tensor: Tensor<'a>, name: Option<String>) -> Self {
        Self { matrix: tensor.borrowed_matrix(), tensor, name }
    }

    fn matrix(&self) -> Matrix<'_> {
        self.matrix.unwrap_or_else(|| self.tensor.matrix())
    }
}

impl CpuOps {
    /// A back end on the instruction set of `cpu`, in the caller's thread pool.
    ///
    /// # Panics
    /// For activations that [`Activations::check_cpu`] refuses, which a caller asks first.
    pub fn new(cpu: Cpu, activations: Activations) -> Self {
        assert!(activations.check_cpu().is_ok(), "only a GPU computes with BF16 activations");
        Self { cpu, activations, free: Arc::default(), recorder: None }
    }

    /// The same, showing the inputs of linear layers to a recorder.
    pub fn recording(cpu: Cpu, recorder: Arc<InputRecorder>) -> Self {
        Self { recorder: Some(recorder), ..Self::new(cpu, Activations::Exact) }
    }

    /// The same values in a buffer of their own.
    pub fn copy(&self, x: &Values) -> Values {
        let mut out = self.scratch(x.rows(), x.cols);
        out.buffer.copy_from_slice(&x.buffer);
        out
    }

    /// Shows the recorder, if there is one, the input of a weight.
    pub fn record(&self, weight: &str, x: &Values) {
        if let Some(recorder) = &self.recorder {
            recorder.record(self.cpu, weight, &x.buffer, x.cols);
        }
    }

    /// Values yet to be written, `[rows, cols]`.
    fn scratch(&self, rows: usize, cols: usize) -> Values {
        Values { buffer: self.free.take(rows * cols), cols, free: Some(self.free.clone()) }
    }
}

/// Values in memory, `[rows, cols]`.
#[derive(Debug)]
pub struct Values {
    buffer: Vec<f32>, // [rows, cols]
    cols: usize,
    /// Where the buffer came from, to be used again once the values are dropped.
    free: Option<Arc<FreeBuffers>>,
}

impl Values {
    fn rows(&self) -> usize {
        self.buffer.len() / self.cols
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        if let Some(free) = &self.free {
            free.give(std::mem::take(&mut self.buffer));
        }
    }
}

/// Buffers that wait to be used again: a fresh large one costs a page fault every 4 KiB.
#[derive(Debug, Default)]
struct FreeBuffers(Mutex<Vec<Vec<f32>>>);

impl FreeBuffers {
    fn take(&self, len: usize) -> Vec<f32> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = buffers.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= len);
        match fitting.min_by_key(|(_, buffer)| buffer.capacity()).map(|(index, _)| index) {
            Some(index) => {
                let mut buffer = buffers.swap_remove(index);
                buffer.resize(len, 0.0);
                buffer
            }
            None => vec![0.0; len],
        }
    }

    fn give(&self, buffer: Vec<f32>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

impl Ops for CpuOps {
    type Tensor = Values;
    type Weight<'a> = CpuWeight<'a>;
    type Cache = KeyValueCache;
    type Carry = [f64; 2];
    type StepGraph = ();
    type Experts = Infallible;
    type Chosen = Infallible;

    fn weight<'a>(&self, source: &'a dyn TensorSource, name: &str) -> Result<CpuWeight<'a>> {
        Ok(CpuWeight::new(source.tensor(name)?, Some(name.to_owned())))
    }

    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>> {
        Ok(weight.tensor.split(parts).into_iter().map(|tensor| CpuWeight::new(tensor, None)).collect())
    }

    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<Values> {
        let tensor = source.tensor(name)?;
        let matrix = tensor.matrix();
        let mut out = self.scratch(matrix.rows(), matrix.cols());
        self.cpu.dequantize(&matrix, 0, &mut out.buffer);
        Ok(out)
    }

    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Values> {
        Ok(Values { buffer: values, cols, free: None })
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Values> {
        let mut out = self.scratch(rows, cols);
        out.buffer.fill(0.0);
        Ok(out)
    }

    fn read(&self, x: &Values, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&x.buffer);
        Ok(())
    }

    fn values<'a>(&self, x: &'a Values, _: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        Ok(&x.buffer)
    }

    fn rows(&self, x: &Values, first: usize, count: usize) -> Result<Values> {
        let mut out = self.scratch(count, x.cols);
        out.buffer.copy_from_slice(&x.buffer[first * x.cols..][..count * x.cols]);
        Ok(out)
    }

    fn columns(&self, x: &Values, first: usize, count: usize) -> Result<Values> {
        let mut out = self.scratch(x.rows(), count);
        for (to, from) in out.buffer.chunks_exact_mut(count).zip(x.buffer.chunks_exact(x.cols)) {
            to.copy_from_slice(&from[first..first + count]);
        }
        Ok(out)
    }

    fn gather(&self, x: &Values, rows: &[u32]) -> Result<Values> {
        let mut out = self.scratch(rows.len(), x.cols);
        for (to, &row) in out.buffer.chunks_exact_mut(x.cols).zip(rows) {
            to.copy_from_slice(&x.buffer[row as usize * x.cols..][..x.cols]);
        }
        Ok(out)
    }

    fn embed(&self, table: &CpuWeight<'_>, tokens: &[u32]) -> Result<Values> {
        let table = table.matrix();
        let mut out = self.scratch(tokens.len(), table.cols());
        self.cpu.gather_rows(&table, tokens, &mut out.buffer);
        Ok(out)
    }

    fn linear(&self, x: &Values, weight: &CpuWeight<'_>, bias: Option<&Values>) -> Result<Values> {
        let [out] = self.linears(x, [(weight, bias)])?;
        Ok(out)
    }

    fn linears<const N: usize>(
        &self,
        x: &Values,
        layers: [(&CpuWeight<'_>, Option<&Values>); N],
    ) -> Result<[Values; N]> {
        if self.recorder.is_some() {
            layers.iter().filter_map(|(weight, _)| weight.name.as_ref()).for_each(|name| self.record(name, x));
        }
        let weights = layers.map(|(weight, _)| weight.matrix());
        let mut products = weights.map(|weight| self.scratch(x.rows(), weight.rows()));
        let mut outs = products.each_mut().map(|product| &mut product.buffer[..]);
        self.cpu.matmul_group(&x.buffer, &weights, &mut outs, self.activations.arithmetic());
        for (product, (_, bias)) in products.iter_mut().zip(layers) {
            if let Some(bias) = bias {
                self.cpu.add_bias(&mut product.buffer, &bias.buffer);
            }
        }
        Ok(products)
    }

    fn rms_norm(&self, x: &Values, gain: &Values, epsilon: f32) -> Result<Values> {
        let mut out = self.scratch(x.rows(), x.cols);
        self.cpu.rms_norm(&x.buffer, &gain.buffer, epsilon, &mut out.buffer);
        Ok(out)
    }

    fn layer_norm(&self, x: &Values, gain: &Values, bias: &Values, epsilon: f32) -> Result<Values> {
        let mut out = self.scratch(x.rows(), x.cols);
        self.cpu.layer_norm(&x.buffer, &gain.buffer, &bias.buffer, epsilon, &mut out.buffer);
        Ok(out)
    }

    fn rotations(&self, frequencies: &[f32], first: usize, tokens: usize) -> Result<(Values, Values)> {
        let (mut cos, mut sin) = (self.scratch(tokens, frequencies.len()), self.scratch(tokens, frequencies.len()));
        let turns = cos.buffer.iter_mut().zip(&mut sin.buffer);
        for ((cos, sin), angle) in turns.zip(angles(frequencies, first, tokens)) {
            (*cos, *sin) = (angle.cos(), angle.sin());
        }
        Ok((cos, sin))
    }

    fn rope(&self, mut x: Values, heads: usize, cos: &Values, sin: &Values) -> Result<Values> {
        let head_dim = x.cols / heads;
        self.cpu.rope(&mut x.buffer, heads, head_dim, &cos.buffer, &sin.buffer);
        Ok(x)
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<KeyValueCache> {
        Ok(KeyValueCache::new(kv_heads, head_dim, capacity))
    }

    fn clear(&self, cache: &mut KeyValueCache) {
        cache.clear();
    }

    fn zero(&self, x: &mut Values) -> Result<()> {
        x.buffer.fill(0.0);
        Ok(())
    }

    fn attention(
        &self,
        query: Values,
        key: Values,
        value: Values,
        cache: &mut KeyValueCache,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<Values> {
        cache.append(&key.buffer, &value.buffer);
        let mut out = self.scratch(query.rows(), query.cols);
        self.cpu.attention(&query.buffer, heads, cache, scale, window, &mut out.buffer);
        Ok(out)
    }

    fn silu_multiply(&self, mut gate: Values, up: Values) -> Result<Values> {
        self.cpu.silu_multiply(&mut gate.buffer, &up.buffer);
        Ok(gate)
    }

    fn add(&self, mut x: Values, y: Values) -> Result<Values> {
        self.cpu.add(&mut x.buffer, &y.buffer);
        Ok(x)
    }

    fn add_scaled(&self, mut x: Values, y: &Values, scale: &Values) -> Result<Values> {
        self.cpu.add_scaled(&mut x.buffer, &y.buffer, scale.buffer[0]);
        Ok(x)
    }

    fn relu(&self, mut x: Values) -> Result<Values> {
        self.cpu.relu(&mut x.buffer);
        Ok(x)
    }

    fn silu(&self, mut x: Values) -> Result<Values> {
        self.cpu.silu(&mut x.buffer);
        Ok(x)
    }

    fn softplus(&self, mut x: Values) -> Result<Values> {
        self.cpu.softplus(&mut x.buffer);
        Ok(x)
    }

    fn negative_exp(&self, mut x: Values) -> Result<Values> {
        x.buffer.iter_mut().for_each(|x| *x = -x.exp());
        Ok(x)
    }

    fn clamp(&self, mut x: Values, limit: f32) -> Result<Values> {
        self.cpu.clamp(&mut x.buffer, -limit, limit);
        Ok(x)
    }

    fn round_to_grid(&self, mut x: Values, scales: &Values, largest: f32) -> Result<Values> {
        self.cpu.round_to_grid(&mut x.buffer, &scales.buffer, largest);
        Ok(x)
    }

    fn depthwise_conv(
        &self,
        x: &Values,
        weight: &Values,
        bias: Option<&Values>,
        history: &mut Values,
    ) -> Result<Values> {
        let mut out = self.scratch(x.rows(), x.cols);
        let bias = bias.map(|bias| &bias.buffer[..]);
        self.cpu.depthwise_conv(&x.buffer, &weight.buffer, bias, &mut history.buffer, &mut out.buffer);
        Ok(out)
    }

    fn selective_scan(&self, scan: Scan<'_, Values>, state: &mut Values) -> Result<Values> {
        let mut out = self.scratch(scan.x.rows(), scan.x.cols);
        let scan = SelectiveScan {
            x: &scan.x.buffer,
            delta: &scan.delta.buffer,
            a: &scan.a.buffer,
            b: &scan.b.buffer,
            c: &scan.c.buffer,
            d: &scan.d.buffer,
        };
        self.cpu.selective_scan(&scan, &mut state.buffer, &mut out.buffer);
        Ok(out)
    }

    fn resolvent(&self, v: &Values, z: [f32; 2]) -> Result<Values> {
        let mut out = self.scratch(v.rows(), 2);
        self.cpu.resolvent(&v.buffer, z, &mut out.buffer);
        Ok(out)
    }

    fn carry(&self) -> Result<[f64; 2]> {
        Ok([0.0; 2])
    }

    fn causal_resolvent(&self, v: &Values, z: [f32; 2], last: &mut [f64; 2]) -> Result<Values> {
        let mut out = self.scratch(v.rows(), 2);
        self.cpu.resolvent_causal(&v.buffer, z, last, &mut out.buffer);
        Ok(out)
    }

    fn route(&self, logits: &Values, chosen: usize) -> Result<Routing<Values>> {
        let (tokens, experts) = (logits.rows(), logits.cols);
        let mut weights = self.scratch(tokens, chosen);
        let mut experts_of: SmallVec<[u32; 16]> = smallvec![0; tokens * chosen]; // [tokens, chosen]
        top_k(&logits.buffer, experts, chosen, &mut experts_of, &mut weights.buffer);
        Ok(Routing { places: Place::by_expert(&experts_of, chosen, experts), weights })
    }

    fn scatter_add(&self, mut sum: Values, y: &Values, places: &[Place], weights: &Values) -> Result<Values> {
        let cols = sum.cols;
        for (from, place) in y.buffer.chunks_exact(cols).zip(places) {
            let (token, slot) = (place.token as usize, place.slot as usize);
            let weight = weights.buffer[token * weights.cols + slot];
            self.cpu.add_scaled(&mut sum.buffer[token * cols..][..cols], from, weight);
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_grow_with_the_position() {
        let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
        let (cos, sin) = ops.rotations(&[1.0, 0.01], 3, 2).unwrap();
        let expected = [3.0f64, 0.03, 4.0, 0.04];
        assert_eq!((cos.rows(), sin.rows()), (2, 2));
        for ((cos, sin), angle) in cos.buffer.iter().zip(&sin.buffer).zip(expected) {
            assert!((f64::from(*cos) - angle.cos()).abs() < 1e-6 && (f64::from(*sin) - angle.sin()).abs() < 1e-6);
        }
    }

    #[test]
    fn the_pool_of_buffers_does_not_grow_with_the_work() {
        let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
        let work = || {
            let x = ops.constant(vec![1.0; 64], 8).unwrap();
            let sum = ops.add(ops.zeros(8, 8).unwrap(), ops.rows(&x, 0, 8).unwrap()).unwrap();
            ops.relu(sum).unwrap();
            ops.free.0.lock().unwrap().len()
        };
        let first = work();
        assert!(first > 0 && (0..100).all(|_| work() == first));
    }
}
