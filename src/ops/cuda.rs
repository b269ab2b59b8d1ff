//! The operations on an NVIDIA card, on weights exactly as they lie in the file.

use std::rc::Rc;

use bkpack_kernels::{
    Cpu,
    cuda::{
        Cuda, DeviceCache, DeviceCarry, DeviceExperts, DeviceMatrix, DeviceScan, DeviceValues, Precision, StepGraph,
    },
};

use super::{Ops, Place, Routing, Scan, Step, cpu::Activations};
use crate::{
    error::{Error, Result},
    tensor::TensorSource,
};

/// The back end of a card.
#[derive(Debug)]
pub struct CudaOps {
    cuda: Rc<Cuda>,
    precision: Precision,
}

impl CudaOps {
    /// A back end on a card.
    ///
    /// # Errors
    /// [`Error::Option`] for 8-bit activations, for which the card has no kernels.
    pub fn new(cuda: Rc<Cuda>, activations: Activations) -> Result<Self> {
        let precision = match activations {
            Activations::Exact => Precision::Exact,
            Activations::Bf16 => Precision::Bfloat,
            Activations::Int8 => {
                let why = "int8 is computed on the CPU alone; pass exact or bf16, or --device cpu".into();
                return Err(Error::Option { option: "--activations", why });
            }
        };
        Ok(Self { cuda, precision })
    }
}

/// The experts of one token, known to the card alone.
#[derive(Debug)]
pub struct Chosen {
    choices: DeviceValues, // [1, chosen]
    weights: DeviceValues, // [1, chosen]
}

impl Ops for CudaOps {
    type Tensor = DeviceValues;
    type Weight<'a> = DeviceMatrix;
    type Cache = DeviceCache;
    type Carry = DeviceCarry;
    type StepGraph = StepGraph;
    type Experts = DeviceExperts;
    type Chosen = Chosen;

