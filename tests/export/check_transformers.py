"""Loads exported folders with transformers (and mlx_lm, where it is installed) and compares logits with bkpack's.

Opt-in: needs torch, transformers, compressed-tensors (and, for MLX, mlx and mlx-lm; on Linux `pip install mlx[cpu]`).

    python tests/export/check_transformers.py target/release/bkpack fixtures/llama

Logits are compared with those of the packed file, as a part of the largest. Exports in FP32 hold the very values of the
packed file, so what remains is the order of additions. Those in FP16 also round the embedding; transformers multiplies
codes and scales in FP16, and MLX computes all of the model in it.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

# How a checkpoint is packed, and the layouts that the result is loaded from.
PACKINGS = {
    "INT4": ["--bits", "4"],
    "INT4 asymmetric": ["--bits", "4", "--asymmetric"],
    "INT8": ["--bits", "8"],
    "INT8 asymmetric, a group a row": ["--bits", "8", "--asymmetric", "--group-size", "row"],
    "INT3, ternary, INT6": [
        "--bits",
        "3",
        "--tensor",
        "o_proj=ternary:g32",
        "--tensor",
        "v_proj=int6:g32",
        "--keep",
        "1.*up_proj",
    ],
}
LIMITS = {"fp32": 1e-5, "fp16": 5e-3}
MLX_LIMITS = {"fp32": 1e-5, "fp16": 2e-2}
TOKENS = [1, 17, 300, 42, 5, 77, 2048, 9, 64, 1000, 3, 256]


def run(*command):
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def transformers_logits(folder, tokens):
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    groups = quantization.get("config_groups", {}).values()
    options = {}
    if not all(group["weights"]["symmetric"] for group in groups):
        # Otherwise compressed-tensors 0.20 makes room for zero points that are not packed.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def mlx_logits(folder, tokens):
    import mlx.core as mx
    import numpy
    from mlx_lm.utils import load_model

    model, _ = load_model(pathlib.Path(folder))
    return torch.from_numpy(numpy.array(model(mx.array([tokens]))[0].astype(mx.float32)))


def main():
    bkpack, checkpoint = sys.argv[1:3]
    layouts = {"compressed-tensors": transformers_logits, "safetensors": transformers_logits}
    if importlib.util.find_spec("mlx_lm"):
        layouts["mlx"] = mlx_logits
    else:
        print("mlx_lm is not installed: MLX folders are not loaded")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        vocabulary = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())["vocab_size"]
        tokens = [token % vocabulary for token in TOKENS]
        (scratch / "ids.json").write_text(json.dumps(tokens))
        for index, (name, options) in enumerate(PACKINGS.items()):
            packed = scratch / f"{index}.bkpack"
            run(bkpack, "convert", checkpoint, "-o", packed, "--quiet", *options)
            run(bkpack, "logits", packed, "--tokens", scratch / "ids.json", "-o", scratch / f"{index}.safetensors")
            ours = load_file(scratch / f"{index}.safetensors")["logits"]
            for layout, load in layouts.items():
                for dtype, limit in (MLX_LIMITS if layout == "mlx" else LIMITS).items():
                    folder = scratch / f"{index}-{layout}-{dtype}"
                    run(bkpack, "export", packed, "--to", layout, "--dtype", dtype, "-o", folder, "--quiet")
                    theirs = load(folder, tokens)
                    error = ((theirs - ours).abs().max() / ours.abs().max()).item()
                    verdict = "ok" if error <= limit else "FAIL"
                    failed |= error > limit
                    print(f"{verdict:4} {name:32} {layout:20} {dtype}  {error:.1e}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
