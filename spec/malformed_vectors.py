"""The malformed test vectors: one small model, damaged in every way that a reader must notice.

Each breaks its rule and, as far as it can be, no other: hashes and seal are made after the damage, unless they are what
is damaged.
"""

from __future__ import annotations

import json
import struct

from malformed_edits import (
    base,
    edit,
    edit_encoding,
    edit_part,
    tensor_of,
    edit_entry,
    set_part,
    set_bytes,
    replace,
    shifted,
    flipped_part,
    seal_hook,
    without,
)
from malformed_records import activation_cases, complex_cases, shard_cases
from vector_writer import (
    SUFFIX,
    binary,
    blake3,
    compact,
    integer,
    paired_shards,
    plain,
    pretty,
    quantized,
    ternary,
    two_shards,
    write,
)


def container_cases(add):
    add("too-short", "header-length", "7 bytes, where the header's length takes 8", sealed=lambda file: file[:7])
    add("empty", "header-length", "no bytes at all", sealed=lambda file: b"")
    over = struct.pack("<Q", 100_000_001)
    add("header-over-limit", "header-length", "a header of 100,000,001 bytes", sealed=lambda file: over + file[8:])
    add(
        "header-length-overflow",
        "header-length",
        "a header of 2^64 - 1 bytes, whose end overflows",
        sealed=lambda file: b"\xff" * 8 + file[8:],
    )
    add(
        "header-past-end",
        "header-length",
        "the header ends one byte behind the file",
        sealed=lambda file: struct.pack("<Q", len(file) - 7) + file[8:],
    )
    add(
        "header-not-utf8", "header-json", "a byte 0xff in a string", header=replace(b"make_vectors", b"make\xffvectors")
    )
    add("header-not-json", "header-json", "a comma too many", header=replace(b'"dtype"', b',"dtype"'))
    add("header-trailing-text", "header-json", "a letter behind the object", header=lambda raw: raw + b"x")
    add("header-no-object", "header-json", "an array of the object", header=lambda raw: b"[" + raw + b"]")
    entry = b'"norm":{"dtype":"F32","shape":[2,3],"data_offsets":[184,208]}'
    add("header-duplicate-part", "duplicate-key", "a part's entry twice", header=replace(entry, entry + b"," + entry))
    add(
        "header-duplicate-field",
        "duplicate-key",
        "a shape twice",
        header=replace(b'"shape":[2,3]', b'"shape":[3,2],"shape":[2,3]'),
    )
    add(
        "header-duplicate-escaped",
        "duplicate-key",
        "a name twice, once with an escape",
        header=replace(entry, entry + b"," + entry.replace(b"norm", b"n\\u006frm")),
    )
    add(
        "metadata-duplicate-key",
        "duplicate-key",
        "the manifest twice",
        header=replace(b'"bkpack":', b'"bkpack":"{}","bkpack":'),
    )
    add("entry-unknown-dtype", "header-entry", "a type F31", entries=edit_entry("norm", dtype="F31"))
    add("entry-negative-shape", "header-entry", "a negative dimension", entries=edit_entry("norm", shape=[-2, -3]))
    add("entry-fractional-shape", "header-entry", "a fractional dimension", entries=edit_entry("norm", shape=[1.5, 4]))
    add("entry-no-offsets", "header-entry", "no data_offsets", entries=without("norm", "data_offsets"))
    add(
        "entry-three-offsets", "header-entry", "three offsets", entries=edit_entry("norm", data_offsets=[184, 208, 208])
    )
    add(
        "metadata-number",
        "header-entry",
        "a number in the metadata",
        entries=lambda header: header["__metadata__"].update(x=1),
    )
    add(
        "hole",
        "offsets",
        "64 bytes between two parts that belong to none",
        entries=shifted(80, 64),
        body=lambda data: data[:80] + bytes(64) + data[80:],
    )
    add(
        "hole-at-start",
        "offsets",
        "64 bytes before the first part",
        entries=shifted(0, 64),
        body=lambda data: bytes(64) + data,
    )
    add(
        "overlap",
        "offsets",
        "the second part starts inside the first",
        entries=shifted(80, -8),
        body=lambda data: data[:72] + data[80:],
    )
    add(
        "offsets-reversed",
        "offsets",
        "a part that ends before it begins",
        entries=edit_entry("norm", data_offsets=[208, 184]),
    )

    def endless(header):
        begin = header["bkpack.file/a.json"]["data_offsets"][0]
        header["bkpack.file/a.json"].update(shape=[2**62], data_offsets=[begin, begin + 2**62])

    add("offsets-past-end", "offsets", "a part of 2^62 bytes, in a file of a few thousand", entries=endless)
    add("truncated", "offsets", "the last byte is missing", sealed=lambda file: file[:-1])
    add("trailing-byte", "offsets", "one byte behind the last part", sealed=lambda file: file + b"\0")

    def both_shapes(shape):
        return {"manifest": edit("norm", shape=shape), "entries": edit_entry("norm", shape=shape)}

    add("size-too-small", "part-size", "24 bytes for eight F32", **both_shapes([2, 4]))
    add("size-too-large", "part-size", "24 bytes for four F32", **both_shapes([2, 2]))
    wraps = [2**61 + 3, 2]  # 2^64 + 24 bytes
    add("size-overflow", "part-size", "a size that is 24 bytes modulo 2^64", entries=edit_entry("norm", shape=wraps))
    add("data-start", "data-start", "the data starts on a multiple of 64 that is none of 4096", page=64)
    last = ["bkpack.file/a.json"]
    add(
        "misaligned",
        "alignment",
        "a part of nine bytes comes before those of larger elements",
        order=lambda names: last + [name for name in names if name not in last],
    )
    add("no-metadata", "metadata", "no __metadata__", entries=without("__metadata__"))
    add("no-manifest", "metadata", "no key bkpack", entries=without("__metadata__", "bkpack"))
    add("no-format", "metadata", "no key format", entries=without("__metadata__", "format"))
    add("other-format", "metadata", "format np", entries=lambda header: header["__metadata__"].update(format="np"))
    add("no-seal", "metadata", "no key bkpack_seal", entries=without("__metadata__", "bkpack_seal"))


