//! Sensitivity: what each encoding of each matrix would cost, in nats a token of Kullback-Leibler divergence.
//!
//! The errors of an encoding, weighted by the [Fisher information](super::fisher), predict how the cost is spread over the
//! matrices of one kind and over encodings of like width. How large it is, short measurements tell: all matrices of a kind in a third of
//! the blocks are quantized, at two widths, and the model's divergence is measured.

use std::collections::{BTreeMap, HashMap};

use bkpack_kernels::{
    Cpu, Grid, Layout,
    cpu::quantize::{QuantizeOptions, Range, Rounding},
};

use super::fisher::{self, Fisher};
use crate::{
    encoding::{GroupSize, Request},
    error::{Error, Result},
    eval::probe::Probe,
    model::{Model, config::check_not_synthetic},
    ops::cpu::{Activations, CpuOps},
    pack::{DEFAULT_TERNARY_THRESHOLD, first_non_finite},
    policy::{ComponentRules, Cost, Sensitivity, TensorSensitivity, budget::candidates},
    progress::{Observer, Unit},
    quant::{
        self, Quantized,
        cost::{Curvature, float_cost, quantized_cost},
    },
    tensor::{Tensor, TensorSource},
};

/// What to measure on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Windows to differentiate on; the short measurements are on others behind them, where the text has any.
    pub windows: usize,
    /// Tokens of a window; see [`Protocol::new`](crate::eval::perplexity::Protocol::new).
    pub ctx: Option<usize>,
    /// How weights will be rounded.
    pub rounding: Rounding,
}

/// Windows to differentiate on, unless told otherwise.
pub const DEFAULT_WINDOWS: usize = 8;

/// Windows that short measurements look at, at most.
pub const MOST_PROBE_WINDOWS: usize = 8;

/// Tokens that a short measurement looks at, if they fit the windows.
const PROBE_TOKENS: usize = 1024;

/// Widths that are measured, the coarser first.
const PROBE_BITS: [u32; 2] = [2, 4];

/// Parts that the blocks are measured in.
const DEPTHS: usize = 3;

/// Matrices that are measured together.
struct Group {
    /// Indices.
    matrices: Vec<usize>,
    /// The first block that they belong to; `None` for those outside of the blocks.
    start: Option<usize>,
}

/// Predicts what every encoding of every matrix costs.
///
/// Memory is that of [`fisher::measure`].
///
/// # Errors
/// As [`fisher::measure`] and [`Probe::divergence`]; [`Error::Synthetic`] for random weights; [`Error::NonFinite`] for NaN or
/// infinite ones.
pub fn measure(
    cpu: Cpu,
    source: &dyn TensorSource,
    tokens: &[u32],
    options: &Options,
    rules: &ComponentRules,
    observer: &dyn Observer,
) -> Result<Sensitivity> {
    check_not_synthetic(source)?;
    let fisher = fisher::measure(cpu, source, tokens, (options.windows, options.ctx), rules, observer)?;
    let costing = Costing { cpu, source, rounding: options.rounding };
    let elements = |matrix: &Fisher| (matrix.rows.len() * matrix.cols.len()) as u64;
    observer.begin("Costing", 4 * fisher.iter().map(elements).sum::<u64>(), Unit::Bytes);
    let mut costs = Vec::with_capacity(fisher.len());
    for matrix in &fisher {
        costs.push(costing.costs(matrix, observer)?);
        observer.advance(4 * elements(matrix));
    }
    observer.end();

    let ops = CpuOps::new(cpu, Activations::Exact);
    let model = Model::load(source, &ops)?;
    let ctx = options.ctx.unwrap_or(model.max_positions().min(512));
    let all: Vec<&[u32]> = tokens.chunks_exact(ctx).collect();
    let count = PROBE_TOKENS.div_ceil(ctx).min(MOST_PROBE_WINDOWS).min(all.len());
    let first = options.windows.min(all.len() - count);
    let groups = groups(&model, &fisher);
    let mut starts: Vec<usize> = groups.iter().filter_map(|group| group.start).collect();
    starts.sort_unstable();
    starts.dedup();
    observer.begin("Probing", (groups.len() * PROBE_BITS.len() * count * ctx) as u64, Unit::Tokens);
    let probe = Probe::new(cpu, &ops, source, &all[first..first + count], starts)?;
    for group in &groups {
        let mut points = Vec::new();
        for bits in PROBE_BITS {
            observer.check()?;
            let mut changed = HashMap::new();
            let mut predicted = 0.0;
            for &index in &group.matrices {
                let request = probed(bits, fisher[index].cols.len());
                predicted += cost_of(&costs[index], request);
                changed.insert(fisher[index].name.clone(), costing.quantize(&fisher[index], request)?);
            }
            points.push(Point { predicted, measured: probe.divergence(changed, group.start)? });
            observer.advance((count * ctx) as u64);
        }
        let [coarse, fine] = points[..] else { unreachable!("a point for each width") };
        // What the Fisher information tells of one matrix is believed by half: among many, those that look the cheapest
        // are often those that it is most wrong about.
        let shares = group.matrices.iter().map(|&index| {
            let own = cost_of(&costs[index], probed(PROBE_BITS[1], fisher[index].cols.len()));
            (own * elements(&fisher[index]) as f64).sqrt()
        });
        let shares: Vec<f64> = shares.collect();
        let whole: f64 = shares.iter().sum();
        for (&index, share) in group.matrices.iter().zip(shares) {
            correct(&mut costs[index], fisher[index].cols.len(), coarse, fine, share / whole);
        }
    }
    observer.end();
    let tensors = fisher.into_iter().zip(costs).map(|(matrix, costs)| {
        let cost = |(request, cost): (Request, f64)| Cost { encoding: request.to_string(), cost };
        TensorSensitivity { name: matrix.name, options: costs.into_iter().map(cost).collect() }
    });
    Ok(Sensitivity { version: 1, tensors: tensors.collect() })
}

