//! The record of quantized activations: what must hold of it and of the tensors of scales that it names.

use std::{collections::HashSet, path::Path};

use super::read::PackedFile;
use crate::{
    encoding::{Encoding, FloatName},
    error::{Error, Result},
    tensor::{ActivationQuantization, TensorSource},
};

/// The components whose activations this version can describe.
const COMPONENTS: [&str; 1] = ["bk_core"];

/// What a tensor of scales adds to the name of its layer.
const SCALE_SUFFIX: &str = ".activation_scale";

/// v, Re G and Im G.
const ROWS: usize = 3;

/// What the rules ask of a tensor of scales.
pub(super) struct ScaleTensor<'a> {
    pub shape: &'a [usize],
    pub component: &'a str,
    pub encoding: Encoding,
}

/// Checks all records of a model; `find` looks a logical tensor up.
pub(super) fn check<'a>(
    path: &Path,
    records: &[ActivationQuantization],
    find: impl Fn(&str) -> Option<ScaleTensor<'a>>,
) -> Result<()> {
    let (mut components, mut scales) = (HashSet::new(), HashSet::new());
    for record in records {
        let component = || record.component.clone();
        let wrong = |why| Err(Error::ActivationComponent { path: path.to_owned(), component: component(), why });
        if !COMPONENTS.contains(&record.component.as_str()) {
            return wrong("this version knows those of bk_core only");
        }
        if !components.insert(&record.component) {
            return wrong("recorded twice");
        }
        for (field, found, holds, expected) in [
            ("bits", record.bits.into(), [4, 8].contains(&record.bits), "4 or 8"),
            ("group_size", record.group_size, record.group_size >= 1, "at least 1"),
            ("positions", record.positions, record.positions >= 1, "at least 1"),
            ("the number of scales", record.scales.len() as u64, !record.scales.is_empty(), "at least 1"),
        ] {
            if !holds {
                let (path, component) = (path.to_owned(), component());
                return Err(Error::ActivationRange { path, component, field, found, expected });
            }
        }
        for name in &record.scales {
            let refuse = |why| Err(Error::ActivationScale { path: path.to_owned(), tensor: name.clone(), why });
            if !scales.insert(name) {
                return refuse("named twice".to_owned());
            }
            if !name.ends_with(SCALE_SUFFIX) {
                return refuse(format!("the name must be that of the layer and {SCALE_SUFFIX}"));
            }
            let Some(tensor) = find(name) else { return refuse("no tensor has this name".to_owned()) };
            if (tensor.encoding != Encoding::Float { dtype: FloatName::F32 }) || tensor.component != record.component {
                return refuse(format!("the tensor must be plain F32 of component {}", record.component));
            }
            let fits = matches!(*tensor.shape, [ROWS, groups] if groups as u64 == record.groups());
            if !fits {
                return refuse(format!(
                    "the shape is {:?} where [{ROWS}, {}] is needed",
                    tensor.shape,
                    record.groups()
                ));
            }
        }
    }
    Ok(())
}

/// Refuses a scale that is negative, NaN or infinite.
pub(super) fn check_values(path: &Path, name: &str, mut values: impl Iterator<Item = f32>) -> Result<()> {
    // Written so that NaN fails.
    let valid = |value: f32| value >= 0.0 && value.is_finite();
    let mut found = 0.0;
    let wrong = values.position(|value| {
        found = value;
        !valid(value)
    });
    match wrong {
        None => Ok(()),
        Some(element) => {
            Err(Error::ActivationScaleValue { path: path.to_owned(), tensor: name.to_owned(), element, found })
        }
    }
}

impl PackedFile {
    pub(super) fn check_activations(&self) -> Result<()> {
        check(self.path(), self.activations(), |name| {
            let tensor = self.entry(name)?;
            Some(ScaleTensor { shape: &tensor.shape, component: &tensor.component, encoding: tensor.encoding })
        })
    }

    pub(super) fn check_activation_values(&self) -> Result<()> {
        for name in self.activations().iter().flat_map(|record| &record.scales) {
            let part = &self.entry(name).expect("checked when the file was opened").parts[0];
            let (words, _) = self.part_bytes(part).as_chunks();
            check_values(self.part_path(part), name, words.iter().map(|bytes| f32::from_le_bytes(*bytes)))?;
        }
        Ok(())
    }
}
