"""Reading a packed model."""

from __future__ import annotations

import io
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Optional, Union

import numpy as np

from ._errors import BkpackError
from ._native import Packed
from ._work import ProgressArgument, as_callback

# numpy has no BF16: its bits, as they are.
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}

Rows = Union[None, int, slice, "np.ndarray", "list[int]"]


def open(path: Union[str, os.PathLike[str]]) -> Model:
    """Opens a packed file, or a model in shards by its index or the name that it was written under.

    Reads and checks the headers; weights stay on disk until they are touched. `Model.verify` checks them, too.

    Raises `BkpackError` for a file that breaks a rule of the format, `MissingFileError` where there is none.
    """
    return Model(path)


class Model(Mapping):
    """A packed model: a read-only mapping from names to tensors, in natural order of the names.

    Closing it, by `close` or at the end of a `with` block, gives up its memory maps; arrays that were handed out stay
    valid, and keep the map of their file, until they are gone themselves. It can be read from several threads at once.

    The file must not be changed in place while it is open. Replacing it (as bkpack does) is safe.
    """

    def __init__(self, path: Union[str, os.PathLike[str]]):
        self._path = os.fspath(path)
        self._native: Optional[Packed] = Packed.open(self._path)
        self._maps = [_map(self._native, shard) for shard in range(len(self._native.shards()))]
        self._names = {name: None for name in self._native.names()}

    @property
    def path(self) -> str:
        """The path that it was opened by."""
        return self._path

    @property
    def closed(self) -> bool:
        return self._native is None

    def close(self) -> None:
        """Gives up the memory maps; harmless where it is closed already."""
        self._native = None
        self._maps = []

    def __enter__(self) -> Model:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        record = self._open().tensor(name) if name in self._names else None
        if record is None:
            raise KeyError(name)
        return Tensor(self, name, json.loads(record))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} tensors"
        return f"<bkpack.Model {self._path!r}, {state}>"

    # Each model is itself and nothing else, whatever a Mapping says.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @property
    def names(self) -> list[str]:
        """The name of every tensor."""
        return list(self._names)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the file says of itself: producer, source, policy, config, tensors with their hashes, files.

        Of a model in shards it is the first shard's, with the tensors of all.
        """
        self._open()
        manifests = [_manifest(mapped) for mapped in self._maps]
        tensors = [tensor for manifest in manifests for tensor in manifest["tensors"]]
        return {**manifests[0], "tensors": tensors}

    @property
    def config(self) -> Optional[dict[str, Any]]:
        """The model's config.json; `None` where the checkpoint had none."""
        return self.manifest["config"]

    @property
    def files(self) -> list[str]:
        """The names of the files that travel inside (tokenizer.json, ...)."""
        return self._open().files()

    def file(self, name: str) -> bytes:
        """A copy of a file that travels inside; `KeyError` if it has none of this name."""
        found = self._open().read_file(name)
        if found is None:
            raise KeyError(name)
        return found

    @property
    def file_bytes(self) -> int:
        """Bytes on disk, everything counted."""
        return self._open().file_bytes()

    @property
    def parameters(self) -> int:
        """The number of weights; a tied one is stored, and counted, once."""
        return self._open().parameters()

    @property
    def complex_names(self) -> list[str]:
        """The complex tensors: each `X` is stored as the tensors `X.real` and `X.imag`."""
        return self._open().complex_names()

    def complex_values(self, name: str) -> np.ndarray:
        """The values of a complex tensor, as a new complex64 array; `KeyError` if there is none of this name."""
        if name not in self.complex_names:
            raise KeyError(name)
        real = self[f"{name}.real"].dequantize()
        values = np.empty(real.shape, np.complex64)
        values.real = real
        values.imag = self[f"{name}.imag"].dequantize()
        return values

    def verify(self, progress: ProgressArgument = None) -> None:
        """Checks every hash, and every rule that needs a look at the weights; raises `BkpackError` for the first broken.

        `progress` is as in `bkpack.convert`.
        """
        self._open().verify(as_callback(progress))

    def _open(self) -> Packed:
        if self._native is None:
            raise BkpackError(f"{self._path}: is closed")
        return self._native


