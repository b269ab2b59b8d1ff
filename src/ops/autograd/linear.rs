//! The product of activations with a weight.

use bkpack_kernels::{Cpu, Data, FloatType, Matrix};
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::function::contiguous;

/// `x * weight^T`: `[tokens, in]` and `[out, in]` to `[tokens, out]`.
///
/// Written by hand because candle would give a transposed weight a transposed gradient, element by element.
pub(super) struct Product {
    pub cpu: Cpu,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((tokens, cols), (rows, weight_cols)) = (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
        if cols != weight_cols {
            return Err(Error::Msg(format!("a product of {cols} with {weight_cols} columns")));
        }
        let shape = Shape::from((tokens, rows));
        if let CpuStorage::F64(_) = x {
            let (x, weight) = (contiguous::<f64>(x, x_layout)?, contiguous::<f64>(weight, weight_layout)?);
            let dot = |index: usize| {
                let (x, weight) = (&x[index / rows * cols..][..cols], &weight[index % rows * cols..][..cols]);
                x.iter().zip(weight).map(|(x, weight)| x * weight).sum()
            };
            return Ok((CpuStorage::F64((0..tokens * rows).into_par_iter().map(dot).collect()), shape));
        }
        let (x, weight) = (contiguous::<f32>(x, x_layout)?, contiguous::<f32>(weight, weight_layout)?);
        let values = bytemuck::cast_slice(weight);
        let matrix = Matrix::new(rows, cols, Data::Float { dtype: FloatType::F32, values }).map_err(Error::wrap)?;
        let mut out = vec![0.0; tokens * rows];
        self.cpu.matmul(x, &matrix, &mut out);
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight) = (x.detach(), weight.detach());
        let gradient = gradient.contiguous()?;
        Ok((Some(gradient.matmul(&weight)?), Some(gradient.t()?.matmul(&x)?)))
    }
}
