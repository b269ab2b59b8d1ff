//! Scales for quantized activations, from what the model computes on a calibration text.

use bkpack_kernels::Cpu;
use rayon::prelude::*;

use super::text::window_bos;
use crate::{
    error::{Error, Result},
    model::{
        Model, check_tokens,
        core_activations::{COMPONENT, CoreTrace, largest_code, scale_name},
    },
    ops::cpu::{Activations, CpuOps},
    progress::{Observer, Unit},
    tensor::{ActivationQuantization, CalibrationText, TensorSource},
};

/// The widths that the core's activations can have.
pub const WIDTHS: [u32; 2] = [8, 4];

/// The shares of the largest magnitude that are tried as the largest value of a group's grid.
const SHARES: std::ops::RangeInclusive<u32> = 30..=100; // per cent

/// What was calibrated: the record for the manifest and its tensors.
#[derive(Clone, Debug)]
pub struct Calibration {
    pub record: ActivationQuantization,
    /// Name, shape `[3, groups]` and values of each layer's scales.
    pub scales: Vec<(String, Vec<usize>, Vec<f32>)>,
}

/// Reads a component and its width: `bk_core=int8` or `bk_core=int4`.
///
/// # Errors
/// A sentence that names these.
pub fn parse_core_width(text: &str) -> Result<u32, &'static str> {
    match text.strip_prefix(COMPONENT).and_then(|rest| rest.strip_prefix('=')) {
        Some("int8") => Ok(8),
        Some("int4") => Ok(4),
        _ => Err("use bk_core=int8 or bk_core=int4"),
    }
}

/// Positions that share a scale: each position has its own at 8 bits, 128 share one at 4.
pub fn group_size(bits: u32) -> usize {
    if bits == 8 { 1 } else { 128 }
}

/// Runs at most `samples` windows of the model's whole context and sets the scales of v, Re G and Im G of each layer's
/// Birman-Schwinger core: those with the least absolute error on these windows.
///
/// # Errors
/// As [`Model::load`]; [`Error::NoCore`] for an architecture without such a core; [`Error::Option`] for a width that is
/// none of [`WIDTHS`] or no samples; [`Error::Tokens`] where the text does not fill one window; [`Error::Output`] where
/// the model computes NaN or infinity; [`Error::Cancelled`].
pub fn calibrate_core(
    cpu: Cpu,
    source: &dyn TensorSource,
    tokens: &[u32],
    (text, bits, samples): (CalibrationText, u32, usize),
    observer: &dyn Observer,
) -> Result<Calibration> {
    if !WIDTHS.contains(&bits) || samples == 0 {
        let why = format!("{samples} samples at {bits} bits; at least 1 sample, and 8 or 4 bits, are needed");
        return Err(Error::Option { option: "--samples, --activations", why });
    }
    let ops = CpuOps::new(cpu, Activations::Exact);
    let mut model = Model::load(source, &ops)?;
    model.keep_core_exact();
    let layers = model.core_layers();
    if layers == 0 {
        return Err(Error::NoCore { path: source.path().to_owned() });
    }
    check_tokens(&text.name, tokens, model.vocab_size())?;
    let positions = model.max_positions();
    let windows: Vec<&[u32]> = tokens.chunks_exact(positions).take(samples).collect();
    if windows.is_empty() {
        let why = format!("{} tokens do not fill one window of {positions}, the model's context", tokens.len());
        return Err(Error::Tokens { source_name: text.name, why });
    }

    let mut state = model.state(positions)?;
    state.record_core();
    let mut traces: Vec<Vec<CoreTrace>> = Vec::with_capacity(windows.len()); // [windows, layers]
    observer.begin("Calibrating", (windows.len() * positions) as u64, Unit::Tokens);
    let bos = window_bos(source)?;
    for window in &windows {
        observer.check()?;
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        state.clear(&ops)?;
        model.forward(&window, &mut state)?;
        traces.push(state.core().to_vec());
        observer.advance(positions as u64);
    }
    observer.end();

    let group = group_size(bits);
    let groups = positions.div_ceil(group);
    let scales: Vec<_> = (0..layers)
        .map(|layer| {
            let values: Vec<f32> = (0..3 * groups)
                .into_par_iter()
                .map(|index| {
                    let (row, first) = (index / groups, index % groups * group);
                    let last = (first + group).min(positions);
                    let windows = traces.iter().map(|layers| &layers[layer].exact.rows()[row][first..last]);
                    least_error_scale(&windows.collect::<Vec<_>>().concat(), largest_code(bits))
                })
                .collect();
            (scale_name(layer), vec![3, groups], values)
        })
        .collect();
    if scales.iter().any(|(_, _, values)| values.iter().any(|scale| !scale.is_finite())) {
        let why = "the model computes activations that are NaN or infinite, so they cannot be calibrated".into();
        return Err(Error::Output { path: source.path().to_owned(), why });
    }
    let record = ActivationQuantization {
        component: COMPONENT.into(),
        bits,
        group_size: group as u64,
        positions: positions as u64,
        samples: windows.len() as u64,
        text,
        scales: scales.iter().map(|(name, _, _)| name.clone()).collect(),
    };
    Ok(Calibration { record, scales })
}

/// The scale whose grid of `2 * largest + 1` values is nearest to the values, in mean absolute error.
///
/// Zero where all values are zero, NaN where one of them is not finite.
fn least_error_scale(values: &[f32], largest: f32) -> f32 {
    if values.iter().any(|value| !value.is_finite()) {
        return f32::NAN;
    }
    let magnitude = values.iter().fold(0.0f32, |magnitude, value| magnitude.max(value.abs()));
    if magnitude == 0.0 {
        return 0.0;
    }
    let error = |scale: f32| -> f64 {
        values
            .iter()
            .map(|&value| {
                let rounded = (value / scale).round_ties_even().clamp(-largest, largest) * scale;
                f64::from((value - rounded).abs())
            })
            .sum()
    };
    // A share of the smallest floats vanishes.
    let candidates = SHARES.map(|share| magnitude * share as f32 / 100.0 / largest).filter(|&scale| scale > 0.0);
    candidates.map(|scale| (error(scale), scale)).min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0.0, |(_, scale)| scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlier_is_clipped_where_that_costs_less() {
        let mut values = vec![1.0, -0.4, 0.3, 0.9, -0.8, 0.55];
        assert!((least_error_scale(&values, 7.0) - 1.0 / 7.0).abs() < 0.03);
        values.extend((0..200).map(|i| 0.001 * (i as f32 - 100.0)));
        assert!(least_error_scale(&values, 7.0) < 0.5 / 7.0);
    }

    #[test]
    fn values_on_the_grid_keep_their_grid() {
        let values: Vec<f32> = (-7..=7).map(|code| 0.25 * code as f32).collect();
        assert_eq!(least_error_scale(&values, 7.0), 0.25);
    }

    #[test]
    fn zeros_and_what_is_not_finite_show_in_the_scale() {
        assert_eq!(least_error_scale(&[0.0, -0.0], 7.0), 0.0);
        assert!(!least_error_scale(&[1.0, f32::INFINITY], 7.0).is_finite());
        assert!(!least_error_scale(&[f32::NAN, 1.0], 7.0).is_finite());
        assert_eq!(least_error_scale(&[], 7.0), 0.0);
    }
}
