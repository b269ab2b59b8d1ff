//! PyTorch's files from before version 1.6: five pickles one after the other, then the storages.

use std::collections::{HashMap, HashSet};

use super::{
    pickle::{self, PickleError, Value},
    stored::Place,
    torch::{Storages, allowed_global, storage_reference},
};
use crate::error::short;

/// What the first pickle of every such file holds: the long integer 0x1950a86a20f9469cfc6c.
const MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// Whether a file starts like one.
pub(super) fn is_legacy(file: &[u8]) -> bool {
    // Protocol 4 puts a frame between the protocol and the number.
    let head = &file[..file.len().min(32)];
    head.first() == Some(&0x80) && head.windows(MAGIC.len()).any(|window| window == MAGIC)
}

/// Finds the pickle of the state dict and the storages behind it.
pub(super) fn layout(file: &[u8]) -> Result<(pickle::Pickle<'_>, Storages), PickleError> {
    let broken = |why: &str| PickleError::Broken(why.to_owned());
    let mut at = 0;
    let mut next = || {
        let pickle = pickle::read(&file[at..], allowed_global)?;
        at += pickle.end;
        Ok(pickle)
    };
    next()?; // the magic number
    let protocol = next()?;
    if !matches!(protocol[protocol.root], Value::Int(1001)) {
        return Err(broken("its protocol version is not 1001"));
    }
    drop(protocol);
    next()?; // sizes of integers on the machine that wrote it
    let (object, keys) = (next()?, next()?);

    let (mut value_bytes, mut seen) = (HashMap::new(), HashSet::new());
    for value in object.values() {
        if let Value::Persistent(id) = value
            && seen.insert(*id)
        {
            let reference = storage_reference(&object, *id).map_err(PickleError::Broken)?;
            value_bytes.insert(reference.key, reference.value_bytes);
        }
    }
    let Value::List(keys_in_order) = &keys[keys.root] else { return Err(broken("its list of storages is no list")) };
    let mut places = HashMap::new();
    for &key in keys_in_order {
        let key = keys.text(key).ok_or_else(|| broken("a storage's key is no text"))?;
        let shown = short(key);
        let Some(&value_bytes) = value_bytes.get(key) else {
            return Err(PickleError::Broken(format!("storage {shown} belongs to no tensor")));
        };
        let length = file.get(at..).and_then(|rest| rest.first_chunk()).map(|length| u64::from_le_bytes(*length));
        let start = at.saturating_add(8);
        let end = length
            .and_then(|length| usize::try_from(length).ok()?.checked_mul(value_bytes)?.checked_add(start))
            .filter(|&end| end <= file.len())
            .ok_or_else(|| PickleError::Broken(format!("storage {shown} ends beyond the file: truncated")))?;
        if places.insert(key.to_owned(), Place::Mapped(start..end)).is_some() {
            return Err(PickleError::Broken(format!("storage {shown} occurs twice")));
        }
        at = end;
    }
    if at != file.len() {
        return Err(PickleError::Broken(format!("{} bytes follow the last storage", file.len() - at)));
    }
    // These files are little-endian whatever machine wrote them.
    Ok((object, Storages { places, big_endian: false }))
}