    fn weight<'a>(&self, source: &'a dyn TensorSource, name: &str) -> Result<Self::Weight<'a>> {
        Ok(self.cuda.matrix(&source.tensor(name)?.matrix())?)
    }

    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>> {
        Ok(weight.split(parts))
    }

    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<DeviceValues> {
        let tensor = source.tensor(name)?;
        let matrix = tensor.matrix();
        let mut values = vec![0.0; matrix.rows() * matrix.cols()];
        // Small, and the same on every instruction set.
        Cpu::detect().dequantize(&matrix, 0, &mut values);
        Ok(self.cuda.values(&values, matrix.cols())?)
    }

    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<DeviceValues> {
        Ok(self.cuda.values(&values, cols)?)
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<DeviceValues> {
        Ok(self.cuda.zeros(rows, cols)?)
    }

    fn read(&self, x: &DeviceValues, out: &mut Vec<f32>) -> Result<()> {
        Ok(self.cuda.read(x, out)?)
    }

    fn rows(&self, x: &DeviceValues, first: usize, count: usize) -> Result<DeviceValues> {
        Ok(self.cuda.rows(x, first, count)?)
    }

    fn columns(&self, x: &DeviceValues, first: usize, count: usize) -> Result<DeviceValues> {
        Ok(self.cuda.columns(x, first, count)?)
    }

    fn gather(&self, x: &DeviceValues, rows: &[u32]) -> Result<DeviceValues> {
        Ok(self.cuda.gather(x, rows)?)
    }

    fn embed(&self, table: &DeviceMatrix, tokens: &[u32]) -> Result<DeviceValues> {
        Ok(self.cuda.embed(table, tokens)?)
    }

    fn linear(&self, x: &DeviceValues, weight: &DeviceMatrix, bias: Option<&DeviceValues>) -> Result<DeviceValues> {
        Ok(self.cuda.linear(x, weight, bias, self.precision)?)
    }

    fn rms_norm(&self, x: &DeviceValues, gain: &DeviceValues, epsilon: f32) -> Result<DeviceValues> {
        Ok(self.cuda.rms_norm(x, gain, epsilon)?)
    }

    fn layer_norm(
        &self,
        x: &DeviceValues,
        gain: &DeviceValues,
        bias: &DeviceValues,
        epsilon: f32,
    ) -> Result<DeviceValues> {
        Ok(self.cuda.layer_norm(x, gain, bias, epsilon)?)
    }

    fn rope(&self, x: DeviceValues, heads: usize, cos: &DeviceValues, sin: &DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.rope(x, heads, cos, sin)?)
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<DeviceCache> {
        Ok(self.cuda.cache(kv_heads, head_dim, capacity)?)
    }

    fn clear(&self, cache: &mut DeviceCache) {
        cache.clear();
    }

    fn zero(&self, x: &mut DeviceValues) -> Result<()> {
        Ok(self.cuda.zero(x)?)
    }

    fn attention(
        &self,
        query: DeviceValues,
        key: DeviceValues,
        value: DeviceValues,
        cache: &mut DeviceCache,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<DeviceValues> {
        Ok(self.cuda.attention(&query, &key, &value, cache, heads, scale, window)?)
    }

    fn silu_multiply(&self, gate: DeviceValues, up: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.silu_multiply(gate, &up)?)
    }

    fn add(&self, x: DeviceValues, y: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.add(x, &y)?)
    }

    fn add_scaled(&self, x: DeviceValues, y: &DeviceValues, scale: &DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.add_scaled(x, y, scale)?)
    }

    fn relu(&self, x: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.relu(x)?)
    }

    fn silu(&self, x: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.silu(x)?)
    }

    fn softplus(&self, x: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.softplus(x)?)
    }

    fn negative_exp(&self, x: DeviceValues) -> Result<DeviceValues> {
        Ok(self.cuda.negative_exp(x)?)
    }

    fn clamp(&self, x: DeviceValues, limit: f32) -> Result<DeviceValues> {
        Ok(self.cuda.clamp(x, limit)?)
    }

    fn round_to_grid(&self, x: DeviceValues, scales: &DeviceValues, largest: f32) -> Result<DeviceValues> {
        Ok(self.cuda.round_to_grid(x, scales, largest)?)
    }

    fn depthwise_conv(
        &self,
        x: &DeviceValues,
        weight: &DeviceValues,
        bias: Option<&DeviceValues>,
        history: &mut DeviceValues,
    ) -> Result<DeviceValues> {
        Ok(self.cuda.depthwise_conv(x, weight, bias, history)?)
    }

    fn selective_scan(&self, scan: Scan<'_, DeviceValues>, state: &mut DeviceValues) -> Result<DeviceValues> {
        let Scan { x, delta, a, b, c, d } = scan;
        Ok(self.cuda.selective_scan(DeviceScan { x, delta, a, b, c, d }, state)?)
    }

    fn resolvent(&self, v: &DeviceValues, z: [f32; 2]) -> Result<DeviceValues> {
        Ok(self.cuda.resolvent(v, z)?)
    }

    fn carry(&self) -> Result<DeviceCarry> {
        Ok(self.cuda.carry()?)
    }

    fn clear_carry(&self, last: &mut DeviceCarry) -> Result<()> {
        Ok(self.cuda.clear_carry(last)?)
    }

    fn causal_resolvent(&self, v: &DeviceValues, z: [f32; 2], last: &mut DeviceCarry) -> Result<DeviceValues> {
        Ok(self.cuda.causal_resolvent(v, z, last)?)
    }

    fn route(&self, logits: &DeviceValues, chosen: usize) -> Result<Routing<DeviceValues>> {
        let (choices, weights) = self.cuda.route(logits, chosen)?;
        let mut numbers = Vec::new();
        self.cuda.read(&choices, &mut numbers)?;
        let choices: Vec<u32> = numbers.iter().map(|&number| number as u32).collect();
        Ok(Routing { places: Place::by_expert(&choices, chosen, logits.cols()), weights })
    }

    fn scatter_add(
        &self,
        sum: DeviceValues,
        y: &DeviceValues,
        places: &[Place],
        weights: &DeviceValues,
    ) -> Result<DeviceValues> {
        let places: Vec<[u32; 2]> = places.iter().map(|place| [place.token, place.slot]).collect();
        Ok(self.cuda.scatter_add(sum, y, &places, weights)?)
    }

    fn repeats_steps(&self) -> bool {
        true
    }

    fn step(
        &self,
        graph: &mut StepGraph,
        Step { token, position }: Step,
        run: &mut dyn FnMut() -> Result<DeviceValues>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        self.cuda.step(graph, (token, position), run, out)
    }

    fn embed_step(&self, table: &DeviceMatrix, _: Step) -> Result<DeviceValues> {
        Ok(self.cuda.embed_step(table)?)
    }

    fn embed_at_step(&self, table: &DeviceMatrix, _: Step) -> Result<DeviceValues> {
        Ok(self.cuda.embed_at_step(table)?)
    }

    fn row_at_step(&self, x: &DeviceValues, _: Step) -> Result<DeviceValues> {
        Ok(self.cuda.row_at_step(x)?)
    }

    fn experts(&self, layers: &[(&DeviceMatrix, Option<&DeviceValues>)]) -> Result<DeviceExperts> {
        Ok(self.cuda.experts(layers)?)
    }

    fn route_step(&self, logits: &DeviceValues, chosen: usize) -> Result<Chosen> {
        let (choices, weights) = self.cuda.route(logits, chosen)?;
        Ok(Chosen { choices, weights })
    }

    fn linear_chosen(&self, x: &DeviceValues, layers: &DeviceExperts, chosen: &Chosen) -> Result<DeviceValues> {
        Ok(self.cuda.linear_chosen(x, layers, &chosen.choices)?)
    }

    fn sum_chosen(&self, y: &DeviceValues, chosen: &Chosen) -> Result<DeviceValues> {
        Ok(self.cuda.weighted_sum(y, &chosen.weights)?)
    }
}
