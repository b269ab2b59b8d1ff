//! PyTorch state dicts: which globals a file may name, where the state dict is, and what a tensor is rebuilt from.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use super::{
    Contents,
    archive::Member,
    dtype::{Element, Float8},
    pickle::{self, Id, Pickle, PickleError, Value},
    stored::{Place, StoredTensor},
    torch_legacy,
};
use crate::error::{Error, Result, short};

/// Where a training script puts the state dict inside what it saves.
const NESTED: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// Tensors of a file, and other entries of its state dict: the largest models have a tenth of this.
const MAX_ENTRIES: usize = 200_000;

/// Entries of the metadata of a tensor: PyTorch writes two at most.
const MAX_METADATA: usize = 8;

/// PyTorch allows 64 dimensions.
const MAX_DIMENSIONS: usize = 64;

/// The raw values that tensors are views of.
pub(super) struct Storages {
    /// By the key that the pickle uses.
    pub places: HashMap<String, Place>,
    pub big_endian: bool,
}

/// What a pickle says of a storage.
pub(super) struct StorageReference<'a> {
    pub key: &'a str,
    kind: Kind,
    /// Bytes of one value.
    pub value_bytes: usize,
    values: usize,
}

/// What a storage or a tensor holds.
#[derive(Clone, Copy)]
enum Kind {
    Float {
        element: Element,
        complex: bool,
    },
    /// What is no float, with the bytes of a value.
    Other(usize),
    /// Bytes whose type the tensor says.
    Untyped,
}

/// Reads the state dict of a file in PyTorch's zip format.
///
/// # Errors
/// A pickle that is broken or names what is not allowed, no state dict, a tensor that its storage does not hold.
pub(super) fn zip_contents(path: &Path, file: &[u8], members: Vec<Member>) -> Result<Contents> {
    let refuse = |why: &str| Error::Torch { path: path.to_owned(), why: why.into() };
    let mut members: HashMap<String, Place> = members.into_iter().map(|member| (member.name, member.place)).collect();
    let mut roots = members.keys().filter_map(|name| name.strip_suffix("data.pkl"));
    let (Some(root), None) = (roots.next().map(str::to_owned), roots.next()) else {
        return Err(refuse("more than one data.pkl"));
    };
    if members.contains_key(&format!("{root}constants.pkl")) {
        return Err(refuse("a TorchScript program; save the state dict alone (torch.save(model.state_dict(), ...))"));
    }
    let read = |place: &Place| place.read(file).map_err(|why| refuse(&why));
    let big_endian = match members.get(&format!("{root}byteorder")) {
        None => false,
        Some(place) => match (place.len() <= 6).then(|| read(place)).transpose()?.as_deref() {
            Some(b"little") => false,
            Some(b"big") => true,
            _ => return Err(refuse("byteorder is neither little nor big")),
        },
    };
    let place = members.remove(&format!("{root}data.pkl")).expect("its name was found here");
    if place.len() > pickle::MAX_BYTES {
        return Err(refuse("data.pkl is longer than 32 MiB, which no state dict needs; save the state dict alone"));
    }
    let bytes = read(&place)?;
    let pickle = pickle::read(&bytes, allowed_global).map_err(|error| explain(path, error))?;
    let data = format!("{root}data/");
    let places = members.into_iter().filter_map(|(name, place)| Some((name.strip_prefix(&data)?.to_owned(), place)));
    contents(path, &pickle, &Storages { places: places.collect(), big_endian })
}

/// Reads the state dict of a file in PyTorch's older format.
///
/// # Errors
/// As [`zip_contents`].
pub(super) fn legacy_contents(path: &Path, file: &[u8]) -> Result<Contents> {
    let (pickle, storages) = torch_legacy::layout(file).map_err(|error| explain(path, error))?;
    contents(path, &pickle, &storages)
}

fn explain(path: &Path, error: PickleError) -> Error {
    let path = path.to_owned();
    match error {
        PickleError::Global(global) => Error::Global { path, global },
        PickleError::Broken(why) => Error::Torch { path, why },
    }
}

