"""An independent writer of the bkpack format, from bkpack-v1.md alone, for the test vectors.

The values come from codes and scales one weight at a time, in the plainest code. Every step of the writer can be
tampered with. Random bytes are SHAKE-256 of a tensor's name, so every run, anywhere, writes the same files.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from hashlib import shake_256
from math import prod

import numpy as np

from blake3_numpy import blake3

SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}


def draw(label: str, count: int) -> list[int]:
    """`count` 16-bit numbers that depend on the label only."""
    return list(struct.unpack(f"<{count}H", shake_256(label.encode()).digest(2 * count)))


# One logical tensor: what is stored, what the manifest says, and the values that must come out.


@dataclass
class Stored:
    """A part before it has a place."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Logical:
    name: str
    shape: list[int]
    encoding: dict
    parts: dict[str, Stored]
    values: list  # np.float32, row by row
    component: str = "other"
    half: str | None = None  # of a complex tensor: "real" or "imaginary"


def float_bytes(values, dtype: str) -> bytes:
    """Exactly representable values in their type; BF16 keeps the upper half of the F32."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{'e' if dtype == 'F16' else 'f'}", *values)


def float_values(data: bytes, dtype: str) -> list:
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    if dtype == "F16":
        return [np.float32(value) for (value,) in struct.iter_unpack("<e", data)]
    return list(np.frombuffer(data, "<f4"))


def stream(codes: list[int], bits: int) -> bytes:
    """A row of codes as one little-endian number, padded to words."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 32) * 4, "little")


def base_3(digits: list[int]) -> bytes:
    digits = digits + [0] * (-len(digits) % 5)
    return bytes(sum(digit * 3**k for k, digit in enumerate(digits[i : i + 5])) for i in range(0, len(digits), 5))


def plain(name: str, dtype: str, shape: list[int], data: bytes | None = None) -> Logical:
    if data is None:
        data = float_bytes([(number % 256 - 128) / 64 for number in draw(name, prod(shape))], dtype)
    stored = Stored(dtype, shape, data)
    return Logical(name, shape, {"kind": "float", "dtype": dtype}, {"values": stored}, float_values(data, dtype))