def seal_cases(add):
    add(
        "seal-wrong",
        "seal",
        "one digit of the seal is another",
        seal=lambda seal: (b"1" if seal[:1] != b"1" else b"2") + seal[1:],
    )
    add("seal-uppercase", "seal", "the right digits in upper case", seal=bytes.upper)
    add(
        "seal-padding",
        "seal",
        "a space of the padding became a tab",
        sealed=lambda file: file[:4090].rstrip(b" ") + b"\t" + file[len(file[:4090].rstrip(b" ")) + 1 :],
    )
    add(
        "seal-shape",
        "seal",
        "a plain tensor's shape was turned, in the header and in the manifest",
        sealed=lambda file: file.replace(b'"shape":[2,3]', b'"shape":[3,2]', 1).replace(
            b'\\"shape\\":[2,3]', b'\\"shape\\":[3,2]', 1
        ),
    )
    add(
        "seal-manifest",
        "seal",
        "a letter of the producer's name changed",
        sealed=replace(b"make_vectors", b"fake_vectors"),
    )
    add(
        "seal-renamed",
        "seal",
        "two letters of a file's name changed, everywhere",
        sealed=lambda file: file.replace(b"a.json", b"b.json"),
    )
    add(
        "seal-twice",
        "seal",
        "the seal's key occurs in a part's entry too",
        entries=edit_entry("norm", bkpack_seal="f" * 64),
    )
    add(
        "seal-space",
        "seal",
        "a space before the seal's digits",
        header=replace(b'"bkpack_seal":"', b'"bkpack_seal": "'),
    )
    add(
        "seal-escaped",
        "seal",
        "the seal's key is written with an escape",
        header=replace(b'"bkpack_seal":"', b'"bkpack\\u005fseal":"'),
    )
    add("seal-short", "seal", "63 digits", seal=lambda seal: seal[:63] + b'" ')

    def elsewhere(header):
        header["__metadata__"]["bkpack@seal"] = "f" * 64
        del header["__metadata__"]["bkpack_seal"]
        header["norm"]["bkpack_seal"] = "0" * 64

    add(
        "seal-elsewhere",
        "seal",
        "the digits that match stand in a part's entry, others under the metadata's key",
        entries=elsewhere,
        header=replace(b"bkpack@seal", b"bkpack\\u005fseal"),
    )


