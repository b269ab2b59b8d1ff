"""Random weights in every encoding, as the CUDA kernels take them, and the numbers they are made of."""

import numpy as np

u32, u64, f32 = np.uint32, np.uint64, np.float32
random = np.random.default_rng(7)


def ceil(a, b):
    return -(-a // b)


def normal(*shape):
    return random.standard_normal(shape).astype(f32)


def pack_stream(codes, bits):
    """[rows, count] codes to little-endian 32-bit words."""
    rows, count = codes.shape
    bit = (codes[:, :, None] >> np.arange(bits)) & 1
    bit = bit.reshape(rows, count * bits).astype(np.uint8)
    bit = np.pad(bit, ((0, 0), (0, -bit.shape[1] % 32)))
    return np.packbits(bit, axis=1, bitorder="little")


def pack_ternary(codes):
    rows, count = codes.shape
    codes = np.pad(codes, ((0, 0), (0, -count % 5))).reshape(rows, -1, 5)
    return (codes * [1, 3, 9, 27, 81]).sum(axis=2).astype(np.uint8)


class Matrix:
    """Random weights in an encoding: their values, and the struct that kernels take."""

    def __init__(self, emulator, encoding, rows, cols, group=None, asymmetric=False, scale="f16", skip_rows=0):
        self.rows, self.cols = rows, cols
        zeros = scales = b""
        groups = zero_bytes = 0
        group = cols if group is None else group
        if encoding in ("f32", "f16", "bf16"):
            values = normal(rows, cols)
            if encoding == "f32":
                codes = values.view(np.uint8)
            elif encoding == "f16":
                half = values.astype(np.float16)
                codes, values = half.view(np.uint8), half.astype(f32)
            else:
                half = (values.view(u32) >> 16).astype(np.uint16)
                codes, values = half.view(np.uint8), (half.astype(u32) << 16).view(f32)
            group = cols
        else:
            groups = ceil(cols, group)
            scales = normal(rows, groups).astype(np.float16 if scale == "f16" else f32)
            s = np.repeat(scales.astype(f32), group, axis=1)[:, :cols]
            if encoding == "ternary":
                code = random.integers(0, 3, (rows, cols))
                codes, level = pack_ternary(code), code - 1
            elif encoding == "binary":
                code = random.integers(0, 2, (rows, cols))
                codes, level = pack_stream(code, 1), 2 * code - 1
            else:
                bits = int(encoding[3:])
                code = random.integers(0, 1 << bits, (rows, cols))
                codes = pack_stream(code, bits)
                if asymmetric:
                    zero = random.integers(0, 1 << bits, (rows, groups))
                    zeros = pack_stream(zero, bits)
                    zero_bytes = zeros.shape[1]
                    level = code - np.repeat(zero, group, axis=1)[:, :cols]
                else:
                    level = code - (1 << (bits - 1))
            values = level.astype(f32) * s
        self.values = values
        codes = codes.reshape(rows, -1)
        self.buffers = [emulator.upload(part) if len(part) else None for part in (codes, scales, zeros)]
        pointers = [buffer.pointer.value if buffer else 0 for buffer in self.buffers]
        sizes = [rows, cols, group, groups, codes.shape[1], zero_bytes]
        # A part of the rows, as where a matrix is split.
        if skip_rows:
            strides = [codes.shape[1], groups * (2 if scale == "f16" else 4), zero_bytes]
            pointers = [pointer + skip_rows * stride if pointer else 0 for pointer, stride in zip(pointers, strides)]
            sizes[0] = self.rows = rows - skip_rows
            self.values = values[skip_rows:]
        self.bytes = np.array(pointers + sizes, u64).tobytes() + np.array([scale == "f16", 0], u32).tobytes()


INTS = [f"int{bits}" for bits in range(2, 9)]
FLOATS = ["f32", "f16", "bf16"]
ENCODINGS = [*FLOATS, *INTS, "ternary", "binary"]


def linear_shapes(encoding):
    yield 19, 61, None, {}
    yield 33, 1100, None, {}
    yield 5, 4133, None, dict(skip_rows=2)
    yield 8, 1280, None, {}
    if encoding not in FLOATS:
        for group in (1, 7, 20, 32, 44, 64, 128, 192, 1000):
            yield 9, 644, group, {}
        yield 6, 5000, 96, dict(scale="f32")
        yield 6, 2048, 128, dict(scale="f32", skip_rows=1)
    if encoding in INTS:
        for group in (3, 32, 64, 333):
            yield 10, 333, group, dict(asymmetric=True)
        yield 7, 4224, 128, dict(asymmetric=True, skip_rows=3)
