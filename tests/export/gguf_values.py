"""Compares an exported GGUF file with the dequantized values of the packed model it was made from.

    bkpack export model.bkpack --to gguf -o model.gguf --json > plan.json
    cargo run --example dequantize -- model.bkpack values.safetensors
    python tests/export/gguf_values.py model.gguf values.safetensors plan.json

Reads the file with the `gguf` package (pip install gguf numpy safetensors), undoes llama.cpp's names and row order by
its own rules, and compares: bit for bit what the plan calls lossless, within the type's rounding what it does not.
Without a plan, every block type, F32 and BF16 must be lossless. Exit status 1 where a value differs.
"""

import json
import re
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file

# The largest difference that rounding to a type may make, as a share of the largest magnitude in the tensor.
ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "Q4_K": 0.1, "Q6_K": 0.03, "Q5_0": 0.06, "Q8_0": 0.006}

LLAMA = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
MAMBA = {
    "attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj", "ssm_out": "mixer.out_proj",
}
EXPERTS = {"ffn_gate_exps": ("w1", 0), "ffn_up_exps": ("w3", 1), "ffn_down_exps": ("w2", None)}


def field(reader, key):
    entry = reader.fields.get(key)
    return None if entry is None else entry.contents()


def halves_together(rows, head_dim):
    """Undoes the order in which the halves of each head alternate."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def expected(values, architecture, name, head_dim):
    """What a tensor of the export must hold, and the packed tensors that it comes from."""
    mamba = architecture == "mamba"
    if name == "token_embd.weight":
        source = "backbone.embeddings.weight" if mamba else "model.embed_tokens.weight"
    elif name == "output_norm.weight":
        source = "backbone.norm_f.weight" if mamba else "model.norm.weight"
    elif name == "output.weight":
        source = "lm_head.weight"
    else:
        layer, part, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)(\.\w+)?", name).groups()
        root = f"{'backbone' if mamba else 'model'}.layers.{layer}."
        if part == "ssm_a":
            return -np.exp(values[root + "mixer.A_log"]), [root + "mixer.A_log"]
        if part == "ssm_d":
            return values[root + "mixer.D"], [root + "mixer.D"]
        if part == "ffn_gate_inp":
            names = [root + "block_sparse_moe.gate.weight", root + "mlp.gate.weight"]
            source = next(name for name in names if name in values)
            return values[source], [source]
        if part in EXPERTS:
            single, half = EXPERTS[part]
            stacked = root + ("mlp.experts.down_proj" if half is None else "mlp.experts.gate_up_proj")
            if stacked in values:
                rows = values[stacked]
                return (rows if half is None else np.split(rows, 2, axis=1)[half]), [stacked]
            names = [n for n in values if re.fullmatch(re.escape(root) + rf"block_sparse_moe\.experts\.\d+\.{single}\.weight", n)]
            names.sort(key=lambda name: int(name.split(".experts.")[1].split(".")[0]))
            return np.stack([values[name] for name in names]), names
        source = root + (MAMBA if mamba else LLAMA)[part] + kind
        if part == "ssm_conv1d" and kind == ".bias" and source not in values:
            return None, []
        if part in ("attn_q", "attn_k") and architecture == "llama":
            return alternating(values[source], head_dim), [source]
    return values[source], [source]


def alternating(rows, head_dim):
    """The rows in llama.cpp's order: the inverse of `halves_together`."""
    order = halves_together(np.arange(len(rows)), head_dim)
    moved = np.empty_like(rows)
    moved[order] = rows
    return moved


def main():
    path, values_path = sys.argv[1:3]
    plan = json.load(open(sys.argv[3])) if len(sys.argv) > 3 else None
    fidelity = {tensor["name"]: tensor["fidelity"]["kind"] for tensor in plan["tensors"]} if plan else {}
    reader, values = GGUFReader(path), load_file(values_path)
    architecture = field(reader, "general.architecture")
    head_dim = field(reader, f"{architecture}.attention.key_length")
    exact = rounded = 0
    used, wrong = set(), []
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        if tensor.name == "rope_freqs.weight":
            continue
        wanted, sources = expected(values, architecture, tensor.name, head_dim)
        if wanted is None:
            wanted = np.zeros(shape, np.float32)
        used.update(sources)
        wanted = np.ascontiguousarray(wanted.reshape(shape))
        same = np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
        if plan:
            lossless = all(fidelity[source] == "lossless" for source in sources)
        else:
            lossless = kind != "F16" and tensor.name.rpartition(".")[2] != "ssm_a"
        if lossless and not same:
            wrong.append(f"{tensor.name} ({kind}) differs though it is called lossless")
        error = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        if not lossless and error > (1e-6 if tensor.name.endswith("ssm_a") else ROUNDING[kind]):
            wrong.append(f"{tensor.name} ({kind}) differs by {error:.2g} of its largest value")
        exact, rounded = exact + same, rounded + (not same)
    for name in sorted(set(values) - used):
        wrong.append(f"{name} is in no tensor of the export")
    print(f"{path}: {architecture}, {len(reader.tensors)} tensors, {exact} bit for bit, {rounded} rounded")
    for line in wrong:
        print("wrong:", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
