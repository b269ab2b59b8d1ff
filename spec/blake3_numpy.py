"""BLAKE3 in numpy: unkeyed, 256-bit output. Many chunks are compressed at once, one lane of the arrays each.

After the BLAKE3 paper, https://github.com/BLAKE3-team/BLAKE3-specs.
"""

import numpy as np

IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
CHUNK, BLOCK, LANES = 1024, 64, 1024


def _rotate(x, bits):
    high = x << np.uint32(32 - bits)
    x >>= np.uint32(bits)
    x |= high


def _mix(a, b, c, d, x, y):
    """The quarter round on four columns at once, in place; every argument is [4, n]."""
    for message, first, second in ((x, 16, 12), (y, 8, 7)):
        a += b
        a += message
        d ^= a
        _rotate(d, first)
        c += d
        b ^= c
        _rotate(b, second)


def _compress(cv, block, counter, length, flags):
    """Compresses n blocks: chaining values [8, n] or [8, 1], words [16, n], counters [n] -> chaining values [8, n]."""
    n = block.shape[1]
    v = np.empty((16, n), np.uint32)
    v[0:8] = cv
    v[8:12] = IV[:4, None]
    v[12] = counter & np.uint64(0xFFFFFFFF)
    v[13] = counter >> np.uint64(32)
    v[14], v[15] = length, flags
    a, b, c, d = v[0:4], v[4:8], v[8:12], v[12:16]
    order = list(range(16))
    for _ in range(7):
        m = block[order]
        _mix(a, b, c, d, m[0:8:2], m[1:8:2])
        b, c, d = b[[1, 2, 3, 0]], c[[2, 3, 0, 1]], d[[3, 0, 1, 2]]  # diagonals become columns
        _mix(a, b, c, d, m[8:16:2], m[9:16:2])
        b, c, d = b[[3, 0, 1, 2]], c[[2, 3, 0, 1]], d[[1, 2, 3, 0]]
        order = [order[i] for i in PERMUTATION]
    return np.concatenate([a ^ c, b ^ d])


def _full_chunks(data, first):
    """Chaining values [8, n] of n whole chunks, the first of them number `first`; never the root."""
    n = len(data) // CHUNK
    words = data.view("<u4").reshape(n, 16, 16).transpose(1, 2, 0).astype(np.uint32, order="C")  # [block, word, chunk]
    counter = np.arange(first, first + n, dtype=np.uint64)
    cv = IV[:, None]
    for i in range(16):
        flags = (CHUNK_START if i == 0 else 0) | (CHUNK_END if i == 15 else 0)
        cv = _compress(cv, words[i], counter, BLOCK, flags)
    return cv


def _last_chunk(data, number, root):
    """The chaining value [8, 1] of one chunk of at most 1024 bytes."""
    blocks = max(1, -(-len(data) // BLOCK))
    padded = np.zeros(blocks * BLOCK, np.uint8)
    padded[: len(data)] = data
    words = padded.view("<u4").astype(np.uint32).reshape(blocks, 16, 1)
    counter = np.array([number], np.uint64)
    cv = IV[:, None]
    for i in range(blocks):
        last = i == blocks - 1
        flags = (CHUNK_START if i == 0 else 0) | ((CHUNK_END | root) if last else 0)
        cv = _compress(cv, words[i], counter, len(data) - i * BLOCK if last else BLOCK, flags)
    return cv


def blake3(data) -> str:
    """The unkeyed 256-bit BLAKE3 of some bytes, as 64 lowercase hex digits."""
    data = np.frombuffer(data, np.uint8)
    if len(data) <= CHUNK:
        return _last_chunk(data, 0, ROOT)[:, 0].astype("<u4").tobytes().hex()
    whole = len(data) // CHUNK
    values = [
        _full_chunks(data[first * CHUNK : min(whole, first + LANES) * CHUNK], first) for first in range(0, whole, LANES)
    ]
    if len(data) % CHUNK:
        values.append(_last_chunk(data[whole * CHUNK :], whole, 0))
    cv = np.concatenate(values, axis=1)  # [8, chunks]
    while cv.shape[1] > 1:
        pairs = cv.shape[1] // 2
        block = np.concatenate([cv[:, 0 : 2 * pairs : 2], cv[:, 1 : 2 * pairs : 2]])
        flags = PARENT | (ROOT if cv.shape[1] == 2 else 0)
        parents = _compress(IV[:, None], block, np.zeros(pairs, np.uint64), BLOCK, flags)
        cv = np.concatenate([parents, cv[:, 2 * pairs :]], axis=1)  # an odd one moves up a level as it is
    return cv[:, 0].astype("<u4").tobytes().hex()


# The official vectors: the input is 0, 1, ... 250, 0, 1, ... of each length.
BLAKE3_VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2048: "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
    2049: "5f4d72f40d7a5f82b15ca2b2e44b1de3c2ef86c426c95c1af0b6879522563030",
    31744: "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


def self_test() -> int:
    failed = 0
    for length, digest in BLAKE3_VECTORS.items():
        found = blake3((np.arange(length) % 251).astype(np.uint8).tobytes())
        failed += found != digest
        print(f"{'ok' if found == digest else 'FAILED'}  BLAKE3 of {length} bytes: {found}")
    return 1 if failed else 0
