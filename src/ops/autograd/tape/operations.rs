//! Every operation, and how its gradient goes back.

use std::{convert::Infallible, sync::Arc};

use bkpack_kernels::cpu::top_k;

use super::{
    super::{norm, resolvent::Resolvent, scan::StateScan},
    Matrix, Node, TapeOps, Weight,
    attention::Attention,
    product::{multiply, transpose},
};
use crate::{
    error::Result,
    ops::{Ops, Place, Routing, Scan},
    tensor::TensorSource,
};

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The sum of the rows, in f64.
fn column_sums(gradient: &[f32], cols: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; cols];
    for row in gradient.chunks_exact(cols) {
        sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

impl TapeOps<'_> {
    /// A copy of rows in an order of their own.
    fn take_rows(&self, id: Option<usize>, values: &[f32], cols: usize, rows: &[u32]) -> Node {
        let whole = values.len();
        let taken = rows.iter().flat_map(|&row| &values[row as usize * cols..][..cols]).copied().collect();
        let rows = rows.to_vec();
        self.record((rows.len(), cols), Arc::new(taken), &[id], move |gradient, sums| {
            let Some(sum) = sums.of(id, whole) else { return };
            for (&row, gradient) in rows.iter().zip(gradient.chunks_exact(cols)) {
                let sum = &mut sum[row as usize * cols..][..cols];
                sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
            }
        })
    }
}

