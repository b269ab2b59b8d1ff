//! Mixes that need no data: what a budget's choice is measured against.

use bkpack_kernels::Grid;

use super::{SizedAlternative, TensorInfo};
use crate::{
    encoding::{GroupSize, Request},
    tensor::matrix_shape,
};

/// One encoding for the blocks, and one for embeddings and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    body: (Grid, u32),
    head: (Grid, u32),
}

impl Preset {
    /// All presets: 2 to 8 bits in groups of 32, 64 and 128, with and without zero points, for all matrices alike or with
    /// embeddings and head at 8 bits.
    pub fn all() -> Vec<Self> {
        const HEAD: (Grid, u32) = (Grid::Int { bits: 8, symmetric: true }, 64);
        let mut presets = Vec::new();
        for bits in 2..=8 {
            for columns in [32, 64, 128] {
                for symmetric in [true, false] {
                    let body = (Grid::Int { bits, symmetric }, columns);
                    presets.push(Self { body, head: body });
                    if bits < 8 {
                        presets.push(Self { body, head: HEAD });
                    }
                }
            }
        }
        presets
    }

    /// Whether all matrices are encoded alike.
    pub fn is_uniform(&self) -> bool {
        self.body == self.head
    }

    /// Whether the blocks' matrices have no zero points.
    pub fn is_symmetric(&self) -> bool {
        !self.body.0.has_zero_points()
    }

    /// What it is called: `uniform int4:g64`, `int4:g64, embedding and head int8:g64`.
    pub fn name(&self) -> String {
        let text = |(grid, columns)| Request::Quantize { grid, group: GroupSize::Columns(columns) }.to_string();
        match self.is_uniform() {
            true => format!("uniform {}", text(self.body)),
            false => format!("{}, embedding and head {}", text(self.body), text(self.head)),
        }
    }

    /// Which of its alternatives each tensor gets; `None` where one lacks the preset's encoding. What has one alternative
    /// has been decided otherwise.
    pub fn choice(&self, tensors: &[TensorInfo], alternatives: &[Vec<SizedAlternative>]) -> Option<Vec<usize>> {
        let one = |(tensor, options): (&TensorInfo, &Vec<SizedAlternative>)| {
            if options.len() == 1 {
                return Some(0);
            }
            let outside = matches!(tensor.component.as_str(), "embedding" | "output");
            let (grid, columns) = if outside { self.head } else { self.body };
            let place = |group| {
                let request = Request::Quantize { grid, group };
                options.iter().position(|option| option.alternative.request == request)
            };
            // A row that does not fill a group is one.
            let (_, cols) = matrix_shape(&tensor.shape);
            place(if cols <= columns as usize { GroupSize::WholeRow } else { GroupSize::Columns(columns) })
        };
        tensors.iter().zip(alternatives).map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Alternative, PLAIN, budget::candidates, tests::tensor};

    #[test]
    fn a_preset_finds_its_encodings() {
        let tensors = [
            tensor("embed", &[64, 256], "embedding"),
            tensor("q", &[64, 256], "other"),
            tensor("narrow", &[64, 48], "other"),
            tensor("norm", &[64], PLAIN),
        ];
        let options = |cols: usize| {
            let costed = |request| Alternative { request, named: false, cost: Some(0.0) };
            let sized = |request| SizedAlternative { alternative: costed(request), bytes: 1 };
            candidates(cols).into_iter().map(sized).collect::<Vec<_>>()
        };
        let kept = vec![SizedAlternative { alternative: Alternative::chosen(Request::Keep), bytes: 1 }];
        let alternatives = [options(256), options(256), options(48), kept];
        let named = |name: &str| Preset::all().into_iter().find(|preset| preset.name() == name).unwrap();
        let requests = |preset: Preset| {
            let choice = preset.choice(&tensors, &alternatives).unwrap();
            let request = |(options, &index): (&Vec<SizedAlternative>, &usize)| options[index].alternative.request;
            alternatives.iter().zip(&choice).map(request).map(|request| request.to_string()).collect::<Vec<_>>()
        };
        let mixed = named("int3:g64, embedding and head int8:g64");
        assert_eq!(requests(mixed), ["int8:g64", "int3:g64", "int3:row", "keep"]);
        let uniform = named("uniform int4:g32:asym");
        assert_eq!(requests(uniform), ["int4:g32:asym", "int4:g32:asym", "int4:g32:asym", "keep"]);
        assert!(uniform.is_uniform() && !mixed.is_uniform());
    }
}