class Tensor:
    """One tensor of a packed model.

    `codes`, `scale`, `zero_point` and `values` are read-only arrays over the file's memory map: nothing is copied, and
    they stay valid when the model is closed. The format's description says what their bits mean.
    """

    def __init__(self, model: Model, name: str, record: dict[str, Any]):
        self._model = model
        self._record = record
        self.name: str = name
        self.shape: tuple[int, ...] = tuple(record["shape"])
        self.component: str = record["component"]
        """Which part of the model it belongs to (`embedding`, `other`, ...)."""
        self.complex: Optional[str] = record["complex"]
        """`"real"` or `"imaginary"` where it is half of a complex tensor."""
        self.encoding: str = record["encoding_text"]
        """How it is stored, for people: `INT4 g128`, `INT3 asym g64`, `ternary g32`, `FP16`, ..."""
        self.encoding_dict: dict[str, Any] = record["encoding"]
        """How it is stored, as in the manifest: `{"kind": "int", "bits": 4, ...}`."""

    def __repr__(self) -> str:
        return f"<bkpack.Tensor {self.name!r} {list(self.shape)} {self.encoding}>"

    @property
    def size(self) -> int:
        """The number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """The stored arrays by role: `values`, or `packed`, `scale` and (where there are any) `zero_point`."""
        self._model._open()
        return {part["role"]: _array(self._model._maps[part["shard"]], part) for part in self._record["parts"]}

    @property
    def values(self) -> Optional[np.ndarray]:
        """Plain values in the tensor's shape; `None` if it is quantized. BF16, which numpy lacks, comes as the uint16 of
        its bits; `dequantize` makes float32 of it."""
        return self.parts.get("values")

    @property
    def codes(self) -> Optional[np.ndarray]:
        """Packed codes, `[rows, words]` of uint32, or of uint8 for ternary; `None` if it is not quantized."""
        return self.parts.get("packed")

    @property
    def scale(self) -> Optional[np.ndarray]:
        """Scales, `[rows, groups]` of float16 or float32; `None` if it is not quantized."""
        return self.parts.get("scale")

    @property
    def zero_point(self) -> Optional[np.ndarray]:
        """Packed zero points, `[rows, words]` of uint32; `None` if it has none."""
        return self.parts.get("zero_point")

    def dequantize(self, rows: Rows = None, dtype: Any = np.float32) -> np.ndarray:
        """The weights as a new array, computed by the native kernels without the GIL.

        `rows` picks from the first dimension as numpy does (an index, a slice, a list of indices, a mask), and only what
        is picked is computed. Weights are computed in float32 and then converted to `dtype`.
        """
        native = self._model._open()
        if rows is None or len(self.shape) < 2:
            floats = np.frombuffer(native.dequantize(self.name), np.float32).reshape(self.shape)
            floats = floats if rows is None else np.array(floats[rows])
        else:
            picked = np.arange(self.shape[0], dtype=np.uint32)[rows]
            if picked.ndim > 1:
                raise IndexError("rows picks from the first dimension alone")
            shape = picked.shape + self.shape[1:]
            raw = native.dequantize_rows(self.name, np.atleast_1d(picked).tolist())
            floats = np.frombuffer(raw, np.float32).reshape(shape)
        return floats.astype(dtype, copy=False)


def _map(native: Packed, shard: int) -> mmap.mmap:
    """Maps a file of the model, and makes sure that it is the one that was checked."""
    path, length, header_bytes = native.shards()[shard]
    with io.open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(mapped) != length or not native.is_header(shard, mapped[:header_bytes]):
        raise BkpackError(f"{path}: was replaced while it was opened; open it again")
    return mapped


def _array(mapped: mmap.mmap, part: dict[str, Any]) -> np.ndarray:
    """The read-only array of a part; it keeps the map alive."""
    shape = tuple(part["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(mapped, _DTYPES[part["dtype"]], count, part["offset"]).reshape(shape)


def _manifest(mapped: mmap.mmap) -> dict[str, Any]:
    """The manifest in a header whose rules and seal were checked."""
    header = json.loads(mapped[8 : 8 + int.from_bytes(mapped[:8], "little")])
    return json.loads(header["__metadata__"]["bkpack"])
