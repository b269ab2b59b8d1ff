//! The selective scan of a state-space model (Mamba, Gu and Dao, 2023).

use super::simd::Simd;
use super::{Cpu, Kernel};

/// The operands of [`Cpu::selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan<'a> {
    /// The input, `[tokens, channels]`.
    pub x: &'a [f32],
    /// The step sizes, after softplus, `[tokens, channels]`.
    pub delta: &'a [f32],
    /// The rates of decay, negative, `[channels, state_size]`.
    pub a: &'a [f32],
    /// What enters the state, `[tokens, state_size]`.
    pub b: &'a [f32],
    /// What is read from the state, `[tokens, state_size]`.
    pub c: &'a [f32],
    /// What is passed by the state, `[channels]`.
    pub d: &'a [f32],
}

impl Cpu {
    /// The selective scan: token after token, `h = exp(delta * a) * h + delta * b * x` and `out = sum of c * h + d * x`,
    /// with a state `h` of `state_size` values for each channel (Hugging Face's `MambaMixer.slow_forward`).
    ///
    /// `state` is `[channels, state_size]`, zero before the first token, and is left as the next token finds it: a
    /// sequence in pieces gives the same bits as in one call. `out` is `[tokens, channels]`.
    ///
    /// # Panics
    /// If the lengths do not fit together or there are no channels.
    pub fn selective_scan(self, scan: &SelectiveScan, state: &mut [f32], out: &mut [f32]) {
        let SelectiveScan { x, delta, a, b, c, d } = *scan;
        let channels = d.len();
        assert!(channels > 0 && x.len().is_multiple_of(channels), "x is not whole rows of {channels} channels");
        let (tokens, state_size) = (x.len() / channels, a.len() / channels);
        assert_eq!((delta.len(), out.len()), (x.len(), x.len()), "delta and out need {tokens} x {channels}");
        let states = channels * state_size;
        assert_eq!((a.len(), state.len()), (states, states), "a and state need {channels} x {state_size}");
        let inputs = tokens * state_size;
        assert_eq!((b.len(), c.len()), (inputs, inputs), "b and c need {tokens} x {state_size}");
        self.dispatch(Scan { scan, state_size, state, out });
    }
}

struct Scan<'a> {
    scan: &'a SelectiveScan<'a>,
    state_size: usize,
    state: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scan, state_size: size, state, out } = self;
        let channels = scan.d.len();
        for (index, out) in out.iter_mut().enumerate() {
            let (token, channel) = (index / channels, index % channels);
            let (x, delta) = (scan.x[index], scan.delta[index]);
            *out = scan.d[channel] * x;
            for s in 0..size {
                let mut decay = [0.0; 16];
                simd.store(simd.exp(simd.splat(delta * scan.a[channel * size + s])), &mut decay);
                let h = &mut state[channel * size + s];
                *h = decay[0] * *h + delta * x * scan.b[token * size + s];
                *out += scan.c[token * size + s] * *h;
            }
        }
    }
}
