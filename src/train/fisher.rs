//! The Fisher information of a model's matrices: how much its predictions mind a change of each weight.

use std::collections::HashMap;

use bkpack_kernels::Cpu;

use super::gradients::Differentiator;
use crate::{
    error::{Error, Result},
    model::sample::Sampler,
    ops::autograd::{AutogradOps, Precision},
    pack::tied_head,
    policy::{ComponentRules, PLAIN},
    progress::{Observer, Unit},
    tensor::{TensorSource, matrix_shape},
};

/// The share of a row's information that is every row's alike: a token that the text lacks matters to other texts.
const COMMON: f64 = 0.1;

/// Half the diagonal of a matrix's Fisher information, in nats a token, as the product `rows[i] * cols[j]`.
///
/// To second order, changing the matrix by `E` moves the distribution of the next token by a Kullback-Leibler divergence
/// of `sum_ij rows[i] cols[j] E_ij^2`. That the information is a product of its marginals is Adafactor's assumption
/// (Shazeer and Stern, arXiv 1804.04235): what few windows tell is spread over rows and columns, and takes no more memory
/// than these.
#[derive(Clone, Debug)]
pub struct Fisher {
    pub name: String,
    pub rows: Vec<f64>,
    /// With a mean of one.
    pub cols: Vec<f32>,
}

/// A matrix that a policy can quantize.
struct Quantizable<'a> {
    name: &'a str,
    component: String,
    rows: usize,
    cols: usize,
}

/// The information of every matrix that a policy can quantize, in the source's order, over the first `windows` of
/// `tokens`. One that the text does not reach (an expert that is never chosen) is taken for the mean
/// of what it reaches of the component, or of the model.
///
/// Memory is that of the model in F32, its gradients and what one window computes.
///
/// # Errors
/// As [`Differentiator`]'s; [`Error::Gradient`] where a gradient is NaN or infinite; [`Error::Cancelled`].
pub fn measure(
    cpu: Cpu,
    source: &dyn TensorSource,
    tokens: &[u32],
    (windows, ctx): (usize, Option<usize>),
    rules: &ComponentRules,
    observer: &dyn Observer,
) -> Result<Vec<Fisher>> {
    let ops = AutogradOps::new(cpu, Precision::Single);
    let differentiator = Differentiator::new(source, &ops, ctx, 1)?;
    let protocol = differentiator.protocol();
    let windows = differentiator.windows(tokens, windows)?;
    let matrices = quantizable(source, rules)?;
    let mut sums: Vec<[Vec<f64>; 2]> =
        matrices.iter().map(|matrix| [vec![0.0; matrix.rows], vec![0.0; matrix.cols]]).collect();
    let mut sampler = Sampler::new(cpu, 1.0, 1.0, 0)?;
    observer.begin("Differentiating", (windows.len() * protocol.ctx) as u64, Unit::Tokens);
    for (index, window) in windows.iter().enumerate() {
        observer.check()?;
        let gradients = differentiator.fisher_gradients(window, &mut sampler)?.gradients;
        for (matrix, sums) in matrices.iter().zip(&mut sums) {
            let Some(squares) = gradients.marginal_squares(matrix.name)? else { continue };
            if !squares[1].iter().all(|square| square.is_finite()) {
                let (path, tensor) = (source.path().to_owned(), matrix.name.to_owned());
                return Err(Error::Gradient { path, tensor, window: index });
            }
            for (sums, squares) in sums.iter_mut().zip(squares) {
                sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
            }
        }
        observer.advance(protocol.ctx as u64);
    }
    observer.end();

    let (mut totals, mut all): (HashMap<&str, [f64; 2]>, _) = (HashMap::new(), [0.0; 2]);
    for (matrix, [rows, _]) in matrices.iter().zip(&sums) {
        let sum = rows.iter().sum::<f64>();
        // What was not reached must not make its like look cheap.
        if sum > 0.0 {
            for [total, elements] in [totals.entry(&matrix.component).or_default(), &mut all] {
                *total += sum;
                *elements += (matrix.rows * matrix.cols) as f64;
            }
        }
    }
    // The gradient of a mean over tokens, each of which adds its own at random: a token's square is that many times it.
    let scale = 0.5 * (protocol.ctx - protocol.skip) as f64 / windows.len() as f64;
    let fisher = matrices.iter().zip(&sums).map(|(matrix, [rows, cols])| {
        let [total, elements] = totals.get(matrix.component.as_str()).copied().unwrap_or(all);
        let (rows, cols) = product(rows, cols, total / elements.max(1.0), scale);
        Fisher { name: matrix.name.to_owned(), rows, cols }
    });
    Ok(fisher.collect())
}

/// Every tensor that is neither plain nor a tied head.
fn quantizable<'a>(source: &'a dyn TensorSource, rules: &ComponentRules) -> Result<Vec<Quantizable<'a>>> {
    let architecture = source.config().and_then(|config| config["architectures"][0].as_str());
    let tied = tied_head(source)?;
    let mut found = Vec::new();
    for name in source.names().iter().filter(|name| tied != Some(name.as_str())) {
        let shape = source.shape(name).expect("a name of the source");
        let component = rules.component(architecture, name, shape).to_owned();
        if component != PLAIN {
            let (rows, cols) = matrix_shape(shape);
            found.push(Quantizable { name, component, rows, cols });
        }
    }
    Ok(found)
}

/// The factors for rows and columns from the sums of squared gradients by row and by column, times `scale`. `like` is the
/// sum for one weight elsewhere, for a matrix that has none.
fn product(rows: &[f64], cols: &[f64], like: f64, scale: f64) -> (Vec<f64>, Vec<f32>) {
    let total: f64 = rows.iter().sum();
    if total == 0.0 {
        return (vec![scale * like; rows.len()], vec![1.0; cols.len()]);
    }
    let mean = total / rows.len() as f64;
    let by_row = rows.iter().map(|row| scale * ((1.0 - COMMON) * row + COMMON * mean) / cols.len() as f64);
    let by_col = cols.iter().map(|col| (col / total * cols.len() as f64) as f32);
    (by_row.collect(), by_col.collect())
}
