"""Reads exports by each layout's documented rule, restated in numpy, and compares with the packed file.

    python tests/export/check.py target/release/bkpack fixtures/llama

Needs numpy and safetensors. Packed values come from spec/reader.py, which knows nothing of the exporters. Words must
be those that the projects' own packers write, and values the same, bit for bit.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "spec"))
import reader  # noqa: E402

PACKINGS = {
    "INT4": ["--bits", "4"],
    "INT4 asymmetric": ["--bits", "4", "--asymmetric", "--group-size", "32"],
    "INT8 asymmetric, a group a row": ["--bits", "8", "--asymmetric", "--group-size", "row"],
    "INT2, groups of 256": ["--bits", "2", "--group-size", "256"],
    "INT3": ["--bits", "3"],
    "INT6": ["--bits", "6", "--group-size", "64"],
    "ternary": ["--bits", "1.58"],
    "binary": ["--bits", "1", "--group-size", "32"],
    "mixed": [
        "--bits",
        "3",
        "--tensor",
        "o_proj=ternary:g32",
        "--tensor",
        "v_proj=int5:g32:asym",
        "--tensor",
        "down_proj=int7:row",
        "--tensor",
        r"layers\.1\..*k_proj=fp16",
    ],
}


def unpack(words, bits, count):
    """Dense streams, [rows, words] to [rows, count]: code i takes bits i*b to i*b + b - 1, lowest bits first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : count * bits].reshape(len(words), count, bits)
    return (stream.astype(np.int32) << np.arange(bits)).sum(axis=2)


