"""What the tests share: the repository's fixtures, the command, the independent reader."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
LLAMA = REPOSITORY / "fixtures" / "llama"
TEXT = REPOSITORY / "fixtures" / "wikitext2.test.txt"
VECTORS = REPOSITORY / "spec" / "vectors"

sys.path.insert(0, str(REPOSITORY / "spec"))
import reader  # noqa: E402

# Every kind of encoding, as arguments and as the command's options.
CASES = [
    ({"bits": 2}, "--bits 2"),
    ({"bits": 3, "group_size": 64}, "--bits 3 --group-size 64"),
    ({}, ""),
    ({"bits": 5}, "--bits 5"),
    ({"bits": 6}, "--bits 6"),
    ({"bits": 7, "group_size": "row"}, "--bits 7 --group-size row"),
    ({"bits": 8}, "--bits 8"),
    ({"bits": 4, "asymmetric": True, "group_size": 32}, "--bits 4 --asymmetric --group-size 32"),
    ({"bits": 3, "asymmetric": True, "group_size": 256}, "--bits 3 --asymmetric --group-size 256"),
    ({"bits": 1.58, "group_size": 64}, "--bits 1.58 --group-size 64"),
    ({"bits": 1, "group_size": 32}, "--bits 1 --group-size 32"),
    ({"bits": 16}, "--bits 16"),
    ({"bits": 32}, "--bits 32"),
    ({"tensor": {"mlp": "bf16"}}, "--tensor mlp=bf16"),
]


def command(*arguments, status=0) -> subprocess.CompletedProcess:
    """Runs the command bkpack, which the environment variable BKPACK names."""
    path = os.environ.get("BKPACK") or shutil.which("bkpack")
    if path is None:
        raise RuntimeError("the command bkpack was not found: name it in the environment variable BKPACK")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != status:
        raise AssertionError(f"bkpack {arguments} ended with {done.returncode}: {done.stderr}")
    return done


def write_safetensors(path: Path, arrays: dict) -> None:
    """A plain file of F32 tensors."""
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.astype("<f4").tobytes())


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two float32 arrays are the same, bit for bit."""
    assert left.dtype == right.dtype == np.float32
    return left.shape == right.shape and np.array_equal(
        np.ascontiguousarray(left).view(np.uint32), np.ascontiguousarray(right).view(np.uint32)
    )


class Case(unittest.TestCase):
    """A test with a folder of its own, and Llama packed at 4 bits."""

    @classmethod
    def setUpClass(cls):
        import bkpack

        shared = tempfile.TemporaryDirectory()
        cls.addClassCleanup(shared.cleanup)
        cls.packed = Path(shared.name) / "llama.bkpack"
        bkpack.convert(LLAMA, cls.packed)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
