//! The operations with their derivatives, recorded by candle: the same forward passes give gradients of every tensor.
//!
//! Of the two kept autodiff libraries that run on a CPU, candle-core 0.11 was chosen over burn 0.22. Its tensors carry
//! their type at run time, so one back end serves f32 and, for checks against finite differences, f64; an operation with
//! a derivative written by hand is one small trait, and matrices are multiplied by `gemm` on all cores. burn's pure-Rust
//! CPU back end, burn-ndarray, is deprecated as of 0.22, and its types carry the back end and the recording through every
//! signature; neither it nor its successor burn-flex was measured. candle-core takes about 230 seconds of one core to
//! build. A step, forward and backward, takes 0.2 seconds of one core and 237 MB for `fixtures/llama` with 256 tokens;
//! PyTorch 2.15 takes 0.14 and 823 MB.

mod attention;
mod elementwise;
mod function;
mod linear;
mod loss;
mod norm;
mod resolvent;
mod scan;
pub mod tape;
mod threads;

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bkpack_kernels::{Cpu, cpu::top_k};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};

use self::{
    attention::CausalSoftmax,
    elementwise::{Rope, SiluMultiply, Softplus},
    function::{apply1, apply2, apply3},
    linear::Product,
    loss::CrossEntropy,
    resolvent::Resolvent,
    scan::StateScan,
    threads::uncut,
};
use super::{Ops, Place, Routing, Scan};
use crate::{
    error::Result,
    tensor::{TensorSource, matrix_shape},
};

/// The type that everything is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    Single,
    /// For checks: eight times slower or more.
    Double,
}

/// The back end that records gradients, on the CPU.
///
/// Every tensor that a model loads becomes one variable, found again by its name: a model that is loaded a second time
/// from the same source shares the variables, and so does a head tied to the embedding.
#[derive(Debug)]
pub struct AutogradOps {
    cpu: Cpu,
    dtype: DType,
    variables: Mutex<BTreeMap<String, Var>>,
    outputs: Mutex<HashMap<String, Moments>>,
}

/// A matrix `[out, in]`: a variable, or a few of its rows.
#[derive(Clone, Debug)]
pub struct Weight {
    name: String,
    matrix: Tensor, // [out, in]
}

/// Keys and values of the positions that an attention layer has seen, each `[positions, kv_heads * head_dim]`.
#[derive(Debug, Default)]
pub struct Cache(Option<[Tensor; 2]>);

/// Sums over the values that products with one tensor had.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    pub count: u64,
    pub sum: f64,
    pub squares: f64,
}

impl Moments {
    /// Adds the sums of other values.
    pub fn add(&mut self, other: Moments) {
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// The mean squared distance to the mean; zero of no values.
    pub fn variance(&self) -> f64 {
        let count = self.count.max(1) as f64;
        (self.squares / count - (self.sum / count).powi(2)).max(0.0)
    }
}

/// What a thread that panicked left is whole: every change is one call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AutogradOps {
    /// A back end that knows no variables yet.
    pub fn new(cpu: Cpu, precision: Precision) -> Self {
        let dtype = match precision {
            Precision::Single => DType::F32,
            Precision::Double => DType::F64,
        };
        Self { cpu, dtype, variables: Mutex::default(), outputs: Mutex::default() }
    }

    /// The variables' names.
    pub fn names(&self) -> Vec<String> {
        locked(&self.variables).keys().cloned().collect()
    }

    /// The variable of a tensor, `[rows, last dimension]`; `None` if no model has loaded it.
    pub fn variable(&self, name: &str) -> Option<Var> {
        locked(&self.variables).get(name).cloned()
    }

    /// The sums over all values that [`Ops::linear`] and [`Ops::embed`] computed from each tensor since the last call.
    pub fn take_outputs(&self) -> HashMap<String, Moments> {
        std::mem::take(&mut locked(&self.outputs))
    }

    /// The mean negative log-likelihood of the targets, in nats: an f64 scalar from logits `[targets, vocabulary]`.
    pub fn mean_cross_entropy(&self, logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let losses = apply1(CrossEntropy { classes: logits.dim(1)?, targets: targets.to_vec() }, logits)?;
        Ok(losses.to_dtype(DType::F64)?.mean_all()?)
    }

    /// A scalar that `loss` computes.
    ///
    /// # Errors
    /// As `loss`.
    pub fn value(&self, loss: impl FnOnce() -> Result<Tensor> + Send) -> Result<f64> {
        uncut(|| Ok(loss()?.to_scalar()?))
    }