def manifest_cases(add):
    add("manifest-not-json", "manifest", "the manifest ends too early", text=lambda text: text[:-1])
    add("manifest-no-object", "manifest", "the manifest is an array", text=lambda text: f"[{text}]")
    add("manifest-no-version", "manifest", "no version", manifest=without("version"))
    add(
        "manifest-version-text",
        "manifest",
        "the version is a string",
        manifest=lambda manifest: manifest.update(version="1"),
    )
    add("manifest-no-tensors", "manifest", "no tensors", manifest=without("tensors"))
    add(
        "manifest-tensors-object",
        "manifest",
        "tensors is an object",
        manifest=lambda manifest: manifest.update(tensors={}),
    )
    add("manifest-no-files", "manifest", "no files", manifest=without("files"))
    for field in ("producer", "source", "policy", "config"):
        add(f"manifest-no-{field}", "manifest", f"no {field}", manifest=without(field))
    add("manifest-no-name", "manifest", "a tensor without a name", manifest=without("tensors", 4, "name"))
    why = "a tensor without a component"
    add("manifest-no-component", "manifest", why, manifest=without("tensors", 4, "component"))
    add("manifest-no-shape", "manifest", "a tensor without a shape", manifest=without("tensors", 4, "shape"))
    add("manifest-shape-text", "manifest", "a shape of strings", manifest=edit("norm", shape=["2", "3"]))
    add("manifest-shape-fraction", "manifest", "a fractional dimension", manifest=edit("norm", shape=[1.5, 4]))
    add("manifest-shape-negative", "manifest", "negative dimensions", manifest=edit("norm", shape=[-2, -3]))
    add("manifest-no-encoding", "manifest", "a tensor without an encoding", manifest=without("tensors", 4, "encoding"))
    add(
        "manifest-no-kind", "manifest", "an encoding without a kind", manifest=without("tensors", 4, "encoding", "kind")
    )
    add(
        "manifest-no-bits",
        "manifest",
        "an int encoding without bits",
        manifest=without("tensors", 0, "encoding", "bits"),
    )
    add("manifest-bits-text", "manifest", "bits as a string", manifest=edit_encoding("int4", bits="4"))
    add("manifest-symmetric-number", "manifest", "symmetric as a number", manifest=edit_encoding("int4", symmetric=1))
    add(
        "manifest-no-hash",
        "manifest",
        "a part without a hash",
        manifest=without("tensors", 4, "parts", "values", "blake3"),
    )
    add("manifest-no-parts", "manifest", "a tensor without parts", manifest=without("tensors", 4, "parts"))
    add("manifest-file-no-part", "manifest", "a file without a part", manifest=without("files", 0, "part"))
    add("manifest-shard-no-set", "manifest", "a shard without a set", shard={"index": 1, "count": 1})
    add(
        "manifest-duplicate-key",
        "duplicate-key",
        "the version twice",
        text=replace('"version":1', '"version":1,"version":1'),
    )
    add(
        "manifest-duplicate-nested",
        "duplicate-key",
        "a key twice in the config",
        text=replace('"config":null', '"config":{"a":[{"b":1,"b":1}]}'),
    )
    add(
        "version-2",
        "version",
        "version 2, otherwise like version 1",
        manifest=lambda manifest: manifest.update(version=2),
    )
    add("version-0", "version", "version 0", manifest=lambda manifest: manifest.update(version=0))

    def other_structure(manifest):
        manifest.clear()
        manifest.update(version=2, layers=[])

    add("version-2-structure", "version", "version 2 with a structure of its own", manifest=other_structure)
    add(
        "duplicate-tensor",
        "duplicate-tensor",
        "a tensor twice",
        manifest=lambda manifest: manifest["tensors"].append(tensor_of(manifest, "norm")),
    )
    norm = [plain("norm", "F32", [0, 3])]
    add("shape-zero", "shape", "a dimension 0", tensors=norm)
    add("shape-overflow", "shape", "2^62 elements, 2^65 times a bit", manifest=edit("norm", shape=[2**31, 2**31]))
    add("shape-wraps", "shape", "2^64 + 6 elements, six modulo 2^64", manifest=edit("norm", shape=[2**63 + 3, 2]))
    kind = {"kind": "lattice", "dimension": 8}
    add("encoding-unknown", "encoding-kind", "the kind lattice", manifest=edit("norm", encoding=kind))
    add("encoding-field-unknown", "unknown-field", "a field offset in int", manifest=edit_encoding("int4", offset=0))
    add("encoding-field-foreign", "unknown-field", "a field bits in binary", manifest=edit_encoding("binary", bits=1))
    add(
        "encoding-field-float",
        "unknown-field",
        "a field group_size in float",
        manifest=edit_encoding("norm", group_size=32),
    )
    add(
        "part-field-unknown",
        "unknown-field",
        "a field offset in a part",
        manifest=edit_part("norm", "values", offset=0),
    )
    add(
        "part-field-unknown-file",
        "unknown-field",
        "a field offset in the part of a travelling file",
        manifest=lambda manifest: manifest["files"][0]["part"].update(offset=0),
    )
    for bits in (1, 9):
        tensors = [quantized("w", [2, 40], integer(bits, True, 32))]
        add(f"bits-{bits}", "encoding-range", f"codes of {bits} bits", tensors=tensors)
    add("bits-260", "encoding-range", "260 bits, 4 modulo 256", manifest=edit_encoding("int4", bits=260))
    add("group-size-zero", "encoding-range", "groups of 0", manifest=edit_encoding("int4", group_size=0))
    group = [quantized("w", [2, 40], integer(4, True, 2**32))]
    add("group-size-large", "encoding-range", "groups of 2^32", tensors=group)
    scale = [quantized("w", [2, 40], integer(4, True, 32, "BF16"), [1.0] * 4)]
    add("scale-bf16", "encoding-range", "scales in BF16", tensors=scale)
    add(
        "dtype-u8",
        "encoding-range",
        "a plain tensor of U8",
        manifest=edit_encoding("norm", dtype="U8"),
        parts=set_part("norm", "U8", [2, 3]),
    )