impl Ops for TapeOps<'_> {
    type Tensor = Node;
    type Weight<'a> = Weight;
    /// Whether a text was seen.
    type Cache = bool;
    type Carry = [f64; 2];
    type StepGraph = ();
    type Experts = Infallible;
    type Chosen = Infallible;

    fn weight(&self, source: &dyn TensorSource, name: &str) -> Result<Weight> {
        let (id, matrix) = self.load(source, name)?;
        Ok(Weight { id, offset: 0, whole: matrix.values.len(), matrix })
    }

    fn split<'a>(&self, weight: Self::Weight<'a>, parts: usize) -> Result<Vec<Self::Weight<'a>>> {
        let Weight { id, offset, whole, matrix } = weight;
        let (rows, length) = (matrix.rows / parts, matrix.values.len() / parts);
        let part = |part: usize| {
            let values = matrix.values[part * length..][..length].to_vec();
            Weight { id, offset: offset + part * length, whole, matrix: Matrix::new(rows, matrix.cols, values).into() }
        };
        Ok((0..parts).map(part).collect())
    }

    fn parameter(&self, source: &dyn TensorSource, name: &str) -> Result<Node> {
        let (id, matrix) = self.load(source, name)?;
        Ok(Node { id, rows: matrix.rows, cols: matrix.cols, values: matrix.values.clone() })
    }

    fn constant(&self, values: Vec<f32>, cols: usize) -> Result<Node> {
        Ok(Node { id: None, rows: values.len() / cols, cols, values: values.into() })
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Node> {
        Ok(Node { id: None, rows, cols, values: vec![0.0; rows * cols].into() })
    }

    fn read(&self, x: &Node, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&x.values);
        Ok(())
    }

    fn rows(&self, x: &Node, first: usize, count: usize) -> Result<Node> {
        let (id, cols, whole) = (x.id, x.cols, x.values.len());
        let values = x.values[first * cols..(first + count) * cols].to_vec();
        Ok(self.record((count, cols), values.into(), &[id], move |gradient, sums| {
            let Some(sum) = sums.of(id, whole) else { return };
            let sum = &mut sum[first * cols..(first + count) * cols];
            sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
        }))
    }

    fn columns(&self, x: &Node, first: usize, count: usize) -> Result<Node> {
        let (id, cols, whole) = (x.id, x.cols, x.values.len());
        let values: Vec<f32> =
            x.values.chunks_exact(cols).flat_map(|row| &row[first..first + count]).copied().collect();
        Ok(self.record((x.rows, count), values.into(), &[id], move |gradient, sums| {
            let Some(sum) = sums.of(id, whole) else { return };
            for (sum, gradient) in sum.chunks_exact_mut(cols).zip(gradient.chunks_exact(count)) {
                sum[first..first + count].iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
            }
        }))
    }

    fn gather(&self, x: &Node, rows: &[u32]) -> Result<Node> {
        Ok(self.take_rows(x.id, &x.values, x.cols, rows))
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Node> {
        assert_eq!(table.whole, table.matrix.values.len(), "a table is not split");
        Ok(self.take_rows(table.id, &table.matrix.values, table.matrix.cols, tokens))
    }

    fn linear(&self, x: &Node, weight: &Weight, bias: Option<&Node>) -> Result<Node> {
        let (cpu, rows, cols) = (self.cpu, weight.matrix.rows, weight.matrix.cols);
        let mut values = multiply(cpu, &x.values, &weight.matrix.values, cols);
        if let Some(bias) = bias {
            cpu.add_bias(&mut values, &bias.values);
        }
        let (x, weight, bias) = (x.clone(), weight.clone(), bias.and_then(|bias| bias.id));
        let inputs = [x.id, weight.id, bias];
        Ok(self.record((x.rows, rows), values.into(), &inputs, move |gradient, sums| {
            if bias.is_some() {
                sums.add(bias, column_sums(gradient, rows));
            }
            if x.id.is_some() {
                sums.add(x.id, multiply(cpu, gradient, weight.matrix.transposed(), rows));
            }
            if weight.id.is_none() || x.rows == 0 {
                return;
            }
            let found = multiply(cpu, &transpose(gradient, rows), &transpose(&x.values, cols), x.rows);
            if weight.whole == found.len() {
                sums.add(weight.id, found);
            } else if let Some(sum) = sums.of(weight.id, weight.whole) {
                sum[weight.offset..].iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
            }
        }))
    }

    fn rms_norm(&self, x: &Node, gain: &Node, epsilon: f32) -> Result<Node> {
        Ok(self.apply(norm::RmsNorm { epsilon: epsilon.into() }, [x, gain], (x.rows, x.cols)))
    }

    fn layer_norm(&self, x: &Node, gain: &Node, bias: &Node, epsilon: f32) -> Result<Node> {
        Ok(self.apply(norm::LayerNorm { epsilon: epsilon.into() }, [x, gain, bias], (x.rows, x.cols)))
    }

    fn rope(&self, x: Node, heads: usize, cos: &Node, sin: &Node) -> Result<Node> {
        let (cpu, head_dim) = (self.cpu, x.cols / heads);
        let mut values = x.values.to_vec();
        cpu.rope(&mut values, heads, head_dim, &cos.values, &sin.values);
        let (id, cos) = (x.id, cos.values.clone());
        let back: Vec<f32> = sin.values.iter().map(|sin| -sin).collect();
        Ok(self.record((x.rows, x.cols), values.into(), &[id], move |gradient, sums| {
            let mut gradient = gradient.to_vec();
            cpu.rope(&mut gradient, heads, head_dim, &cos, &back);
            sums.add(id, gradient);
        }))
    }

    fn cache(&self, _: usize, _: usize, _: usize) -> Result<bool> {
        Ok(false)
    }

    fn clear(&self, cache: &mut bool) {
        *cache = false;
    }

    fn zero(&self, x: &mut Node) -> Result<()> {
        *x = self.zeros(x.rows, x.cols)?;
        Ok(())
    }

    fn attention(
        &self,
        query: Node,
        key: Node,
        value: Node,
        seen: &mut bool,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<Node> {
        assert!(!std::mem::replace(seen, true), "a text runs in one call");
        let (tokens, head_dim) = (query.rows, query.cols / heads);
        let kv_heads = key.cols / head_dim;
        let attention = Attention { cpu: self.cpu, tokens, heads, kv_heads, head_dim, scale, window };
        let (values, weights) = attention.forward(&query.values, &key.values, &value.values);
        let (shape, inputs) = ((tokens, query.cols), [query.id, key.id, value.id]);
        Ok(self.record(shape, values.into(), &inputs, move |gradient, sums| {
            let gradients = attention.backward([&query, &key, &value].map(Node::values), &weights, gradient);
            inputs.into_iter().zip(gradients).for_each(|(id, gradient)| sums.add(id, gradient));
        }))
    }

    fn silu_multiply(&self, gate: Node, up: Node) -> Result<Node> {
        let mut values = gate.values.to_vec();
        self.cpu.silu_multiply(&mut values, &up.values);
        Ok(self.record((gate.rows, gate.cols), values.into(), &[gate.id, up.id], move |gradient, sums| {
            let (mut of_gate, mut of_up) = (Vec::with_capacity(gradient.len()), Vec::with_capacity(gradient.len()));
            for ((&gate, &up), &gradient) in gate.values.iter().zip(up.values.iter()).zip(gradient) {
                let share = sigmoid(gate);
                of_gate.push(gradient * up * share * (1.0 + gate * (1.0 - share)));
                of_up.push(gradient * gate * share);
            }
            sums.add(gate.id, of_gate);
            sums.add(up.id, of_up);
        }))
    }

    fn add(&self, x: Node, y: Node) -> Result<Node> {
        let mut values = x.values.to_vec();
        self.cpu.add(&mut values, &y.values);
        Ok(self.record((x.rows, x.cols), values.into(), &[x.id, y.id], move |gradient, sums| {
            sums.add(x.id, gradient.to_vec());
            sums.add(y.id, gradient.to_vec());
        }))
    }

    fn add_scaled(&self, x: Node, y: &Node, scale: &Node) -> Result<Node> {
        let (y, factor, of_scale) = (y.clone(), scale.values[0], scale.id);
        let mut values = x.values.to_vec();
        self.cpu.add_scaled(&mut values, &y.values, factor);
        Ok(self.record((x.rows, x.cols), values.into(), &[x.id, y.id, of_scale], move |gradient, sums| {
            sums.add(x.id, gradient.to_vec());
            sums.add(y.id, gradient.iter().map(|gradient| gradient * factor).collect());
            let products = gradient.iter().zip(y.values.iter()).map(|(&a, &b)| f64::from(a) * f64::from(b));
            sums.add(of_scale, vec![products.sum::<f64>() as f32]);
        }))
    }

    fn relu(&self, x: Node) -> Result<Node> {
        Ok(self.map(x, |values| self.cpu.relu(values), |x, _| if x > 0.0 { 1.0 } else { 0.0 }))
    }

    fn silu(&self, x: Node) -> Result<Node> {
        let slope = |x: f32, _| {
            let share = sigmoid(x);
            share * (1.0 + x * (1.0 - share))
        };
        Ok(self.map(x, |values| self.cpu.silu(values), slope))
    }

    fn softplus(&self, x: Node) -> Result<Node> {
        Ok(self.map(x, |values| self.cpu.softplus(values), |x, _| sigmoid(x)))
    }

    fn negative_exp(&self, x: Node) -> Result<Node> {
        Ok(self.map(x, |values| values.iter_mut().for_each(|value| *value = -value.exp()), |_, y| y))
    }

    fn clamp(&self, x: Node, limit: f32) -> Result<Node> {
        let slope = move |x: f32, _| if x.abs() <= limit { 1.0 } else { 0.0 };
        Ok(self.map(x, |values| self.cpu.clamp(values, -limit, limit), slope))
    }

    /// The gradient passes as if values within the grid's range were not rounded (straight-through).
    fn round_to_grid(&self, x: Node, scales: &Node, largest: f32) -> Result<Node> {
        let mut values = x.values.to_vec();
        self.cpu.round_to_grid(&mut values, &scales.values, largest);
        let scales = scales.values.clone();
        Ok(self.record((x.rows, x.cols), values.into(), &[x.id], move |gradient, sums| {
            let pairs = x.values.iter().zip(scales.iter()).zip(gradient);
            let pass = |((x, scale), gradient): ((&f32, &f32), &f32)| match x.abs() <= scale * largest {
                true => *gradient,
                false => 0.0,
            };
            sums.add(x.id, pairs.map(pass).collect());
        }))
    }

    fn depthwise_conv(&self, x: &Node, weight: &Node, bias: Option<&Node>, history: &mut Node) -> Result<Node> {
        let (tokens, channels, kernel) = (x.rows, x.cols, weight.cols);
        let padded = [&history.values[..], &x.values].concat(); // [kernel - 1 + tokens, channels]
        let (mut values, mut last) = (vec![0.0; tokens * channels], history.values.to_vec());
        let biases = bias.map(|bias| bias.values());
        self.cpu.depthwise_conv(&x.values, &weight.values, biases, &mut last, &mut values);
        *history = Node { id: None, rows: kernel - 1, cols: channels, values: last.into() };
        let taps = transpose(&weight.values, kernel); // [kernel, channels]
        let (of_x, of_weight, of_bias) = (x.id, weight.id, bias.and_then(|bias| bias.id));
        Ok(self.record((tokens, channels), values.into(), &[of_x, of_weight, of_bias], move |gradient, sums| {
            let mut before = vec![0.0; padded.len()];
            let mut of_taps = vec![0.0f32; taps.len()];
            for (token, gradient) in gradient.chunks_exact(channels).enumerate() {
                for tap in 0..kernel {
                    let place = (token + tap) * channels;
                    let (before, padded) = (&mut before[place..][..channels], &padded[place..][..channels]);
                    let (taps, of_taps) =
                        (&taps[tap * channels..][..channels], &mut of_taps[tap * channels..][..channels]);
                    for channel in 0..channels {
                        before[channel] += gradient[channel] * taps[channel];
                        of_taps[channel] += gradient[channel] * padded[channel];
                    }
                }
            }
            sums.add(of_x, before.split_off((kernel - 1) * channels));
            sums.add(of_weight, transpose(&of_taps, channels));
            if of_bias.is_some() {
                sums.add(of_bias, column_sums(gradient, channels));
            }
        }))
    }

    fn selective_scan(&self, scan: Scan<'_, Node>, state: &mut Node) -> Result<Node> {
        let (tokens, channels, states) = (scan.x.rows, scan.x.cols, scan.a.cols);
        let widths = [channels, channels, states, states];
        let parts = [scan.x, scan.delta, scan.b, scan.c].map(Node::clone);
        let width = 2 * (channels + states);
        let mut inputs = Vec::with_capacity(tokens * width);
        for token in 0..tokens {
            for (part, width) in parts.iter().zip(widths) {
                inputs.extend_from_slice(&part.values[token * width..][..width]);
            }
        }
        // The state of a text that begins has no gradient.
        let ids = parts.each_ref().map(|part| part.id);
        let joined = self.record((tokens, width), inputs.into(), &ids, move |gradient, sums| {
            let mut first = 0;
            for (id, width_of) in ids.into_iter().zip(widths) {
                let columns = gradient.chunks_exact(width).flat_map(|row| &row[first..first + width_of]);
                sums.add(id, columns.copied().collect());
                first += width_of;
            }
        });
        let function = StateScan { tokens, channels, states };
        let both = self.apply(function, [&joined, scan.a, state], (tokens + states, channels));
        let last = both.values[tokens * channels..].to_vec();
        *state = Node { id: None, rows: channels, cols: states, values: last.into() };
        let outputs = self.rows(&both, 0, tokens)?;
        let (x, d) = (scan.x.clone(), scan.d.clone());
        let skipped = |values: &mut Vec<f32>| {
            for (row, x) in values.chunks_exact_mut(channels).zip(x.values.chunks_exact(channels)) {
                row.iter_mut().zip(x).zip(d.values.iter()).for_each(|((value, x), d)| *value += x * d);
            }
        };
        let mut values = outputs.values.to_vec();
        skipped(&mut values);
        let ids = [outputs.id, x.id, d.id];
        Ok(self.record((tokens, channels), values.into(), &ids, move |gradient, sums| {
            sums.add(outputs.id, gradient.to_vec());
            let rows = gradient.chunks_exact(channels);
            sums.add(x.id, rows.flat_map(|row| row.iter().zip(d.values.iter()).map(|(g, d)| g * d)).collect());
            let products: Vec<f32> = gradient.iter().zip(x.values.iter()).map(|(g, x)| g * x).collect();
            sums.add(d.id, column_sums(&products, channels));
        }))
    }

    fn resolvent(&self, v: &Node, z: [f32; 2]) -> Result<Node> {
        Ok(self.apply::<1>(Resolvent { z: z.map(f64::from) }, [v], (v.rows, 2)))
    }

    fn carry(&self) -> Result<[f64; 2]> {
        Ok([0.0; 2])
    }

    fn causal_resolvent(&self, v: &Node, z: [f32; 2], last: &mut [f64; 2]) -> Result<Node> {
        let before = self.constant(last.iter().map(|&part| part as f32).collect(), 2)?;
        let result = self.apply::<2>(Resolvent { z: z.map(f64::from) }, [v, &before], (v.rows, 2));
        let row = &result.values[2 * (v.rows - 1)..];
        *last = [row[0].into(), row[1].into()];
        Ok(result)
    }

    fn route(&self, logits: &Node, chosen: usize) -> Result<Routing<Node>> {
        let (tokens, experts) = (logits.rows, logits.cols);
        let (mut experts_of, mut weights) = (vec![0; tokens * chosen], vec![0.0; tokens * chosen]);
        top_k(&logits.values, experts, chosen, &mut experts_of, &mut weights);
        let places = Place::by_expert(&experts_of, chosen, experts);
        let (id, weights) = (logits.id, Arc::new(weights));
        let kept = weights.clone();
        let weights = self.record((tokens, chosen), weights, &[id], move |gradient, sums| {
            let mut out = vec![0.0; tokens * experts];
            let rows =
                gradient.chunks_exact(chosen).zip(kept.chunks_exact(chosen)).zip(experts_of.chunks_exact(chosen));
            for (token, ((gradient, weights), experts_of)) in rows.enumerate() {
                let mean: f32 = gradient.iter().zip(weights).map(|(gradient, weight)| gradient * weight).sum();
                for ((gradient, weight), &expert) in gradient.iter().zip(weights).zip(experts_of) {
                    out[token * experts + expert as usize] = weight * (gradient - mean);
                }
            }
            sums.add(id, out);
        });
        Ok(Routing { places, weights })
    }

    fn scatter_add(&self, sum: Node, y: &Node, places: &[Place], weights: &Node) -> Result<Node> {
        let (cols, chosen, y, weights) = (y.cols, weights.cols, y.clone(), weights.clone());
        let mut values = sum.values.to_vec();
        let slot = move |place: &Place| place.token as usize * chosen + place.slot as usize;
        for (place, y) in places.iter().zip(y.values.chunks_exact(cols)) {
            let (weight, to) = (weights.values[slot(place)], &mut values[place.token as usize * cols..][..cols]);
            to.iter_mut().zip(y).for_each(|(to, y)| *to += weight * y);
        }
        let (ids, places) = ([sum.id, y.id, weights.id], places.to_vec());
        Ok(self.record((sum.rows, cols), values.into(), &ids, move |gradient, sums| {
            sums.add(ids[0], gradient.to_vec());
            let mut of_y = Vec::with_capacity(y.values.len());
            let mut of_weights = vec![0.0; weights.values.len()];
            for (place, y) in places.iter().zip(y.values.chunks_exact(cols)) {
                let gradient = &gradient[place.token as usize * cols..][..cols];
                let weight = weights.values[slot(place)];
                of_y.extend(gradient.iter().map(|gradient| gradient * weight));
                of_weights[slot(place)] = gradient.iter().zip(y).map(|(gradient, y)| gradient * y).sum();
            }
            sums.add(ids[1], of_y);
            sums.add(ids[2], of_weights);
        }))
    }
}
