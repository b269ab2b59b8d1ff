#!/usr/bin/env python3
"""Runs every CUDA kernel on the emulator and compares it with NumPy in double precision.

    kernels/cuda/emulate/build.sh && python3 kernels/cuda/emulate/test.py [FOLDER of libcuda.so.1] [--only NAME]

Needs numpy. Shapes are ragged on purpose; every kernel of every PTX file must have been launched at the end. What it prints
are the largest errors, each relative to the sum of the magnitudes of the terms.
"""

import argparse
import ctypes
import pathlib
import re
import sys

import numpy as np

from matrices import ENCODINGS, FLOATS, Matrix, ceil, f32, linear_shapes, normal, random, u32, u64

HERE = pathlib.Path(__file__).resolve().parent
CUDA = HERE.parent


class Emulator:
    def __init__(self, folder):
        self.driver = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self.launched = set()
        self.functions = {}
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, 100, 0)
        if b"emulator" not in name.value:
            sys.exit("this test is for the emulator")
        for path in sorted((CUDA / "ptx").glob("*.ptx")):
            text = path.read_bytes()
            module = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), text)
            for entry in re.findall(rb"\.entry (\w+)\(", text):
                function = ctypes.c_void_p()
                self.call("cuModuleGetFunction", ctypes.byref(function), module, entry)
                self.functions[entry.decode()] = function

    def call(self, name, *arguments):
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} gives {status}")

    def upload(self, array):
        array = np.ascontiguousarray(array)
        return Buffer(self, array.nbytes, array)

    def room(self, shape, dtype=f32):
        return Buffer(self, int(np.prod(shape)) * np.dtype(dtype).itemsize, None, shape, dtype)

    def launch(self, name, grid, block, *arguments, shared=0):
        """Buffers become pointers, None a null pointer; other arguments are NumPy scalars or bytes."""
        self.launched.add(name)
        grid = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
        values = []
        for argument in arguments:
            if argument is None:
                value = bytes(8)
            elif isinstance(argument, Buffer):
                value = int(argument.pointer.value).to_bytes(8, "little")
            else:
                value = argument if isinstance(argument, bytes) else argument.tobytes()
            values.append(ctypes.create_string_buffer(value, len(value)))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function = self.functions[name]
        if shared > 49152:
            self.call("cuFuncSetAttribute", function, 8, shared)
        self.call("cuLaunchKernel", function, *map(int, grid), int(block), 1, 1, int(shared), None, pointers, None)


class Buffer:
    def __init__(self, emulator, size, array, shape=None, dtype=None):
        self.emulator = emulator
        self.pointer = ctypes.c_uint64()
        emulator.call("cuMemAlloc_v2", ctypes.byref(self.pointer), ctypes.c_size_t(max(size, 1)))
        self.shape, self.dtype = (array.shape, array.dtype) if array is not None else (shape, dtype)
        if array is not None and size:
            emulator.call("cuMemcpyHtoD_v2", self.pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(size))

    def read(self):
        out = np.empty(self.shape, self.dtype)
        if out.nbytes:
            self.emulator.call("cuMemcpyDtoH_v2", out.ctypes.data_as(ctypes.c_void_p), self.pointer, ctypes.c_size_t(out.nbytes))
        return out

    def __del__(self):
        self.emulator.driver.cuMemFree_v2(self.pointer)


errors = {}


def close(name, found, expected, limit, scale=None):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    scale = np.abs(expected) + 1e-30 if scale is None else scale
    if expected.size == 0:
        return
    error = float(np.max(np.abs(found - expected) / scale))
    errors[name] = max(errors.get(name, 0.0), error)
    if not error <= limit:
        at = np.unravel_index(np.nanargmax(np.nan_to_num(np.abs(found - expected) / scale, nan=np.inf)), found.shape)
        sys.exit(f"{name}: error {error} above {limit} at {at}: {found[at]} for {expected[at]}")


