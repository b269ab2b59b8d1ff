//! Causal depthwise convolution: one short filter a channel.

use super::elementwise::by_rows;
use super::scratch::Buffer;
use super::simd::Simd;
use super::{Cpu, Kernel};

impl Cpu {
    /// Causal depthwise convolution: `out[t, c] = bias[c] + sum over j of weight[c, j] * x[t - (kernel - 1) + j, c]`, where
    /// the inputs before the first token are `history`.
    ///
    /// `x` and `out` are `[tokens, channels]`, `weight` is `[channels, kernel]`, `bias` is `[channels]`. `history` is
    /// `[kernel - 1, channels]`, oldest first, and becomes the last inputs, so that a sequence in pieces gives the same
    /// bits as in one call. `channels` and `kernel` follow from the lengths of `weight` and `history`.
    ///
    /// # Panics
    /// If the lengths do not fit together or there are no weights.
    pub fn depthwise_conv(self, x: &[f32], weight: &[f32], bias: Option<&[f32]>, history: &mut [f32], out: &mut [f32]) {
        assert!(weight.len() > history.len(), "{} weights with a history of {}", weight.len(), history.len());
        let channels = weight.len() - history.len();
        let kernel = weight.len() / channels;
        assert_eq!(weight.len(), channels * kernel, "weights are not a filter for each of {channels} channels");
        assert!(x.len() == out.len() && x.len().is_multiple_of(channels), "x and out are not equal rows of {channels}");
        assert!(bias.is_none_or(|bias| bias.len() == channels), "bias needs one value for each of {channels} channels");

        let mut taps = Buffer::zeros(weight.len()); // [kernel, channels]
        for (channel, filter) in weight.chunks_exact(kernel).enumerate() {
            taps[channel..].iter_mut().step_by(channels).zip(filter).for_each(|(to, &from)| *to = from);
        }
        by_rows(out, channels, |first, out| {
            self.dispatch(Convolution { first, channels, x, history, taps: &taps, bias, out });
        });

        let (kept, fresh) = (history.len().saturating_sub(x.len()), history.len().min(x.len()));
        history.copy_within(fresh.., 0);
        history[kept..].copy_from_slice(&x[x.len() - fresh..]);
    }
}

/// Rows of the output from row `first`.
struct Convolution<'a> {
    first: usize,
    channels: usize,
    x: &'a [f32],       // [tokens, channels]
    history: &'a [f32], // [kernel - 1, channels]
    taps: &'a [f32],    // [kernel, channels]
    bias: Option<&'a [f32]>,
    out: &'a mut [f32], // [rows, channels]
}

impl Kernel for Convolution<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, out) in self.out.chunks_exact_mut(self.channels).enumerate() {
            match self.bias {
                Some(bias) => out.copy_from_slice(bias),
                None => out.fill(0.0),
            }
            for (tap, weights) in self.taps.chunks_exact(self.channels).enumerate() {
                // Position in the history followed by the input.
                let start = (self.first + row + tap) * self.channels;
                let input = match start.checked_sub(self.history.len()) {
                    Some(start) => &self.x[start..],
                    None => &self.history[start..],
                };
                multiply_add(simd, weights, &input[..self.channels], out);
            }
        }
    }
}

/// `out += a * b`, element by element.
#[inline(always)]
fn multiply_add<S: Simd>(simd: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        simd.store(simd.mul_add(simd.load(a), simd.load(b), simd.load(out)), out);
    }
    let last = simd.mul_add(simd.load_partial(a_tail), simd.load_partial(b_tail), simd.load_partial(out_tail));
    simd.store_partial(last, out_tail);
}
