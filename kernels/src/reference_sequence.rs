//! The scalar oracle of the operations that carry a state from token to token, and of the resolvent, in f64.

use crate::cpu::SelectiveScan;

/// Causal depthwise convolution with zeros before the first token.
///
/// `x` is `[tokens, channels]`, `weight` is `[channels, kernel]`, `bias` is `[channels]`.
pub fn depthwise_conv(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let channels = bias.len();
    let kernel = weight.len() / channels;
    let mut out = vec![0.0; x.len()];
    for token in 0..x.len() / channels {
        for channel in 0..channels {
            let mut sum = f64::from(bias[channel]);
            for j in 0..kernel {
                if let Some(from) = (token + j + 1).checked_sub(kernel) {
                    sum += f64::from(weight[channel * kernel + j]) * f64::from(x[from * channels + channel]);
                }
            }
            out[token * channels + channel] = sum;
        }
    }
    out
}

/// The selective scan from a zero state: the outputs `[tokens, channels]` and the last state `[channels, state_size]`.
pub fn selective_scan(scan: &SelectiveScan) -> (Vec<f64>, Vec<f64>) {
    let channels = scan.d.len();
    let size = scan.a.len() / channels;
    let (mut out, mut state) = (vec![0.0; scan.x.len()], vec![0.0; scan.a.len()]);
    for token in 0..scan.x.len() / channels {
        for channel in 0..channels {
            let at = token * channels + channel;
            let (x, delta) = (f64::from(scan.x[at]), f64::from(scan.delta[at]));
            out[at] = f64::from(scan.d[channel]) * x;
            for s in 0..size {
                let h = &mut state[channel * size + s];
                let input = delta * f64::from(scan.b[token * size + s]) * x;
                *h = (delta * f64::from(scan.a[channel * size + s])).exp() * *h + input;
                out[at] += f64::from(scan.c[token * size + s]) * *h;
            }
        }
    }
    (out, state)
}

/// The diagonal of `(H - z I)^-1`, real and imaginary parts, with `H = tridiag(1, v_i - 2, 1)`: the dense inverse by
/// Gauss-Jordan elimination with partial pivoting, in cubic time.
pub fn resolvent(v: &[f32], z: [f32; 2]) -> Vec<[f64; 2]> {
    let n = v.len();
    // The matrix beside the identity, which becomes the inverse.
    let mut rows = vec![vec![[0.0; 2]; 2 * n]; n];
    for (i, row) in rows.iter_mut().enumerate() {
        row[i] = [f64::from(v[i]) - 2.0 - f64::from(z[0]), -f64::from(z[1])];
        if i > 0 {
            row[i - 1] = [1.0, 0.0];
        }
        if i + 1 < n {
            row[i + 1] = [1.0, 0.0];
        }
        row[n + i] = [1.0, 0.0];
    }
    let norm = |[re, im]: [f64; 2]| re * re + im * im;
    let multiply = |[a, b]: [f64; 2], [c, d]: [f64; 2]| [a * c - b * d, a * d + b * c];
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| norm(rows[a][column]).total_cmp(&norm(rows[b][column])));
        rows.swap(column, pivot.unwrap_or(column));
        let [re, im] = rows[column][column];
        let factor = [re / norm([re, im]), -im / norm([re, im])];
        rows[column].iter_mut().for_each(|value| *value = multiply(*value, factor));
        let from = rows[column].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != column) {
            let factor = row[column];
            if norm(factor) > 0.0 {
                for (value, &from) in row.iter_mut().zip(&from) {
                    let [re, im] = multiply(factor, from);
                    *value = [value[0] - re, value[1] - im];
                }
            }
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n + i]).collect()
}
