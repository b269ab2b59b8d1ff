//! The operations with their derivatives for training, in f32: a tape of its own for each window, so that every thread runs a
//! window by itself, on the kernels that also run inference.
//!
//! candle cuts element-wise work among threads of its own, one call at a time, so that no two windows can run side by side, and
//! multiplies with 256-bit vectors. Gradients of both back ends are compared for every architecture.

mod attention;
mod operations;
mod product;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
};

use bkpack_kernels::Cpu;

use super::function::Function;
use crate::{
    error::Result,
    tensor::{TensorSource, matrix_shape},
};

/// The values that are differentiated by, under their tensors' names; shared by all tapes of a step.
#[derive(Debug, Default)]
pub struct Variables(BTreeMap<String, Arc<Matrix>>);

/// A matrix, and its transpose once it was needed.
#[derive(Debug)]
pub(super) struct Matrix {
    rows: usize,
    cols: usize,
    values: Arc<Vec<f32>>,          // [rows, cols]
    transposed: OnceLock<Vec<f32>>, // [cols, rows]
}

impl Matrix {
    fn new(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), rows * cols, "values fill their shape");
        Self { rows, cols, values: Arc::new(values), transposed: OnceLock::new() }
    }

    fn transposed(&self) -> &[f32] {
        self.transposed.get_or_init(|| product::transpose(&self.values, self.cols))
    }
}

impl Variables {
    /// Gives a variable these values, `[rows, cols]`.
    ///
    /// # Panics
    /// If they do not fill the shape.
    pub fn set(&mut self, name: &str, (rows, cols): (usize, usize), values: Vec<f32>) {
        self.0.insert(name.to_owned(), Arc::new(Matrix::new(rows, cols, values)));
    }
}

/// A tensor `[rows, cols]` and its place on the tape.
#[derive(Clone, Debug)]
pub struct Node {
    /// `None` where no variable has a part in it.
    id: Option<usize>,
    rows: usize,
    cols: usize,
    values: Arc<Vec<f32>>,
}

impl Node {
    /// Its values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// A matrix that activations are multiplied with: a variable, or some of its rows.
#[derive(Clone, Debug)]
pub struct Weight {
    id: Option<usize>,
    /// Where its gradient begins in that of the variable, which has so many values.
    offset: usize,
    whole: usize,
    matrix: Arc<Matrix>,
}

/// Gradients so far, by place on the tape.
#[derive(Debug, Default)]
pub(super) struct Sums(Vec<Option<Vec<f32>>>);

impl Sums {
    fn slot(&mut self, id: usize) -> &mut Option<Vec<f32>> {
        if self.0.len() <= id {
            self.0.resize_with(id + 1, || None);
        }
        &mut self.0[id]
    }

    /// Adds the gradient of a tensor, if a variable has a part in it.
    fn add(&mut self, id: Option<usize>, gradient: Vec<f32>) {
        let Some(id) = id else { return };
        match self.slot(id) {
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient),
            empty => *empty = Some(gradient),
        }
    }

    /// The gradient of a tensor of `length` values so far, to be added to.
    fn of(&mut self, id: Option<usize>, length: usize) -> Option<&mut Vec<f32>> {
        Some(self.slot(id?).get_or_insert_with(|| vec![0.0; length]))
    }
}

/// How the gradient of one result goes back to what it was computed from.
struct Step {
    result: usize,
    backward: Box<Backward>,
}

/// Adds to the gradients of the inputs what that of the result says of them.
type Backward = dyn FnOnce(&[f32], &mut Sums);

/// The back end of one window. A text runs in one call, from its start.
pub struct TapeOps<'v> {
    cpu: Cpu,
    variables: &'v Variables,
    loaded: RefCell<HashMap<String, usize>>,
    next: Cell<usize>,
    steps: RefCell<Vec<Step>>,
    sums: RefCell<Sums>,
}

impl<'v> TapeOps<'v> {
    /// An empty tape.
    pub fn new(cpu: Cpu, variables: &'v Variables) -> Self {
        let (loaded, next, steps, sums) = (RefCell::default(), Cell::new(0), RefCell::default(), RefCell::default());
        Self { cpu, variables, loaded, next, steps, sums }
    }

