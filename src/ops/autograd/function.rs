//! Operations whose derivative is written by hand, as plain functions of slices, made known to candle.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor,
    WithDType, backend::BackendStorage,
};
use rayon::prelude::*;

use super::Moments;

/// Evaluates an expression with a type parameter that is the Rust type of a float `DType`.
macro_rules! in_type {
    ($dtype:expr, $name:expr, $type:ident => $expression:expr) => {
        match $dtype {
            DType::F32 => {
                type $type = f32;
                $expression
            }
            DType::F64 => {
                type $type = f64;
                $expression
            }
            dtype => return Err(Error::UnsupportedDTypeForOp(dtype, $name)),
        }
    };
}

/// A function of `N` tensors, and what its result's gradient says of theirs.
pub(super) trait Function<const N: usize>: Send + Sync + 'static {
    const NAME: &str;

    /// The result's shape.
    fn shape(&self, inputs: [&[usize]; N]) -> Vec<usize>;

    /// The result's values.
    fn forward<T: WithDType>(&self, inputs: [&[T]; N]) -> Vec<T>;

    /// The gradient of each input from that of the result.
    fn backward<T: WithDType>(&self, inputs: [&[T]; N], result: &[T], gradient: &[T]) -> [Vec<T>; N];
}

/// Applies a function of one tensor, and records it.
pub(super) fn apply1(function: impl Function<1>, x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Recorded(function))
}

/// Applies a function of two tensors, and records it.
pub(super) fn apply2(function: impl Function<2>, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&y.contiguous()?, Recorded(function))
}

/// Applies a function of three tensors, and records it.
pub(super) fn apply3(function: impl Function<3>, x: &Tensor, y: &Tensor, z: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&y.contiguous()?, &z.contiguous()?, Recorded(function))
}

struct Recorded<F>(F);

fn forward<F: Function<N>, const N: usize>(
    function: &F,
    inputs: [(&CpuStorage, &Layout); N],
) -> Result<(CpuStorage, Shape)> {
    let shape = function.shape(inputs.map(|(_, layout)| layout.dims()));
    Ok((in_type!(inputs[0].0.dtype(), F::NAME, T => forward_in::<T, F, N>(function, inputs)?), shape.into()))
}

fn forward_in<T: WithDType, F: Function<N>, const N: usize>(
    function: &F,
    inputs: [(&CpuStorage, &Layout); N],
) -> Result<CpuStorage> {
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(inputs) {
        *slice = contiguous(storage, layout)?;
    }
    Ok(T::to_cpu_storage_owned(function.forward(slices)))
}

fn backward<F: Function<N>, const N: usize>(
    function: &F,
    inputs: [&Tensor; N],
    result: &Tensor,
    gradient: &Tensor,
) -> Result<[Tensor; N]> {
    in_type!(result.dtype(), F::NAME, T => backward_in::<T, F, N>(function, inputs, result, gradient))
}

fn backward_in<T: WithDType, F: Function<N>, const N: usize>(
    function: &F,
    inputs: [&Tensor; N],
    result: &Tensor,
    gradient: &Tensor,
) -> Result<[Tensor; N]> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<T>();
    let mut owned: [Vec<T>; N] = std::array::from_fn(|_| Vec::new());
    for (owned, input) in owned.iter_mut().zip(inputs) {
        *owned = values(input)?;
    }
    let slices = std::array::from_fn(|index| owned[index].as_slice());
    let gradients = function.backward(slices, &values(result)?, &values(gradient)?);
    let mut tensors = inputs.map(Tensor::clone);
    for ((tensor, values), input) in tensors.iter_mut().zip(gradients).zip(inputs) {
        *tensor = Tensor::from_vec(values, input.dims(), &Device::Cpu)?;
    }
    Ok(tensors)
}

impl<F: Function<1>> CustomOp1 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(&self.0, [(s, l)])
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [x] = backward(&self.0, [x], result, gradient)?;
        Ok(Some(x))
    }
}