    /// A scalar that `loss` computes, and its gradients with respect to every variable.
    ///
    /// # Errors
    /// As `loss`.
    pub fn gradients(&self, loss: impl FnOnce() -> Result<Tensor> + Send) -> Result<(f64, Gradients)> {
        let (value, by_tensor) = uncut(|| -> Result<_> {
            let loss = loss()?;
            Ok((loss.to_scalar()?, loss.backward()?))
        })?;
        Ok((value, Gradients { by_tensor, variables: locked(&self.variables).clone() }))
    }

    fn load(&self, source: &dyn TensorSource, name: &str) -> Result<Tensor> {
        if let Some(known) = self.variable(name) {
            return Ok(known.as_tensor().clone());
        }
        let tensor = source.tensor(name)?;
        let mut values = vec![0.0f32; tensor.elements()];
        self.cpu.dequantize(&tensor.matrix(), 0, &mut values);
        let values = Tensor::from_vec(values, matrix_shape(tensor.shape()), &Device::Cpu)?.to_dtype(self.dtype)?;
        let variable = Var::from_tensor(&values)?;
        let tensor = variable.as_tensor().clone();
        locked(&self.variables).insert(name.to_owned(), variable);
        Ok(tensor)
    }

    fn indices(&self, indices: impl IntoIterator<Item = u32>) -> Result<Tensor> {
        Ok(Tensor::from_iter(indices, &Device::Cpu)?)
    }

    fn record(&self, name: &str, output: &Tensor) -> Result<()> {
        let moments = function::moments(output)?;
        locked(&self.outputs).entry(name.to_owned()).or_default().add(moments);
        Ok(())
    }
}

/// The gradients of one loss.
pub struct Gradients {
    by_tensor: GradStore,
    variables: BTreeMap<String, Var>,
}

impl Gradients {
    /// The mean absolute gradient of a tensor; zero where the loss does not depend on it.
    pub fn mean_absolute(&self, name: &str) -> Result<f64> {
        match self.variables.get(name).and_then(|variable| self.by_tensor.get(variable)) {
            Some(gradient) => Ok(function::mean_absolute(gradient)?),
            None => Ok(0.0),
        }
    }

    /// The sums of a tensor's squared gradients by row and by column; `None` where the loss does not depend on it.
    pub fn marginal_squares(&self, name: &str) -> Result<Option<[Vec<f64>; 2]>> {
        match self.variables.get(name).and_then(|variable| self.by_tensor.get(variable)) {
            Some(gradient) => Ok(Some(function::marginal_squares(gradient)?)),
            None => Ok(None),
        }
    }

    /// The gradient of a tensor, row-major, in the order of its values; `None` where the loss does not depend on it.
    pub fn get(&self, name: &str) -> Result<Option<Vec<f64>>> {
        match self.variables.get(name).and_then(|variable| self.by_tensor.get(variable)) {
            Some(gradient) => Ok(Some(gradient.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)),
            None => Ok(None),
        }
    }
}

impl Ops for AutogradOps {
    type Tensor = Tensor;
    type Weight<'a> = Weight;
    type Cache = Cache;
    type Carry = [f64; 2];
    type StepGraph = ();
    type Experts = Infallible;
    type Chosen = Infallible;

