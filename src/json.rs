//! JSON from untrusted files: a key named twice is an error, since readers would disagree about which one counts.

use std::{collections::HashSet, fmt, fs::File, io::Read, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor},
};

use crate::error::{Error, Result};

/// The most that [`read_small`] reads: results and lists of targets are a few kilobytes.
const MOST_BYTES: u64 = 1 << 20;

/// The bytes of a file that is expected to be small, such as a result.
///
/// # Errors
/// [`Error::Io`]; [`Error::Json`] for what is no regular file, and for more than 1 MiB.
pub fn read_small(path: &Path) -> Result<Vec<u8>> {
    let refuse = |why: &str| Err(Error::Json { path: path.to_owned(), why: why.to_owned() });
    // A pipe or a device could block, or never end.
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return refuse("is no regular file");
    }
    let mut bytes = Vec::new();
    let mut limited = File::open(path).map_err(Error::io(path))?.take(MOST_BYTES + 1);
    limited.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MOST_BYTES {
        return refuse("has more than 1 MiB, too much for a file of figures or targets");
    }
    Ok(bytes)
}

/// Parses a JSON document, refusing duplicate keys at every level.
pub fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    check_unique_keys(path, bytes)?;
    serde_json::from_slice(bytes).map_err(|error| Error::Json { path: path.to_owned(), why: error.to_string() })
}

/// Refuses a document that does not parse or that names a key twice in one object.
pub fn check_unique_keys(path: &Path, bytes: &[u8]) -> Result<()> {
    match serde_json::from_slice::<UniqueKeys>(bytes) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            Err(match text.strip_prefix(DUPLICATE).and_then(|rest| rest.rsplit_once(" at line ")) {
                Some((key, _)) => Error::DuplicateKey { path: path.to_owned(), key: key.to_owned() },
                None => Error::Json { path: path.to_owned(), why: text },
            })
        }
    }
}

const DUPLICATE: &str = "duplicate key ";

/// Any JSON value whose objects name no key twice.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueKeysVisitor)
    }
}

struct UniqueKeysVisitor;

impl<'de> Visitor<'de> for UniqueKeysVisitor {
    type Value = UniqueKeys;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_i64<E>(self, _: i64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_u64<E>(self, _: u64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_f64<E>(self, _: f64) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_str<E>(self, _: &str) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_unit<E>(self) -> Result<UniqueKeys, E> {
        Ok(UniqueKeys)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<UniqueKeys, A::Error> {
        while sequence.next_element::<UniqueKeys>()?.is_some() {}
        Ok(UniqueKeys)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys, A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if keys.contains(&key) {
                return Err(A::Error::custom(format_args!("{DUPLICATE}{key}")));
            }
            keys.insert(key);
            map.next_value::<UniqueKeys>()?;
        }
        Ok(UniqueKeys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<()> {
        check_unique_keys(Path::new("x.json"), text.as_bytes())
    }

    #[test]
    fn duplicate_keys_are_named_at_every_level() {
        assert!(check(r#"{"a": [1, {"b": null, "c": -2.5}], "b": true}"#).is_ok());
        for text in [r#"{"k": 1, "k": 2}"#, r#"{"a": [{"k": 1, "x": 0, "k": 1}]}"#, r#"{"k": 1, "\u006b": 2}"#] {
            assert!(matches!(check(text), Err(Error::DuplicateKey { key, .. }) if key == "k"), "{text}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "{} x", "nul", &"[".repeat(100_000)] {
            assert!(matches!(check(text), Err(Error::Json { .. })));
        }
    }
}
