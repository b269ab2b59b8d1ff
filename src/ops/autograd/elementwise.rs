//! Element-wise operations and the rotary position embedding, each one node of the graph: of plain operations they would
//! be three to ten, with a tensor and a gradient each.

use candle_core::WithDType;
use rayon::prelude::*;

use super::function::Function;

/// Elements of one task.
const TASK: usize = 1 << 12;

/// `log(1 + exp(x))`, of a small relative error for large negative values, too.
pub(super) struct Softplus;

/// `gate / (1 + exp(-gate)) * up`.
pub(super) struct SiluMultiply;

/// Turns element `i` of each head with element `i + head_dim / 2`: `[tokens, heads * head_dim]`.
pub(super) struct Rope {
    pub heads: usize,
    /// Half of `head_dim`.
    pub half: usize,
    pub cos: Vec<f64>, // [tokens, half]
    pub sin: Vec<f64>, // [tokens, half]
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Function<1> for Softplus {
    const NAME: &str = "softplus";

    fn shape(&self, [x]: [&[usize]; 1]) -> Vec<usize> {
        x.to_vec()
    }

    fn forward<T: WithDType>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        x.par_iter().with_min_len(TASK).map(|x| T::from_f64(softplus(x.to_f64()))).collect()
    }

    fn backward<T: WithDType>(&self, [x]: [&[T]; 1], _: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        let pairs = x.par_iter().zip(gradient).with_min_len(TASK);
        [pairs.map(|(x, gradient)| T::from_f64(gradient.to_f64() * sigmoid(x.to_f64()))).collect()]
    }
}

impl Function<2> for SiluMultiply {
    const NAME: &str = "gated SiLU";

    fn shape(&self, [gate, _]: [&[usize]; 2]) -> Vec<usize> {
        gate.to_vec()
    }

    fn forward<T: WithDType>(&self, [gate, up]: [&[T]; 2]) -> Vec<T> {
        let value = |(gate, up): (&T, &T)| T::from_f64(gate.to_f64() * sigmoid(gate.to_f64()) * up.to_f64());
        gate.par_iter().zip(up).with_min_len(TASK).map(value).collect()
    }

    fn backward<T: WithDType>(&self, [gate, up]: [&[T]; 2], _: &[T], gradient: &[T]) -> [Vec<T>; 2] {
        let both = |((gate, up), gradient): ((&T, &T), &T)| {
            let (gate, gradient) = (gate.to_f64(), gradient.to_f64());
            let share = sigmoid(gate);
            let slope = share * (1.0 + gate * (1.0 - share));
            (T::from_f64(gradient * up.to_f64() * slope), T::from_f64(gradient * gate * share))
        };
        gate.par_iter().zip(up).zip(gradient).with_min_len(TASK).map(both).unzip().into()
    }
}

impl Rope {
    /// Turns by the angles times `direction`, 1 or -1.
    fn turn<T: WithDType>(&self, x: &[T], direction: f64) -> Vec<T> {
        let mut out = Vec::with_capacity(x.len());
        for (row, (cos, sin)) in x.chunks_exact(2 * self.half * self.heads).zip(self.angles()) {
            for head in row.chunks_exact(2 * self.half) {
                let (first, second) = head.split_at(self.half);
                let turned = |x: &[T], y: &[T], direction: f64, out: &mut Vec<T>| {
                    let angles = cos.iter().zip(sin);
                    let elements = x.iter().zip(y).zip(angles);
                    out.extend(
                        elements
                            .map(|((x, y), (cos, sin))| T::from_f64(x.to_f64() * cos - direction * y.to_f64() * sin)),
                    );
                };
                turned(first, second, direction, &mut out);
                turned(second, first, -direction, &mut out);
            }
        }
        out
    }

    fn angles(&self) -> impl Iterator<Item = (&[f64], &[f64])> {
        self.cos.chunks_exact(self.half).zip(self.sin.chunks_exact(self.half))
    }
}

impl Function<1> for Rope {
    const NAME: &str = "rope";

    fn shape(&self, [x]: [&[usize]; 1]) -> Vec<usize> {
        x.to_vec()
    }

    fn forward<T: WithDType>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        self.turn(x, 1.0)
    }

    fn backward<T: WithDType>(&self, _: [&[T]; 1], _: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        [self.turn(gradient, -1.0)]
    }
}