def part_cases(add):
    add(
        "role-missing",
        "parts",
        "no scale",
        manifest=without("tensors", 0, "parts", "scale"),
        parts=lambda parts: parts.pop("int4_scale"),
    )
    add(
        "role-zero-point-missing",
        "parts",
        "an asymmetric tensor without zero points",
        manifest=without("tensors", 1, "parts", "zero_point"),
        parts=lambda parts: parts.pop("int3_zero_point"),
    )

    def role(tensor, name, part):
        return lambda manifest: tensor_of(manifest, tensor)["parts"].update(
            {name: {"name": part, "blake3": blake3(bytes(16))}}
        )

    add(
        "role-zero-point-extra",
        "parts",
        "a symmetric tensor with zero points",
        manifest=role("int4", "zero_point", "int4_zero_point"),
        parts=set_part("int4_zero_point", "U32", [4, 1]),
    )
    add(
        "role-unknown",
        "parts",
        "a role bias",
        manifest=role("int4", "bias", "int4_bias"),
        parts=set_part("int4_bias", "U32", [4, 1]),
    )
    add(
        "role-null",
        "parts",
        "a role packed that is null",
        manifest=lambda manifest: tensor_of(manifest, "norm")["parts"].update(packed=None),
    )
    add(
        "role-float-packed",
        "parts",
        "a plain tensor with the role packed",
        manifest=role("norm", "packed", "norm_packed"),
        parts=set_part("norm_packed", "U32", [4, 1]),
    )

    def renamed(old, new):
        """A part under another name, in the header and in the manifest."""
        name = compact(old)
        return {
            "text": replace(f'"name":{name},"blake3"', f'"name":{compact(new)},"blake3"'),
            "header": replace(f"{name}:".encode(), f"{compact(new)}:".encode()),
        }

    add("part-name-values", "part-name", "the values of norm named norm_values", **renamed("norm", "norm_values"))
    add("part-name-packed", "part-name", "packed words named int4.packed", **renamed("int4_packed", "int4.packed"))
    add(
        "part-name-swapped",
        "part-name",
        "the scales of two tensors change places",
        manifest=lambda manifest: swap(
            tensor_of(manifest, "ternary")["parts"], tensor_of(manifest, "binary")["parts"], "scale"
        ),
    )
    add(
        "part-name-file", "part-name", "a file's part named file/a.json", **renamed("bkpack.file/a.json", "file/a.json")
    )
    add("part-missing", "part-missing", "the file does not hold norm", parts=lambda parts: parts.pop("norm"))
    add(
        "part-missing-scale",
        "part-missing",
        "the file does not hold int4_scale",
        parts=lambda parts: parts.pop("int4_scale"),
    )
    add(
        "part-missing-file",
        "part-missing",
        "the file does not hold a.json",
        parts=lambda parts: parts.pop("bkpack.file/a.json"),
    )
    shared = quantized("w", [2, 40], integer(4, True, 32))
    scale = shared.parts["scale"]
    both = [shared, plain("w_scale", "F16", scale.shape, scale.data)]
    add("part-shared", "part-shared", "the scale of w is a plain tensor w_scale as well", tensors=both)
    add(
        "part-shared-file",
        "part-shared",
        "a file is listed twice",
        manifest=lambda manifest: manifest["files"].append(manifest["files"][0]),
    )
    add("part-orphan", "part-orphan", "a part that nothing names", parts=set_part("orphan", "F32", [2]))
    add(
        "part-orphan-file",
        "part-orphan",
        "a file that nothing names",
        manifest=lambda manifest: manifest["files"].clear(),
    )

    for name, tensor, role_name, dtype in (
        ("values", "norm", "values", "U32"),
        ("packed", "int4", "packed", "F32"),
        ("binary", "binary", "packed", "F32"),
        ("scale", "int4", "scale", "BF16"),
        ("zero-point", "int3", "zero_point", "F32"),
    ):
        part = tensor + SUFFIX[role_name]
        add(f"dtype-{name}", "part-dtype", f"{part} is {dtype}", entries=edit_entry(part, dtype=dtype))
    add(
        "dtype-scale-f32",
        "part-dtype",
        "F32 scales where the encoding says F16",
        parts=set_part("int4_scale", "F32", [4, 2]),
    )
    add("dtype-ternary", "part-dtype", "ternary_packed is U32", parts=set_part("ternary_packed", "U32", [2, 2]))
    add("dtype-file", "part-dtype", "a file is F16", parts=set_part("bkpack.file/a.json", "F16", [4]))

    for name, part, shape in (
        ("values", "norm", [3, 2]),
        ("file", "bkpack.file/a.json", [3, 3]),
        ("values-flat", "norm", [6]),
        ("packed", "int4_packed", [5, 4]),
        ("scale", "int4_scale", [2, 4]),
        ("zero-point", "int3_zero_point", [1, 2]),
        ("ternary", "ternary_packed", [4, 1]),
        ("binary", "binary_packed", [1, 4]),
    ):
        add(f"shape-{name}", "part-shape", f"{part} has shape {shape}", entries=edit_entry(part, shape=shape))
    add("shape-packed-wide", "part-shape", "a word too many in each row", parts=set_part("int4_packed", "U32", [4, 6]))
    add("shape-packed-narrow", "part-shape", "a word too few in each row", parts=set_part("int3_packed", "U32", [2, 6]))
    add(
        "shape-scale-groups",
        "part-shape",
        "no scale for the last, shorter group",
        parts=set_part("int4_scale", "F16", [4, 1]),
    )
    add(
        "shape-zero-point-wide",
        "part-shape",
        "a word of zero points for each group",
        parts=set_part("int3_zero_point", "U32", [2, 3]),
    )
    vector = [quantized("v", [40], integer(4, True, 64))]
    add(
        "shape-vector",
        "part-shape",
        "a vector's words without the dimension of the rows",
        tensors=vector,
        entries=edit_entry("v_packed", shape=[5]),
    )
    add(
        "hash-uppercase",
        "hash-text",
        "a hash in upper case",
        manifest=edit_part("norm", "values", blake3="ABCDEF01" * 8),
    )
    add("hash-short", "hash-text", "a hash of 63 digits", manifest=edit_part("norm", "values", blake3="1" * 63))
    add("hash-not-hex", "hash-text", "a hash with the letter g", manifest=edit_part("norm", "values", blake3="g" * 64))
    add(
        "hash-file",
        "hash-text",
        "a file's hash is empty",
        manifest=lambda manifest: manifest["files"][0]["part"].update(blake3=""),
    )
    for name, text in (
        ("slash", "a/b"),
        ("backslash", "a\\b"),
        ("dot", ".hidden"),
        ("parent", ".."),
        ("empty", ""),
        ("not-ascii", "\u00e9.json"),
        ("newline", "a.json\n"),
        ("nul", "a\0b"),
    ):
        add(f"file-name-{name}", "file-name", f"a file named {json.dumps(text)}", files={text: b"{}\n"})


