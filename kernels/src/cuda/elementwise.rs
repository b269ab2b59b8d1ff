//! Element by element, in place.

use super::{Cuda, context::Arguments, elements, error::Result, size, values::DeviceValues};

/// Functions of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Relu,
    Silu,
    Softplus,
    NegativeExp,
}

impl Cuda {
    fn apply(&self, x: DeviceValues, function: Function) -> Result<DeviceValues> {
        let x = x.changing();
        let name = match function {
            Function::Relu => "relu",
            Function::Silu => "silu",
            Function::Softplus => "softplus",
            Function::NegativeExp => "negative_exp",
        };
        let arguments = Arguments::default().buffer(&x.buffer).u64(x.len());
        // SAFETY: each takes (x, n).
        unsafe { self.launch("elementwise", [name, "", ""], elements(x.len()), arguments)? };
        Ok(x)
    }

    /// `max(x, 0)`.
    ///
    /// # Errors
    /// [`CudaError::Call`](super::CudaError::Call), as of every function here.
    pub fn relu(&self, x: DeviceValues) -> Result<DeviceValues> {
        self.apply(x, Function::Relu)
    }

    /// `x / (1 + exp(-x))`.
    pub fn silu(&self, x: DeviceValues) -> Result<DeviceValues> {
        self.apply(x, Function::Silu)
    }

    /// `log(1 + exp(x))`.
    pub fn softplus(&self, x: DeviceValues) -> Result<DeviceValues> {
        self.apply(x, Function::Softplus)
    }

    /// `-exp(x)`.
    pub fn negative_exp(&self, x: DeviceValues) -> Result<DeviceValues> {
        self.apply(x, Function::NegativeExp)
    }

    /// `x` limited to `-limit..=limit`.
    pub fn clamp(&self, x: DeviceValues, limit: f32) -> Result<DeviceValues> {
        let x = x.changing();
        let arguments = Arguments::default().buffer(&x.buffer).u64(x.len()).f32(limit);
        // SAFETY: clamp(x, n, limit).
        unsafe { self.launch("elementwise", ["clamp", "", ""], elements(x.len()), arguments)? };
        Ok(x)
    }

    /// `x + y`.
    ///
    /// # Panics
    /// If they have different shapes, as the following.
    pub fn add(&self, x: DeviceValues, y: &DeviceValues) -> Result<DeviceValues> {
        self.combine("add", x, y)
    }

    /// `gate / (1 + exp(-gate)) * up`.
    pub fn silu_multiply(&self, gate: DeviceValues, up: &DeviceValues) -> Result<DeviceValues> {
        self.combine("silu_multiply", gate, up)
    }

    fn combine(&self, name: &'static str, x: DeviceValues, y: &DeviceValues) -> Result<DeviceValues> {
        assert_eq!(x.len(), y.len(), "both operands of {name}");
        let x = x.changing();
        let arguments = Arguments::default().buffer(&x.buffer).buffer(&y.buffer).u64(x.len());
        // SAFETY: each takes (x, y, n), with as many values in both.
        unsafe { self.launch("elementwise", [name, "", ""], elements(x.len()), arguments)? };
        Ok(x)
    }

    /// `x + scale * y`; `scale` is `[1, 1]`.
    pub fn add_scaled(&self, x: DeviceValues, y: &DeviceValues, scale: &DeviceValues) -> Result<DeviceValues> {
        assert!(x.len() == y.len() && scale.len() == 1, "two operands of one shape and a scalar");
        let x = x.changing();
        let arguments = Arguments::default().buffer(&x.buffer).buffer(&y.buffer).buffer(&scale.buffer).u64(x.len());
        // SAFETY: add_scaled(x, y, scale, n), with as many values in `x` and `y`.
        unsafe { self.launch("elementwise", ["add_scaled", "", ""], elements(x.len()), arguments)? };
        Ok(x)
    }

    /// `clamp(round(x / scale), -largest, largest) * scale`, halves to even; a zero scale gives zero.
    pub fn round_to_grid(&self, x: DeviceValues, scales: &DeviceValues, largest: f32) -> Result<DeviceValues> {
        assert_eq!(x.len(), scales.len(), "one scale for each value");
        let x = x.changing();
        let arguments = Arguments::default().buffer(&x.buffer).buffer(&scales.buffer).u64(x.len()).f32(largest);
        // SAFETY: round_to_grid(x, scales, n, largest), with a scale for each value.
        unsafe { self.launch("elementwise", ["round_to_grid", "", ""], elements(x.len()), arguments)? };
        Ok(x)
    }

    /// `sum[token] += weights[token, slot] * y[i]` for the `i`-th place `[token, slot]`, no token twice.
    ///
    /// # Panics
    /// If a place is not there, or a token occurs twice.
    pub fn scatter_add(
        &self,
        sum: DeviceValues,
        y: &DeviceValues,
        places: &[[u32; 2]],
        weights: &DeviceValues,
    ) -> Result<DeviceValues> {
        assert!(y.rows() == places.len() && y.cols() == sum.cols(), "a row of the sum's width for each place");
        let (tokens, chosen) = (sum.rows().min(weights.rows()), weights.cols());
        let within = |&[token, slot]: &[u32; 2]| (token as usize) < tokens && (slot as usize) < chosen;
        assert!(places.iter().all(within), "a place beyond {tokens} tokens or {chosen} choices");
        let mut seen = vec![false; tokens];
        let once = |&[token, _]: &[u32; 2]| !std::mem::replace(&mut seen[token as usize], true);
        assert!(places.iter().all(once), "a token occurs twice");
        let sum = sum.changing();
        let list = self.uploaded(bytemuck::cast_slice(places))?;
        let arguments = Arguments::default()
            .buffer(&sum.buffer)
            .buffer(&y.buffer)
            .buffer(&list)
            .buffer(&weights.buffer)
            .u64(y.len())
            .u32(size("columns", sum.cols())?)
            .u32(size("choices", chosen)?);
        // SAFETY: scatter_add(sum, y, places, weights, n, cols, chosen), whose places are checked above: no two threads add
        // to one element.
        unsafe { self.launch("elementwise", ["scatter_add", "", ""], elements(y.len()), arguments)? };
        Ok(sum)
    }
}