/// The matrices of one kind in one part of the blocks, together.
fn groups(model: &Model<CpuOps>, fisher: &[Fisher]) -> Vec<Group> {
    let prefixes = model.block_prefixes();
    let mut groups: BTreeMap<(usize, String), Group> = BTreeMap::new();
    for (index, matrix) in fisher.iter().enumerate() {
        let block = prefixes.iter().position(|prefix| matrix.name.starts_with(prefix));
        let rest = block.map_or(matrix.name.as_str(), |block| &matrix.name[prefixes[block].len()..]);
        // Experts, and whatever else is numbered, are of one kind.
        let fields = rest.split('.').map(|field| if field.parse::<u64>().is_ok() { "*" } else { field });
        let kind = fields.collect::<Vec<_>>().join(".");
        let depth = block.map(|block| block * DEPTHS / prefixes.len());
        let start = depth.map(|depth| (depth * prefixes.len()).div_ceil(DEPTHS));
        let group = groups.entry((depth.unwrap_or(DEPTHS), kind));
        group.or_insert(Group { matrices: Vec::new(), start }).matrices.push(index);
    }
    groups.into_values().collect()
}

/// The encoding that is measured at a width.
fn probed(bits: u32, cols: usize) -> Request {
    let group = if cols > 128 { GroupSize::Columns(128) } else { GroupSize::WholeRow };
    Request::Quantize { grid: Grid::Int { bits, symmetric: true }, group }
}

fn cost_of(costs: &[(Request, f64)], request: Request) -> f64 {
    costs.iter().find(|(known, _)| *known == request).expect("a candidate").1
}

/// What a group was predicted to cost at one width, and what it did.
#[derive(Clone, Copy, Debug)]
struct Point {
    predicted: f64,
    measured: f64,
}

/// Makes the predicted costs of a matrix such that those of its group come to the measured one at the finer width, and to
/// about that at the coarser, by a power law: divergences grow otherwise than squared errors once these are large. `share`
/// is the matrix's part of its group's cost.
fn correct(costs: &mut [(Request, f64)], cols: usize, coarse: Point, fine: Point, share: f64) {
    /// What a measured divergence cannot be told from zero below.
    const LEAST: f64 = 1e-9;
    let own = cost_of(costs, probed(PROBE_BITS[1], cols));
    if own <= 0.0 || coarse.predicted <= fine.predicted {
        return;
    }
    let [coarse_log, fine_log] = [coarse, fine].map(|point| point.measured.max(LEAST).ln());
    let power = (coarse_log - fine_log) / (coarse.predicted / fine.predicted).ln();
    // Noise must not make fewer bits look better.
    let power = power.clamp(0.3, 2.0);
    for (_, cost) in costs {
        // Beyond the finer of the two, where errors are small, cost is in proportion to them.
        let relative = *cost / own;
        let relative = if relative < 1.0 { relative } else { relative.powf(power) };
        *cost = share * fine.measured.max(LEAST) * relative;
    }
}

/// Predicts costs from the Fisher information.
struct Costing<'a> {
    cpu: Cpu,
    source: &'a dyn TensorSource,
    rounding: Rounding,
}