def swap(left: dict, right: dict, key: str):
    left[key], right[key] = right[key], left[key]


def content_cases(add):
    for part in ("int4_packed", "norm", "bkpack.file/a.json", "ternary_scale", "int3_zero_point"):
        name = part.replace("bkpack.file/", "file-").replace(".", "-").replace("_", "-")
        add(
            f"bit-flip-{name}",
            "part-hash",
            f"a bit of {part} flipped after packing",
            stage="contents",
            sealed=flipped_part(part),
        )

    def content(name, rule, why, part, at, data):
        add(name, rule, why, stage="contents", parts=set_bytes(part, at, data))

    tensors = {tensor.name: tensor for tensor in base()[0]}
    high = tensors["int3"].parts["packed"].data[27] | 0x80
    content("padding-codes", "padding", "the highest bit of a row's last word", "int3_packed", 27, bytes([high]))
    first = tensors["int3"].parts["zero_point"].data[1] | 0x02
    content("padding-zero-point", "padding", "the bit behind the last zero point", "int3_zero_point", 1, bytes([first]))
    content("padding-binary", "padding", "bits behind the last column", "binary_packed", 5, b"\x01")
    last = tensors["ternary"].parts["packed"].data[1] + 9
    content("padding-ternary", "padding", "a digit behind the last column", "ternary_packed", 1, bytes([last]))
    content("ternary-243", "ternary-byte", "a byte 243", "ternary_packed", 2, b"\xf3")
    content("ternary-255", "ternary-byte", "a byte 255", "ternary_packed", 0, b"\xff")
    content("scale-nan", "scale-value", "an F16 scale that is NaN", "int4_scale", 2, struct.pack("<H", 0x7E00))
    content(
        "scale-infinite", "scale-value", "an F16 scale that is infinite", "int4_scale", 14, struct.pack("<H", 0xFC00)
    )
    content("scale-nan-f32", "scale-value", "an F32 scale that is NaN", "int3_scale", 20, struct.pack("<I", 0x7F800001))
    content(
        "scale-infinite-f32",
        "scale-value",
        "an F32 scale that is infinite",
        "int3_scale",
        0,
        struct.pack("<I", 0x7F800000),
    )
    content(
        "scale-nan-ternary",
        "scale-value",
        "a ternary tensor's scale is NaN",
        "ternary_scale",
        0,
        struct.pack("<H", 0xFFFF),
    )
    content(
        "scale-infinite-binary",
        "scale-value",
        "a binary tensor's scale is infinite",
        "binary_scale",
        6,
        struct.pack("<H", 0x7C00),
    )