def pack(codes, bits):
    """The words of [rows, count] codes, each row filled up with zeros."""
    stream = ((codes[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def gptq_pack_rows(codes, bits):
    """Codes [in, out] to words [in * bits / 32, out] as AutoGPTQ and GPTQModel write them: 2, 4 and 8 bits fill a word,
    32 codes of 3 bits three words, with the 11th and the 22nd across two."""
    codes = codes.astype(np.uint32)
    words = np.zeros((len(codes) * bits // 32, codes.shape[1]), np.uint32)
    if bits != 3:
        for row in range(len(words)):
            for place in range(32 // bits):
                words[row] |= codes[row * (32 // bits) + place] << np.uint32(bits * place)
        return words.view(np.int32)
    code = row = 0
    while row < len(words):
        for place in range(10):
            words[row] |= codes[code + place] << np.uint32(3 * place)
        words[row] |= codes[code + 10] << np.uint32(30)
        words[row + 1] |= (codes[code + 10] >> np.uint32(2)) & np.uint32(1)
        for place in range(10):
            words[row + 1] |= codes[code + 11 + place] << np.uint32(3 * place + 1)
        words[row + 1] |= codes[code + 21] << np.uint32(31)
        words[row + 2] |= (codes[code + 21] >> np.uint32(1)) & np.uint32(3)
        for place in range(10):
            words[row + 2] |= codes[code + 22 + place] << np.uint32(3 * place + 2)
        code, row = code + 32, row + 3
    return words.view(np.int32)


def spread(groups, size, columns):
    """A value a group, [rows, groups], to a value a column."""
    return np.repeat(groups, size, axis=1)[:, :columns]


def compressed_tensors(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    tensors, values = load_file(folder / "model.safetensors"), {}
    groups = list(config["config_groups"].values())
    for name in [name for name in tensors if name.endswith("_packed")]:
        weight = name.removesuffix("_packed")
        module = weight.removesuffix(".weight")
        named = [group for group in groups if module in group["targets"]] or [
            g for g in groups if g["targets"] == ["Linear"]
        ]
        assert len(named) == 1 and module not in config["ignore"], module
        scheme = named[0]["weights"]
        bits, (rows, columns) = scheme["num_bits"], tensors.pop(f"{weight}_shape")
        words, scales = tensors.pop(name), tensors.pop(f"{weight}_scale")
        assert (words.dtype, words.shape) == (np.int32, (rows, -(-columns * bits // 32)))
        size = columns if scheme["strategy"] == "channel" else scheme["group_size"]
        assert scales.shape == (rows, columns // size)
        codes = unpack(words, bits, columns)
        assert (pack(codes, bits) == words).all(), f"{weight}: padding"
        zeros = np.full(scales.shape, 1 << (bits - 1))
        if not scheme["symmetric"]:
            points = tensors.pop(f"{weight}_zero_point")  # packed down the rows
            zeros = unpack(np.ascontiguousarray(points.T), bits, rows).T
            assert (pack(np.ascontiguousarray(zeros.T), bits).T == points).all(), f"{weight}: padding of zero points"
        scales = spread(scales.astype(np.float32), size, columns)
        values[weight] = (codes - spread(zeros, size, columns)).astype(np.float32) * scales
    plain = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 2}
    linear = {module for module in plain if "embed" not in module}
    assert linear <= set(config["ignore"]), linear
    return values | {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def mlx(folder):
    config = json.loads((folder / "config.json").read_text())["quantization"]
    base = {key: config[key] for key in ("bits", "group_size", "mode")}
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        scheme = config.get(module, base)
        assert scheme["mode"] == "affine"
        bits, size = scheme["bits"], scheme["group_size"]
        words, scales, biases = (tensors.pop(f"{module}.{part}") for part in ("weight", "scales", "biases"))
        columns = scales.shape[1] * size
        assert (words.dtype, words.shape) == (np.uint32, (len(scales), columns * bits // 32)), module
        scales, biases = (spread(part.astype(np.float32), size, columns) for part in (scales, biases))
        values[f"{module}.weight"] = unpack(words, bits, columns).astype(np.float32) * scales + biases
    return values | {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def gptq(folder):
    import re

    config = json.loads((folder / "quantize_config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["desc_act"]) == ("gptq_v2", False)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        rules = [rule for pattern, rule in config["dynamic"].items() if re.match(pattern[2:], module)]
        assert not any(pattern[0] == "-" and re.match(pattern[2:], module) for pattern in config["dynamic"])
        scheme = rules[0] if rules else config
        bits = scheme["bits"]
        words, points, scales, group = (
            tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        inputs, outputs = len(group), words.shape[1]
        size = inputs if scheme["group_size"] == -1 else scheme["group_size"]
        assert (group == np.arange(inputs) // size).all() and scales.dtype == np.float16
        codes = unpack(np.ascontiguousarray(words.T), bits, inputs).T  # [in, out]
        assert (gptq_pack_rows(codes, bits) == words).all(), f"{module}: words"
        zeros = unpack(points, bits, outputs)  # [groups, out]
        assert (gptq_pack_rows(zeros.T, bits).T == points).all(), f"{module}: zero points"
        if scheme["sym"]:
            assert (zeros == 1 << (bits - 1)).all()
        weight = (codes - zeros[group]).astype(np.float32) * scales[group].astype(np.float32)
        values[f"{module}.weight"] = np.ascontiguousarray(weight.T)
    return values | {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def safetensors(folder):
    return load_file(folder / "model.safetensors")


def npz(file):
    arrays, values = np.load(file, allow_pickle=False), {}
    names = {name.removesuffix(".codes") for name in arrays if name.endswith(".codes")}
    for name in names:
        codes, scales = arrays[f"{name}.codes"].astype(np.int32), arrays[f"{name}.scales"].astype(np.float32)
        size, columns = int(arrays[f"{name}.group_size"]), codes.shape[-1]
        assert codes.shape == tuple(arrays[f"{name}.shape"]) and str(arrays[f"{name}.encoding"])
        levels = codes.reshape(-1, columns)
        if f"{name}.zero_points" in arrays:
            levels = levels - spread(arrays[f"{name}.zero_points"].astype(np.int32), size, columns)
        values[name] = (levels.astype(np.float32) * spread(scales, size, columns)).reshape(codes.shape)
    others = [name for name in arrays if not any(name.startswith(f"{quantized}.") for quantized in names)]
    return values | {name: arrays[name].astype(np.float32) for name in others}


LAYOUTS = {"compressed-tensors": compressed_tensors, "mlx": mlx, "gptq": gptq, "safetensors": safetensors, "npz": npz}


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    bkpack, checkpoint = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for index, (packing, options) in enumerate(PACKINGS.items()):
            packed = scratch / f"{index}.bkpack"
            run(bkpack, "convert", checkpoint, "-o", packed, "--quiet", *options)
            model = reader.open_model(packed)
            expected = {name: model.dequantize(name) for name in model.tensors}
            for layout, read in LAYOUTS.items():
                output = scratch / f"{index}-{layout}"
                # What is plain beside GPTQ's F16 scales may be of any type.
                plan = json.loads(
                    run(bkpack, "export", packed, "--to", layout, "--dtype", "fp32", "-o", output, "--json")
                )
                values = read(output)
                assert values.keys() == expected.keys(), values.keys() ^ expected.keys()
                for tensor in plan["tensors"]:
                    assert tensor["fidelity"] == {"kind": "lossless"}, tensor
                for name, wanted in expected.items():
                    found = values[name]
                    assert found.shape == wanted.shape and found.dtype == np.float32, name
                    # Of zeros, the sums of MLX lose the sign.
                    bits = np.float32 if layout == "mlx" else np.int32
                    assert (found.view(bits) == wanted.view(bits)).all(), name
                files = [output] if output.is_file() else list(output.iterdir())
                assert sum(file.stat().st_size for file in files) == plan["file_bytes"]
                print(f"{packing}: {layout}: {len(expected)} tensors, every value the same")


if __name__ == "__main__":
    main()
