//! The diagonal of the resolvent, whose recurrences are differentiated by running them backward.

use candle_core::WithDType;

use super::function::Function;

/// A complex number: real and imaginary part.
type Complex = [f64; 2];

fn multiply(a: Complex, b: Complex) -> Complex {
    [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]
}

fn subtract(a: Complex, b: Complex) -> Complex {
    [a[0] - b[0], a[1] - b[1]]
}

fn add(a: Complex, b: Complex) -> Complex {
    [a[0] + b[0], a[1] + b[1]]
}

fn reciprocal([re, im]: Complex) -> Complex {
    let modulus = re * re + im * im;
    [re / modulus, -im / modulus]
}

/// The derivative of a loss by `d` from that by `w = 1 / d`: a derivative by a complex number is that by its real part
/// less `i` times that by its imaginary part, which is what the chain rule of holomorphic functions multiplies.
fn through_reciprocal(w: Complex, derivative: Complex) -> Complex {
    multiply(multiply(w, w).map(|part| -part), derivative)
}

/// The diagonal of `(H - zI)^-1` with `H = tridiag(1, v_i - 2, 1)`: `[positions, 1]` to `[positions, 2]`; of one tensor
/// the full one, of two the causal one, which continues the value `[1, 2]` of the position before.
pub(super) struct Resolvent {
    pub z: Complex,
}

impl Resolvent {
    /// `v_i - 2 - z`.
    fn diagonal<T: WithDType>(&self, v: &[T]) -> Vec<Complex> {
        v.iter().map(|v| subtract([v.to_f64() - 2.0, 0.0], self.z)).collect()
    }

    /// `l_i = 1 / (a_i - l_{i-1})`.
    fn ratios<'a>(a: impl Iterator<Item = &'a Complex>, first: Complex) -> Vec<Complex> {
        let step = |previous: &mut Complex, a: &Complex| {
            *previous = reciprocal(subtract(*a, *previous));
            Some(*previous)
        };
        a.scan(first, step).collect()
    }

    /// The ratios from the left and from the right.
    fn both(a: &[Complex]) -> [Vec<Complex>; 2] {
        let mut right = Self::ratios(a.iter().rev(), [0.0; 2]);
        right.reverse();
        [Self::ratios(a.iter(), [0.0; 2]), right]
    }
}

fn pairs<T: WithDType>(values: &[T]) -> impl Iterator<Item = Complex> {
    values.chunks_exact(2).map(|pair| [pair[0].to_f64(), pair[1].to_f64()])
}

/// Derivatives by complex numbers, from the gradients of their parts or back.
fn conjugate(x: Complex) -> Complex {
    [x[0], -x[1]]
}

impl Function<1> for Resolvent {
    const NAME: &str = "resolvent";

    fn shape(&self, [v]: [&[usize]; 1]) -> Vec<usize> {
        vec![v[0], 2]
    }

    fn forward<T: WithDType>(&self, [v]: [&[T]; 1]) -> Vec<T> {
        let a = self.diagonal(v);
        let [left, right] = Self::both(&a);
        let at = |index: usize| {
            let left = if index == 0 { [0.0; 2] } else { left[index - 1] };
            let right = right.get(index + 1).copied().unwrap_or_default();
            reciprocal(subtract(subtract(a[index], left), right))
        };
        (0..a.len()).flat_map(at).map(T::from_f64).collect()
    }

    fn backward<T: WithDType>(&self, [v]: [&[T]; 1], result: &[T], gradient: &[T]) -> [Vec<T>; 1] {
        let [left, right] = Self::both(&self.diagonal(v));
        let derivatives = pairs(result).zip(pairs(gradient));
        // By each whole denominator a_i - l_{i-1} - r_{i+1}.
        let whole: Vec<Complex> = derivatives.map(|(value, g)| through_reciprocal(value, conjugate(g))).collect();
        let mut total = whole.clone();
        // l_i is part of the denominators of G_{i+1} and of l_{i+1}; r_i of those of G_{i-1} and of r_{i-1}.
        let mut next = [0.0; 2];
        for index in (0..left.len()).rev() {
            let of_whole = whole.get(index + 1).copied().unwrap_or_default();
            next = through_reciprocal(left[index], add(of_whole, next).map(|part| -part));
            total[index] = add(total[index], next);
        }
        let (mut next, mut of_whole) = ([0.0; 2], [0.0; 2]);
        for index in 0..right.len() {
            next = through_reciprocal(right[index], add(of_whole, next).map(|part| -part));
            total[index] = add(total[index], next);
            of_whole = whole[index];
        }
        [total.into_iter().map(|derivative| T::from_f64(derivative[0])).collect()]
    }
}

impl Function<2> for Resolvent {
    const NAME: &str = "causal resolvent";

    fn shape(&self, [v, _]: [&[usize]; 2]) -> Vec<usize> {
        vec![v[0], 2]
    }

    fn forward<T: WithDType>(&self, [v, last]: [&[T]; 2]) -> Vec<T> {
        let last = [last[0].to_f64(), last[1].to_f64()];
        Self::ratios(self.diagonal(v).iter(), last).into_iter().flatten().map(T::from_f64).collect()
    }

    fn backward<T: WithDType>(&self, [v, _]: [&[T]; 2], result: &[T], gradient: &[T]) -> [Vec<T>; 2] {
        let mut of_v = vec![T::zero(); v.len()];
        let mut next = [0.0; 2];
        let steps = pairs(result).zip(pairs(gradient)).collect::<Vec<_>>();
        for (of_v, (value, gradient)) in of_v.iter_mut().zip(steps).rev() {
            next = through_reciprocal(value, subtract(conjugate(gradient), next));
            *of_v = T::from_f64(next[0]);
        }
        [of_v, conjugate(next.map(|part| -part)).map(T::from_f64).to_vec()]
    }
}