def test_linear(gpu):
    for encoding in ENCODINGS:
        for rows, cols, group, options in linear_shapes(encoding):
            w = Matrix(gpu, encoding, rows, cols, group, **options)
            for tokens in (1, 3, 7, 70):
                if tokens == 70 and rows * cols > 25000:
                    continue
                x, bias = normal(tokens, cols), normal(w.rows)
                with_bias = tokens % 2 == 1
                expected = x.astype(np.float64) @ w.values.astype(np.float64).T + (bias if with_bias else 0)
                scale = np.abs(x).astype(np.float64) @ np.abs(w.values).astype(np.float64).T + 1e-6
                x_d, bias_d, out = gpu.upload(x), gpu.upload(bias) if with_bias else None, gpu.room((tokens, w.rows))
                if tokens <= 8:
                    t = 1 if tokens == 1 else 4 if tokens <= 4 else 8
                    gpu.launch(f"gemv_{encoding}_t{t}", ceil(w.rows, 16), 256, w.bytes, x_d, bias_d, out, u32(tokens))
                    close(f"gemv_{encoding}", out.read(), expected, 1e-6, scale)
                if rows * cols < 25000 and encoding not in FLOATS:
                    gpu.launch(f"gemm_plain_{encoding}", (ceil(w.rows, 64), ceil(tokens, 64)), 256, w.bytes, x_d, bias_d, out, u32(tokens))
                    close(f"gemm_plain_{encoding}", out.read(), expected, 2e-6, scale)
                if tokens in (7, 70) and (group is None or group % 32 == 0 or group >= cols):
                    padded = ceil(cols, 64) * 64
                    hi, lo = gpu.room((tokens, padded), np.uint16), gpu.room((tokens, padded), np.uint16)
                    modes = (("exact", 3e-5),) if encoding in FLOATS else (("exact", 3e-5), ("bf16", 2e-2))
                    for mode, limit in modes:
                        low = lo if mode == "exact" else None
                        terms = (hi, lo) if mode == "exact" else (hi,)
                        gpu.launch("split_activations", ceil(tokens * padded // 8, 256), 256, x_d, hi, low, u32(tokens), u32(cols), u32(padded))
                        w_terms = 2 if mode == "exact" and encoding in ("f32", "f16") else 1
                        shared = (2 if mode == "exact" else 1) * 2 * 8192 + w_terms * 16384 + 1024
                        out = gpu.room((tokens, w.rows))
                        gpu.launch(f"gemm_{encoding}_{mode}", (ceil(w.rows, 128), ceil(tokens, 64)), 256, w.bytes, *terms, bias_d, out, u32(tokens), u32(padded), shared=shared)
                        close(f"gemm_{encoding}_{mode}", out.read(), expected, limit, scale)
    # Several tiles of rows and tokens.
    w = Matrix(gpu, "int4", 260, 192, 64)
    x = normal(130, 192)
    x_d, hi, lo, out = gpu.upload(x), gpu.room((130, 192), np.uint16), gpu.room((130, 192), np.uint16), gpu.room((130, 260))
    gpu.launch("split_activations", 3, 256, x_d, hi, lo, u32(130), u32(192), u32(192))
    gpu.launch("gemm_int4_exact", (3, 3), 256, w.bytes, hi, lo, None, out, u32(130), u32(192), shared=50176)
    expected = x.astype(np.float64) @ w.values.astype(np.float64).T
    close("gemm_int4_exact", out.read(), expected, 3e-5, np.abs(x) @ np.abs(w.values).T)
    gpu.launch("gemm_plain_int4", (5, 3), 256, w.bytes, x_d, None, out, u32(130))
    close("gemm_plain_int4", out.read(), expected, 2e-6, np.abs(x) @ np.abs(w.values).T)


def test_chosen(gpu):
    """Experts of one layer in several encodings, each launched for itself; the last choice is no expert."""
    for encoding in ENCODINGS:
        for rows, cols, group, options in linear_shapes(encoding):
            if rows * cols > 13000:
                continue
            other = "int8" if encoding == "f32" else "f32"
            own = [Matrix(gpu, encoding, rows, cols, group, **options) for _ in range(2)]
            rows = own[0].rows
            experts = [(encoding, own[0]), (other, Matrix(gpu, other, rows, cols)), (encoding, own[1])]
            chosen, x, bias = f32([2, 0, 1, np.nan, 3]), normal(5, cols), normal(3, rows)
            bias_d = gpu.upload(bias)
            for shared in (True, False):
                x_d, out = gpu.upload(x), gpu.room((5, rows))
                for name in (encoding, other):
                    table = b""
                    for index, (encoded, w) in enumerate(experts):
                        pointer = bias_d.pointer.value + index * rows * 4 if index != 1 else 0
                        table += (w.bytes if encoded == name else bytes(len(w.bytes))) + u64(pointer).tobytes()
                    table = gpu.upload(np.frombuffer(table, np.uint8))
                    stride = 0 if shared else cols
                    gpu.launch(f"gemv_{name}_chosen", (ceil(rows, 16), 5), 256, table, u32(3), gpu.upload(chosen), x_d, u32(stride), out, u32(rows))
                found = out.read()
                for slot, expert in enumerate((2, 0, 1)):
                    row, values = x[0 if shared else slot].astype(np.float64), experts[expert][1].values.astype(np.float64)
                    expected = values @ row + (bias[expert] if expert != 1 else 0)
                    close(f"gemv_{encoding}_chosen", found[slot], expected, 1e-6, np.abs(values) @ np.abs(row) + 1e-6)
                assert np.isnan(found[3:]).all(), encoding


def test_embed(gpu):
    for encoding in ENCODINGS:
        for rows, cols, group, options in linear_shapes(encoding):
            if rows * cols > 20000:
                continue
            w = Matrix(gpu, encoding, rows, cols, group, **options)
            tokens = random.integers(0, w.rows, 4).astype(u32)
            out = gpu.room((5, cols))
            gpu.launch(f"embed_{encoding}", (5, ceil(cols, 256)), 256, w.bytes, gpu.upload(np.append(tokens, u32(w.rows))), out)
            found = out.read()
            assert found[:4].tobytes() == w.values[tokens].tobytes(), encoding
            assert np.isnan(found[4]).all()
        errors[f"embed_{encoding}"] = 0.0


def test_elementwise(gpu):
    n = 1037
    x, y = normal(n) * 4, normal(n)
    x[:4] = [0, 30, -30, 100]
    d = np.float64

    def run(name, *arguments, block=256):
        buffer = gpu.upload(x)
        gpu.launch(name, 3, block, buffer, *arguments)
        return buffer.read()

    silu = lambda v: v.astype(d) / (1 + np.exp(-v.astype(d)))
    close("silu", run("silu", u64(n)), silu(x), 1e-6, np.abs(silu(x)) + 1e-12)
    close("relu", run("relu", u64(n)), np.maximum(x, 0), 0)
    close("softplus", run("softplus", u64(n)), np.log1p(np.exp(x.astype(d))), 1e-6)
    small = np.minimum(x, 50)
    buffer = gpu.upload(small)
    gpu.launch("negative_exp", 3, 256, buffer, u64(n))
    close("negative_exp", buffer.read(), -np.exp(small.astype(d)), 1e-6)
    close("clamp", run("clamp", u64(n), f32(1.5)), np.clip(x, -1.5, 1.5), 0)
    close("add", run("add", gpu.upload(y), u64(n)), x + y, 0)
    close("add_scaled", run("add_scaled", gpu.upload(y), gpu.upload(f32([0.3])), u64(n)), x.astype(d) + d(f32(0.3)) * y, 1e-6, np.abs(x) + np.abs(y))
    close("silu_multiply", run("silu_multiply", gpu.upload(y), u64(n)), silu(x) * y, 1e-6, np.abs(silu(x) * y) + 1e-12)
    scales = np.abs(y) / 4
    scales[5] = 0
    with np.errstate(all="ignore"):
        expected = np.where(scales == 0, 0, np.clip(np.rint(x / scales), -7, 7).astype(f32) * scales)
    close("round_to_grid", run("round_to_grid", gpu.upload(scales), u64(n), f32(7)), expected, 0)
    matrix = normal(17, 61)
    out = gpu.room((17, 20))
    gpu.launch("copy_columns", 2, 256, gpu.upload(matrix), out, u64(340), u32(61), u32(11), u32(20))
    close("copy_columns", out.read(), matrix[:, 11:31], 0)
    rows = u32([3, 16, 0, 3])
    out = gpu.room((4, 61))
    gpu.launch("gather_rows", 1, 256, gpu.upload(matrix), gpu.upload(rows), out, u64(4 * 61), u32(61))
    close("gather_rows", out.read(), matrix[rows], 0)
    total, weights, part = gpu.upload(matrix), normal(17, 3), normal(4, 61)
    places = u32([[2, 0], [16, 2], [0, 1], [5, 1]])
    gpu.launch("scatter_add", 1, 256, total, gpu.upload(part), gpu.upload(places), gpu.upload(weights), u64(4 * 61), u32(61), u32(3))
    expected = matrix.astype(d)
    expected[places[:, 0]] += weights[places[:, 0], places[:, 1]][:, None].astype(d) * part
    close("scatter_add", total.read(), expected, 1e-6, np.abs(expected) + 1)
    weights, out = normal(17), gpu.room(61)
    gpu.launch("weighted_sum", 1, 256, gpu.upload(weights), gpu.upload(matrix), out, u64(61), u32(17))
    close("weighted_sum", out.read(), weights.astype(d) @ matrix, 1e-6, np.abs(weights) @ np.abs(matrix))


def test_norm(gpu):
    for rows, cols in ((3, 61), (5, 64), (2, 1500), (4, 1)):
        x, gain, bias = normal(rows, cols) + 2, normal(cols), normal(cols)
        block = min(max(ceil(ceil(cols, 4), 32) * 32, 32), 256)
        d = x.astype(np.float64)
        out = gpu.room((rows, cols))
        gpu.launch("rms_norm", rows, block, gpu.upload(x), gpu.upload(gain), out, u32(cols), f32(1e-5))
        expected = d / np.sqrt((d**2).mean(1, keepdims=True) + float(f32(1e-5))) * gain
        close("rms_norm", out.read(), expected, 2e-6, np.abs(expected) + 1e-3)
        gpu.launch("layer_norm", rows, block, gpu.upload(x), gpu.upload(gain), gpu.upload(bias), out, u32(cols), f32(1e-5))
        expected = (d - d.mean(1, keepdims=True)) / np.sqrt(d.var(1, keepdims=True) + float(f32(1e-5))) * gain + bias
        close("layer_norm", out.read(), expected, 5e-6, np.abs(expected) + 1)


def test_rope(gpu):
    tokens, heads, dim = 5, 3, 18
    x, angle = normal(tokens, heads, dim), normal(tokens, dim // 2)
    cos, sin = np.cos(angle), np.sin(angle)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    expected = np.concatenate([a * c - b * s, b * c + a * s], axis=2)
    buffer = gpu.upload(x)
    gpu.launch("rope", 1, 256, buffer, gpu.upload(cos), gpu.upload(sin), u32(tokens), u32(heads), u32(dim))
    close("rope", buffer.read(), expected, 1e-6, 1)


def test_attention(gpu):
    shapes = [(40, 0, 4, 2, 64, 1000), (33, 70, 6, 2, 48, 50), (1, 300, 9, 3, 64, 2**32 - 1), (3, 5, 2, 2, 33, 4), (2, 130, 6, 1, 128, 1000), (1, 0, 1, 1, 7, 1), (5, 90, 2, 1, 256, 100)]
    for tokens, past, heads, kv_heads, dim, window in shapes:
        capacity, positions = past + tokens + 9, past + tokens
        k, v, q = normal(positions, kv_heads, dim), normal(positions, kv_heads, dim), normal(tokens, heads, dim)
        keys = np.full((kv_heads, capacity, dim), np.nan, f32)
        values = keys.copy()
        keys[:, :past], values[:, :past] = k[:past].swapaxes(0, 1), v[:past].swapaxes(0, 1)
        keys, values, past_d = gpu.upload(keys), gpu.upload(values), gpu.upload(u32([past]))
        sizes = u32(tokens), u32(kv_heads), u32(dim), u32(capacity)
        gpu.launch("kv_append", 2, 256, gpu.upload(k[past:]), gpu.upload(v[past:]), keys, values, past_d, *sizes)
        close("kv_append", keys.read()[:, :positions], k.swapaxes(0, 1), 0)
        close("kv_append", values.read()[:, :positions], v.swapaxes(0, 1), 0)
        scale = dim**-0.5
        score = np.einsum("thd,phd->htp", q.astype(np.float64), np.repeat(k, heads // kv_heads, 1).astype(np.float64)) * scale
        position, key = past + np.arange(tokens)[:, None], np.arange(positions)
        score[:, (key > position) | (key + window <= position)] = -np.inf
        p = np.exp(score - score.max(2, keepdims=True))
        p /= p.sum(2, keepdims=True)
        expected = np.einsum("htp,phd->thd", p, np.repeat(v, heads // kv_heads, 1).astype(np.float64))
        arguments = past_d, u32(tokens), u32(heads), u32(kv_heads), u32(dim), u32(capacity), u32(window), f32(scale)
        out = gpu.room((tokens, heads, dim))
        D = ceil(dim, 32) * 32
        gpu.launch("attention_prefill", (ceil(tokens, 32), heads), 256, gpu.upload(q), keys, values, out, *arguments, shared=4 * (64 * (D + 4) + 32 * D + 32 * 36))
        close("attention_prefill", out.read(), expected, 3e-6, 1)
        for splits in (1, 3, 40):
            partial, out = gpu.room((tokens, heads, splits, dim + 2)), gpu.room((tokens, heads, dim))
            grid = (kv_heads * ceil(heads // kv_heads, 4), splits, tokens)
            gpu.launch("attention_decode", grid, 128, gpu.upload(q), keys, values, partial, *arguments, u32(splits))
            gpu.launch("attention_combine", (heads, tokens), 128, partial, out, u32(tokens), u32(heads), u32(dim), u32(splits))
            close("attention_decode", out.read(), expected, 3e-6, 1)


def test_conv(gpu):
    for channels, kernel, pieces in ((37, 4, (5, 1, 2, 9)), (300, 1, (3,)), (5, 7, (2, 2, 12))):
        weight, bias = normal(channels, kernel), normal(channels)
        x = normal(sum(pieces), channels)
        padded = np.concatenate([np.zeros((kernel - 1, channels)), x])
        expected = sum(weight[:, j].astype(np.float64) * padded[j : j + len(x)] for j in range(kernel))
        history = gpu.upload(np.zeros((kernel - 1, channels), f32)) if kernel > 1 else None
        first = 0
        for index, tokens in enumerate(pieces):
            piece, out = gpu.upload(x[first : first + tokens]), gpu.room((tokens, channels))
            sizes = u32(tokens), u32(channels), u32(kernel)
            with_bias = index % 2 == 0
            gpu.launch("depthwise_conv", 2, 256, piece, gpu.upload(weight), gpu.upload(bias) if with_bias else None, history, out, *sizes)
            close("depthwise_conv", out.read(), expected[first : first + tokens] + (bias if with_bias else 0), 2e-6, 5)
            first += tokens
            if history:
                gpu.launch("conv_history", ceil(channels, 256), 256, piece, history, *sizes)
                close("conv_history", history.read(), padded[first : first + kernel - 1], 0, 1)


def test_scan(gpu):
    for channels, states, pieces in ((37, 16, (300, 1, 20)), (64, 5, (17,)), (33, 20, (600, 3))):
        tokens = sum(pieces)
        x, delta = normal(tokens, channels), np.abs(normal(tokens, channels)) * f32(0.3)
        a, b, c, d = -np.abs(normal(channels, states)) * 3, normal(tokens, states), normal(tokens, states), normal(channels)
        h, expected = np.zeros((channels, states)), np.zeros((tokens, channels))
        after = []
        for t in range(tokens):
            step = delta[t, :, None].astype(np.float64)
            h = np.exp(step * a) * h + step * b[t] * x[t, :, None]
            expected[t] = h @ c[t].astype(np.float64) + d * x[t]
            after.append(h)
        for name in ("selective_scan", "selective_scan_step"):
            state, first = gpu.upload(np.zeros((channels, states), f32)), 0
            for piece in pieces:
                rows, out = slice(first, first + piece), gpu.room((piece, channels))
                grid, block = (ceil(channels, 32), 512) if name == "selective_scan" else (ceil(channels, 64), 64)
                inputs = [gpu.upload(v) for v in (x[rows], delta[rows], a, b[rows], c[rows], d)]
                gpu.launch(name, grid, block, *inputs, state, out, u32(piece), u32(channels), u32(states))
                first += piece
                close(name, out.read(), expected[rows], 3e-6, 10)
                close(name, state.read(), after[first - 1], 3e-6, 3)


def test_resolvent(gpu):
    for n, z, spread, pieces in ((1, 1j, 1, (1,)), (70, 1j, 2, (69, 1)), (5000, 1j, 2, (4096, 4, 900)), (2600, 0.4 - 0.1j, 1, (2048, 552)), (300, 1j, 1000, (300,)), (6000, 1e-3j, 1, (6000,))):
        v = (random.uniform(-1.5, 1.5, n) * spread).astype(f32)
        diagonal = v.astype(np.float64) - 2 - complex(f32(z.real), f32(z.imag))
        left, right, ratio = np.zeros(n, complex), np.zeros(n, complex), 0
        for i in range(n):
            left[i] = ratio = 1 / (diagonal[i] - ratio)
        ratio = 0
        for i in reversed(range(n)):
            right[i] = ratio
            ratio = 1 / (diagonal[i] - ratio)
        full = 1 / (diagonal - np.append(0, left[:-1]) - right)
        zs = f32(z.real), f32(z.imag)
        pair = lambda values: np.stack([values.real, values.imag], 1)
        last, first = gpu.upload(np.zeros(2)), 0
        for piece in pieces:
            tiles = ceil(piece, 2048)
            d, maps, starts, out = gpu.upload(v[first : first + piece]), gpu.room((tiles, 8), np.float64), gpu.room((tiles, 2), np.float64), gpu.room((piece, 2))
            gpu.launch("resolvent_tiles", tiles, 256, d, u64(piece), *zs, u32(0), maps)
            gpu.launch("resolvent_carry", 1, 32, maps, u32(tiles), last, starts)
            gpu.launch("resolvent_causal", tiles, 256, d, u64(piece), *zs, starts, out, last)
            close("resolvent_causal", out.read(), pair(left[first : first + piece]), 1e-6, np.abs(left[first : first + piece])[:, None])
            first += piece
            close("resolvent_carry", last.read(), pair(left[first - 1 : first])[0], 1e-9, np.abs(left[first - 1]))
        tiles = ceil(n, 2048)
        d, maps, starts = gpu.upload(v), gpu.room((tiles, 8), np.float64), gpu.room((tiles, 2), np.float64)
        rights, out = gpu.room((n, 2), np.float64), gpu.room((n, 2))
        gpu.launch("resolvent_tiles", tiles, 256, d, u64(n), *zs, u32(1), maps)
        gpu.launch("resolvent_carry", 1, 32, maps, u32(tiles), None, starts)
        gpu.launch("resolvent_right", tiles, 256, d, u64(n), *zs, starts, rights)
        close("resolvent_right", rights.read(), pair(right), 1e-9, np.abs(right)[:, None] + 1e-30)
        gpu.launch("resolvent_tiles", tiles, 256, d, u64(n), *zs, u32(0), maps)
        gpu.launch("resolvent_carry", 1, 32, maps, u32(tiles), None, starts)
        gpu.launch("resolvent_full", tiles, 256, d, u64(n), *zs, starts, rights, out)
        close("resolvent_full", out.read(), pair(full), 1e-6, np.abs(full)[:, None])


def test_route(gpu):
    for tokens, experts, k in ((9, 8, 2), (3, 70, 7), (2, 3, 3), (1, 1, 1)):
        logits = np.rint(normal(tokens, experts) * 2) / 2  # with ties
        if tokens == 9:
            logits[3, 5] = np.nan
            logits[4] = -0.0
            logits[4, 6] = 0.0
        order = np.array([sorted(range(experts), key=lambda i: (np.isnan(row[i]), -row[i], i)) for row in np.nan_to_num(logits, nan=-1e30)])
        chosen, weights = gpu.room((tokens, k)), gpu.room((tokens, k))
        gpu.launch("route", ceil(tokens, 4), 128, gpu.upload(logits), chosen, weights, u32(tokens), u32(experts), u32(k))
        expected = order[:, :k]
        assert (chosen.read() == expected).all()
        top = np.take_along_axis(logits, expected, 1).astype(np.float64)
        p = np.exp(top - top[:, :1])
        close("route", weights.read(), p / p.sum(1, keepdims=True), 1e-6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=CUDA.parent.parent / "target" / "cuda-emulator")
    parser.add_argument("--only")
    options = parser.parse_args()
    gpu = Emulator(options.folder)
    tests = [value for name, value in globals().items() if name.startswith("test_")]
    for test in tests:
        if options.only in (None, test.__name__[5:]):
            test(gpu)
            print(f"{test.__name__[5:]}: as expected", flush=True)
    for name, error in sorted(errors.items()):
        print(f"  {name:24} {error:.1e}")
    if not options.only:
        missed = sorted(gpu.functions.keys() - gpu.launched)
        if missed:
            sys.exit(f"never launched: {', '.join(missed)}")
        print(f"{len(gpu.launched)} kernels agree with NumPy")


if __name__ == "__main__":
    main()