def quantized(name: str, shape: list[int], encoding: dict, scales: list[float] | None = None) -> Logical:
    """A tensor with drawn codes and zero points; scales are drawn too (some negative, the last one 0) if not given."""
    kind, group_size = encoding["kind"], encoding["group_size"]
    columns = shape[-1]
    rows = prod(shape[:-1])
    groups = -(-columns // group_size)
    bits = encoding.get("bits", 1)
    levels = 3 if kind == "ternary" else 2**bits
    asymmetric = encoding.get("symmetric") is False

    codes = [number % levels for number in draw(name + ".codes", rows * columns)]
    codes[0], codes[-1] = levels - 1, 0
    if scales is None:
        scales = [(number - 32768) / 2**20 for number in draw(name + ".scales", rows * groups)]
        scales[-1] = 0.0 if rows * groups > 1 else scales[-1]
        scales = [struct.unpack("<e", struct.pack("<e", scale))[0] for scale in scales]
        if encoding["scale"] == "F32":  # not representable in F16
            scales = [float(np.float32(scale * (1 + 2**-20))) for scale in scales]
    zero_points = [number % levels for number in draw(name + ".zero_points", rows * groups)]

    scale_data = float_bytes(scales, encoding["scale"])
    wide = float_values(scale_data, encoding["scale"])
    values = []
    for row in range(rows):
        for column in range(columns):
            code = codes[row * columns + column]
            group = row * groups + column // group_size
            if kind == "ternary":
                level = code - 1
            elif kind == "binary":
                level = 2 * code - 1
            else:
                level = code - (zero_points[group] if asymmetric else 2 ** (bits - 1))
            with np.errstate(over="ignore", under="ignore"):
                values.append(np.float32(level) * wide[group])

    pack = base_3 if kind == "ternary" else lambda row: stream(row, bits)
    packed = b"".join(pack(codes[row * columns : (row + 1) * columns]) for row in range(rows))
    dtype = "U8" if kind == "ternary" else "U32"
    parts = {
        "packed": Stored(dtype, [rows, len(packed) // SIZE[dtype] // rows], packed),
        "scale": Stored(encoding["scale"], [rows, groups], scale_data),
    }
    if asymmetric:
        data = b"".join(stream(zero_points[row * groups : (row + 1) * groups], bits) for row in range(rows))
        parts["zero_point"] = Stored("U32", [rows, len(data) // 4 // rows], data)
    return Logical(name, shape, encoding, parts, values)


def complex_pair(real: Logical, imaginary: Logical) -> list[Logical]:
    """The halves of a complex tensor; their names must end in .real and .imag."""
    real.half, imaginary.half = "real", "imaginary"
    return [real, imaginary]


def activation_scale(layer: str, groups: int) -> Logical:
    """Drawn scales of v, Re G and Im G of a layer, the last one 0."""
    name = layer + ".activation_scale"
    scales = [(number + 1) / 2**20 for number in draw(name, 3 * groups - 1)]
    tensor = plain(name, "F32", [3, groups], float_bytes([*scales, 0.0], "F32"))
    tensor.component = "bk_core"
    return tensor


def activations(scales: list[Logical], bits: int, group_size: int, positions: int) -> dict:
    return {
        "component": "bk_core",
        "bits": bits,
        "group_size": group_size,
        "positions": positions,
        "samples": 100,
        "text": {"name": "calibration.txt", "blake3": blake3(b"a text")},
        "scales": [scale.name for scale in scales],
    }


def rounded_activations(scale: Logical, record: dict) -> dict:
    """Drawn values of a layer (ties, values out of range, a zero among them) and what quantization makes of them."""
    positions, groups = record["positions"], scale.shape[1]
    limit = 2 ** (record["bits"] - 1) - 1
    before, after = [], []
    for row in range(3):
        levels = [(number - 32768) / 65536 * 3 * limit for number in draw(f"{scale.name}.{row}", positions)]
        levels[:5] = [0.5, 1.5, -2.5, 0.0, -3.0 * limit]
        scales = [scale.values[row * groups + position // record["group_size"]] for position in range(positions)]
        before.append([np.float32(level) * (s or np.float32(1)) for level, s in zip(levels, scales)])
        after.append(
            [
                np.float32(min(max(round(float(x / s)), -limit), limit)) * s if s else np.float32(0)
                for x, s in zip(before[-1], scales)
            ]
        )
    plain_numbers = [[[float(value) for value in row] for row in rows] for rows in (before, after)]
    return dict(zip(("layer", "values", "quantized"), (scale.name[: -len(".activation_scale")], *plain_numbers)))


def integer(bits: int, symmetric: bool, group_size: int, scale: str = "F16") -> dict:
    return {"kind": "int", "bits": bits, "symmetric": symmetric, "group_size": group_size, "scale": scale}


def ternary(group_size: int, scale: str = "F16") -> dict:
    return {"kind": "ternary", "group_size": group_size, "scale": scale}


def binary(group_size: int, scale: str = "F16") -> dict:
    return {"kind": "binary", "group_size": group_size, "scale": scale}


# The writer. Every step can be tampered with, by a hook that is called on what the step made.

SUFFIX = {"values": "", "packed": "_packed", "scale": "_scale", "zero_point": "_zero_point"}


def same(value):
    return value


def compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write(
    tensors: list[Logical],
    files: dict[str, bytes],
    parts=same,  # the stored parts by name, before they are hashed
    manifest=same,  # the manifest
    text=same,  # the manifest as JSON
    order=same,  # the names of the parts in the order of their bytes
    entries=same,  # the header
    header=same,  # the header as JSON bytes
    body=same,  # the data section
    sealed=same,  # the whole file
    page=4096,
    shard=None,
    records=(),  # of quantized activations
) -> bytes:
    stored = {tensor.name + SUFFIX[role]: part for tensor in tensors for role, part in tensor.parts.items()}
    stored.update({f"bkpack.file/{name}": Stored("U8", [len(data)], data) for name, data in files.items()})
    stored = {name: Stored(part.dtype, part.shape, part.data) for name, part in stored.items()}
    parts(stored)

    def reference(name):
        return {"name": name, "blake3": blake3(stored[name].data) if name in stored else "1" * 64}

    record = {
        "version": 1,
        "producer": "make_vectors.py",
        "source": {"kind": "huggingface", "files": []},
        "policy": {},
        "config": None,
        **({"shard": shard} if shard else {}),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "component": tensor.component,
                **({"complex": tensor.half} if tensor.half else {}),
                "encoding": dict(tensor.encoding),
                "parts": {role: reference(tensor.name + SUFFIX[role]) for role in tensor.parts},
            }
            for tensor in tensors
        ],
        **({"activations": list(records)} if records else {}),
        "files": [{"name": name, "part": reference(f"bkpack.file/{name}")} for name in files],
    }
    manifest(record)
    manifest_text = text(compact(record))

    names = sorted(stored, key=lambda name: (len(stored[name].data) % 64 != 0, -SIZE[stored[name].dtype]))
    names = order(names)
    head = {"__metadata__": {"format": "pt", "bkpack": manifest_text, "bkpack_seal": "0" * 64}}
    position = 0
    for name in names:
        part = stored[name]
        end = position + len(part.data)
        head[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [position, end]}
        position = end
    entries(head)
    head_bytes = header(compact(head).encode())
    head_bytes += b" " * (-(8 + len(head_bytes)) % page)
    head_bytes = bytearray(struct.pack("<Q", len(head_bytes)) + head_bytes)
    at = head_bytes.find(b"0" * 64)
    if at >= 0:
        head_bytes[at : at + 64] = blake3(bytes(head_bytes)).encode()
    return bytes(sealed(bytes(head_bytes) + body(b"".join(stored[name].data for name in names))))


def header_of(file: bytes) -> dict:
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])


def index_of(shards: dict[str, bytes]) -> dict:
    weight_map, total_size = {}, 0
    for shard, file in shards.items():
        total_size += len(file) - 8 - int.from_bytes(file[:8], "little")
        weight_map.update({name: shard for name in header_of(file) if name != "__metadata__"})
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def pretty(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def expected(tensors: list[Logical]) -> bytes:
    """A plain safetensors file of the values as F32."""
    head, data = {}, b""
    for tensor in tensors:
        raw = np.array(tensor.values, "<f4").tobytes()
        head[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = compact(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def two_shards(first=None, second=None, index=same, again=()):
    """A model of two shards and its index: files by name, tensors, travelling files.

    `first`, `second` and `index` tamper with the three files; `again` are more tensors for the second shard.
    """
    tensors = [
        quantized("a.weight", [4, 40], integer(4, True, 32)),
        plain("a.norm", "F32", [5]),
        quantized("b.weight", [2, 33], ternary(32)),
    ]
    travelling = {"config.json": b"{}\n"}
    shards = cut(tensors[:2], [*tensors[2:], *again], travelling, first, second, index)
    return shards, tensors, travelling


def paired_shards(first=None, second=None, drop=()):
    """A model of two shards with a complex tensor across them, and scales of activations in the second. `drop` are
    names of tensors to leave out."""
    real, imaginary = complex_pair(plain("c.real", "F16", [2, 3]), quantized("c.imag", [2, 3], integer(8, True, 2)))
    scale = activation_scale("blocks.0.bk_layer", 4)
    tensors = [real, imaginary, scale]
    kept = [[tensor for tensor in part if tensor.name not in drop] for part in ([real], [imaginary, scale])]
    first = {"records": [activations([scale], 8, 3, 10)], **(first or {})}
    return cut(*kept, {}, first, second), tensors, {}


def cut(first_tensors, second_tensors, travelling, first=None, second=None, index=same) -> dict[str, bytes]:
    """The two shards and the index of a model."""
    shard = {"count": 2, "set": blake3(b"set of shards")}
    shards = {
        "model-00001-of-00002.bkpack": write(first_tensors, travelling, shard={"index": 1, **shard}, **(first or {})),
        "model-00002-of-00002.bkpack": write(second_tensors, {}, shard={"index": 2, **shard}, **(second or {})),
    }
    return {**shards, "model.bkpack.index.json": index(pretty(index_of(shards)))}