    /// How far the tape is.
    pub fn position(&self) -> usize {
        self.steps.borrow().len()
    }

    /// Says what the gradient of the loss with respect to a tensor is, in part.
    ///
    /// # Panics
    /// If it has another number of values.
    pub fn seed(&self, tensor: &Node, gradient: Vec<f32>) {
        assert_eq!(gradient.len(), tensor.values.len(), "a gradient for each value");
        self.sums.borrow_mut().add(tensor.id, gradient);
    }

    /// Takes the gradients back over everything that was computed since the tape was at `position`, and forgets it. All that
    /// comes of it must have its gradient.
    pub fn backward(&self, position: usize) {
        let steps = self.steps.borrow_mut().split_off(position);
        let sums = &mut *self.sums.borrow_mut();
        for Step { result, backward } in steps.into_iter().rev() {
            if let Some(gradient) = sums.slot(result).take() {
                backward(&gradient, sums);
            }
        }
    }

    /// The gradients of the variables, as far as the tape was taken back; of those that the loss depends on.
    pub fn into_gradients(self) -> HashMap<String, Vec<f32>> {
        let mut sums = self.sums.into_inner();
        let gradients = self.loaded.into_inner().into_iter().map(|(name, id)| (name, sums.slot(id).take()));
        gradients.filter_map(|(name, gradient)| Some((name, gradient?))).collect()
    }

    fn new_id(&self) -> usize {
        self.next.replace(self.next.get() + 1)
    }

    /// A variable, or a tensor of the source that is none.
    fn load(&self, source: &dyn TensorSource, name: &str) -> Result<(Option<usize>, Arc<Matrix>)> {
        if let Some(matrix) = self.variables.0.get(name) {
            let id = *self.loaded.borrow_mut().entry(name.to_owned()).or_insert_with(|| self.new_id());
            return Ok((Some(id), matrix.clone()));
        }
        let tensor = source.tensor(name)?;
        let mut values = vec![0.0; tensor.elements()];
        self.cpu.dequantize(&tensor.matrix(), 0, &mut values);
        let (rows, cols) = matrix_shape(tensor.shape());
        Ok((None, Arc::new(Matrix::new(rows, cols, values))))
    }

    /// A result, and how its gradient goes back to its inputs.
    fn record(
        &self,
        (rows, cols): (usize, usize),
        values: Arc<Vec<f32>>,
        inputs: &[Option<usize>],
        backward: impl FnOnce(&[f32], &mut Sums) + 'static,
    ) -> Node {
        assert_eq!(values.len(), rows * cols, "values fill their shape");
        let id = inputs.iter().any(Option::is_some).then(|| {
            let result = self.new_id();
            self.steps.borrow_mut().push(Step { result, backward: Box::new(backward) });
            result
        });
        Node { id, rows, cols, values }
    }

    /// A function whose derivative is known to the other back end, too.
    fn apply<const N: usize>(&self, function: impl Function<N>, inputs: [&Node; N], shape: (usize, usize)) -> Node {
        let values = Arc::new(function.forward(inputs.map(|input| input.values())));
        let (kept, result) = (inputs.map(Node::clone), values.clone());
        self.record(shape, values, &inputs.map(|input| input.id), move |gradient, sums| {
            let inputs = std::array::from_fn(|index| kept[index].values());
            let gradients = function.backward(inputs, &result, gradient);
            kept.iter().zip(gradients).for_each(|(input, gradient)| sums.add(input.id, gradient));
        })
    }

    /// A function of each element by itself: its values, and its derivative from input and output.
    fn map(&self, x: Node, values: impl FnOnce(&mut [f32]), slope: impl Fn(f32, f32) -> f32 + 'static) -> Node {
        let mut result = x.values.to_vec();
        values(&mut result);
        let result = Arc::new(result);
        let kept = result.clone();
        self.record((x.rows, x.cols), result, &[x.id], move |gradient, sums| {
            let pairs = x.values.iter().zip(kept.iter()).zip(gradient);
            sums.add(x.id, pairs.map(|((&x, &y), gradient)| gradient * slope(x, y)).collect());
        })
    }
}
