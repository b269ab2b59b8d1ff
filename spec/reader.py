"""An independent reader of the bkpack format, version 1, written from bkpack-v1.md alone.

Needs Python 3.9, numpy and blake3_numpy.py beside it. Archives (section 7 of the page) are left out: unpack them first.

    python reader.py MODEL                          list the tensors and check every rule
    python reader.py MODEL --compare F32.safetensors compare every weight, bit for bit, with a plain file
    python reader.py --vectors vectors              run the test vectors
    python reader.py --self-test                    check BLAKE3 against known digests

MODEL is a packed file or, for a model in shards, its index. Exit status: 0 all is well, 1 values differ or a vector
fails, 2 the file breaks a rule or cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import blake3_numpy
from blake3_numpy import blake3


class FormatError(Exception):
    """A file breaks a rule of the page. `rule` is a short stable name of it; the vectors' index uses the same names."""

    def __init__(self, rule: str, message: str):
        super().__init__(f"{message} [{rule}]")
        self.rule = rule
        self.message = message


# JSON as the page wants it: no key twice, and nothing that Python accepts beyond the standard.


def _integer(text):
    return int(text) if len(text) <= 20 else _finite(text)  # no u64 is longer; the conversion of more is quadratic


def _finite(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _no_constant(text):
    raise ValueError(f"{text} is no JSON value")


def _unique(pairs):
    result = {}
    for key, value in pairs:
        if key in result:
            raise FormatError("duplicate-key", f"an object names the key {key!r} twice")
        result[key] = value
    return result


def parse_json(raw: bytes, rule: str, what: str):
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
        return value
    except (ValueError, RecursionError) as error:
        raise FormatError(rule, f"{what} is not valid JSON: {error}") from None


def is_text(value):
    return isinstance(value, str)


def is_unsigned(value):
    return type(value) is int and 0 <= value < 2**64


def is_flag(value):
    return isinstance(value, bool)


def is_list(value):
    return isinstance(value, list)


def is_object(value):
    return isinstance(value, dict)


def is_unsigned_list(value):
    return is_list(value) and all(is_unsigned(item) for item in value)


def is_text_list(value):
    return is_list(value) and all(map(is_text, value))


def get(owner: dict, key: str, check, what: str, rule: str = "manifest"):
    if key not in owner:
        raise FormatError(rule, f"{what} has no field {key!r}")
    if not check(owner[key]):
        raise FormatError(rule, f"{what}: the field {key!r} has the wrong type ({check.__name__[3:]} expected)")
    return owner[key]


# The container: section 1, rules 1 to 4. A plain safetensors file obeys them too.

DTYPE_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
PLAIN_SIZE = {**DTYPE_SIZE, "C64": 8}  # what a plain file to compare with may hold: complex tensors in one piece
HEADER_LIMIT = 100_000_000


@dataclass
class Part:
    """A stored tensor; offsets count from the start of the data section."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


class Container:
    """A safetensors file: `parts` by name in the order of their bytes, `metadata` or None, `start` of the data."""

    def __init__(self, path, sizes=DTYPE_SIZE):
        self.file = open(path, "rb")
        self.sizes = sizes
        self.size = os.fstat(self.file.fileno()).st_size
        if self.size < 8:
            raise FormatError("header-length", "the file is too short to hold the length of a header")
        length = int.from_bytes(self.bytes_at(0, 8), "little")
        if length > HEADER_LIMIT or length > self.size - 8:
            raise FormatError("header-length", f"the header claims {length} bytes, in a file of {self.size}")
        self.start = 8 + length
        header = parse_json(self.bytes_at(8, length), "header-json", "the header")
        if not is_object(header):
            raise FormatError("header-json", "the header is no JSON object")
        self.metadata = header.pop("__metadata__", None)
        if self.metadata is not None and not (is_object(self.metadata) and all(map(is_text, self.metadata.values()))):
            raise FormatError("header-entry", "__metadata__ is no object of strings")
        parts = {name: self._entry(name, entry) for name, entry in header.items()}
        self.parts = dict(sorted(parts.items(), key=lambda item: (item[1].begin, item[1].end, item[0])))
        self._check_layout()

    def bytes_at(self, begin: int, length: int) -> bytes:
        self.file.seek(begin)
        data = self.file.read(length)
        if len(data) != length:
            raise OSError("the file became shorter while it was read")
        return data

    def part_bytes(self, name: str) -> bytes:
        part = self.parts[name]
        return self.bytes_at(self.start + part.begin, part.end - part.begin)

    def _entry(self, name, entry) -> Part:
        what, rule = f"the entry of part {name!r}", "header-entry"
        if not is_object(entry):
            raise FormatError(rule, f"{what} is no object")
        dtype = get(entry, "dtype", is_text, what, rule)
        shape = get(entry, "shape", is_unsigned_list, what, rule)
        offsets = get(entry, "data_offsets", is_unsigned_list, what, rule)
        if dtype not in self.sizes:
            raise FormatError(rule, f"{what}: the type {dtype!r} is not one of {', '.join(self.sizes)}")
        if len(offsets) != 2:
            raise FormatError(rule, f"{what}: data_offsets has {len(offsets)} numbers")
        return Part(dtype, shape, *offsets)

    def _check_layout(self):
        position = 0
        for name, part in self.parts.items():
            if part.begin != position or part.end < part.begin:
                kind = "a hole before it" if part.begin > position else "an overlap"
                kind = kind if part.begin <= part.end else "its end before its begin"
                raise FormatError("offsets", f"part {name!r} at [{part.begin}, {part.end}): {kind}")
            size = self.sizes[part.dtype]
            for dimension in part.shape:
                size *= dimension
                if size >= 2**64:
                    raise FormatError("part-size", f"part {name!r}: the size of shape {part.shape} overflows 64 bits")
            if size != part.end - part.begin:
                raise FormatError("part-size", f"part {name!r}: {part.end - part.begin} bytes do not hold {part.shape}")
            position = part.end
        if position != self.size - self.start:
            raise FormatError("offsets", f"the parts end at {position}, the data at {self.size - self.start}")


# Encodings: section 4.

FIELDS = {
    "float": {"dtype": is_text},
    "int": {"bits": is_unsigned, "symmetric": is_flag, "group_size": is_unsigned, "scale": is_text},
    "ternary": {"group_size": is_unsigned, "scale": is_text},
    "binary": {"group_size": is_unsigned, "scale": is_text},
}


def check_encoding(encoding: dict, what: str):
    kind = get(encoding, "kind", is_text, what)
    if kind not in FIELDS:
        raise FormatError("encoding-kind", f"{what}: the kind {kind!r} is not known to this version")
    for key, check in FIELDS[kind].items():
        get(encoding, key, check, what)
    for key in encoding:
        if key != "kind" and key not in FIELDS[kind]:
            raise FormatError("unknown-field", f"{what}: {kind} has no field {key!r}")
    if kind == "float" and encoding["dtype"] not in ("F32", "F16", "BF16"):
        raise FormatError("encoding-range", f"{what}: dtype {encoding['dtype']!r} is not F32, F16 or BF16")
    if kind == "int" and not 2 <= encoding["bits"] <= 8:
        raise FormatError("encoding-range", f"{what}: bits is {encoding['bits']}, not 2 to 8")
    if kind != "float" and not 1 <= encoding["group_size"] < 2**32:
        raise FormatError("encoding-range", f"{what}: group_size is {encoding['group_size']}, not 1 to 2^32 - 1")
    if kind != "float" and encoding["scale"] not in ("F16", "F32"):
        raise FormatError("encoding-range", f"{what}: scale is {encoding['scale']!r}, not F16 or F32")


def code_bits(encoding: dict) -> int:
    return encoding["bits"] if encoding["kind"] == "int" else 1


def widen(raw: bytes, dtype: str) -> np.ndarray:
    """The f32 values of stored floats."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def unpack_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Dense streams [rows, words] of u32 -> codes [rows, count]."""
    position = np.arange(count, dtype=np.int64) * bits
    word, shift = position // 32, (position % 32).astype(np.uint64)
    following = np.minimum(word + 1, words.shape[1] - 1)  # only read where a code straddles two words
    pair = words[:, word].astype(np.uint64) | words[:, following].astype(np.uint64) << np.uint64(32)
    return (pair >> shift & np.uint64(2**bits - 1)).astype(np.int32)


def check_ternary(packed: np.ndarray, what: str):
    if packed.max() > 242:
        raise FormatError("ternary-byte", f"{what}: a ternary byte is {packed.max()}, above 242")


def unpack_ternary(packed: np.ndarray) -> np.ndarray:
    """Checked bytes [rows, bytes] -> digits [rows, 5 * bytes]."""
    digits = packed[:, :, None] // np.array([1, 3, 9, 27, 81], np.uint8) % np.uint8(3)
    return digits.reshape(len(packed), -1).astype(np.int32)


@dataclass
class Tensor:
    """A logical tensor: the roles of its parts map to (part name, BLAKE3), and `stored` is the file that holds them."""

    name: str
    shape: list[int]
    encoding: dict
    parts: dict[str, tuple[str, str]]
    stored: Container = field(repr=False)
    component: str = ""
    half: str | None = None  # of a complex tensor: "real" or "imaginary"

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.columns

    @property
    def groups(self) -> int:
        return -(-self.columns // self.encoding["group_size"])

    def layout(self) -> dict[str, tuple[str, list[int]]]:
        """The type and shape of the part in each role."""
        encoding = self.encoding
        if encoding["kind"] == "float":
            return {"values": (encoding["dtype"], self.shape)}
        layout = {"scale": (encoding["scale"], [self.rows, self.groups])}
        if encoding["kind"] == "ternary":
            layout["packed"] = ("U8", [self.rows, -(-self.columns // 5)])
        else:
            bits = code_bits(encoding)
            layout["packed"] = ("U32", [self.rows, -(-self.columns * bits // 32)])
            if encoding["kind"] == "int" and not encoding["symmetric"]:
                layout["zero_point"] = ("U32", [self.rows, -(-self.groups * bits // 32)])
        return layout

    def part(self, role: str) -> np.ndarray:
        """The stored part of a role in its own shape: floats as f32, words as u32, bytes as u8."""
        dtype, shape = self.layout()[role]
        raw = self.stored.part_bytes(self.parts[role][0])
        if dtype in ("U32", "U8"):
            return np.frombuffer(raw, "<u4" if dtype == "U32" else "u1").reshape(shape)
        return widen(raw, dtype).reshape(shape)

    def dequantize(self) -> np.ndarray:
        """The weights as f32, in the logical shape."""
        if len(self.shape) > 32:  # what every numpy can hold; the page has no limit
            raise FormatError("dimensions", f"tensor {self.name!r}: numpy cannot hold {len(self.shape)} dimensions")
        encoding, kind = self.encoding, self.encoding["kind"]
        if kind == "float":
            return self.part("values")
        packed, scale = self.part("packed"), self.part("scale")
        zero_point = self.part("zero_point") if "zero_point" in self.parts else None
        if kind == "ternary":
            check_ternary(packed, f"tensor {self.name!r}")
        group = np.arange(self.columns, dtype=np.int64) // encoding["group_size"]  # the group of each column
        weights = np.empty((self.rows, self.columns), np.float32)
        step = max(1, 2**20 // self.columns)
        for top in range(0, self.rows, step):
            rows = slice(top, top + step)
            if kind == "ternary":
                level = unpack_ternary(packed[rows])[:, : self.columns] - 1
            elif kind == "binary":
                level = 2 * unpack_stream(packed[rows], 1, self.columns) - 1
            else:
                level = unpack_stream(packed[rows], encoding["bits"], self.columns)
                if zero_point is None:
                    level -= 2 ** (encoding["bits"] - 1)
                else:
                    level -= unpack_stream(zero_point[rows], encoding["bits"], self.groups)[:, group]
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                weights[rows] = level.astype(np.float32) * scale[rows][:, group]
        return weights.reshape(self.shape)

    def check_contents(self):
        for name, digest in self.parts.values():
            check_hash(self.stored, name, digest)
        if self.encoding["kind"] == "float":
            return
        if not np.isfinite(self.part("scale")).all():
            raise FormatError("scale-value", f"tensor {self.name!r} has a scale that is NaN or infinite")
        for role, count in (("packed", self.columns), ("zero_point", self.groups)):
            if role not in self.parts:
                continue
            packed = self.part(role)
            if self.encoding["kind"] == "ternary":
                check_ternary(packed, f"tensor {self.name!r}")
                dirty = unpack_ternary(packed[:, -1:])[:, (count - 1) % 5 + 1 :].any()
            else:
                used = count * code_bits(self.encoding) % 32
                dirty = used and (packed[:, -1] >> np.uint32(used)).any()
            if dirty:
                raise FormatError("padding", f"tensor {self.name!r}: {role}: the padding of a row is not zero")


def check_hash(stored: Container, name: str, digest: str):
    if blake3(stored.part_bytes(name)) != digest:
        raise FormatError("part-hash", f"part {name!r} does not match its BLAKE3")


# One packed file: rules 5 and 6, the metadata, the seal and the manifest.

SEAL_KEY = b'"bkpack_seal":"'
SUFFIX = {"values": "", "packed": "_packed", "scale": "_scale", "zero_point": "_zero_point"}
HASH = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
HALF_SUFFIX = {"real": ".real", "imaginary": ".imag"}
ACTIVATION_FIELDS = {
    "component": is_text,
    "bits": is_unsigned,
    "group_size": is_unsigned,
    "positions": is_unsigned,
    "samples": is_unsigned,
    "text": is_object,
    "scales": is_text_list,
}
TEXT_FIELDS = {"name": is_text, "blake3": is_text}


def check_fields(record, fields: dict, what: str):
    """Exactly these fields, of these types."""
    if not is_object(record):
        raise FormatError("manifest", f"{what} is no object")
    for key, check in fields.items():
        get(record, key, check, what)
    for key in record:
        if key not in fields:
            raise FormatError("unknown-field", f"{what} has no field {key!r}")


class PackedFile(Container):
    """One file with its manifest checked: `tensors` by name, `files` as name -> (part name, BLAKE3)."""

    def __init__(self, path):
        super().__init__(path)
        for key in ("bkpack", "format", "bkpack_seal"):
            if key not in (self.metadata or {}):
                raise FormatError("metadata", f"__metadata__ has no key {key!r}")
        if self.metadata["format"] != "pt":
            raise FormatError("metadata", f"__metadata__: format is {self.metadata['format']!r}, not 'pt'")
        if self.start % 4096:
            raise FormatError("data-start", f"the data starts at byte {self.start}, not on a multiple of 4096")
        for name, part in self.parts.items():
            if part.begin % DTYPE_SIZE[part.dtype]:
                raise FormatError("alignment", f"part {name!r} of type {part.dtype} starts at byte {part.begin}")
        self._check_seal()
        self.manifest = parse_json(self.metadata["bkpack"].encode("utf-8"), "manifest", "the manifest")
        if not is_object(self.manifest):
            raise FormatError("manifest", "the manifest is no JSON object")
        # Before all else: another version may have another structure.
        version = get(self.manifest, "version", is_unsigned, "the manifest")
        if version != 1:
            raise FormatError("version", f"format version {version} is not supported (this reader knows version 1)")
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, tuple[str, str]] = {}
        self.unclaimed = set(self.parts)
        for tensor in get(self.manifest, "tensors", is_list, "the manifest"):
            self._add_tensor(tensor)
        for field in ("producer", "source", "policy", "config"):
            if field not in self.manifest:
                raise FormatError("manifest", f"the manifest has no field {field!r}")
        self.activations = self.manifest.get("activations", [])
        if not is_list(self.activations):
            raise FormatError("manifest", "the manifest: the field 'activations' has the wrong type (list expected)")
        for record in self.activations:
            check_fields(record, ACTIVATION_FIELDS, "a record of activations")
            check_fields(record["text"], TEXT_FIELDS, "the text of a record of activations")
        for file in get(self.manifest, "files", is_list, "the manifest"):
            self._add_file(file)
        for name in sorted(self.unclaimed):
            raise FormatError("part-orphan", f"part {name!r} belongs to no tensor and no file")
        self.shard = self.manifest.get("shard")
        if "shard" in self.manifest:
            if not is_object(self.shard):
                raise FormatError("manifest", "the manifest: the field 'shard' has the wrong type (object expected)")
            for key, check in (("index", is_unsigned), ("count", is_unsigned), ("set", is_text)):
                get(self.shard, key, check, "the manifest's shard")

    def _check_seal(self):
        head = self.bytes_at(0, self.start)
        if head.count(SEAL_KEY, 8) != 1:
            raise FormatError("seal", "the header does not hold the seal's key exactly once")
        at = head.index(SEAL_KEY, 8) + len(SEAL_KEY)
        if not re.match(rb'[0-9a-f]{64}"', head[at : at + 65]):
            raise FormatError("seal", "the seal is not 64 lowercase hex digits")
        seal = blake3(head[:at] + b"0" * 64 + head[at + 64 :])
        if head[at : at + 64] != seal.encode() or self.metadata["bkpack_seal"] != seal:
            raise FormatError("seal", "the header does not match its seal: it was changed after packing")

    def _claim(self, reference: dict, name: str, what: str) -> tuple[str, str]:
        """The name and hash that a part reference gives, checked against the name that the rules give."""
        for key in reference:
            if key not in ("name", "blake3"):
                raise FormatError("unknown-field", f"{what} has no field {key!r}")
        found = get(reference, "name", is_text, what)
        digest = get(reference, "blake3", is_text, what)
        if not HASH.fullmatch(digest):
            raise FormatError("hash-text", f"{what}: the hash is not 64 lowercase hex digits")
        if found != name:
            raise FormatError("part-name", f"{what} is named {found!r}, not {name!r}")
        if name not in self.parts:
            raise FormatError("part-missing", f"{what}: the file holds no part {name!r}")
        if name not in self.unclaimed:
            raise FormatError("part-shared", f"{what}: part {name!r} is claimed twice")
        self.unclaimed.remove(name)
        return name, digest

    def _add_tensor(self, record):
        if not is_object(record):
            raise FormatError("manifest", "an entry of 'tensors' is no object")
        name = get(record, "name", is_text, "a tensor of the manifest")
        what = f"tensor {name!r}"
        if name in self.tensors:
            raise FormatError("duplicate-tensor", f"{what} is listed twice")
        shape = get(record, "shape", is_unsigned_list, what)
        if 0 in shape:
            raise FormatError("shape", f"{what}: shape {shape} holds no element")
        elements = 1
        for dimension in shape:
            elements *= dimension
            if 8 * elements >= 2**64:
                raise FormatError("shape", f"{what}: eight times the elements of shape {shape} overflow 64 bits")
        encoding = get(record, "encoding", is_object, what)
        check_encoding(encoding, f"{what}: encoding")
        half = record.get("complex")
        if "complex" in record:
            if not is_text(half) or half not in HALF_SUFFIX:
                raise FormatError("complex-field", f"{what}: complex is {half!r}, not 'real' or 'imaginary'")
            if not name.endswith(HALF_SUFFIX[half]):
                raise FormatError("complex-name", f"{what} is a half whose name does not end in {HALF_SUFFIX[half]}")
        references = get(record, "parts", is_object, what)
        tensor = Tensor(name, shape, encoding, {}, self, get(record, "component", is_text, what), half)
        layout = tensor.layout()
        if set(references) != set(layout):
            raise FormatError("parts", f"{what} has the roles {sorted(references)}, not {sorted(layout)}")
        for role, (dtype, part_shape) in layout.items():
            reference = get(references, role, is_object, what)
            tensor.parts[role] = self._claim(reference, name + SUFFIX[role], f"{what}: part {role}")
            part = self.parts[name + SUFFIX[role]]
            if part.dtype != dtype:
                raise FormatError("part-dtype", f"{what}: part {role} is {part.dtype}, not {dtype}")
            if part.shape != part_shape:
                raise FormatError("part-shape", f"{what}: part {role} has shape {part.shape}, not {part_shape}")
        self.tensors[name] = tensor

    def _add_file(self, record):
        if not is_object(record):
            raise FormatError("manifest", "an entry of 'files' is no object")
        name = get(record, "name", is_text, "a file of the manifest")
        if not FILE_NAME.fullmatch(name):
            raise FormatError("file-name", f"the file name {name!r} is not one safe path component")
        what = f"file {name!r}"
        reference = get(record, "part", is_object, what)
        self.files[name] = self._claim(reference, f"bkpack.file/{name}", what)
        if self.parts[f"bkpack.file/{name}"].dtype != "U8":
            raise FormatError("part-dtype", f"{what} is {self.parts[f'bkpack.file/{name}'].dtype}, not U8")
        if len(self.parts[f"bkpack.file/{name}"].shape) != 1:
            raise FormatError("part-shape", f"{what} does not have one dimension")

    def check_contents(self):
        for tensor in self.tensors.values():
            tensor.check_contents()
        for name, digest in self.files.values():
            check_hash(self, name, digest)


# A whole model: one file, or the shards of an index (section 6).


class Model:
    """A model whose structure has been checked; `manifest` and `activations` are the first shard's.

    `tensors` holds the logical tensors, halves of complex ones under their own names; `complex_names` are those that
    `dequantize` puts together.
    """

    def __init__(self, shards: list[PackedFile], path):
        self.shards = shards
        self.manifest = shards[0].manifest
        self.activations = shards[0].activations
        self.tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
        self._holder = {name: shard for shard in shards for name in shard.files}
        self.complex_names = []
        try:
            for tensor in self.tensors.values():
                if tensor.half:
                    self._check_half(tensor)
            self._check_activations()
        except FormatError as error:
            raise FormatError(error.rule, f"{path}: {error.message}") from None

    def _check_half(self, tensor: Tensor):
        name = tensor.name[: -len(HALF_SUFFIX[tensor.half])]
        other_half = "imaginary" if tensor.half == "real" else "real"
        other = self.tensors.get(name + HALF_SUFFIX[other_half])
        what = f"tensor {tensor.name!r} is half of a complex tensor"
        if other is None or other.half != other_half:
            raise FormatError("complex-pair", f"{what}, and the {other_half} half is not there")
        if other.shape != tensor.shape:
            raise FormatError("complex-pair", f"{what} of shape {tensor.shape}; the other half has {other.shape}")
        if name in self.tensors:
            raise FormatError("complex-clash", f"{what}, and there is a tensor {name!r} as well")
        if tensor.half == "real":
            self.complex_names.append(name)

    def _check_activations(self):
        components, scales = set(), set()
        for record in self.activations:
            component, size, positions = record["component"], record["group_size"], record["positions"]
            what = f"activations of {component!r}"
            if component != "bk_core":
                raise FormatError("activation-component", f"{what} are not known to this version")
            if component in components:
                raise FormatError("activation-component", f"{what} are recorded twice")
            components.add(component)
            if record["bits"] not in (4, 8) or size < 1 or positions < 1 or not record["scales"]:
                numbers = f"{record['bits']} bits, groups of {size}, {positions} positions"
                raise FormatError("activation-range", f"{what}: {numbers}, {len(record['scales'])} scales")
            shape = [3, -(-positions // size)]
            for name in record["scales"]:
                tensor = self.tensors.get(name)
                if name in scales:
                    problem = "named twice"
                elif not name.endswith(".activation_scale"):
                    problem = "not named after a layer and .activation_scale"
                elif tensor is None:
                    problem = "no tensor of the model"
                elif tensor.encoding != {"kind": "float", "dtype": "F32"} or tensor.component != component:
                    problem = f"not plain F32 of component {component}"
                elif tensor.shape != shape:
                    problem = f"of shape {tensor.shape}, not {shape}"
                else:
                    scales.add(name)
                    continue
                raise FormatError("activation-scale", f"{what}: the scales {name!r} are {problem}")

    def dequantize(self, name: str) -> np.ndarray:
        """The weights of a tensor as f32, or of a complex tensor as complex64, in its logical shape."""
        if name not in self.complex_names:
            return self.tensors[name].dequantize()
        values = np.empty(self.tensors[name + ".real"].shape, np.complex64)
        values.real = self.tensors[name + ".real"].dequantize()
        values.imag = self.tensors[name + ".imag"].dequantize()
        return values

    def quantize_activations(self, layer: str, values: np.ndarray) -> np.ndarray:
        """What becomes of v, Re G and Im G of a layer: f32 [3, positions] of one window to f32 of the same shape."""
        name = layer + ".activation_scale"
        record = next(record for record in self.activations if name in record["scales"])
        count = values.shape[1]
        if count > record["positions"]:
            raise ValueError(f"{count} positions, where the model has scales for {record['positions']}")
        scale = self.tensors[name].dequantize()[:, np.arange(count) // record["group_size"]]
        limit = np.float32(2 ** (record["bits"] - 1) - 1)
        with np.errstate(all="ignore"):
            levels = np.clip(np.rint(values.astype(np.float32) / scale), -limit, limit)
            return np.where(scale == 0, np.float32(0), levels * scale)

    @property
    def file_names(self) -> list[str]:
        return list(self._holder)

    def file(self, name: str) -> bytes:
        """The bytes of a travelling file."""
        holder = self._holder[name]
        return holder.part_bytes(holder.files[name][0])

    def check_contents(self):
        """Checks the hash of every part, the padding, the ternary bytes and the scales."""
        for shard in self.shards:
            shard.check_contents()
        for name in (name for record in self.activations for name in record["scales"]):
            scale = self.tensors[name].dequantize()
            if not (np.isfinite(scale) & (scale >= 0)).all():
                raise FormatError("activation-scale-value", f"{name!r} has a scale that is negative, NaN or infinite")


def open_file(path: Path) -> PackedFile:
    try:
        return PackedFile(path)
    except FormatError as error:
        raise FormatError(error.rule, f"{path}: {error.message}") from None


def open_model(path) -> Model:
    """Opens a packed file, or a model in shards by its index, and checks everything but the contents."""
    path = Path(path)
    if path.name.endswith(".index.json"):
        return Model(open_shards(path), path)
    packed = open_file(path)
    if packed.shard is not None:
        raise FormatError("shard-set", f"{path} is one shard of a model; open the model by its index")
    return Model([packed], path)


def open_shards(path: Path) -> list[PackedFile]:
    if path.stat().st_size > HEADER_LIMIT:
        raise FormatError("shard-index", f"{path}: the index is longer than {HEADER_LIMIT} bytes")
    raw = path.read_bytes()
    index = parse_json(raw, "shard-index", f"{path}: the index")
    if not is_object(index):
        raise FormatError("shard-index", f"{path}: the index is no JSON object")
    targets = get(index, "weight_map", is_object, f"{path}: the index", "shard-index").values()
    stem, _, extension = path.name[: -len(".index.json")].rpartition(".")
    pattern = re.compile(re.escape(stem) + r"-[0-9]{5}-of-([0-9]{5})\." + re.escape(extension))
    counts = {match and int(match[1]) for match in (is_text(name) and pattern.fullmatch(name) for name in targets)}
    if len(counts) != 1 or not all(counts):
        raise FormatError("shard-index", f"{path}: the index does not name shards {stem}-00001-of-0000N.{extension}")
    count = counts.pop()

    shards, seen, weight_map, total_size = [], set(), {}, 0
    for number in range(1, count + 1):
        name = f"{stem}-{number:05}-of-{count:05}.{extension}"
        if not (path.parent / name).exists():
            raise FormatError("shard-missing", f"{path}: shard {name} is missing")
        shard = open_file(path.parent / name)
        if shard.shard is None:
            raise FormatError("shard-set", f"{name} is no shard")
        if shards and shard.activations:
            raise FormatError("activation-shard", f"{name}: only the first shard's manifest records activations")
        if (shard.shard["index"], shard.shard["count"]) != (number, count):
            raise FormatError("shard-set", f"{name} says it is {shard.shard['index']} of {shard.shard['count']}")
        if shards and shard.shard["set"] != shards[0].shard["set"]:
            raise FormatError("shard-set", f"{name} belongs to another set than the first shard")
        for tensor in shard.tensors:
            if tensor in seen:
                raise FormatError("duplicate-tensor", f"{name}: tensor {tensor!r} is in another shard too")
            seen.add(tensor)
        for part in shard.parts:
            if part in weight_map:
                raise FormatError("part-shared", f"{name}: part {part!r} is in another shard too")
            weight_map[part] = name
        total_size += shard.size - shard.start
        shards.append(shard)
    expected = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    if raw != (json.dumps(expected, indent=2, ensure_ascii=False) + "\n").encode("utf-8"):
        raise FormatError("shard-index", f"{path}: the index differs from the one that follows from the shards")
    return shards


# The command.


def describe(encoding: dict) -> str:
    if encoding["kind"] == "float":
        return encoding["dtype"]
    text = encoding["kind"]
    if text == "int":
        text += f"{encoding['bits']} {'symmetric' if encoding['symmetric'] else 'asymmetric'}"
    return f"{text}, groups of {encoding['group_size']}, {encoding['scale']} scales"


def count(model: Model) -> str:
    weights = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    return f"{len(model.tensors)} tensors, {weights} weights"


def list_model(path):
    model = open_model(path)
    for tensor in model.tensors.values():
        half = f"  {tensor.half} half" if tensor.half else ""
        print(f"{tensor.name}  {tensor.shape}  {describe(tensor.encoding)}{half}")
    for record in model.activations:
        numbers = f"{record['bits']} bits, groups of {record['group_size']}, {record['positions']} positions"
        print(f"activations of {record['component']}  {numbers}")
    for name in model.file_names:
        print(f"file {name}  {len(model.file(name))} bytes")
    model.check_contents()
    print(f"{count(model)}, {len(model.file_names)} files: every rule holds")


def first_difference(model: Model, plain: Container) -> str | None:
    """Where the model's weights and a plain safetensors file differ in a bit, in words. The plain file holds F32, and a
    complex tensor as C64 or as its two halves."""
    whole = [name for name in model.complex_names if name in plain.parts]
    halves = {name + suffix for name in whole for suffix in HALF_SUFFIX.values()}
    names = {**dict.fromkeys(name for name in model.tensors if name not in halves), **dict.fromkeys(whole)}
    for name in sorted(names.keys() ^ plain.parts.keys()):
        return f"tensor {name!r} is in only one of the two files"
    for name in names:
        part = plain.parts[name]
        dtype = "C64" if name in whole else "F32"
        shape = model.tensors[name + ".real" if name in whole else name].shape
        if part.dtype != dtype or part.shape != shape:
            return f"tensor {name!r} is {dtype} {shape} here and {part.dtype} {part.shape} there"
        # A complex value is two f32, the real one first.
        ours = np.ascontiguousarray(model.dequantize(name)).reshape(-1).view(np.float32)
        theirs = np.frombuffer(plain.part_bytes(name), "<f4").astype(np.float32)
        different = np.flatnonzero(ours.view(np.uint32) != theirs.view(np.uint32))
        if different.size:
            at = different[0]
            bits = [f"{array.view(np.uint32)[at]:08x}" for array in (ours, theirs)]
            return (
                f"tensor {name!r}: {different.size} weights differ, the first at element {at}: "
                f"{ours[at]} ({bits[0]}) here, {theirs[at]} ({bits[1]}) there"
            )
    return None


def compare(path, plain_path) -> int:
    model = open_model(path)
    difference = first_difference(model, Container(plain_path, PLAIN_SIZE))
    if difference:
        print(difference)
        return 1
    print(f"{count(model)}: identical")
    return 0


def valid_failure(folder: Path, case: dict) -> str | None:
    """What is wrong with a vector that must be accepted."""
    try:
        model = open_model(folder / case["file"])
        model.check_contents()
        plain = Container(folder / case["expected"])
        difference = first_difference(model, plain) or complex_difference(model, plain, case["complex"])
        files = {name: model.file(name).decode("utf-8") for name in model.file_names}
    except (FormatError, OSError) as error:
        return f"refused: {error}"
    if model.activations != case["activations"]:
        return "the records of activations differ"
    for example in case["examples"]:
        found = model.quantize_activations(example["layer"], np.array(example["values"], np.float32))
        if not np.array_equal(found, np.array(example["quantized"], np.float32)):
            return f"the quantized activations of {example['layer']!r} differ"
    return difference or (None if files == case["files"] else "the travelling files differ")


def complex_difference(model: Model, plain: Container, names: list[str]) -> str | None:
    """Whether the complex tensors are these, put together from their halves."""
    if sorted(model.complex_names) != names:
        return f"the complex tensors are {model.complex_names}, not {names}"
    for name in names:
        values = model.dequantize(name)
        for half, suffix in ((values.real, ".real"), (values.imag, ".imag")):
            if half.astype("<f4").tobytes() != plain.part_bytes(name + suffix):
                return f"the complex tensor {name!r} differs from {name + suffix!r}"
    return None


def malformed_failure(folder: Path, case: dict) -> str | None:
    """What is wrong with a vector that must be refused, for its rule and at its stage."""
    stage = "open"
    try:
        model = open_model(folder / case["file"])
        stage = "contents"
        model.check_contents()
    except FormatError as error:
        found = (stage, error.rule)
        return None if found == (case["stage"], case["rule"]) else f"refused at {stage}: {error}"
    except OSError as error:
        return f"cannot be read: {error}"
    return "accepted"


def run_vectors(folder: Path) -> int:
    passed = failed = 0
    for kind, failure_of in (("valid", valid_failure), ("malformed", malformed_failure)):
        for case in json.loads((folder / kind / "index.json").read_text(encoding="utf-8")):
            failure = failure_of(folder / kind, case)
            passed, failed = passed + (not failure), failed + bool(failure)
            print(f"{'FAILED' if failure else 'ok'}  {kind}/{case['file']}" + (f": {failure}" if failure else ""))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Independent reader of the bkpack format, version 1.")
    parser.add_argument("model", nargs="?", help="a packed file, or the index of a model in shards")
    parser.add_argument("--compare", metavar="F32.safetensors", help="a plain file to compare every weight with")
    parser.add_argument("--vectors", metavar="DIR", type=Path, help="run the test vectors of a folder")
    parser.add_argument("--self-test", action="store_true", help="check BLAKE3 against known digests")
    arguments = parser.parse_args()
    if sum((arguments.model is not None, arguments.vectors is not None, arguments.self_test)) != 1:
        parser.error("give a MODEL, --vectors or --self-test")
    try:
        if arguments.self_test:
            return blake3_numpy.self_test()
        if arguments.vectors:
            return run_vectors(arguments.vectors)
        if arguments.compare:
            return compare(arguments.model, arguments.compare)
        list_model(arguments.model)
        return 0
    except (FormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