    fn weight(&self, source: &dyn TensorSource, name: &str) -> Result<Weight> {
        Ok(Weight { name: name.to_owned(), matrix: self.load(source, name)? })
    }

    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>> {
        let rows = weight.matrix.dim(0)? / parts;
        let part = |part: usize| {
            let matrix = weight.matrix.narrow(0, part * rows, rows)?;
            Ok(Weight { name: weight.name.clone(), matrix })
        };
        (0..parts).map(part).collect()
    }

    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<Tensor> {
        self.load(source, name)
    }

    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Tensor> {
        let rows = values.len() / cols;
        Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?.to_dtype(self.dtype)?)
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(Tensor::zeros((rows, cols), self.dtype, &Device::Cpu)?)
    }

    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        *out = x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
        Ok(())
    }

    fn rows(&self, x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
        Ok(x.narrow(0, first, count)?)
    }

    fn columns(&self, x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
        Ok(x.narrow(1, first, count)?.contiguous()?)
    }

    fn gather(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        Ok(x.index_select(&self.indices(rows.iter().copied())?, 0)?)
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Tensor> {
        let rows = self.gather(&table.matrix, tokens)?;
        self.record(&table.name, &rows)?;
        Ok(rows)
    }

    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let product = x.contiguous()?.apply_op2(&weight.matrix, Product { cpu: self.cpu })?;
        let output = match bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        };
        self.record(&weight.name, &output)?;
        Ok(output)
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor, epsilon: f32) -> Result<Tensor> {
        Ok(apply2(norm::RmsNorm { epsilon: epsilon.into() }, x, gain)?)
    }

    fn layer_norm(&self, x: &Tensor, gain: &Tensor, bias: &Tensor, epsilon: f32) -> Result<Tensor> {
        Ok(apply3(norm::LayerNorm { epsilon: epsilon.into() }, x, gain, bias)?)
    }

    fn rope(&self, x: Tensor, heads: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let angles = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
        let rope = Rope { heads, half: cos.dim(1)?, cos: angles(cos)?, sin: angles(sin)? };
        Ok(apply1(rope, &x)?)
    }

    fn cache(&self, _: usize, _: usize, _: usize) -> Result<Cache> {
        Ok(Cache::default())
    }

    fn clear(&self, cache: &mut Cache) {
        *cache = Cache::default();
    }

    fn zero(&self, x: &mut Tensor) -> Result<()> {
        *x = x.zeros_like()?;
        Ok(())
    }

    fn attention(
        &self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: &mut Cache,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<Tensor> {
        let (tokens, cols) = query.dims2()?;
        let head_dim = cols / heads;
        let kv_heads = key.dim(1)? / head_dim;
        let [key, value] = match cache.0.take() {
            Some([keys, values]) => [Tensor::cat(&[keys, key], 0)?, Tensor::cat(&[values, value], 0)?],
            None => [key, value],
        };
        let positions = key.dim(0)?;
        cache.0 = Some([key.clone(), value.clone()]);
        let by_head = |x: &Tensor, heads: usize| {
            let rows = x.dim(0)?;
            x.reshape((rows, heads, head_dim))?.transpose(0, 1)?.contiguous()
        };
        // Heads that share keys are one matrix, so that keys are never copied.
        let query = by_head(&query, heads)?.reshape((kv_heads, heads / kv_heads * tokens, head_dim))?;
        let (key, value) = (by_head(&key, kv_heads)?, by_head(&value, kv_heads)?); // [kv_heads, positions, head_dim]
        let scores = query.matmul(&key.transpose(1, 2)?)?; // [kv_heads, heads / kv_heads * tokens, positions]
        let weights = apply1(CausalSoftmax { tokens, positions, window, scale: scale.into() }, &scores)?;
        let attended = weights.matmul(&value)?.reshape((heads, tokens, head_dim))?;
        Ok(attended.transpose(0, 1)?.contiguous()?.reshape((tokens, cols))?)
    }

    fn silu_multiply(&self, gate: Tensor, up: Tensor) -> Result<Tensor> {
        Ok(apply2(SiluMultiply, &gate, &up)?)
    }

    fn add(&self, x: Tensor, y: Tensor) -> Result<Tensor> {
        Ok((x + y)?)
    }

    fn add_scaled(&self, x: Tensor, y: &Tensor, scale: &Tensor) -> Result<Tensor> {
        Ok((x + y.broadcast_mul(scale)?)?)
    }

    fn relu(&self, x: Tensor) -> Result<Tensor> {
        Ok(x.relu()?)
    }

    fn silu(&self, x: Tensor) -> Result<Tensor> {
        Ok(x.silu()?)
    }

    fn softplus(&self, x: Tensor) -> Result<Tensor> {
        Ok(apply1(Softplus, &x)?)
    }

    fn negative_exp(&self, x: Tensor) -> Result<Tensor> {
        Ok(x.exp()?.neg()?)
    }

    fn clamp(&self, x: Tensor, limit: f32) -> Result<Tensor> {
        Ok(x.clamp(-f64::from(limit), f64::from(limit))?)
    }

    /// The gradient passes as if values within the grid's range were not rounded (straight-through).
    fn round_to_grid(&self, x: Tensor, scales: &Tensor, largest: f32) -> Result<Tensor> {
        let limits = (scales * f64::from(largest))?;
        let clipped = x.minimum(&limits)?.maximum(&limits.neg()?)?;
        let (mut values, mut steps) = (Vec::new(), Vec::new());
        self.read(&x, &mut values)?;
        self.read(scales, &mut steps)?;
        self.cpu.round_to_grid(&mut values, &steps, largest);
        let rounded = Tensor::from_vec(values, x.dims(), &Device::Cpu)?.to_dtype(self.dtype)?;
        Ok((&clipped + (rounded - clipped.detach())?)?)
    }

    fn depthwise_conv(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        history: &mut Tensor,
    ) -> Result<Tensor> {
        let ((tokens, channels), kernel) = (x.dims2()?, weight.dim(1)?);
        let padded = if kernel > 1 { Tensor::cat(&[&*history, x], 0)? } else { x.clone() };
        let tap = |j: usize| {
            let weights = weight.narrow(1, j, 1)?.reshape((1, channels))?;
            padded.narrow(0, j, tokens)?.broadcast_mul(&weights)
        };
        let mut sum = tap(0)?;
        for j in 1..kernel {
            sum = (sum + tap(j)?)?;
        }
        if kernel > 1 {
            *history = padded.narrow(0, tokens, kernel - 1)?.contiguous()?;
        }
        match bias {
            Some(bias) => Ok(sum.broadcast_add(bias)?),
            None => Ok(sum),
        }
    }

    fn selective_scan(&self, scan: Scan<'_, Tensor>, state: &mut Tensor) -> Result<Tensor> {
        let ((tokens, channels), states) = (scan.x.dims2()?, scan.a.dim(1)?);
        let inputs = Tensor::cat(&[scan.x, scan.delta, scan.b, scan.c], 1)?; // [tokens, 2 * (channels + states)]
        let both = apply3(StateScan { tokens, channels, states }, &inputs, scan.a, state)?;
        let outputs = both.narrow(0, 0, tokens * channels)?.reshape((tokens, channels))?;
        *state = both.narrow(0, tokens * channels, channels * states)?.reshape((channels, states))?;
        Ok((outputs + scan.x.broadcast_mul(scan.d)?)?)
    }

    fn resolvent(&self, v: &Tensor, z: [f32; 2]) -> Result<Tensor> {
        Ok(apply1(Resolvent { z: z.map(f64::from) }, v)?)
    }

    fn carry(&self) -> Result<[f64; 2]> {
        Ok([0.0; 2])
    }

    fn causal_resolvent(&self, v: &Tensor, z: [f32; 2], last: &mut [f64; 2]) -> Result<Tensor> {
        let before = Tensor::from_vec(last.to_vec(), (1, 2), &Device::Cpu)?.to_dtype(self.dtype)?;
        let values = apply2(Resolvent { z: z.map(f64::from) }, v, &before)?; // [positions, 2]
        let row = values.narrow(0, v.dim(0)? - 1, 1)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        last.copy_from_slice(&row);
        Ok(values)
    }

    fn route(&self, logits: &Tensor, chosen: usize) -> Result<Routing<Tensor>> {
        let (tokens, experts) = logits.dims2()?;
        let mut values = Vec::new();
        self.read(logits, &mut values)?;
        let (mut experts_of, mut weights) = (vec![0; tokens * chosen], vec![0.0; tokens * chosen]);
        top_k(&values, experts, chosen, &mut experts_of, &mut weights);
        let places = Place::by_expert(&experts_of, chosen, experts);
        let indices = Tensor::from_vec(experts_of, (tokens, chosen), &Device::Cpu)?;
        let logits = logits.gather(&indices, 1)?;
        // The largest comes first, and what is subtracted from all has no gradient.
        let powers = logits.broadcast_sub(&logits.narrow(1, 0, 1)?.detach())?.exp()?;
        Ok(Routing { places, weights: powers.broadcast_div(&powers.sum_keepdim(1)?)? })
    }

    fn scatter_add(&self, sum: Tensor, y: &Tensor, places: &[Place], weights: &Tensor) -> Result<Tensor> {
        let chosen = weights.dim(1)? as u32;
        let slots = self.indices(places.iter().map(|place| place.token * chosen + place.slot))?;
        let weights = weights.flatten_all()?.index_select(&slots, 0)?.reshape((places.len(), 1))?;
        let tokens = self.indices(places.iter().map(|place| place.token))?;
        Ok(sum.index_add(&tokens, &y.broadcast_mul(&weights)?, 0)?)
    }
}
