//! What a file is, told by its first bytes and never by its name.

use std::path::Path;

use super::{CheckpointKind, Contents, archive, npy, npz, safetensors, torch, torch_legacy};
use crate::error::{Error, Result};

/// Whether a file may be safetensors: what is surely something else is not.
pub(crate) fn may_be_safetensors(file: &[u8]) -> bool {
    let Some((length, rest)) = file.split_first_chunk() else { return true };
    // A length, of which the upper four bytes are zero, then a JSON object.
    let header = length[4..] == [0; 4] && rest.first() == Some(&b'{');
    let fits = u64::from_le_bytes(*length) <= rest.len() as u64;
    header || fits && !(is_zip(file) || torch_legacy::is_legacy(file) || foreign(file).is_some())
}

fn is_zip(file: &[u8]) -> bool {
    file.starts_with(b"PK\x03\x04") || file.starts_with(b"PK\x05\x06")
}

/// A format that is known and not read: its name, and what to do.
fn foreign(file: &[u8]) -> Option<&'static str> {
    Some(match file {
        _ if file.starts_with(npy::MAGIC) => {
            "a single NumPy array; put the model's arrays into one .npz file (numpy.savez), named as its tensors"
        }
        _ if file.get(257..262) == Some(b"ustar") => {
            "a tar archive, as PyTorch wrote before 2018 (or something else); load and save it with a newer PyTorch"
        }
        _ if file.starts_with(b"version https://git-lfs.github.com/spec/") => {
            "a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
        }
        _ if file.starts_with(b"<!") || file.starts_with(b"<html") => {
            "a web page, most likely what a download gave instead of the file; fetch it again"
        }
        _ if file.starts_with(b"{") => "a JSON file; name the folder or the file of weights that it belongs to",
        _ if file.starts_with(b"GGUF") => "a GGUF file, which is quantized or converted already; bring its checkpoint",
        _ if file.starts_with(b"\x89HDF\r\n\x1a\n") => "an HDF5 file; save the weights as safetensors or .npz",
        _ if file.starts_with(b"\x1f\x8b") => "a gzip file; unpack it first",
        [0x80, 2..=5, ..] => {
            "a pickle that torch.save did not write, which is never loaded; save the state dict with torch.save"
        }
        _ => return None,
    })
}

/// Reads what a file of weights holds.
///
/// # Errors
/// A format that is not read, and every error of the formats that are.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<(CheckpointKind, Contents)> {
    let refuse = |why: String| Error::NotAModel { path: path.to_owned(), why };
    if may_be_safetensors(file) {
        return Ok((CheckpointKind::Safetensors, safetensors::contents(path, file)?));
    }
    if torch_legacy::is_legacy(file) {
        return Ok((CheckpointKind::Torch, torch::legacy_contents(path, file)?));
    }
    if let Some(format) = foreign(file) {
        return Err(refuse(format!("is {format}")));
    }
    if !is_zip(file) {
        return Err(refuse("is none of safetensors, NPZ and PyTorch by its first bytes".into()));
    }
    let members = archive::members(path, file)?;
    if members.iter().any(|member| member.name == "data.pkl" || member.name.ends_with("/data.pkl")) {
        return Ok((CheckpointKind::Torch, torch::zip_contents(path, file, members)?));
    }
    if !members.iter().any(|member| member.name.ends_with(".npy")) {
        let why = "is a zip archive without .npy arrays (NPZ) and without data.pkl (PyTorch)";
        return Err(refuse(why.into()));
    }
    let tensors = npz::tensors(path, file, members)?;
    Ok((CheckpointKind::Npz, Contents { tensors, notices: Vec::new() }))
}
