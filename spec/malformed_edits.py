"""The healthy model that malformed vectors start from, and the ways to damage its manifest, parts and header."""

from __future__ import annotations

from math import prod

from vector_writer import SIZE, Logical, Stored, binary, header_of, integer, plain, quantized, ternary


def base() -> tuple[list[Logical], dict[str, bytes]]:
    tensors = [
        quantized("int4", [4, 40], integer(4, True, 32)),
        quantized("int3", [2, 70], integer(3, False, 32, "F32")),
        quantized("ternary", [2, 7], ternary(32)),
        quantized("binary", [2, 40], binary(32)),
        plain("norm", "F32", [2, 3]),
    ]
    return tensors, {"a.json": b'{"a": 1}\n'}


def edit(name: str, **fields):
    """A manifest hook that sets fields of one tensor."""
    return lambda manifest: tensor_of(manifest, name).update(fields)


def edit_encoding(name: str, **fields):
    return lambda manifest: tensor_of(manifest, name)["encoding"].update(fields)


def edit_part(name: str, role: str, **fields):
    return lambda manifest: tensor_of(manifest, name)["parts"][role].update(fields)


def tensor_of(manifest: dict, name: str) -> dict:
    return next(tensor for tensor in manifest["tensors"] if tensor["name"] == name)


def edit_entry(name: str, **fields):
    """An entries hook that sets fields of one part."""
    return lambda header: header[name].update(fields)


def set_part(name: str, dtype: str, shape: list[int], data: bytes | None = None):
    """A parts hook that puts other bytes, zeros by default, into a part."""
    data = bytes(SIZE[dtype] * prod(shape)) if data is None else data
    return lambda parts: parts.__setitem__(name, Stored(dtype, shape, data))


def set_bytes(name: str, at: int, data: bytes):
    """A parts hook that overwrites some bytes of a part."""

    def hook(parts):
        old = parts[name].data
        parts[name].data = old[:at] + data + old[at + len(data) :]
        assert parts[name].data != old and len(parts[name].data) == len(old)

    return hook


def replace(old, new):
    """A hook that replaces text or bytes, once."""

    def hook(value):
        assert value.count(old) >= 1, old
        return value.replace(old, new, 1)

    return hook


def shifted(after: int, by: int):
    """An entries hook that moves all parts from a position on."""

    def hook(header):
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= after:
                entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return hook


def flipped_part(name: str):
    """A sealed hook that flips one bit of a part."""

    def hook(file):
        at = 8 + int.from_bytes(file[:8], "little") + header_of(file)[name]["data_offsets"][0]
        return file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]

    return hook


def seal_hook(change):
    """A sealed hook that changes the 64 digits of the seal and the quote behind them."""

    def hook(file):
        digits = header_of(file)["__metadata__"]["bkpack_seal"].encode() + b'"'
        changed = change(digits)
        assert changed != digits
        return file.replace(digits, changed, 1)

    return hook


def without(*path):
    """A hook that removes a field."""

    def hook(record):
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return hook