/// Whether a pickle may mention a global. Nothing is called, so this is a list of what is understood (tensors) and of
/// what training scripts save beside them (optimizer settings, arguments), which is passed over.
pub(super) fn allowed_global(module: &str, name: &str) -> bool {
    match module {
        "torch._utils" => {
            name == "_rebuild_parameter" || name == "_rebuild_parameter_with_state" || is_rebuild_tensor(name)
        }
        "torch._tensor" => name == "_rebuild_from_type_v2",
        "torch.nn.parameter" => matches!(name, "Parameter" | "Buffer"),
        "torch.storage" => matches!(name, "UntypedStorage" | "TypedStorage"),
        "torch.serialization" => name == "_get_layout",
        "torch" => {
            matches!(name, "Tensor" | "Size" | "device") || storage_kind(name).is_some() || dtype_kind(name).is_some()
        }
        "torch.cuda" => storage_kind(name).is_some(),
        "collections" => matches!(name, "OrderedDict" | "defaultdict" | "Counter" | "deque"),
        "builtins" | "__builtin__" => matches!(
            name,
            "bool"
                | "bytearray"
                | "complex"
                | "dict"
                | "float"
                | "frozenset"
                | "int"
                | "list"
                | "range"
                | "set"
                | "slice"
                | "str"
                | "tuple"
        ),
        "_codecs" => name == "encode",
        "numpy" => matches!(name, "dtype" | "ndarray"),
        "numpy.core.multiarray" | "numpy._core.multiarray" => matches!(name, "scalar" | "_reconstruct"),
        "argparse" => name == "Namespace",
        "pathlib" => matches!(name, "Path" | "PosixPath" | "PurePosixPath" | "PureWindowsPath" | "WindowsPath"),
        "datetime" => matches!(name, "date" | "datetime" | "time" | "timedelta"),
        _ => false,
    }
}

fn is_rebuild_tensor(name: &str) -> bool {
    matches!(name, "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3")
}

fn float(element: Element) -> Kind {
    Kind::Float { element, complex: false }
}

fn complex(element: Element) -> Kind {
    Kind::Float { element, complex: true }
}

/// What a storage class holds.
fn storage_kind(class: &str) -> Option<Kind> {
    Some(match class {
        "DoubleStorage" => float(Element::F64),
        "FloatStorage" => float(Element::F32),
        "HalfStorage" => float(Element::F16),
        "BFloat16Storage" => float(Element::BF16),
        "ComplexDoubleStorage" => complex(Element::F64),
        "ComplexFloatStorage" => complex(Element::F32),
        "LongStorage" => Kind::Other(8),
        "IntStorage" | "QInt32Storage" => Kind::Other(4),
        "ShortStorage" => Kind::Other(2),
        "CharStorage" | "ByteStorage" | "BoolStorage" | "QInt8Storage" | "QUInt8Storage" | "QUInt4x2Storage"
        | "QUInt2x4Storage" => Kind::Other(1),
        "UntypedStorage" => Kind::Untyped,
        _ => return None,
    })
}

/// What a dtype stands for.
fn dtype_kind(dtype: &str) -> Option<Kind> {
    Some(match dtype {
        "float64" => float(Element::F64),
        "float32" => float(Element::F32),
        "float16" => float(Element::F16),
        "bfloat16" => float(Element::BF16),
        "float8_e4m3fn" => float(Element::Small(Float8::E4M3)),
        "float8_e5m2" => float(Element::Small(Float8::E5M2)),
        "float8_e4m3fnuz" => float(Element::Small(Float8::E4M3Fnuz)),
        "float8_e5m2fnuz" => float(Element::Small(Float8::E5M2Fnuz)),
        "float8_e8m0fnu" => float(Element::Small(Float8::E8M0)),
        "complex32" => complex(Element::F16),
        "complex64" => complex(Element::F32),
        "complex128" => complex(Element::F64),
        "int64" | "uint64" => Kind::Other(8),
        "int32" | "uint32" | "qint32" => Kind::Other(4),
        "int16" | "uint16" => Kind::Other(2),
        "int8" | "uint8" | "bool" | "qint8" | "quint8" | "float4_e2m1fn_x2" => Kind::Other(1),
        _ => return None,
    })
}

/// Reads a persistent id: `("storage", class, key, location, number of values)`, in old files with a view after it.
///
/// # Errors
/// A sentence about what is wrong with it.
pub(super) fn storage_reference<'a>(pickle: &Pickle<'a>, id: Id) -> Result<StorageReference<'a>, String> {
    let broken = || "a reference to a storage is not understood".to_owned();
    let Value::Tuple(items) = &pickle[id] else { return Err(broken()) };
    let (&[tag, class, key, _, values], view) = items.split_first_chunk().ok_or_else(broken)?;
    if pickle.text(tag) != Some("storage") || view.len() > 1 {
        return Err(broken());
    }
    if view.iter().any(|&view| !matches!(pickle[view], Value::Other)) {
        return Err("holds views of storages, as PyTorch before 0.4 wrote them; load and save it once more".into());
    }
    let Value::Global(_, class) = pickle[class] else { return Err(broken()) };
    let kind = storage_kind(class).ok_or_else(|| format!("storage class {class} is not known"))?;
    let (key, values) = pickle.text(key).zip(pickle.size(values)).ok_or_else(broken)?;
    let value_bytes = match kind {
        Kind::Float { element, complex } => element.bytes() * if complex { 2 } else { 1 },
        Kind::Other(bytes) => bytes,
        Kind::Untyped => 1,
    };
    Ok(StorageReference { key, kind, value_bytes, values })
}

