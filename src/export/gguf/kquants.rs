//! Rounding to ggml's own types, for what they cannot hold as it is: Q4_K and Q6_K, and Q5_0 and Q8_0 for rows that are
//! no whole blocks of 256.
//!
//! The layouts are ggml's; scales are found here by trying a few around the one that just covers the weights, each
//! improved by least squares.

use half::f16;

use super::blocks::{BlockType, write_block};

/// Rounds one row of whole blocks.
///
/// # Panics
/// If the type is none that this module knows, or `values` or `out` are no whole row.
pub(super) fn write_row(kind: BlockType, values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), kind.row_bytes(values.len()));
    for (values, out) in values.chunks_exact(kind.columns()).zip(out.chunks_exact_mut(kind.bytes())) {
        match kind {
            BlockType::Q4K => write_q4_k(values, out),
            BlockType::Q6K => write_q6_k(values, out),
            BlockType::Q5_0 => write_symmetric(kind, values, 16, out),
            BlockType::Q8_0 => write_symmetric(kind, values, 128, out),
            _ => unreachable!("nothing is rounded to {kind:?}"),
        }
    }
}

/// A block of one scale over levels from `-half` to `half - 1`.
fn write_symmetric(kind: BlockType, values: &[f32], half: i32, out: &mut [u8]) {
    let scale = f16::from_f32(symmetric_scale(values, half));
    let codes: Vec<u8> = values.iter().map(|&value| (level(value, scale.to_f32(), half) + half) as u8).collect();
    write_block(kind, &codes, half, scale, out);
}

/// The nearest level to `value / scale`.
fn level(value: f32, scale: f32, half: i32) -> i32 {
    if scale == 0.0 { 0 } else { ((value / scale).round_ties_even() as i32).clamp(-half, half - 1) }
}

/// The scale of least squared error among a few: the value of largest magnitude stands on the level `-half`, or a little
/// further in or out.
fn symmetric_scale(values: &[f32], half: i32) -> f32 {
    let largest = values.iter().copied().fold(0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    if largest == 0.0 {
        return 0.0;
    }
    let mut best = (f64::INFINITY, 0.0);
    for step in -4..=4 {
        let first = largest / (-half as f32 + 0.1 * step as f32);
        let levels = || values.iter().map(|&value| (f64::from(value), f64::from(level(value, first, half))));
        let (xl, ll) = levels().fold((0.0, 0.0), |(xl, ll), (x, l)| (xl + x * l, ll + l * l));
        let scale = if ll > 0.0 { (xl / ll) as f32 } else { first };
        let error = levels().map(|(x, l)| (x - l * f64::from(scale)).powi(2)).sum::<f64>();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// d and dmin, eight scales and minima of 6 bits, 256 nibbles: `w = d * scale * q - dmin * minimum`.
fn write_q4_k(values: &[f32], out: &mut [u8]) {
    const MOST: f32 = 63.0;
    let mut fits = [(0f32, 0f32); 8];
    fits.iter_mut().zip(values.chunks_exact(32)).for_each(|(fit, values)| *fit = affine_scale(values));
    let largest = |part: fn(&(f32, f32)) -> f32| fits.iter().map(part).fold(0f32, f32::max);
    let d = f16::from_f32(largest(|fit| fit.0) / MOST);
    let dmin = f16::from_f32(largest(|fit| fit.1) / MOST);
    let six =
        |value: f32, unit: f16| if unit == f16::ZERO { 0 } else { (value / unit.to_f32()).round().min(MOST) as u8 };
    let scales = fits.map(|fit| six(fit.0, d));
    let minima = fits.map(|fit| six(fit.1, dmin));
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&dmin.to_le_bytes());
    for j in 0..4 {
        // The first four lie in the lower six bits; the last four are split into nibbles and the two bits left over.
        out[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
        out[8 + j] = minima[j] | minima[j + 4] >> 4 << 6;
        out[12 + j] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4;
    }
    let code = |index: usize| {
        let (scale, minimum) = (f32::from(scales[index / 32]), f32::from(minima[index / 32]));
        let (scale, minimum) = (d.to_f32() * scale, dmin.to_f32() * minimum);
        if scale == 0.0 { 0 } else { ((values[index] + minimum) / scale).round().clamp(0.0, 15.0) as u8 }
    };
    for (index, byte) in out[16..].iter_mut().enumerate() {
        let first = index / 32 * 64 + index % 32;
        *byte = code(first) | code(first + 32) << 4;
    }
}

/// Scale and minimum, neither negative, such that `scale * q - minimum` with q from 0 to 15 is close to the values.
fn affine_scale(values: &[f32]) -> (f32, f32) {
    let lowest = values.iter().copied().fold(0f32, f32::min);
    let highest = values.iter().copied().fold(0f32, f32::max);
    if highest == lowest {
        return (0.0, 0.0);
    }
    let mut best = (f64::INFINITY, (highest - lowest) / 15.0, -lowest);
    for step in -5..=10 {
        let inverse = (15.0 + 0.1 * step as f32) / (highest - lowest);
        let code = |value: f32| f64::from(((value - lowest) * inverse).round().clamp(0.0, 15.0));
        let (mut q1, mut q2, mut x1, mut xq) = (0.0, 0.0, 0.0, 0.0);
        for &value in values {
            let (x, q) = (f64::from(value), code(value));
            (q1, q2, x1, xq) = (q1 + q, q2 + q * q, x1 + x, xq + x * q);
        }
        let count = values.len() as f64;
        let determinant = count * q2 - q1 * q1;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut minimum) = ((count * xq - x1 * q1) / determinant, (q1 * xq - q2 * x1) / determinant);
        if minimum < 0.0 {
            (scale, minimum) = (xq / q2, 0.0);
        }
        let error = values.iter().map(|&value| (scale * code(value) - minimum - f64::from(value)).powi(2)).sum::<f64>();
        if scale > 0.0 && error < best.0 {
            best = (error, scale as f32, minimum as f32);
        }
    }
    (best.1, best.2)
}

/// 256 levels from -32 to 31, 16 scales of 8 bits, d: `w = d * scale * level`.
fn write_q6_k(values: &[f32], out: &mut [u8]) {
    let mut found = [0f32; 16];
    found.iter_mut().zip(values.chunks_exact(16)).for_each(|(scale, values)| *scale = symmetric_scale(values, 32));
    let largest = found.iter().fold(0f32, |a, b| a.max(b.abs()));
    let d = f16::from_f32(largest / 127.0);
    let scales =
        found.map(|scale| if d == f16::ZERO { 0 } else { (scale / d.to_f32()).round().clamp(-127.0, 127.0) as i8 });
    let code = |index: usize| {
        let scale = d.to_f32() * f32::from(scales[index / 16]);
        (level(values[index], scale, 32) + 32) as u8
    };
    let (low, rest) = out.split_at_mut(128);
    let (high, rest) = rest.split_at_mut(64);
    for half in 0..2 {
        for l in 0..32 {
            // Four columns, 32 apart, share a byte of high bits.
            let [a, b, c, d] = [0, 32, 64, 96].map(|offset| code(128 * half + offset + l));
            low[64 * half + l] = a & 15 | (c & 15) << 4;
            low[64 * half + 32 + l] = b & 15 | (d & 15) << 4;
            high[32 * half + l] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
    rest[..16].iter_mut().zip(scales).for_each(|(out, scale)| *out = scale as u8);
    rest[16..].copy_from_slice(&d.to_le_bytes());
}