def malformed() -> dict[str, bytes]:
    files, index = {}, []
    healthy = write(*base())

    def add(name, rule, why, stage="open", tensors=None, files=None, seal=None, **hooks):
        if seal:
            hooks["sealed"] = seal_hook(seal)
        built = write(base()[0] if tensors is None else tensors, base()[1] if files is None else files, **hooks)
        assert built != healthy, name
        record(f"{name}.bkpack", rule, stage, why, {f"{name}.bkpack": built})

    def add_shards(name, rule, why, opened="model.bkpack.index.json", drop=(), **hooks):
        built, _, _ = two_shards(**hooks)
        for file in drop:
            del built[file]
        record_shards(name, rule, why, opened, built)

    def add_paired(name, rule, why, **hooks):
        built, _, _ = paired_shards(**hooks)
        record_shards(name, rule, why, "model.bkpack.index.json", built)

    def record_shards(name, rule, why, opened, built):
        record(f"{name}/{opened}", rule, "open", why, {f"{name}/{file}": data for file, data in built.items()})

    def record(file, rule, stage, why, built):
        assert not files.keys() & built.keys(), file
        files.update(built)
        index.append({"file": file, "rule": rule, "stage": stage, "why": why})

    container_cases(add)
    seal_cases(add)
    manifest_cases(add)
    part_cases(add)
    content_cases(add)
    complex_cases(add, add_paired)
    activation_cases(add, add_paired)
    shard_cases(add_shards)
    files["index.json"] = pretty(index)
    return files
