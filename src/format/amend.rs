//! Adding to a packed file what is only known once it runs: a copy with other records and, byte for byte, the same
//! weights.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use super::{
    PackedFile, PackedWriter,
    activations::{ScaleTensor, check, check_values},
    entry::{PackedPart, PackedTensor},
    layout::{FilePlan, PlannedTensor, stored_file, stored_parts, tensor_entry},
    read::read_manifest,
};
use crate::{
    checkpoint::header::Header,
    encoding::{Encoding, FloatName},
    error::{Error, Result},
    progress::{Observer, Unit},
    tensor::{ActivationQuantization, TensorSource, checked_elements, natural_order},
};

/// Writes a copy of a packed model of one file whose activations are quantized as these records say, with these
/// tensors of scales (name, shape, values; [`ActivationQuantization::scales`]). Returns `output`.
///
/// Earlier records and their scales are left out, as are fields of the manifest that this version does not know;
/// everything else stays as it is. `output` may be the packed file itself, which needs `force` like any file that
/// exists; it is replaced when the copy is whole.
///
/// # Errors
/// A sharded model, a record or a scale that breaks a rule of the format, a scale that no record names, a part that
/// does not match its hash, a target that exists (unless `force`), a full disk, cancellation.
pub fn with_activations(
    packed: &PackedFile,
    activations: Vec<ActivationQuantization>,
    scales: Vec<(String, Vec<usize>, Vec<f32>)>,
    output: &Path,
    force: bool,
    observer: &dyn Observer,
) -> Result<PathBuf> {
    let path = packed.path();
    let Some((file, _)) = packed.single() else {
        let why = "is sharded; activation scales can only be added to a model of one file".into();
        return Err(Error::ShardSet { path: path.to_owned(), why });
    };
    let mut manifest = read_manifest(path, file, &Header::read(path, file)?)?;
    let replaced: HashSet<&String> = packed.activations().iter().flat_map(|record| &record.scales).collect();
    let kept: Vec<&PackedTensor> = packed.tensors().iter().filter(|tensor| !replaced.contains(&tensor.name)).collect();
    let added = plan_scales(packed, &kept, &activations, &scales)?;

    manifest.tensors.retain(|entry| !replaced.contains(&entry.name));
    manifest.tensors.extend(added.iter().map(|tensor| tensor_entry(tensor, &stored_parts(tensor))));
    manifest.tensors.sort_by(|a, b| natural_order(&a.name, &b.name));
    manifest.activations = activations;
    let planned: HashMap<String, PlannedTensor> =
        kept.iter().map(|tensor| planned(tensor)).chain(added).map(|tensor| (tensor.name.clone(), tensor)).collect();
    let mut stored: Vec<_> = manifest.tensors.iter().flat_map(|entry| stored_parts(&planned[&entry.name])).collect();
    stored.extend(packed.file_parts().map(|(_, part)| stored_file(&part.name, packed.part_bytes(part).len())));
    let plan = FilePlan::new(output.to_owned(), manifest, stored);

    let tensor_parts = kept.iter().flat_map(|tensor| tensor.parts.iter().map(|part| (tensor.name.as_str(), part)));
    let parts: Vec<(&str, &PackedPart)> = tensor_parts.chain(packed.file_parts()).collect();
    observer.begin("Copying", plan.data_bytes() as u64, Unit::Bytes);
    let mut writer = PackedWriter::create(output, vec![plan], force)?;
    for (tensor, part) in parts {
        observer.check()?;
        let bytes = packed.part_bytes(part);
        if writer.write_part(&part.name, bytes)? != part.hash {
            let (path, tensor) = (path.to_owned(), tensor.to_owned());
            return Err(Error::PartHash { path, tensor, part: part.name.clone() });
        }
        observer.advance(bytes.len() as u64);
    }
    for (name, _, values) in &scales {
        observer.check()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.write_part(name, &bytes)?;
        observer.advance(bytes.len() as u64);
    }
    writer.finish_as_planned()?;
    observer.end();
    Ok(output.to_owned())
}

/// Checks records and scales as a reader of the copy would, so that what is written opens.
fn plan_scales(
    packed: &PackedFile,
    kept: &[&PackedTensor],
    activations: &[ActivationQuantization],
    scales: &[(String, Vec<usize>, Vec<f32>)],
) -> Result<Vec<PlannedTensor>> {
    let path = packed.path();
    let component_of: HashMap<&String, &String> =
        activations.iter().flat_map(|record| record.scales.iter().map(|name| (name, &record.component))).collect();
    let mut taken: HashSet<&str> = kept.iter().map(|tensor| tensor.name.as_str()).collect();
    taken.extend(kept.iter().flat_map(|tensor| tensor.parts.iter().map(|part| part.name.as_str())));
    taken.extend(packed.file_parts().map(|(_, part)| part.name.as_str()));
    let mut added = Vec::new();
    for (name, shape, values) in scales {
        let refuse =
            |why: &str| Error::ActivationScale { path: path.to_owned(), tensor: name.clone(), why: why.into() };
        let component = *component_of.get(name).ok_or_else(|| refuse("no record names this tensor"))?;
        if !taken.insert(name) {
            return Err(refuse("the model already has a tensor or a part of this name"));
        }
        if checked_elements(shape) != Some(values.len()) {
            return Err(refuse("the values do not fill the shape"));
        }
        check_values(path, name, values.iter().copied())?;
        added.push(PlannedTensor {
            name: name.clone(),
            shape: shape.clone(),
            component: component.clone(),
            complex: None,
            encoding: Encoding::Float { dtype: FloatName::F32 },
            reason: None,
        });
    }
    let found = |name: &str| {
        let tensor = added.iter().find(|tensor| tensor.name == name)?;
        Some(ScaleTensor { shape: &tensor.shape, component: &tensor.component, encoding: tensor.encoding })
    };
    check(path, activations, found)?;
    Ok(added)
}

/// A tensor as it was planned when the model was packed.
fn planned(tensor: &PackedTensor) -> PlannedTensor {
    PlannedTensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        component: tensor.component.clone(),
        complex: tensor.complex,
        encoding: tensor.encoding,
        reason: tensor.reason.clone(),
    }
}