/// The function that rebuilds a tensor and its arguments, parameters and subclasses unwrapped; `None` for what is no
/// tensor.
fn rebuild<'p, 'a>(pickle: &'p Pickle<'a>, mut id: Id) -> Option<(&'a str, &'p [Id])> {
    // A call's arguments are older than the call, so this ends; nobody wraps more often than this.
    for _ in 0..4 {
        let Value::Call { mut function, mut arguments } = pickle[id] else { return None };
        if let (Value::Global("torch._tensor", _), Value::Tuple(items)) = (&pickle[function], &pickle[arguments]) {
            let [inner, _type, inner_arguments, _state] = items[..] else { return None };
            (function, arguments) = (inner, inner_arguments);
        }
        let (Value::Global("torch._utils", name), Value::Tuple(items)) = (&pickle[function], &pickle[arguments]) else {
            return None;
        };
        if is_rebuild_tensor(name) {
            return Some((name, items));
        }
        id = *items.first()?;
    }
    None
}

/// The dict of tensors and the key under which it was found.
fn state_dict<'a>(pickle: &Pickle<'a>) -> Result<(Id, Option<&'static str>), String> {
    const ADVICE: &str = "save the state dict alone (torch.save(model.state_dict(), ...))";
    let holds_tensors = |id: Id| match &pickle[id] {
        Value::Dict(pairs) => pairs.iter().any(|&(_, value)| rebuild(pickle, value).is_some()),
        _ => false,
    };
    let Value::Dict(pairs) = &pickle[pickle.root] else { return Err(format!("holds no dict of tensors; {ADVICE}")) };
    let found = NESTED.into_iter().filter_map(|key| Some((pickle.get(pickle.root, key)?, Some(key))));
    let found: Vec<_> = found.filter(|&(id, _)| holds_tensors(id)).collect();
    match found[..] {
        [] if holds_tensors(pickle.root) => Ok((pickle.root, None)),
        [] => {
            let keys = pairs.iter().filter_map(|&(key, _)| pickle.text(key)).take(5);
            let keys: Vec<_> = keys.map(|key| short(key)).collect();
            Err(format!("holds no dict of tensors, only the entries {keys:?}; {ADVICE}"))
        }
        [first, ..] if found.iter().all(|other| other.0 == first.0) => Ok(first),
        _ => {
            let keys: Vec<_> = found.iter().filter_map(|(_, key)| *key).collect();
            Err(format!("holds a state dict under each of {keys:?}; {ADVICE}"))
        }
    }
}

fn contents(path: &Path, pickle: &Pickle, storages: &Storages) -> Result<Contents> {
    let refuse = |why: String| Error::Torch { path: path.to_owned(), why };
    let (dict, key) = state_dict(pickle).map_err(refuse)?;
    let Value::Dict(pairs) = &pickle[dict] else { unreachable!("a state dict is a dict") };
    let mut notices = Vec::new();
    if let Some(key) = key {
        notices.push(format!("the state dict is entry {key:?} of the file; the other entries are passed over"));
    }
    if pairs.len() > MAX_ENTRIES {
        return Err(refuse(format!("the state dict has {} entries, more than {MAX_ENTRIES}", pairs.len())));
    }
    let (mut tensors, mut skipped) = (Vec::new(), Vec::new());
    let mut names = HashSet::new();
    let mut deflated: HashMap<&str, &str> = HashMap::new();
    for &(name, value) in pairs {
        let Some((function, arguments)) = rebuild(pickle, value) else {
            skipped.push(name);
            continue;
        };
        let name = pickle.text(name).ok_or_else(|| refuse("a tensor's name is no text, or too long".into()))?;
        if !names.insert(name) {
            return Err(Error::SharedName { path: path.to_owned(), tensor: name.into() });
        }
        let in_tensor = |why: String| refuse(format!("tensor {}: {why}", short(name)));
        let (storage, kind) = tensor_storage(pickle, function, arguments).map_err(in_tensor)?;
        let Kind::Float { element, complex } = kind else {
            let dtype = arguments.get(6).filter(|_| function == "_rebuild_tensor_v3").unwrap_or(&arguments[0]);
            let dtype = type_name(pickle, *dtype);
            return Err(Error::UnsupportedDtype { path: path.to_owned(), tensor: name.into(), dtype });
        };
        let place = storages.places.get(storage.key).cloned();
        let place = place.ok_or_else(|| in_tensor(format!("storage {} is missing", short(storage.key))))?;
        if matches!(place, Place::Deflated(_))
            && let Some(other) = deflated.insert(storage.key, name)
        {
            let other = short(other);
            let why = format!("shares a compressed storage with {other}; write the archive without compression");
            return Err(in_tensor(why));
        }
        let tensor = stored_tensor(pickle, name, &storage, arguments, (element, complex), place, storages.big_endian);
        tensors.push(tensor.map_err(in_tensor)?);
    }
    if !skipped.is_empty() {
        let key = |&id: &Id| short(pickle.text(id).unwrap_or("(a key that is no text)"));
        let first: Vec<_> = skipped.iter().take(3).map(key).collect();
        notices
            .push(format!("{} entries of the state dict are no tensors and are passed over: {first:?}", skipped.len()));
    }
    Ok(Contents { tensors, notices })
}