impl<F: Function<2>> CustomOp2 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        forward(&self.0, [(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, y] = backward(&self.0, [x, y], result, gradient)?;
        Ok((Some(x), Some(y)))
    }
}

impl<F: Function<3>> CustomOp3 for Recorded<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        forward(&self.0, [(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, y, z] = backward(&self.0, [x, y, z], result, gradient)?;
        Ok((Some(x), Some(y), Some(z)))
    }
}

/// The values of a contiguous tensor, in place.
pub(super) fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let (start, end) = layout.contiguous_offsets().ok_or(Error::RequiresContiguous { op: "custom operation" })?;
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// Sums over a tensor's values.
pub(super) fn moments(tensor: &Tensor) -> Result<Moments> {
    let [sum, squares] = sums(tensor, |value| [value, value * value])?;
    Ok(Moments { count: tensor.elem_count() as u64, sum, squares })
}

/// The mean absolute value of a tensor.
pub(super) fn mean_absolute(tensor: &Tensor) -> Result<f64> {
    let [sum] = sums(tensor, |value| [value.abs()])?;
    Ok(sum / tensor.elem_count() as f64)
}

/// Sums of functions of each value, in place.
fn sums<const N: usize>(tensor: &Tensor, of: impl Fn(f64) -> [f64; N] + Sync) -> Result<[f64; N]> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Msg("a tensor is not in the CPU's memory".into()));
    };
    in_type!(tensor.dtype(), "sums", T => Ok(sum_up(contiguous::<T>(storage, layout)?, of)))
}

fn sum_up<T: WithDType, const N: usize>(values: &[T], of: impl Fn(f64) -> [f64; N] + Sync) -> [f64; N] {
    /// Values of one task, whose sums are added in order, so that they do not depend on the number of threads.
    const TASK: usize = 1 << 14;
    let add = |mut sums: [f64; N], more: [f64; N]| {
        sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        sums
    };
    let of_task = |values: &[T]| values.iter().map(|value| of(value.to_f64())).fold([0.0; N], add);
    let tasks: Vec<[f64; N]> = values.par_chunks(TASK).map(of_task).collect();
    tasks.into_iter().fold([0.0; N], add)
}

/// Sums of a matrix's squared values, by row and by column.
pub(super) fn marginal_squares(tensor: &Tensor) -> Result<[Vec<f64>; 2]> {
    let (_, cols) = tensor.dims2()?;
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Msg("a tensor is not in the CPU's memory".into()));
    };
    in_type!(tensor.dtype(), "marginals", T => Ok(add_marginals(contiguous::<T>(storage, layout)?, cols)))
}

fn add_marginals<T: WithDType>(values: &[T], cols: usize) -> [Vec<f64>; 2] {
    /// Rows of one task, whose sums are added in order, so that they do not depend on the number of threads.
    const TASK: usize = 64;
    if values.is_empty() {
        return [Vec::new(), vec![0.0; cols]];
    }
    let of_task = |values: &[T]| {
        let mut by_column = vec![0.0; cols];
        let by_row = |row: &[T]| {
            let squares = row.iter().map(|value| value.to_f64().powi(2));
            squares.zip(&mut by_column).fold(0.0, |sum, (square, column)| {
                *column += square;
                sum + square
            })
        };
        let by_row: Vec<f64> = values.chunks_exact(cols).map(by_row).collect();
        (by_row, by_column)
    };
    let tasks: Vec<_> = values.par_chunks(TASK * cols).map(of_task).collect();
    let mut marginals = [Vec::with_capacity(values.len() / cols), vec![0.0; cols]];
    for (by_row, by_column) in tasks {
        marginals[0].extend(by_row);
        marginals[1].iter_mut().zip(by_column).for_each(|(sum, more)| *sum += more);
    }
    marginals
}
