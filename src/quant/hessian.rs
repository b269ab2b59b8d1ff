//! The second moments of a linear layer's inputs: what calibrated rounding knows of the data.

use bkpack_kernels::{
    Cpu,
    cpu::{gram_index, gram_len},
};

/// `X^T X` of the inputs `X` `[tokens, cols]` of a linear layer: half the Hessian of the squared error of its output, for
/// every row of its weight.
///
/// Holds about `4 * cols^2` bytes. The sums are the same for any number of threads; they depend, by rounding alone, on how
/// the tokens were cut into calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Hessian {
    cols: usize,
    tokens: u64,
    gram: Vec<f64>, // [gram_len(cols)]
}

impl Hessian {
    /// No tokens yet, of `cols` columns.
    pub fn new(cols: usize) -> Self {
        Self { cols, tokens: 0, gram: vec![0.0; gram_len(cols)] }
    }

    /// Adds rows of inputs, `[tokens, cols]`, on all threads of the pool.
    ///
    /// Sums are taken in f32 over 256 tokens, and of these in f64: an entry is off by at most 1.5e-5 of the sum of the
    /// magnitudes of its products.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn add(&mut self, cpu: Cpu, x: &[f32]) {
        cpu.add_gram(x, self.cols, &mut self.gram);
        self.tokens += x.len().checked_div(self.cols).unwrap_or(0) as u64;
    }

    /// Adds the tokens that another one has seen.
    ///
    /// # Panics
    /// If it is of another number of columns.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.cols, other.cols, "two Hessians of different layers");
        self.tokens += other.tokens;
        for (sum, other) in self.gram.iter_mut().zip(&other.gram) {
            *sum += other;
        }
    }

    /// Inputs of the layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The sum over tokens of the product of two inputs, in either order.
    ///
    /// # Panics
    /// If a column is not there.
    pub fn get(&self, a: usize, b: usize) -> f64 {
        assert!(a < self.cols && b < self.cols, "columns {a} and {b} of {}", self.cols);
        self.gram[gram_index(a, b)]
    }

    /// The sum of squares of each input: `[cols]`.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.cols).map(|column| self.get(column, column)).collect()
    }
}