/// The storage behind a tensor and what the tensor takes its bytes for.
fn tensor_storage<'a>(
    pickle: &Pickle<'a>,
    function: &str,
    arguments: &[Id],
) -> Result<(StorageReference<'a>, Kind), String> {
    let broken = || "its arguments are not understood".to_owned();
    let Some(&Value::Persistent(id)) = arguments.first().map(|&storage| &pickle[storage]) else { return Err(broken()) };
    let storage = storage_reference(pickle, id)?;
    let metadata = match function {
        "_rebuild_tensor_v2" => arguments.get(6),
        "_rebuild_tensor_v3" => arguments.get(7),
        _ => None,
    };
    if let Some(Value::Dict(flags)) = metadata.map(|&metadata| &pickle[metadata]) {
        if flags.len() > MAX_METADATA {
            return Err(broken());
        }
        if flags.iter().any(|&(_, flag)| matches!(pickle[flag], Value::Bool(true))) {
            return Err("is a conjugated or negated view; save it after .resolve_conj().resolve_neg()".into());
        }
    }
    let kind = match (function, storage.kind) {
        ("_rebuild_tensor_v3", _) => {
            let Value::Global("torch", dtype) = pickle[*arguments.get(6).ok_or_else(broken)?] else {
                return Err(broken());
            };
            dtype_kind(dtype).ok_or_else(broken)?
        }
        (_, Kind::Untyped) => return Err("its storage has no type".into()),
        (_, kind) => kind,
    };
    Ok((storage, kind))
}

/// The name of what is no float, for the message that refuses it: a dtype, or the class of a storage.
fn type_name(pickle: &Pickle, id: Id) -> String {
    let class = match &pickle[id] {
        Value::Persistent(reference) => match &pickle[*reference] {
            Value::Tuple(items) => items.get(1).copied().unwrap_or(id),
            _ => id,
        },
        _ => id,
    };
    match pickle[class] {
        Value::Global(module, name) => format!("{module}.{name}"),
        _ => "of an unknown type".into(),
    }
}

fn stored_tensor(
    pickle: &Pickle,
    name: &str,
    storage: &StorageReference,
    arguments: &[Id],
    (element, complex): (Element, bool),
    place: Place,
    big_endian: bool,
) -> Result<StoredTensor, String> {
    let broken = || "its offset, shape or strides are not understood".to_owned();
    let [_, offset, shape, strides, ..] = *arguments else { return Err(broken()) };
    let (shape, strides) = sizes(pickle, shape).zip(sizes(pickle, strides)).ok_or_else(broken)?;
    if shape.len() != strides.len() {
        return Err(broken());
    }
    let declared = storage.values.checked_mul(storage.value_bytes).filter(|&bytes| bytes <= place.len());
    declared.ok_or_else(|| {
        let key = short(storage.key);
        format!("storage {key} claims {} values, but has {} bytes: truncated", storage.values, place.len())
    })?;
    let value_bytes = element.bytes() * if complex { 2 } else { 1 };
    let start = pickle.size(offset).and_then(|offset| offset.checked_mul(value_bytes)).ok_or_else(broken)?;
    let strides = match is_row_major(&shape, &strides) {
        true => None,
        false => {
            let in_bytes = strides.iter().map(|stride| stride.checked_mul(value_bytes));
            Some(in_bytes.collect::<Option<Vec<_>>>().ok_or_else(broken)?)
        }
    };
    Ok(StoredTensor { name: name.into(), shape, element, complex, big_endian, place, start, strides })
}

/// A tuple of sizes, or a `torch.Size` of one.
fn sizes(pickle: &Pickle, mut id: Id) -> Option<Vec<usize>> {
    if let Value::Call { function, arguments } = pickle[id] {
        let (Value::Global("torch", "Size"), Value::Tuple(items)) = (&pickle[function], &pickle[arguments]) else {
            return None;
        };
        id = *items.first()?;
    }
    let (Value::Tuple(items) | Value::List(items)) = &pickle[id] else { return None };
    let items = (items.len() <= MAX_DIMENSIONS).then_some(items)?;
    items.iter().map(|&item| pickle.size(item)).collect()
}

/// Whether values lie one after the other; the stride of a dimension of one element says nothing.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = Some(1usize);
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || expected == Some(stride);
        expected = expected.and_then(|expected| expected.checked_mul(size));
        fits
    })
}
