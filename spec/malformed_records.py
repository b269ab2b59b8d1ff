"""Malformed vectors of what a model records beside single tensors: complex pairs, quantized activations, shards."""

from __future__ import annotations

import json
import struct

from malformed_edits import edit, tensor_of, set_bytes, replace, flipped_part, without
from vector_writer import (
    activation_scale,
    activations,
    blake3,
    compact,
    complex_pair,
    integer,
    plain,
    pretty,
    quantized,
)


def complex_cases(add, add_paired):
    def pair(**hooks):
        return {"tensors": complex_pair(plain("c.real", "F32", [2, 3]), plain("c.imag", "F16", [2, 3])), **hooks}

    for name, value in (("unknown", "conjugate"), ("upper", "Real"), ("null", None), ("flag", True)):
        why = f"the field complex is {json.dumps(value)}"
        add(f"complex-field-{name}", "complex-field", why, **pair(manifest=edit("c.imag", complex=value)))
    why = "the halves are marked the wrong way round"
    swapped = [plain("c.real", "F32", [2, 3]), plain("c.imag", "F16", [2, 3])]
    add("complex-name-swapped", "complex-name", why, tensors=complex_pair(*reversed(swapped)))
    imaginary = edit("norm", complex="imaginary")
    add("complex-name-suffix", "complex-name", "norm is marked as an imaginary part", manifest=imaginary)
    add("complex-alone", "complex-pair", "no other half", tensors=pair()["tensors"][:1])
    add("complex-alone-imaginary", "complex-pair", "no real half", tensors=pair()["tensors"][1:])
    add("complex-unmarked", "complex-pair", "the other half is not marked", **pair(manifest=unmarked("c.imag")))
    turned = complex_pair(plain("c.real", "F32", [2, 3]), plain("c.imag", "F32", [3, 2]))
    add("complex-shape", "complex-pair", "the halves have different shapes", tensors=turned)
    clash = [*pair()["tensors"], plain("c", "F32", [2, 3])]
    add("complex-clash", "complex-clash", "a tensor c beside the halves of c", tensors=clash)
    add_paired("shard-complex-alone", "complex-pair", "the other half is in no shard", drop=["c.imag"])


def unmarked(name: str):
    return lambda manifest: tensor_of(manifest, name).pop("complex")


def activation_cases(add, add_paired):
    def core(change=None, scales=None, bits=8):
        """A model with scales for ten positions in groups of three; `change` is applied to its record."""
        scales = scales or [activation_scale("layer", 4), activation_scale("other", 4)]
        record = activations(scales, bits, 3, 10)
        if change:
            change(record)
        return {"tensors": scales, "records": [record]}

    def fields(**new):
        return lambda record: record.update(new)

    for name, change in (
        ("null", lambda manifest: manifest.update(activations=None)),
        ("object", lambda manifest: manifest.update(activations=manifest["activations"][0])),
        ("text", lambda manifest: manifest.update(activations=["bk_core"])),
    ):
        why = f"activations is no list of objects ({name})"
        add(f"activations-{name}", "manifest", why, **core(), manifest=change)
    for field in ("component", "bits", "group_size", "positions", "samples", "text", "scales"):
        name = field.replace("_", "-")
        add(f"activations-no-{name}", "manifest", f"activations without {field}", **core(without(field)))
    for field in ("name", "blake3"):
        why = f"a calibration text without {field}"
        add(f"activations-no-text-{field}", "manifest", why, **core(without("text", field)))
    add("activations-bits-text", "manifest", "bits as a string", **core(fields(bits="8")))
    add("activations-scales-text", "manifest", "scales as one string", **core(fields(scales="layer.activation_scale")))
    add("activations-field", "unknown-field", "a field offset in activations", **core(fields(offset=0)))
    add(
        "activations-field-text",
        "unknown-field",
        "a field offset in the calibration text",
        **core(lambda record: record["text"].update(offset=0)),
    )
    component = "activation-component"
    add("activations-component", component, "activations of experts", **core(fields(component="expert")))
    add(
        "activations-twice",
        component,
        "two records of one component",
        **core(),
        manifest=lambda manifest: manifest["activations"].append(
            activations([activation_scale("layer", 10)], 4, 1, 10)
        ),
    )
    for bits in (0, 3, 16):
        add(f"activations-bits-{bits}", "activation-range", f"{bits} bits", **core(bits=bits))
    add("activations-group-zero", "activation-range", "groups of 0", **core(fields(group_size=0)))
    add("activations-positions-zero", "activation-range", "no positions", **core(fields(positions=0)))
    add("activations-no-scale", "activation-range", "an empty list of scales", **core(fields(scales=[])))

    def scale(name, why, **hooks):
        add(f"activation-scale-{name}", "activation-scale", why, **hooks)

    repeated = fields(scales=["layer.activation_scale", "layer.activation_scale"])
    scale("missing", "scales that are not there", **core(fields(scales=["absent.activation_scale"])))
    scale("twice", "scales named twice", **core(repeated))
    layer = activation_scale("layer", 4)
    other = plain("layer.scales", "F32", [3, 4], layer.parts["values"].data)
    other.component = "bk_core"
    scale("name", "the name does not end in .activation_scale", **core(scales=[other]))
    half = plain(layer.name, "F16", [3, 4], struct.pack("<12e", *[1.0] * 12))
    half.component = "bk_core"
    scale("f16", "scales in F16", **core(scales=[half]))
    packed = quantized(layer.name, [3, 4], integer(8, True, 4, "F32"), [1.0] * 3)
    packed.component = "bk_core"
    scale("quantized", "quantized scales", **core(scales=[packed]))
    stray = activation_scale("layer", 4)
    stray.component = "other"
    scale("component", "scales of another component", **core(scales=[stray]))
    scale("groups", "a column too many", **core(scales=[activation_scale("layer", 5)]))
    scale("groups-few", "a column too few", **core(scales=[activation_scale("layer", 3)]))
    for name, shape in (("rows", [4, 3]), ("flat", [12]), ("cube", [3, 4, 1])):
        turned = plain(layer.name, "F32", shape, layer.parts["values"].data)
        turned.component = "bk_core"
        scale(name, f"the shape {shape}", **core(scales=[turned]))

    for name, at, word in (
        ("nan", 0, 0x7FC00000),
        ("infinite", 44, 0x7F800000),
        ("negative", 20, 0xBF800000),
        ("tiny", 4, 0x80000001),
    ):
        add(
            f"activation-scale-{name}",
            "activation-scale-value",
            f"a scale with the bits {word:08x}",
            stage="contents",
            **core(),
            parts=set_bytes("layer.activation_scale", at, struct.pack("<I", word)),
        )
    why = "a bit of an activation scale flipped after packing"
    flipped = flipped_part("other.activation_scale")
    add("bit-flip-activation-scale", "part-hash", why, stage="contents", **core(), sealed=flipped)

    gone = "blocks.0.bk_layer.activation_scale"
    add_paired("shard-activation-scale", "activation-scale", "scales that are in no shard", drop=[gone])
    record = activations([activation_scale("blocks.0.bk_layer", 4)], 8, 3, 10)
    why = "the record is in the second shard"
    add_paired("shard-activations", "activation-shard", why, first={"records": []}, second={"records": [record]})