impl Costing<'_> {
    /// What each encoding costs a matrix.
    fn costs(&self, matrix: &Fisher, observer: &dyn Observer) -> Result<Vec<(Request, f64)>> {
        let tensor = self.source.tensor(&matrix.name)?;
        let values = tensor.matrix();
        let curvature = Curvature { rows: &matrix.rows, cols: &matrix.cols };
        let range = quant::range(self.cpu, &values, values.cols());
        if range.non_finite > 0 {
            let (path, name) = (self.source.path().to_owned(), matrix.name.clone());
            let first = first_non_finite(self.cpu, &tensor);
            return Err(Error::NonFinite { path, tensor: name, count: range.non_finite, first });
        }
        let mut ranges = HashMap::new();
        let mut costs = Vec::new();
        for request in candidates(values.cols()) {
            observer.check()?;
            let cost = match request {
                Request::Keep => 0.0,
                Request::Float(dtype) => float_cost(self.cpu, &values, dtype, curvature),
                Request::Quantize { grid, group } => {
                    let layout = Layout { grid, group: group.columns(values.cols()) };
                    let range =
                        *ranges.entry(layout.group).or_insert_with(|| quant::range(self.cpu, &values, layout.group));
                    quantized_cost(self.cpu, &values, &self.options(layout, range), curvature)
                }
            };
            // A float type that cannot hold a weight is no candidate.
            if cost.is_finite() {
                costs.push((request, cost));
            }
        }
        Ok(costs)
    }

    fn options(&self, layout: Layout, range: Range) -> QuantizeOptions {
        let scale_type = quant::scale_type(layout, range);
        QuantizeOptions { layout, scale_type, rounding: self.rounding, ternary_threshold: DEFAULT_TERNARY_THRESHOLD }
    }

    /// The matrix in one encoding.
    fn quantize(&self, matrix: &Fisher, request: Request) -> Result<Tensor<'static>> {
        let Request::Quantize { grid, group } = request else { unreachable!("integers are measured") };
        let tensor = self.source.tensor(&matrix.name)?;
        let values = tensor.matrix();
        let layout = Layout { grid, group: group.columns(values.cols()) };
        let options = self.options(layout, quant::range(self.cpu, &values, layout.group));
        let mut quantized = Quantized::default();
        quant::quantize(self.cpu, &values, &options, &mut quantized);
        let data = quantized.into_data(&options);
        Ok(Tensor::new(tensor.shape().to_vec(), data).expect("quantized to this layout"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corrected_costs_meet_what_was_measured() {
        // Two matrices, the second with four times the errors; int3 lies between the measured widths, int6 beyond.
        let request = |bits| probed(bits, 256);
        let predicted = |factor: f64| {
            [(2, 64.0), (3, 16.0), (4, 4.0), (6, 0.25)].map(|(bits, cost)| (request(bits), factor * cost)).to_vec()
        };
        let mut matrices = [predicted(1.0), predicted(4.0)];
        let (coarse, fine) = (Point { predicted: 320.0, measured: 0.9 }, Point { predicted: 20.0, measured: 0.1 });
        for (costs, share) in matrices.iter_mut().zip([1.0 / 3.0, 2.0 / 3.0]) {
            correct(costs, 256, coarse, fine, share);
        }
        let sum = |bits| matrices.iter().map(|costs| cost_of(costs, request(bits))).sum::<f64>();
        assert!((sum(4) - 0.1).abs() < 1e-12 && (sum(2) - 0.9).abs() < 1e-12, "{} {}", sum(4), sum(2));
        assert!((sum(3) - 0.3).abs() < 1e-12, "the geometric mean: {}", sum(3));
        assert!((sum(6) - 0.1 / 16.0).abs() < 1e-12, "in proportion to the errors: {}", sum(6));
        assert_eq!(cost_of(&matrices[1], request(4)), 2.0 * cost_of(&matrices[0], request(4)));

        // A matrix of zeros stays free, and so does one whose group showed nothing to go by.
        let mut zeros = vec![(request(2), 0.0), (request(4), 0.0)];
        correct(&mut zeros, 256, coarse, fine, 0.0);
        assert!(zeros.iter().all(|(_, cost)| *cost == 0.0));
        // Measurements the wrong way round still leave fewer bits the costlier.
        let mut noisy = predicted(1.0);
        correct(
            &mut noisy,
            256,
            Point { predicted: 64.0, measured: 0.1 },
            Point { predicted: 4.0, measured: 0.2 },
            1.0,
        );
        assert!(noisy.is_sorted_by(|a, b| a.1 > b.1), "{noisy:?}");
    }
}
