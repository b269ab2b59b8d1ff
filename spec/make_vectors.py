"""Writes the test vectors of the bkpack format.

    python make_vectors.py            write vectors/ anew
    python make_vectors.py --check    fail if vectors/ is not what this program writes

`valid/` holds files with the values they decode to, `malformed/` one file for every way to break a rule. Needs Python
3.9 and numpy.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np

from malformed_vectors import malformed
from vector_writer import (
    Logical,
    activation_scale,
    activations,
    binary,
    complex_pair,
    expected,
    integer,
    paired_shards,
    plain,
    pretty,
    quantized,
    rounded_activations,
    ternary,
    two_shards,
    write,
)

VECTORS = Path(__file__).parent / "vectors"


def every_length(label: str, group: int, encoding) -> list[Logical]:
    """Odd row lengths, groups that divide them or not, both types of scale; `encoding` takes group size and scale."""
    cases = [
        ([3, 1], 32, "F16"),
        ([2, 5], 2, "F32"),
        ([2, 31], 31, "F16"),
        ([3, 33], 32, "F32"),
        ([2, 100], 48, "F16"),
        ([2, 96], 32, "F16"),
        ([2, 2 * group], group, "F32"),
    ]
    return [
        quantized(f"{label}.{shape[1]}_by_{group_size}", shape, encoding(group_size, scale))
        for shape, group_size, scale in cases
    ]


def float_tensors() -> list[Logical]:
    special = {
        "F32": struct.pack("<8I", 0, 0x80000000, 1, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000),
        "F16": struct.pack("<8H", 0, 0x8000, 1, 0x03FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00),
        "BF16": struct.pack("<8H", 0, 0x8000, 1, 0x007F, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0),
    }
    tensors = []
    for dtype in ("F32", "F16", "BF16"):
        tensors += [plain(f"{dtype}.{len(shape)}d", dtype, shape) for shape in ([], [5], [3, 7], [2, 3, 4])]
        tensors.append(plain(f"{dtype}.special", dtype, [8], special[dtype]))
    return tensors


def shaped_tensors() -> list[Logical]:
    return [
        quantized("vector.int4", [100], integer(4, True, 32)),
        quantized("vector.int5", [33], integer(5, False, 32)),
        quantized("vector.binary", [40], binary(32)),
        quantized("vector.ternary", [7], ternary(32)),
        quantized("cube.int3", [2, 3, 33], integer(3, False, 16)),
        quantized("cube.ternary", [2, 2, 7], ternary(4)),
        quantized("four.int6", [2, 1, 3, 5], integer(6, True, 5)),
        quantized("column.int2", [4, 1], integer(2, True, 1)),
        quantized("huge_group.int8", [2, 40], integer(8, True, 2**32 - 1)),
        quantized("whole_words.int4", [64, 32], integer(4, True, 32)),
    ]


def extreme_scales() -> list[Logical]:
    """One row of two groups each."""
    smallest, largest = 2.0**-149, float(np.float32(3.4028235e38))
    pairs = {
        "F16": [(2.0**-24, -(2.0**-24)), (65504.0, -65504.0), (0.0, -0.0)],
        "F32": [(smallest, -smallest), (largest, -largest), (0.0, -0.0), (float(np.float32(0.1)), 1.0)],
    }
    return [
        quantized(f"{scale}.{number}.{encoding['kind']}{bits}", [1, 64], encoding, list(pair))
        for scale in pairs
        for number, pair in enumerate(pairs[scale])
        for bits in (3, 8)
        for encoding in [integer(bits, bits == 8, 32, scale)]
    ]


def complex_tensors() -> list[Logical]:
    special = struct.pack("<4I", 0x80000000, 0x7F800000, 0x00000001, 0x7F7FFFFF)
    return [
        *complex_pair(plain("plain.real", "F32", [3, 5]), plain("plain.imag", "F32", [3, 5])),
        *complex_pair(plain("scalar.real", "F16", []), plain("scalar.imag", "BF16", [])),
        *complex_pair(plain("special.real", "F32", [4], special), plain("special.imag", "F32", [4])),
        *complex_pair(
            quantized("mixed.real", [2, 70], integer(4, True, 32)), quantized("mixed.imag", [2, 70], ternary(64, "F32"))
        ),
        *complex_pair(quantized("dotted.real.real", [1, 9], binary(4)), plain("dotted.real.imag", "F16", [1, 9])),
        plain("alone.real", "F32", [2]),
        plain("both.real", "F32", [2]),
        plain("both.imag", "F32", [3]),
    ]


def add_unknown_fields(manifest):
    manifest["comment"] = {"anything": [1, 2.5, None, {"version": 2}]}
    manifest["source"]["revision"] = "main"
    manifest["config"] = {"hidden_size": 8, "nested": {"list": [True, False, "x"]}}
    for tensor in manifest["tensors"]:
        tensor["importance"] = 0.25
    for file in manifest["files"]:
        file["media_type"] = "application/json"


def valid() -> dict[str, bytes]:
    files, index = {}, []

    def add(name, why, tensors, travelling=None, records=(), **hooks):
        files[f"{name}.bkpack"] = write(tensors, travelling or {}, records=records, **hooks)
        listed(f"{name}.bkpack", name, why, tensors, travelling or {}, records)

    def listed(file, name, why, tensors, travelling, records=()):
        files[f"{name}.expected.safetensors"] = expected(tensors)
        case = {"file": file, "expected": f"{name}.expected.safetensors"}
        case["files"] = {key: data.decode() for key, data in travelling.items()}
        case["complex"] = sorted(tensor.name[: -len(".real")] for tensor in tensors if tensor.half == "real")
        case["activations"] = list(records)
        named = {tensor.name: tensor for tensor in tensors}
        case["examples"] = [rounded_activations(named[name], record) for record in records for name in record["scales"]]
        index.append({**case, "why": why})

    def add_shards(name, why, shards, tensors, travelling, records=()):
        files.update({f"{name}/{file}": data for file, data in shards.items()})
        listed(f"{name}/model.bkpack.index.json", name, why, tensors, travelling, records)

    for bits in range(2, 9):
        group = (64, 128, 256)[bits % 3]
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "asymmetric"
            tensors = every_length("w", group, partial(integer, bits, symmetric))
            add(f"int{bits}-{kind}", f"{bits}-bit {kind} codes in rows of many lengths", tensors)
    add("ternary", "five digits a byte, rows of many lengths", every_length("w", 128, ternary))
    add("binary", "one bit a weight, rows of many lengths", every_length("w", 64, binary))
    add("float", "plain tensors, scalars, special values", float_tensors())
    add("shapes", "tensors of one, three and four dimensions, and a group larger than any row", shaped_tensors())
    add("scales", "the smallest and largest scales, both signs, both zeros; products that overflow", extreme_scales())
    small = [quantized("w", [4, 40], integer(4, True, 32)), plain("norm", "F16", [3])]
    travelling = {"config.json": b'{"a": "\xc3\xa9"}\n', "A-b_c.9": b"x", "empty.txt": b"", "0": b"0" * 64}
    add("files", "travelling files, one of them empty", small, travelling)
    names = [
        'quote"back\\slash',
        "w\u00f6rld/\u4e16\u754c",
        '"bkpack_seal":"',
        "new\nline \u0001",
        "a",
        "a_packed_",
        "a.b",
    ]
    add("names", "names that JSON must escape", [plain(name, "F32", [2]) for name in names])
    add("unknown-fields", "fields that version 1 does not know", small, {"a.json": b"{}"}, manifest=add_unknown_fields)
    add(
        "any-order",
        "parts in an order of their own, aligned; the header with spaces and with escapes",
        [quantized("w", [4, 40], integer(4, False, 32, "F32")), plain("norm", "F16", [4]), plain("bias", "F32", [2])],
        {"f": b"eight by"},
        order=lambda names: sorted(names, reverse=True),
        header=lambda raw: raw.replace(b'"shape":', b'"shape" :\t').replace(b'"dtype"', b'"\\u0064type"') + b" ",
    )
    add("complex", "complex tensors in halves, and tensors that are only named as if", complex_tensors())
    scales = [activation_scale(f"blocks.{layer}.bk_layer", 4) for layer in (0, 10)]
    core = [*scales, quantized("blocks.0.bk_layer.v_proj.weight", [1, 40], integer(8, True, 32))]
    records = [activations(scales, 8, 3, 10)]
    add("activations", "8-bit activations, the last group of positions shorter", core, records=records)
    wide = [activation_scale("core", 1)]
    records = [activations(wide, 4, 2**40, 5)]
    add("activations-wide", "4-bit activations, one group for all positions", wide, records=records)
    each = [activation_scale("core", 5)]
    add("activations-each", "a scale for each position", each, records=[activations(each, 8, 1, 5)])
    add("activations-none", "an empty list of activations", small, manifest=lambda m: m.update(activations=[]))
    add_shards("sharded", "a model of two shards", *two_shards())
    shards, tensors, travelling = paired_shards()
    records = [activations(tensors[2:], 8, 3, 10)]
    why = "a complex tensor across two shards, and scales of activations in the second"
    add_shards("sharded-halves", why, shards, tensors, travelling, records)
    files["index.json"] = pretty(index)
    return files


def everything() -> dict[str, bytes]:
    built = {f"valid/{name}": data for name, data in valid().items()}
    built.update({f"malformed/{name}": data for name, data in malformed().items()})
    return built


def check(built: dict[str, bytes]) -> int:
    found = {path.relative_to(VECTORS).as_posix(): path.read_bytes() for path in VECTORS.rglob("*") if path.is_file()}
    problems = [f"{name}: missing" for name in sorted(built.keys() - found.keys())]
    problems += [f"{name}: not written by this program" for name in sorted(found.keys() - built.keys())]
    problems += [f"{name}: differs" for name in sorted(built.keys() & found.keys()) if built[name] != found[name]]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(built)} files, {len(problems)} differences")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the test vectors of the bkpack format.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if vectors/ differs")
    arguments = parser.parse_args()
    built = everything()
    if arguments.check:
        return check(built)
    for folder in ("valid", "malformed"):
        shutil.rmtree(VECTORS / folder, ignore_errors=True)
    for name, data in built.items():
        path = VECTORS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(built)} files, {sum(map(len, built.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