def shard_cases(add_shards):
    def changed(change):
        return lambda raw: pretty(change(json.loads(raw)))

    def size(index):
        return {"metadata": {"total_size": index["metadata"]["total_size"] + 1}, "weight_map": index["weight_map"]}

    def reordered(index):
        return {**index, "weight_map": dict(reversed(list(index["weight_map"].items())))}

    def moved(index):
        index["weight_map"]["b.weight_packed"] = "model-00001-of-00002.bkpack"
        return index

    def elsewhere(index):
        index["weight_map"]["b.weight_packed"] = "../model-00002-of-00002.bkpack"
        return index

    def lacking(index):
        del index["weight_map"]["a.norm"]
        return index

    add_shards("index-not-json", "shard-index", "the index ends too early", index=lambda raw: raw[:-2])
    add_shards("index-size", "shard-index", "total_size is one too large", index=changed(size))
    add_shards("index-order", "shard-index", "the parts in another order", index=changed(reordered))
    add_shards("index-moved", "shard-index", "a part in the wrong shard", index=changed(moved))
    add_shards("index-lacking", "shard-index", "a part that is not listed", index=changed(lacking))
    add_shards("index-outside", "shard-index", "a shard in the folder above", index=changed(elsewhere))
    add_shards("index-newline", "shard-index", "no newline at the end", index=lambda raw: raw[:-1])
    add_shards(
        "index-compact",
        "shard-index",
        "the right content without indentation",
        index=lambda raw: compact(json.loads(raw)).encode() + b"\n",
    )
    add_shards("shard-missing", "shard-missing", "the second shard is not there", drop=["model-00002-of-00002.bkpack"])

    def shard_field(**fields):
        return {"manifest": lambda manifest: manifest["shard"].update(fields)}

    add_shards("shard-other-set", "shard-set", "the shards carry different sets", second=shard_field(set="1" * 64))
    add_shards("shard-index-twice", "shard-set", "both shards say they are the first", second=shard_field(index=1))
    add_shards(
        "shard-index-zero",
        "shard-set",
        "the indices run from 0",
        first=shard_field(index=0),
        second=shard_field(index=1),
    )
    add_shards("shard-count", "shard-set", "the second shard says it is one of three", second=shard_field(count=3))
    add_shards(
        "shard-unmarked", "shard-set", "the second shard has no field shard", second={"manifest": without("shard")}
    )
    add_shards(
        "shard-alone",
        "shard-set",
        "a shard is opened on its own, without its index",
        opened="model-00001-of-00002.bkpack",
        drop=["model-00002-of-00002.bkpack", "model.bkpack.index.json"],
    )
    twice = [plain("a.norm", "F32", [5])]
    add_shards("shard-duplicate-tensor", "duplicate-tensor", "a tensor in both shards", again=twice)
