//! NPZ: a zip archive with one NumPy array a tensor.

use std::path::Path;

use super::{
    archive::Member,
    npy::{self, Dtype},
    stored::{StoredTensor, column_major_strides},
};
use crate::error::{Error, Result};

/// The arrays of an archive, named as their members without `.npy`.
pub(super) fn tensors(path: &Path, file: &[u8], members: Vec<Member>) -> Result<Vec<StoredTensor>> {
    members.into_iter().map(|member| tensor(path, file, member)).collect()
}

fn tensor(path: &Path, file: &[u8], member: Member) -> Result<StoredTensor> {
    let Member { name: member, place } = member;
    let refuse = |why: String| Error::Npy { path: path.to_owned(), member: member.clone(), why };
    let Some(name) = member.strip_suffix(".npy") else {
        return Err(refuse("is no .npy array, and an NPZ file holds nothing else".into()));
    };
    let head = place.head(file, npy::MAX_HEADER).map_err(refuse)?;
    let header = npy::read(&head).map_err(refuse)?;
    let (element, complex, big_endian) = match header.dtype {
        Dtype::Float { element, complex, big_endian } => (element, complex, big_endian),
        Dtype::Other(dtype) => {
            return Err(Error::UnsupportedDtype { path: path.to_owned(), tensor: name.into(), dtype });
        }
    };
    let value_bytes = element.bytes() * if complex { 2 } else { 1 };
    let bytes = header.shape.iter().try_fold(value_bytes, |bytes, &size| bytes.checked_mul(size));
    if bytes.and_then(|bytes| bytes.checked_add(header.data_start)) != Some(place.len()) {
        return Err(refuse(format!(
            "shape {:?} does not fit its {} bytes after a header of {}",
            header.shape,
            place.len(),
            header.data_start
        )));
    }
    // One dimension has the same order both ways.
    let transposed = header.fortran && header.shape.len() > 1;
    let strides = transposed.then(|| column_major_strides(&header.shape, value_bytes));
    let (name, shape, start) = (name.to_owned(), header.shape, header.data_start);
    Ok(StoredTensor { name, shape, element, complex, big_endian, place, start, strides })
}
